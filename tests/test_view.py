"""MmapView: a task's hold on a region."""

from __future__ import annotations

import asyncio
import copy
import errno
import gc
import pickle
import sys
import types
import warnings
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import aclosing
from pathlib import Path

import anyio
import numpy as np
import pytest
from anyio import BusyResourceError, ClosedResourceError, WouldBlock, to_thread
from anyio.lowlevel import checkpoint

from aiommap import AsyncMmap, DeadlockError, MmapView, Protection, RegionLock

from .between_steps import between_steps
from .cancelling import on_asyncio
from .content import file_of, inc, maps_of, only_linux
from .fake_kernel import FakeKernel
from .flushing import entered, mapped_by

pytestmark = pytest.mark.anyio

N = 10_000


async def in_another_task(call: Callable[[], object]) -> object:
    """What a call gives in a task of its own; awaited if it has to be."""
    result: list[object] = []

    async def run() -> None:
        got = call()
        result.append(await got if hasattr(got, "__await__") else got)

    async with anyio.create_task_group() as tg:
        tg.start_soon(run)
    return result[0]


async def catch(call: Callable[[], object]) -> BaseException:
    """The exception that a call raises in a task of its own."""

    async def run() -> BaseException:
        try:
            got = call()
            if hasattr(got, "__await__"):
                await got
        except Exception as exc:
            return exc
        raise AssertionError("nothing was raised")

    error = await in_another_task(run)
    assert isinstance(error, BaseException)
    return error


async def free(m: AsyncMmap, offset: int = 0, length: int | None = None) -> bool:
    """Whether another task could have a region exclusively."""

    def ask() -> bool:
        try:
            view = m.view_mut_nowait(offset, length)
        except WouldBlock:
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del view
        return True

    result = bool(await in_another_task(ask))
    await checkpoint()  # the region of the dropped view is free
    await checkpoint()
    return result


@pytest.fixture
async def m(tmp_path: Path) -> AsyncIterator[AsyncMmap]:
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N)), "r+") as m:
        yield m


# What it is


async def test_what_a_shared_view_shows(m: AsyncMmap) -> None:
    """A view knows its length, place and mode, and has a read-only buffer of its bytes."""
    async with m.view(100, 50) as v:
        assert (len(v), v.offset, v.writable, v.closed) == (50, 100, False, False)
        assert v.buffer.readonly
        assert v.buffer == inc(50, 100)
        assert bytes(v) == inc(50, 100)
        assert v.ptr() == m.ptr() + 100
        assert repr(v) == "<MmapView of bytes 100 to 150, shared>"
    assert v.closed
    assert (len(v), v.offset) == (50, 100)
    assert repr(v) == "<MmapView of bytes 100 to 150, closed>"


async def test_what_an_exclusive_view_shows(m: AsyncMmap) -> None:
    """An exclusive view has a writable buffer over the map's memory."""
    async with m.view_mut(100, 50) as v:
        assert (len(v), v.offset, v.writable) == (50, 100, True)
        assert not v.buffer.readonly
        assert v.mut_ptr() == v.ptr() == m.mut_ptr() + 100
        assert repr(v) == "<MmapView of bytes 100 to 150, exclusive>"
        v.buffer[0:3] = b"abc"
    assert await m.read_at(99, 5) == bytes([99]) + b"abc" + bytes([103])


async def test_awaited_or_entered(m: AsyncMmap) -> None:
    """A view can be awaited and closed later, or awaited and entered, or entered."""
    v = await m.view(0, 10)
    assert not await free(m)
    await v.aclose()
    assert await free(m)
    async with await m.view_mut(0, 10) as v:
        assert not await free(m)
    assert await free(m)
    async with m.view(0, 10):
        assert not await free(m)
    assert await free(m)


async def test_the_default_is_the_whole_map_and_the_rest(m: AsyncMmap) -> None:
    """Without a length a view reaches to the end of the map."""
    async with m.view() as v:
        assert len(v) == N
    async with m.view_mut(N - 3) as v:
        assert (len(v), v.offset) == (3, N - 3)
    async with m.view(N) as v:
        assert len(v) == 0


async def test_offset_is_in_the_map_not_in_the_file(tmp_path: Path) -> None:
    """Offsets of views count from the start of the map, wherever that is in the file."""
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N)), offset=5_000) as m:
        async with m.view(10, 5) as v:
            assert v.offset == 10
            assert v[:] == inc(5, 5_010)


# Plain memory


async def test_items_and_slices(m: AsyncMmap) -> None:
    """An index gives an int and a slice bytes, with steps and negative indices, as in mmap."""
    data = inc(50, 100)
    async with m.view(100, 50) as v:
        assert v[0] == 100
        assert v[-1] == data[-1]
        assert type(v[0:2]) is bytes
        for key in (slice(None), slice(3, 9), slice(-5, None), slice(None, None, -3), slice(9, 3)):
            assert v[key] == data[key]
        for index in (50, -51, 2**63):
            with pytest.raises(IndexError, match="index"):
                v[index]
        for wrong in (1.0, "1", None):
            with pytest.raises(TypeError, match="invalid slice key"):
                v[wrong]  # type: ignore[call-overload]


