"""``info``: what a file is, and what is possible here."""

from __future__ import annotations

import argparse
import os
import stat
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import anyio

from aiommap import AsyncMmap, capabilities

from ._progress import Complain, Progress


async def info(
    options: argparse.Namespace, progress: Progress | None, complain: Complain
) -> dict[str, Any]:
    """Facts of the file, and the capabilities of the kernel and of its file system."""
    path = options.file
    found: dict[str, Any] = {"path": path or tempfile.gettempdir()}
    if path is not None:
        found |= await anyio.to_thread.run_sync(facts, path)
        if found.get("size"):
            async with AsyncMmap.open_path(path) as m:
                found["resident"] = await m.resident()
    found["file_system"] = await anyio.to_thread.run_sync(file_system, found["path"])
    found["capabilities"] = asdict(await anyio.to_thread.run_sync(capabilities, path))
    return found


def facts(path: str) -> dict[str, Any]:
    """Size, space taken and holes; nothing of a directory."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            return {}
        taken = getattr(status, "st_blocks", None)
        return {
            "size": status.st_size,
            "allocated": None if taken is None else taken * 512,
            "holes": holes(fd, status.st_size),
        }
    finally:
        os.close(fd)


def holes(fd: int, size: int) -> int | None:
    """Bytes of a file that no block was given to; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    total = offset = 0
    with suppress(OSError):  # ENXIO: nothing but a hole from here on, which ends the file
        while offset < size:
            data = offset
            try:
                data = os.lseek(fd, offset, os.SEEK_DATA)
            except OSError:
                total += size - offset
                raise
            total += data - offset
            offset = os.lseek(fd, data, os.SEEK_HOLE)
    return total


def file_system(path: str) -> str | None:
    """The type of the file system that has the path, on Linux; else None."""
    if sys.platform != "linux":
        return None
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            before, _, after = line.partition(" - ")
            if before.split()[2] == wanted:
                return after.split()[0]
    return None
