"""A crew of one thread that takes all that waits at once: flushes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from anyio import CapacityLimiter

from ._crew import Crew, Request, Seat
from ._event_loop import EventLoop
from ._workers import post_surely

R = TypeVar("R", bound=Request)


class BatchCrew(Crew[R]):
    """
    One thread that takes the waiting requests of many tasks in batches.

    So one device flush serves all who asked before it began.

    :param batch: how many requests may be in hand
    :param perform: does a batch, in a worker, and must not raise; it sets ``error`` of the
        requests that failed, and gives groups of those that are done: yields them where it
        goes on, and returns the last. If it takes long it can :meth:`take` what comes
        meanwhile, and must :meth:`put_back` what is left while others wait for the limiter
    """

    takes_any = True

    def __init__(
        self,
        loop: EventLoop,
        limiter: CapacityLimiter,
        *,
        batch: int,
        perform: Callable[[list[R]], Generator[Sequence[R], None, Sequence[R]]],
    ) -> None:
        super().__init__(loop, limiter, threads=1, batch=batch)
        self._perform = perform
        self._seat: Seat[R] | None = None  # of the one thread, while it works

    def _work_off(self, seat: Seat[R]) -> None:
        self._seat = seat
        while True:
            if self.take():
                self._perform_batch(seat)
            if not self._linger(seat):
                return

    def _perform_batch(self, seat: Seat[R]) -> None:
        """Deliver group by group, but for the last one, which stays in hand."""
        steps = self._perform(list(seat.requests))
        try:
            while True:
                group = next(steps)
                _forget(group)
                if group and len(group) == len(seat.requests):
                    self._hand_back(seat)
                else:
                    given = set(map(id, group))
                    seat.requests = [each for each in seat.requests if id(each) not in given]
                    post_surely(self._loop, self._deliver, group)
        except StopIteration as stop:
            _forget(stop.value)
            seat.requests = list(stop.value)
        except BaseException as exc:
            self._spoil(seat, exc)  # those too that it took meanwhile

    def take(self) -> list[R]:
        """A batch of what waits; none while others wait for the limiter. For ``perform``."""
        seat = self._seat
        assert seat is not None
        with self._lock:
            before = len(seat.requests)
            self._pop(before + self._batch, seat.requests)
            return seat.requests[before:]

    def put_back(self, requests: Sequence[R]) -> bool:
        """
        Have requests done by a later ``perform``, if others wait for the limiter; whether so.

        Found out with every group that ``perform`` gives, also with an empty one.
        """
        with self._lock:
            if self._yielding:
                for request in reversed(requests):
                    request._taken = False
                    self._waiting.appendleft(request)
            return self._yielding


def _forget(requests: Sequence[Request]) -> None:
    # Here, and before they are delivered: what goes with the last reference may wait, and who is
    # woken may look.
    for each in requests:
        each.forget()
