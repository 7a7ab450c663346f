"""Windows. Calls and structures from the Windows SDK's documentation on learn.microsoft.com.

* *Maps* are the standard library's, made by protection (``access=``); there is no executable one.
  A file cannot be cut while it is mapped (ERROR_USER_MAPPED_FILE), so what is left to guard
  against is storage that goes away: touching such a page raises EXCEPTION_IN_PAGE_ERROR,
  which ends the process as SIGBUS does.
* *Durability* takes two steps: FlushViewOfFile writes the pages of a map, and FlushFileBuffers
  takes what was written through the disk's cache, with the metadata. ``os.fsync`` does the
  second, but calls every failure EBADF, so it is not used.
* *Reading* at an offset is ReadFile with an OVERLAPPED. On the synchronous handles of the C
  library this also moves the file position, which a descriptor shares with its duplicates:
  whoever gave us a file to map must not rely on its position
  (https://github.com/MicrosoftDocs/sdk-api/pull/1309).
* *The guarded copy* is ReadProcessMemory of our own process, see :func:`copy`.

``WinDLL`` releases the GIL around a call, and with ``use_last_error`` keeps the error per
thread.
"""

from __future__ import annotations

import sys

assert sys.platform == "win32"

import ctypes
import errno
import mmap
import msvcrt
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Sequence
from ctypes import c_int, c_int64, c_size_t, c_uint32, c_void_p

from .._options import Advice, Protection
from ._guarded_copy import copy_until_missing
from ._last_place import search_holding_the_gil
from ._map_registry import MapRegistry
from ._memory import address_of, foreign
from ._protocol import Buffer, Capabilities, Scratch

page_size = mmap.PAGESIZE
map_granularity = mmap.ALLOCATIONGRANULARITY
map_file_flushes = False
cuts_mapped_files = False


class _Overlapped(ctypes.Structure):
    _fields_ = (
        ("internal", c_size_t),
        ("internal_high", c_size_t),
        ("offset", c_uint32),
        ("offset_high", c_uint32),
        ("event", c_void_p),
    )


class _MemoryRange(ctypes.Structure):  # WIN32_MEMORY_RANGE_ENTRY
    _fields_ = (("address", c_void_p), ("length", c_size_t))


class _StandardInfo(ctypes.Structure):  # FILE_STANDARD_INFO
    _fields_ = (
        ("allocation_size", c_int64),
        ("end_of_file", c_int64),
        ("number_of_links", c_uint32),
        ("delete_pending", ctypes.c_ubyte),
        ("directory", ctypes.c_ubyte),
    )


class _BasicInfo(ctypes.Structure):  # FILE_BASIC_INFO
    _fields_ = (
        ("creation_time", c_int64),
        ("last_access_time", c_int64),
        ("last_write_time", c_int64),
        ("change_time", c_int64),
        ("attributes", c_uint32),
    )


_kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
_handle = c_void_p
_bool = c_int

_flush_view = foreign(_kernel32, "FlushViewOfFile", _bool, c_void_p, c_size_t)
_flush_buffers = foreign(_kernel32, "FlushFileBuffers", _bool, _handle)
_read_file = foreign(_kernel32, "ReadFile", _bool, _handle, c_void_p, c_uint32, c_void_p, c_void_p)
_get_file_info = foreign(
    _kernel32, "GetFileInformationByHandleEx", _bool, _handle, c_int, c_void_p, c_uint32
)
_set_file_info = foreign(
    _kernel32, "SetFileInformationByHandle", _bool, _handle, c_int, c_void_p, c_uint32
)
_final_path = foreign(
    _kernel32, "GetFinalPathNameByHandleW", c_uint32, _handle, c_void_p, c_uint32, c_uint32
)
_this_process = foreign(_kernel32, "GetCurrentProcess", _handle)
_read_memory = foreign(
    _kernel32, "ReadProcessMemory", _bool, _handle, c_void_p, c_void_p, c_size_t, c_void_p
)
_prefetch = foreign(
    _kernel32, "PrefetchVirtualMemory", _bool, _handle, c_size_t, c_void_p, c_uint32
)
_query_working_set = foreign(_kernel32, "K32QueryWorkingSetEx", _bool, _handle, c_void_p, c_uint32)
_working_set_size = foreign(
    _kernel32, "GetProcessWorkingSetSize", _bool, _handle, c_void_p, c_void_p
)
_lock = foreign(_kernel32, "VirtualLock", _bool, c_void_p, c_size_t)
_unlock = foreign(_kernel32, "VirtualUnlock", _bool, c_void_p, c_size_t)
_pause = foreign(_kernel32, "Sleep", None, c_uint32)

