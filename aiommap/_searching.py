"""Search in a map, off the loop and piece by piece."""

from __future__ import annotations

from typing import SupportsIndex

from . import _buffers
from ._open_map import OpenMap
from ._ranges import as_int
from ._typing import Buffer


async def find(
    core: OpenMap,
    needle: Buffer,
    start: SupportsIndex,
    end: SupportsIndex | None,
    *,
    last: bool,
) -> int:
    """The first or last place of the needle in ``[start, end)``, or -1; see ``bytes.find``."""
    wanted = bytes(_buffers.readable(needle, "needle"))
    first, stop = _bounds(start, end, core.mapping.length)
    await core.loop.checkpoint()
    if stop - first < len(wanted):
        return -1
    if not wanted:
        return stop if last else first
    while stop - first >= len(wanted):
        # Pieces overlap by all but one byte of the needle, so that no place is missed and
        # none is looked at twice.
        count = min(core.pager.piece + len(wanted) - 1, stop - first)
        piece = stop - count if last else first
        claim = await core.lock.acquire(piece, piece + count, False)
        try:
            mapping = core.still_inside(piece, count)
            found = await core.pager.search(mapping, piece, count, wanted, last=last)
        finally:
            core.lock.release(claim)
        if found >= 0:
            return piece + found
        if last:
            stop = piece + len(wanted) - 1
        else:
            first = piece + count - len(wanted) + 1
    return -1


def _bounds(start: SupportsIndex, end: SupportsIndex | None, size: int) -> tuple[int, int]:
    """As ``bytes.find`` takes them: negative from the end, and cut to the size at the end."""
    first = as_int(start, "start")
    stop = size if end is None else as_int(end, "end")
    if stop < 0:
        stop = max(stop + size, 0)
    if first < 0:
        first = max(first + size, 0)
    return first, min(stop, size)
