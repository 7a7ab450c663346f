"""What a power cut, a crash and the death of the process leave: on ext4, xfs and btrfs.

Each proof is a coroutine that takes the kernel to flush with, and raises
:class:`BytesLostError` when something is not there that was promised. It runs with the real
kernel, and then as its own control with every false flush: those must lose something.
"""

from __future__ import annotations

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("the rigs need Linux", allow_module_level=True)

import errno
import mmap
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import anyio
from anyio import to_thread

from aiommap import AsyncMmap, FlushError, PendingFlush
from aiommap._kernel import Kernel, native

from .conftest import BACKENDS
from .false_flushes import FALSE_FLUSHES
from .flushing import mapped_by
from .processes import run_python
from .rigs.crash_image import CrashImage
from .rigs.faults import PAGE, dirty_pages, write_back
from .rigs.file_systems import FILE_SYSTEMS
from .rigs.logged_disk import LoggedDisk
from .rigs.plain_files import make_durable
from .rigs.plain_files import opened as opened_descriptor
from .rigs.slow_file import SlowFile

pytestmark = pytest.mark.anyio

T = TypeVar("T")

MIB = 1 << 20
SIZE = 8 * PAGE
OLD = bytes(SIZE)
NEW = b"new"

MakeDisk = Callable[..., LoggedDisk]
MakeImage = Callable[..., CrashImage]
Proof = Callable[[LoggedDisk, Kernel], Awaitable[None]]

