"""What the kernel tests see with: files, the kernel's own books, C functions that fail."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiommap._kernel import _linux

PAGE = mmap.PAGESIZE


class OpenFile:
    """A file of four pages, each full of its number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(b"".join(bytes([number]) * PAGE for number in range(4)))
        self.fd = os.open(path, os.O_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self.fd)


def maps_flags(address: int) -> str:
    """Permissions of the map at an address, and ``s`` or ``p``, by the kernel's own books."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, flags = line.split()[:2]
        start, stop = (int(number, 16) for number in span.split("-"))
        if start <= address < stop:
            return flags
    raise AssertionError(f"nothing is mapped at {address:#x}")


def smaps(address: int) -> dict[str, str]:
    """What /proc/self/smaps says about the map at an address."""
    found: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, value = line.partition(" ")
        if not key.endswith(":"):
            start, stop = (int(number, 16) for number in key.split("-"))
            inside = start <= address < stop
        elif inside:
            found[key[:-1]] = value.strip()
    return found


def outcome(call: Callable[..., object], *arguments: object) -> int:
    """The errno that a call raises, or 0."""
    try:
        call(*arguments)
    except OSError as exc:
        return exc.errno or -1
    return 0


def closed_descriptor() -> int:
    """A number that no descriptor has."""
    fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    return fd


def pattern(length: int, seed: int = 7) -> bytes:
    """Bytes in which every page differs from every other."""
    period = bytes((seed * number * number + number) % 251 for number in range(65_521))
    return (period * (length // len(period) + 1))[:length]


class Answers:
    """A C function that answers with these errnos in turn (0: well), the last one for ever."""

    def __init__(self, *errors: int) -> None:
        self.errors = list(errors)
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *arguments: Any) -> int:
        self.calls.append(arguments)
        error = self.errors.pop(0) if len(self.errors) > 1 else self.errors[0]
        ctypes.set_errno(error)
        return -1 if error else 0


KERNEL_ALONE = f"""
import sys, types
package = types.ModuleType("aiommap")
package.__path__ = [{str(Path(_linux.__file__).parents[1])!r}]
sys.modules["aiommap"] = package
"""
"""Lets a program import the kernel layer without what is built on it."""


def run_python(script: str) -> str:
    """What a program prints, in a process of its own; an error of it is one here."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", KERNEL_ALONE + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
