"""The rules of the region lock, against a model that is obviously right."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiommap import _region_queue
from aiommap._errors import DeadlockError
from aiommap._range_index import FAN, FEW, RangeIndex
from aiommap._range_sets import clip, outside, union
from aiommap._region_queue import RegionQueue, claims_for, overlap
from aiommap._wait_graph import GONE, HELD, WAITING, Claim, WaitGraph

TIB = 2**40
Asked = tuple[int, int, bool]


class ModelRequest:
    """What the model knows of a request: its ranges now, and whether it holds them."""

    def __init__(self, ranges: list[Asked], owner: str | None) -> None:
        self.ranges = [asked for asked in ranges if asked[0] < asked[1]]
        self.owner = owner
        self.held = False
        # Requests that were waiting when this one came, and that it went past.
        self.passed: list[ModelRequest] = []


def conflict(one: ModelRequest, other: ModelRequest) -> bool:
    # Loops, because a history of 1 000 steps comes here a million times.
    for start, stop, alone in one.ranges:
        for low, high, other_alone in other.ranges:
            if start < high and low < stop and (alone or other_alone):
                return True
    return False


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
            asked
            for start, stop, exclusive in request.ranges
            if not exclusive
            for asked in clip(covered, start, stop)
        ]
        # What the same request asks for exclusively counts as exclusive only.
        free = [part for start, stop in free for part in outside(start, stop, alone)]
        strict = ModelRequest(
            [(*part, True) for part in alone]
            + [
                (*part, False)
                for start, stop, exclusive in request.ranges
                if not exclusive
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


class DifferenceError(AssertionError):
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
                    raise DifferenceError("would_grant() is wrong")
                granted = self.queue.add(claims)
        except DeadlockError:
            if request is not None:
                raise DifferenceError(f"deadlock at {ranges}, not in the model") from None
            return "deadlock"
        if request is None:
            raise DifferenceError(f"no deadlock at {ranges}, but in the model")
        if granted != request.held:
            raise DifferenceError(f"{ranges} granted: {granted}")
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
            raise DifferenceError(f"granted {granted}")

    def check(self) -> None:
        for claim, request in self.claims.items():
            if (claim.state == HELD) != request.held:
                raise DifferenceError(f"{claim} is held: {request.held} in the model")
        shared = sum(not part.exclusive for claim in self.held() for part in claim.parts)
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_long_walks_as_the_model(seed: int) -> None:
    """Histories of 1 000 steps, with no end in between, keep to the model."""
    walk(RegionQueue(), random.Random(seed).randint, 1000, check_every=20)


@pytest.mark.parametrize("seed", range(40))
def test_some_walks_as_the_model(seed: int) -> None:
    """The same as above, in little."""
    walk(RegionQueue(), random.Random(seed).randint, 50)


# Planted faults


class Unchecked(RegionQueue):
    """Only the model can tell."""

    def _check(self) -> None:
        pass


class UnfairOnAdd(Unchecked):
    """A new request looks at what is held only, and passes those who wait."""

    def _in_the_way(self, claim: Claim) -> list[Any]:
        return [piece for piece in super()._in_the_way(claim) if piece.claim.state == HELD]


class UnfairOnWakeUp(Unchecked):
    """A release grants whoever conflicts with nothing that is held."""

    def _grant(self, touched: Iterable[Claim]) -> Sequence[Claim]:
        for claim in touched:
            for part in claim.parts:
                for earlier in list(part.waits_for):
                    if earlier.state == WAITING:
                        del self._links(part).waits_for[earlier]
        return super()._grant(touched)


class ForgetsReleaseOnCancel(Unchecked):
    """A cancelled waiter leaves, but those who waited for it are not looked at again."""

    def remove(self, lead: Claim) -> Sequence[Claim]:
        cancelled = lead.state == WAITING
        self._closing = cancelled
        granted = super().remove(lead)
        self._closing = False
        return granted


class ForgetsOrderOnCancel(Unchecked):
    """What a cancelled writer hid stays hidden."""

    def _bequeath(self, *_: Any) -> None:
        pass


class SplitForgetsWaiter(Unchecked):
    """The last one who waits is not told of the right half."""

    def split(self, claim: Claim, at: int) -> tuple[Claim, Claim]:
        left, right = super().split(claim, at)
        waiters = list(right.waited_by)
        if waiters:
            del self._links(waiters[-1]).waits_for[right]
            del self._links(right).waited_by[waiters[-1]]
        return left, right


class RestrictForgetsWaiter(Unchecked):
    """Who waited for the rest only is not granted."""

    def restrict(self, claim: Claim, start: int, stop: int) -> Sequence[Claim]:
        self._closing = True
        super().restrict(claim, start, stop)
        self._closing = False
        return ()


class DowngradeForgetsReaders(Unchecked):
    """Readers behind a writer that became a reader wait on."""

    def downgrade(self, lead: Claim) -> Sequence[Claim]:
        self._closing = True
        super().downgrade(lead)
        self._closing = False
        return ()


class PassesNoWriter(Unchecked):
    """A reader that reads already waits behind writers that wait for it."""

    def _plan(self, claim: Claim) -> Any:
        pieces, own = super()._plan(claim)
        return (self._in_the_way(claim), []) if own else (pieces, own)


@pytest.mark.parametrize(
    "fault",
    [
        UnfairOnAdd,
        UnfairOnWakeUp,
        ForgetsReleaseOnCancel,
        ForgetsOrderOnCancel,
        SplitForgetsWaiter,
        RestrictForgetsWaiter,
        DowngradeForgetsReaders,
        PassesNoWriter,
    ],
)
def test_model_catches(fault: type[RegionQueue]) -> None:
    """Each planted fault makes a difference from the model within 1 000 histories."""
    for seed in range(1000):
        try:
            walk(fault(), random.Random(seed).randint, 50)
        except DifferenceError:
            return
        except (AssertionError, KeyError):
            # It stumbled over its own fault before the model could tell.
            continue
    pytest.fail(f"{fault.__name__} went unnoticed")


# What the walks cannot see: order, cost, messages


def held(queue: RegionQueue, start: int, stop: int, exclusive: bool, owner: Any = None) -> Claim:
    claim = Claim(start, stop, exclusive, owner)
    assert queue.add((claim,))
    return claim


def waiting(queue: RegionQueue, start: int, stop: int, exclusive: bool, owner: Any = None) -> Claim:
    claim = Claim(start, stop, exclusive, owner)
    assert not queue.add((claim,))
    return claim


def test_plain_example() -> None:
    """A writer waits for the readers before it, a reader after it waits for the writer."""
    queue = RegionQueue()
    reader, other = held(queue, 0, 10, False), held(queue, 5, 15, False)
    writer = waiting(queue, 0, 10, True)
    late = waiting(queue, 9, 20, False)
    beside = held(queue, 10, 15, False)
    assert queue.remove(reader) == []
    assert queue.remove(other) == [writer]
    assert queue.remove(writer) == [late]
    queue._check()
    assert [claim.state for claim in (late, beside)] == [HELD, HELD]


def test_readers_are_granted_together_in_order_of_arrival() -> None:
    """A release grants all readers at once, and names them as they came."""
    queue = RegionQueue()
    writer = held(queue, 0, 100, True)
    readers = [waiting(queue, start, 100, False) for start in (50, 10, 90, 0, 70)]
    assert queue.remove(writer) == readers


def test_granted_once() -> None:
    """Who waits for several gets one grant, with the last of them."""
    queue = RegionQueue()
    holds = [held(queue, start, start + 10, True) for start in range(0, 100, 10)]
    wide = waiting(queue, 0, 100, True)
    grants = [queue.remove(hold) for hold in holds]
    assert grants == [[]] * 9 + [[wide]]


def test_parts_are_granted_together() -> None:
    """A request for two ranges holds neither before it can hold both."""
    queue = RegionQueue()
    first, second = held(queue, 0, 10, True), held(queue, 20, 30, True)
    both = claims_for([(0, 10, False), (20, 30, True)], None)
    assert not queue.add(both)
    assert not queue.remove(first)
    behind = waiting(queue, 5, 6, True)
    assert queue.remove(second) == [both[0]]
    assert queue.remove(both[0]) == [behind]


def test_ranges_of_one_request_are_joined() -> None:
    """Overlapping ranges of one request become one, exclusive where any is."""
    claims = claims_for([(0, 10, False), (4, 6, True), (8, 12, False), (3, 3, True)], None)
    assert sorted((c.start, c.stop, c.exclusive) for c in claims) == [
        (0, 4, False),
        (4, 6, True),
        (6, 12, False),
    ]
    assert len(claims_for([(5, 5, True)], None)) == 1


def test_closing_grants_nobody() -> None:
    """All who wait are cancelled; nobody is granted on the way; what is held stays held."""
    queue = RegionQueue()
    hold = held(queue, 0, 10, True)
    waiters = [waiting(queue, n % 7, 10 + n, n % 3 == 0) for n in range(30)]
    assert queue.remove_waiting() == waiters
    assert {claim.state for claim in waiters} == {GONE}
    queue._check()
    assert (queue.waiting, queue.longest_queue, hold.state) == (0, 30, HELD)
    assert queue.remove(hold) == []
    assert not queue._claims()


class Counting(RegionQueue):
    """Counts the waits it notes: what enqueueing costs, and what waking costs."""

    links = 0

    def _link(self, later: Claim, earlier: Claim) -> list[tuple[int, int]]:
        self.links += 1
        return super()._link(later, earlier)


def test_hot_range_costs_the_same_for_each_waiter() -> None:
    """Of 3 000 readers and writers on one range none waits for more than its neighbours."""
    queue = Counting()
    held(queue, 0, 10, True)
    for n in range(3000):
        waiting(queue, 0, 10, n % 4 == 0)
    # A reader waits for a writer; the writer after three readers for them and for their writer.
    assert queue.links <= 2 * 3000


def test_narrow_writers_under_wide_readers() -> None:
    """Writers on one byte meet the readers of everything once, not once each."""
    queue = Counting()
    for _ in range(500):
        held(queue, 0, TIB, False)
    for _ in range(500):
        waiting(queue, 77, 78, True)
    assert queue.links <= 500 + 500


class CountingRanges(Counting):
    """Counts the ranges that it shows, and those in what waits note of the claims they hide."""

    shown = 0

    def _show(self, claim: Claim, start: int, stop: int) -> None:
        self.shown += 1
        super()._show(claim, start, stop)

    def _visible(self, claim: Claim) -> list[tuple[int, int]]:
        visible = super()._visible(claim)
        self.shown += len(visible)
        return visible


def test_a_task_that_holds_much_shared_asks_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more byte meets one of its 1 000 holds, all of them again meet each once."""
    looks = 0

    def counting_clip(ranges: Iterable[tuple[int, int]], start: int, stop: int) -> Any:
        nonlocal looks
        ranges = list(ranges)
        looks += len(ranges)
        return clip(ranges, start, stop)

    def counting_overlap(one: Any, other: Any) -> bool:
        nonlocal looks
        looks += 1
        return overlap(one, other)

    monkeypatch.setattr(_region_queue, "clip", counting_clip)
    monkeypatch.setattr(_region_queue, "overlap", counting_overlap)
    graph = WaitGraph()
    queue, other = CountingRanges(graph), CountingRanges(graph)
    for lock in (queue, other):
        for n in range(1000):
            held(lock, n, n + 1, False, "A")
        waiting(lock, 0, 1000, True, "B" if lock is queue else "C")
    queue.links = queue.shown = looks = 0
    again = held(queue, 500, 501, False, "A")
    assert (queue.links, queue.shown) == (1, 0)
    assert looks == 1
    queue.remove(again)
    wide = held(queue, 0, 1000, False, "A")
    assert queue.links == 1001
    assert looks <= 1002
    assert all(len(later.links.waits_for[wide]) == 1 for later in wide.waited_by if later.links)
    held(queue, 500, 501, False, "A")
    assert looks <= 1003
    queue._check()


