"""What the region lock costs, beside anyio.Lock and a plain range lock, in one run.

Run it with ``python -m tests.benchmarks.bench_region_lock [--rounds N] [--loops asyncio,...]``.
All contenders take turns in each round, and the best round of each counts: the machine's other
work hits all of them alike. Full collections are kept out of the timed parts; with 10 000 tasks
one takes about 10 ms, for every lock.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import anyio
from anyio.lowlevel import checkpoint

from aiommap import RegionLease, RegionLock
from aiommap._claim_lock import ClaimLock

LOOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}
HELD = (0, 1_000, 10_000, 100_000)
WAITERS = (100, 10_000)
PAGE = 4096
Enter = Callable[[int], AbstractAsyncContextManager[object]]
"""How a contender takes the region of the given number."""


class LinearScanLock:
    """The plain range lock: a list of what is held, looked through on each request."""

    def __init__(self) -> None:
        self.held: list[tuple[int, int]] = []
        self.changed = anyio.Event()

    @asynccontextmanager
    async def exclusive(self, start: int, stop: int) -> AsyncIterator[None]:
        while any(low < stop and start < high for low, high in self.held):
            await self.changed.wait()
        self.held.append((start, stop))
        try:
            await checkpoint()
            yield
        finally:
            self.held.remove((start, stop))
            self.changed.set()
            self.changed = anyio.Event()


async def take_turns(enter: Enter, count: int) -> None:
    for number in range(count):
        async with enter(number * 7919 % 100_000):
            pass


async def just_yield(count: int) -> None:
    for _ in range(count):
        await checkpoint()


async def just_look(lock: ClaimLock, count: int) -> None:
    for _ in range(count):
        lock.check_free(0, PAGE, True)


def gap(ask: Callable[[int, int], Any]) -> Enter:
    """Pages between the held ones."""
    return lambda number: ask((2 * number + 1) * PAGE, (2 * number + 2) * PAGE)


def wide(ask: Callable[[int, int], Any]) -> Enter:
    """A TiB where nothing is held, next to all the held pages."""
    return lambda number: ask(2**40 + number, 2**41)


def hold_pages(lock: RegionLock, count: int) -> list[RegionLease]:
    return [lock.exclusive_nowait(2 * n * PAGE, (2 * n + 1) * PAGE) for n in range(count)]


async def time_uncontended(rounds: int) -> dict[str, float]:
    """Microseconds for one pass through ``async with``, by contender."""
    fast_lock, slow_lock = anyio.Lock(fast_acquire=True), anyio.Lock()
    contenders: dict[str, Callable[[int], Awaitable[None]]] = {
        "checkpoint": just_yield,
        "anyio.Lock": partial(take_turns, lambda _: slow_lock),
        "anyio.Lock, fast": partial(take_turns, lambda _: fast_lock),
        "check_free, idle": partial(just_look, ClaimLock()),
    }
    leases: list[RegionLease] = []
    for held in HELD:
        if held <= 10_000:
            linear = LinearScanLock()
            linear.held = [(2 * n * PAGE, (2 * n + 1) * PAGE) for n in range(held)]
            contenders[f"linear scan, {held} held"] = partial(take_turns, gap(linear.exclusive))
        lock = RegionLock()
        fast = RegionLock(fast_acquire=True)
        leases += hold_pages(lock, held) + hold_pages(fast, held)
        asks = {
            "exclusive": gap(lock.exclusive),
            "shared": gap(lock.shared),
            "wide": wide(lock.exclusive),
            "exclusive, fast": gap(fast.exclusive),
            "shared, fast": gap(fast.shared),
        }
        for name, enter in asks.items():
            contenders[f"{name}, {held} held"] = partial(take_turns, enter)
    best = dict.fromkeys(contenders, float("inf"))
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for name, run in contenders.items():
            count = 20 if "linear" in name and "000" in name else 1000
            begin = time.perf_counter()
            await run(count)
            best[name] = min(best[name], (time.perf_counter() - begin) / count * 1e6)
    gc.enable()
    for lease in leases:
        lease.release()
    return best


async def queue_up(enter: Enter, first: AbstractAsyncContextManager[object], count: int) -> float:
    """Microseconds a waiter, from its request in a queue of so many to its release."""
    ready = 0
    gate, full = anyio.Event(), anyio.Event()

    async def wait(number: int) -> None:
        nonlocal ready
        ready += 1
        if ready == count:
            full.set()
        await gate.wait()
        async with enter(number):
            pass

    async with anyio.create_task_group() as tg:
        async with first:
            for number in range(count):
                tg.start_soon(wait, number)
            await full.wait()
            gc.collect()
            gc.disable()
            begin = time.perf_counter()
            gate.set()
            await checkpoint()
    gc.enable()
    return (time.perf_counter() - begin) / count * 1e6


async def time_queues(rounds: int) -> dict[str, float]:
    """Microseconds a waiter on one hot range, by contender and number of waiters."""
    best: dict[str, float] = {}
    for _ in range(rounds):
        for count in WAITERS:
            # As many waiters in all, so that the best round is drawn from as many.
            for _ in range(20 if count == min(WAITERS) else 1):
                plain, writers, mixed = anyio.Lock(), RegionLock(), RegionLock()

                def mix(number: int, lock: RegionLock = mixed) -> Any:
                    ask = lock.exclusive if number % 4 == 0 else lock.shared
                    return ask(0, PAGE)

                contenders: dict[str, tuple[Enter, AbstractAsyncContextManager[object]]] = {
                    "anyio.Lock": (lambda _, lock=plain: lock, plain),  # type: ignore[misc]
                    "writers": (
                        lambda _, lock=writers: lock.exclusive(0, PAGE),  # type: ignore[misc]
                        writers.exclusive(0, PAGE),
                    ),
                    "readers and writers": (mix, mixed.exclusive(0, PAGE)),
                }
                for name, (enter, first) in contenders.items():
                    key = f"{name}, {count} waiters"
                    cost = await queue_up(enter, first, count)
                    best[key] = min(best.get(key, cost), cost)
    return best


def ratios(cost: dict[str, float]) -> dict[str, tuple[float, float]]:
    """What the lock is held to: name to (measured, limit)."""
    most = max(HELD)
    result = {
        "exclusive / anyio.Lock": (cost["exclusive, 0 held"] / cost["anyio.Lock"], 0.8),
        "exclusive / anyio.Lock, both fast": (
            cost["exclusive, fast, 0 held"] / cost["anyio.Lock, fast"],
            2.0,
        ),
        f"exclusive, {most} held / 0 held": (
            cost[f"exclusive, {most} held"] / cost["exclusive, 0 held"],
            1.25,
        ),
        f"shared, {most} held / 0 held": (
            cost[f"shared, {most} held"] / cost["shared, 0 held"],
            1.25,
        ),
        f"wide, {most} held / 0 held": (
            cost[f"wide, {most} held"] / cost["wide, 0 held"],
            1.25,
        ),
    }
    few, many = WAITERS
    for name in ("writers", "readers and writers"):
        result[f"{name}, {many} waiters / {few}"] = (
            cost[f"{name}, {many} waiters"] / cost[f"{name}, {few} waiters"],
            1.5,
        )
    return result


async def measure(rounds: int) -> dict[str, float]:
    return await time_uncontended(rounds) | await time_queues(max(3, rounds // 8))


def print_table(title: str, rows: dict[str, list[str]], columns: list[str]) -> None:
    width = max(map(len, rows)) + 1
    print(f"\n| {title:<{width}} | " + " | ".join(f"{name:>14}" for name in columns) + " |")
    print(f"|{'-' * (width + 2)}|" + "|".join("-" * 15 + ":" for _ in columns) + "|")
    for name, cells in rows.items():
        print(f"| {name:<{width}} | " + " | ".join(f"{cell:>14}" for cell in cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--loops", default=",".join(LOOPS))
    options = parser.parse_args()
    names = options.loops.split(",")
    print(f"Python {sys.version.split()[0]}, best of {options.rounds} rounds")
    costs = {}
    for name in names:
        backend, backend_options = LOOPS[name]
        costs[name] = anyio.run(
            measure, options.rounds, backend=backend, backend_options=backend_options
        )
    first = costs[names[0]]
    rows = {row: [f"{costs[name][row]:.2f}" for name in names] for row in first}
    print_table("microseconds", rows, names)
    shown = {name: ratios(costs[name]) for name in names}
    rows = {
        row: [f"{shown[name][row][0]:.2f} of {shown[name][row][1]:.2f}" for name in names]
        for row in shown[names[0]]
    }
    print_table("ratio, measured of allowed", rows, names)


if __name__ == "__main__":
    main()
