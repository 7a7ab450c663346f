"""The part of the FUSE kernel protocol that serving one file takes (linux/fuse.h).

The rigs speak to ``/dev/fuse`` themselves instead of through libfuse: one thread with a timer
queue then has any number of requests in flight (libfuse needs a thread for each), pages that are
mapped right now can be evicted (``FUSE_NOTIFY_INVAL_INODE``, which the Python binding does not
offer), read-ahead and the write-back cache are the test's choice, and nothing has to be installed.
A request costs 60 us of processor time: a 20 ms disk under 64 readers serves 3 000 pages a second.
"""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError("Linux only")

import enum
import errno
import os
import stat
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from .mounts import MS_NODEV, MS_NOSUID, mount


class Op(enum.IntEnum):
    """The kinds of request that are answered with more than ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43


ROOT_NODE, FILE_NODE = 1, 2
FILE_NAME = "file"

_IN_HEADER = struct.Struct("=IIQQIIIHH")
_OUT_HEADER = struct.Struct("=IiQ")
_ATTRIBUTES = struct.Struct("=6Q10I")
_ENTRY = struct.Struct("=QQQQII")
_ATTR = struct.Struct("=QII")
_OPENED = struct.Struct("=QII")
_IO = struct.Struct("=QQIIQII")
"""fuse_read_in and fuse_write_in have the same shape."""
_WRITTEN = struct.Struct("=II")
_FSYNC_IN = struct.Struct("=QII")
_SETATTR_IN = struct.Struct("=II6Q8I")
_FALLOCATE_IN = struct.Struct("=QQQII")
_STATFS_OUT = struct.Struct("=5Q10I")
_INIT_IN = struct.Struct("=IIII")
_INIT_OUT = struct.Struct("=IIIIHHIIHH8I")
_INVALIDATE = struct.Struct("=Qqq")
_DIRECTORY_ENTRY = struct.Struct("=QQII")

_ASYNC_READ, _BIG_WRITES, _WRITEBACK_CACHE, _MAX_PAGES = 1, 1 << 5, 1 << 16, 1 << 22
_FOPEN_KEEP_CACHE = 1 << 1
_SETATTR_SIZE = 1 << 3
_NOTIFY_INVALIDATE_INODE = 2
_MAX_WRITE = 1 << 20
_FOREVER = 1 << 30
"""Seconds that the kernel may trust names and attributes: only the kernel changes them."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the kernel; fields that its kind does not have are zero."""

    kind: int
    unique: int
    node: int
    offset: int = 0
    length: int = 0
    data: bytes = b""
    flags: int = 0
    """FSYNC: 1 for fdatasync. FALLOCATE: the mode. SETATTR: 1 if the size is to be set."""


@dataclass(frozen=True)
class Caching:
    """What the kernel may keep and read ahead."""

    max_readahead: int | None = None
    """In bytes; 0 reads only pages that are asked for; None is the kernel's default (128 KiB)."""
    write_back: bool = True
    """``write`` leaves dirty pages as on a disk; otherwise each ``write`` reaches the server before
    it returns. Stores into a mapping leave dirty pages either way."""
    max_background: int = 1024
    """How many read-ahead and write-back requests may be in flight. The kernel's default of 12
    would turn 20 ms a page into a queue."""


