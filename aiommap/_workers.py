"""The only hop between the event loop and threads.

Why not ``anyio.to_thread``: native asyncio cancellation gets through its shield, gives the
limiter's token back while the thread still runs, and drops work that no thread has taken yet
(a close among it, whose descriptor would leak). What touches raw addresses needs more, and some
work needs less than one thread hop per request:

* :func:`run` is one call in a thread. However the caller is cancelled, it returns or raises
  only when the thread has finished, and what the call made is given to ``discard``.
* :func:`start` is one call that nobody waits for and nobody can cancel.
* Requests that many tasks make together are :mod:`aiommap._crew`'s.

Threads are kept for a moment when idle, as trio's thread cache does, and belong to no loop.
They are daemons: the interpreter's exit does not wait for a disk that does not answer.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from copy import copy
from typing import Any, Generic, ParamSpec, TypeVar, TypeVarTuple

import anyio
from anyio import BusyResourceError, CapacityLimiter, ClosedResourceError
from anyio.lowlevel import RunVar, checkpoint_if_cancelled

from ._errors import DeadlockError
from ._event_loop import EventLoop, Parking, an_event_loop_runs_here, current_event_loop

P = ParamSpec("P")
T = TypeVar("T")
Args = TypeVarTuple("Args")

DEFAULT_THREADS = 40
"""Of one event loop, for all its maps: as many as anyio's own limiter has."""

IDLE_SECONDS = 2.0
"""How long a thread without work stays. Out of the air: a new one costs 0.1 ms."""

TRIES = 1000
"""How often a thread tries to tell the event loop of its end. Others free memory meanwhile."""

_default_limiter: RunVar[CapacityLimiter] = RunVar("aiommap_limiter")


def default_limiter() -> CapacityLimiter:
    """The limiter of the running event loop for calls that were given none."""
    try:
        return _default_limiter.get()
    except LookupError:
        limiter = CapacityLimiter(DEFAULT_THREADS)
        _default_limiter.set(limiter)
        return limiter


class _Thread:
    """A thread that does one piece of work after another, and ends when it gets none."""

    def __init__(self) -> None:
        self._work: Callable[[], object] | None = None
        self._ready = threading.Lock()
        self._ready.acquire()

    def give(self, work: Callable[[], object]) -> None:
        self._work = work
        self._ready.release()

    def start(self) -> None:
        threading.Thread(target=self._main, name="aiommap worker", daemon=True).start()

    def _main(self) -> None:
        while True:
            if not self._ready.acquire(timeout=IDLE_SECONDS):
                with suppress(ValueError):
                    _idle.remove(self)
                    return
                # Not idle any more: work is on its way, wait for it.
                self._ready.acquire()
            work, self._work = self._work, None
            assert work is not None
            last = work()
            # What the work refers to (a map, a descriptor) goes now, not with the next piece.
            del work
            _idle.append(self)
            if isinstance(last, LastCall):
                last.call()
                del last


class LastCall:
    """
    What work may return, to be called when its thread is free again.

    For the call that wakes the event loop: the loop's next work then finds this thread, still
    awake, and not one that has to be woken.
    """

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call


# deque's append, pop and remove are atomic, and that is all the locking there is.
_idle: deque[_Thread] = deque()


def start(work: Callable[[], object]) -> None:
    """
    Run ``work`` in a thread soon; nobody can cancel it. It must not raise.

    :raises RuntimeError: when the system gives no more threads
    """
    try:
        thread = _idle.pop()
    except IndexError:
        thread = _Thread()
        thread.start()
    thread.give(work)


def off_the_loop(work: Callable[[], object]) -> None:
    """Run it in another thread if an event loop runs in this one, else here and now."""
    if an_event_loop_runs_here():
        with suppress(RuntimeError):  # no more threads: better on the loop than never
            start(work)
            return
    work()


# A forked child has none of the parent's threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)


