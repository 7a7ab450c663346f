"""Leaving a map flushes what was written: every way to store, and every way to leave."""

from __future__ import annotations

import asyncio
import ctypes
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest

from aiommap import AsyncMmap, FlushError, MmapViewSync, Protection, TruncatedError

from .cancelling import let_others_run, on_asyncio
from .content import file_of, gone, maps_of, only_linux
from .fake_kernel import FakeKernel
from .flushing import SYNCS, begin, entered, mapped_by

pytestmark = pytest.mark.anyio

MIB = 1 << 20
PAGE = 4096
Store = Callable[[AsyncMmap], Awaitable[object]]


@pytest.fixture
def fake() -> FakeKernel:
    return FakeKernel(durability=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return file_of(tmp_path, MIB)


# The ways to store; each puts b"x" somewhere


async def write_little(m: AsyncMmap) -> None:
    await m.write_at(PAGE, b"x")


async def write_much(m: AsyncMmap) -> None:
    await m.write_at(0, b"x" * (700 << 10))


async def through_a_view(m: AsyncMmap) -> None:
    async with m.view_mut(PAGE, 10) as v:
        v[3] = ord("x")


async def through_a_view_file(m: AsyncMmap) -> None:
    async with m.view_mut(PAGE, 10) as v:
        await v.write(b"x")


async def through_a_view_that_was_downgraded(m: AsyncMmap) -> None:
    async with m.view_mut(PAGE, 10) as v:
        v[3] = ord("x")
        v.downgrade()


async def through_a_view_after_a_flush(m: AsyncMmap) -> None:
    async with m.view_mut(PAGE, 10) as v:
        await m.flush()
        v[3] = ord("x")


async def through_halves(m: AsyncMmap) -> None:
    v = await m.view_mut(PAGE, 10)
    left, right = v.split_at(5)
    async with left, right:
        right[0] = ord("x")


async def through_raw_memory(m: AsyncMmap) -> None:
    with m.as_mut_slice() as raw:
        raw[5] = ord("x")


async def through_raw_memory_after_a_flush(m: AsyncMmap) -> None:
    with m.as_mut_slice() as raw:
        await m.flush()
        raw[5] = ord("x")


async def through_an_address(m: AsyncMmap) -> None:
    ctypes.memset(m.mut_ptr(), ord("x"), 1)


async def by_moving(m: AsyncMmap) -> None:
    await m.write_at(0, b"x")
    await m.flush()
    await m.move(PAGE, 0, 10)


async def and_set_to_read(m: AsyncMmap) -> None:
    await m.write_at(0, b"x")
    await m.set_protection(Protection.READ)


async def and_flushed_a_part(m: AsyncMmap) -> None:
    await m.write_at(0, b"x")
    await m.flush_range(PAGE, PAGE)


async def and_started_a_write_back(m: AsyncMmap) -> None:
    await m.write_at(0, b"x")
    await m.flush_async()


async def and_a_flush_was_cancelled(m: AsyncMmap) -> None:
    await m.write_at(0, b"x")
    with anyio.CancelScope() as scope:
        scope.cancel()
        await m.flush()


STORES: list[Store] = [
    write_little,
    write_much,
    through_a_view,
    through_a_view_file,
    through_a_view_that_was_downgraded,
    through_a_view_after_a_flush,
    through_halves,
    through_raw_memory,
    through_raw_memory_after_a_flush,
    through_an_address,
    by_moving,
    and_set_to_read,
    and_flushed_a_part,
    and_started_a_write_back,
    and_a_flush_was_cancelled,
]


def assert_all_durable(fake: FakeKernel, path: Path) -> None:
    content = path.read_bytes()
    assert b"x" in content
    assert fake.disk.durable(path) == content


@pytest.mark.parametrize("store", STORES, ids=lambda store: store.__name__)
async def test_what_was_written_is_durable(fake: FakeKernel, path: Path, store: Store) -> None:
    """Whatever the way it was written in, it is on the disk when the block is left."""
    async with mapped_by(fake).open_path(path, "r+") as m:
        await store(m)
        assert fake.disk.durable(path) != path.read_bytes()
    assert_all_durable(fake, path)


@pytest.mark.parametrize("store", STORES, ids=lambda store: store.__name__)
async def test_a_failing_block_does_not_flush(fake: FakeKernel, path: Path, store: Store) -> None:
    """When the block raises, what it wrote last may be half of something: no flush, and the
    block's exception comes through."""
    with pytest.raises(ZeroDivisionError):
        async with mapped_by(fake).open_path(path, "r+") as m:
            await store(m)
            fake.calls.clear()
            raise ZeroDivisionError
    assert not fake.names(*SYNCS)


async def test_a_cancelled_block_does_not_flush(fake: FakeKernel, path: Path) -> None:
    """Cancelled, the map closes without a flush; so does aclose() in a cancelled scope."""
    with anyio.CancelScope() as scope:
        async with mapped_by(fake).open_path(path, "r+") as m:
            await m.write_at(0, b"x")
            scope.cancel()
            await anyio.sleep_forever()
    m = await mapped_by(fake).open_path(path, "r+")
    await m.write_at(0, b"y")
    with anyio.CancelScope() as scope:
        scope.cancel()
        await m.aclose()
    assert scope.cancelled_caught
    assert m.closed
    assert not fake.names(*SYNCS)


async def test_asked_not_to_flush(fake: FakeKernel, path: Path) -> None:
    """aclose(flush=False) leaves it to the kernel when the bytes reach the disk."""
    m = await mapped_by(fake).open_path(path, "r+")
    await m.write_at(0, b"x")
    await m.aclose(flush=False)
    assert not fake.names(*SYNCS)


async def only_read(m: AsyncMmap) -> None:
    await m.read_at(0, 10)
    async with m.view(0, 10) as v:
        bytes(v)


async def flushed_all(m: AsyncMmap) -> None:
    await m.write_at(0, b"x")
    await m.flush()


async def changed_protection(m: AsyncMmap) -> None:
    await m.set_protection(Protection.READ)
    await m.set_protection(Protection.READ_WRITE)


async def resized_to_the_same(m: AsyncMmap) -> None:
    await m.resize(len(m))


@pytest.mark.parametrize(
    "use",
    [only_read, flushed_all, changed_protection, resized_to_the_same],
    ids=lambda use: use.__name__,
)
async def test_nothing_unflushed_costs_no_flush(fake: FakeKernel, path: Path, use: Store) -> None:
    """Leaving a map that was not written since it was flushed does not go to the disk."""
    async with mapped_by(fake).open_path(path, "r+") as m:
        await use(m)
        fake.calls.clear()
    assert not fake.names(*SYNCS)


@pytest.mark.parametrize("length", [PAGE, 2 * MIB])
async def test_a_new_size_is_flushed(fake: FakeKernel, path: Path, length: int) -> None:
    """A resize is something to be made durable, like a store."""
    async with mapped_by(fake).open_path(path, "r+") as m:
        await m.resize(length)
    assert fake.names(*SYNCS) == ["sync_data"]
    assert len(fake.disk.durable(path)) == length


async def test_a_new_size_is_flushed_also_if_the_resize_was_cancelled(
    fake: FakeKernel, path: Path
) -> None:
    """A resize that was done when its task was cancelled is flushed at the end all the same."""
    async with mapped_by(fake).open_path(path, "r+") as m:
        with fake.hold("set_file_size", times=1) as hold:
            async with anyio.create_task_group() as tasks:
                resize = begin(tasks, lambda: m.resize(PAGE))
                await entered(hold)
                resize.scope.cancel()
                await let_others_run()
                hold.release.set()
        assert resize.scope.cancelled_caught
        assert len(m) == PAGE
    assert fake.names(*SYNCS) == ["sync_data"]


# Views that are out


async def test_views_that_are_out(fake: FakeKernel, path: Path) -> None:
    """What is stored through a view after its map was closed is flushed with the last view."""
    m = await mapped_by(fake).open_path(path, "r+")
    first = await m.view_mut(0, PAGE)
    last = await m.view_mut(PAGE, PAGE)
    await m.aclose()
    first[0] = last[0] = ord("x")
    await first.aclose()
    assert fake.disk.durable(path)[0] == 0
    await last.aclose()
    assert_all_durable(fake, path)


async def test_views_of_a_failed_block(fake: FakeKernel, path: Path) -> None:
    """A map whose block failed is not flushed with its last view either."""
    with pytest.raises(ZeroDivisionError):
        async with mapped_by(fake).open_path(path, "r+") as m:
            view = await m.view_mut(0, PAGE)
            raise ZeroDivisionError
    view[0] = 1
    await view.aclose()
    assert not fake.names(*SYNCS)


async def test_into_view(fake: FakeKernel, path: Path) -> None:
    """A map given up for a view is flushed when the last part of the view is closed."""
    m = await mapped_by(fake).open_path(path, "r+")
    view = await m.into_view()
    left, right = view.split_at(10)
    async with left:
        left[0] = ord("x")
    assert fake.disk.durable(path)[0] == 0
    async with right:
        right[0] = ord("x")
    assert_all_durable(fake, path)


async def test_into_view_sync(fake: FakeKernel, path: Path) -> None:
    """The same for a view that threads share: flushed with its last clone."""
    m = await mapped_by(fake).open_path(path, "r+")
    view: MmapViewSync = await m.into_view_sync()
    clone = view.clone()
    await view.aclose()
    clone[0] = ord("x")
    await clone.aclose()
    assert_all_durable(fake, path)


async def test_memory_of_a_view_that_outlives_it(fake: FakeKernel, path: Path) -> None:
    """An array over a view's buffer that is alive after the view was closed may be stored to:
    the map is flushed at the end, although a flush came in between."""
    async with mapped_by(fake).open_path(path, "r+") as m:
        view = await m.view_mut(0, PAGE)
        array = view.buffer[10:20]
        with pytest.raises(BufferError):
            await view.aclose()
        await m.flush()
        array[0] = ord("x")
        array.release()
    assert_all_durable(fake, path)


# A flush of another task is under way


async def test_closing_waits_for_a_flush_of_another_task(fake: FakeKernel, path: Path) -> None:
    """While a flush of everything is under way nothing is durable yet: a map that is closed in
    the meantime is closed when it is."""
    m = await mapped_by(fake).open_path(path, "r+")
    await m.write_at(0, b"x")
    with fake.hold("sync_data", times=1) as hold:
        async with anyio.create_task_group() as tasks:
            begin(tasks, m.flush)
            await entered(hold)
            closing = begin(tasks, m.aclose)
            await let_others_run()
            assert not closing.done.is_set()
            hold.release.set()
    assert_all_durable(fake, path)


async def test_closing_after_a_flush_that_was_cancelled_in_the_middle(
    fake: FakeKernel, path: Path
) -> None:
    """A flush that its task left may still fail: closing asks again, and is told."""
    m = await mapped_by(fake).open_path(path, "r+")
    await m.write_at(0, b"x")
    fake.fail("sync_data", errno.EIO, times=1)
    with fake.hold("sync_data", times=1) as hold:
        async with anyio.create_task_group() as tasks:
            flush = begin(tasks, m.flush)
            await entered(hold)
            closing = begin(tasks, m.aclose)
            flush.scope.cancel()
            await flush.done.wait()
            hold.release.set()
    assert isinstance(closing.error, FlushError)


async def test_a_flush_after_set_protection_waits_too(fake: FakeKernel, path: Path) -> None:
    """A map that was written and set to READ owes its flush until one has ended, not until one
    has begun."""
    async with mapped_by(fake).open_path(path, "r+") as m:
        await m.write_at(0, b"x")
        with fake.hold("sync_data", times=1) as hold:
            async with anyio.create_task_group() as tasks:
                begin(tasks, m.flush)
                await entered(hold)
                await m.set_protection(Protection.READ)
                again = begin(tasks, m.flush)
                await let_others_run()
                assert not again.done.is_set()
                hold.release.set()
                assert await again.get() is None
        fake.calls.clear()
        await m.flush()  # now there is nothing to do
        assert not fake.names(*SYNCS)


async def test_the_last_view_fails_while_the_map_closes(fake: FakeKernel, path: Path) -> None:
    """A view that is left by an exception in the very moment in which the map is closed does
    not take the map's flush with it."""
    m = await mapped_by(fake).open_path(path, "r+")
    await m.write_at(0, b"x")

    async def fail_with_a_view() -> None:
        with pytest.raises(ZeroDivisionError):
            async with await m.view(0, PAGE):
                ready.set()
                await closing_begins.wait()
                raise ZeroDivisionError

    async def close() -> None:
        closing_begins.set()
        await m.aclose()

    ready, closing_begins = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as tasks:
        begin(tasks, fail_with_a_view)
        await ready.wait()
        closing = begin(tasks, close)
    assert closing.error is None
    assert_all_durable(fake, path)


# Failures


@only_linux
@pytest.mark.parametrize("entering", [False, True])
async def test_a_failing_flush_raises_after_all_is_closed(
    fake: FakeKernel, path: Path, entering: bool
) -> None:
    """The flush of leaving fails: FlushError, and nothing is left open."""
    fake.fail("sync_data", errno.EIO)
    m = await mapped_by(fake).open_path(path, "r+")
    await m.write_at(0, b"x")
    with pytest.raises(FlushError):
        if entering:
            async with m:
                pass
        else:
            await m.aclose()
    assert m.closed
    assert maps_of(path) == 0
    await m.aclose()  # again: says nothing any more


@pytest.mark.parametrize("protection", ["r+", "r"])
async def test_closing_a_tainted_map_raises(fake: FakeKernel, path: Path, protection: str) -> None:
    """An earlier failure that nobody cleared is raised by closing, also with nothing to flush."""
    m = await mapped_by(fake).open_path(path, "r+")
    fake.fail("sync_data", errno.EIO, times=1)
    with pytest.raises(FlushError):
        await m.flush()
    await m.set_protection(protection)
    fake.calls.clear()
    with pytest.raises(FlushError):
        await m.aclose()
    assert m.closed
    assert not fake.names(*SYNCS)


async def test_a_cleared_failure_is_not_raised(fake: FakeKernel, path: Path) -> None:
    """Acknowledged, it does not come up again; what was not flushed is flushed once more."""
    async with mapped_by(fake).open_path(path, "r+") as m:
        await m.write_at(0, b"x")
        fake.fail("sync_data", errno.EIO, times=1)
        with pytest.raises(FlushError):
            await m.flush()
        await m.clear_flush_error()
        fake.calls.clear()
    assert fake.names(*SYNCS) == ["sync_data"]


async def test_the_exception_of_the_block_is_not_hidden(fake: FakeKernel, path: Path) -> None:
    """A failing block of a tainted map raises what the block raised."""
    with pytest.raises(ZeroDivisionError):
        async with mapped_by(fake).open_path(path, "r+") as m:
            fake.fail("sync_data", errno.EIO, times=1)
            with pytest.raises(FlushError):
                await m.flush()
            raise ZeroDivisionError


async def test_the_last_view_raises_too(fake: FakeKernel, path: Path) -> None:
    """Where the last view closes the map, it is told of the failure."""
    m = await mapped_by(fake).open_path(path, "r+")
    view = await m.into_view()
    view[0] = 1
    fake.fail("sync_data", errno.EIO, times=1)
    with pytest.raises(FlushError):
        await view.aclose()
    assert view.closed


async def test_truncated_under_a_written_map(fake: FakeKernel, path: Path) -> None:
    """Closing a written map whose file was cut says so, and closes it."""
    m = await mapped_by(fake).open_path(path, "r+")
    await m.write_at(MIB - 1, b"x")
    with open(path, "r+b") as file:
        file.truncate(PAGE)
    with pytest.raises(TruncatedError):
        await m.aclose()
    assert m.closed


@only_linux
@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("how", ["write_at", "move", "view.write"])
async def test_a_store_that_outlives_the_closing_is_flushed(
    fake: FakeKernel, path: Path, how: str, failing: bool
) -> None:
    """aclose() does not wait for a copy under way in another task; the copy ends the map then,
    with a flush of its own, and its caller is told when that fails."""
    m = await mapped_by(fake).open_path(path, "r+")
    await m.write_at(0, b"x" * PAGE)
    await m.flush()

    async def store() -> None:
        if how == "write_at":
            await m.write_at(PAGE, b"x" * PAGE)
        elif how == "move":
            await m.move(PAGE, 0, PAGE)
        else:
            async with m.view_mut(PAGE, PAGE) as v:
                await v.write(b"x" * PAGE)

    with fake.hold("copy", times=1) as hold:
        async with anyio.create_task_group() as tasks:
            outcome = begin(tasks, store)
            await entered(hold)
            await m.aclose()
            assert maps_of(path) == 1
            if failing:
                fake.fail("sync_data", errno.EIO, times=1)
            hold.release.set()
            error = await outcome.get()
    await gone(path)
    assert isinstance(error, FlushError) if failing else error is None
    assert (fake.disk.durable(path) == path.read_bytes()) is not failing
    assert path.read_bytes()[PAGE : 2 * PAGE] == b"x" * PAGE


async def test_what_one_store_was_told_is_flushed_when_the_last_one_is_cancelled(
    fake: FakeKernel, path: Path
) -> None:
    """Of two stores that outlive the closing the first ends well, and the last one, cancelled,
    does not take the flush with it."""
    m = await mapped_by(fake).open_path(path, "r+")
    with fake.hold("copy", times=1) as first, fake.hold("copy", after=1, times=1) as second:
        async with anyio.create_task_group() as tasks:
            told = begin(tasks, lambda: m.write_at(0, b"x" * 10))
            await entered(first)
            cancelled = begin(tasks, lambda: m.write_at(PAGE, b"y" * 10))
            await entered(second)
            await m.aclose()
            first.release.set()
            assert await told.get() is None
            assert not fake.names(*SYNCS) or fake.disk.durable(path)[:10] != b"x" * 10
            cancelled.scope.cancel()
            second.release.set()
            await cancelled.done.wait()
    assert fake.disk.durable(path)[:10] == b"x" * 10
    await gone(path)


@on_asyncio
async def test_native_cancellation_of_closing(fake: FakeKernel, path: Path) -> None:
    """task.cancel() in the middle of the flush of aclose(): the map is closed, and its memory
    goes when the flush that is under way lets go of it."""
    m = await mapped_by(fake).open_path(path, "r+")
    await m.write_at(0, b"x")
    with fake.hold("sync_data", times=1) as hold:
        task = asyncio.ensure_future(m.aclose())
        await entered(hold)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert m.closed
        hold.release.set()


@pytest.mark.parametrize("first", ["good", "bad"])
@pytest.mark.parametrize("bad", ["fails", "is cancelled"])
async def test_what_ended_well_is_flushed_whoever_ends_last(
    fake: FakeKernel, path: Path, first: str, bad: str
) -> None:
    """Of two views of a closed map one ends well and the other does not: what the first stored is
    durable, in whatever order they end."""
    m = await mapped_by(fake).open_path(path, "r+")
    left, right = (await m.into_view()).split_at(PAGE)

    async def end_well() -> None:
        async with left:
            left[:4] = b"good"

    async def end_badly() -> None:
        if bad == "fails":
            with pytest.raises(ZeroDivisionError):
                async with right:
                    raise ZeroDivisionError
        else:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await right.aclose()

    ends = (end_well, end_badly) if first == "good" else (end_badly, end_well)
    for end in ends:
        await end()
    assert fake.disk.durable(path)[:4] == b"good"
    await gone(path)


@pytest.mark.parametrize("flush", [True, False])
async def test_a_reader_that_ends_last(fake: FakeKernel, path: Path, flush: bool) -> None:
    """It ends the map with the flush that a writer's bytes would else not get, unless the map was
    closed without one."""
    m = await mapped_by(fake).open_path(path, "r+")
    writer, reader = await m.view_mut(0, 10), await m.view(PAGE, 10)
    await m.aclose(flush=flush)
    writer[:4] = b"good"
    await writer.aclose()
    with pytest.raises(ZeroDivisionError):
        async with reader:
            raise ZeroDivisionError
    assert (fake.disk.durable(path)[:4] == b"good") is flush
    await gone(path)


async def test_views_that_all_end_badly_flush_nothing(fake: FakeKernel, path: Path) -> None:
    """The control: nobody was told that anything ended well."""
    m = await mapped_by(fake).open_path(path, "r+")
    for view in (await m.into_view()).split_at(PAGE):
        with pytest.raises(ZeroDivisionError):
            async with view:
                view[:4] = b"lost"
                raise ZeroDivisionError
    assert not fake.names(*SYNCS)


async def test_a_file_made_long_again_is_flushed(fake: FakeKernel, path: Path) -> None:
    """resize() to the length that the map has changes the file's size, where somebody cut it; and
    leaving makes that durable."""
    async with mapped_by(fake).open_path(path, "r+") as m:
        with open(path, "r+b") as file:
            file.truncate(PAGE)
        await m.resize(MIB)
        fake.calls.clear()
    assert fake.names(*SYNCS) == ["sync_data"]
