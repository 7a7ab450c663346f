"""The memory of a map, and what can be known and done of it without a wait: for the loop.

A page is only touched after a probe that cannot wait has shown it in memory: a read that is
refused where the disk is needed (``preadv`` with ``RWF_NOWAIT``), or ``mincore``. What waits is
in ``_mapping.py``, and how both keep the process alive is said there.
"""

from __future__ import annotations

import errno
import mmap
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import ClassVar, Literal

from ._buffers import is_plain
from ._errors import TruncatedError
from ._file import File, Filename, at_once
from ._kernel import Kernel, address_of
from ._options import Protection
from ._ranges import page_span, pieces
from ._read_starts import STARTED, ReadStarts

INLINE = 256 << 10
"""
Bytes that are copied on the loop when they are in memory: 10 to 20 us, where a thread hop
takes 50 to 150 us.
"""

PROBED = 4 << 20
"""
Bytes whose pages are looked up on the loop, by mincore: 100 us where none of them was touched
before, 12 us else. Larger ranges always go to a worker.
"""

SCRATCH = 64 << 10


def _end(of: type[MappedMemory], memory: mmap.mmap, file: File | None) -> None:
    # Nobody uses the address any more. The file goes with the call.
    of.finisher(partial(_unmap, memory, file))


def _unmap(memory: mmap.mmap, file: File | None) -> None:
    # close() unmaps without the GIL, which the mmap object's own end would hold for as long as
    # it takes (10 ms and more for a GiB).
    with suppress(BufferError):  # refused while buffers are out: their end unmaps
        memory.close()


