"""MmapViewSync: the same hold without the one-task rule."""

from __future__ import annotations

import errno
import gc
import sys
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import anyio
import pytest
from anyio import ClosedResourceError, from_thread, to_thread
from anyio.lowlevel import checkpoint

from aiommap import AsyncMmap, MmapViewSync

from .content import file_of, inc, maps_of, only_linux, zeros
from .fake_kernel import FakeKernel
from .flushing import entered, mapped_by

pytestmark = pytest.mark.anyio

N = 1_000


@pytest.fixture
async def m(tmp_path: Path) -> AsyncMmap:
    """A map that the test consumes."""
    return await AsyncMmap.open_path(file_of(tmp_path, inc(N)), "r+")


@pytest.fixture
async def v(m: AsyncMmap) -> AsyncIterator[MmapViewSync]:
    async with m.into_view_sync() as v:
        yield v


async def test_what_it_shows(m: AsyncMmap) -> None:
    """A sync view of a writable map is exclusive, of all of it, and consumes the map."""
    async with m.into_view_sync() as v:
        assert m.closed
        assert (len(v), v.offset, v.writable, v.closed) == (N, 0, True, False)
        assert bytes(v) == inc(N)
        assert repr(v) == f"<MmapViewSync of bytes 0 to {N}, exclusive>"
    assert v.closed
    assert repr(v) == f"<MmapViewSync of bytes 0 to {N}, closed>"


async def test_of_a_map_that_is_not_writable(tmp_path: Path) -> None:
    """A sync view of a READ map is shared and read-only."""
    m = await AsyncMmap.open_path(file_of(tmp_path, inc(N)))
    async with m.into_view_sync() as v:
        assert not v.writable
        with pytest.raises(TypeError, match="read-only"):
            v[0] = 1
        with pytest.raises(PermissionError, match="view_mut"):
            await v.write(b"a")
        with pytest.raises(PermissionError, match="view_mut"):
            v.mut_ptr()


async def test_several_tasks_use_it(v: MmapViewSync) -> None:
    """Tasks share a sync view: items, slices, flushes."""

    async def store(place: int) -> None:
        v[place] = 255
        await v.flush_range(place, 1)
        assert v[place] == 255

    async with anyio.create_task_group() as tg:
        for place in range(10):
            tg.start_soon(store, place)
    assert v[:11] == b"\xff" * 10 + b"\n"


async def test_memory_is_free_to_use_in_threads(v: MmapViewSync) -> None:
    """Items, slices, bytes(), ptr() and the buffer work in any thread."""

    def use() -> int:
        v[0:3] = b"abc"
        v.buffer[3] = 100
        assert bytes(v)[:4] == b"abcd"
        assert v.as_slice()[0] == ord("a")
        v.as_mut_slice()[4] = 101
        if sys.version_info >= (3, 12):
            with memoryview(v) as view:
                assert view[3] == 100
        return v.ptr()

    assert await to_thread.run_sync(use) == v.mut_ptr()
    assert v[:5] == b"abcde"


async def test_awaited_calls_in_threads_go_through_from_thread(v: MmapViewSync) -> None:
    """What is awaited works in a thread through anyio.from_thread, and nowhere else."""

    def use() -> bytes:
        from_thread.run(v.seek, 10)
        from_thread.run(v.write, b"abc")
        from_thread.run(v.flush)
        from_thread.run(v.seek, 10)
        return from_thread.run(v.read, 5)

    assert await to_thread.run_sync(use) == b"abc" + inc(2, 13)


async def test_loop_bound_calls_from_a_foreign_thread(v: MmapViewSync) -> None:
    """split_at, restrict, downgrade, clone and whatever is awaited: RuntimeError in a thread."""

    def use() -> None:
        for call in (
            lambda: v.split_at(1),
            lambda: v.restrict(0, 1),
            v.downgrade,
            v.clone,
        ):
            with pytest.raises(RuntimeError, match="from_thread"):
                call()
        for awaited in (
            v.flush,
            v.tell,
            v.read,
            v.readline,
            v.flush_async,
            v.aclose,
            lambda: v.seek(0),
            lambda: v.write(b"a"),
            lambda: v.readinto(bytearray(1)),
            lambda: v.flush_range(0, 1),
            lambda: v.flush_async_range(0, 1),
        ):
            with pytest.raises(RuntimeError, match="from_thread"):
                awaited().send(None)

    await to_thread.run_sync(use)
    assert bytes(v) == inc(N)


async def test_use_in_another_event_loop(v: MmapViewSync) -> None:
    """In another event loop, a call that is awaited is a RuntimeError that says so."""

    async def use() -> None:
        with pytest.raises(RuntimeError, match="belongs to another event loop"):
            await v.read()

    await to_thread.run_sync(anyio.run, use)


