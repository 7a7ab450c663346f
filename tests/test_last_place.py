"""The last place of a needle, found by searches for the first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aiommap._kernel._last_place import last_place

letters = st.binary(max_size=60).map(lambda data: bytes(byte % 2 for byte in data))


class Searched:
    """Bytes that count how many of them were searched."""

    def __init__(self, data: bytes, needle: bytes) -> None:
        self.data = data
        self.needle = needle
        self.bytes = 0

    def find(self, start: int, stop: int) -> int:
        assert 0 <= start <= stop <= len(self.data)
        self.bytes += stop - start
        found = self.data.find(self.needle, start, stop)
        return found if found < 0 else found - start

    def last_place(self) -> int:
        return last_place(self.find, len(self.data), len(self.needle))


@given(data=letters, needle=letters.filter(bool))
def test_as_rfind(data: bytes, needle: bytes) -> None:
    """It is where bytes.rfind says, wherever and however often the needle occurs."""
    assert Searched(data, needle).last_place() == data.rfind(needle)


@given(place=st.integers(0, 9_990), more=st.lists(st.integers(0, 9_990), max_size=5))
def test_all_is_searched_about_twice(place: int, more: list[int]) -> None:
    """Many or few places, near or far: no more than a few times the length is searched."""
    data = bytearray(10_000)
    for start in (place, *more):
        data[start : start + 10] = b"the needle"
    searched = Searched(bytes(data), b"the needle")
    assert searched.last_place() == data.rfind(b"the needle")
    assert searched.bytes <= 2 * len(data) + 20 * len(b"the needle")
    nothing_but = Searched(bytes(10_000), bytes(10))
    assert nothing_but.last_place() == 9_990
    assert nothing_but.bytes <= 2 * len(data) + 20 * 10
