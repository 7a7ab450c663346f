"""A view as a binary anyio.AsyncFile: copies at a cursor of its own."""

from __future__ import annotations

import array
import io
import os
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiommap import AsyncMmap, MmapView, TruncatedError

from .content import file_of, inc

pytestmark = pytest.mark.anyio

TEXT = b"one\ntwo\n\nfour, the last without a newline"


@pytest.fixture
async def m(tmp_path: Path) -> AsyncIterator[AsyncMmap]:
    async with AsyncMmap.open_path(file_of(tmp_path, b"#" * 10 + TEXT + b"#" * 10), "r+") as m:
        yield m


@pytest.fixture
async def v(m: AsyncMmap) -> AsyncIterator[MmapView]:
    # Not entered here: a fixture runs in a task of its own on asyncio, and a view has one owner.
    left, rest = (await m.view_mut()).split_at(10)
    v, right = rest.split_at(len(TEXT))
    await left.aclose()
    await right.aclose()
    yield v
    await v.aclose()


async def test_read(v: MmapView) -> None:
    """read gives the next bytes, fewer at the end, then nothing."""
    assert await v.read(3) == b"one"
    assert await v.tell() == 3
    assert await v.read(0) == b""
    assert await v.read(2) == b"\nt"
    assert await v.read(1000) == TEXT[5:]
    assert await v.tell() == len(TEXT)
    assert await v.read(1) == b""
    assert await v.read() == b""


@pytest.mark.parametrize("size", [-1, None, -100])
async def test_read_all(v: MmapView, size: int | None) -> None:
    """None and negative sizes are all the rest."""
    await v.seek(4)
    assert await v.read(size) == TEXT[4:]
    await v.seek(0)
    assert await v.read() == TEXT


async def test_readline(v: MmapView) -> None:
    """readline gives lines with their newlines, the last without; then nothing."""
    assert await v.readline() == b"one\n"
    assert await v.readline(2) == b"tw"
    assert await v.readline(0) == b""
    assert await v.readline(100) == b"o\n"
    assert await v.readline(None) == b"\n"
    assert await v.readline(-1) == b"four, the last without a newline"
    assert await v.readline() == b""
    assert await v.tell() == len(TEXT)


async def test_lines(v: MmapView) -> None:
    """Asynchronous iteration gives the lines from the cursor on."""
    assert [line async for line in v] == TEXT.splitlines(keepends=True)
    assert [line async for line in v] == []
    await v.seek(5)
    assert [line async for line in v] == TEXT[5:].splitlines(keepends=True)


@pytest.mark.parametrize("length", [4_095, 4_096, 4_097, 12_287, 12_288, 50_000])
async def test_long_lines(tmp_path: Path, length: int) -> None:
    """Lines longer than what is looked at first come whole."""
    line = b"x" * (length - 1) + b"\n"
    data = line + b"y" * length
    async with AsyncMmap.open_path(file_of(tmp_path, data)) as m, m.view() as v:
        assert await v.readline() == line
        assert await v.readline() == b"y" * length
        await v.seek(0)
        assert await v.readline(length - 1) == line[:-1]
        assert await v.readline() == b"\n"


async def test_readinto(v: MmapView) -> None:
    """readinto fills a buffer from the cursor, in part at the end, and says how much."""
    buffer = bytearray(5)
    assert await v.readinto(buffer) == 5
    assert buffer == TEXT[:5]
    wide = array.array("H", [0, 0])
    assert await v.readinto(wide) == 4
    assert wide.tobytes() == TEXT[5:9]
    await v.seek(-2, os.SEEK_END)
    assert await v.readinto(buffer) == 2
    assert buffer == TEXT[-2:] + TEXT[2:5]
    assert await v.readinto(buffer) == 0
    assert await v.readinto(bytearray()) == 0
    with pytest.raises(TypeError, match="buffer must be writable"):
        await v.readinto(b"abc")


async def test_write(m: AsyncMmap, v: MmapView) -> None:
    """write stores at the cursor, moves it, and touches nothing around the view."""
    assert await v.write(b"ONE") == 3
    assert await v.tell() == 3
    assert await v.write(array.array("B", b"!")) == 1
    assert await v.write(b"") == 0
    await v.seek(-1, os.SEEK_END)
    assert await v.write(b"E") == 1
    expected = b"ONE!" + TEXT[4:-1] + b"E"
    assert bytes(v) == expected
    await v.aclose()
    assert await m.read_at(0, len(m)) == b"#" * 10 + expected + b"#" * 10


async def test_write_never_grows(v: MmapView) -> None:
    """A write past the end is a ValueError with the numbers, and nothing has changed."""
    await v.seek(-2, os.SEEK_END)
    with pytest.raises(ValueError, match=r"3 bytes do not fit at 39 in a view of 41 bytes"):
        await v.write(b"abc")
    assert await v.tell() == len(TEXT) - 2
    assert bytes(v) == TEXT
    await v.seek(0)
    with pytest.raises(ValueError, match="do not fit"):
        await v.write(bytes(len(TEXT) + 1))
    assert bytes(v) == TEXT


@pytest.mark.parametrize("wrong", ["text", None, 3])
async def test_write_wants_a_buffer(v: MmapView, wrong: object) -> None:
    """What is no buffer is a TypeError."""
    with pytest.raises(TypeError, match="must be bytes or another buffer"):
        await v.write(wrong)  # type: ignore[arg-type]