def test_a_sliver_that_is_cut_off_concerns_those_who_meet_it() -> None:
    """Of 1 000 writers who wait, each for a byte of its own, a cut of one byte looks at one."""
    for at in (10, 990):
        queue = CountingRanges()
        rest = held(queue, 0, 1000, False)
        for n in range(0, 1000, 2):
            waiting(queue, n, n + 1, True)
        queue.links = queue.shown = 0
        left, right = queue.split(rest, at)
        assert queue.links == 5
        assert queue.shown <= 6
        queue._check()
        kept = max(left, right, key=lambda half: half.stop - half.start)
        queue.links = queue.shown = 0
        assert len(queue.restrict(kept, kept.start + 1, kept.stop)) == 1
        assert (queue.links, queue.shown) == (0, 0)
        queue._check()


def test_what_cancelled_writers_hid_is_counted_once_when_a_hold_is_cut() -> None:
    """Who hides all of a hold, and hid it piece by piece, hides each half as one range."""
    queue = RegionQueue()
    hold = held(queue, 0, 1000, False)
    writers = [waiting(queue, n, n + 1, True) for n in range(0, 1000, 2)]
    last = waiting(queue, 0, 1000, True)
    for writer in writers:
        queue.remove(writer)
    left, right = queue.split(hold, 400)
    assert last.links is not None
    assert last.links.waits_for == {left: [(0, 400)], right: [(400, 1000)]}
    queue._check()


