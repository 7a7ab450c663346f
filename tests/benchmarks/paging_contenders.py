"""What the pager is measured beside: the ways in which programs read and write files today.

Each contender is an async context manager that gives ``read(offset, length) -> bytes``, or
``write(offset, data)``, or None where it does not run on this event loop. They are used as their
own documentation shows.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import anyio.lowlevel
from anyio import to_thread

from aiommap import AsyncMmap

Read = Callable[[int, int], Awaitable[bytes]]
Write = Callable[[int, bytes], Awaitable[object]]
Contender = Callable[[Path, int], AbstractAsyncContextManager[Read | None]]
Writer = Callable[[Path, int], AbstractAsyncContextManager[Write | None]]
"""Takes the path and how many tasks will read, or write, at the same time."""


def _on_asyncio() -> bool:
    from sniffio import current_async_library

    return current_async_library() == "asyncio"


@asynccontextmanager
async def map_read_at(path: Path, tasks: int) -> AsyncIterator[Read | None]:
    async with AsyncMmap.open_path(path) as m:
        yield m.read_at


@asynccontextmanager
async def map_view(path: Path, tasks: int) -> AsyncIterator[Read | None]:
    async with AsyncMmap.open_path(path) as m:

        async def read(offset: int, length: int) -> bytes:
            async with m.view(offset, length) as v:
                return bytes(v.buffer)

        yield read


@asynccontextmanager
async def with_aiofiles(path: Path, tasks: int) -> AsyncIterator[Read | None]:
    """A file has one cursor, so each task has a file of its own: seek, then read."""
    if not _on_asyncio():
        yield None
        return
    import aiofiles  # type: ignore[import-untyped, import-not-found, unused-ignore]

    free = [await aiofiles.open(path, "rb", buffering=0) for _ in range(tasks)]
    files = list(free)

    async def read(offset: int, length: int) -> bytes:
        file = free.pop()
        try:
            await file.seek(offset)
            data: bytes = await file.read(length)
            return data
        finally:
            free.append(file)

    try:
        yield read
    finally:
        for file in files:
            await file.close()


@asynccontextmanager
async def with_anyio_file(path: Path, tasks: int) -> AsyncIterator[Read | None]:
    """As aiofiles, on every event loop."""
    free = [await anyio.open_file(path, "rb", buffering=0) for _ in range(tasks)]
    files = list(free)

    async def read(offset: int, length: int) -> bytes:
        file = free.pop()
        try:
            await file.seek(offset)
            return await file.read(length)
        finally:
            free.append(file)

    try:
        yield read
    finally:
        for file in files:
            await file.aclose()


@asynccontextmanager
async def with_aiofile(path: Path, tasks: int) -> AsyncIterator[Read | None]:
    """aiofile over caio: Linux's own asynchronous reads where they work, else its threads."""
    if not _on_asyncio():
        yield None
        return
    from aiofile import AIOFile  # type: ignore[import-not-found, unused-ignore]

    async with AIOFile(str(path), "rb") as file:

        async def read(offset: int, length: int) -> bytes:
            data: bytes = await file.read_bytes(length, offset)
            return data

        yield read


@asynccontextmanager
async def with_thread_pread(path: Path, tasks: int) -> AsyncIterator[Read | None]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    async def read(offset: int, length: int) -> bytes:
        return await to_thread.run_sync(os.pread, fd, length, offset)

    try:
        yield read
    finally:
        os.close(fd)


@asynccontextmanager
async def _plain_map(path: Path) -> AsyncIterator[mmap.mmap]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pages = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
    with pages:
        # So that a slice reads what it touches, as all the others do.
        pages.madvise(mmap.MADV_RANDOM)
        yield pages


@asynccontextmanager
async def slice_and_checkpoint(path: Path, tasks: int) -> AsyncIterator[Read | None]:
    checkpoint = anyio.lowlevel.checkpoint
    async with _plain_map(path) as pages:

        async def read(offset: int, length: int) -> bytes:
            await checkpoint()
            return pages[offset : offset + length]

        yield read


