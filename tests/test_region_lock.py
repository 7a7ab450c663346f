"""The region lock as tasks see it, on every event loop."""

from __future__ import annotations

import asyncio
import gc
import operator
import sys
import threading
import types
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import suppress
from typing import Any, cast

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from anyio import TASK_STATUS_IGNORED, ClosedResourceError, WouldBlock
from anyio.abc import TaskGroup, TaskStatus

from aiommap import DeadlockError, RegionLease, RegionLock, RegionLockStatistics
from aiommap._claim_lock import GRANTS_PER_YIELD, ClaimLock
from aiommap._event_loop import Parking
from aiommap._region_lock import RegionRequest
from aiommap._wait_graph import HELD, Claim

from .between_steps import between_steps

pytestmark = pytest.mark.anyio

Record = list[str]


async def until(condition: Callable[[], bool]) -> None:
    """Let the others run until it is so."""
    with anyio.fail_after(20):
        while not condition():
            await anyio.lowlevel.checkpoint()


async def queued(lock: RegionLock, number: int) -> None:
    """Until so many requests wait."""
    await until(lambda: lock.statistics().waiting == number)


def assert_unused(lock: RegionLock) -> None:
    now = lock.statistics()
    assert (now.held_shared, now.held_exclusive, now.waiting) == (0, 0, 0)
    lock._claims.queue._check()
    assert not lock._claims.queue._claims()


async def hold(
    request: RegionRequest | RegionLease,
    name: str,
    record: Record,
    leave: anyio.Event,
    *,
    task_status: TaskStatus[None] = TASK_STATUS_IGNORED,
) -> None:
    """Hold a region until told to leave; started when it is held."""
    async with request:
        record.append(name)
        task_status.started()
        await leave.wait()
    record.append(f"-{name}")


# The basics


async def test_await_and_async_with() -> None:
    """A request is awaited or entered; the lease says what it holds; leaving frees it."""
    lock = RegionLock()
    lease = await lock.shared(-5, 10**30)
    assert (lease.start, lease.stop, lease.exclusive) == (-5, 10**30, False)
    lease.release()
    async with lock.exclusive(0, 1) as lease:
        assert (lease.start, lease.stop, lease.exclusive) == (0, 1, True)
        assert lock.statistics() == RegionLockStatistics(0, 1, 0, 0)
    assert_unused(lock)


async def test_leaving_frees_when_the_block_fails() -> None:
    """An exception passes through and the region is free."""
    lock = RegionLock()
    with pytest.raises(KeyError, match="mine"):
        async with lock.exclusive(0, 1):
            raise KeyError("mine")
    assert_unused(lock)


async def test_lease_that_ended_inside_its_block() -> None:
    """Releasing or splitting inside the block is fine; leaving does nothing then."""
    lock = RegionLock()
    async with lock.exclusive(0, 2) as lease:
        lease.release()
    async with lock.exclusive(0, 2) as lease:
        left, right = lease.split_at(1)
    assert lock.statistics().held_exclusive == 2
    left.release()
    right.release()
    assert_unused(lock)


async def test_empty_ranges_conflict_with_nothing() -> None:
    """A lease of nothing is granted at once and holds nobody up, wherever it lies."""
    lock = RegionLock()
    async with lock.exclusive(0, 10), lock.exclusive(5, 5), lock.exclusive(5, 5) as empty:
        assert (empty.start, empty.stop) == (5, 5)
        left, right = empty.split_at(5)
        left.restrict(5, 5)
        left.downgrade()
        left.release()
        right.release()
    assert_unused(lock)


@pytest.mark.parametrize("ask", ["shared", "exclusive", "shared_nowait", "exclusive_nowait"])
async def test_arguments_are_checked_when_called(ask: str) -> None:
    """Wrong arguments raise in the call itself, before anything is awaited."""
    lock = RegionLock()
    call: Callable[[Any, Any], object] = getattr(lock, ask)
    with pytest.raises(ValueError, match="start 3 is greater than stop 2"):
        call(3, 2)
    with pytest.raises(TypeError, match=r"stop must be an integer, not 2\.5"):
        call(1, 2.5)
    with pytest.raises(TypeError, match="start must be an integer, not True"):
        call(True, 3)
    assert_unused(lock)


async def test_request_runs_once() -> None:
    """A second await or enter of a request raises; one never awaited leaves nothing behind."""
    lock = RegionLock()
    request = lock.exclusive(0, 1)
    assert repr(request) == "<RegionRequest [0, 1) exclusive>"
    (await request).release()
    assert repr(request) == "<RegionRequest used>"
    with pytest.raises(RuntimeError, match="make a new one"):
        await request
    with pytest.raises(RuntimeError, match="make a new one"):
        async with request:
            pytest.fail("entered twice")
    lock.exclusive(0, 1)
    assert_unused(lock)


async def test_lease_that_ended_is_refused() -> None:
    """Everything but leaving raises on a lease that was released."""
    lock = RegionLock()
    lease = await lock.exclusive(0, 1)
    assert repr(lease) == "<RegionLease [0, 1) exclusive>"
    lease.release()
    assert repr(lease) == "<RegionLease ended>"
    uses: list[Callable[[], object]] = [
        lease.release,
        lease.downgrade,
        lambda: lease.split_at(0),
        lambda: lease.restrict(0, 1),
        lambda: lease.start,
        lambda: lease.stop,
        lambda: lease.exclusive,
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match="this lease has ended"):
            use()
    with pytest.raises(RuntimeError, match="this lease has ended"):
        async with lease:
            pytest.fail("entered after its end")


async def test_split_and_restrict_stay_inside() -> None:
    """split_at() and restrict() refuse what is outside, and nothing has changed then."""
    lock = RegionLock()
    async with lock.exclusive(10, 20) as lease:
        with pytest.raises(ValueError, match=r"cannot split \[10, 20\) at 21, which is outside"):
            lease.split_at(21)
        with pytest.raises(ValueError, match=r"\[9, 20\) is not inside the lease of \[10, 20\)"):
            lease.restrict(9, 20)
        with pytest.raises(ValueError, match="start 12 is greater than stop 11"):
            lease.restrict(12, 11)
        assert (lease.start, lease.stop) == (10, 20)