def test_cancelled_writers_leave_a_reader_whole() -> None:
    """10 000 writers who give up do not leave the reader they waited for in 10 000 pieces."""
    queue = RegionQueue()
    reader = held(queue, 0, TIB, False)
    rng = random.Random(1)
    for _ in range(1000):
        start = rng.randrange(1000)
        writers = [waiting(queue, start + n, start + 2 * n + 1, True) for n in range(10)]
        rng.shuffle(writers)
        for writer in writers:
            queue.remove(writer)
        assert queue._visible(reader) == [(0, TIB)]


# Deadlocks


def test_cycle_is_refused_and_named() -> None:
    """A holds 1 and wants 2, B holds 2 and wants 1: B is refused, and told why."""
    queue = RegionQueue()
    held(queue, 0, 10, True, "A")
    held(queue, 10, 20, True, "B")
    waiting(queue, 10, 20, True, "A")
    before = queue._claims()
    with pytest.raises(DeadlockError) as caught:
        queue.add((Claim(5, 6, False, "B"),))
    assert str(caught.value) == (
        "deadlock: 'B' asks for [5, 6) shared, which waits for [0, 10) exclusive held by 'A', who "
        "waits for [10, 20) exclusive held by 'B'; release first, or take the regions in one "
        "order everywhere"
    )
    assert queue._claims() == before
    queue._check()


