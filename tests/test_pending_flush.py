"""PendingFlush: a write-back that was started, and when it may be called durable."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest

from aiommap import AsyncMmap, FlushError, PendingFlush, TruncatedError

from .cancelling import let_others_run, on_asyncio
from .content import file_of, maps_of, only_linux, open_descriptors
from .fake_kernel import FakeKernel
from .flushing import SYNCS, begin, entered, mapped_by, opened

pytestmark = pytest.mark.anyio

MIB = 1 << 20
PAGE = 4096


@pytest.fixture
def fake() -> FakeKernel:
    return FakeKernel(durability=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return file_of(tmp_path, MIB)


async def test_started_and_not_durable(fake: FakeKernel, path: Path) -> None:
    """flush_async starts the write-back of exactly the pages and waits for no device flush: its
    result is not done, and a power cut would lose the bytes."""
    async with opened(fake, path) as m:
        await m.write_at(PAGE + 5, b"x")
        pending = await m.flush_async_range(PAGE + 5, 1)
        starts = [call.arguments[2:] for call in fake.calls if call.name == "start_write_back"]
        assert starts == [(PAGE, PAGE)]
        assert not fake.names(*SYNCS)
        assert not pending.done
        assert fake.disk.durable(path)[PAGE + 5] == 0
        assert repr(pending) == f"<PendingFlush of bytes {PAGE + 5} to {PAGE + 6}, pending>"


@pytest.mark.parametrize("way", ["wait", "await"])
async def test_waited_for(fake: FakeKernel, path: Path, way: str) -> None:
    """wait(), or awaiting it, makes it durable; once more costs nothing."""
    async with opened(fake, path) as m:
        await m.write_at(PAGE, b"x")
        pending = await m.flush_async()
        for _ in range(3):
            if way == "wait":
                await pending.wait()
            else:
                await pending
            assert pending.done
            assert fake.disk.durable(path)[PAGE : PAGE + 1] == b"x"
            assert fake.names(*SYNCS) == ["sync_data"]
        assert repr(pending) == f"<PendingFlush of bytes 0 to {MIB}, done>"


async def test_done_by_a_later_flush_that_covers_it(fake: FakeKernel, path: Path) -> None:
    """Nobody waits, but somebody else flushes the range: done. A flush of something else does
    not count, nor one that covers a part."""
    async with opened(fake, path) as m:
        pending = await m.flush_async_range(PAGE, 2 * PAGE)
        await m.flush_range(PAGE, PAGE)
        await m.flush_range(8 * PAGE, PAGE)
        assert not pending.done
        await m.flush_range(0, 4 * PAGE)
        assert pending.done
        await pending
        assert fake.names(*SYNCS) == ["sync_range"] * 3


async def test_a_flush_that_began_before_does_not_count(fake: FakeKernel, path: Path) -> None:
    """A flush that is under way when the write-back is started may have missed the stores."""
    async with opened(fake, path) as m:
        with fake.hold("sync_data", times=1) as hold:
            async with anyio.create_task_group() as tasks:
                begin(tasks, m.flush)
                await entered(hold)
                await m.write_at(0, b"x")
                pending = await m.flush_async()
                hold.release.set()
        assert not pending.done
        assert fake.disk.durable(path)[0] == 0
        await pending
        assert fake.disk.durable(path)[0] == ord("x")


async def test_a_flush_that_begins_while_the_write_back_is_started_counts(
    fake: FakeKernel, path: Path
) -> None:
    """All the stores were made before flush_async was called: any flush after that covers
    them, also one that is over before the write-back has been started."""
    async with opened(fake, path) as m:
        await m.write_at(0, b"x")
        got: list[PendingFlush] = []

        async def start() -> None:
            got.append(await m.flush_async())

        with fake.hold("start_write_back", times=1) as hold:
            async with anyio.create_task_group() as tasks:
                begin(tasks, start)
                await entered(hold)
                await m.flush()
                hold.release.set()
        assert got[0].done


async def test_one_look_for_all_who_ask_meanwhile(fake: FakeKernel, path: Path) -> None:
    """Twenty tasks that ask while a write-back is being started share the next one, which begins
    after them: each page once, also where their ranges overlap."""
    async with opened(fake, path) as m:
        got: list[PendingFlush] = []

        async def start(number: int) -> None:
            got.append(await m.flush_async_range(number * PAGE, 2 * PAGE))

        with fake.hold("start_write_back", times=1) as hold:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(start, 50)
                await entered(hold)
                for number in range(20):
                    tasks.start_soon(start, number)
                await let_others_run(20)
                hold.release.set()
        starts = [call.arguments[2:] for call in fake.calls if call.name == "start_write_back"]
        assert starts == [(50 * PAGE, 2 * PAGE), (0, 21 * PAGE)]
        assert len(got) == 21
        assert not any(pending.done for pending in got)


async def test_it_does_not_wait_for_a_flush(fake: FakeKernel, path: Path) -> None:
    """While another task's flush waits for the disk, a write-back is started all the same."""
    async with opened(fake, path) as m:
        with fake.hold("sync_data", times=1) as hold:
            async with anyio.create_task_group() as tasks:
                flush = begin(tasks, m.flush)
                await entered(hold)
                pending = await m.flush_async()
                assert not flush.done.is_set()
                hold.release.set()
        assert not pending.done


