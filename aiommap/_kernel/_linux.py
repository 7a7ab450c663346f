"""Linux. Calls and flags from the man pages; what they really do is measured in docs/design.md.

``ctypes.CDLL`` releases the GIL around a call, and with ``use_errno`` keeps errno per thread.
"""

from __future__ import annotations

import sys

assert sys.platform == "linux"

import ctypes
import errno
import fcntl
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from .._options import Advice, Protection
from ._memory import address_of, error_from_errno, foreign
from ._pipe_copy import copy as copy_through_pipe
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
from ._posix import map_file as map_file
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
from ._posix import sync_all as sync_all
from ._posix import sync_directory as sync_directory
from ._posix import unpin as unpin
from ._protocol import Buffer, Capabilities

_offset = ctypes.c_int64

_msync = foreign(libc, "msync", ctypes.c_int, address_t, size_t, ctypes.c_int)
# On 32-bit systems glibc's plain fallocate takes offsets of 32 bits; musl has only one.
_fallocate = foreign(
    libc, "fallocate64", ctypes.c_int, ctypes.c_int, ctypes.c_int, _offset, _offset
) or foreign(libc, "fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int, _offset, _offset)
_sync_file_range = foreign(
    libc, "sync_file_range", ctypes.c_int, ctypes.c_int, _offset, _offset, ctypes.c_uint
)
# On 32-bit systems plain fstatfs is EOVERFLOW for a large file system; musl has only one.
_fstatfs = foreign(libc, "fstatfs64", ctypes.c_int, ctypes.c_int, ctypes.c_void_p) or foreign(
    libc, "fstatfs", ctypes.c_int, ctypes.c_int, ctypes.c_void_p
)
_process_vm_readv = foreign(
    libc,
    "process_vm_readv",
    ctypes.c_ssize_t,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)
_statx = foreign(
    libc,
    "statx",
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_void_p,
)
_preadv2_types = (ctypes.c_int, address_t, ctypes.c_int, _offset, ctypes.c_int)
# With the GIL: what does not wait is done faster than it is given away and taken back.
_libc_with_gil = ctypes.PyDLL(None, use_errno=True)
_preadv2 = foreign(_libc_with_gil, "preadv64v2", ctypes.c_ssize_t, *_preadv2_types) or foreign(
    _libc_with_gil, "preadv2", ctypes.c_ssize_t, *_preadv2_types
)
_memfd_create = foreign(libc, "memfd_create", ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


def _by_number(library: ctypes.CDLL, *arguments: Any) -> Callable[..., int] | None:
    # Calls so new have the same numbers on all architectures but these.
    if os.uname().machine.startswith(("mips", "alpha")):
        return None
    return foreign(library, "syscall", ctypes.c_long, ctypes.c_long, *arguments)


_cachestat_types = (ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long)
_syscall = _by_number(libc, *_cachestat_types)
_syscall_with_gil = _by_number(_libc_with_gil, *_cachestat_types)
_process_madvise = _by_number(libc, ctypes.c_long, address_t, size_t, ctypes.c_long, ctypes.c_ulong)

_MS_SYNC = 4
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_SYNC_FILE_RANGE_WRITE = 2
_SYNC_FILE_RANGE_WRITE_AND_WAIT = 1 | 2 | 4
_FALLOC_FL_KEEP_SIZE = 1
_MAP_HUGETLB = 0x40000
_RWF_NOWAIT = 8
_MFD_CLOEXEC = 1
_MFD_HUGETLB = 4
_MFD_NOEXEC_SEAL = 0x8  # Linux 6.3
_F_OFD_GETLK = 36
_COPY_MOST = 0x7FFFFFFF // page_size * page_size  # MAX_RW_COUNT: no call moves more at once
_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000
_STATX_SIZE = 0x200
_FEW_PAGES = 256 << 10
_SMALL_QUEUE = 32  # of a SATA disk
_READ_AHEAD = 128 << 10  # VM_READAHEAD_PAGES, what bdi_alloc() sets for what is no disk
_MOST_SPANS = 1024  # UIO_MAXIOV
_SYS_PROCESS_MADVISE = 440
# The calling thread, Linux 6.14. That of the whole process had another number before 6.17, and has
# the same memory.
_PIDFD_SELF = -10000
_MADV_WILLNEED = 3
_SYS_CACHESTAT = 451
# What struct statfs begins with, f_type (asm/statfs.h).
_FileSystemType = ctypes.c_uint if os.uname().machine == "s390x" else ctypes.c_long
_MEMORY_FILE_SYSTEMS = frozenset((0x01021994, 0x858458F6, 0x958458F6))  # tmpfs, ramfs, hugetlbfs

_ADVICE = {
    Advice.NORMAL: 0,
    Advice.RANDOM: 1,
    Advice.SEQUENTIAL: 2,
    Advice.WILL_NEED: 3,
    Advice.DONT_FORK: 10,
    Advice.DO_FORK: 11,
    Advice.MERGEABLE: 12,
    Advice.UNMERGEABLE: 13,
    Advice.HUGE_PAGE: 14,
    Advice.NO_HUGE_PAGE: 15,
    Advice.DONT_DUMP: 16,
    Advice.DO_DUMP: 17,
    Advice.COLD: 20,
    Advice.PAGE_OUT: 21,
}


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _CachestatRange(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Cachestat(ctypes.Structure):
    _fields_ = (
        ("cached", ctypes.c_uint64),
        ("dirty", ctypes.c_uint64),
        ("writeback", ctypes.c_uint64),
        ("evicted", ctypes.c_uint64),
        ("recently_evicted", ctypes.c_uint64),
    )


class _Statx(ctypes.Structure):
    # The size is at byte 40 of 256.
    _fields_ = (
        ("before", ctypes.c_uint64 * 5),
        ("size", ctypes.c_uint64),
        ("after", ctypes.c_uint64 * 26),
    )


# Files


def reopen(fd: int) -> int | None:
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if flags & os.O_ACCMODE != os.O_RDWR or fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_UNLCK:
            return None
        flags &= os.O_ACCMODE | os.O_DIRECT | os.O_NOATIME
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:  # no /proc, rights that we have no more, a lease of somebody else's
        return None


def path_of(fd: int) -> str | None:
    try:
        path = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # no such descriptor, or no /proc
        return None
    # Pipes, sockets and files in memory have other names, files without one this ending.
    return path if path.startswith("/") and not path.endswith(" (deleted)") else None


def file_size(fd: int) -> int:
    # Not fstat(): it asks for the times too, and then the next store changes them (multigrain
    # timestamps, Linux 6.13), so that a flush has to write the inode through the journal as well.
    return _statx_size(fd, 0)


def known_file_size(fd: int) -> int:
    # FUSE, NFS and their like answer fstat() from their server once their memory is stale.
    return _statx_size(fd, _AT_STATX_DONT_SYNC)


def _statx_size(fd: int, flags: int) -> int:
    if _statx is None:
        return os.fstat(fd).st_size
    answer = _Statx()
    if _statx(fd, b"", _AT_EMPTY_PATH | flags, _STATX_SIZE, ctypes.byref(answer)):
        # Linux before 4.11, a container that refuses it (ENOSYS, EPERM), or an error that is
        # fstat's too.
        return os.fstat(fd).st_size
    return int(answer.size)


def reserve(fd: int, offset: int, length: int, *, grow: bool) -> bool:
    # Not posix_fallocate: where the file system has no fallocate, glibc's emulation writes a
    # byte into every block and races with whoever else writes there.
    assert _fallocate is not None
    if length == 0:
        return True
    while _fallocate(fd, 0 if grow else _FALLOC_FL_KEEP_SIZE, offset, length) == -1:
        error = ctypes.get_errno()
        if error in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM):
            return False  # EPERM: a container; who really may not is told by what follows
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))
    return True


