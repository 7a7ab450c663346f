"""resize and set_protection: the map takes another shape under its users."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import ClosedResourceError
from anyio.lowlevel import checkpoint

from aiommap import AsyncMmap, DeadlockError, Protection, TruncatedError
from aiommap._event_loop import current_event_loop

from .content import file_of, inc, maps_of, only_linux, zeros
from .fake_kernel import FakeKernel

pytestmark = pytest.mark.anyio

N = 10_000
READ, WRITE, COPY, EXECUTE = Protection


class Mmap(AsyncMmap):
    """A map on a kernel that a test can break."""


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    kernel = FakeKernel()
    monkeypatch.setattr(Mmap, "_kernel", kernel)
    return kernel


Change = Callable[[AsyncMmap], Coroutine[Any, Any, None]]
CHANGES: dict[str, Change] = {
    "grow": lambda m: m.resize(N + 5_000),
    "shrink": lambda m: m.resize(N - 5_000),
    "protect": lambda m: m.set_protection(READ),
}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def describe(m: AsyncMmap) -> tuple[int, Protection]:
    return len(m), m.protection


# resize


@pytest.mark.parametrize("length", [N + 1, 3 * N, N - 1, 5_000, 4_096, 4_097, 1, N])
async def test_resize(tmp_path: Path, length: int) -> None:
    """Map and file take the new length; content stays, what is new is zero."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path, "r+") as m:
        await m.resize(length)
        expected = (inc(N) + zeros(length))[:length]
        assert len(m) == length
        assert path.stat().st_size == length
        assert await m.file_size() == length
        assert await m.read_at(0, length) == expected
        async with m.view_mut() as v:
            assert len(v) == length
            v[length - 1] = 77
        with pytest.raises(ValueError, match=f"map of {length} bytes"):
            await m.read_at(length, 1)
    assert path.read_bytes() == expected[:-1] + b"M"


async def test_growing_after_shrinking_shows_zeros(tmp_path: Path) -> None:
    """What was cut off does not come back, inside a page either."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path, "r+") as m:
        await m.resize(5)
        await m.resize(N)
        assert await m.read_at(0, N) == inc(5) + zeros(N - 5)
    assert path.read_bytes() == inc(5) + zeros(N - 5)


async def test_resize_of_a_map_with_an_offset(tmp_path: Path) -> None:
    """A map that reaches the end of its file takes the file along, from any offset."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path, "r+", offset=5_001) as m:
        await m.resize(100)
        assert path.stat().st_size == 5_101
        await m.resize(8_000)
        assert path.stat().st_size == 13_001
        assert m.offset == 5_001
        assert await m.read_at(0, 8_000) == inc(100, 5_001) + zeros(7_900)
    assert path.read_bytes() == inc(5_101) + zeros(7_900)


async def test_a_file_that_goes_on_behind_the_map_is_not_cut(tmp_path: Path) -> None:
    """Shrinking is a ValueError where the file is longer; growing takes its bytes in."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path, "r+", offset=100, length=1_000) as m:
        with pytest.raises(ValueError, match=r"ends at byte 1100 of the file, which has 10000"):
            await m.resize(500)
        assert len(m) == 1_000
        assert await m.read_at(0, 1_000) == inc(1_000, 100)
        await m.resize(2_000)
        assert await m.read_at(0, 2_000) == inc(2_000, 100)
        assert path.stat().st_size == N
        await m.resize(N)
        assert path.stat().st_size == N + 100
    assert path.read_bytes() == inc(N) + zeros(100)


async def test_another_process_grew_the_file(tmp_path: Path) -> None:
    """A file that somebody else made longer is never cut by resize."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path, "r+") as m:
        with open(path, "ab") as file:
            file.write(b"theirs")
        with pytest.raises(ValueError, match="would cut off what others keep"):
            await m.resize(100)
        await m.resize(N + 3)
        assert await m.read_at(N, 3) == b"the"
    assert path.read_bytes() == inc(N) + b"theirs"


