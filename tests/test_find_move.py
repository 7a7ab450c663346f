"""find, rfind and move: as bytes and mmap, off the loop."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import ClosedResourceError
from hypothesis import example, given
from hypothesis import strategies as st

from aiommap import AsyncMmap, DeadlockError, TruncatedError, _byte_search, _pager
from aiommap._mapping import Mapping

from .content import file_of, inc
from .fake_kernel import FakeKernel
from .flushing import mapped_by

pytestmark = pytest.mark.anyio

PAGE = 4096
N = 2_000_000  # several pieces of a search
NEEDLE = b"the needle"


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 512 KiB in two windows, so that a small file has several."""
    monkeypatch.setattr(_pager, "FIRST_STREAMED", 512 << 10)
    monkeypatch.setattr(_pager, "FIRST_STREAMED_FAR", 512 << 10)
    monkeypatch.setattr(_pager, "MOST_SEARCHED", 512 << 10)
    monkeypatch.setattr(_byte_search, "_WINDOW", 256 << 10)


@pytest.fixture
async def m(tmp_path: Path) -> AsyncIterator[AsyncMmap]:
    async with AsyncMmap.open_path(file_of(tmp_path, N), "r+") as m:
        yield m


small = st.binary(max_size=12).map(lambda data: bytes(byte % 3 for byte in data))
place = st.one_of(st.none(), st.integers(-16, 16), st.sampled_from([2**70, -(2**70)]))


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@given(data=small.filter(bool), needle=small, start=place, end=place)
@example(data=b"abc", needle=b"", start=3, end=None)
@example(data=b"abc", needle=b"", start=4, end=None)
@example(data=b"abc", needle=b"", start=2, end=1)
def test_as_bytes(
    backend: str, data: bytes, needle: bytes, start: int | None, end: int | None
) -> None:
    """find and rfind follow bytes.find and bytes.rfind for every needle, start and end."""

    async def compare() -> None:
        async with AsyncMmap.anonymous(len(data)) as m:
            await m.write_at(0, data)
            first = 0 if start is None else start
            assert await m.find(needle, first, end) == data.find(needle, first, end)
            assert await m.rfind(needle, first, end) == data.rfind(needle, first, end)

    anyio.run(compare, backend=backend)


async def test_places_around_the_borders_of_pieces(m: AsyncMmap) -> None:
    """A needle is found wherever it lies, across the borders of pieces and windows too."""
    borders = (0, 256 << 10, 512 << 10, (512 << 10) + 9, 1 << 20, N - len(NEEDLE))
    for border in borders:
        for place in {max(border - len(NEEDLE) + 1, 0), max(border - 1, 0), border}:
            await m.write_at(place, NEEDLE)
            assert await m.find(NEEDLE) == place
            assert await m.rfind(NEEDLE) == place
            assert await m.find(NEEDLE, place + 1) == -1
            assert await m.rfind(NEEDLE, 0, place + len(NEEDLE) - 1) == -1
            assert await m.find(NEEDLE, place, place + len(NEEDLE)) == place
            await m.write_at(place, bytes(len(NEEDLE)))
    assert await m.find(NEEDLE) == await m.rfind(NEEDLE) == -1


async def test_first_and_last_of_many(m: AsyncMmap) -> None:
    """find gives the first place and rfind the last, pieces apart."""
    for place in (700_000, 100, 1_900_000, 800_000):
        await m.write_at(place, NEEDLE)
    assert await m.find(NEEDLE) == 100
    assert await m.rfind(NEEDLE) == 1_900_000
    assert await m.find(NEEDLE, 101) == 700_000
    assert await m.rfind(NEEDLE, 0, 1_900_000) == 800_000
    assert await m.find(NEEDLE, -200_000) == 1_900_000
    assert await m.rfind(NEEDLE, 0, -200_000) == 800_000


@pytest.mark.parametrize("size", [300_000, 700_001])
async def test_a_needle_larger_than_a_piece(m: AsyncMmap, size: int) -> None:
    """Needles of any size are found."""
    needle = inc(size, 1)
    await m.write_at(1_000_003, needle)
    assert await m.find(needle) == await m.rfind(needle) == 1_000_003
    assert await m.find(needle + b"x") == -1
    assert await m.find(bytes(N + 1)) == -1


async def test_needles_of_other_types(m: AsyncMmap) -> None:
    """Any contiguous buffer is a needle; a string is a TypeError."""
    await m.write_at(1000, NEEDLE)
    for needle in (bytearray(NEEDLE), memoryview(NEEDLE), memoryview(NEEDLE).cast("H")):
        assert await m.find(needle) == await m.rfind(needle) == 1000
    with pytest.raises(TypeError, match="must be bytes or another buffer"):
        await m.find("text")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be bytes or another buffer"):
        await m.find(3)  # type: ignore[arg-type]
    with pytest.raises(BufferError, match="needle must be contiguous"):
        await m.find(memoryview(NEEDLE)[::2])
    with pytest.raises(TypeError, match="start must be an integer"):
        await m.find(b"a", 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="end must be an integer"):
        await m.rfind(b"a", 0, True)


