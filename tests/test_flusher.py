"""Flushes of one map: group commit, failures that stay, and what each caller is told."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import anyio
import pytest
from anyio import CapacityLimiter
from anyio.lowlevel import checkpoint

from aiommap import AsyncMmap, FlushError, TruncatedError
from aiommap._flusher import BULK, Flusher
from aiommap._piece_size import PieceSize

from .cancelling import let_others_run, on_asyncio
from .content import at_rest, file_of, gone
from .fake_kernel import PATIENCE, FakeKernel
from .flushing import SYNCS, begin, entered, mapped_by, opened

pytestmark = pytest.mark.anyio

MIB = 1 << 20
PAGE = 4096

Calls = tuple[Callable[[], Awaitable[object]], ...]


@pytest.fixture
def fake() -> FakeKernel:
    return FakeKernel()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return file_of(tmp_path, MIB)


# Group commit


async def test_a_hundred_tasks_share_two_flushes(fake: FakeKernel, path: Path) -> None:
    """Of 100 tasks that commit at once, the first flushes, and the 99 that come meanwhile share
    one flush: two device flushes, counted at the kernel."""
    async with opened(fake, path) as m:

        async def commit(number: int) -> None:
            await m.write_at(number * PAGE, b"%064d" % number)
            await m.flush_range(number * PAGE, 64)

        with fake.hold("sync_range") as first:
            async with anyio.create_task_group() as tasks:
                begin(tasks, partial(commit, 0))
                await entered(first)
                others = [begin(tasks, partial(commit, n)) for n in range(1, 100)]
                while m.statistics().flushes_requested < 100:
                    await checkpoint()
                first.release.set()
        assert fake.names(*SYNCS) == ["sync_range", "sync_data"]
        assert not [each for each in others if each.error]
        assert m.statistics().flushes_done == 2


class SlowClock:
    """A clock by which every flush takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now


