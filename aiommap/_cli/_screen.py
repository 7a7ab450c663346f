"""What the commands show in a terminal. The only module that needs rich."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from ._wording import counted, printable

SHADES = " ░▒▓█"
STEPS = "▁▂▃▄▅▆▇█"
PLAIN = str.maketrans(SHADES + STEPS, " .:+#" + "_.-~:+*#")  # where these cannot be shown


class Watch:
    """Progress bars on stderr, gone when the command is done."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
        )
        console = Console(stderr=True)
        self._bars = Progress(*columns, console=console, transient=True)
        self._shown = console.is_terminal
        self._bar: TaskID | None = None

    def __enter__(self) -> Self:
        if self._shown:
            self._bars.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._shown:
            self._bars.stop()

    def begin(self, name: str, total: int) -> None:
        self._bar = self._bars.add_task(printable(name), total=total)

    def advance(self, amount: int) -> None:
        assert self._bar is not None
        self._bars.advance(self._bar, amount)


def show_residency(found: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """A line of shades for each file."""
    console = Console()
    for each in found:
        size = each["size"]
        places = len(each["parts"])
        borders = [size * number // places for number in range(places + 1)]
        picture = "".join(
            shade(count, stop - start)
            for count, (start, stop) in zip(each["parts"], pairwise(borders), strict=True)
        )
        console.print(
            Text.assemble(
                *("[", (drawn(picture, console), "green"), "] "),
                *((share(each), "bold"), " ", printable(each["path"])),
            ),
            soft_wrap=True,
        )


def drawn(picture: str, console: Console) -> str:
    """A picture in characters that the terminal has."""
    try:
        picture.encode(console.encoding)
    except UnicodeEncodeError:
        return picture.translate(PLAIN)
    return picture


def shade(count: int, size: int) -> str:
    """How full a place is: empty and full mean just that."""
    if count >= size:
        return SHADES[-1]
    if count == 0:
        return SHADES[0]
    return SHADES[1 + min(3 * count // size, 2)]


def share(each: dict[str, Any]) -> str:
    """How much of a file is in memory, in words."""
    percent = 100 * each["resident"] / each["size"]
    return f"{percent:3.0f}% of {decimal(each['size'])}"


def show_load(found: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """A line for each file."""
    console = Console()
    for each in found:
        rate = decimal(int(each["size"] / max(each["seconds"], 1e-9)))
        console.print(
            Text(
                f"{printable(each['path'])}: {share(each)} in memory, "
                f"{each['seconds']:.2f} s, {rate}/s"
            ),
            soft_wrap=True,
        )


def show_evict(found: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """A line for each file."""
    console = Console()
    for each in found:
        console.print(
            Text(f"{printable(each['path'])}: {share(each)} in memory still"), soft_wrap=True
        )


MEANINGS = {
    "populate": "pages can be brought in with an error instead of SIGBUS",
    "nowait_reads": "a read that would wait for the disk can be refused",
    "cachestat": "the page cache can be counted without a map",
    "mincore": "the kernel tells which pages of a map are in memory",
    "write_back_start": "write-back can be started without waiting for it",
    "full_sync": "a flush reaches the medium and not only the disk's cache",
    "huge_pages": "huge pages can be mapped now",
    "ofd_locks": "file locks that belong to an open file",
    "reserve": "blocks can be reserved, so that a full disk is an error at once",
}


def show_info(found: dict[str, Any], options: argparse.Namespace) -> None:
    """Facts and abilities, a line each."""
    console = Console()
    table = Table(title=Text(printable(found["path"])), show_header=False, title_justify="left")
    if "size" in found:
        size = found["size"]
        table.add_row("size", f"{size} bytes ({decimal(size)})" if size > 999 else decimal(size))
        if found["allocated"] is not None:
            table.add_row("on the disk", decimal(found["allocated"]))
        if found["holes"] is not None:
            table.add_row("holes", decimal(found["holes"]))
    if "resident" in found:
        table.add_row("in memory", decimal(found["resident"]))
    table.add_row("file system", found["file_system"] or "not known")
    known = found["capabilities"]
    table.add_row("page size", f"{known['page_size']} bytes", end_section=True)
    for name, meaning in MEANINGS.items():
        answer = Text("yes", "green") if known[name] else Text("no", "red")
        table.add_row(Text(name), answer + Text(f"  {meaning}", "dim"))
    console.print(table)


def show_stall(found: dict[str, Any], options: argparse.Namespace) -> None:
    """The three side by side; a picture of the gaps in the order of time."""
    console = Console(record=options.svg is not None)
    table = Table(
        title=Text(
            f"{counted(found['reads'], 'read')} of {counted(found['bytes'], 'byte')}, "
            f"{counted(options.tasks, 'task')}, cold cache"
        ),
        caption="gaps: each place is a part of the time it took; the height is the longest gap "
        "in it, from 1 ms to the longest of all",
    )
    table.add_column("")
    table.add_column("took", justify="right")
    table.add_column("longest gap", justify="right")
    table.add_column("gaps", no_wrap=True)
    ways = found["ways"]
    longest = max(each["longest_gap"] for each in ways.values())
    for name, each in ways.items():
        table.add_row(
            name,
            f"{each['seconds'] * 1000:.0f} ms",
            Text(f"{each['longest_gap'] * 1000:.1f} ms", "bold"),
            Text(
                drawn(heights(each["gaps"], longest), console),
                "red" if each is not ways["aiommap"] else "green",
            ),
        )
    console.print(table)
    if options.svg is not None:
        console.save_svg(options.svg, title=f"aiommap stall {printable(found['path'])}")


def heights(gaps: Sequence[float], longest: float, places: int = 28) -> str:
    """The gaps in so many parts of the time, the longest of each, on a logarithmic scale."""
    worst = [0.0] * places
    total = sum(gaps)
    passed = 0.0
    for gap in gaps:
        first = min(int(places * passed / total), places - 1)
        passed += gap
        last = min(int(places * passed / total), places - 1)
        for place in range(first, last + 1):
            worst[place] = max(worst[place], gap)
    return "".join(STEPS[level(gap, longest)] for gap in worst)


def level(gap: float, longest: float, least: float = 0.001) -> int:
    """From 0 for a millisecond to 7 for the longest."""
    if gap <= least or longest <= least:
        return 0
    return min(int(8 * math.log(gap / least) / math.log(longest / least)), 7)