every_file_system = pytest.mark.parametrize("kind", list(FILE_SYSTEMS))
every_false_flush = pytest.mark.parametrize("false", list(FALSE_FLUSHES))


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Two loops: what a disk keeps does not depend on the event loop, and disks take time."""
    return BACKENDS[request.param]


class BytesLostError(AssertionError):
    """Bytes that were promised to be durable are not there."""


async def after_power_cut(disk: LoggedDisk, name: str) -> bytes | None:
    return await to_thread.run_sync(disk.after_power_cut, name)


async def check_durable(disk: LoggedDisk, path: Path, expected: bytes, what: object = "") -> None:
    found = await after_power_cut(disk, path.name)
    if found != expected:
        raise BytesLostError(f"{path.name} {what}: {None if found is None else len(found)} bytes")


def make_durable_by_pages(path: Path, size: int) -> None:
    """
    A file of zeros, each page by itself in the page cache. A file that is written at once is
    kept in large folios, and the kernel then writes a whole folio for each dirty byte.
    """
    with opened_descriptor(path, os.O_RDWR | os.O_CREAT) as descriptor:
        for offset in range(0, size, PAGE):
            os.pwrite(descriptor, bytes(PAGE), offset)
        os.fsync(descriptor)
    make_durable(path, b"")


def stored_into(content: bytes, offset: int, data: bytes = NEW) -> bytes:
    return content[:offset] + data + content[offset + len(data) :]


# A file that is there. One disk for all ways to commit, and a power cut after each.


async def by_flush(m: AsyncMmap) -> None:
    await m.write_at(PAGE, NEW)
    await m.flush()


async def by_flush_range(m: AsyncMmap) -> None:
    await m.write_at(PAGE, NEW)
    await m.flush_range(PAGE + 1, 1)


async def by_a_view(m: AsyncMmap) -> None:
    async with m.view_mut(PAGE, 100) as v:
        v[0:3] = NEW
        await v.flush()


async def by_a_part_of_a_view(m: AsyncMmap) -> None:
    async with m.view_mut(0, 2 * PAGE) as v:
        v[PAGE : PAGE + 3] = NEW
        await v.flush_range(PAGE, 3)


async def by_waiting(m: AsyncMmap) -> None:
    await m.write_at(PAGE, NEW)
    await (await m.flush_async())


async def by_waiting_for_a_range(m: AsyncMmap) -> None:
    await m.write_at(PAGE, NEW)
    await (await m.flush_async_range(PAGE, 3)).wait()


async def by_the_flush_of_another_task(m: AsyncMmap) -> None:
    await m.write_at(PAGE, NEW)
    pending = await m.flush_async_range(PAGE, 3)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(m.flush_range, PAGE, 3)
        tasks.start_soon(m.flush_range, 4 * PAGE, 3)
    assert pending.done


async def by_closing(m: AsyncMmap) -> None:
    await m.write_at(PAGE, NEW)
    await m.aclose()


async def by_waiting_after_closing(m: AsyncMmap) -> None:
    await m.write_at(PAGE, NEW)
    pending: PendingFlush = await m.flush_async()
    await m.aclose(flush=False)
    await pending


async def by_the_last_view(m: AsyncMmap) -> None:
    view = await m.into_view()
    view[PAGE : PAGE + 3] = NEW
    await view.aclose()


WAYS = [
    by_flush,
    by_flush_range,
    by_a_view,
    by_a_part_of_a_view,
    by_waiting,
    by_waiting_for_a_range,
    by_the_flush_of_another_task,
    by_closing,
    by_waiting_after_closing,
    by_the_last_view,
]


async def commits(disk: LoggedDisk, kernel: Kernel) -> None:
    """What was stored into a file is there when any of the ways to commit has returned."""
    await commits_by(disk, kernel, WAYS)


async def commits_by(
    disk: LoggedDisk, kernel: Kernel, ways: Sequence[Callable[[AsyncMmap], Awaitable[None]]]
) -> None:
    for way in ways:
        path = disk.path / way.__name__
        make_durable(path, OLD)
        async with mapped_by(kernel).open_path(path, "r+") as m:
            await way(m)
            await check_durable(disk, path, stored_into(OLD, PAGE))


async def grows(disk: LoggedDisk, kernel: Kernel) -> None:
    """A map that grew, and a store into what is new: the size and the bytes are there."""
    path = disk.path / "grown"
    make_durable(path, OLD)
    async with mapped_by(kernel).open_path(path, "r+") as m:
        await m.resize(3 * SIZE)
        await m.write_at(2 * SIZE, NEW)
        await m.flush_range(2 * SIZE, 3)
        expected = stored_into(bytes(3 * SIZE), 2 * SIZE)
        await check_durable(disk, path, expected)


async def shrinks(disk: LoggedDisk, kernel: Kernel) -> None:
    """A map that was made shorter: the size is there."""
    path = disk.path / "shrunk"
    make_durable(path, OLD)
    async with mapped_by(kernel).open_path(path, "r+") as m:
        await m.resize(PAGE)
        await m.flush()
        await check_durable(disk, path, OLD[:PAGE])


async def creates(disk: LoggedDisk, kernel: Kernel) -> None:
    """A new file: its name and size when create has returned, what was stored after a flush."""
    path = disk.path / "created"
    async with mapped_by(kernel).create(path, SIZE) as m:
        await check_durable(disk, path, OLD, "after create")
        await m.write_at(PAGE, NEW)
        await m.flush_range(PAGE, 3)
        await check_durable(disk, path, stored_into(OLD, PAGE), "after flush")


async def creates_again(disk: LoggedDisk, kernel: Kernel) -> None:
    """A file that was there grows by create(exist_ok=True): its size is there."""
    path = disk.path / "created again"
    make_durable(path, OLD[:10])
    async with mapped_by(kernel).create(path, SIZE, exist_ok=True):
        await check_durable(disk, path, OLD)


PROOFS: list[Proof] = [commits, grows, shrinks, creates, creates_again]
every_proof = pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.__name__)


@pytest.mark.fuse
@pytest.mark.loopdev
@every_file_system
@every_proof
async def test_a_power_cut(kind: str, proof: Proof, make_logged_disk: MakeDisk) -> None:
    """Nothing is lost of what was committed, in any way, when the power goes right after it."""
    await proof(make_logged_disk(kind), native)


@pytest.mark.fuse
@pytest.mark.loopdev
@every_file_system
@every_false_flush
@every_proof
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_power_cut_takes_what_was_flushed_falsely(
    kind: str, proof: Proof, false: str, make_logged_disk: MakeDisk
) -> None:
    """The control: with no flush, MS_ASYNC or sync_file_range alone, each proof finds a loss."""
    disk = make_logged_disk(kind)
    kernel = FALSE_FLUSHES[false]()
    if proof is commits:
        for way in WAYS:
            with pytest.raises(BytesLostError):
                await commits_by(disk, kernel, [way])
    else:
        with pytest.raises(BytesLostError):
            await proof(disk, kernel)


@pytest.mark.fuse
@pytest.mark.loopdev
@every_file_system
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_large_flush_survives_a_power_cut(kind: str, make_logged_disk: MakeDisk) -> None:
    """A flush that is written piece by piece ends with a flush of the disk: 40 MiB are there."""
    disk = make_logged_disk(kind, 512 * MIB)
    path = disk.path / "large"
    length = 40 * MIB
    async with AsyncMmap.create(path, length) as m:
        data = os.urandom(MIB) * 40
        await m.write_at(0, data)
        await m.flush()
        await check_durable(disk, path, data)


# A crash of the system, with whatever the disk has


async def a_before_b(image: CrashImage, kernel: Kernel) -> None:
    """A was flushed before B was stored: no crash leaves B without A."""
    path = image.path / "ordered"
    make_durable_by_pages(path, SIZE)
    async with mapped_by(kernel).open_path(path, "r+") as m:
        with opened_descriptor(path) as descriptor:
            for round_ in (b"1", b"2", b"3"):
                await m.write_at(0, round_)
                await m.flush_range(0, 1)
                await m.write_at(4 * PAGE, round_)
                # The worst that the kernel may do: write B at once, of its own accord.
                write_back(descriptor, 4 * PAGE, PAGE)
                after = image.after_crash("ordered")
                assert after is not None
                if after[4 * PAGE : 4 * PAGE + 1] == round_ != after[:1]:
                    raise BytesLostError(f"B of round {round_!r} is there and A is not")


# Not on btrfs, where what was written out of turn is not in the tree: B never comes first.
where_the_kernel_can_reorder = pytest.mark.parametrize("kind", ["ext4", "xfs"])


@pytest.mark.loopdev
@every_file_system
async def test_a_before_b(kind: str, make_crash_image: MakeImage) -> None:
    """What was flushed first is there when what was stored later is."""
    await a_before_b(make_crash_image(kind), native)


@pytest.mark.loopdev
@where_the_kernel_can_reorder
@pytest.mark.parametrize("false", ["no flush", "MS_ASYNC"])
async def test_a_before_b_without_a_flush(
    kind: str, false: str, make_crash_image: MakeImage
) -> None:
    """The control: without a flush in between, a crash leaves B without A."""
    with pytest.raises(BytesLostError):
        await a_before_b(make_crash_image(kind), FALSE_FLUSHES[false]())


@pytest.mark.loopdev
@every_file_system
async def test_crash_points(kind: str, make_crash_image: MakeImage) -> None:
    """A crash at any moment leaves what was flushed last, while the program goes on; a store
    that nobody flushed is not there."""
    image = make_crash_image(kind)
    path = image.path / "file"
    make_durable(path, OLD)
    async with AsyncMmap.open_path(path, "r+") as m:
        for value in range(1, 6):
            await m.write_at(0, bytes([value]))
            await m.flush()
            await m.write_at(0, b"\xff")
            after = await to_thread.run_sync(image.after_crash, "file")
            assert after is not None
            assert after[0] == value


# The process dies

DYING = """
    import os, signal, sys
    import anyio
    from aiommap import AsyncMmap

    async def main():
        async with AsyncMmap.open_path(sys.argv[1], sys.argv[2]) as m:
            async with m.view_mut(0, 100) as v:
                v[0:3] = b"new"
                await m.write_at(5000, b"new")
                os.kill(os.getpid(), signal.SIGKILL)

    anyio.run(main, backend=sys.argv[3])
