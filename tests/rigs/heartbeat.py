"""How long an event loop was away: the longest gap between the beats of a task."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator

import anyio


class Heartbeat:
    """The beats so far; :attr:`longest_gap` is the figure."""

    def __init__(self) -> None:
        self.beats = 0
        self.longest_gap = 0.0
        """Seconds from one beat to the next. On an idle loop that is the interval plus what its
        timers and the scheduler add (1.4 to 4.8 ms within a second on two cores), so compare it
        with a control, or with a bound far above."""
        self._last = time.perf_counter()

    def beat(self) -> None:
        now = time.perf_counter()
        self.longest_gap = max(self.longest_gap, now - self._last)
        self._last = now
        self.beats += 1

    def reset(self) -> None:
        """Forget the gaps so far: a warm-up should not count."""
        self.longest_gap = 0.0
        self.beats = 0
        self._last = time.perf_counter()


async def _run(heart: Heartbeat, interval: float) -> None:
    while True:
        # The one sleep that is allowed in a test: it is the beat, nothing waits for it.
        await anyio.sleep(interval)
        heart.beat()


@contextlib.asynccontextmanager
async def heartbeat(interval: float = 0.001) -> AsyncIterator[Heartbeat]:
    """Measure how long the loop was away while the block ran.

    ::

        async with heartbeat() as heart:
            await work()
        assert heart.longest_gap < 0.01

    :param interval: seconds between beats
    """
    async with anyio.create_task_group() as tasks:
        heart = Heartbeat()
        tasks.start_soon(_run, heart, interval)
        try:
            yield heart
        finally:
            heart.beat()  # a loop that was away until the very end
            tasks.cancel_scope.cancel()
