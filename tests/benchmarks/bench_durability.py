"""Flushes beside their peers: ``uv run --group bench python -m tests.benchmarks.bench_durability``.

Prints what was measured and the ratios that the flusher must show, with a verdict each. Needs
Linux, root for the disk with a slow flush, and a real disk with 1 GiB free; takes about two
minutes a loop. Contenders take turns in a random order, and a ratio is the median of the rounds'
ratios: a machine that others use as well slows both sides of it.
"""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError("Linux only")

import argparse
import ctypes
import gc
import mmap
import os
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
from anyio import to_thread
from rich.console import Console
from rich.table import Table

from aiommap import AsyncMmap

from ..rigs.faults import cached_pages
from ..rigs.heartbeat import heartbeat
from ..rigs.logged_disk import logged_disk

MIB = 1 << 20
PAGE = 4096
FILE = 4 * MIB
RECORD = b"r" * 64
TASKS = (1, 10, 100)
_MS_SYNC = 4

LOOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

Commit = Callable[[int], Awaitable[object]]
Store = Callable[[int], None]


def msync(address: int, length: int) -> None:
    if _libc.msync(address, length, _MS_SYNC):
        raise OSError(ctypes.get_errno(), "msync")


def page_by_page(path: Path, size: int) -> None:
    """
    A file whose pages are single in the page cache: a file that is written at once is kept in
    large folios, and the kernel then writes all of one for each dirty byte.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        for offset in range(0, size, PAGE):
            os.pwrite(fd, bytes(PAGE), offset)
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def plain_map(path: Path) -> Iterator[tuple[int, mmap.mmap, int]]:
    """A descriptor, a map of the standard library, and its address."""
    fd = os.open(path, os.O_RDWR)
    try:
        with mmap.mmap(fd, 0) as pages:
            anchor = ctypes.c_char.from_buffer(pages)
            try:
                yield fd, pages, ctypes.addressof(anchor)
            finally:
                del anchor
    finally:
        os.close(fd)


async def commits_per_second(tasks: int, seconds: float, store: Store, commit: Commit) -> float:
    """
    Tasks that store 64 bytes into a page of their own and commit them, again and again.

    The pages are neighbours, so that a flush is few writes for the disk. Scattered, the writes
    of 100 pages cost more than the flush, on this disk and above all in the slow disk's server.
    """
    done = 0
    began = time.perf_counter()
    end = began + seconds

    async def work(number: int) -> None:
        nonlocal done
        offset = number * PAGE
        while time.perf_counter() < end:
            store(offset)
            await commit(offset)
            done += 1

    async with anyio.create_task_group() as group:
        for number in range(tasks):
            group.start_soon(work, number)
    return done / (time.perf_counter() - began)


Rates = dict[str, dict[int, list[float]]]
"""Commits per second, round by round, by contender and number of tasks."""


async def commits(path: Path, seconds: float, rounds: int) -> Rates:
    page_by_page(path, FILE)
    figures: Rates = {}
    with plain_map(path) as (fd, pages, address):
        async with AsyncMmap.open_path(path, "r+") as m:

            def store(offset: int) -> None:
                pages[offset : offset + 64] = RECORD

            async def by_view(offset: int) -> None:
                async with m.view_mut(offset, 64) as view:
                    view[:] = RECORD
                    await view.flush()

            contenders: dict[str, tuple[Store, Commit]] = {
                "to_thread(mmap.flush)": (store, lambda _: to_thread.run_sync(pages.flush)),
                "to_thread(msync)": (store, lambda _: to_thread.run_sync(msync, address, FILE)),
                "to_thread(fdatasync)": (store, lambda _: to_thread.run_sync(os.fdatasync, fd)),
                "m.flush()": (store, lambda _: m.flush()),
                "m.flush_range()": (store, lambda offset: m.flush_range(offset, 64)),
                "view_mut + view.flush()": (lambda _: None, by_view),
            }
            for _ in range(rounds):
                for tasks in TASKS:
                    for name in random.sample(list(contenders), len(contenders)):
                        put, commit = contenders[name]
                        gc.collect()
                        rate = await commits_per_second(tasks, seconds, put, commit)
                        figures.setdefault(name, {}).setdefault(tasks, []).append(rate)
    return {name: figures[name] for name in contenders}


def dirty(address: int, size: int, value: int) -> None:
    _libc.memset(address, value, size)


async def large_flush(path: Path, size: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds for a flush of dirty memory, and the heartbeat's longest gap meanwhile."""
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    figures: dict[str, list[tuple[float, float]]] = {}
    with plain_map(path) as (fd, pages, address):
        async with AsyncMmap.open_path(path, "r+") as m:
            contenders: dict[str, Callable[[], Awaitable[object]]] = {
                "to_thread(mmap.flush)": lambda: to_thread.run_sync(pages.flush),
                "to_thread(msync)": lambda: to_thread.run_sync(msync, address, size),
                "m.flush()": m.flush,
                "nothing (idle heartbeat)": lambda: anyio.sleep(0.5),
            }
            dirty(address, size, 1)  # once unmeasured: the first writes fill unwritten blocks
            os.fsync(fd)
            value = 1
            for _ in range(rounds):
                for name in random.sample(list(contenders), len(contenders)):
                    value += 1
                    await to_thread.run_sync(dirty, address, size, value % 256)
                    gc.collect()
                    gc.disable()
                    async with heartbeat() as heart:
                        await anyio.sleep(0.05)
                        heart.reset()
                        began = time.perf_counter()
                        await contenders[name]()
                        took = time.perf_counter() - began
                    gc.enable()
                    figures.setdefault(name, []).append((took, heart.longest_gap))
                    await to_thread.run_sync(os.fdatasync, fd)
    return {name: figures[name] for name in contenders}


