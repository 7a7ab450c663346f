"""AsyncMmap: what it is, copies, flushes, and its end."""

from __future__ import annotations

import array
import errno
import gc
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import pytest
from anyio import ClosedResourceError, from_thread, to_thread
from anyio.lowlevel import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from aiommap import (
    AsyncMmap,
    DeadlockError,
    FlushError,
    PendingFlush,
    Protection,
    TruncatedError,
)
from aiommap._event_loop import current_event_loop

from .content import file_of, inc, maps_of, only_linux, open_descriptors, settled_descriptors, zeros
from .fake_kernel import FakeKernel

pytestmark = pytest.mark.anyio

N = 10_000
LARGE = 3_000_000


class Mmap(AsyncMmap):
    """A map on a kernel that a test can break and look into."""


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    kernel = FakeKernel(durability=True)
    monkeypatch.setattr(Mmap, "_kernel", kernel)
    return kernel


@pytest.fixture
async def m(tmp_path: Path) -> AsyncIterator[AsyncMmap]:
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N)), "r+") as m:
        yield m


# What it is


async def test_what_it_shows(tmp_path: Path) -> None:
    """len, protection, offset, private, closed, ptr, repr."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path, "r+", offset=10, length=20) as m:
        assert (len(m), m.protection, m.offset) == (20, Protection.READ_WRITE, 10)
        assert (m.private, m.closed) == (False, False)
        assert m.ptr() == m.mut_ptr()
        assert m.ptr() % 4096 == 10
        async with m.view():
            assert repr(m) == f"<AsyncMmap of {str(path)!r}, 20 bytes from 10, READ_WRITE, 1 views>"
    assert m.closed
    assert repr(m) == "<AsyncMmap closed>"
    async with AsyncMmap.anonymous(5) as m:
        assert repr(m) == "<AsyncMmap of anonymous memory, 5 bytes from 0, READ_WRITE, 0 views>"


async def test_raw_slices(m: AsyncMmap) -> None:
    """as_slice and as_mut_slice are the memory itself, of the whole map, without a lock."""
    async with m.view_mut(0, 10) as v:
        with m.as_slice() as raw, m.as_mut_slice() as mutable:
            assert raw.readonly
            assert not mutable.readonly
            assert raw == mutable == inc(N)
            mutable[0] = 99
            assert raw[0] == v[0] == 99
            with pytest.raises(TypeError, match="read-only"):
                raw[0] = 1


async def test_not_writable(tmp_path: Path) -> None:
    """Whatever stores is a PermissionError in a READ or READ_EXECUTE map."""
    path = file_of(tmp_path, inc(N))
    for protection in (Protection.READ, Protection.READ_EXECUTE):
        async with AsyncMmap.open_path(path, protection) as m:
            for call in (m.mut_ptr, m.as_mut_slice, m.view_mut, m.view_mut_nowait):
                with pytest.raises(PermissionError, match=f"its protection is {protection.name}"):
                    call()
            for awaited in (m.write_at(0, b"a"), m.move(0, 1, 1), m.resize(5)):
                with pytest.raises(PermissionError, match=f"its protection is {protection.name}"):
                    await awaited
    assert path.read_bytes() == inc(N)


# Copies


@pytest.mark.parametrize("protection", ["r+", "c"])
@pytest.mark.parametrize("kind", ["file", "anonymous"])
async def test_copies_of_every_size(tmp_path: Path, kind: str, protection: str) -> None:
    """write_at, read_at and readinto_at are exact at every size and place."""
    if kind == "file":
        opening = AsyncMmap.open_path(file_of(tmp_path, LARGE), protection)
    else:
        opening = AsyncMmap.anonymous(LARGE, protection)
    expected = bytearray(LARGE)
    async with opening as m:
        for offset, length in (
            (0, 1),
            (4_095, 2),
            (100, 65_536),
            (7, 256 << 10),
            (9, (256 << 10) + 1),
            (300_001, 2_000_003),
            (LARGE - 1, 1),
            (0, LARGE),
        ):
            data = inc(length, offset + length)
            assert await m.write_at(offset, data) == length
            expected[offset : offset + length] = data
            assert await m.read_at(offset, length) == data
            buffer = bytearray(length)
            assert await m.readinto_at(offset, buffer) == length
            assert buffer == data
            assert await m.read_at(0, LARGE) == expected


async def test_read_at_gives_bytes_of_its_own(m: AsyncMmap) -> None:
    """What read_at gave does not change with the map; nothing is b""."""
    data = await m.read_at(0, 5)
    await m.write_at(0, b"xxxxx")
    assert (type(data), data) == (bytes, inc(5))
    assert await m.read_at(N, 0) == b""


async def test_buffers_of_every_kind(m: AsyncMmap) -> None:
    """write_at and readinto_at take any contiguous buffer, as its bytes."""
    assert await m.write_at(0, array.array("H", [0x6161, 0x6262])) == 4
    assert await m.write_at(4, memoryview(b"xcdx")[1:3]) == 2
    assert await m.read_at(0, 6) == b"aabbcd"
    wide = array.array("I", [0])
    assert await m.readinto_at(0, wide) == 4
    assert wide.tobytes() == b"aabb"
    with pytest.raises(TypeError, match="buffer must be writable"):
        await m.readinto_at(0, b"abc")
    with pytest.raises(TypeError, match="must be bytes or another buffer"):
        await m.readinto_at(0, 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be bytes or another buffer"):
        await m.write_at(0, "text")  # type: ignore[arg-type]
    with pytest.raises(BufferError, match="must be contiguous"):
        await m.write_at(0, memoryview(b"abcd")[::2])
    with pytest.raises(BufferError, match="must be contiguous"):
        await m.readinto_at(0, memoryview(bytearray(4))[::2])


@pytest.mark.parametrize("distance", [0, 1, -1, 5_000, -5_000])
async def test_write_at_of_the_maps_own_memory(tmp_path: Path, distance: int) -> None:
    """The source may be memory of the same map, overlapping the target in any way."""
    data = inc(LARGE - 13) + b"not periodic!"
    async with AsyncMmap.open_path(file_of(tmp_path, data), "r+") as m:
        source = 10_000
        with m.as_slice() as raw:
            await m.write_at(source + distance, raw[source : source + 20_000])
        expected = bytearray(data)
        expected[source + distance :][:20_000] = b""
        expected = bytearray(data)
        expected[source + distance : source + distance + 20_000] = data[source : source + 20_000]
        assert await m.read_at(0, LARGE) == expected


async def test_copies_lock_their_region(m: AsyncMmap) -> None:
    """read_at waits for writers, write_at for readers, and nobody for what is elsewhere."""
    for taken, calls in (
        (m.view_mut, [m.read_at(0, 5), m.readinto_at(4, bytearray(1)), m.write_at(9, b"a")]),
        (m.view, [m.write_at(0, b"\0"), m.write_at(9, b"\t")]),
    ):
        held = await taken(0, 10)
        async with anyio.create_task_group() as tg:

            async def run(call: object) -> None:
                await call  # type: ignore[misc]

            for call in calls:
                tg.start_soon(run, call)
            await anyio.wait_all_tasks_blocked()
            assert m.statistics().waiting == len(calls)
            await m.read_at(10, 5)
            await m.write_at(10, inc(5, 10))
            await held.aclose()
    assert m.statistics().waiting == 0


async def test_copies_under_own_views(m: AsyncMmap) -> None:
    """A reader may read under its own view; conflicting copies are a DeadlockError."""
    async with m.view(0, 10):
        assert await m.read_at(0, 20) == inc(20)
        assert await m.readinto_at(5, bytearray(10)) == 10
        with pytest.raises(DeadlockError, match="holds"):
            await m.write_at(9, b"ab")


async def test_truncated(tmp_path: Path) -> None:
    """Bytes that the file does not reach are a TruncatedError that names them; the rest works."""
    path = file_of(tmp_path, inc(LARGE))
    async with AsyncMmap.open_path(path, "r+") as m:
        os.truncate(path, 8_192)
        for offset, length in ((8_192, 1), (8_190, 3), (0, 8_193), (100, 1_000_000), (8_193, 5)):
            for call in (
                m.read_at(offset, length),
                m.readinto_at(offset, bytearray(length)),
                m.write_at(offset, bytes(length)),
                m.load(offset, length),
                m.view(offset, length),
                m.view_mut(offset, length),
                m.flush_range(offset, length),
                m.flush_async_range(offset, length),
            ):
                with pytest.raises(TruncatedError, match="reaches to byte 8192") as caught:
                    await call
                assert caught.value.size == 8_192
                assert caught.value.filename == str(path)
                assert caught.value.offset + caught.value.length > 8_192
        assert await m.read_at(0, 8_192) == inc(8_192)
        assert await m.write_at(8_191, b"x") == 1
        await m.flush_range(0, 8_192)
        os.truncate(path, LARGE)
        assert await m.read_at(8_190, 4) == bytes([254]) + b"x\0\0"
        async with m.view_mut_nowait():
            pass
    assert path.stat().st_size == LARGE


async def test_a_truncated_error_names_what_was_asked_for(tmp_path: Path) -> None:
    """Offset and length of the error are the caller's, however it was cut into pieces."""
    path = file_of(tmp_path, inc(LARGE))
    async with AsyncMmap.open_path(path) as m:
        os.truncate(path, 1_500_000)
        with pytest.raises(TruncatedError, match="bytes 7 to 3000000") as caught:
            await m.read_at(7, LARGE - 7)
        assert (caught.value.offset, caught.value.length) == (7, LARGE - 7)
        os.truncate(path, LARGE)


