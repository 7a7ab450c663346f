"""The file systems of the rigs: full ones, and ones that crash or lose power, on each kind.

As in ``test_rigs.py``, shown with the kernel's own calls, controls included.
"""

from __future__ import annotations

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("the rigs need Linux", allow_module_level=True)

import errno
import os
import signal
from collections.abc import Callable

from tests.rigs.crash_image import CrashImage
from tests.rigs.faults import PAGE, dirty_pages, write_back
from tests.rigs.file_systems import FILE_SYSTEMS, MIB
from tests.rigs.logged_disk import LoggedDisk
from tests.rigs.plain_files import TOUCH, make_durable, mapped, opened, run_child, seconds
from tests.rigs.small_fs import SmallFileSystem

every_file_system = pytest.mark.parametrize("kind", list(FILE_SYSTEMS))


def write_until_full(descriptor: int, most: int) -> int:
    """Write and flush piece after piece until ENOSPC; returns how many bytes fitted."""
    piece = bytes(16 * PAGE)
    for offset in range(0, most, len(piece)):
        try:
            os.pwrite(descriptor, piece, offset)
            os.fdatasync(descriptor)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return offset
    return most


class TestSmallFileSystem:
    @pytest.mark.smallfs
    def test_a_full_tmpfs(self, make_small_fs: Callable[..., SmallFileSystem]) -> None:
        """ENOSPC for a write, SIGBUS for a store into a hole and even for a read of one."""
        small = make_small_fs()
        hole = small.path / "hole"
        with hole.open("xb") as file:
            file.truncate(4 * PAGE)
        small.fill()
        with opened(hole) as descriptor, pytest.raises(OSError, match="No space left"):
            os.pwrite(descriptor, b"x", 0)
        assert run_child(TOUCH, hole, 0, 1).returncode == -signal.SIGBUS
        assert run_child(TOUCH, hole, 0, "read").returncode == -signal.SIGBUS
        small.free()
        assert run_child(TOUCH, hole, 0, 1).returncode == 0

    @pytest.mark.loopdev
    @every_file_system
    def test_a_full_disk(self, kind: str, make_small_fs: Callable[..., SmallFileSystem]) -> None:
        """ENOSPC for a write, SIGBUS for a store into a hole, and both work when it is freed."""
        small = make_small_fs(kind)
        hole = small.path / "hole"
        with hole.open("xb") as file:
            file.truncate(MIB)
            os.fsync(file.fileno())
        small.fill()
        with opened(hole) as descriptor:
            with pytest.raises(OSError, match="No space left"):
                os.posix_fallocate(descriptor, 0, MIB)
            assert write_until_full(descriptor, MIB) < MIB
        assert run_child(TOUCH, hole, MIB - 1, 1).returncode == -signal.SIGBUS
        small.free()
        assert run_child(TOUCH, hole, MIB - 1, 1).returncode == 0

    @pytest.mark.loopdev
    @every_file_system
    def test_leave(self, kind: str, make_small_fs: Callable[..., SmallFileSystem]) -> None:
        """What was to be left can be written, and not much more."""
        small = make_small_fs(kind)
        small.fill(4 * MIB)
        with opened(small.path / "file", os.O_RDWR | os.O_CREAT) as descriptor:
            written = write_until_full(descriptor, 16 * MIB)
        assert 3 * MIB <= written <= 5 * MIB