_FILE_BASIC_INFO = 0  # FILE_INFO_BY_HANDLE_CLASS
_FILE_STANDARD_INFO = 1
_FILE_ALLOCATION_INFO = 5
_FILE_END_OF_FILE_INFO = 6
_FILE_ATTRIBUTE_SPARSE_FILE = 0x200
_FILE_ATTRIBUTE_COMPRESSED = 0x800

_ERROR_INVALID_FUNCTION = 1
_ERROR_CRC = 23
_ERROR_SECTOR_NOT_FOUND = 27
_ERROR_WRITE_FAULT = 29
_ERROR_READ_FAULT = 30
_ERROR_GEN_FAILURE = 31
_ERROR_LOCK_VIOLATION = 33
_ERROR_HANDLE_EOF = 38
_ERROR_HANDLE_DISK_FULL = 39
_ERROR_NOT_SUPPORTED = 50
_ERROR_INVALID_PARAMETER = 87
_ERROR_DISK_FULL = 112
_ERROR_NOT_LOCKED = 158
_ERROR_PARTIAL_COPY = 299
_ERROR_INVALID_ADDRESS = 487
_ERROR_NOACCESS = 998
_ERROR_SWAPERROR = 999
_ERROR_IO_DEVICE = 1117
_ERROR_DISK_QUOTA_EXCEEDED = 1295
_ERROR_NO_SYSTEM_RESOURCES = 1450
_ERROR_WORKING_SET_QUOTA = 1453
_ERROR_COMMITMENT_LIMIT = 1455

# Where CPython's own table (PC/errmap.h) has EINVAL or EACCES for want of an entry, and the
# callers decide by errno.
_ERRNO = {
    _ERROR_CRC: errno.EIO,
    _ERROR_SECTOR_NOT_FOUND: errno.EIO,
    _ERROR_WRITE_FAULT: errno.EIO,
    _ERROR_READ_FAULT: errno.EIO,
    _ERROR_GEN_FAILURE: errno.EIO,
    _ERROR_HANDLE_DISK_FULL: errno.ENOSPC,
    _ERROR_DISK_FULL: errno.ENOSPC,
    _ERROR_PARTIAL_COPY: errno.EFAULT,
    _ERROR_INVALID_ADDRESS: errno.EFAULT,
    _ERROR_NOACCESS: errno.EFAULT,
    _ERROR_SWAPERROR: errno.EFAULT,
    _ERROR_IO_DEVICE: errno.EIO,
    _ERROR_DISK_QUOTA_EXCEEDED: getattr(errno, "EDQUOT", errno.ENOSPC),
    _ERROR_NO_SYSTEM_RESOURCES: errno.ENOMEM,
    _ERROR_WORKING_SET_QUOTA: errno.ENOMEM,
    _ERROR_COMMITMENT_LIMIT: errno.ENOMEM,
}
# What file systems say that have no such query or no allocation to set, FAT and exFAT among them.
_CANNOT_RESERVE = (_ERROR_INVALID_FUNCTION, _ERROR_NOT_SUPPORTED, _ERROR_INVALID_PARAMETER)
# What ReadProcessMemory says of a page that it cannot touch.
_MISSING_PAGE = (_ERROR_PARTIAL_COPY, _ERROR_NOACCESS, _ERROR_SWAPERROR)

_LOCK_PAUSES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
"""
Milliseconds between tries of a flush that met ERROR_LOCK_VIOLATION: half a second in all, in a
worker thread, then the error is the caller's. FlushViewOfFile has it now and then although
nobody holds a lock; .NET retries up to 300 times with growing pauses, and saw no more than 3
needed (MemoryMappedView.Flush in System.IO.MemoryMappedFiles).
"""

_WORD = ctypes.sizeof(c_void_p)
_READ_MOST = 1 << 30  # ReadFile takes a 32-bit length
_COPY_MOST = 1 << 20  # a piece of the guarded copy; bounds what is tried again around a fault

