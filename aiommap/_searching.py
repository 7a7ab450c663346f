"""Search in a map, off the loop, piece by piece and a few pieces at a time."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import SupportsIndex

from anyio import WouldBlock

from . import _buffers
from ._errors import DeadlockError, Range
from ._mapped_memory import INLINE
from ._open_map import OpenMap
from ._pager import AT_ONCE
from ._paging_crew import Access
from ._ranges import as_int
from ._typing import Buffer
from ._wait_graph import Claim


async def find(
    core: OpenMap,
    needle: Buffer,
    start: SupportsIndex,
    end: SupportsIndex | None,
    *,
    last: bool,
) -> int:
    """The first or last place of the needle in ``[start, end)``, or -1; see ``bytes.find``."""
    first, stop = _bounds(start, end, core.mapping.length)
    given = _buffers.readable(needle, "needle")
    try:
        if _buffers.is_plain(given) and len(given) <= INLINE:
            wanted = bytes(given)
        else:
            wanted = await core.run(partial(core.mapping.copied, given))
    finally:
        del given  # the caller may resize its buffer meanwhile, and who keeps an error
    await core.loop.checkpoint()
    if stop - first < len(wanted):
        return -1
    if not wanted:
        return stop if last else first
    return await _Search(core, wanted, first, stop, last).run()


class _Search:
    """
    Pieces in order, each held shared while it is searched.

    A piece is of places where the needle may begin, and what is searched are all bytes of a needle
    that begins there: no place is missed and none is looked at twice. It never waits for a piece of
    the map while it holds another one, so it cannot be part of a deadlock.
    """

    def __init__(self, core: OpenMap, needle: bytes, first: int, stop: int, last: bool) -> None:
        self._core = core
        self._needle = needle
        self._last = last
        self._overlap = len(needle) - 1
        self._pieces = core.pager.pieces_to_search(
            first, stop - first - self._overlap, least=len(needle), last=last
        )
        self._under_way: deque[tuple[int, Claim, Access[int]]] = deque()

    async def run(self) -> int:
        try:
            piece = next(self._pieces, None)
            while piece is not None or self._under_way:
                if piece is not None and await self._begin(*piece):
                    piece = next(self._pieces, None)
                    continue
                found = await self._take_first()
                if found >= 0:
                    self._leave(None)
                    return found
            return -1
        except BaseException as error:
            self._leave(type(error))
            raise

    def _leave(self, reason: type[BaseException] | None) -> None:
        self._pieces.close()  # now, whoever keeps the error, and with it this object
        while self._under_way:
            _, claim, request = self._under_way.pop()
            self._core.pager.abandon(request)
            self._core.lock.leave(claim, reason)

    async def _begin(self, places: range, ahead: Range) -> bool:
        """Begin with a piece, unless others are under way and have to be waited for first."""
        core = self._core
        start = places.start
        stop = places.stop + self._overlap
        if not self._under_way:
            claim = await core.lock.acquire(start, stop, False)
        elif len(self._under_way) == AT_ONCE:
            return False
        else:
            try:
                claim = core.lock.acquire_nowait(start, stop, False)
            except (WouldBlock, DeadlockError):
                return False  # once nothing else is held, it waits for it, or raises
        try:
            mapping = core.still_inside(start, stop - start)
            offset, length = ahead
            ahead = offset, length + self._overlap if length else 0
            request = core.pager.search_soon(
                mapping, start, stop - start, self._needle, ahead, last=self._last
            )
        except BaseException:
            core.lock.release(claim)
            raise
        self._under_way.append((start, claim, request))
        return True

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
