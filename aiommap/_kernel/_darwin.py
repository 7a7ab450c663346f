"""macOS. What is special about it; the rest is as on any POSIX system.

Constants and structures are those of Apple's <sys/fcntl.h>. ``fcntl`` is called through the
standard library: it takes a variable number of arguments, which ctypes would pass in the wrong
place on ARM, and it releases the GIL.

* ``fsync`` stops at the disk's cache; ``fcntl(F_FULLFSYNC)`` goes on to the medium (fsync(2)).
  Neither need know of stores through a map, so ``msync`` comes first.
* ``mmap.mmap()`` itself does a F_FULLFSYNC of the file, holding the GIL and dropping the error
  (Modules/mmapmodule.c, "Issue #11277"). :func:`map_file` does one before it, without the GIL,
  so that there is little left to wait for, and with the error where stores are meant to reach
  the file; the rest is CPython's.
* ``mach_vm_read_overwrite`` on ourselves is no guarded copy: from some size on it shares pages
  copy-on-write instead of touching them, and the fault comes with the first use of the copy.
  The pipe of :mod:`._pipe_copy` touches them all.
* There is no ``fallocate``: F_PREALLOCATE adds blocks behind the last one, and cannot fill
  holes.
"""

from __future__ import annotations

import sys

assert sys.platform == "darwin"

import errno
import fcntl
import mmap
import os
import struct

from .._options import Protection
from . import _portable
from ._memory import address_of
from ._pipe_copy import copy as copy
from ._portable import advise as advise
from ._portable import cached_pages as cached_pages
from ._portable import copy_many as copy_many
from ._portable import disk_queue as disk_queue
from ._portable import file_is_in_memory as file_is_in_memory
from ._portable import file_size as file_size
from ._portable import hand_over, maps, msync
from ._portable import known_file_size as known_file_size
from ._portable import longest_hint as longest_hint
from ._portable import map_memory as map_memory
from ._portable import memory_file as memory_file
from ._portable import path_of as path_of
from ._portable import populate_many as populate_many
from ._portable import populate_read as populate_read
from ._portable import populate_write as populate_write
from ._portable import read as read
from ._portable import read_ahead as read_ahead
from ._portable import read_nowait as read_nowait
from ._portable import reopen as reopen
from ._portable import start_write_back as start_write_back
from ._portable import will_need_many as will_need_many
from ._portable import write_back as write_back
from ._posix import can_reserve, sync_directory_with, works
from ._posix import cuts_mapped_files as cuts_mapped_files
from ._posix import duplicate as duplicate
from ._posix import free_blocks as free_blocks
from ._posix import map_granularity as map_granularity
from ._posix import move as move
from ._posix import page_size as page_size
from ._posix import pin as pin
from ._posix import pin_limit as pin_limit
from ._posix import reads_directly as reads_directly
from ._posix import resident as resident
from ._posix import search as search
from ._posix import set_file_size as set_file_size
from ._posix import unpin as unpin
from ._protocol import Capabilities

map_file_flushes = True

_F_PREALLOCATE = 42
_F_RDADVISE = 44
_F_FULLFSYNC = 51
_F_OFD_GETLK = 92
_F_ALLOCATECONTIG = 2
_F_ALLOCATEALL = 4
_F_PEOFPOSMODE = 3
_F_RDLCK = 1

# struct fstore: flags, position mode, offset, length, bytes allocated (out).
_FSTORE = struct.Struct("@Iiqqq")
# struct radvisory: offset, count, padding.
_RADVISORY = struct.Struct("@qi4x")
# struct flock: start, length, pid, type, whence.
_FLOCK = struct.Struct("@qqihh")

_INT_MAX = 2**31 - 1
_STAT_BLOCK = 512  # unit of st_blocks (stat(2))

