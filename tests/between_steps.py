"""Calls between two steps of the event loop, where the garbage collector may come as well."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import anyio.lowlevel


async def between_steps(call: Callable[[], object]) -> None:
    """
    Have it called in the loop's thread but in no task, and return afterwards.

    Where the loop lets us: on its way into the selector, when it has made out how long it sleeps.
    """
    called = False

    def once() -> None:
        nonlocal called
        if not called:
            called = True
            call()

    if "trio" in sys.modules and sys.modules["trio"].lowlevel.in_trio_task():
        import trio

        class BeforeSleep(trio.abc.Instrument):
            def before_io_wait(self, timeout: float) -> None:
                once()

        instrument = BeforeSleep()
        trio.lowlevel.add_instrument(instrument)
        while not called:
            await trio.lowlevel.checkpoint()
        trio.lowlevel.remove_instrument(instrument)
        return
    loop: Any = asyncio.get_running_loop()
    selector = getattr(loop, "_selector", None)
    if selector is None:  # uvloop
        loop.call_soon(once)
        while not called:
            await anyio.lowlevel.checkpoint()
        return
    select = selector.select

    def call_and_select(timeout: float | None = None) -> Any:
        once()
        return select(timeout)

    selector.select = call_and_select
    while not called:
        await anyio.lowlevel.checkpoint()
    del selector.select
