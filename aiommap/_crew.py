"""Threads that take the waiting requests of many tasks together: page-ins, copies, flushes.

A hop between the loop and a thread costs more than most of what is asked for, so it serves a
batch. A request that is abandoned goes on by itself; it owns what it touches. How a thread works
is said in ``_batch_crew.py`` (all at once) and ``_stream_crew.py`` (a few at a time); here is who
waits, who works, and on whose token.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Generic, TypeVar

import anyio
from anyio import CapacityLimiter

from ._event_loop import EventLoop
from ._workers import TRIES, LastCall, Work, acquire_token, own, post_surely, return_token, start

LINGER_SECONDS = 0.002
"""How long a crew's thread without work keeps its token: its end and another's start cost the
loop 15 us, more than a read."""


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


R = TypeVar("R", bound=Request)


class Seat(Generic[R]):
    """
    A thread's place in a crew.

    :ivar token: of the limiter; None when it was given back
    :ivar bell: how the thread is called while it lingers
    :ivar requests: what it has taken and not delivered
    :ivar counts: whether the crew counts the thread
    :ivar performing: whether it counts as one that may be waiting for the disk
    """

    __slots__ = ("bell", "counts", "performing", "requests", "token")

    def __init__(self, token: object) -> None:
        self.token: object | None = token
        self.bell = threading.Lock()
        self.bell.acquire()
        self.requests: list[R] = []
        self.counts = True
        self.performing = False


class Crew(Generic[R]):
    """
    A few threads that take the waiting requests of many tasks.

    One hop serves many, so that the cost of a hop is shared. Each thread holds one token of the
    limiter. Where the limiter has none left, the crew is *starved* until one of the tasks whose
    requests wait has *begged* a token of it; a task that leaves while it begs calls the next.
    While others wait for the limiter, a thread gives its token back after what it has in hand.

    :param threads: how many at once
    :param batch: how many requests may be in hand, or announced
    """

    takes_any = False
    """Whether a thread takes whatever waits, or only what is short together with others."""

    def __init__(
        self, loop: EventLoop, limiter: CapacityLimiter, *, threads: int, batch: int
    ) -> None:
        self._loop = loop
        self._limiter = limiter
        self._threads = threads
        self._batch = batch
        self._waiting: deque[R] = deque()
        self._announced = 0  # the first so many of those were announced
        self._lingering: list[Seat[R]] = []  # of threads without work
        self._closed = False
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

        :param stay: the request uses what belongs to the caller; not where it may be put back,
            for who has been cancelled does not beg any more
        :raises BaseException: what the request's ``perform`` raised
        """
        assert not (stay and self.takes_any)
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
        if request.error is not None:
            error = request.take_error()
            assert error is not None
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
            for seat in seats:
                self._uncount(seat)
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
            await acquire_token(self._loop, self._limiter, token)
        finally:
            self._begging = False
        self._employ(token)

    def _call_next(self) -> None:
        """Have another task ask the limiter, in the place of one that does not any more."""
        if not self._starved or self._begging:
            return
        with self._lock:
            self._drop_abandoned()
            for request in self._waiting:
                if request.parking is not None and not request._abandoned:
                    request.parking.wake()
                    return

    def _drop_abandoned(self) -> None:
        """Nobody looks again at those at the front: when many leave, each looks for the next."""
        while self._waiting and self._waiting[0]._abandoned:
            self._waiting.popleft()
            self._dropped -= 1
            self._announced -= self._announced > 0

    def _employ(self, token: object) -> None:
        with self._lock:
            self._starved = False
            # Somebody else may have got a token while this one was being begged.
            wanted = self._active < self._threads and bool(self._waiting)
            self._active += wanted
        try:
            if wanted:
                seat: Seat[R] = Seat(token)
                start(partial(self._work, seat))
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

    def _work(self, seat: Seat[R]) -> LastCall | None:
        error: BaseException | None = None
        try:
            self._work_off(seat)
        except BaseException as exc:
            error = exc
        tries = 0
        while error is not None and tries < TRIES:
            try:
                self._break_off(seat, error)
                error = None
            except MemoryError:  # others free some meanwhile
                tries += 1
        # In one call where there is nothing left to do: each wakes the loop, which then wants
        # the interpreter while this thread still has it (50 us and more for who waits).
        try:
            return LastCall(partial(self._leave, seat))
        except MemoryError:
            self._leave(seat)
            return None

    def _leave(self, seat: Seat[R]) -> None:
        posted = post_surely(self._loop, self._deliver_and_retire, seat)
        if not posted and seat.token is not None:
            return_token(self._limiter, seat.token)

    def _work_off(self, seat: Seat[R]) -> None:
        """Do what waits, in a worker, until :meth:`_linger`; ``seat.requests`` is delivered."""
        raise NotImplementedError

    def _has_work(self) -> bool:
        """Whether there is something to do for one thread more."""
        return bool(self._waiting)

    def _is_help_wanted(self) -> bool:
        """Whether there is something to do that no thread will come to by itself."""
        return not self._active and self._has_work()

    def _linger(self, seat: Seat[R]) -> bool:
        """
        Wait a moment for more, which saves a thread's end and another's start.

        :return: whether there is work; else the thread must end
        """
        with self._lock:
            more = not self._yielding and self._has_work()
            if not more:
                if self._yielding or self._closed or self._limiter.available_tokens < 1:
                    self._uncount(seat)
                    return False
                self._lingering.append(seat)
        # Afterwards, so that there is little left to do: the loop wakes, and wants the interpreter.
        if seat.requests:
            self._hand_back(seat)
        if more:
            return True
        if not seat.bell.acquire(timeout=LINGER_SECONDS):
            with self._lock:
                if seat in self._lingering:
                    self._lingering.remove(seat)
                    self._uncount(seat)
                    return False
            seat.bell.acquire()  # it is being rung
        return seat.counts  # called, or sent away

    def _hand_back(self, seat: Seat[R]) -> None:
        """Have all that the thread has in hand delivered."""
        done: list[R] = []
        done, seat.requests = seat.requests, done
        post_surely(self._loop, self._deliver, done)

    def _uncount(self, seat: Seat[R]) -> None:
        """The thread does no more, or nothing that may take long. Again, it does nothing."""
        if seat.counts:
            seat.counts = False
            self._active -= 1

    def _break_off(self, seat: Seat[R], error: BaseException) -> None:
        """
        The thread ends because of something that nobody has thought of, or for want of memory:
        who waits for it gets the error, and if that is nobody, who waits next. Then an error
        that comes again and again leaves nobody waiting. May be called again where it fails.
        """
        with self._lock:
            if seat in self._lingering:
                self._lingering.remove(seat)
            self._uncount(seat)
            if not seat.requests:
                self._pop(self._batch, seat.requests)
            self._spoil(seat, error)

    def _spoil(self, seat: Seat[R], error: BaseException) -> None:
        """A mistake of ours, or no memory: better an error than tasks that wait for ever."""
        seat.requests = [each for each in seat.requests if each._taken]  # else it was put back
        for request in seat.requests:
            if not request.done and request.error is None:
                request.error = own(error)

    def _deliver_and_retire(self, seat: Seat[R]) -> None:
        try:
            self._deliver(seat.requests)
        finally:
            token, seat.token = seat.token, None
            if token is not None:  # else it comes twice, or was sent away
                self._retire(token)

    def _pop(self, most: int, requests: list[R]) -> None:
        """Add the next requests that somebody wants; none while others wait for the limiter."""
        while self._waiting and len(requests) < most and not self._yielding:
            request = self._waiting[0]
            if not request._abandoned:
                if requests and not (self.takes_any or (request.together and requests[0].together)):
                    break
                requests.append(request)  # first of all: for want of memory it may fail
                request._taken = True
            else:
                self._dropped -= 1
            self._waiting.popleft()
            self._announced -= self._announced > 0

    @property
    def waiting(self) -> int:
        """About how many requests wait that no thread has taken."""
        return len(self._waiting)

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