async def test_split_and_restrict(v: MmapViewSync) -> None:
    """The halves of a sync view are sync views with their places in the map."""
    left, right = v.split_at(400)
    assert v.closed
    assert (left.offset, len(left), right.offset, len(right)) == (0, 400, 400, 600)
    right.restrict(100, 50)
    assert (right.offset, bytes(right)) == (500, inc(50, 500))
    await left.aclose()
    await right.aclose()


async def test_downgrade(v: MmapViewSync) -> None:
    """A sync view can become read-only."""
    v[0] = 9
    v.downgrade()
    assert not v.writable
    with pytest.raises(TypeError, match="read-only"):
        v[0] = 1
    assert v[0] == 9


async def test_clones(m: AsyncMmap) -> None:
    """A clone is another handle on the region, with its own cursor; the last one closes."""
    v = await m.into_view_sync()
    clone = v.clone()
    assert (len(clone), clone.offset, clone.writable) == (N, 0, True)
    assert m.statistics().views == 2
    await v.seek(5)
    assert await clone.tell() == 0
    clone[0] = 77
    assert v[0] == 77
    await v.aclose()
    with pytest.raises(ClosedResourceError, match="closed"):
        v[0]
    assert clone[0] == 77
    third = clone.clone()
    await clone.aclose()
    await third.flush()
    await third.aclose()
    assert m.statistics().views == 0


@only_linux
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
async def test_the_map_closes_with_the_last_handle(
    tmp_path: Path, m: AsyncMmap, order: tuple[int, ...]
) -> None:
    """In whatever order handles close, memory goes with the last, and is flushed then."""
    v = await m.into_view_sync()
    handles = [v, v.clone(), v.clone()]
    v[0] = 1
    for index in order:
        assert maps_of(tmp_path / "data.bin") == 1
        assert m.statistics().flushes_done == 0
        await handles[index].aclose()
        await handles[index].aclose()
    assert maps_of(tmp_path / "data.bin") == 0
    assert m.statistics().flushes_done == 1


async def test_shape_is_fixed_while_clones_are_out(v: MmapViewSync) -> None:
    """With clones out, split_at, restrict and downgrade are a BufferError."""
    clone = v.clone()
    for view in (v, clone):
        for call in (lambda: view.split_at(1), lambda: view.restrict(0, 1), view.downgrade):  # noqa: B023
            with pytest.raises(BufferError, match="while 1 clones of it are open"):
                call()
    await v.aclose()
    clone.restrict(0, 10)
    assert len(clone) == 10
    await clone.aclose()


async def test_a_dropped_clone_warns_and_the_others_go_on(v: MmapViewSync) -> None:
    """A clone that is dropped is a ResourceWarning; the region stays with the others."""
    clone = v.clone()
    with pytest.warns(ResourceWarning, match="MmapViewSync of bytes 0 to 1000 was dropped"):
        del clone
        gc.collect()
    assert v[0] == 0
    v.restrict(0, 10)


async def test_handles_dropped_in_threads_are_counted_in_the_loop(m: AsyncMmap) -> None:
    """Threads that drop the last two at the same time leave both to the map's event loop."""
    v = await m.into_view_sync()
    handles = [[v], [v.clone()]]
    del v
    threads = [threading.Thread(target=handle.clear) for handle in handles]
    with pytest.warns(ResourceWarning, match="MmapViewSync") as caught:
        for thread in threads:
            thread.start()
            thread.join()
    assert len(caught) == 2
    assert m.statistics().views == 2
    assert m._core.lock.statistics().held_exclusive == 1
    with anyio.fail_after(10):
        while m.statistics().views or m._core.is_mapped:
            await checkpoint()
    assert m._core.lock.statistics().held_exclusive == 0


async def test_a_clone_that_a_thread_dropped_is_not_in_the_way(v: MmapViewSync) -> None:
    """Who asks for another shape right afterwards does not meet it any more."""
    clones = [v.clone()]
    with pytest.warns(ResourceWarning, match="MmapViewSync"):
        thread = threading.Thread(target=clones.clear)
        thread.start()
        thread.join()
    v.restrict(0, 10)
    assert len(v) == 10


@only_linux
async def test_the_last_handle_dropped_closes_the_map(tmp_path: Path, m: AsyncMmap) -> None:
    """Dropping every handle unmaps, with a warning each."""
    v = await m.into_view_sync()
    clone = v.clone()
    with pytest.warns(ResourceWarning, match="MmapViewSync") as caught:
        del v, clone
        gc.collect()
    assert len(caught) == 2
    with anyio.fail_after(10):
        while maps_of(tmp_path / "data.bin"):
            await checkpoint()


