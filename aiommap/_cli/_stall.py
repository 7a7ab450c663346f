"""``stall``: the same reads in three ways, and for how long the event loop stood still."""

from __future__ import annotations

import argparse
import mmap
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
from anyio.abc import TaskStatus

from aiommap import AsyncMmap

from ._pages import send_out
from ._progress import Complain, Progress

Read = Callable[[int, int], Awaitable[bytes]]
BEAT = 0.001  # seconds; what a loop with nothing else to do keeps within a few tenths


@asynccontextmanager
async def plain(path: str) -> AsyncIterator[Read]:
    """A plain map, on the event loop."""
    with (
        await anyio.to_thread.run_sync(open, path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m,
    ):

        async def read(offset: int, size: int) -> bytes:
            await anyio.lowlevel.checkpoint()
            return m[offset : offset + size]

        yield read


@asynccontextmanager
async def threads(path: str) -> AsyncIterator[Read]:
    """A plain map, in worker threads."""
    with (
        await anyio.to_thread.run_sync(open, path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m,
    ):

        async def read(offset: int, size: int) -> bytes:
            return await anyio.to_thread.run_sync(m.__getitem__, slice(offset, offset + size))

        yield read


@asynccontextmanager
async def ours(path: str) -> AsyncIterator[Read]:
    """aiommap."""
    async with AsyncMmap.open_path(path) as m:
        yield m.read_at


WAYS = {"plain map on the loop": plain, "plain map in threads": threads, "aiommap": ours}


async def stall(
    options: argparse.Namespace, progress: Progress | None, complain: Complain
) -> dict[str, Any]:
    """Measure the three."""
    if options.svg is not None:
        await anyio.to_thread.run_sync(check_writable, options.svg)
    size = await send_out(options.file)
    if size == 0:
        raise ValueError(f"{options.file!r} is empty: nothing to measure")
    length = min(options.size, size)
    places = range(0, size - length + 1, length)
    reads = min(options.reads, len(places))
    chosen = random.Random(0).sample(places, reads)
    found = {}
    for name, way in WAYS.items():
        await send_out(options.file)
        if progress is not None:
            progress.begin(name, reads)
        async with way(options.file) as read:
            found[name] = await measure(read, chosen, length, options.tasks, progress)
    return {"path": options.file, "reads": reads, "bytes": length, "ways": found}


def check_writable(path: str) -> None:
    """:raises OSError: nothing can be saved there; said now, and not after the measurement"""
    is_new = not os.path.lexists(path)
    with open(path, "ab"):
        pass
    if is_new:
        os.unlink(path)


async def measure(
    read: Read, places: list[int], length: int, tasks: int, progress: Progress | None
) -> dict[str, Any]:
    """How long the reads took, and the beats of a task beside them."""
    gaps: list[float] = []

    async def heartbeat(*, task_status: TaskStatus[None]) -> None:
        last = time.perf_counter()
        task_status.started()
        while True:
            try:
                await anyio.sleep(BEAT)
            finally:
                now = time.perf_counter()
                gaps.append(now - last)
                last = now

    wanted = iter(places)

    async def reader() -> None:
        for offset in wanted:  # one iterator for all
            await read(offset, length)
            if progress is not None:
                progress.advance(1)

    async with anyio.create_task_group() as beating:
        await beating.start(heartbeat)
        started = time.perf_counter()
        async with anyio.create_task_group() as readers:
            for _ in range(tasks):
                readers.start_soon(reader)
        seconds = time.perf_counter() - started
        beating.cancel_scope.cancel()
    return {"seconds": seconds, "longest_gap": max(gaps), "gaps": gaps}
