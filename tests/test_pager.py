"""Pages come in off the loop: batches, pieces, cancellation, and kernels that can do less."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import pytest
from anyio import CapacityLimiter, to_thread
from anyio.abc import TaskGroup

from aiommap import (
    AsyncMmap,
    MmapStatistics,
    Protection,
    TruncatedError,
    _mapped_memory,
)
from aiommap._mapped_memory import INLINE
from aiommap._read_starts import COLD_READS, STARTED

from .cancelling import let_others_run, on_asyncio
from .content import file_of, inc
from .fake_kernel import FakeKernel, Hold
from .flushing import entered, mapped_by
from .paging import cold_kernel, held, holding, on_disk
from .processes import run_python

pytest.importorskip("tests.rigs.faults", reason="the pager's rigs need Linux")

from .rigs.faults import dirty_pages, resident_pages
from .rigs.slow_file import SlowFile, content
from .rigs.small_fs import SmallFileSystem

pytestmark = pytest.mark.anyio

PAGE = 4096
MIB = 1 << 20

MakeSlowFile = Callable[..., SlowFile]
MakeSmallFs = Callable[..., SmallFileSystem]


def delta(before: MmapStatistics, after: MmapStatistics) -> tuple[int, int]:
    """Accesses that stayed on the loop, and those that left it."""
    return (
        after.loads_inline - before.loads_inline,
        after.loads_off_loop - before.loads_off_loop,
    )


class TestBatches:
    @pytest.mark.fuse
    async def test_all_reads_are_started_before_the_first_is_waited_for(
        self, make_slow_file: MakeSlowFile
    ) -> None:
        """Of 40 tasks that wait for 40 pages, the disk has 40 requests at the same time."""
        file = make_slow_file(MIB, max_readahead=0)
        got: list[bytes] = []

        async def look(page: int) -> None:
            async with m.view(page * PAGE, PAGE) as v:
                got.append(bytes(v))

        async with AsyncMmap.open_path(file.path) as m:
            file.evict()
            async with holding(file), anyio.create_task_group() as tg:
                for page in range(0, 80, 2):
                    tg.start_soon(look, page)
                await held(file, 40)
                assert got == []
                await to_thread.run_sync(file.release, "read")
        assert sorted(got) == sorted(content(page * PAGE, PAGE) for page in range(0, 80, 2))
        assert file.statistics().most_reads_at_once >= 40

    @pytest.mark.fuse
    async def test_who_comes_later_does_not_wait_for_the_batch_before(
        self, make_slow_file: MakeSlowFile
    ) -> None:
        """Reads of tasks that come while all threads wait for the disk are started at once."""
        file = make_slow_file(MIB, max_readahead=0)
        async with AsyncMmap.open_path(file.path) as m:
            file.evict()
            async with holding(file), anyio.create_task_group() as tg:
                for count in range(1, 9):
                    tg.start_soon(m.read_at, 2 * count * PAGE, PAGE)
                    await held(file, count)
                await to_thread.run_sync(file.release, "read")

    @pytest.mark.fuse
    async def test_no_thread_per_request(self, make_slow_file: MakeSlowFile) -> None:
        """256 tasks that wait for pages of one map use three threads, and as many tokens."""
        file = make_slow_file(2 * MIB, max_readahead=0)
        limiter = CapacityLimiter(10)
        async with AsyncMmap.open_path(file.path, limiter=limiter) as m:
            file.evict()
            before = threading.active_count()
            async with holding(file), anyio.create_task_group() as tg:
                for page in range(256):
                    tg.start_soon(m.read_at, page * PAGE, PAGE)
                await held(file, 32)
                await let_others_run()
                # wait_held above took one of anyio's threads, too.
                assert threading.active_count() <= before + 4
                assert limiter.borrowed_tokens <= 3
                await to_thread.run_sync(file.release, "read")

    async def test_a_page_that_does_not_come_holds_up_its_own_task(self, tmp_path: Path) -> None:
        """While one page is waited for, 50 tasks get theirs."""
        kernel = cold_kernel()
        async with mapped_by(kernel).open_path(file_of(tmp_path, inc(MIB))) as m:
            done: list[int] = []

            async def look(page: int) -> None:
                async with m.view(page * PAGE, PAGE) as v:
                    assert bytes(v) == inc(PAGE)
                done.append(page)

            async with anyio.create_task_group() as tg:
                with kernel.hold("populate_read", times=1) as hold:
                    tg.start_soon(look, 0)
                    await entered(hold)
                    async with anyio.create_task_group() as others:
                        for page in range(1, 51):
                            others.start_soon(look, page)
                    assert sorted(done) == list(range(1, 51))
            assert done[-1] == 0

    @pytest.mark.fuse
    async def test_a_batch_with_a_bad_page(self, make_slow_file: MakeSlowFile) -> None:
        """One page in a batch that the disk cannot read is an error for its task only."""
        file = make_slow_file(MIB, max_readahead=0)
        file.fail_reads(8 * PAGE, PAGE)
        results: dict[int, object] = {}

        async def look(page: int) -> None:
            try:
                async with m.view(page * PAGE, PAGE) as v:
                    results[page] = bytes(v)
            except OSError as exc:
                results[page] = exc.errno

        async with AsyncMmap.open_path(file.path) as m:
            file.evict()
            async with anyio.create_task_group() as tg:
                for page in range(20):
                    tg.start_soon(look, page)
        expected: dict[int, object] = {page: content(page * PAGE, PAGE) for page in range(20)}
        expected[8] = errno.EIO
        assert results == expected

    async def read_512_pages(self, tmp_path: Path) -> FakeKernel:
        """Have as many tasks read a page each; the kernel that was asked."""
        if not _can_populate_many():
            pytest.skip("needs process_madvise on ourselves, Linux 6.14")
        kernel = cold_kernel()
        async with mapped_by(kernel).open_path(file_of(tmp_path, inc(2 * MIB))) as m:
            kernel.calls.clear()
            async with anyio.create_task_group() as tg:
                for page in range(512):
                    tg.start_soon(m.read_at, page * PAGE, PAGE)
        return kernel

    async def test_no_page_is_populated_before_its_read_is_started(self, tmp_path: Path) -> None:
        """A fault whose read nobody has started would read far around itself: each thread starts
        the reads of what it populates, although another one announced them."""
        kernel = await self.read_512_pages(tmp_path)
        last: dict[int, object] = {}
        populated = 0
        for call in kernel.calls:
            if call.name == "populate_many":
                populated += 1
                assert last.get(call.thread) == call.arguments
            if call.name == "will_need_many":
                last[call.thread] = call.arguments
        assert populated

    async def test_many_page_ins_in_few_calls(self, tmp_path: Path) -> None:
        """The pages of many tasks are asked for, and waited for, with a few calls."""
        kernel = await self.read_512_pages(tmp_path)
        loads = kernel.names("populate_read", "populate_many")
        assert len(loads) < 512 / 2
        assert len(kernel.names("will_need", "will_need_many")) < 512


class TestBatchesOfStores:
    """Small stores, and the preparing of small views, of many tasks: together, in few calls."""

    def disk_kernel(self) -> FakeKernel:
        """Every file is on a disk, so that stores go to a worker."""
        kernel = FakeKernel()
        kernel.wrap("file_is_in_memory", lambda real, fd: False)
        return kernel

    @pytest.mark.parametrize("call", ["write_at", "view_mut"])
    async def test_in_few_calls(self, tmp_path: Path, call: str) -> None:
        if not _can_populate_many():
            pytest.skip("needs process_madvise on ourselves, Linux 6.14")
        kernel = self.disk_kernel()
        path = file_of(tmp_path, bytes(2 * MIB))

        async def store(m: AsyncMmap, page: int) -> None:
            offset = page * PAGE + page % 50
            if call == "write_at":
                await m.write_at(offset, page.to_bytes(2, "little"))
            else:
                async with m.view_mut(offset, 2) as v:
                    v[:] = page.to_bytes(2, "little")

        async with mapped_by(kernel).open_path(path, "r+") as m:
            kernel.calls.clear()
            async with anyio.create_task_group() as tg:
                for page in range(512):
                    tg.start_soon(store, m, page)
            assert 0 < len(kernel.names("populate_write", "populate_many")) < 512 / 2
            assert len(kernel.names("copy", "copy_many")) < 512 / 2
        expected = bytearray(2 * MIB)
        for page in range(512):
            place = page * PAGE + page % 50
            expected[place : place + 2] = page.to_bytes(2, "little")
        assert path.read_bytes() == expected

    @pytest.mark.parametrize("lacking", ["nothing", "process_madvise", "populate", "copy_many"])
    async def test_what_cannot_be_stored_is_an_error_of_its_own(
        self, tmp_path: Path, lacking: str
    ) -> None:
        """
        Beside stores behind the end of the file, across it, and from memory that is gone, the
        others of a batch land; so does one whose bytes come from the place beside it.
        """
        kernel = self.disk_kernel()
        if lacking == "copy_many":
            kernel.wrap("copy_many", lambda real, copies: False)
        elif lacking != "nothing":
            kernel.lack(lacking)
        data = inc(64 * PAGE)
        path = file_of(tmp_path, data)
        gone = file_of(tmp_path, PAGE, "gone")
        end = 40 * PAGE + 100
        results: dict[int, object] = {}
        fill = bytearray(b"!" * 200)

        async def store(page: int, source: bytearray | memoryview) -> None:
            try:
                results[page] = await m.write_at(page * PAGE + 10, source)
            except OSError as exc:
                results[page] = type(exc), exc.errno

        async with (
            AsyncMmap.open_path(gone) as other,
            mapped_by(kernel).open_path(path, "r+") as m,
        ):
            os.truncate(gone, 0)
            os.truncate(path, end)
            with other.as_slice() as missing, m.as_slice() as own:
                async with anyio.create_task_group() as tg:
                    for page in range(30, 50):
                        source = {33: missing, 35: own[35 * PAGE : 35 * PAGE + 200]}.get(page, fill)
                        tg.start_soon(store, page, source)
                del source, own, missing
            fill.append(0)  # nobody has it any more
            await m.aclose(flush=False)

        expected = bytearray(data[:end])
        for page in range(30, 40):
            if page != 33:
                first = page * PAGE + 10
                expected[first : first + 200] = b"!" * 200
        expected[35 * PAGE + 10 : 35 * PAGE + 210] = data[35 * PAGE : 35 * PAGE + 200]
        assert path.read_bytes() == expected
        assert results.pop(33) == (OSError, errno.EFAULT)
        for page, result in results.items():
            assert result == (200 if page < 40 else (TruncatedError, errno.ENODATA)), page


def _can_populate_many() -> bool:
    from aiommap._kernel import native

    return native.populate_many([], write=False) is True


class TestCancellation:
    @pytest.mark.fuse
    @pytest.mark.parametrize(
        "call", ["view", "view_mut", "read_at", "readinto_at", "load", "find", "windows"]
    )
    async def test_leaves_while_the_disk_holds_the_page(
        self, make_slow_file: MakeSlowFile, call: str
    ) -> None:
        """A cancelled task leaves at once, its region is free, and the page comes later."""
        file = make_slow_file(MIB, max_readahead=0)
        async with AsyncMmap.open_path(file.path, "r+") as m:
            file.evict()
            async with holding(file):
                async with anyio.create_task_group() as tg:
                    tg.start_soon(access, m, call)
                    await held(file)
                    tg.cancel_scope.cancel()
                # Nobody has released the disk.
                async with m.view_mut_nowait():
                    assert m.statistics().waiting == 0
            assert await m.read_at(0, PAGE) == content(0, PAGE)

    @pytest.mark.fuse
    async def test_a_cancelled_small_read_leaves_the_buffer(
        self, make_slow_file: MakeSlowFile
    ) -> None:
        """It is not waited for, and nothing lands in the caller's buffer any more."""
        file = make_slow_file(MIB, max_readahead=0)
        buffer = bytearray(b"?" * PAGE)
        async with AsyncMmap.open_path(file.path) as m:
            file.evict()
            async with holding(file), anyio.create_task_group() as tg:
                tg.start_soon(m.readinto_at, 0, buffer)
                await held(file)
                tg.cancel_scope.cancel()
            buffer.append(0)  # its export has ended
            assert await m.read_at(0, PAGE) == content(0, PAGE)
        assert buffer == b"?" * PAGE + b"\0"

    @pytest.mark.fuse
    @on_asyncio
    async def test_native_cancellation(self, make_slow_file: MakeSlowFile) -> None:
        """``task.cancel()`` gets out too, and leaves the region free."""
        file = make_slow_file(MIB, max_readahead=0)
        async with AsyncMmap.open_path(file.path, "r+") as m:
            file.evict()
            async with holding(file):
                task = asyncio.ensure_future(access(m, "read_at"))
                await held(file)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                async with m.view_mut_nowait(0, PAGE):
                    pass

    @pytest.mark.fuse
    @pytest.mark.parametrize("call", ["readinto_at, large", "write_at", "move"])
    async def test_stays_where_the_users_memory_is_in_use(
        self, make_slow_file: MakeSlowFile, call: str
    ) -> None:
        """A call that reads or writes the caller's buffer, or the map, ends with the worker."""
        file = make_slow_file(MIB, max_readahead=0)
        async with AsyncMmap.open_path(file.path, "r+") as m:
            file.evict()
            over = anyio.Event()

            async def run() -> None:
                try:
                    await access(m, call)
                finally:
                    over.set()

            async with holding(file), anyio.create_task_group() as tg:
                tg.start_soon(run)
                await held(file)
                tg.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):
                    await let_others_run(20)
                    assert not over.is_set()
                    await to_thread.run_sync(file.release, "read")
                    await over.wait()
            file.heal()

    @pytest.mark.parametrize("call", ["read_at", "view.read"])
    async def test_a_cancelled_read_writes_to_memory_of_its_own(
        self, tmp_path: Path, call: str
    ) -> None:
        """What a worker still reads for a task that has left lands in nobody else's memory."""
        kernel = cold_kernel()
        size = 600 << 10  # freed, it goes back to the system, and the next one gets it
        async with mapped_by(kernel).open_path(file_of(tmp_path, b"x" * MIB)) as m:
            for _ in range(5):
                with kernel.hold("read") as hold:
                    async with anyio.create_task_group() as tg, m.view(0, load=False) as v:
                        if call == "read_at":
                            tg.start_soon(m.read_at, 0, size)
                            await entered(hold)
                        else:
                            tg.start_soon(cancel_when, hold, tg)
                            await v.read(size)
                        tg.cancel_scope.cancel()
                    mine = [bytearray(size) for _ in range(8)]
                while hold.waiting or not no_thread_works_for(m):
                    await anyio.lowlevel.checkpoint()
                assert not any(map(any, mine))

    async def test_a_cancelled_load_stops_between_two_pieces(self, tmp_path: Path) -> None:
        """A load of many pieces asks for none after the one under way."""
        kernel = cold_kernel()
        async with mapped_by(kernel).open_path(file_of(tmp_path, 16 * MIB)) as m:
            with kernel.hold("populate_read", after=2) as hold:
                async with anyio.create_task_group() as tg:
                    tg.start_soon(m.load)
                    await entered(hold)
                    tg.cancel_scope.cancel()
                assert hold.waiting == 1
            await let_others_run(20)
            assert len(kernel.names("populate_read")) == 3
            asked = [call.arguments[1] for call in kernel.calls if call.name == "populate_read"]
            assert sum(asked) < 16 * MIB

    async def test_cancelled_before_a_thread_took_it(self, tmp_path: Path) -> None:
        """Requests of cancelled tasks that no thread has taken are dropped."""
        kernel = cold_kernel()
        async with mapped_by(kernel).open_path(file_of(tmp_path, inc(MIB))) as m:
            with kernel.hold("populate_read") as hold:
                async with anyio.create_task_group() as tg:
                    for page in range(100):
                        tg.start_soon(m.read_at, page * PAGE, PAGE)
                    await entered(hold)
                    tg.cancel_scope.cancel()
            assert await m.read_at(200 * PAGE, PAGE) == inc(PAGE)
            # The two that were under way, and the last one.
            assert len(kernel.names("populate_read")) <= 3


