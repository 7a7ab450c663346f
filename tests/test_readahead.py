"""Who reads one page after another, beside others, has more read ahead than asked for."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiommap import AsyncMmap
from aiommap._readahead import GROWTH, STREAMS, Readahead

from .flushing import mapped_by

pytest.importorskip("tests.rigs.slow_file", reason="the pager's rigs need Linux")

import itertools

from .paging import cold_kernel
from .rigs.slow_file import SlowFile, content

PAGE = 4096
MOST = 64
MIB = 1 << 20


class TestRules:
    def test_each_read_that_continues_another_is_longer(self) -> None:
        """Four times, up to 256 KiB."""
        readahead = Readahead()
        stops = [0]
        for _ in range(6):
            stops.append(readahead.stop(stops[-1], stops[-1] + 1, MOST))
        lengths = [stop - start for start, stop in itertools.pairwise(stops)]
        assert lengths == [1, GROWTH, GROWTH**2, MOST, MOST, MOST]

    def test_one_that_begins_elsewhere_is_not(self) -> None:
        """Nor one that begins in the pages before."""
        readahead = Readahead()
        assert readahead.stop(10, 12, MOST) == 12
        assert readahead.stop(13, 14, MOST) == 14
        assert readahead.stop(10, 12, MOST) == 12
        assert readahead.stop(0, 2, MOST) == 2

    def test_who_asks_for_what_was_read_ahead(self) -> None:
        """Stores come here for each page: more is read when that is used up."""
        readahead = Readahead()
        stops = [readahead.stop(page, page + 1, MOST) for page in range(25)]
        assert stops == [1, *[5] * 4, *[21] * 16, *[85] * 4]

    def test_large_reads_are_as_large_as_they_were(self) -> None:
        """More than the most is read only where it is asked for."""
        readahead = Readahead()
        assert readahead.stop(0, 100, MOST) == 100
        assert readahead.stop(100, 200, MOST) == 200
        assert readahead.stop(200, 201, MOST) == 300

    def test_many_streams(self) -> None:
        """Each of them is known, whatever the others do meanwhile."""
        readahead = Readahead()
        for turn in (1, GROWTH):
            for stream in range(STREAMS // 2):
                start = stream * 1000 + (turn > 1)
                assert readahead.stop(start, start + 1, MOST) == start + turn

    def test_what_is_remembered_is_bounded(self) -> None:
        """Reads at random leave no more than a little."""
        readahead = Readahead()
        for page in range(0, 20 * STREAMS, 10):
            assert readahead.stop(page, page + 1, MOST) == page + 1
        assert len(readahead._streams) <= 2 * STREAMS

    @given(steps=st.lists(st.integers(1, 20 * PAGE), max_size=60), start=st.integers(0, PAGE))
    def test_reads_of_any_size_follow_each_other(self, steps: list[int], start: int) -> None:
        """A stream of bytes: only what is not there yet is asked for, it is all that is wanted and
        not much more, and always the next pages."""
        readahead = Readahead()
        position = start
        first = there = start // PAGE
        asked = 0
        for step in steps:
            stop = -(-(position + step) // PAGE)
            if stop > there:
                reach = readahead.stop(position // PAGE, stop, MOST)
                assert reach >= stop
                assert reach - there <= max(MOST, stop - there)
                asked += 1
                there = reach
            position += step
        assert asked <= 4 + (there - first) // (MOST // 2) + sum(
            step > MOST * PAGE // 2 for step in steps
        )


@pytest.mark.fuse
@pytest.mark.anyio
class TestManyTasks:
    @pytest.mark.parametrize("how", ["view", "read_at", "write_at"])
    async def test_tasks_that_go_through_parts_of_a_file(
        self, make_slow_file: Callable[..., SlowFile], how: str
    ) -> None:
        """16 tasks with 256 pages each: what the kernel takes for reads at random."""
        file = make_slow_file(16 * MIB, read=0.002)
        async with AsyncMmap.open_path(file.path, "r+") as m:
            file.evict()
            file.statistics(reset=True)

            async def go_through(start: int) -> None:
                for offset in range(start, start + MIB, PAGE):
                    if how == "read_at":
                        assert await m.read_at(offset, 16) == content(offset, 16)
                    elif how == "write_at":
                        await m.write_at(offset, bytes(PAGE))
                    else:
                        async with m.view(offset, PAGE) as v:
                            assert bytes(v[:16]) == content(offset, 16)

            async with anyio.create_task_group() as tg:
                for start in range(0, 16 * MIB, MIB):
                    tg.start_soon(go_through, start)
            assert file.statistics().reads < 800

    @pytest.mark.parametrize("why", ["the disk", "RANDOM", "NORMAL again"])
    async def test_not_where_nobody_wants_it(
        self, make_slow_file: Callable[..., SlowFile], why: str
    ) -> None:
        """Nor where the kernel is not to read ahead itself, or was told that pages are used at
        random; other advice ends that."""
        file = make_slow_file(2 * MIB, max_readahead=0 if why == "the disk" else None)
        async with AsyncMmap.open_path(file.path, "r+") as m:
            if why != "the disk":
                await m.advise("random")
            if why == "NORMAL again":
                await m.advise("normal", 0, PAGE)  # one word for a part is enough
            file.evict()
            file.statistics(reset=True)

            async def go_through(start: int) -> None:
                for offset in range(start, start + MIB // 4, PAGE):
                    await m.write_at(offset, b"x")

            async with anyio.create_task_group() as tg:
                for start in range(0, 2 * MIB, MIB // 4):
                    tg.start_soon(go_through, start)
            reads = file.statistics().reads
        # Page by page, 512; the kernel itself may read around a few that nobody had asked for.
        assert reads < 200 if why == "NORMAL again" else reads > 400

    async def test_not_behind_the_end_of_the_map(
        self, make_slow_file: Callable[..., SlowFile]
    ) -> None:
        """What is read ahead ends where the map ends."""
        kernel = cold_kernel()
        size = 100 * PAGE + 17
        async with mapped_by(kernel).open_path(
            make_slow_file(2 * MIB).path, offset=10, length=size
        ) as m:

            async def go_through(start: int) -> None:
                for offset in range(start, size, 10 * PAGE):
                    await m.load(offset, min(10 * PAGE, size - offset))

            async with anyio.create_task_group() as tg:
                for start in range(0, 10 * PAGE, PAGE):
                    tg.start_soon(go_through, start)
            base = m.ptr()
        ends = [
            address + length - base
            for call in kernel.calls
            if call.name == "will_need_many"
            for address, length in call.arguments[0]
        ]
        assert ends
        assert max(ends) <= -(-(10 + size) // PAGE) * PAGE
