"""What is measured of the pager. Each scenario is a coroutine that fills a :class:`Figures`.

Contenders of one scenario take turns within one run, several times, and each counts with its
best turn: the machine is shared, and only ratios within a run mean something.
"""

from __future__ import annotations

import gc
import mmap
import os
import random
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import anyio
from anyio import to_thread

from aiommap import AsyncMmap, Protection

from ..rigs.faults import evict, heartbeat, major_faults_of_this_thread
from ..rigs.slow_file import SlowFile, slow_file
from .paging_contenders import (
    AIOFILE,
    AIOFILES,
    ANYIO_FILE,
    CONTENDERS,
    LOCK_SLICE,
    READ_AT,
    SLICE,
    THREAD_PREAD,
    THREAD_SLICE,
    VIEW,
    WRITERS,
    Read,
    Write,
)

PAGE = 4096
MIB = 1 << 20


@dataclass
class Figures:
    """The best value of each measure: ``values[scenario][row][column]``."""

    values: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def note(
        self, scenario: str, row: str, column: str, value: float, *, least: bool = True
    ) -> None:
        """Keep the best turn: the least value (seconds, gaps), or the largest (rates)."""
        cells = self.values.setdefault(scenario, {}).setdefault(row, {})
        old = cells.get(column)
        if old is None or (value < old if least else value > old):
            cells[column] = value

    def get(self, scenario: str, row: str, column: str) -> float | None:
        return self.values.get(scenario, {}).get(row, {}).get(column)


@dataclass(frozen=True)
class Run:
    """What the scenarios of one event loop share."""

    figures: Figures
    loop: str
    file: Path
    """On a real disk, of ``size`` bytes."""
    size: int
    rounds: int
    quick: bool


HOT = "hot 4 KiB access, us"
COLD = "cold random 4 KiB reads on a real disk, per second"
SLOW = "64 tasks on a disk of 20 ms, accesses per second"
SLOW_GAP = "64 tasks on a disk of 20 ms, longest gap of the loop, ms"
BULK = "all of 16 MiB on a disk of 20 ms, ms"
BESIDE = "how long 8 tasks wait for a page beside one that wants 64 MiB, 12 requests at a time, ms"
BESIDE_ROWS = (
    "nothing, for 1 s",
    "aiommap load",
    "aiommap read_at",
    "aiommap write_at",
    "aiommap windows()",
    "aiommap find",
)
SCAN = "crc32 over all of the file, GB/s"
SCAN_GAP = "crc32 over all of the file, longest gap of the loop, ms"
FIND = "find in all of the file, GB/s"
FIND_GAP = "find in all of the file, longest gap of the loop, ms"
CANCEL = "cold load of 256 MiB on a slow disk, cancelled after 50 ms"
WRITE = "random 4 KiB stores into a file in memory, per second"
STORE = "first stores under 16 committing tasks, us"
FAULTS = "major faults of the loop thread"

HOT_ROWS = (READ_AT, SLICE, VIEW, LOCK_SLICE, THREAD_PREAD, AIOFILE, AIOFILES, ANYIO_FILE)
COLD_ONCE = (SLICE, THREAD_SLICE, ANYIO_FILE)
"""Far behind, whatever the turn."""
COLD_ROWS = (READ_AT, VIEW, SLICE, THREAD_SLICE, THREAD_PREAD, AIOFILE, AIOFILES, ANYIO_FILE)
TASKS = (1, 16, 64, 256)


