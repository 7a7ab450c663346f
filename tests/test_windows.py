"""windows(): a range in consecutive pieces of memory."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import threading
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import BusyResourceError, ClosedResourceError, WouldBlock, to_thread
from anyio.lowlevel import checkpoint

from aiommap import AsyncMmap, DeadlockError, TruncatedError
from aiommap._pager import Pager
from aiommap._paging_crew import Load
from aiommap._window_stream import Windows

from .clock import Clock
from .content import file_of, inc
from .fake_kernel import Call, FakeKernel

pytestmark = pytest.mark.anyio

N = 100_000


@pytest.fixture
async def m(tmp_path: Path) -> AsyncIterator[AsyncMmap]:
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N)), "r+") as m:
        yield m


async def can_write(m: AsyncMmap, offset: int, length: int = 1) -> bool:
    """Whether another task could write there now."""
    result = []

    async def ask() -> None:
        try:
            async with m.view_mut_nowait(offset, length):
                result.append(True)
        except WouldBlock:
            result.append(False)

    async with anyio.create_task_group() as tg:
        tg.start_soon(ask)
    return result[0]


@pytest.mark.parametrize("size", [1, 999, 4096, N - 1, N, N + 1, 2**40])
async def test_windows_cover_the_range_in_order(m: AsyncMmap, size: int) -> None:
    """Each window is read-only, as large as asked for but for the last, and they follow."""
    length = N if size > 1 else 100
    data = b""
    async for window in m.windows(size, length=length):
        assert window.readonly
        assert len(window) == min(size, length - len(data))
        data += window
    assert data == inc(length)


async def test_the_example_of_the_docstring(m: AsyncMmap) -> None:
    """A checksum over windows of the default size is that of the file."""
    checksum = 0
    async for window in m.windows():
        checksum = zlib.crc32(window, checksum)
    assert checksum == zlib.crc32(inc(N))


async def test_a_part_of_the_map(m: AsyncMmap) -> None:
    """Offset and length cut out a part; an empty part has no windows."""
    parts = [bytes(window) async for window in m.windows(10, offset=5, length=25)]
    assert parts == [inc(10, 5), inc(10, 15), inc(5, 25)]
    assert [w async for w in m.windows(offset=N)] == []
    assert [w async for w in m.windows(offset=5, length=0)] == []


async def test_wrong_arguments(m: AsyncMmap) -> None:
    """Sizes below 1, ranges outside and what is no integer raise in the call."""
    for size in (0, -1):
        with pytest.raises(ValueError, match="size must be at least 1"):
            m.windows(size)
    with pytest.raises(TypeError, match="size must be an integer"):
        m.windows(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not inside the map"):
        m.windows(offset=N + 1)


async def test_the_region_of_the_window_in_hand_is_held_shared(m: AsyncMmap) -> None:
    """Others may read the window in hand and write everywhere else; a step moves on."""
    seen = []
    async for window in m.windows(10, length=30):
        start = window[0]
        for other in (0, 10, 20):
            assert await can_write(m, other, 10) == (other != start)
        seen.append(start)
    assert seen == [0, 10, 20]
    assert await can_write(m, 0, 30)


async def test_a_window_is_released_at_the_next_step(m: AsyncMmap) -> None:
    """After the step the window's memory is gone, also after the last one."""
    last = None
    async for window in m.windows(10, length=30):
        if last is not None:
            with pytest.raises(ValueError, match="released"):
                last[0]
        last = window
    assert last is not None
    with pytest.raises(ValueError, match="released"):
        last[0]


@pytest.mark.parametrize("how", ["break", "exception", "aclose", "async with", "delete"])
async def test_leaving_early_frees_the_region_at_once(m: AsyncMmap, how: str) -> None:
    """However the loop is left, the same task may write to the region right away."""
    if how == "break":
        async for _window in m.windows(10):
            break
    elif how == "exception":
        with pytest.raises(KeyError, match="mine"):
            async for _window in m.windows(10):
                raise KeyError("mine")
    elif how == "aclose":
        windows = m.windows(10)
        await anext(windows)
        await windows.aclose()
        await windows.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(windows)
    elif how == "async with":
        async with m.windows(10) as windows:
            async for window in windows:
                assert window[0] == 0
                break
    else:
        windows = m.windows(10)
        await anext(windows)
        del windows
    async with m.view_mut_nowait(0, N):
        pass
    # The window is gone too: nothing keeps the map from being resized.
    await m.resize(N + 1)