# Durability


async def test_flush_makes_everything_durable(tmp_path: Path, kernel: FakeKernel) -> None:
    """What was stored before a flush is what a power loss leaves; without it nothing is."""
    path = file_of(tmp_path, N)
    async with Mmap.open_path(path, "r+") as m:
        await m.write_at(0, inc(N))
        assert kernel.disk.durable(path) == zeros(N)
        await m.flush()
        assert kernel.disk.durable(path) == inc(N)
        async with m.view_mut(100, 3) as v:
            v[:] = b"abc"
            await v.flush()
        assert kernel.disk.durable(path)[100:103] == b"abc"
        await m.write_at(200, b"def")
        await m.flush_range(200, 3)
        assert kernel.disk.durable(path)[200:203] == b"def"
        async with m.view_mut(300, 10) as v:
            v[2:5] = b"ghi"
            await v.flush_range(2, 3)
            assert kernel.disk.durable(path)[302:305] == b"ghi"
            with pytest.raises(ValueError, match="inside the view of 10 bytes"):
                await v.flush_range(5, 6)


async def test_flush_async_starts_and_wait_makes_durable(
    tmp_path: Path, kernel: FakeKernel
) -> None:
    """flush_async starts the write-back; only waiting for it makes the bytes durable."""
    path = file_of(tmp_path, N)
    async with Mmap.open_path(path, "r+") as m:
        await m.write_at(0, b"abc")
        pending = await m.flush_async()
        assert kernel.names("start_write_back", "sync_data", "sync_range") == ["start_write_back"]
        assert not pending.done
        assert kernel.disk.durable(path)[:3] == zeros(3)
        await pending.wait()
        assert pending.done
        assert kernel.disk.durable(path)[:3] == b"abc"
        count = len(kernel.names("sync_data", "sync_range"))
        await pending
        await pending.wait()
        assert len(kernel.names("sync_data", "sync_range")) == count


