"""The thread hop: nothing is lost, whoever is cancelled in whatever way."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import checkpoint

from aiommap import AsyncMmap, _crew, _workers
from aiommap._batch_crew import BatchCrew
from aiommap._crew import Crew, Request, Seat
from aiommap._event_loop import current_event_loop
from aiommap._stream_crew import StreamCrew
from aiommap._workers import acquire_token, finish, run, start

from .cancelling import let_others_run, on_asyncio, on_trio
from .clock import Clock
from .content import at_rest, file_of
from .processes import run_python

pytestmark = pytest.mark.anyio

PATIENCE = 30.0
"""Seconds after which a thread in a test gives up, so that a broken test fails."""


class Gate:
    """A place in a worker: the test knows when it was reached, and says when to go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.open.wait(PATIENCE)

    async def wait_reached(self) -> None:
        assert await to_thread.run_sync(self.reached.wait, PATIENCE)


class Errand(Request):
    """A request of the tests: it passes a gate, or calls something, and says so."""

    def __init__(self, work: Callable[[], object] = lambda: None, log: list[Any] | None = None):
        super().__init__()
        self.work = work
        self.log: list[Any] = [] if log is None else log
        self.forgotten = False

    def announce(self) -> None:
        self.log.append(("announce", self))

    def perform(self) -> None:
        self.log.append(("perform", self))
        self.work()

    def forget(self) -> None:
        self.forgotten = True


def new_crew(
    limiter: CapacityLimiter | None = None, *, threads: int = 1, batch: int = 64
) -> StreamCrew[Errand]:
    limiter = limiter or CapacityLimiter(10)
    return StreamCrew(current_event_loop(), limiter, threads=threads, batch=batch)


async def lingering(crew: Crew[Errand], threads: int) -> None:
    """Wait until so many threads of a crew wait for more to do."""
    with anyio.fail_after(PATIENCE):
        while len(crew._lingering) != threads:
            await checkpoint()


