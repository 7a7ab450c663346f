"""A small file system that can be full: tmpfs, or ext4, xfs or btrfs on an image in memory."""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError("Linux only")

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .file_systems import FILE_SYSTEMS, MIB, MIXED_BTRFS, mounted_image, new_image
from .mounts import mounted, rig_directory

PAGE = 4096
DEFAULT_SIZES = {"tmpfs": 8 * MIB, "ext4": 64 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB}
"""In bytes. Only what is written takes memory, but xfs and btrfs refuse to be small."""

_libc = ctypes.CDLL(None, use_errno=True)


class SmallFileSystem:
    """A mounted file system, to be filled and freed at will."""

    def __init__(self, kind: str, path: Path) -> None:
        self.kind = kind
        self.path = path
        """Its root."""
        self._filler = path / ".filler"

    def _sync(self) -> None:
        """Write everything: btrfs and xfs give freed blocks back only with a commit."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.syncfs(descriptor):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), str(self.path))
        finally:
            os.close(descriptor)

    def fill(self, leave: int = 0) -> None:
        """Take all free blocks but ``leave`` bytes (rounded up to pages).

        The blocks are reserved and not written, so that this takes 1 to 10 ms. ext4, xfs and
        btrfs may still find a few blocks for metadata, or need some: leave at least 1 MiB for a
        test that wants a certain amount of data to fit.
        """
        self.free()
        reserve = self.path / ".reserve"
        if leave:
            with reserve.open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, leave)
        with self._filler.open("xb") as file:
            piece = 1 << 30
            size = 0
            while piece >= PAGE:
                try:
                    os.posix_fallocate(file.fileno(), size, piece)
                    size += piece
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EFBIG):
                        raise
                    piece //= 2
        if leave:
            reserve.unlink()
        self._sync()

    def free(self) -> None:
        """Give back what :meth:`fill` took."""
        self._filler.unlink(missing_ok=True)
        self._sync()


@contextlib.contextmanager
def small_fs(kind: str = "tmpfs", size: int | None = None) -> Iterator[SmallFileSystem]:
    """Mount a new file system of ``size`` bytes for the length of a ``with`` block.

    :param kind: ``tmpfs`` (marker ``smallfs``), or ``ext4``, ``xfs``, ``btrfs`` (marker
        ``loopdev``)
    :param size: in bytes, None: the smallest that is of use, see :data:`DEFAULT_SIZES`
    """
    size = DEFAULT_SIZES[kind] if size is None else size
    directory = rig_directory("small")
    try:
        if kind == "tmpfs":
            with mounted("tmpfs", directory / "root", "tmpfs", options=f"size={size}") as path:
                yield SmallFileSystem(kind, path)
            return
        system = MIXED_BTRFS if kind == "btrfs" else FILE_SYSTEMS[kind]
        image = directory / "image"
        new_image(system, size, image)
        with mounted_image(system, image) as there:
            yield SmallFileSystem(kind, there.path)
    finally:
        shutil.rmtree(directory, ignore_errors=True)  # a detached mount may still be in use
