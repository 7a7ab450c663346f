"""Where bytes occur in a mapping: in a worker, without the GIL, and safe from bad storage."""

from __future__ import annotations

import mmap
from collections import deque
from contextlib import suppress

from ._errors import TruncatedError
from ._kernel import Scratch
from ._mapping import Mapping
from ._ranges import pieces

_WINDOW = 4 << 20
"""
What is read and searched with one call each. Larger ones leave the cache between the two (8 MiB: a
fifth slower); below 2 MiB the GIL, which has to be had back after each call, costs more than that
gains, and where the loop is busy sooner.
"""

_idle: deque[bytearray] = deque(maxlen=2)
"""
Windows that were used, for the next search: fresh pages would cost half of what searching them
does. As many as the threads that one map's search keeps busy, 8 MiB in all; more are freed.
"""


def search(mapping: Mapping, offset: int, length: int, needle: bytes, *, last: bool) -> int:
    """
    Where the needle first, or last, occurs inside the range, from the range; or -1.

    :raises OSError: see :meth:`Mapping.read_into`; only if it is not found before that place
    """
    if length < len(needle):
        return -1
    window = min(max(_WINDOW, 2 * len(needle)), length)
    step = window - len(needle) + 1
    scratch = _scratch(window)
    try:
        starts = range(0, length - len(needle) + 1, step)
        for start in reversed(starts) if last else starts:
            count = min(window, length - start)
            first = offset + start
            try:
                mapping.read_into(first, memoryview(scratch)[:count])
            except OSError as error:
                # It may be on this side of what cannot be read.
                if last:
                    found = _search_end(mapping, first, count, needle, scratch)
                else:
                    found = _search_beginning(mapping, first, count, needle, scratch)
                if found < 0:
                    raise error from None
            else:
                found = mapping.kernel.search(scratch, count, needle, last=last)
            if found >= 0:
                return start + found
        return -1
    finally:
        if isinstance(scratch, bytearray):
            _idle.append(scratch)


def _scratch(size: int) -> Scratch:
    if size > _WINDOW:  # for a long needle
        return mmap.mmap(-1, size)
    try:
        scratch = _idle.pop()
    except IndexError:
        scratch = bytearray()
    return scratch if len(scratch) >= size else bytearray(size)


def _search_beginning(
    mapping: Mapping, offset: int, length: int, needle: bytes, scratch: Scratch
) -> int:
    """The first place in the bytes before the first that cannot be read."""
    memory = memoryview(scratch)
    done = 0
    try:
        for piece, count in _pages(mapping, offset, length):
            mapping.read_into(piece, memory[done : done + count])
            done += count
    except TruncatedError as exc:
        rest = exc.size - offset - done
        if rest > 0:  # the file ends inside of the page
            with suppress(OSError):  # cut once more
                mapping.read_into(offset + done, memory[done : done + rest])
                done += rest
    except OSError:
        pass  # the caller has one to raise
    memory.release()
    return mapping.kernel.search(scratch, done, needle, last=False)


def _search_end(mapping: Mapping, offset: int, length: int, needle: bytes, scratch: Scratch) -> int:
    """The last place in the bytes behind the last that cannot be read."""
    memory = memoryview(scratch)
    done = length
    try:
        for piece, count in reversed(_pages(mapping, offset, length)):
            mapping.read_into(piece, memory[done - count : done])
            done -= count
    except OSError:
        pass  # as above
    memory.release()
    rest = bytearray(scratch[done:length])
    found = mapping.kernel.search(rest, len(rest), needle, last=True)
    return found if found < 0 else done + found


def _pages(mapping: Mapping, offset: int, length: int) -> list[tuple[int, int]]:
    """A range of the map, cut where pages of the file begin."""
    parts = pieces(mapping.offset + offset, length, mapping.kernel.page_size)
    return [(start - mapping.offset, count) for start, count in parts]