async def test_pending_flush_of_a_view(tmp_path: Path, kernel: FakeKernel) -> None:
    """The pending flushes of a view are of its own bytes, relative to it."""
    path = file_of(tmp_path, N)
    async with Mmap.open_path(path, "r+") as m:
        async with m.view_mut(100, 50) as v:
            v[10:13] = b"abc"
            part = await v.flush_async_range(10, 3)
            whole = await v.flush_async()
            assert repr(part) == "<PendingFlush of bytes 110 to 113, pending>"
            assert repr(whole) == "<PendingFlush of bytes 100 to 150, pending>"
            with pytest.raises(ValueError, match="inside the view of 50 bytes"):
                await v.flush_async_range(50, 1)
        await part
        assert repr(part) == "<PendingFlush of bytes 110 to 113, done>"
        assert kernel.disk.durable(path)[110:113] == b"abc"


async def test_a_later_flush_covers_a_pending_one(tmp_path: Path) -> None:
    """done turns true when a later flush covered the range; nobody needs to wait."""
    async with AsyncMmap.open_path(file_of(tmp_path, N), "r+") as m:
        await m.write_at(0, b"abc")
        first = await m.flush_async_range(0, 3)
        await m.flush()
        assert first.done
        second = await m.flush_async_range(0, 3)
        await m.flush_range(0, 10)
        assert second.done
        await m.flush_async()  # dropped


