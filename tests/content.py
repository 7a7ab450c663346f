"""What tests put into files, and how they look at them without a map of ours."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from anyio import CapacityLimiter, to_thread


def inc(n: int, start: int = 0) -> bytes:
    """The ``n`` bytes ``i % 256`` from ``start`` on; INC(n) of the conformance page."""
    first = start % 256
    cycle = bytes(range(256))
    return (cycle * (-(-(n + first) // 256)))[first : first + n]


def zeros(n: int) -> bytes:
    """Z(n) of the conformance page."""
    return bytes(n)


def file_of(folder: Path, data: bytes | int, name: str = "data.bin") -> Path:
    """A file with this content, or of that many zero bytes (sparse)."""
    path = folder / name
    if isinstance(data, int):
        with open(path, "wb") as file:
            os.truncate(file.fileno(), data)
    else:
        path.write_bytes(data)
    return path


def open_descriptors() -> set[str]:
    """What this process's descriptors refer to, with their numbers."""
    result = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            result.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:  # the listing's own
            continue
    return result


def settled_descriptors() -> set[str]:
    """As :func:`open_descriptors`, once what earlier tests have left to the collector is gone."""
    gc.collect()
    return open_descriptors()


def maps_of(path: os.PathLike[str]) -> int:
    """How many memory areas of this process are of that file."""
    with open("/proc/self/maps", encoding="utf-8") as file:
        return sum(line.rstrip("\n").endswith(str(path)) for line in file)


def file_descriptors(path: Path) -> list[str]:
    """This process's descriptors of that file."""
    return [each for each in open_descriptors() if str(path) in each]


async def gone(path: Path) -> None:
    """Wait until threads have let go of a file."""
    for _ in range(10_000):
        if not file_descriptors(path) and not maps_of(path):
            return
        await to_thread.run_sync(lambda: None)
    raise AssertionError(f"{path} is still open: {file_descriptors(path)}, {maps_of(path)} maps")


async def at_rest(limiter: CapacityLimiter) -> None:
    """Wait until all threads have handed their tokens back, those of what was abandoned too."""
    for _ in range(10_000):
        if limiter.borrowed_tokens == 0:
            return
        await to_thread.run_sync(lambda: None)
    raise AssertionError("a token of the limiter did not come back")


only_linux = pytest.mark.skipif(
    not os.path.exists("/proc/self/maps"), reason="looks at Linux's own books in /proc"
)
