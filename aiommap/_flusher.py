"""Flushes of one map: few device flushes for many tasks, and a failure that stays.

One thread flushes, a batch of requests at a time (:class:`~aiommap._batch_crew.BatchCrew`);
what may be told to whom is :mod:`aiommap._flush_batch`'s. It is one thread for the sake of
truth: the kernel tells a failed write-back to one caller of an open file only. With two, the
one that was told nothing could report success before the other has latched the failure.

How a batch is flushed
----------------------
* One range, less than half of the file: ``msync`` of its pages, so a small commit waits for
  its own pages and not for what others have dirtied.
* Otherwise: one ``fdatasync``, which costs the same for any number of ranges, and does not
  care into how many areas advice has cut the map (``msync`` flushes the disk once for each).
* A flush of a long range is *bulk*: its dirty pages are written piece by piece, and a device
  flush that finds little to do ends it. Between two pieces the commits of other tasks get
  their turn, by ``msync`` as long as they are few, so that they do not wait for the rest of
  the bulk. Bulk that is asked for meanwhile joins in.

A cancelled waiter takes nothing with it: the flush goes on, for the others and for the log.
Bulk that nobody waits for any more stops after the piece at hand.

Write-backs are started by another thread, because the one that flushes may be waiting for the
disk's cache; by one, because two that look for dirty pages in the same range wait for each
other's pages and interrupt every processor for each, the event loop's with it. Those who ask
while it looks share the next look.
"""

from __future__ import annotations

import errno
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from anyio import CapacityLimiter
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from . import _workers
from ._batch_crew import BatchCrew
from ._crew import Request
from ._errors import FlushError, Range, TruncatedError
from ._event_loop import EventLoop, Parking
from ._file import File, Filename
from ._flush_batch import Failure, FlushLog, Ticket, length_inside, merge
from ._mapping import Mapping
from ._piece_size import PieceSize
from ._range_sets import outside, union
from ._ranges import pieces
from ._slow_log import log_if_slow
from ._uncopyable import Uncopyable

T = TypeVar("T")

BULK = 32 << 20
"""A longer range is flushed piece by piece: 30 to 300 ms on common disks, if all is dirty."""

_SMALLEST_PIECE = 4 << 20
_LARGEST_PIECE = 256 << 20
_QUICK = 0.01  # seconds for a piece of which little was dirty; out of the air

_EACH_BY_ITSELF = 16
"""
Ranges that are flushed one by one in the middle of bulk; more share one flush, which then
waits for the rest of the bulk. At 10 ms a flush these take 160 ms, as long as a few pieces.
"""

_START_PIECE = 32 << 20
"""Bytes whose write-back is started by one call in a worker; cancelled tasks leave between."""

_STARTED_AT_ONCE = 1 << 20
_TURN_SECONDS = 0.005
"""
So much of it at a time, and then the event loop has its turn. That is waited for as long as two
such starts take, or so many seconds: a loop that is slow, or over, holds it up no longer. For each
page whose write-back starts the kernel interrupts the other processors of the process: beside
a busy loop on two processors all at once made the longest turn 20 ms, 2 MiB 10 ms, and this 7 ms.
"""


class _Flush(Request):
    """
    A range of a map that is to be durable.

    It knows the mapping weakly, so that no task that waits is the last to hold it: unmapping
    is for workers. Without a mapping, the file's descriptor will do.
    """

    __slots__ = ("failures", "file", "in_bulk", "length", "mapping", "offset", "ticket", "wanted")

    def __init__(
        self,
        file: File,
        mapping: weakref.ref[Mapping],
        offset: int,
        length: int,
        failures: int,
        ticket: Ticket | None = None,
    ) -> None:
        # As the classes above do it, without their calls: a hundred tasks that commit are bound
        # by the event loop's time.
        self.done: bool = False
        self.error: BaseException | None = None
        self.parking: Parking | None = None
        self._taken = False
        self._abandoned = False
        self.file: File | None = file
        self.mapping = mapping
        self.offset = offset
        self.length = length
        self.failures = failures
        """How many there were when it was asked for."""
        self.ticket = ticket
        self.wanted = True
        self.in_bulk = False

    def forget(self) -> None:
        self.file = None  # which would keep its descriptor open