async def test_a_pending_flush_outlives_its_map(tmp_path: Path, kernel: FakeKernel) -> None:
    """A pending flush can be waited for after the map has closed."""
    path = file_of(tmp_path, N)
    m = await Mmap.open_path(path, "r+")
    await m.write_at(0, b"abc")
    pending = await m.flush_async()
    await m.aclose(flush=False)
    assert kernel.disk.durable(path)[:3] == zeros(3)
    await pending
    assert pending.done
    assert kernel.disk.durable(path)[:3] == b"abc"


async def test_waiters_of_one_pending_flush(tmp_path: Path, kernel: FakeKernel) -> None:
    """Several waiters, and several pending flushes, share device flushes."""
    async with Mmap.open_path(file_of(tmp_path, N), "r+") as m:
        pendings = []
        for place in range(5):
            await m.write_at(place * 1000, b"abc")
            pendings.append(await m.flush_async_range(place * 1000, 3))
        async with anyio.create_task_group() as tg:
            for pending in pendings * 4:
                tg.start_soon(pending.wait)
        assert all(pending.done for pending in pendings)
        assert m.statistics().flushes_done <= 3


@pytest.mark.parametrize("what", ["READ", "READ_COPY", "anonymous", "empty range"])
async def test_nothing_to_flush(tmp_path: Path, kernel: FakeKernel, what: str) -> None:
    """READ, READ_COPY and anonymous maps and empty ranges: no-ops, pending flushes done."""
    if what == "anonymous":
        opening = Mmap.anonymous(N)
    elif what == "empty range":
        opening = Mmap.open_path(file_of(tmp_path, N), "r+")
    else:
        opening = Mmap.open_path(file_of(tmp_path, N), Protection[what])
    async with opening as m:
        length = 0 if what == "empty range" else 10
        await m.flush_range(5, length)
        assert (await m.flush_async_range(5, length)).done
        if length:
            await m.flush()
            pending = await m.flush_async()
            assert isinstance(pending, PendingFlush)
            assert pending.done
            await pending
        assert kernel.names("sync_data", "sync_range", "start_write_back") == []