def file_is_in_memory(fd: int) -> bool:
    buffer = (ctypes.c_long * 64)()  # more than struct statfs of any architecture
    if _fstatfs is None or _fstatfs(fd, ctypes.addressof(buffer)) == -1:
        return False  # a container may refuse it; it only spares waits
    return (_FileSystemType.from_buffer(buffer).value & 0xFFFFFFFF) in _MEMORY_FILE_SYSTEMS


def disk_queue(fd: int) -> int:
    queue = _disk_setting(fd, *_of_disk("nr_requests"))
    return _SMALL_QUEUE if queue is None else queue


def read_ahead(fd: int) -> int:
    ahead = _disk_setting(fd, *_of_disk("read_ahead_kb"), "class/bdi/{}/read_ahead_kb")
    return _READ_AHEAD if ahead is None else ahead << 10


def longest_hint(read_ahead: int) -> int:
    # mm/readahead.c, force_page_cache_ra(): the larger one of what is read ahead and of what one
    # request of the disk takes, which is not told for all of them.
    longest = max(read_ahead, _READ_AHEAD)
    return longest - longest % page_size


def _of_disk(setting: str) -> tuple[str, str]:
    return f"dev/block/{{}}/queue/{setting}", f"dev/block/{{}}/../queue/{setting}"  # a partition's


def _disk_setting(fd: int, *names: str) -> int | None:
    """What sysfs says of the file's disk; None where it has none there, or none that is known."""
    device = os.fstat(fd).st_dev
    for name in names:
        path = "/sys/" + name.format(f"{os.major(device)}:{os.minor(device)}")
        with suppress(OSError, ValueError), open(path) as file:
            return int(file.read())
    return None


def sync_data(fd: int) -> None:
    os.fdatasync(fd)