async def test_store_items_and_slices(m: AsyncMmap) -> None:
    """Items take ints and slices take buffers of their size, with steps too."""
    expected = bytearray(inc(50))
    async with m.view_mut(0, 50) as v:
        v[0] = 200
        v[-1] = 7
        v[10:13] = b"abc"
        v[20:30:2] = bytearray(b"vwxyz")
        v[5:2:-1] = b"rst"
        v[9:9] = b""
        expected[0], expected[-1] = 200, 7
        expected[10:13] = b"abc"
        expected[20:30:2] = b"vwxyz"
        expected[5:2:-1] = b"rst"
        assert bytes(v) == expected
        for value in (256, -1):
            with pytest.raises(ValueError, match="invalid value for format"):
                v[0] = value
        for wrong in (b"a", 1.0, None):
            with pytest.raises(TypeError, match="invalid type for format"):
                v[0] = wrong  # type: ignore[call-overload]
        for size in (0, 2, 4):
            with pytest.raises(ValueError, match="different structures"):
                v[10:13] = bytes(size)
        with pytest.raises(TypeError, match="must be bytes or another buffer"):
            v[0:2] = "ab"  # type: ignore[call-overload]
        with pytest.raises(IndexError, match="index"):
            v[50] = 1
        assert bytes(v) == expected
    assert await m.read_at(0, 50) == expected


async def test_a_slice_takes_any_buffer(m: AsyncMmap) -> None:
    """Wider items are stored as their bytes."""
    async with m.view_mut(0, 4) as v:
        v[:] = memoryview(b"abcd").cast("H")
        assert bytes(v) == b"abcd"


async def test_a_shared_view_takes_no_stores(m: AsyncMmap) -> None:
    """A store into a read-only view is a TypeError as memoryview says, and nothing changes."""
    async with m.view(0, 10) as v:
        with pytest.raises(TypeError, match="cannot modify read-only memory"):
            v[0] = 1
        with pytest.raises(TypeError, match="cannot modify read-only memory"):
            v[0:2] = b"ab"
        with pytest.raises(TypeError, match="cannot modify read-only memory"):
            v.buffer[0] = 1
        with pytest.raises(TypeError, match="cannot modify read-only memory"):
            v.as_slice()[0] = 1
        with pytest.raises(PermissionError, match="view_mut"):
            v.as_mut_slice()
        with pytest.raises(PermissionError, match="view_mut"):
            v.mut_ptr()
        with pytest.raises(PermissionError, match="view_mut"):
            await v.write(b"a")
        assert bytes(v) == inc(10)


async def test_deleting_items_is_not_possible(m: AsyncMmap) -> None:
    """A region does not shrink by ``del``."""
    async with m.view_mut(0, 10) as v:
        with pytest.raises(TypeError, match="restrict"):
            del v[0]  # type: ignore[attr-defined]


async def test_bytes_but_no_iteration(m: AsyncMmap) -> None:
    """bytes() copies the region; iterating over it, and ``in``, are refused."""
    async with m.view(0, 10) as v:
        assert bytes(v) == inc(10)
        with pytest.raises(TypeError, match="not iterable"):
            iter(v)
        with pytest.raises(TypeError, match=r"iterable|container"):
            assert 3 in v  # type: ignore[operator]


async def test_as_slice_and_as_mut_slice(m: AsyncMmap) -> None:
    """The raw slices are zero-copy; as_slice is read-only in a writable view too."""
    async with m.view_mut(0, 10) as v:
        read_only, mutable = v.as_slice(), v.as_mut_slice()
        assert read_only.readonly
        mutable[0] = 99
        assert read_only[0] == 99
        assert v.as_slice() is read_only
    for view in (read_only, mutable):
        with pytest.raises(ValueError, match="released"):
            view[0]


MEMORY: dict[str, Callable[[MmapView], memoryview]] = {
    "buffer": lambda v: v.buffer,
    "as_slice": lambda v: v.as_slice(),
    "as_mut_slice": lambda v: v.as_mut_slice(),
}


@pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY)
async def test_its_memory_may_be_released_by_the_user(
    m: AsyncMmap, memory: Callable[[MmapView], memoryview]
) -> None:
    """``with v.buffer as memory:``: the view gives out another one, and is used as before."""
    async with m.view_mut(0, 10) as v:
        other = v.as_slice()
        for value in range(3):
            with memory(v) as given:
                assert given[1] == 1
            v[0] = value
            assert (v[0], v[0:2], bytes(v[1:])) == (value, bytes([value, 1]), inc(10)[1:])
            assert v.buffer[0] == v.as_slice()[0] == v.as_mut_slice()[0] == value
        if memory is not MEMORY["as_slice"]:
            assert other[0] == 2
        with memory(v):
            pass
        left, right = v.split_at(5)
        async with left, right:
            assert right[0] == 5
    with pytest.raises(ValueError, match="released"):
        other[0]


@pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY)
async def test_what_is_left_of_memory_that_the_user_released(
    m: AsyncMmap, memory: Callable[[MmapView], memoryview]
) -> None:
    """Slices of it count as derived from the view's buffer."""
    v = await m.view_mut(0, 10)
    with memory(v) as given:
        kept = given[2:]
    assert v[2] == v.as_slice()[2] == 2
    with pytest.raises(BufferError, match="alive"):
        await v.aclose()
    assert kept[0] == 2


@pytest.mark.skipif(sys.version_info < (3, 12), reason="__buffer__ is new in Python 3.12")
async def test_buffer_protocol(m: AsyncMmap) -> None:
    """From 3.12, memoryview(v) is a buffer of the region, and counts as derived from it."""
    v = await m.view_mut(0, 10)
    with memoryview(v) as view:  # type: ignore[arg-type, unused-ignore]
        assert not view.readonly
        assert view == inc(10)
        view[0] = 42
    assert v[0] == 42
    kept = memoryview(v)  # type: ignore[arg-type, unused-ignore]
    with pytest.raises(BufferError, match="alive"):
        await v.aclose()
    assert kept[0] == 42


