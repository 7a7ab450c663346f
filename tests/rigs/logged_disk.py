"""A file system on a disk that records each write and flush, and can lose what was not flushed.

The file system lies on a loop device (direct I/O: nothing is cached below it), whose image is a
FUSE file, whose server keeps two versions: what was written, and what the last flush covered.
That tells msync from sync_file_range, which writes the same pages but never flushes the disk.
"""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError("Linux only")

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from .crash_image import after_crash
from .file_systems import FILE_SYSTEMS, FileSystem, mounted_image, new_image
from .fuse_client import ServedFile, serve
from .fuse_protocol import Caching
from .fuse_server import Served
from .mounts import rig_directory
from .small_fs import DEFAULT_SIZES
from .stores import Record as Record


class Disk(ServedFile):
    """The disk below the file system: its latencies, its faults, its record.

    ``set_latency(fsync=...)`` is the time of a device flush; the loop device does nothing else
    meanwhile, as a simple disk. ``fail_writes(..., containing=...)`` makes the write-back of a
    file's data fail wherever it is put, and spares the file system's own structures.
    """

    def __init__(
        self, path: Path, control: Connection, process: subprocess.Popen[bytes], scratch: Path
    ) -> None:
        super().__init__(path, control, process)
        self._scratch = scratch

    def copy(self, *, after_power_cut: bool) -> Path:
        """An image of the disk at this instant."""
        target = Path(tempfile.mkdtemp(prefix="copy-", dir=self._scratch)) / "image"
        self._ask("copy", target, after_power_cut)
        return target

    def log(self) -> list[Record]:
        """Every write and flush that the disk has done, in order."""
        answer = self._ask("log")
        assert isinstance(answer, list)
        return answer

    def unflushed(self) -> list[Record]:
        """The writes that a power cut would lose now."""
        answer = self._ask("unflushed")
        assert isinstance(answer, list)
        return answer


class LoggedDisk:
    """A mounted file system on a recorded disk."""

    def __init__(self, system: FileSystem, path: Path, disk: Disk) -> None:
        self.kind = system.name
        self.path = path
        """Its root."""
        self.disk = disk
        self._system = system

    def power_loss_view(self) -> Path:
        """What the disk would hold after a power cut now: all writes since the last flush lost."""
        return self.disk.copy(after_power_cut=True)

    def crash_copy(self) -> Path:
        """What the disk holds now: what a crash of the system, with power kept, would leave."""
        return self.disk.copy(after_power_cut=False)

    @contextlib.contextmanager
    def mounted(self, copy: Path) -> Iterator[Path]:
        """Mount one of these, with the recovery that follows a crash; the copy is used up."""
        with after_crash(self._system, copy) as root:
            yield root

    def _read(self, copy: Path, name: str) -> bytes | None:
        with self.mounted(copy) as root:
            try:
                return (root / name).read_bytes()
            except FileNotFoundError:
                return None

    def after_power_cut(self, name: str) -> bytes | None:
        """The content of the file ``name`` after a power cut now; None: no such file."""
        return self._read(self.power_loss_view(), name)

    def after_crash(self, name: str) -> bytes | None:
        """The content of the file ``name`` after a crash now; None: no such file."""
        return self._read(self.crash_copy(), name)


@contextlib.contextmanager
def logged_disk(
    kind: str = "ext4", size: int | None = None, *, flush: float = 0.0
) -> Iterator[LoggedDisk]:
    """Mount a new file system on a recorded disk for the length of a ``with`` block.

    :param kind: ``ext4``, ``xfs`` or ``btrfs``
    :param size: in bytes, None: :data:`~.small_fs.DEFAULT_SIZES`
    :param flush: seconds that a device flush takes once the file system is mounted
    """
    system = FILE_SYSTEMS[kind]
    directory = rig_directory("logged")
    image = directory / "image"
    served = directory / "served"
    served.mkdir()
    try:
        new_image(system, DEFAULT_SIZES[kind] if size is None else size, image)
        with serve(Served(served, Caching(), image=image)) as (path, control, process):
            disk = Disk(path, control, process, directory)
            with mounted_image(system, path, direct_io=True) as there:
                disk.set_latency(fsync=flush)
                try:
                    yield LoggedDisk(system, there.path, disk)
                finally:
                    # The unmount writes and flushes: neither held nor slowly.
                    with contextlib.suppress(OSError, EOFError):  # the test may have killed it
                        disk.heal()
                        disk.release()
                        disk.set_latency(read=0.0, write=0.0, fsync=0.0)
    finally:
        shutil.rmtree(directory, ignore_errors=True)  # a detached mount may still be in use