async def cancel_when(hold: Hold, tasks: TaskGroup) -> None:
    await entered(hold)
    tasks.cancel_scope.cancel()


def no_thread_works_for(m: AsyncMmap) -> bool:
    """Whether no thread works for the map."""
    return m._core.pager._crew._performing == 0


async def access(m: AsyncMmap, call: str, offset: int = 0) -> object:
    """One use of the first page, or of all."""
    match call:
        case "view":
            async with m.view(offset, PAGE) as v:
                return bytes(v)
        case "view_mut":
            async with m.view_mut(offset, PAGE) as v:
                return bytes(v)
        case "read_at":
            return await m.read_at(offset, PAGE)
        case "readinto_at":
            buffer = bytearray(PAGE)
            await m.readinto_at(offset, buffer)
            return bytes(buffer)
        case "readinto_at, large":
            await m.readinto_at(offset, bytearray(INLINE + 1))
        case "write_at":
            return await m.write_at(offset + 1, b"x")
        case "move":
            await m.move(offset + 2 * PAGE, offset, PAGE)
        case "load":
            await m.load()
        case "find":
            return await m.find(b"no such thing")
        case "windows":
            async for window in m.windows(PAGE):
                return bytes(window)
        case _:
            raise AssertionError(call)
    return None


class TestLesserKernels:
    @pytest.mark.parametrize(
        "lacking",
        [
            (),
            ("populate",),
            ("process_madvise",),
            ("nowait_reads",),
            ("nowait_reads", "mincore"),
            ("nowait_reads", "cachestat"),
            ("process_vm",),
            ("populate", "nowait_reads", "mincore", "cachestat", "process_vm", "fallocate"),
        ],
        ids=lambda lacking: "+".join(lacking) or "nothing",
    )
    @pytest.mark.parametrize("protection", ["r+", "c"])
    async def test_everything_works_without(
        self, tmp_path: Path, lacking: tuple[str, ...], protection: str
    ) -> None:
        """Every way to the bytes gives the same where the kernel can do less."""
        size = MIB + 5
        path = on_disk(tmp_path, inc(size))
        kernel = FakeKernel()
        kernel.lack(*lacking)
        async with mapped_by(kernel).open_path(path, protection) as m:
            await self.look_at_all(m, size)
            os.truncate(path, 8 * PAGE + 1)
            for call in ("view", "view_mut", "read_at", "readinto_at", "write_at"):
                with pytest.raises(TruncatedError) as caught:
                    await access(m, call, 8 * PAGE)
                assert caught.value.size == 8 * PAGE + 1
            assert await m.read_at(PAGE, 1) == b"y" if protection == "r+" else b"y"
            await m.aclose(flush=False)

    async def look_at_all(self, m: AsyncMmap, size: int) -> None:
        async with m.view(3, 10_000) as v:
            assert bytes(v) == inc(10_000, 3)
        assert await m.read_at(100_000, 5000) == inc(5000, 100_000)
        assert await m.read_at(0, size) == inc(size)
        buffer = bytearray(70_000)
        assert await m.readinto_at(PAGE - 1, buffer) == 70_000
        assert buffer == inc(70_000, PAGE - 1)
        assert await m.find(bytes([255, 0, 1, 2]), 1000) == 1023
        assert await m.rfind(bytes([255, 0, 1, 2])) == (size - 5) // 256 * 256 - 1
        assert b"".join([bytes(window) async for window in m.windows(300_000)]) == inc(size)
        await m.load()
        async with m.view_mut(PAGE, 3) as v:
            v[:] = b"xyz"
        await m.write_at(PAGE, b"y")
        assert await m.read_at(PAGE - 1, 5) == b"\xffyyz\x03"
        await m.move(2 * PAGE, PAGE, 3)
        assert await m.read_at(2 * PAGE, 4) == b"yyz\x03"

    async def test_without_populate_the_page_cache_is_warmed_by_reading(
        self, tmp_path: Path
    ) -> None:
        """Kernels before 5.14: what is missing is read into scratch memory, in a worker."""
        path = on_disk(tmp_path, inc(MIB))
        kernel = FakeKernel()
        kernel.lack("populate", "nowait_reads")
        async with mapped_by(kernel).open_path(path) as m:
            async with m.view(5, 100_000) as v:
                reads = [call for call in kernel.calls if call.name == "read"]
                assert sum(len(call.arguments[1][0]) for call in reads) == 100_000
                assert threading.get_ident() not in {call.thread for call in reads}
                assert bytes(v) == inc(100_000, 5)
            # Tried once.
            async with m.view(500_000, PAGE):
                pass
            assert len(kernel.names("populate_read", "populate_many")) == 1

    @pytest.mark.smallfs
    async def test_tmpfs_has_no_disk(self, make_small_fs: MakeSmallFs) -> None:
        """On tmpfs what is there is found there, and holes are left holes by reading."""
        path = make_small_fs("tmpfs").path / "file"
        path.write_bytes(inc(10 * PAGE))
        os.truncate(path, 20 * PAGE)
        async with AsyncMmap.open_path(path, "r+") as m:
            before = m.statistics()
            assert await m.read_at(5, 3 * PAGE) == inc(3 * PAGE, 5)
            await m.write_at(PAGE, b"abc")
            async with m.view(0, 10 * PAGE) as v:
                assert v[PAGE : PAGE + 4] == b"abc\x03"
            assert delta(before, m.statistics()) == (3, 0)
            assert await m.read_at(12 * PAGE, 3) == bytes(3)
            assert path.stat().st_blocks * 512 == 10 * PAGE

    @pytest.mark.fuse
    async def test_a_server_is_not_asked_for_what_is_in_memory(
        self, make_slow_file: MakeSlowFile
    ) -> None:
        """Reads that are repeated stay on the loop, and need no server: it is dead by then."""
        file = make_slow_file(MIB, max_readahead=0)
        async with AsyncMmap.open_path(file.path) as m:
            assert await m.read_at(PAGE, 2 * PAGE) == content(PAGE, 2 * PAGE)
            file.process.kill()
            file.process.wait()
            before = m.statistics()
            assert await m.read_at(PAGE + 3, PAGE) == content(PAGE + 3, PAGE)
            async with m.view(PAGE, 2 * PAGE) as v:
                assert bytes(v) == content(PAGE, 2 * PAGE)
            assert delta(before, m.statistics()) == (2, 0)
            with pytest.raises(OSError, match=r".") as caught:
                await m.read_at(8 * PAGE, PAGE)
            assert caught.value.errno in (errno.ENOTCONN, errno.EIO, errno.ECONNABORTED)

    async def test_where_mincore_pretends(self, tmp_path: Path) -> None:
        """A file of somebody else's, opened for reading: no cold page is touched on the loop."""
        path = on_disk(tmp_path, inc(256 * PAGE))
        if os.geteuid() != 0:
            pytest.skip("needs root, to become somebody else")
        done = run_python(_AS_NOBODY, path)
        assert (done.returncode, done.stdout.split()) == (0, ["0", "0", "256"]), done.stderr


