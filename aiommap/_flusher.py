"""Flushes of one map: few device flushes for many tasks, and a failure that stays.

One thread flushes, a batch of requests at a time (:class:`~aiommap._workers.Crew`); what may
be told to whom is :mod:`aiommap._flush_batch`'s. The failure is latched in that thread, before
it takes the next batch: the kernel would let the next flush succeed.

How a batch is flushed
----------------------
* One range: ``msync`` of its pages, so a small commit waits for its own pages and not for
  what others have dirtied.
* Several: write-back of each is started, then one ``fdatasync``.
* A flush of many megabytes is cut into pieces that are written one after another, and ends
  with a device flush that finds little to do. Between two pieces the commits of other tasks
  get their turn, and a cancelled task leaves.

A cancelled waiter takes nothing with it: the flush goes on, for the others and for the log.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

from anyio import CapacityLimiter
from anyio.lowlevel import checkpoint

from . import _workers
from ._errors import FlushError, TruncatedError
from ._event_loop import EventLoop
from ._file import File, Filename
from ._flush_batch import Failure, FlushLog, Ticket, merge
from ._mapping import Mapping

PIECE = 32 << 20
"""Bytes written back before others get their turn: 30 to 300 ms on common disks."""

_EACH_BY_ITSELF = 16
"""Ranges that are flushed one by one while a large flush is under way; more share one."""


class _Flush(_workers.Request):
    """A range that is to be durable, of a mapping, or of a file whose mapping is gone."""

    __slots__ = ("file", "length", "mapping", "offset")

    def __init__(self, file: File, mapping: Mapping | None, offset: int, length: int) -> None:
        super().__init__()
        self.file = file
        self.mapping = mapping
        self.offset = offset
        self.length = length


class _WriteBack(_Flush):
    """A piece of a large flush; the write-back of the piece after it is started too."""

    __slots__ = ("next",)

    def __init__(self, mapping: Mapping, offset: int, length: int, next_length: int) -> None:
        assert mapping.file is not None
        super().__init__(mapping.file, mapping, offset, length)
        self.next = next_length


class Flusher:
    """The flushes of one map, on one file, through all mappings that it has in its life."""

    def __init__(self, loop: EventLoop, limiter: CapacityLimiter, filename: Filename) -> None:
        self._limiter = limiter
        self._filename = filename
        self._log = FlushLog()
        self._log_lock = threading.Lock()  # held for a few instructions, never in a wait
        self._crew: _workers.Crew[_Flush] = _workers.Crew(
            loop, limiter, threads=1, batch=4096, perform=self._perform
        )
        self._large = 0
        self.requested = 0
        self.write_backs = 0

    @property
    def done(self) -> int:
        """Device flushes that succeeded."""
        return self._log.succeeded

    def check(self) -> None:
        """:raises FlushError: when a flush has failed and was not cleared"""
        failure = self._log.failure
        if failure is not None:
            raise self._error(failure)

    def clear(self) -> None:
        """Acknowledge a failed flush."""
        with self._log_lock:
            self._log.clear()

    def _error(self, failure: Failure) -> FlushError:
        return FlushError(failure.errno, failure.ranges, self._filename)

    async def flush(self, mapping: Mapping, offset: int, length: int) -> None:
        """
        Make a range durable. A checkpoint.

        :raises FlushError: this flush failed, or an earlier one that was not cleared
        :raises TruncatedError: the file does not reach the range
        """
        assert mapping.file is not None
        self.check()
        self.requested += 1
        if length > PIECE:
            await self._write_back(mapping, offset, length)
        await self._crew.do(_Flush(mapping.file, mapping, offset, length))

    async def _write_back(self, mapping: Mapping, offset: int, length: int) -> None:
        self._large += 1
        try:
            end = offset + length
            while offset < end:
                count = min(PIECE, end - offset)
                following = min(PIECE, end - offset - count)
                await self._crew.do(_WriteBack(mapping, offset, count, following))
                offset += count
        finally:
            self._large -= 1

    async def flush_file(self, file: File, mapping: Mapping | None, ticket: Ticket) -> None:
        """Make a ticket's range durable; as :meth:`flush`, also when the map is closed."""
        self.check()
        self.requested += 1
        await self._crew.do(_Flush(file, mapping, ticket.offset, ticket.length))

    async def start(self, mapping: Mapping, offset: int, length: int) -> PendingFlush:
        """
        Start the write-back of a range. A checkpoint.

        :raises FlushError: an earlier flush failed, or the kernel refused this write-back
        :raises TruncatedError: the file does not reach the range
        """
        self.check()
        # In a thread of its own: the one that flushes may be waiting for the disk's cache.
        end = offset + length
        while True:
            count = min(PIECE, end - offset)
            await _workers.run(partial(self._start, mapping, offset, count), limiter=self._limiter)
            offset += count
            if offset >= end:
                break
        self.write_backs += 1
        with self._log_lock:
            ticket = self._log.ticket(end - length, length, mapping.file)
        return PendingFlush(self, mapping, ticket)

    def _start(self, mapping: Mapping, offset: int, length: int) -> None:
        mapping.check_reach(offset, length)
        try:
            mapping.start_write_back(offset, length)
        except OSError as exc:
            raise self._failed(exc, [(offset, length)]) from None

    # In the worker

    def _failed(self, error: OSError, ranges: list[tuple[int, int]]) -> FlushError:
        with self._log_lock:
            failure = self._log.fail(error.errno or 0, ranges)
        return self._error(failure)

    def _perform(self, requests: Sequence[_Flush]) -> None:
        try:
            flushes = [each for each in requests if type(each) is _Flush and self._may(each)]
            # Commits before bulk: a piece of a large flush can wait for them.
            if flushes:
                self._perform_flushes(flushes)
            for each in requests:
                if isinstance(each, _WriteBack) and self._may(each):
                    self._perform_write_back(each)
        except BaseException as exc:
            for each in requests:
                each.error = each.error or exc
        finally:
            for each in requests:
                each.mapping = None

    def _may(self, request: _Flush) -> bool:
        try:
            self.check()
            if request.mapping is not None:
                request.mapping.check_reach(request.offset, request.length)
        except OSError as exc:
            request.error = exc
            return False
        return True

    def _perform_flushes(self, requests: list[_Flush]) -> None:
        ranges = merge((each.offset, each.length) for each in requests)
        with self._log_lock:
            number = self._log.begin()
        try:
            covered = self._sync(requests, ranges)
        except OSError as exc:
            if isinstance(exc, TruncatedError):
                raise
            for each in requests:
                each.error = self._failed(exc, ranges)
            return
        with self._log_lock:
            self._log.end(number, covered)

    def _sync(
        self, requests: list[_Flush], ranges: list[tuple[int, int]]
    ) -> list[tuple[int, int]] | None:
        """Flush; what it covered, None for the whole file."""
        file = requests[0].file
        mapping = requests[0].mapping
        same = mapping is not None and all(each.mapping is mapping for each in requests)
        one_by_one = len(ranges) == 1 or (self._large > 0 and len(ranges) <= _EACH_BY_ITSELF)
        if same and one_by_one and mapping is not None and ranges != [(0, mapping.length)]:
            for offset, length in ranges:
                mapping.sync_range(offset, length)
            return ranges
        if same and mapping is not None and len(ranges) > 1:
            for offset, length in ranges:
                mapping.start_write_back(offset, length)
        # The whole map too: fdatasync does not care into how many areas advice has cut it.
        file.kernel.sync_data(file.fd)
        return None

    def _perform_write_back(self, request: _WriteBack) -> None:
        mapping = request.mapping
        assert mapping is not None
        try:
            if request.next:
                # The disk goes on with the next piece while we hand this one back.
                mapping.start_write_back(request.offset, request.length)
                mapping.start_write_back(request.offset + request.length, request.next)
            mapping.write_back(request.offset, request.length)
        except OSError as exc:
            request.error = self._failed(exc, [(request.offset, request.length)])


