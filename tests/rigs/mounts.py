"""Mounting, and a home for everything the rigs put on this machine.

Each process that uses a rig has one home: a temporary directory with a tmpfs on it. Images, mount
points and copies live below it, so that one lazy unmount of the home takes everything along, and
images never wait for a disk. The directory's name carries the id and start time of its process:
what a killed run left behind is recognised by its dead owner and removed by the next run.
"""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError("Linux only")

import atexit
import contextlib
import ctypes
import errno
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]

MS_NOSUID = 2
MS_NODEV = 4
_MNT_DETACH = 2
_PREFIX = "aiommap-rig-"


def mount(source: str, target: Path, kind: str, *, flags: int = 0, options: str = "") -> None:
    """Call mount(2).

    :raises OSError: with the kernel's errno
    """
    result = _libc.mount(
        source.encode(), os.fsencode(target), kind.encode(), flags, options.encode()
    )
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"mounting {kind} ({options}): {os.strerror(number)}", str(target))


def unmount(target: Path) -> None:
    """Unmount ``target`` and what is mounted below it; nothing mounted there is no error.

    A clean unmount writes everything back before it returns. Where files are still open or mapped
    (a failing test), the mount is detached instead, and the kernel ends it after the last user.
    """
    for flags in (0, _MNT_DETACH):
        if not _libc.umount2(os.fsencode(target), flags):
            return
        number = ctypes.get_errno()
        if number in (errno.EINVAL, errno.ENOENT):  # not a mount point; already gone
            return
        if number != errno.EBUSY or flags == _MNT_DETACH:
            # A dead FUSE server answers ENOTCONN to nothing here: umount2 does not ask it.
            raise OSError(number, f"unmounting: {os.strerror(number)}", str(target))


@contextlib.contextmanager
def mounted(
    source: str, target: Path, kind: str, *, flags: int = 0, options: str = ""
) -> Iterator[Path]:
    """Mount for the length of a ``with`` block; ``target`` is made and removed."""
    target.mkdir()
    try:
        mount(source, target, kind, flags=flags, options=options)
        try:
            yield target
        finally:
            unmount(target)
    finally:
        with contextlib.suppress(OSError):  # still detached-but-busy directories may refuse
            target.rmdir()


def _start_time(pid: int) -> str | None:
    """When the process started, in clock ticks since boot; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name, in parentheses, may itself contain spaces and parentheses.
    return stat.rpartition(")")[2].split()[19]


def _remove(home: Path) -> None:
    unmount(home)
    with contextlib.suppress(OSError):
        home.rmdir()


def _remove_at_exit(home: Path, owner: int) -> None:
    # A forked child that ends through exit() runs this too: the home is not the child's.
    if os.getpid() == owner:
        _remove(home)


def remove_stale_homes(directory: Path) -> None:
    """Unmount and remove the homes below ``directory`` whose process is gone."""
    for home in directory.glob(f"{_PREFIX}*"):
        pid, _, started = home.name.removeprefix(_PREFIX).partition("-")
        if pid.isdecimal() and _start_time(int(pid)) != started.partition("-")[0]:
            # Another run may be removing the same one; what cannot be removed is not in our way.
            with contextlib.suppress(OSError):
                _remove(home)


@functools.cache
def _home_of(pid: int) -> Path:
    directory = Path(tempfile.gettempdir())
    remove_stale_homes(directory)
    home = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{pid}-{_start_time(pid)}-", dir=directory))
    atexit.register(_remove_at_exit, home, pid)
    mount("tmpfs", home, "tmpfs", flags=MS_NOSUID | MS_NODEV, options="mode=0755")
    return home


def rig_directory(name: str) -> Path:
    """A new empty directory on tmpfs for one rig."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_home_of(os.getpid())))
