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
        self._in_hand: list[R] = []  # what one run of ``perform`` was given and took

    def _work_off(self, seat: Seat) -> Sequence[R]:
        done: Sequence[R] = ()
        self._in_hand = []
        try:
            while True:
                if self.take():
                    done = self._perform_batch(self._perform(list(self._in_hand)))
                    self._in_hand = []
                left = self._linger(seat, done)
                if left is not None:
                    return left
                done = ()
        except BaseException as exc:
            return [*done, *self._break_off(seat, self._in_hand, exc)]

    def _perform_batch(self, steps: Generator[Sequence[R], None, Sequence[R]]) -> Sequence[R]:
        """Deliver group by group; gives the last one."""
        try:
            while True:
                group = next(steps)
                post_surely(self._loop, self._deliver, group)
                if len(group) == len(self._in_hand):
                    self._in_hand = []
                else:
                    given = set(map(id, group))
                    self._in_hand = [each for each in self._in_hand if id(each) not in given]
        except StopIteration as stop:
            last: Sequence[R] = stop.value
            return last
        except BaseException as exc:
            # Those too that it took meanwhile.
            return self._spoilt([each for each in self._in_hand if each.taken], exc)

    def take(self) -> list[R]:
        """A batch of what waits; none while others wait for the limiter. For ``perform``."""
        with self._lock:
            before = len(self._in_hand)
            self._pop(before + self._batch, self._in_hand)
            return self._in_hand[before:]

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
