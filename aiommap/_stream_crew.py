"""A crew that does requests a few at a time, and starts what the next ones need: page-ins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from typing import TypeVar

from anyio import CapacityLimiter

from ._crew import Crew, Request, Seat
from ._event_loop import EventLoop
from ._workers import without_frames

MOST_TOGETHER = 16
QUICK_SECONDS = 0.001
SLOW_SECONDS = 0.002
"""
How many requests a thread does at once and hands back together: more after each time that it
was quick, fewer after one that was slow, because one of them may keep the others waiting. Each
hand-over wakes the loop, for 5 us, and takes the GIL from it, for 10 and more.
"""

R = TypeVar("R", bound=Request)


class StreamCrew(Crew[R]):
    """
    A few threads that do waiting requests, having announced many of them.

    All reads of a batch are under way before the first is waited for.

    :param threads: how many do requests at once
    :param batch: how many requests may be announced and not done
    :param announcer: one more thread announces what comes while they all wait
    """

    def __init__(
        self,
        loop: EventLoop,
        limiter: CapacityLimiter,
        *,
        threads: int,
        batch: int,
        announcer: bool = False,
    ) -> None:
        super().__init__(loop, limiter, threads=threads + announcer, batch=batch)
        self._performers = threads
        self._performing = 0  # threads that may be waiting for the disk
        self._some = 1  # how many are done together
        self._asked_for_help = False

    def announce(self, requests: Sequence[R]) -> None:
        """Start what the requests will need, without waiting. In a worker."""
        for request in requests:
            request.announce()

    def perform_some(self, requests: Sequence[R]) -> None:
        """Do a few requests that were announced, in a worker."""
        for request in requests:
            try:
                request.perform()
            except BaseException as exc:
                request.error = without_frames(exc)

    def _work_off(self, seat: Seat[R]) -> None:
        """
        Do what waits, a few requests at a time. What nobody works on yet stays in the queue,
        announced, so that a request which takes long holds up no more than those beside it.
        """
        while True:
            fresh = self._begin_announcing()
            if fresh:
                with suppress(Exception):  # a hint; what is wrong comes up again
                    self.announce(fresh)
            with self._lock:
                some = self._some
                # The last of several threads leaves waiting to the others.
                if self._may_perform():
                    self._pop(some, seat.requests)
                    if seat.requests:
                        self._performing += 1
                        seat.performing = True
                help_wanted = self._is_help_wanted() and not self._asked_for_help
                self._asked_for_help |= help_wanted
            if help_wanted:
                self._loop.post(self._help)
            if not seat.requests:
                if self._linger(seat):
                    continue
                return
            began = time.monotonic()
            try:
                self.perform_some(seat.requests)
            except BaseException as exc:
                self._spoil(seat, exc)
            took = time.monotonic() - began
            with self._lock:
                self._performs_no_more(seat)
                if took > SLOW_SECONDS:
                    # Storage whose queue is full starts nothing on a hint: once more.
                    self._announced = 0
            if took > SLOW_SECONDS:
                self._some = max(some // 2, 1)
            elif took < QUICK_SECONDS and len(seat.requests) == some:
                self._some = min(some * 2, MOST_TOGETHER)
            self._hand_back(seat)

    def _performs_no_more(self, seat: Seat[R]) -> None:
        if seat.performing:
            seat.performing = False
            self._performing -= 1

    def _uncount(self, seat: Seat[R]) -> None:
        self._performs_no_more(seat)
        super()._uncount(seat)

    def _break_off(self, seat: Seat[R], error: BaseException) -> None:
        self._asked_for_help = False  # maybe it was this one who did, and did not
        super()._break_off(seat, error)

    def _has_work(self) -> bool:
        """Whether there is something to do for one thread more."""
        if self._may_perform():
            return bool(self._waiting)
        return self._announced < min(len(self._waiting), self._batch)

    def _may_perform(self) -> bool:
        return self._performing < self._performers

    def _is_help_wanted(self) -> bool:
        # All threads may be waiting for the disk.
        return self._performing == self._active < self._threads and self._has_work()

    def _help(self) -> None:
        """A thread leaves requests to others, because it may have to wait for the disk."""
        with self._lock:
            self._asked_for_help = False
            wanted = self._active > 0 and self._is_help_wanted()
        if wanted:
            with suppress(RuntimeError):  # no more threads: the one at work goes on
                self._hire()

    def _begin_announcing(self) -> list[R]:
        with self._lock:
            if self._announced >= min(len(self._waiting), self._batch):
                return []
            if len(self._waiting) == 1 and self._may_perform():
                return []  # it is done at once
            fresh = list(islice(self._waiting, self._announced, self._batch))
            self._announced += len(fresh)
        return [request for request in fresh if not request._abandoned]
