"""The event loop never waits for a disk, and bad storage is an error and not the end.

Sentences 1 and 2 of the design, for every call. That the loop does not wait is shown in two ways:
the kernel counts no page fault of the loop's thread that waited for a disk, over thousands of
accesses to cold pages; and the loop goes on with other tasks while the disk holds what a call
needs, for as long as it likes.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread
from anyio.lowlevel import checkpoint

from aiommap import AsyncMmap, MmapView, TruncatedError

from .content import file_of, inc
from .fake_kernel import Call, FakeKernel
from .flushing import mapped_by

if sys.platform != "linux":
    pytest.skip("the kernel's books and the rigs are Linux's", allow_module_level=True)

from .rigs.faults import evict, major_faults_of_this_thread
from .rigs.plain_files import TOUCH, run_child
from .rigs.slow_file import SlowFile, content
from .rigs.small_fs import SmallFileSystem

pytestmark = pytest.mark.anyio

PAGE = 4096
MIB = 1 << 20
PAGES = 2000
"""Of the file on a real disk whose pages are accessed cold."""

MakeSlowFile = Callable[..., SlowFile]
MakeSmallFs = Callable[..., SmallFileSystem]
Use = Callable[[AsyncMmap, int], Awaitable[object]]


# Every way to use a page, as often as it is in the file.


async def view(m: AsyncMmap, page: int) -> bytes:
    async with m.view(page * PAGE, PAGE) as v:
        return bytes(v.buffer)


async def view_mut(m: AsyncMmap, page: int) -> bytes:
    async with m.view_mut(page * PAGE, PAGE) as v:
        v.buffer[0] = v.buffer[0]
        return bytes(v)


async def read_at(m: AsyncMmap, page: int) -> bytes:
    return await m.read_at(page * PAGE, PAGE)


async def readinto_at(m: AsyncMmap, page: int) -> bytes:
    buffer = bytearray(PAGE)
    await m.readinto_at(page * PAGE, buffer)
    return bytes(buffer)


async def write_at(m: AsyncMmap, page: int) -> None:
    await m.write_at(page * PAGE, inc(PAGE))


async def file_read(m: AsyncMmap, page: int) -> bytes:
    async with m.view(page * PAGE, PAGE, load=False) as v:
        return await v.read()


async def file_readinto(m: AsyncMmap, page: int) -> bytes:
    buffer = bytearray(PAGE)
    async with m.view(page * PAGE, PAGE, load=False) as v:
        await v.readinto(buffer)
    return bytes(buffer)


async def file_readline(m: AsyncMmap, page: int) -> bytes:
    async with m.view(page * PAGE, PAGE, load=False) as v:
        return b"".join([line async for line in v])


async def file_write(m: AsyncMmap, page: int) -> None:
    async with m.view_mut(page * PAGE, PAGE, load=False) as v:
        await v.write(inc(PAGE))


async def move(m: AsyncMmap, page: int) -> None:
    await m.move(page * PAGE, page * PAGE + 1, PAGE - 1)


async def load(m: AsyncMmap, page: int) -> None:
    await m.load(page * PAGE, PAGE)


async def find(m: AsyncMmap, page: int) -> None:
    await m.find(b"no such bytes", page * PAGE, (page + 1) * PAGE)


async def rfind(m: AsyncMmap, page: int) -> None:
    await m.rfind(b"no such bytes", page * PAGE, (page + 1) * PAGE)


async def windows(m: AsyncMmap, page: int) -> bytes:
    data = b""
    async for window in m.windows(PAGE // 2, offset=page * PAGE, length=PAGE):
        data += window
    return data


async def large_view(m: AsyncMmap, page: int) -> bytes:
    """A view of more than the loop looks up page by page."""
    start = min(page, PAGES - 100) * PAGE
    async with m.view(start, 100 * PAGE) as v:
        return bytes(v)


READS: tuple[Use, ...] = (
    view,
    read_at,
    readinto_at,
    file_read,
    file_readinto,
    file_readline,
    load,
    find,
    rfind,
    windows,
)
STORES: tuple[Use, ...] = (view_mut, write_at, file_write, move)


def by_name(use: Use) -> str:
    return str(getattr(use, "__name__", use))


class TestMajorFaults:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = file_of(tmp_path, random.Random(0).randbytes(PAGES * PAGE))
        try:
            evict(path)
        except RuntimeError:
            pytest.skip("temporary files are in memory here: no page can be made cold")
        return path

    @pytest.mark.parametrize("use", READS + STORES, ids=by_name)
    async def test_none_on_the_loop(self, path: Path, use: Use) -> None:
        """Thousands of accesses to cold pages, and the loop's thread waited in none."""
        pages = random.Random(1).sample(range(PAGES), 1000)
        async with AsyncMmap.open_path(path, "r+") as m:
            await m.advise("random")
            before = major_faults_of_this_thread()
            for page in pages[:300]:  # one task, and then many
                await use(m, page)
            rest = iter(pages[300:])

            async def worker() -> None:
                for page in rest:
                    await use(m, page)

            async with anyio.create_task_group() as tg:
                for _ in range(16):
                    tg.start_soon(worker)
            assert major_faults_of_this_thread() == before

    async def test_none_in_large_views_and_a_scan(self, path: Path) -> None:
        """Nor in views of 400 KiB, windows over all of it, and a writable view of all of it."""
        async with AsyncMmap.open_path(path, "r+") as m:
            before = major_faults_of_this_thread()
            for page in range(0, PAGES, 500):
                await large_view(m, page)
            await m.aclose()
        evict(path)
        async with AsyncMmap.open_path(path, "r+") as m:
            total = 0
            async for window in m.windows(300_000):
                total += sum(window[::PAGE])
            assert major_faults_of_this_thread() == before
            await m.aclose()
        evict(path)
        async with AsyncMmap.open_path(path, "r+") as m, m.view_mut() as v:
            assert sum(v.buffer[::PAGE]) > 0
            assert major_faults_of_this_thread() == before

    async def test_the_control_fires(self, path: Path) -> None:
        """A plain map on the loop waits once for each of these pages."""
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as plain:
            plain.madvise(mmap.MADV_RANDOM)
            before = major_faults_of_this_thread()
            for page in range(1000):
                plain[page * PAGE]
            assert major_faults_of_this_thread() - before == 1000

    async def test_the_control_of_load_false(self, path: Path) -> None:
        """A view that was not loaded waits as well: it is what ``load`` is for."""
        async with AsyncMmap.open_path(path) as m:
            await m.advise("random")
            before = major_faults_of_this_thread()
            async with m.view(load=False) as v:
                assert sum(v.buffer[: 100 * PAGE : PAGE]) >= 0
            assert major_faults_of_this_thread() - before == 100


