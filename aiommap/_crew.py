"""Threads that take the waiting requests of many tasks together: page-ins, copies, flushes.

A hop between the loop and a thread costs more than most of what is asked for, so it serves a
batch. A request that is abandoned goes on by itself; it owns what it touches.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Generic, TypeVar

import anyio
from anyio import CapacityLimiter

from ._event_loop import EventLoop
from ._workers import (
    LastCall,
    Work,
    acquire_token,
    post_surely,
    return_token,
    start,
    without_frames,
)

LINGER_SECONDS = 0.002
"""How long a crew's thread without work keeps its token: its end and another's start cost the
loop 15 us, more than a read."""

MOST_TOGETHER = 16
QUICK_SECONDS = 0.001
SLOW_SECONDS = 0.002
"""
How many requests a thread does at once and hands back together: more after each time that it
was quick, fewer after one that was slow, because one of them may keep the others waiting. Each
hand-over wakes the loop, for 5 us, and takes the GIL from it, for 10 and more.
"""


class Request(Work):
    """
    Something a :class:`Crew` does for a task.

    A subclass says what in :meth:`perform`, in a worker. It owns what it touches, or its task
    asks :meth:`Crew.do` to stay until it is done.
    """

    __slots__ = ("_abandoned", "_taken")

    together = False
    """Whether it is short, so that a few may be done together by one thread."""

    def __init__(self) -> None:
        super().__init__()
        self._taken = False
        self._abandoned = False

    @property
    def taken(self) -> bool:
        """Whether a thread has it, or had it."""
        return self._taken

    def announce(self) -> None:
        """Start what will be needed, without waiting. All requests of a batch do so first."""

    def perform(self) -> None:
        """Do it, in a worker. What it raises reaches the task."""
        raise NotImplementedError

    def forget(self) -> None:
        """Let go of what it touches: it is done, or will not be. From any thread."""


class _Seat:
    """
    A thread's place in a crew: its token of the limiter, and how it is called while it lingers.

    :ivar token: None when it was given back
    """

    __slots__ = ("bell", "token")

    def __init__(self, token: object) -> None:
        self.token: object | None = token
        self.bell = threading.Lock()
        self.bell.acquire()


R = TypeVar("R", bound=Request)


class Crew(Generic[R]):
    """
    A few threads that take the waiting requests of many tasks in batches.

    One hop serves a whole batch, so that the cost of a hop is shared, all reads of a batch are
    under way before the first is waited for, and one device flush serves all who asked before
    it began. At most ``threads`` batches are worked on at once; each holds one token of the
    limiter. Where the limiter has none left, the crew is *starved* until one of the tasks whose
    requests wait has *begged* a token of it; a task that leaves while it begs calls the next.
    While others wait for the limiter, a thread gives its token back after each batch.

    :param threads: how many work at once
    :param batch: how many requests may be announced and not done
    :param announcer: one more thread announces what comes while they all wait
    :param perform: does a batch, in a worker, and must not raise; it sets ``error`` of the
        requests that failed, and gives groups of those that are done: yields them where it
        goes on, and returns the last. If it takes long it can :meth:`take` what comes
        meanwhile, and must :meth:`put_back` what is left while others wait for the limiter
    """

    def __init__(
        self,
        loop: EventLoop,
        limiter: CapacityLimiter,
        *,
        threads: int,
        batch: int,
        announcer: bool = False,
        perform: Callable[[list[R]], Generator[Sequence[R], None, Sequence[R]]] | None = None,
    ) -> None:
        self._loop = loop
        self._limiter = limiter
        self._performers = threads
        self._threads = threads + announcer
        self._batch = batch
        self._perform = perform
        self._waiting: deque[R] = deque()
        self._announced = 0  # the first so many of those were announced
        self._some = 1  # how many are done together
        self._in_hand: list[R] = []  # what one run of ``perform`` was given and took
        self._lingering: list[_Seat] = []  # of threads without work
        self._closed = False
        self._asked_for_help = False
        self._performing = 0  # threads that may be waiting for the disk
        # Between the loop and the threads: who takes the last request, and whether a request
        # was taken before it was abandoned. Held for a few instructions, never in a wait.
        # Re-entrant, because the garbage collector may run in between, and end something that
        # abandons its requests.
        self._lock = threading.RLock()
        self._active = 0
        self._dropped = 0  # requests in the queue that were abandoned
        self._starved = False
        self._begging = False
        self._yielding = False

    def submit(self, request: R) -> None:
        """
        Have it done, whether or not anybody waits for it.

        Where the limiter has no token it is done with the next request that a task waits for.

        :raises RuntimeError: when the system gives no thread; then it is not done
        """
        seat = None
        with self._lock:
            self._waiting.append(request)
            if self._lingering:
                seat = self._lingering.pop()
            wanted = self._is_help_wanted()
        if seat is not None:
            seat.bell.release()
        elif wanted:
            try:
                self._hire()
            except BaseException:
                self.abandon(request)
                raise

    async def do(self, request: R, *, stay: bool = False) -> None:
        """Have it done and wait: :meth:`submit`, then :meth:`wait`."""
        request.parking = self._loop.parking()
        self.submit(request)
        await self.wait(request, stay=stay)

    async def wait(self, request: R, *, stay: bool = False) -> None:
        """
        Wait for a request that was submitted. A checkpoint, unless it is done.

        Cancelled, a request that no thread has taken is dropped; one that is under way goes
        on by itself, and the caller leaves at once or, with ``stay``, when it has finished.

        :param stay: the request uses what belongs to the caller
        :raises BaseException: what the request's ``perform`` raised
        """
        interrupt: BaseException | None = None
        try:
            while not request.done:
                parking = request.parking = request.parking or self._loop.parking()
                if self._starved and not self._begging and not request._taken:
                    await self._beg()
                else:
                    await parking.park()
                    request.parking = None
        except GeneratorExit:
            # The coroutine of a forgotten task, closed in any thread: nothing can be awaited.
            self.abandon(request)
            self._loop.post(self._call_next)
            raise
        except BaseException:
            self.abandon(request)
            self._call_next()
            self._clear_out()
            if stay and request._taken:
                interrupt = await request.drain(self._loop)
            if interrupt is None:
                raise
        if interrupt is not None:
            try:
                raise interrupt
            finally:
                del interrupt
        error = request.take_error()
        if error is not None:
            try:
                raise error
            finally:
                del error  # or the error would refer to this frame, and the frame to it

    def abandon(self, request: R) -> None:
        """Nobody wants it any more: drop it unless a thread has taken it. From any thread."""
        request.parking = None
        with self._lock:
            if request._taken or request._abandoned:
                return
            request._abandoned = True
            self._dropped += 1
        request.forget()

    def _clear_out(self) -> None:
        """A crew that is starved for long must not collect what was abandoned meanwhile."""
        with self._lock:
            if self._dropped > 2 * self._batch and self._dropped * 2 > len(self._waiting):
                first = list(islice(self._waiting, self._announced))
                self._announced = sum(not each._abandoned for each in first)
                self._waiting = deque(each for each in self._waiting if not each._abandoned)
                self._dropped = 0

    def close(self) -> None:
        """
        Send the threads without work away, and have no more of them linger.

        The event loop may end right after the map: then nobody would take their tokens back.
        """
        self._closed = True
        with self._lock:
            seats, self._lingering = self._lingering, []
            self._active -= len(seats)
        for seat in seats:
            token, seat.token = seat.token, None
            self._limiter.release_on_behalf_of(token)
            seat.bell.release()

    def _hire(self) -> None:
        token = object()
        try:
            self._limiter.acquire_on_behalf_of_nowait(token)
        except (anyio.WouldBlock, self._loop.would_block):
            with self._lock:
                # A thread of ours that is at work will come round; else somebody has to ask.
                self._starved = self._active == 0 and bool(self._waiting)
            return
        self._employ(token)

    async def _beg(self) -> None:
        token = object()
        self._begging = True
        try:
            await acquire_token(self._limiter, token)
        finally:
            self._begging = False
        self._employ(token)

    def _call_next(self) -> None:
        """Have another task ask the limiter, in the place of one that does not any more."""
        if not self._starved or self._begging:
            return
        with self._lock:
            for request in self._waiting:
                if request.parking is not None and not request._abandoned:
                    request.parking.wake()
                    return

    def _employ(self, token: object) -> None:
        with self._lock:
            self._starved = False
            # Somebody else may have got a token while this one was being begged.
            wanted = self._active < self._threads and bool(self._waiting)
            self._active += wanted
        try:
            if wanted:
                start(partial(self._work, _Seat(token)))
        except BaseException:
            wanted = False
            with self._lock:
                self._active -= 1
                self._starved = self._active == 0 and bool(self._waiting)
            if self._active == 0:
                raise
        finally:
            if not wanted:
                self._limiter.release_on_behalf_of(token)

    def _work(self, seat: _Seat) -> LastCall:
        if self._perform is None:
            done = self._work_off(seat)
        else:
            done = self._work_in_batches(self._perform)
        # In one call where there is nothing left to do: each wakes the loop, which then wants
        # the interpreter while this thread still has it (50 us and more for who waits).
        return LastCall(partial(self._leave, done, seat))

    def _leave(self, done: Sequence[R], seat: _Seat) -> None:
        posted = post_surely(self._loop, self._deliver_and_retire, done, seat)
        if not posted and seat.token is not None:
            return_token(self._limiter, seat.token)

    def _work_in_batches(
        self, perform: Callable[[list[R]], Generator[Sequence[R], None, Sequence[R]]]
    ) -> Sequence[R]:
        """Do what waits; gives what is still to be delivered."""
        done: Sequence[R] = ()
        try:
            while self._take():
                if done:
                    post_surely(self._loop, self._deliver, done)
                    done = ()
                done = self._perform_batch(perform(self._in_hand))
        except BaseException as exc:
            return [*done, *self._break_off(self._in_hand, exc)]
        return done

    def _break_off(
        self, requests: Sequence[R], error: BaseException, *, performing: bool = False
    ) -> Sequence[R]:
        """
        The thread ends because of something that nobody has thought of, or for want of memory:
        who waits for it gets the error, and if that is nobody, who waits next. Then an error
        that comes again and again leaves nobody waiting.
        """
        with self._lock:
            self._active -= 1
            self._performing -= performing
            self._asked_for_help = False
            return self._spoilt(requests or self._pop(self._batch), error)

    def _perform_batch(self, steps: Generator[Sequence[R], None, Sequence[R]]) -> Sequence[R]:
        """Deliver group by group; gives the last one."""
        try:
            while True:
                group = next(steps)
                post_surely(self._loop, self._deliver, group)
                given = set(map(id, group))
                self._in_hand = [each for each in self._in_hand if id(each) not in given]
        except StopIteration as stop:
            last: Sequence[R] = stop.value
            return last
        except BaseException as exc:
            # Those too that it took meanwhile.
            return self._spoilt([each for each in self._in_hand if each.taken], exc)

    def _spoilt(self, requests: Sequence[R], error: BaseException) -> Sequence[R]:
        """A mistake of ours, or no memory: better an error than tasks that wait for ever."""
        for request in requests:
            if not request.done and request.error is None:
                request.error = error
        return requests

    def _deliver_and_retire(self, requests: Sequence[R], seat: _Seat) -> None:
        self._deliver(requests)
        token, seat.token = seat.token, None
        if token is not None:  # else it comes twice, or was sent away
            self._retire(token)

    # Without a perform of its own

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

    def _work_off(self, seat: _Seat) -> Sequence[R]:
        """
        Do what waits, a few requests at a time; gives what is still to be delivered. What nobody
        works on yet stays in the queue, announced, so that a request which takes long holds up
        no more than those beside it.
        """
        post = self._loop.post
        requests: list[R] = []
        performing = False
        try:
            while True:
                fresh = self._begin_announcing()
                if fresh:
                    with suppress(Exception):  # a hint; what is wrong comes up again
                        self.announce(fresh)
                with self._lock:
                    some = self._some
                    # The last of several threads leaves waiting to the others.
                    if self._may_perform():
                        requests = self._pop(some)
                        performing = bool(requests)
                        self._performing += performing
                    help_wanted = self._is_help_wanted() and not self._asked_for_help
                    self._asked_for_help |= help_wanted
                if help_wanted:
                    post(self._help)
                if not requests:
                    if self._linger(seat):
                        continue
                    return ()
                began = time.monotonic()
                try:
                    self.perform_some(requests)
                except BaseException as exc:
                    self._spoilt(requests, exc)
                took = time.monotonic() - began
                self._performing_ends()
                performing = False
                if took > SLOW_SECONDS:
                    self._some = max(some // 2, 1)
                elif took < QUICK_SECONDS and len(requests) == some:
                    self._some = min(some * 2, MOST_TOGETHER)
                post_surely(self._loop, self._deliver, requests)
                requests = []
        except BaseException as exc:
            return self._break_off(requests, exc, performing=performing)

    def _has_work(self) -> bool:
        """Whether there is something to do for one thread more."""
        if self._may_perform():
            return bool(self._waiting)
        return self._announced < min(len(self._waiting), self._batch)

    def _may_perform(self) -> bool:
        return self._performing < self._performers

    def _performing_ends(self) -> None:
        with self._lock:
            self._performing -= 1

    def _is_help_wanted(self) -> bool:
        """Whether there is something to do while all threads may be waiting for the disk."""
        return self._performing == self._active < self._threads and self._has_work()

    def _linger(self, seat: _Seat) -> bool:
        """Wait a moment for more, which saves a thread's end and another's start."""
        with self._lock:
            if not self._yielding and self._has_work():
                return True
            if self._yielding or self._closed or self._limiter.available_tokens < 1:
                self._active -= 1
                return False
            self._lingering.append(seat)
        if not seat.bell.acquire(timeout=LINGER_SECONDS):
            with self._lock:
                if seat in self._lingering:
                    self._lingering.remove(seat)
                    self._active -= 1
                    return False
            seat.bell.acquire()  # it is being rung
        return seat.token is not None  # else it was sent away

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

    def _pop(self, most: int) -> list[R]:
        """The next requests that somebody wants; none while others wait for the limiter."""
        requests: list[R] = []
        while self._waiting and len(requests) < most and not self._yielding:
            request = self._waiting[0]
            if requests and not (request.together or self._perform):
                break
            self._waiting.popleft()
            self._announced -= self._announced > 0
            if request._abandoned:
                self._dropped -= 1
            else:
                request._taken = True
                requests.append(request)
        return requests

    def _take(self) -> bool:
        """Begin a batch of what waits; False: there is none, and the thread has ended."""
        with self._lock:
            self._in_hand = []
            taken = bool(self.take())
            self._active -= not taken
        return taken

    def take(self) -> list[R]:
        """A batch of what waits; none while others wait for the limiter. For ``perform``."""
        with self._lock:
            requests = self._pop(self._batch)
            self._in_hand = self._in_hand + requests
        return requests

    @property
    def waiting(self) -> int:
        """About how many requests wait that no thread has taken."""
        return len(self._waiting)

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

    def _deliver(self, requests: Sequence[R]) -> None:
        limiter = self._limiter
        if limiter.available_tokens <= 0 and limiter.statistics().tasks_waiting:
            self._yielding = True
        for request in requests:
            request.forget()  # the thread may refer to the request a moment longer
            request.deliver()

    def _retire(self, token: object) -> None:
        """A thread has ended; there may be work left, if it ended for others' sake."""
        self._yielding = False
        self._limiter.release_on_behalf_of(token)
        with self._lock:
            wanted = self._active < self._threads and self._has_work()
        if wanted:
            try:
                self._hire()
            except RuntimeError as exc:  # no more threads
                self._give_up(exc)
            self._call_next()

    def _give_up(self, error: RuntimeError) -> None:
        with self._lock:
            requests = list(self._waiting)
            self._waiting.clear()
            self._announced = 0
            self._dropped = 0
        for request in requests:
            request._taken = True
            request.error = RuntimeError(*error.args)
            request.forget()
            request.deliver()