async def test_derived_buffers_of_a_clone(m: AsyncMmap) -> None:
    """Buffers that outlive one handle: BufferError, and the other handles go on."""
    v = await m.into_view_sync()
    clone = v.clone()
    kept = clone.buffer[:5]
    with pytest.raises(BufferError, match="alive"):
        await clone.aclose()
    assert bytes(kept) == inc(5)
    kept.release()
    await v.aclose()


async def test_after_close(m: AsyncMmap) -> None:
    """A closed handle raises ClosedResourceError for whatever is asked of it."""
    async with m.into_view_sync() as v:
        buffer = v.buffer
    with pytest.raises(ValueError, match="released"):
        buffer[0]
    calls: tuple[Callable[[], object], ...] = (
        lambda: v[0],
        lambda: v.buffer,
        v.clone,
        v.ptr,
        v.as_slice,
        v.as_mut_slice,
        lambda: bytes(v),
        lambda: v.split_at(0),
        lambda: v.restrict(0, 0),
        v.downgrade,
    )
    for call in calls:
        with pytest.raises(ClosedResourceError, match="the view is closed"):
            call()
    with pytest.raises(ClosedResourceError, match="the view is closed"):
        await v.read()


async def test_two_threads_store_and_flush_at_the_same_time(tmp_path: Path) -> None:
    """Halves and clones in threads: each stores, then flushes through the event loop."""
    size = 1 << 20
    path = file_of(tmp_path, size)
    m = await AsyncMmap.open_path(path, "r+")
    left, right = (await m.into_view_sync()).split_at(size // 3)

    def fill(view: MmapViewSync) -> None:
        for start in range(0, len(view), 1 << 16):
            part = view.buffer[start : start + (1 << 16)]
            part[:] = inc(len(part), view.offset + start)
            part.release()
            from_thread.run(view.flush_range, start, min(1 << 16, len(view) - start))

    async with left, right, anyio.create_task_group() as tg:
        tg.start_soon(to_thread.run_sync, fill, left)
        tg.start_soon(to_thread.run_sync, fill, right)
    assert path.read_bytes() == inc(size)


async def test_anonymous_memory(tmp_path: Path) -> None:
    """A sync view of anonymous memory works as one of a file; its flushes do nothing."""
    m = await AsyncMmap.anonymous(100)
    async with m.into_view_sync() as v:
        assert bytes(v) == zeros(100)
        await v.flush()
        assert (await v.flush_async()).done


async def test_calls_that_move_the_cursor_take_turns(v: MmapViewSync) -> None:
    """No write of several tasks is lost, and no byte is read twice."""
    async with anyio.create_task_group() as tasks:
        for number in range(5):
            tasks.start_soon(v.write, bytes([number]) * 4)
    assert await v.tell() == 20
    assert sorted(v[:20:4]) == [0, 1, 2, 3, 4]
    await v.seek(0)
    got: list[bytes] = []

    async def read() -> None:
        got.append(await v.read(4))

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(read)
    assert sorted(got) == [bytes([number]) * 4 for number in range(5)]
    await v.seek(0)
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(v.seek, 10, 1)
    assert await v.tell() == 50


async def test_no_new_shape_in_the_middle_of_a_copy(tmp_path: Path) -> None:
    """split_at, restrict and downgrade: BufferError while another task reads through it."""
    kernel = FakeKernel()
    m = await mapped_by(kernel).open_path(file_of(tmp_path, inc(N)), "r+")
    async with m.into_view_sync() as v:
        kernel.fail("read_nowait", errno.EAGAIN)
        with kernel.hold("read", times=1) as hold:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(v.read, 500)
                await entered(hold)
                for call in (partial(v.restrict, 0, 10), partial(v.split_at, 5), v.downgrade):
                    with pytest.raises(BufferError, match="another task"):
                        call()
                hold.release.set()
        assert await v.tell() == 500
        v.restrict(0, 10)
        assert await v.read() == b""


async def test_closed_in_the_middle_of_a_copy_it_flushes_all_the_same(tmp_path: Path) -> None:
    """Who ends the last copy of the last view of a map flushes what was written, and unmaps."""
    kernel = FakeKernel(durability=True)
    path = file_of(tmp_path, N)
    m = await mapped_by(kernel).open_path(path, "r+")
    v = await m.into_view_sync()
    v[:3] = b"abc"
    kernel.fail("read_nowait", errno.EAGAIN)
    with kernel.hold("read", times=1) as hold:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(v.read)
            await entered(hold)
            await v.aclose()
            assert kernel.disk.durable(path)[:3] == bytes(3)
            hold.release.set()
    assert kernel.disk.durable(path)[:3] == b"abc"
    assert maps_of(path) == 0
