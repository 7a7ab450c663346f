"""When the event loop may start a read of the disk itself. Rules only: no time, no reads."""

from __future__ import annotations

SLOW_START = 0.0005
CAREFUL = 0.5
"""
Seconds that the start of a read takes on average when it has to wait, for a free place in the
disk's queue or for an extent tree, and for how long no look starts one then. It takes 5 us.
"""

COLD_READS = 4
COLD_MOST = 1024
"""
After a read that was not in memory so many more are started before anybody looks for them. That
pays from a quarter of cold reads on; the others lose 1 us of 5. And how many at most.
"""

STARTED = 64 << 10
"""Bytes of a read that the loop starts."""


class ReadStarts:
    """
    The reads of one map that the loop starts. Whoever counts one holds this and not the map.

    :param queue: how many reads the disk takes before the next one has to wait
    """

    __slots__ = ("_seconds", "careful_until", "cold", "most", "under_way")

    def __init__(self, queue: int) -> None:
        self.under_way: int = 0
        """Reads that were started and not looked for again."""
        self.most: int = queue * 7 // 8
        """How many may be: an eighth is for other readers, and writers."""
        self.cold: int = 0
        """How many of the next reads are to be started at once."""
        self.careful_until: float = 0.0
        """Until when no look may start a read; 0 while all may."""
        self._seconds = 0.0

    def missed(self) -> None:
        """A read of few bytes had to wait for the disk, and the next ones may have to."""
        self.cold = min(self.cold + COLD_READS, COLD_MOST)

    def took(self, began: float, ended: float) -> None:
        """A read was started, between these two times."""
        seconds = ended - began
        if seconds > SLOW_START or self._seconds:
            # The moving average of the last eight or so, each cut to four times the limit: a
            # thread that lost its processor for a while is not a disk that is busy.
            self._seconds += (min(seconds, 4 * SLOW_START) - self._seconds) / 8
            if self._seconds > SLOW_START:
                self._seconds = 0.0
                self.careful_until = ended + CAREFUL

    def recover(self, now: float) -> None:
        """Stop being careful when it is time."""
        if now > self.careful_until:
            self.careful_until = 0.0
