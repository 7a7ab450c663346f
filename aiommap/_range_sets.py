"""Small sets of ranges: lists of ``(start, stop)`` pairs, ``start < stop``, any integers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

Range = tuple[int, int]


def clip(ranges: Iterable[Range], start: int, stop: int) -> list[Range]:
    """What the ranges have in common with ``[start, stop)``, range by range."""
    return [
        (max(start, low), min(stop, high))
        for low, high in ranges
        if max(start, low) < min(stop, high)
    ]


def outside(start: int, stop: int, ranges: Iterable[Range]) -> list[Range]:
    """What of ``[start, stop)`` none of the ranges covers, in order."""
    result = []
    for low, high in sorted(clip(ranges, start, stop)):
        if start < low:
            result.append((start, low))
        start = max(start, high)
    if start < stop:
        result.append((start, stop))
    return result


def meets(ranges: Sequence[Range], start: int, stop: int) -> bool:
    """Whether one of the ranges, sorted and apart, overlaps ``[start, stop)``."""
    place = bisect_left(ranges, (stop,))
    return start < stop and place > 0 and ranges[place - 1][1] > start


def union(ranges: Iterable[Range]) -> list[Range]:
    """What any of the ranges covers, in order; those that overlap or touch become one."""
    result: list[Range] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if result and start <= result[-1][1]:
            start, stop = result[-1][0], max(stop, result[-1][1])
            result.pop()
        result.append((start, stop))
    return result
