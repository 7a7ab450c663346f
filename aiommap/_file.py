"""The open file under a map: how it is opened, created, measured and given back.

Synchronous, for worker threads. A :class:`File` owns one descriptor and closes it when the
last map, flush or pending flush that uses it lets go; nothing else closes it, so a descriptor
number in use can never be somebody else's file.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import ClassVar

from ._kernel import Kernel
from ._options import Protection

Filename = str | bytes | None


@contextmanager
def naming(filename: Filename) -> Iterator[None]:
    """Give the kernel's errors the path they are about, where it is known."""
    try:
        yield
    except OSError as exc:
        if exc.filename is None and filename is not None:
            exc.filename = filename
        raise


def at_once(end: Callable[[], object]) -> None:
    end()


class File:
    """A descriptor of ours, with what is known of its file."""

    __slots__ = (
        "anonymous",
        "direct",
        "disk_queue",
        "fd",
        "filename",
        "in_memory",
        "kernel",
        "location",
        "longest_hint",
        "made",
        "mincore_is_honest",
        "read_ahead",
        "shared",
    )

    def __init__(
        self, kernel: Kernel, fd: int, filename: Filename = None, *, anonymous: bool = False
    ) -> None:
        self.kernel: Kernel = kernel
        self.fd: int = fd
        self.filename: Filename = filename
        self.location: Filename = filename
        """As ``filename``; of a file that we created, absolute where that can be told."""
        self.shared: bool = False
        """Whether the open file is the caller's too."""
        self.made: bool = False
        """Whether it is removed if what it was made for comes to nothing."""
        self.anonymous: bool = anonymous
        self.in_memory: bool = anonymous
        self.direct: bool = False
        self.mincore_is_honest: bool = anonymous
        self.disk_queue: int = 0
        self.read_ahead: int = 0
        self.longest_hint: int = sys.maxsize

    finisher: ClassVar[Callable[[Callable[[], object]], object]] = staticmethod(at_once)
    """Closes the descriptor of a file that nobody uses any more: it may wait for a disk."""

    def __del__(self) -> None:
        fd, self.fd = self.fd, -1
        if fd != -1:
            type(self).finisher(partial(_close, fd))

    def close(self) -> None:
        """
        Close the descriptor now, in a worker: for a file that came to nothing, which the traceback
        of its error would keep open for as long as somebody keeps the error.
        """
        fd, self.fd = self.fd, -1
        if fd != -1:
            _close(fd)

    def inspect(self, *, writable: bool) -> None:
        """
        Find out what the file is. In a worker.

        :param writable: the caller may write the file
        :raises OSError: ENODEV for what has no pages to map, as the kernel says it for
            directories and pipes
        """
        with naming(self.filename):
            status = os.fstat(self.fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(
                    errno.ENODEV,
                    f"{os.strerror(errno.ENODEV)}: only regular files can be mapped, and this is "
                    f"{_KINDS.get(stat.S_IFMT(status.st_mode), 'none')}",
                )
            self.in_memory = self.kernel.file_is_in_memory(self.fd)
            if self.shared and not self.in_memory:
                self._reopen()
            self.direct = self.kernel.reads_directly(self.fd)
            self.disk_queue = self.kernel.disk_queue(self.fd)
            self.read_ahead = self.kernel.read_ahead(self.fd)
            self.longest_hint = self.kernel.longest_hint(self.read_ahead)
        # The kernel says "all resident" to whoever neither owns nor may write the file
        # (can_do_mincore() in mm/mincore.c).
        self.mincore_is_honest = writable or (
            hasattr(os, "geteuid")
            and os.geteuid() == status.st_uid
            and status.st_uid != _overflow_uid()
        )

    def _reopen(self) -> None:
        # The kernel reports a failed write-back to each open file once: who shares ours may get
        # the report in our place.
        fd = self.kernel.reopen(self.fd)
        if fd is not None:
            fd, self.fd = self.fd, fd
            self.shared = False
            _close(fd)

    def size(self) -> int:
        """Bytes of the file now."""
        try:  # naming() by hand: every flush comes by here
            return self.kernel.file_size(self.fd)
        except OSError as exc:
            exc.filename = exc.filename or self.filename
            raise

    def set_size(self, size: int) -> None:
        """Cut the file, or grow it with a hole."""
        with naming(self.filename):
            self.kernel.set_file_size(self.fd, size)

    def reserve(self, offset: int, length: int, *, grow: bool = False) -> bool:
        """Give a range blocks, see :meth:`Kernel.reserve`."""
        with naming(self.filename):
            return self.kernel.reserve(self.fd, offset, length, grow=grow)

    def grow(self, length: int) -> bool:
        """
        Make the file longer, with blocks for what is new; False where that cannot be done.

        :raises OSError: ENOSPC, EDQUOT: there is no room; the file is as it was
        """
        size = self.size()
        if size >= length:
            return True  # somebody else was quicker
        try:
            # Blocks first and size second, so that a full disk leaves the size alone; and
            # growing by fallocate, because ftruncate would cut a file that somebody else grew
            # meanwhile.
            return self.reserve(size, length - size) and self.reserve(
                size, length - size, grow=True
            )
        except OSError:
            # A reservation that fails keeps the blocks that it got before the disk was full,
            # behind the end of the file. Setting the size gives them back.
            with suppress(OSError):
                if self.size() == size:
                    self.set_size(size)
            raise


def _close(fd: int) -> None:
    # It is closed whatever the kernel says, and what it says is no flush's answer.
    with suppress(OSError):
        os.close(fd)


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@cache
def _overflow_uid() -> int:
    """
    What the kernel shows as the owner where the real one has no number in our user namespace.

    It may be our own number too, and then nothing tells whether the file is ours.
    """
    try:
        with open("/proc/sys/kernel/overflowuid", "rb") as file:
            return int(file.read())
    except (OSError, ValueError):  # no /proc
        return 65534


def duplicate_file(kernel: Kernel, fd: int, filename: Filename) -> File:
    """
    A descriptor of our own for a file that the caller has open. Never waits.

    It shares the caller's open file, until :meth:`File.inspect` may open it once more.
    """
    if filename is None:
        filename = kernel.path_of(fd)
    with naming(filename):
        file = File(kernel, kernel.duplicate(fd), filename)
    file.shared = True
    return file


def open_file(kernel: Kernel, path: str | bytes, protection: Protection) -> File:
    """Open by path with the rights that the protection needs, and no more."""
    flags = os.O_RDWR if protection is Protection.READ_WRITE else os.O_RDONLY
    flags |= SAFE_FLAGS
    # A read that notes its time may wait for the file system's journal, even one that must not
    # wait for the disk (RWF_NOWAIT). Only the owner of a file may do without.
    with suppress(PermissionError):
        return File(kernel, open_descriptor(path, flags | _NO_ACCESS_TIME), path)
    return File(kernel, open_descriptor(path, flags), path)


def open_descriptor(path: str | bytes, flags: int) -> int:
    """As :func:`os.open`, which may wait for a lease to be given back, but for no FIFO."""
    try:
        return os.open(path, flags)
    except BlockingIOError:
        # Somebody has a lease on the file (Samba, nfsd). Where we may wait, the kernel lets us in
        # when it is given back, after /proc/sys/fs/lease-break-time seconds in any case.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise
    return os.open(path, flags & ~_NONBLOCK)


_NO_ACCESS_TIME: int = getattr(os, "O_NOATIME", 0)


# Without it the open of a FIFO waits for its other end, for ever.
_NONBLOCK: int = getattr(os, "O_NONBLOCK", 0)

SAFE_FLAGS = (
    getattr(os, "O_CLOEXEC", 0)
    | _NONBLOCK
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_BINARY", 0)
)