class _Start(Request):
    """A range of a mapping whose write-back is to be started."""

    __slots__ = ("length", "mapping", "offset")

    def __init__(self, mapping: Mapping, offset: int, length: int) -> None:
        super().__init__()
        self.mapping: Mapping | None = mapping
        self.offset = offset
        self.length = length

    def forget(self) -> None:
        self.mapping = None


class _Bulk:
    """Long ranges that are being written piece by piece."""

    def __init__(self) -> None:
        self.requests: list[_Flush] = []
        self._asked: list[Range] = []  # starts and stops of what pieces were made of, in order
        self._todo: deque[Range] = deque()

    def add(self, request: _Flush) -> None:
        """
        What was written before it came is not written again: the device flush at the end
        begins later than this and covers it.
        """
        self.requests.append(request)
        request.in_bulk = True
        start, stop = request.offset, request.offset + request.length
        for low, high in outside(start, stop, self._asked):
            self._todo.append((low, high - low))
        self._asked = union([*self._asked, (start, stop)])

    def next_pieces(self, size: int) -> list[Range]:
        """A piece to write now and the one after it; none when all is written or unwanted."""
        if not self._todo or not any(each.wanted for each in self.requests):
            return []
        offset, length = self._todo.popleft()
        if length > size:
            self._todo.appendleft((offset + size, length - size))
            length = size
        following = [(start, min(count, size)) for start, count in islice(self._todo, 1)]
        return [(offset, length), *following]