"""


@pytest.mark.parametrize("protection", ["r+", "c"])
async def test_the_process_dies(tmp_path: Path, protection: str, backend_name: str) -> None:
    """A store is in the file as soon as it is made: a process that is killed right after it,
    without any flush, loses nothing. The control: with READ_COPY the file never had it."""
    path = tmp_path / "file"
    path.write_bytes(OLD)
    result = await to_thread.run_sync(run_python, DYING, path, protection, backend_name)
    assert result.returncode == -signal.SIGKILL, result.stderr
    expected = stored_into(stored_into(OLD, 0), 5000) if protection == "r+" else OLD
    assert path.read_bytes() == expected


# The disk fails


@pytest.mark.fuse
@pytest.mark.loopdev
@every_file_system
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
async def test_a_failed_write_back(kind: str, number: int, make_logged_disk: MakeDisk) -> None:
    """The disk refuses the data: flush says so, again and again, although the kernel's second
    answer would be that all is well; after clear_flush_error and new stores it is durable."""
    disk = make_logged_disk(kind)
    path = disk.path / "file"
    make_durable(path, OLD)
    m = await AsyncMmap.open_path(path, "r+")
    pending = await m.flush_async_range(4 * PAGE, PAGE)
    await m.write_at(PAGE, b"poison")
    disk.disk.fail_writes(number, containing=b"poison")
    for call in (m.flush, m.flush, pending.wait):
        with pytest.raises(FlushError) as caught:
            await call()
        assert caught.value.errno == number
        assert caught.value.filename == str(path)
    disk.disk.heal()
    with pytest.raises(FlushError):
        await m.flush_range(0, 1)
    assert await after_power_cut(disk, "file") == OLD
    await m.clear_flush_error()
    await m.write_at(PAGE, b"better")
    await m.flush()
    await check_durable(disk, path, stored_into(OLD, PAGE, b"better"))
    with pytest.raises(FlushError):
        await pending
    await m.aclose()


@pytest.mark.fuse
@pytest.mark.loopdev
@every_file_system
async def test_nobody_takes_the_report_away(kind: str, make_logged_disk: MakeDisk) -> None:
    """The kernel reports to each open file once. Maps of one descriptor have one each: its owner's
    own fsync() takes the report from neither, nor one map from the other."""
    disk = make_logged_disk(kind)
    path = disk.path / "file"
    make_durable(path, OLD)
    with opened_descriptor(path) as descriptor:
        one, two = [await AsyncMmap.open(descriptor, "r+") for _ in range(2)]
        await one.write_at(PAGE, b"poison")
        disk.disk.fail_writes(errno.EIO, containing=b"poison")
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            os.fsync(descriptor)
        os.fsync(descriptor)  # the control: it is told once
        for m in (one, two):
            with pytest.raises(FlushError):
                await m.flush()
            await m.aclose(flush=False)
        disk.disk.heal()


@pytest.mark.fuse
@pytest.mark.loopdev
@every_file_system
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_what_the_standard_library_says(kind: str, number: int, make_logged_disk: MakeDisk) -> None:
    """The control of the latch: mmap.flush fails once, then it succeeds, and nothing is there."""
    disk = make_logged_disk(kind)
    path = disk.path / "file"
    make_durable(path, OLD)
    with opened_descriptor(path) as descriptor, mmap.mmap(descriptor, 0) as pages:
        pages[PAGE : PAGE + 6] = b"poison"
        disk.disk.fail_writes(number, containing=b"poison")
        with pytest.raises(OSError, match=os.strerror(number)):
            pages.flush()
        pages.flush()
        disk.disk.heal()
        pages.flush()
        assert disk.after_power_cut("file") == OLD


@pytest.mark.fuse
@pytest.mark.loopdev
@every_file_system
async def test_a_write_back_that_failed_by_itself(kind: str, make_logged_disk: MakeDisk) -> None:
    """The kernel wrote of its own accord and failed before anybody asked: the next flush, of
    whatever range, says so; and so does closing the map."""
    disk = make_logged_disk(kind)
    path = disk.path / "file"
    make_durable(path, OLD)
    m = await AsyncMmap.open_path(path, "r+")
    await m.write_at(PAGE, b"poison")
    disk.disk.fail_writes(errno.EIO, containing=b"poison")
    with opened_descriptor(path) as other, pytest.raises(OSError, match="Input/output error"):
        await to_thread.run_sync(os.fdatasync, other)
    with pytest.raises(FlushError):
        await m.flush_range(6 * PAGE, 1)
    with pytest.raises(FlushError):
        await m.aclose()
    disk.disk.heal()


@pytest.mark.fuse
async def test_full_while_it_is_written_back(slow_file: SlowFile) -> None:
    """ENOSPC on a disk that finds out only when it is written to: flush_async's pending flush
    has it, and closing the map raises it."""
    slow_file.fail_writes(errno.ENOSPC, PAGE, PAGE)
    m = await AsyncMmap.open_path(slow_file.path, "r+")
    await m.write_at(PAGE, NEW)
    with pytest.raises(FlushError) as caught:
        await (await m.flush_async())
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(FlushError):
        await m.aclose()
    slow_file.heal()


# Write-back that was only started


@pytest.mark.fuse
@pytest.mark.loopdev
@every_file_system
async def test_started_write_back_is_no_promise(kind: str, make_logged_disk: MakeDisk) -> None:
    """flush_async really writes the pages, but a power cut before wait() has returned takes
    them: the disk was not flushed."""
    disk = make_logged_disk(kind)
    path = disk.path / "file"
    make_durable_by_pages(path, SIZE)
    async with AsyncMmap.open_path(path, "r+") as m:
        await m.write_at(PAGE, NEW)
        pending = await m.flush_async()
        with opened_descriptor(path) as descriptor:
            assert dirty_pages(descriptor) == 0
            write_back(descriptor)  # wait for what was started, without flushing the disk
        assert [record.length for record in disk.disk.unflushed()].count(PAGE) == 1
        assert await after_power_cut(disk, "file") == OLD
        await pending
        await check_durable(disk, path, stored_into(OLD, PAGE))