class FuseConnection:
    """A mounted FUSE file system with one file, seen from its server."""

    def __init__(self, directory: Path, size: int, caching: Caching) -> None:
        self.size = size
        self._caching = caching
        self._created = time.time_ns()
        self._buffer = bytearray(_MAX_WRITE + 4096)
        self.descriptor = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        mount(
            "aiommap-rig",
            directory,
            "fuse",
            flags=MS_NOSUID | MS_NODEV,
            options=f"fd={self.descriptor},rootmode=40000,user_id=0,group_id=0,"
            "allow_other,default_permissions",
        )

    def receive(self) -> Request | None:
        """The next request, or None if there is none now.

        :raises OSError: ENODEV: unmounted
        """
        while True:
            try:
                length = os.readv(self.descriptor, [self._buffer])
                break
            except BlockingIOError:
                return None
            except OSError as error:
                # ENOENT: the request was interrupted before it was read.
                if error.errno not in (errno.ENOENT, errno.EINTR):
                    raise
        _, kind, unique, node, *_ = _IN_HEADER.unpack_from(self._buffer)
        body = _IN_HEADER.size
        if kind == Op.READ:
            _, offset, size, *_ = _IO.unpack_from(self._buffer, body)
            return Request(kind, unique, node, offset, size)
        if kind == Op.WRITE:
            _, offset, size, *_ = _IO.unpack_from(self._buffer, body)
            start = body + _IO.size
            # Copied: the buffer is used again, and the write may be served much later.
            return Request(
                kind, unique, node, offset, size, bytes(self._buffer[start : start + size])
            )
        if kind in (Op.FSYNC, Op.FSYNCDIR):
            return Request(kind, unique, node, flags=_FSYNC_IN.unpack_from(self._buffer, body)[1])
        if kind == Op.FALLOCATE:
            _, offset, size, mode, _ = _FALLOCATE_IN.unpack_from(self._buffer, body)
            return Request(kind, unique, node, offset, size, flags=mode)
        if kind == Op.SETATTR:
            valid, _, _, size, *_ = _SETATTR_IN.unpack_from(self._buffer, body)
            return Request(kind, unique, node, length=size, flags=int(bool(valid & _SETATTR_SIZE)))
        if kind == Op.READDIR:
            return Request(kind, unique, node, _IO.unpack_from(self._buffer, body)[1])
        return Request(kind, unique, node, data=bytes(self._buffer[body:length]))

    def _send(self, unique: int, number: int, *parts: bytes) -> None:
        length = _OUT_HEADER.size + sum(map(len, parts))
        try:
            os.writev(self.descriptor, [_OUT_HEADER.pack(length, number, unique), *parts])
        except OSError as error:
            # ENOENT: the caller was killed meanwhile. ENODEV: unmounted meanwhile.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise

    def reply(self, request: Request, *parts: bytes) -> None:
        self._send(request.unique, 0, *parts)

    def reply_written(self, request: Request) -> None:
        self.reply(request, _WRITTEN.pack(request.length, 0))

    def reply_error(self, request: Request, number: int) -> None:
        self._send(request.unique, -number)

    def invalidate(self, offset: int = 0, length: int = 0) -> None:
        """Drop the file's pages from the page cache, mapped ones too; dirty ones are written first.

        Waits for requests in flight on those pages, so it may not be called by the thread that
        serves them. ``length`` 0 goes to the end of the file.
        """
        body = _INVALIDATE.pack(FILE_NODE, offset, length)
        header = _OUT_HEADER.pack(_OUT_HEADER.size + len(body), _NOTIFY_INVALIDATE_INODE, 0)
        try:
            os.writev(self.descriptor, [header, body])
        except OSError as error:
            if error.errno != errno.ENOENT:  # nobody has looked the file up: nothing is cached
                raise

    def _attributes(self, node: int) -> bytes:
        seconds, nanoseconds = divmod(self._created, 10**9)
        directory = node == ROOT_NODE
        size = 4096 if directory else self.size
        mode = stat.S_IFDIR | 0o755 if directory else stat.S_IFREG | 0o666
        return _ATTRIBUTES.pack(
            *(node, size, -(-size // 512), seconds, seconds, seconds),
            *(nanoseconds, nanoseconds, nanoseconds),
            *(mode, 1, os.geteuid(), os.getegid(), 0, 4096, 0),
        )

    def serve_metadata(self, request: Request) -> None:
        """Answer whatever is not about the file's content."""
        match request.kind:
            case Op.INIT:
                self._serve_init(request)
            case Op.LOOKUP if request.data.rstrip(b"\0") == FILE_NAME.encode():
                entry = _ENTRY.pack(FILE_NODE, 0, _FOREVER, _FOREVER, 0, 0)
                self.reply(request, entry, self._attributes(FILE_NODE))
            case Op.LOOKUP:
                self.reply_error(request, errno.ENOENT)
            case Op.GETATTR | Op.SETATTR:  # times and modes are not kept
                self.reply(request, _ATTR.pack(_FOREVER, 0, 0), self._attributes(request.node))
            case Op.OPEN:
                self.reply(request, _OPENED.pack(0, _FOPEN_KEEP_CACHE, 0))
            case Op.OPENDIR:
                self.reply(request, _OPENED.pack(0, 0, 0))
            case Op.READDIR:
                self.reply(request, self._directory() if request.offset == 0 else b"")
            case Op.STATFS:
                self.reply(request, _STATFS_OUT.pack(*[1 << 30] * 5, 4096, 255, 4096, *[0] * 7))
            case Op.RELEASE | Op.RELEASEDIR | Op.FSYNCDIR | Op.DESTROY:
                self.reply(request)
            case Op.FORGET | Op.BATCH_FORGET:
                pass  # want no answer
            case _:
                # The kernel does not ask again. For INTERRUPT: a request ends when it is served,
                # as with a disk.
                self.reply_error(request, errno.ENOSYS)

    def _serve_init(self, request: Request) -> None:
        major, _, max_readahead, offered = _INIT_IN.unpack_from(request.data)
        flags = _ASYNC_READ | _BIG_WRITES | _MAX_PAGES
        if self._caching.write_back:
            flags |= _WRITEBACK_CACHE
        if self._caching.max_readahead is not None:
            max_readahead = self._caching.max_readahead
        background = self._caching.max_background
        limits = (background, background, _MAX_WRITE, 1, _MAX_WRITE // 4096, 0)
        self.reply(
            request, _INIT_OUT.pack(major, 31, max_readahead, offered & flags, *limits, *[0] * 8)
        )

    @staticmethod
    def _directory() -> bytes:
        result = b""
        entries = [(ROOT_NODE, ".", 4), (ROOT_NODE, "..", 4), (FILE_NODE, FILE_NAME, 8)]
        for position, (node, name, kind) in enumerate(entries, 1):
            entry = _DIRECTORY_ENTRY.pack(node, position, len(name), kind) + name.encode()
            result += entry + bytes(-len(entry) % 8)
        return result
