"""Large ranges come in pieces: how large, and what is being read ahead of the one at hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread
from hypothesis import given
from hypothesis import strategies as st

from aiommap import AsyncMmap, _pager, _paging_crew
from aiommap._kernel import _linux
from aiommap._mapping import Mapping
from aiommap._piece_size import AHEAD, SLOW, PieceSize

from .clock import Clock
from .content import file_of
from .fake_kernel import FakeKernel
from .flushing import mapped_by
from .paging import cold_kernel, held, holding
from .rigs.slow_file import SlowFile, content

KIB = 1 << 10
MIB = 1 << 20


class TestPieceSize:
    """The rules, without time and without reads."""

    def test_twice_as_large_after_a_quick_one(self) -> None:
        """To the largest, and not after one that was smaller than it might have been."""
        size = PieceSize(100, 10, 300)
        size.took(99, 0.0)
        assert size.bytes == 100
        size.took(100, 0.0)
        assert size.bytes == 200
        size.took(200, 0.0)
        assert size.bytes == 300

    def test_half_as_large_after_a_slow_one(self) -> None:
        """To the smallest, whatever the size of the one that was slow."""
        size = PieceSize(100, 30, 300)
        size.took(1, SLOW * 1.01)
        assert size.bytes == 50
        size.took(1, SLOW * 1.01)
        assert size.bytes == 30

    def test_one_that_was_begun_before_says_nothing(self) -> None:
        """Four of one size are under way; that they all were slow is told once."""
        size = PieceSize(160, 10, 320)
        for _ in range(4):
            size.took(160, SLOW * 2)
        assert size.bytes == 80

    def test_after_a_full_queue_four_are_to_be_quick(self) -> None:
        """One piece waits for a place for those that it reads ahead, and these are quick for that:
        they grow after four in a row from then on."""
        size = PieceSize(80, 10, 320)
        size.took(80, SLOW * 2, starting=SLOW * 2)
        assert size.bytes == 40
        for expected in (40, 40, 40, 80):
            size.took(size.bytes, 0.0)
            assert size.bytes == expected
        size.took(80, 0.0)
        size.took(80, SLOW)  # not in a row
        for expected in (80, 80, 80, 160):
            size.took(80, 0.0)
            assert size.bytes == expected

    def test_many_at_a_time_read_no_more_ahead_than_one(self) -> None:
        """What is being read for all of them is four of the largest pieces, whoever leaves how."""
        size = PieceSize(160, 10, 160)
        others = [size.pieces(0, 10_000) for _ in range(7)]
        for each in others:
            next(each)
        whole = size.pieces(0, 10_000)
        assert next(whole) == (range(20), (0, 4 * 20))
        for each in others[:4]:
            each.close()
        assert next(whole) == (range(20, 60), (80, 100))
        del others, each
        assert next(whole) == (range(60, 220), (180, 520))
        many = [size.pieces(0, 10_000) for _ in range(100)]
        assert all(len(next(each)[0]) >= 10 for each in many)

    def test_not_smaller_than_they_may_be(self) -> None:
        """A search for a long needle, which is read again for each piece."""
        size = PieceSize(10, 1, 100)
        assert [len(piece) for piece, _ in size.pieces(0, 95, least=40)] == [40, 40, 15]

    def test_as_large_after_one_that_was_neither(self) -> None:
        """Between a quarter of the slow time and the slow time nothing changes."""
        size = PieceSize(100, 30, 300)
        for seconds in (SLOW / AHEAD, SLOW / 2, SLOW):
            size.took(100, seconds)
            assert size.bytes == 100

    @given(
        offset=st.integers(0, 1000),
        length=st.integers(0, 1000),
        first=st.integers(1, 300),
        backwards=st.booleans(),
        seconds=st.lists(st.sampled_from([0.0, SLOW / 2, 2 * SLOW]), max_size=40),
    )
    def test_each_byte_once(
        self, offset: int, length: int, first: int, backwards: bool, seconds: list[float]
    ) -> None:
        """Pieces cover the range in order; the reads of each, and of what the next three would be,
        have been started when it is handed out, each byte's once."""
        size = PieceSize(first, 1, 500)
        end = offset + length
        covered: list[int] = []
        started: list[int] = []
        took = iter(seconds)
        for piece, (start, count) in size.pieces(offset, length, backwards=backwards):
            assert 0 < len(piece) <= size.bytes
            part = list(piece)
            covered += reversed(part) if backwards else part
            ahead = list(range(start, start + count))
            started += reversed(ahead) if backwards else ahead
            if backwards:
                wanted = range(max(piece.stop - AHEAD * len(piece), offset), end)
            else:
                wanted = range(offset, min(piece.start + AHEAD * len(piece), end))
            assert set(wanted) <= set(started)
            size.took(len(piece), next(took, 0.0))
        everything = list(range(offset, end))
        assert covered == started == (everything[::-1] if backwards else everything)