async def test_flushes_of_a_truncated_file(tmp_path: Path) -> None:
    """A file shorter than the map is a TruncatedError each time, until it is long again."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path, "r+") as m:
        await m.write_at(0, b"abc")
        os.truncate(path, 5_000)
        for _ in range(2):
            with pytest.raises(TruncatedError, match="reaches to byte 5000") as caught:
                await m.flush()
            assert (caught.value.offset, caught.value.length) == (0, N)
            with pytest.raises(TruncatedError, match="reaches to byte 5000"):
                await m.flush_async()
        await m.flush_range(0, 5_000)
        os.truncate(path, N)
        await m.flush()


@pytest.mark.parametrize("call", ["sync_data", "sync_range"])
async def test_a_failed_flush_stays(tmp_path: Path, kernel: FakeKernel, call: str) -> None:
    """After a failed flush every flush raises it, no-op ones too, until it is cleared."""
    path = file_of(tmp_path, N)
    m = await Mmap.open_path(path, "r+")
    await m.write_at(0, b"abc")
    pending = await m.flush_async_range(0, 3)
    kernel.fail("sync_data", errno.EIO)
    kernel.fail("sync_range", errno.EIO)
    flush: Callable[[], object] = m.flush if call == "sync_data" else lambda: m.flush_range(0, 3)
    with pytest.raises(FlushError, match="flush failed: Input/output error") as caught:
        await flush()  # type: ignore[misc]
    assert caught.value.errno == errno.EIO
    assert caught.value.filename == str(path)
    assert caught.value.ranges
    kernel.heal()
    for again in (
        m.flush(),
        m.flush_range(0, 3),
        m.flush_range(5, 0),
        m.flush_async(),
        m.flush_async_range(N, 0),
        pending.wait(),
    ):
        with pytest.raises(FlushError, match="Input/output error"):
            await again
    assert not pending.done
    assert "failed" in repr(pending)
    async with m.view_mut() as v:
        with pytest.raises(FlushError, match="Input/output error"):
            await v.flush()
    await m.clear_flush_error()
    await m.write_at(0, b"xyz")
    await m.flush()
    assert kernel.disk.durable(path)[:3] == b"xyz"
    with pytest.raises(FlushError, match="Input/output error"):
        await pending
    await m.aclose()


async def test_a_failed_flush_shows_in_aclose(tmp_path: Path, kernel: FakeKernel) -> None:
    """Leaving raises the FlushError, its own or one from before, and everything is closed."""
    path = file_of(tmp_path, N)
    before = settled_descriptors()
    for earlier in (True, False):
        m = await Mmap.open_path(path, "r+")
        await m.write_at(0, b"abc")
        kernel.fail("sync_data", errno.ENOSPC)
        kernel.fail("sync_range", errno.ENOSPC)
        if earlier:
            with pytest.raises(FlushError, match="No space left"):
                await m.flush()
            kernel.heal()
        with pytest.raises(FlushError, match="No space left"):
            await m.aclose()
        kernel.heal()
        assert m.closed
        await m.aclose()
    gc.collect()
    assert open_descriptors() == before


# The end


@only_linux
async def test_leaving_flushes_what_was_written(tmp_path: Path, kernel: FakeKernel) -> None:
    """Stores of every kind are durable after the block."""

    async def write(m: AsyncMmap) -> None:
        await m.write_at(0, b"abc")

    async def view(m: AsyncMmap) -> None:
        async with m.view_mut(0, 3) as v:
            v[:] = b"abc"

    async def move(m: AsyncMmap) -> None:
        with open(path, "r+b") as file:
            file.seek(10)
            file.write(b"abc")
        await m.move(0, 10, 3)

    async def raw(m: AsyncMmap) -> None:
        with m.as_mut_slice() as mutable:
            mutable[0:3] = b"abc"

    async def pointer(m: AsyncMmap) -> None:
        m.mut_ptr()
        with m.as_mut_slice() as mutable:
            mutable[0:3] = b"abc"

    async def flushed_before(m: AsyncMmap) -> None:
        await m.write_at(0, b"xyz")
        await m.flush()
        await m.write_at(0, b"abc")

    async def flushed_in_a_view(m: AsyncMmap) -> None:
        async with m.view_mut(0, 3) as v:
            await m.flush()
            v[:] = b"abc"

    async def flushed_in_part(m: AsyncMmap) -> None:
        await m.write_at(0, b"abc")
        await m.flush_range(5_000, 10)

    for store in (
        write, view, move, raw, pointer, flushed_before, flushed_in_a_view, flushed_in_part,
    ):  # fmt: skip
        path = file_of(tmp_path, N, name=store.__name__)
        async with Mmap.open_path(path, "r+") as m:
            await store(m)
        assert kernel.disk.durable(path)[:3] == b"abc", store.__name__


async def test_leaving_does_not_flush_what_needs_none(tmp_path: Path, kernel: FakeKernel) -> None:
    """Nothing written, or all flushed, or flush=False: no device flush at the end."""
    path = file_of(tmp_path, N)
    async with Mmap.open_path(path, "r+") as m:
        await m.read_at(0, 10)
        async with m.view():
            pass
    assert m.statistics().flushes_done == 0
    async with Mmap.open_path(path, "r+") as m:
        await m.write_at(0, b"abc")
        await m.flush()
    assert m.statistics().flushes_done == 1
    m = await Mmap.open_path(path, "r+")
    await m.write_at(0, b"abc")
    await m.aclose(flush=False)
    assert m.statistics().flushes_done == 0


@only_linux
@pytest.mark.parametrize("how", ["exception", "cancelled"])
async def test_leaving_a_failed_block(tmp_path: Path, kernel: FakeKernel, how: str) -> None:
    """A block that failed or was cancelled is closed, and not flushed."""
    path = file_of(tmp_path, N)
    before = settled_descriptors()

    async def run() -> AsyncMmap:
        async with Mmap.open_path(path, "r+") as m:
            await m.write_at(0, b"abc")
            if how == "exception":
                raise KeyError("mine")
            scope.cancel()
            maps.append(m)
            await checkpoint()
        raise AssertionError("not reached")

    maps: list[AsyncMmap] = []
    with anyio.CancelScope() as scope:
        if how == "exception":
            with pytest.raises(KeyError, match="mine"):
                await run()
        else:
            await run()
    assert kernel.names("sync_data", "sync_range") == []
    assert maps_of(path) == 0
    gc.collect()
    assert open_descriptors() == before


@only_linux
async def test_aclose_in_a_cancelled_scope(tmp_path: Path, kernel: FakeKernel) -> None:
    """aclose in a cancelled scope closes, does not flush, and reports the cancellation."""
    path = file_of(tmp_path, N)
    m = await Mmap.open_path(path, "r+")
    await m.write_at(0, b"abc")
    with anyio.CancelScope() as scope:
        scope.cancel()
        await m.aclose()
    assert scope.cancelled_caught
    assert m.closed
    assert maps_of(path) == 0
    assert kernel.names("sync_data", "sync_range") == []


async def test_closing_again(m: AsyncMmap) -> None:
    """aclose may be called again, at the same time too."""
    async with anyio.create_task_group() as tg:
        for _ in range(3):
            tg.start_soon(m.aclose)
    await m.aclose()
    assert m.closed
    with pytest.raises(ClosedResourceError, match="closed"):
        async with m:
            pass


async def test_after_close(tmp_path: Path) -> None:
    """A closed map refuses what needs its bytes; what it was can still be read off it."""
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N)), "r+", offset=3) as m:
        await m.read_at(0, 1)
    assert (m.offset, m.protection, m.private) == (3, Protection.READ_WRITE, False)
    assert m.statistics().loads_inline + m.statistics().loads_off_loop == 1
    for call in (
        m.ptr,
        m.mut_ptr,
        m.as_slice,
        m.as_mut_slice,
        m.view,
        m.view_mut,
        m.view_nowait,
        m.view_mut_nowait,
        m.into_view,
        m.into_view_sync,
        m.windows,
        lambda: len(m),
    ):
        with pytest.raises(ClosedResourceError, match="the map is closed"):
            call()
    for awaited in (
        m.read_at(0, 1),
        m.readinto_at(0, bytearray(1)),
        m.write_at(0, b"a"),
        m.flush(),
        m.flush_range(0, 1),
        m.flush_async(),
        m.flush_async_range(0, 1),
    ):
        with pytest.raises(ClosedResourceError, match="the map is closed"):
            await awaited


async def test_waiters_are_woken_with_closed_resource_error(m: AsyncMmap) -> None:
    """Who waits for a region when the map closes is told so, and the holder goes on."""
    woken = []

    async def want(call: Callable[[], object]) -> None:
        with pytest.raises(ClosedResourceError, match="the map was closed"):
            await call()  # type: ignore[misc]
        woken.append(call)

    async with m.view_mut(0, 10) as v:
        async with anyio.create_task_group() as tg:
            for call in (
                lambda: m.view(0, 1),
                lambda: m.view_mut(0, 1),
                lambda: m.read_at(0, 1),
                lambda: m.write_at(0, b"a"),
                lambda: m.move(5, 50, 1),
                lambda: m.find(b"abc"),
                lambda: m.resize(5),
                lambda: m.into_view(),
                lambda: anext(m.windows(5)),
            ):
                tg.start_soon(want, call)
            await anyio.wait_all_tasks_blocked()
            assert m.statistics().waiting == 9
            await m.aclose()
        assert len(woken) == 9
        assert m.statistics().waiting == 0
        v[0] = 42
        await v.flush()
        assert v[0] == 42


@only_linux
async def test_views_outlive_their_map(tmp_path: Path) -> None:
    """aclose does not wait for views; memory and descriptor go with the last of them."""
    path = file_of(tmp_path, inc(N))
    before = settled_descriptors()
    m = await AsyncMmap.open_path(path, "r+")
    a, b = await m.view_mut(0, 10), await m.view(10, 10)
    await m.aclose()
    assert maps_of(path) == 1
    a[0] = 42
    assert await a.read(3) == b"*\1\2"
    await a.flush()
    left, right = a.split_at(5)
    await left.aclose()
    assert bytes(right) == inc(5, 5)
    assert bytes(b) == inc(10, 10)
    await right.aclose()
    assert maps_of(path) == 1
    await b.aclose()
    assert maps_of(path) == 0
    assert open_descriptors() == before


@only_linux
async def test_raw_buffers_outlive_their_map(tmp_path: Path) -> None:
    """aclose never raises BufferError: a raw buffer keeps the memory, until it goes."""
    path = file_of(tmp_path, inc(N))
    m = await AsyncMmap.open_path(path, "r+")
    raw = m.as_mut_slice()
    part = raw[5:10]
    await m.aclose()
    raw.release()
    part[0] = 42
    assert bytes(part) == b"*" + inc(4, 6)
    assert maps_of(path) == 1
    del part
    gc.collect()
    assert maps_of(path) == 0
    assert path.read_bytes()[5] == 42


@only_linux
async def test_what_views_store_after_the_map_closed_is_flushed(
    tmp_path: Path, kernel: FakeKernel
) -> None:
    """The last view of a closed map flushes what was written, as the map was told."""
    for flush in (True, False):
        path = file_of(tmp_path, N, name=f"flush {flush}")
        m = await Mmap.open_path(path, "r+")
        v = await m.view_mut(0, 10)
        await m.aclose(flush=flush)
        v[0:3] = b"abc"
        await v.aclose()
        assert kernel.disk.durable(path)[:3] == (b"abc" if flush else zeros(3))
        assert maps_of(path) == 0


async def test_the_event_loop_that_opened_it(m: AsyncMmap) -> None:
    """In another event loop, or a foreign thread, a map is a RuntimeError that says so."""

    async def use() -> None:
        for call in (m.view_nowait, m.view_mut_nowait, m.windows, m.into_view):
            with pytest.raises(RuntimeError, match="belongs to another event loop"):
                call()
        for opening in (m.view(), m.view_mut()):
            with pytest.raises(RuntimeError, match=r"belongs to .* event loop"):
                await opening
        for awaited in (
            m.read_at(0, 1),
            m.readinto_at(0, bytearray(1)),
            m.write_at(0, b"a"),
            m.move(0, 1, 1),
            m.find(b"a"),
            m.flush(),
            m.flush_range(0, 1),
            m.flush_async(),
            m.load(),
            m.resident(),
            m.advise("normal"),
            m.pin(),
            m.unpin(),
            m.resize(5),
            m.set_protection("r"),
            m.file_size(),
            m.clear_flush_error(),
            m.aclose(),
        ):
            with pytest.raises(RuntimeError, match="belongs to another event loop"):
                await awaited

    def in_a_thread() -> None:
        with pytest.raises(RuntimeError, match="foreign thread"):
            m.view_nowait()
        with m.as_slice() as raw:  # plain memory, free to use anywhere
            assert raw[:3] == inc(3)
        assert from_thread.run(m.read_at, 0, 3) == inc(3)
        assert (len(m), m.closed, m.offset) == (N, False, 0)

    await to_thread.run_sync(anyio.run, use)
    await to_thread.run_sync(in_a_thread)
    assert await m.read_at(0, 3) == inc(3)


async def test_every_async_call_is_a_checkpoint(m: AsyncMmap) -> None:
    """Each awaited call meets a cancellation that is pending, and others get their turn."""
    pending = await m.flush_async()
    async with m.view_mut(5_000, 100) as v:
        calls: list[Callable[[], object]] = [
            lambda: m.read_at(0, 1),
            lambda: m.readinto_at(0, bytearray(1)),
            lambda: m.write_at(0, b"a"),
            lambda: m.move(0, 1, 1),
            lambda: m.find(b"a", 0, 100),
            lambda: m.rfind(b"a", 0, 100),
            m.flush,
            lambda: m.flush_range(0, 0),
            m.flush_async,
            lambda: m.flush_async_range(0, 0),
            m.clear_flush_error,
            m.load,
            m.resident,
            lambda: m.advise("normal", 0, 0),
            lambda: m.pin(0, 0),
            lambda: m.unpin(0, 0),
            m.file_size,
            pending.wait,
            v.tell,
            lambda: v.seek(0),
            lambda: v.read(0),
            lambda: v.readinto(bytearray()),
            lambda: v.readline(0),
            lambda: v.write(b""),
            v.flush,
            lambda: anext(m.windows(10)),
        ]
        for call in calls:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await call()  # type: ignore[misc]
            assert scope.cancelled_caught, call
    async with m.view_mut_nowait():
        pass


data = st.binary(min_size=1, max_size=64)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@given(
    start=data,
    steps=st.lists(
        st.tuples(
            st.sampled_from(["read", "write", "move", "resize", "find"]),
            st.integers(0, 70),
            st.integers(0, 70),
            st.binary(max_size=20),
        ),
        max_size=15,
    ),
)
def test_as_a_bytearray(
    backend: str, start: bytes, steps: list[tuple[str, int, int, bytes]]
) -> None:
    """Any sequence of calls on anonymous memory gives what a bytearray gives."""

    async def compare() -> None:
        expected = bytearray(start)
        async with AsyncMmap.anonymous(len(start)) as m:
            await m.write_at(0, start)
            for name, a, b, chunk in steps:
                size = len(expected)
                if name == "read" and a + b <= size:
                    assert await m.read_at(a, b) == expected[a : a + b]
                elif name == "write" and a + len(chunk) <= size:
                    await m.write_at(a, chunk)
                    expected[a : a + len(chunk)] = chunk
                elif name == "move" and a + len(chunk) <= size and b + len(chunk) <= size:
                    await m.move(a, b, len(chunk))
                    expected[a : a + len(chunk)] = expected[b : b + len(chunk)]
                elif name == "resize" and a:
                    await m.resize(a)
                    expected = (expected + bytes(a))[:a]
                elif name == "find":
                    assert await m.find(chunk, a, b) == expected.find(chunk, a, b)
            assert await m.read_at(0, len(m)) == expected

    anyio.run(compare, backend=backend)


async def test_the_kernel_that_has_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an old kernel, with everything optional missing, the main calls work all the same."""
    monkeypatch.setattr(Mmap, "_kernel", FakeKernel.old())
    path = file_of(tmp_path, inc(LARGE))
    async with Mmap.open_path(path, "r+", offset=5_001) as m:
        size = len(m)
        async with m.view_mut(0, 100_000) as v:
            v[0:3] = b"abc"
        await m.write_at(500_000, b"the needle")
        assert await m.find(b"the needle") == 500_000
        assert await m.rfind(b"the needle") == 500_000
        await m.move(0, 500_000, 10)
        assert await m.read_at(0, 10) == b"the needle"
        await m.flush()
        await (await m.flush_async())
        total = 0
        async for window in m.windows(100_000):
            total += len(window)
        assert total == size
        await m.load()
        await m.resident()
        await m.resize(size + 10)
        await m.set_protection("r")
        assert await m.read_at(size - 3, 13) == inc(3, LARGE - 3) + zeros(10)
    async with Mmap.create(tmp_path / "new", N) as m:
        await m.write_at(0, inc(N))
    async with Mmap.anonymous(N) as m:
        await m.write_at(0, inc(N))
        async with m.view() as v:
            assert bytes(v) == inc(N)
        os.truncate(path, 5_001 + 100)
    async with Mmap.open_path(path) as m:
        os.truncate(path, 100)
        with pytest.raises(TruncatedError, match="reaches to byte 100"):
            await m.load()
        with pytest.raises(TruncatedError, match="reaches to byte 100"):
            await m.read_at(50, 100)


def test_it_belongs_to_the_loop_while_that_runs() -> None:
    """After its event loop has ended a map that was left open warns, and goes."""
    if sys.platform != "linux":
        pytest.skip("looks at descriptors in /proc")
    before = settled_descriptors()

    async def leave_open() -> None:
        m = await AsyncMmap.anonymous(100)
        kept.append(m)
        kept.append(await m.view())

    for backend in ("asyncio", "trio"):
        kept: list[object] = []
        anyio.run(leave_open, backend=backend)
        with pytest.warns(ResourceWarning, match="dropped without being closed"):
            kept.clear()
            gc.collect()
    assert open_descriptors() == before


async def test_statistics_of_the_loop_are_its_own() -> None:
    """The identity of the event loop is that of the map's."""
    async with AsyncMmap.anonymous(10) as m:
        assert m._core.loop.name == current_event_loop().name
