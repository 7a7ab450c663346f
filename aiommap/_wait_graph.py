"""Who waits for whom: the claims of tasks on ranges, and the search for cycles of waits.

A :class:`Claim` is one range of one request, waiting or held. While anybody waits, claims are
the nodes of a graph: ``waits_for`` leads from a waiting claim to the earlier ones it waits for
directly, ``waited_by`` leads back. Two more steps come from the tasks: a waiting claim goes on
when *all* parts of its request may (requests of several ranges are granted together), and a
held claim ends when its owner goes on, who may wait for something else, in this lock or in
another one. :class:`WaitGraph` keeps that second kind of step, for all locks that share it.

Complete and cheap. A request can close a cycle only if its task holds something that somebody
waits for; most tasks hold nothing of the kind, and for them there is no search. For the others
two searches run in turns, one from what the request waits for towards the task, one from what
the task holds towards those who wait for it. The first one that comes to its end without
having met the other side proves that there is no cycle, so the cost is twice the smaller side:
one step for a task whose holds are wanted by someone idle, and one step for a request that
runs into a long queue behind an idle holder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ._ranges import LARGEST_OFFSET

NEW, WAITING, HELD, GONE = range(4)
"""The states of a claim, in the order it goes through them."""


SPELLED = 5
"""How many of a long cycle's waits a message has from each end. Out of the air."""


class Cut:
    """A part of a claim's range, where later claims hide the rest of it."""

    __slots__ = ("claim", "start", "stop")

    def __init__(self, start: int, stop: int, claim: Claim) -> None:
        self.start: int = start
        self.stop: int = stop
        self.claim = claim


class Links:
    """
    What a claim needs from the moment that others wait for it, or it for others.

    :ivar waits_for: the claims this one waits for directly, each with the bytes of that claim
        which this one hides (shared claims hide nothing)
    :ivar waited_by: the claims that wait for this one directly
    :ivar cuts: the bytes that no later exclusive claim hides, by start and by stop; None when
        that is the whole range
    :ivar parts: the claims of the request when it has several, this one included; else empty
    :ivar ticket: order of arrival among the requests that had to wait
    :ivar waiter: what the shell needs to wake the task
    :ivar queue: the queue the claim is in
    """

    __slots__ = ("cuts", "parts", "queue", "ticket", "waited_by", "waiter", "waits_for")

    def __init__(self, queue: object) -> None:
        self.waits_for: dict[Claim, list[tuple[int, int]]] = {}
        self.waited_by: dict[Claim, None] = {}
        self.cuts: tuple[dict[int, Cut], dict[int, Cut]] | None = None
        self.parts: tuple[Claim, ...] = ()
        self.ticket: int = 0
        self.waiter: Any = None
        self.queue: object = queue


class Claim:
    """One range of one request: what it asks for or holds, for whom, and how it stands."""

    __slots__ = ("exclusive", "links", "owner", "start", "state", "stop")

    def __init__(self, start: int, stop: int, exclusive: bool, owner: object = None) -> None:
        self.start: int = start
        self.stop: int = stop
        self.exclusive: bool = exclusive
        self.owner: object = owner
        self.state: int = NEW
        # Made when needed: of 100 000 claims that nobody waits for, none has links.
        self.links: Links | None = None

    @property
    def claim(self) -> Claim:
        """Itself: a claim that nobody hides is its own visible piece, as a :class:`Cut` is."""
        return self

    @property
    def parts(self) -> tuple[Claim, ...]:
        """The claims of its request."""
        links = self.links
        return (self,) if links is None else links.parts or (self,)

    @property
    def waits_for(self) -> Iterable[Claim]:
        return () if self.links is None else self.links.waits_for

    @property
    def waited_by(self) -> Iterable[Claim]:
        return () if self.links is None else self.links.waited_by

    def __repr__(self) -> str:
        state = ("new", "waiting", "held", "gone")[self.state]
        owner = "" if self.owner is None else f" {name_of(self.owner)}"
        return f"<{self.__class__.__name__} {spell(self)} {state}{owner}>"


def spell(claim: Claim) -> str:
    """The claim's range and mode, for messages."""
    everything = claim.start == 0 and claim.stop == LARGEST_OFFSET
    where = "everything" if everything else f"[{claim.start}, {claim.stop})"
    return f"{where} {'exclusive' if claim.exclusive else 'shared'}"


def name_of(owner: object) -> str:
    """A task's name, for messages."""
    get_name = getattr(owner, "get_name", None)  # asyncio
    name = get_name() if callable(get_name) else getattr(owner, "name", None)  # trio
    return f"task {name!r}" if name is not None else f"{owner!r}"


