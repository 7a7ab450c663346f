"""Files, maps and processes with nothing but the kernel's own calls: what the rigs are tested with.

Controls of other tests use them too.
"""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError("Linux only")

import contextlib
import mmap
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_PROJECT = Path(__file__).parents[2]


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def mapped(descriptor: int) -> Iterator[mmap.mmap]:
    """A shared writable map that reads only the pages it touches."""
    with mmap.mmap(descriptor, 0) as pages:
        pages.madvise(mmap.MADV_RANDOM)
        yield pages


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run_child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, which may die."""
    return subprocess.run(
        [sys.executable, "-S", "-c", code, *map(str, arguments)],
        cwd=_PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


TOUCH = """\
import mmap, os, sys
path, offset, value = sys.argv[1], int(sys.argv[2]), sys.argv[3]
pages = mmap.mmap(os.open(path, os.O_RDWR), 0)
if value == "read":
    pages[offset]
else:
    pages[offset] = int(value)
"""
"""For :func:`run_child`: read or set a byte of a file through a map, which may be SIGBUS.

Arguments: the path, the offset, and ``read`` or the byte."""


def make_durable(path: Path, data: bytes) -> None:
    """A new file, with all that durability takes."""
    with opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
        os.pwrite(descriptor, data, 0)
        os.fsync(descriptor)
    with opened(path.parent, os.O_RDONLY) as directory:
        os.fsync(directory)
