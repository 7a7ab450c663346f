"""When the loop may start reads itself: the rules alone."""

from __future__ import annotations

import pytest

from aiommap._read_starts import CAREFUL, COLD_MOST, COLD_READS, SLOW_START, ReadStarts


@pytest.mark.parametrize(("queue", "most"), [(0, 0), (1, 0), (8, 7), (16, 14), (256, 224)])
def test_an_eighth_of_the_queue_is_left(queue: int, most: int) -> None:
    """The disk's queue is never filled; where nothing is known of it nothing is started."""
    assert ReadStarts(queue).most == most


def test_misses_are_saved_up_to_a_limit() -> None:
    """Each miss has a few reads started at once, and a long cold past ends after a while."""
    starts = ReadStarts(256)
    starts.missed()
    starts.missed()
    assert starts.cold == 2 * COLD_READS
    for _ in range(COLD_MOST):
        starts.missed()
    assert starts.cold == COLD_MOST


def test_careful_after_slow_starts() -> None:
    """An average above the limit ends starts for a while; then they are tried anew."""
    starts = ReadStarts(256)
    count = 0
    while not starts.careful_until:
        starts.took(100.0, 100.0 + 2 * SLOW_START)
        count += 1
    assert 2 < count < 12  # of a moving average of eight, from nothing to half
    end = starts.careful_until
    assert end == 100.0 + 2 * SLOW_START + CAREFUL
    starts.recover(end)
    assert starts.careful_until == end
    starts.recover(end + 0.001)
    assert not starts.careful_until
    starts.took(end, end + 2 * SLOW_START)
    assert not starts.careful_until


def test_one_slow_start_is_an_accident() -> None:
    """A thread that lost its processor for a second is no busy disk."""
    starts = ReadStarts(256)
    for _ in range(100):
        starts.took(100.0, 101.0)
        for _ in range(20):
            starts.took(100.0, 100.0 + SLOW_START / 100)
        assert not starts.careful_until


def test_starts_at_the_limit_are_no_reason() -> None:
    """Only an average above it is."""
    starts = ReadStarts(256)
    for _ in range(1000):
        starts.took(0.0, SLOW_START)
    assert not starts.careful_until
