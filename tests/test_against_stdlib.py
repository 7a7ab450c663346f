"""Random operation sequences on a view and on the standard library's mmap of an identical file.

Each step runs on both sides. The results have to be the same, and so has the kind of error; then
cursor, length and content are compared. Where the contract says something else than ``mmap``
does, :data:`DIFFERENCES` says what and why, and the comparison expects just that.

``AIOMMAP_HYPOTHESIS=thorough`` runs 1 000 sequences for each event loop instead of a few.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aiommap import AsyncMmap, MmapView

from .conftest import BACKENDS

DIFFERENCES = {
    "slice of another size": (
        "mmap raises IndexError; the contract says what memoryview says, ValueError"
    ),
    "byte that is none": (
        "mmap raises TypeError for what is no integer and ValueError above 255; so do we, from "
        "memoryview"
    ),
    "whence": "mmap raises ValueError, as we do; seek gives the cursor here, and None before 3.13",
    "search without a start": (
        "mmap searches from its cursor; the map has none, and searches from its beginning: the "
        "comparison gives the start to both"
    ),
    "empty needle": (
        "mmap.find gives a place beyond the end or misses some; the contract follows bytes.find, "
        "so that is what is compared"
    ),
    "resize to 0": "mmap raises ValueError or OSError, depending on the version; we, ValueError",
    "read of a negative size": "all the rest for both",
    "readline with a size": "mmap has none; io.BytesIO's is compared in test_file_view.py",
    "write past the end": "ValueError for both, and nothing has changed",
    "resize moves no cursor": (
        "mmap's cursor stays; resizing needs the map, so a view is taken again here and its "
        "cursor put back, to the end if it is beyond (mmap cannot tell or seek there either)"
    ),
}


@dataclass
class Pair:
    """The same file twice: as an mmap object, and as a view of a map of ours."""

    theirs: mmap.mmap
    m: AsyncMmap
    v: MmapView

    def content(self) -> bytes:
        return self.theirs[:]

    def place(self, place: Place, base: int = 0) -> int:
        """A number, or a place that is inside now, seen from ``base``."""
        return place.number % (len(self.theirs) + 1) - base if place.inside else place.number


@dataclass(frozen=True)
class Place:
    """A number as it is, or one that is made to fit into what the file has when it is used."""

    number: int
    inside: bool


Outcome = tuple[str, Any]


def outcome_of(call: Callable[[], object]) -> Outcome:
    try:
        return "value", call()
    except (ValueError, TypeError, IndexError, BufferError, OSError) as exc:
        return "error", kind_of(exc)


async def outcome(call: Callable[[], Any]) -> Outcome:
    try:
        got = call()
        return "value", await got if hasattr(got, "__await__") else got
    except (ValueError, TypeError, IndexError, BufferError, OSError) as exc:
        return "error", kind_of(exc)


def kind_of(error: BaseException) -> str:
    for kind in (ValueError, TypeError, IndexError, BufferError, OSError):
        if isinstance(error, kind):
            return kind.__name__
    raise AssertionError(error)


# Steps: each gives what both sides did


async def read(pair: Pair, size: int | None) -> tuple[Outcome, Outcome]:
    return outcome_of(lambda: pair.theirs.read(size)), await outcome(lambda: pair.v.read(size))


async def readline(pair: Pair) -> tuple[Outcome, Outcome]:
    return outcome_of(pair.theirs.readline), await outcome(pair.v.readline)


async def seek(pair: Pair, place: Place, whence: int) -> tuple[Outcome, Outcome]:
    base = {1: pair.theirs.tell(), 2: len(pair.theirs)}.get(whence, 0)
    offset = pair.place(place, base)

    def theirs() -> int:
        pair.theirs.seek(offset, whence)  # type: ignore[arg-type]
        return pair.theirs.tell()

    return outcome_of(theirs), await outcome(lambda: pair.v.seek(offset, whence))


async def write(pair: Pair, data: bytes) -> tuple[Outcome, Outcome]:
    return outcome_of(lambda: pair.theirs.write(data)), await outcome(lambda: pair.v.write(data))


async def find(
    pair: Pair, needle: bytes, start: Place, end: Place | None, last: bool
) -> tuple[Outcome, Outcome]:
    arguments: tuple[Any, ...] = (needle, pair.place(start))
    if end is not None:
        arguments += (pair.place(end),)
    theirs = pair.theirs.rfind if last else pair.theirs.find
    if not needle:  # DIFFERENCES["empty needle"]
        content = pair.content()
        theirs = content.rfind if last else content.find
    # Searching takes the map's regions, so the view gives way and comes back.
    position = await give_way(pair)
    ours = pair.m.rfind if last else pair.m.find
    result = outcome_of(lambda: theirs(*arguments)), await outcome(lambda: ours(*arguments))
    await take_again(pair, position)
    return result


async def move(pair: Pair, dest: Place, src: Place, count: Place) -> tuple[Outcome, Outcome]:
    places = pair.place(dest), pair.place(src)
    number = pair.place(count)
    if count.inside:
        number = count.number % (len(pair.theirs) - max(*places, 0) + 1 or 1)
    position = await give_way(pair)
    result = (
        outcome_of(lambda: pair.theirs.move(*places, number)),
        await outcome(lambda: pair.m.move(*places, number)),
    )
    await take_again(pair, position)
    return result


async def resize(pair: Pair, size: int) -> tuple[Outcome, Outcome]:
    position = await give_way(pair)

    def theirs() -> None:
        if size == 0:  # DIFFERENCES["resize to 0"]
            raise ValueError
        pair.theirs.resize(size)

    result = outcome_of(theirs), await outcome(lambda: pair.m.resize(size))
    await take_again(pair, min(position, len(pair.m)))
    pair.theirs.seek(min(position, len(pair.theirs)))
    return result


Slice = tuple[Place | None, Place | None, int | None]


def slice_of(pair: Pair, key: Slice) -> slice:
    start, stop, step = key
    return slice(start and pair.place(start), stop and pair.place(stop), step)


async def get(pair: Pair, place: Place) -> tuple[Outcome, Outcome]:
    key = pair.place(place, place.number % 2 * len(pair.theirs))
    return outcome_of(lambda: pair.theirs[key]), await outcome(lambda: pair.v[key])


async def get_slice(pair: Pair, places: Slice) -> tuple[Outcome, Outcome]:
    key = slice_of(pair, places)
    return outcome_of(lambda: pair.theirs[key]), await outcome(lambda: pair.v[key])


async def set_item(pair: Pair, place: Place, value: object) -> tuple[Outcome, Outcome]:
    key = pair.place(place, place.number % 2 * len(pair.theirs))
    return (
        outcome_of(lambda: pair.theirs.__setitem__(key, value)),  # type: ignore[call-overload]
        await outcome(lambda: pair.v.__setitem__(key, value)),  # type: ignore[call-overload]
    )


async def set_slice(
    pair: Pair, places: Slice, value: bytes, fitting: bool
) -> tuple[Outcome, Outcome]:
    key = slice_of(pair, places)
    if fitting:
        count = len(range(*key.indices(len(pair.theirs))))
        value = ((value or b"x") * (count + 1))[:count]
    theirs = outcome_of(lambda: pair.theirs.__setitem__(key, value))
    if theirs == ("error", "IndexError"):  # DIFFERENCES["slice of another size"]
        theirs = ("error", "ValueError")
    return theirs, await outcome(lambda: pair.v.__setitem__(key, value))


async def flush(pair: Pair) -> tuple[Outcome, Outcome]:
    return outcome_of(pair.theirs.flush), await outcome(pair.v.flush)


async def tell(pair: Pair) -> tuple[Outcome, Outcome]:
    return outcome_of(pair.theirs.tell), await outcome(pair.v.tell)


async def give_way(pair: Pair) -> int:
    position = await pair.v.tell()
    await pair.v.aclose()
    return position


async def take_again(pair: Pair, position: int) -> None:
    pair.v = await pair.m.view_mut()
    await pair.v.seek(position)


# What hypothesis makes of them

PAGE = mmap.PAGESIZE
inside = st.integers(0, 2**16).map(lambda number: Place(number, True))
anywhere = st.one_of(
    st.integers(-20, 60), st.sampled_from([PAGE - 1, PAGE, PAGE + 1, -PAGE, 2**31, 2**62, -(2**62)])
).map(lambda number: Place(number, False))
place = st.one_of(inside, inside, anywhere)
letters = st.text("ab\n\0", max_size=9).map(str.encode)
needles = st.text("ab", max_size=3).map(str.encode)
optional = st.one_of(st.none(), place)
slices = st.tuples(optional, optional, st.one_of(st.none(), st.sampled_from([1, 2, 3, -1, -2, 7])))
items = st.one_of(st.integers(0, 255), st.integers(-3, 260), st.sampled_from([b"a", None, 1.5]))
lengths = st.one_of(st.integers(0, 60), st.sampled_from([PAGE, PAGE + 5, 3 * PAGE]))
step = st.one_of(
    st.tuples(st.just(read), st.one_of(st.none(), st.integers(-3, 20), st.just(PAGE))),
    st.tuples(st.just(readline)),
    st.tuples(st.just(tell)),
    st.tuples(st.just(seek), place, st.sampled_from([0, 0, 1, 1, 2, 2, 3, -1])),
    st.tuples(st.just(write), letters),
    st.tuples(st.just(find), needles, place, optional, st.booleans()),
    st.tuples(st.just(move), place, place, place),
    st.tuples(st.just(resize), lengths),
    st.tuples(st.just(get), place),
    st.tuples(st.just(get_slice), slices),
    st.tuples(st.just(set_item), place, items),
    st.tuples(st.just(set_slice), slices, letters, st.booleans()),
    st.tuples(st.just(flush)),
)


def at(number: int) -> Place:
    return Place(number, False)


contents = st.one_of(
    st.text("ab\n\0", min_size=8, max_size=41).map(str.encode),
    st.sampled_from([b"a\nb" * 14, b"x" * PAGE, b"ab\n" * (PAGE // 3) + b"ends"]),
)


@contextmanager
def opened_by_them(path: Path) -> Iterator[mmap.mmap]:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as theirs:
        yield theirs


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@given(content=contents, steps=st.lists(step, min_size=15, max_size=50))
@example(content=b"abc", steps=[(find, b"", at(3), None, False), (find, b"", at(0), None, True)])
@example(content=b"abc", steps=[(seek, at(0), 2), (read, 5), (write, b""), (write, b"a")])
@example(content=b"x" * PAGE, steps=[(resize, 3 * PAGE), (get, at(-1)), (resize, 5), (get, at(5))])
def test_same_as_mmap(
    backend: tuple[str, dict[str, Any]], content: bytes, steps: list[tuple[Any, ...]]
) -> None:
    """Any sequence of steps gives the same results, errors, cursor and content as mmap."""
    name, options = backend
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for each in ("theirs", "ours"):
            (folder / each).write_bytes(content)
        theirs = stack.enter_context(opened_by_them(folder / "theirs"))

        async def compare() -> None:
            async with AsyncMmap.open_path(folder / "ours", "r+") as m:
                pair = Pair(theirs, m, await m.view_mut())
                try:
                    for call, *arguments in steps:
                        expected, got = await call(pair, *arguments)
                        assert got == expected, (call.__name__, arguments)
                        assert await pair.v.tell() == theirs.tell()
                        assert len(pair.v) == len(m) == len(theirs)
                    assert bytes(pair.v) == theirs[:]
                finally:
                    await pair.v.aclose()

        anyio.run(compare, backend=name, backend_options=options)
        theirs.flush()
        assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()
        assert os.stat(folder / "ours").st_size == os.stat(folder / "theirs").st_size


def test_every_difference_has_a_reason() -> None:
    """The table of differences says something of each."""
    assert all(DIFFERENCES.values())