async def test_leaving_by_cancellation_frees_the_region(m: AsyncMmap) -> None:
    """A task that is cancelled in the loop leaves nothing."""

    async def stop() -> None:
        async for _window in m.windows(10):
            await anyio.sleep_forever()

    async with anyio.create_task_group() as tg:
        tg.start_soon(stop)
        await anyio.wait_all_tasks_blocked()
        assert not await can_write(m, 0)
        tg.cancel_scope.cancel()
    gc.collect()
    await anyio.wait_all_tasks_blocked()
    assert await can_write(m, 0, N)


async def test_a_window_waits_for_a_writer(m: AsyncMmap) -> None:
    """A step waits until the writer of the next window has gone, and shows what it stored."""
    held = await m.view_mut(10, 10)
    seen = []

    async def look() -> None:
        async for window in m.windows(10, length=30):
            seen.append(window[0])

    async with anyio.create_task_group() as tg:
        tg.start_soon(look)
        await anyio.wait_all_tasks_blocked()
        assert seen == [0]
        held[0] = 99
        await held.aclose()
    assert seen == [0, 99, 20]


async def test_an_own_conflicting_view(m: AsyncMmap) -> None:
    """A window over what the task holds exclusively is a DeadlockError."""
    async with m.view_mut(10, 10):
        windows = m.windows(10)
        await anext(windows)
        with pytest.raises(DeadlockError, match="holds"):
            await anext(windows)
        await windows.aclose()
    assert await can_write(m, 0, N)


async def test_arrays_over_a_window(m: AsyncMmap) -> None:
    """A step while arrays over the window are alive is a BufferError; its region is free."""
    windows = m.windows(10)
    kept = pickle.PickleBuffer(await anext(windows))
    with pytest.raises(BufferError, match="exported buffer"):
        await anext(windows)
    assert await can_write(m, 0, N)
    assert bytes(kept.raw()) == inc(10)
    kept.release()
    assert await anext(windows) == inc(10, 10)
    kept = pickle.PickleBuffer(windows._window)  # type: ignore[arg-type]
    with pytest.raises(BufferError, match="exported buffer"):
        await windows.aclose()
    assert await can_write(m, 0, N)
    kept.release()


async def test_after_the_map_has_closed(tmp_path: Path) -> None:
    """A step after the map was closed is a ClosedResourceError; the window in hand is memory."""
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N))) as m:
        windows = m.windows(10)
        window = await anext(windows)
    assert bytes(window) == inc(10)
    with pytest.raises(ClosedResourceError, match="closed"):
        await anext(windows)
    with pytest.raises(ValueError, match="released"):
        window[0]