class Work:
    """What a thread does, and the one task that may wait for it."""

    __slots__ = ("done", "error", "parking")

    def __init__(self) -> None:
        self.done: bool = False
        self.error: BaseException | None = None
        self.parking: Parking | None = None

    def deliver(self) -> None:
        """Tell the task; on the loop."""
        self.done = True
        if self.parking is not None:
            self.parking.wake()

    async def drain(self, loop: EventLoop) -> BaseException | None:
        """
        Wait until it is done, whatever happens to the task meanwhile; gives what happened.

        Who drains because of an exception raises the one given here instead, if there is one:
        it came through a shield, so no scope of anyio will deliver it a second time. It is
        raised outside the handler of the first one: anyio takes a CancelledError that has one
        of a scope for its context for the scope's own, and would swallow it.
        """
        interrupt: BaseException | None = None
        shield = anyio.CancelScope(shield=True)
        shield.__enter__()
        try:
            while not self.done:
                self.parking = loop.parking()
                try:
                    await self.parking.park()
                except GeneratorExit:
                    raise
                except BaseException as exc:
                    # Native cancellation ignores the shield, and may come more than once;
                    # KeyboardInterrupt comes on trio.
                    interrupt = exc
        except GeneratorExit:
            # The coroutine of a forgotten task is being closed, after its event loop maybe:
            # it cannot wait, and the scope cannot be left outside its task.
            raise
        except BaseException:
            shield.__exit__(None, None, None)
            raise
        shield.__exit__(None, None, None)
        return None if interrupt is None else without_frames(interrupt)

    def take_error(self) -> BaseException | None:
        """The error, and forget it: a cycle through its traceback would keep buffers alive."""
        error, self.error = self.error, None
        return error


class _Job(Work, Generic[T]):
    """One call in a thread. Its token, if it has one, goes back when the thread is done."""

    __slots__ = ("_call", "_loop", "limiter", "result")

    def __init__(self, loop: EventLoop, call: Callable[[], T]) -> None:
        super().__init__()
        self._loop = loop
        self._call: Callable[[], T] | None = call
        self.limiter: CapacityLimiter | None = None
        self.result: T | None = None

    def deliver(self) -> None:
        limiter, self.limiter = self.limiter, None
        if limiter is not None:
            limiter.release_on_behalf_of(self)
        super().deliver()

    def __call__(self) -> None:
        call, self._call = self._call, None
        assert call is not None
        try:
            self.result = call()
        except BaseException as exc:
            self.error = without_frames(exc)
        del call
        if not post_surely(self._loop, self.deliver) and self.limiter is not None:
            return_token(self.limiter, self)


def without_frames(error: BaseException) -> BaseException:
    """
    The same exception without the way it took so far, if it is one that users will see.

    The frames of its traceback refer to mappings and buffers. Who keeps the exception (a test,
    a log, a task that was cancelled) would keep a closed map's descriptor open. Errors that
    only a mistake of ours raises keep it.
    """
    if isinstance(error, _EXPECTED) or not isinstance(error, Exception):
        error.__traceback__ = None
        context, error.__context__ = error.__context__, None
        for earlier in (context, error.__cause__):
            if earlier is not None and earlier is not error:
                without_frames(earlier)
    return error


def own(error: BaseException) -> BaseException:
    """A copy for one of several tasks: what is raised gets a traceback, and a context."""
    try:
        return without_frames(copy(error))
    except Exception:  # it cannot be made of its arguments, or there is no memory
        return error


_EXPECTED = (
    OSError,
    ValueError,
    MemoryError,
    BufferError,
    DeadlockError,
    ClosedResourceError,
    BusyResourceError,
)