async def test_several_waiters_share_one_flush(fake: FakeKernel, path: Path) -> None:
    """Ten tasks wait for the same pending flush: one device flush, although nine of them came
    while it was under way."""
    async with opened(fake, path) as m:
        pending = await m.flush_async()
        with fake.hold("sync_data", times=1) as hold:
            async with anyio.create_task_group() as tasks:
                waiters = [begin(tasks, pending.wait)]
                await entered(hold)
                waiters += [begin(tasks, pending.wait) for _ in range(9)]
                await let_others_run()
                hold.release.set()
        assert [each.error for each in waiters] == [None] * 10
        assert fake.names(*SYNCS) == ["sync_data"]


async def test_several_pending_flushes_share_one_flush(fake: FakeKernel, path: Path) -> None:
    """What is waited for in one moment is one batch, as with flush()."""
    async with opened(fake, path) as m:
        pending = [await m.flush_async_range(n * 8 * PAGE, 1) for n in range(20)]
        with fake.hold("sync_range", times=1) as hold:
            async with anyio.create_task_group() as tasks:
                begin(tasks, pending[0].wait)
                await entered(hold)
                for each in pending[1:]:
                    begin(tasks, each.wait)
                await let_others_run()
                hold.release.set()
        assert all(each.done for each in pending)
        assert fake.names(*SYNCS) == ["sync_range", "sync_data"]


async def test_a_cancelled_waiter_leaves_the_others_alone(fake: FakeKernel, path: Path) -> None:
    """One of two waiters is cancelled, the one whose request is under way: the other is served."""
    async with opened(fake, path) as m:
        pending = await m.flush_async()
        with fake.hold("sync_data", times=1) as hold:
            async with anyio.create_task_group() as tasks:
                one = begin(tasks, pending.wait)
                await entered(hold)
                two = begin(tasks, pending.wait)
                await let_others_run()
                one.scope.cancel()
                await one.done.wait()
                assert not pending.done
                hold.release.set()
                assert await two.get() is None
        assert pending.done
        assert fake.names(*SYNCS) == ["sync_data"]


@on_asyncio
async def test_native_cancellation_of_a_waiter(fake: FakeKernel, path: Path) -> None:
    """task.cancel() on a waiter: the pending flush is still there to be waited for."""
    async with opened(fake, path) as m:
        pending = await m.flush_async()
        with fake.hold("sync_data", times=1) as hold:
            task = asyncio.ensure_future(pending.wait())
            await entered(hold)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            hold.release.set()
        await pending
        assert pending.done


@only_linux
async def test_after_the_map_was_closed(fake: FakeKernel, path: Path) -> None:
    """A pending flush outlives its map: the memory is gone at once, the descriptor when the
    flush is done, and the bytes are durable then."""
    before = open_descriptors()
    async with opened(fake, path) as m:
        await m.write_at(0, b"x")
        pending = await m.flush_async()
    assert maps_of(path) == 0
    assert len(open_descriptors() - before) == 1
    assert not pending.done
    await pending
    assert pending.done
    assert fake.names(*SYNCS) == ["sync_data"]
    assert fake.disk.durable(path)[0] == ord("x")
    assert not open_descriptors() - before