async def test_a_truncated_file(tmp_path: Path) -> None:
    """Windows that the file does not reach are a TruncatedError, those before are fine."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path) as m:
        os.truncate(path, 8192)
        seen = 0
        with pytest.raises(TruncatedError, match="reaches to byte 8192") as caught:
            async for window in m.windows(4096):
                seen += len(window)
        assert seen == 8192
        assert caught.value.size == 8192
        os.truncate(path, N)


async def test_resized_meanwhile(m: AsyncMmap) -> None:
    """A window that a resize has cut off is a ValueError that says so."""
    seen = []

    async def look() -> None:
        with pytest.raises(ValueError, match="not inside the map any more"):
            async for window in m.windows(10_000):
                seen.append(len(window))

    held = await m.view_mut(20_000, 10)
    async with anyio.create_task_group() as tg:
        tg.start_soon(m.resize, 15_000)
        await anyio.wait_all_tasks_blocked()
        tg.start_soon(look)  # behind the resize, from its first window on
        await anyio.wait_all_tasks_blocked()
        assert seen == []
        await held.aclose()
    assert seen == [10_000]


class Mmap(AsyncMmap):
    """A map on a kernel that a test looks into."""


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    kernel = FakeKernel()
    # As on a disk that reads 128 KiB ahead by itself, whatever the disk here does.
    kernel.wrap("longest_hint", lambda real, fd: 128 << 10)
    monkeypatch.setattr(Mmap, "_kernel", kernel)
    return kernel


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("aiommap._window_stream.monotonic", clock.monotonic)
    monkeypatch.setattr("aiommap._paging_crew.time", clock)
    return clock


async def test_cold_windows_are_loaded_in_a_worker_and_ahead(
    tmp_path: Path, kernel: FakeKernel
) -> None:
    """Where pages are not in memory, they are loaded off the loop, the next pieces as well."""
    size = 12 << 20
    path = file_of(tmp_path, inc(size))
    # Nothing is in memory, as far as can be told without waiting.
    kernel.fail("read_nowait", errno.EAGAIN)
    kernel.fail("resident", errno.EAGAIN)
    async with Mmap.open_path(path) as m:
        windows = m.windows(1 << 20)
        await anext(windows)
        await loaded(kernel, 4 << 20)
        assert threading.get_ident() not in {each.thread for each in loads(kernel)}
        await windows.aclose()
        total = 0
        async for window in m.windows(1 << 20):
            total = zlib.crc32(window, total)
    assert total == zlib.crc32(inc(size))


def loads(kernel: FakeKernel) -> list[Call]:
    return [call for call in list(kernel.calls) if call.name == "populate_read"]


async def loaded(kernel: FakeKernel, length: int) -> None:
    """Wait until so many bytes have been asked for."""
    with anyio.fail_after(30):
        while sum(each.arguments[1] for each in loads(kernel)) < length:
            await checkpoint()


async def all_there(windows: Windows) -> None:
    """Wait until what is being read ahead is there."""
    with anyio.fail_after(30):
        while not all(each.done for each in windows._loads):
            await checkpoint()


async def test_the_read_ahead_is_bounded(tmp_path: Path, kernel: FakeKernel, clock: Clock) -> None:
    """With a consumer that does not go on, at most 32 MiB behind its window are asked for."""
    kernel.fail("resident", errno.EAGAIN, times=1)  # the first window is not in memory
    async with Mmap.open_path(file_of(tmp_path, 192 << 20)) as m:
        async with m.windows(1 << 20) as windows:
            for _ in range(100):
                await anext(windows)
            # On a disk that takes no time the pieces are as large as they get.
            assert max(each.arguments[1] for each in loads(kernel)) == 16 << 20
            await loaded(kernel, 116 << 20)
            for _ in range(100):
                await checkpoint()
            assert sum(each.arguments[1] for each in loads(kernel)) <= 132 << 20


async def test_pieces_of_a_slow_disk_are_small(
    tmp_path: Path, kernel: FakeKernel, clock: Clock
) -> None:
    """At 4 MiB a second nobody else waits for seconds until two pieces of 16 MiB are there."""

    def populate(real: Callable[..., None], address: int, length: int) -> None:
        clock.now += length / (4 << 20)
        real(address, length)

    kernel.wrap("populate_read", populate)
    kernel.fail("read_nowait", errno.EAGAIN)
    kernel.fail("resident", errno.EAGAIN)
    async with Mmap.open_path(file_of(tmp_path, 16 << 20)) as m:
        async for _ in m.windows(64 << 10, length=12 << 20):
            pass
        assert loads(kernel)[-1].arguments[1] <= 256 << 10


async def test_of_two_tasks_one_is_refused(m: AsyncMmap) -> None:
    """Windows belong to one task; another one's step is an error, and takes nothing away."""
    windows = m.windows(4096)
    held = await m.view_mut(0, 1)
    seen = []

    async def step() -> None:
        seen.append(bytes(await anext(windows)))

    async with anyio.create_task_group() as tg:
        tg.start_soon(step)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(BusyResourceError):
            await anext(windows)
        with pytest.raises(BusyResourceError):
            await windows.aclose()
        await held.aclose()
    assert seen == [inc(4096)]
    await windows.aclose()


async def test_a_kept_error_keeps_no_stream(tmp_path: Path, kernel: FakeKernel) -> None:
    """Who keeps what ended a loop over windows keeps neither their loads nor their share."""
    kernel.fail("read_nowait", errno.EAGAIN)
    kernel.fail("resident", errno.EAGAIN)
    path = file_of(tmp_path, 4 << 20)
    async with Mmap.open_path(path) as m:

        async def scan() -> None:
            async for _ in m.windows(64 << 10):
                os.truncate(path, 0)

        with pytest.raises(TruncatedError) as kept:
            await scan()
        await checkpoint()
        assert kept.value.size == 0
        assert not m._core.pager._streamed._users