# What file systems without F_FULLFSYNC or F_PREALLOCATE say: ENOTSUP on SMB
# (https://github.com/golang/go/issues/64215), EINVAL on FUSE
# (https://github.com/macfuse/macfuse/issues/79), ENOTTY on others.
_UNSUPPORTED = (
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.ENOTTY,
    errno.EOPNOTSUPP,
)


# Durability


def _full_sync(fd: int) -> None:
    try:
        fcntl.fcntl(fd, _F_FULLFSYNC)
    except OSError as exc:
        if exc.errno not in _UNSUPPORTED:
            raise
        # As far as such a file system goes; SQLite, Go and libuv do the same.
        os.fsync(fd)


def sync_data(fd: int) -> None:
    hand_over(fd)
    _full_sync(fd)


def sync_all(fd: int) -> None:
    # F_FULLFSYNC has no half that leaves metadata out.
    sync_data(fd)


def sync_directory(path: str | bytes) -> None:
    sync_directory_with(_full_sync, path)


def sync_range(address: int, length: int) -> None:
    msync(address, length, wait=True)
    found = maps.at(address)
    if found is not None:
        _full_sync(found.fd)


# Files


def reserve(fd: int, offset: int, length: int, *, grow: bool) -> bool:
    if length == 0:
        return True
    status = os.fstat(fd)
    allocated = status.st_blocks * _STAT_BLOCK
    if allocated < status.st_size and offset < status.st_size:
        return False  # it has holes, or is compressed, and nothing fills a hole in place
    end = offset + length
    missing = end - max(allocated, status.st_size)
    if missing > 0 and not _preallocate(fd, missing):
        return False
    if grow and end > file_size(fd):
        # There is no call that only grows: a file that somebody else makes longer between
        # these two lines is cut to `end` again.
        os.ftruncate(fd, end)
    return True


def _preallocate(fd: int, length: int) -> bool:
    # Counted from the physical end of the file; the offset must be 0 in this mode. In one
    # piece if there is one, else in several; all of it or nothing.
    for flags in (_F_ALLOCATECONTIG | _F_ALLOCATEALL, _F_ALLOCATEALL):
        try:
            fcntl.fcntl(fd, _F_PREALLOCATE, _FSTORE.pack(flags, _F_PEOFPOSMODE, 0, length, 0))
        except OSError as exc:
            if exc.errno in _UNSUPPORTED:
                return False
            if not flags & _F_ALLOCATECONTIG:
                raise
        else:
            return True
    return False


def will_need(fd: int, offset: int, length: int) -> None:
    while length > 0:
        count = min(length, _INT_MAX)
        try:
            fcntl.fcntl(fd, _F_RDADVISE, _RADVISORY.pack(offset, count))
        except OSError:
            return  # a hint; the read that follows has the error
        offset += count
        length -= count


# Maps


def map_file(fd: int, length: int, protection: Protection, offset: int) -> mmap.mmap:
    try:
        _full_sync(fd)
    except OSError:
        # Through other maps no store reaches the file, and what cannot be flushed can still be
        # read: HFS says EROFS of every file on a read-only volume.
        if protection is Protection.READ_WRITE:
            raise
    return _portable.map_file(fd, length, protection, offset)


# What works here, found by trying


def capabilities(path: str | bytes | None) -> Capabilities:
    with mmap.mmap(-1, page_size) as memory:
        mincore = works(resident, address_of(memory), page_size)
    fd = os.open(os.curdir if path is None else path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        full_sync = works(fcntl.fcntl, fd, _F_FULLFSYNC)
        ofd_locks = works(fcntl.fcntl, fd, _F_OFD_GETLK, _FLOCK.pack(0, 0, 0, _F_RDLCK, 0))
    finally:
        os.close(fd)
    return Capabilities(
        populate=False,
        nowait_reads=False,
        cachestat=False,
        mincore=mincore,
        write_back_start=True,
        full_sync=full_sync,
        huge_pages=False,
        ofd_locks=ofd_locks,
        reserve=can_reserve(path, reserve),
        page_size=page_size,
    )
