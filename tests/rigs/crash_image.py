"""A file system whose disk can be copied at any instant, to see what a crash would have left.

The image is on tmpfs, so that what the file system has handed to its disk, and nothing else, is in
the copy. Pages that no flush has written are not. This cannot see a missing device flush, or writes
that a disk would have reordered: :mod:`.logged_disk` can, but is slower.
"""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError("Linux only")

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .file_systems import FILE_SYSTEMS, FileSystem, copy_sparse, mounted_image, new_image
from .mounts import rig_directory
from .small_fs import DEFAULT_SIZES

_MOST_ATTEMPTS = 100
"""Copies spoilt by writes before giving up. Out of the air; one or two are common."""


@contextlib.contextmanager
def after_crash(system: FileSystem, image: Path) -> Iterator[Path]:
    """Mount a copy, as after a crash, and give its root. The copy is used up."""
    try:
        with mounted_image(system, image) as there:
            yield there.path
    finally:
        image.unlink()


class CrashImage:
    """A mounted file system that can crash as often as a test likes without stopping."""

    def __init__(self, system: FileSystem, path: Path, image: Path, device: str) -> None:
        self.kind = system.name
        self.path = path
        """Its root."""
        self._system = system
        self._image = image
        self._counters = Path("/sys/block") / Path(device).name

    def _writes(self) -> tuple[str, str]:
        """Writes the disk has done, and writes under way."""
        done = (self._counters / "stat").read_text().split()[4]
        return done, (self._counters / "inflight").read_text().split()[1]

    def crash_copy(self) -> Path:
        """What is on the disk at this instant.

        A copy takes milliseconds. If the disk was written meanwhile (a journal's timer, another
        thread), the copy is a state that never was, and is taken again.

        :raises RuntimeError: the disk is written without a pause
        """
        for _ in range(_MOST_ATTEMPTS):
            target = Path(tempfile.mkdtemp(prefix="crash-", dir=self._image.parent)) / "image"
            before = self._writes()
            with self._image.open("rb") as source:
                copy_sparse(source.fileno(), target)
            if before == self._writes() and before[1] == "0":
                return target
            target.unlink()
        raise RuntimeError("the disk never rested: pause the writers, or take logged_disk")

    @contextlib.contextmanager
    def mounted(self, copy: Path) -> Iterator[Path]:
        """Mount what :meth:`crash_copy` gave, with the recovery that follows a crash.

        Gives the root of the file system. The copy is removed with the end of the block.
        """
        with after_crash(self._system, copy) as root:
            yield root

    def after_crash(self, name: str) -> bytes | None:
        """The content that the file ``name`` would have after a crash now; None: no such file."""
        with self.mounted(self.crash_copy()) as root:
            try:
                return (root / name).read_bytes()
            except FileNotFoundError:
                return None


@contextlib.contextmanager
def crash_image(kind: str = "ext4", size: int | None = None) -> Iterator[CrashImage]:
    """Mount a new file system (``ext4``, ``xfs`` or ``btrfs``) for the length of a ``with`` block.

    :param size: in bytes, None: :data:`~.small_fs.DEFAULT_SIZES`
    """
    system = FILE_SYSTEMS[kind]
    directory = rig_directory("crash")
    image = directory / "image"
    try:
        new_image(system, DEFAULT_SIZES[kind] if size is None else size, image)
        with mounted_image(system, image) as there:
            yield CrashImage(system, there.path, image, there.device)
    finally:
        shutil.rmtree(directory, ignore_errors=True)  # a detached mount may still be in use
