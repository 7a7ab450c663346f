"""The event loop layer: identity, parking, posting from threads."""

from __future__ import annotations

import asyncio
import threading

import anyio
import pytest

from aiommap._event_loop import current_event_loop

from .processes import run_python

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_parking_survives_native_cancellation() -> None:
    """A wait that was cancelled natively can be parked on again and is woken then."""
    parking = current_event_loop().parking()
    parked = asyncio.Event()
    order: list[str] = []

    async def wait() -> None:
        parked.set()
        try:
            await parking.park()
        except asyncio.CancelledError:
            order.append("cancelled")
        await parking.park()
        order.append("woken")

    task = asyncio.ensure_future(wait())
    await parked.wait()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    parking.wake()
    await task
    assert order == ["cancelled", "woken"]


async def test_wake_before_park_is_not_lost() -> None:
    """A wake-up that comes first ends the wait at once."""
    parking = current_event_loop().parking()
    parking.wake()
    with anyio.fail_after(5):
        await parking.park()


async def test_wake_twice_is_harmless() -> None:
    """Waking again, and waking a task that has left, does nothing."""
    loop = current_event_loop()
    parking = loop.parking()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await parking.park()
    assert scope.cancelled_caught
    parking.wake()
    parking.wake()
    await loop.checkpoint()


async def test_park_is_cancelled_by_a_scope() -> None:
    """Parking is a cancellation point."""
    parking = current_event_loop().parking()
    with anyio.move_on_after(0) as scope:
        await parking.park()
    assert scope.cancelled_caught


def test_post_to_an_abandoned_guest_run() -> None:
    """Where trio's host loop ends before it, that is the end of the loop: no error in a thread."""
    code = """
        import gc, trio
        from collections import deque
        from aiommap._event_loop import current_event_loop

        async def main():
            loops.append(current_event_loop())
            await trio.sleep_forever()

        calls, loops = deque(), []
        trio.lowlevel.start_guest_run(
            main, run_sync_soon_threadsafe=calls.append, done_callback=print
        )
        while not loops:
            calls.popleft()()
        assert loops[0].post(print)
        while not calls:  # trio's thread has woken, and refers to the run no more
            pass
        calls.clear()
        gc.collect()
        assert not loops[0].post(print)
        print("ok")
    """
    assert run_python(code).stdout == "ok\n"


async def test_post_from_a_thread_wakes_the_loop() -> None:
    """A thread's post runs in the loop's thread, without the thread waiting for it."""
    loop = current_event_loop()
    parking = loop.parking()
    ran_in: list[int] = []

    def callback() -> None:
        ran_in.append(threading.get_ident())
        parking.wake()

    thread = threading.Thread(target=loop.post, args=(callback,))
    thread.start()
    with anyio.fail_after(5):
        await parking.park()
    thread.join()
    assert ran_in == [threading.get_ident()]


async def test_current_task_tells_tasks_apart() -> None:
    """Two tasks have two identities, one task always the same."""
    loop = current_event_loop()
    seen: list[object] = []

    async def look() -> None:
        seen.append(loop.current_task())

    async with anyio.create_task_group() as tg:
        tg.start_soon(look)
    assert loop.current_task() is loop.current_task()
    assert seen[0] is not loop.current_task()


async def test_checkpoint_lets_others_run_and_is_cancellable() -> None:
    """A checkpoint yields once, and raises in a cancelled scope."""
    loop = current_event_loop()
    ran = anyio.Event()

    async def other() -> None:
        ran.set()

    async with anyio.create_task_group() as tg:
        tg.start_soon(other)
        for _ in range(3):
            await loop.checkpoint()
        assert ran.is_set()
    with anyio.CancelScope() as scope:
        scope.cancel()
        for _ in range(3):
            await loop.checkpoint()
    assert scope.cancelled_caught


async def test_is_running_here_only_in_the_loop() -> None:
    """Other threads, with a loop of their own or without, are strangers."""
    loop = current_event_loop()
    assert loop.is_running_here()
    answers: list[bool] = []

    async def ask() -> None:
        answers.append(loop.is_running_here())

    def in_thread() -> None:
        answers.append(loop.is_running_here())
        anyio.run(ask, backend="asyncio")
        anyio.run(ask, backend="trio")

    await anyio.to_thread.run_sync(in_thread)
    assert answers == [False, False, False]


def test_no_loop() -> None:
    """Outside an event loop there is none, and the error says so."""
    with pytest.raises(RuntimeError, match="no event loop runs in this thread"):
        current_event_loop()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_post_to_a_loop_that_is_over(backend: str) -> None:
    """A post after the loop's end does nothing and says so."""

    async def main() -> object:
        return current_event_loop()

    loop = anyio.run(main, backend=backend)
    assert loop.post(print) is False  # type: ignore[attr-defined]
