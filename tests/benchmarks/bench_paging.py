"""The pager beside its peers: ``uv run --group bench python -m tests.benchmarks.bench_paging``.

Prints what was measured, and the ratios that the pager must show, with a verdict each. Needs
Linux, root for the slow disk, a real disk with 1 GiB free, and takes some minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from rich.console import Console
from rich.table import Table

from . import paging_scenarios as scenarios
from .paging_contenders import (
    AIOFILE,
    AIOFILES,
    ANYIO_FILE,
    LOCK_SLICE,
    READ_AT,
    SLICE,
    THREAD_PREAD,
    THREAD_SLICE,
    VIEW,
)
from .paging_scenarios import Figures, Run

LOOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


@dataclass(frozen=True)
class Promise:
    """A ratio, or a figure, that has a bound."""

    text: str
    value: Callable[[Figures, str], float | None]
    bound: float
    at_least: bool

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def _ratio(
    scenario: str, row: str, other: str, column: str = "{}"
) -> Callable[[Figures, str], float | None]:
    def value(figures: Figures, loop: str) -> float | None:
        ours = figures.get(scenario, row, column.format(loop))
        theirs = figures.get(scenario, other, column.format(loop))
        return None if ours is None or not theirs else ours / theirs

    return value


def _speed_up(
    scenario: str, row: str, other: str, column: str = "{}"
) -> Callable[[Figures, str], float | None]:
    """How many times as fast, where the figures are times."""
    return _ratio(scenario, other, row, column)


def _figure(scenario: str, row: str, column: str = "{}") -> Callable[[Figures, str], float | None]:
    return lambda figures, loop: figures.get(scenario, row, column.format(loop))


PROMISES = (
    Promise(
        "hot read_at / (slice + checkpoint)", _ratio(scenarios.HOT, READ_AT, SLICE), 1.5, False
    ),
    Promise("hot view / (Lock + slice)", _ratio(scenarios.HOT, VIEW, LOCK_SLICE), 1.3, False),
    Promise("aiofiles / hot read_at", _speed_up(scenarios.HOT, READ_AT, AIOFILES), 20, True),
    Promise(
        "anyio.open_file / hot read_at", _speed_up(scenarios.HOT, READ_AT, ANYIO_FILE), 20, True
    ),
    Promise(
        "to_thread(os.pread) / hot read_at",
        _speed_up(scenarios.HOT, READ_AT, THREAD_PREAD),
        15,
        True,
    ),
    Promise(
        "cold reads, 256 tasks: / aiofiles",
        _ratio(scenarios.COLD, READ_AT, AIOFILES, "{} 256"),
        4,
        True,
    ),
    Promise(
        "cold reads, 256 tasks: / aiofile (caio)",
        _ratio(scenarios.COLD, READ_AT, AIOFILE, "{} 256"),
        1,
        True,
    ),
    Promise(
        "20 ms disk: views / slices in threads",
        _ratio(scenarios.SLOW, VIEW, THREAD_SLICE),
        40,
        True,
    ),
    Promise("20 ms disk: longest gap, ms", _figure(scenarios.SLOW_GAP, VIEW), 10, False),
    Promise(
        "windows() / plain loop, warm",
        _ratio(scenarios.SCAN, "aiommap windows()", "plain loop", "{} warm"),
        0.95,
        True,
    ),
    Promise(
        "windows(4 MiB) / plain loop, warm",
        _ratio(scenarios.SCAN, "aiommap windows(4 MiB)", "plain loop", "{} warm"),
        0.95,
        True,
    ),
    Promise(
        "windows() / plain loop, cold",
        _ratio(scenarios.SCAN, "aiommap windows()", "plain loop", "{} cold"),
        1,
        True,
    ),
    Promise("find / mmap.find", _ratio(scenarios.FIND, "aiommap find", "mmap.find"), 2, True),
    Promise("find: longest gap, ms", _figure(scenarios.FIND_GAP, "aiommap find"), 10, False),
    Promise(
        "cancelled load: out after, ms",
        _figure(scenarios.CANCEL, "out after, ms from the cancellation"),
        500,
        False,
    ),
    Promise("major faults of the loop, view", _figure(scenarios.FAULTS, VIEW), 0, False),
    Promise("major faults of the loop, read_at", _figure(scenarios.FAULTS, READ_AT), 0, False),
    Promise("control: slices on the loop", _figure(scenarios.FAULTS, SLICE), 1, True),
)


def _tables(figures: Figures) -> Iterable[Table]:
    for scenario, rows in figures.values.items():
        columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
        table = Table(title=scenario, title_justify="left")
        table.add_column("")
        for column in columns:
            table.add_column(column, justify="right")
        for row, cells in rows.items():
            table.add_row(row, *(_number(cells.get(column)) for column in columns))
        yield table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _verdicts(figures: Figures, loops: list[str]) -> Table:
    table = Table(title="What it must show", title_justify="left")
    table.add_column("")
    table.add_column("bound", justify="right")
    for loop in loops:
        table.add_column(loop, justify="right")
    for promise in PROMISES:
        cells = []
        for loop in loops:
            value = promise.value(figures, loop)
            if value is None:
                cells.append("-")
            else:
                mark = "[green]" if promise.holds(value) else "[bold red]NOT "
                cells.append(f"{mark}{_number(value)}[/]")
        sign = "at least" if promise.at_least else "at most"
        table.add_row(promise.text, f"{sign} {promise.bound:g}", *cells)
    return table


def plot(figures: Figures, loops: list[str], path: Path) -> None:
    """The figures of the first loop as bars and lines."""
    import matplotlib  # type: ignore[import-not-found, unused-ignore]

    matplotlib.use("svg")
    import matplotlib.pyplot as plt  # type: ignore[import-not-found, unused-ignore]

    loop = loops[0]
    figure, places = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    figure.suptitle(f"aiommap beside its peers ({loop})")
    _bars(places[0][0], figures, scenarios.HOT, loop, log=True)
    lines = places[0][1]
    for row, cells in figures.values.get(scenarios.COLD, {}).items():
        points = [(n, cells[f"{loop} {n}"]) for n in scenarios.TASKS if f"{loop} {n}" in cells]
        width = 2.5 if row.startswith("aiommap") else 1.2
        lines.plot(*zip(*points, strict=True), marker="o", label=row, linewidth=width)
    lines.set_xscale("log", base=2)
    lines.set_xlabel("tasks")
    lines.set_title(scenarios.COLD, fontsize=10)
    lines.set_ylim(bottom=0)
    lines.legend(fontsize=8)
    _bars(places[1][0], figures, scenarios.SLOW_GAP, loop, log=True)
    _bars(places[1][1], figures, scenarios.SLOW, loop, log=True)
    figure.savefig(path)


def _bars(place: Any, figures: Figures, scenario: str, column: str, *, log: bool) -> None:
    rows = {
        row: cells[column]
        for row, cells in figures.values.get(scenario, {}).items()
        if column in cells
    }
    colours = ["C0" if row.startswith("aiommap") else "0.6" for row in rows]
    bars = place.barh(list(rows), list(rows.values()), color=colours, log=log)
    place.bar_label(bars, labels=[_number(value) for value in rows.values()], padding=3)
    place.invert_yaxis()
    place.margins(x=0.2)
    place.set_title(scenario, fontsize=10)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loops", default=",".join(LOOPS), help="of: " + ", ".join(LOOPS))
    names = ",".join(scenarios.SCENARIOS)
    parser.add_argument("--only", default=names, help=f"of: {names}")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--size", type=int, default=1024, help="MiB of the file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="fewer reads; noisier")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--json", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    loops = options.loops.split(",")
    console = Console(width=140)
    path = scenarios.make_file(options.directory, options.size << 20)
    figures = Figures()
    for loop in loops:
        backend, backend_options = LOOPS[loop]
        run = Run(figures, loop, path, options.size << 20, options.rounds, options.quick)
        anyio.run(
            scenarios.run_scenarios,
            run,
            options.only.split(","),
            lambda text: console.print(f"[dim]{text}"),
            backend=backend,
            backend_options=backend_options,
        )
    for table in _tables(figures):
        console.print(table)
    console.print(_verdicts(figures, loops))
    if options.json:
        options.json.write_text(json.dumps(figures.values, indent=1))
    if options.plot:
        plot(figures, loops, options.plot)
    return 0


if __name__ == "__main__":
    assert asyncio  # uvloop's backend option imports it late
    sys.exit(main())
