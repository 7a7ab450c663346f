"""Where bytes occur in a mapping: in a worker, without the GIL, and safe from bad storage."""

from __future__ import annotations

import threading

from ._mapping import Mapping

_WINDOW = 8 << 20
"""
What is read and searched with one call each. 512 KiB, which stay in the cache, were half as fast:
the GIL has to be had back after each.
"""

_CLOSER = 64 << 10


class _ThreadScratch(threading.local):
    """Memory that a worker reads into again and again: fresh pages would cost more."""

    def __init__(self) -> None:
        self._memory = bytearray(0)

    def window(self, length: int) -> bytearray:
        if len(self._memory) < length:
            self._memory = bytearray(length)
        return self._memory


_thread = _ThreadScratch()


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
    window = max(at_once, 2 * len(needle))
    step = window - len(needle) + 1
    scratch = _thread.window(window)
    starts = range(0, max(length - len(needle), 0) + 1, step)
    for start in reversed(starts) if last else starts:
        count = min(window, length - start)
        mapping.read_into(offset + start, memoryview(scratch)[:count])
        found = mapping.kernel.search(scratch, count, needle, last=last)
        if found >= 0:
            return start + found
    return -1
