"""Ways to cancel a task at a chosen await, on every event loop.

:class:`Suspensions` counts how often a coroutine gives control to the event loop; :func:`ways` are
the ways in which a program cancels a task there. With both, :func:`sweep` goes over all the awaits
of a call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import anyio
import pytest
from anyio.lowlevel import checkpoint

from .conftest import BACKENDS

T = TypeVar("T")

on_asyncio = pytest.mark.parametrize(
    "anyio_backend",
    [backend for backend in BACKENDS.values() if backend[0] == "asyncio"],
    ids=[name for name, backend in BACKENDS.items() if backend[0] == "asyncio"],
)
"""For tests of native asyncio cancellation."""

on_trio = pytest.mark.parametrize("anyio_backend", [BACKENDS["trio"]], ids=["trio"])


async def let_others_run(rounds: int = 5) -> None:
    """Give every task that can run its turn, several times."""
    for _ in range(rounds):
        await checkpoint()


@dataclass
class Suspensions:
    """
    Runs a coroutine as a part of the current task and counts how often it suspends it.

    :ivar at: the suspension at which to call ``then``, counted from 0; None for never
    """

    at: int | None = None
    then: Callable[[], object] = field(default=lambda: None)
    count: int = 0

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await _Driven(self, coroutine)


@dataclass
class _Driven(Awaitable[T]):
    suspensions: Suspensions
    coroutine: Coroutine[Any, Any, T]

    def __await__(self) -> Generator[Any, Any, T]:
        counter = self.suspensions
        coroutine = self.coroutine
        value: Any = None
        error: BaseException | None = None
        try:
            while True:
                try:
                    what = coroutine.send(value) if error is None else coroutine.throw(error)
                except StopIteration as stop:
                    return stop.value  # type: ignore[no-any-return]
                if counter.count == counter.at:
                    counter.then()
                counter.count += 1
                value, error = None, None
                try:
                    value = yield what
                except BaseException as exc:
                    error = exc
        finally:
            coroutine.close()
            error = None  # or it would refer to this frame, and the frame to it


Call = Callable[[], Awaitable[object]]


async def _by_scope(call: Call, at: int) -> tuple[int, bool]:
    suspensions = Suspensions(at)
    with anyio.CancelScope() as scope:
        suspensions.then = scope.cancel
        await suspensions.run(_awaiting(call))
    return suspensions.count, scope.cancelled_caught


async def _by_task_group(call: Call, at: int) -> tuple[int, bool]:
    """The call runs in a child task, and the group is cancelled."""
    suspensions = Suspensions(at)
    cancelled = True

    async def child() -> None:
        nonlocal cancelled
        await suspensions.run(_awaiting(call))
        cancelled = False

    async with anyio.create_task_group() as tasks:
        suspensions.then = tasks.cancel_scope.cancel
        tasks.start_soon(child)
    return suspensions.count, cancelled


async def _by_task_cancel(call: Call, at: int, times: int = 1) -> tuple[int, bool]:
    """``task.cancel()``, natively; then again at the next suspensions."""
    suspensions = Suspensions(at)
    task: asyncio.Task[object] | None = None
    left = times

    def cancel() -> None:
        nonlocal left
        assert task is not None
        task.cancel()
        left -= 1
        if left and suspensions.at is not None:
            suspensions.at += 1

    suspensions.then = cancel
    started = asyncio.Event()

    async def body() -> object:
        started.set()
        # So that even an eager task is known to cancel() before the first suspension of the call.
        await asyncio.sleep(0)
        return await suspensions.run(_awaiting(call))

    task = asyncio.get_running_loop().create_task(body())
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()
    return suspensions.count, task.cancelled()


async def _by_task_cancel_thrice(call: Call, at: int) -> tuple[int, bool]:
    return await _by_task_cancel(call, at, 3)


async def _by_timeout(call: Call, at: int) -> tuple[int, bool]:
    """``asyncio.timeout``, which runs out at that suspension."""
    suspensions = Suspensions(at)
    try:
        async with asyncio.timeout(None) as timeout:
            now = asyncio.get_running_loop().time()
            suspensions.then = lambda: timeout.reschedule(now - 1)
            await suspensions.run(_awaiting(call))
    except TimeoutError:
        return suspensions.count, True
    return suspensions.count, False


async def _awaiting(call: Call) -> object:
    return await call()


Way = Callable[[Call, int], Awaitable[tuple[int, bool]]]

EVERYWHERE: dict[str, Way] = {"scope": _by_scope, "task group": _by_task_group}
NATIVE: dict[str, Way] = {
    "task.cancel": _by_task_cancel,
    "task.cancel thrice": _by_task_cancel_thrice,
    "asyncio.timeout": _by_timeout,
}


def ways(backend_name: str) -> dict[str, Way]:
    """How a task can be cancelled on this event loop."""
    return EVERYWHERE if backend_name == "trio" else {**EVERYWHERE, **NATIVE}


MOST_SUSPENSIONS = 200
"""A call that is still suspended after so many goes on for ever."""


async def sweep(
    backend_name: str,
    before: Callable[[], Awaitable[T]],
    call: Callable[[T], Awaitable[object]],
    after: Callable[[T, str, bool], Awaitable[object]],
) -> int:
    """
    Cancel a call at its first suspension, at its second one..., in every way; then look.

    :param before: prepares each attempt
    :param call: what is cancelled
    :param after: looks at the state; gets a description, and whether the call was cancelled
    :return: the most suspensions it was cancelled at
    """
    most = 0
    for name, way in ways(backend_name).items():
        at = 0
        while True:
            state = await before()
            count, cancelled = await way(partial(call, state), at)
            await after(state, f"{name} at suspension {at}", cancelled)
            if count <= at:  # it ended before
                break
            at += 1
            assert at < MOST_SUSPENSIONS
        most = max(most, at)
    return most
