"""create and resize on full disks, and beside others: the file is the old or the new one."""

from __future__ import annotations

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("the rigs need Linux", allow_module_level=True)

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio

from aiommap import AsyncMmap

from .cancelling import let_others_run, on_asyncio
from .content import open_descriptors
from .fake_kernel import FakeKernel
from .flushing import begin, entered, mapped_by
from .rigs.small_fs import SmallFileSystem

pytestmark = pytest.mark.anyio

MIB = 1 << 20
PAGE = 4096

MakeSmall = Callable[..., SmallFileSystem]
every_kind = pytest.mark.parametrize(
    "kind",
    [
        pytest.param("tmpfs", marks=pytest.mark.smallfs),
        *(pytest.param(kind, marks=pytest.mark.loopdev) for kind in ("ext4", "xfs", "btrfs")),
    ],
)


def almost_full(small: SmallFileSystem) -> None:
    small.fill(leave=2 * MIB)


def room(folder: Path) -> int:
    """Bytes that can still be reserved there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # btrfs counts with the next commit
        status = os.fstatvfs(descriptor)
        return status.f_bfree * status.f_frsize  # root has the reserved ones too
    finally:
        os.close(descriptor)


@every_kind
async def test_create_without_room(kind: str, make_small_fs: MakeSmall) -> None:
    """A file that does not fit is ENOSPC with its path when it is created, not SIGBUS when it is
    stored to; no file and no descriptor is left behind, and its blocks are free again."""
    small = make_small_fs(kind)
    almost_full(small)
    before, files = room(small.path), set(os.listdir(small.path))
    descriptors = open_descriptors()
    path = small.path / "new"
    with pytest.raises(OSError, match="new") as caught:
        await AsyncMmap.create(path, 64 * MIB)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert set(os.listdir(small.path)) == files
    assert open_descriptors() == descriptors
    assert room(small.path) >= before - MIB
    async with AsyncMmap.create(path, MIB) as m:
        await m.write_at(0, b"x" * MIB)


@every_kind
async def test_a_created_file_can_be_stored_to_on_a_full_disk(
    kind: str, make_small_fs: MakeSmall
) -> None:
    """
    Its blocks are its own: the disk fills up behind it, and every store and flush works.

    But for btrfs, which wants room again for the first store into a page through a map, whether
    it has a block or not: there our calls raise.
    """
    small = make_small_fs(kind)
    async with AsyncMmap.create(small.path / "new", MIB) as m:
        small.fill()
        if kind == "btrfs":
            with pytest.raises(OSError, match="new"):
                await m.write_at(0, b"x" * MIB)
            small.free()
        await m.write_at(0, b"x" * MIB)
        async with m.view_mut() as v:
            v[::PAGE] = b"y" * (MIB // PAGE)
            await v.flush()
        assert await m.read_at(0, PAGE) == b"y" + b"x" * (PAGE - 1)
    small.free()


@every_kind
async def test_resize_without_room(kind: str, make_small_fs: MakeSmall) -> None:
    """A map that cannot grow is the old map of the old file, and what the file system had
    reserved before it was full is given back: others can have it."""
    small = make_small_fs(kind)
    path = small.path / "file"
    async with AsyncMmap.create(path, MIB) as m:
        await m.write_at(0, b"x" * MIB)
        await m.flush()
        almost_full(small)
        before = room(small.path)
        with pytest.raises(OSError, match="file") as caught:
            await m.resize(64 * MIB)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(path)
        assert len(m) == path.stat().st_size == MIB
        assert room(small.path) >= before - MIB // 2
        assert await m.read_at(MIB - 1, 1) == b"x"
        await m.write_at(0, b"y")
        await m.flush()


@every_kind
async def test_exist_ok_without_room(kind: str, make_small_fs: MakeSmall) -> None:
    """create(exist_ok=True) that cannot grow leaves the file that was there as it was."""
    small = make_small_fs(kind)
    path = small.path / "file"
    path.write_bytes(b"x" * MIB)
    almost_full(small)
    before = room(small.path)
    with pytest.raises(OSError, match="file") as caught:
        await AsyncMmap.create(path, 64 * MIB, exist_ok=True)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"x" * MIB
    assert room(small.path) >= before - MIB // 2


@pytest.mark.smallfs
async def test_create_without_room_and_without_fallocate(make_small_fs: MakeSmall) -> None:
    """Where blocks cannot be reserved, a new file is written full of zeros: ENOSPC then, too."""
    fake = FakeKernel()
    fake.lack("fallocate")
    small = make_small_fs()
    files = set(os.listdir(small.path))
    with pytest.raises(OSError, match="new") as caught:
        await mapped_by(fake).create(small.path / "new", 64 * MIB)
    assert caught.value.errno == errno.ENOSPC
    assert set(os.listdir(small.path)) == files


async def test_without_fallocate_nobody_elses_bytes_are_written(tmp_path: Path) -> None:
    """A file that others may have open is never written to make room: it grows by a hole, and
    what they store meanwhile stays (glibc's emulation of fallocate would race with them)."""
    fake = FakeKernel()
    fake.lack("fallocate")
    path = tmp_path / "file"
    path.write_bytes(b"a" * PAGE)
    with open(path, "r+b", buffering=0) as other:
        fake.before("set_file_size", lambda call: other.write(b"b"))
        async with mapped_by(fake).create(path, 4 * PAGE, exist_ok=True) as m:
            assert await m.read_at(0, 2) == b"ba"
            assert len(m) == 4 * PAGE
            await m.resize(8 * PAGE)
            assert await m.read_at(0, 3) == b"bba"
    assert path.stat().st_blocks * 512 <= 2 * PAGE


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
async def test_what_the_reservation_says(tmp_path: Path, number: int) -> None:
    """Quota and size limits are reported like a full disk, with the path."""
    fake = FakeKernel()
    fake.fail("reserve", number)
    with pytest.raises(OSError, match="new") as caught:
        await mapped_by(fake).create(tmp_path / "new", PAGE)
    assert caught.value.errno == number
    assert not os.listdir(tmp_path)


async def test_removed_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """exist_ok: a file that is removed between "it is there" and the open is made anew, and it
    is ours: a failure removes it again."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    real = os.open

    def removing(name: Any, flags: int, *rest: Any, **options: Any) -> int:
        if name == str(path) and not flags & os.O_EXCL:
            path.unlink()
        return real(name, flags, *rest, **options)

    monkeypatch.setattr(os, "open", removing)
    fake = FakeKernel()
    fake.fail("sync_directory", errno.EIO)
    with pytest.raises(OSError, match="file"):
        await mapped_by(fake).create(path, PAGE, exist_ok=True)
    assert not path.exists()


async def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    """exist_ok does not try for ever on a name that is there and cannot be opened."""
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="link"):
        await AsyncMmap.create(link, PAGE, exist_ok=True)
    assert os.listdir(tmp_path) == ["link"]


async def test_the_first_error_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the file cannot even be removed again, what is raised is why it could not be made."""

    def refuse(path: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    fake = FakeKernel()
    fake.fail("sync_all", errno.EIO)
    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(OSError, match="new") as caught:
        await mapped_by(fake).create(tmp_path / "new", PAGE)
    assert caught.value.errno == errno.EIO


CREATING = ("reserve", "sync_all", "sync_directory", "map_file")


@on_asyncio
@pytest.mark.parametrize("call", CREATING)
async def test_cancelled_natively_in_the_middle(tmp_path: Path, call: str) -> None:
    """task.cancel(), twice, while the file is made: it is gone when the task has ended."""
    import asyncio

    fake = FakeKernel()
    before = open_descriptors()
    with fake.hold(call, times=1) as hold:

        async def create() -> None:
            await mapped_by(fake).create(tmp_path / "new", PAGE)

        task = asyncio.ensure_future(create())
        await entered(hold)
        for _ in range(2):
            task.cancel()
            await let_others_run()
        hold.release.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not os.listdir(tmp_path)
    assert open_descriptors() == before


async def test_a_shrinking_map_is_not_flushed_as_it_was(tmp_path: Path) -> None:
    """A resize that makes the file shorter waits neither for a flush nor makes it fail."""
    fake = FakeKernel(durability=True)
    path = tmp_path / "file"
    async with mapped_by(fake).create(path, 8 * PAGE) as m:
        await m.write_at(0, b"x" * (8 * PAGE))
        with fake.hold("sync_data", times=1) as hold:
            async with anyio.create_task_group() as tasks:
                flush = begin(tasks, m.flush)
                await entered(hold)
                await m.resize(PAGE)
                assert not flush.done.is_set()
                hold.release.set()
        assert flush.error is None
        await m.flush()
    assert fake.disk.durable(path) == b"x" * PAGE
