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
import fcntl
import mmap
import os
import resource
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from .._options import Advice, Protection
from ._guarded_copy import copy_until_missing
from ._last_place import last_place, search_holding_the_gil
from ._map_registry import MapRegistry
from ._memory import address_of, error_from_errno, foreign
from ._protocol import Buffer, Capabilities, Scratch

page_size = mmap.PAGESIZE
map_granularity = mmap.ALLOCATIONGRANULARITY
map_file_flushes = False
cuts_mapped_files = True

_libc = ctypes.CDLL(None, use_errno=True)
_address = ctypes.c_void_p
_size = ctypes.c_size_t

_msync = foreign(_libc, "msync", ctypes.c_int, _address, _size, ctypes.c_int)
_madvise = foreign(_libc, "madvise", ctypes.c_int, _address, _size, ctypes.c_int)
_mincore = foreign(_libc, "mincore", ctypes.c_int, _address, _size, ctypes.c_void_p)
_mlock = foreign(_libc, "mlock", ctypes.c_int, _address, _size)
_munlock = foreign(_libc, "munlock", ctypes.c_int, _address, _size)
_memmem = foreign(_libc, "memmem", _address, _address, _size, ctypes.c_char_p, _size)
_memmove = foreign(_libc, "memmove", _address, _address, _address, _size)
_raw_write = foreign(_libc, "write", ctypes.c_ssize_t, ctypes.c_int, _address, _size)
_raw_read = foreign(_libc, "read", ctypes.c_ssize_t, ctypes.c_int, _address, _size)

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
_PROT = {
    Protection.READ: mmap.PROT_READ,
    Protection.READ_WRITE: mmap.PROT_READ | mmap.PROT_WRITE,
    Protection.READ_COPY: mmap.PROT_READ | mmap.PROT_WRITE,
    Protection.READ_EXECUTE: mmap.PROT_READ | mmap.PROT_EXEC,
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

# Tries of a call that says EAGAIN before it is believed; out of the air. It is not always
# temporary: madvise says it when the process may not have more maps.
_AGAIN_TRIES = 10

maps = MapRegistry()
"""The maps of files that this process has."""


def unsupported(error: int = errno.ENOSYS) -> OSError:
    """The error for what this platform has no call for."""
    return OSError(error, os.strerror(error))


# Files


def duplicate(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)


def path_of(fd: int) -> str | None:
    return None  # POSIX does not tell


def file_size(fd: int) -> int:
    return os.fstat(fd).st_size


def known_file_size(fd: int) -> int:
    return file_size(fd)


def set_file_size(fd: int, size: int) -> None:
    os.ftruncate(fd, size)


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


def reads_directly(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


def disk_queue(fd: int) -> int:
    return 0


def read_ahead(fd: int) -> int:
    return 128 << 10  # not told; as Linux does by default


def longest_hint(read_ahead: int) -> int:
    return sys.maxsize


def free_blocks(fd: int) -> int:
    return os.fstatvfs(fd).f_bavail


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


def sync_directory(path: str | bytes) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as exc:
        # File systems without directory sync say EINVAL; their names need none.
        if exc.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)


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
    flags = mmap.MAP_PRIVATE if protection is Protection.READ_COPY else mmap.MAP_SHARED
    prot = _PROT[protection]
    if sys.version_info >= (3, 13):
        # The descriptor is ours already; without this the map would keep a second one.
        memory = mmap.mmap(fd, length, flags=flags, prot=prot, offset=offset, trackfd=False)
    else:
        memory = mmap.mmap(fd, length, flags=flags, prot=prot, offset=offset)
    maps.add(fd, memory, offset, writable=protection is Protection.READ_WRITE)
    return memory


def memory_file(length: int, *, huge: bool) -> int | None:
    return None


def map_memory(length: int, protection: Protection, *, stack: bool, huge: bool) -> mmap.mmap:
    # A stack needs nothing special where MAP_STACK is only a hint.
    if huge:
        raise unsupported()
    flags = mmap.MAP_PRIVATE if protection is Protection.READ_COPY else mmap.MAP_SHARED
    return mmap.mmap(-1, length, flags=flags | mmap.MAP_ANONYMOUS, prot=_PROT[protection])


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


def resident(address: int, length: int) -> bytes:
    if _mincore is None:
        raise unsupported()
    vector = ctypes.create_string_buffer(-(-length // page_size))
    if _mincore(address, length, vector) == -1:
        raise error_from_errno()
    return vector.raw


def cached_pages(fd: int, offset: int, length: int) -> int:
    raise unsupported()


# The guarded copy


class _Pipe:
    """
    Carries bytes between two places of our own memory.

    A kernel that finds a page missing while it copies from or to a process says EFAULT and
    does not signal, whatever the call: so ``write`` into a pipe and ``read`` out of it are a
    guarded copy that every POSIX system has. Between two copies the pipe is empty.
    """

    MOST = 1 << 16  # the capacity of a pipe on Linux, and the largest on macOS and FreeBSD

    def __init__(self) -> None:
        self.process = os.getpid()
        self._ends: tuple[int, ...] = ()
        self._ends = os.pipe()
        for end in self._ends:
            os.set_blocking(end, False)

    def __del__(self) -> None:
        for end in self._ends:
            os.close(end)

    def carry(self, destination: int, source: int, length: int) -> int:
        """Copy up to :attr:`MOST` bytes; 0 where the first page, of some or all, is missing."""
        assert _raw_write is not None
        assert _raw_read is not None
        outlet, inlet = self._ends
        # SAFETY: the caller's ranges are inside memory that it keeps alive; a page of it that
        # cannot be touched is EFAULT.
        written = _raw_write(inlet, source, min(length, self.MOST))
        done = 0
        while done < written:
            count = _raw_read(outlet, destination + done, written - done)
            if count <= 0:
                break
            done += count
        if written == -1 or done < written:
            error = ctypes.get_errno()
            # Nothing tells how much is left in the pipe, and the next copy must not find it.
            with suppress(BlockingIOError):
                while os.read(outlet, self.MOST):
                    pass
            if error != errno.EFAULT:
                raise OSError(error, os.strerror(error))
        return done


class _Thread(threading.local):
    """What each thread has of its own."""

    pipe: _Pipe | None = None


_thread = _Thread()


def _own_pipe() -> _Pipe:
    # Nor may a forked child share its parent's: they would get each other's bytes.
    pipe = _thread.pipe
    if pipe is None or pipe.process != os.getpid():
        pipe = _thread.pipe = _Pipe()
    return pipe


def copy(destination: int, source: int, length: int) -> int:
    return copy_until_missing(
        destination, source, length, carry=_own_pipe().carry, most=_Pipe.MOST, page_size=page_size
    )


def copy_many(copies: Sequence[tuple[int, int, int]]) -> bool:
    return False


def move(destination: int, source: int, length: int) -> None:
    assert _memmove is not None
    _memmove(destination, source, length)


def search(data: Scratch, length: int, needle: bytes, *, last: bool) -> int:
    if _memmem is None:
        return search_holding_the_gil(data, length, needle, last=last)
    return search_with(_memmem, data, length, needle, last=last)


def search_with(
    memmem: Callable[..., int], data: Scratch, length: int, needle: bytes, *, last: bool
) -> int:
    """:meth:`Kernel.search` by the C library's ``memmem``, without the GIL."""
    # SAFETY: the export pins the memory, and the places are inside.
    with memoryview(data):
        address = address_of(data)

        def find(start: int, stop: int) -> int:
            found = memmem(address + start, stop - start, needle, len(needle))
            return -1 if not found else found - address - start

        return last_place(find, length, len(needle)) if last else find(0, length)


# Hints


def advise(address: int, length: int, advice: Advice) -> None:
    number = _ADVICE.get(advice)
    if _madvise is None or number is None:
        raise unsupported(errno.ENOTSUP)
    error = errno.EAGAIN
    for _ in range(_AGAIN_TRIES):
        if _madvise(address, length, number) != -1:
            return
        error = ctypes.get_errno()
        if error not in (errno.EINTR, errno.EAGAIN):
            break
    # The range is a good one, so that EINVAL means the advice.
    error = errno.ENOTSUP if error == errno.EINVAL else error
    raise OSError(error, os.strerror(error))


def pin(address: int, length: int) -> None:
    if _mlock is None:
        raise unsupported()
    if _mlock(address, length) == -1:
        raise error_from_errno()


def unpin(address: int, length: int) -> None:
    if _munlock is None:
        raise unsupported()
    if _munlock(address, length) == -1:
        raise error_from_errno()


def pin_limit() -> int | None:
    kind: int | None = getattr(resource, "RLIMIT_MEMLOCK", None)
    if kind is None:
        return None
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


# What works here, found by trying


def works(call: object, *arguments: object) -> bool:
    """Whether the call does without OSError."""
    try:
        call(*arguments)  # type: ignore[operator]
    except OSError:
        return False
    return True


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


def can_reserve(path: str | bytes | None, call: Callable[..., bool]) -> bool:
    """Tried on a file of our own beside ``path``: to reserve is to change."""
    folder: str | bytes | None = None
    if path is not None:
        os.stat(path)
        folder = path if os.path.isdir(path) else os.path.dirname(os.path.realpath(path))
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return call(file.fileno(), 0, page_size, grow=True)
    except OSError:
        return False
