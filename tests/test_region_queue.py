"""The rules of the region lock, against a model that is obviously right."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiommap._errors import DeadlockError
from aiommap._range_index import FAN, RangeIndex
from aiommap._range_sets import clip, outside, union
from aiommap._region_queue import RegionQueue, claims_for
from aiommap._wait_graph import GONE, HELD, WAITING, Claim, WaitGraph

TIB = 2**40
Asked = tuple[int, int, bool]


def members(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(start, stop) for start, stop in ranges if start < stop]


class ModelRequest:
    """What the model knows of a request: its ranges now, and whether it holds them."""

    def __init__(self, ranges: list[Asked], owner: str | None) -> None:
        self.ranges = [asked for asked in ranges if asked[0] < asked[1]]
        self.owner = owner
        self.held = False
        # Requests that were waiting when this one came, and that it went past.
        self.passed: list[ModelRequest] = []


def conflicting(one: Asked, other: Asked) -> bool:
    return one[0] < other[1] and other[0] < one[1] and (one[2] or other[2])


def conflict(one: ModelRequest, other: ModelRequest) -> bool:
    return any(conflicting(a, b) for a in one.ranges for b in other.ranges)


class Model:
    """The rule, spelled out: everything is looked at, every time."""

    def __init__(self) -> None:
        self.requests: list[ModelRequest] = []  # in order of arrival

    def blockers(self, request: ModelRequest) -> list[ModelRequest]:
        at = self.requests.index(request)
        earlier = [
            other
            for other in self.requests[:at]
            if other not in request.passed and conflict(request, other)
        ]
        later = [
            other
            for other in self.requests[at + 1 :]
            if request in other.passed and conflict(request, other)
        ]
        return earlier + later

    def add(self, ranges: list[Asked], owner: str | None) -> ModelRequest | None:
        """The new request; None: a deadlock."""
        request = ModelRequest(ranges, owner)
        own = [r for r in self.requests if r.held and r.owner == owner and owner is not None]
        if any(conflict(request, hold) for hold in own):
            return None
        # Bytes that the task already holds shared are free for its further shared requests.
        covered = [(start, stop) for hold in own for start, stop, _ in hold.ranges]
        alone = [(start, stop) for start, stop, exclusive in ranges if exclusive]
        free = [
            asked for start, stop, exclusive in request.ranges if not exclusive
            for asked in clip(covered, start, stop)
        ]
        # What the same request asks for exclusively counts as exclusive only.
        free = [part for start, stop in free for part in outside(start, stop, alone)]
        strict = ModelRequest(
            [(*part, True) for part in alone]
            + [
                (*part, False)
                for start, stop, exclusive in request.ranges if not exclusive
                for part in outside(start, stop, covered)
            ],
            owner,
        )
        loose = ModelRequest([(start, stop, False) for start, stop in free], owner)
        request.passed = [
            other
            for other in self.requests
            if conflict(loose, other) and not conflict(strict, other)
        ]
        self.requests.append(request)
        if self.closes_cycle(request):
            self.requests.remove(request)
            return None
        request.held = not self.blockers(request)
        return request

    def closes_cycle(self, request: ModelRequest) -> bool:
        todo = self.blockers(request)
        seen: list[ModelRequest] = []
        while todo:
            other = todo.pop()
            if other in seen:
                continue
            seen.append(other)
            if other.held:
                if other.owner is None:
                    continue
                if other.owner == request.owner:
                    return True
                todo += [r for r in self.requests if r.owner == other.owner and not r.held]
            else:
                todo += self.blockers(other)
        return False

    def remove(self, request: ModelRequest) -> list[ModelRequest]:
        self.requests.remove(request)
        return self.grant()

    def grant(self) -> list[ModelRequest]:
        granted = [r for r in self.requests if not r.held and not self.blockers(r)]
        for request in granted:
            request.held = True
        return granted

    def split(self, request: ModelRequest, at: int) -> tuple[ModelRequest, ModelRequest]:
        place = self.requests.index(request)
        halves = []
        for low, high in ((-TIB, at), (at, 2 * TIB)):
            ranges = [(max(a, low), min(b, high), alone) for a, b, alone in request.ranges]
            half = ModelRequest(ranges, request.owner)
            half.held = True
            half.passed = list(request.passed)
            halves.append(half)
        self.requests[place : place + 1] = halves
        return halves[0], halves[1]

    def restrict(self, request: ModelRequest, start: int, stop: int) -> list[ModelRequest]:
        request.ranges = [
            (*part, alone) for a, b, alone in request.ranges for part in clip([(a, b)], start, stop)
        ]
        return self.grant()

    def downgrade(self, request: ModelRequest) -> list[ModelRequest]:
        request.ranges = [(start, stop, False) for start, stop, _ in request.ranges]
        return self.grant()


class Difference(AssertionError):
    """The queue did something else than the model."""


class Walk:
    """A history that queue and model go through together, compared after each step."""

    def __init__(self, queue: RegionQueue) -> None:
        self.queue = queue
        self.model = Model()
        self.claims: dict[Claim, ModelRequest] = {}
        self.bounds: dict[Claim, tuple[int, int]] = {}
        self.arrived: list[Claim] = []

    def held(self, *, single: bool = False) -> list[Claim]:
        return [
            claim for claim in self.claims
            if claim.state == HELD and not (single and len(claim.parts) > 1)
        ]  # fmt: skip

    def add(self, ranges: list[Asked], owner: str | None) -> str:
        """:return: "held", "waiting" or "deadlock" """
        request = self.model.add(ranges, owner)
        claims = claims_for(ranges, owner)
        try:
            if len(claims) == 1 and self.queue.add_if_free(claims[0]):
                granted = True
            else:
                if self.queue.would_grant(claims) != (request is not None and request.held):
                    raise Difference("would_grant() is wrong")
                granted = self.queue.add(claims)
        except DeadlockError:
            if request is not None:
                raise Difference(f"deadlock at {ranges}, not in the model") from None
            return "deadlock"
        if request is None:
            raise Difference(f"no deadlock at {ranges}, but in the model")
        if granted != request.held:
            raise Difference(f"{ranges} granted: {granted}")
        self.claims[claims[0]] = request
        self.arrived.append(claims[0])
        return "held" if granted else "waiting"

    def remove(self, claim: Claim) -> None:
        request = self.claims.pop(claim)
        self.compare(self.queue.remove(claim), self.model.remove(request))

    def split(self, claim: Claim, at: int) -> None:
        halves = self.queue.split(claim, at)
        requests = self.model.split(self.claims.pop(claim), at)
        self.claims.update(zip(halves, requests, strict=True))

    def restrict(self, claim: Claim, start: int, stop: int) -> None:
        granted = self.queue.restrict(claim, start, stop)
        self.compare(granted, self.model.restrict(self.claims[claim], start, stop))

    def downgrade(self, claim: Claim) -> None:
        granted = self.queue.downgrade(claim)
        self.compare(granted, self.model.downgrade(self.claims[claim]))

    def hand_over(self, claim: Claim, owner: str | None) -> None:
        self.queue.hand_over(claim, owner)
        self.claims[claim].owner = owner

    def compare(self, granted: Sequence[Claim], expected: list[ModelRequest]) -> None:
        # In order of arrival, and no one twice.
        if [self.claims[claim] for claim in granted] != expected:
            raise Difference(f"granted {granted}")

    def check(self) -> None:
        for claim, request in self.claims.items():
            if (claim.state == HELD) != request.held:
                raise Difference(f"{claim} is held: {request.held} in the model")
        shared = sum(
            not part.exclusive for claim in self.held() for part in claim.parts
        )
        exclusive = sum(part.exclusive for claim in self.held() for part in claim.parts)
        assert (self.queue.held_shared, self.queue.held_exclusive) == (shared, exclusive)
        assert self.queue.waiting == len(self.claims) - len(self.held())
        self.queue._check()


# Histories


SCALES = (1, 1, 1, 4096, TIB // 16)
OWNERS = (*"abcdefgh", None)


def walk(queue: RegionQueue, randint: Any, steps: int, check_every: int = 1) -> None:
    """Walk a history that ``randint(low, high)`` decides, a choice after the other."""

    def choose(options: Sequence[Any]) -> Any:
        return options[randint(0, len(options) - 1)]

    def some_range() -> Asked:
        scale = choose(SCALES)
        start = randint(0, 16) * scale
        return start, min(start + randint(0, 12) * choose(SCALES[:4]), TIB), randint(0, 1) == 1

    history = Walk(queue)
    parked: dict[str | None, Claim] = {}
    for step in range(steps):
        for owner, claim in list(parked.items()):
            if claim.state != WAITING:
                del parked[owner]
        action = randint(0, 15)
        held = history.held()
        single = history.held(single=True)
        if action < 7 or not history.claims:
            # A task that waits cannot ask.
            owner = choose([owner for owner in OWNERS if owner not in parked])
            ranges = [some_range() for _ in range(choose((1, 1, 1, 1, 2, 3)))]
            if history.add(ranges, owner) == "waiting" and owner is not None:
                parked[owner] = history.arrived[-1]
        elif action < 10 and held:
            history.remove(choose(held))
        elif action < 12 and parked:
            history.remove(choose(list(parked.values())))
        elif action == 12 and single:
            claim = choose(single)
            history.split(claim, randint(claim.start, claim.stop))
        elif action == 13 and single:
            claim = choose(single)
            start = randint(claim.start, claim.stop)
            history.restrict(claim, start, randint(start, claim.stop))
        elif action == 14 and held:
            history.downgrade(choose(held))
        elif action == 15 and held:
            # Whoever takes over runs, so it does not wait.
            owners = [owner for owner in OWNERS if owner not in parked]
            history.hand_over(choose(held), choose(owners))
        if step % check_every == 0:
            history.check()
    for claim in list(history.claims):
        history.remove(claim)
    history.check()
    assert not history.queue._claims()


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_walks_as_the_model(choices: random.Random) -> None:
    """1 000 histories of 50 steps: queue and model grant the same, in the same order."""
    walk(RegionQueue(), choices.randint, 50)
