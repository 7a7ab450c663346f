"""Images of ext4, xfs and btrfs, and how to mount them."""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError("Linux only")

import contextlib
import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from .loop_device import loop_device
from .mounts import mounted, rig_directory

MIB = 1 << 20
TOOL_PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
"""Where mkfs is looked for: administrators' directories are not in everyone's path."""


@dataclasses.dataclass(frozen=True)
class FileSystem:
    """How to make and mount one kind of file system."""

    name: str
    make: tuple[str, ...]
    """The mkfs command without the image's path."""
    options: str
    """Mount options. Commits by timer are put off (ext4's default is 5 s, btrfs's 30 s): what an
    explicit flush made durable is to be told from what came to disk by itself on a slow machine."""
    smallest: int
    """In bytes. Images are sparse, so that size costs nothing."""


FILE_SYSTEMS = {
    system.name: system
    for system in (
        FileSystem(
            "ext4",
            # Lazy initialisation would go on writing to the disk long after the mount.
            ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"),
            "commit=300",
            8 * MIB,
        ),
        # A copy of a mounted image has the same UUID, which xfs refuses without nouuid.
        FileSystem("xfs", ("mkfs.xfs", "-q", "-f"), "nouuid", 300 * MIB),
        FileSystem("btrfs", ("mkfs.btrfs", "-q", "-f", "-m", "single"), "commit=300", 114 * MIB),
    )
}

MIXED_BTRFS = dataclasses.replace(
    FILE_SYSTEMS["btrfs"], make=("mkfs.btrfs", "-q", "-f", "--mixed"), smallest=32 * MIB
)
"""btrfs that puts data and metadata together: the only kind that a small image of can be filled and
freed again. Otherwise the full disk has no metadata left to delete the filling with."""


def copy_sparse(source: int, target: Path) -> None:
    """Copy what the file behind descriptor ``source`` holds, without its holes."""
    size = os.fstat(source).st_size
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size)
        end = 0
        while end < size:
            try:
                start = os.lseek(source, end, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole is left
                break
            end = os.lseek(source, start, os.SEEK_HOLE)
            os.lseek(descriptor, start, os.SEEK_SET)
            while start < end:
                start += os.sendfile(descriptor, source, start, end - start)
    finally:
        os.close(descriptor)


_CHUNK = 64 * 1024


def _dig_holes(path: Path) -> None:
    """Turn zeros into holes: mkfs.xfs writes a log of 64 MiB, which every copy would pay for."""
    zeros = bytes(_CHUNK)
    dug = path.with_suffix(".dug")
    with path.open("rb") as source, dug.open("xb") as target:
        while chunk := source.read(_CHUNK):
            if chunk == zeros[: len(chunk)]:
                target.seek(len(chunk), os.SEEK_CUR)
            else:
                target.write(chunk)
        target.truncate(source.tell())
    dug.rename(path)


_empty_images: dict[tuple[tuple[str, ...], int], Path] = {}


def new_image(system: FileSystem, size: int, path: Path) -> None:
    """Write an empty file system of ``size`` bytes to the new file ``path``.

    mkfs (5 to 100 ms) runs once per kind and size in a process, further images are copies.

    :raises ValueError: ``size`` is below what this file system can be
    """
    if size < system.smallest:
        raise ValueError(f"{system.name} needs {system.smallest} bytes or more, got {size}")
    empty = _empty_images.get((system.make, size))
    if empty is None:
        empty = rig_directory("empty") / system.name
        with empty.open("xb") as file:
            file.truncate(size)
        subprocess.run(
            [*system.make, str(empty)],
            check=True,
            capture_output=True,
            env={**os.environ, "PATH": TOOL_PATH},
        )
        _dig_holes(empty)
        _empty_images[system.make, size] = empty
    with empty.open("rb") as file:
        copy_sparse(file.fileno(), path)


@dataclasses.dataclass(frozen=True)
class Mounted:
    """A mounted image."""

    path: Path
    """The root of the file system."""
    device: str
    """The loop device below it."""


@contextlib.contextmanager
def mounted_image(system: FileSystem, image: Path, *, direct_io: bool = False) -> Iterator[Mounted]:
    """Mount ``image`` through a loop device; the file system recovers as after a crash."""
    directory = rig_directory("mnt")
    with (
        loop_device(image, direct_io=direct_io) as device,
        mounted(device, directory / system.name, system.name, options=system.options) as path,
    ):
        yield Mounted(path, device)
    with contextlib.suppress(OSError):
        directory.rmdir()