_AS_NOBODY = """
import asyncio, os, random, resource, sys
import aiommap
from aiommap import AsyncMmap

path = sys.argv[1]

async def main():
    async with AsyncMmap.open(fd) as m:
        assert not m._core.mapping.file.mincore_is_honest
        pages = list(range(0, 256))
        random.Random(0).shuffle(pages)
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
        for page in pages[:100]:
            async with m.view(page * 4096, 4096) as v:
                v.buffer[0]
        print(resource.getrusage(resource.RUSAGE_THREAD).ru_majflt - before)
        async with m.view(0, 256 * 4096) as v:  # larger than what is read to look
            bytes(v)
        async for window in m.windows(300_000):
            bytes(window)
        print(resource.getrusage(resource.RUSAGE_THREAD).ru_majflt - before)
        print(await m.resident() // 4096)

async def warm_up():
    async with AsyncMmap.open_path(aiommap.__file__) as m:
        await m.read_at(0, 1)

asyncio.run(warm_up())  # everything is imported: the libraries may be root's alone
fd = os.open(path, os.O_RDONLY)  # and so may the folder
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
asyncio.run(main())
"""


class TestLooks:
    async def test_a_page_in_memory_stays_on_the_loop(self, tmp_path: Path) -> None:
        """What is in memory needs no worker; what is not needs one, or a second look."""
        path = on_disk(tmp_path, inc(64 * PAGE))
        async with AsyncMmap.open_path(path) as m:
            async with m.view(0, 16 * PAGE):
                pass
            before = m.statistics()
            for offset in range(0, 16 * PAGE, PAGE):
                assert await m.read_at(offset, PAGE) == inc(PAGE)
                async with m.view(offset, PAGE) as v:
                    assert bytes(v) == inc(PAGE)
            assert delta(before, m.statistics()) == (32, 0)

    async def test_a_second_look_one_turn_later(self, tmp_path: Path) -> None:
        """A read that the first look has started may be done by the next turn of the loop."""
        kernel = FakeKernel()
        kernel.fail("read_nowait", errno.EAGAIN, times=1)
        async with mapped_by(kernel).open_path(file_of(tmp_path, inc(PAGE))) as m:
            assert await m.read_at(0, PAGE) == inc(PAGE)
            assert m.statistics().loads_off_loop == 0
            kernel.fail("read_nowait", errno.EAGAIN, times=1)
            async with m.view(0, PAGE) as v:
                assert bytes(v) == inc(PAGE)
            assert m.statistics().loads_off_loop == 0

    async def test_after_a_miss_reads_are_started_at_once(self, tmp_path: Path) -> None:
        """While the pages asked for are cold, a read is under way before others are let run."""
        kernel = FakeKernel()
        kernel.fail("read_nowait", errno.EAGAIN, times=1)
        async with mapped_by(kernel).open_path(file_of(tmp_path, inc(MIB))) as m:
            await m.read_at(0, PAGE)
            assert kernel.names("will_need") == []
            kernel.calls.clear()
            for _ in range(COLD_READS):
                assert await m.read_at(PAGE, PAGE) == inc(MIB)[PAGE : 2 * PAGE]
            looks = kernel.names("will_need", "read_nowait")
            assert looks == ["will_need", "read_nowait"] * COLD_READS
            assert {call.thread for call in kernel.calls} == {threading.get_ident()}
            # All of them found their page: it may have been there before, as all others may be.
            kernel.calls.clear()
            await m.read_at(PAGE, PAGE)
            assert kernel.names("will_need", "read_nowait") == ["read_nowait"]

    async def test_what_is_started_at_once_is_small(self, tmp_path: Path) -> None:
        """Large reads are a worker's, which starts them piece by piece; nothing is no read."""
        kernel = FakeKernel()
        kernel.fail("read_nowait", errno.EAGAIN, times=1)
        async with mapped_by(kernel).open_path(file_of(tmp_path, inc(MIB))) as m:
            await m.read_at(0, PAGE)
            await m.read_at(0, STARTED + 1)
            assert kernel.names("will_need") == []
            await m.read_at(0, STARTED)
            assert kernel.names("will_need") == ["will_need"]

    async def test_a_read_is_not_started_at_once_where_that_waits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Starts that take long end it as they end looks that start reads."""
        now = [100.0]
        monkeypatch.setattr(_mapped_memory, "monotonic", lambda: now[0])
        kernel = FakeKernel()
        kernel.fail("read_nowait", errno.EAGAIN, times=1)
        kernel.before("will_need", lambda call: now.__setitem__(0, now[0] + 0.002))
        async with mapped_by(kernel).open_path(file_of(tmp_path, inc(MIB))) as m:
            for page in range(20):
                await m.read_at(page * PAGE, PAGE)
            # The average of the last eight or so is above the limit after the third.
            assert kernel.names("will_need") == ["will_need"] * 3

    async def test_a_cancelled_read_gives_its_place_back(self, tmp_path: Path) -> None:
        """The places for reads under way are not lost with the tasks that leave."""
        kernel = FakeKernel()
        kernel.fail("read_nowait", errno.EAGAIN, times=1)
        async with mapped_by(kernel).open_path(file_of(tmp_path, inc(MIB))) as m:
            await m.read_at(0, PAGE)
            for _ in range(COLD_READS):
                with anyio.CancelScope() as scope:
                    scope.cancel()
                    await m.read_at(0, PAGE)
                assert scope.cancelled_caught
            assert kernel.names("will_need") == ["will_need"] * COLD_READS
            assert m._core.mapping.starts.under_way == 0

    async def test_the_loop_starts_no_more_reads_than_the_queue_takes(self, tmp_path: Path) -> None:
        """Beyond that a look asks first whether it would start one."""
        kernel = FakeKernel()
        kernel.wrap("disk_queue", lambda real, fd: 16)
        kernel.fail("read_nowait", errno.EAGAIN)
        kernel.wrap("cached_pages", lambda real, fd, offset, length: 0)
        async with mapped_by(kernel).open_path(file_of(tmp_path, inc(MIB))) as m:
            loop_thread = threading.get_ident()
            async with anyio.create_task_group() as tg:
                for page in range(64):
                    tg.start_soon(m.read_at, page * PAGE, PAGE)
        looks = [call for call in kernel.calls if call.name == "read_nowait"]
        assert {call.thread for call in looks} == {loop_thread}
        # Nobody looks again before all have looked: of a queue of 16, an eighth is for others.
        first_turn = kernel.names("read_nowait", "cached_pages")[:64]
        assert first_turn == ["read_nowait"] * 14 + ["cached_pages"] * 50

    async def test_starts_that_wait_make_it_careful(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If starting reads takes long, looks do not start any for half a second."""
        now = [100.0]
        seconds = 0.002
        monkeypatch.setattr(_mapped_memory, "monotonic", lambda: now[0])
        kernel = FakeKernel()
        kernel.before("read_nowait", lambda call: now.__setitem__(0, now[0] + seconds))
        kernel.fail("read_nowait", errno.EAGAIN)
        kernel.wrap("cached_pages", lambda real, fd, offset, length: 0)
        async with mapped_by(kernel).open_path(file_of(tmp_path, inc(MIB))) as m:
            for page in range(10):
                await m.read_at(page * PAGE, PAGE)
            kernel.calls.clear()
            await m.read_at(100 * PAGE, PAGE)
            loop = threading.get_ident()
            assert "read_nowait" not in [c.name for c in kernel.calls if c.thread == loop]
            assert "cached_pages" in kernel.names()
            now[0] += 1.0
            seconds = 0.0
            await m.read_at(101 * PAGE, PAGE)
            kernel.calls.clear()
            await m.read_at(102 * PAGE, PAGE)
            assert "read_nowait" in kernel.names()

    async def test_large_ranges_are_looked_up_in_a_worker(self, tmp_path: Path) -> None:
        """No lookup of more than 4 MiB runs on the loop, whatever is in memory."""
        kernel = FakeKernel()
        async with mapped_by(kernel).open_path(file_of(tmp_path, 8 * MIB)) as m:
            await m.load()
            kernel.calls.clear()
            async with m.view():
                pass
        loop = threading.get_ident()
        assert not [c for c in kernel.calls if c.thread == loop and c.name == "resident"]