async def started_write_back(path: Path, size: int, rounds: int) -> tuple[float, float, int]:
    """Seconds of flush_async, seconds of a full flush, and pages dirty 0.5 s after the former."""
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    started: list[float] = []
    flushed: list[float] = []
    left = 0
    with plain_map(path) as (fd, _, address):
        async with AsyncMmap.open_path(path, "r+") as m:
            await to_thread.run_sync(dirty, address, size, 1)
            await m.flush()
            for value in range(rounds):
                await to_thread.run_sync(dirty, address, size, value + 2)
                began = time.perf_counter()
                pending = await m.flush_async()
                started.append(time.perf_counter() - began)
                await anyio.sleep(0.5)
                now = cached_pages(fd)
                left = max(left, now.dirty)
                await pending
                await to_thread.run_sync(dirty, address, size, value + 100)
                began = time.perf_counter()
                await m.flush()
                flushed.append(time.perf_counter() - began)
    return statistics.median(started), statistics.median(flushed), left


class Report:
    """Tables, and the verdicts at the end."""

    def __init__(self) -> None:
        self.console = Console(width=110)
        self.verdicts = Table("must show", "measured", "bound", "", title="Verdicts")
        self.failed = 0

    def commits(self, where: str, loop: str, rates: Rates) -> None:
        table = Table(title=f"Commits per second {where}, {loop} (x to_thread(mmap.flush))")
        table.add_column("")
        for tasks in TASKS:
            table.add_column(f"{tasks} tasks", justify="right")
        for name, by_tasks in rates.items():
            cells = [
                f"{statistics.median(by_tasks[tasks]):,.0f} ({ratio(rates, name, tasks):.2f} x)"
                for tasks in TASKS
            ]
            table.add_row(name, *cells)
        self.console.print(table)

    def verdict(self, text: str, value: float, bound: float, *, at_least: bool) -> None:
        good = value >= bound if at_least else value <= bound
        self.failed += not good
        sign = ">=" if at_least else "<="
        self.verdicts.add_row(
            text, f"{value:.3g}", f"{sign} {bound:g}", "ok" if good else "NOT REACHED"
        )


def ratio(rates: Rates, name: str, tasks: int) -> float:
    """Beside the standard library's flush in a thread."""
    base = rates["to_thread(mmap.flush)"][tasks]
    pairs = zip(rates[name][tasks], base, strict=True)
    return statistics.median(rate / its_base for rate, its_base in pairs)