def test_long_cycle_through_readers_and_waiters() -> None:
    """A cycle of five tasks, through a crowd of readers and a waiting writer, is found."""
    queue = RegionQueue()
    for n, owner in enumerate("ABCDE"):
        held(queue, 10 * n, 10 * n + 10, False, owner)
        for reader in range(20):
            held(queue, 10 * n, 10 * n + 10, False, f"{owner}{reader}")
    for n, owner in enumerate("ABCD"):
        waiting(queue, 10 * n + 15, 10 * n + 16, True, owner)
    waiting(queue, 5, 6, True, "someone")
    with pytest.raises(
        DeadlockError, match=r"asked for by 'someone', which waits for .* who waits for"
    ):
        queue.add((Claim(5, 6, True, "E"),))


def test_a_very_long_cycle_is_named_by_its_ends() -> None:
    """The message has the waits at both ends of a cycle, and how many it leaves out."""
    for waiters, left_out in ((9, 0), (10, 2), (3000, 2992)):
        queue = RegionQueue()
        held(queue, 0, 1, True, "A")
        held(queue, 10, 11, True, "B")
        waiting(queue, 0, 1, True, "B")
        for n in range(waiters):
            waiting(queue, 10, 11, True, n)
        with pytest.raises(DeadlockError) as caught:
            queue.add((Claim(10, 11, True, "A"),))
        message = str(caught.value)
        assert message.count("waits for [") == (10 if left_out else waiters + 2)
        assert f"by {waiters - 1}, which" in message
        assert "who waits for [0, 1) exclusive held by 'A'; release first" in message
        more = f"which waits for the first of {left_out} more in a row, the last of which waits for"
        assert (more in message) == bool(left_out)


def test_cycle_through_two_locks() -> None:
    """Locks that share a graph see the cycles that go through both."""
    graph = WaitGraph()
    one, two = RegionQueue(graph), RegionQueue(graph)
    held(one, 0, 1, True, "A")
    held(two, 0, 1, True, "B")
    waiting(two, 0, 1, True, "A")
    with pytest.raises(DeadlockError, match="'B' asks for"):
        one.add((Claim(0, 1, True, "B"),))
    one._check()
    two._check()