async def test_nowait() -> None:
    """The nowait forms take what is free and raise WouldBlock where they would wait."""
    lock = RegionLock()
    record: Record = []
    leave = anyio.Event()
    async with anyio.create_task_group() as tg:
        await tg.start(hold, lock.shared(0, 10), "reader", record, leave)
        tg.start_soon(hold, lock.exclusive(5, 15), "writer", record, leave)
        await queued(lock, 1)
        for ask in (lock.exclusive_nowait, lock.shared_nowait):
            with pytest.raises(WouldBlock):
                ask(14, 20)
        with pytest.raises(WouldBlock):
            lock.exclusive_nowait(0, 1)
        lock.shared_nowait(0, 1).release()
        lock.exclusive_nowait(15, 20).release()
        leave.set()
    assert_unused(lock)


async def test_repr_and_statistics() -> None:
    """A lock shows what is held, what waits, and the longest queue there ever was."""
    lock = RegionLock()
    leave = anyio.Event()
    async with anyio.create_task_group() as tg:
        await tg.start(hold, lock.shared(0, 10), "reader", [], leave)
        await tg.start(hold, lock.exclusive(10, 20), "writer", [], leave)
        for _ in range(3):
            tg.start_soon(hold, lock.exclusive(0, 20), "all", [], leave)
        await queued(lock, 3)
        assert repr(lock) == "<RegionLock held shared 1, held exclusive 1, waiting 3>"
        assert lock.statistics() == RegionLockStatistics(1, 1, 3, 3)
        leave.set()
    assert lock.statistics() == RegionLockStatistics(0, 0, 0, 3)


# Fairness


async def test_writer_against_a_stream_of_readers() -> None:
    """A writer waits for the readers before it, not for those who keep coming."""
    lock = RegionLock()
    record: Record = []
    leave = [anyio.Event() for _ in range(3)]
    async with anyio.create_task_group() as tg:
        await tg.start(hold, lock.shared(0, 10), "first", record, leave[0])
        await tg.start(hold, lock.shared(5, 15), "second", record, leave[1])
        tg.start_soon(hold, lock.exclusive(0, 20), "writer", record, leave[2])
        await queued(lock, 1)
        for n in range(20):
            tg.start_soon(hold, lock.shared(n, n + 1), "late", record, leave[2])
            await queued(lock, n + 2)
        leave[0].set()
        await until(lambda: "-first" in record)
        assert record == ["first", "second", "-first"]
        leave[1].set()
        await until(lambda: "writer" in record)
        assert record[3:] == ["-second", "writer"]
        leave[2].set()
    assert record[5] == "-writer"
    assert record[6:26] == ["late"] * 20
    assert_unused(lock)


async def test_everything_against_hammering_narrow_requests() -> None:
    """A request for everything comes to its turn while narrow ones come in all the time."""
    lock = RegionLock()
    stop = False

    async def hammer(n: int) -> None:
        while not stop:
            async with lock.exclusive(n, n + 1):
                await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tg:
        for n in range(10):
            tg.start_soon(hammer, n)
        await until(lambda: lock.statistics().held_exclusive > 5)
        for _ in range(5):
            async with lock.exclusive(-(10**9), 10**9):
                assert lock.statistics().held_exclusive == 1
        stop = True
    assert_unused(lock)


async def test_blocked_head_does_not_delay_disjoint_requests() -> None:
    """Who is behind a waiting request in time but not in range is granted at once."""
    lock = RegionLock()
    record: Record = []
    leave = anyio.Event()
    async with anyio.create_task_group() as tg:
        await tg.start(hold, lock.exclusive(0, 10), "holder", record, leave)
        tg.start_soon(hold, lock.exclusive(5, 15), "head", record, leave)
        await queued(lock, 1)
        await tg.start(hold, lock.exclusive(15, 20), "disjoint", record, leave)
        assert record == ["holder", "disjoint"]
        leave.set()


async def test_readers_that_queue_together_run_together() -> None:
    """All readers behind a writer hold their regions at the same time after it."""
    lock = RegionLock()
    record: Record = []
    leave_writer, leave = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as tg:
        await tg.start(hold, lock.exclusive(0, 100), "writer", record, leave_writer)
        for n in range(10):
            tg.start_soon(hold, lock.shared(n, 50 + n), "reader", record, leave)
        await queued(lock, 10)
        leave_writer.set()
        await until(lambda: record.count("reader") == 10)
        assert lock.statistics().held_shared == 10
        leave.set()


async def test_order_is_order_of_arrival_where_ranges_overlap() -> None:
    """Writers on one range, and those that overlap it, follow one another as they came."""
    lock = RegionLock()
    record: Record = []
    leave, gone = anyio.Event(), anyio.Event()
    gone.set()
    async with anyio.create_task_group() as tg:
        await tg.start(hold, lock.exclusive(0, 100), "holder", record, leave)
        for n in range(20):
            request = lock.exclusive(n, 50) if n % 2 else lock.exclusive(25, 75 + n)
            tg.start_soon(hold, request, str(n), record, gone)
            await queued(lock, n + 1)
        leave.set()
    assert [name for name in record[2:] if name[0] != "-"] == [str(n) for n in range(20)]


async def test_one_wake_up_per_grant() -> None:
    """A release wakes those whom it grants, each once, and no one else."""
    lock = RegionLock()
    record: Record = []
    leave, gone = anyio.Event(), anyio.Event()
    gone.set()
    woken: list[object] = []

    class Spy:
        def __init__(self, parking: Parking) -> None:
            self.parking = parking

        def wake(self) -> None:
            woken.append(self)
            self.parking.wake()

    async with anyio.create_task_group() as tg:
        await tg.start(hold, lock.exclusive(0, 100), "holder", record, leave)
        for n in range(30):
            tg.start_soon(hold, lock.exclusive(n % 3, 10), str(n), record, gone)
        await queued(lock, 30)
        for lead in lock._claims.queue._waiting:
            assert lead.links is not None
            lead.links.waiter = Spy(lead.links.waiter)
        leave.set()
    assert len(woken) == len(set(map(id, woken))) == 30


# Yielding