class WaitGraph:
    """
    What each task waits for, and what it holds that others wait for.

    Only claims that take part in a wait are here, so an uncontended lock never touches it.
    Locks that share a graph see the cycles that go through several of them.
    """

    __slots__ = ("__weakref__", "_contended", "_waiting")

    def __init__(self) -> None:
        self._waiting: dict[object, dict[Claim, None]] = {}
        self._contended: dict[object, dict[Claim, None]] = {}

    def starts_waiting(self, claim: Claim) -> None:
        """The owner parks until the request that the claim leads is granted."""
        _put(self._waiting, claim)

    def ends_waiting(self, claim: Claim) -> None:
        """It does not any more."""
        _take(self._waiting, claim)

    def is_wanted(self, claim: Claim) -> None:
        """Somebody waits for the held claim."""
        _put(self._contended, claim)

    def is_unwanted(self, claim: Claim) -> None:
        """Nobody waits for it any more, or it is not held any more."""
        _take(self._contended, claim)

    def find_cycle(self, owner: object, blockers: Sequence[Claim]) -> list[Claim] | None:
        """
        The way from something that a new request would wait for to something its owner holds.

        :param owner: who asks
        :param blockers: the claims that the request would wait for
        :return: claims, the first one of ``blockers``, the last one held by ``owner``; each but
            the last is waiting for the next one, or held by somebody who does. None: no cycle
        """
        if owner is None or owner not in self._contended:
            return None
        path: list[Claim] = []
        ahead = self._towards(owner, blockers, path)
        back = self._back_from(owner, blockers)
        for _ in ahead:
            # Exhausted means that nobody who waits for the owner is in the way. A meeting makes
            # it go on for ever: then the search ahead is bound to find the path.
            if next(back, "exhausted") == "exhausted":
                return None
        return path or None

    def _towards(
        self, owner: object, blockers: Sequence[Claim], path: list[Claim]
    ) -> Iterator[None]:
        came_from: dict[Claim, Claim | None] = dict.fromkeys(blockers)
        todo = list(came_from)
        for claim in todo:  # grows
            yield
            waiting: Iterable[Claim] = (claim,)
            if claim.state == HELD:
                if claim.owner is owner:
                    step: Claim | None = claim
                    while step is not None:
                        path.append(step)
                        step = came_from[step]
                    path.reverse()
                    return
                waiting = self._waiting.get(claim.owner, ())
            for lead in waiting:
                for part in lead.parts:
                    for earlier in part.waits_for:
                        yield
                        if earlier not in came_from:
                            came_from[earlier] = claim
                            todo.append(earlier)

    def _back_from(self, owner: object, blockers: Sequence[Claim]) -> Iterator[None]:
        holders = {claim.owner for claim in blockers if claim.state == HELD}
        waiting = {claim.parts[0] for claim in blockers if claim.state == WAITING}
        seen: set[Claim] = set()
        todo = list(self._contended[owner])
        for claim in todo:  # grows
            yield
            for later in claim.waited_by:
                yield
                lead = later.parts[0]
                if lead in seen:
                    continue
                seen.add(lead)
                if lead in waiting or (lead.owner is not None and lead.owner in holders):
                    while True:
                        yield
                todo += lead.parts
                todo += self._contended.get(lead.owner, ())

    def wanted(self, queue: object) -> dict[object, set[Claim]]:
        """By owner, the holds in a queue that others wait for. For tests: O(n)."""
        return _of(queue, self._contended)

    def check(self, queue: object, claims: Iterable[Claim]) -> None:
        """Assert that the graph says the truth about a queue's claims. For tests: O(n)."""
        waiting: dict[object, set[Claim]] = {}
        contended: dict[object, set[Claim]] = {}
        for claim in claims:
            if claim.owner is None:
                continue
            if claim.state == WAITING:
                waiting.setdefault(claim.owner, set()).add(claim.parts[0])
            elif claim.waited_by:
                contended.setdefault(claim.owner, set()).add(claim)
        assert _of(queue, self._waiting) == waiting
        assert self.wanted(queue) == contended


def _put(table: dict[object, dict[Claim, None]], claim: Claim) -> None:
    if claim.owner is not None:
        table.setdefault(claim.owner, {})[claim] = None


def _take(table: dict[object, dict[Claim, None]], claim: Claim) -> None:
    claims = table.get(claim.owner)
    if claims is not None:
        claims.pop(claim, None)
        if not claims:
            del table[claim.owner]


def _of(queue: object, table: dict[object, dict[Claim, None]]) -> dict[object, set[Claim]]:
    mine = {
        owner: {claim for claim in claims if claim.links and claim.links.queue is queue}
        for owner, claims in table.items()
    }
    return {owner: claims for owner, claims in mine.items() if claims}


def spell_cycle(asked: Sequence[Claim], path: Sequence[Claim]) -> str:
    """The message for a request that closes a cycle of waits."""
    text = f"deadlock: {name_of(asked[0].owner)} asks for {' and '.join(map(spell, asked))}, which"
    left_out = len(path) - 2 * SPELLED
    for place, claim in enumerate(path):
        if left_out > 1 and SPELLED <= place < SPELLED + left_out:
            if place == SPELLED:
                text += f" waits for the first of {left_out} more in a row, the last of which"
        elif claim.state == WAITING:
            text += f" waits for {spell(claim)} asked for by {name_of(claim.owner)}, which"
        else:
            text += f" waits for {spell(claim)} held by {name_of(claim.owner)}, who"
    return f"{text.rpartition(',')[0]}; release first, or take the regions in one order everywhere"


def spell_own(claim: Claim, hold: Claim) -> str:
    """The message for a request that conflicts with its own task's hold."""
    return (
        f"deadlock: {name_of(claim.owner)} asks for {spell(claim)} and holds {spell(hold)} "
        f"itself; release it first, or use what it holds"
    )


def closure(claims: Iterable[Claim]) -> dict[Claim, set[Claim]]:
    """Whom each claim waits for, directly or through others."""
    waits = {claim: set(claim.waits_for) for claim in claims}
    grown = True
    while grown:
        grown = False
        for found in waits.values():
            more = set().union(*(waits[claim] for claim in found)) - found
            found |= more
            grown = grown or bool(more)
    return waits
