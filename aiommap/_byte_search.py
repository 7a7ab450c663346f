"""Where bytes occur in a mapping: in a worker, without the GIL, and safe from bad storage."""

from __future__ import annotations

from collections import deque

from ._mapping import Mapping

_WINDOW = 8 << 20
"""
What is read and searched with one call each. 512 KiB, which stay in the cache, were half as fast:
the GIL has to be had back after each.
"""

_CLOSER = 64 << 10

_idle: deque[bytearray] = deque(maxlen=2)
"""
Windows that were used, for the next search: fresh pages would cost half of what searching them
does. As many as the threads that one map's search keeps busy; more are freed.
"""


def search(mapping: Mapping, offset: int, length: int, needle: bytes, *, last: bool) -> int:
    """
    Where the needle first, or last, occurs inside the range, from the range; or -1.

    :raises OSError: see :meth:`Mapping.read_into`; only if it is not found before that place
    """
    try:
        return _search(mapping, offset, length, needle, last, _WINDOW)
    except OSError:
        # It may be on this side of what cannot be read: look more closely.
        return _search(mapping, offset, length, needle, last, _CLOSER)


def _search(
    mapping: Mapping, offset: int, length: int, needle: bytes, last: bool, at_once: int
) -> int:
    if length < len(needle):
        return -1
    window = min(max(at_once, 2 * len(needle)), length)
    step = window - len(needle) + 1
    try:
        scratch = _idle.pop()
    except IndexError:
        scratch = bytearray()
    if len(scratch) < window:
        scratch = bytearray(window)
    try:
        starts = range(0, length - len(needle) + 1, step)
        for start in reversed(starts) if last else starts:
            count = min(window, length - start)
            mapping.read_into(offset + start, memoryview(scratch)[:count])
            found = mapping.kernel.search(scratch, count, needle, last=last)
            if found >= 0:
                return start + found
        return -1
    finally:
        if len(scratch) <= _WINDOW:
            _idle.append(scratch)