@asynccontextmanager
async def slice_under_lock(path: Path, tasks: int) -> AsyncIterator[Read | None]:
    lock = anyio.Lock()
    async with _plain_map(path) as pages:

        async def read(offset: int, length: int) -> bytes:
            async with lock:
                return pages[offset : offset + length]

        yield read


@asynccontextmanager
async def slice_in_thread(path: Path, tasks: int) -> AsyncIterator[Read | None]:
    async with _plain_map(path) as pages:

        def copy(offset: int, length: int) -> bytes:
            return pages[offset : offset + length]

        async def read(offset: int, length: int) -> bytes:
            return await to_thread.run_sync(partial(copy, offset, length))

        yield read


@asynccontextmanager
async def map_write_at(path: Path, tasks: int) -> AsyncIterator[Write | None]:
    async with AsyncMmap.open_path(path, "r+") as m:
        yield m.write_at


@asynccontextmanager
async def map_view_mut(path: Path, tasks: int) -> AsyncIterator[Write | None]:
    async with AsyncMmap.open_path(path, "r+") as m:

        async def write(offset: int, data: bytes) -> None:
            async with m.view_mut(offset, len(data)) as v:
                v.buffer[:] = data

        yield write


@asynccontextmanager
async def write_with_aiofiles(path: Path, tasks: int) -> AsyncIterator[Write | None]:
    """As :func:`with_aiofiles`."""
    if not _on_asyncio():
        yield None
        return
    import aiofiles

    free = [await aiofiles.open(path, "r+b", buffering=0) for _ in range(tasks)]
    files = list(free)

    async def write(offset: int, data: bytes) -> None:
        file = free.pop()
        try:
            await file.seek(offset)
            await file.write(data)
        finally:
            free.append(file)

    try:
        yield write
    finally:
        for file in files:
            await file.close()


@asynccontextmanager
async def write_with_aiofile(path: Path, tasks: int) -> AsyncIterator[Write | None]:
    """As :func:`with_aiofile`."""
    if not _on_asyncio():
        yield None
        return
    from aiofile import AIOFile

    async with AIOFile(str(path), "r+b") as file:

        async def write(offset: int, data: bytes) -> None:
            await file.write_bytes(data, offset)

        yield write


@asynccontextmanager
async def with_thread_pwrite(path: Path, tasks: int) -> AsyncIterator[Write | None]:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    async def write(offset: int, data: bytes) -> None:
        await to_thread.run_sync(os.pwrite, fd, data, offset)

    try:
        yield write
    finally:
        os.close(fd)


READ_AT = "aiommap read_at"
VIEW = "aiommap view"
AIOFILES = "aiofiles"
AIOFILE = "aiofile (caio)"
ANYIO_FILE = "anyio.open_file"
THREAD_PREAD = "to_thread(os.pread)"
SLICE = "slice + checkpoint"
LOCK_SLICE = "anyio.Lock + slice"
THREAD_SLICE = "to_thread(slice)"

CONTENDERS: dict[str, Contender] = {
    READ_AT: map_read_at,
    VIEW: map_view,
    SLICE: slice_and_checkpoint,
    LOCK_SLICE: slice_under_lock,
    THREAD_SLICE: slice_in_thread,
    THREAD_PREAD: with_thread_pread,
    AIOFILE: with_aiofile,
    AIOFILES: with_aiofiles,
    ANYIO_FILE: with_anyio_file,
}

WRITE_AT = "aiommap write_at"
VIEW_MUT = "aiommap view_mut"
THREAD_PWRITE = "to_thread(os.pwrite)"

WRITERS: dict[str, Writer] = {
    WRITE_AT: map_write_at,
    VIEW_MUT: map_view_mut,
    THREAD_PWRITE: with_thread_pwrite,
    AIOFILE: write_with_aiofile,
    AIOFILES: write_with_aiofiles,
}
