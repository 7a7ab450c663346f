"""Who may hold which range: the rules of the region lock, without tasks and without waiting.

Theory of operation
===================

A request asks for one range or for several, each shared or exclusive. **It waits for every
earlier request, held or waiting, that overlaps and conflicts with it, and for nothing else.**
Two ranges conflict when they overlap and one of them is exclusive; the ranges of one request
never conflict. So whoever comes later never delays whoever came earlier (no starvation, no
writer preference, no reader preference), and what is disjoint never meets. Empty ranges
overlap nothing.

One exception, which keeps a task from waiting for itself: **bytes that a task already holds
shared are free for its further shared requests.** On these bytes the request is placed beside
the hold, before the writers that wait for it (who have to wait for that task anyway); on its
other bytes the rule holds. A request that conflicts with a hold of its own task, or that closes
a cycle of waits, is refused with DeadlockError (``_wait_graph.py``).

The frontier
------------
Looking at every earlier request would cost O(waiting) per request, so a request looks at the
*frontier*: at each byte the last exclusive claim, held or waiting, and the shared claims since.
Whatever else covers that byte is waited for by these, so waiting for these is enough. The
frontier is kept as pieces: an exclusive claim, when it comes, *hides* the bytes of all pieces
it overlaps, and waits for the claims they belong to; a shared claim hides nothing and waits for
the exclusive pieces it overlaps. Exclusive and shared pieces have an index each
(``_range_index.py``), so a reader never looks at readers.

Each wait is kept by the one who waits, with the bytes it hides of the claim it waits for:
``waits_for[earlier] = [(start, stop), ...]``. Hence the bytes of each claim are, at any time,
either visible or hidden by exactly one waiting claim. That invariant does the rest:

* *release*: the claim's visible pieces go, and so do the entries of those who wait for it; who
  has no entry left, in any part of its request, is granted. Nothing else is looked at.
* *cancel* of a waiting exclusive claim: what it hid belongs to whoever covers these bytes now.
  Where the claim was visible, the hidden bytes are visible again; where a later claim hid it,
  that one hides them, and waits for their claims. Later shared claims wait for the exclusive
  ones among them. (A waiting shared claim hides nothing: those who wait for it wait for all
  they need already.)
* *split*, *restrict*, *downgrade* of a held claim cut up its pieces and entries the same way.

Cost
----
O(log n + conflicts on the frontier) to add; every piece is hidden once, so a queue of n writers
and readers on one hot range costs O(1) each, in memory too. O(log n + those who wait directly)
to release, with one wake-up for each request that may go and none for the others. A split or a
restriction looks at those who wait, and changes something for those who meet what is cut off.
Between add and release of a range that nobody else wants: a few entries in hash tables, and no
object besides the claim.

Cancelling a waiting reader costs O(those it waits for + those behind), a waiting writer O(what it
hid + those behind, each with what it meets of that): each of those behind has to wait for every
conflicting claim by itself from then on. That is a sum where writers queue on one range, and a
product where a wide writer has both many narrow exclusive holds before and many wide requests
behind it: 1 000 and 1 000 are a million waits, 0.7 s; 2 000 and 2 000 are four times as much.

Rejected: counting all conflicting predecessors (each request O(waiting): 10 000 writers on a
byte are 50 million pairs); waking everyone to look again (the same, at release); plain FIFO
(blocks disjoint ranges behind a waiting one); readers first, or writers first (starves the
other).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ._errors import DeadlockError
from ._frontier import Frontier, Piece
from ._range_index import RangeIndex, finder
from ._range_sets import Range, clip, meets, outside, union
from ._wait_graph import (
    GONE,
    HELD,
    WAITING,
    Claim,
    Cut,
    WaitGraph,
    closure,
    spell_cycle,
    spell_own,
)


class RegionQueue(Frontier):
    """
    The requests for ranges of one lock, held and waiting.

    A request is named by its first claim; claims of a request with several ranges come from
    :func:`claims_for`. Methods that may let others go return the requests granted, in order
    of arrival; waking their tasks is the caller's business. Not thread-safe, and not to be
    entered from a finalizer.

    :ivar held_exclusive: number of ranges held exclusively
    :ivar held_shared: number of ranges held shared
    :ivar longest_queue: the most requests that ever waited at one time
    :ivar graph: who waits for whom; another one only before the first request
    :ivar busy: whether an addition, removal or change is under way. Not where nobody waits: it
        would cost the hot path as much as a hash table's entry
    """

    __slots__ = (
        "_closing",
        "_tickets",
        "_waiting",
        "_wanted",
        "busy",
        "graph",
        "held_exclusive",
        "held_shared",
        "longest_queue",
    )

    def __init__(self, graph: WaitGraph | None = None) -> None:
        super().__init__()
        self.graph: WaitGraph = WaitGraph() if graph is None else graph
        self._waiting: dict[Claim, None] = {}
        # By owner, its holds that somebody waits for, as they may not be on the frontier. One is
        # by far the most frequent: no index for it.
        self._wanted: dict[object, Claim | RangeIndex[Claim]] = {}
        self._tickets = 0
        self._closing = False
        self.busy: bool = False
        self.held_exclusive: int = 0
        self.held_shared: int = 0
        self.longest_queue: int = 0

    @property
    def waiting(self) -> int:
        """Number of requests that wait."""
        return len(self._waiting)

    # Adding

    def is_free(self, start: int, stop: int, exclusive: bool) -> bool:
        """
        Whether a request would meet no conflicting range, held or waiting. O(log n).

        False does not say that it would wait: a further shared request of a task that holds
        the bytes shared would not. :meth:`would_grant` knows.
        """
        return start >= stop or not (
            (self._exclusive.classes and self._exclusive.overlaps(start, stop))
            or (exclusive and self._shared.classes and self._shared.overlaps(start, stop))
        )

    def add_if_free(self, claim: Claim) -> bool:
        """
        Grant a request of one range if it meets no conflict; else leave everything as it was.

        O(log n). The path of almost every request: :meth:`add` decides the others.
        """
        start = claim.start
        stop = claim.stop
        if claim.exclusive:
            if start < stop:
                if self._shared.classes and self._shared.overlaps(start, stop):
                    return False
                if not self._exclusive.add_if_free(claim):
                    return False
            self.held_exclusive += 1
        else:
            if start < stop:
                if self._exclusive.classes and self._exclusive.overlaps(start, stop):
                    return False
                self._shared.add(claim)
            self.held_shared += 1
        claim.state = HELD
        return True

    def add(self, parts: Sequence[Claim]) -> bool:
        """
        Grant the request, or have it wait: O(log n + conflicts on the frontier).

        :param parts: the claims of the request, new ones, of one owner
        :return: True: granted; False: it waits
        :raises DeadlockError: if it conflicts with a hold of its owner or closes a cycle of
            waits; then nothing has changed
        """
        self.busy = True
        try:
            plan = [self._plan(claim) for claim in parts]
            blockers = [piece.claim for pieces, _ in plan for piece in pieces]
            if blockers:
                cycle = self.graph.find_cycle(parts[0].owner, blockers)
                if cycle:
                    raise DeadlockError(spell_cycle(parts, cycle))
            if len(parts) > 1:
                for claim in parts:
                    self._links(claim).parts = tuple(parts)
            for claim, (pieces, own) in zip(parts, plan, strict=True):
                if claim.exclusive and claim is not parts[0]:
                    # A part placed before it may have cut one of these pieces.
                    pieces = self._in_the_way(claim)
                self._place(claim, pieces, own)
            if not blockers:
                for claim in parts:
                    self._hold(claim)
                return True
            lead = parts[0]
            for claim in parts:
                claim.state = WAITING
            self._tickets += 1
            self._links(lead).ticket = self._tickets
            self._waiting[lead] = None
            self.longest_queue = max(self.longest_queue, len(self._waiting))
            self.graph.starts_waiting(lead)
            return False
        finally:
            self.busy = False

    def would_grant(self, parts: Sequence[Claim]) -> bool:
        """
        Whether :meth:`add` would grant the request at once. Changes nothing.

        :raises DeadlockError: if it conflicts with a hold of its owner
        """
        self.busy = True
        try:
            plan = [self._plan(claim) for claim in parts]  # all of them, for the DeadlockError
        finally:
            self.busy = False
        return not any(pieces for pieces, _ in plan)

    def _plan(self, claim: Claim) -> tuple[list[Piece], list[Claim]]:
        """What the claim has to wait for, and its owner's shared holds it goes beside."""
        pieces = self._in_the_way(claim)
        if not pieces or claim.owner is None:
            return pieces, []
        for piece in pieces:
            hold = piece.claim
            if hold.owner is claim.owner and hold.state == HELD:
                raise DeadlockError(spell_own(claim, hold))
        # A hold that is not on the frontier is hidden by someone who waits for it.
        own = self._own_holds(claim)
        for hold in own:
            if hold.exclusive or claim.exclusive:
                raise DeadlockError(spell_own(claim, hold))
        if own:
            others = outside(claim.start, claim.stop, [(hold.start, hold.stop) for hold in own])
            pieces = [piece for piece in pieces if meets(others, piece.start, piece.stop)]
        return pieces, own

    def _place(self, claim: Claim, pieces: list[Piece], own: list[Claim]) -> None:
        """Put a new claim on the frontier and have it wait for these pieces."""
        if claim.start >= claim.stop:
            return
        if claim.exclusive:
            for piece in pieces:
                self._link(claim, piece.claim).append(self._hide(piece, claim))
            self._exclusive.add(claim)
            return
        if own:
            self._place_beside(claim, own)
        else:
            self._shared.add(claim)
        for piece in pieces:
            self._link(claim, piece.claim)

    def _place_beside(self, claim: Claim, own: list[Claim]) -> None:
        """
        Place a shared claim so that where its owner has shared holds it is where they are:
        visible where they are, else hidden by who hides them, who then waits for it as well.
        """
        self._links(claim).cuts = {}, {}
        for start, stop in outside(claim.start, claim.stop, [(h.start, h.stop) for h in own]):
            self._show(claim, start, stop)
        placed = claim.start
        for hold in sorted(own, key=lambda hold: hold.start):
            part = max(placed, hold.start), min(hold.stop, claim.stop)
            if part[0] >= part[1]:
                continue  # beside the holds before it
            for start, stop in clip(self._visible(hold), *part):
                self._show(claim, start, stop)
            for later in hold.waited_by:
                hidden = clip(self._links(later).waits_for[hold], *part)
                if hidden:
                    self._link(later, claim).extend(hidden)
            placed = hold.stop
        for later in claim.waited_by:
            entries = self._links(later).waits_for
            entries[claim] = union(entries[claim])

    # Leaving

    def remove(self, lead: Claim) -> Sequence[Claim]:
        """
        Release a held request or cancel a waiting one.

        :return: the requests that are granted thereby
        """
        if lead.links is None:  # nobody waits: the hot path
            if lead.exclusive:
                self.held_exclusive -= 1
                if lead.start < lead.stop:
                    self._exclusive.remove(lead)
            else:
                self.held_shared -= 1
                if lead.start < lead.stop:
                    self._shared.remove(lead)
            lead.state = GONE
            return ()
        self.busy = True
        try:
            parts = lead.parts
            if lead.state == WAITING:
                del self._waiting[lead]
                self.graph.ends_waiting(lead)
            else:
                for claim in parts:
                    self._count(claim, -1)
            touched: dict[Claim, None] = {}
            for claim in parts:
                self._take_out(claim, touched)
            return self._grant(touched)
        finally:
            self.busy = False

    def remove_waiting(self) -> list[Claim]:
        """Cancel every request that waits and grant none. :return: them, in order of arrival"""
        self._closing = True
        leads = list(self._waiting)
        # Last come, first out: then nobody is left behind who would have to wait for others.
        for lead in reversed(leads):
            self.remove(lead)
        self._closing = False
        return leads

    def _take_out(self, claim: Claim, touched: dict[Claim, None]) -> None:
        """Remove a claim; ``touched`` gets those who waited for it."""
        links = self._links(claim)
        visible = self._take_visible(claim)
        if links.waited_by and claim.state == HELD:
            self._is_unwanted(claim)
        heirs = [(later, self._links(later).waits_for.pop(claim)) for later in links.waited_by]
        touched.update(links.waited_by)
        for earlier in links.waits_for:
            self._unlink(claim, earlier)
        if claim.exclusive and links.waits_for:
            self._bequeath(links.waits_for, visible, heirs)
        links.waits_for = {}
        links.waited_by = {}
        claim.state = GONE

    def _bequeath(
        self,
        hidden: dict[Claim, list[Range]],
        visible: list[Range],
        heirs: list[tuple[Claim, list[Range]]],
    ) -> None:
        """Hand what a cancelled exclusive claim hid to whoever covers these bytes now."""
        cuts = [Cut(*part, claim) for claim, parts in hidden.items() for part in parts]
        find = finder(cuts)
        for start, stop in visible:
            for cut in find(start, stop):
                self._show(cut.claim, max(start, cut.start), min(stop, cut.stop))
        for later, parts in heirs:
            if later.exclusive:
                for start, stop in parts:
                    for cut in find(start, stop):
                        part = max(start, cut.start), min(stop, cut.stop)
                        self._link(later, cut.claim).append(part)
            else:
                for cut in find(later.start, later.stop):
                    if cut.claim.exclusive:
                        self._link(later, cut.claim)

    def _grant(self, touched: Iterable[Claim]) -> Sequence[Claim]:
        """Grant the requests among these that wait for nobody any more."""
        granted = []
        for claim in touched:
            if claim.state != WAITING or self._closing:
                continue
            parts = claim.parts
            if any(self._links(part).waits_for for part in parts):
                continue
            lead = parts[0]
            del self._waiting[lead]
            self.graph.ends_waiting(lead)
            for part in parts:
                self._hold(part)
            granted.append(lead)
        if len(granted) > 1:
            granted.sort(key=lambda lead: self._links(lead).ticket)
        return granted

    def _hold(self, claim: Claim) -> None:
        claim.state = HELD
        self._count(claim, 1)
        if claim.links is not None and claim.links.waited_by:
            self._is_wanted(claim)

    # Changing what is held

    def split(self, claim: Claim, at: int) -> tuple[Claim, Claim]:
        """
        Cut a hold of one range in two, ``start <= at <= stop``; the claim is one of them then.

        Nobody can be granted by it. O(log n + those who wait), little for those that do not meet
        the shorter half.
        """
        start, stop = claim.start, claim.stop
        if at - start < stop - at:
            left = Claim(start, at, claim.exclusive, claim.owner)
            self._shrink(claim, at, stop, left)
            return left, claim
        right = Claim(at, stop, claim.exclusive, claim.owner)
        self._shrink(claim, start, at, right)
        return claim, right

    def restrict(self, claim: Claim, start: int, stop: int) -> Sequence[Claim]:
        """
        Keep ``[start, stop)`` of a hold of one range and give the rest back.

        :return: the requests that are granted thereby
        """
        return self._shrink(claim, start, stop)

    def _shrink(
        self, claim: Claim, start: int, stop: int, other: Claim | None = None
    ) -> Sequence[Claim]:
        """
        Have a hold keep ``[start, stop)`` only, and another one, new and of the same owner, have
        the rest.

        :return: the requests that are granted thereby
        """
        self.busy = True
        try:
            if other is not None:
                self._hold(other)
            return self._grant(self._cut_off(claim, start, stop, other))
        finally:
            self.busy = False

    def _cut_off(self, claim: Claim, start: int, stop: int, other: Claim | None) -> list[Claim]:
        """:return: those who do not wait for the first one any more"""
        waited_by = list(claim.waited_by)
        if waited_by:
            self._is_unwanted(claim)
        old_start, old_stop = claim.start, claim.stop
        visible = self._keep_visible(claim, start, stop)
        if other is not None:
            self._set_visible(other, visible)
        gone = []
        for later in waited_by:
            if max(later.start, old_start) >= start and min(later.stop, old_stop) <= stop:
                continue  # it does not meet the rest
            entries = self._links(later).waits_for
            # What cancelled writers hid, one by one, is one range again: else each cut counts them.
            hidden = union(entries[claim])
            if other is not None and self._wait_for_part(later, other, hidden):
                self._link(later, other).extend(clip(hidden, other.start, other.stop))
            if self._wait_for_part(later, claim, hidden):
                entries[claim] = clip(hidden, start, stop)
            else:
                del entries[claim]
                del self._links(claim).waited_by[later]
                gone.append(later)
        if claim.waited_by:
            self._is_wanted(claim)
        return gone

    def downgrade(self, lead: Claim) -> Sequence[Claim]:
        """
        Make a hold shared.

        :return: the requests that are granted thereby
        """
        self.busy = True
        try:
            return self._grant(self._let_readers_in(lead))
        finally:
            self.busy = False

    def _let_readers_in(self, lead: Claim) -> list[Claim]:
        """:return: those who do not wait for it any more"""
        touched = []
        for claim in lead.parts:
            if not claim.exclusive:
                continue
            visible = self._take_visible(claim)
            self._count(claim, -1)
            claim.exclusive = False
            self._count(claim, 1)
            self._set_visible(claim, visible)
            for later in list(claim.waited_by):
                if not later.exclusive:
                    del self._links(later).waits_for[claim]
                    self._unlink(later, claim)
                    touched.append(later)
        return touched

    def hand_over(self, lead: Claim, owner: object) -> None:
        """
        Have a hold belong to another task, or to nobody (None).

        It closes no cycle of waits where the new owner takes over itself, as it does not wait then.
        Where others hand it over, a cycle is not looked for.
        """
        for claim in lead.parts:
            wanted = bool(claim.waited_by)
            if wanted:
                self._is_unwanted(claim)
            claim.owner = owner
            if wanted:
                self._is_wanted(claim)

    def _wait_for_part(self, later: Claim, part: Claim, hidden: list[Range]) -> bool:
        """Whether who waited for a hold, hiding this of it, waits for that part of it."""
        if part.start >= part.stop:
            return False
        if later.exclusive:
            return bool(clip(hidden, part.start, part.stop))
        return overlap(later, part)

    # Who waits for whom

    def _is_wanted(self, hold: Claim) -> None:
        """Somebody waits for a hold, which is not empty then."""
        if hold.owner is not None:
            self.graph.is_wanted(hold)
            holds = self._wanted.setdefault(hold.owner, hold)
            if holds is hold:
                return
            if isinstance(holds, Claim):
                first = holds
                holds = self._wanted[hold.owner] = RangeIndex()
                holds.add(first)
            holds.add(hold)

    def _is_unwanted(self, hold: Claim) -> None:
        """Nobody waits for it any more, or it is about to change its owner or its range."""
        if hold.owner is not None:
            self.graph.is_unwanted(hold)
            holds = self._wanted[hold.owner]
            if not isinstance(holds, Claim):
                holds.remove(hold)
                if holds.classes:
                    return
            del self._wanted[hold.owner]

    def _own_holds(self, claim: Claim) -> list[Claim]:
        """Which of its owner's holds that somebody waits for it overlaps."""
        holds = self._wanted.get(claim.owner)
        if holds is None:
            return []
        if isinstance(holds, Claim):
            return [holds] if overlap(holds, claim) else []
        return holds.overlapping(claim.start, claim.stop)

    def _link(self, later: Claim, earlier: Claim) -> list[Range]:
        """Have ``later`` wait for ``earlier``. :return: the bytes of it that it hides"""
        waited_by = self._links(earlier).waited_by
        if not waited_by and earlier.state == HELD:
            self._is_wanted(earlier)
        waited_by[later] = None
        return self._links(later).waits_for.setdefault(earlier, [])

    def _unlink(self, later: Claim, earlier: Claim) -> None:
        """Undo the side of ``earlier``."""
        waited_by = self._links(earlier).waited_by
        del waited_by[later]
        if not waited_by and earlier.state == HELD:
            self._is_unwanted(earlier)

    def _count(self, claim: Claim, change: int) -> None:
        if claim.exclusive:
            self.held_exclusive += change
        else:
            self.held_shared += change

    # For tests

    def _claims(self) -> set[Claim]:
        """Every claim that covers a byte."""
        pieces = self._exclusive.pieces() + self._shared.pieces()
        claims = {piece.claim for piece in pieces}
        claims |= {part for lead in self._waiting for part in lead.parts}
        while True:
            found = claims | {earlier for claim in claims for earlier in claim.waits_for}
            if found == claims:
                return {claim for claim in claims if claim.start < claim.stop}
            claims = found

    def _check(self) -> None:
        """Assert the whole truth about the queue. For tests: O(n * n)."""
        self._exclusive.check()
        self._shared.check()
        claims = self._claims()
        for claim in claims:
            self._check_claim(claim)
        waits = closure(claims)
        for claim in claims:
            assert claim not in waits[claim], "a cycle of waits"
            for other in claims.difference(claim.parts):
                if overlap(claim, other) and (claim.exclusive or other.exclusive):
                    assert other in waits[claim] or claim in waits[other], (claim, other)
        assert {claim.parts[0] for claim in claims if claim.state == WAITING} == set(self._waiting)
        tickets = [self._links(lead).ticket for lead in self._waiting]
        assert tickets == sorted(tickets)
        assert self.longest_queue >= len(tickets)
        self.graph.check(self, claims)
        wanted = {}
        for owner, holds in self._wanted.items():
            if isinstance(holds, Claim):
                wanted[owner] = {holds}
            else:
                holds.check()
                wanted[owner] = set(holds.pieces())
        assert wanted == self.graph.wanted(self)

    def _check_claim(self, claim: Claim) -> None:
        self._check_pieces(claim)
        links = self._links(claim)
        assert links.queue is self
        assert all(claim in self._links(later).waits_for for later in links.waited_by)
        assert all(claim in self._links(earlier).waited_by for earlier in links.waits_for)
        blocked = any(self._links(part).waits_for for part in claim.parts)
        assert claim.state == (WAITING if blocked else HELD)
        # Each byte is visible, or hidden by one waiting exclusive claim that covers it.
        covered = sorted(self._visible(claim))
        for later in links.waited_by:
            hidden = self._links(later).waits_for[claim]
            assert later.exclusive or claim.exclusive
            assert bool(hidden) == later.exclusive
            assert clip(hidden, later.start, later.stop) == hidden
            covered = sorted(covered + hidden)
        ends = [claim.start, *(end for part in covered for end in part), claim.stop]
        assert ends[::2] == ends[1::2], (claim, covered)


def claims_for(ranges: Iterable[tuple[int, int, bool]], owner: object) -> tuple[Claim, ...]:
    """
    The claims of a request for several ranges ``(start, stop, exclusive)``.

    Ranges that overlap become one, exclusive where any of them is, so the claims of a request
    never overlap one another. There is at least one, if only of an empty range.
    """
    ranges = list(ranges)
    alone = union((start, stop) for start, stop, exclusive in ranges if exclusive)
    claims = [Claim(start, stop, True, owner) for start, stop in alone]
    for start, stop in union((start, stop) for start, stop, exclusive in ranges if not exclusive):
        claims += [Claim(low, high, False, owner) for low, high in outside(start, stop, alone)]
    return tuple(claims) or (Claim(0, 0, False, owner),)


def overlap(one: Piece, other: Piece) -> bool:
    """Whether they have a byte in common; neither is empty."""
    return one.start < other.stop and other.start < one.stop