_ACCESS = {
    Protection.READ: mmap.ACCESS_READ,
    Protection.READ_WRITE: mmap.ACCESS_WRITE,
    Protection.READ_COPY: mmap.ACCESS_COPY,
}

maps = MapRegistry()
"""The maps of files that this process has."""


def _unsupported(error: int = errno.ENOSYS) -> OSError:
    return OSError(error, os.strerror(error))


def _last_error(code: int | None = None) -> OSError:
    if code is None:
        code = ctypes.get_last_error()
    if code in _ERRNO:
        return OSError(_ERRNO[code], ctypes.FormatError(code).strip())
    return ctypes.WinError(code)


def _handle_of(fd: int) -> int:
    return msvcrt.get_osfhandle(fd)


# Files


def duplicate(fd: int) -> int:
    # DuplicateHandle, not inherited by child processes (PEP 446).
    return os.dup(fd)


def reopen(fd: int) -> int | None:
    return None


def path_of(fd: int) -> str | None:
    return None  # GetFinalPathNameByHandle may ask a server


def file_size(fd: int) -> int:
    return os.fstat(fd).st_size


def known_file_size(fd: int) -> int:
    return file_size(fd)


def set_file_size(fd: int, size: int) -> None:
    # Not os.ftruncate: the C library grows a file by writing zeros, all of them.
    _set_info(fd, _FILE_END_OF_FILE_INFO, size)


def _get_info(fd: int, kind: int, info: ctypes.Structure) -> None:
    assert _get_file_info is not None
    if not _get_file_info(_handle_of(fd), kind, ctypes.addressof(info), ctypes.sizeof(info)):
        raise _last_error()


def _set_info(fd: int, kind: int, value: int) -> None:
    assert _set_file_info is not None
    info = c_int64(value)
    if not _set_file_info(_handle_of(fd), kind, ctypes.addressof(info), ctypes.sizeof(info)):
        raise _last_error()


def reserve(fd: int, offset: int, length: int, *, grow: bool) -> bool:
    if length == 0:
        return True
    end = offset + length
    basic = _BasicInfo()
    info = _StandardInfo()
    try:
        # Not FileAttributeTagInfo, which FAT and exFAT do not have.
        _get_info(fd, _FILE_BASIC_INFO, basic)
        if basic.attributes & (_FILE_ATTRIBUTE_SPARSE_FILE | _FILE_ATTRIBUTE_COMPRESSED):
            return False  # it can have holes; every other file has all of its blocks
        _get_info(fd, _FILE_STANDARD_INFO, info)
        # Only ever upwards: an allocation below the size would cut the file.
        if end > max(info.allocation_size, info.end_of_file):
            _set_info(fd, _FILE_ALLOCATION_INFO, end)
        if grow and end > file_size(fd):
            # There is no call that only grows: a file that somebody else makes longer between
            # these two lines is cut to `end` again.
            _set_info(fd, _FILE_END_OF_FILE_INFO, end)
    except OSError as exc:
        if getattr(exc, "winerror", None) in _CANNOT_RESERVE:
            return False
        raise
    return True


def file_is_in_memory(fd: int) -> bool:
    return False  # Windows has no file system in memory of its own


def reads_directly(fd: int) -> bool:
    return False


def disk_queue(fd: int) -> int:
    return 0


def read_ahead(fd: int) -> int:
    return 128 << 10  # not told; as Linux does by default


def longest_hint(read_ahead: int) -> int:
    return sys.maxsize


def free_blocks(fd: int) -> int:
    assert _final_path is not None
    name = ctypes.create_unicode_buffer(1 << 15)  # the longest path there is
    if not _final_path(_handle_of(fd), ctypes.addressof(name), len(name), 0):
        raise _last_error()
    return shutil.disk_usage(name.value).free // page_size


def _flush_memory(address: int, length: int) -> None:
    assert _flush_view is not None
    assert _pause is not None
    # SAFETY: the caller's range is inside its map, which it keeps alive. Same below.
    for pause in (*_LOCK_PAUSES, None):
        if _flush_view(address, length):
            return
        code = ctypes.get_last_error()
        if code != _ERROR_LOCK_VIOLATION or pause is None:
            raise _last_error(code)
        _pause(pause)


def _flush_file(fd: int) -> None:
    assert _flush_buffers is not None
    if not _flush_buffers(_handle_of(fd)):
        raise _last_error()


