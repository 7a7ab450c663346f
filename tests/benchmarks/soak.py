"""Random work with faults for as long as wanted: nothing is lost, nothing hangs, nothing grows.

    python -m tests.benchmarks.soak --minutes 20

Tasks read, write, search, flush, resize, close and open again; a part of them is cancelled at
any time. Each task has blocks that only it writes and compares them with a model of its own;
everybody reads the blocks of all, which must never be seen half written. One map's kernel fails
at random (EIO, ENOSPC), another one's file is cut and grown by a thread. What the process uses
is measured every few seconds, and must be flat after the first fifth.

The exit status is 1 if something grew; what is lost is an AssertionError.
"""

from __future__ import annotations

import argparse
import errno
import gc
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import anyio
from anyio import ClosedResourceError, to_thread
from anyio.lowlevel import checkpoint

from aiommap import AsyncMmap, DeadlockError, FlushError, TruncatedError
from tests.fake_kernel import FakeKernel
from tests.rigs.heartbeat import Heartbeat, heartbeat
from tests.test_cancellation import map_class

BLOCK = 4096
TASKS = 24
BLOCKS_EACH = 8
SIZE = BLOCK * TASKS * BLOCKS_EACH

MOST_RSS = 24 << 20
"""Bytes that the resident memory may grow: allocators keep some. Out of the air."""


@dataclass
class Books:
    """What the process uses."""

    seconds: float
    rss: int
    descriptors: int
    threads: int
    areas: int


def books(began: float) -> Books:
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        rss = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with open("/proc/self/maps", encoding="utf-8") as file:
        areas = sum(1 for _ in file)
    return Books(
        round(time.monotonic() - began, 1),
        rss,
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        areas,
    )