@pytest.mark.skipif(sys.version_info < (3, 12), reason="__buffer__ is new in Python 3.12")
@pytest.mark.parametrize("made", [np.frombuffer, np.asarray], ids=["frombuffer", "asarray"])
async def test_arrays_of_a_view(m: AsyncMmap, made: Callable[..., np.ndarray]) -> None:
    """An array made from the view itself counts as derived from it, too: NumPy must not have the
    mere address of memory that is unmapped then."""
    v = await m.view_mut(0, 10)
    array = made(v, dtype=np.uint8)
    array[0] = 42
    assert v[0] == 42
    with pytest.raises(BufferError, match="cannot split"):
        v.split_at(5)
    with pytest.raises(BufferError, match="alive"):
        await v.aclose()
    with pytest.raises(BufferError, match="buffers of its memory are out"):
        await m.resize(5)
    assert array[0] == 42
    del array
    await m.resize(5)
    async with m.view(0, 5) as other:
        made(other, dtype=np.uint8)  # gone by the end


# The buffer's end


async def test_the_buffer_dies_with_the_view(m: AsyncMmap) -> None:
    """After the view has closed, whatever it gave out raises, and so does the view."""
    async with m.view_mut(0, 10) as v:
        buffer = v.buffer
    with pytest.raises(ValueError, match="released"):
        buffer[0]
    for call in (
        lambda: v[0],
        lambda: v.__setitem__(0, 1),
        lambda: v.buffer,
        lambda: bytes(v),
        v.as_slice,
        v.as_mut_slice,
        v.ptr,
        v.mut_ptr,
        lambda: v.split_at(1),
        lambda: v.restrict(0, 1),
        v.downgrade,
        v.flush,
        lambda: v.flush_range(0, 1),
        v.flush_async,
        lambda: v.flush_async_range(0, 1),
        v.tell,
        lambda: v.seek(0),
        v.read,
        v.readline,
        lambda: v.readinto(bytearray(1)),
        lambda: v.write(b"a"),
        v.__aenter__,
    ):
        assert isinstance(await catch(call), ClosedResourceError)


@pytest.mark.parametrize("how", ["slice", "cast", "as_slice"])
async def test_derived_buffers_at_close(m: AsyncMmap, how: str) -> None:
    """Buffers that outlive the view: BufferError, the region is free, and they stay memory."""
    kept = None
    with pytest.raises(BufferError, match=r"slices or arrays .* are alive: the region is free"):
        async with m.view_mut(0, 10) as v:
            kept = {
                "slice": lambda: v.buffer[2:4],
                "cast": lambda: v.buffer.cast("b"),
                "as_slice": lambda: v.as_slice()[2:],
            }[how]()
    assert v.closed
    assert await free(m)
    assert kept is not None
    assert kept[0] in (0, 2)


async def test_derived_buffers_do_not_hide_the_exception_of_the_block(m: AsyncMmap) -> None:
    """When the block failed, its exception is the one that is seen."""
    kept = None
    with pytest.raises(KeyError, match="mine"):
        async with m.view(0, 10) as v:
            kept = v.buffer[2:4]
            raise KeyError("mine")
    assert bytes(kept or b"") == inc(2, 2)
    assert await free(m)


async def test_derived_buffers_that_are_gone(m: AsyncMmap) -> None:
    """Slices that were released or deleted before the close are no matter."""
    async with m.view(0, 10) as v:
        part = v.buffer[2:4]
        with v.buffer[3:5] as other:
            assert other == inc(2, 3)
        del part


async def test_a_buffer_that_outlives_everything(tmp_path: Path) -> None:
    """A derived buffer keeps its memory mapped after view and map have closed."""
    path = file_of(tmp_path, inc(N))
    m = await AsyncMmap.open_path(path)
    v = await m.view()
    kept = v.buffer[5:10]
    with pytest.raises(BufferError, match="alive"):
        await v.aclose()
    await m.aclose()
    assert kept == inc(5, 5)
    if sys.platform == "linux":
        assert maps_of(path) == 1
        kept.release()
        assert maps_of(path) == 0


async def test_withdrawing_is_refused_again_and_again(m: AsyncMmap) -> None:
    """split_at, restrict, downgrade: BufferError while slices are alive, also the next time."""
    async with m.view_mut(0, 10) as v:
        kept = v.buffer[2:4]
        for _ in range(2):
            with pytest.raises(BufferError, match="cannot split the view while slices"):
                v.split_at(5)
            with pytest.raises(BufferError, match="cannot restrict the view while slices"):
                v.restrict(0, 5)
            with pytest.raises(BufferError, match="cannot downgrade the view while slices"):
                v.downgrade()
        assert (len(v), v.offset, v.writable) == (10, 0, True)
        v[0] = 77
        assert v[0] == 77
        kept.release()
        v.downgrade()
        assert not v.writable


async def test_slices_from_before_a_refused_split_are_found_at_close(m: AsyncMmap) -> None:
    """A slice that stopped a split and is still alive at close is a BufferError there too."""
    kept = None
    with pytest.raises(BufferError, match="alive: the region is free"):
        async with m.view_mut(0, 10) as v:
            kept = v.buffer[2:4]
            with pytest.raises(BufferError, match="cannot split"):
                v.split_at(5)
    assert kept is not None
    assert await free(m)


# One task at a time


async def test_whose_a_view_is_comes_before_what_it_may(m: AsyncMmap) -> None:
    """Closed, or another task's, a read-only view says that first."""
    async with m.view(0, 10) as v:

        async def use() -> None:
            for call in (v.as_mut_slice, v.mut_ptr):
                with pytest.raises(BusyResourceError):
                    call()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(use)
    for call in (v.as_mut_slice, v.mut_ptr):
        with pytest.raises(ClosedResourceError, match="the view is closed"):
            call()


