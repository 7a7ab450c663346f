"""Nothing grows: descriptors, maps, threads and locks after many rounds of everything."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import anyio
import pytest
from anyio import WouldBlock
from anyio.lowlevel import checkpoint

from aiommap import AsyncMmap, MmapView, RegionLock
from aiommap._workers import default_limiter

from .content import at_rest, file_of, inc, only_linux

pytestmark = [pytest.mark.anyio, only_linux]

ROUNDS = int(os.environ.get("AIOMMAP_LEAK_ROUNDS", "1000"))
WARM_UP = 50
N = 20_000


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def memory_areas(path: Path) -> tuple[int, int]:
    """Areas of the file, and all areas of this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(path) in line or "memfd:aiommap" in line for line in lines), len(lines)


async def use(view: MmapView) -> None:
    async with view:
        view[:3] = b"abc"
        await view.seek(1)
        await view.read(5)


async def one_round(path: Path, number: int) -> None:
    """Open, view, split, resize, cancel, close: each round a little differently."""
    async with AsyncMmap.open_path(path, "r+") as m:
        left, right = (await m.view_mut(0, 100)).split_at(40)
        async with anyio.create_task_group() as tg:
            tg.start_soon(use, left)
            tg.start_soon(use, right)
        async with m.view(0, 5_000), m.view(100, 5_000):
            # A waiter that is cancelled, at another moment in each round.
            async with anyio.create_task_group() as tg:
                tg.start_soon(m.write_at, 50, b"abc")
                tg.start_soon(m.resize, 5)
                tg.start_soon(m.read_at, 0, 10_000)
                for _ in range(number % 5):
                    await checkpoint()
                tg.cancel_scope.cancel()
        await m.resize(N + number % 3 * 5_000)
        await m.resize(N)
        async for _window in m.windows(8_000):
            break
        if number % 10 == 0:
            await m.find(b"nowhere")
            await m.set_protection("r")
            await m.flush()
        if number % 7 == 0:
            pending = await m.flush_async_range(0, 10)
            if number % 2:
                await pending
    with anyio.CancelScope() as scope:
        async with AsyncMmap.open_path(path) as m, m.view():
            scope.cancel()
            await checkpoint()
    # A cancelled opening, at another moment in each round.
    async with anyio.create_task_group() as tg:

        async def open_and_close() -> None:
            async with AsyncMmap.open_path(path, "c") as m:
                await m.write_at(0, b"x")

        tg.start_soon(open_and_close)
        for _ in range(number % 4):
            await checkpoint()
        tg.cancel_scope.cancel()
    consumed = await AsyncMmap.anonymous(N)
    async with consumed.into_view_sync() as view:
        clone = view.clone()
        clone[0] = 1
        await clone.aclose()


async def settled(path: Path) -> None:
    """What cancelled openings leave to a worker is gone, and workers without work are too."""
    with anyio.fail_after(30):
        while memory_areas(path)[0] or default_limiter().borrowed_tokens:
            await checkpoint()


async def test_flat(tmp_path: Path) -> None:
    """After 1 000 rounds there are as many descriptors, maps, threads and locks as after 50."""
    path = file_of(tmp_path, inc(N))
    for number in range(WARM_UP):
        await one_round(path, number)
    await settled(path)
    gc.collect()
    before = descriptors(), memory_areas(path)[0]
    areas = memory_areas(path)[1]
    threads = threading.active_count()
    for number in range(ROUNDS):
        await one_round(path, number)
    await settled(path)
    gc.collect()
    assert (descriptors(), memory_areas(path)[0]) == before
    # The allocator takes and merges areas of its own.
    assert memory_areas(path)[1] < areas + 50
    assert threading.active_count() <= threads + 2
    await at_rest(default_limiter())
    assert path.stat().st_size == N


async def test_locks_are_flat(tmp_path: Path) -> None:
    """After 1 000 rounds on one map and one lock nothing is held, waits, or is remembered."""
    lock = RegionLock()
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N)), "r+") as m:
        for number in range(ROUNDS):
            held = await m.view_mut(number % 100, 200)
            lease = await lock.exclusive(number % 10, 50)
            async with anyio.create_task_group() as tg:
                tg.start_soon(m.read_at, 150, 100)
                tg.start_soon(m.view(0, 300).__aenter__)
                tg.start_soon(lock.shared(0, 100).__aenter__)
                for _ in range(number % 4):
                    await checkpoint()
                if number % 3:
                    tg.cancel_scope.cancel()
                else:
                    tg.cancel_scope.cancel()
                    await held.aclose()
            if not held.closed:
                left, right = held.split_at(number % 200)
                left.restrict(0, len(left) // 2)
                right.downgrade()
                await left.aclose()
                await right.aclose()
            a, b = lease.split_at(number % 10 + 5)
            a.release()
            b.downgrade()
            b.release()
        gc.collect()
        await anyio.wait_all_tasks_blocked()
        statistics = m.statistics()
        assert (statistics.views, statistics.waiting) == (0, 0)
        queue = m._core.lock.queue
        assert (queue.held_shared, queue.held_exclusive, queue.waiting) == (0, 0, 0)
        mine = lock.statistics()
        assert (mine.held_shared, mine.held_exclusive, mine.waiting) == (0, 0, 0)
        async with m.view_mut_nowait(), lock.exclusive_nowait(-(2**70), 2**70):
            with pytest.raises(WouldBlock):
                await in_another_task(m)
    graph = lock._claims.queue.graph
    assert graph is m._core.lock.queue.graph
    assert (graph._waiting, graph._contended) == ({}, {})


async def in_another_task(m: AsyncMmap) -> None:
    failure: list[BaseException] = []

    async def ask() -> None:
        try:
            m.view_nowait()
        except WouldBlock as exc:
            failure.append(exc)

    async with anyio.create_task_group() as tg:
        tg.start_soon(ask)
    raise failure[0]