@pytest.mark.parametrize("exclusive", [False, True])
def test_own_hold_is_refused_behind_a_waiter_too(exclusive: bool) -> None:
    """A conflict with one's own hold is a deadlock, also where a waiting writer hides it."""
    queue = RegionQueue()
    held(queue, 0, 10, exclusive, "A")
    waiting(queue, 0, 20, True, "B")
    claim = Claim(5, 6, not exclusive, "A")
    with pytest.raises(DeadlockError, match=r"'A' asks for \[5, 6\) .* holds \[0, 10\) .* itself"):
        queue.would_grant((claim,))
    with pytest.raises(DeadlockError, match="itself"):
        queue.add((claim,))
    queue._check()


def test_reader_passes_writers_that_wait_for_it() -> None:
    """Bytes held shared are free for a further shared request of the task; others wait."""
    queue = RegionQueue()
    hold = held(queue, 0, 10, False, "A")
    writer = waiting(queue, 5, 20, True, "B")
    again = held(queue, 2, 8, False, "A")
    waiting(queue, 2, 8, False, "C")
    with pytest.raises(DeadlockError, match="'A' asks for"):
        queue.add((Claim(8, 12, False, "A"),))
    queue._check()
    assert queue.remove(hold) == []
    assert queue.remove(again) == [writer]


def test_hand_over_moves_the_hold() -> None:
    """After a hand-over the new owner is the one who must not ask; nobody's holds are free."""
    queue = RegionQueue()
    hold = held(queue, 0, 10, True, "A")
    queue.hand_over(hold, "B")
    with pytest.raises(DeadlockError, match="'B' asks for"):
        queue.add((Claim(0, 1, True, "B"),))
    waiter = waiting(queue, 0, 1, True, "A")
    queue.hand_over(hold, None)
    waiting(queue, 0, 1, True, "B")
    queue._check()
    assert queue.remove(hold) == [waiter]


class CountingGraph(WaitGraph):
    """Counts the steps of its searches."""

    steps = 0

    def _towards(self, *args: Any) -> Any:
        for step in super()._towards(*args):
            self.steps += 1
            yield step


def test_search_ends_with_the_smaller_side() -> None:
    """No cycle is seen in a few steps where either side of the request is small."""
    graph = CountingGraph()
    queue = RegionQueue(graph)
    held(queue, 0, 10, True, "hot")
    for n in range(1000):
        held(queue, 100 + n, 101 + n, True, n)
    for n in range(1000):
        waiting(queue, 0, 10, True, n)
    assert graph.steps == 0, "who holds nothing that others wait for is not searched for"
    held(queue, 50, 51, True, "late")
    waiting(queue, 50, 51, True, "idle")
    waiting(queue, 0, 10, True, "late")  # long ahead, short back
    held(queue, 60, 61, True, "other")
    waiting(queue, 60, 61, True, "hot")  # short ahead, long back
    assert 0 < graph.steps < 20


# The index, and sets of ranges


