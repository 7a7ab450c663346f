"""Many tasks edit one memory-mapped file at the same time, durably, and the loop keeps beating.

    uv run examples/quickstart.py [FILE] [--backend asyncio|trio] [--tasks N]

Works on a copy of FILE; without one, on a copy of a large file of the Python installation.
Writers take exclusive views of regions, disjoint and overlapping, and invert every byte in
them. Readers copy regions out, check that they never see one half inverted, and search for what
they saw. What was written is flushed along the way (``flush_async``, awaited later). At the end
another process checks every byte with ordinary reads.

A heartbeat task measures the longest time for which the event loop stood still; then the same
is done with ``asyncio.to_thread`` on the plain ``mmap`` object, for comparison.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from aiommap import AsyncMmap, PendingFlush

BLOCK = 16 << 10
NEAR = 1 << 20  # bytes around a block that are searched
INVERT = bytes(255 - value for value in range(256))
READERS = 4
Span = tuple[int, int]  # first block, number of blocks


@dataclass
class Work:
    """The edits, drawn before either contender starts, so that both do the same."""

    size: int
    tasks: list[list[Span]]
    original: Path
    flips: list[int] = field(default_factory=list)

    @classmethod
    def draw(cls, original: Path, tasks: int, rng: random.Random) -> Work:
        size = original.stat().st_size
        blocks = -(-size // BLOCK)
        lists: list[list[Span]] = [[] for _ in range(tasks)]
        flips = [0] * blocks
        # Everything once in spans of one to four blocks, then a quarter of it again: those
        # spans overlap others, and the tasks have to wait for one another.
        first = 0
        spans: list[Span] = []
        while first < blocks:
            count = min(rng.randint(1, 4), blocks - first)
            spans.append((first, count))
            first += count
        for _ in range(max(blocks // 10, 1)):
            count = min(rng.randint(1, 4), blocks)
            spans.append((rng.randrange(blocks - count + 1), count))
        rng.shuffle(spans)
        for number, (start, count) in enumerate(spans):
            lists[number % tasks].append((start, count))
            for block in range(start, start + count):
                flips[block] += 1
        return cls(size, lists, original, flips)

    def bounds(self, span: Span) -> tuple[int, int]:
        """Offset and length of a span, in bytes."""
        offset = span[0] * BLOCK
        return offset, min(span[1] * BLOCK, self.size - offset)

    def any_block(self, rng: random.Random) -> tuple[int, int]:
        """Offset and length of some block, in bytes."""
        return self.bounds((rng.randrange(len(self.flips)), 1))

    @staticmethod
    def near(offset: int, length: int) -> tuple[int, int]:
        """Where to search for a block's beginning: from, to."""
        return max(offset - NEAR // 2, 0), offset + length

    @property
    def edited(self) -> int:
        """Bytes that will be rewritten."""
        return sum(self.bounds(span)[1] for spans in self.tasks for span in spans)


@dataclass
class Result:
    edited: int = 0  # bytes
    seconds: float = 0.0
    gap: float = 0.0
    reads: int = 0


async def heartbeat(result: Result, stop: anyio.Event) -> None:
    """The longest time between two turns of a task that only ever waits a millisecond."""
    last = time.perf_counter()
    while not stop.is_set():
        await anyio.sleep(0.001)
        now = time.perf_counter()
        result.gap = max(result.gap, now - last)
        last = now


async def show(progress: Progress, bar: TaskID, result: Result, stop: anyio.Event) -> None:
    """Keep the progress bar up to date, ten times a second and not with every view."""
    while not stop.is_set():
        progress.update(bar, completed=result.edited)
        await anyio.sleep(0.1)


async def edit(path: Path, work: Work, progress: Progress) -> Result:
    """The edits with aiommap, on whatever event loop runs."""
    result = Result()
    bar = progress.add_task("aiommap", total=work.edited)
    stop = anyio.Event()
    pending: list[PendingFlush] = []

    async with (
        AsyncMmap.open_path(work.original) as original,
        AsyncMmap.open_path(path, "r+") as m,
    ):

        async def write(spans: list[Span]) -> None:
            for span in spans:
                async with m.view_mut(*work.bounds(span)) as v:
                    v[:] = bytes(v).translate(INVERT)
                    result.edited += len(v)
            pending.append(await m.flush_async())  # starts now, awaited later

        async def read(seed: int) -> None:
            rng = random.Random(seed)
            while not stop.is_set():
                offset, length = work.any_block(rng)
                was = await original.read_at(offset, length)
                now = await m.read_at(offset, length)
                check_block(offset, now, was)
                await m.find(now[:24], *work.near(offset, length))
                result.reads += 1

        started = time.perf_counter()
        async with anyio.create_task_group() as background:
            background.start_soon(heartbeat, result, stop)
            background.start_soon(show, progress, bar, result, stop)
            for seed in range(READERS):
                background.start_soon(read, seed)
            async with anyio.create_task_group() as writers:
                for spans in work.tasks:
                    writers.start_soon(write, spans)
            for flush in pending:
                await flush
            await m.flush()
            result.seconds = time.perf_counter() - started
            stop.set()
    progress.update(bar, completed=work.edited)
    return result


async def edit_plain(path: Path, work: Work, progress: Progress) -> Result:
    """The same with the plain mmap object in threads: the loop stands still all the same."""
    result = Result()
    bar = progress.add_task("plain mmap in threads", total=work.edited)
    stop = anyio.Event()
    lock = asyncio.Lock()
    with (
        work.original.open("rb") as source,
        mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as original,
        path.open("r+b") as file,
        mmap.mmap(file.fileno(), 0) as m,
    ):

        def invert(offset: int, length: int) -> None:
            m[offset : offset + length] = m[offset : offset + length].translate(INVERT)

        async def write(spans: list[Span]) -> None:
            for span in spans:
                async with lock:
                    await asyncio.to_thread(invert, *work.bounds(span))
                result.edited += work.bounds(span)[1]
            await asyncio.to_thread(m.flush)

        def look(offset: int, length: int) -> tuple[bytes, bytes]:
            return m[offset : offset + length], original[offset : offset + length]

        async def read(seed: int) -> None:
            rng = random.Random(seed)
            while not stop.is_set():
                offset, length = work.any_block(rng)
                async with lock:
                    now, was = await asyncio.to_thread(look, offset, length)
                check_block(offset, now, was)
                await asyncio.to_thread(m.find, now[:24], *work.near(offset, length))
                result.reads += 1

        started = time.perf_counter()
        async with anyio.create_task_group() as background:
            background.start_soon(heartbeat, result, stop)
            background.start_soon(show, progress, bar, result, stop)
            for seed in range(READERS):
                background.start_soon(read, seed)
            async with anyio.create_task_group() as writers:
                for spans in work.tasks:
                    writers.start_soon(write, spans)
            result.seconds = time.perf_counter() - started
            stop.set()
    progress.update(bar, completed=work.edited)
    return result


def check_block(offset: int, now: bytes, was: bytes) -> None:
    if now not in (was, was.translate(INVERT)):
        raise AssertionError(f"a half-written block at {offset}")


CHECKER = """
import json, sys
edited, original, plan = sys.argv[1:]
invert = bytes(255 - value for value in range(256))
block, flips = json.load(open(plan))
with open(edited, "rb") as new, open(original, "rb") as old:
    for number, count in enumerate(flips):
        was = old.read(block)
        if new.read(block) != (was.translate(invert) if count % 2 else was):
            sys.exit(f"block {number} is wrong")
    if new.read() or old.read():
        sys.exit("the sizes differ")
"""


def check(edited: Path, work: Work) -> None:
    """Have another process compare every byte, with ordinary reads."""
    plan = edited.with_suffix(".json")
    plan.write_text(json.dumps([BLOCK, work.flips]))
    subprocess.run([sys.executable, "-c", CHECKER, edited, work.original, plan], check=True)


def make_copy(source: Path, target: Path) -> Path:
    """A copy on the disk, and not in memory: the pages have to come in again."""
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
        if sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return target


def largest_file_of_python() -> Path:
    """The interpreter's executable or library, whichever is larger."""
    library = Path(sysconfig.get_config_var("LIBDIR") or ".") / str(
        sysconfig.get_config_var("LDLIBRARY")
    )
    found = [Path(sys.executable).resolve(), library]
    return max((path for path in found if path.is_file()), key=lambda path: path.stat().st_size)


def positive(text: str) -> int:
    """A type of argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="what to edit a copy of")
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio")
    parser.add_argument("--tasks", type=positive, default=32, help="writers at the same time")
    options = parser.parse_args()
    source = options.file or largest_file_of_python()
    if not source.is_file() or source.stat().st_size == 0:
        parser.error(f"{source} is not a file with content")

    console = Console()
    columns = (TextColumn("{task.description:>22}"), BarColumn(), TaskProgressColumn())
    with tempfile.TemporaryDirectory() as folder:
        ours = make_copy(source, Path(folder, "aiommap"))
        plain = make_copy(source, Path(folder, "plain"))
        work = Work.draw(source, options.tasks, random.Random(0))
        with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
            result = anyio.run(edit, ours, work, progress, backend=options.backend)
            beside = asyncio.run(edit_plain(plain, work, progress))
        check(ours, work)
        check(plain, work)

    mib = work.edited / (1 << 20)
    console.print(
        f"[bold]{options.tasks} tasks on {options.backend}[/] rewrote {mib:.0f} MiB of a copy of "
        f"{source.name} ({work.size >> 20} MiB), in {sum(map(len, work.tasks))} exclusive views;\n"
        f"{READERS} readers checked and searched {result.reads} blocks meanwhile; another process "
        f"has checked every byte.",
        soft_wrap=True,
    )
    for name, each in (("aiommap", result), ("plain mmap in threads", beside)):
        console.print(
            f"{name:>22}: {mib / each.seconds:6.0f} MiB/s, the event loop stood still for at most "
            f"[bold]{each.gap * 1000:.1f} ms[/]",
            soft_wrap=True,
        )


if __name__ == "__main__":
    main()
