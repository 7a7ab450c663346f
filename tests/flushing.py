"""Maps over a kernel of the test's, and calls in tasks of their own: for the tests of flushes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from anyio import CapacityLimiter, to_thread
from anyio.abc import TaskGroup

from aiommap import AsyncMmap
from aiommap._kernel import Kernel

from .fake_kernel import Hold

SYNCS = ("sync_data", "sync_range")
"""The calls that make bytes of a file durable."""


def mapped_by(kernel: Kernel) -> type[AsyncMmap]:
    """The map class over a kernel of the test's."""

    class Faked(AsyncMmap):
        __slots__ = ()
        _kernel = kernel

    return Faked


@asynccontextmanager
async def opened(
    kernel: Kernel, path: Path, limiter: CapacityLimiter | None = None
) -> AsyncIterator[AsyncMmap]:
    """A writable map of a kernel of the test's; leaving it does not flush."""
    m = await mapped_by(kernel).open_path(path, "r+", limiter=limiter)
    try:
        yield m
    finally:
        await m.aclose(flush=False)


async def entered(hold: Hold) -> None:
    """Wait until a call is held."""
    await to_thread.run_sync(hold.wait_entered)


class Outcome:
    """
    What became of a call in a task of its own.

    :ivar error: the OSError that it raised
    :ivar scope: around the call
    """

    def __init__(self) -> None:
        self.error: OSError | None = None
        self.done = anyio.Event()
        self.scope = anyio.CancelScope()

    async def run(self, call: Callable[[], Awaitable[object]]) -> None:
        with self.scope:
            try:
                await call()
            except OSError as exc:
                self.error = exc
        self.done.set()

    async def get(self) -> OSError | None:
        await self.done.wait()
        return self.error


def begin(tasks: TaskGroup, call: Callable[[], Awaitable[object]]) -> Outcome:
    """Start a call in a task of its own."""
    outcome = Outcome()
    tasks.start_soon(outcome.run, call)
    return outcome
