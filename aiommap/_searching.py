"""Search in a map, off the loop, piece by piece and a few pieces at a time."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import SupportsIndex

from anyio import WouldBlock

from . import _buffers
from ._errors import DeadlockError
from ._mapped_memory import INLINE
from ._open_map import OpenMap
from ._pager import THREADS, Access
from ._ranges import as_int
from ._typing import Buffer
from ._wait_graph import Claim

_AT_ONCE = THREADS + 1
"""Pieces under way: two are searched, and one is next while a result is handed back."""


async def find(
    core: OpenMap,
    needle: Buffer,
    start: SupportsIndex,
    end: SupportsIndex | None,
    *,
    last: bool,
) -> int:
    """The first or last place of the needle in ``[start, end)``, or -1; see ``bytes.find``."""
    given = _buffers.readable(needle, "needle")
    first, stop = _bounds(start, end, core.mapping.length)
    if _buffers.is_plain(given) and len(given) <= INLINE:
        wanted = bytes(given)
        await core.loop.checkpoint()
    else:
        wanted = await core.run(partial(core.mapping.copied, given))
    if stop - first < len(wanted):
        return -1
    if not wanted:
        return stop if last else first
    return await _Search(core, wanted, first, stop, last).run()


class _Search:
    """
    Pieces in order, each held shared while it is searched.

    Pieces overlap by all but one byte of the needle, so that no place is missed and none is
    looked at twice. It never waits for a piece of the map while it holds another one, so it
    cannot be part of a deadlock.
    """

    def __init__(self, core: OpenMap, needle: bytes, first: int, stop: int, last: bool) -> None:
        self._core = core
        self._needle = needle
        self._first = first
        self._stop = stop
        self._last = last
        self._under_way: deque[tuple[int, Claim, Access[int]]] = deque()

    async def run(self) -> int:
        try:
            while (piece := self._next()) or self._under_way:
                if piece and not self._under_way:
                    start, stop = piece
                    self._begin(start, await self._core.lock.acquire(start, stop, False))
                elif not piece or not self._begin_if_free(*piece):
                    found = await self._take_first()
                    if found >= 0:
                        self._leave(None)
                        return found
            return -1
        except BaseException as error:
            self._leave(type(error))
            raise

    def _leave(self, reason: type[BaseException] | None) -> None:
        while self._under_way:
            _, claim, request = self._under_way.pop()
            self._core.pager.abandon(request)
            self._core.lock.leave(claim, reason)

    def _next(self) -> tuple[int, int] | None:
        rest = self._stop - self._first
        if rest < len(self._needle) or len(self._under_way) == _AT_ONCE:
            return None
        searched = self._core.pager.searched
        count = min(max(searched, len(self._needle)) + len(self._needle) - 1, rest)
        start = self._stop - count if self._last else self._first
        return start, start + count

    def _begin_if_free(self, start: int, stop: int) -> bool:
        try:
            claim = self._core.lock.acquire_nowait(start, stop, False)
        except (WouldBlock, DeadlockError):
            return False  # once nothing else is held, it waits for it, or raises
        self._begin(start, claim)
        return True

    def _begin(self, start: int, claim: Claim) -> None:
        core = self._core
        count = claim.stop - start
        try:
            mapping = core.still_inside(start, count)
            request = core.pager.search_soon(mapping, start, count, self._needle, last=self._last)
        except BaseException:
            core.lock.release(claim)
            raise
        self._under_way.append((start, claim, request))
        overlap = len(self._needle) - 1
        if self._last:
            self._stop = start + overlap
        else:
            self._first = start + count - overlap

    async def _take_first(self) -> int:
        start, claim, request = self._under_way[0]
        found = await self._core.pager.found(request)
        self._under_way.popleft()
        self._core.lock.release(claim)
        return start + found if found >= 0 else -1


def _bounds(start: SupportsIndex, end: SupportsIndex | None, size: int) -> tuple[int, int]:
    """As ``bytes.find`` takes them: negative from the end, and cut to the size at the end."""
    first = as_int(start, "start")
    stop = size if end is None else as_int(end, "end")
    if stop < 0:
        stop = max(stop + size, 0)
    if first < 0:
        first = max(first + size, 0)
    return first, min(stop, size)