async def test_closing_the_map_with_a_flush_makes_it_done(fake: FakeKernel, path: Path) -> None:
    """Leaving the map flushes what was written, and with it what was pending."""
    async with mapped_by(fake).open_path(path, "r+") as m:
        await m.write_at(0, b"x")
        pending = await m.flush_async()
    assert pending.done
    assert fake.names(*SYNCS) == ["sync_data"]


@only_linux
async def test_nobody_has_to_wait(fake: FakeKernel, path: Path) -> None:
    """Dropped, it leaves nothing behind: no warning, no descriptor, no flush."""
    before = open_descriptors()
    async with opened(fake, path) as m:
        for _ in range(100):
            await m.flush_async()
    gc.collect()
    assert not open_descriptors() - before
    assert not fake.names(*SYNCS)


async def test_nothing_to_flush(path: Path) -> None:
    """For maps whose stores reach no file, and for empty ranges, it is done from the start."""
    calls: list[Callable[[AsyncMmap], Awaitable[PendingFlush]]] = [
        lambda m: m.flush_async(),
        lambda m: m.flush_async_range(0, 10),
    ]
    for opening in (
        AsyncMmap.open_path(path),
        AsyncMmap.open_path(path, "c"),
        AsyncMmap.anonymous(MIB),
    ):
        async with opening as m:
            for call in calls:
                pending = await call(m)
                assert pending.done
                await pending
            assert m.statistics().writebacks_started == 0
    async with AsyncMmap.open_path(path, "r+") as m:
        assert (await m.flush_async_range(MIB, 0)).done


async def test_from_a_view(fake: FakeKernel, path: Path) -> None:
    """A view's offsets are its own; the pending flush outlives it."""
    async with opened(fake, path) as m:
        async with m.view_mut(2 * PAGE, 4 * PAGE) as v:
            v[PAGE] = 1
            pending = await v.flush_async_range(PAGE, 1)
        assert repr(pending) == f"<PendingFlush of bytes {3 * PAGE} to {3 * PAGE + 1}, pending>"
        await pending
        assert fake.disk.durable(path)[3 * PAGE] == 1


# Failures


async def test_a_failing_wait(fake: FakeKernel, path: Path) -> None:
    """The flush that wait() needs fails: FlushError, now and for ever, also after
    clear_flush_error and after a flush that went well."""
    async with opened(fake, path) as m:
        pending = await m.flush_async_range(5, 10)
        fake.fail("sync_range", errno.EIO, times=1)
        with pytest.raises(FlushError) as caught:
            await pending
        assert caught.value.ranges == ((5, 10),)
        await m.clear_flush_error()
        await m.flush()
        for _ in range(2):
            with pytest.raises(FlushError):
                await pending.wait()
        assert not pending.done
        assert repr(pending).endswith("failed>")


async def test_a_failure_of_another_range(fake: FakeKernel, path: Path) -> None:
    """What was not known to be durable when something of the map failed has failed too: the
    kernel does not say which pages it has dropped."""
    async with opened(fake, path) as m:
        done = await m.flush_async_range(0, 10)
        await done
        pending = await m.flush_async_range(5 * PAGE, 10)
        fake.fail("sync_range", errno.EIO, times=1)
        with pytest.raises(FlushError) as caught:
            await m.flush_range(9 * PAGE, 10)
        assert caught.value.ranges == ((5 * PAGE, 10), (9 * PAGE, 10))
        with pytest.raises(FlushError):
            await pending
        await done  # it was durable before


async def test_a_failure_while_the_write_back_is_started(fake: FakeKernel, path: Path) -> None:
    """A flush fails, and is acknowledged, between the call of flush_async and its result: the
    stores were made before that, so the result can never become durable."""
    async with opened(fake, path) as m:
        got: list[PendingFlush] = []

        async def start() -> None:
            got.append(await m.flush_async_range(0, 10))

        fake.fail("sync_data", errno.EIO, times=1)
        with fake.hold("start_write_back", times=1) as hold:
            async with anyio.create_task_group() as tasks:
                begin(tasks, start)
                await entered(hold)
                with pytest.raises(FlushError):
                    await m.flush()
                await m.clear_flush_error()
                hold.release.set()
        with pytest.raises(FlushError):
            await got[0]


