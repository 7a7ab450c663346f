"""The faulty disk that users test with: slow, stopped, failing and good again."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from aiommap import AsyncMmap, FlushError
from aiommap.testing import FaultyDisk, Operation, faulty_disk

from .content import file_of, inc

pytestmark = pytest.mark.anyio

SIZE = 1 << 20


@pytest.fixture
def disk() -> Iterator[FaultyDisk]:
    with faulty_disk() as disk:
        yield disk


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return file_of(tmp_path, inc(SIZE))


async def test_good_disk_changes_nothing(anyio_backend: Any, disk: FaultyDisk, file: Path) -> None:
    """A map on a disk that was told nothing works as ever, and what it asks for is counted."""
    async with AsyncMmap.open_path(file, "r+") as m:
        await m.write_at(0, b"hello")
        await m.flush()
        assert await m.read_at(0, 6) == b"hello\x05"
    assert file.read_bytes()[:6] == b"hello\x05"
    assert disk.asked("store") >= 1
    assert disk.asked("flush") >= 1


@pytest.mark.parametrize("error", [errno.EIO, errno.ETIMEDOUT])
async def test_bad_sector(error: int, anyio_backend: Any, disk: FaultyDisk, file: Path) -> None:
    """Reads raise the errno with the path; healed, the same calls work."""
    async with AsyncMmap.open_path(file) as m:
        disk.fail("read", error)
        for call in (m.read_at(0, 10), m.load(), m.find(b"\x00"), m.view(0, 4096)):
            with pytest.raises(OSError, match=r"data\.bin") as raised:
                await call
            assert raised.value.errno == error
        disk.heal()
        assert await m.read_at(0, 3) == inc(3)
        async with m.view(0, 4096) as view:
            assert view[:] == inc(4096)


async def test_full_disk(anyio_backend: Any, disk: FaultyDisk, file: Path, tmp_path: Path) -> None:
    """Without room, ``create``, a writable view and a store raise ENOSPC and leave nothing."""
    disk.fail("store", errno.ENOSPC)
    with pytest.raises(OSError, match="No space") as raised:
        await AsyncMmap.create(tmp_path / "new", SIZE)
    assert raised.value.errno == errno.ENOSPC
    assert not (tmp_path / "new").exists()
    async with AsyncMmap.open_path(file, "r+") as m:
        for call in (m.write_at(0, b"x"), m.view_mut(0, 10), m.view_mut(0, SIZE)):
            with pytest.raises(OSError, match="No space"):
                await call
        disk.heal()
        await m.write_at(0, b"x")


async def test_failed_flush_stays_failed(anyio_backend: Any, disk: FaultyDisk, file: Path) -> None:
    """A flush fails with FlushError, also after the disk was healed, until it is cleared."""
    async with AsyncMmap.open_path(file, "r+") as m:
        await m.write_at(0, b"x")
        disk.fail("flush")
        with pytest.raises(FlushError) as raised:
            await m.flush()
        assert raised.value.errno == errno.EIO
        disk.heal()
        with pytest.raises(FlushError):
            await m.flush_range(0, 1)
        await m.clear_flush_error()
        await m.flush()


@pytest.mark.parametrize("operation", ["read", "store", "flush"])
async def test_held_disk_stops_one_task_and_not_the_loop(
    operation: Operation, anyio_backend: Any, disk: FaultyDisk, file: Path
) -> None:
    """While a call is held its task waits, and the event loop goes on."""
    async with AsyncMmap.open_path(file, "r+") as m:
        record = []

        async def work() -> None:
            await {
                "read": lambda: m.read_at(0, 1),
                "store": lambda: m.write_at(0, b"x"),
                "flush": m.flush,
            }[operation]()
            record.append("done")

        async with anyio.create_task_group() as tasks:
            with disk.hold(operation) as held:
                tasks.start_soon(work)
                await held.reached()
                await anyio.wait_all_tasks_blocked()
                record.append("loop lives")
        assert record == ["loop lives", "done"]


async def test_delay_is_spent_in_a_worker(anyio_backend: Any, disk: FaultyDisk, file: Path) -> None:
    """A delayed read ends later than the turns of the loop that it would have held up."""
    async with AsyncMmap.open_path(file) as m:
        disk.delay("read", 0.02)
        turns = 0
        done = anyio.Event()

        async def read() -> None:
            await m.read_at(0, 10)
            done.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            while not done.is_set():
                await anyio.lowlevel.checkpoint()
                turns += 1
        assert turns > 10


async def test_only_maps_of_the_block(anyio_backend: Any, file: Path) -> None:
    """Maps opened before the block keep the real disk, and the block's end brings it back."""
    async with AsyncMmap.open_path(file) as before:
        with faulty_disk() as disk:
            disk.fail("read")
            assert await before.read_at(0, 1) == b"\0"
        async with AsyncMmap.open_path(file) as after:
            disk.fail("read")
            assert await after.read_at(0, 1) == b"\0"


async def test_bad_disk_and_many_readers(anyio_backend: Any, disk: FaultyDisk, file: Path) -> None:
    """Page-ins that are asked for together fail as those that are asked for alone."""
    failed: list[int] = []

    async def look(offset: int) -> None:
        try:
            async with m.view(offset, 1):
                raise AssertionError("the disk is bad")
        except OSError as exc:
            failed.append(exc.errno or 0)

    async with AsyncMmap.open_path(file) as m:
        disk.fail("read")
        async with anyio.create_task_group() as tasks:
            for offset in range(8):
                tasks.start_soon(look, offset)
    assert failed == [errno.EIO] * 8


async def test_unknown_operation(anyio_backend: Any, disk: FaultyDisk) -> None:
    """An operation that does not exist is refused at once."""
    with pytest.raises(ValueError, match="not 'write'"):
        disk.fail("write")  # type: ignore[arg-type]


@pytest.mark.parametrize("error", ["EIO", 0, -5, True, None, 5.0])
async def test_unknown_errno(error: Any, anyio_backend: Any, disk: FaultyDisk, file: Path) -> None:
    """What is no errno is refused at once, and changes nothing."""
    with pytest.raises(ValueError, match=f"such as errno.EIO, not {error!r}"):
        disk.fail("read", error)
    async with AsyncMmap.open_path(file) as m:
        assert await m.read_at(0, 1) == b"\0"
