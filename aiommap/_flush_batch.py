"""The rules of flushing, without tasks or threads: who is served by which flush, what failed.

Theory of operation
-------------------
A *device flush* makes everything durable that was stored before it began. So a request is
served by the first device flush that begins after it; requests that arrive while one is under
way share the next. Flushes are numbered as they begin. A :class:`Ticket` (a write-back that
is started and that somebody may wait for later) remembers the number of the last flush begun
before it; any flush with a higher number that succeeds, and covers its range, has made it
durable.

One failure spoils everything that was not durable by then. The kernel reports a failed
write-back once and marks the pages clean, so the next flush would succeed and mean nothing
(measured on ext4, xfs and btrfs; https://lwn.net/Articles/752063/). Hence

* the log keeps the failure, and every flush fails with it until it is cleared;
* a flush that was under way at that moment has failed too, whatever the kernel says of it: it
  found pages clean that were never written;
* whoever asked before that moment is told of it, cleared or not, and so are the tickets open
  then: their bytes may be lost, and no later flush can tell. :attr:`FlushLog.failures`, taken
  when something is asked for, is what :meth:`FlushLog.failure_since` compares.

Tickets are held weakly: nobody needs to wait for one. Each is looked at until the first flush
that covers it, or failure, resolves it. They are kept in a plain list of weak references and
not in a WeakSet, which the garbage collector changes in other threads while it is iterated.

Invariants: no ticket is open while a failure is latched; an open ticket was asked for after
the last failure; its number is at most that of the last flush begun.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ._errors import Range
from ._range_sets import union

MOST_RANGES = 64
"""Ranges that a failure names at most; more are named as the one range around them."""

_FIRST_SWEEP = 32  # tickets that are kept before the first look for dropped ones; out of the air


@dataclass(frozen=True, slots=True)
class Failure:
    """What the kernel said, and which ranges were to be flushed since the last good flush."""

    errno: int
    ranges: tuple[Range, ...]


class Ticket:
    """A range whose write-back is started and that a later flush makes durable."""

    __slots__ = ("__weakref__", "done", "failure", "keeps", "length", "number", "offset")

    def __init__(self, number: int, offset: int, length: int, keeps: object) -> None:
        self.number: int = number
        self.offset: int = offset
        self.length: int = length
        self.keeps: object = keeps
        """What a flush of this ticket will need (the file); let go as soon as none will."""
        self.done: bool = False
        self.failure: Failure | None = None

    def _resolve(self, failure: Failure | None) -> None:
        self.done = failure is None
        self.failure = failure
        self.keeps = None


class FlushLog:
    """
    Which flushes began, and what became of them. Not thread-safe.

    :ivar begun: the number of the last flush that began
    :ivar succeeded: how many succeeded
    :ivar failure: the failure that every flush reports, until it is cleared
    :ivar failures: how many there were
    """

    def __init__(self) -> None:
        self.begun = 0
        self.succeeded = 0
        self.failure: Failure | None = None
        self.failures = 0
        self._last: Failure | None = None
        self._last_number = -1  # of the last flush that had begun when it failed
        self._open: list[weakref.ref[Ticket]] = []
        self._sweep_at = _FIRST_SWEEP
        # Ranges of write-backs that nobody flushed yet, kept for the report of a failure.
        self._started: list[Range] = []

    def failure_since(self, failures: int) -> Failure | None:
        """What a request must be told that was made when there were so many failures."""
        return self.failure if self.failures == failures else self._last

    def ticket(self, offset: int, length: int, keeps: object) -> Ticket:
        """A write-back of a range is about to be started. Amortised O(1)."""
        ticket = Ticket(self.begun, offset, length, keeps)
        if self.failure is not None:
            ticket._resolve(self.failure)
            return ticket
        if len(self._open) >= self._sweep_at:
            self._open = [weakref.ref(each) for each in self._tickets()]
            self._sweep_at = max(2 * len(self._open), _FIRST_SWEEP)
        self._open.append(weakref.ref(ticket))
        if length:
            self._started.append((offset, length))
            if len(self._started) > 2 * MOST_RANGES:
                self._started = summary(self._started)
        return ticket

    def _tickets(self) -> Iterator[Ticket]:
        """The open ones that somebody still has."""
        for reference in self._open:
            ticket = reference()
            if ticket is not None:
                yield ticket

    def begin(self) -> int:
        """A device flush begins now: the number to report its end with."""
        self.begun += 1
        return self.begun

    def end(self, number: int, covered: Iterable[Range] | None) -> Failure | None:
        """
        The kernel says that the flush succeeded. O(open tickets x log ranges).

        :param covered: the ranges it was for, None for the whole map
        :return: None, or the failure that came in between and makes it mean nothing
        """
        if self._last_number >= number:
            return self._last
        self.succeeded += 1
        ranges = None if covered is None else merge(covered)
        still_open = []
        for ticket in self._tickets():
            if ticket.number < number and _covers(ranges, ticket.offset, ticket.length):
                ticket._resolve(None)
            else:
                still_open.append(weakref.ref(ticket))
        self._open = still_open
        if ranges is None:
            # Of write-backs that started after it began nothing is known, but a failure of
            # theirs would be reported with what is flushed then.
            self._started = [(each.offset, each.length) for each in self._tickets()]
        else:
            self._started = [each for each in self._started if not _covers(ranges, *each)]
        return None

    def fail(self, errno: int, ranges: Iterable[Range]) -> Failure:
        """A flush or write-back failed. The first failure stays."""
        if self.failure is None:
            self.failure = Failure(errno, tuple(summary([*self._started, *ranges])))
        self.failures += 1
        self._last = self.failure
        self._last_number = self.begun
        for ticket in self._tickets():
            ticket._resolve(self.failure)
        self._open.clear()
        self._started.clear()
        return self.failure

    def cut(self, length: int) -> None:
        """The map was made shorter: what lay behind is not waited for any more. O(tickets)."""
        for ticket in self._tickets():
            ticket.length = length_inside(ticket.offset, ticket.length, length)
        self._started = [
            (offset, length_inside(offset, count, length))
            for offset, count in self._started
            if offset < length
        ]

    def clear(self) -> None:
        """The user knows. What failed stays failed."""
        self.failure = None

    def _check(self) -> None:
        open_tickets = list(self._tickets())
        assert self.succeeded <= self.begun
        assert self._last_number <= self.begun
        assert (self._last is None) == (self.failures == 0)
        if self.failure is not None:
            assert not self._open
            assert not self._started
            assert self.failure == self._last
            assert len(self.failure.ranges) <= MOST_RANGES
        assert len(self._started) <= 2 * MOST_RANGES or len(self._started) <= len(open_tickets)
        assert len(self._open) <= max(self._sweep_at, len(open_tickets))
        for ticket in open_tickets:
            assert not ticket.done
            assert ticket.failure is None
            assert ticket.number <= self.begun
            assert ticket.number >= self._last_number


def length_inside(offset: int, length: int, size: int) -> int:
    """How many bytes of the range are left when only ``size`` bytes are."""
    return max(min(length, size - offset), 0)


def _covers(ranges: Sequence[Range] | None, offset: int, length: int) -> bool:
    """Whether one of the ranges, which are in order and apart, holds all of it. O(log n)."""
    if ranges is None or length == 0:
        return True
    index = bisect_right(ranges, offset, key=_offset_of) - 1
    if index < 0:
        return False
    start, size = ranges[index]
    return length <= size - (offset - start)


def _offset_of(each: Range) -> int:
    return each[0]


def merge(ranges: Iterable[Range]) -> list[Range]:
    """Exactly the same bytes, in order: ranges that overlap or touch become one. O(n log n)."""
    parts = union((offset, offset + length) for offset, length in ranges)
    return [(start, stop - start) for start, stop in parts]


def summary(ranges: Iterable[Range]) -> list[Range]:
    """As :func:`merge`, for a message: where they are many, the one range around them."""
    result = merge(ranges)
    if len(result) > MOST_RANGES:
        start = result[0][0]
        return [(start, sum(result[-1]) - start)]
    return result