async def hot(run: Run) -> None:
    """One task reads pages that are in memory, one after another."""
    span = 4 * MIB
    offsets = [random.Random(1).randrange(span // PAGE) * PAGE for _ in range(256)]
    async with AsyncExitStack() as stack:
        reads: dict[str, Read] = {}
        for row in HOT_ROWS:
            read = await stack.enter_async_context(CONTENDERS[row](run.file, 1))
            if read is not None:
                reads[row] = read
        for offset in range(0, span, PAGE):
            await reads[SLICE](offset, PAGE)
        for _ in range(run.rounds * 3):
            for row, read in reads.items():
                count = 2 if row in (AIOFILE, AIOFILES, ANYIO_FILE, THREAD_PREAD) else 16
                gc.collect()
                gc.disable()
                start = time.perf_counter()
                for _ in range(count):
                    for offset in offsets:
                        await read(offset, PAGE)
                took = time.perf_counter() - start
                gc.enable()
                run.figures.note(HOT, row, run.loop, took / (count * len(offsets)) * 1e6)


async def _share(read: Read, offsets: list[int], tasks: int) -> float:
    """Seconds in which so many tasks read all these pages."""
    rest = iter(offsets)

    async def worker() -> None:
        for offset in rest:
            data = await read(offset, PAGE)
            assert len(data) == PAGE

    start = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(tasks):
            group.start_soon(worker)
    return time.perf_counter() - start


async def cold(run: Run) -> None:
    """Tasks read random pages of a file that is not in memory."""
    pages = run.size // PAGE
    for scenario in (COLD, FAULTS):
        run.figures.values.setdefault(scenario, {row: {} for row in COLD_ROWS})
    for tasks in TASKS:
        # The two that come close, more often; and nobody always after the same one.
        turns = [row for row in COLD_ROWS if row not in COLD_ONCE] * run.rounds
        turns += [READ_AT, AIOFILE] * run.rounds * 2
        random.shuffle(turns)
        for row in (*COLD_ONCE, *turns):
            count = {1: 2_000, 16: 10_000}.get(tasks, 20_000)
            if row in COLD_ONCE:
                count //= 2
            if run.quick:
                count //= 4
            evict(run.file)
            offsets = [page * PAGE for page in random.sample(range(pages), count)]
            async with CONTENDERS[row](run.file, tasks) as read:
                if read is None:
                    continue
                faults = major_faults_of_this_thread()
                took = await _share(read, offsets, tasks)
                faults = major_faults_of_this_thread() - faults
            column = f"{run.loop} {tasks}"
            run.figures.note(COLD, row, column, count / took, least=False)
            if tasks == 64:
                run.figures.note(FAULTS, row, run.loop, faults, least=False)


async def slow(run: Run) -> None:
    """64 tasks look at random pages of a disk that takes 20 ms for each."""
    size = 256 * MIB
    with slow_file(size, read=0.02, max_readahead=0) as file:
        for row in (VIEW, READ_AT, SLICE, THREAD_SLICE, THREAD_PREAD, AIOFILE):
            plain = row in (SLICE, THREAD_SLICE)
            for _ in range(1 if plain else run.rounds):
                count = 64 if plain else 4096
                file.evict()
                pages = random.sample(range(size // PAGE), count)
                async with CONTENDERS[row](file.path, 64) as read:
                    if read is None:
                        continue
                    async with heartbeat() as heart:
                        await anyio.sleep(0.01)
                        gc.collect()
                        heart.reset()
                        took = await _share(read, [page * PAGE for page in pages], 64)
                run.figures.note(SLOW, row, run.loop, count / took, least=False)
                run.figures.note(SLOW_GAP, row, run.loop, heart.longest_gap * 1e3)


async def bulk(run: Run) -> None:
    """One task wants all of a file whose requests take 20 ms, with the kernel's read-ahead."""
    size = 16 * MIB
    absent = b"\xff" * 16
    with slow_file(size, read=0.02) as file:
        async with AsyncMmap.open_path(file.path, Protection.READ_WRITE) as m:

            async def scan() -> None:
                async for _ in m.windows():
                    pass

            async def find() -> None:
                assert await m.find(absent) == -1

            fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
            with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as pages:
                os.close(fd)
                for _ in range(run.rounds):
                    for row, work in (
                        ("aiommap load", m.load),
                        ("aiommap read_at", partial(m.read_at, 0, size)),
                        ("aiommap write_at", partial(m.write_at, 0, bytes(size))),
                        ("aiommap windows()", scan),
                        ("aiommap find", find),
                        ("to_thread(slice)", partial(to_thread.run_sync, bytes, pages)),
                        ("to_thread(mmap.find)", partial(to_thread.run_sync, pages.find, absent)),
                    ):
                        file.evict()
                        took, _ = await _timed(work)
                        run.figures.note(BULK, row, run.loop, took * 1e3)


async def beside(run: Run) -> None:
    """
    8 tasks read single pages while one goes through 64 MiB of the same map, on a disk that takes
    20 ms for a request and 12 requests at a time, as a FUSE file system that says nothing of it.
    """
    large = 64 * MIB
    size = 1024 * MIB
    absent = b"\xff" * 16
    with slow_file(size, read=0.02, max_background=12) as file:
        for _ in range(run.rounds):
            for row in BESIDE_ROWS:
                file.evict()
                async with AsyncMmap.open_path(file.path, Protection.READ_WRITE) as m:
                    offsets = (page * PAGE for page in _shuffled(large // PAGE, size // PAGE))
                    waits: list[float] = []

                    async def read(
                        m: AsyncMmap = m,
                        offsets: Iterator[int] = offsets,
                        waits: list[float] = waits,
                    ) -> None:
                        for offset in offsets:
                            start = time.perf_counter()
                            await m.read_at(offset, PAGE)
                            waits.append(time.perf_counter() - start)

                    async def scan(m: AsyncMmap = m) -> None:
                        async for _ in m.windows(length=large):
                            pass

                    works: dict[str, Callable[[], Awaitable[object]]] = {
                        "aiommap load": partial(m.load, 0, large),
                        "aiommap read_at": partial(m.read_at, 0, large),
                        "aiommap write_at": partial(m.write_at, 0, bytes(large)),
                        "aiommap windows()": scan,
                        "aiommap find": partial(m.find, absent, 0, large),
                        "nothing, for 1 s": partial(anyio.sleep, 1),
                    }
                    start = time.perf_counter()
                    async with anyio.create_task_group() as group:
                        for _ in range(8):
                            group.start_soon(read)
                        await works[row]()
                        took = time.perf_counter() - start
                        group.cancel_scope.cancel()
                for column, value in (
                    ("it takes", took * 1e3),
                    ("median", sorted(waits)[len(waits) // 2] * 1e3),
                    ("longest", max(waits) * 1e3),
                ):
                    run.figures.note(BESIDE, row, f"{run.loop} {column}", value)


def _shuffled(first: int, stop: int) -> Iterator[int]:
    """Numbers of a range, each once, no two neighbours after another."""
    count = stop - first
    return (first + number * 7919 % count for number in range(count))


async def _timed(work: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    """Seconds, and the longest gap of the loop in seconds."""
    async with heartbeat() as heart:
        await anyio.sleep(0.01)
        gc.collect()
        heart.reset()
        start = time.perf_counter()
        await work()
        took = time.perf_counter() - start
    return took, heart.longest_gap


def _plain_loop(path: Path) -> int:
    checksum = 0
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as pages, memoryview(pages) as whole:
            for start in range(0, len(whole), MIB):
                checksum = zlib.crc32(whole[start : start + MIB], checksum)
    finally:
        os.close(fd)
    return checksum


async def scan(run: Run) -> None:
    """A checksum over all of the file, warm and cold."""
    expected: list[int] = []

    async def windows() -> None:
        checksum = 0
        async with AsyncMmap.open_path(run.file) as m:
            async for window in m.windows():
                checksum = zlib.crc32(window, checksum)
        expected.append(checksum)

    async def large_windows() -> None:
        checksum = 0
        async with AsyncMmap.open_path(run.file) as m:
            async for window in m.windows(4 * MIB):
                checksum = zlib.crc32(window, checksum)
        expected.append(checksum)

    async def plain() -> None:
        expected.append(_plain_loop(run.file))

    async def in_thread() -> None:
        expected.append(await to_thread.run_sync(_plain_loop, run.file))

    for temperature in ("warm", "cold"):
        for _ in range(run.rounds):
            for row, work in (
                ("aiommap windows()", windows),
                ("aiommap windows(4 MiB)", large_windows),
                ("plain loop", plain),
                ("plain loop in a thread", in_thread),
            ):
                if temperature == "cold":
                    evict(run.file)
                took, gap = await _timed(work)
                column = f"{run.loop} {temperature}"
                run.figures.note(SCAN, row, column, run.size / took / 1e9, least=False)
                run.figures.note(SCAN_GAP, row, column, gap * 1e3)
    assert len(set(expected)) == 1


async def find(run: Run) -> None:
    """Sixteen bytes that occur once, at the very end."""
    with run.file.open("rb") as file:
        file.seek(run.size - 16)
        needle = file.read()
    wanted = run.size - 16
    async with AsyncMmap.open_path(run.file) as m:
        await m.load()

        async def ours() -> None:
            assert await m.find(needle) == wanted

        async def ours_last() -> None:
            assert await m.rfind(needle, 0, wanted) == -1

        fd = os.open(run.file, os.O_RDONLY | os.O_CLOEXEC)
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as pages:
            os.close(fd)

            async def stdlib() -> None:
                assert pages.find(needle) == wanted

            async def stdlib_last() -> None:
                assert pages.rfind(needle, 0, wanted) == -1

            async def in_thread() -> None:
                assert await to_thread.run_sync(pages.find, needle) == wanted

            for _ in range(run.rounds):
                for row, work in (
                    ("aiommap find", ours),
                    ("mmap.find", stdlib),
                    ("to_thread(mmap.find)", in_thread),
                    ("aiommap rfind", ours_last),
                    ("mmap.rfind", stdlib_last),
                ):
                    took, gap = await _timed(work)
                    run.figures.note(FIND, row, run.loop, run.size / took / 1e9, least=False)
                    run.figures.note(FIND_GAP, row, run.loop, gap * 1e3)


async def cancel(run: Run) -> None:
    """A load that would take for ever is cancelled after 50 ms."""
    with slow_file(256 * MIB, read=0.02, max_readahead=0) as file:
        async with AsyncMmap.open_path(file.path) as m:
            for _ in range(run.rounds):
                file.evict()
                start = time.perf_counter()
                with anyio.move_on_after(0.05) as scope:
                    await m.load()
                took = time.perf_counter() - start
                assert scope.cancelled_caught
                row = "out after, ms from the cancellation"
                run.figures.note(CANCEL, row, run.loop, (took - 0.05) * 1e3)
                await _until_idle(file)


async def _until_idle(file: SlowFile) -> None:
    """Pages that are on their way still come: wait for them, so that they can be evicted."""
    before = -1
    while before != (before := file.statistics().reads):  # noqa: ASYNC110 - nobody tells
        await anyio.sleep(0.1)


async def stores(run: Run) -> None:
    """
    First stores into clean pages, on the loop, while 16 tasks make the whole map durable again
    and again: in views whose pages were made ready for stores, and in views that were not.
    """
    size = 64 * MIB
    path = make_file(run.file.parent, size, step=PAGE)
    async with AsyncMmap.open_path(path, "r+") as m:
        await m.load()
        for row, load in (("prepared", True), ("not prepared (load=False)", False)):
            seconds: list[float] = []
            gc.collect()
            gc.disable()
            with anyio.move_on_after(2 if run.quick else 8):
                async with anyio.create_task_group() as group:
                    for commit in (True, False):
                        for _ in range(16):
                            group.start_soon(_store, m, load, commit, seconds)
            gc.enable()
            seconds.sort()
            count = len(seconds)
            for column, value in (
                ("p50", seconds[count // 2]),
                ("p99", seconds[count * 99 // 100]),
                ("p99.9", seconds[count * 999 // 1000]),
                ("max", seconds[-1]),
            ):
                run.figures.note(STORE, row, f"{run.loop} {column}", value * 1e6)


async def _store(m: AsyncMmap, load: bool, commit: bool, seconds: list[float]) -> None:
    while True:
        page = random.randrange(len(m) // PAGE)
        async with m.view_mut(page * PAGE, PAGE, load=load) as v:
            memory = v.buffer
            start = time.perf_counter()
            memory[0] = 1
            seconds.append(time.perf_counter() - start)
        if commit:
            await (await m.flush_async())


async def writes(run: Run) -> None:
    """Tasks store random pages that are in memory, and nobody flushes."""
    size = 64 * MIB
    path = make_file(run.file.parent, size)
    data = bytes(PAGE)
    for tasks in TASKS:
        count = 2_000 if run.quick or tasks == 1 else 8_000
        for _ in range(run.rounds):
            for row, writer in WRITERS.items():
                async with writer(path, tasks) as write:
                    if write is None:
                        continue
                    offsets = [random.randrange(size // PAGE) * PAGE for _ in range(count)]
                    took = await _share_writes(write, offsets, data, tasks)
                    run.figures.note(WRITE, row, f"{run.loop} {tasks}", count / took, least=False)
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    await to_thread.run_sync(os.fsync, fd)  # the next one begins with clean pages
                finally:
                    os.close(fd)


async def _share_writes(write: Write, offsets: list[int], data: bytes, tasks: int) -> float:
    rest = iter(offsets)

    async def worker() -> None:
        for offset in rest:
            await write(offset, data)

    start = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(tasks):
            group.start_soon(worker)
    return time.perf_counter() - start


SCENARIOS: dict[str, Callable[[Run], Awaitable[None]]] = {
    "hot": hot,
    "cold": cold,
    "slow": slow,
    "bulk": bulk,
    "beside": beside,
    "scan": scan,
    "find": find,
    "cancel": cancel,
    "stores": stores,
    "writes": writes,
}


def make_file(folder: Path, size: int, *, step: int = 8 * MIB) -> Path:
    """
    A file of random bytes on the disk under ``folder``, or the one that is there.

    :param step: bytes of a write; the file system keeps them together in memory, too
    """
    path = folder / f"aiommap-bench-{size}.bin"
    with suppress(FileNotFoundError):
        if path.stat().st_size == size:
            return path
    block = random.Random(0)
    with path.open("wb") as file:
        for start in range(0, size, step):
            file.write(block.randbytes(min(step, size - start)))
            if step == PAGE:
                file.flush()
        file.flush()
        os.fsync(file.fileno())
    return path


async def run_scenarios(run: Run, names: list[str], say: Callable[[str], object]) -> None:
    for name in names:
        say(f"{run.loop}: {name}")
        await partial(SCENARIOS[name], run)()
