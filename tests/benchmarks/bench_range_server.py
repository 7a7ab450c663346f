"""Three range servers under a cold cache: ``examples/range_server.py`` on a slow disk.

    uv run --group bench --group examples python -m tests.benchmarks.bench_range_server [--svg FILE]

Each server runs in a process of its own, and so does the load: 64 connections ask for ranges of
4 KiB, each at a place that nobody has read before, on a disk that takes 20 ms for a request. Needs
Linux and root. Ends with 1 if the map's 99th percentile is not the best of the three.
"""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError("Linux only")

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from tests.rigs.slow_file import slow_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "range_server.py"
LABELS = {"aiommap": "aiommap", "file": "Starlette's FileResponse", "plain": "plain mmap"}
LATENCY = 0.02  # seconds a request of the disk takes

Figures = dict[str, dict[str, Any]]


def measure(how: str, clients: int, requests: int, rounds: int) -> dict[str, Any]:
    """The best of several rounds, by the 99th percentile; each on a cold cache."""
    found = []
    for seed in range(rounds):
        with slow_file(64 << 20, read=LATENCY, max_readahead=0) as file:
            serve = [sys.executable, str(EXAMPLE), "serve", str(file.path), "--how", how]
            with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
                try:
                    assert server.stdout is not None
                    url = server.stdout.readline().strip()
                    file.evict()
                    load = [sys.executable, str(EXAMPLE), "load", url, "--json"]
                    load += ["--clients", str(clients), "--requests", str(requests)]
                    load += ["--seed", str(seed)]
                    output = subprocess.run(load, check=True, stdout=subprocess.PIPE).stdout
                    found.append(json.loads(output))
                finally:
                    server.kill()
    best: dict[str, Any] = min(found, key=lambda figures: figures["p99"])
    return best


def draw(figures: Figures, clients: int, target: Path) -> None:
    """The figures as bars, on a logarithmic scale."""
    from matplotlib import pyplot

    columns = {"p50": "half of the answers", "p99": "99 of 100", "longest": "the slowest"}
    pyplot.rcParams["svg.fonttype"] = "none"
    pyplot.rcParams["svg.hashsalt"] = "aiommap"
    chart, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    for number, (how, each) in enumerate(figures.items()):
        values = [each[column] * 1000 for column in columns]
        places = [place + (number - 1) * 0.27 for place in range(len(columns))]
        bars = axes.bar(places, values, 0.25, label=LABELS[how])
        axes.bar_label(bars, [f"{value:.0f}" for value in values], fontsize=8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(columns)), list(columns.values()))
    axes.set_ylabel("milliseconds")
    axes.set_title(
        f"{clients} clients, 4 KiB each from a cold cache, {LATENCY * 1000:.0f} ms disk",
        fontsize=10,
    )
    chart.legend(fontsize=8, loc="outside lower center", ncols=3)
    axes.margins(y=0.2)
    chart.savefig(target, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--svg", type=Path, help="draw the figures into this file")
    options = parser.parse_args()
    figures: Figures = {}
    for how, label in LABELS.items():
        # The plain map serves one page after another; a tenth of the load is enough to see it.
        requests = options.requests // 10 if how == "plain" else options.requests
        each = figures[how] = measure(how, options.clients, requests, options.rounds)
        print(
            f"{label:>26}: p50 {each['p50'] * 1000:7.1f} ms, p99 {each['p99'] * 1000:7.1f} ms, max "
            f"{each['longest'] * 1000:7.1f} ms, {each['answers'] / each['seconds']:6.0f} answers/s"
        )
    if options.svg:
        draw(figures, options.clients, options.svg)
    best = min(figures, key=lambda how: float(figures[how]["p99"]))
    print(f"best 99th percentile: {LABELS[best]}")
    sys.exit(best != "aiommap")


if __name__ == "__main__":
    main()