async def test_a_search_waits_for_the_writer_of_a_piece(m: AsyncMmap) -> None:
    """Each piece is held shared while it is searched: what a writer stored is found."""
    held = await m.view_mut(N - 100, 100)
    found = []

    async def search() -> None:
        found.append(await m.find(NEEDLE))

    async with anyio.create_task_group() as tg:
        tg.start_soon(search)
        await anyio.wait_all_tasks_blocked()
        while not m.statistics().waiting:  # the pieces before it are searched in a worker
            await anyio.lowlevel.checkpoint()
        held[: len(NEEDLE)] = NEEDLE
        await held.aclose()
    assert found == [N - 100]
    async with m.view_mut_nowait():
        pass


async def test_the_map_is_made_smaller_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two pieces: the rest is not there any more, and nothing behind it is asked for."""
    piece = 512 << 10
    asked: list[tuple[int, int, int]] = []
    search_soon = _pager.Pager.search_soon

    def noting(
        self: _pager.Pager, mapping: Mapping, start: int, *rest: Any, **options: Any
    ) -> object:
        request = search_soon(self, mapping, start, *rest, **options)
        [(offset, length)] = request.ahead
        asked.append((mapping.length, start, offset + length if length else 0))
        return request

    monkeypatch.setattr(_pager.Pager, "search_soon", noting)
    async with AsyncMmap.open_path(file_of(tmp_path, 8 * piece), "r+") as m:
        held = await m.view_mut(2 * piece, 1)

        async def search() -> None:
            with pytest.raises(ValueError, match="not inside the map any more"):
                await m.find(b"it is not there")

        async def shrink() -> None:
            await m.resize(9 * piece // 2)

        async with anyio.create_task_group() as tg:
            for waiting, task in enumerate((search, shrink), 1):
                tg.start_soon(task)
                while m.statistics().waiting < waiting:
                    await anyio.lowlevel.checkpoint()
            await held.aclose()
    assert any(size == 8 * piece and read > 9 * piece // 2 for size, _, read in asked)
    assert any(size == 9 * piece // 2 and start for size, start, _ in asked)
    assert all(read <= size for size, _, read in asked)


async def test_search_in_a_truncated_file(tmp_path: Path) -> None:
    """What the file does not reach is a TruncatedError; before it, search goes on."""
    path = file_of(tmp_path, N)
    async with AsyncMmap.open_path(path, "r+") as m:
        await m.write_at(100, NEEDLE)
        os.truncate(path, 1_000_000)
        assert await m.find(NEEDLE) == 100
        with pytest.raises(TruncatedError, match="reaches to byte 1000000"):
            await m.rfind(NEEDLE)
        assert await m.rfind(NEEDLE, 0, 1_000_000) == 100
        os.truncate(path, N)


@pytest.mark.parametrize("size", [600_000, 600_001, 4096, 12])
async def test_the_needle_is_just_before_the_end_of_a_truncated_file(
    tmp_path: Path, size: int
) -> None:
    """To the last byte that is there, a needle before what cannot be read is found."""
    path = file_of(tmp_path, N)
    async with AsyncMmap.open_path(path, "r+") as m:
        await m.write_at(size - len(NEEDLE), NEEDLE)
        os.truncate(path, size)
        assert await m.find(NEEDLE) == size - len(NEEDLE)
        with pytest.raises(TruncatedError, match=f"reaches to byte {size} "):
            await m.find(NEEDLE[1:] + b"!")
        os.truncate(path, N)


async def test_rfind_takes_no_longer_than_find_for_whatever_needle(m: AsyncMmap) -> None:
    """A needle that nearly fits everywhere, which takes CPython's rfind seconds, is searched in
    linear time: many times that would run out of this test's patience."""
    needle = b"a" * 2000 + b"b" + b"a" * 2000
    await m.write_at(0, needle + b"a" * (N - len(needle)))
    with anyio.fail_after(60):
        for _ in range(50):
            assert await m.rfind(needle) == 0
            assert await m.find(needle) == 0


@pytest.mark.parametrize("kind", [bytes, bytearray])
async def test_a_needle_of_megabytes(m: AsyncMmap, kind: type) -> None:
    """A long needle is copied and searched in a worker."""
    needle = inc(700_000)
    await m.write_at(1_000_000, needle)
    assert await m.find(kind(needle)) == 1_000_000
    assert await m.rfind(kind(needle)) == 1_000_000
    assert await m.find(kind(needle) + b"!") == -1