class Flusher:
    """
    The flushes of one map, on one file, through all mappings that it has in its life.

    :ivar length: of the map; while a flush is on its way a resize may have cut it
    :ivar requested: how many flushes were asked for
    :ivar write_backs: how many write-backs were started
    """

    def __init__(self, loop: EventLoop, limiter: CapacityLimiter, mapping: Mapping) -> None:
        self._loop = loop
        self._limiter = limiter
        self._filename: Filename = mapping.filename
        self._start_in_file = mapping.offset
        self.length: int = mapping.length
        self._log = FlushLog()
        self._log_lock = threading.Lock()  # held for a look at the open tickets, never in a wait
        # Held in workers only, while the file is cut: so that no flush takes that for a
        # truncation by somebody else.
        self._cut_lock = threading.Lock()
        self._crew: BatchCrew[_Flush] = BatchCrew(loop, limiter, batch=4096, perform=self._perform)
        self._starters: BatchCrew[_Start] = BatchCrew(
            loop, limiter, batch=4096, perform=self._perform_starts
        )
        self._bulk = _Bulk()
        self._piece = PieceSize(BULK, _SMALLEST_PIECE, _LARGEST_PIECE, quick=_QUICK)
        self.requested: int = 0
        self.write_backs: int = 0

    # On the loop

    def close(self) -> None:
        """The map is gone: no thread waits for more to do. What is under way goes on."""
        self._crew.close()
        self._starters.close()

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

    def flush(self, mapping: Mapping, offset: int, length: int) -> Coroutine[Any, Any, None]:
        """
        Make a range durable: await it. A checkpoint.

        :raises FlushError: this flush failed, or an earlier one that was not cleared
        :raises TruncatedError: the file does not reach the range
        """
        assert mapping.file is not None
        failures = self._log.failures  # before the check: one that comes in between counts
        self.check()
        return self._do(_Flush(mapping.file, weakref.ref(mapping), offset, length, failures))

    async def _do(self, request: _Flush) -> None:
        await checkpoint_if_cancelled()  # of a task that is cancelled already nothing begins
        self.requested += 1
        try:
            # Crew.do(), without its frame.
            request.parking = self._loop.parking()
            self._crew.submit(request)
            await self._crew.wait(request)
        except BaseException:
            request.wanted = False
            raise

    async def wait_for(self, ticket: Ticket, mapping: weakref.ref[Mapping]) -> None:
        """
        Make a ticket's range durable, also when the map is closed. A checkpoint.

        :raises FlushError: it cannot be known to be durable any more, cleared or not
        :raises TruncatedError: the file does not reach the range
        """
        if not self._loop.is_running_here():
            raise RuntimeError(
                "this pending flush belongs to another event loop: wait for it in the one that "
                "opened its map"
            )
        await checkpoint()
        file = ticket.keeps
        if isinstance(file, File):  # else it is resolved
            failures = self._log.failures
            request = _Flush(file, mapping, ticket.offset, ticket.length, failures, ticket)
            del file  # its end is for the worker
            await self._do(request)
        if ticket.failure is not None:
            raise self._error(ticket.failure)

    @_workers.forgetful
    async def start(self, mapping: Mapping, offset: int, length: int) -> PendingFlush:
        """
        Start the write-back of a range. A checkpoint.

        :raises FlushError: an earlier flush failed, or the kernel refused this write-back
        :raises TruncatedError: the file does not reach the range
        """
        self.check()
        assert mapping.file is not None
        await checkpoint_if_cancelled()
        with self._log_lock:
            # Before anything starts, so that it is told of whatever fails from now on. The map may
            # be shorter already than the loop knows.
            ticket = self._log.ticket(
                offset, length_inside(offset, length, self.length), mapping.file
            )
        pending = PendingFlush(self, weakref.ref(mapping), ticket)
        end = offset + length
        while offset < end:
            count = min(_START_PIECE, end - offset)
            await self._starters.do(_Start(mapping, offset, count))
            offset += count
        self.write_backs += 1
        return pending

    # In a worker

    def cut(self, change: Callable[[], T], length: int) -> T:
        """Run what makes the map, and its file, shorter."""
        with self._cut_lock:
            result = change()
            self.length = length
            with self._log_lock:
                self._log.cut(length)
        return result

    def _failed(self, error: BaseException, ranges: Sequence[Range]) -> Failure:
        # What is no OSError came from us; what the kernel would have said is not known then.
        number = error.errno if isinstance(error, OSError) else None
        with self._log_lock:
            return self._log.fail(number or errno.EIO, ranges)

    def _reach(self, file: File) -> tuple[int, int, int]:
        """Bytes of the file, of the map that it reaches, and of the map, at one instant."""
        with self._cut_lock:
            size = file.size()
            return size, length_inside(0, size - self._start_in_file, self.length), self.length

    def _perform_starts(
        self, requests: list[_Start]
    ) -> Generator[list[_Start], None, list[_Start]]:
        """Start the write-back of the ranges, each page once. The log is told of failures."""
        for mapping in {id(each.mapping): each.mapping for each in requests}.values():
            assert mapping is not None
            self._start([each for each in requests if each.mapping is mapping], mapping)
        del mapping
        for each in requests:
            each.mapping = None  # should it be the last reference: unmapping is for workers
        yield from ()
        return requests

    def _start(self, requests: list[_Start], mapping: Mapping) -> None:
        """Never raises."""
        assert mapping.file is not None
        try:
            _, reach, limit = self._reach(mapping.file)
        except BaseException as exc:
            _spoil(requests, exc)
            return
        admitted = []
        for each in requests:
            each.length = length_inside(each.offset, each.length, limit)
            if each.length > reach - each.offset and each.length:
                each.error = TruncatedError(each.offset, each.length, reach, self._filename)
            else:
                admitted.append(each)
        ranges = merge([(each.offset, each.length) for each in admitted])
        parts = [part for each in ranges for part in pieces(*each, _STARTED_AT_ONCE)]
        took = 0.0
        try:
            for number, part in enumerate(parts):
                if number:
                    self._wait_for_turns(1, max(2 * took, _TURN_SECONDS))
                began = time.monotonic()
                mapping.start_write_back(*part)
                took = time.monotonic() - began
        except BaseException as exc:
            failure = self._failed(exc, ranges)
            for each in admitted:
                each.error = self._error(failure)

    def _perform(self, requests: list[_Flush]) -> Generator[list[_Flush], None, list[_Flush]]:
        try:
            return (yield from self._flush_many(requests))
        except BaseException:
            self._bulk = _Bulk()  # whose requests get the error
            raise

    def _flush_many(self, requests: list[_Flush]) -> Generator[list[_Flush], None, list[_Flush]]:
        # Without those that were put back and then abandoned.
        self._bulk.requests = [each for each in self._bulk.requests if each.taken]
        while True:
            small = []
            for each in requests:
                if each.length <= BULK:
                    small.append(each)
                elif not each.in_bulk:  # else it was put back
                    self._bulk.add(each)
            if small:
                began = time.monotonic()
                self._flush(small, in_bulk=bool(self._bulk.requests))
                took = time.monotonic() - began
                if not self._bulk.requests and len(small) + self._crew.waiting == 1:
                    return small
                yield small
                if not self._bulk.requests:
                    self._gather(took / 2)
            if not self._write_piece(self._bulk):
                break
            yield []
            wanted, gone = _by_wanted(self._bulk.requests)
            if self._crew.put_back(wanted):
                self._bulk.requests = wanted
                return gone
            requests = self._crew.take()
        bulk, self._bulk = self._bulk.requests, _Bulk()
        wanted, _ = _by_wanted(bulk)
        if wanted:
            self._flush(wanted, in_bulk=False)
        return bulk

    def _gather(self, seconds: float) -> None:
        """
        Let those who were just served ask again before the next flush begins.

        Else a hundred tasks that commit again and again fall into two halves: one is served
        while the other waits, and each flush serves fifty. At most half the time of a flush
        (PostgreSQL's advice for its commit_delay), and mostly the moment that the event loop
        takes to run them.
        """
        # The first turn comes when the tasks have been woken; the second is the one in which they
        # run, before or after our call (trio draws lots); in the third they have run.
        self._wait_for_turns(3, seconds)

    def _wait_for_turns(self, turns: int, seconds: float) -> None:
        """Wait until the event loop has come round so many times, but no longer than that."""
        ran = threading.Lock()
        ran.acquire()
        call: Callable[[], object] = ran.release
        for _ in range(turns - 1):
            call = partial(self._loop.post, call)
        if self._loop.post(call):
            ran.acquire(timeout=seconds)

    def _write_piece(self, bulk: _Bulk) -> bool:
        """Write some more of the bulk; False when there is no more, or no point in it."""
        parts = bulk.next_pieces(self._piece.bytes)
        # The latest, which has the map's present length.
        mapping = bulk.requests[-1].mapping() if bulk.requests else None
        if not parts or mapping is None or self._log.failure is not None:
            return False
        began = time.monotonic()
        try:
            if len(parts) > 1:
                # The disk goes on with the next piece while we look after this one.
                for offset, length in parts:
                    mapping.start_write_back(offset, length_inside(offset, length, mapping.length))
            offset, length = parts[0]
            mapping.write_back(offset, length_inside(offset, length, mapping.length))
        except BaseException as exc:
            self._failed(exc, [(each.offset, each.length) for each in bulk.requests])
            return False
        log_if_slow(began, "write-back of %d bytes at %d of %r", length, offset, self._filename)
        self._piece.took(length, time.monotonic() - began)
        return True

    def _flush(self, requests: list[_Flush], *, in_bulk: bool) -> None:
        """One device flush, or a few, for all requests that may be served. Never raises."""
        try:
            file = requests[0].file
            assert file is not None
            size, reach, limit = self._reach(file)
        except BaseException as exc:
            _spoil(requests, exc)
            return
        # Looked at together: a failure that comes after this is one during the flush.
        with self._log_lock:
            log = self._log
            failures = -1 if log.failure is not None else log.failures
            admitted = [
                each
                for each in requests
                # Nearly always; the rest are looked at more closely.
                if (
                    each.failures == failures
                    and each.ticket is None
                    and each.offset + each.length <= reach
                )
                or self._may(each, reach, limit)
            ]
            if not admitted:
                return
            number = log.begin()
        ranges = [
            (each.offset, length_inside(each.offset, each.length, reach)) for each in admitted
        ]
        if len(ranges) > 1:
            ranges = merge(ranges)
        began = time.monotonic()
        try:
            synced = self._sync(admitted, ranges, size, in_bulk)
        except BaseException as exc:
            self._failed(exc, ranges)
            covered: list[Range] | None = []
        else:
            covered = self._proven(file, admitted, synced)
        log_if_slow(
            began, "flush for %d tasks, %d ranges of %r", len(admitted), len(ranges), self._filename
        )
        with self._log_lock:
            failure = self._log.end(number, covered)
        if failure is not None:
            for each in admitted:
                each.error = self._error(failure)

    def _may(self, request: _Flush, reach: int, limit: int) -> bool:
        """Whether a flush that begins now can serve it; else it is served, or has its error."""
        if request.ticket is not None and request.ticket.done:
            return False  # by the flush of another who waited for it
        failure = self._log.failure_since(request.failures)
        if failure is not None:
            request.error = self._error(failure)
            return False
        self._clip(request, reach, limit)
        # With an error, too, if the file has some of it: nobody may come again to flush that.
        return request.error is None or request.offset < reach

    def _clip(self, request: _Flush, reach: int, limit: int) -> None:
        """To what is left of it in the map. It has its error where the file holds less."""
        request.length = length_inside(request.offset, request.length, limit)
        if request.length > reach - request.offset and request.length:
            request.error = TruncatedError(request.offset, request.length, reach, self._filename)

    def _sync(
        self, requests: list[_Flush], ranges: list[Range], size: int, in_bulk: bool
    ) -> list[Range] | None:
        """Flush; what it was for, None for the whole map."""
        mapping = requests[0].mapping()
        if mapping is not None and all(each.mapping() is mapping for each in requests):
            few = len(ranges) == 1 and ranges[0][1] < size - ranges[0][1]
            if few or (in_bulk and len(ranges) <= _EACH_BY_ITSELF):
                for offset, length in ranges:
                    mapping.sync_range(offset, length)
                return ranges
        file = requests[0].file
        assert file is not None
        file.kernel.sync_data(file.fd)
        return None

    def _proven(
        self, file: File, requests: list[_Flush], synced: list[Range] | None
    ) -> list[Range] | None:
        """
        What of the synced ranges the file still holds, None for the whole map. Never raises.

        Bytes that were truncated away while the kernel flushed are not durable, whatever it
        says: who asked for them has an error.
        """
        try:
            _, reach, limit = self._reach(file)
        except BaseException as exc:
            _spoil(requests, exc)
            return []
        if reach == limit:
            return synced
        for each in requests:
            self._clip(each, reach, limit)
        if synced is None:
            return [(0, reach)]
        return [(offset, length_inside(offset, length, reach)) for offset, length in synced]