OURS = "m.flush_range()"


def run(call: Callable[..., Awaitable[Any]], loop: str, *arguments: Any) -> Any:
    backend, options = LOOPS[loop]
    return anyio.run(call, *arguments, backend=backend, backend_options=options)


def bench_commits(report: Report, loop: str, folder: Path, seconds: float, rounds: int) -> None:
    many = (6, 35) if loop == "trio" else (8, 60)
    here = run(commits, loop, folder / "commits", seconds, rounds)
    report.commits("on this disk", loop, here)
    report.verdict(f"{loop}: 100 tasks here", ratio(here, OURS, 100), many[0], at_least=True)
    report.verdict(f"{loop}: 1 task here", ratio(here, OURS, 1), 0.9, at_least=True)
    with logged_disk("ext4", flush=0.01) as disk:
        slow = run(commits, loop, disk.path / "commits", seconds, rounds)
    report.commits("at 10 ms a flush", loop, slow)
    report.verdict(
        f"{loop}: 100 tasks at 10 ms a flush", ratio(slow, OURS, 100), many[1], at_least=True
    )
    report.verdict(f"{loop}: 1 task at 10 ms a flush", ratio(slow, OURS, 1), 0.9, at_least=True)


def bench_large(report: Report, loop: str, folder: Path, size: int, rounds: int) -> None:
    figures = run(large_flush, loop, folder / "large", size, rounds)
    table = Table(
        "", "seconds", "longest gap of the loop", title=f"Flush of {size >> 20} MiB, {loop}"
    )
    for name, values in figures.items():
        took = statistics.median(seconds for seconds, _ in values)
        gap = statistics.median(gap for _, gap in values)
        table.add_row(name, f"{took:.3f}", f"{gap * 1e3:.1f} ms")
    report.console.print(table)
    ours, raw = figures["m.flush()"], figures["to_thread(msync)"]
    beside = statistics.median(one[0] / other[0] for one, other in zip(ours, raw, strict=True))
    gap = statistics.median(gap for _, gap in ours)
    report.verdict(f"{loop}: large flush / raw msync", beside, 1.1, at_least=False)
    report.verdict(f"{loop}: gap in ms during it", gap * 1e3, 10, at_least=False)


def bench_started(report: Report, loop: str, folder: Path, rounds: int) -> None:
    with logged_disk("ext4", 512 * MIB, flush=0.2) as disk:
        slow = run(started_write_back, loop, disk.path / "started", 32 * MIB, rounds)
    here = run(started_write_back, loop, folder / "started", 256 * MIB, rounds)
    table = Table("", "flush_async", "flush", "dirty 0.5 s later", title=f"flush_async, {loop}")
    for name, (started, flushed, left) in (
        ("32 MiB at 200 ms a flush", slow),
        ("256 MiB on this disk", here),
    ):
        table.add_row(name, f"{started * 1e3:.1f} ms", f"{flushed * 1e3:.1f} ms", f"{left} pages")
    report.console.print(table)
    report.verdict(
        f"{loop}: flush_async / flush at 200 ms a flush", slow[0] / slow[1], 0.1, at_least=False
    )
    for name, figures in (("at 200 ms a flush", slow), ("here", here)):
        report.verdict(f"{loop}: pages dirty 0.5 s later, {name}", figures[2], 0, at_least=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", choices=list(LOOPS), action="append")
    parser.add_argument("--only", choices=("commits", "large", "started"), action="append")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each commit measurement")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=1024, help="MiB of the large flush")
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    options = parser.parse_args()
    report = Report()
    only = options.only or ("commits", "large", "started")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for loop in options.loop or ("asyncio", "trio"):
            if "commits" in only:
                bench_commits(report, loop, folder, options.seconds, options.rounds)
            if "large" in only:
                bench_large(report, loop, folder, options.size * MIB, options.rounds)
            if "started" in only:
                bench_started(report, loop, folder, options.rounds)
            for path in folder.iterdir():
                path.unlink()
    report.console.print(report.verdicts)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
