"""The event loop under us: who runs, how a task parks, how a thread posts back.

anyio carries everything that can wait until a scope is cancelled. Three things it does not
offer, or not at the price of a memory access, and they live here and nowhere else:

* the identity of the running task (a view belongs to one task, a lease has an owner);
* parking a task and waking exactly that one, without an event object per waiter;
* a call posted to the loop from a thread that does not wait for it. ``anyio.from_thread``
  waits for the answer, so a worker would stand still until the loop has time, and it is
  tied to anyio's own threads, which drop work whose caller was cancelled.

A :class:`Parking` is one wait of one task. :meth:`~Parking.park` may be cancelled in any way
the loop knows: an anyio scope, trio's own, native ``task.cancel()``. A wake-up that meets a
cancellation in the same tick can still end in the exception (asyncio) or in the wake-up
(trio), so the caller looks at what it waited for, not at how the wait ended.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import types
import weakref
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVarTuple

import anyio

if TYPE_CHECKING:
    import trio

Args = TypeVarTuple("Args")


class Parking(Protocol):
    """One wait of the task that created it."""

    def wake(self) -> None:
        """End the wait; again, or after the task left, it does nothing. Loop thread only."""

    async def park(self) -> None:
        """Wait for :meth:`wake`. Cancellable; returns at once if already woken."""


class EventLoop(Protocol):
    """What the other modules know of the running event loop."""

    name: str

    itself: Any
    """The loop, or trio's token for it: one for each loop, to be told apart by."""

    would_block: type[Exception]
    """What a limiter without tokens raises: not anyio's own on trio (anyio 4.16)."""

    def is_running_here(self) -> bool:
        """Whether the caller runs inside this loop, in its thread."""

    def current_task(self) -> object:
        """The running task; None in a callback. :raises RuntimeError: where no loop runs"""

    def task_here(self) -> object:
        """As :meth:`current_task`, where :meth:`is_running_here` is known to be true. Cheap."""

    def asking_task(self) -> object:
        """
        Who makes an awaitable, where a task may be put around it; else None. Cheap.

        :raises RuntimeError: where no loop runs
        """

    def is_around(self, task: Any, awaitable: object) -> bool:
        """
        Whether a task was put around an awaitable and does nothing but await it: what it gets
        is for who asked.
        """

    def has_ended(self, task: Any) -> bool:
        """Whether a task of this loop has finished."""

    def parking(self) -> Parking:
        """A new wait for the current task."""

    def post(self, callback: Callable[[*Args], object], *args: *Args) -> bool:
        """Have the loop call ``callback`` soon, from any thread; False if the loop is over."""

    def checkpoint(self) -> Awaitable[None]:
        """Let others run, and be cancelled."""


