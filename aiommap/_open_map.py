"""What a map and its views share, and when it goes.

An :class:`OpenMap` has the mapping, the region lock, the pager and the flusher, and counts who
uses them: the map until it is closed, then the views that are still out and the stores that are
still under way. The last one to leave gives the memory and the descriptor to a worker, which
lets them go where nobody waits. What is in flight by then (a load, a flush) holds the mapping by
itself.

The loop thread comes here for every access, so the order is: check, one checkpoint, look
whether the bytes are free and in memory, and only then anything that costs more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeVar

from anyio import CancelScope, CapacityLimiter, ClosedResourceError

from . import _buffers, _workers
from ._claim_lock import ClaimLock
from ._event_loop import EventLoop, current_event_loop
from ._file import File
from ._flusher import Flusher, PendingFlush, nothing_pending
from ._kernel import Kernel
from ._mapped_memory import INLINE
from ._mapping import Mapping
from ._pager import Pager
from ._read_starts import STARTED
from ._wait_graph import Claim

T = TypeVar("T")

PATIENCE = 9
LOOK = 3
"""
How many turns of the loop a task waits for what is being read before it asks a worker. One after
which it looks counts for a few: the read is mostly there by then.
"""

STORES_PREPARED = 256 << 10
"""
Up to this many bytes a writable view comes with its pages ready for stores, so that a store
never waits for the file system. It dirties the pages, written to or not; larger views come
with their holes filled, and leave the first store into each page to the task (docs/design.md).
"""


# The last one to use a mapping may be the loop: a read that outlives the map's closing, a map
# that nobody closed. Unmapping waits, and so does the last close of a descriptor.
Mapping.finisher = staticmethod(_workers.off_the_loop)
File.finisher = staticmethod(_workers.off_the_loop)


@dataclass(frozen=True, slots=True)
class MmapStatistics:
    """
    What a map has done so far, and what waits.

    :ivar views: views that are out now
    :ivar waiting: requests that wait for a region now
    :ivar loads_inline: accesses that found their pages in memory and stayed on the loop
    :ivar loads_off_loop: loads and copies that went to a worker
    :ivar bytes_loaded: the bytes of those
    :ivar flushes_requested: calls that asked for something durable
    :ivar flushes_done: device flushes that succeeded
    :ivar writebacks_started: calls of ``flush_async`` and ``flush_async_range``
    """

    views: int
    waiting: int
    loads_inline: int
    loads_off_loop: int
    bytes_loaded: int
    flushes_requested: int
    flushes_done: int
    writebacks_started: int


class _Gone:
    """
    What stands where the mapping was: what it was can be read off it, and no more. No check of
    its own is on the path of an access.
    """

    __slots__ = ("offset", "private", "protection")

    def __init__(self, mapping: Mapping) -> None:
        self.offset = mapping.offset
        self.private = mapping.private
        self.protection = mapping.protection

    def __getattr__(self, name: str) -> NoReturn:
        raise ClosedResourceError("the map is closed")


class OpenMap:
    """
    The state behind one :class:`~aiommap.AsyncMmap` and its views.

    :ivar mapping: the memory; once it is gone, each use of it raises ClosedResourceError
    """

    __slots__ = (
        "__weakref__",
        "_ending",
        "_raw_stores",
        "_whole_flushes",
        "closed",
        "closing",
        "flush_at_end",
        "flush_owed",
        "flusher",
        "kernel",
        "limiter",
        "loads_inline",
        "lock",
        "loop",
        "mapping",
        "pager",
        "stores",
        "views",
        "written",
    )

    def __init__(self, kernel: Kernel, mapping: Mapping, limiter: CapacityLimiter | None) -> None:
        self.kernel: Kernel = kernel
        self.loop: EventLoop = current_event_loop()
        self.limiter: CapacityLimiter = limiter or _workers.default_limiter()
        self.mapping: Mapping = mapping
        self.lock: ClaimLock = ClaimLock(known_as="map")
        self.lock.check_thread()  # it belongs to the first event loop that uses it: this one
        self.pager: Pager = Pager(self.loop, self.limiter, mapping)
        self.flusher: Flusher = Flusher(self.loop, self.limiter, mapping)
        self.closed: bool = False
        self.closing: bool = False  # by close_forgotten(), as soon as the loop comes to it
        self.flush_at_end: bool = False
        self.views: int = 0
        self.stores: int = 0
        self.loads_inline: int = 0
        self.written: bool = False
        self._raw_stores = False
        self._whole_flushes = 0
        self._ending = 0
        self.flush_owed: bool = False  # for a use that ended well after the map was closed

    # Checks

    @property
    def is_mapped(self) -> bool:
        """Whether the mapping is still there."""
        return not isinstance(self.mapping, _Gone)

    def check_loop(self) -> None:
        """:raises RuntimeError: when the caller is not in the map's own event loop"""
        if not self.loop.is_running_here():
            raise RuntimeError(
                "this map belongs to another event loop, or is used from a foreign thread or a "
                "forked process: open it again there, call through anyio.from_thread.run, or hand "
                "over memory (as_slice(), the buffer of a view, into_view_sync())"
            )

    def check_open(self) -> None:
        """:raises ClosedResourceError: the map was closed"""
        if self.closed:
            raise ClosedResourceError("the map is closed")

    def check(self) -> None:
        """
        The map may be used here and now.

        :raises ClosedResourceError: it was closed
        :raises RuntimeError: see :meth:`check_loop`
        """
        if self.closed:
            raise ClosedResourceError("the map is closed")
        if not self.loop.is_running_here():
            self.check_loop()  # raises

    def check_writable(self) -> None:
        """:raises ClosedResourceError, PermissionError: stores are not allowed"""
        if self.closed:
            self.check()  # raises
        protection = self.mapping.protection
        if not protection.writable:
            raise PermissionError(
                f"the map is not writable: its protection is {protection.name}; open it with "
                f"READ_WRITE or READ_COPY, or use set_protection() if its file was opened for "
                f"writing"
            )

    def still_inside(self, offset: int, length: int) -> Mapping:
        """
        The mapping as it is after a wait, which may have let a resize or a close through.

        :raises ValueError: the range is not inside any more
        """
        mapping = self.mapping
        if length > mapping.length - offset and length:
            raise ValueError(
                f"offset {offset} and length {length} are not inside the map any more: it was "
                f"resized to {mapping.length} bytes"
            )
        return mapping

    # Copies; the caller holds the region or has found it free

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        """The bytes, if few and in memory."""
        mapping = self.mapping
        if length > mapping.length - offset:
            self.still_inside(offset, length)  # raises
        data = mapping.read_nowait(offset, length)
        if data is not None:
            self.loads_inline += 1
        return data

    async def read(self, offset: int, length: int) -> bytes:
        """The bytes, off the loop where needed."""
        data = self.read_nowait(offset, length)
        if data is None:
            data = await self.pager.read(self.mapping, offset, length)
        return data

    @_workers.forgetful
    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """As :meth:`read`, into the caller's buffer."""
        length = len(buffer)
        data = None
        if length <= INLINE and _buffers.is_plain(buffer):
            data = self.read_nowait(offset, length)
        if data is None:
            await self.pager.read_into(self.still_inside(offset, length), offset, buffer)
        else:
            buffer[:] = data

    def write_nowait(self, offset: int, data: memoryview) -> bool:
        """Store few bytes, where that cannot wait."""
        mapping = self.still_inside(offset, len(data))
        if not data.nbytes:
            return True
        if not mapping.write_nowait(offset, data):
            return False
        self.written = True
        self.loads_inline += 1
        return True

    @_workers.forgetful
    async def write(self, offset: int, data: memoryview) -> None:
        """Store the bytes, off the loop where needed."""
        if not self.write_nowait(offset, data):
            async with _Storing(self):
                await self.pager.write(self.mapping, offset, data)

    @_workers.forgetful
    async def move(self, dest: int, src: int, length: int) -> None:
        """Copy bytes inside the map, off the loop."""
        self.still_inside(dest, length)
        self.still_inside(src, length)
        if length:
            async with _Storing(self):
                await self.pager.move(self.mapping, dest, src, length)

    # Views

    def is_ready_nowait(self, offset: int, length: int, write: bool = False) -> bool:
        """Whether the range can be touched, and stored to if ``write``, without a wait."""
        mapping = self.mapping
        if length > mapping.length - offset:
            self.still_inside(offset, length)  # raises
        if length == 0:
            return True
        if (write and mapping.shares_disk) or not mapping.is_loaded_nowait(offset, length):
            return False
        self.loads_inline += 1
        return True

    @_workers.forgetful
    async def make_ready(self, offset: int, length: int, *, write: bool) -> None:
        """Bring the range in, off the loop; see :data:`STORES_PREPARED`."""
        mapping = self.mapping
        if not write and await self.poll(offset, length, self.is_ready_nowait):
            return
        if write and length > STORES_PREPARED:
            await self.run(partial(mapping.prepare_stores, offset, length))
            write = False
        await self.pager.load(mapping, offset, length, write=write)

    # Pages that are not in memory; the first look at them has started to read them

    def read_if_free(self, offset: int, length: int) -> bytes | None:
        """As :meth:`read_nowait`, where the region is not held but found free."""
        if self.closed or not self.lock.check_free(offset, offset + length, False):
            return None
        return self.read_nowait(offset, length)

    async def poll(self, offset: int, length: int, look: Callable[[int, int], T]) -> T | None:
        """
        Look again a few times, a turn of the loop later each, until something is found.

        Where many tasks read from a fast disk a read is done by then: half the cost of a hop.
        While as many are under way as looks may start, there is nothing to look for: then a turn
        is how a task waits for its own.
        """
        if length > STARTED or not self.mapping.starts_reads:
            return None
        starts = self.mapping.starts
        starts.missed()
        checkpoint = self.loop.checkpoint
        patience = PATIENCE
        while patience > 0:
            if starts.under_way >= starts.most:
                patience -= 1
                await checkpoint()
                if starts.under_way >= starts.most:
                    continue
            else:
                patience -= LOOK
                starts.under_way += 1
                try:
                    await checkpoint()
                finally:
                    starts.under_way -= 1
            found = look(offset, length)
            if found:
                return found
        return None

    def run(self, call: Callable[[], T]) -> Coroutine[Any, Any, T]:
        """Run a call in a worker; stays until it has finished."""
        return _workers.run(call, limiter=self.limiter)

    def leave(self, claim: Claim) -> None:
        """A view has closed. Frees its region, without waiting."""
        granted = self.lock.queue.remove(claim)
        self.views -= 1
        if claim.exclusive:
            self.written = True
        if granted:
            self.lock.wake(granted)

    def forget(self, claim: Claim) -> None:
        """A view was dropped without being closed; from any thread, at any moment."""
        self.lock.drop(claim, self.leave_forgotten)

    def leave_forgotten(self, claim: Claim) -> None:
        """As :meth:`leave`, for :meth:`forget` when it is safe."""
        self.leave(claim)
        self.let_go_soon()

    @property
    def in_use(self) -> bool:
        """Whether views are out or stores under way, the last of which ends a closed map."""
        return self.views > 0 or self.stores > 0

    # Flushes

    @property
    def _unflushed(self) -> bool:
        # While a flush of everything is under way, nothing of it is durable yet.
        return self.written or self._whole_flushes > 0

    def _is_nothing_to_flush(self, mapping: Mapping, length: int) -> bool:
        return length == 0 or mapping.file is None or not (mapping.syncable or self._owes(mapping))

    def _owes(self, mapping: Mapping) -> bool:
        # Written, and then set to READ: the bytes are still to be made durable.
        return self._unflushed and not mapping.private and _is_named(mapping.file)

    def flush(self, offset: int, length: int) -> Awaitable[None]:
        """Make a range durable: await it."""
        mapping = self.mapping
        if self._is_nothing_to_flush(mapping, length):
            self.flusher.check()
            return self.loop.checkpoint()
        if offset == 0 and length == mapping.length:
            return self._flush_all(length)
        return self.flusher.flush(mapping, offset, length)

    async def _flush_all(self, length: int) -> None:
        flush = self.flusher.flush(self.mapping, 0, length)  # not where an earlier one failed
        # Before it begins: what is stored from now on is not this flush's.
        self.written = self._raw_stores or self.views > 0
        self._whole_flushes += 1
        try:
            await flush
        except BaseException:
            self.written = True
            raise
        finally:
            self._whole_flushes -= 1

    async def flush_before_mapping(self) -> None:
        """
        Flush what was written, where mapping the file anew would do it and keep to itself what
        could not be written. What fails here stays failed: the next flush says so.
        """
        if self.kernel.map_file_flushes and self._unflushed:
            with suppress(OSError):
                # As far as the file reaches: somebody may have truncated it.
                await self.flush(0, await self.run(self.mapping.reach))

    @_workers.forgetful
    async def flush_async(self, offset: int, length: int) -> PendingFlush:
        """Start the write-back of a range."""
        mapping = self.mapping
        self.flusher.check()
        if self._is_nothing_to_flush(mapping, length):
            await self.loop.checkpoint()
            return nothing_pending(offset, length)
        return await self.flusher.start(mapping, offset, length)

    def raw_stores(self) -> None:
        """Memory was given out that anybody may store to at any time."""
        self.written = self._raw_stores = True

    # The end

    def begin_close(self, *, flush_at_end: bool) -> None:
        """Refuse new requests and wake those that wait for a region."""
        self.closed = True
        self.flush_at_end = flush_at_end
        self.lock.close(lambda: ClosedResourceError("the map was closed"))

    async def flush_what_was_written(self) -> None:
        """The flush of leaving. :raises FlushError: also one from before"""
        if self._unflushed and self.is_mapped:
            await self.flush(0, self.mapping.length)
        else:
            self.flusher.check()

    async def end(self, *, flush: bool) -> None:
        """
        Flush if asked and not cancelled, then let go unless views are out. Never cancelled.

        :raises FlushError: after everything is closed
        """
        # Another one that ends meanwhile, the last view, leaves the letting go to us.
        self._ending += 1
        try:
            if flush:
                # A cancelled caller does not flush: it shows here, before anything starts.
                await self.loop.checkpoint()
                await self.flush_what_was_written()
        except GeneratorExit:  # forgotten while it flushed: nothing can be awaited
            self._ending -= 1
            self.let_go_soon()
            raise
        except BaseException:
            self._ending -= 1
            await self.let_go()
            raise
        self._ending -= 1
        await self.let_go()

    async def end_of_use(self, *, stored: bool, failed: bool) -> None:
        """
        A view or a store of a closed map has ended: the last one ends the map. Never cancelled.

        :param stored: it may have stored something
        :param failed: with an exception, which nothing that is raised here may hide
        :raises FlushError: unless it failed
        """
        if self.in_use:
            self.flush_owed |= stored and not failed
        elif not self.flush_owed:
            await self.end(flush=self.flush_at_end and not failed)
        else:
            # What others stored, and ended well, is flushed all the same.
            try:
                with CancelScope(shield=True):
                    await self.end(flush=self.flush_at_end)
            except OSError:
                if not failed:
                    raise

    def close_forgotten(self) -> None:
        """
        Close without waiting and without a flush; from any thread, at any moment.

        At once where that is safe, else soon.
        """
        self.closing = True
        if self.lock.is_safe_here():
            self._close_forgotten()
        else:
            self.loop.post(self._close_forgotten)

    def _close_forgotten(self) -> None:
        if not self.closed:
            self.begin_close(flush_at_end=False)
        self.let_go_soon()

    async def let_go(self) -> None:
        """Give memory and descriptor to a worker, if nobody uses them; wait for it."""
        box = self._take_unused()
        if box:
            await _workers.finish(box.clear)

    def let_go_soon(self) -> None:
        """As :meth:`let_go`, without waiting: for the end of forgotten objects."""
        box = self._take_unused()
        if box:
            _workers.off_the_loop(box.clear)

    def _take_unused(self) -> list[Mapping]:
        """In a list, so that a worker can drop the last reference: that unmaps, and may wait."""
        if not self.closed or self.in_use or self._ending or not self.is_mapped:
            return []
        mapping = self.mapping
        self.mapping = _Gone(mapping)  # type: ignore[assignment]
        if self.loop.is_running_here():
            self.pager.close()
            self.flusher.close()
        return [mapping]

    def replace(self, mapping: Mapping, *, resized: bool) -> list[Mapping]:
        """The map has another length or protection from now on; gives what is not needed."""
        if not self.is_mapped:
            return [mapping]  # it was closed meanwhile
        old, self.mapping = self.mapping, mapping
        self.flusher.length = mapping.length
        self.written |= resized  # the file's size is something to be made durable
        return [old]

    def statistics(self) -> MmapStatistics:
        return MmapStatistics(
            views=self.views,
            waiting=self.lock.queue.waiting,
            loads_inline=self.loads_inline,
            loads_off_loop=self.pager.loads,
            bytes_loaded=self.pager.bytes_loaded,
            flushes_requested=self.flusher.requested,
            flushes_done=self.flusher.done,
            writebacks_started=self.flusher.write_backs,
        )


class _Storing:
    """
    A store by copy that is under way in a worker.

    A map that is closed meanwhile does not wait for it; the last one ends the map, with the flush
    that its bytes would else not get.
    """

    __slots__ = ("_core",)

    def __init__(self, core: OpenMap) -> None:
        self._core = core

    async def __aenter__(self) -> None:
        self._core.stores += 1
        self._core.written = True

    async def __aexit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        core = self._core
        core.stores -= 1
        # A flush that ran meanwhile may have missed the last of it.
        core.written = True
        if exc_type is GeneratorExit:  # forgotten, and closed in any thread: nothing can be awaited
            core.loop.post(core.let_go_soon)
        elif core.closed:
            await core.end_of_use(stored=True, failed=exc_type is not None)


def _is_named(file: File | None) -> bool:
    return file is not None and not file.anonymous