async def test_a_view_belongs_to_its_task(m: AsyncMmap) -> None:
    """Every use of a view by another task is a BusyResourceError, and changes nothing."""
    async with m.view_mut(0, 10) as v:
        for call in (
            lambda: v[0],
            lambda: v.__setitem__(0, 1),
            lambda: v.buffer,
            lambda: bytes(v),
            v.as_slice,
            v.as_mut_slice,
            v.ptr,
            v.mut_ptr,
            lambda: v.split_at(1),
            lambda: v.restrict(0, 1),
            v.downgrade,
            v.flush,
            lambda: v.flush_range(0, 1),
            v.flush_async,
            lambda: v.flush_async_range(0, 1),
            v.tell,
            lambda: v.seek(0),
            v.read,
            v.readline,
            lambda: v.readinto(bytearray(1)),
            lambda: v.write(b"a"),
            v.__aenter__,
        ):
            assert isinstance(await catch(call), BusyResourceError)
        assert (len(v), v.writable, v[0]) == (10, True, 0)


async def test_any_task_may_close_a_view(m: AsyncMmap) -> None:
    """A view may be closed by another task of the event loop."""
    v = await m.view_mut(0, 10)
    await in_another_task(v.aclose)
    assert v.closed
    assert await free(m)


async def test_halves_belong_to_who_uses_them_first(m: AsyncMmap) -> None:
    """A half belongs to the first task that uses it; from then on others are refused."""
    v = await m.view_mut(0, 10)
    left, right = v.split_at(5)
    await in_another_task(lambda: left.__setitem__(0, 50))
    with pytest.raises(BusyResourceError, match="using"):
        left[0]
    assert right[0] == 5
    assert isinstance(await catch(lambda: right[0]), BusyResourceError)
    for half in (left, right):
        await half.aclose()


async def test_halves_are_filled_by_child_tasks(m: AsyncMmap) -> None:
    """``tg.start_soon(fill, left)`` and ``tg.start_soon(fill, right)`` are safe."""

    async def fill(half: MmapView, byte: int) -> None:
        async with half:
            half[:] = bytes([byte]) * len(half)
            await half.flush()

    left, right = (await m.view_mut(0, 100)).split_at(40)
    async with anyio.create_task_group() as tg:
        tg.start_soon(fill, left, 1)
        tg.start_soon(fill, right, 2)
    assert await m.read_at(0, 100) == b"\1" * 40 + b"\2" * 60


async def test_the_task_that_takes_a_half_over_is_its_owner_for_deadlocks(m: AsyncMmap) -> None:
    """After a child has entered a half, the parent waits for it instead of a DeadlockError."""
    left, right = (await m.view_mut(0, 10)).split_at(5)
    entered, leave = anyio.Event(), anyio.Event()

    async def hold() -> None:
        async with left:
            entered.set()
            await leave.wait()

    async with anyio.create_task_group() as tg:
        tg.start_soon(hold)
        await entered.wait()
        with pytest.raises(WouldBlock):
            m.view_nowait(0, 5)
        with pytest.raises(DeadlockError, match="holds"):
            m.view_nowait(5, 5)
        leave.set()
    await right.aclose()
    assert await free(m)


async def test_use_from_a_foreign_thread(m: AsyncMmap) -> None:
    """In a thread a view is a RuntimeError that says why, and its buffer is free to use."""
    async with m.view_mut(0, 10) as v:
        buffer = v.buffer

        def use() -> None:
            for call in (lambda: v[0], lambda: v.split_at(1), v.ptr):
                with pytest.raises(RuntimeError, match="foreign thread"):
                    call()
            buffer[0] = 99

        await to_thread.run_sync(use)
        assert v[0] == 99


# Shape


async def test_split(m: AsyncMmap) -> None:
    """split_at consumes the view, and its halves have their offsets in the map."""
    v = await m.view_mut(100, 50)
    left, right = v.split_at(20)
    assert v.closed
    with pytest.raises(ClosedResourceError, match="closed"):
        v.split_at(1)
    assert (left.offset, len(left), right.offset, len(right)) == (100, 20, 120, 30)
    assert left.writable
    assert right.writable
    assert (bytes(left), bytes(right)) == (inc(20, 100), inc(30, 120))
    assert m.statistics().views == 2
    await left.aclose()
    assert await free(m, 100, 20)
    assert not await free(m, 120, 30)
    await right.aclose()
    assert await free(m)


async def test_split_of_a_shared_view(m: AsyncMmap) -> None:
    """The halves of a shared view are shared."""
    left, right = (await m.view(0, 10)).split_at(5)
    assert not left.writable
    async with m.view(0, 10):
        pass
    await left.aclose()
    await right.aclose()


async def test_nobody_gets_in_between_a_split(m: AsyncMmap) -> None:
    """Who waits for the whole still waits after the split, until both halves have gone."""
    log = []
    v = await m.view_mut(0, 10)

    async def want() -> None:
        async with m.view_mut(0, 10):
            log.append("granted")

    async with anyio.create_task_group() as tg:
        tg.start_soon(want)
        await anyio.wait_all_tasks_blocked()
        left, right = v.split_at(5)
        for name, half in (("left", left), ("right", right)):
            await anyio.wait_all_tasks_blocked()
            log.append(name)
            await half.aclose()
    assert log == ["left", "right", "granted"]


async def test_restrict(m: AsyncMmap) -> None:
    """restrict works in place and relative, and frees the rest at once."""
    async with m.view_mut(100, 50) as v:
        v.restrict(10, 20)
        assert (v.offset, len(v)) == (110, 20)
        assert bytes(v) == inc(20, 110)
        assert v.ptr() == m.ptr() + 110
        assert await free(m, 100, 10)
        assert await free(m, 130, 20)
        assert not await free(m, 110, 1)
        assert not await free(m, 129, 1)
        v.restrict(20, 0)
        assert bytes(v) == b""
        assert await free(m)


async def test_restrict_lets_waiters_in(m: AsyncMmap) -> None:
    """Who waits for the part that restrict gives back gets it."""
    async with m.view_mut(0, 10) as v, anyio.create_task_group() as tg:

        async def want() -> None:
            async with m.view_mut(5, 5):
                got.set()

        got = anyio.Event()
        tg.start_soon(want)
        await anyio.wait_all_tasks_blocked()
        assert not got.is_set()
        v.restrict(0, 5)
        await got.wait()


