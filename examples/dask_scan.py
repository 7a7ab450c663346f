"""Scan a file on a Dask cluster: each worker has a map of its own, and an event loop that lives.

    uv run --group examples examples/dask_scan.py [FILE] [--workers N] [--scheduler ADDRESS]

Where one machine is not enough: the regions of a file that all workers can open are scanned by
coroutines on the workers' own event loops. Dask's worker talks to its scheduler on that loop (its
heartbeats, its data transfers). A scan that froze it would look like a dead worker; here pages come
in beside it. Counts how often each byte value occurs, and finds the most frequent words, and
compares with a plain loop over the file.

Without ``--scheduler`` a local cluster of processes is started.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distributed import Client, LocalCluster, Worker, WorkerPlugin, as_completed, get_worker

from aiommap import AsyncMmap

REGION = 4 << 20
PIECE = 64 << 10  # counted at once: a loop in C keeps the interpreter until it is done
LONGEST_WORD = 64
WORD = re.compile(rb"[A-Za-z_]{4,%d}" % LONGEST_WORD)


class Map(WorkerPlugin):  # type: ignore[misc]
    """Opens a worker's map when the worker starts, and closes it when it ends."""

    def __init__(self, path: str) -> None:
        self.name = f"map of {path}"
        self.path = path

    async def setup(self, worker: Worker) -> None:
        self.map = await AsyncMmap.open_path(self.path)

    async def teardown(self, worker: Worker) -> None:
        await self.map.aclose()


async def scan(name: str, start: int, stop: int) -> tuple[Counter[int], Counter[bytes], float]:
    """What a region has, and the longest time for which the worker's event loop stood still."""
    m: AsyncMmap = get_worker().plugins[name].map
    values: Counter[int] = Counter()
    words: Counter[bytes] = Counter()
    gap = 0.0

    async def heartbeat() -> None:
        nonlocal gap
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            gap = max(gap, now - last)
            last = now

    beat = asyncio.ensure_future(heartbeat())
    try:
        # A word belongs to the region that it begins in; look a little back and ahead.
        first, last = max(start - 1, 0), min(stop + LONGEST_WORD, len(m))
        async with m.view(first, last - first) as view:
            # Counting takes the interpreter: in a thread it shares it with the loop.
            values, words = await asyncio.to_thread(count, view.buffer, start - first, stop - first)
    finally:
        beat.cancel()
    return values, words, gap


def count(memory: memoryview, start: int, stop: int) -> tuple[Counter[int], Counter[bytes]]:
    """Byte values of ``[start, stop)``, and the words that begin there."""
    values: Counter[int] = Counter()
    for offset in range(start, stop, PIECE):
        values.update(memory[offset : min(offset + PIECE, stop)].tobytes())
    words: Counter[bytes] = Counter()
    for match in WORD.finditer(memory):
        if start <= match.start() < stop:
            words[match[0]] += 1
    return values, words


def regions(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, REGION):
        yield start, min(start + REGION, size)


def scan_file(client: Client, path: Path) -> tuple[Counter[int], Counter[bytes], float]:
    """Scan all regions on the cluster."""
    plugin = Map(str(path))
    client.register_plugin(plugin)
    futures = [
        client.submit(scan, plugin.name, start, stop, pure=False)
        for start, stop in regions(path.stat().st_size)
    ]
    values: Counter[int] = Counter()
    words: Counter[bytes] = Counter()
    gap = 0.0
    for future in as_completed(futures):
        some_values, some_words, worst = future.result()
        values += some_values
        words += some_words
        gap = max(gap, worst)
    client.unregister_worker_plugin(plugin.name)
    return values, words, gap


def large_file_of_python() -> Path:
    """The interpreter's library, or the interpreter itself."""
    library = Path(sysconfig.get_config_var("LIBDIR") or ".") / str(
        sysconfig.get_config_var("LDLIBRARY")
    )
    return library if library.is_file() else Path(sys.executable).resolve()


def positive(text: str) -> int:
    """A type of argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, default=large_file_of_python())
    parser.add_argument("--workers", type=positive, default=2)
    parser.add_argument("--scheduler", help="address of a running cluster")
    options = parser.parse_args()
    path = options.file.resolve()
    if not path.is_file() or path.stat().st_size == 0:
        parser.error(f"{path} is not a file with content")

    started = time.perf_counter()
    keywords: dict[str, Any] = {"n_workers": options.workers, "threads_per_worker": 1}
    if options.scheduler:
        with Client(options.scheduler) as client:
            values, words, gap = scan_file(client, path)
    else:
        with (
            LocalCluster(processes=True, dashboard_address=":0", **keywords) as cluster,
            Client(cluster) as client,
        ):
            values, words, gap = scan_file(client, path)
    took = time.perf_counter() - started

    plain = Counter(path.read_bytes())
    if values != plain:
        sys.exit("the counts differ from those of a plain loop")
    print(
        f"{path}: {values.total()} bytes, counted right, in {took:.1f} s with the cluster's start"
    )
    print("most frequent words:", ", ".join(f"{w.decode()} {n}" for w, n in words.most_common(5)))
    print(f"a worker's event loop stood still for at most {gap * 1000:.1f} ms")


if __name__ == "__main__":
    main()