async def test_search_around_a_bad_page(tmp_path: Path) -> None:
    """On either side of a page that cannot be read, search finds what comes before it."""
    path = file_of(tmp_path, N)
    kernel = FakeKernel()
    bad = 100 * PAGE

    def read(real: Callable[..., int], fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset <= bad < offset + sum(map(len, buffers)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    kernel.wrap("read", read)
    async with mapped_by(kernel).open_path(path, "r+") as m:
        for offset in (bad - len(NEEDLE), bad + PAGE):
            await m.write_at(offset, NEEDLE)
        assert await m.find(NEEDLE) == bad - len(NEEDLE)
        assert await m.rfind(NEEDLE) == bad + PAGE
        for call in (m.find, m.rfind):
            with pytest.raises(OSError, match="Input/output error"):
                await call(NEEDLE + b"!")


async def test_cancelled_search(m: AsyncMmap) -> None:
    """A cancelled search leaves no region."""
    async with anyio.create_task_group() as tg:
        tg.start_soon(m.find, NEEDLE)
        tg.start_soon(m.rfind, NEEDLE)
        await anyio.lowlevel.checkpoint()
        tg.cancel_scope.cancel()
    async with m.view_mut_nowait():
        pass


# move


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@given(
    data=st.binary(min_size=1, max_size=50),
    dest=st.integers(0, 50),
    src=st.integers(0, 50),
    length=st.integers(0, 50),
)
def test_move_as_memmove(backend: str, data: bytes, dest: int, src: int, length: int) -> None:
    """move copies as if through a copy, overlapping or not; what is outside is a ValueError."""
    inside = max(dest, src) <= len(data) - length
    expected = bytearray(data)
    if inside:
        expected[dest : dest + length] = data[src : src + length]

    async def compare() -> None:
        async with AsyncMmap.anonymous(len(data)) as m:
            await m.write_at(0, data)
            if inside:
                await m.move(dest, src, length)
            else:
                with pytest.raises(ValueError, match="not inside the map"):
                    await m.move(dest, src, length)
            assert await m.read_at(0, len(data)) == expected

    anyio.run(compare, backend=backend)


@pytest.mark.parametrize(
    ("dest", "src", "length"),
    [
        (1, 0, N - 1),
        (0, 1, N - 1),
        (300_000, 0, 1_500_000),
        (0, 300_000, 1_500_000),
        (1_000_000, 0, 1_000_000),
        (4_095, 5_000, 1_000_001),
    ],
)
async def test_large_moves(tmp_path: Path, dest: int, src: int, length: int) -> None:
    """Moves of several pieces, overlapping in both directions, in a file."""
    data = inc(N - 7) + b"end end"
    expected = bytearray(data)
    expected[dest : dest + length] = data[src : src + length]
    path = file_of(tmp_path, data)
    async with AsyncMmap.open_path(path, "r+") as m:
        await m.move(dest, src, length)
        assert await m.read_at(0, N) == expected
    assert path.read_bytes() == expected


async def test_move_holds_both_ranges(m: AsyncMmap) -> None:
    """move waits for readers of its target and writers of its source, and for nothing else."""
    await m.write_at(0, b"abc")
    for offset, mutable, waits in (
        (100, False, True),
        (100, True, True),
        (0, True, True),
        (0, False, False),
        (50, True, False),
    ):
        held = await (m.view_mut(offset, 3) if mutable else m.view(offset, 3))
        done = anyio.Event()

        async def move(done: anyio.Event) -> None:
            await m.move(100, 0, 3)
            done.set()

        async with anyio.create_task_group() as tg:
            tg.start_soon(move, done)
            await anyio.wait_all_tasks_blocked()
            assert (m.statistics().waiting == 1) == waits
            if not waits:
                await done.wait()
            await held.aclose()
    assert await m.read_at(100, 3) == b"abc"


async def test_move_under_an_own_view(m: AsyncMmap) -> None:
    """A source that the task reads is fine; other own holds are a DeadlockError."""
    async with m.view(0, 10):
        await m.move(100, 0, 10)
        with pytest.raises(DeadlockError, match="holds"):
            await m.move(0, 100, 10)
    async with m.view_mut(0, 10):
        with pytest.raises(DeadlockError, match="holds"):
            await m.move(100, 0, 10)
    async with m.view_mut_nowait():
        pass


async def test_move_needs_a_writable_map(tmp_path: Path) -> None:
    """move in a READ map is a PermissionError, also for nothing."""
    async with AsyncMmap.open_path(file_of(tmp_path, 100)) as m:
        with pytest.raises(PermissionError, match="its protection is READ"):
            await m.move(0, 1, 1)
        with pytest.raises(PermissionError, match="its protection is READ"):
            await m.move(0, 0, 0)


async def test_move_in_a_truncated_file(tmp_path: Path) -> None:
    """A source or target that the file does not reach: TruncatedError, nothing changed."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path, "r+") as m:
        os.truncate(path, 8192)
        for dest, src in ((0, 10_000), (10_000, 0), (8_190, 0), (0, 8_190)):
            with pytest.raises(TruncatedError, match="reaches to byte 8192"):
                await m.move(dest, src, 100)
        assert path.read_bytes() == inc(8192)
        os.truncate(path, N)


async def test_after_close(tmp_path: Path) -> None:
    """A closed map refuses all three."""
    async with AsyncMmap.open_path(file_of(tmp_path, 100), "r+") as m:
        pass
    for call in (m.find(b"a"), m.rfind(b"a"), m.move(0, 1, 1)):
        with pytest.raises(ClosedResourceError, match="the map is closed"):
            await call
