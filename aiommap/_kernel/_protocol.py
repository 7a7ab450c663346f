"""The functions that every platform file has, and what each promises.

No policy and no anyio here: a function makes one request of the kernel and turns its errno
into OSError. Everything that may wait releases the GIL, which is why the calls on memory go
through ``ctypes.CDLL`` and not through the methods of :class:`mmap.mmap`: those hold the GIL
until the disk has answered.

A platform module satisfies :class:`Kernel` as it is; a test passes an object of its own.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .._options import Advice, Protection

Buffer = bytearray | memoryview
Scratch = bytearray | mmap.mmap
"""Memory of our own that is searched; large ones are anonymous maps, which nobody zeroes first."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """
    What this kernel, and the file system of one path, can do. False is also what could not be
    tried: ``nowait_reads`` in a directory, and ``reserve``, where no file can be made.

    :ivar populate: pages can be brought in with an error instead of SIGBUS (Linux 5.14)
    :ivar nowait_reads: a read that would wait for the disk can be refused
        (``RWF_NOWAIT``; depends on the file system)
    :ivar cachestat: the page cache can be counted without a map (Linux 6.5)
    :ivar mincore: the kernel tells which pages of a map are in memory
    :ivar write_back_start: write-back can be started without waiting for it
    :ivar full_sync: a flush reaches the medium and not only the disk's cache
    :ivar huge_pages: huge pages can be mapped now
    :ivar ofd_locks: file locks that belong to an open file and not to a process
    :ivar reserve: blocks can be reserved, so that a full disk is an error at once
    :ivar page_size: bytes
    """

    populate: bool
    nowait_reads: bool
    cachestat: bool
    mincore: bool
    write_back_start: bool
    full_sync: bool
    huge_pages: bool
    ofd_locks: bool
    reserve: bool
    page_size: int


class Kernel(Protocol):
    """One platform. Addresses, offsets and lengths are in bytes."""

    @property
    def page_size(self) -> int:
        """Bytes of a page."""

    @property
    def map_granularity(self) -> int:
        """What the offset of a map must be a multiple of."""

    @property
    def map_file_flushes(self) -> bool:
        """Whether :meth:`map_file` flushes the file, and may keep to itself that it failed."""

    @property
    def cuts_mapped_files(self) -> bool:
        """Whether a file can be made shorter while it is mapped."""

    # Files

    def duplicate(self, fd: int) -> int:
        """A second descriptor of the same open file, closed on exec."""

    def reopen(self, fd: int) -> int | None:
        """
        The same file opened once more, closed on exec, if ``fd`` may read and write it; None where
        that is refused, not known, or would tell somebody who has a lease on it.
        """

    def path_of(self, fd: int) -> str | None:
        """What the open file is called, where the platform tells; never waits."""

    def file_size(self, fd: int) -> int:
        """Bytes of the file now."""

    def known_file_size(self, fd: int) -> int:
        """As :meth:`file_size`, as far as this kernel knows: no server is asked, no wait."""

    def set_file_size(self, fd: int, size: int) -> None:
        """Cut the file, or grow it with a hole."""

    def reserve(self, fd: int, offset: int, length: int, *, grow: bool) -> bool:
        """
        Give the range blocks; False where that cannot be done. Changes no byte.

        :param grow: make the file reach the end of the range too; else its size stays
        :raises OSError: ENOSPC, EDQUOT: there is no room for them
        """

    def file_is_in_memory(self, fd: int) -> bool:
        """Whether stores to the file never wait for a disk (tmpfs, memfd); False in doubt."""

    def reads_directly(self, fd: int) -> bool:
        """Whether reads of the open file pass memory by, and want aligned buffers (O_DIRECT)."""

    def disk_queue(self, fd: int) -> int:
        """Requests that the file's disk takes before one has to wait; an estimate if unknown."""

    def read_ahead(self, fd: int) -> int:
        """Bytes that are read ahead of who reads the file from page to page; an estimate if
        unknown."""

    def longest_hint(self, read_ahead: int) -> int:
        """Bytes that one hint starts to read at most, where so many are read ahead; what is behind
        them, it leaves alone."""

    def free_blocks(self, fd: int) -> int:
        """Blocks of the file's file system that we may still use."""

    def sync_data(self, fd: int) -> None:
        """Make the file's bytes, and the size needed to read them, durable."""

    def sync_all(self, fd: int) -> None:
        """As :meth:`sync_data`, with all of the metadata."""

    def sync_directory(self, path: str | bytes) -> None:
        """Make the names in a directory durable."""

    def start_write_back(self, fd: int, address: int, offset: int, length: int) -> None:
        """Start writing the range's dirty pages; says nothing about when they are safe."""

    def write_back(self, fd: int, address: int, offset: int, length: int) -> None:
        """
        Write the range's dirty pages and wait until the disk took them, into its cache maybe.

        Takes the bulk out of a later flush; a platform without it does nothing.
        """

    # Reading without a map

    def read(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """Read at an offset; short at the end of the file."""

    def read_nowait(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """
        As :meth:`read`, from memory only: short, or BlockingIOError, where the disk is needed.

        :raises OSError: EOPNOTSUPP where the file or the platform cannot tell
        """

    def will_need(self, fd: int, offset: int, length: int) -> None:
        """Start reading the range into memory; a hint that never fails."""

    # Maps

    def map_file(self, fd: int, length: int, protection: Protection, offset: int) -> mmap.mmap:
        """Map a range that starts at a multiple of :attr:`map_granularity`."""

    def memory_file(self, length: int, *, huge: bool) -> int | None:
        """A nameless file in memory of that size; None where the platform has none."""

    def map_memory(
        self, length: int, protection: Protection, *, stack: bool, huge: bool
    ) -> mmap.mmap:
        """Map memory without a file: shared with forked children, or private for READ_COPY."""

    def sync_range(self, address: int, length: int) -> None:
        """Make the range's stores durable; the address is a multiple of the page size."""

    def populate_read(self, address: int, length: int) -> None:
        """
        Bring the pages in.

        :raises OSError: EFAULT where touching a page would be SIGBUS; EINVAL or ENOSYS where
            the kernel cannot do it
        """

    def populate_write(self, address: int, length: int) -> None:
        """As :meth:`populate_read`, ready for stores; dirties every page."""

    def will_need_many(self, spans: Sequence[tuple[int, int]]) -> bool:
        """Start reading pages, ``(address, length)`` each, in one call; False for "one by one"."""

    def populate_many(self, spans: Sequence[tuple[int, int]], *, write: bool) -> bool:
        """
        Bring pages in, ready for stores if ``write``, in one call; False for "one by one", some
        may be there then.
        """

    def resident(self, address: int, length: int) -> bytes:
        """A byte for each page, its lowest bit set if the page is in memory (``mincore``)."""

    def cached_pages(self, fd: int, offset: int, length: int) -> int:
        """
        Pages of the file range in memory, also those whose read is still under way.

        :raises OSError: ENOSYS or EPERM where the kernel does not tell
        """

    def copy(self, destination: int, source: int, length: int) -> int:
        """
        Copy between two addresses of our own; what would be SIGBUS ends it early.

        :return: the bytes copied, short where a page of either side cannot be touched
        :raises OSError: EFAULT where nothing could be copied
        """

    def copy_many(self, copies: Sequence[tuple[int, int, int]]) -> bool:
        """
        Copies as of :meth:`copy`, ``(destination, source, length)`` each, in one call; False for
        "one by one", some may be done then.
        """

    def move(self, destination: int, source: int, length: int) -> None:
        """As :meth:`copy`, but a page that cannot be touched is SIGBUS."""

    def search(self, data: Scratch, length: int, needle: bytes, *, last: bool) -> int:
        """Where the needle first, or last, occurs in the first ``length`` bytes, or -1."""

    def advise(self, address: int, length: int, advice: Advice) -> None:
        """Give the kernel a hint. :raises OSError: ENOTSUP where it is not known"""

    def pin(self, address: int, length: int) -> None:
        """Keep the pages in memory. :raises OSError: ENOMEM or EPERM at the limit"""

    def unpin(self, address: int, length: int) -> None:
        """Undo :meth:`pin`."""

    def pin_limit(self) -> int | None:
        """Bytes that this process may pin; None for no limit."""

    def capabilities(self, path: str | bytes | None) -> Capabilities:
        """What this kernel, and the file system of ``path``, can do."""