def _by_wanted(requests: Sequence[_Flush]) -> tuple[list[_Flush], list[_Flush]]:
    """Those that somebody waits for, and the others, at one instant."""
    groups: tuple[list[_Flush], list[_Flush]] = ([], [])
    for each in requests:
        groups[not each.wanted].append(each)
    return groups


def _spoil(requests: Sequence[Request], error: BaseException) -> None:
    for each in requests:
        each.error = _workers.own(error)


class PendingFlush(Uncopyable):
    """
    A write-back that was started; durable once :meth:`wait` has returned.

    Given out by ``flush_async()`` and ``flush_async_range()``. Nobody needs to wait for it.
    It can be waited for by several tasks, again and again, also after its map was closed::

        pending = await m.flush_async()
        ...  # go on while the disk writes
        await pending
    """

    __slots__ = ("__weakref__", "_flusher", "_mapping", "_ticket")

    def __init__(
        self, flusher: Flusher | None, mapping: weakref.ref[Mapping] | None, ticket: Ticket
    ) -> None:
        self._flusher = flusher
        self._mapping = mapping
        self._ticket = ticket

    @property
    def done(self) -> bool:
        """
        Whether it is known to be durable: waited for, or covered by a later flush. Where somebody
        has cut the file and made it long again before that, as it was then.
        """
        return self._ticket.done

    @_workers.forgetful
    async def wait(self) -> None:
        """
        Wait until the range is durable, in one device flush with all others who wait.

        A checkpoint. Cancelled, it leaves the write-back and other waiters alone.

        :raises FlushError: the kernel could not write it, or something else of the map
            before it was known to be durable; a pending flush that failed stays failed, also
            after ``clear_flush_error()``
        :raises TruncatedError: the file does not reach the range any more
        :raises RuntimeError: the map belongs to another event loop
        """
        if self._flusher is None or self._mapping is None:
            await checkpoint()
        else:
            await self._flusher.wait_for(self._ticket, self._mapping)

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