async def test_no_more_pieces_are_under_way_than_threads_take(
    tmp_path: Path, kernel: FakeKernel
) -> None:
    """Others' requests wait for the three pieces before them, and not for all that is ahead."""
    kernel.fail("resident", errno.EAGAIN, times=1)
    async with Mmap.open_path(file_of(tmp_path, 16 << 20)) as m, m.windows(1 << 20) as windows:
        with kernel.hold("populate_read") as hold:
            async with anyio.create_task_group() as tg:
                tg.start_soon(anext, windows)
                await to_thread.run_sync(hold.wait_entered)
                # Announced farther ahead, four pieces of 1 MiB, but not asked for.
                assert windows._loads_end == 3 << 20
                tg.cancel_scope.cancel()


async def test_a_map_that_was_smaller_for_a_while(tmp_path: Path, kernel: FakeKernel) -> None:
    """What could not be read ahead, because the map ended there, is loaded when it is back."""
    kernel.fail("read_nowait", errno.EAGAIN)
    kernel.fail("resident", errno.EAGAIN)
    size = 32 << 20
    async with Mmap.open_path(file_of(tmp_path, inc(size)), "r+") as m:
        windows = m.windows(64 << 10)

        async def after_resize(length: int) -> None:
            async with anyio.create_task_group() as tg:
                tg.start_soon(m.resize, length)
                await anyio.wait_all_tasks_blocked()
                await anext(windows)

        await anext(windows)
        end = windows._loads_end
        await after_resize(end + (64 << 10))
        while windows._loads_end == end:
            await all_there(windows)
            await anext(windows)
        # There was no more than 64 KiB of the next piece, and nothing of what else was begun.
        gap = range(end + (64 << 10), windows._loads_end, 64 << 10)
        seen = windows._position
        await after_resize(size)
        await all_there(windows)
        await m.write_at(end, inc(size)[end:])
        kernel.calls.clear()
        data = b"".join([bytes(window) async for window in windows])
        covered = {
            position
            for address, length in [each.arguments for each in loads(kernel)]
            for position in range(address - m.ptr(), address - m.ptr() + length, 64 << 10)
        }
        assert covered.issuperset(gap)
    assert data == inc(size)[seen + (64 << 10) :]


async def test_a_bad_piece_does_not_make_the_others_good(
    tmp_path: Path, kernel: FakeKernel
) -> None:
    """What is to be looked up because it was not loaded is so also after a piece that failed."""
    kernel.fail("read_nowait", errno.EAGAIN)
    kernel.fail("resident", errno.EAGAIN)
    kernel.fail("populate_read", errno.EIO, times=1)
    async with Mmap.open_path(file_of(tmp_path, inc(4 << 20))) as m:
        windows = m.windows(64 << 10)
        windows._doubtful_until = 3 << 20
        await anext(windows)
        assert windows._doubtful_until == 3 << 20
        await windows.aclose()


async def test_the_read_ahead_begins_behind_what_was_looked_up(
    tmp_path: Path, kernel: FakeKernel
) -> None:
    """However large the pieces are by then, the first 4 MiB are looked up, and all that follows is
    asked for ahead."""
    size = 48 << 20
    async with Mmap.open_path(file_of(tmp_path, size)) as m:
        await m.load()
        kernel.calls.clear()
        m._core.pager._streamed.bytes = 16 << 20
        kernel.wrap("cached_pages", lambda real, fd, offset, length: 0)
        async for _ in m.windows(1 << 20):
            pass
        hinted = {
            position
            for call in list(kernel.calls)
            if call.name == "will_need_many"
            for address, length in call.arguments[0]
            for position in range(address - m.ptr(), address - m.ptr() + length, 64 << 10)
        }
    assert hinted == set(range(4 << 20, size, 64 << 10))