@pytest.mark.parametrize("length", [2_000, 3_000, 5_000, N, 2 * N])
async def test_resize_of_a_truncated_file(tmp_path: Path, length: int) -> None:
    """A map whose file was truncated can be resized to any length, and works again."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path, "r+") as m:
        os.truncate(path, 3_000)
        await m.resize(length)
        assert path.stat().st_size == length == len(m)
        assert await m.read_at(0, length) == (inc(3_000) + zeros(length))[:length]
        await m.write_at(length - 1, b"x")
        await m.flush()


async def test_growing_reserves_blocks(tmp_path: Path) -> None:
    """What a resize adds has blocks, so that a full disk is an error there."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path, "r+") as m:
        await m.resize(1 << 20)
        if sys.platform == "linux":
            assert path.stat().st_blocks * 512 >= 1 << 20


@pytest.mark.parametrize("protection", [WRITE, COPY])
@pytest.mark.parametrize("length", [1, 5_000, 20_000])
async def test_resize_of_anonymous_memory(protection: Protection, length: int) -> None:
    """Anonymous memory, shared or private, keeps its content and grows by zeros."""
    async with AsyncMmap.anonymous(N, protection) as m:
        await m.write_at(0, inc(N))
        await m.resize(length)
        assert (len(m), m.protection, m.private) == (length, protection, protection is COPY)
        assert await m.read_at(0, length) == (inc(N) + zeros(length))[:length]
        await m.write_at(length - 1, b"x")


async def test_resize_needs_a_writable_map(tmp_path: Path) -> None:
    """READ maps: PermissionError; READ_COPY of a file: ValueError that says to open again."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path) as m:
        with pytest.raises(PermissionError, match="its protection is READ"):
            await m.resize(100)
    async with AsyncMmap.open_path(path, "c") as m:
        with pytest.raises(ValueError, match="open it again"):
            await m.resize(100)
    assert path.read_bytes() == inc(N)


@pytest.mark.parametrize(
    ("length", "error", "message"),
    [
        (0, ValueError, "at least 1 byte, not 0"),
        (-1, ValueError, "at least 1 byte, not -1"),
        (2**63, ValueError, "any file can have"),
        (True, TypeError, "must be an integer"),
        (1.0, TypeError, "must be an integer"),
        (None, TypeError, "must be an integer"),
    ],
)
async def test_wrong_lengths(
    tmp_path: Path, length: int, error: type[Exception], message: str
) -> None:
    """Lengths that a map cannot have raise before anything is locked."""
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N)), "r+") as m, m.view():
        with pytest.raises(error, match=message):
            await m.resize(length)


async def test_a_length_that_the_disk_does_not_have(tmp_path: Path) -> None:
    """More than the file system takes: the kernel's OSError with the path; nothing changed."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path, "r+") as m:
        with pytest.raises(OSError, match=r"\[Errno") as caught:
            await m.resize(2**62)
        assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
        assert caught.value.filename == str(path)
        assert len(m) == N
        assert path.stat().st_size == N
        assert await m.read_at(0, N) == inc(N)


async def test_the_new_size_is_durable_with_the_next_flush(
    tmp_path: Path, kernel: FakeKernel
) -> None:
    """A resize is something to flush: leaving the map does it, an explicit flush too."""
    path = file_of(tmp_path, inc(N))
    async with Mmap.open_path(path, "r+") as m:
        await m.resize(N + 1)
    assert m.statistics().flushes_done == 1


# set_protection