async def test_downgrade(m: AsyncMmap) -> None:
    """downgrade keeps the region, read-only, and lets the readers in that wait for it."""
    async with m.view_mut(0, 10) as v, anyio.create_task_group() as tg:

        async def read() -> None:
            async with m.view(0, 10) as other:
                assert other[0] == 42
                got.set()

        got = anyio.Event()
        tg.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        v[0] = 42
        v.downgrade()
        assert not v.writable
        assert v.buffer.readonly
        with pytest.raises(TypeError, match="read-only"):
            v[0] = 1
        await got.wait()
        v.downgrade()  # nothing to do
        assert not await free(m)


async def test_what_was_written_before_a_downgrade_is_flushed_at_the_end(tmp_path: Path) -> None:
    """Leaving the map flushes what a view stored that was downgraded later."""
    async with AsyncMmap.open_path(file_of(tmp_path, 100), "r+") as m:
        async with m.view_mut() as v:
            v[0] = 1
            v.downgrade()
    assert m.statistics().flushes_done == 1


# Waiting, and not waiting


async def test_readers_share_and_writers_do_not(m: AsyncMmap) -> None:
    """Two readers may hold a region, a writer only alone; disjoint regions do not meet."""

    async def look() -> bytes:
        async with m.view_nowait(0, 10) as other:
            return bytes(other)

    async with m.view(0, 10):
        assert await in_another_task(look) == inc(10)
        assert isinstance(await catch(lambda: m.view_mut_nowait(9, 1)), WouldBlock)
        assert await free(m, 10, 10)
    async with m.view_mut(0, 10):
        assert isinstance(await catch(lambda: m.view_nowait(9, 1)), WouldBlock)
        assert isinstance(await catch(lambda: m.view_mut_nowait(9, 1)), WouldBlock)
        assert await free(m, 10, 10)


async def test_nowait_forms(m: AsyncMmap) -> None:
    """view_nowait and view_mut_nowait give the same views at once, or WouldBlock."""
    with_read = m.view_nowait(0, 10)
    assert (with_read.writable, bytes(with_read)) == (False, inc(10))
    with_write = m.view_mut_nowait(10)
    assert (with_write.writable, len(with_write)) == (True, N - 10)
    assert isinstance(await catch(lambda: m.view_mut_nowait(0, 1)), WouldBlock)
    assert isinstance(await catch(lambda: m.view_nowait(N - 1, 1)), WouldBlock)
    await with_read.aclose()
    async with with_write:
        pass
    assert await free(m)


async def test_own_conflicting_holds(m: AsyncMmap) -> None:
    """What a task holds in a conflicting way is a DeadlockError, in the nowait form too."""
    async with m.view_mut(0, 10):
        for conflict in (m.view, m.view_mut):
            with pytest.raises(DeadlockError, match="holds"):
                await conflict(5, 10)
        for now in (m.view_nowait, m.view_mut_nowait):
            with pytest.raises(DeadlockError, match="holds"):
                now(5, 10)
        with pytest.raises(DeadlockError, match="holds"):
            await m.read_at(5, 10)
        with pytest.raises(DeadlockError, match="holds"):
            await m.write_at(5, b"a")
        with pytest.raises(DeadlockError, match="holds"):
            await m.readinto_at(5, bytearray(1))
        with pytest.raises(DeadlockError, match="holds"):
            await m.move(5, 100, 1)
        with pytest.raises(DeadlockError, match="holds"):
            await m.find(b"a")
    async with m.view(0, 10):
        with pytest.raises(DeadlockError, match="holds"):
            await m.view_mut(5, 10)
        with pytest.raises(DeadlockError, match="holds"):
            m.view_mut_nowait(5, 10)
        with pytest.raises(DeadlockError, match="holds"):
            await m.write_at(5, b"a")
    assert await free(m)


async def test_a_reader_passes_waiting_writers_where_it_reads_already(m: AsyncMmap) -> None:
    """A shared request for bytes that the task holds shared does not wait for writers."""
    async with anyio.create_task_group() as tg:
        async with m.view(0, 10):

            async def write() -> None:
                async with m.view_mut(0, 10):
                    pass

            tg.start_soon(write)
            await anyio.wait_all_tasks_blocked()
            assert m.statistics().waiting == 1
            assert await m.read_at(2, 3) == inc(3, 2)
            async with m.view(0, 5) as again:
                assert bytes(again) == inc(5)
            m_again = m.view_nowait(0, 10)
            await m_again.aclose()
            assert await m.find(bytes([3]), 0, 10) == 3
            assert isinstance(await catch(lambda: m.view_nowait(0, 1)), WouldBlock)


async def test_a_circle_of_tasks_is_a_deadlock_error(m: AsyncMmap) -> None:
    """Two tasks that take two regions in opposite order: one gets DeadlockError, one both."""
    log = []
    both_hold = anyio.Event()

    async def take(first: int, second: int, wait: bool) -> None:
        async with m.view_mut(first, 1):
            if wait:
                await both_hold.wait()
            else:
                await anyio.wait_all_tasks_blocked()
                both_hold.set()
            try:
                async with m.view_mut(second, 1):
                    log.append("both")
            except DeadlockError:
                log.append("deadlock")

    async with anyio.create_task_group() as tg:
        tg.start_soon(take, 0, 1, True)
        tg.start_soon(take, 1, 0, False)
    assert sorted(log) == ["both", "deadlock"]
    assert await free(m)