def sync_data(fd: int) -> None:
    for found in maps.of_file(fd):
        if found.writable:
            _flush_memory(found.address, found.length)
    _flush_file(fd)


def sync_all(fd: int) -> None:
    # FlushFileBuffers has no half that leaves metadata out.
    sync_data(fd)


def sync_directory(path: str | bytes) -> None:
    # No documented call does it. The metadata that FlushFileBuffers writes for a file is in
    # the journal of NTFS with the file's name; SQLite and PostgreSQL do not flush directories
    # on Windows either.
    os.stat(path)


def start_write_back(fd: int, address: int, offset: int, length: int) -> None:
    write_back(fd, address, offset, length)


def write_back(fd: int, address: int, offset: int, length: int) -> None:
    if length:  # 0 would be the whole map
        _flush_memory(address, length)


# Reading without a map


def read(fd: int, buffers: Sequence[Buffer], offset: int) -> int:
    total = 0
    for buffer in buffers:
        count = _read_one(fd, buffer, offset + total)
        total += count
        if count < len(buffer):
            break
    return total


def _read_one(fd: int, buffer: Buffer, offset: int) -> int:
    assert _read_file is not None
    where = _Overlapped(offset=offset & 0xFFFFFFFF, offset_high=offset >> 32)
    count = c_uint32(0)
    # SAFETY: the export keeps the buffer where it is, and the length is its own.
    with memoryview(buffer) as view:
        if not _read_file(
            _handle_of(fd),
            address_of(view),
            min(len(view), _READ_MOST),
            ctypes.addressof(count),
            ctypes.addressof(where),
        ):
            code = ctypes.get_last_error()
            if code != _ERROR_HANDLE_EOF:
                raise _last_error(code)
            return 0
    return count.value


def read_nowait(fd: int, buffers: Sequence[Buffer], offset: int) -> int:
    raise _unsupported(errno.EOPNOTSUPP)


def will_need(fd: int, offset: int, length: int) -> None:
    # Pages are prefetched by address, so this is for files with a map.
    for found in maps.of_file(fd):
        start = max(offset - found.offset, 0)
        stop = min(offset + length - found.offset, found.length)
        if start < stop:
            _prefetch_memory(found.address + start, stop - start)
            return


def _prefetch_memory(address: int, length: int) -> bool:
    assert _this_process is not None
    if _prefetch is None:  # before Windows 8
        return False
    wanted = _MemoryRange(address, length)
    return bool(_prefetch(_this_process(), 1, ctypes.addressof(wanted), 0))


# Maps


def map_file(fd: int, length: int, protection: Protection, offset: int) -> mmap.mmap:
    memory = mmap.mmap(fd, length, access=_access(protection), offset=offset)
    maps.add(fd, memory, offset, writable=protection is Protection.READ_WRITE)
    return memory


def _access(protection: Protection) -> int:
    if protection not in _ACCESS:
        raise _unsupported(errno.ENOTSUP)
    return _ACCESS[protection]


def memory_file(length: int, *, huge: bool) -> int | None:
    return None


def map_memory(length: int, protection: Protection, *, stack: bool, huge: bool) -> mmap.mmap:
    # There is no fork to share it with, and `stack` is only a hint.
    if huge:
        raise _unsupported()
    return mmap.mmap(-1, length, access=_access(protection))


def sync_range(address: int, length: int) -> None:
    if length == 0:  # 0 would be the whole map
        return
    _flush_memory(address, length)
    found = maps.at(address)
    if found is not None:
        _flush_file(found.fd)


def populate_read(address: int, length: int) -> None:
    # PrefetchVirtualMemory is a hint: it neither says that the pages are in nor why not.
    raise _unsupported()


def populate_write(address: int, length: int) -> None:
    raise _unsupported()


def will_need_many(spans: Sequence[tuple[int, int]]) -> bool:
    return False


def populate_many(spans: Sequence[tuple[int, int]], *, write: bool) -> bool:
    return False


