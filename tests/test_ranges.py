"""Offsets, lengths and page spans."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiommap._ranges import (
    LARGEST_OFFSET,
    as_int,
    check_length,
    check_part,
    check_range,
    page_span,
    pieces,
)

any_int = st.one_of(
    st.integers(),
    st.integers(-3, 200),
    st.sampled_from([2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**64)]),
)


class Index:
    """What numpy's integers are to us."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __index__(self) -> int:
        return self._value


class bool_:  # noqa: N801 - the name of numpy's
    """What numpy's bool was: it has an ``__index__``."""

    def __index__(self) -> int:
        return 1


@pytest.mark.parametrize("value", [0, 1, -1, 2**64])
def test_whatever_has_an_index_is_an_integer(value: int) -> None:
    """Ints and objects with ``__index__`` are taken, and become ints."""
    assert as_int(value, "offset") == value
    assert as_int(Index(value), "offset") == value
    assert type(as_int(Index(value), "offset")) is int


@pytest.mark.parametrize("value", [True, False, bool_(), 1.0, "1", b"1", None, 1j, [1]])
def test_what_is_not_an_integer(value: object) -> None:
    """Bools, numpy's too, floats, strings and None are a TypeError that names the argument."""
    with pytest.raises(TypeError, match="the place must be an integer, not"):
        as_int(value, "the place")  # type: ignore[arg-type]


def test_an_error_of_index_is_kept_as_a_type_error() -> None:
    """An ``__index__`` that raises something else is not hidden."""

    class Broken:
        def __index__(self) -> int:
            raise ZeroDivisionError("broken")

    with pytest.raises(ZeroDivisionError, match="broken"):
        as_int(Broken(), "offset")


@given(any_int, st.one_of(any_int, st.none()), st.one_of(st.integers(0, 200), st.just(2**63 - 1)))
def test_inside_is_what_the_contract_says(offset: int, length: int | None, size: int) -> None:
    """Inside means ``0 <= offset <= size`` and ``0 <= length <= size - offset``, for any int."""
    inside = 0 <= offset <= size and (length is None or 0 <= length <= size - offset)
    if inside:
        expected = size - offset if length is None else length
        assert check_part(offset, length, size) == (offset, expected)
        assert length is None or check_range(offset, length, size) == (offset, expected)
        return
    with pytest.raises(ValueError, match="are not inside the map of") as caught:
        check_part(offset, length, size)
    numbers = [int(word) for word in re.findall(r"-?\d+", str(caught.value))]
    assert numbers[0] == offset
    assert numbers[-1] == size
    if length is not None:
        assert numbers[1] == length


def test_none_is_a_length_only_where_all_the_rest_makes_sense() -> None:
    """Where a length has to be given None is a TypeError, as any other that is no integer."""
    with pytest.raises(TypeError, match="length must be an integer, not None"):
        check_range(0, None, 10)  # type: ignore[arg-type]


def test_the_message_names_what_was_left() -> None:
    """The error names both numbers, the size, and whose they are."""
    message = "offset 3 and length 9 are not inside the view of 10 bytes"
    with pytest.raises(ValueError, match=message):
        check_range(3, 9, 10, "view")


@pytest.mark.parametrize("length", [1, 2**63 - 1])
def test_lengths_that_something_can_have(length: int) -> None:
    """From one byte to the largest ``off_t``."""
    assert check_length(length) == length


@pytest.mark.parametrize(
    ("length", "message"),
    [(0, "at least 1 byte, not 0"), (-1, "at least 1 byte, not -1"), (2**63, "any file can have")],
)
def test_lengths_that_nothing_can_have(length: int, message: str) -> None:
    """Zero, negative and more than ``off_t`` holds: ValueError with the number."""
    with pytest.raises(ValueError, match=message):
        check_length(length)


PAGE = 4096
offsets = st.integers(0, 10 * PAGE)


@given(offsets, offsets)
def test_page_span_is_the_smallest_that_covers(offset: int, length: int) -> None:
    """A span begins and ends at pages, covers the range, and has no page too many."""
    start, span = page_span(offset, length, PAGE)
    assert start % PAGE == span % PAGE == 0
    assert start <= offset < start + PAGE
    if length == 0:
        assert span == 0
    else:
        assert offset + length <= start + span < offset + length + PAGE


@given(offsets, offsets, st.integers(1, 3 * PAGE))
def test_pieces_cover_the_range_once(offset: int, length: int, size: int) -> None:
    """Pieces follow each other, are not empty, and end at multiples of the size."""
    end = offset
    for start, count in pieces(offset, length, size):
        assert start == end
        assert 0 < count <= size
        end += count
        assert end % size == 0 or end == offset + length
    assert end == offset + length


def test_largest_offset_is_off_t() -> None:
    """``off_t`` is signed and has 64 bits."""
    assert LARGEST_OFFSET == 2**63 - 1
