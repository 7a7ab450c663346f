"""One map of one file: the only module that knows addresses. Synchronous.

What keeps the process alive
----------------------------
* *Lifetime.* Whoever uses the raw address, in whatever thread, holds the :class:`Mapping`;
  whoever keeps a buffer holds the :class:`mmap.mmap` object below it. The memory is unmapped
  when the last reference of both kinds has gone, so nothing can dangle.
* *Faults.* A page that the file does not reach, or that the disk cannot read, is SIGBUS when
  it is touched. So nothing here touches pages of a file: shared maps are read with ``preadv``
  on the descriptor (the same page cache), private ones and all stores are copied by the
  kernel (``process_vm_readv`` on ourselves), and both answer with an error. Pages that the
  user is going to touch are populated first, which answers with an error too.
* *Waiting.* Functions named ``..._nowait`` never wait for a disk and run on the loop; the
  others run in a worker and release the GIL while they wait.

When a page cannot be had the kernel only says EFAULT; :meth:`Mapping.explain` asks the file
what is the matter with it.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import ClassVar, Literal

from ._buffers import is_plain
from ._errors import Range, TruncatedError
from ._file import File, Filename, naming
from ._kernel import Kernel, address_of, new_bytes
from ._options import Advice, Protection
from ._ranges import page_span, pieces

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

SLOW_START = 0.0005
CAREFUL = 0.5
"""
Seconds that the start of a read takes on average when it has to wait, for a free place in the
disk's queue or for an extent tree, and for how long no look starts one then. It takes 5 us.
"""

_SCRATCH = 64 << 10
_MOST_AREAS = 64
_LASTING = frozenset(
    (
        Advice.NORMAL,
        Advice.RANDOM,
        Advice.SEQUENTIAL,
        Advice.HUGE_PAGE,
        Advice.NO_HUGE_PAGE,
        Advice.MERGEABLE,
        Advice.UNMERGEABLE,
    )
)
_MISSING = (errno.EFAULT, errno.EIO)
_NO_POPULATE = (errno.EINVAL, errno.ENOSYS, errno.EPERM)
_POPULATE_TRIES = 5  # where pages are missing, and in the file right after; out of the air
_NO_GUARD = (errno.ENOSYS, errno.EPERM)


def _bad_buffer() -> OSError:
    return OSError(
        errno.EFAULT,
        "the memory of the buffer given cannot be read or written; is it a map of a file that "
        "was truncated?",
    )


def _now(end: Callable[[], object]) -> None:
    end()


def _unmap(memory: mmap.mmap, file: File | None) -> None:
    # close() unmaps without the GIL, which the mmap object's own end would hold for as long as
    # it takes (10 ms and more for a GiB).
    with suppress(BufferError):  # refused while buffers are out: their end unmaps
        memory.close()


class Mapping:
    """Bytes ``offset`` to ``offset + length`` of a file, or memory without a file."""

    __slots__ = (
        "__weakref__",
        "_address",
        "_careful_until",
        "_delta",
        "_fd",
        "_map",
        "_nowait",
        "_page",
        "_populate",
        "_probe",
        "_read_file_nowait",
        "_scratch",
        "_start_seconds",
        "file",
        "kernel",
        "length",
        "most_starting",
        "offset",
        "private",
        "protection",
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
        # The map starts at a multiple of the granularity; the user's first byte is here.
        self._delta = delta
        self._address = address_of(memory) + delta
        # What reads that must not wait read into: one byte, and as much as the last read took.
        # Bound once: they are on the path of every access.
        self._fd = file.fd if file is not None else -1
        self._page = kernel.page_size
        self._read_file_nowait = kernel.read_nowait
        self._probe = [memoryview(bytearray(1))]
        self._scratch = [memoryview(bytearray(0))]
        # Found out by trying, then remembered: whether reads can be refused instead of wait,
        # and whether pages can be populated.
        self._nowait = file is not None and not self.private and not file.in_memory
        self._populate = True
        # Reads that may be under way because of looks from the loop. Half of what the disk takes
        # before the next one has to wait: for there are other readers, and writers.
        self.most_starting: int = file.disk_queue // 2 if file is not None else 0
        self._careful_until = 0.0
        self._start_seconds = 0.0

    finisher: ClassVar[Callable[[Callable[[], object]], object]] = staticmethod(_now)
    """Runs what ends a mapping whose last user is gone; the map's makes that a worker's task."""

    def __del__(self) -> None:
        try:
            memory = self._map
        except AttributeError:  # __init__ did not get that far
            return
        # Nobody uses the address any more. The file goes with the call.
        Mapping.finisher(partial(_unmap, memory, self.file))

    def discard(self) -> None:
        """Unmap and close now: for a mapping that nobody has got, see :meth:`File.close`."""
        self._map.close()
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
    def store_waits(self) -> bool:
        """Whether the first store into a page may wait for a disk (journal, throttling)."""
        return self.file is not None and not self.private and not self.file.in_memory

    @property
    def pages_are_files(self) -> bool:
        """Whether pages come from a disk, are the same for everybody, and cost no memory."""
        return self.store_waits

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
        return self._nowait and self._careful_until == 0

    def is_loaded_nowait(self, offset: int, length: int, careful: bool = False) -> bool:
        """
        Whether the range is in the file and in memory; in doubt it is not.

        :param careful: start no read if it is not

        O(1) up to two pages, O(pages) with a small constant above.
        """
        if self._nowait and 0 < length <= INLINE:
            if (careful or self._careful_until) and not self._is_cached_nowait(offset, length):
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
            except OSError as exc:
                return self._refused(exc, began)
        if length == 0:
            return True
        if length > PROBED:
            return False
        if self._nowait and self.file is not None and not self.file.mincore_is_honest:
            # The first piece that is not there ends it, and starts no more than one read.
            return all(
                self.is_loaded_nowait(start, count, careful)
                for start, count in pieces(offset, length, INLINE)
            )
        return self._is_resident_nowait(offset, length) and self._reaches_nowait(offset, length)

    def _window(self, length: int) -> list[memoryview]:
        window = self._scratch
        if len(window[0]) != length:
            whole = window[0].obj
            if len(whole) < length:  # type: ignore[arg-type]
                whole = bytearray(max(length, _SCRATCH))
            window = self._scratch = [memoryview(whole)[:length]]
        return window

    def _refused(self, error: OSError, began: float) -> Literal[False]:
        """A read that must not wait was refused: the disk is needed, or it cannot be had."""
        if error.errno == errno.EAGAIN:
            now = monotonic()
            # The moving average of the last eight or so, each cut to four times the limit: a
            # thread that lost its processor for a while is not a disk that is busy.
            cost = min(now - began, 4 * SLOW_START) - self._start_seconds
            self._start_seconds += cost / 8
            if self._start_seconds > SLOW_START:
                self._start_seconds = 0.0
                self._careful_until = now + CAREFUL
        elif error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            self._nowait = False
        return False

    def _is_cached_nowait(self, offset: int, length: int) -> bool:
        """Whether a look at the range would start no read: its pages are there or on their way."""
        if self._careful_until and monotonic() > self._careful_until:
            self._careful_until = 0.0
        assert self.file is not None
        start, size = page_span(self.offset + offset, length, self._page)
        try:
            return self.kernel.cached_pages(self._fd, start, size) * self._page >= size
        except OSError:
            return self._is_resident_nowait(offset, length)

    def _is_resident_nowait(self, offset: int, length: int) -> bool:
        if self.file is not None and not self.file.mincore_is_honest:
            return False
        try:
            state = self.kernel.resident(*self._pages(offset, length))
        except OSError:
            return False
        return state.count(1) == len(state) or all(byte & 1 for byte in state)

    def _reaches_nowait(self, offset: int, length: int) -> bool:
        file = self.file
        if file is None or file.anonymous:
            return True
        try:
            # fstat() asks the server of a FUSE or network file system; those do not know reads
            # that must not wait.
            size = (self.kernel.file_size if self._nowait else self.kernel.known_file_size)(file.fd)
        except OSError:
            return False
        return size - self.offset - offset >= length

    def read_nowait(self, offset: int, length: int, careful: bool = False) -> bytes | None:
        """The bytes, if they are few and in memory; else None. See :meth:`is_loaded_nowait`."""
        if length > INLINE:
            return None
        if self._nowait:
            if (careful or self._careful_until) and not self._is_cached_nowait(offset, length):
                return None
            began = monotonic()
            window = self._scratch
            if len(window[0]) != length:
                window = self._window(length)
            try:
                if self._read_file_nowait(self._fd, window, self.offset + offset) == length:
                    return bytes(window[0])
            except OSError as exc:
                self._refused(exc, began)  # the worker finds out what is the matter
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
            return bytes(memory) if self._reaches_nowait(offset, length) else None
        return None

    def write_nowait(self, offset: int, data: memoryview) -> bool:
        """Store a few bytes, if that cannot wait for a disk; else False, to be done again."""
        length = data.nbytes
        if length > INLINE or self.store_waits:
            return False
        if length == 0:
            return True
        if not is_plain(data):
            return False  # touching it may wait
        source = address_of(data)
        target = self._address + offset
        if source < target + length and target < source + length:
            return False  # overlapping
        if not (self._is_resident_nowait(offset, length) and self._reaches_nowait(offset, length)):
            return False
        # SAFETY: the data is exported by its memoryview, the map is held by self. A page that
        # was truncated away meanwhile ends the copy early, and the worker finds out.
        return self._copy_nowait(target, source, length) and self._reaches_nowait(offset, length)

    def _copy_nowait(self, target: int, source: int, length: int) -> bool:
        try:
            return self.kernel.copy(target, source, length) == length
        except OSError:
            return False

    # In a worker: may wait, without the GIL

    def _pages(self, offset: int, length: int) -> tuple[int, int]:
        # SAFETY: a map begins at a page and the kernel maps whole pages, so the pages around
        # a range inside the map are pages of the map.
        return page_span(self._address + offset, length, self.kernel.page_size)

    def will_load(self, offset: int, length: int) -> None:
        """Start reading the range; a hint."""
        if self.file is not None and not self.file.in_memory:
            self.kernel.will_need(self.file.fd, self.offset + offset, length)

    def will_load_many(self, ranges: Sequence[Range]) -> None:
        """Start reading the ranges; a hint."""
        if self.file is None or self.file.in_memory:
            return
        if not self.kernel.will_need_many([self._pages(*each) for each in ranges]):
            for offset, length in ranges:
                self.kernel.will_need(self.file.fd, self.offset + offset, length)

    def load_many(self, ranges: Sequence[Range]) -> bool:
        """
        Bring several ranges in together, if that goes well; else :meth:`load` says why.

        It waits for all of them: for a few that are on their way already.
        """
        if not self._populate:
            return False
        if not self.kernel.populate_read_many([self._pages(*each) for each in ranges]):
            return False
        try:
            reach = self.reach()
        except OSError:
            return False
        return all(length <= reach - offset for offset, length in ranges)

    def load(self, offset: int, length: int, *, write: bool = False) -> None:
        """
        Bring the range in, ready for stores if ``write``, which dirties its pages.

        :raises TruncatedError: the file does not reach it
        :raises OSError: what the disk says; ENOSPC for a hole that has no room
        """
        if length == 0:
            return
        tries = _POPULATE_TRIES
        while self._populate:
            try:
                if write:
                    self.kernel.populate_write(*self._pages(offset, length))
                else:
                    self.kernel.populate_read(*self._pages(offset, length))
                break
            except OSError as exc:
                tries -= 1
                if exc.errno in _NO_POPULATE:
                    self._populate = False
                elif reason := self.explain(exc, offset, length, write=write):
                    raise reason from None
                elif not tries:
                    raise self._named(OSError(errno.EIO, os.strerror(errno.EIO))) from None
        if not self._populate:
            self._load_by_reading(offset, length)
            if write:
                self.reserve(offset, length)
        # The last page is there even when the file ends inside it.
        self.check_reach(offset, length)

    def _load_by_reading(self, offset: int, length: int) -> None:
        # Kernels before 5.14 and other platforms: reading warms the page cache, and what is
        # left for the touch is a fault that finds its page.
        scratch = memoryview(bytearray(min(length, _SCRATCH)))
        for start, count in pieces(offset, length, _SCRATCH):
            if self.file is None:
                # SAFETY: inside the map; memory without a file has no page that can be missing.
                self.kernel.move(address_of(scratch), self._address + start, count)
            else:
                self._read_file(start, scratch[:count])

    def reserve(self, offset: int, length: int) -> None:
        """Give holes of the range blocks, so that a store finds room or the call ENOSPC."""
        if self.file is None or self.private or length == 0:
            return
        try:
            self.file.reserve(self.offset + offset, length)
        except OSError as exc:
            if exc.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._populate:
                raise
            # On a full disk xfs refuses also where every block is there already: it wants room
            # for the asking itself. Whether stores find room is then found out by preparing
            # them; this dirties the pages, but they are about to be stored to.
            try:
                self.kernel.populate_write(*self._pages(offset, length))
            except OSError:
                raise exc from None

    def explain(self, error: OSError, offset: int, length: int, *, write: bool) -> OSError | None:
        """
        Why a page of the range cannot be had; ``error`` itself when the kernel knew.

        None where the file answers all the same: it healed meanwhile (cut and grown again by
        somebody else, a bad page that can be read now), or the memory itself is bad.
        """
        if error.errno not in _MISSING:
            return self._named(error)
        try:
            self.check_reach(offset, length)
            if self.file is not None:
                if not self.file.anonymous:
                    scratch = memoryview(bytearray(min(length, _SCRATCH)))
                    for start, count in pieces(offset, length, _SCRATCH):
                        self._read_file(start, scratch[:count])
                if write and not self.private:
                    self.file.reserve(self.offset + offset, length)
                if (write or self.file.in_memory) and self.kernel.free_blocks(self.file.fd) == 0:
                    # On tmpfs even reading a hole through a map takes a page; on btrfs every
                    # first store into a page does, whether it has a block or not.
                    return self._named(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        except OSError as exc:
            return self._named(exc)
        return None

    def _named(self, error: OSError) -> OSError:
        if error.filename is None and self.file is not None:
            error.filename = self.file.filename
        return error

    def _read_file(self, offset: int, buffer: memoryview) -> None:
        assert self.file is not None
        done = 0
        length = len(buffer)
        with naming(self.file.filename):
            while done < length:
                try:
                    count = self.kernel.read(
                        self.file.fd, [buffer[done:]], self.offset + offset + done
                    )
                except OSError as exc:
                    if exc.errno == errno.EFAULT:
                        raise _bad_buffer() from None
                    raise
                if count == 0:
                    size = min(self.reach(), offset + done)
                    raise self._truncated(offset, length, size)
                done += count

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """
        Copy the range into a writable buffer of bytes, exactly.

        :raises TruncatedError: the file does not reach it
        :raises OSError: what the disk says
        """
        if self.distance(offset, buffer):
            # It overlaps the place it comes from; the kernel copies page by page, forwards.
            data = memoryview(self.read(offset, len(buffer)))
            # SAFETY: both are exported by their memoryviews, and equally long.
            self._copy(address_of(buffer), address_of(data), len(buffer), offset, write=False)
            return
        if self.file is not None and not self.private:
            self._read_file(offset, buffer)
            return
        # SAFETY: the caller's buffer is exported by its memoryview, the map is held by self.
        self._copy(address_of(buffer), self._address + offset, len(buffer), offset, write=False)
        self.check_reach(offset, len(buffer))

    def read(self, offset: int, length: int) -> bytes:
        """As :meth:`read_into`, as new bytes, without the GIL while it copies."""
        if length == 0:
            return b""
        data, memory = new_bytes(length)
        self.read_into(offset, memory)
        return data

    def write(self, offset: int, data: memoryview) -> None:
        """
        Store bytes: all of them, or an error. Never makes the file longer.

        :raises TruncatedError: the file does not reach the range
        :raises OSError: ENOSPC for a hole that has no room, what the disk says otherwise
        """
        length = data.nbytes
        if length == 0:
            return
        self.check_reach(offset, length)
        source = address_of(data)
        target = self._address + offset
        if source < target + length and target < source + length:
            # It overlaps the place it goes to; the kernel copies page by page, forwards.
            data = memoryview(self._copied_source(source, length))
            source = address_of(data)
        if self.store_waits:
            # So that an error is found before the first byte has changed.
            self.load(offset, length, write=True)
        self._copy(target, source, length, offset, write=True)
        # Truncated while we copied: some bytes went into pages that are gone.
        self.check_reach(offset, length)

    def copied(self, data: memoryview) -> bytes:
        """
        A copy of a caller's buffer, which may be a map itself.

        :raises OSError: EFAULT: it cannot be read
        """
        # SAFETY: the buffer is exported by its memoryview.
        return self._copied_source(address_of(data), len(data))

    def _copied_source(self, source: int, length: int) -> bytes:
        data, memory = new_bytes(length)
        try:
            copied = self.kernel.copy(address_of(memory), source, length)
        except OSError as exc:
            if exc.errno == errno.EFAULT:
                raise _bad_buffer() from None
            if exc.errno not in _NO_GUARD:
                raise
            self.kernel.move(address_of(memory), source, length)
            return data
        if copied != length:
            raise _bad_buffer()
        return data

    def _copy(self, target: int, source: int, length: int, offset: int, *, write: bool) -> None:
        done = 0
        tries = _POPULATE_TRIES
        while done < length:
            try:
                # SAFETY: both sides are alive, the map by self and the other by its
                # memoryview, and `length` is inside both.
                done += self.kernel.copy(target + done, source + done, length - done)
                tries = _POPULATE_TRIES
            except OSError as exc:
                if exc.errno in _NO_GUARD:
                    # SAFETY: as above; a truncation between these two lines is SIGBUS, which
                    # only the guarded copy prevents.
                    self.load(offset + done, length - done, write=write)
                    self.kernel.move(target + done, source + done, length - done)
                    return
                if exc.errno != errno.EFAULT:
                    raise self._named(exc) from None
                # A page of ours or of the buffer's. load() raises if it is ours, and if it was
                # ours and is there by now, the next try goes on.
                self._check_buffer((source if write else target) + done)
                tries -= 1
                if not tries:
                    raise self._named(OSError(errno.EIO, os.strerror(errno.EIO))) from None
                self.load(offset + done, length - done, write=write)

    def _check_buffer(self, address: int) -> None:
        """:raises OSError: EFAULT: this byte of the caller's buffer cannot be touched"""
        scratch = bytearray(1)
        try:
            # SAFETY: a byte of the caller's buffer, which its memoryview keeps.
            self.kernel.copy(address_of(scratch), address, 1)
        except OSError as exc:
            if exc.errno == errno.EFAULT:
                raise _bad_buffer() from None
            raise

    def _cached_bytes(self, file: File, offset: int, length: int) -> int:
        page = self.kernel.page_size
        start, size = page_span(self.offset + offset, length, page)
        with naming(file.filename):
            return min(self.kernel.cached_pages(file.fd, start, size) * page, length)

    def resident_bytes(self, offset: int, length: int) -> int:
        """How many bytes of the range are in memory now."""
        # mincore tells of whole pages, and of those behind the end of the file too.
        length = min(length, max(self.reach() - offset, 0))
        if length == 0:
            return 0
        address, span = self._pages(offset, length)
        page = self.kernel.page_size
        if self.file is not None and not self.file.mincore_is_honest:
            with suppress(OSError):  # no better witness than mincore
                return self._cached_bytes(self.file, offset, length)
        try:
            state = self.kernel.resident(address, span)
        except OSError:
            if self.file is None:
                raise
            return self._cached_bytes(self.file, offset, length)
        first = self._address + offset
        total = 0
        for number, byte in enumerate(state):
            if byte & 1:
                start = address + number * page
                total += min(start + page, first + length) - max(start, first)
        return total

    # Durability

    def start_write_back(self, offset: int, length: int) -> None:
        """Start writing the range's dirty pages."""
        assert self.file is not None
        address, span = self._pages(offset, length)
        start, _ = page_span(self.offset + offset, length, self.kernel.page_size)
        with naming(self.file.filename):
            self.kernel.start_write_back(self.file.fd, address, start, span)

    def write_back(self, offset: int, length: int) -> None:
        """Write the range's dirty pages, see :meth:`Kernel.write_back`."""
        assert self.file is not None
        address, span = self._pages(offset, length)
        start, _ = page_span(self.offset + offset, length, self.kernel.page_size)
        with naming(self.file.filename):
            self.kernel.write_back(self.file.fd, address, start, span)

    def sync_range(self, offset: int, length: int) -> None:
        """Make the range durable, and the size needed to read it."""
        self.kernel.sync_range(*self._pages(offset, length))

    # Hints

    def advise(self, offset: int, length: int, advice: Advice) -> None:
        """Give the kernel a hint. Hints about how pages are used may reach further."""
        if advice in _LASTING:
            # Each change between two pages splits the kernel's area, and a map of hundreds of
            # areas is slow to flush. The hint may as well be true of a bit more.
            grain = max(self.length // _MOST_AREAS, 1)
            end = min(-(-(offset + length) // grain) * grain, self.length)
            offset -= offset % grain
            length = end - offset
        with naming(self.filename):
            self.kernel.advise(*self._pages(offset, length), advice)

    def page_numbers(self, offset: int, length: int) -> tuple[int, int]:
        """The pages of a range, ``(first, stop)``, counted from the page the map begins in."""
        page = self.kernel.page_size
        start = self._address % page + offset
        return start // page, -(-(start + length) // page)

    def pin_pages(self, first: int, count: int) -> None:
        """Keep pages, counted from the map's first, in memory."""
        self.kernel.pin(*self._page_range(first, count))

    def unpin_pages(self, first: int, count: int) -> None:
        self.kernel.unpin(*self._page_range(first, count))

    def _page_range(self, first: int, count: int) -> tuple[int, int]:
        page = self.kernel.page_size
        start = self._address - self._address % page
        return start + first * page, count * page
