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

    __slots__ = ("_largest", "_quick", "_seen", "_smallest", "_users", "_wanted", "bytes")

    def __init__(self, first: int, smallest: int, largest: int, *, quick: float = SLOW / AHEAD):
        self.bytes: int = first
        self._smallest = smallest
        self._largest = largest
        self._quick = quick
        self._wanted = 1  # so many quick ones in a row, before the next one is larger
        self._seen = 0
        self._users: set[object] = set()  # which a generator may leave in any thread

    def took(self, length: int, seconds: float, starting: float = 0.0) -> None:
        """
        A piece of ``length`` bytes took so long. Those begun at another size tell little.

        :param starting: seconds of it to start the reads ahead. That waits only where the queue
            of the storage is full: then one piece waits, and the next ones are quick for it.
        """
        if starting > self._quick:
            self._wanted = AHEAD
        if seconds > SLOW and length <= self.bytes:
            self.bytes = max(self.bytes // 2, self._smallest)
            self._seen = 0
        elif seconds < self._quick and length >= self.bytes:
            self._seen += 1
            if self._seen >= self._wanted:
                self.bytes = min(self.bytes * 2, self._largest)
                self._seen = 0
        else:
            self._seen = 0

    def pieces(
        self, offset: int, length: int, *, backwards: bool = False, least: int = 1
    ) -> Generator[tuple[range, Range], None, None]:
        """
        A range in consecutive pieces, each as large as it may be by then.

        Who takes a piece has to use it, with what is to be started: nobody else will.

        :param least: bytes of a piece, whatever the size may be; the last one may have fewer
        :return: pairs of a piece, and of what to start reading before it is waited for, as offset
            and length: each byte once, :data:`AHEAD` pieces from the beginning of this one
        """
        stop = offset + length
        begun = stop if backwards else offset  # so far, reads were started
        user = object()
        self._users.add(user)
        try:
            while offset < stop:
                share = max(self._largest // len(self._users), self._smallest)
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
            self._users.discard(user)