def resident(address: int, length: int) -> bytes:
    # "In the working set" is less than "in memory": a page that is only in the standby list
    # counts as missing, which errs on the careful side.
    assert _this_process is not None
    if _query_working_set is None:
        raise _unsupported()
    pages = -(-length // page_size)
    # PSAPI_WORKING_SET_EX_INFORMATION: an address, then attributes whose lowest bit is "valid".
    entries = array("Q" if _WORD == 8 else "L", bytes(2 * pages * _WORD))
    for number in range(pages):
        entries[2 * number] = address + number * page_size
    if pages and not _query_working_set(
        _this_process(), entries.buffer_info()[0], len(entries) * _WORD
    ):
        raise _last_error()
    return bytes(attributes & 1 for attributes in entries[1::2])


def cached_pages(fd: int, offset: int, length: int) -> int:
    raise _unsupported()


def copy(destination: int, source: int, length: int) -> int:
    # ReadProcessMemory promises to survive a source that cannot be read. What it copies to is
    # written by the kernel inside the same exception handler, so a destination that cannot be
    # written is an error too (ReactOS, ntoskrnl/mm/ARM3/virtual.c, MiDoMappedCopy, is the
    # source we can cite; Microsoft documents the first half only). WriteProcessMemory would
    # add nothing but its habit of making read-only pages writable. The count that it gives
    # after a failure is reckoned from the source even when it was the destination that
    # failed, so it is not used.
    return copy_until_missing(
        destination, source, length, carry=_carry, most=_COPY_MOST, page_size=page_size
    )


def _carry(destination: int, source: int, length: int) -> int:
    assert _this_process is not None
    assert _read_memory is not None
    count = c_size_t(0)
    # SAFETY: both ranges are inside memory that the caller keeps alive; a page of it that
    # cannot be touched is an error.
    if _read_memory(_this_process(), source, destination, length, ctypes.addressof(count)):
        return length
    code = ctypes.get_last_error()
    if code not in _MISSING_PAGE:
        raise _last_error(code)
    return 0


def copy_many(copies: Sequence[tuple[int, int, int]]) -> bool:
    return False


def move(destination: int, source: int, length: int) -> None:
    # SAFETY: as in _carry; a page that cannot be touched ends the process. ctypes.memmove
    # releases the GIL.
    ctypes.memmove(destination, source, length)


def search(data: Scratch, length: int, needle: bytes, *, last: bool) -> int:
    # The C library has no memmem.
    return search_holding_the_gil(data, length, needle, last=last)


# Hints


def advise(address: int, length: int, advice: Advice) -> None:
    if advice is Advice.NORMAL:
        return  # no other advice is kept, so there is nothing to take back
    if advice is not Advice.WILL_NEED or _prefetch is None:
        raise _unsupported(errno.ENOTSUP)
    if length and not _prefetch_memory(address, length):
        raise _last_error()


def pin(address: int, length: int) -> None:
    assert _lock is not None
    if length and not _lock(address, length):
        raise _last_error()


def unpin(address: int, length: int) -> None:
    assert _unlock is not None
    if length and not _unlock(address, length):
        code = ctypes.get_last_error()
        # Elsewhere it is no error to unlock what is not locked.
        if code != _ERROR_NOT_LOCKED:
            raise _last_error(code)


def pin_limit() -> int | None:
    # VirtualLock takes at most the pages of the minimum working set, less a few.
    assert _this_process is not None
    assert _working_set_size is not None
    least, most = c_size_t(0), c_size_t(0)
    if not _working_set_size(_this_process(), ctypes.addressof(least), ctypes.addressof(most)):
        raise _last_error()
    return least.value


# What works here, found by trying


def _works(call: Callable[..., object], *arguments: object) -> bool:
    try:
        call(*arguments)
    except OSError:
        return False
    return True


def capabilities(path: str | bytes | None) -> Capabilities:
    with mmap.mmap(-1, page_size) as memory:
        mincore = _works(resident, address_of(memory), page_size)
    folder: str | bytes | None = None
    if path is not None:
        os.stat(path)
        folder = path if os.path.isdir(path) else os.path.dirname(os.path.realpath(path))
    can_reserve = full_sync = False
    try:
        # On a file of our own beside it: to reserve is to change.
        with tempfile.TemporaryFile(dir=folder) as file:
            can_reserve = reserve(file.fileno(), 0, page_size, grow=True)
            full_sync = _works(_flush_file, file.fileno())
    except OSError:
        pass
    return Capabilities(
        populate=False,
        nowait_reads=False,
        cachestat=False,
        mincore=mincore,
        write_back_start=True,
        full_sync=full_sync,
        huge_pages=False,
        ofd_locks=False,
        reserve=can_reserve,
        page_size=page_size,
    )
