"""What later requests have to look at: at each byte, the last exclusive claim and the shared
claims since. ``_region_queue.py`` says why that is enough, and when pieces hide and show.

A claim's bytes are on the frontier as pieces: the claim itself while nothing of it is hidden,
else its :class:`~aiommap._wait_graph.Cut` s. Pieces of a claim never overlap or touch, those of
different exclusive claims never overlap. Exclusive and shared pieces have an index each, so a
reader never looks at readers.
"""

from __future__ import annotations

from ._range_index import RangeIndex
from ._range_sets import Range, clip, outside, union
from ._wait_graph import Claim, Cut, Links

Piece = Claim | Cut


class Frontier:
    """The pieces, and the changes that keep each of a claim's bytes on it or hidden."""

    __slots__ = ("_exclusive", "_shared")

    def __init__(self) -> None:
        self._exclusive: RangeIndex[Piece] = RangeIndex()
        self._shared: RangeIndex[Piece] = RangeIndex()

    def _in_the_way(self, claim: Claim) -> list[Piece]:
        """What the claim conflicts with on the frontier."""
        if claim.start >= claim.stop:
            return []
        pieces = self._exclusive.overlapping(claim.start, claim.stop)
        if claim.exclusive:
            pieces += self._shared.overlapping(claim.start, claim.stop)
        return pieces

    def _visible(self, claim: Claim) -> list[Range]:
        """The claim's ranges on the frontier."""
        return [(piece.start, piece.stop) for piece in _pieces_of(claim)]

    def _take_visible(self, claim: Claim) -> list[Range]:
        """Take the claim off the frontier. :return: its ranges there"""
        index = self._index(claim)
        for piece in _pieces_of(claim):
            index.remove(piece)
        return self._visible(claim)

    def _set_visible(self, claim: Claim, visible: list[Range]) -> None:
        """Put what these ranges and the claim have in common on the frontier, and no more."""
        if claim.start >= claim.stop:
            return
        parts = clip(visible, claim.start, claim.stop)
        if parts == [(claim.start, claim.stop)]:
            if claim.links is not None:
                claim.links.cuts = None
            self._index(claim).add(claim)
            return
        self._links(claim).cuts = {}, {}
        for start, stop in parts:
            self._show(claim, start, stop)

    def _keep_visible(self, claim: Claim, start: int, stop: int) -> list[Range]:
        """
        Have the claim be ``[start, stop)`` of what it was, and take the rest of it off the
        frontier. :return: the ranges of that
        """
        index = self._index(claim)
        cuts = None if claim.links is None else claim.links.cuts
        touched = [p for p in _pieces_of(claim) if p.start < start or p.stop > stop]
        ranges = [(piece.start, piece.stop) for piece in touched]
        for piece in touched:
            index.remove(piece)
            if cuts is not None:
                del cuts[0][piece.start], cuts[1][piece.stop]
        claim.start = start
        claim.stop = stop
        if cuts is None:
            if touched and start < stop:
                index.add(claim)
        else:
            for kept in clip(ranges, start, stop):
                self._put_cut(claim, *kept)
            cut = cuts[0].get(start)
            if cut is not None and cut.stop == stop:
                index.remove(cut)
                self._links(claim).cuts = None
                index.add(claim)
        return [part for low, high in ranges for part in outside(low, high, [(start, stop)])]

    def _hide(self, piece: Piece, later: Claim) -> Range:
        """Take what ``later`` covers of a piece off the frontier. :return: that range"""
        claim = piece.claim
        index = self._index(claim)
        index.remove(piece)
        links = self._links(claim)
        if links.cuts is None:
            links.cuts = {}, {}
        else:
            del links.cuts[0][piece.start], links.cuts[1][piece.stop]
        for start, stop in outside(piece.start, piece.stop, [(later.start, later.stop)]):
            self._put_cut(claim, start, stop)
        return max(piece.start, later.start), min(piece.stop, later.stop)

    def _show(self, claim: Claim, start: int, stop: int) -> None:
        """Put hidden bytes of a claim on the frontier, joined with those beside them."""
        index = self._index(claim)
        links = self._links(claim)
        assert links.cuts is not None
        by_start, by_stop = links.cuts
        left = by_stop.pop(start, None)
        if left is not None:
            del by_start[left.start]
            index.remove(left)
            start = left.start
        right = by_start.pop(stop, None)
        if right is not None:
            del by_stop[right.stop]
            index.remove(right)
            stop = right.stop
        if start == claim.start and stop == claim.stop:
            links.cuts = None
            index.add(claim)
        else:
            self._put_cut(claim, start, stop)

    def _put_cut(self, claim: Claim, start: int, stop: int) -> None:
        cuts = self._links(claim).cuts
        assert cuts is not None
        cut = Cut(start, stop, claim)
        cuts[0][start] = cuts[1][stop] = cut
        self._index(claim).add(cut)

    def _index(self, claim: Claim) -> RangeIndex[Piece]:
        return self._exclusive if claim.exclusive else self._shared

    def _links(self, claim: Claim) -> Links:
        links = claim.links
        if links is None:
            links = claim.links = Links(self)
        return links

    def _check_pieces(self, claim: Claim) -> None:
        """Assert that the frontier has what the claim says. For tests: O(n)."""
        shown = {(p.start, p.stop) for p in self._index(claim).pieces() if p.claim is claim}
        assert shown == set(self._visible(claim))
        cuts = None if claim.links is None else claim.links.cuts
        if cuts is not None:
            assert set(cuts[0].values()) == set(cuts[1].values())
            assert union(shown) == sorted(shown), "pieces overlap or touch"


def _pieces_of(claim: Claim) -> list[Piece]:
    if claim.start >= claim.stop:
        return []
    cuts = None if claim.links is None else claim.links.cuts
    return [claim] if cuts is None else list(cuts[0].values())