def start_write_back(fd: int, address: int, offset: int, length: int) -> None:
    # msync(MS_ASYNC) does nothing since Linux 2.6.19.
    _write_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


def write_back(fd: int, address: int, offset: int, length: int) -> None:
    _write_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE_AND_WAIT)


def _write_range(fd: int, offset: int, length: int, flags: int) -> None:
    if _sync_file_range is None or length == 0:  # a length of 0 would be the rest of the file
        return
    while _sync_file_range(fd, offset, length, flags) == -1:
        error = ctypes.get_errno()
        if error in (errno.ENOSYS, errno.ESPIPE, errno.EPERM):
            return  # it only ever brings forward what a flush does anyway
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))


# Reading without a map


def read(fd: int, buffers: Sequence[Buffer], offset: int) -> int:
    try:
        return os.preadv(fd, buffers, offset)
    except PermissionError:
        # CPython's preadv is always preadv2, which some containers refuse with EPERM.
        data = os.pread(fd, sum(map(len, buffers)), offset)
    done = 0
    for buffer in buffers:
        part = data[done : done + len(buffer)]
        buffer[: len(part)] = part
        done += len(part)
    return done


def read_nowait(fd: int, buffers: Sequence[Buffer], offset: int) -> int:
    return _preadv(fd, buffers, offset, _RWF_NOWAIT)


def read_nowait_by_libc(fd: int, buffers: Sequence[Buffer], offset: int) -> int:
    """As :func:`read_nowait`, where Python was built for a system without preadv2 (uv's are)."""
    if _preadv2 is None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    vector = _vector([(address_of(buffer), len(buffer)) for buffer in buffers])
    # SAFETY: the caller keeps the buffers, and it does not wait.
    done = _preadv2(fd, ctypes.addressof(vector), len(buffers), offset, _RWF_NOWAIT)
    if done == -1:
        raise error_from_errno()
    return done


# Looked up once: this is on the path of every access.
_preadv = os.preadv
if not hasattr(os, "RWF_NOWAIT"):
    read_nowait = read_nowait_by_libc


def will_need(fd: int, offset: int, length: int) -> None:
    if length == 0:  # would be the rest of the file
        return
    try:
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)
    except OSError:
        return  # a hint; the read that follows has the error


# Maps


def create_memory_file(flags: int) -> int:
    # Not os.memfd_create: Python may have been built for a system without it (uv's are).
    if _memfd_create is None:
        raise unsupported()
    fd = _memfd_create(b"aiommap", flags)
    if fd == -1:
        raise error_from_errno()
    return fd


def memory_file(length: int, *, huge: bool) -> int | None:
    flags = _MFD_CLOEXEC | (_MFD_HUGETLB if huge else 0)
    try:
        # No seal against shrinking: resize() would need it back. Nobody else has the file.
        try:
            fd = create_memory_file(flags | _MFD_NOEXEC_SEAL)
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            fd = create_memory_file(flags)
    except OSError as exc:
        if exc.errno in (errno.ENOSYS, errno.EPERM):
            return None
        raise
    try:
        os.ftruncate(fd, length)
    except BaseException:
        os.close(fd)
        raise
    return fd


def map_memory(length: int, protection: Protection, *, stack: bool, huge: bool) -> mmap.mmap:
    flags = (mmap.MAP_STACK if stack else 0) | (_MAP_HUGETLB if huge else 0)
    return map_anonymous(length, protection, flags)


def sync_range(address: int, length: int) -> None:
    assert _msync is not None
    # SAFETY: the caller's range is inside its map, which it keeps alive. Same below.
    while _msync(address, length, _MS_SYNC) == -1:
        if ctypes.get_errno() != errno.EINTR:
            raise error_from_errno()


def populate_read(address: int, length: int) -> None:
    madvise(address, length, _MADV_POPULATE_READ)


def populate_write(address: int, length: int) -> None:
    madvise(address, length, _MADV_POPULATE_WRITE)


def will_need_many(spans: Sequence[tuple[int, int]]) -> bool:
    return all(
        _process_madvise_self(spans[first : first + _MOST_SPANS], _MADV_WILLNEED) is not None
        for first in range(0, len(spans), _MOST_SPANS)
    )


def populate_many(spans: Sequence[tuple[int, int]], *, write: bool) -> bool:
    done = _process_madvise_self(spans, _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ)
    return done is not None and done == sum(length for _, length in spans)


def _process_madvise_self(spans: Sequence[tuple[int, int]], advice: int) -> int | None:
    """How many bytes were advised, from the first on; None for none."""
    if _process_madvise is None:
        return None
    vector = _vector(spans)
    done = _process_madvise(
        _SYS_PROCESS_MADVISE, _PIDFD_SELF, ctypes.addressof(vector), len(spans), advice, 0
    )
    return None if done == -1 else done


