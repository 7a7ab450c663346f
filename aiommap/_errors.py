"""What goes wrong with a map and is not the kernel's own error.

Every class takes what happened as typed arguments and writes its own message, which ends in
what to do instead.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence

Range = tuple[int, int]


class TruncatedError(OSError):
    """
    The file no longer reaches the bytes that were asked for.

    Raised by every call that touches the missing bytes, until the file is long again. The map
    itself, and regions that the file still reaches, stay usable.

    :ivar offset: first byte asked for, in bytes from the start of the map
    :ivar length: number of bytes asked for
    :ivar size: the bytes of the map that the file still reaches
    """

    def __init__(
        self, offset: int, length: int, size: int, filename: str | bytes | None = None
    ) -> None:
        message = (
            f"bytes {offset} to {offset + length} of the map are not in the file any more, which "
            f"was truncated and reaches to byte {size} of the map; make it long again, or "
            f"resize() or reopen the map"
        )
        super().__init__(errno.ENODATA, message)
        self.filename = filename
        self.offset = offset
        self.length = length
        self.size = size

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.offset, self.length, self.size, self.filename)


class FlushError(OSError):
    """
    The kernel could not bring bytes to the disk, and they may be lost.

    The kernel reports such a failure once and then marks the pages clean, so a later flush
    would succeed without having written them (https://lwn.net/Articles/752063/). The map
    therefore keeps the error: every flush raises it until
    :meth:`~aiommap.AsyncMmap.clear_flush_error`.

    :ivar errno: what the kernel said first (``EIO``, ``ENOSPC``, ``EDQUOT``, ...)
    :ivar filename: the file's path, where known
    :ivar ranges: ``(offset, length)`` pairs, in bytes from the start of the map, that were
        to be flushed since the last good flush
    """

    def __init__(
        self, error: int, ranges: Iterable[Range] = (), filename: str | bytes | None = None
    ) -> None:
        self.ranges: Sequence[Range] = tuple(ranges)
        message = (
            f"flush failed: {os.strerror(error)}; the stores into {_spell(self.ranges)} may be "
            f"lost; write them to a good place, or call clear_flush_error(), store them again "
            f"and flush"
        )
        super().__init__(error, message)
        self.filename = filename

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.errno, self.ranges, self.filename)


class DeadlockError(RuntimeError):
    """
    The region asked for can never become free, because its holder waits for the asker.

    Either the task already holds some of the bytes in a way that conflicts, or its request
    closes a cycle of tasks that wait for one another. Release first, or take the regions in
    one order everywhere.
    """


def _spell(ranges: Sequence[Range], most: int = 4) -> str:
    shown = ", ".join(f"[{offset}, {offset + length})" for offset, length in ranges[:most])
    more = len(ranges) - most
    return (shown or "the map") + (f" and {more} more ranges" if more > 0 else "")
