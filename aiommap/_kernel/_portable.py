"""Any POSIX system: the standard library, and the few C functions that all of them have.

What the standard library does well without the GIL comes from there. The rest is ``msync``,
``madvise``, ``mlock`` and their like through ``ctypes.CDLL``, which releases the GIL where the
methods of :class:`mmap.mmap` hold it; where a system lacks one, or where we do not know its
flags, the standard library does it all the same, holding the GIL.

Not known here, and answered so that the caller takes the careful way: whether a page can be
populated (no), whether a read would wait (cannot tell), whether a file is in memory (no).

Used as it is by systems without a file of their own; :mod:`._darwin` takes from here what macOS
does the same way. It also works on Linux, where the conformance tests run it.
"""

from __future__ import annotations

import sys

assert sys.platform != "win32"

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Sequence

from .._options import Advice, Protection
from ._map_registry import MapRegistry
from ._memory import address_of, error_from_errno, foreign
from ._pipe_copy import copy as copy
from ._posix import (
    address_t,
    can_reserve,
    libc,
    madvise,
    map_anonymous,
    size_t,
    unsupported,
    works,
)
from ._posix import cuts_mapped_files as cuts_mapped_files
from ._posix import duplicate as duplicate
from ._posix import free_blocks as free_blocks
from ._posix import map_file as map_descriptor
from ._posix import map_file_flushes as map_file_flushes
from ._posix import map_granularity as map_granularity
from ._posix import move as move
from ._posix import page_size as page_size
from ._posix import pin as pin
from ._posix import pin_limit as pin_limit
from ._posix import reads_directly as reads_directly
from ._posix import resident as resident
from ._posix import search as search
from ._posix import set_file_size as set_file_size
from ._posix import sync_directory as sync_directory
from ._posix import unpin as unpin
from ._protocol import Buffer, Capabilities

_msync = foreign(libc, "msync", ctypes.c_int, address_t, size_t, ctypes.c_int)

# MS_ASYNC and MS_SYNC from each system's <sys/mman.h>; POSIX fixes the names only, and the mmap
# module does not have them.
_MSYNC_FLAGS = {
    "aix": (0x10, 0x20),
    "darwin": (1, 0x10),
    "dragonfly": (1, 0),
    "freebsd": (1, 0),
    "linux": (1, 4),
    "netbsd": (1, 4),
    "sunos": (1, 4),
}.get(sys.platform.rstrip("0123456789"))

# These the mmap module has, as far as the system knows them.
_ADVICE_NAMES = {
    Advice.NORMAL: ("MADV_NORMAL",),
    Advice.RANDOM: ("MADV_RANDOM",),
    Advice.SEQUENTIAL: ("MADV_SEQUENTIAL",),
    Advice.WILL_NEED: ("MADV_WILLNEED",),
    Advice.COLD: ("MADV_COLD",),
    Advice.PAGE_OUT: ("MADV_PAGEOUT",),
    Advice.HUGE_PAGE: ("MADV_HUGEPAGE",),
    Advice.NO_HUGE_PAGE: ("MADV_NOHUGEPAGE",),
    Advice.DONT_FORK: ("MADV_DONTFORK",),
    Advice.DO_FORK: ("MADV_DOFORK",),
    Advice.DONT_DUMP: ("MADV_DONTDUMP", "MADV_NOCORE"),
    Advice.DO_DUMP: ("MADV_DODUMP", "MADV_CORE"),
    Advice.MERGEABLE: ("MADV_MERGEABLE",),
    Advice.UNMERGEABLE: ("MADV_UNMERGEABLE",),
}
_ADVICE: dict[Advice, int] = {
    advice: getattr(mmap, name)
    for advice, names in _ADVICE_NAMES.items()
    for name in names
    if hasattr(mmap, name)
}
_UNSUPPORTED = (
    errno.EINVAL,
    errno.ENODEV,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.ENOTTY,
    errno.EOPNOTSUPP,
)

# A single preadv of more than INT_MAX bytes is EINVAL on macOS; a power of two below it.
_READ_MOST = 1 << 30

maps = MapRegistry()
"""The maps of files that this process has."""


# Files


def reopen(fd: int) -> int | None:
    return None  # where /dev/fd opens anything it mostly duplicates


def path_of(fd: int) -> str | None:
    return None  # POSIX does not tell


def file_size(fd: int) -> int:
    return os.fstat(fd).st_size


def known_file_size(fd: int) -> int:
    return file_size(fd)


def reserve(fd: int, offset: int, length: int, *, grow: bool) -> bool:
    if length == 0:
        return True
    allocate: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)
    if allocate is None:
        return False
    size = file_size(fd)
    inside = length
    if not grow:
        # posix_fallocate makes the file reach the end of its range; there is no other kind. A
        # file that is cut between these two lines grows back to what it was.
        inside = min(length, size - offset)
        if inside <= 0:
            return False
    try:
        allocate(fd, offset, inside)
    except OSError as exc:
        if exc.errno in _UNSUPPORTED:
            return False
        raise
    return inside == length


def file_is_in_memory(fd: int) -> bool:
    # POSIX does not tell. In doubt it is not: then nobody stores on the event loop.
    return False


def disk_queue(fd: int) -> int:
    return 0


def read_ahead(fd: int) -> int:
    return 128 << 10  # not told; as Linux does by default


