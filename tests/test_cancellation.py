"""A call that is cancelled at any of its awaits, in any way, leaves no trace but its effect."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import anyio
import pytest
from anyio import CapacityLimiter, to_thread

from aiommap import AsyncMmap, FlushError, RegionLock, _workers
from aiommap._flush_batch import FlushLog
from aiommap._kernel import Kernel
from aiommap._mapped_memory import INLINE

from .cancelling import let_others_run, on_asyncio, sweep
from .content import at_rest, file_of, inc, maps_of, open_descriptors
from .fake_kernel import FakeKernel
from .processes import run_python

pytestmark = pytest.mark.anyio

SIZE = 1 << 20
"""Several pieces of everything that is done in pieces."""

PATIENCE = 30.0


def map_class(kernel: Kernel) -> type[AsyncMmap]:
    class Map(AsyncMmap):
        _kernel = kernel

    return Map


def cold_kernel() -> FakeKernel:
    """Nothing is known to be in memory, so that everything goes to a worker."""
    kernel = FakeKernel()
    kernel.lack("nowait_reads")
    kernel.wrap("resident", lambda real, address, length: bytes(len(real(address, length))))
    return kernel


@dataclass
class State:
    """What a call of the sweep works on."""

    m: AsyncMmap


async def windows_of(state: State) -> None:
    async for window in state.m.windows(1 << 18):
        len(window)


async def entered(state: State, **options: Any) -> None:
    async with state.m.view(0, 1 << 19, **options) as v:
        len(v)


async def entered_mut(state: State) -> None:
    async with state.m.view_mut(0, 100) as v:
        v[0] = 1


async def awaited_mut(state: State) -> None:
    v = await state.m.view_mut(100, 1 << 19)
    try:
        await v.flush()
    finally:
        await v.aclose()


async def split(state: State) -> None:
    async with state.m.view_mut(0, 8192) as v:
        left, right = v.split_at(100)
        async with left, right:
            await left.write(b"left")
            await right.write(b"right")


async def consumed(state: State) -> None:
    async with state.m.into_view() as v:
        await v.write(b"x")


async def consumed_sync(state: State) -> None:
    async with state.m.into_view_sync() as v:
        async with v.clone() as other:
            await other.write(b"x")
        await v.read()


async def pended(state: State) -> None:
    await state.m.write_at(0, b"x")
    await (await state.m.flush_async())


async def pinned(state: State) -> None:
    await state.m.pin(0, 8192)
    await state.m.unpin(0, 8192)


async def file_like(state: State) -> None:
    async with state.m.view_mut(0, 1 << 19) as v:
        await v.write(b"line\n" * 3000)
        await v.seek(0)
        await v.tell()
        await v.readline()
        await v.readinto(bytearray(1 << 18))
        await v.read()
        await v.flush_range(0, 10)
        await (await v.flush_async_range(0, 10))


CALLS: dict[str, Callable[[State], Awaitable[object]]] = {
    "read_at": lambda s: s.m.read_at(5, SIZE - 10),
    "read_at small": lambda s: s.m.read_at(5, 10),
    "readinto_at": lambda s: s.m.readinto_at(0, bytearray(SIZE)),
    "write_at": lambda s: s.m.write_at(0, bytes(SIZE)),
    "write_at small": lambda s: s.m.write_at(0, b"x"),
    "move": lambda s: s.m.move(1000, 0, SIZE - 1000),
    "find": lambda s: s.m.find(b"not there"),
    "rfind": lambda s: s.m.rfind(b"not there"),
    "load": lambda s: s.m.load(),
    "resident": lambda s: s.m.resident(),
    "advise": lambda s: s.m.advise("random"),
    "pin and unpin": pinned,
    "flush": lambda s: s.m.flush(),
    "flush_range": lambda s: s.m.flush_range(10, 1000),
    "flush_async": lambda s: s.m.flush_async(),
    "PendingFlush": pended,
    "clear_flush_error": lambda s: s.m.clear_flush_error(),
    "file_size": lambda s: s.m.file_size(),
    "grow": lambda s: s.m.resize(SIZE + 100),
    "shrink": lambda s: s.m.resize(SIZE - 100),
    "set_protection": lambda s: s.m.set_protection("r"),
    "view": entered,
    "view without load": lambda s: entered(s, load=False),
    "view_mut": entered_mut,
    "view_mut and flush": awaited_mut,
    "split": split,
    "file": file_like,
    "windows": windows_of,
    "into_view": consumed,
    "into_view_sync": consumed_sync,
    "aclose": lambda s: s.m.aclose(),
    "aclose without flush": lambda s: s.m.aclose(flush=False),
}


@asynccontextmanager
async def meddling(m: AsyncMmap) -> AsyncIterator[None]:
    """Meanwhile others hold all of the map and let it go, again and again, in turns."""

    async def meddle() -> None:
        try:
            while True:
                async with m.view_mut(load=False):
                    await let_others_run(1)
        except (anyio.ClosedResourceError, ValueError, PermissionError):
            return  # closed, resized, read-only: that was the call

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(meddle)
        await let_others_run(1)
        yield
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("busy", [False, True], ids=["alone", "meddled with"])
@pytest.mark.parametrize("name", CALLS)
async def test_sweep(name: str, busy: bool, tmp_path: Path, backend_name: str) -> None:
    """Whatever call is cancelled wherever: the region is free, the map usable, nothing leaked."""
    path = file_of(tmp_path, inc(SIZE))
    limiter = CapacityLimiter(3)
    opener = map_class(cold_kernel())

    async def before() -> State:
        os.truncate(path, SIZE)
        return State(await opener.open_path(path, "r+", limiter=limiter))

    async def call(state: State) -> object:
        if not busy:
            return await CALLS[name](state)
        async with meddling(state.m):
            return await CALLS[name](state)

    async def after(state: State, what: str, cancelled: bool) -> None:
        m = state.m
        core = m._core
        with anyio.fail_after(PATIENCE):
            await at_rest(limiter)
        assert core.lock.statistics().waiting == 0, what
        assert m.statistics().waiting == 0, what
        assert m.statistics().views == 0, what
        held = core.lock.statistics()
        assert (held.held_shared, held.held_exclusive) == (0, 0), what
        core.lock.queue._check()
        if not m.closed:
            if m.protection.writable:
                m.view_mut_nowait()._give_back()
            assert len(m) == path.stat().st_size, what
            assert len(await m.read_at(0, len(m))) == len(m), what
            await m.flush()
            await m.aclose()
        assert maps_of(path) == 0, what
        assert not [each for each in open_descriptors() if str(path) in each], what
        assert not core.is_mapped, what

    most = await sweep(backend_name, before, call, after)
    assert most >= 1  # it is a checkpoint
    assert limiter.statistics().tasks_waiting == 0


@pytest.mark.parametrize("kind", ["open_path", "open", "create", "create again", "anonymous"])
async def test_sweep_of_opening(kind: str, tmp_path: Path, backend_name: str) -> None:
    """A cancelled opening leaves no descriptor, no map and no new file behind."""
    path = file_of(tmp_path, inc(SIZE))
    new = tmp_path / "new.bin"
    limiter = CapacityLimiter(1)

    with open(path, "rb") as file:

        async def before() -> None:
            new.unlink(missing_ok=True)
            if kind == "create again":
                new.write_bytes(b"old")

        async def call(_: None) -> None:
            if kind == "open_path":
                opening = AsyncMmap.open_path(path, limiter=limiter)
            elif kind == "open":
                opening = AsyncMmap.open(file, limiter=limiter)
            elif kind == "anonymous":
                opening = AsyncMmap.anonymous(SIZE, limiter=limiter)
            else:
                again = kind == "create again"
                opening = AsyncMmap.create(new, SIZE, exist_ok=again, limiter=limiter)
            m = await opening
            opened.append(m)

        async def after(_: None, what: str, cancelled: bool) -> None:
            assert limiter.borrowed_tokens == 0, what
            if opened:
                await opened.pop().aclose(flush=False)
            elif kind == "create":
                assert not new.exists(), what
            elif kind == "create again":
                assert new.read_bytes()[:3] == b"old"
            assert open_descriptors() == descriptors, what
            assert maps_of(path) == maps_of(new) == 0, what

        opened: list[AsyncMmap] = []
        async with AsyncMmap.anonymous(1):
            pass  # what is made once in a process
        descriptors = open_descriptors()
        assert await sweep(backend_name, before, call, after) >= 1


@pytest.mark.parametrize("exclusive", [False, True])
async def test_sweep_of_the_lock(exclusive: bool, backend_name: str) -> None:
    """A cancelled request for a range leaves the lock as if it had never been made."""

    async def before() -> RegionLock:
        return RegionLock()

    async def call(lock: RegionLock) -> None:
        async def hold() -> None:
            async with lock.exclusive(0, 10):
                await let_others_run(2)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hold)
            await let_others_run(1)
            async with lock.exclusive(0, 20) if exclusive else lock.shared(0, 20) as lease:
                await let_others_run(1)
                lease.restrict(5, 10)

    async def after(lock: RegionLock, what: str, cancelled: bool) -> None:
        now = lock.statistics()
        assert (now.held_shared, now.held_exclusive, now.waiting) == (0, 0, 0), what
        lock.exclusive_nowait(0, 20).release()

    assert await sweep(backend_name, before, call, after) >= 3


class TestThreadInside:
    """The cancellation comes while a worker is in the middle of a system call."""

    async def _handed_on_after_the_thread_left(
        self, tmp_path: Path, name: str, use: Callable[[AsyncMmap], Awaitable[object]]
    ) -> bool:
        """Cancel a call whose thread stands in a kernel function; is its region handed on late?"""
        kernel = cold_kernel()
        order: list[str] = []
        path = file_of(tmp_path, inc(SIZE))
        async with (
            map_class(kernel).open_path(path, "r+") as m,
            anyio.create_task_group() as tasks,
        ):
            scope = anyio.CancelScope()

            async def caller() -> None:
                with scope:
                    await use(m)

            async def next_one() -> None:
                async with m.view(load=False) if name == "map_file" else m.view_mut(load=False):
                    order.append("region")

            with kernel.hold(name) as hold:
                tasks.start_soon(caller)
                await to_thread.run_sync(hold.wait_entered)
                tasks.start_soon(next_one)
                await let_others_run()
                scope.cancel()
                await let_others_run()
                order.append("thread")
                hold.release.set()
        return order == ["thread", "region"]

    USES: ClassVar[dict[str, tuple[str, Callable[[AsyncMmap], Awaitable[object]]]]] = {
        "readinto_at": ("read", lambda m: m.readinto_at(0, bytearray(INLINE + 1))),
        "write_at": ("populate_write", lambda m: m.write_at(0, b"x" * 100)),
        "move": ("copy", lambda m: m.move(0, 100, 100)),
        "resize": ("map_file", lambda m: m.resize(SIZE + 100)),
        "set_protection": ("map_file", lambda m: m.set_protection("r")),
    }

    @pytest.mark.parametrize("use", USES)
    async def test_region(self, use: str, tmp_path: Path) -> None:
        """The region of a call is not handed on before its thread is off the memory."""
        name, call = self.USES[use]
        assert await self._handed_on_after_the_thread_left(tmp_path, name, call)

    @pytest.mark.parametrize("use", ["readinto_at", "write_at", "move"])
    async def test_region_planted_fault(
        self, use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Control: without the wait for the thread, that test fails."""

        async def no_drain(work: object, loop: object) -> None:
            return None

        monkeypatch.setattr(_workers.Work, "drain", no_drain)
        name, call = self.USES[use]
        assert not await self._handed_on_after_the_thread_left(tmp_path, name, call)

    @on_asyncio
    async def test_native(self, tmp_path: Path) -> None:
        """task.cancel(), three times, does not hand the region on early either."""
        kernel = cold_kernel()
        buffer = bytearray(INLINE + 1)
        async with map_class(kernel).open_path(file_of(tmp_path, inc(SIZE)), "r+") as m:
            with kernel.hold("read") as hold:
                task = asyncio.ensure_future(m.readinto_at(0, buffer))
                await to_thread.run_sync(hold.wait_entered)
                for _ in range(3):
                    task.cancel()
                    await let_others_run()
                    assert not task.done()
                    with pytest.raises(anyio.WouldBlock):
                        m.view_mut_nowait(0, 10)
                hold.release.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            m.view_mut_nowait(0, 10)._give_back()
            kernel.calls.clear()  # they refer to it
            buffer.extend(b"its export has ended")

    @pytest.mark.parametrize("function", ["map_file", "set_file_size", "reserve"])
    @pytest.mark.parametrize("length", [SIZE + 8192, SIZE - 8192])
    async def test_resize(self, function: str, length: int, tmp_path: Path) -> None:
        """A cancelled resize has given the old map or the new one, and the file fits it."""
        kernel = cold_kernel()
        path = file_of(tmp_path, inc(SIZE))
        async with map_class(kernel).open_path(path, "r+") as m:
            with kernel.hold(function) as hold:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(m.resize, length)
                    with anyio.move_on_after(0.2):  # where it does not come by, it just ends
                        while not hold.entered.is_set() and len(m) == SIZE:
                            await let_others_run(1)
                    tasks.cancel_scope.cancel()
                    hold.release.set()
            assert len(m) in (SIZE, length)
            assert path.stat().st_size == len(m)
            assert await m.read_at(0, SIZE - 8192) == inc(SIZE - 8192)
            await m.write_at(len(m) - 1, b"!")
            assert maps_of(path) == 1
        assert path.read_bytes()[-1:] == b"!"

    @pytest.mark.parametrize("kind", ["open_path", "create"])
    async def test_opening(self, kind: str, tmp_path: Path) -> None:
        """What a thread opens for a cancelled task is closed, and removed, before it goes on."""
        kernel = FakeKernel()
        opener = map_class(kernel)
        path = file_of(tmp_path, inc(SIZE))
        new = tmp_path / "new"
        descriptors = open_descriptors()
        kept: list[BaseException] = []

        async def caller() -> None:
            try:
                if kind == "open_path":
                    await opener.open_path(path)
                else:
                    await opener.create(new, SIZE)
            except BaseException as exc:
                kept.append(exc)
                assert open_descriptors() == descriptors
                assert not new.exists()
                raise

        with kernel.hold("map_file") as hold:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(caller)
                await to_thread.run_sync(hold.wait_entered)
                tasks.cancel_scope.cancel()
                hold.release.set()
        assert len(kept) == 1
        assert maps_of(path) == maps_of(new) == 0

    async def _error_is_kept(self, tmp_path: Path) -> bool:
        """Cancel a flush that is going to fail: do later flushes say so?"""
        kernel = FakeKernel()
        path = file_of(tmp_path, inc(SIZE))
        async with map_class(kernel).open_path(path, "r+") as m:
            await m.write_at(0, b"x")
            kernel.fail("sync_data", errno.EIO, times=1)
            kernel.fail("sync_range", errno.EIO, times=1)
            with kernel.hold("sync_data") as hold:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(m.flush)
                    await to_thread.run_sync(hold.wait_entered)
                    tasks.cancel_scope.cancel()
                hold.release.set()
            try:
                await m.flush()
            except FlushError:
                await m.clear_flush_error()
                await m.flush()
                return True
            return False

    async def test_error_of_a_cancelled_flush(self, tmp_path: Path) -> None:
        """The failure of a flush that nobody waits for any more is not lost."""
        assert await self._error_is_kept(tmp_path)

    async def test_error_of_a_cancelled_flush_planted_fault(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Control: a log that forgets the failure fails that test."""
        real = FlushLog.fail

        def forgetful(log: FlushLog, *arguments: Any) -> Any:
            failure = real(log, *arguments)
            log.failure = log._last = None
            log.failures -= 1
            return failure

        monkeypatch.setattr(FlushLog, "fail", forgetful)
        assert not await self._error_is_kept(tmp_path)

    async def test_other_waiters_of_a_flush(self, tmp_path: Path) -> None:
        """A cancelled waiter does not take the flush from the others."""
        kernel = FakeKernel()
        path = file_of(tmp_path, inc(SIZE))
        done: list[str] = []

        async def flush(name: str) -> None:
            await m.flush()
            done.append(name)

        async with map_class(kernel).open_path(path, "r+") as m:
            await m.write_at(0, b"x")
            with kernel.hold("sync_data") as hold:
                async with anyio.create_task_group() as tasks:
                    async with anyio.create_task_group() as cancelled:
                        cancelled.start_soon(flush, "first")
                        await to_thread.run_sync(hold.wait_entered)
                        cancelled.start_soon(flush, "second, cancelled")
                        tasks.start_soon(flush, "second")
                        await let_others_run()
                        cancelled.cancel_scope.cancel()
                    hold.release.set()
        assert done == ["second"]

    async def test_reads_of_a_batch(self, tmp_path: Path) -> None:
        """Of many reads that wait together, the ones that stay are served."""
        kernel = cold_kernel()
        path = file_of(tmp_path, inc(SIZE))
        got: dict[int, bytes] = {}

        async def read(number: int) -> None:
            got[number] = await m.read_at(number, 10)

        async with map_class(kernel).open_path(path, "r+") as m:
            with kernel.hold("read") as hold:
                async with anyio.create_task_group() as tasks:
                    async with anyio.create_task_group() as cancelled:
                        for number in range(50):
                            (cancelled if number % 2 else tasks).start_soon(read, number)
                        await to_thread.run_sync(hold.wait_entered)
                        cancelled.cancel_scope.cancel()
                    hold.release.set()
        assert got == {number: inc(10, number) for number in range(0, 50, 2)}


def test_keyboard_interrupt(tmp_path: Path) -> None:
    """Ctrl-C at any await of trio's main task: threads are waited for, the map closes."""
    path = file_of(tmp_path, inc(SIZE))
    code = """
        import os, signal, sys, threading
        import trio
        from functools import partial
        from aiommap import AsyncMmap
        from tests.cancelling import Suspensions
        from tests.content import maps_of
        from tests.test_cancellation import CALLS, SIZE, State, cold_kernel, map_class

        path = sys.argv[1]
        opener = map_class(cold_kernel())
        # A shell's background job ignores SIGINT, and trio then leaves it so.
        signal.signal(signal.SIGINT, signal.default_int_handler)

        async def main(call, suspensions):
            async with opener.open_path(path, "r+") as m:
                await suspensions.run(call(State(m)))

        async def awaiting(call, state):
            return await call(state)

        for name in ("read_at", "readinto_at", "write_at", "move", "flush", "view_mut", "grow",
                     "windows", "PendingFlush", "aclose", "into_view"):
            at = 0
            while True:
                os.truncate(path, SIZE)
                suspensions = Suspensions(at, partial(signal.raise_signal, signal.SIGINT))
                try:
                    trio.run(main, partial(awaiting, CALLS[name]), suspensions,
                             restrict_keyboard_interrupt_to_checkpoints=True)
                    interrupted = False
                except KeyboardInterrupt:
                    interrupted = True
                if suspensions.count <= at:
                    break
                # An interrupt that comes with the last wake-up is met after the call.
                assert interrupted, (name, at)
                at += 1
            assert at >= 1, name
        print("ok", threading.active_count() < 10)
    """
    result = run_python(code, path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok True\n", "")


async def test_thousand_waiters(tmp_path: Path) -> None:
    """A thousand tasks wait for a region and are cancelled together; the next one gets it."""
    async with AsyncMmap.open_path(file_of(tmp_path, inc(SIZE)), "r+") as m:
        async with m.view_mut(), anyio.create_task_group() as tasks:
            for number in range(1000):
                if number % 2:
                    tasks.start_soon(entered_mut, State(m))
                else:
                    tasks.start_soon(m.read_at, number, 9)
            await let_others_run()
            tasks.cancel_scope.cancel()
        assert m.statistics().waiting == 0
        m.view_mut_nowait()._give_back()
        assert threading.active_count() < 60
