"""Pinned ranges: which pages are to stay in memory, and how often that was asked for.

The kernel's ``mlock`` does not nest: one ``munlock`` undoes any number of them. So the counts
are kept here, by page, as runs: ``{first page: (count of pages, how often)}`` would have to be
cut at every change; instead the places where the count changes are kept, sorted.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from contextlib import suppress
from functools import partial

import anyio

from . import _workers
from ._errors import TruncatedError
from ._mapping import Mapping
from ._open_map import OpenMap

Run = tuple[int, int]

_TRIES = 5  # of a pin that says ENOMEM; out of the air


class PinCounts:
    """
    How often each page is pinned. Pure.

    ``_starts[i]`` is where a run of pages begins whose count is ``_counts[i]``; the last run
    has no end and count 0. Costs O(runs) a change.
    """

    def __init__(self) -> None:
        self._starts = [0]
        self._counts = [0]

    def _cut(self, page: int) -> int:
        index = bisect_left(self._starts, page)
        if index == len(self._starts) or self._starts[index] != page:
            self._starts.insert(index, page)
            self._counts.insert(index, self._counts[index - 1])
        return index

    def _runs(self, first: int, stop: int, count: int) -> list[Run]:
        """The runs inside ``[first, stop)`` whose count is ``count``, as (page, pages)."""
        result: list[Run] = []
        index = bisect_right(self._starts, first) - 1
        while index < len(self._starts) and self._starts[index] < stop:
            start = max(self._starts[index], first)
            end = self._starts[index + 1] if index + 1 < len(self._starts) else stop
            if self._counts[index] == count and min(end, stop) > start:
                result.append((start, min(end, stop) - start))
            index += 1
        return result

    def unpinned(self, first: int, stop: int) -> list[Run]:
        """Runs that are not pinned: what a pin has to tell the kernel."""
        return self._runs(first, stop, 0)

    def pinned_once(self, first: int, stop: int) -> list[Run]:
        """Runs that are pinned once: what an unpin has to tell the kernel."""
        return self._runs(first, stop, 1)

    def add(self, first: int, stop: int, by: int) -> None:
        """Count the pages up or down. O(runs), with a small constant."""
        if first == stop:
            return
        low = self._cut(first)
        high = self._cut(stop)
        for index in range(low, high):
            self._counts[index] += by
        for index in (high, low):  # between them, all differ by what they differed by before
            if index and self._counts[index] == self._counts[index - 1]:
                del self._starts[index], self._counts[index]

    def _check(self) -> None:
        assert self._starts[0] == 0
        assert self._starts == sorted(set(self._starts))
        assert self._counts[-1] == 0
        assert all(count >= 0 for count in self._counts)
        assert all(a != b for a, b in zip(self._counts, self._counts[1:], strict=False))


class Pins:
    """The pins of one mapping; they end with it."""

    def __init__(self) -> None:
        self._counts = PinCounts()
        self._turn = anyio.Lock()  # a change is counted before the next one looks

    @_workers.forgetful
    async def pin(self, core: OpenMap, mapping: Mapping, offset: int, length: int) -> None:
        first, stop = mapping.page_numbers(offset, length)
        async with self._turn:
            runs = self._counts.unpinned(first, stop)
            try:
                await core.run(partial(_pin_runs, mapping, offset, length, runs))
            except TruncatedError:
                raise
            except OSError as exc:
                raise _with_limit(exc, mapping, length) from exc
            except GeneratorExit:
                raise
            except BaseException:
                # Cancelled; the worker may have pinned all the same.
                await _workers.finish(partial(_unpin_runs, mapping, runs))
                raise
            self._counts.add(first, stop, 1)

    @_workers.forgetful
    async def unpin(self, core: OpenMap, mapping: Mapping, offset: int, length: int) -> None:
        first, stop = mapping.page_numbers(offset, length)
        async with self._turn:
            if self._counts.unpinned(first, stop):
                raise ValueError(
                    f"offset {offset} and length {length} are not all pinned: unpin what was "
                    f"pinned, as often as it was"
                )
            runs = self._counts.pinned_once(first, stop)
            self._counts.add(first, stop, -1)
            # Counted down is undone in the kernel too, cancelled or not.
            await _workers.finish(partial(_unpin_runs, mapping, runs))


def _pin_runs(mapping: Mapping, offset: int, length: int, runs: list[Run]) -> None:
    tries = _TRIES
    while True:
        mapping.check_reach(offset, length)
        tried: list[Run] = []
        try:
            for run in runs:
                tried.append(run)
                mapping.pin_pages(*run)
            return
        except OSError as exc:
            # The one that failed too: where Linux cannot bring a page in, the run counts as
            # locked all the same.
            for run in tried:
                with suppress(OSError):
                    mapping.unpin_pages(*run)
            # For a page that is missing it says no more than ENOMEM, and by now the file may have
            # been cut and grown again.
            tries -= 1
            if not tries or exc.errno != errno.ENOMEM:
                mapping.check_reach(offset, length)
                raise


def _unpin_runs(mapping: Mapping, runs: list[Run]) -> None:
    for run in runs:
        mapping.unpin_pages(*run)


def _with_limit(error: OSError, mapping: Mapping, length: int) -> OSError:
    if error.errno not in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):
        error.filename = error.filename or mapping.filename
        return error
    limit = mapping.kernel.pin_limit()
    allowed = "without limit" if limit is None else f"up to {limit} bytes (RLIMIT_MEMLOCK)"
    return OSError(
        error.errno,
        f"cannot pin {length} bytes: this process may pin {allowed} in all",
        mapping.filename,
    )