@asynccontextmanager
async def while_the_disk_holds(file: SlowFile, kind: Any) -> AsyncIterator[None]:
    """The disk does nothing of a kind until the block is left, which happens on the loop."""
    file.hold(kind)
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(file.release, kind)


class TestTurns:
    """With the disk held, the test itself goes on, which it could not if the loop waited."""

    @pytest.mark.fuse
    @pytest.mark.parametrize("use", READS + STORES, ids=by_name)
    async def test_the_loop_turns_while_a_page_is_held(
        self, make_slow_file: MakeSlowFile, use: Use
    ) -> None:
        """Other tasks run while a call waits for a page, and get pages that are there."""
        file = make_slow_file(MIB, max_readahead=0)
        results: list[object] = []

        async def run() -> None:
            results.append(await use(m, 100))

        async with AsyncMmap.open_path(file.path, "r+") as m:
            file.evict()
            expected = content(0, PAGE)
            assert await m.read_at(0, PAGE) == expected
            async with anyio.create_task_group() as tg:
                async with while_the_disk_holds(file, "read"):
                    tg.start_soon(run)
                    await to_thread.run_sync(file.wait_held, "read")
                    for _ in range(100):
                        await checkpoint()
                        assert await m.read_at(0, PAGE) == expected
                        async with m.view(0, PAGE) as v:
                            assert bytes(v) == expected
                    assert results == []
            assert len(results) == 1
            if isinstance(results[0], bytes):
                assert results[0] == content(100 * PAGE, PAGE)

    @pytest.mark.fuse
    @pytest.mark.parametrize("call", ["flush", "flush_range", "pending", "leave"])
    async def test_the_loop_turns_while_a_flush_is_held(
        self, make_slow_file: MakeSlowFile, call: str
    ) -> None:
        """Other tasks run while a flush waits for the disk, and take regions meanwhile."""
        file = make_slow_file(MIB, max_readahead=0)
        over = anyio.Event()

        async def run(m: AsyncMmap) -> None:
            match call:
                case "flush":
                    await m.flush()
                case "flush_range":
                    await m.flush_range(0, PAGE)
                case "pending":
                    await (await m.flush_async())
                case _:
                    await m.aclose()
            over.set()

        m = await AsyncMmap.open_path(file.path, "r+")
        await m.write_at(0, b"abc")
        await m.load()
        async with anyio.create_task_group() as tg:
            async with while_the_disk_holds(file, "fsync"):
                tg.start_soon(run, m)
                await to_thread.run_sync(file.wait_held, "fsync")
                for _ in range(100):
                    await checkpoint()
                    if call != "leave":
                        async with m.view(PAGE, PAGE) as v:
                            assert bytes(v) == content(PAGE, PAGE)
                assert not over.is_set()
        assert over.is_set()
        await m.aclose()
        assert file.stored(0, 3) == b"abc"

    @pytest.mark.fuse
    async def test_the_loop_turns_while_an_opening_waits(
        self, make_slow_file: MakeSlowFile
    ) -> None:
        """A populated view of the first task does not hold up that another map opens."""
        file = make_slow_file(MIB, max_readahead=0)
        async with AsyncMmap.open_path(file.path) as m:
            file.evict()
            async with anyio.create_task_group() as tg:
                async with while_the_disk_holds(file, "read"):
                    tg.start_soon(view, m, 3)
                    await to_thread.run_sync(file.wait_held, "read")
                    async with AsyncMmap.open_path(file.path) as second:
                        assert len(second) == MIB
                    async with AsyncMmap.anonymous(MIB) as memory:
                        await memory.write_at(0, b"abc")