class Soak:
    """The work of one event loop."""

    def __init__(self, folder: Path, seed: int, seconds: float) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.until = time.monotonic() + seconds
        self.done: Counter[str] = Counter()
        self.models = [[bytes(BLOCK)] * BLOCKS_EACH for _ in range(TASKS)]
        self.blocks = self.new_file("blocks")

    def new_file(self, name: str, size: int = SIZE) -> Path:
        path = self.folder / name
        path.write_bytes(bytes(size))
        return path

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until

    # Blocks with one owner each

    async def own_blocks(self, m: AsyncMmap, task: int) -> None:
        """Writes its own blocks in every way and looks at everybody's."""
        model = self.models[task]
        rng = random.Random(self.random.random())
        while not self.over:
            index = rng.randrange(BLOCKS_EACH)
            offset = (task * BLOCKS_EACH + index) * BLOCK
            content = bytes([rng.randrange(256)]) * BLOCK
            sure = False
            limit = rng.choice((None, None, None, 0, 0.0005, 0.005))
            with anyio.move_on_after(limit) if limit is not None else anyio.CancelScope():
                match rng.randrange(5):
                    case 0:
                        await m.write_at(offset, content)
                    case 1:
                        async with m.view_mut(offset, BLOCK) as v:
                            v[:] = content
                    case 2:
                        async with m.view_mut(offset, BLOCK) as v:
                            await v.write(content)
                            await v.flush()
                    case 3:
                        left, right = (await m.view_mut(offset, BLOCK)).split_at(100)
                        async with left, right:
                            left[:] = content[:100]
                            right[:] = content[100:]
                    case 4:
                        content = model[index]
                        await self.look(m, rng)
                sure = True
            if not sure:
                # Cancelled: nobody knows how much of it was stored.
                self.done["cancelled"] += 1
                await m.write_at(offset, content)
            model[index] = content
            got = await m.read_at(offset, BLOCK)
            assert got == content, f"lost update of block {task}/{index}"
            self.done["updates"] += 1

    async def look(self, m: AsyncMmap, rng: random.Random) -> None:
        block = rng.randrange(SIZE // BLOCK) * BLOCK
        match rng.randrange(8):
            case 0:
                async with m.view(block, BLOCK) as v:
                    assert len(set(v.buffer)) == 1, "a block was seen half written"
            case 1:
                assert len(set(await m.read_at(block, BLOCK))) == 1, "torn read"
            case 2:
                buffer = bytearray(BLOCK)
                await m.readinto_at(block, buffer)
                assert len(set(buffer)) == 1, "torn readinto"
            case 3:
                async for window in m.windows(4 * BLOCK, offset=block):
                    assert len(set(window[:BLOCK])) == 1, "torn window"
                    if rng.random() < 0.1:
                        break
            case 4:
                await m.find(bytes((1, 2, 3)))
            case 5:
                await m.flush()
            case 6:
                pending = await m.flush_async()
                if rng.random() < 0.5:
                    await pending
            case 7:
                await m.load()
                await m.resident()
        self.done["looks"] += 1

    # Maps that come and go

    async def open_and_close(self) -> None:
        """Opens, uses and closes maps of all kinds, cancelled at any moment."""
        rng = random.Random(self.random.random())
        number = 0
        while not self.over:
            number += 1
            path = self.folder / f"new {id(rng)} {number % 3}"
            with anyio.move_on_after(rng.choice((0, 0.001, 0.01, 1))):
                match rng.randrange(4):
                    case 0:
                        path.unlink(missing_ok=True)  # a cancelled resize may have left it longer
                        async with AsyncMmap.create(path, SIZE, exist_ok=True) as m:
                            await m.write_at(0, b"x" * 5000)
                            await m.resize(SIZE + rng.randrange(5000))
                            await m.resize(SIZE)
                    case 1:
                        async with AsyncMmap.anonymous(SIZE) as m:
                            await m.write_at(10, b"y" * 100_000)
                            assert await m.find(b"y") == 10
                            await m.resize(SIZE // 2)
                    case 2:
                        async with (
                            AsyncMmap.open_path(self.blocks, "c") as m,
                            m.into_view() as v,
                        ):
                            await v.write(b"private")
                    case 3:
                        m = await AsyncMmap.open_path(self.blocks)
                        async with m, m.view(0, BLOCK):
                            await m.aclose()
            if rng.random() < 0.3:
                path.unlink(missing_ok=True)
            self.done["maps"] += 1

    # Faults

    async def on_a_bad_disk(self) -> None:
        """A kernel that fails now and then: an error, and then it works again."""
        rng = random.Random(self.random.random())
        kernel = FakeKernel()
        path = self.new_file(f"bad {id(rng)}")
        while not self.over:
            try:
                async with map_class(kernel).open_path(path, "r+") as m:
                    for _ in range(20):
                        name = rng.choice(
                            (
                                "read",
                                "populate_read",
                                "populate_write",
                                "sync_data",
                                "sync_range",
                                "reserve",
                            )
                        )
                        number = rng.choice((errno.EIO, errno.ENOSPC))
                        kernel.fail(name, number, times=1, after=rng.randrange(3))
                        try:
                            await self.work(m, rng)
                        except FlushError:
                            await m.clear_flush_error()
                            self.done["flush errors"] += 1
                        except OSError as exc:
                            if exc.errno not in (errno.EIO, errno.ENOSPC):
                                raise
                            self.done["disk errors"] += 1
                    kernel.heal()
            except OSError:
                self.done["errors at the end"] += 1
            kernel.heal()
            kernel.calls.clear()
            async with map_class(kernel).open_path(path, "r+") as m:
                m.view_mut_nowait()._give_back()
                await m.write_at(0, bytes(SIZE))

    async def on_a_file_that_is_cut(self) -> None:
        """Another thread truncates the file and makes it long again."""
        rng = random.Random(self.random.random())
        path = self.new_file(f"cut {id(rng)}")
        stop = threading.Event()

        def cut() -> None:
            while not stop.wait(0.01):
                os.truncate(path, SIZE // 3)
                os.truncate(path, SIZE)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(to_thread.run_sync, cut)
            try:
                async with AsyncMmap.open_path(path, "r+") as m:
                    while not self.over:
                        try:
                            await self.work(m, rng)
                        except TruncatedError:
                            self.done["truncated"] += 1
                        except OSError as exc:
                            if exc.errno != errno.EIO:
                                raise
                            self.done["cut each time"] += 1
            except TruncatedError:
                self.done["truncated at the end"] += 1
            finally:
                stop.set()

    async def work(self, m: AsyncMmap, rng: random.Random) -> None:
        offset = rng.randrange(SIZE)
        length = min(rng.choice((1, 100, 5000, 300_000)), SIZE - offset)
        match rng.randrange(7):
            case 0:
                assert len(await m.read_at(offset, length)) == length
            case 1:
                await m.write_at(offset, bytes(length))
            case 2:
                await m.flush_range(offset, length)
            case 3:
                await m.load(offset, length)
            case 4:
                async with m.view_mut(offset, length) as v:
                    await v.write(bytes(length))
            case 5:
                await m.find(b"\1" * 9, offset)
            case 6:
                await m.move(0, SIZE // 2, length // 2)
        self.done["work under faults"] += 1

    async def deadlocks(self, m: AsyncMmap) -> None:
        """Two tasks that take two regions in different orders: an error for one of them."""
        rng = random.Random(self.random.random())
        while not self.over:
            order = [0, SIZE // 2]
            rng.shuffle(order)
            try:
                async with m.view_mut(order[0], BLOCK, load=False):
                    await checkpoint()
                    async with m.view_mut(order[1], BLOCK, load=False):
                        await checkpoint()
                self.done["pairs of regions"] += 1
            except DeadlockError:
                self.done["deadlocks"] += 1

    async def run(self, report: Callable[[Heartbeat], Awaitable[None]]) -> None:
        other = self.new_file("pairs")
        async with heartbeat(0.01) as heart:
            async with (
                AsyncMmap.open_path(self.blocks, "r+") as m,
                AsyncMmap.open_path(other, "r+") as pairs,
                anyio.create_task_group() as tasks,
            ):
                for task in range(TASKS):
                    tasks.start_soon(self.own_blocks, m, task)
                for _ in range(3):
                    tasks.start_soon(self.open_and_close)
                    tasks.start_soon(self.deadlocks, pairs)
                for _ in range(2):
                    tasks.start_soon(self.on_a_bad_disk)
                    tasks.start_soon(self.on_a_file_that_is_cut)
                while not self.over:
                    await anyio.sleep(1)
                    await report(heart)
            with open(self.blocks, "rb") as file:
                expected = b"".join(block for model in self.models for block in model)
                assert file.read() == expected, "the file is not what was flushed"
            try:
                await m.read_at(0, 1)
            except ClosedResourceError:
                self.done["closed"] += 1


def soak(backend: str, minutes: float, seed: int) -> dict[str, object]:
    """Run it; figures, and what grew."""
    began = time.monotonic()
    measured: list[Books] = []
    gaps: list[float] = []

    async def report(heart: Heartbeat) -> None:
        gaps.append(heart.longest_gap)
        measured.append(books(began))
        heart.reset()  # a full pass of the garbage collector is in the books, and not the map's

    with tempfile.TemporaryDirectory(prefix="aiommap-soak-") as folder:
        work = Soak(Path(folder), seed, minutes * 60)
        anyio.run(work.run, report, backend=backend)
    after = books(began)
    settled = measured[len(measured) // 5 :]
    half = len(settled) // 2
    grew = [
        name
        for name, most in (("rss", MOST_RSS), ("descriptors", 12), ("threads", 12), ("areas", 60))
        if _middle(settled[half:], name) - _middle(settled[:half], name) > most
    ]
    return {
        "backend": backend,
        "python": sys.version.split()[0],
        "seconds": after.seconds,
        "done": dict(work.done),
        "early": asdict(settled[0]),
        "late": asdict(settled[-1]),
        "after": asdict(after),
        "longest gap of the loop": round(max(gaps), 3),
        "usual longest gap in a second": round(sorted(gaps)[len(gaps) // 2], 4),
        "grew": grew,
    }


def _middle(measured: list[Books], name: str) -> int:
    values = sorted(getattr(each, name) for each in measured)
    middle: int = values[len(values) // 2]
    return middle


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="for all backends together")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--backend", choices=["asyncio", "trio", "both"], default="both")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(2**32)
    print(f"seed {seed}", file=sys.stderr)
    backends = ["asyncio", "trio"] if options.backend == "both" else [options.backend]
    failed = False
    for backend in backends:
        result = soak(backend, options.minutes / len(backends), seed)
        print(json.dumps(result, indent=1))
        failed = failed or bool(result["grew"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