def cached_pages(fd: int, offset: int, length: int) -> int:
    if _syscall is None or _syscall_with_gil is None:
        raise unsupported()
    if length == 0:  # would be the rest of the file
        return 0
    wanted = _CachestatRange(offset, length)
    answer = _Cachestat()
    call = _syscall_with_gil if length <= _FEW_PAGES else _syscall
    if call(_SYS_CACHESTAT, fd, ctypes.addressof(wanted), ctypes.addressof(answer), 0) == -1:
        raise error_from_errno()
    return int(answer.cached)


def copy(destination: int, source: int, length: int) -> int:
    done = 0
    while True:
        try:
            copied = _copy_once(destination + done, source + done, length - done)
        except OSError as exc:
            if exc.errno in (errno.ENOSYS, errno.EPERM):
                # A seccomp filter, or a kernel before 3.2: as guarded, and slower.
                return copy_through_pipe(destination, source, length)
            if done == 0 or exc.errno != errno.EFAULT:
                raise
            return done
        done += copied
        if done == length or copied < _COPY_MOST:
            return done


def _copy_once(destination: int, source: int, length: int) -> int:
    if _process_vm_readv is None:
        raise unsupported()
    local = _Iovec(destination, length)
    remote = _Iovec(source, length)
    copied = _process_vm_readv(
        os.getpid(), ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0
    )
    if copied == -1:
        raise error_from_errno()
    return copied


def copy_many(copies: Sequence[tuple[int, int, int]]) -> bool:
    if _process_vm_readv is None:
        return False
    count = len(copies)
    local = _vector([(destination, length) for destination, _, length in copies])
    remote = _vector([(source, length) for _, source, length in copies])
    copied = _process_vm_readv(
        os.getpid(), ctypes.addressof(local), count, ctypes.addressof(remote), count, 0
    )
    return copied == sum(length for _, _, length in copies)


def _vector(spans: Sequence[tuple[int, int]]) -> ctypes.Array[ctypes.c_size_t]:
    """An array of ``struct iovec``: an address and a length each."""
    return (ctypes.c_size_t * (2 * len(spans)))(*[number for span in spans for number in span])


def advise(address: int, length: int, advice: Advice) -> None:
    try:
        madvise(address, length, _ADVICE[advice])
    except OSError as exc:
        if exc.errno != errno.EINVAL or _knows(advice):
            raise
        # Too new for this kernel, or not built in (huge pages, merging).
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP)) from None


@cache
def _knows(advice: Advice) -> bool:
    """Whether the kernel takes an advice for the simplest memory that there is."""
    with mmap.mmap(-1, page_size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        return works(madvise, address_of(memory), page_size, _ADVICE[advice])


# What works here, found by trying


def capabilities(path: str | bytes | None) -> Capabilities:
    with mmap.mmap(-1, page_size) as memory:
        address = address_of(memory)
        populate = works(populate_read, address, page_size)
        mincore = works(resident, address, page_size)
    if path is None:
        path = os.curdir
        with suppress(FileNotFoundError):  # no directory of temporary files can be written
            path = tempfile.gettempdir()
    if os.path.isdir(path):
        # A directory cannot be read, so a file of our own in it is asked, where one can be made.
        with suppress(OSError), tempfile.TemporaryFile(dir=path) as file:
            return _file_capabilities(file.fileno(), path, populate, mincore)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return _file_capabilities(fd, path, populate, mincore)
    finally:
        os.close(fd)


def _file_capabilities(fd: int, path: str | bytes, populate: bool, mincore: bool) -> Capabilities:
    nowait = True
    try:
        read_nowait(fd, [bytearray(1)], 0)
    except BlockingIOError:
        pass
    except OSError:
        nowait = False
    return Capabilities(
        populate=populate,
        nowait_reads=nowait,
        cachestat=works(cached_pages, fd, 0, page_size),
        mincore=mincore,
        write_back_start=_can_start_write_back(fd),
        full_sync=not file_is_in_memory(fd),
        huge_pages=_has_huge_pages(),
        ofd_locks=_has_ofd_locks(fd),
        reserve=can_reserve(path, reserve),
        page_size=page_size,
    )


def _can_start_write_back(fd: int) -> bool:
    return _sync_file_range is not None and _sync_file_range(fd, 0, 1, _SYNC_FILE_RANGE_WRITE) == 0


def _has_huge_pages() -> bool:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["HugePages_Free"].split()[0]) > 0
    except (OSError, KeyError, ValueError):
        return False


def _has_ofd_locks(fd: int) -> bool:
    # struct flock: type, whence, start, length, pid; asked about, not taken.
    flock = b"\0\0\0\0\0\0\0\0" + bytes(24)
    return works(fcntl.fcntl, fd, _F_OFD_GETLK, flock)
