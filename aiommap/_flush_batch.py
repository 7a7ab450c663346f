"""The rules of flushing, without tasks or threads: who is served by which flush, what failed.

Theory of operation
-------------------
A *device flush* makes everything durable that was stored before it began. So a request is
served by the first device flush that begins after it; requests that arrive while one is under
way share the next. Flushes are numbered as they begin. A :class:`Ticket` (a write-back that
was started and that somebody may wait for later) remembers the number of the last flush begun
before it; any flush with a higher number that succeeds, and covers its range, has made it
durable.

One failure spoils everything that was not durable by then. The kernel reports a failed
write-back once and marks the pages clean, so the next flush would succeed and mean nothing
(measured on ext4, xfs and btrfs; https://lwn.net/Articles/752063/). Hence

* the log keeps the failure, and every flush fails with it until it is cleared;
* every ticket open at that time has failed for good, cleared or not: its bytes may be lost,
  and no later flush can tell.

Tickets are held weakly: nobody needs to wait for one. Each is looked at until the first flush
that covers it, or failure, resolves it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

from ._errors import Range

MOST_RANGES = 64
"""Ranges that a failure names at most; more are named as the one range around them."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What the kernel said, and which ranges were to be flushed since the last good flush."""

    errno: int
    ranges: tuple[Range, ...]


class Ticket:
    """A range whose write-back was started and that a later flush makes durable."""

    __slots__ = ("__weakref__", "done", "failure", "keeps", "length", "number", "offset")

    def __init__(self, number: int, offset: int, length: int, keeps: object) -> None:
        self.number = number
        self.offset = offset
        self.length = length
        self.keeps = keeps
        """What a flush of this ticket will need (the file); let go as soon as none will."""
        self.done = False
        self.failure: Failure | None = None

    def _resolve(self, failure: Failure | None) -> None:
        self.done = failure is None
        self.failure = failure
        self.keeps = None


class FlushLog:
    """Which flushes began, and what became of them. Not thread-safe."""

    def __init__(self) -> None:
        self.begun = 0
        self.succeeded = 0
        self.failure: Failure | None = None
        self._open: weakref.WeakSet[Ticket] = weakref.WeakSet()
        # Ranges of write-backs that nobody flushed yet, kept for the report of a failure.
        self._started: list[Range] = []

    def ticket(self, offset: int, length: int, keeps: object) -> Ticket:
        """A write-back of a range was started. O(1)."""
        ticket = Ticket(self.begun, offset, length, keeps)
        if self.failure is not None:
            ticket._resolve(self.failure)
        else:
            self._open.add(ticket)
            self._started.append((offset, length))
            if len(self._started) > MOST_RANGES:
                self._started = merge(self._started)
        return ticket

    def begin(self) -> int:
        """A device flush begins now: the number to report its end with."""
        self.begun += 1
        return self.begun

    def end(self, number: int, covered: Iterable[Range] | None) -> None:
        """
        The flush succeeded.

        :param covered: the ranges it was for, None for the whole file
        """
        self.succeeded += 1
        ranges = None if covered is None else merge(covered)
        for ticket in list(self._open):
            if ticket.number < number and _covers(ranges, ticket.offset, ticket.length):
                ticket._resolve(None)
                self._open.discard(ticket)
        if ranges is None:
            self._started.clear()
        else:
            self._started = [each for each in self._started if not _covers(ranges, *each)]

    def fail(self, errno: int, ranges: Iterable[Range]) -> Failure:
        """A flush or write-back failed. The first failure stays."""
        if self.failure is None:
            self.failure = Failure(errno, tuple(merge([*self._started, *ranges])))
        for ticket in list(self._open):
            ticket._resolve(self.failure)
        self._open.clear()
        self._started.clear()
        return self.failure

    def clear(self) -> None:
        """The user knows. Tickets that failed stay failed."""
        self.failure = None

    def _check(self) -> None:
        assert self.succeeded <= self.begun
        assert not (self.failure and self._open)
        assert len(self._started) <= MOST_RANGES
        for ticket in self._open:
            assert not ticket.done
            assert ticket.failure is None
            assert ticket.number <= self.begun


def _covers(ranges: list[Range] | None, offset: int, length: int) -> bool:
    if ranges is None or length == 0:
        return True
    return any(start <= offset and length <= size - (offset - start) for start, size in ranges)


def merge(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes as few ranges in order: those that overlap or touch become one."""
    result: list[Range] = []
    for offset, length in sorted(ranges):
        if length == 0:
            continue
        if result and offset <= sum(result[-1]):
            start, size = result[-1]
            result[-1] = (start, max(size, offset + length - start))
        else:
            result.append((offset, length))
    if len(result) > MOST_RANGES:
        start = result[0][0]
        return [(start, sum(result[-1]) - start)]
    return result