class TestLoad:
    async def test_load_and_resident(self, tmp_path: Path) -> None:
        """``load`` brings all in, ``resident`` counts the bytes that are there."""
        path = on_disk(tmp_path, inc(64 * PAGE - 10))
        async with AsyncMmap.open_path(path) as m:
            assert await m.resident() == 0
            await m.load()
            with open(path, "rb") as file:
                assert resident_pages(file.fileno()) == 64
            assert await m.resident() == 64 * PAGE - 10
            assert await m.resident(5, 10_000) == 10_000
            assert await m.resident(7, 0) == 0

    async def test_load_false_brings_nothing_in(self, tmp_path: Path) -> None:
        """``load=False`` gives the region and leaves its pages where they are."""
        path = on_disk(tmp_path, inc(64 * PAGE))
        async with AsyncMmap.open_path(path, "r+") as m:
            async with m.view(load=False) as v:
                assert len(v) == 64 * PAGE
            async with m.view_mut(0, PAGE, load=False):
                pass
            assert await m.resident() == 0
            stats = m.statistics()
            assert (stats.loads_off_loop, stats.loads_inline, stats.bytes_loaded) == (0, 0, 0)

    async def test_what_is_counted(self, tmp_path: Path) -> None:
        """The statistics tell accesses on the loop from loads in workers, and their bytes."""
        kernel = cold_kernel()
        async with mapped_by(kernel).open_path(file_of(tmp_path, inc(MIB))) as m:
            async with m.view(0, 3 * PAGE):
                pass
            await m.load(0, 10)
            stats = m.statistics()
            assert (stats.loads_off_loop, stats.loads_inline) == (2, 0)
            assert stats.bytes_loaded == 3 * PAGE + 10
            await m.load(5, 0)
            assert m.statistics() == stats