class MappedMemory:
    """Bytes ``offset`` to ``offset + length`` of a file, or memory without a file."""

    __slots__ = (
        "__weakref__",
        "_address",
        "_delta",
        "_fd",
        "_is_read",
        "_map",
        "_nowait",
        "_page",
        "_populate",
        "_probe",
        "_read_file_nowait",
        "_scratch",
        "_will_need",
        "file",
        "kernel",
        "length",
        "offset",
        "private",
        "protection",
        "starts",
        "used_at_random",
    )

    def __init__(
        self,
        kernel: Kernel,
        file: File | None,
        memory: mmap.mmap,
        protection: Protection,
        offset: int,
        length: int,
        delta: int,
    ) -> None:
        self.kernel: Kernel = kernel
        self.file: File | None = file
        self.protection: Protection = protection
        self.offset: int = offset
        self.length: int = length
        self.private: bool = protection is Protection.READ_COPY
        self._map = memory
        # Not by __del__, in the middle of which a weak reference, and flushes have one, still
        # gives out the object: its address would be used while it is unmapped.
        weakref.finalize(self, _end, type(self), memory, file).atexit = False
        # The map starts at a multiple of the granularity; the user's first byte is here.
        self._delta = delta
        self._address = address_of(memory) + delta
        # What reads that must not wait read into: one byte, and as much as the last read took.
        # Bound once: they are on the path of every access.
        self._fd = file.fd if file is not None else -1
        self._page = kernel.page_size
        self._read_file_nowait = kernel.read_nowait
        self._will_need = kernel.will_need
        self._probe = [memoryview(bytearray(1))]
        self._scratch = [memoryview(bytearray(0))]
        # Whether the file itself can be read for what the memory has.
        self._is_read = file is not None and not self.private and not file.direct
        # Found out by trying, then remembered: whether reads can be refused instead of wait, and
        # whether pages can be populated.
        self._nowait = self._is_read and file is not None and not file.in_memory
        self._populate = True
        self.used_at_random: bool = False  # as was advised last, for whatever part
        self.starts: ReadStarts = ReadStarts(file.disk_queue if file is not None else 0)

    finisher: ClassVar[Callable[[Callable[[], object]], object]] = staticmethod(at_once)
    """Runs what ends a mapping whose last user is gone; the map's makes that a worker's task."""

    def unmap(self) -> None:
        """Unmap now: for a mapping that nobody has got, see :meth:`File.close`."""
        self._map.close()

    def discard(self) -> None:
        """As :meth:`unmap`, and close the file."""
        self.unmap()
        if self.file is not None:
            self.file.close()

    # What it is

    @property
    def address(self) -> int:
        """Of the first byte; valid while this object, or a buffer of it, lives."""
        return self._address

    @property
    def syncable(self) -> bool:
        """Whether stores reach a file that somebody may want to be durable."""
        return (
            self.protection is Protection.READ_WRITE
            and self.file is not None
            and not self.file.anonymous
        )

    @property
    def shares_disk(self) -> bool:
        """
        Whether pages come from a disk, are the same for everybody, and cost no memory. Then the
        first store into one may wait for it (journal, throttling).
        """
        return self.file is not None and not self.private and not self.file.in_memory

    def buffer(self, offset: int, length: int, writable: bool) -> memoryview:
        """The memory itself. Whoever holds it, or a slice of it, keeps the map mapped."""
        if length == 0:
            # Nothing of the map, which may be resized and closed in spite of it.
            return memoryview(bytearray() if writable else b"")
        start = self._delta + offset
        view = memoryview(self._map)[start : start + length]
        return view if writable or view.readonly else view.toreadonly()

    def exported(self) -> bool:
        """Whether buffers of the memory are out."""
        try:
            # Refused in this order: because of buffers, then because of the size.
            self._map.resize(-1)
        except BufferError:
            return True
        except (ValueError, TypeError, SystemError, AttributeError):
            return False
        raise AssertionError("mmap.resize(-1) must fail")

    @property
    def filename(self) -> Filename:
        """What errors and the log call the file; None for memory."""
        return None if self.file is None else self.file.filename

    def reach(self) -> int:
        """How many bytes of the map the file reaches now."""
        if self.file is None or self.file.anonymous:
            return self.length
        return min(max(self.file.size() - self.offset, 0), self.length)

    def check_reach(self, offset: int, length: int) -> None:
        """:raises TruncatedError: when the file does not reach the end of the range"""
        size = self.reach()
        if length > size - offset and length:
            raise self._truncated(offset, length, size)

    def _truncated(self, offset: int, length: int, size: int) -> TruncatedError:
        return TruncatedError(offset, length, size, self.filename)

    def distance(self, offset: int, buffer: memoryview) -> int:
        """How far behind the bytes at ``offset`` a buffer lies that overlaps them; else 0."""
        away = address_of(buffer) - (self._address + offset)
        return away if abs(away) < len(buffer) else 0

    # On the loop: never waits for a disk

    @property
    def starts_reads(self) -> bool:
        """Whether a look at what is not in memory starts to read it."""
        return self._nowait and self.starts.careful_until == 0

    def start_nowait(self, offset: int, length: int) -> None:
        """
        Start to read what was not looked for: one of those that may be cold.

        A look that misses starts the read as well, but raises an error besides and comes
        a turn of the loop later.
        """
        starts = self.starts
        starts.cold -= 1
        if length <= STARTED and not starts.careful_until:
            began = monotonic()
            self._will_need(self._fd, self.offset + offset, length)
            starts.took(began, monotonic())

    def is_loaded_nowait(self, offset: int, length: int) -> bool:
        """
        Whether the range is in the file and in memory; in doubt it is not.

        O(1) up to two pages, O(pages) with a small constant above.
        """
        if self._nowait and 0 < length <= INLINE:
            starts = self.starts
            if (
                starts.under_way >= starts.most or starts.careful_until
            ) and not self._is_cached_nowait(offset, length):
                return False
            # A byte of a page proves the page, and the last byte that the file reaches it.
            first = self.offset + offset
            last = first + length - 1
            page = self._page
            pages = last // page - first // page
            began = monotonic()
            try:
                if pages <= 1:
                    read = self._read_file_nowait
                    return read(self._fd, self._probe, last) == 1 and (
                        pages == 0 or read(self._fd, self._probe, first) == 1
                    )
                # Cheaper than page by page: 64 KiB in 2.5 us.
                return self._read_file_nowait(self._fd, self._window(length), first) == length
            except BlockingIOError:
                starts.took(began, monotonic())  # to start to read it
                return False
            except OSError as exc:
                return self._refused(exc)
        if length == 0:
            return True
        if length > PROBED:
            return False
        if self._nowait and self.file is not None and not self.file.mincore_is_honest:
            # The first piece that is not there ends it, and starts no more than one read.
            return all(
                self.is_loaded_nowait(start, count)
                for start, count in pieces(offset, length, INLINE)
            )
        return self._is_resident_nowait(offset, length) and self.reaches_nowait(offset, length)

    def _window(self, length: int) -> list[memoryview]:
        window = self._scratch
        if len(window[0]) != length:
            whole = window[0].obj
            if len(whole) < length:  # type: ignore[arg-type]
                whole = bytearray(max(length, SCRATCH))
            window = self._scratch = [memoryview(whole)[:length]]
        return window

    def _refused(self, error: OSError) -> Literal[False]:
        """A read that must not wait cannot be had, here or at all: the worker finds out."""
        # EPERM: a container.
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM):
            self._nowait = False
        return False

    def _is_cached_nowait(self, offset: int, length: int) -> bool:
        """Whether a look at the range would start no read: its pages are there or on their way."""
        self.starts.recover(monotonic())
        try:
            return self._is_cached(offset, length)
        except OSError:
            return self._is_resident_nowait(offset, length)

    def _is_cached(self, offset: int, length: int) -> bool:
        """
        Whether its pages are there or on their way.

        :raises OSError: the kernel does not tell
        """
        start, size = page_span(self.offset + offset, length, self._page)
        return self.kernel.cached_pages(self._fd, start, size) * self._page >= size

    def _is_resident_nowait(self, offset: int, length: int) -> bool:
        if self.file is not None and not self.file.mincore_is_honest:
            return False
        try:
            state = self.kernel.resident(*self._pages(offset, length))
        except OSError:
            return False
        return state.count(1) == len(state) or all(byte & 1 for byte in state)

    def reaches_nowait(self, offset: int, length: int) -> bool:
        """Whether the file reaches the range, as far as the kernel knows."""
        file = self.file
        if file is None or file.anonymous:
            return True
        if self._nowait:
            last = self.offset + offset + length - 1
            try:
                # Half the price of the size; the byte is in memory where this is asked.
                return self._read_file_nowait(self._fd, self._probe, last) == 1
            except BlockingIOError:
                return False  # the page has gone; whether the file has it, a worker finds out
            except OSError:
                pass
        try:
            # fstat() asks the server of a FUSE or network file system; those do not know reads
            # that must not wait.
            size = (self.kernel.file_size if self._nowait else self.kernel.known_file_size)(file.fd)
        except OSError:
            return False
        return size - self.offset - offset >= length

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        """The bytes, if they are few and in memory; else None. See :meth:`is_loaded_nowait`."""
        if length > INLINE:
            return None
        if self._nowait:
            starts = self.starts
            if (
                starts.under_way >= starts.most or starts.careful_until
            ) and not self._is_cached_nowait(offset, length):
                return None
            began = monotonic()
            window = self._scratch
            if len(window[0]) != length:
                window = self._window(length)
            try:
                if self._read_file_nowait(self._fd, window, self.offset + offset) == length:
                    return bytes(window[0])
            except BlockingIOError:
                starts.took(began, monotonic())
            except OSError as exc:
                self._refused(exc)
            return None
        if length == 0:
            return b""
        if not self._is_resident_nowait(offset, length):
            return None
        # Not read(): the file systems that come here may ask a server before they answer.
        memory = self._window(length)[0]
        # SAFETY: the scratch is as long, the map is held by self.
        if self._copy_nowait(address_of(memory), self._address + offset, length):
            # Afterwards: bytes behind the end of the file, in its last page, read as zeros.
            return bytes(memory) if self.reaches_nowait(offset, length) else None
        return None

    def write_nowait(self, offset: int, data: memoryview) -> bool:
        """Store a few bytes, if that cannot wait for a disk; else False, to be done again."""
        length = data.nbytes
        if length > INLINE or self.shares_disk:
            return False
        if length == 0:
            return True
        if not is_plain(data):
            return False  # touching it may wait
        source = address_of(data)
        target = self._address + offset
        if source < target + length and target < source + length:
            return False  # overlapping
        if not (self._is_resident_nowait(offset, length) and self.reaches_nowait(offset, length)):
            return False
        # SAFETY: the data is exported by its memoryview, the map is held by self. A page that
        # was truncated away meanwhile ends the copy early, and the worker finds out.
        return self._copy_nowait(target, source, length) and self.reaches_nowait(offset, length)

    def _copy_nowait(self, target: int, source: int, length: int) -> bool:
        try:
            return self.kernel.copy(target, source, length) == length
        except OSError:
            return False

    def _pages(self, offset: int, length: int) -> tuple[int, int]:
        # SAFETY: a map begins at a page and the kernel maps whole pages, so the pages around
        # a range inside the map are pages of the map.
        return page_span(self._address + offset, length, self.kernel.page_size)