async def test_who_was_served_and_asks_again_shares_the_next_flush(
    fake: FakeKernel, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks that commit again and again do not fall into two halves that are served in turn:
    the next flush gives those who were just served a moment to ask again."""
    monkeypatch.setattr("aiommap._flusher.time", SlowClock())
    async with opened(fake, path) as m:

        async def commit_twice() -> None:
            await m.flush()
            await m.flush()

        with fake.hold("sync_data", times=1) as first:
            async with anyio.create_task_group() as tasks:
                begin(tasks, commit_twice)
                await entered(first)
                begin(tasks, m.flush)
                await let_others_run()
                first.release.set()
        assert fake.names(*SYNCS) == ["sync_data"] * 2


async def test_write_back_is_started_at_the_pace_of_the_loop(
    fake: FakeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than a MiB at a time, and the event loop has its turn before the next one."""
    path = file_of(tmp_path, 5 * MIB + PAGE)
    turns = 0
    at: list[tuple[int, int]] = []

    def start(real: Callable[..., None], fd: int, address: int, offset: int, length: int) -> None:
        at.append((length, turns))
        real(fd, address, offset, length)

    fake.wrap("start_write_back", start)
    async with opened(fake, path) as m:
        wait = m._core.flusher._wait_for_turns

        def counted(number: int, seconds: float) -> None:
            nonlocal turns
            turns += number
            wait(number, 60)

        monkeypatch.setattr(m._core.flusher, "_wait_for_turns", counted)
        await m.flush_async()
        assert at == [(MIB, 0), (MIB, 1), (MIB, 2), (MIB, 3), (MIB, 4), (PAGE, 5)]


async def test_a_request_is_served_by_a_flush_that_begins_after_it(path: Path) -> None:
    """A task that stores while a flush is under way is not told that it is durable when that
    one ends: it waits for the next, and its bytes are on the disk then."""
    fake = FakeKernel(durability=True)
    async with opened(fake, path) as m:
        await m.write_at(0, b"first")
        with fake.hold("sync_data", times=1) as first, fake.hold("sync_data", after=1) as second:
            async with anyio.create_task_group() as tasks:
                early = begin(tasks, m.flush)
                await entered(first)
                await m.write_at(PAGE, b"later")
                late = begin(tasks, m.flush)
                await let_others_run()
                first.release.set()
                await entered(second)
                await early.done.wait()
                assert fake.disk.durable(path)[: PAGE + 5] == b"first".ljust(PAGE, b"\0") + bytes(5)
                assert not late.done.is_set()
                second.release.set()
        assert fake.disk.durable(path)[PAGE : PAGE + 5] == b"later"
        assert len(fake.names("sync_data")) == 2


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([(0, 64)], ["sync_range"]),
        ([(0, 64), (32, 64), (96, 4)], ["sync_range"]),
        ([(0, 64), (8 * PAGE, 64)], ["sync_data"]),
        ([(0, MIB)], ["sync_data"]),
        ([(0, MIB // 2 - 1)], ["sync_range"]),
        ([(0, MIB // 2)], ["sync_data"]),
        ([(0, 0)], []),
    ],
)
async def test_which_call_flushes_a_batch(
    fake: FakeKernel, path: Path, ranges: list[tuple[int, int]], expected: list[str]
) -> None:
    """One short range is flushed by itself, so that it does not wait for what others dirtied;
    several, or half of the file, by one flush of the file."""
    async with opened(fake, path) as m:
        with fake.hold("sync_data") as first:
            async with anyio.create_task_group() as tasks:
                begin(tasks, m.flush)
                await entered(first)
                outcomes = [begin(tasks, partial(m.flush_range, *r)) for r in ranges]
                await let_others_run()
                first.release.set()
        assert [each.error for each in outcomes] == [None] * len(ranges)
        assert fake.names(*SYNCS)[1:] == expected


async def test_a_map_of_a_part_of_a_file(fake: FakeKernel, tmp_path: Path) -> None:
    """Flushing a map of a small part of a file flushes that part, not the rest of the file."""
    path = file_of(tmp_path, 64 * MIB, "large.bin")
    async with mapped_by(fake).open_path(path, "r+", offset=5 * MIB + 3, length=100) as m:
        await m.write_at(0, b"x" * 100)
        await m.flush()
    assert set(fake.names(*SYNCS)) == {"sync_range"}


async def test_flushes_while_views_are_out(fake: FakeKernel, path: Path) -> None:
    """A flush takes no region: under the task's own view, and while another task writes."""
    async with opened(fake, path) as m:
        async with m.view_mut(0, PAGE) as v:
            v[0:5] = b"hello"
            await v.flush()
            await m.flush()
        assert len(fake.names(*SYNCS)) == 2


# Cancelled waiters


async def test_a_cancelled_waiter_takes_nothing_with_it(fake: FakeKernel, path: Path) -> None:
    """Of three that wait for the same flush, one is cancelled; the others are served by it."""
    async with opened(fake, path) as m:
        with fake.hold("sync_data", times=1) as first:
            async with anyio.create_task_group() as tasks:
                begin(tasks, m.flush)
                await entered(first)
                waiters = [begin(tasks, m.flush) for _ in range(3)]
                await let_others_run()
                waiters[1].scope.cancel()
                await waiters[1].done.wait()  # at once: nothing was released
                assert first.waiting == 1
                first.release.set()
        assert [each.scope.cancelled_caught for each in waiters] == [False, True, False]
        assert len(fake.names(*SYNCS)) == 2


async def test_the_only_waiter_is_cancelled(fake: FakeKernel, path: Path) -> None:
    """A request that nobody waits for any more, and that no thread has taken, is dropped."""
    async with opened(fake, path) as m:
        with fake.hold("sync_data", times=1) as first:
            async with anyio.create_task_group() as tasks:
                served = begin(tasks, m.flush)
                await entered(first)
                cancelled = begin(tasks, m.flush)
                await let_others_run()
                cancelled.scope.cancel()
                await cancelled.done.wait()
                first.release.set()
                assert await served.get() is None
        await m.flush_range(0, 1)  # behind whatever is left in the queue
        assert fake.names(*SYNCS) == ["sync_data", "sync_range"]


async def test_the_error_of_a_cancelled_waiter_is_not_lost(fake: FakeKernel, path: Path) -> None:
    """The only task that waited for a failing flush is cancelled first: the next one is told."""
    async with opened(fake, path) as m:
        fake.fail("sync_data", errno.EIO, times=1)
        with fake.hold("sync_data", times=1) as hold:
            async with anyio.create_task_group() as tasks:
                cancelled = begin(tasks, m.flush)
                await entered(hold)
                cancelled.scope.cancel()
                await cancelled.done.wait()
                queued = begin(tasks, partial(m.flush_range, 0, 1))
                await let_others_run()
                hold.release.set()
        assert isinstance(await queued.get(), FlushError)
        with pytest.raises(FlushError):
            await m.flush()
        assert fake.names(*SYNCS) == ["sync_data"]


@on_asyncio
async def test_native_cancellation_of_a_waiter(fake: FakeKernel, path: Path) -> None:
    """task.cancel() ends the wait at once, leaves the flush to the others, and loses no error."""
    async with opened(fake, path) as m:
        fake.fail("sync_data", errno.EIO, times=1)
        with fake.hold("sync_data", times=1) as hold:
            in_flight = asyncio.ensure_future(m.flush())
            await entered(hold)
            waiting = [asyncio.ensure_future(m.flush()) for _ in range(2)]
            await let_others_run()
            for task in (in_flight, waiting[0]):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            hold.release.set()
            with pytest.raises(FlushError):
                await waiting[1]
        with pytest.raises(FlushError):
            await m.flush()


# Failures


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["sync_data", "sync_range", "start_write_back"])
async def test_a_failure_is_latched(fake: FakeKernel, path: Path, call: str, number: int) -> None:
    """After one failed flush or write-back every flush fails, although the kernel, asked again,
    would be content: it is not asked. The error says what, where, and in which file."""
    async with opened(fake, path) as m:
        first: dict[str, Callable[[], Awaitable[object]]] = {
            "sync_data": m.flush,
            "sync_range": partial(m.flush_range, 100, 50),
            "start_write_back": partial(m.flush_async_range, 100, 50),
        }
        fake.fail(call, number, times=1)
        with pytest.raises(FlushError) as caught:
            await first[call]()
        assert caught.value.errno == number
        assert caught.value.filename == str(path)
        assert caught.value.ranges == (((0, MIB),) if call == "sync_data" else ((100, 50),))
        calls = len(fake.calls)
        async with m.view(0, 10) as v:
            calls_again: Calls = (
                m.flush,
                m.flush_async,
                partial(m.flush_range, 0, 1),
                partial(m.flush_range, 0, 0),
                partial(m.flush_async_range, 0, 0),
                v.flush,
                v.flush_async,
            )
            for again in calls_again:
                with pytest.raises(FlushError) as caught:
                    await again()
                assert caught.value.errno == number
        assert not [c for c in list(fake.calls)[calls:] if c.name in (*SYNCS, "start_write_back")]


async def test_the_retry_lies(path: Path) -> None:
    """Why it is latched: the disk does not have what a second flush would have called durable."""
    fake = FakeKernel(durability=True)
    async with opened(fake, path) as m:
        await m.write_at(0, b"precious")
        fake.fail("sync_data", errno.EIO, times=1)
        with pytest.raises(FlushError):
            await m.flush()
        await m.clear_flush_error()
        await m.flush()  # the user said they know
        assert fake.disk.durable(path)[:8] == bytes(8)
        await m.write_at(0, b"restored")
        await m.flush()
        assert fake.disk.durable(path)[:8] == b"restored"


async def test_all_waiters_of_a_failing_batch_are_told(fake: FakeKernel, path: Path) -> None:
    """A flush that fails fails for all who share it, each with an exception of its own."""
    async with opened(fake, path) as m:
        fake.fail("sync_data", errno.EIO, after=1, times=1)
        with fake.hold("sync_data", times=1) as hold:
            async with anyio.create_task_group() as tasks:
                good = begin(tasks, m.flush)
                await entered(hold)
                bad = [begin(tasks, m.flush) for _ in range(5)]
                await let_others_run()
                hold.release.set()
        assert good.error is None
        assert all(isinstance(each.error, FlushError) for each in bad)
        assert len({id(each.error) for each in bad}) == 5


async def test_clearing_lets_flushes_through_again(fake: FakeKernel, path: Path) -> None:
    """clear_flush_error acknowledges: the next flush asks the kernel; a new failure is latched
    again."""
    async with opened(fake, path) as m:
        fake.fail("sync_data", errno.EIO, times=1)
        with pytest.raises(FlushError):
            await m.flush()
        await m.clear_flush_error()
        await m.flush()
        fake.fail("sync_data", errno.ENOSPC, times=1)
        for _ in range(2):
            with pytest.raises(FlushError) as caught:
                await m.flush()
            assert caught.value.errno == errno.ENOSPC


async def test_who_waited_through_a_failure_is_told_although_it_was_cleared(
    fake: FakeKernel, path: Path
) -> None:
    """A task that stored and asked before a failure hears of it, even if somebody else clears
    it before its turn: its bytes may be lost, and the flush it would get could not tell."""
    async with opened(fake, path) as m:
        flusher = m._core.flusher

        def clear_if_failed(_: object) -> None:
            if flusher._log.failure is not None:
                flusher.clear()  # as m.clear_flush_error() at the worst moment

        fake.before("file_size", clear_if_failed)
        fake.fail("sync_data", errno.EIO, times=1)
        with fake.hold("sync_data", times=1) as hold:
            async with anyio.create_task_group() as tasks:
                failing = begin(tasks, m.flush)
                await entered(hold)
                queued = begin(tasks, m.flush)
                await let_others_run()
                hold.release.set()
        assert isinstance(failing.error, FlushError)
        assert isinstance(queued.error, FlushError)
        await m.flush()


@pytest.mark.parametrize("clear", [False, True])
async def test_a_write_back_that_fails_during_a_flush(
    fake: FakeKernel, path: Path, clear: bool
) -> None:
    """A write-back that another task starts fails while a flush is under way: that flush finds
    the lost pages clean and succeeds at the kernel, but its task is told, cleared or not."""
    async with opened(fake, path) as m:
        fake.fail("start_write_back", errno.EIO, times=1)
        with fake.hold("sync_data", times=1) as hold:
            async with anyio.create_task_group() as tasks:
                flush = begin(tasks, m.flush)
                await entered(hold)
                with pytest.raises(FlushError):
                    await m.flush_async_range(0, 10)
                if clear:
                    await m.clear_flush_error()
                hold.release.set()
        assert isinstance(flush.error, FlushError)


async def test_an_error_of_ours_counts_as_a_failure(fake: FakeKernel, path: Path) -> None:
    """Whatever breaks in the middle of a flush, nobody is told that all is well: EIO."""

    def broken(real: object, fd: int) -> None:
        raise MemoryError

    async with opened(fake, path) as m:
        fake.wrap("sync_data", broken)
        for _ in range(2):
            with pytest.raises(FlushError) as caught:
                await m.flush()
            assert caught.value.errno == errno.EIO


async def test_a_file_that_cannot_be_looked_at_is_not_latched(fake: FakeKernel, path: Path) -> None:
    """An error before anything was flushed is the caller's alone; nothing was lost by it."""
    async with opened(fake, path) as m:
        fake.fail("file_size", errno.EIO, times=1)
        with pytest.raises(OSError, match=r"data\.bin") as caught:
            await m.flush()
        assert not isinstance(caught.value, FlushError)
        await m.flush()


@pytest.mark.parametrize("how", ["flush", "flush_async"])
async def test_the_file_cannot_be_measured_for_many(fake: FakeKernel, path: Path, how: str) -> None:
    """Each task gets an error of its own, with a traceback of its own, and who keeps one keeps no
    descriptor with it."""
    async with opened(fake, path) as m:
        fake.fail("file_size", errno.ESTALE)
        with fake.hold("file_size", times=1) as hold:
            async with anyio.create_task_group() as tasks:
                outcomes = [begin(tasks, getattr(m, how)) for _ in range(20)]
                await entered(hold)
                await let_others_run()
                hold.release.set()
        errors = [outcome.error for outcome in outcomes]
        assert {(error.errno, error.filename) for error in errors if error is not None} == {
            (errno.ESTALE, str(path))
        }
        assert len(set(map(id, errors))) == 20
        fake.heal()
    await gone(path)


async def test_a_failure_between_the_check_and_the_request(
    fake: FakeKernel, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails, and is cleared, in the very moment in which a flush is asked for is told."""
    async with opened(fake, path) as m:
        flusher = m._core.flusher
        real = Flusher.check
        moments = iter([True])

        def check(self: Flusher) -> None:
            real(self)
            if next(moments, False):
                self._failed(OSError(errno.EIO, ""), [(0, 1)])
                self.clear()

        monkeypatch.setattr(Flusher, "check", check)
        with pytest.raises(FlushError):
            await m.flush()
        assert next(moments, None) is None
        await m.flush()
        assert flusher.done == 1


# Truncated


@pytest.mark.parametrize("how", ["flush", "aclose", "leave"])
async def test_what_a_cut_file_still_has_is_flushed(how: str, path: Path) -> None:
    """One byte less is an error, and all the others are durable all the same: nobody might come
    again to flush them."""
    fake = FakeKernel(durability=True)
    m = await mapped_by(fake).open_path(path, "r+")
    await m.write_at(0, b"precious")
    os.truncate(path, MIB - 1)
    with pytest.raises(TruncatedError) as caught:
        if how == "leave":
            async with m:
                pass
        else:
            await getattr(m, how)()
    assert (caught.value.offset, caught.value.length, caught.value.size) == (0, MIB, MIB - 1)
    assert fake.disk.durable(path)[:8] == b"precious"
    await m.aclose(flush=False)


async def test_a_write_back_of_a_cut_file_that_fails(fake: FakeKernel, path: Path) -> None:
    """What the disk says counts for more than that the file is short: it stays."""
    async with opened(fake, path) as m:
        os.truncate(path, MIB - 1)
        fake.fail("sync_data", errno.EIO, times=1)
        for _ in range(2):
            with pytest.raises(FlushError):
                await m.flush()
        await m.clear_flush_error()
        with pytest.raises(TruncatedError):
            await m.flush()


async def test_truncated_each_time_until_long_again(fake: FakeKernel, path: Path) -> None:
    """The standard library's flush says nothing when the file was cut; this one does, every
    time, for what was cut off only, and is content when the file is long again."""
    async with opened(fake, path) as m:
        os.truncate(path, PAGE + 10)
        for _ in range(2):
            for call in (m.flush, m.flush_async, partial(m.flush_range, PAGE, 11)):
                with pytest.raises(TruncatedError) as caught:
                    await call()
                assert caught.value.size == PAGE + 10
                assert caught.value.filename == str(path)
            assert (caught.value.offset, caught.value.length) == (PAGE, 11)
            await m.flush_range(0, PAGE + 10)
            await m.flush_range(MIB, 0)
        os.truncate(path, MIB)
        await m.flush()
        await (await m.flush_async())


async def test_one_of_a_batch_is_truncated(fake: FakeKernel, path: Path) -> None:
    """Those whose bytes the file still has are served; the other is told."""
    async with opened(fake, path) as m:
        with fake.hold("sync_data", times=1) as hold:
            async with anyio.create_task_group() as tasks:
                begin(tasks, m.flush)
                await entered(hold)
                inside = begin(tasks, partial(m.flush_range, 0, 10))
                outside = begin(tasks, partial(m.flush_range, PAGE, 10))
                await let_others_run()
                os.truncate(path, PAGE)
                hold.release.set()
        assert inside.error is None
        assert isinstance(outside.error, TruncatedError)


@pytest.mark.parametrize(
    ("offset", "length", "call"),
    [(0, MIB, "sync_data"), (PAGE + 5, 20, "sync_range"), (0, PAGE + 20, "sync_range")],
)
async def test_truncated_while_the_disk_flushes(
    fake: FakeKernel, path: Path, offset: int, length: int, call: str
) -> None:
    """The file was long enough when the flush began and is not when it ends: what the kernel
    flushed of it may be less than what was asked for, and the task is told."""
    async with opened(fake, path) as m:
        with fake.hold(call, times=1) as hold:
            async with anyio.create_task_group() as tasks:
                flush = begin(tasks, partial(m.flush_range, offset, length))
                await entered(hold)
                os.truncate(path, PAGE + 10)
                hold.release.set()
        assert isinstance(flush.error, TruncatedError)
        assert (flush.error.offset, flush.error.length) == (offset, length)
        assert flush.error.size == PAGE + 10
        assert flush.error.filename == str(path)
        assert fake.names(*SYNCS) == [call]
        await m.flush_range(0, PAGE)  # nothing is latched
        os.truncate(path, MIB)
        await m.flush()


@pytest.mark.parametrize(
    ("offset", "call"), [(PAGE + 10, "sync_data"), (2 * PAGE, "sync_data"), (5, "sync_range")]
)
async def test_one_of_a_batch_is_truncated_while_the_disk_flushes(
    fake: FakeKernel, path: Path, offset: int, call: str
) -> None:
    """Those whose bytes the file still has are served by that flush; the other is told."""
    async with opened(fake, path) as m:
        with fake.hold("sync_data", times=1) as first, fake.hold(call, after=call == SYNCS[0]) as h:
            async with anyio.create_task_group() as tasks:
                begin(tasks, m.flush)
                await entered(first)
                inside = begin(tasks, partial(m.flush_range, 0, 10))
                outside = begin(tasks, partial(m.flush_range, offset, PAGE + 10))
                await let_others_run()
                first.release.set()
                await entered(h)
                os.truncate(path, PAGE + 10)
                h.release.set()
        assert inside.error is None
        assert isinstance(outside.error, TruncatedError)
        assert fake.names(*SYNCS) == ["sync_data", call]


@pytest.mark.parametrize(("length", "call"), [(MIB, "sync_data"), (PAGE, "sync_range")])
async def test_the_size_cannot_be_told_after_a_flush(
    fake: FakeKernel, path: Path, length: int, call: str
) -> None:
    """Then nothing is known to be durable: the task is told. It is no failed flush, and is not
    latched."""
    async with opened(fake, path) as m:
        with fake.hold(call, times=1) as hold:
            async with anyio.create_task_group() as tasks:
                flush = begin(tasks, partial(m.flush_range, 0, length))
                await entered(hold)
                fake.fail("file_size", errno.ESTALE, times=1)
                hold.release.set()
        assert flush.error is not None
        assert flush.error.errno == errno.ESTALE
        await m.flush()


async def test_a_map_that_shrinks_itself_is_not_truncated(fake: FakeKernel, path: Path) -> None:
    """A flush that waits while the map is made shorter is about what is left of it."""
    async with opened(fake, path) as m:
        with fake.hold("sync_data", times=1) as hold:
            async with anyio.create_task_group() as tasks:
                begin(tasks, m.flush)
                await entered(hold)
                whole = begin(tasks, m.flush)
                behind = begin(tasks, partial(m.flush_range, MIB - PAGE, 10))
                await let_others_run()
                await m.resize(PAGE)
                hold.release.set()
        assert whole.error is None
        assert behind.error is None
        await m.resize(MIB)
        await m.flush()


# Bulk


@pytest.fixture
def large(tmp_path: Path) -> Path:
    return file_of(tmp_path, 4 * BULK, "large.bin")


async def test_commits_get_their_turn_between_the_pieces_of_a_large_flush(
    fake: FakeKernel, large: Path
) -> None:
    """While 128 MiB are being flushed, another task's commit is done after one piece of them."""
    async with opened(fake, large) as m:
        with fake.hold("write_back", times=1) as first, fake.hold("write_back", after=1) as rest:
            async with anyio.create_task_group() as tasks:
                whole = begin(tasks, m.flush)
                await entered(first)
                commit = begin(tasks, partial(m.flush_range, 0, 64))
                await let_others_run()
                first.release.set()
                assert await commit.get() is None
                await entered(rest)
                assert not whole.done.is_set()
                assert fake.names(*SYNCS) == ["sync_range"]
                rest.release.set()
        assert fake.names(*SYNCS) == ["sync_range", "sync_data"]
        starts = {call.arguments[2:] for call in fake.calls if call.name in ("write_back",)}
        assert sum(length for _, length in starts) == 4 * BULK


async def test_large_flushes_are_shared(fake: FakeKernel, large: Path) -> None:
    """Who asks for the same in the middle of a large flush joins it: nothing is written twice,
    and one device flush, which begins after the last of them, serves all."""
    async with opened(fake, large) as m:
        with fake.hold("write_back", times=1) as first:
            async with anyio.create_task_group() as tasks:
                begin(tasks, m.flush)
                await entered(first)
                others = [
                    begin(tasks, m.flush),
                    begin(tasks, partial(m.flush_range, BULK - 10, 2 * BULK)),
                ]
                await let_others_run()
                first.release.set()
        assert [each.error for each in others] == [None, None]
        assert fake.names(*SYNCS) == ["sync_data"]
        written = [call.arguments[2:] for call in fake.calls if call.name == "write_back"]
        assert len(written) == len(set(written))
        assert sum(length for _, length in written) == 4 * BULK


async def test_a_large_flush_that_nobody_wants_stops(fake: FakeKernel, large: Path) -> None:
    """Cancelled in the middle, a large flush leaves the rest, and others are served."""
    async with opened(fake, large) as m:
        with fake.hold("write_back", times=1) as first:
            async with anyio.create_task_group() as tasks:
                whole = begin(tasks, m.flush)
                await entered(first)
                whole.scope.cancel()
                await whole.done.wait()
                first.release.set()
                await m.flush_range(0, 64)
        await m.flush_range(0, 64)
        assert fake.names("write_back") == ["write_back"]
        assert set(fake.names(*SYNCS)) == {"sync_range"}
        await m.flush()  # and the next one starts from the beginning
        assert fake.names(*SYNCS)[-1] == "sync_data"


async def test_one_of_two_who_want_a_large_flush_is_cancelled(
    fake: FakeKernel, large: Path
) -> None:
    """The other is served."""
    async with opened(fake, large) as m:
        with fake.hold("write_back", times=1) as first:
            async with anyio.create_task_group() as tasks:
                one = begin(tasks, m.flush)
                await entered(first)
                two = begin(tasks, m.flush)
                await let_others_run()
                one.scope.cancel()
                await one.done.wait()
                first.release.set()
                assert await two.get() is None
        assert fake.names(*SYNCS) == ["sync_data"]


@pytest.mark.parametrize("call", ["write_back", "start_write_back"])
async def test_a_piece_that_fails(fake: FakeKernel, large: Path, call: str) -> None:
    """A large flush whose second piece fails raises, without a device flush, and it is latched:
    for whoever commits in the middle of it, too."""
    async with opened(fake, large) as m:
        fake.fail(call, errno.ENOSPC, after=1, times=1)
        with fake.hold("write_back", times=1) as first:
            async with anyio.create_task_group() as tasks:
                whole = begin(tasks, m.flush)
                if call == "write_back":
                    await entered(first)
                    first.release.set()
        assert isinstance(whole.error, FlushError)
        assert whole.error.errno == errno.ENOSPC
        assert whole.error.ranges == ((0, 4 * BULK),)
        with pytest.raises(FlushError):
            await m.flush_range(0, 1)
        assert not fake.names(*SYNCS)


async def test_truncated_in_the_middle_of_a_large_flush(fake: FakeKernel, large: Path) -> None:
    """The file is cut while it is being flushed: the task is told, and nothing is latched."""
    async with opened(fake, large) as m:
        with fake.hold("write_back", times=1) as first:
            async with anyio.create_task_group() as tasks:
                whole = begin(tasks, m.flush)
                await entered(first)
                os.truncate(large, BULK)
                first.release.set()
        assert isinstance(whole.error, TruncatedError)
        await m.flush_range(0, 10)


def _let_the_loop_run(m: AsyncMmap, _: object) -> None:
    """In a worker. No piece is as quick as with a fake: the loop hears of it before the next."""
    ran = threading.Event()
    m._core.loop.post(ran.set)
    assert ran.wait(PATIENCE)


async def test_a_large_flush_leaves_the_only_token_to_others(fake: FakeKernel, large: Path) -> None:
    """With a limiter of one thread, work of others is done between two pieces, and the large
    flush then goes on where it was."""
    limiter = CapacityLimiter(1)
    async with opened(fake, large, limiter) as m:
        fake.before("write_back", partial(_let_the_loop_run, m))
        with fake.hold("write_back", times=1) as first, fake.hold("write_back", after=2) as rest:
            async with anyio.create_task_group() as tasks:
                whole = begin(tasks, m.flush)
                await entered(first)
                size = begin(tasks, m.file_size)
                await let_others_run()
                first.release.set()
                await size.done.wait()
                assert not whole.done.is_set()
                rest.release.set()
                assert await whole.get() is None
        written = [call.arguments[2:] for call in fake.calls if call.name == "write_back"]
        assert len(written) == len(set(written)) > 2
        assert fake.names(*SYNCS) == ["sync_data"]
    await at_rest(limiter)


async def test_a_large_flush_is_cancelled_while_others_have_the_token(
    fake: FakeKernel, large: Path
) -> None:
    """It has given its thread away in the middle and is cancelled before it gets one again: the
    next flushes are good, and do all of it."""
    limiter = CapacityLimiter(1)
    async with opened(fake, large, limiter) as m:
        fake.before("write_back", partial(_let_the_loop_run, m))
        with fake.hold("write_back", times=1) as first, fake.hold("file_size", times=1) as token:
            async with anyio.create_task_group() as tasks:
                whole = begin(tasks, m.flush)
                await entered(first)
                size = begin(tasks, m.file_size)
                await let_others_run()
                first.release.set()
                await entered(token)
                whole.scope.cancel()
                await whole.done.wait()
                commit = begin(tasks, partial(m.flush_range, 0, 10))
                again = begin(tasks, m.flush)
                await let_others_run()
                assert not size.done.is_set()
                token.release.set()
        assert [size.error, commit.error, again.error] == [None] * 3
        assert fake.names(*SYNCS)[-1] == "sync_data"
    await at_rest(limiter)


async def test_many_commits_in_the_middle_of_a_large_flush(fake: FakeKernel, large: Path) -> None:
    """A few are flushed one by one, so that they do not wait for the rest of it; very many take
    one flush of the file, because a hundred flushes would last longer than that."""
    async with opened(fake, large) as m:
        for count, expected in ((16, ["sync_range"] * 16), (17, ["sync_data"])):
            before = len(fake.names(*SYNCS))
            with fake.hold("write_back", times=1) as first:
                async with anyio.create_task_group() as tasks:
                    begin(tasks, m.flush)
                    await entered(first)
                    for number in range(count):
                        begin(tasks, partial(m.flush_range, number * 10 * PAGE, 1))
                    await let_others_run()
                    first.release.set()
            assert fake.names(*SYNCS)[before:] == [*expected, "sync_data"]


# The loop


async def test_the_loop_never_flushes(fake: FakeKernel, large: Path) -> None:
    """No sync, write-back or start of one runs in the event loop's thread."""
    async with opened(fake, large) as m:
        await m.write_at(0, b"x")
        await m.flush()
        await m.flush_range(0, 10)
        await (await m.flush_async())
        await m.aclose()
    here = threading.get_ident()
    durability = (*SYNCS, "start_write_back", "write_back")
    assert [c for c in fake.calls if c.name in durability]
    assert not [c for c in fake.calls if c.name in durability and c.thread == here]


async def test_every_flush_is_a_checkpoint(fake: FakeKernel, path: Path) -> None:
    """Flushes with nothing to do let others run, and raise a cancellation, like any other."""
    async with opened(fake, path) as m, AsyncMmap.open_path(path) as read_only:
        for call in (
            m.flush,
            m.flush_async,
            partial(m.flush_range, 0, 0),
            partial(m.flush_async_range, 0, 0),
            read_only.flush,
            read_only.flush_async,
            m.clear_flush_error,
        ):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await call()
            assert scope.cancelled_caught


async def test_statistics_count(fake: FakeKernel, path: Path) -> None:
    """What was asked for, what the device did, and how many write-backs were started."""
    async with opened(fake, path) as m:
        await m.flush()
        await m.flush_range(0, 0)
        pending = await m.flush_async()
        fake.fail("sync_data", errno.EIO, times=1)
        with pytest.raises(FlushError):
            await pending.wait()
        statistics = m.statistics()
        assert statistics.flushes_requested == 2
        assert statistics.flushes_done == 1
        assert statistics.writebacks_started == 1


async def test_a_large_flush_that_nobody_wants_any_more_is_let_go(
    fake: FakeKernel, large: Path
) -> None:
    """Cancelled in the moment in which it is put back for others' sake, it keeps no descriptor."""
    limiter = CapacityLimiter(1)
    async with opened(fake, large, limiter) as m:
        with (
            fake.hold("write_back", times=1) as first,
            fake.hold("write_back", after=1, times=1) as second,
        ):
            async with anyio.create_task_group() as tasks:
                whole = begin(tasks, m.flush)
                await entered(first)
                begin(tasks, m.file_size)  # which waits for the only token
                while not limiter.statistics().tasks_waiting:
                    await checkpoint()
                first.release.set()
                await entered(second)
                # The crew has heard by then that others wait.
                while not m._core.flusher._crew._yielding:
                    await checkpoint()
                whole.scope.cancel()
                await whole.done.wait()
                second.release.set()
    await at_rest(limiter)
    assert m._core.flusher._bulk.requests == []
    await gone(large)


async def test_a_mistake_in_the_middle_of_a_large_flush(
    fake: FakeKernel, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory, say: the task is told, and the next flush begins anew."""

    def took(self: PieceSize, *_: object) -> None:
        monkeypatch.undo()
        raise MemoryError

    async with opened(fake, large) as m:
        monkeypatch.setattr(PieceSize, "took", took)
        with pytest.raises(MemoryError):
            await m.flush()
        assert m._core.flusher._bulk.requests == []
        await m.flush()
        assert m.statistics().flushes_done == 1