class TestNothingByHalves:
    """What is known to fail beforehand changes nothing, however many pieces it would have had."""

    @pytest.fixture
    async def shorter(self, tmp_path: Path) -> AsyncIterator[tuple[AsyncMmap, Path]]:
        """A map of 4 MiB of zeros whose file has been cut to 3 MiB."""
        path = file_of(tmp_path, bytes(4 * MIB))
        async with AsyncMmap.open_path(path, "r+") as m:
            os.truncate(path, 3 * MIB)
            yield m, path
            await m.aclose(flush=False)

    async def test_write_at_beside_other_large_uses(self, shorter: tuple[AsyncMmap, Path]) -> None:
        """Others make the pieces smaller."""
        m, path = shorter
        pager = m._core.pager
        pager._piece.bytes = 16 * MIB
        others = [pager._piece.pieces(0, 64 * MIB) for _ in range(16)]
        for each in others:
            next(each)
        with pytest.raises(TruncatedError, match="bytes 0 to 4194304 "):
            await m.write_at(0, b"x" * (4 * MIB))
        assert path.read_bytes() == bytes(3 * MIB)

    async def test_one_piece_is_prepared_by_itself(self, tmp_path: Path) -> None:
        """Only where there are more of them, blocks are reserved beforehand, for all of them."""
        kernel = FakeKernel()
        async with mapped_by(kernel).open_path(file_of(tmp_path, bytes(4 * MIB)), "r+") as m:
            await m.write_at(0, bytes(100_000))
            assert kernel.names("reserve") == []
            await m.write_at(0, bytes(4 * MIB))
            assert kernel.names("reserve") == ["reserve"]

    async def test_move_from_behind_the_end(self, shorter: tuple[AsyncMmap, Path]) -> None:
        """The source is looked at, too, and the error names it."""
        m, path = shorter
        await m.write_at(2 * MIB, b"x" * MIB)
        before = path.read_bytes()
        with pytest.raises(TruncatedError, match="bytes 2097152 to 4194304 "):
            await m.move(0, 2 * MIB, 2 * MIB)
        assert path.read_bytes() == before

    async def test_a_writable_view_behind_the_end_takes_no_blocks(self, tmp_path: Path) -> None:
        """Room is made for stores only where they would find the file."""
        path = file_of(tmp_path, 64 * MIB)
        async with AsyncMmap.open_path(path, "r+") as m:
            os.truncate(path, 0)
            with pytest.raises(TruncatedError):
                await m.view_mut()
        assert path.stat().st_blocks == 0