@pytest.mark.loopdev
@every_file_system
class TestCrashImage:
    def test_flushed_data_survives(
        self, kind: str, make_crash_image: Callable[..., CrashImage]
    ) -> None:
        """fdatasync and msync make it into the copy, a bare write and a bare store do not."""
        image = make_crash_image(kind)
        make_durable(image.path / "file", b"a" * 4 * PAGE)
        with opened(image.path / "file") as descriptor, mapped(descriptor) as pages:
            os.pwrite(descriptor, b"b", 0)
            os.fdatasync(descriptor)
            pages[PAGE] = ord("c")
            pages.flush(PAGE, PAGE)
            os.pwrite(descriptor, b"d", 2 * PAGE)
            pages[3 * PAGE] = ord("e")
            after = image.after_crash("file")
        assert after is not None
        assert after[::PAGE] == b"bcaa"
        assert image.after_crash("another") is None

    def test_many_crash_points(
        self, kind: str, make_crash_image: Callable[..., CrashImage]
    ) -> None:
        """Each crash point shows what was flushed last, while the file system works on."""
        image = make_crash_image(kind)
        make_durable(image.path / "file", bytes(PAGE))
        with opened(image.path / "file") as descriptor:
            for value in (b"1", b"2", b"3", b"4", b"5"):
                os.pwrite(descriptor, value, 0)
                os.fdatasync(descriptor)
                copy = image.crash_copy()
                os.pwrite(descriptor, b"x", 0)
                with image.mounted(copy) as root:
                    assert (root / "file").read_bytes()[:1] == value


@pytest.mark.fuse
@pytest.mark.loopdev
@every_file_system
class TestLoggedDisk:
    def test_a_power_cut_takes_what_was_not_flushed(
        self, kind: str, make_logged_disk: Callable[..., LoggedDisk]
    ) -> None:
        """msync survives the power cut; sync_file_range writes the page, and it is lost."""
        logged = make_logged_disk(kind)
        path = logged.path / "file"
        make_durable(path, b"a" * PAGE)
        with opened(path) as descriptor, mapped(descriptor) as pages:
            pages[0] = ord("b")
            pages.flush()
            assert logged.disk.log()[-1].kind == "flush"
            assert logged.after_power_cut("file") == b"b" + b"a" * (PAGE - 1)
            pages[0] = ord("c")
            write_back(descriptor)
            assert logged.disk.unflushed()[-1].length == PAGE
            assert dirty_pages(descriptor) == 0
            assert logged.after_power_cut("file") == b"b" + b"a" * (PAGE - 1)
            if kind != "btrfs":  # copy-on-write: the page is on the disk, the tree is not
                assert logged.after_crash("file") == b"c" + b"a" * (PAGE - 1)
            pages.flush()
            # No page is dirty any more, and the flush must reach the device all the same.
            assert logged.after_power_cut("file") == b"c" + b"a" * (PAGE - 1)

    def test_a_flush_takes_its_time(
        self, kind: str, make_logged_disk: Callable[..., LoggedDisk]
    ) -> None:
        """A device flush of 0.2 s is felt by fdatasync, and not by sync_file_range."""
        logged = make_logged_disk(kind)
        path = logged.path / "file"
        make_durable(path, b"a" * PAGE)
        logged.disk.set_latency(fsync=0.2)
        with opened(path) as descriptor:
            os.pwrite(descriptor, b"b", 0)
            assert seconds(lambda: write_back(descriptor)) < 0.2
            assert seconds(lambda: os.fdatasync(descriptor)) >= 0.2

    @pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
    def test_a_failed_write_back(
        self, kind: str, number: int, make_logged_disk: Callable[..., LoggedDisk]
    ) -> None:
        """A write of the file's data fails: fdatasync says so once, and then that all is well."""
        logged = make_logged_disk(kind)
        path = logged.path / "file"
        make_durable(path, b"a" * PAGE)
        logged.disk.fail_writes(number, containing=b"poison")
        with opened(path) as descriptor:
            os.pwrite(descriptor, b"poison", 0)
            with pytest.raises(OSError, match=os.strerror(number)):
                os.fdatasync(descriptor)
            os.fdatasync(descriptor)
            logged.disk.heal()
            assert logged.after_power_cut("file") == b"a" * PAGE
            os.pwrite(descriptor, b"better", 0)
            os.fdatasync(descriptor)
            assert logged.after_power_cut("file") == b"better" + b"a" * (PAGE - 6)