@pytest.mark.parametrize("new", [READ, WRITE, EXECUTE])
@pytest.mark.parametrize("old", [READ, WRITE, EXECUTE])
@pytest.mark.parametrize("kind", ["file", "anonymous"])
async def test_set_protection(tmp_path: Path, kind: str, old: Protection, new: Protection) -> None:
    """READ, READ_WRITE and READ_EXECUTE become each other; content stays."""
    if kind == "file":
        with open(file_of(tmp_path, inc(N)), "r+b") as file:
            m = await AsyncMmap.open(file, old)
    else:
        m = await AsyncMmap.anonymous(N)
        await m.write_at(0, inc(N))
        await m.set_protection(old)
    async with m:
        await m.set_protection(new)
        assert m.protection is new
        await m.set_protection(new.value)
        assert await m.read_at(0, N) == inc(N)
        if new.writable:
            await m.write_at(0, b"x")
            async with m.view_mut(1, 1) as v:
                v[0] = 1
            m.as_mut_slice().release()
        else:
            with pytest.raises(PermissionError, match=f"its protection is {new.name}"):
                await m.write_at(0, b"x")
            with pytest.raises(PermissionError, match=f"its protection is {new.name}"):
                m.as_mut_slice()


@only_linux
@pytest.mark.parametrize("protection", [READ, WRITE, COPY, EXECUTE])
async def test_never_writable_and_executable(tmp_path: Path, protection: Protection) -> None:
    """The kernel's own books show the protection, and no area that is both."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path, protection):
        lines = [
            line.split()[1]
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(str(path))
        ]
    assert lines == [{READ: "r--s", WRITE: "rw-s", COPY: "rw-p", EXECUTE: "r-xs"}[protection]]


@pytest.mark.parametrize("other", [READ, WRITE, EXECUTE])
@pytest.mark.parametrize("kind", ["file", "anonymous"])
async def test_read_copy_stays_what_it_is(tmp_path: Path, kind: str, other: Protection) -> None:
    """To and from READ_COPY: ValueError that says to open again; READ_COPY itself is fine."""
    path = file_of(tmp_path, inc(N))

    async def opened(protection: Protection) -> AsyncMmap:
        if kind == "file":
            return await AsyncMmap.open_path(path, protection)
        return await AsyncMmap.anonymous(N, protection)

    async with await opened(COPY) as m:
        await m.set_protection(COPY)
        with pytest.raises(ValueError, match=f"READ_COPY cannot become {other.name}.*open it"):
            await m.set_protection(other)
        assert m.protection is COPY
    async with await opened(other) as m:
        with pytest.raises(ValueError, match=f"{other.name} cannot become READ_COPY.*open it"):
            await m.set_protection(COPY)
        assert m.protection is other


async def test_unknown_protection(tmp_path: Path) -> None:
    """What is no protection raises before anything is locked."""
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N)), "r+") as m, m.view():
        with pytest.raises(ValueError, match="protection 'w' is not known"):
            await m.set_protection("w")
        with pytest.raises(TypeError, match="must be a Protection"):
            await m.set_protection(None)  # type: ignore[arg-type]


async def test_stores_before_set_protection_are_flushed(tmp_path: Path) -> None:
    """What was written before the map became READ is flushed when asked and at the end."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path, "r+") as m:
        await m.write_at(0, b"abc")
        await m.set_protection(READ)
        await m.flush()
        assert m.statistics().flushes_done == 1
    async with AsyncMmap.open_path(path, "r+") as m:
        await m.write_at(0, b"abc")
        await m.set_protection(READ)
    assert m.statistics().flushes_done == 1


