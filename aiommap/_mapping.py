"""One map of one file. Synchronous; this and ``_mapped_memory.py`` alone know addresses.

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
* *Waiting.* What :class:`MappedMemory` does never waits for a disk and runs on the loop; what
  is added here runs in a worker and releases the GIL while it waits.

When a page cannot be had the kernel only says EFAULT; :meth:`Mapping.explain` asks the file
what is the matter with it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

from ._errors import Range
from ._file import File, naming
from ._kernel import address_of, new_bytes
from ._mapped_memory import SCRATCH, MappedMemory
from ._options import Advice
from ._ranges import page_span, pieces

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
_USES = (Advice.NORMAL, Advice.RANDOM, Advice.SEQUENTIAL)
_MISSING = (errno.EFAULT, errno.EIO)
_NO_POPULATE = (errno.EINVAL, errno.ENOSYS, errno.EPERM)
_FAR = 1 << 20
_MOST_READAHEAD = 256 << 10
_POPULATE_TRIES = 5  # where pages are missing, and in the file right after; out of the air
_RESIDENT = bytes(range(1, 256, 2))  # of mincore: the lowest bit says it, the others nothing
_NO_GUARD = (errno.ENOSYS, errno.EPERM)


def _bad_buffer() -> OSError:
    return OSError(
        errno.EFAULT,
        "the memory of the buffer given cannot be read or written; is it a map of a file that "
        "was truncated?",
    )


class Mapping(MappedMemory):
    """A map of a file, or memory: what waits for a disk, without the GIL, in a worker."""

    __slots__ = ()

    # Pages

    @property
    def reads_far(self) -> bool:
        """
        Whether a read that was not announced reads far ahead of itself.

        On its own it does so with large pages of the cache, on a hint with small ones: loads of
        16 MiB took 8 % less in all.
        """
        return self.file is None or self.file.longest_hint >= _FAR

    @property
    def readahead(self) -> int:
        """
        How many pages may be read ahead of who goes on from page to page, without being told.

        Twice as many as the kernel does, up to 256 KiB: it goes on before the last one is needed,
        and we do not. 0 where it reads none, or was told that pages are used at random.
        """
        if self.file is None or self.used_at_random:
            return 0
        return min(2 * self.file.read_ahead, _MOST_READAHEAD) // self.kernel.page_size

    def will_load(self, ranges: Sequence[Range]) -> None:
        """Start reading all of the ranges; a hint."""
        if self.file is None or self.file.in_memory:
            return
        page = self.kernel.page_size
        # To count pages that are there takes less than to start reading them: of `find` a
        # fifteenth.
        with suppress(OSError):
            ranges = [each for each in ranges if each[1] < _FAR or not self._is_cached(*each)]
        # Of the file, so that its requests begin where its blocks do.
        hints = [
            hint
            for offset, length in ranges
            for hint in pieces(
                *page_span(self.offset + offset, length, page), self.file.longest_hint
            )
        ]
        if not hints:
            return
        # SAFETY: pages of the map, as in _pages().
        base = self._address - self.offset
        if not self.kernel.will_need_many([(base + start, length) for start, length in hints]):
            for start, length in hints:
                self.kernel.will_need(self.file.fd, start, length)

    def load_many(self, ranges: Sequence[Range], *, write: bool = False) -> bool:
        """
        Bring several ranges in together, if that goes well; else :meth:`load` says why.

        It waits for all of them: for a few that are on their way already.
        """
        if not self._populate:
            return False
        spans = [self._pages(*each) for each in ranges]
        # They are announced, but maybe the thread that does so has not come to them; and a fault
        # whose read nobody has started reads far around itself, 8 MiB on some disks.
        self.kernel.will_need_many(spans)
        return self.kernel.populate_many(spans, write=write) and self._reaches_all(ranges)

    def _reaches_all(self, ranges: Sequence[Range]) -> bool:
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
        scratch = memoryview(bytearray(min(length, SCRATCH)))
        for start, count in pieces(offset, length, SCRATCH):
            if self.file is None:
                # SAFETY: inside the map; memory without a file has no page that can be missing.
                self.kernel.move(address_of(scratch), self._address + start, count)
            elif self.file.direct:
                # SAFETY: inside the map; a page that is missing ends the copy.
                try:
                    copied = self.kernel.copy(address_of(scratch), self._address + start, count)
                except OSError:
                    copied = 0
                if copied != count:
                    self.check_reach(start, count)
                    raise self._named(OSError(errno.EIO, os.strerror(errno.EIO)))
            else:
                self._read_file(start, scratch[:count])

    def prepare_stores(self, offset: int, length: int) -> None:
        """
        See to it that stores into the range find a file, and room in it.

        :raises TruncatedError: the file does not reach it; then it is given no blocks either
        :raises OSError: ENOSPC
        """
        self.check_reach(offset, length)
        self.reserve(offset, length)

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
                if not (self.file.anonymous or self.file.direct):
                    scratch = memoryview(bytearray(min(length, SCRATCH)))
                    for start, count in pieces(offset, length, SCRATCH):
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
        if self._is_read:
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
        if self.file is not None and not self.private:
            # So that an error is found before the first byte has changed: also files in memory
            # may have room for the first pages only.
            self.load(offset, length, write=True)
        self._copy(target, source, length, offset, write=True)
        # Truncated while we copied: some bytes went into pages that are gone.
        self.check_reach(offset, length)

    def write_many(self, parts: Sequence[tuple[int, memoryview]]) -> bool:
        """
        Store several, ``(offset, data)`` each, if all goes well. Else each is to be stored by
        itself, be it again: :meth:`write` says what is wrong.
        """
        ranges = []
        copies = []
        for offset, data in parts:
            length = len(data)
            target = self._address + offset
            # SAFETY: as in write().
            source = address_of(data)
            if source < target + length and target < source + length:
                return False
            ranges.append((offset, length))
            copies.append((target, source, length))
        return (
            self.load_many(ranges, write=True)
            and self.kernel.copy_many(copies)
            and self._reaches_all(ranges)
        )

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
        total = (len(state) - len(state.translate(None, _RESIDENT))) * page
        # Of the first page and the last one, what is in the range.
        first = self._address + offset
        if state[0] & 1:
            total -= first - address
        if state[-1] & 1:
            total -= address + len(state) * page - (first + length)
        return total

    # Durability

    def start_write_back(self, offset: int, length: int) -> None:
        """Start writing the range's dirty pages."""
        self._write(self.kernel.start_write_back, offset, length)

    def write_back(self, offset: int, length: int) -> None:
        """Write the range's dirty pages, see :meth:`Kernel.write_back`."""
        self._write(self.kernel.write_back, offset, length)

    def _write(self, call: Callable[[int, int, int, int], None], offset: int, length: int) -> None:
        assert self.file is not None
        address, span = self._pages(offset, length)
        start, _ = page_span(self.offset + offset, length, self.kernel.page_size)
        with naming(self.file.filename):
            call(self.file.fd, address, start, span)

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
        if advice in _USES:
            self.used_at_random: bool = advice is Advice.RANDOM

    def page_numbers(self, offset: int, length: int) -> tuple[int, int]:
        """The pages of a range, ``(first, stop)``, counted from the page the map begins in."""
        page = self.kernel.page_size
        start = self._address % page + offset
        return start // page, -(-(start + length) // page)

    def up_to_page(self, stop: int) -> int:
        """The offset where a page begins, counted as :meth:`page_numbers` does, or the end."""
        page = self.kernel.page_size
        return min(stop * page - self._address % page, self.length)

    def pin_pages(self, first: int, count: int) -> None:
        """Keep pages, counted from the map's first, in memory."""
        self.kernel.pin(*self._page_range(first, count))

    def unpin_pages(self, first: int, count: int) -> None:
        self.kernel.unpin(*self._page_range(first, count))

    def _page_range(self, first: int, count: int) -> tuple[int, int]:
        page = self.kernel.page_size
        start = self._address - self._address % page
        return start + first * page, count * page