async def test_free_region_yields_exactly_once() -> None:
    """By default each uncontended request lets every other task have one turn."""
    lock = RegionLock()
    turns = 0
    stop = False

    async def other() -> None:
        nonlocal turns
        while not stop:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tg:
        tg.start_soon(other)
        await until(lambda: turns > 2)
        before = turns
        for n in range(50):
            async with lock.exclusive(n, n + 1):
                pass
        # A turn sooner or later, as trio shuffles.
        assert abs(turns - before - 50) <= 1
        stop = True


async def test_fast_lock_lets_others_run_now_and_then() -> None:
    """A fast lock does not yield, but for once in so many grants: a loop starves nobody."""
    lock = RegionLock(fast_acquire=True)
    turns = 0
    stop = False

    async def other() -> None:
        nonlocal turns
        while not stop:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tg:
        tg.start_soon(other)
        await until(lambda: turns > 2)
        before = turns
        for n in range(GRANTS_PER_YIELD - 1):
            async with lock.exclusive(n, n + 1):
                pass
        assert turns == before
        for n in range(10 * GRANTS_PER_YIELD):
            (await lock.shared(n, n + 1)).release()
        assert abs(turns - before - 10) <= 1
        stop = True


# Cancellation


@pytest.mark.parametrize("order", ["cancel", "cancel, release", "release, cancel"])
@pytest.mark.parametrize("mode", ["shared", "exclusive"])
async def test_cancelled_waiter_leaves_no_trace(order: str, mode: str) -> None:
    """Cancelled before, or in the same tick as its grant, a waiter passes the region on."""
    lock = RegionLock()
    record: Record = []
    leave, forever = anyio.Event(), anyio.Event()
    scope = anyio.CancelScope()

    async def victim() -> None:
        with scope:
            await hold(getattr(lock, mode)(0, 10), "victim", record, forever)

    async with anyio.create_task_group() as tg:
        lease = await lock.exclusive(0, 10)
        tg.start_soon(victim)
        await queued(lock, 1)
        tg.start_soon(hold, lock.exclusive(5, 6), "next", record, leave)
        await queued(lock, 2)
        for action in order.split(", "):
            scope.cancel() if action == "cancel" else lease.release()
        if order == "cancel":
            await queued(lock, 1)
            lease.release()
        await until(lambda: "next" in record)
        leave.set()
    # On trio, who was granted first gets its region and is cancelled after that.
    assert [name for name in record if "victim" not in name] == ["next", "-next"]
    assert_unused(lock)


async def test_cancelled_writer_lets_the_readers_behind_it_go() -> None:
    """Readers that wait for a waiting writer only go on when it gives up."""
    lock = RegionLock()
    record: Record = []
    leave, forever = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as tg:
        await tg.start(hold, lock.shared(0, 10), "reader", record, leave)
        async with anyio.create_task_group() as writer:
            writer.start_soon(hold, lock.exclusive(0, 10), "writer", record, forever)
            await queued(lock, 1)
            tg.start_soon(hold, lock.shared(0, 10), "behind", record, leave)
            await queued(lock, 2)
            writer.cancel_scope.cancel()
        await until(lambda: "behind" in record)
        leave.set()
    assert_unused(lock)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("how", ["await", "async with", "ranges"])
async def test_grant_that_meets_a_cancellation_is_given_back(fast: bool, how: str) -> None:
    """A cancelled scope gets no region, or one that it leaves again."""
    lock = RegionLock(fast_acquire=fast)
    with anyio.CancelScope() as scope:
        scope.cancel()
        if how == "await":
            (await lock.exclusive(0, 1)).release()
        elif how == "ranges":
            claims = lock._claims
            claims.release(await claims.acquire_ranges([(0, 1, True), (2, 3, False)]))
        else:
            async with lock.exclusive(0, 1):
                pass
    assert_unused(lock)


def asyncio_only(backend_name: str) -> None:
    if backend_name != "asyncio":
        pytest.skip("native cancellation is asyncio's")


