"""Descriptors are closed by workers: on FUSE the last close waits for the write-back of a file."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest
from anyio.lowlevel import checkpoint

from aiommap import AsyncMmap, Protection, _file
from aiommap._kernel import native

from .content import file_of, gone, only_linux
from .fake_kernel import FakeKernel
from .flushing import begin, entered, mapped_by, opened

pytestmark = only_linux


@pytest.fixture
def closings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads in which descriptors of the package are closed."""
    threads: list[int] = []
    real = _file._close

    def close(fd: int) -> None:
        threads.append(threading.get_ident())
        real(fd)

    monkeypatch.setattr(_file, "_close", close)
    return threads


async def drop_a_pending_flush(path: Path) -> None:
    fake = FakeKernel()
    async with opened(fake, path) as m:
        pending = await m.flush_async()
    del pending
    await gone(path)


async def close_during_a_flush(path: Path) -> None:
    fake = FakeKernel()
    async with anyio.create_task_group() as tasks:
        async with opened(fake, path) as m:
            hold = fake.hold("sync_data")
            flush = begin(tasks, m.flush)
            await entered(hold)
        hold.release.set()
        assert await flush.get() is None
    await gone(path)


async def cancel_an_opening(path: Path) -> None:
    limiter = anyio.CapacityLimiter(1)
    with path.open("rb") as file:
        async with limiter:
            with anyio.CancelScope() as scope:
                opening = AsyncMmap.open(file, limiter=limiter)
                async with anyio.create_task_group() as tasks:

                    async def cancel() -> None:
                        while not limiter.statistics().tasks_waiting:
                            await checkpoint()
                        scope.cancel()

                    tasks.start_soon(cancel)
                    await opening
    await gone(path)


async def cancel_a_closing(path: Path) -> None:
    fake = FakeKernel()
    m = await mapped_by(fake).open_path(path, "r+")
    await m.write_at(0, b"x")
    hold = fake.hold("sync_data")
    async with anyio.create_task_group() as tasks:
        closing = begin(tasks, m.aclose)
        await entered(hold)
        closing.scope.cancel()
        await closing.done.wait()
    hold.release.set()
    await gone(path)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "how", [drop_a_pending_flush, close_during_a_flush, cancel_an_opening, cancel_a_closing]
)
async def test_no_descriptor_is_closed_on_the_loop(
    tmp_path: Path, closings: list[int], how: Callable[[Path], Awaitable[None]]
) -> None:
    """Whoever is the last to use the file, a worker closes it."""
    await how(file_of(tmp_path, 1 << 20))
    assert closings
    assert threading.get_ident() not in closings


def test_without_an_event_loop_it_is_closed_at_once(tmp_path: Path, closings: list[int]) -> None:
    """The control: there is nobody to hold up."""
    file = _file.open_file(native, str(file_of(tmp_path, 10)), Protection.READ)
    del file
    assert closings == [threading.get_ident()]