class TestTruncation:
    @pytest.mark.parametrize("use", READS + STORES, ids=by_name)
    async def test_before(self, tmp_path: Path, use: Use) -> None:
        """What the file does not reach is a TruncatedError; the rest works; it heals."""
        path = file_of(tmp_path, inc(8 * PAGE))
        async with AsyncMmap.open_path(path, "r+") as m:
            os.truncate(path, 3 * PAGE + 5)
            for page in (3, 5):
                with pytest.raises(TruncatedError) as caught:
                    await use(m, page)
                assert caught.value.size == 3 * PAGE + 5
                assert caught.value.filename == str(path)
            await use(m, 2)
            os.truncate(path, 8 * PAGE)
            await use(m, 5)
            await m.flush()

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("use", [view, view_mut, load, windows], ids=by_name)
    async def test_during(self, tmp_path: Path, use: Use, when: str) -> None:
        """A file that is cut while its pages come in is a TruncatedError, at any moment of it."""
        path = file_of(tmp_path, inc(8 * PAGE))
        kernel = FakeKernel()
        kernel.fail("read_nowait", errno.EAGAIN)
        kernel.wrap("resident", lambda real, address, length: bytes(len(real(address, length))))
        name = "populate_write" if use is view_mut else "populate_read"

        def populate(real: Callable[..., None], address: int, length: int) -> None:
            if when == "before":
                os.truncate(path, PAGE)
            try:
                real(address, length)
            finally:
                os.truncate(path, PAGE)

        kernel.wrap(name, populate)
        kernel.wrap("populate_many", lambda real, spans, write: False)
        async with mapped_by(kernel).open_path(path, "r+") as m:
            with pytest.raises(TruncatedError) as caught:
                await use(m, 4)
            assert caught.value.size == PAGE
            kernel.heal()
            assert await m.read_at(0, PAGE) == inc(PAGE)
            await m.aclose(flush=False)

    async def test_during_a_copy(self, tmp_path: Path) -> None:
        """A file that is cut in the middle of a store is an error, not SIGBUS."""
        path = file_of(tmp_path, inc(8 * PAGE))
        kernel = FakeKernel()

        def cut(call: Call) -> None:
            os.truncate(path, 2 * PAGE)

        kernel.before("copy", cut)
        async with mapped_by(kernel).open_path(path, "r+") as m:
            with pytest.raises(TruncatedError):
                await m.write_at(0, bytes(8 * PAGE))
            assert await m.read_at(PAGE, PAGE)
            await m.aclose(flush=False)

    async def test_after(self, tmp_path: Path) -> None:
        """A view that is out when its file is cut: its methods that copy raise."""
        path = file_of(tmp_path, inc(8 * PAGE))
        async with AsyncMmap.open_path(path, "r+") as m:
            async with m.view_mut(4 * PAGE, 2 * PAGE) as v:
                os.truncate(path, PAGE)
                for attempt in (v.read, lambda: v.readinto(bytearray(9)), lambda: v.write(b"x")):
                    await v.seek(0)
                    with pytest.raises(TruncatedError):
                        await attempt()
            assert await m.read_at(0, PAGE) == inc(PAGE)
            await m.aclose(flush=False)

    async def test_the_control_dies(self, tmp_path: Path) -> None:
        """A plain map that touches such a page is killed."""
        path = file_of(tmp_path, inc(8 * PAGE))
        code = TOUCH.replace("pages[offset]\n", "os.truncate(path, 0); pages[offset]\n", 1)
        assert run_child(code, path, 4 * PAGE, "read").returncode == -7


