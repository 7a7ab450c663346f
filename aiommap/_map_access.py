"""What a map does with its bytes: copies, searches, flushes, pages.

The part of :class:`~aiommap.AsyncMmap` that takes no map apart: the argument checks of each
call, the region it holds, and what it promises. How it is done is the layers' below.
"""

from __future__ import annotations

from functools import partial
from typing import SupportsIndex

from . import _buffers, _workers
from ._flusher import PendingFlush
from ._mapped_memory import INLINE
from ._mapping import Mapping
from ._open_map import OpenMap
from ._options import Advice
from ._pins import Pins
from ._ranges import check_length, check_part, check_range, pieces
from ._searching import find
from ._typing import Buffer
from ._uncopyable import Uncopyable
from ._window_stream import Windows

WINDOW = 1 << 20
"""Bytes of a window where none are given: large against the cost of a step, small in a cache."""

_RESIDENT_PIECE = 1 << 30
"""Bytes whose residency is asked for at once: 262 144 pages, a vector of 256 KiB."""


class MapAccess(Uncopyable):
    """Reading, writing, searching, flushing and paging of an open map."""

    __slots__ = ("__weakref__", "_core", "_pins")

    def __init__(self, core: OpenMap) -> None:
        self._core = core
        self._pins = Pins()

    def _checked(self) -> Mapping:
        self._core.check()
        return self._core.mapping

    # Copies

    async def read_at(self, offset: SupportsIndex, length: SupportsIndex) -> bytes:
        """
        A copy of a range, all of it. A checkpoint.

        The region is held shared while it is copied. Small ranges that are in memory are
        copied on the loop, others in a worker; either way bad storage is an error.

        :raises DeadlockError: the task holds the region exclusively
        :raises TruncatedError: the file does not reach the range
        :raises OSError: what the disk says
        """
        core = self._core
        if core.closed or not core.loop.is_running_here():
            core.check()  # raises
        size = core.mapping.length
        if not (type(offset) is type(length) is int and 0 <= offset <= offset + length <= size):
            offset, length = check_range(offset, length, size)
        # Not the mapping: who keeps an error, and with it this frame, would keep it.
        starts = core.mapping.starts
        if starts.cold and starts.under_way < starts.most:
            core.mapping.start_nowait(offset, length)
            starts.under_way += 1
            try:
                await core.loop.checkpoint()
            finally:
                starts.under_way -= 1
        else:
            await core.loop.checkpoint()
        stop = offset + length
        lock = core.lock
        if lock.queue.is_free(offset, stop, False) or lock.check_free(offset, stop, False):
            if core.closed:
                core.check()  # raises
            data = core.read_nowait(offset, length)
            if data is None:
                data = await core.poll(offset, length, core.read_if_free)
            if data is not None:
                return data
        claim = await core.lock.acquire(offset, offset + length, False)
        with core.lock.holding(claim):
            return await core.read(offset, length)

    async def readinto_at(self, offset: SupportsIndex, buffer: Buffer) -> int:
        """
        Copy a range into a buffer, and fill it. See :meth:`read_at`.

        :param buffer: writable and contiguous; its size says how many bytes
        :return: the bytes copied, always the buffer's size
        :raises TypeError: the buffer is read-only, or none
        """
        core = self._core
        core.check()
        target = _buffers.writable(buffer)
        try:
            offset, length = check_range(offset, len(target), core.mapping.length)
            if length <= INLINE and _buffers.is_plain(target):
                # No worker gets the caller's memory: a task that is cancelled need not stay.
                target[:] = await self.read_at(offset, length)
                return length
            claim = await core.lock.acquire(offset, offset + length, False)
            with core.lock.holding(claim):
                await core.read_into(offset, target)
        finally:
            del target  # who keeps an error, and with it this frame, may still resize the buffer
        return length

    async def write_at(self, offset: SupportsIndex, data: Buffer) -> int:
        """
        Store bytes, all of them. A checkpoint. The file never grows.

        The region is held exclusively while it is stored to. Durable after the next flush.

        :param data: contiguous bytes; may be memory of this map too
        :return: the bytes stored, always the size of ``data``
        :raises PermissionError: the map is not writable
        :raises DeadlockError: the task holds bytes of the region
        :raises TruncatedError: the file does not reach the range
        :raises OSError: ENOSPC for a hole without room, what the disk says otherwise
        """
        core = self._core
        core.check()
        core.check_writable()
        source = _buffers.readable(data)
        try:
            offset, length = check_range(offset, len(source), core.mapping.length)
            await core.loop.checkpoint()
            if core.lock.check_free(offset, offset + length, True):
                core.check()
                core.check_writable()
                if core.write_nowait(offset, source):
                    return length
                # Others have run already, and nobody has since it was found free.
                claim = core.lock.acquire_nowait(offset, offset + length, True)
            else:
                claim = await core.lock.acquire(offset, offset + length, True)
            with core.lock.holding(claim):
                core.check_writable()
                await core.write(offset, source)
        finally:
            del source  # as above
        return length

    @_workers.forgetful
    async def move(self, dest: SupportsIndex, src: SupportsIndex, length: SupportsIndex) -> None:
        """
        Copy bytes inside the map; the ranges may overlap, as with ``memmove``. A checkpoint.

        Both ranges are held while it runs, granted together.

        :raises PermissionError: the map is not writable
        :raises DeadlockError: the task holds bytes of the ranges in a conflicting way
        :raises OSError: as :meth:`write_at`
        """
        core = self._core
        core.check()
        core.check_writable()
        size = core.mapping.length
        dest, length = check_range(dest, length, size)
        src, length = check_range(src, length, size)
        claim = await core.lock.acquire_ranges(
            ((dest, dest + length, True), (src, src + length, False))
        )
        with core.lock.holding(claim):
            core.check_writable()
            await core.move(dest, src, length)

    @_workers.forgetful
    async def find(
        self, needle: Buffer, start: SupportsIndex = 0, end: SupportsIndex | None = None
    ) -> int:
        """
        Where the bytes first occur in ``[start, end)``, or -1, as :meth:`bytes.find`.

        Off the loop, piece by piece, each held shared while it is searched: no snapshot of
        the whole. A checkpoint; cancellable between pieces.

        :param start: negative counts from the end
        :raises OSError: as :meth:`read_at`
        """
        self._core.check()
        return await find(self._core, needle, start, end, last=False)

    @_workers.forgetful
    async def rfind(
        self, needle: Buffer, start: SupportsIndex = 0, end: SupportsIndex | None = None
    ) -> int:
        """Where the bytes last occur, or -1, as :meth:`bytes.rfind`. See :meth:`find`."""
        self._core.check()
        return await find(self._core, needle, start, end, last=True)

    def windows(
        self,
        size: SupportsIndex = WINDOW,
        *,
        offset: SupportsIndex = 0,
        length: SupportsIndex | None = None,
    ) -> Windows:
        """
        A range in consecutive windows of memory, the next ones read ahead::

            async for window in m.windows():
                checksum = zlib.crc32(window, checksum)

        Each window's region is held shared, and its pages are in memory, when it is handed
        out; it is released at the next step. Up to 32 MiB behind it are being loaded meanwhile,
        whatever the size of the windows; where the disk reads little ahead by itself, the reads
        of up to 48 MiB more are started. Each step is a checkpoint, and raises what ``view()``
        does. Leaving the loop early frees the region with the iterator; enter one that has a name
        with ``async with``, or its last window stays held as long as the name does.

        :param size: bytes of a window, at least 1; the last one may be shorter
        :raises ValueError: the range is not inside the map
        """
        core = self._core
        core.check()
        size = check_length(size, "size")
        offset, length = check_part(offset, length, core.mapping.length)
        return Windows(core, size, offset, length)

    # Durability

    async def flush(self) -> None:
        """
        Make everything durable that was stored before. A checkpoint.

        When it returns, a power cut loses none of it, nor the size needed to read it. Tasks
        that ask at the same time share device flushes. Nothing to do for maps that are
        read-only, copy-on-write or anonymous. Takes no region: a task may flush under its own
        view. Cancelled, it leaves; what is under way goes on.

        :raises FlushError: this flush failed, or an earlier one that was not cleared
        :raises TruncatedError: the file does not reach the end of the map any more; what it
            still has is durable
        """
        await self._core.flush(0, self._checked().length)

    async def flush_range(self, offset: SupportsIndex, length: SupportsIndex) -> None:
        """
        Make a range durable, and maybe more. See :meth:`flush`.

        It waits for at most what is dirty when it begins; while a large flush of another task
        is under way, small ranges are flushed between its pieces.
        """
        core = self._core
        core.check()
        offset, length = check_range(offset, length, core.mapping.length)
        await core.flush(offset, length)

    async def flush_async(self) -> PendingFlush:
        """
        Start the write-back of everything stored before. A checkpoint.

        It does not wait for the disk. Awaiting the result makes it durable; nobody has to.

        :raises FlushError: an earlier flush failed, or the kernel refused
        :raises TruncatedError: the file does not reach the end of the map any more
        """
        return await self._core.flush_async(0, self._checked().length)

    async def flush_async_range(self, offset: SupportsIndex, length: SupportsIndex) -> PendingFlush:
        """Start the write-back of a range, and maybe more. See :meth:`flush_async`."""
        offset, length = check_range(offset, length, self._checked().length)
        return await self._core.flush_async(offset, length)

    async def clear_flush_error(self) -> None:
        """
        Acknowledge a failed flush, so that flushes are tried again. A checkpoint.

        What was to be flushed then may be lost, and no later flush can tell: store it again,
        and then flush. A :class:`PendingFlush` from before stays failed.
        """
        self._core.check()
        self._core.flusher.clear()
        await self._core.loop.checkpoint()

    # Pages

    async def load(self, offset: SupportsIndex = 0, length: SupportsIndex | None = None) -> None:
        """
        Bring a range into memory. A checkpoint; cancellable between pieces.

        It takes no region, and nothing keeps the pages there but :meth:`pin`.

        :raises TruncatedError: the file does not reach the range
        :raises OSError: what the disk says
        """
        core = self._core
        offset, length = check_part(offset, length, self._checked().length)
        await core.loop.checkpoint()
        core.check()
        if not core.is_ready_nowait(offset, length, write=False):
            await core.pager.load(core.mapping, offset, length)

    @_workers.forgetful
    async def resident(self, offset: SupportsIndex = 0, length: SupportsIndex | None = None) -> int:
        """
        How many bytes of a range are in memory now. A checkpoint.

        Where the kernel hides it from who neither owns nor may write the file, pages whose
        read is still under way are counted too.
        """
        core = self._core
        offset, length = check_part(offset, length, self._checked().length)
        await core.loop.checkpoint()
        mapping = core.still_inside(offset, length)
        total = 0
        for piece, count in pieces(offset, length, _RESIDENT_PIECE):
            total += await core.run(partial(mapping.resident_bytes, piece, count))
        return total

    @_workers.forgetful
    async def advise(
        self,
        advice: Advice | str,
        offset: SupportsIndex = 0,
        length: SupportsIndex | None = None,
    ) -> None:
        """
        Tell the kernel how a range will be used. A checkpoint.

        The range is widened to whole pages; hints that last (NORMAL, RANDOM, SEQUENTIAL,
        those about huge and merged pages) to 64ths of the map, so that the kernel never has
        to keep it in hundreds of areas. After RANDOM, for whatever part, we read no further than
        asked for either, until NORMAL or SEQUENTIAL. No advice changes bytes. ``resize()`` and
        ``set_protection()`` map anew, without it.

        :raises OSError: ENOTSUP where the platform does not know it; EINVAL where it does not
            fit this memory
        """
        advice = Advice.parse(advice)
        core = self._core
        offset, length = check_part(offset, length, self._checked().length)
        await core.loop.checkpoint()
        mapping = core.still_inside(offset, length)
        if length:
            await core.run(partial(mapping.advise, offset, length, advice))

    @_workers.forgetful
    async def pin(self, offset: SupportsIndex = 0, length: SupportsIndex | None = None) -> None:
        """
        Keep a range in memory until it is unpinned as often as it was pinned. A checkpoint.

        The range is widened to whole pages, which are brought in. Closing unpins, and so do
        ``resize()`` and ``set_protection()``, which map anew.

        :raises OSError: ENOMEM or EPERM beyond RLIMIT_MEMLOCK, with the limit
        """
        core = self._core
        offset, length = check_part(offset, length, self._checked().length)
        await core.loop.checkpoint()
        mapping = core.still_inside(offset, length)
        if length:
            await self._pins.pin(core, mapping, offset, length)

    @_workers.forgetful
    async def unpin(self, offset: SupportsIndex = 0, length: SupportsIndex | None = None) -> None:
        """
        Undo one :meth:`pin` of the range. A checkpoint.

        :raises ValueError: some of it is not pinned; nothing is unpinned
        """
        core = self._core
        offset, length = check_part(offset, length, self._checked().length)
        await core.loop.checkpoint()
        mapping = core.still_inside(offset, length)
        if length:
            await self._pins.unpin(core, mapping, offset, length)