async def test_views_of_nothing(m: AsyncMmap) -> None:
    """An empty view conflicts with nothing, keeps nothing from being resized, and works."""
    async with m.view_mut(0, 100), m.view_mut(50, 0) as empty, m.view(50, 0) as other:
        assert (bytes(empty), len(other), empty.offset) == (b"", 0, 50)
        assert await empty.read() == b""
        assert await empty.write(b"") == 0
        await empty.flush()
        with pytest.raises(ValueError, match="do not fit"):
            await empty.write(b"a")
        with pytest.raises(IndexError, match="index"):
            empty[0]
    async with m.view_mut(N, 0):
        await m.resize(N + 1)
        await m.resize(10)
        assert len(m) == 10


async def test_a_view_waits_and_the_map_shrinks(m: AsyncMmap) -> None:
    """A request that waited while the map was cut is a ValueError that says so."""
    for load in (True, False):
        for take in (m.view, m.view_mut):
            await m.resize(N)
            held = await m.view_mut(0, 10)
            async with anyio.create_task_group() as tg:
                tg.start_soon(m.resize, 100)
                await anyio.wait_all_tasks_blocked()
                opening = take(90, 20, load=load)
                tg.start_soon(held_open, opening)
                await anyio.wait_all_tasks_blocked()
                await in_another_task(held.aclose)
            assert await free(m)


async def held_open(opening: object) -> None:
    """Wait for a view that cannot be had any more."""
    with pytest.raises(ValueError, match="not inside the map any more: it was resized to 100"):
        await opening  # type: ignore[misc]


# Openings


async def test_arguments_are_checked_when_called(m: AsyncMmap) -> None:
    """What is wrong with the arguments shows in the call, before anything is awaited."""
    with pytest.raises(ValueError, match="not inside the map"):
        m.view(N + 1)
    with pytest.raises(TypeError, match="offset must be an integer"):
        m.view_mut(1.0)  # type: ignore[arg-type]


async def test_an_opening_runs_once(m: AsyncMmap) -> None:
    """A second await or enter of the same opening is a RuntimeError."""
    opening = m.view(0, 10)
    async with opening:
        pass
    with pytest.raises(RuntimeError, match="already awaited or entered"):
        await opening
    with pytest.raises(RuntimeError, match="already awaited or entered"):
        async with opening:
            pass
    opening = m.view_mut(0, 10)
    await (await opening).aclose()
    with pytest.raises(RuntimeError, match="already awaited or entered"):
        await opening


async def test_an_opening_that_is_never_awaited_leaves_nothing(m: AsyncMmap) -> None:
    """A view that is never awaited holds nothing and warns of nothing."""
    for make in (m.view, m.view_mut):
        make(0, 10)
    gc.collect()
    assert await free(m)
    assert m.statistics().views == 0


async def test_not_loaded_on_request(m: AsyncMmap) -> None:
    """load=False takes the region without bringing pages in."""
    before = m.statistics()
    async with m.view(load=False) as v, m.view(0, 10, load=False):
        assert v[0] == 0
    after = m.statistics()
    assert (after.loads_inline, after.loads_off_loop) == (
        before.loads_inline,
        before.loads_off_loop,
    )


async def test_writable_views_need_a_writable_map(tmp_path: Path) -> None:
    """view_mut of a READ map is a PermissionError in the call, and names the protection."""
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N))) as m:
        with pytest.raises(PermissionError, match="its protection is READ"):
            m.view_mut()
        with pytest.raises(PermissionError, match="its protection is READ"):
            m.view_mut_nowait()


async def test_protection_that_changes_while_a_writer_waits(m: AsyncMmap) -> None:
    """A writer that waited while the map became READ gets PermissionError."""
    held = await m.view(0, 10)
    async with anyio.create_task_group() as tg:
        tg.start_soon(m.set_protection, Protection.READ)
        await anyio.wait_all_tasks_blocked()
        waiting = m.view_mut(0, 10)

        async def want() -> None:
            with pytest.raises(PermissionError, match="its protection is READ"):
                await waiting

        tg.start_soon(want)
        await anyio.wait_all_tasks_blocked()
        await in_another_task(held.aclose)
    async with m.view():
        pass


# The end


async def test_closing_twice(m: AsyncMmap) -> None:
    """A view may be closed again and again, inside its own block too."""
    async with m.view(0, 10) as v:
        await v.aclose()
        await v.aclose()
    assert await free(m)


async def test_closing_twice_the_last_view_of_a_map(tmp_path: Path) -> None:
    """As above for the view of a map that was consumed, which closes with it."""
    m = await AsyncMmap.open_path(file_of(tmp_path, inc(N)), "r+")
    async with m.into_view() as v:
        v[0] = 1
        await v.aclose()
        await v.aclose()
    assert v.closed
    m = await AsyncMmap.open_path(file_of(tmp_path, inc(N)), "r+")
    v = await m.view()
    await m.aclose()
    assert bytes(v) == inc(N)
    await v.aclose()
    await v.aclose()


async def test_a_dropped_view_warns_and_frees_its_region(m: AsyncMmap) -> None:
    """A view, or half, that is dropped without being closed is a ResourceWarning, and free."""
    v = await m.view_mut(3, 4)
    with pytest.warns(ResourceWarning, match="MmapView of bytes 3 to 7 was dropped without"):
        del v
        gc.collect()
    await anyio.wait_all_tasks_blocked()
    assert await free(m)
    left, right = (await m.view_mut(0, 10)).split_at(5)
    with pytest.warns(ResourceWarning, match="MmapView of bytes 5 to 10 was dropped without"):
        del right
        gc.collect()
    await anyio.wait_all_tasks_blocked()
    assert await free(m, 5, 5)
    assert not await free(m, 0, 5)
    await left.aclose()
    assert m.statistics().views == 0


