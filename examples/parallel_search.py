"""Search a large file with many tasks; matches come in order while the search goes on.

    uv run examples/parallel_search.py PATTERN [FILE] [--regex] [--tasks N] [--backend NAME]

Without FILE it searches a large file of the Python installation. PATTERN is text, or with
``--regex`` a regular expression for bytes; one match is found across at most ``--longest``
bytes. Prints the place of each match with what stands around it. The bar goes to stderr, so
the output can be piped. Exit code 1 if nothing was found, as grep has it.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import anyio
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from aiommap import AsyncMmap

PIECE = 4 << 20
CONTEXT = 24
PRINTABLE = bytes(each if 32 <= each < 127 else ord(".") for each in range(256))


@dataclass(frozen=True)
class Match:
    """Bytes ``[start, stop)`` of the file, and what stands around them."""

    start: int
    stop: int
    around: bytes


class InOrder:
    """Lets numbered results through in the order of their numbers, each as soon as it can go."""

    def __init__(self, show: Callable[[Match], None]) -> None:
        self._show = show
        self._next = 0
        self._early: dict[int, list[Match]] = {}
        self._end = 0

    def add(self, number: int, matches: list[Match]) -> None:
        self._early[number] = matches
        while self._next in self._early:
            for match in self._early.pop(self._next):
                if match.start >= self._end:  # else a part of one that began a piece earlier
                    self._end = match.stop
                    self._show(match)
            self._next += 1


Spans = list[tuple[int, int]]


async def literal(m: AsyncMmap, needle: bytes, start: int, stop: int) -> Spans:
    """Matches that begin in ``[start, stop)``. Off the loop, without the interpreter lock."""
    found = []
    end = min(stop + len(needle) - 1, len(m))
    while (place := await m.find(needle, start, end)) >= 0:
        start = place + len(needle)
        found.append((place, start))
    return found


async def expression(
    m: AsyncMmap, pattern: re.Pattern[bytes], longest: int, start: int, stop: int
) -> Spans:
    """Matches that begin in ``[start, stop)``. In a thread, on the memory of a view."""
    end = min(stop + longest, len(m))

    def search(memory: memoryview) -> Spans:
        return [(start + each.start(), start + each.end()) for each in pattern.finditer(memory)]

    async with m.view(start, end - start) as view:
        spans = await anyio.to_thread.run_sync(search, view.buffer)
    return [span for span in spans if span[0] < stop]


async def search(
    path: Path,
    pattern: bytes,
    compiled: re.Pattern[bytes] | None,
    options: argparse.Namespace,
    console: Console,
) -> int:
    """Print all matches; how many there are."""
    count = 0

    def show(match: Match) -> None:
        nonlocal count
        count += 1
        print(match.start, match.around.translate(PRINTABLE).decode(), sep="\t")

    async with AsyncMmap.open_path(path) as m:
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
        results = InOrder(show)
        pieces: Iterator[int] = iter(range(0, len(m), PIECE))
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=len(m))

            async def searcher() -> None:
                for start in pieces:  # one iterator for all: each takes the next piece
                    stop = min(start + PIECE, len(m))
                    if compiled is None:
                        spans = await literal(m, pattern, start, stop)
                    else:
                        spans = await expression(m, compiled, options.longest, start, stop)
                    matches = []
                    for place, end in spans:
                        first = max(place - CONTEXT, 0)
                        size = min(place + 2 * CONTEXT, len(m)) - first
                        matches.append(Match(place, end, await m.read_at(first, size)))
                    results.add(start // PIECE, matches)
                    progress.advance(bar, stop - start)

            async with anyio.create_task_group() as tasks:
                for _ in range(options.tasks):
                    tasks.start_soon(searcher)
    return count


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
    parser.add_argument("pattern", help="what to search for")
    parser.add_argument("file", nargs="?", type=Path, help="where")
    parser.add_argument("--regex", action="store_true", help="PATTERN is a regular expression")
    parser.add_argument("--longest", type=positive, default=4096, help="bytes a match may have")
    parser.add_argument("--tasks", type=positive, default=8)
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio")
    options = parser.parse_args()
    if not options.pattern:
        parser.error("the pattern is empty")
    pattern = os.fsencode(options.pattern)  # the bytes that were typed, whatever they are
    try:
        compiled = re.compile(pattern) if options.regex else None
    except re.error as error:
        parser.error(f"not a regular expression for bytes: {error}")
    path = options.file or large_file_of_python()
    if not path.is_file() or path.stat().st_size == 0:
        parser.error(f"{path} is not a file with content")
    console = Console(stderr=True)
    count = anyio.run(search, path, pattern, compiled, options, console, backend=options.backend)
    console.print(f"{count} matches in {path}", markup=False, soft_wrap=True)
    sys.exit(0 if count else 1)


if __name__ == "__main__":
    main()