def forgetful(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """A coroutine function whose errors and cancellations are raised :func:`without_frames`."""

    @functools.wraps(method)
    async def forgetting(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(*args, **kwargs)
        except BaseException as exc:
            del args, kwargs  # this frame is in the traceback too
            without_frames(exc)
            raise

    return forgetting


async def acquire_token(loop: EventLoop, limiter: CapacityLimiter, borrower: object) -> None:
    """
    Get a token, under native cancellation too. A checkpoint only where there is none.

    anyio before 4.16 loses a token that is there at once when the checkpoint after it is cancelled
    natively; and on 4.9 a waiter that is cancelled in the very tick in which it was woken takes
    the wake-up with it, and who waits behind it waits on.
    """
    try:
        limiter.acquire_on_behalf_of_nowait(borrower)
        return
    except (anyio.WouldBlock, loop.would_block):
        pass
    try:
        await limiter.acquire_on_behalf_of(borrower)
    except GeneratorExit:
        raise
    except BaseException:
        now = limiter.statistics()
        if now.tasks_waiting and now.borrowed_tokens < now.total_tokens:
            limiter.total_tokens += 1  # which wakes one
            limiter.total_tokens -= 1
        raise


def post_surely(loop: EventLoop, callback: Callable[[*Args], object], *args: *Args) -> bool:
    """
    As ``loop.post()``, also where there is hardly any memory left; ``callback`` may come twice.
    """
    for _ in range(TRIES):
        with suppress(MemoryError):
            return loop.post(callback, *args)
    return False


def return_token(limiter: CapacityLimiter, borrower: object) -> None:
    """
    Give a token back in a thread, because the event loop is over that would do it.

    The limiter is nobody's now, or it is used again by the next event loop.
    """
    with suppress(RuntimeError):  # trio's, where a task of the next loop waits for a token
        limiter.release_on_behalf_of(borrower)


@forgetful
async def run(
    call: Callable[[], T],
    *,
    limiter: CapacityLimiter | None = None,
    discard: Callable[[T], object] | None = None,
) -> T:
    """
    Run ``call`` in a worker thread. Always a checkpoint.

    When the caller is cancelled, in whatever way, the cancellation is raised only after the
    thread has finished; a result that nobody will see is given to ``discard``, in a thread.

    :param limiter: how many threads may be at work at once; None is this loop's default
    :raises BaseException: whatever ``call`` raises
    """
    loop = current_event_loop()
    limiter = limiter or default_limiter()
    job = _Job(loop, call)
    await checkpoint_if_cancelled()
    await acquire_token(loop, limiter, job)
    job.limiter = limiter
    parking = job.parking = loop.parking()
    try:
        start(job)
    except BaseException:
        limiter.release_on_behalf_of(job)
        raise
    interrupt: BaseException | None = None
    try:
        await parking.park()
    except GeneratorExit:
        raise  # forgotten: there is nobody who could wait
    except BaseException:
        interrupt = await job.drain(loop)
        if job.error is None and discard is not None:
            made = [job.result]
            job.result = None
            interrupt = await _finish(loop, lambda: discard(made.pop())) or interrupt  # type: ignore[arg-type]
        if interrupt is None:
            raise
    if interrupt is not None:
        try:
            raise interrupt
        finally:
            del interrupt
    error = job.take_error()
    if error is not None:
        try:
            raise error
        finally:
            del error  # or the error would refer to this frame, and the frame to it
    # The thread may refer to the job a moment longer, and must not to what it made.
    result, job.result = job.result, None
    return result  # type: ignore[return-value]


async def finish(call: Callable[[], object]) -> None:
    """
    Run ``call`` in a worker thread and wait for it; for what must happen.

    It starts before the first await, takes no token of a limiter, and nobody can cancel it: a
    cancellation of the caller is raised when it has finished. ``call`` must not raise.
    """
    interrupt = await _finish(current_event_loop(), call)
    if interrupt is not None:
        try:
            raise interrupt
        finally:
            del interrupt


async def _finish(loop: EventLoop, call: Callable[[], object]) -> BaseException | None:
    job = _Job(loop, call)
    del call
    try:
        start(job)
    except RuntimeError:  # no more threads: better late on the loop than never
        job()
    return await job.drain(loop)
