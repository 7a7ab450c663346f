"""How much of a large range is asked for at once. Rules only: no time, no reads."""

from __future__ import annotations

from collections.abc import Generator

from ._errors import Range

SLOW = 0.1
"""Seconds for a piece from which on the next one is smaller: what who wants to leave, or is next,
has to wait for."""

AHEAD = 4
"""
Pieces that are being read at a time. So a piece grows until four take 0.1 s: where a request takes
long and many are answered in parallel (network, 60 ms), they are needed to be fast at all.
"""


class PieceSize:
    """
    The size of a piece: doubled after one that was quick, halved after one that was slow.

    Those who go through ranges at the same time share what is read ahead: :data:`AHEAD` of the
    largest pieces for all of them.

    :ivar bytes: of the next piece, for one alone
    :param first: bytes of the first piece
    :param smallest: bytes of a piece at least
    :param largest: bytes of a piece at most
    :param quick: seconds for a piece below which the next one may be larger
    """

    __slots__ = ("_largest", "_quick", "_sharing", "_smallest", "bytes")

    def __init__(self, first: int, smallest: int, largest: int, *, quick: float = SLOW / AHEAD):
        self.bytes: int = first
        self._smallest = smallest
        self._largest = largest
        self._quick = quick
        self._sharing = 0

    def took(self, length: int, seconds: float) -> None:
        """A piece of ``length`` bytes took so long."""
        if seconds > SLOW:
            self.bytes = max(self.bytes // 2, self._smallest)
        elif seconds < self._quick and length >= self.bytes:
            self.bytes = min(self.bytes * 2, self._largest)

    def pieces(
        self, offset: int, length: int, *, backwards: bool = False, least: int = 1
    ) -> Generator[tuple[range, Range], None, None]:
        """
        A range in consecutive pieces, each as large as it may be by then.

        :param least: bytes of a piece, whatever the size may be; the last one may have fewer
        :return: pairs of a piece, and of what to start reading before it is waited for, as offset
            and length: each byte once, :data:`AHEAD` pieces from the beginning of this one
        """
        stop = offset + length
        begun = stop if backwards else offset  # so far, reads were started
        self._sharing += 1
        try:
            while offset < stop:
                share = max(self._largest // self._sharing, self._smallest)
                count = min(max(min(self.bytes, share), least), stop - offset)
                if backwards:
                    until = max(stop - AHEAD * count, offset)
                    yield range(stop - count, stop), (min(until, begun), max(begun - until, 0))
                    begun = min(begun, until)
                    stop -= count
                else:
                    until = min(offset + AHEAD * count, stop)
                    yield range(offset, offset + count), (begun, max(until - begun, 0))
                    begun = max(begun, until)
                    offset += count
        finally:
            self._sharing -= 1