class TestRun:
    async def test_result_and_error(self) -> None:
        """run() gives what the call gives and raises what it raises, from another thread."""
        here = threading.get_ident()
        assert await run(threading.get_ident) != here
        with pytest.raises(OSError, match="disk"):
            await run(_raiser(OSError(5, "disk")))

    async def test_cancelled_scope_starts_nothing(self) -> None:
        """In a scope that is cancelled already, the call never runs."""
        calls: list[int] = []
        with anyio.CancelScope() as scope:
            scope.cancel()
            await run(lambda: calls.append(1))
        assert scope.cancelled_caught
        assert calls == []

    async def test_cancelled_caller_stays_until_the_thread_is_done(self) -> None:
        """A cancellation is raised only when the thread has left the call."""
        gate = Gate()
        order: list[str] = []

        def call() -> None:
            gate()
            order.append("thread")

        async def caller() -> None:
            try:
                await run(call)
            finally:
                order.append("caller")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller)
            await gate.wait_reached()
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await let_others_run()
                assert order == []
                gate.open.set()
        assert order == ["thread", "caller"]

    @on_asyncio
    async def test_native_cancellation_again_and_again(self) -> None:
        """task.cancel() gets through every shield of anyio, but not out of run()."""
        gate = Gate()
        limiter = CapacityLimiter(1)
        task = asyncio.ensure_future(run(gate, limiter=limiter))
        await gate.wait_reached()
        for _ in range(5):
            task.cancel()
            await let_others_run()
            assert not task.done()
            assert limiter.borrowed_tokens == 1
        gate.open.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert limiter.borrowed_tokens == 0

    @on_asyncio
    async def test_native_cancellation_after_a_scope(self) -> None:
        """task.cancel() that comes while a cancelled scope drains is not taken for the scope's."""
        gate = Gate()
        after: list[str] = []

        async def caller() -> None:
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                await run(gate)
            after.append("went on")

        scopes: list[anyio.CancelScope] = []
        task = asyncio.ensure_future(caller())
        await gate.wait_reached()
        scopes[0].cancel()
        await let_others_run()
        task.cancel()
        await let_others_run()
        gate.open.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert after == []

    @on_asyncio
    async def test_native_cancellation_after_a_scope_in_a_crew(self) -> None:
        """The same for a request whose caller stays."""
        gate = Gate()
        crew = new_crew()
        scopes: list[anyio.CancelScope] = []

        async def caller() -> None:
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                await crew.do(Errand(gate), stay=True)
            raise AssertionError("the cancellation was swallowed")

        task = asyncio.ensure_future(caller())
        await gate.wait_reached()
        scopes[0].cancel()
        await let_others_run()
        task.cancel()
        await let_others_run()
        assert not task.done()
        gate.open.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_discard_has_run_when_the_cancellation_is_raised(self) -> None:
        """What a cancelled caller will not see is undone, in a worker, before it goes on."""
        gate = Gate()
        undone: list[tuple[str, bool]] = []
        here = threading.get_ident()

        def call() -> str:
            gate()
            return "made"

        async def caller() -> None:
            try:
                await run(call, discard=lambda made: undone.append((made, own_thread())))
            finally:
                seen.append(list(undone))

        def own_thread() -> bool:
            return threading.get_ident() != here

        seen: list[list[tuple[str, bool]]] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller)
            await gate.wait_reached()
            tasks.cancel_scope.cancel()
            gate.open.set()
        assert seen == [[("made", True)]]

    async def test_discarded_results_die_in_the_worker(self) -> None:
        """Nothing on the event loop keeps a discarded result: its end is the worker's."""
        gate = Gate()
        died_in: list[int] = []

        class Thing:
            def __del__(self) -> None:
                died_in.append(threading.get_ident())

        def call() -> Thing:
            gate()
            return Thing()

        kept: list[BaseException] = []

        async def caller() -> None:
            try:
                await run(call, discard=lambda thing: None)
            except BaseException as exc:
                kept.append(exc)
                raise

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller)
            await gate.wait_reached()
            tasks.cancel_scope.cancel()
            gate.open.set()
        assert len(died_in) == 1
        assert died_in[0] != threading.get_ident()

    async def test_nothing_to_discard_after_an_error(self) -> None:
        """A call that failed while its caller was cancelled made nothing."""
        gate = Gate()
        undone: list[object] = []

        def call() -> None:
            gate()
            raise OSError(5, "disk")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: run(call, discard=undone.append))
            await gate.wait_reached()
            tasks.cancel_scope.cancel()
            gate.open.set()
        assert undone == []

    async def test_tokens_come_back(self) -> None:
        """After a result, an error and a cancellation in each stage, no token is missing."""
        limiter = CapacityLimiter(1)
        await run(lambda: None, limiter=limiter)
        assert limiter.borrowed_tokens == 0
        with pytest.raises(OSError, match="disk"):
            await run(_raiser(OSError(5, "disk")), limiter=limiter)
        assert limiter.borrowed_tokens == 0
        gate = Gate()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: run(gate, limiter=limiter))
            await gate.wait_reached()
            tasks.start_soon(lambda: run(gate, limiter=limiter))  # waits for the token
            await let_others_run()
            assert limiter.statistics().tasks_waiting == 1
            tasks.cancel_scope.cancel()
            gate.open.set()
        assert limiter.borrowed_tokens == 0
        assert limiter.statistics().tasks_waiting == 0

    @on_asyncio
    async def test_token_of_a_waiter_cancelled_when_its_turn_came(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A waiter that is cancelled natively in the tick of its wake-up hands it on."""
        limiter = CapacityLimiter(1)
        gate = Gate()
        first = asyncio.ensure_future(run(gate, limiter=limiter))
        await gate.wait_reached()
        second = asyncio.ensure_future(run(lambda: 2, limiter=limiter))
        third = asyncio.ensure_future(run(lambda: 3, limiter=limiter))
        await let_others_run()
        assert limiter.statistics().tasks_waiting == 2

        def deliver(job: object, real: Callable[[Any], None] = _workers._Job.deliver) -> None:
            real(job)
            second.cancel()  # the limiter has woken it just now

        with monkeypatch.context() as patch:
            patch.setattr(_workers._Job, "deliver", deliver)
            gate.open.set()
            await asyncio.wait([first])
        with anyio.fail_after(PATIENCE):
            assert await third == 3
        with pytest.raises(asyncio.CancelledError):
            await second
        assert limiter.borrowed_tokens == 0
        assert limiter.total_tokens == 1

    async def test_no_thread_to_be_had(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the system gives no thread, run() raises and finish() does it all the same."""
        monkeypatch.setattr(_workers, "_idle", type(_workers._idle)())
        monkeypatch.setattr(threading.Thread, "start", _raiser(RuntimeError("can't start")))
        limiter = CapacityLimiter(1)
        with pytest.raises(RuntimeError, match="can't start"):
            await run(lambda: None, limiter=limiter)
        assert limiter.borrowed_tokens == 0
        done: list[int] = []
        await finish(lambda: done.append(1))
        assert done == [1]

    async def test_a_kept_error_keeps_nothing_else(self) -> None:
        """An OSError of the call does not refer to what the call worked on."""

        class Thing:
            pass

        things = [Thing()]
        reference = weakref.ref(things[0])

        def call(thing: Thing) -> None:
            raise OSError(5, "disk")

        with pytest.raises(OSError, match="disk") as caught:
            await run(lambda: call(things.pop()))
        assert reference() is None
        assert caught.value.errno == 5

    @on_asyncio
    async def test_forgotten_coroutine(self) -> None:
        """Closed while its thread is at work, it ends without a wait; the token comes back."""
        gate = Gate()
        limiter = CapacityLimiter(1)
        coroutine = run(gate, limiter=limiter)
        coroutine.send(None)  # parked
        await gate.wait_reached()
        coroutine.close()
        assert limiter.borrowed_tokens == 1
        gate.open.set()
        await at_rest(limiter)

    @on_trio
    async def test_keyboard_interrupt_while_draining(self) -> None:
        """Ctrl-C reaches the main task of trio when its thread has finished."""
        code = """
            import signal, threading, trio
            from aiommap._workers import run
            # A shell's background job ignores SIGINT, and trio then leaves it so.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            order = []
            def call():
                signal.raise_signal(signal.SIGINT)
                interrupted.wait()
                order.append("thread")
            interrupted = threading.Event()
            async def watch():
                try:
                    await trio.sleep_forever()
                finally:
                    interrupted.set()
            async def main():
                trio.lowlevel.spawn_system_task(release)
                try:
                    await run(call)
                finally:
                    order.append("caller")
            async def release():
                # The interrupt is for the main task, which has it when everything else waits.
                await trio.testing.wait_all_tasks_blocked(0.05)
                interrupted.set()
            import trio.testing
            try:
                trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
            except KeyboardInterrupt:
                order.append("interrupt")
            print(order)
        """
        result = await to_thread.run_sync(run_python, code)
        assert result.stdout.strip() == "['thread', 'caller', 'interrupt']", result.stderr


class TestFinish:
    async def test_starts_before_the_first_await(self) -> None:
        """What must happen happens although the task is cancelled at the first await."""
        done = threading.Event()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await finish(done.set)
        assert done.is_set()

    @on_asyncio
    async def test_native_cancellation(self) -> None:
        """It ends with the cancellation, after the work."""
        gate = Gate()
        task = asyncio.ensure_future(finish(gate))
        await gate.wait_reached()
        for _ in range(3):
            task.cancel()
            await let_others_run()
        assert not task.done()
        gate.open.set()
        with pytest.raises(asyncio.CancelledError):
            await task


class TestTokens:
    @pytest.mark.parametrize("free", [True, False])
    async def test_a_cancelled_one_is_not_lost(self, free: bool) -> None:
        """Whether the token is there at once, where anyio before 4.16 lost it, or comes later."""
        limiter = CapacityLimiter(1)
        if not free:
            limiter.acquire_on_behalf_of_nowait("somebody")
        loop = current_event_loop()
        got = []

        async def acquire() -> None:
            borrower = object()
            await acquire_token(loop, limiter, borrower)
            got.append(borrower)

        if free:
            # No checkpoint: there is no place where a cancellation could take it away.
            coroutine = acquire()
            with pytest.raises(StopIteration):
                coroutine.send(None)
            limiter.release_on_behalf_of(got.pop())
        else:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(acquire)
                await let_others_run()
                limiter.release_on_behalf_of("somebody")
                tasks.cancel_scope.cancel()
            for borrower in got:
                limiter.release_on_behalf_of(borrower)
        assert limiter.borrowed_tokens == 0


class TestCrew:
    async def test_a_batch(self) -> None:
        """Requests that wait are taken together, and all are announced before one is done."""
        crew = new_crew()
        gate = Gate()
        log: list[Any] = []
        requests = [Errand(log=log) for _ in range(3)]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(crew.do, Errand(gate))
            await gate.wait_reached()
            for request in requests:
                tasks.start_soon(crew.do, request)
            await let_others_run()
            gate.open.set()
        assert {name for name, _ in log[:3]} == {"announce"}
        assert log[3:] == [("perform", request) for _, request in log[:3]]

    async def test_announced_again_after_a_slow_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Storage that is busy may have started nothing: it is told again of those who wait."""
        clock = Clock()
        monkeypatch.setattr("aiommap._stream_crew.time", clock)
        crew = new_crew()
        gate = Gate()
        log: list[Any] = []

        def slowly() -> None:
            clock.now += 1

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(crew.do, Errand(gate))
            await gate.wait_reached()
            for _ in range(3):
                tasks.start_soon(crew.do, Errand(slowly, log))
            await let_others_run()
            gate.open.set()
        # The last one is alone, and done at once.
        names = [name for name, _ in log]
        assert names == [*["announce"] * 3, "perform", *["announce"] * 2, "perform", "perform"]

    async def test_a_large_one_takes_no_others_along(self) -> None:
        """Short ones are done together with each other; behind a long one they would wait."""
        crew = new_crew(threads=2)
        crew._some = 16
        gate = Gate()
        large = Errand(gate)
        small = [Errand() for _ in range(8)]
        for each in small:
            each.together = True
        async with anyio.create_task_group() as tasks:
            for each in (large, *small):
                tasks.start_soon(crew.do, each)
            await gate.wait_reached()
            with anyio.fail_after(PATIENCE):
                while not all(each.done for each in small):
                    await checkpoint()
            assert not large.done
            gate.open.set()

    async def test_who_leaves_does_not_look_at_those_who_left(self) -> None:
        """Where many wait for a token and all are cancelled, each looks for the next one once."""
        limiter = CapacityLimiter(1)
        limiter.acquire_on_behalf_of_nowait("somebody")
        crew = new_crew(limiter)
        async with anyio.create_task_group() as tasks:
            requests = [Errand() for _ in range(50)]
            for each in requests:
                tasks.start_soon(crew.do, each)
            await let_others_run()
            assert len(crew._waiting) == 50
            for each in list(crew._waiting)[:40]:
                crew.abandon(each)
            crew._begging = False  # as if that one had left, too
            crew._call_next()
            crew._begging = True
            assert len(crew._waiting) == 10
            assert crew._dropped == 0
            tasks.cancel_scope.cancel()
        limiter.release_on_behalf_of("somebody")
        done = Errand()
        await crew.do(done)
        assert done.done

    async def test_at_most_batch_at_once(self) -> None:
        """No more requests than was said are announced and not done; the rest follows."""
        crew = new_crew(batch=2)
        gate = Gate()
        log: list[Any] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(crew.do, Errand(gate))
            await gate.wait_reached()
            for _ in range(3):
                tasks.start_soon(crew.do, Errand(log=log))
            await let_others_run()
            gate.open.set()
        names = [name for name, _ in log]
        assert names == ["announce", "announce", "perform", "announce", "perform", "perform"]

    async def test_no_more_threads_than_asked_for(self) -> None:
        """However many requests there are, no more threads than that are at work."""
        crew = new_crew(threads=2, batch=1)
        lock = threading.Lock()
        at_work = most = 0
        both = threading.Barrier(2)

        def work() -> None:
            nonlocal at_work, most
            with lock:
                at_work += 1
                most = max(most, at_work)
            both.wait(PATIENCE)
            with lock:
                at_work -= 1

        async with anyio.create_task_group() as tasks:
            for _ in range(6):
                tasks.start_soon(crew.do, Errand(work))
        assert most == 2

    async def test_an_error_is_its_own(self) -> None:
        """One request that fails does not touch the others of its batch."""
        crew = new_crew()
        gate = Gate()
        results: list[str] = []

        async def caller(request: Errand) -> None:
            try:
                await crew.do(request)
                results.append("done")
            except OSError as exc:
                results.append(str(exc.errno))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(crew.do, Errand(gate))
            await gate.wait_reached()
            for error in (None, OSError(5, "disk"), None):
                tasks.start_soon(caller, Errand(_raiser(error) if error else lambda: None))
            await let_others_run()
            gate.open.set()
        assert sorted(results) == ["5", "done", "done"]

    async def test_an_announcement_that_fails(self) -> None:
        """What announce() raises is no reason to leave tasks waiting."""

        class Broken(Errand):
            def announce(self) -> None:
                raise OSError(5, "hint")

        crew = new_crew()
        gate = Gate()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(crew.do, Errand(gate))
            await gate.wait_reached()
            for _ in range(2):
                tasks.start_soon(crew.do, Broken())
            await let_others_run()
            gate.open.set()

    @pytest.mark.parametrize("own", [False, True])
    async def test_a_mistake_of_ours(self, own: bool) -> None:
        """What should never be raised between the requests reaches those who wait for them, and
        the crew works on."""
        broken = True

        class Careless(StreamCrew[Errand]):
            def perform_some(self, requests: Sequence[Errand]) -> None:
                if broken:
                    raise MemoryError
                super().perform_some(requests)

        def perform(requests: list[Errand]) -> Generator[list[Errand], None, list[Errand]]:
            if broken:
                raise MemoryError
            yield from ()
            return requests

        limiter = CapacityLimiter(1)
        loop = current_event_loop()
        crew: Crew[Errand] = Careless(loop, limiter, threads=1, batch=64)
        if own:
            crew = BatchCrew(loop, limiter, batch=64, perform=perform)
        for _ in range(2):
            with pytest.raises(MemoryError):
                await crew.do(Errand())
        broken = False
        await crew.do(Errand())
        await at_rest(limiter)

    @pytest.mark.parametrize(
        "where", ["_begin_announcing", "announce", "_linger", "take", "_work_off"]
    )
    async def test_a_thread_breaks_off(self, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Wherever a thread fails, for want of memory say: nobody is left waiting, the token comes
        back, and the crew works on."""

        def perform(requests: list[Errand]) -> Generator[list[Errand], None, list[Errand]]:
            yield from ()
            return requests

        limiter = CapacityLimiter(1)
        crew: Crew[Errand] = new_crew(limiter)
        if where == "take":
            crew = BatchCrew(current_event_loop(), limiter, batch=64, perform=perform)
        outcomes: list[str] = []

        async def caller() -> None:
            try:
                await crew.do(Errand())
                outcomes.append("done")
            except MemoryError:
                outcomes.append("error")

        with monkeypatch.context() as patch, anyio.fail_after(PATIENCE):
            patch.setattr(crew, where, _raiser(MemoryError()))
            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(caller)
        assert len(outcomes) == 20
        assert (outcomes.count("error") > 0) == (
            where in ("_begin_announcing", "take", "_work_off")
        )
        await crew.do(Errand())
        await at_rest(limiter)

    async def test_a_thread_breaks_off_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """For want of memory it also fails to tell those who wait: it tries again, and counts as
        gone once."""
        limiter = CapacityLimiter(2)
        crew = new_crew(limiter)
        spoil = crew._spoil
        failing = 3

        def spoil_later(seat: Seat[Errand], error: BaseException) -> None:
            nonlocal failing
            if failing:
                failing -= 1
                raise MemoryError
            spoil(seat, error)

        with monkeypatch.context() as patch, anyio.fail_after(PATIENCE):
            patch.setattr(crew, "_spoil", spoil_later)
            patch.setattr(crew, "_begin_announcing", _raiser(MemoryError()))
            with pytest.raises(MemoryError):
                await crew.do(Errand())
            await at_rest(limiter)
        assert (failing, crew._active, crew._performing) == (0, 0, 0)
        with anyio.fail_after(PATIENCE):
            await crew.do(Errand())

    @pytest.mark.parametrize("kind", ["stream", "batch"])
    async def test_a_thread_breaks_off_while_it_lingers(
        self, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The next request does not call a thread that is gone."""

        class BrokenBell:
            def acquire(self, timeout: float) -> bool:
                raise MemoryError

            def release(self) -> None:
                pytest.fail("nobody hears it")

        class BrokenSeat(_crew.Seat[Errand]):
            def __init__(self, token: object) -> None:
                super().__init__(token)
                self.bell = BrokenBell()  # type: ignore[assignment]

        def perform(requests: list[Errand]) -> Generator[list[Errand], None, list[Errand]]:
            yield from ()
            return requests

        monkeypatch.setattr(_crew, "Seat", BrokenSeat)
        limiter = CapacityLimiter(2)
        crew: Crew[Errand] = new_crew(limiter)
        if kind == "batch":
            crew = BatchCrew(current_event_loop(), limiter, batch=64, perform=perform)
        with anyio.fail_after(PATIENCE):
            for _ in range(3):
                await crew.do(Errand())
                await at_rest(limiter)
                assert (crew._lingering, crew._active) == ([], 0)

    async def test_no_memory_to_tell_the_loop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A thread tries again and again to hand back what it did."""
        loop = current_event_loop()
        limiter = CapacityLimiter(1)
        crew = new_crew(limiter)
        left = 30

        class Forgetful:
            def __getattr__(self, name: str) -> Any:
                return getattr(loop, name)

            def post(self, *args: Any) -> bool:
                nonlocal left
                left -= 1
                if left > 0:
                    raise MemoryError
                return loop.post(*args)

        monkeypatch.setattr(crew, "_loop", Forgetful())
        with anyio.fail_after(PATIENCE):
            await crew.do(Errand())
            await at_rest(limiter)
            assert left < 0
            await crew.do(Errand())
        await at_rest(limiter)

    async def test_no_memory_to_hand_a_group_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nor is anybody lost whom a thread has taken when it cannot tell the loop of others."""
        loop = current_event_loop()
        limiter = CapacityLimiter(1)
        failing = 2

        class Forgetful:
            def __getattr__(self, name: str) -> Any:
                return getattr(loop, name)

            def post(self, *args: Any) -> bool:
                nonlocal failing
                if failing:
                    failing -= 1
                    raise MemoryError
                return loop.post(*args)

        def perform(requests: list[Errand]) -> Generator[list[Errand], None, list[Errand]]:
            for request in requests:
                request.work()
            yield requests[:1]
            more = crew.take()
            if more:
                raise ZeroDivisionError
            return requests[1:]

        crew = BatchCrew(loop, limiter, batch=64, perform=perform)
        monkeypatch.setattr(crew, "_loop", Forgetful())
        gate = Gate()
        outcomes: list[str] = []

        async def caller(request: Errand) -> None:
            try:
                await crew.do(request)
                outcomes.append("done")
            except ZeroDivisionError:
                outcomes.append("error")

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(caller, Errand(gate))
                await gate.wait_reached()
                for _ in range(3):
                    tasks.start_soon(caller, Errand())
                await let_others_run()
                gate.open.set()
        assert sorted(outcomes) == ["done", "error", "error", "error"]
        await at_rest(limiter)

    async def test_closed_it_keeps_no_token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """After close() a thread that waits for more to do has no token, nor waits the next."""
        monkeypatch.setattr(_crew, "LINGER_SECONDS", PATIENCE)
        limiter = CapacityLimiter(3)
        crew = new_crew(limiter)
        await crew.do(Errand())
        await lingering(crew, 1)
        assert limiter.borrowed_tokens == 1
        crew.close()
        assert limiter.borrowed_tokens == 0
        await crew.do(Errand())
        assert not crew._lingering
        await at_rest(limiter)

    async def test_cancelled_before_a_thread_took_it(self) -> None:
        """It is not done, and lets go of what it would have touched."""
        crew = new_crew()
        gate = Gate()
        late = Errand()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(crew.do, Errand(gate))
            await gate.wait_reached()
            async with anyio.create_task_group() as cancelled:
                cancelled.start_soon(crew.do, late)
                await let_others_run()
                cancelled.cancel_scope.cancel()
            assert late.forgotten
            gate.open.set()
        await crew.do(Errand())
        assert late.log == []

    async def test_cancelled_while_under_way(self) -> None:
        """Its caller leaves at once; the request goes on, and the crew works on."""
        crew = new_crew()
        gate = Gate()
        request = Errand(gate)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(crew.do, request)
            await gate.wait_reached()
            tasks.cancel_scope.cancel()
        assert not request.done
        assert not request.forgotten
        gate.open.set()
        await crew.do(Errand())
        assert request.done

    @on_asyncio
    async def test_stay(self) -> None:
        """With stay the caller leaves when the thread has, however often it is cancelled."""
        crew = new_crew()
        gate = Gate()
        request = Errand(gate)
        task = asyncio.ensure_future(crew.do(request, stay=True))
        await gate.wait_reached()
        for _ in range(3):
            task.cancel()
            await let_others_run()
        assert not task.done()
        gate.open.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert request.done

    async def test_no_thread_to_be_had(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The task gets the error, and the request is not done later behind its back."""
        limiter = CapacityLimiter(1)
        crew = new_crew(limiter)
        request = Errand()
        with monkeypatch.context() as patch:
            patch.setattr(_workers, "_idle", type(_workers._idle)())
            patch.setattr(threading.Thread, "start", _raiser(RuntimeError("can't start")))
            with pytest.raises(RuntimeError, match="can't start"):
                await crew.do(request)
        assert limiter.borrowed_tokens == 0
        await crew.do(Errand())
        assert request.log == []
        assert request.forgotten

    @on_asyncio
    async def test_forgotten_coroutine(self) -> None:
        """Closed while it waits, it ends without a wait, and others are served."""
        crew = new_crew()
        gate = Gate()
        coroutine = crew.do(Errand(gate), stay=True)
        coroutine.send(None)
        await gate.wait_reached()
        waiting = Errand()
        second = crew.do(waiting)
        second.send(None)
        second.close()
        coroutine.close()
        gate.open.set()
        await crew.do(Errand())
        assert waiting.log == []

    async def test_garbage_that_is_collected_while_the_lock_is_held(self) -> None:
        """The collector may end a task's request in the middle of the crew's own work."""
        crew = new_crew()
        with crew._lock:
            crew.abandon(Errand())

    async def test_abandoned_requests_do_not_pile_up(self) -> None:
        """A crew that gets no token forgets what was abandoned meanwhile."""
        limiter = CapacityLimiter(1)
        crew = new_crew(limiter, batch=4)
        limiter.acquire_on_behalf_of_nowait(self)
        for _ in range(100):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await crew.do(Errand())
        assert len(crew._waiting) < 20
        limiter.release_on_behalf_of(self)
        await crew.do(Errand())


class TestStarvation:
    """The limiter has no token left for a crew."""

    async def test_one_begs_for_all(self) -> None:
        """Of the tasks that wait, one asks the limiter, and all are served in one batch."""
        limiter = CapacityLimiter(1)
        crew = new_crew(limiter)
        limiter.acquire_on_behalf_of_nowait(self)
        log: list[Any] = []
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(crew.do, Errand(log=log))
            await let_others_run()
            assert limiter.statistics().tasks_waiting == 1
            limiter.release_on_behalf_of(self)
        assert [name for name, _ in log] == ["announce"] * 5 + ["perform"] * 5
        await at_rest(limiter)

    async def test_the_beggar_is_cancelled(self) -> None:
        """Another one begs in its place."""
        limiter = CapacityLimiter(1)
        crew = new_crew(limiter)
        limiter.acquire_on_behalf_of_nowait(self)
        request = Errand()
        async with anyio.create_task_group() as tasks:
            async with anyio.create_task_group() as cancelled:
                cancelled.start_soon(crew.do, Errand())
                await let_others_run()
                tasks.start_soon(crew.do, request)
                await let_others_run()
                cancelled.cancel_scope.cancel()
            await let_others_run()
            assert limiter.statistics().tasks_waiting == 1
            limiter.release_on_behalf_of(self)
        assert request.done
        await at_rest(limiter)

    @pytest.mark.parametrize("cancelled", [{0, 1}, {1, 0, 2}, {0, 2}, {3, 0}])
    async def test_several_are_cancelled_in_one_tick(self, cancelled: set[int]) -> None:
        """Also where the one that was to beg next goes in the same moment."""
        limiter = CapacityLimiter(1)
        crew = new_crew(limiter)
        limiter.acquire_on_behalf_of_nowait(self)
        requests = [Errand() for _ in range(5)]
        scopes = [anyio.CancelScope() for _ in requests]

        async def caller(request: Errand, scope: anyio.CancelScope) -> None:
            with scope:
                await crew.do(request)

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                for request, scope in zip(requests, scopes, strict=True):
                    tasks.start_soon(caller, request, scope)
                    await let_others_run()
                for number in cancelled:
                    scopes[number].cancel()
                await let_others_run()
                assert limiter.statistics().tasks_waiting == 1
                limiter.release_on_behalf_of(self)
        assert {number for number in range(5) if not requests[number].done} == cancelled
        await at_rest(limiter)

    @on_asyncio
    @pytest.mark.parametrize("cancelled", [[0, 1], [1, 0], [0, 1, 2]])
    async def test_several_are_cancelled_natively_in_one_tick(self, cancelled: list[int]) -> None:
        """The same by task.cancel(), also in the tick in which the token comes."""
        limiter = CapacityLimiter(1)
        crew = new_crew(limiter)
        limiter.acquire_on_behalf_of_nowait(self)
        requests = [Errand() for _ in range(4)]
        callers = []
        for request in requests:
            callers.append(asyncio.ensure_future(crew.do(request)))
            await let_others_run()
        limiter.release_on_behalf_of(self)
        for number in cancelled:
            callers[number].cancel()
        with anyio.fail_after(PATIENCE):
            await asyncio.wait(callers)
        assert requests[3].done
        await at_rest(limiter)
        assert limiter.total_tokens == 1

    async def test_the_beggar_comes_too_late(self) -> None:
        """A token that is begged when a thread is at work already is given back."""
        limiter = CapacityLimiter(1)
        crew = new_crew(limiter)
        limiter.acquire_on_behalf_of_nowait(self)
        gate = Gate()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(crew.do, Errand(gate))
            await let_others_run()
            limiter.total_tokens = 3
            extra = object()
            await limiter.acquire_on_behalf_of(extra)
            crew._employ(extra)  # as if it had been the second to get one
            await gate.wait_reached()
            assert crew._active == 1
            assert limiter.borrowed_tokens == 2  # the test's and the thread's
            gate.open.set()
        limiter.release_on_behalf_of(self)
        await at_rest(limiter)

    async def test_a_busy_crew_does_not_keep_the_token(self) -> None:
        """While one crew always has work, another one on the same limiter is served."""
        limiter = CapacityLimiter(1)
        busy = new_crew(limiter)
        other = new_crew(limiter)
        stop = False

        async def keep_busy() -> None:
            while not stop:
                await busy.do(Errand())

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                for _ in range(4):
                    tasks.start_soon(keep_busy)
                await let_others_run()
                for _ in range(10):
                    await other.do(Errand())
                    await run(lambda: None, limiter=limiter)
                stop = True
        await at_rest(limiter)

    async def test_a_thread_is_refused_after_a_yield(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where no thread can be had to go on with, the tasks that wait get the error."""
        limiter = CapacityLimiter(1)
        crew = new_crew(limiter)
        gate = Gate()
        results: list[str] = []

        async def caller() -> None:
            try:
                await crew.do(Errand())
            except RuntimeError as exc:
                results.append(str(exc))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(crew.do, Errand(gate))
            await gate.wait_reached()
            tasks.start_soon(caller)
            tasks.start_soon(caller)
            await let_others_run()
            crew._yielding = True
            with monkeypatch.context() as patch:
                patch.setattr(_crew, "start", _raiser(RuntimeError("can't start")))
                gate.open.set()
                while len(results) < 2:
                    await let_others_run()
        assert results == ["can't start"] * 2
        await at_rest(limiter)

    async def test_many_maps_on_one_token(self, tmp_path: Any) -> None:
        """A CapacityLimiter(1) of the caller's serves many maps, each with many tasks."""
        limiter = CapacityLimiter(1)
        path = file_of(tmp_path, 1 << 20)

        async def work(number: int) -> None:
            async with AsyncMmap.open_path(path, "r+", limiter=limiter) as m:

                async def use(start: int) -> None:
                    await m.write_at(start, bytes([number]) * 100)
                    assert await m.find(b"\xff") == -1
                    await m.flush_range(start, 100)
                    await m.load()

                async with anyio.create_task_group() as inner:
                    for task in range(4):
                        inner.start_soon(use, task << 18)

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                for number in range(20):
                    tasks.start_soon(work, number)
        await at_rest(limiter)


class TestThreads:
    def test_threads_are_used_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Work that comes after work is done by the thread that is idle: none is started."""
        started = 0
        start_thread = _workers._Thread.start

        def counted(thread: _workers._Thread) -> None:
            nonlocal started
            started += 1
            start_thread(thread)

        # Threads of earlier tests may still come to be idle, which is all the better.
        monkeypatch.setattr(_workers, "_idle", type(_workers._idle)())
        monkeypatch.setattr(_workers._Thread, "start", counted)
        for _ in range(10):
            done = threading.Event()
            start(done.set)
            assert done.wait(PATIENCE)
            while not _workers._idle:  # it says that it is idle a moment after
                pass
        assert started == 1

    def test_an_idle_thread_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A thread that gets no work for a while is gone, and the next work gets a new one."""
        monkeypatch.setattr(_workers, "_idle", type(_workers._idle)())
        monkeypatch.setattr(_workers, "IDLE_SECONDS", 0.01)
        threads: list[threading.Thread] = []
        for _ in range(3):
            done = threading.Event()

            def work(done: threading.Event = done) -> None:
                threads.append(threading.current_thread())
                done.set()

            start(work)
            assert done.wait(PATIENCE)
            threads[-1].join(PATIENCE)
            assert not threads[-1].is_alive()
        assert len(set(threads)) == 3

    def test_what_work_refers_to_goes_with_it(self) -> None:
        """An idle thread keeps nothing of its last piece of work."""

        class Thing:
            pass

        gone = threading.Event()
        thing = Thing()
        weakref.finalize(thing, gone.set)
        pieces = [partial(id, thing)]
        del thing
        start(pieces.pop())
        assert gone.wait(PATIENCE)

    def test_a_result_arrives_after_the_loop_has_ended(self) -> None:
        """A thread that has nobody to tell any more ends quietly."""
        code = """
            import asyncio, threading
            from aiommap import _workers
            gate = threading.Event()
            at_work = threading.Event()
            def call():
                at_work.set()
                gate.wait()
            loop = asyncio.new_event_loop()
            task = loop.create_task(_workers.run(call))
            async def until():
                while not at_work.is_set():
                    await asyncio.sleep(0)
            loop.run_until_complete(until())
            loop.close()
            done = threading.Event()
            gate.set()
            while not _workers._idle:
                pass
            task._log_destroy_pending = False
            del task
            print("ok")
        """
        result = run_python(code)
        assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    @pytest.mark.parametrize("how", ["run", "crew"])
    def test_a_token_comes_back_after_the_loop_has_ended(self, backend: str, how: str) -> None:
        """A limiter that is used by one event loop after another loses no token to a thread that
        is still at work when the first one ends."""
        limiter = CapacityLimiter(1)
        gate = Gate()

        async def first() -> None:
            async with anyio.create_task_group() as tasks:
                if how == "crew":
                    tasks.start_soon(new_crew(limiter).do, Errand(gate))
                    await gate.wait_reached()
                    tasks.cancel_scope.cancel()
                else:
                    loop = current_event_loop()
                    job: _workers._Job[None] = _workers._Job(loop, gate)
                    job.limiter = limiter
                    limiter.acquire_on_behalf_of_nowait(job)
                    start(job)

        async def second() -> None:
            gate.open.set()
            with anyio.fail_after(PATIENCE):
                while limiter.borrowed_tokens:
                    await to_thread.run_sync(lambda: None)
                assert await run(lambda: 1, limiter=limiter) == 1

        limiter = CapacityLimiter(1)
        anyio.run(first, backend=backend)
        anyio.run(second, backend=backend)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_fork_while_threads_are_at_work(self) -> None:
        """A forked child starts threads of its own, whatever the parent's are doing."""
        code = """
            import os, sys, threading, warnings
            import anyio
            from aiommap import AsyncMmap
            from aiommap._workers import start
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork with threads
            async def main(name):
                async with AsyncMmap.anonymous(1 << 20) as m:
                    await m.write_at(0, name)
                    await m.load()
                    return await m.find(name)
            gate, at_work, idle = threading.Event(), threading.Event(), threading.Event()
            start(lambda: (at_work.set(), gate.wait()))
            start(idle.set)
            at_work.wait()
            idle.wait()
            child = os.fork()
            if child == 0:
                os._exit(anyio.run(main, b"child"))
            assert anyio.run(main, b"parent") == 0
            gate.set()
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status))
        """
        result = run_python(code)
        assert (result.returncode, result.stdout, result.stderr) == (0, "0\n", "")


def _raiser(error: BaseException) -> Callable[..., Any]:
    def raise_it(*_: object, **__: object) -> None:
        raise error

    return raise_it