class PendingFlush:
    """
    A write-back that was started; durable once :meth:`wait` has returned.

    Given out by ``flush_async()`` and ``flush_async_range()``. Nobody needs to wait for it.
    It can be waited for by several tasks, again and again, also after its map was closed::

        pending = await m.flush_async()
        ...  # go on while the disk writes
        await pending
    """

    __slots__ = ("__weakref__", "_flusher", "_mapping", "_ticket")

    def __init__(self, flusher: Flusher | None, mapping: Mapping | None, ticket: Ticket) -> None:
        self._flusher = flusher
        self._mapping = weakref.ref(mapping) if mapping is not None else None
        self._ticket = ticket

    @property
    def done(self) -> bool:
        """Whether it is known to be durable: waited for, or covered by a later flush."""
        return self._ticket.done

    async def wait(self) -> None:
        """
        Wait until the range is durable, in one device flush with all others who wait.

        A checkpoint. Cancelled, it leaves the write-back and other waiters alone.

        :raises FlushError: the kernel could not write it, or something else of the map
            before it was known to be durable; a pending flush that failed stays failed, also
            after ``clear_flush_error()``
        :raises TruncatedError: the file does not reach the range any more
        """
        ticket = self._ticket
        flusher = self._flusher
        await checkpoint()
        if ticket.failure is not None:
            assert flusher is not None
            raise flusher._error(ticket.failure)
        file = ticket.keeps
        if ticket.done or flusher is None or not isinstance(file, File):
            return
        mapping = self._mapping() if self._mapping is not None else None
        await flusher.flush_file(file, mapping, ticket)

    def __await__(self) -> Generator[Any, Any, None]:
        return self.wait().__await__()

    def __repr__(self) -> str:
        ticket = self._ticket
        state = "failed" if ticket.failure else "done" if ticket.done else "pending"
        return (
            f"<PendingFlush of bytes {ticket.offset} to {ticket.offset + ticket.length}, {state}>"
        )


def nothing_pending(offset: int = 0, length: int = 0) -> PendingFlush:
    """What a flush gives that has nothing to write: done."""
    ticket = Ticket(0, offset, length, None)
    ticket.done = True
    return PendingFlush(None, None, ticket)