async def test_a_task_may_have_at_once_what_it_dropped(m: AsyncMmap) -> None:
    """The region of a dropped view, half or sync view is free for the same task in the next
    line, whichever way it was taken."""
    request = m.view_mut(0, 10)
    views = [await request, m.view_mut_nowait(10, 10), *(await m.view_mut(20, 10)).split_at(5)]
    while views:
        offset, length = views[-1].offset, len(views[-1])
        with pytest.warns(ResourceWarning, match="was dropped without"):
            views.pop()
        assert m.statistics().views == len(views)
        await m.write_at(offset, bytes(length))
        async with m.view_mut(offset, length), m.view(offset + length, 0):
            pass


async def test_what_is_dropped_between_two_steps_of_the_loop(m: AsyncMmap, tmp_path: Path) -> None:
    """A view gives its region back, and a map closes, in the loop's next turn: who is woken
    between the steps is overlooked."""
    dropped = [await m.view_mut(0, 10)]
    other = await AsyncMmap.open_path(file_of(tmp_path, inc(N)))

    async def use() -> None:
        async with other:
            await suspend()

    @types.coroutine
    def suspend() -> Generator[None, None, None]:
        yield

    forgotten = use()
    forgotten.send(None)
    left: list[object] = []

    def drop() -> None:
        with pytest.warns(ResourceWarning, match="was dropped without"):
            dropped.clear()
        forgotten.close()
        left.extend((m.statistics().views, other.closed))

    await between_steps(drop)
    assert left == [1, False]
    with anyio.fail_after(10):
        while m.statistics().views or not other.closed:
            await checkpoint()


async def test_views_are_not_copied(m: AsyncMmap) -> None:
    """A copy would give the region back a second time: copying and pickling are a TypeError."""
    async with m.view_mut(0, 10) as v, m.windows(10, offset=10) as windows:
        pending = await m.flush_async()
        lock = RegionLock()
        lease = await lock.exclusive(0, 10)
        for each in (m, v, m.view(20, 1), windows, pending, lock, lease, lock.shared(20, 21),
                     AsyncMmap.anonymous(1)):  # fmt: skip
            for way in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(TypeError, match=f"cannot .* {type(each).__name__}"):
                    way(each)
        lease.release()


@only_linux
async def test_the_last_view_dropped_closes_a_consumed_map(tmp_path: Path) -> None:
    """Dropping the last view of a consumed map unmaps it."""
    path = file_of(tmp_path, inc(N))
    m = await AsyncMmap.open_path(path, "r+")
    v = await m.into_view()
    del m
    with pytest.warns(ResourceWarning, match="dropped without being closed"):
        del v
        gc.collect()
    with anyio.fail_after(10):
        while maps_of(path):
            await checkpoint()


async def test_a_block_that_an_async_generator_leaves(m: AsyncMmap) -> None:
    """An async generator that is closed by its task frees the region before aclose returns."""

    async def chunks() -> AsyncIterator[bytes]:
        async with m.view_mut(0, 100) as v:
            for place in range(0, 100, 10):
                yield v[place : place + 10]

    async with aclosing(chunks()) as stream:  # type: ignore[type-var]
        assert await anext(stream) == inc(10)
    async with m.view_mut_nowait(0, 100):
        pass


# into_view


async def test_into_view_consumes_the_map(m: AsyncMmap) -> None:
    """into_view gives one exclusive view of everything, and the map refuses its own calls."""
    async with m.into_view() as v:
        assert m.closed
        assert (len(v), v.offset, v.writable) == (N, 0, True)
        for call in (
            m.view,
            m.view_mut,
            m.view_nowait,
            m.view_mut_nowait,
            m.into_view,
            m.into_view_sync,
            lambda: m.read_at(0, 1),
            lambda: m.write_at(0, b"a"),
            lambda: m.readinto_at(0, bytearray(1)),
            lambda: m.move(0, 1, 1),
            lambda: m.find(b"a"),
            lambda: m.rfind(b"a"),
            m.windows,
            m.flush,
            lambda: m.flush_range(0, 1),
            m.flush_async,
            lambda: m.flush_async_range(0, 1),
            m.load,
            m.resident,
            lambda: m.advise("normal"),
            m.pin,
            m.unpin,
            lambda: m.resize(10),
            lambda: m.set_protection("r"),
            m.clear_flush_error,
            m.file_size,
            m.ptr,
            m.mut_ptr,
            m.as_slice,
            m.as_mut_slice,
            m.__aenter__,
        ):
            assert isinstance(await catch(call), ClosedResourceError)
        v[0] = 200
        assert await v.read(3) == b"\xc8\1\2"
        await v.flush()
    await m.aclose()


async def test_into_view_of_a_map_that_is_not_writable(tmp_path: Path) -> None:
    """The view of a READ map is shared, and joins readers that are out."""
    m = await AsyncMmap.open_path(file_of(tmp_path, inc(N)))
    async with m.view(0, 10), m.into_view() as v:
        assert (v.writable, bytes(v)) == (False, inc(N))


async def test_into_view_waits_for_views(m: AsyncMmap) -> None:
    """into_view waits until nobody holds anything; an own view is a DeadlockError."""
    async with m.view_mut(0, 10):
        with pytest.raises(DeadlockError, match="holds"):
            await m.into_view()
        with pytest.raises(DeadlockError, match="holds"):
            await m.into_view_sync()
    assert not m.closed
    held = await m.view(0, 10)
    got = anyio.Event()

    async def consume() -> None:
        async with m.into_view():
            got.set()

    async with anyio.create_task_group() as tg:
        tg.start_soon(consume)
        await anyio.wait_all_tasks_blocked()
        assert not got.is_set()
        assert not m.closed
        await in_another_task(held.aclose)
        await got.wait()


async def test_into_view_wakes_those_who_wait_behind_it(m: AsyncMmap) -> None:
    """Requests that wait when the map is consumed get ClosedResourceError."""
    held = await m.view(0, 10)
    async with anyio.create_task_group() as tg:

        async def consume() -> None:
            async with m.into_view():
                pass

        async def want() -> None:
            with pytest.raises(ClosedResourceError, match="the map was closed"):
                await m.view(0, 10)

        tg.start_soon(consume)
        await anyio.wait_all_tasks_blocked()
        tg.start_soon(want)
        await anyio.wait_all_tasks_blocked()
        await in_another_task(held.aclose)


