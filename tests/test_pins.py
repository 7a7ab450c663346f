"""Pin counts: runs of pages, against a count per page."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from aiommap._pins import PinCounts

PAGES = 40
ranges = st.tuples(st.integers(0, PAGES), st.integers(0, PAGES)).map(lambda p: (min(p), max(p)))


class PinCountsMachine(RuleBasedStateMachine):
    """Counts up and down in any order are what a dictionary of pages says."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = PinCounts()
        self.model = dict.fromkeys(range(PAGES), 0)

    @rule(pages=ranges)
    def pin(self, pages: tuple[int, int]) -> None:
        self.counts.add(*pages, 1)
        for page in range(*pages):
            self.model[page] += 1

    @rule(pages=ranges)
    def unpin(self, pages: tuple[int, int]) -> None:
        if all(self.model[page] for page in range(*pages)):
            self.counts.add(*pages, -1)
            for page in range(*pages):
                self.model[page] -= 1

    @rule(pages=ranges)
    def ask(self, pages: tuple[int, int]) -> None:
        for runs, wanted in (
            (self.counts.unpinned(*pages), 0),
            (self.counts.pinned_once(*pages), 1),
        ):
            named = [page for first, count in runs for page in range(first, first + count)]
            assert named == [page for page in range(*pages) if self.model[page] == wanted]
            assert all(count > 0 for _, count in runs)
            # As few runs as possible: they do not touch.
            assert all(a + n < b for (a, n), (b, _) in pairwise(runs))

    @invariant()
    def is_sound(self) -> None:
        self.counts._check()


TestPinCounts = PinCountsMachine.TestCase
TestPinCounts.__doc__ = PinCountsMachine.__doc__


@given(st.lists(ranges, max_size=30))
def test_undoing_everything_leaves_nothing(pins: list[tuple[int, int]]) -> None:
    """After as many unpins as pins there is one run, and it is not pinned."""
    counts = PinCounts()
    for pages in pins:
        counts.add(*pages, 1)
    for pages in reversed(pins):
        counts.add(*pages, -1)
    assert counts._starts == [0]
    assert counts.unpinned(0, PAGES) == [(0, PAGES)]
