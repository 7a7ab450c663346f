"""Loop devices by ioctl: a losetup process for each of hundreds of crash points is too slow."""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError("Linux only")

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

# linux/loop.h
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82
_LO_FLAGS_AUTOCLEAR = 4
_LO_FLAGS_DIRECT_IO = 16
_LOOP_MAJOR = 7
# struct loop_config: fd, block_size, struct loop_info64 (of which only lo_flags is set), reserved.
_LOOP_CONFIG = struct.Struct("=II 52x I 176x 64x")


def _open_device(number: int) -> int:
    path = Path(f"/dev/loop{number}")
    if not path.exists():  # a container's /dev does not grow by itself
        with contextlib.suppress(FileExistsError):
            os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(_LOOP_MAJOR, number))
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


@contextlib.contextmanager
def loop_device(image: Path, *, direct_io: bool = False) -> Iterator[str]:
    """Attach ``image`` to a free loop device and give the device's path.

    The kernel detaches it by itself with its last user, so that nothing is left even when this
    process is killed: the block's end, or the unmount of the file system on it, whichever is later.

    :param direct_io: do not cache the image a second time: each write of the device reaches the
        image's file system at once
    :raises OSError: with the kernel's errno
    """
    # An O_DIRECT descriptor is what makes the kernel honour LO_FLAGS_DIRECT_IO everywhere.
    backing = os.open(image, os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct_io else 0))
    try:
        flags = _LO_FLAGS_AUTOCLEAR | (_LO_FLAGS_DIRECT_IO if direct_io else 0)
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            while True:
                number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
                device = _open_device(number)
                try:
                    fcntl.ioctl(device, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(backing, 0, flags))
                    break
                except OSError as error:
                    os.close(device)
                    if error.errno != errno.EBUSY:  # EBUSY: another process took it first
                        raise
        finally:
            os.close(control)
    finally:
        os.close(backing)
    try:
        yield f"/dev/loop{number}"
    finally:
        os.close(device)