@pytest.mark.anyio
class TestLoads:
    async def test_pieces_grow_on_a_quick_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where pieces take no time each is twice as large as the one before, to 16 MiB."""
        sizes = await _piece_sizes(tmp_path, monkeypatch, 128 * MIB, lambda size: 0.0)
        assert sizes[0] == 256 << 10
        for before, after in pairwise(sizes[:-1]):
            assert after == min(2 * before, 16 * MIB)
        assert max(sizes) == 16 * MIB

    async def test_pieces_shrink_on_a_slow_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At 1 MiB a second pieces get smaller, and none takes a second, down to 128 KiB."""
        sizes = await _piece_sizes(tmp_path, monkeypatch, 2 * MIB, lambda size: size / MIB)
        assert sizes[:2] == [256 << 10, 128 << 10]
        assert set(sizes[2:]) == {128 << 10}

    async def test_latency_alone_does_not_keep_them_small(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Pieces ahead are under way: 60 ms for each four of them are no reason to be slow."""
        sizes = await _piece_sizes(tmp_path, monkeypatch, 64 * MIB, lambda size: 0.06 / 4)
        assert max(sizes) == 16 * MIB

    async def test_pieces_shrink_where_hints_wait(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the storage has no place for what is to be read ahead, to start it takes the time
        and to load nothing, and then the pieces are too large all the same."""
        sizes = await _piece_sizes(
            tmp_path, monkeypatch, 8 * MIB, lambda size: 0.0, lambda size: size / (4 * MIB)
        )
        assert max(sizes[8:]) <= 512 << 10

    async def test_the_next_pieces_are_under_way(self, tmp_path: Path) -> None:
        """While a piece is waited for, the reads of the next three have been started, once."""
        kernel = cold_kernel()
        async with mapped_by(kernel).open_path(file_of(tmp_path, 16 * MIB)) as m:
            await m.load(0, 8 * MIB)
            base = m.ptr()
        started = pieces = 0
        for call in kernel.calls:
            if call.name == "will_need_many":
                for address, length in call.arguments[0]:
                    assert address - base == started
                    started += length
            elif call.name == "populate_read":
                address, length = call.arguments
                assert started >= min(address - base + 4 * length, 8 * MIB)
                pieces += 1
        assert started == 8 * MIB
        assert pieces > 4


async def _piece_sizes(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    seconds: Callable[[int], float],
    starting: Callable[[int], float] = lambda length: 0.0,
) -> list[int]:
    """
    How a load is cut on a disk that takes so many seconds for so many bytes, and so many to
    start reading them.
    """

    clock = Clock()
    monkeypatch.setattr(_paging_crew, "time", clock)
    kernel = cold_kernel()

    def populate(real: Callable[..., None], address: int, length: int) -> None:
        clock.now += seconds(length)  # and no page is touched, to save the time

    def will_need(real: Callable[..., bool], spans: list[tuple[int, int]]) -> bool:
        clock.now += starting(sum(length for _, length in spans))
        return True

    kernel.wrap("populate_read", populate)
    kernel.wrap("will_need_many", will_need)
    async with mapped_by(kernel).open_path(file_of(folder, size)) as m:
        await m.load()
    return [call.arguments[1] for call in kernel.calls if call.name == "populate_read"]


@pytest.mark.anyio
class TestSearches:
    async def test_pieces_grow_where_they_are_quick(self, tmp_path: Path) -> None:
        """Pieces of a search in memory are up to 32 MiB."""
        sizes = await _searched(tmp_path, lambda length: 0.0)
        assert sizes[0] == MIB
        assert max(sizes) == 32 * MIB

    async def test_pieces_are_larger_at_once_where_the_disk_reads_far_ahead(
        self, tmp_path: Path
    ) -> None:
        """Such a disk is local, and quick."""
        sizes = await _searched(tmp_path, lambda length: 0.0, reads_far=True)
        assert sizes[0] == 4 * MIB

    async def test_pieces_shrink_where_they_are_slow(self, tmp_path: Path) -> None:
        """At 8 MiB a second nobody else waits for a second, to say nothing of four."""
        sizes = await _searched(tmp_path, lambda length: length / (8 * MIB))
        assert sizes[0] == MIB
        assert sizes[-2] <= MIB // 2

    @pytest.mark.parametrize("cached", [True, False])
    async def test_nothing_is_started_where_all_is_there(
        self, tmp_path: Path, cached: bool
    ) -> None:
        """What is in memory is counted, and not asked for again."""
        kernel = FakeKernel()
        if not cached:
            kernel.wrap("cached_pages", lambda real, fd, offset, length: length // 4096 - 1)
        async with mapped_by(kernel).open_path(file_of(tmp_path, bytes(8 * MIB))) as m:
            assert await m.find(b"x") == -1
        assert bool(kernel.names("will_need_many")) is not cached


async def _searched(
    folder: Path, seconds: Callable[[int], float], *, reads_far: bool = False
) -> list[int]:
    """The pieces of a search, where so many bytes take so many seconds."""
    sizes: list[int] = []

    class Search(_paging_crew.Access[int]):
        def perform(self) -> None:
            sizes.append(self.length)
            super().perform()
            self.seconds = seconds(self.length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_pager, "Access", Search)
        patch.setattr(Mapping, "reads_far", reads_far)
        # Nothing is read, to save the time.
        patch.setattr(_pager, "search", lambda *arguments, last: -1)
        async with AsyncMmap.open_path(file_of(folder, 256 * MIB)) as m:
            assert await m.find(b"x") == -1
    return sizes


@pytest.mark.fuse
@pytest.mark.anyio
class TestHighLatency:
    """Storage that answers late and many at once: a network, a FUSE file system."""

    @pytest.mark.parametrize(
        "use",
        [
            lambda m: m.load(),
            lambda m: m.read_at(0, MIB),
            lambda m: m.readinto_at(0, bytearray(MIB)),
            lambda m: m.write_at(0, bytes(MIB)),
            lambda m: m.move(MIB // 2, 0, MIB // 2),
            lambda m: m.move(0, MIB // 2, MIB // 2),
            lambda m: m.find(b"not there"),
            lambda m: m.rfind(b"not there"),
            lambda m: _all_windows(m),
            lambda m: _a_view(m),
        ],
        ids=[
            "load",
            "read_at",
            "readinto_at",
            "write_at",
            "move",
            "move_back",
            "find",
            "rfind",
            "windows",
            "view",
        ],
    )
    async def test_everything_is_asked_for_at_once(
        self, make_slow_file: Callable[..., SlowFile], use: Callable[[AsyncMmap], Any]
    ) -> None:
        """The reads of a MiB wait for the disk at the same time, in requests of 128 KiB: the
        kernel's own read-ahead, and a hint for all of it, would be one or two of them."""
        file = make_slow_file(MIB, max_readahead=0)
        async with AsyncMmap.open_path(file.path, "r+") as m:
            file.evict()
            file.statistics(reset=True)
            async with holding(file), anyio.create_task_group() as tg:
                tg.start_soon(use, m)
                await held(file, 8)
                await to_thread.run_sync(file.release, "read")
            assert file.statistics().reads == 8

    @pytest.mark.parametrize("last", [False, True])
    async def test_a_search_reads_ahead_of_its_pieces(
        self, make_slow_file: Callable[..., SlowFile], monkeypatch: pytest.MonkeyPatch, last: bool
    ) -> None:
        """Two pieces of 128 KiB are searched, and three more being read."""
        monkeypatch.setattr(_pager, "FIRST_STREAMED", 128 * KIB)
        file = make_slow_file(2 * MIB, max_readahead=0)
        async with AsyncMmap.open_path(file.path) as m:
            file.evict()
            async with holding(file), anyio.create_task_group() as tg:
                tg.start_soon(m.rfind if last else m.find, b"x")
                await held(file, 5)
                tg.cancel_scope.cancel()

    async def test_a_full_queue(self, make_slow_file: Callable[..., SlowFile]) -> None:
        """
        FUSE drops a hint where all its 12 places are taken, and a page that nobody asked for is
        read with 31 others around it, by one task at a time: so they are asked for again.
        """
        file = make_slow_file(16 * MIB, max_background=12, read=0.005)
        pages = iter(range(1024))
        with open(file.path, "rb", buffering=0) as plain:
            async with AsyncMmap.open(plain.fileno()) as m:
                # It does so once there was read-ahead through the same open file.
                file.evict()
                os.pread(plain.fileno(), 4 * KIB, 0)
                file.statistics(reset=True)

                async def read() -> None:
                    for page in pages:
                        await m.read_at(page * 4001 % 4096 * 4 * KIB, 4 * KIB)

                async with anyio.create_task_group() as tg:
                    for _ in range(64):
                        tg.start_soon(read)
        done = file.statistics()
        assert done.read_bytes / done.reads < 16 * KIB

    async def test_on_older_kernels(self, make_slow_file: Callable[..., SlowFile]) -> None:
        """Without one call for all hints, there is a call for each."""
        kernel = FakeKernel()
        kernel.lack("process_madvise")
        file = make_slow_file(MIB, max_readahead=0)
        async with mapped_by(kernel).open_path(file.path) as m:
            file.evict()
            async with holding(file), anyio.create_task_group() as tg:
                tg.start_soon(m.load)
                await held(file, 8)
                await to_thread.run_sync(file.release, "read")
        assert len(kernel.names("will_need")) == 8

    async def test_control_one_hint_for_all(
        self, make_slow_file: Callable[..., SlowFile], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The kernel starts no more than 128 KiB on a hint, and the rest comes page by page."""
        monkeypatch.setattr(_linux, "longest_hint", lambda fd: MIB)
        file = make_slow_file(MIB, max_readahead=0)
        async with AsyncMmap.open_path(file.path) as m:
            file.evict()
            file.statistics(reset=True)
            await m.load()
        assert file.statistics().most_reads_at_once < 8
        assert file.statistics().reads > 100


async def _all_windows(m: AsyncMmap) -> None:
    position = 0
    async for window in m.windows(256 * KIB):
        assert bytes(window[:16]) == content(position, 16)
        position += len(window)


async def _a_view(m: AsyncMmap) -> None:
    async with m.view() as v:
        assert bytes(v[:16]) == content(0, 16)