async def test_set_protection_of_a_truncated_file(tmp_path: Path) -> None:
    """A file that does not reach the end of the map is a TruncatedError; the map stays."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path, "r+") as m:
        os.truncate(path, 3_000)
        with pytest.raises(TruncatedError, match="reaches to byte 3000"):
            await m.set_protection(READ)
        assert describe(m) == (N, WRITE)
        os.truncate(path, N)
        await m.set_protection(READ)


# Both: who waits, who is refused


@changes
async def test_an_own_view(tmp_path: Path, change: Change) -> None:
    """With a view of its own the task gets DeadlockError, and nothing has changed."""
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N)), "r+") as m:
        for view in (m.view(0, 1), m.view_mut(N - 1, 1)):
            async with view as v:
                with pytest.raises(DeadlockError, match="asks for everything exclusive and holds"):
                    await change(m)
                assert len(v) == 1
        assert describe(m) == (N, WRITE)


@changes
async def test_views_of_others(tmp_path: Path, change: Change) -> None:
    """While others hold regions the change waits, and those who come later wait for it."""
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N)), "r+") as m:
        log = []
        leave = anyio.Event()

        async def hold() -> None:
            async with m.view(0, 1):
                await leave.wait()
                log.append("left")

        async def reshape() -> None:
            await change(m)
            log.append("changed")

        async def come_later() -> None:
            async with m.view(1, 1):
                log.append("later")

        async with anyio.create_task_group() as tg:
            for each in (hold, reshape, come_later):
                tg.start_soon(each)
                await anyio.wait_all_tasks_blocked()
            assert describe(m) == (N, WRITE)
            assert log == []
            leave.set()
        assert log == ["left", "changed", "later"]
        assert describe(m) != (N, WRITE)


@changes
async def test_raw_buffers(tmp_path: Path, change: Change) -> None:
    """With raw buffers out: BufferError, nothing has changed, and the lock is free again."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path, "r+") as m:
        raw = m.as_slice()
        part = raw[5:10]
        raw.release()
        address = m.ptr()
        for _ in range(2):
            with pytest.raises(BufferError, match="while buffers of its memory are out"):
                await change(m)
        assert describe(m) == (N, WRITE)
        assert m.ptr() == address
        assert path.stat().st_size == N
        assert bytes(part) == inc(5, 5)
        async with m.view_mut_nowait():
            pass
        part.release()
        await change(m)


@pytest.mark.parametrize(
    "same", [lambda m: m.resize(N), lambda m: m.set_protection(WRITE)], ids=["resize", "protect"]
)
async def test_raw_buffers_and_nothing_to_change(tmp_path: Path, same: Change) -> None:
    """Refused too, as with a view of one's own, and as mmap.resize() does."""
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N)), "r+") as m:
        with m.as_slice(), pytest.raises(BufferError, match="buffers of its memory are out"):
            await same(m)
        await same(m)


@only_linux
@changes
async def test_the_old_memory_goes(tmp_path: Path, change: Change) -> None:
    """After the change one map of the file is left, and after closing none."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path, "r+") as m:
        await change(m)
        assert maps_of(path) == 1
    assert maps_of(path) == 0


async def test_to_the_same_shape(tmp_path: Path, kernel: FakeKernel) -> None:
    """A change to what the map is already maps nothing anew."""
    async with Mmap.open_path(file_of(tmp_path, inc(N)), "r+") as m:
        address = m.ptr()
        kernel.calls.clear()
        await m.resize(N)
        await m.set_protection("r+")
        assert kernel.names("map_file", "set_file_size", "reserve") == []
        assert m.ptr() == address


@changes
async def test_it_cannot_be_mapped(tmp_path: Path, kernel: FakeKernel, change: Change) -> None:
    """When mapping fails, the kernel's error is raised, and map and file are the old ones."""
    path = file_of(tmp_path, inc(N))
    async with Mmap.open_path(path, "r+") as m:
        kernel.fail("map_file", errno.ENOMEM)
        with pytest.raises(OSError, match="Cannot allocate memory") as caught:
            await change(m)
        assert caught.value.filename == str(path)
        kernel.heal()
        assert describe(m) == (N, WRITE)
        assert path.read_bytes() == inc(N)
        assert await m.read_at(0, N) == inc(N)
        await change(m)
        assert describe(m) != (N, WRITE)


async def test_a_full_disk(tmp_path: Path, kernel: FakeKernel) -> None:
    """When blocks cannot be reserved: ENOSPC with the path, map and file are the old ones."""
    path = file_of(tmp_path, inc(N))
    async with Mmap.open_path(path, "r+") as m:
        kernel.fail("reserve", errno.ENOSPC)
        with pytest.raises(OSError, match="No space left") as caught:
            await m.resize(2 * N)
        assert caught.value.filename == str(path)
        assert len(m) == N
        assert path.stat().st_size == N


