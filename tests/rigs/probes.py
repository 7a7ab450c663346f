"""Trying what each rig does first: the only way to know in a container what is allowed."""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError("Linux only")

import os
import shutil
from collections.abc import Callable

from .file_systems import FILE_SYSTEMS, TOOL_PATH, mounted_image, new_image
from .fuse_protocol import Caching, FuseConnection
from .mounts import rig_directory, unmount
from .small_fs import DEFAULT_SIZES

INSTALL = "run .ci/install-rigs as root"


def _missing_smallfs() -> str | None:
    try:
        rig_directory("probe")
    except OSError as error:
        return f"a tmpfs cannot be mounted ({error.strerror}): needs CAP_SYS_ADMIN"
    return None


def _missing_fuse() -> str | None:
    try:
        descriptor = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"/dev/fuse cannot be opened ({error.strerror}): load the kernel module fuse"
    os.close(descriptor)
    directory = rig_directory("probe")
    try:
        # Mounts, but serves nothing: the kernel's first question waits until the unmount.
        connection = FuseConnection(directory, 0, Caching())
    except OSError as error:
        return f"FUSE cannot be mounted ({error.strerror}): needs CAP_SYS_ADMIN"
    os.close(connection.descriptor)
    unmount(directory)
    return None


def _missing_loopdev() -> str | None:
    for system in FILE_SYSTEMS.values():
        command = system.make[0]
        if shutil.which(command, path=TOOL_PATH) is None:
            return f"{command} is not installed: {INSTALL}"
        image = rig_directory("probe") / "image"
        try:
            new_image(system, DEFAULT_SIZES[system.name], image)
            with mounted_image(system, image):
                pass
        except OSError as error:
            return (
                f"{system.name} on a loop device cannot be mounted ({error.strerror}): "
                f"needs CAP_SYS_ADMIN and the kernel modules loop and {system.name}"
            )
    return None


PROBES: dict[str, Callable[[], str | None]] = {
    "fuse": _missing_fuse,
    "loopdev": _missing_loopdev,
    "smallfs": _missing_smallfs,
}
"""By marker: None if the rig works here, or what is missing and how to get it."""