def longest_hint(read_ahead: int) -> int:
    return sys.maxsize


_sync_descriptor: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)


def hand_over(fd: int) -> None:
    """Give the file what this process stored through its maps; waits for the writes."""
    for found in maps.of_file(fd):
        if found.writable:
            msync(found.address, found.length, wait=True)


def sync_data(fd: int) -> None:
    hand_over(fd)
    _sync_descriptor(fd)


def sync_all(fd: int) -> None:
    hand_over(fd)
    os.fsync(fd)


def start_write_back(fd: int, address: int, offset: int, length: int) -> None:
    if length:
        msync(address, length, wait=False)


def write_back(fd: int, address: int, offset: int, length: int) -> None:
    if length and _MSYNC_FLAGS is not None:
        msync(address, length, wait=True)


# Reading without a map


def read(fd: int, buffers: Sequence[Buffer], offset: int) -> int:
    buffers = _at_most(buffers, _READ_MOST)
    if hasattr(os, "preadv"):
        return os.preadv(fd, buffers, offset)
    total = 0
    for buffer in buffers:
        data = os.pread(fd, len(buffer), offset + total)
        memoryview(buffer)[: len(data)] = data
        total += len(data)
        if len(data) < len(buffer):
            break
    return total


def _at_most(buffers: Sequence[Buffer], most: int) -> Sequence[Buffer]:
    if sum(map(len, buffers)) <= most:
        return buffers
    fitting: list[Buffer] = []
    for buffer in buffers:
        fitting.append(memoryview(buffer)[:most])
        most -= len(fitting[-1])
        if most == 0:
            break
    return fitting


def read_nowait(fd: int, buffers: Sequence[Buffer], offset: int) -> int:
    raise unsupported(errno.EOPNOTSUPP)


def will_need(fd: int, offset: int, length: int) -> None:
    advise_file: Callable[[int, int, int, int], None] | None
    advise_file = getattr(os, "posix_fadvise", None)
    if advise_file is None or length == 0:  # a length of 0 would be the rest of the file
        return
    try:
        advise_file(fd, offset, length, getattr(os, "POSIX_FADV_WILLNEED", 3))
    except OSError:
        return  # a hint; the read that follows has the error


# Maps


def map_file(fd: int, length: int, protection: Protection, offset: int) -> mmap.mmap:
    memory = map_descriptor(fd, length, protection, offset)
    maps.add(fd, memory, offset, writable=protection is Protection.READ_WRITE)
    return memory


def memory_file(length: int, *, huge: bool) -> int | None:
    return None


def map_memory(length: int, protection: Protection, *, stack: bool, huge: bool) -> mmap.mmap:
    # A stack needs nothing special where MAP_STACK is only a hint.
    if huge:
        raise unsupported()
    return map_anonymous(length, protection)


def msync(address: int, length: int, *, wait: bool) -> None:
    """Write the range's stores to its file; ``wait`` until they are written."""
    if _msync is None or _MSYNC_FLAGS is None:
        if wait:
            _flush_holding_the_gil(address, length)
        return
    # SAFETY: the caller's range is inside its map, which it keeps alive. Same below.
    while _msync(address, length, _MSYNC_FLAGS[wait]) == -1:
        if ctypes.get_errno() != errno.EINTR:
            raise error_from_errno()


def _flush_holding_the_gil(address: int, length: int) -> None:
    # The mmap module was compiled with the flags that we do not know here.
    found = maps.at(address)
    if found is not None:
        found.memory.flush(address - found.address, length)


def sync_range(address: int, length: int) -> None:
    msync(address, length, wait=True)
    found = maps.at(address)
    if found is not None:
        # The size needed to read it, and what msync may have left in a cache.
        _sync_descriptor(found.fd)


def populate_read(address: int, length: int) -> None:
    raise unsupported()


def populate_write(address: int, length: int) -> None:
    raise unsupported()


def will_need_many(spans: Sequence[tuple[int, int]]) -> bool:
    return False


def populate_many(spans: Sequence[tuple[int, int]], *, write: bool) -> bool:
    return False


def cached_pages(fd: int, offset: int, length: int) -> int:
    raise unsupported()


def copy_many(copies: Sequence[tuple[int, int, int]]) -> bool:
    return False


# Hints


def advise(address: int, length: int, advice: Advice) -> None:
    number = _ADVICE.get(advice)
    if number is None:
        raise unsupported(errno.ENOTSUP)
    try:
        madvise(address, length, number)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        # The range is a good one, so that it means the advice.
        raise unsupported(errno.ENOTSUP) from None


# What works here, found by trying


def capabilities(path: str | bytes | None) -> Capabilities:
    with mmap.mmap(-1, page_size) as memory:
        mincore = works(resident, address_of(memory), page_size)
    return Capabilities(
        populate=False,
        nowait_reads=False,
        cachestat=False,
        mincore=mincore,
        # On Linux, where the tests run this file, MS_ASYNC does nothing.
        write_back_start=_MSYNC_FLAGS is not None and sys.platform != "linux",
        full_sync=False,  # POSIX leaves open how far fsync goes, and nothing tells
        huge_pages=False,
        ofd_locks=False,
        reserve=can_reserve(path, reserve),
        page_size=page_size,
    )