async def test_failure_after_the_map_was_closed(fake: FakeKernel, path: Path) -> None:
    """With the map gone its failures are still latched for its pending flushes."""
    async with opened(fake, path) as m:
        one, two = await m.flush_async_range(0, 10), await m.flush_async_range(PAGE, 10)
    fake.fail("sync_data", errno.ENOSPC, times=1)
    for pending in (one, two, one):
        with pytest.raises(FlushError) as caught:
            await pending
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(path)
    assert fake.names(*SYNCS) == ["sync_data"]


# Truncated and resized


@pytest.mark.parametrize("closed", [False, True])
async def test_truncated(fake: FakeKernel, path: Path, closed: bool) -> None:
    """The file was cut by somebody else: TruncatedError, until it is long again; also after the
    map was closed."""
    m = await mapped_by(fake).open_path(path, "r+")
    pending = await m.flush_async_range(2 * PAGE, PAGE)
    inside = await m.flush_async_range(0, PAGE)
    if closed:
        await m.aclose(flush=False)
    os.truncate(path, PAGE)
    for _ in range(2):
        with pytest.raises(TruncatedError) as caught:
            await pending
        assert caught.value.size == PAGE
    await inside
    os.truncate(path, MIB)
    await pending
    assert pending.done
    await m.aclose(flush=False)


@pytest.mark.parametrize(("length", "call"), [(MIB, "sync_data"), (PAGE, "sync_range")])
async def test_truncated_while_the_disk_flushes(
    fake: FakeKernel, path: Path, length: int, call: str
) -> None:
    """The file is cut during the flush: wait() raises and does not return undone. What the file
    still has is done."""
    async with opened(fake, path) as m:
        pending = await m.flush_async_range(PAGE, length - PAGE if length == MIB else length)
        inside = await m.flush_async_range(PAGE, 5)
        with fake.hold(call, times=1) as hold:
            async with anyio.create_task_group() as tasks:
                waiter = begin(tasks, pending.wait)
                await entered(hold)
                os.truncate(path, PAGE + 10)
                hold.release.set()
        assert isinstance(waiter.error, TruncatedError)
        assert not pending.done
        assert inside.done
        await inside
        assert fake.names(*SYNCS) == [call]
        os.truncate(path, MIB)
        await pending
        assert pending.done


@pytest.mark.parametrize(("length", "call"), [(MIB, "sync_data"), (PAGE, "sync_range")])
async def test_resized_while_the_disk_flushes(
    fake: FakeKernel, path: Path, length: int, call: str
) -> None:
    """The map's own resize cuts the file during the flush: what is left is done, no error."""
    async with opened(fake, path) as m:
        pending = await m.flush_async_range(MIB - length, length)
        with fake.hold(call, times=1) as hold:
            async with anyio.create_task_group() as tasks:
                waiter = begin(tasks, pending.wait)
                await entered(hold)
                await m.resize(PAGE)
                hold.release.set()
        assert waiter.error is None
        assert pending.done


async def test_resized(fake: FakeKernel, path: Path) -> None:
    """The map's own resize cut it off: what is left is made durable, and that is no error."""
    async with opened(fake, path) as m:
        await m.write_at(0, b"x")
        pending = await m.flush_async()
        behind = await m.flush_async_range(MIB - PAGE, PAGE)
        await m.resize(PAGE)
        await pending
        await behind
        assert pending.done
        assert behind.done
        assert fake.disk.durable(path)[0] == ord("x")


# Elsewhere


def test_another_event_loop(path: Path) -> None:
    """A pending flush belongs to its map's event loop: elsewhere a RuntimeError says so."""

    async def start() -> PendingFlush:
        async with AsyncMmap.open_path(path, "r+") as m:
            pending = await m.flush_async()
            await m.aclose(flush=False)
            return pending

    pending = anyio.run(start)
    with pytest.raises(RuntimeError, match="another event loop"):
        anyio.run(pending.wait)


async def test_not_done_by_a_flush_after_a_truncation(tmp_path: Path) -> None:
    """Bytes that somebody has cut off are not durable, however many flushes succeed."""
    path = file_of(tmp_path, MIB)
    async with AsyncMmap.open_path(path, "r+") as m:
        await m.write_at(MIB - 1, b"x")
        pending = await m.flush_async()
        os.truncate(path, MIB // 2)
        with pytest.raises(TruncatedError):
            await pending
        await m.flush_range(0, MIB // 2)
        assert not pending.done
        with pytest.raises(TruncatedError):
            await pending
        os.truncate(path, MIB)