async def test_into_view_flushes_like_leaving_the_map(tmp_path: Path) -> None:
    """Closing the last view flushes what was written, unless its block failed."""
    for fails in (False, True):
        m = await AsyncMmap.open_path(file_of(tmp_path, inc(N)), "r+")
        try:
            async with m.into_view() as v:
                v[0] = 1
                if fails:
                    raise KeyError("mine")
        except KeyError:
            pass
        assert m.statistics().flushes_done == (0 if fails else 1)


async def test_a_cancelled_into_view_consumes_nothing(m: AsyncMmap) -> None:
    """Cancelled while it waits, into_view leaves the map as it was."""
    async with m.view(0, 10):
        async with anyio.create_task_group() as tg:
            tg.start_soon(m.into_view().__aenter__)
            await anyio.wait_all_tasks_blocked()
            tg.cancel_scope.cancel()
        assert not m.closed
        assert await m.read_at(0, 3) == inc(3)
    assert await free(m)


@pytest.mark.parametrize("call", ["write", "read"])
async def test_closed_by_another_task_in_the_middle_of_a_copy(tmp_path: Path, call: str) -> None:
    """The region is free when the copy has ended, not before: nobody else's bytes change."""
    kernel = FakeKernel()
    name = {"write": "populate_write", "read": "read"}[call]
    async with mapped_by(kernel).open_path(file_of(tmp_path, inc(N)), "r+") as m:
        kernel.fail("read_nowait", errno.EAGAIN)
        taken: list[MmapView] = []

        async def own() -> None:
            v = await m.view_mut(load=False)
            taken.append(v)
            assert (await v.write(b"x" * N) if call == "write" else len(await v.read())) == N

        with kernel.hold(name, times=1) as hold:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(own)
                await entered(hold)
                await taken[0].aclose()
                assert taken[0].closed
                with pytest.raises(WouldBlock):
                    m.view_mut_nowait()
                hold.release.set()
        async with m.view_mut() as w:
            assert bytes(w) == (b"x" * N if call == "write" else inc(N))


@on_asyncio
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("way", ["wait_for", "gather", "in a coroutine"])
async def test_taken_by_a_task_around_the_await(m: AsyncMmap, way: str, used: bool) -> None:
    """asyncio wraps what it waits for in a task, and that has ended when the view arrives."""

    async def take() -> MmapView:
        return await m.view_mut(0, 10)

    if way == "wait_for":
        v = await asyncio.wait_for(m.view_mut(0, 10), 10)
    else:
        (v,) = await asyncio.gather(m.view_mut(0, 10) if way == "gather" else take())
    if used or way == "in a coroutine":  # which nobody can tell from a task that keeps it
        v[0] = 1
    with anyio.fail_after(20), pytest.raises(DeadlockError, match="holds"):
        await m.read_at(0, 1)
    async with v:
        v[0] = 1
        with pytest.raises(DeadlockError, match="holds"):
            await m.read_at(0, 1)
        assert isinstance(await catch(lambda: v[0]), BusyResourceError)


@on_asyncio
async def test_what_gather_took_is_the_askers(m: AsyncMmap) -> None:
    """From the start: a third task cannot take it before the one that asked has used it."""
    (v,) = await asyncio.gather(m.view_mut(0, 10))
    error = await catch(lambda: v[0])
    assert isinstance(error, BusyResourceError)
    assert v[0] == 0
    await v.aclose()


async def test_the_error_of_another_task_says_whose_it_is(m: AsyncMmap) -> None:
    """anyio's error names nobody; a note does, and says what to do instead."""
    async with m.view_mut(3, 10) as v:
        error = await catch(lambda: v[0])
    assert error is not None
    (note,) = error.__notes__
    for word in ("MmapView of bytes 3 to 13", "belongs to task", "split_at()"):
        assert word in note


@on_asyncio
async def test_asked_for_by_one_task_and_used_by_another(m: AsyncMmap) -> None:
    """A view that asyncio took in a task of its own belongs to the first task that uses it."""

    async def producer() -> list[asyncio.Future[MmapView]]:
        return [asyncio.ensure_future(m.view_mut(each, 1)) for each in range(3)]

    first, second, third = await asyncio.create_task(producer())
    v = await first
    v[0] = 1
    assert isinstance(await catch(lambda: v[0]), BusyResourceError)
    await v.aclose()
    async with await second as v:
        v[0] = 1

    async def consumer() -> None:
        async with await third as w:
            w[0] = 1

    await asyncio.create_task(consumer())
    assert await free(m)


async def test_an_empty_view_outlives_a_shrink(tmp_path: Path) -> None:
    """It holds no byte that could be cut off."""
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N)), "r+") as m, m.view(N, 0) as v:
        await m.resize(N // 2)
        assert await v.read() == b""
        assert bytes(v) == b""


async def test_a_closed_read_only_map_is_closed_first_of_all(tmp_path: Path) -> None:
    """ClosedResourceError, and no advice to change the protection."""
    m = await AsyncMmap.open_path(file_of(tmp_path, inc(N)))
    async with m.view():
        await m.aclose()
        for call in (m.view_mut, m.view_mut_nowait):
            with pytest.raises(ClosedResourceError):
                call()


async def test_another_event_loop_is_told_of_the_map(m: AsyncMmap) -> None:
    """Not of a region lock that its user never saw."""

    async def take() -> None:
        await m.view(0, 1)

    with pytest.raises(RuntimeError, match="this map belongs"):
        await to_thread.run_sync(anyio.run, take)