async def test_mapped_anew_meanwhile(tmp_path: Path, kernel: FakeKernel) -> None:
    """What was loaded through the old mapping is looked up in the new one."""
    kernel.lack("nowait_reads")  # so that mincore is asked
    size = 4 << 20
    async with Mmap.open_path(file_of(tmp_path, inc(size)), "r+") as m:
        windows = m.windows(64 << 10)
        await anext(windows)
        async with anyio.create_task_group() as tg:
            tg.start_soon(m.set_protection, "r")
            await anyio.wait_all_tasks_blocked()
            await anext(windows)  # behind it
            kernel.calls.clear()
        before = windows._loads_end
        async for window in windows:
            if windows._position <= before:
                [call] = [each for each in kernel.calls if each.name == "resident"]
                assert call.arguments[1] == len(window)
            kernel.calls.clear()


async def test_no_thread_to_read_ahead(
    tmp_path: Path, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece that could not be begun, for want of a thread, is loaded when its window comes."""
    kernel.fail("read_nowait", errno.EAGAIN)
    kernel.fail("resident", errno.EAGAIN)
    size = 8 << 20
    begin = Pager.load_soon
    begun = 0

    def load_soon(self: Pager, *arguments: Any) -> Load:
        nonlocal begun
        begun += 1
        if begun == 4:  # the first three are those that the first window waits for
            raise RuntimeError("can't start new thread")
        return begin(self, *arguments)

    monkeypatch.setattr(Pager, "load_soon", load_soon)
    async with Mmap.open_path(file_of(tmp_path, inc(size))) as m:
        data = b"".join([bytes(window) async for window in m.windows(1 << 20)])
        assert begun > 4
        assert sum(each.arguments[1] for each in loads(kernel)) >= size
    assert data == inc(size)


@pytest.mark.parametrize("how", ["break", "exception", "cancel", "aclose"])
async def test_leaving_early_stops_the_read_ahead(
    tmp_path: Path, kernel: FakeKernel, how: str
) -> None:
    """Pieces that no thread has begun are not read any more, however the loop is left."""
    kernel.fail("resident", errno.EAGAIN, times=1)
    window = 4 << 20
    held = threading.Event()
    released = threading.Event()
    first = 0

    def hold(call: Call) -> None:
        """The disk reads the first window, and holds all others."""
        if call.arguments[0] >= first + window:
            held.set()
            assert released.wait(60)

    kernel.before("populate_read", hold)
    async with Mmap.open_path(file_of(tmp_path, 16 * window)) as m:
        first = m.ptr()

        async def consume() -> None:
            with anyio.CancelScope() as scope:
                async for _ in m.windows(window):
                    await to_thread.run_sync(held.wait)
                    if how == "break":
                        break
                    if how == "exception":
                        raise LookupError
                    scope.cancel()

        try:
            if how == "exception":
                with pytest.raises(LookupError):
                    await consume()
            elif how == "aclose":
                windows = m.windows(window)
                await anext(windows)
                await to_thread.run_sync(held.wait)
                await windows.aclose()
            else:
                await consume()
            gc.collect()
            async with m.view_nowait():  # no region is left
                pass
        finally:
            released.set()
        await checkpoint()  # the interpreter drops a cancellation when its task waits again
        # Those that two threads had begun.
        ahead = [each for each in loads(kernel) if each.arguments[0] >= first + window]
        assert 1 <= len(ahead) <= 2
        assert not m._core.pager._streamed._users


async def test_a_step_that_was_cancelled_can_be_taken_again(
    tmp_path: Path, kernel: FakeKernel
) -> None:
    """A consumer that gave up waiting for a window gets it later."""
    kernel.fail("resident", errno.EAGAIN, times=1)
    async with Mmap.open_path(file_of(tmp_path, inc(10 << 20))) as m, m.windows() as windows:
        with kernel.hold("populate_read") as hold:
            async with anyio.create_task_group() as tg:
                tg.start_soon(anext, windows)
                await to_thread.run_sync(hold.wait_entered)
                tg.cancel_scope.cancel()
        data = b"".join([bytes(window) async for window in windows])
    assert data == inc(10 << 20)


async def test_a_bad_page_spoils_its_own_window_only(tmp_path: Path, kernel: FakeKernel) -> None:
    """Windows of a piece before and after the one that cannot be read are as good as any."""
    kernel.fail("resident", errno.EAGAIN, times=1)
    kernel.fail("populate_read", errno.EIO, times=1)  # the first piece, of four windows
    async with Mmap.open_path(file_of(tmp_path, inc(6 << 20))) as m:
        data = b"".join([bytes(window) async for window in m.windows(256 << 10)])
    assert data == inc(6 << 20)


def spans(kernel: FakeKernel, name: str, m: AsyncMmap) -> list[tuple[int, int]]:
    """The ranges of the map that a function of the kernel was asked about, in MiB."""
    return [
        ((call.arguments[0] - m.ptr()) >> 20, call.arguments[1] >> 20)
        for call in list(kernel.calls)
        if call.name == name
    ]


async def test_what_is_in_memory_is_looked_up_at_first_and_then_mapped_ahead(
    tmp_path: Path, kernel: FakeKernel, clock: Clock
) -> None:
    """The first 4 MiB are looked up on the loop, and workers have what follows ready."""
    path = file_of(tmp_path, inc(20 << 20))
    async with Mmap.open_path(path) as m:
        await m.load()
        kernel.calls.clear()
        data = b"".join([bytes(window) async for window in m.windows(1 << 20)])
        assert spans(kernel, "resident", m) == [(n, 1) for n in (0, 0, 1, 2, 3)]
        position = 4
        for start, length in sorted(spans(kernel, "populate_read", m)):
            assert start == position
            position += length
        assert position == 20
        assert threading.get_ident() not in {each.thread for each in loads(kernel)}
    assert data == inc(20 << 20)


async def test_a_slow_consumer_has_its_windows_looked_up_again(
    tmp_path: Path, kernel: FakeKernel, clock: Clock
) -> None:
    """What was loaded ahead long ago may be gone by now: it is looked up, and loaded."""
    path = file_of(tmp_path, inc(8 << 20))
    async with Mmap.open_path(path) as m:
        await m.load()
        windows = m.windows(1 << 20)
        total = b""
        async for window in windows:
            total += window
            if len(total) == 6 << 20:
                await all_there(windows)
                kernel.calls.clear()
                kernel.fail("resident", errno.EAGAIN)
                clock.now += 1
        assert spans(kernel, "resident", m) == [(6, 1), (7, 1)]
        assert spans(kernel, "populate_read", m) == [(6, 1), (7, 1)]
    assert total == inc(8 << 20)


async def test_a_window_that_was_loaded_and_then_cut_off(tmp_path: Path, clock: Clock) -> None:
    """However fresh the pages are, a window that the file does not reach any more is an error
    and not memory that kills the process."""
    size = 12 << 20
    path = file_of(tmp_path, inc(size))
    async with AsyncMmap.open_path(path) as m:
        seen = 0
        with pytest.raises(TruncatedError, match="reaches to byte 6291456 "):
            async for window in m.windows(1 << 20):
                assert bytes(window) == inc(1 << 20)
                seen += len(window)
                if seen == 6 << 20:
                    os.truncate(path, seen)
        assert seen == 6 << 20
        os.truncate(path, size)


async def test_a_cancelled_first_step_loads_nothing_twice(
    tmp_path: Path, kernel: FakeKernel
) -> None:
    """The pieces that were begun are those that the next step waits for."""
    kernel.fail("resident", errno.EAGAIN)
    size = 16 << 20
    async with Mmap.open_path(file_of(tmp_path, inc(size))) as m, m.windows(4 << 20) as windows:
        # All of them, for the second piece may be the first to come there.
        with kernel.hold("populate_read") as hold:
            async with anyio.create_task_group() as tg:
                tg.start_soon(anext, windows)
                await to_thread.run_sync(hold.wait_entered)
                tg.cancel_scope.cancel()
        data = b"".join([bytes(window) async for window in windows])
        # Each once, and what the cancelled step had waited for is looked up.
        assert sum(each.arguments[1] for each in loads(kernel)) == size + (4 << 20)
    assert data == inc(size)


async def test_warm_windows_stay_on_the_loop(tmp_path: Path, kernel: FakeKernel) -> None:
    """Windows that are in memory need no worker."""
    path = file_of(tmp_path, inc(N))
    async with Mmap.open_path(path) as m:
        await m.load()
        kernel.calls.clear()
        assert b"".join([bytes(window) async for window in m.windows(4096)]) == inc(N)
        assert loads(kernel) == []