class TestBadPages:
    @pytest.mark.fuse
    @pytest.mark.parametrize("use", READS + STORES, ids=by_name)
    async def test_a_page_that_cannot_be_read(self, make_slow_file: MakeSlowFile, use: Use) -> None:
        """EIO comes out with the path; other pages work; healed, the same call succeeds."""
        file = make_slow_file(MIB, max_readahead=0)
        async with AsyncMmap.open_path(file.path, "r+") as m:
            file.evict()
            file.fail_reads(20 * PAGE, PAGE)
            for _ in range(2):
                with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
                    await use(m, 20)
                assert caught.value.errno == errno.EIO
                assert caught.value.filename == str(file.path)
            await use(m, 19)
            await use(m, 21)
            file.heal()
            result = await use(m, 20)
            if isinstance(result, bytes):
                assert result == content(20 * PAGE, PAGE)

    @pytest.mark.fuse
    async def test_in_the_middle_of_a_large_range(self, make_slow_file: MakeSlowFile) -> None:
        """A bad page inside a large read, load or scan is an error of all of it."""
        file = make_slow_file(2 * MIB, max_readahead=0)
        async with AsyncMmap.open_path(file.path) as m:
            file.evict()
            file.fail_reads(300 * PAGE, PAGE)
            for attempt in (
                m.load,
                lambda: m.read_at(0, 2 * MIB),
                lambda: m.readinto_at(0, bytearray(2 * MIB)),
                lambda: m.find(b"no such bytes"),
                lambda: scan(m),
            ):
                with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                    await attempt()
            file.heal()
            assert await scan(m) == content(0, 2 * MIB)


async def scan(m: AsyncMmap) -> bytes:
    data = b""
    async for window in m.windows(100_000):
        data += window
    return data


class TestFullDisks:
    @pytest.mark.loopdev
    @pytest.mark.smallfs
    @pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
    @pytest.mark.parametrize("use", STORES, ids=by_name)
    async def test_a_store_into_a_hole(
        self, make_small_fs: MakeSmallFs, kind: str, use: Use
    ) -> None:
        """A hole without room for it is ENOSPC; other pages work; with room the call succeeds."""
        small = make_small_fs(kind)
        path = self.with_hole(small, 200)
        small.fill()
        async with AsyncMmap.open_path(path, "r+") as m:
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
                await use(m, 100)
            assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
            await use(m, 1)
            await m.flush()
            small.free()
            await use(m, 100)
            await m.flush()

    @pytest.mark.loopdev
    @pytest.mark.smallfs
    @pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
    async def test_a_large_writable_view_of_holes(
        self, make_small_fs: MakeSmallFs, kind: str
    ) -> None:
        """A view too large to be prepared page by page is refused before any store."""
        small = make_small_fs(kind)
        path = self.with_hole(small, 200)
        small.fill()
        async with AsyncMmap.open_path(path, "r+") as m:
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                await m.view_mut(0, 200 * PAGE)
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                await m.write_at(0, bytes(200 * PAGE))
            assert await m.read_at(0, PAGE) == inc(PAGE)
            small.free()
            async with m.view_mut(0, 200 * PAGE) as v:
                v[:] = inc(200 * PAGE, 7)
            assert await m.read_at(0, 200 * PAGE) == inc(200 * PAGE, 7)

    @pytest.mark.smallfs
    async def test_reading_a_hole_of_a_full_tmpfs(self, make_small_fs: MakeSmallFs) -> None:
        """Copies read zeros; a view would need a page of its own, and says that there is none."""
        small = make_small_fs("tmpfs")
        path = self.with_hole(small, 20)
        small.fill()
        async with AsyncMmap.open_path(path) as m:
            for copy in (read_at, readinto_at, file_read, file_readinto):
                assert await copy(m, 15) == bytes(PAGE)
            assert await m.find(b"no such bytes") == -1
            for touch in (view, load, windows):
                with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                    await touch(m, 15)
            assert await view(m, 0) == inc(PAGE)
            small.free()
            assert await view(m, 15) == bytes(PAGE)

    @pytest.mark.smallfs
    async def test_the_control_dies(self, make_small_fs: MakeSmallFs) -> None:
        """A plain map that reads such a hole is killed."""
        small = make_small_fs("tmpfs")
        path = self.with_hole(small, 20)
        small.fill()
        assert run_child(TOUCH, path, 15 * PAGE, "read").returncode == -7

    @staticmethod
    def with_hole(small: SmallFileSystem, pages: int) -> Path:
        """A file of two pages of data and a hole."""
        path = small.path / "file"
        path.write_bytes(inc(2 * PAGE))
        os.truncate(path, pages * PAGE)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return path


async def test_views_that_are_out_survive_the_errors_of_others(tmp_path: Path) -> None:
    """A view on good pages goes on while other calls on the map fail."""
    path = file_of(tmp_path, inc(8 * PAGE))
    async with AsyncMmap.open_path(path, "r+") as m:
        v: MmapView
        async with m.view(0, PAGE) as v:
            os.truncate(path, 2 * PAGE)
            with pytest.raises(TruncatedError):
                await m.load()
            with pytest.raises(TruncatedError):
                await view(m, 4)
            assert bytes(v) == inc(PAGE)
        await m.aclose(flush=False)
