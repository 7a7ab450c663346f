"""What the kernel says about pages: faults of a thread, residency, dirt; and making pages cold."""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError("Linux only")

import contextlib
import ctypes
import mmap
import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .heartbeat import Heartbeat as Heartbeat
from .heartbeat import heartbeat as heartbeat

PAGE = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_uint]
_libc.syscall.restype = ctypes.c_long

_MAP_FAILED = ctypes.c_void_p(-1).value
_MADV_DONTNEED = 4
_SYNC_FILE_RANGE_WRITE = 2
_SYNC_FILE_RANGE_AND_WAIT = 1 | 2 | 4
_CACHESTAT = 451
"""The same number on every architecture."""


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def major_faults_of_this_thread() -> int:
    """Page faults of the calling thread that had to wait for a disk, since it started."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt


@contextlib.contextmanager
def _fresh_map(descriptor: int, offset: int, length: int) -> Iterator[int]:
    """Map a range without touching it, and give the address."""
    address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, offset)
    if address == _MAP_FAILED:
        _check(-1)
    try:
        yield address
    finally:
        _check(_libc.munmap(address, length))


def _pages(descriptor: int, offset: int, length: int | None) -> tuple[int, int]:
    """The page-aligned range around a range; ``length`` None goes to the end of the file."""
    end = os.fstat(descriptor).st_size if length is None else offset + length
    start = offset // PAGE * PAGE
    return start, -(-(end - start) // PAGE) * PAGE


def residency(descriptor: int, offset: int = 0, length: int | None = None) -> list[bool]:
    """For each page of a range whether it is in the page cache, by mincore on a map of its own.

    The caller must own the file or may write it; to others the kernel says "all of it".
    """
    start, length = _pages(descriptor, offset, length)
    if length <= 0:
        return []
    vector = ctypes.create_string_buffer(length // PAGE)
    with _fresh_map(descriptor, start, length) as address:
        _check(_libc.mincore(address, length, vector))
    return [bool(byte & 1) for byte in vector.raw]


def resident_pages(descriptor: int, length: int | None = None, offset: int = 0) -> int:
    """How many pages of a range are in the page cache."""
    return sum(residency(descriptor, offset, length))


@dataclass(frozen=True)
class CachedPages:
    """The answer of cachestat(2), in pages."""

    cached: int
    """Also pages whose read is still in flight."""
    dirty: int
    in_write_back: int
    evicted: int
    recently_evicted: int


def cached_pages(descriptor: int, offset: int = 0, length: int = 0) -> CachedPages:
    """What the page cache has of a range; ``length`` 0 goes to the end of the file.

    :raises OSError: ENOSYS or EPERM before Linux 6.5 and in some containers
    """
    area = (ctypes.c_uint64 * 2)(offset, length)
    answer = (ctypes.c_uint64 * 5)()
    _check(_libc.syscall(ctypes.c_long(_CACHESTAT), descriptor, area, answer, 0))
    return CachedPages(*answer)


def dirty_pages(descriptor: int, offset: int = 0, length: int = 0) -> int:
    """How many pages of a range wait to be written, without those that are being written."""
    return cached_pages(descriptor, offset, length).dirty


def write_back(descriptor: int, offset: int = 0, length: int = 0, *, wait: bool = True) -> None:
    """Write a range to the disk by sync_file_range: without metadata, without a device flush.

    The classic mistake, and so the negative control of every proof of durability.
    """
    flags = _SYNC_FILE_RANGE_AND_WAIT if wait else _SYNC_FILE_RANGE_WRITE
    _check(_libc.sync_file_range(descriptor, offset, length, flags))


def _unmap_pages_here(status: os.stat_result) -> None:
    """Take a file's pages out of the page tables of this process: mapped pages are not evicted.

    Only shared maps: they lose nothing by it, whereas private ones would lose what they changed.
    """
    # By inode alone, because btrfs shows another device number in the maps than in stat. Another
    # file that happens to have the same number takes a few faults more, and no harm.
    entry = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ..(.)(.) [0-9a-f]+ \S+ (\d+) +(/.*)")
    for line in Path("/proc/self/maps").read_text().splitlines():
        match = entry.fullmatch(line)
        if match is None or int(match[5]) != status.st_ino or match[4] != "s":
            continue
        start, end = int(match[1], 16), int(match[2], 16)
        _check(_libc.madvise(start, end - start, _MADV_DONTNEED))


def evict(file: int | str | os.PathLike[str]) -> None:
    """Make all pages of a file on a real disk cold: write them, then drop them from the page cache.

    Pages that another process has mapped stay, as do all pages on tmpfs, which has no disk. A file
    of the FUSE rig has a stronger :meth:`~.fuse_client.ServedFile.evict`.

    :param file: a descriptor or a path
    :raises RuntimeError: pages stayed
    """
    if not isinstance(file, int):
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        try:
            evict(descriptor)
        finally:
            os.close(descriptor)
        return
    os.fsync(file)
    left = 0
    for _ in range(3):  # a page that is being looked at by the kernel just now is skipped
        _unmap_pages_here(os.fstat(file))
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        left = resident_pages(file)
        if not left:
            return
    raise RuntimeError(f"{left} pages could not be evicted: on tmpfs, or mapped by another process")