async def test_seek(v: MmapView) -> None:
    """seek counts from the start, the cursor or the end, and gives the cursor."""
    size = len(TEXT)
    assert await v.seek(5) == 5
    assert await v.seek(3, os.SEEK_CUR) == 8
    assert await v.seek(-8, os.SEEK_CUR) == 0
    assert await v.seek(0, os.SEEK_END) == size
    assert await v.seek(-size, os.SEEK_END) == 0
    assert await v.seek(size) == size
    assert await v.tell() == size


@pytest.mark.parametrize(
    ("offset", "whence"),
    [(-1, 0), (42, 0), (-6, 1), (37, 1), (1, 2), (-42, 2), (2**63, 0), (-(2**63), 2)],
)
async def test_seek_outside(v: MmapView, offset: int, whence: int) -> None:
    """A place outside the view is a ValueError, and the cursor stays."""
    await v.seek(5)
    with pytest.raises(ValueError, match=r"cannot seek to -?\d+ in a view of 41 bytes"):
        await v.seek(offset, whence)
    assert await v.tell() == 5


async def test_seek_with_wrong_arguments(v: MmapView) -> None:
    """An unknown whence is a ValueError; what is no integer is a TypeError."""
    for whence in (3, -1, "0"):
        with pytest.raises(ValueError, match="whence must be 0, 1 or 2"):
            await v.seek(0, whence)  # type: ignore[arg-type]
    for wrong in (1.0, True, None, "1"):
        with pytest.raises(TypeError, match="offset must be an integer"):
            await v.seek(wrong)  # type: ignore[arg-type]
    for wrong in (1.0, True, "1"):
        with pytest.raises(TypeError, match="size must be an integer"):
            await v.read(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="size must be an integer"):
            await v.readline(wrong)  # type: ignore[arg-type]


async def test_each_view_has_its_own_cursor(m: AsyncMmap) -> None:
    """Two views of the same region read independently."""
    async with m.view(10) as a, m.view(10) as b:
        await a.read(4)
        assert await b.tell() == 0
        assert await b.readline() == b"one\n"
        assert await a.readline() == b"two\n"


async def test_split_puts_cursors_to_zero(m: AsyncMmap) -> None:
    """The halves of a view begin to read at their own beginnings."""
    v = await m.view(10, len(TEXT))
    await v.seek(6)
    left, right = v.split_at(4)
    assert (await left.tell(), await right.tell()) == (0, 0)
    assert await left.read() == b"one\n"
    assert await right.readline() == b"two\n"
    await left.aclose()
    await right.aclose()


@pytest.mark.parametrize(("cursor", "after"), [(0, 0), (3, 0), (5, 1), (8, 4), (9, 4), (41, 4)])
async def test_restrict_clamps_the_cursor(v: MmapView, cursor: int, after: int) -> None:
    """restrict leaves the cursor on its byte, or at the nearer end."""
    await v.seek(cursor)
    v.restrict(4, 4)
    assert await v.tell() == after
    assert await v.read() == TEXT[4:8][after:]


async def test_anyio_file_functions_find_what_they_need(v: MmapView) -> None:
    """The methods have the names of anyio.AsyncFile's."""
    names = ("read", "readinto", "readline", "write", "seek", "tell", "aclose", "__aiter__")
    for name in names:
        assert hasattr(anyio.AsyncFile, name)
        assert hasattr(v, name)


async def test_reading_past_a_truncation(tmp_path: Path) -> None:
    """A truncated file is a TruncatedError here, and the cursor stays."""
    path = file_of(tmp_path, inc(100_000))
    async with AsyncMmap.open_path(path, "r+") as m, m.view_mut(load=False) as v:
        await v.seek(50_000)
        os.truncate(path, 10_000)
        with pytest.raises(TruncatedError, match="reaches to byte 10000"):
            await v.read()
        with pytest.raises(TruncatedError, match="reaches to byte 10000"):
            await v.write(b"abc")
        with pytest.raises(TruncatedError, match="reaches to byte 10000"):
            await v.readinto(bytearray(10))
        with pytest.raises(TruncatedError, match="reaches to byte 10000"):
            await v.readline()
        assert await v.tell() == 50_000
        await v.seek(0)
        assert await v.read(10_000) == inc(10_000)
        os.truncate(path, 100_000)


lines = st.lists(st.binary(max_size=6) | st.just(b"\n"), max_size=20).map(b"".join)
sizes = st.one_of(st.none(), st.integers(-2, 12))
steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["read", "readline"]), sizes),
        st.tuples(st.just("seek"), st.integers(0, 30)),
        st.tuples(st.just("readinto"), st.integers(0, 12)),
    ),
    max_size=12,
)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@given(data=lines.filter(bool), steps=steps)
def test_reads_as_bytesio_does(backend: str, data: bytes, steps: list[tuple[str, int]]) -> None:
    """Any sequence of reads gives what io.BytesIO gives."""

    async def compare() -> None:
        expected = io.BytesIO(data)
        m = await AsyncMmap.anonymous(len(data))
        await m.write_at(0, data)
        async with m.into_view() as v:
            for name, argument in steps:
                if name == "seek":
                    place = min(argument, len(data))
                    assert await v.seek(place) == expected.seek(place)
                elif name == "readinto":
                    a, b = bytearray(argument), bytearray(argument)
                    assert await v.readinto(a) == expected.readinto(b)
                    assert a == b
                else:
                    got = await getattr(v, name)(argument)
                    assert got == getattr(expected, name)(argument)
                assert await v.tell() == expected.tell()
            assert [line async for line in v] == expected.readlines()

    anyio.run(compare, backend=backend)
