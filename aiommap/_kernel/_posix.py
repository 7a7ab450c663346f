"""What Linux, macOS and other POSIX systems do the same way."""

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
from collections.abc import Callable

from .._options import Protection
from ._last_place import last_place, search_holding_the_gil
from ._memory import address_of, error_from_errno, foreign
from ._protocol import Scratch

page_size = mmap.PAGESIZE
map_granularity = mmap.ALLOCATIONGRANULARITY
map_file_flushes = False
cuts_mapped_files = True

libc = ctypes.CDLL(None, use_errno=True)
address_t = ctypes.c_void_p
size_t = ctypes.c_size_t

_madvise = foreign(libc, "madvise", ctypes.c_int, address_t, size_t, ctypes.c_int)
_mincore = foreign(libc, "mincore", ctypes.c_int, address_t, size_t, ctypes.c_void_p)
_mlock = foreign(libc, "mlock", ctypes.c_int, address_t, size_t)
_munlock = foreign(libc, "munlock", ctypes.c_int, address_t, size_t)
_memmem = foreign(libc, "memmem", address_t, address_t, size_t, ctypes.c_char_p, size_t)
_memmove = foreign(libc, "memmove", address_t, address_t, address_t, size_t)

_PROT = {
    Protection.READ: mmap.PROT_READ,
    Protection.READ_WRITE: mmap.PROT_READ | mmap.PROT_WRITE,
    Protection.READ_COPY: mmap.PROT_READ | mmap.PROT_WRITE,
    Protection.READ_EXECUTE: mmap.PROT_READ | mmap.PROT_EXEC,
}

_AGAIN_TRIES = 10  # of a madvise that says EAGAIN, before it is believed; out of the air


def unsupported(error: int = errno.ENOSYS) -> OSError:
    """The error for what this platform has no call for."""
    return OSError(error, os.strerror(error))


def works(call: object, *arguments: object) -> bool:
    """Whether the call does without OSError."""
    try:
        call(*arguments)  # type: ignore[operator]
    except OSError:
        return False
    return True


# Files


def duplicate(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)


def set_file_size(fd: int, size: int) -> None:
    os.ftruncate(fd, size)


def reads_directly(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


def free_blocks(fd: int) -> int:
    return os.fstatvfs(fd).f_bavail


def sync_all(fd: int) -> None:
    os.fsync(fd)


def sync_directory(path: str | bytes) -> None:
    sync_directory_with(os.fsync, path)


def sync_directory_with(sync: Callable[[int], None], path: str | bytes) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(fd)
    except OSError as exc:
        # File systems without directory sync say EINVAL; their names need none.
        if exc.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)


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


# Maps


def _flags(protection: Protection) -> int:
    return mmap.MAP_PRIVATE if protection is Protection.READ_COPY else mmap.MAP_SHARED


def map_file(fd: int, length: int, protection: Protection, offset: int) -> mmap.mmap:
    flags, prot = _flags(protection), _PROT[protection]
    if sys.version_info >= (3, 13):
        # The descriptor is ours already; without this the map would keep a second one.
        return mmap.mmap(fd, length, flags=flags, prot=prot, offset=offset, trackfd=False)
    return mmap.mmap(fd, length, flags=flags, prot=prot, offset=offset)


def map_anonymous(length: int, protection: Protection, flags: int = 0) -> mmap.mmap:
    flags |= _flags(protection) | mmap.MAP_ANONYMOUS
    return mmap.mmap(-1, length, flags=flags, prot=_PROT[protection])


# SAFETY: every caller's range is inside its map, which it keeps alive.


def madvise(address: int, length: int, advice: int) -> None:
    if _madvise is None:
        raise unsupported(errno.ENOTSUP)
    refused = 0
    while _madvise(address, length, advice) == -1:
        error = ctypes.get_errno()
        # EAGAIN is also what madvise(2) makes of "no more maps" (vm.max_map_count), and then
        # it does not pass.
        refused += error == errno.EAGAIN
        if error not in (errno.EINTR, errno.EAGAIN) or refused == _AGAIN_TRIES:
            raise OSError(error, os.strerror(error))


def resident(address: int, length: int) -> bytes:
    if _mincore is None:
        raise unsupported()
    vector = ctypes.create_string_buffer(-(-length // page_size))
    if _mincore(address, length, vector) == -1:
        raise error_from_errno()
    return vector.raw


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


def move(destination: int, source: int, length: int) -> None:
    assert _memmove is not None
    _memmove(destination, source, length)


def search(data: Scratch, length: int, needle: bytes, *, last: bool) -> int:
    if _memmem is None:
        return search_holding_the_gil(data, length, needle, last=last)
    memmem = _memmem
    # The export pins the memory, and the places are inside.
    with memoryview(data):
        address = address_of(data)

        def find(start: int, stop: int) -> int:
            found = memmem(address + start, stop - start, needle, len(needle))
            return -1 if not found else found - address - start

        return last_place(find, length, len(needle)) if last else find(0, length)