class TestStores:
    async def test_a_small_writable_view_is_ready_for_stores(self, tmp_path: Path) -> None:
        """Up to 256 KiB the stores themselves take no page fault at all."""
        path = on_disk(tmp_path, inc(128 * PAGE))
        async with AsyncMmap.open_path(path, "r+") as m, m.view_mut(0, 64 * PAGE) as v:
            buffer = v.buffer
            before = _faults()
            for offset in range(0, 64 * PAGE, PAGE):
                buffer[offset] = 1
            # The interpreter may take a few of its own.
            assert _faults() - before < 8

    async def test_a_large_writable_view_dirties_nothing_by_itself(self, tmp_path: Path) -> None:
        """Beyond 256 KiB nothing is dirty until it is stored to, but holes have blocks."""
        path = on_disk(tmp_path, bytes(0))
        with open(path, "r+b") as file:
            os.truncate(file.fileno(), 128 * PAGE)
            async with AsyncMmap.open_path(path, "r+") as m:
                assert path.stat().st_blocks == 0
                async with m.view_mut():
                    assert dirty_pages(file.fileno()) == 0
                    assert path.stat().st_blocks * 512 >= 128 * PAGE
                async with m.view_mut(0, PAGE):
                    assert dirty_pages(file.fileno()) >= 1

    async def test_reserve_is_asked_for_before_the_pages(self, tmp_path: Path) -> None:
        """A large writable view first finds room for its holes, then loads."""
        kernel = cold_kernel()
        async with mapped_by(kernel).open_path(file_of(tmp_path, MIB), "r+") as m:
            kernel.calls.clear()
            async with m.view_mut():
                pass
            names = kernel.names("reserve", "populate_read", "populate_write")
            assert names[0] == "reserve"
            assert set(names[1:]) == {"populate_read"}
            kernel.calls.clear()
            async with m.view_mut(0, PAGE):
                pass
            assert kernel.names("reserve", "populate_read", "populate_write") == ["populate_write"]

    async def test_private_stores_stay_on_the_loop(self, tmp_path: Path) -> None:
        """What never reaches a disk is stored at once, once its page is in memory."""
        async with AsyncMmap.open_path(file_of(tmp_path, inc(PAGE)), Protection.READ_COPY) as m:
            await m.load()
            before = m.statistics()
            await m.write_at(5, b"abc")
            async with m.view_mut(0, 10) as v:
                assert bytes(v) == inc(5) + b"abc" + inc(2, 8)
            assert delta(before, m.statistics()) == (2, 0)


def _faults() -> int:
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_minflt + usage.ru_majflt


async def test_one_limiter_token_is_enough(tmp_path: Path) -> None:
    """With a limiter of one token, 100 tasks on two maps all get their pages."""
    limiter = CapacityLimiter(1)
    kernel = cold_kernel()
    opening = mapped_by(kernel).open_path
    first = await opening(file_of(tmp_path, inc(MIB), "1"), limiter=limiter)
    second = await opening(file_of(tmp_path, inc(MIB), "2"), limiter=limiter)
    got: list[bytes] = []

    async def look(m: AsyncMmap, page: int) -> None:
        got.append(await m.read_at(page * PAGE, PAGE))

    async with first, second, anyio.create_task_group() as tg:
        for page in range(50):
            tg.start_soon(look, first, page)
            tg.start_soon(look, second, page)
    assert got == [inc(PAGE)] * 100