async def test_a_file_system_that_cannot_reserve(tmp_path: Path, kernel: FakeKernel) -> None:
    """Where blocks cannot be reserved the file grows all the same."""
    path = file_of(tmp_path, inc(N))
    kernel.lack("fallocate")
    async with Mmap.open_path(path, "r+") as m:
        await m.resize(2 * N)
        assert await m.read_at(0, 2 * N) == inc(N) + zeros(N)


async def test_a_file_that_cannot_be_cut(tmp_path: Path, kernel: FakeKernel) -> None:
    """When cutting fails, map and file are the old ones."""
    path = file_of(tmp_path, inc(N))
    async with Mmap.open_path(path, "r+") as m:
        kernel.fail("set_file_size", errno.EPERM)
        with pytest.raises(PermissionError, match="not permitted") as caught:
            await m.resize(100)
        assert caught.value.filename == str(path)
        kernel.heal()
        assert len(m) == N
        assert await m.read_at(0, N) == inc(N)


@changes
async def test_cancelled_while_it_waits(tmp_path: Path, change: Change) -> None:
    """Cancelled before it is granted, nothing has changed and nobody waits for it."""
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N)), "r+") as m:
        async with m.view(0, 1):
            async with anyio.create_task_group() as tg:
                tg.start_soon(change, m)
                await anyio.wait_all_tasks_blocked()
                assert m.statistics().waiting == 1
                tg.cancel_scope.cancel()
            assert m.statistics().waiting == 0
        assert describe(m) == (N, WRITE)
        await change(m)


@changes
@pytest.mark.parametrize("call", ["map_file", "set_file_size", "reserve"])
async def test_cancelled_while_it_runs(
    tmp_path: Path, kernel: FakeKernel, change: Change, call: str
) -> None:
    """Cancelled in the middle, the map is the old or the new one, whole, with its file."""
    path = file_of(tmp_path, inc(N))
    async with Mmap.open_path(path, "r+") as m:
        loop = current_event_loop()
        entered = anyio.Event()

        def on_enter() -> None:
            loop.post(entered.set)

        with kernel.hold(call, on_enter=on_enter) as hold:
            async with anyio.create_task_group() as tg:

                async def run() -> None:
                    await change(m)
                    entered.set()  # it did not come by

                tg.start_soon(run)
                await entered.wait()
                tg.cancel_scope.cancel()
                hold.release.set()
        length, protection = describe(m)
        assert length == path.stat().st_size == await m.file_size()
        assert await m.read_at(0, min(N, length)) == inc(N)[:length]
        if protection is WRITE:
            async with m.view_mut_nowait() as v:
                v[0] = 1
                await v.flush()


async def test_after_close(tmp_path: Path) -> None:
    """A closed map refuses both."""
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N)), "r+") as m:
        pass
    for change in CHANGES.values():
        with pytest.raises(ClosedResourceError, match="the map is closed"):
            await change(m)


@changes
async def test_closed_while_it_waits(tmp_path: Path, change: Change) -> None:
    """When the map closes while a change waits, the change is a ClosedResourceError."""
    m = await AsyncMmap.open_path(file_of(tmp_path, inc(N)), "r+")
    async with m.view(0, 1), anyio.create_task_group() as tg:

        async def want() -> None:
            with pytest.raises(ClosedResourceError, match="the map was closed"):
                await change(m)

        tg.start_soon(want)
        await anyio.wait_all_tasks_blocked()
        await m.aclose()
        await checkpoint()


async def test_pins_do_not_survive_a_resize(tmp_path: Path) -> None:
    """Resizing unpins, as the docstring of pin says."""
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N)), "r+") as m:
        await m.pin(0, 4096)
        await m.resize(N + 1)
        with pytest.raises(ValueError, match="not all pinned"):
            await m.unpin(0, 4096)