@pytest.mark.parametrize("seed", range(6))
def test_index_finds_what_overlaps(seed: int) -> None:
    """The index finds exactly what a look at every piece finds, with tries and without."""
    rng = random.Random(seed)
    index: RangeIndex[Claim] = RangeIndex()
    pieces: list[Claim] = []
    span = rng.choice([100, 10 * FAN**2, TIB])
    for step in range(1500):
        length = rng.choice([1, 2, 3, 4, 17, 4096, span // 3 or 1])
        start = rng.randrange(-span, span)
        piece = Claim(start, start + rng.randint(1, length), False)
        # Grow, then shrink.
        if rng.random() < (0.9 if step < 1000 else 0.2) or not pieces:
            pieces.append(piece)
            index.add(piece)
        else:
            index.remove(pieces.pop(rng.randrange(len(pieces))))
        expected = {p for p in pieces if p.start < start + length and start < p.stop}
        found = index.overlapping(start, start + length)
        assert len(found) == len(expected)
        assert set(found) == expected
        assert index.overlaps(start, start + length) == bool(expected)
        if step % 100 == 0:
            index.check()
    for piece in pieces:
        index.remove(piece)
    index.check()
    assert not index.classes


@pytest.mark.parametrize("seed", range(4))
def test_index_adds_only_what_is_free(seed: int) -> None:
    """add_if_free() inserts a piece exactly when it overlaps none."""
    rng = random.Random(seed)
    index: RangeIndex[Claim] = RangeIndex()
    covered: set[int] = set()
    longest = rng.choice([1, 8, 50])
    for _ in range(2000):
        start = rng.randrange(5000)
        piece = Claim(start, start + rng.randint(1, longest), True)
        numbers = set(range(piece.start, piece.stop))
        assert index.add_if_free(piece) == (not numbers & covered)
        if not numbers & covered:
            covered |= numbers
    index.check()


@pytest.mark.parametrize("span", [1 << 12, TIB, 1 << 63])
def test_the_trie_names_the_buckets_in_a_range(span: int) -> None:
    """Exactly those in use, from the first to the last, however far apart they are."""
    rng = random.Random(span)
    index: RangeIndex[Claim] = RangeIndex()
    numbers = {rng.randrange(-span, span) for _ in range(1000)}
    for number in numbers:
        index.add(Claim(number, number + 1, True))
    (size,) = index.classes.values()
    assert len(size.levels) > 1
    for first in rng.sample(sorted(numbers), 50):
        for width in (0, 1, FAN, 5 * FAN, span // 10, 2 * span):
            for low in (first, first + 1):
                expected = {number for number in numbers if low <= number <= first + width}
                if low <= first + width:
                    assert sorted(size.in_use(low, first + width)) == sorted(expected)
                    assert size.any_in_use(low, first + width) == bool(expected)


def test_whether_a_wide_range_is_free_is_found_at_the_first_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing lists the 10 000 pieces in it."""
    index: RangeIndex[Claim] = RangeIndex()
    for n in range(10_000):
        index.add(Claim(n * 8192, n * 8192 + 4096, True))
    (size,) = index.classes.values()
    monkeypatch.delattr(type(size), "in_use")
    assert index.overlaps(0, TIB)
    assert index.overlaps(4096, 4096 * 9)
    assert not index.overlaps(8192 * 10_000, TIB)
    assert not index.overlaps(-TIB, 0)


def test_an_index_that_was_large_is_small_again() -> None:
    """When the last piece of a size goes, so do the tables that 10 000 have filled."""
    index: RangeIndex[Claim] = RangeIndex()
    pieces = [Claim(n * 4096, (n + 1) * 4096, True) for n in range(10_000)]
    for piece in pieces:
        index.add(piece)
    for piece in pieces:
        index.remove(piece)
    index.add(pieces[0])
    (size,) = index.classes.values()
    assert sys.getsizeof(size.buckets) <= sys.getsizeof({0: piece})
    index.check()


def test_wide_search_does_not_try_every_bucket() -> None:
    """A search over a TiB among 10 000 small pieces elsewhere looks at a few nodes."""
    index: RangeIndex[Claim] = RangeIndex()
    for n in range(10_000):
        index.add(Claim(n * 8192, n * 8192 + 4096, True))
    (size,) = index.classes.values()
    assert len(size.levels) == 2
    assert size.in_use(10**10, 2**60) == []
    assert len(size.levels[-1]) <= FEW
    assert len(index.overlapping(0, TIB)) == 10_000


@given(
    st.lists(st.tuples(st.integers(-20, 20), st.integers(-20, 20))),
    st.integers(-20, 20),
    st.integers(-20, 20),
)
def test_sets_of_ranges(ranges: list[tuple[int, int]], start: int, stop: int) -> None:
    """clip, outside and union do to ranges what sets do to their members."""

    def numbers(some: Iterable[tuple[int, int]]) -> set[int]:
        return {number for low, high in some for number in range(low, high)}

    here = set(range(start, stop))
    assert numbers(clip(ranges, start, stop)) == numbers(ranges) & here
    assert numbers(outside(start, stop, ranges)) == here - numbers(ranges)
    joined = union(ranges)
    assert numbers(joined) == numbers(ranges)
    assert all(low < high for low, high in joined)
    assert all(left[1] < right[0] for left, right in pairwise(joined))
