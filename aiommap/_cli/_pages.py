"""``residency``, ``load`` and ``evict``: files in the page cache."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from itertools import pairwise
from typing import Any

import anyio

from aiommap import AsyncMmap

from ._progress import Complain, Progress, for_each_file

PIECE = 16 << 20  # loaded or evicted at once, between two steps of the bar
Found = dict[str, Any]


def cut(size: int, parts: int) -> list[tuple[int, int]]:
    """A size in so many parts, as equal as whole bytes allow: offsets and lengths."""
    borders = [size * number // parts for number in range(parts + 1)]
    return [(start, stop - start) for start, stop in pairwise(borders) if stop > start]


async def residency(
    options: argparse.Namespace, progress: Progress | None, complain: Complain
) -> list[Found]:
    """Bytes in memory of each part of each file."""

    async def look(path: str) -> Found:
        async with AsyncMmap.open_path(path) as m:
            parts = [await m.resident(*part) for part in cut(len(m), options.parts)]
            return {"path": path, "size": len(m), "resident": await m.resident(), "parts": parts}

    return await for_each_file(options, complain, look)


async def load(
    options: argparse.Namespace, progress: Progress | None, complain: Complain
) -> list[Found]:
    """Bring each file in."""

    async def bring(path: str) -> Found:
        started = time.perf_counter()
        async with AsyncMmap.open_path(path) as m:
            if progress is not None:
                progress.begin(path, len(m))
            for offset in range(0, len(m), PIECE):
                count = min(PIECE, len(m) - offset)
                await m.load(offset, count)
                if progress is not None:
                    progress.advance(count)
            return {
                "path": path,
                "size": len(m),
                "resident": await m.resident(),
                "seconds": time.perf_counter() - started,
            }

    return await for_each_file(options, complain, bring)


async def evict(
    options: argparse.Namespace, progress: Progress | None, complain: Complain
) -> list[Found]:
    """Send each file out."""

    async def send(path: str) -> Found:
        started = time.perf_counter()
        size = await send_out(path, progress)
        async with AsyncMmap.open_path(path) as m:
            return {
                "path": path,
                "size": size,
                "resident": await m.resident(),
                "seconds": time.perf_counter() - started,
            }

    return await for_each_file(options, complain, send)


async def send_out(path: str, progress: Progress | None = None) -> int:
    """
    Have the kernel forget a file's pages; the file's size.

    :raises OSError: ENOTSUP where the platform has no call for it
    """
    if sys.platform == "win32" or sys.platform == "darwin":
        raise OSError(errno.ENOTSUP, "this system cannot send a file out of memory", path)
    fd = await anyio.to_thread.run_sync(os.open, path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        # Dirty pages cannot be forgotten.
        await anyio.to_thread.run_sync(os.fsync, fd)
        size = os.fstat(fd).st_size
        if progress is not None:
            progress.begin(path, size)
        for offset in range(0, size, PIECE):
            count = min(PIECE, size - offset)
            await anyio.to_thread.run_sync(
                os.posix_fadvise, fd, offset, count, os.POSIX_FADV_DONTNEED
            )
            if progress is not None:
                progress.advance(count)
    finally:
        os.close(fd)
    return size