class _AsyncioParking:
    __slots__ = ("_future", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._future: asyncio.Future[None] = loop.create_future()

    def wake(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    async def park(self) -> None:
        if self._future.cancelled():
            # An earlier park() of this wait was cancelled; the draining caller parks again.
            self._future = self._loop.create_future()
        await self._future


@types.coroutine
def _bare_yield() -> Generator[None, None, None]:
    """What ``asyncio.sleep(0)`` comes down to."""
    yield


_running_loop = asyncio._get_running_loop  # looked up once: it is on the path of every access


class AsyncioLoop:
    """asyncio, with any loop (uvloop) and any task factory (eager tasks)."""

    __slots__ = ("asking_task", "checkpoint", "current_task", "itself", "task_here")
    name = "asyncio"
    would_block: type[Exception] = anyio.WouldBlock

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.itself: asyncio.AbstractEventLoop = loop
        # Bound once: they are on the path of every access.
        self.checkpoint = _bare_yield
        self.current_task = self.asking_task = asyncio.current_task
        # Looking for the running loop asks the kernel for the process's id before Python 3.12.
        self.task_here = partial(asyncio.current_task, loop)

    def is_running_here(self) -> bool:
        return _running_loop() is self.itself

    def is_around(self, task: Any, awaitable: object) -> bool:
        # What ensure_future() makes, and with it gather(), and wait_for() before Python 3.12: a
        # coroutine with the awaitable for its one argument.
        coroutine = None if task is None else task.get_coro()
        if getattr(coroutine, "__name__", "") != "_wrap_awaitable":
            return False
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        return frame is not None and any(each is awaitable for each in frame.f_locals.values())

    def has_ended(self, task: Any) -> bool:
        ended: bool = task.done()
        return ended

    def parking(self) -> Parking:
        return _AsyncioParking(self.itself)

    def post(self, callback: Callable[[*Args], object], *args: *Args) -> bool:
        try:
            self.itself.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the loop is closed
            return False
        return True


class _TrioParking:
    __slots__ = ("_parked", "_task", "_woken")

    def __init__(self, task: trio.lowlevel.Task) -> None:
        self._task = task
        self._parked = False
        self._woken = False

    def wake(self) -> None:
        if self._woken:
            return
        self._woken = True
        if self._parked:
            self._parked = False
            _trio().lowlevel.reschedule(self._task)

    async def park(self) -> None:
        if self._woken:
            return
        self._parked = True
        await _trio().lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, _: Any) -> trio.lowlevel.Abort:
        self._parked = False
        succeeded: trio.lowlevel.Abort = _trio().lowlevel.Abort.SUCCEEDED
        return succeeded


class TrioLoop:
    """trio, also in guest mode."""

    __slots__ = (
        "__weakref__",
        "_current_token",
        "_run_finished",
        "checkpoint",
        "current_task",
        "itself",
        "task_here",
        "would_block",
    )
    name = "trio"

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        self.itself: trio.lowlevel.TrioToken = token
        self.would_block: type[Exception] = _trio().WouldBlock
        # Not looked up when needed: that may be at the end of the interpreter.
        self._run_finished: type[Exception] = _trio().RunFinishedError
        # Bound once: they are on the path of every access.
        self.checkpoint = _trio().lowlevel.checkpoint
        self.current_task = self.task_here = _trio().lowlevel.current_task
        self._current_token: Callable[[], object] = _trio().lowlevel.current_trio_token
        _trio_loops.add(self)

    def is_running_here(self) -> bool:
        try:
            return self._current_token() is self.itself
        except RuntimeError:  # no trio in this thread
            return False

    @staticmethod
    def asking_task() -> object:
        return None

    def is_around(self, task: Any, awaitable: object) -> bool:
        return False

    def has_ended(self, task: Any) -> bool:
        return inspect.getcoroutinestate(task.coro) == inspect.CORO_CLOSED

    def parking(self) -> Parking:
        return _TrioParking(self.current_task())

    def end_in_child(self) -> None:
        """This process was forked: trio believes to run here still, and asyncio knows better."""
        self.current_task = self.task_here = self._current_token = _no_task

    def post(self, callback: Callable[[*Args], object], *args: *Args) -> bool:
        try:
            self.itself.run_sync_soon(callback, *args)
        except (self._run_finished, OSError):  # the latter where a guest run was abandoned
            return False
        return True


_trio_loops: weakref.WeakSet[TrioLoop] = weakref.WeakSet()


def _no_task() -> object:
    raise RuntimeError("in a forked process: its parent's event loop does not run here")


def _end_in_child() -> None:
    for loop in _trio_loops:
        loop.end_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_end_in_child)


def _trio() -> Any:
    # Never imported by us: where trio runs, somebody has.
    return sys.modules["trio"]


def in_trio_task() -> bool:
    """Whether the caller is a trio task (asked first: in guest mode both loops run here)."""
    trio = sys.modules.get("trio")
    return trio is not None and trio.lowlevel.in_trio_task()


def an_event_loop_runs_here() -> bool:
    """Whether what is done in this thread now holds up an event loop, or is a task of one."""
    trio = sys.modules.get("trio")
    return asyncio._get_running_loop() is not None or (
        trio is not None and trio.lowlevel.in_trio_run()
    )


def current_event_loop() -> EventLoop:
    """
    The event loop the caller runs in.

    :raises RuntimeError: when no task of asyncio or trio is running in this thread
    """
    if in_trio_task():
        return TrioLoop(_trio().lowlevel.current_trio_token())
    loop = asyncio._get_running_loop()
    if loop is None:
        raise RuntimeError("no event loop runs in this thread: call this from asyncio or trio")
    return AsyncioLoop(loop)