@pytest.mark.parametrize("how", ["await", "async with"])
async def test_native_cancellation_of_the_yield(backend_name: str, how: str) -> None:
    """task.cancel() that meets the yield after a grant gives the grant back."""
    asyncio_only(backend_name)
    lock = RegionLock()

    async def victim() -> None:
        if how == "await":
            await lock.exclusive(0, 1)
        async with lock.exclusive(0, 1):
            pass
        pytest.fail("not cancelled")

    task = asyncio.create_task(victim())
    await until(lambda: lock.statistics().held_exclusive == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert_unused(lock)


@pytest.mark.parametrize("order", ["cancel", "cancel, release", "release, cancel"])
async def test_native_cancellation_of_a_waiter(backend_name: str, order: str) -> None:
    """task.cancel() before or in the same tick as the grant passes the region on."""
    asyncio_only(backend_name)
    lock = RegionLock()
    forever = anyio.Event()
    record: Record = []
    lease = await lock.exclusive(0, 10)
    task = asyncio.create_task(hold(lock.exclusive(0, 10), "victim", record, forever))
    await queued(lock, 1)
    forever.set()
    other = asyncio.create_task(hold(lock.exclusive(0, 10), "next", record, forever))
    await queued(lock, 2)
    for action in order.split(", "):
        task.cancel() if action == "cancel" else lease.release()
    if order == "cancel":
        await queued(lock, 1)
        lease.release()
    with pytest.raises(asyncio.CancelledError):
        await task
    await other
    assert record == ["next", "-next"]
    assert_unused(lock)


async def test_native_timeout_around_a_waiter(backend_name: str) -> None:
    """asyncio.timeout() that ends while a task waits leaves no trace."""
    asyncio_only(backend_name)
    lock = RegionLock()
    async with anyio.create_task_group() as tg:
        leave = anyio.Event()
        await tg.start(hold, lock.exclusive(0, 1), "holder", [], leave)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await lock.exclusive(0, 1)
        assert lock.statistics().waiting == 0
        leave.set()
    assert_unused(lock)


async def test_storm_of_cancellations() -> None:
    """Hundreds of tasks that wait, hold and are cancelled at any point leave an unused lock."""
    lock = RegionLock()
    inside: dict[int, tuple[int, int, bool]] = {}

    async def worker(n: int, tg: TaskGroup) -> None:
        start, exclusive = n * 7 % 40, n % 3 == 0
        stop = start + 1 + n % 13
        async with (lock.exclusive if exclusive else lock.shared)(start, stop):
            for low, high, alone in inside.values():
                assert high <= start or stop <= low or not (exclusive or alone)
            inside[n] = start, stop, exclusive
            try:
                for _ in range(n % 4):
                    await anyio.lowlevel.checkpoint()
            finally:
                del inside[n]
        if n % 5 == 0:
            tg.cancel_scope.cancel()

    async with anyio.create_task_group() as outer:
        for group in range(20):

            async def run(group: int = group) -> None:
                async with anyio.create_task_group() as tg:
                    for n in range(20):
                        tg.start_soon(worker, 20 * group + n + 1, tg)

            outer.start_soon(run)
    assert_unused(lock)


# Ownership and deadlocks


async def test_own_hold_is_a_deadlock() -> None:
    """A task that asks for what it holds in a conflicting way is told at once."""
    lock = RegionLock()
    async with lock.exclusive(0, 10):
        for ask in (lock.shared, lock.exclusive):
            with pytest.raises(DeadlockError, match=r"holds \[0, 10\) exclusive itself"):
                await ask(9, 11)
        for ask_now in (lock.shared_nowait, lock.exclusive_nowait):
            with pytest.raises(DeadlockError, match=r"holds \[0, 10\) exclusive itself"):
                ask_now(9, 11)
    async with lock.shared(0, 10):
        with pytest.raises(DeadlockError, match=r"holds \[0, 10\) shared itself"):
            async with lock.exclusive(5, 6):
                pytest.fail("upgraded")
    assert_unused(lock)


async def test_reader_passes_a_writer_that_waits_for_it() -> None:
    """Bytes held shared are free for further shared requests of the task."""
    lock = RegionLock()
    leave = anyio.Event()
    leave.set()
    record: Record = []
    async with anyio.create_task_group() as tg:
        async with lock.shared(0, 10):
            tg.start_soon(hold, lock.exclusive(5, 20), "writer", record, leave)
            await queued(lock, 1)
            async with lock.shared(0, 10):
                lock.shared_nowait(2, 7).release()
                assert lock._claims.check_free(3, 6, False)
            with pytest.raises(DeadlockError, match="asks for"):
                await lock.shared(8, 12)
            assert record == []
    assert_unused(lock)


async def test_a_deadlock_is_not_found_while_another_one_is_handled() -> None:
    """The request is made a second time after some turns; what comes then has no context."""
    lock = RegionLock()
    async with lock.shared(0, 10):
        with pytest.raises(DeadlockError) as caught:
            await lock.exclusive(0, 10)
        assert caught.value.__context__ is None
        with anyio.CancelScope() as scope:
            scope.cancel()
            with pytest.raises(anyio.get_cancelled_exc_class()) as cancelled:
                await lock.exclusive(0, 10)
            assert not isinstance(cancelled.value.__context__, DeadlockError)
    assert_unused(lock)


async def test_cycle_of_waits() -> None:
    """Of two tasks that want what the other holds the later one gets DeadlockError."""
    lock = RegionLock()
    record: Record = []
    ready = anyio.Event()

    async def first() -> None:
        async with lock.exclusive(0, 10):
            await ready.wait()
            async with lock.exclusive(10, 20):
                record.append("first has both")

    async with anyio.create_task_group() as tg:
        tg.start_soon(first, name="the first")
        async with lock.exclusive(10, 20):
            await until(lambda: lock.statistics().held_exclusive == 2)
            ready.set()
            await queued(lock, 1)
            with pytest.raises(DeadlockError) as caught:
                await lock.shared(0, 1)
            assert "waits for [0, 10) exclusive held by task 'the first', who" in str(caught.value)
            assert "waits for [10, 20) exclusive held by" in str(caught.value)
            assert record == []
    assert record == ["first has both"]
    assert_unused(lock)


async def test_cycle_through_many_tasks_and_locks() -> None:
    """A ring of ten tasks over five locks, readers among them, breaks at the last one."""
    locks = [RegionLock() for _ in range(5)]
    deadlocks: list[int] = []
    finished: list[int] = []

    def ask(n: int) -> RegionRequest:
        lock = locks[n % 5]
        return lock.shared(n, n + 1) if n % 2 else lock.exclusive(n, n + 1)

    async def member(n: int) -> None:
        async with ask(n):
            await until(lambda: sum(held_in(lock) for lock in locks) == 10 or bool(finished))
            try:
                async with locks[(n + 1) % 10 % 5].exclusive((n + 1) % 10, (n + 1) % 10 + 1):
                    finished.append(n)
            except DeadlockError:
                deadlocks.append(n)
                finished.append(n)

    def held_in(lock: RegionLock) -> int:
        now = lock.statistics()
        return now.held_shared + now.held_exclusive

    async with anyio.create_task_group() as tg:
        for n in range(10):
            tg.start_soon(member, n)
    assert len(deadlocks) == 1
    assert sorted(finished) == list(range(10))
    for lock in locks:
        assert_unused(lock)


async def test_half_counts_for_the_task_that_takes_it_over() -> None:
    """After a split each half is a hold of the task that enters it."""
    lock = RegionLock()
    record: Record = []
    leave = anyio.Event()

    async def fill(half: RegionLease) -> None:
        async with half:
            with pytest.raises(DeadlockError, match="itself"):
                await lock.shared(half.start, half.stop)
            record.append(f"{half.start}")
            await leave.wait()

    async with anyio.create_task_group() as tg:
        left, right = (await lock.exclusive(0, 20)).split_at(10)
        with pytest.raises(DeadlockError, match="itself"):
            await lock.shared(12, 13)
        tg.start_soon(fill, left)
        tg.start_soon(fill, right)
        await until(lambda: len(record) == 2)
        tg.start_soon(hold, lock.exclusive(0, 20), "all", record, leave)
        with pytest.raises(WouldBlock):
            lock.shared_nowait(12, 13)
        leave.set()
        async with lock.shared(0, 20):  # no deadlock: the holders are others
            record.append("splitter")
    assert_unused(lock)


async def test_split_restrict_and_downgrade_let_others_in() -> None:
    """What a lease gives back goes to those who wait, at once and no more than that."""
    lock = RegionLock()
    record: Record = []
    leave = anyio.Event()
    async with anyio.create_task_group() as tg:
        lease = await lock.exclusive(0, 100)
        for start in (0, 30, 60, 90):
            tg.start_soon(hold, lock.shared(start, start + 10), str(start), record, leave)
        tg.start_soon(hold, lock.exclusive(50, 55), "writer", record, leave)
        await queued(lock, 5)
        left, right = lease.split_at(60)
        right.restrict(60, 80)
        await until(lambda: "90" in record)
        left.downgrade()
        await until(lambda: len(record) == 3)
        assert sorted(record) == ["0", "30", "90"]
        right.release()
        await until(lambda: "60" in record)
        left.restrict(0, 50)
        await until(lambda: "writer" in record)
        left.release()
        leave.set()
    assert_unused(lock)


async def test_any_task_may_release() -> None:
    """A lease is released by whoever has it."""
    lock = RegionLock()
    lease = await lock.exclusive(0, 1)

    async def release() -> None:
        lease.release()

    async with anyio.create_task_group() as tg:
        tg.start_soon(release)
    assert_unused(lock)


# Leases that are dropped, tasks that are forgotten


async def test_dropped_lease_is_freed_with_a_warning() -> None:
    """A lease that goes out of use unreleased warns, and those who wait go on."""
    lock = RegionLock()
    record: Record = []
    leave = anyio.Event()
    leave.set()
    async with anyio.create_task_group() as tg:
        lease = await lock.exclusive(0, 10)
        tg.start_soon(hold, lock.exclusive(5, 6), "next", record, leave)
        await queued(lock, 1)
        with pytest.warns(ResourceWarning, match=r"a region lease of \[0, 10\) exclusive was"):
            del lease
            gc.collect()
    assert record == ["next", "-next"]
    assert_unused(lock)


async def test_a_lease_dropped_between_two_steps_of_the_loop() -> None:
    """It is released in the loop's next turn: who is woken between the steps is overlooked."""
    lock = RegionLock()
    record: Record = []
    leave = anyio.Event()
    leave.set()
    leases = [await lock.exclusive(0, 10)]
    waiting: list[int] = []

    def drop() -> None:
        with pytest.warns(ResourceWarning, match="dropped without being released"):
            leases.clear()
        waiting.append(lock.statistics().waiting)

    async with anyio.create_task_group() as tg:
        tg.start_soon(hold, lock.exclusive(5, 6), "next", record, leave)
        await queued(lock, 1)
        await between_steps(drop)
        assert waiting == [1]
    assert record == ["next", "-next"]
    assert_unused(lock)


async def test_a_lease_dropped_while_trio_cancels_who_waits_for_it(backend_name: str) -> None:
    """trio does not find a task woken that it is about to wake itself."""
    if backend_name != "trio":
        pytest.skip("asyncio's cancellations are not written in Python")
    lock = RegionLock()
    leases = [await lock.exclusive(0, 10)]

    def collect(frame: types.FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name == "_attempt_abort":
            leases.clear()

    async with anyio.create_task_group() as tg:
        tg.start_soon(lock.exclusive(5, 6).__aenter__)
        await queued(lock, 1)
        with pytest.warns(ResourceWarning, match="dropped without being released"):
            sys.setprofile(collect)
            try:
                tg.cancel_scope.cancel()
            finally:
                sys.setprofile(None)
    await until(lambda: lock.statistics().held_exclusive == 0)
    assert_unused(lock)


async def test_a_task_may_have_at_once_what_it_dropped() -> None:
    """The range of a dropped lease, or half of one, is free for the same task in the next line."""
    lock = RegionLock()
    for ask in (lock.exclusive, lock.shared):
        lease = await ask(0, 10)
        with pytest.warns(ResourceWarning, match="dropped without being released"):
            del lease
        lock.exclusive_nowait(0, 10).release()
        left, right = (await ask(0, 10)).split_at(4)
        with pytest.warns(ResourceWarning, match="dropped without being released"):
            del left
        async with lock.exclusive(0, 4):
            right.release()
    assert_unused(lock)


async def test_what_a_thread_dropped_is_free_before_anybody_waits_for_it() -> None:
    """A release that a finalizer left to the event loop comes before the next request's answer."""
    lock = RegionLock()
    for again in (lock.exclusive_nowait, lock.exclusive):
        leases = [await lock.exclusive(0, 10)]
        with pytest.warns(ResourceWarning, match="dropped without being released"):
            thread = threading.Thread(target=leases.clear)
            thread.start()
            thread.join()
        got = again(0, 10)
        lease = got if isinstance(got, RegionLease) else await got
        lease.release()
    assert_unused(lock)


async def test_a_child_that_was_just_started_takes_its_half_over_first() -> None:
    """Who splits a hold, starts a task for a half and then asks for its range waits for it."""
    for _ in range(10):  # trio draws lots
        lock = RegionLock()
        record: Record = []
        leave = anyio.Event()
        leave.set()
        left, right = (await lock.exclusive(0, 20)).split_at(10)
        async with anyio.create_task_group() as tg:
            tg.start_soon(hold, left, "left", record, leave)
            tg.start_soon(hold, right, "right", record, leave)
            async with lock.shared(0, 20):
                assert sorted(record) == ["-left", "-right", "left", "right"]
        assert_unused(lock)


@pytest.mark.parametrize("use", ["downgrade", "restrict", "split_at"])
async def test_a_half_is_whose_task_uses_it_first(use: str) -> None:
    """Not only who enters it: any use but its release. What that task then asks for in conflict
    with it is an error and no wait; and the one that split may wait for it."""
    lock = RegionLock()
    half, other = (await lock.exclusive(0, 20)).split_at(10)
    other.release()
    used = anyio.Event()

    async def work() -> None:
        parts = [half]
        if use == "downgrade":
            half.downgrade()
        elif use == "restrict":
            half.restrict(0, 5)
        else:
            parts = list(half.split_at(5))
        with anyio.fail_after(20), pytest.raises(DeadlockError, match="itself"):
            await lock.exclusive(0, 1)
        used.set()
        await until(lambda: lock.statistics().waiting == 1)
        for part in parts:
            part.release()

    async with anyio.create_task_group() as tg:
        tg.start_soon(work)
        await used.wait()
        async with lock.exclusive(0, 20):
            pass
    assert_unused(lock)


async def test_nobody_comes_for_the_half() -> None:
    """A half that no other task takes over is the splitter's own hold: DeadlockError."""
    lock = RegionLock()
    left, right = (await lock.exclusive(0, 20)).split_at(10)
    with pytest.raises(DeadlockError, match="itself"):
        await lock.shared(0, 20)
    left.release()
    right.release()
    assert_unused(lock)


async def one_of(way: str, awaitable: Awaitable[Any]) -> Any:
    """What asyncio gives of an awaitable that it awaits in a task of its own."""
    if way == "wait_for":
        return await asyncio.wait_for(awaitable, 20)
    if way == "ensure_future":
        return await asyncio.ensure_future(awaitable)
    (result,) = await asyncio.gather(awaitable)
    return result


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("way", ["wait_for", "gather", "ensure_future"])
async def test_taken_by_a_task_around_the_await(backend_name: str, way: str, waits: bool) -> None:
    """A lease belongs to who asked for it: asyncio's task around it has ended by then."""
    asyncio_only(backend_name)
    lock = RegionLock()
    leave = anyio.Event()
    async with anyio.create_task_group() as tasks:
        if waits:
            await tasks.start(hold, lock.shared(0, 10), "before", [], leave)
            asyncio.get_running_loop().call_soon(leave.set)
        lease = await one_of(way, lock.exclusive(0, 10))
    with anyio.fail_after(20):
        with pytest.raises(DeadlockError, match=r"holds \[0, 10\) exclusive itself"):
            await lock.shared(0, 1)
        with pytest.raises(DeadlockError, match=r"holds \[20, 30\) exclusive itself"):
            await one_of(way, own(lock))
    lease.release()
    assert_unused(lock)


class Pair:
    """An awaitable of a user's, which asyncio awaits in a task of its own: it goes on there."""

    def __init__(self, lock: RegionLock) -> None:
        self.lock = lock
        self.request = lock.exclusive(0, 10)

    def __await__(self) -> Generator[Any, Any, None]:
        return self.both().__await__()

    async def both(self) -> None:
        lease = await self.request
        with pytest.raises(DeadlockError, match="itself"):
            await self.lock.shared(0, 5)
        lease.release()


@pytest.mark.parametrize("way", ["wait_for", "gather", "ensure_future"])
async def test_taken_by_a_task_that_goes_on(backend_name: str, way: str) -> None:
    """A task that does more than await a request keeps what it got."""
    asyncio_only(backend_name)
    lock = RegionLock()
    with anyio.fail_after(20):
        await one_of(way, Pair(lock))
    assert_unused(lock)


async def own(lock: RegionLock) -> None:
    """A task of its own, not one around an await: it keeps what it takes."""
    async with lock.exclusive(20, 30):
        await lock.exclusive(20, 30)


async def test_asked_for_by_another_task(backend_name: str) -> None:
    """A request belongs to the task that awaits it, if that does anything else."""
    lock = RegionLock()
    request = lock.exclusive(0, 10)
    leave = anyio.Event()
    taken = anyio.Event()

    async def take() -> None:
        lease = await request
        taken.set()
        with pytest.raises(DeadlockError, match="itself"):
            await lock.shared(0, 1)
        await leave.wait()
        lease.release()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take)
        await taken.wait()
        await lock.exclusive_nowait(10, 20).__aexit__(None, None, None)
        tasks.start_soon(hold, lock.shared(0, 1), "later", [], leave)
        await queued(lock, 1)
        leave.set()
    assert_unused(lock)


async def test_asked_for_outside_of_a_loop() -> None:
    """Requests may be made in any thread; they are awaited in the loop's."""
    lock = RegionLock()
    async with lock.exclusive(0, 1):
        pass
    for request in await anyio.to_thread.run_sync(
        lambda: (lock.exclusive(0, 1), lock.shared(1, 2), RegionLock().shared(0, 1))
    ):
        (await request).release()
    assert_unused(lock)


async def test_lease_dropped_in_a_thread() -> None:
    """The last reference may go in any thread; the release is done by the event loop."""
    lock = RegionLock()
    leases = [await lock.exclusive(0, 10)]
    with pytest.warns(ResourceWarning, match="dropped without being released"):
        await anyio.to_thread.run_sync(leases.clear)
    await until(lambda: lock.statistics().held_exclusive == 0)
    assert_unused(lock)


async def test_lock_and_lease_dropped_together() -> None:
    """A lock that goes with its leases makes no trouble."""
    lock = RegionLock()
    lease = await lock.shared(0, 1)
    del lock
    with pytest.warns(ResourceWarning, match=r"\[0, 1\) shared"):
        del lease
        gc.collect()
    await anyio.lowlevel.checkpoint()


@types.coroutine
def suspend() -> Generator[None, None, None]:
    yield


@pytest.mark.parametrize("where", ["block", "wait"])
async def test_forgotten_coroutine_frees_its_region(where: str) -> None:
    """A coroutine closed from elsewhere, as the collector does, has its release posted."""
    lock = RegionLock(fast_acquire=True)

    async def body() -> None:
        async with lock.exclusive(0, 1):
            await suspend()

    lease = await lock.exclusive(0, 1) if where == "wait" else None
    if lease is not None:
        # In another task's name: its own request would be a deadlock.
        lock._claims.disown(cast(Any, lease._claim))
    coroutine = body()
    coroutine.send(None)
    thread = threading.Thread(target=coroutine.close)
    thread.start()
    thread.join()
    # Not yet: the loop has not had a turn.
    now = lock.statistics()
    assert now.held_exclusive + now.waiting == (1 if lease is None else 2)
    if lease is not None:
        await queued(lock, 0)
        lease.release()
    await until(lambda: lock.statistics().held_exclusive == 0)
    assert_unused(lock)


@pytest.mark.parametrize("where", ["block", "wait"])
async def test_forgotten_coroutine_that_is_closed_between_two_steps(where: str) -> None:
    """Its region is freed as well, in the loop's next turn."""
    lock = RegionLock(fast_acquire=True)

    async def body() -> None:
        async with lock.exclusive(0, 1):
            await suspend()

    lease = await lock.exclusive(0, 1) if where == "wait" else None
    if lease is not None:
        lock._claims.disown(cast(Any, lease._claim))
    coroutine = body()
    coroutine.send(None)
    asked: list[int] = []

    def close() -> None:
        coroutine.close()
        now = lock.statistics()
        asked.append(now.held_exclusive + now.waiting)

    await between_steps(close)
    assert asked == [1 if lease is None else 2]
    await queued(lock, 0)
    if lease is not None:
        lease.release()
    await until(lambda: lock.statistics().held_exclusive == 0)
    assert_unused(lock)


async def test_forgotten_waiter_that_is_closed_in_the_middle_of_a_request() -> None:
    """Where the lock's own code is interrupted, nobody leaves before that is done."""
    lock = RegionLock(fast_acquire=True)
    lease = await lock.exclusive(0, 1)
    lock._claims.disown(cast(Any, lease._claim))

    async def body() -> None:
        await lock.exclusive(0, 1)

    coroutine = body()
    coroutine.send(None)
    loop: Any = lock._claims._loop
    waiting: list[int] = []
    # As the collector comes, without a frame between the request's and the waiter's.
    steps = coroutine.close, lambda: waiting.append(lock.statistics().waiting), loop.parking
    parking = filter(None, map(operator.call, steps))
    cast(Any, lock._claims)._loop = types.SimpleNamespace(parking=parking.__next__, post=loop.post)

    async with anyio.create_task_group() as tg:

        async def ask() -> None:
            (await lock.exclusive(0, 1)).release()

        tg.start_soon(ask)
        await until(lambda: bool(waiting))
        lock._claims._loop = loop
        assert waiting == [2]
        await queued(lock, 1)
        lease.release()
    assert_unused(lock)


async def test_async_generator_frees_its_region_when_closed() -> None:
    """aclose() of an async generator inside a block frees the region before it returns."""
    lock = RegionLock()

    async def rows() -> AsyncIterator[int]:
        async with lock.exclusive(0, 1):
            yield 1

    generator = rows()
    await generator.__anext__()
    await cast(Any, generator).aclose()
    lock.exclusive_nowait(0, 1).release()
    assert_unused(lock)


class Woken:
    """Stands for a task that waits."""

    def __init__(self) -> None:
        self.times = 0

    def wake(self) -> None:
        self.times += 1


def split(lock: RegionLock, lease: RegionLease) -> list[RegionLease]:
    return list(lease.split_at(5))


def restrict(lock: RegionLock, lease: RegionLease) -> list[RegionLease]:
    lease.restrict(2, 4)
    return [lease]


def downgrade(lock: RegionLock, lease: RegionLease) -> list[RegionLease]:
    lease.downgrade()
    return [lease]


def release(lock: RegionLock, lease: RegionLease) -> list[RegionLease]:
    lease.release()
    return []


def ask_again(lock: RegionLock, lease: RegionLease) -> list[RegionLease]:
    return [lease, *([] if lease.exclusive else [lock.shared_nowait(3, 6)])]


@pytest.mark.parametrize("do", [split, restrict, downgrade, release, ask_again])
async def test_a_lease_that_a_finalizer_releases_in_the_middle_of_the_queues_work(
    do: Callable[[RegionLock, RegionLease], list[RegionLease]],
) -> None:
    """At whichever line it comes, the work goes on as if it had come afterwards."""

    lines = at = 0

    def collect(frame: types.FrameType, event: str, _: object) -> Any:
        nonlocal lines
        queue = frame.f_globals["__name__"] in ("aiommap._region_queue", "aiommap._frontier")
        if queue and event == "line":
            lines += 1
            if lines == at:
                sys.settrace(None)
                other.release()
        return collect if queue or frame.f_code.co_filename != __file__ else None

    while lines >= at:
        at += 1
        lines = 0
        lock = RegionLock()
        hold = lock.exclusive_nowait(0, 5) if do is downgrade else lock.shared_nowait(0, 10)
        other = lock.shared_nowait(5 if do is downgrade else 1, 11)
        tasks = []
        for n in range(6):
            claim = Claim(n, n + 5, n % 2 == 0, n)
            assert not lock._claims.queue.add((claim,))
            assert claim.links is not None
            claim.links.waiter = Woken()
            tasks.append(claim)
        sys.settrace(collect)
        try:
            left = do(lock, hold)
        finally:
            sys.settrace(None)
        if lines < at:
            other.release()
        lock._claims.release_abandoned()
        lock._claims.queue._check()
        for lease in left:
            lease.release()
        for claim in tasks:
            assert claim.state == HELD
            assert claim.links is not None
            assert claim.links.waiter.times == 1
            lock._claims.release(claim)
        assert_unused(lock)
    assert at > 20


# Loops and threads


async def use(lock: RegionLock) -> None:
    async with lock.exclusive(100, 101):
        pass


async def test_other_loops_and_threads_are_refused(
    anyio_backend: tuple[str, dict[str, Any]],
) -> None:
    """A lock belongs to the loop that used it first; elsewhere it raises RuntimeError."""
    lock = RegionLock()
    lease = await lock.shared(0, 10)
    name, options = anyio_backend

    def elsewhere() -> None:
        with pytest.raises(RuntimeError, match="belongs to the event loop that used it first"):
            anyio.run(use, lock, backend=name, backend_options=options)
        uses: list[Callable[[], object]] = [
            lease.release,
            lambda: lease.split_at(5),
            lambda: lease.restrict(5, 6),
            lease.downgrade,
            lambda: lock.shared_nowait(0, 1),
        ]
        for attempt in uses:
            with pytest.raises(RuntimeError, match="belongs to the event loop"):
                attempt()
        with pytest.raises(RuntimeError, match="no event loop runs in this thread"):
            RegionLock().shared_nowait(0, 1)

    await anyio.to_thread.run_sync(elsewhere)
    lease.release()
    assert_unused(lock)


async def test_lock_made_outside_a_loop(anyio_backend: tuple[str, dict[str, Any]]) -> None:
    """A lock may be created anywhere, and used in the loop that comes first."""
    lock = await anyio.to_thread.run_sync(RegionLock)
    await use(lock)
    assert_unused(lock)


# Which goes first of what the collector finds, a lease or the coroutine that would release it, is
# open.
@pytest.mark.filterwarnings("ignore:a region lease of:ResourceWarning")
def test_a_loop_that_ends_with_waiters_is_let_go(anyio_backend: tuple[str, dict[str, Any]]) -> None:
    """Nothing keeps the locks, tasks and loop of a program that stopped in the middle."""
    name, options = anyio_backend
    if name != "asyncio":
        pytest.skip("trio's loop ends with its tasks")
    if "use_uvloop" in options:
        uvloop = pytest.importorskip("uvloop")
        make = uvloop.new_event_loop
    else:
        make = options.get("loop_factory", asyncio.new_event_loop)

    def stop_in_the_middle() -> list[weakref.ref[object]]:
        lock, other = RegionLock(), RegionLock()

        async def main() -> None:
            tasks = [asyncio.ensure_future(use(lock)) for lock in (lock, other) for _ in range(2)]
            await queued(lock, 1)
            await queued(other, 1)
            assert lock._claims.queue.graph is other._claims.queue.graph
            assert set(lock._claims.queue.graph._waiting) == {tasks[1], tasks[3]}

        async def use(lock: RegionLock) -> None:
            async with lock.exclusive(0, 1):
                await anyio.sleep_forever()

        loop = make()
        loop.run_until_complete(main())
        loop.close()
        return [weakref.ref(each) for each in (lock, other, loop)]

    refs = stop_in_the_middle()
    gc.collect()
    assert [each() for each in refs] == [None, None, None]


# The lock of claims


async def test_ranges_are_granted_together() -> None:
    """A request for two ranges waits for both and holds both."""
    lock = ClaimLock()
    first, second = await lock.acquire(0, 10, True), await lock.acquire(20, 30, False)
    lock.disown(first)
    lock.disown(second)
    granted: list[object] = []

    async def move() -> None:
        claim = await lock.acquire_ranges([(0, 5, False), (22, 23, True), (22, 24, False)])
        granted.append(claim)
        lock.downgrade(claim)
        lock.release(claim)

    async with anyio.create_task_group() as tg:
        tg.start_soon(move)
        await until(lambda: lock.statistics().waiting == 1)
        assert not lock.check_free(3, 4, True)
        lock.release(first)
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
        assert granted == []
        lock.release(second)
    assert len(granted) == 1
    both = await lock.acquire_ranges([(0, 1, True), (5, 6, False)])
    assert lock.statistics() == RegionLockStatistics(1, 1, 0, 1)
    lock.release(both)
    assert not lock.queue._claims()


async def test_check_free() -> None:
    """It says whether a request would meet nothing: no wait, and no deadlock."""
    lock = ClaimLock()
    assert lock.check_free(0, 10, True)
    claim = await lock.acquire(0, 10, False)
    assert lock.check_free(5, 6, False)
    assert lock.check_free(10, 20, True)
    assert lock.check_free(5, 5, True)
    assert not lock.check_free(5, 6, True)
    lock.disown(claim)
    assert not lock.check_free(5, 6, True)
    lock.adopt(claim)
    assert not lock.check_free(5, 6, True)
    lock.release(claim)


async def test_close_wakes_waiters_and_refuses_requests() -> None:
    """After close() waiting and new requests raise; what is held is released as ever."""
    lock = ClaimLock()
    claim = await lock.acquire(0, 10, True)
    raised: list[str] = []

    async def wait(n: int) -> None:
        with pytest.raises(ClosedResourceError):
            await lock.acquire(n, 10 + n, n % 2 == 0)
        raised.append("")

    async with anyio.create_task_group() as tg:
        for n in range(10):
            tg.start_soon(wait, n)
        await until(lambda: lock.statistics().waiting == 10)
        lock.close(ClosedResourceError)
        lock.close(KeyError)
    assert len(raised) == 10
    asks: list[Callable[[], Awaitable[object]]] = [
        lambda: lock.acquire(50, 60, False),
        lambda: lock.acquire_ranges([(50, 60, False)]),
    ]
    for ask in asks:
        with pytest.raises(ClosedResourceError):
            await ask()
    with pytest.raises(ClosedResourceError):
        lock.acquire_nowait(50, 60, False)
    left, right = lock.split(claim, 5)
    lock.restrict(left, 0, 1)
    lock.release(left)
    lock.release(right)
    assert lock.statistics() == RegionLockStatistics(0, 0, 0, 10)


async def test_close_meets_a_cancellation() -> None:
    """A waiter that is cancelled and woken by close() in one tick leaves no trace."""
    lock = ClaimLock()
    claim = await lock.acquire(0, 10, True)
    scope = anyio.CancelScope()

    async def wait() -> None:
        with scope:
            # Which of the two it notices is the loop's choice.
            with suppress(ClosedResourceError):
                await lock.acquire(0, 10, True)

    async with anyio.create_task_group() as tg:
        tg.start_soon(wait)
        await until(lambda: lock.statistics().waiting == 1)
        lock.close(ClosedResourceError)
        scope.cancel()
    lock.release(claim)
    assert not lock.queue._claims()


async def test_abandoned_claim_is_released_soon() -> None:
    """abandon() releases in the loop, once, and is too late for what was released before."""
    lock = ClaimLock()
    claim = await lock.acquire(0, 10, True)
    await anyio.to_thread.run_sync(lock.abandon, claim)
    await until(lambda: lock.statistics().held_exclusive == 0)
    claim = await lock.acquire(0, 10, True)
    lock.abandon(claim)
    lock.release(claim)
    other = await lock.acquire(0, 10, True)
    await anyio.lowlevel.checkpoint()
    assert lock.statistics().held_exclusive == 1
    lock.release(other)


async def test_statistics_are_compared_by_what_is_held_and_waits() -> None:
    """The longest queue that ever was does not make two states differ."""
    assert RegionLock().statistics() == RegionLockStatistics(0, 0, 0)


def test_a_lease_that_nobody_gave_out(recwarn: pytest.WarningsRecorder) -> None:
    """Its finalizer has nothing to do, and says nothing."""
    with pytest.raises(TypeError):
        RegionLease()  # type: ignore[call-arg]
    RegionLease.__new__(RegionLease).__del__()
    assert not recwarn
