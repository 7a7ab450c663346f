"""User code as a type checker sees it. Checked by mypy and pyright from a test, never run."""

from __future__ import annotations

import array
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import assert_type

import anyio
from anyio import CapacityLimiter

import aiommap
from aiommap import (
    Advice,
    AsyncMmap,
    Capabilities,
    FlushError,
    MmapOptions,
    MmapStatistics,
    MmapView,
    MmapViewSync,
    PendingFlush,
    Protection,
    RegionLease,
    RegionLock,
    RegionLockStatistics,
    TruncatedError,
    capabilities,
)


class Index:
    """An integer of somebody else's, as numpy's are."""

    def __index__(self) -> int:
        return 5


class Special(AsyncMmap):
    """Opening a subclass gives the subclass."""


async def opening(path: Path, limiter: CapacityLimiter) -> None:
    assert_type(await AsyncMmap.open_path(path), AsyncMmap)
    assert_type(await AsyncMmap.open_path(str(path), "r+", offset=Index(), length=5), AsyncMmap)
    assert_type(await AsyncMmap.open_path(bytes(path), Protection.READ), AsyncMmap)
    assert_type(await AsyncMmap.open(3, Protection.READ_COPY, limiter=limiter), AsyncMmap)
    with open(path, "rb") as file, open(path, "rb", buffering=0) as raw:
        assert_type(await AsyncMmap.open(file), AsyncMmap)
        assert_type(await AsyncMmap.open(raw), AsyncMmap)
        assert_type(await AsyncMmap.open_with_offset(file, "r", 1, 2), AsyncMmap)
    async with await anyio.open_file(path, "rb") as async_file:
        assert_type(await AsyncMmap.open(async_file), AsyncMmap)
    assert_type(await AsyncMmap.create(path, 10, exist_ok=True, mode=0o600), AsyncMmap)
    assert_type(await AsyncMmap.anonymous(10), AsyncMmap)
    options = MmapOptions(stack=True, huge=False, populate=False)
    assert_type(await AsyncMmap.anonymous_with_options(10, "r+", options), AsyncMmap)
    assert_type(await Special.open_path(path), Special)
    async with AsyncMmap.open_path(path) as m:
        assert_type(m, AsyncMmap)
    async with Special.anonymous(10) as special:
        assert_type(special, Special)
    either: Awaitable[AsyncMmap] = AsyncMmap.open_path(path)
    del either
    async with AsyncExitStack() as stack:
        m = await stack.enter_async_context(AsyncMmap.open_path(path))
        assert_type(m, AsyncMmap)
        assert_type(await stack.enter_async_context(m.view()), MmapView)
        assert_type(await stack.enter_async_context(m.into_view_sync()), MmapViewSync)
        assert_type(await stack.enter_async_context(RegionLock().shared(0, 5)), RegionLease)


async def the_map(m: AsyncMmap) -> None:
    assert_type(len(m), int)
    assert_type(m.protection, Protection)
    assert_type(m.protection.writable, bool)
    assert_type(m.offset, int)
    assert_type(m.private, bool)
    assert_type(m.closed, bool)
    assert_type(m.ptr(), int)
    assert_type(m.mut_ptr(), int)
    raw: memoryview = m.as_slice()
    raw = m.as_mut_slice()
    del raw
    assert_type(await m.file_size(), int)
    assert_type(await m.read_at(0, 5), bytes)
    assert_type(await m.readinto_at(0, bytearray(5)), int)
    assert_type(await m.readinto_at(0, array.array("B")), int)
    assert_type(await m.write_at(0, b"abc"), int)
    assert_type(await m.write_at(Index(), memoryview(b"abc")), int)
    assert_type(await m.find(b"abc"), int)
    assert_type(await m.rfind(bytearray(b"abc"), 0, None), int)
    await m.move(0, 5, 10)
    await m.load()
    assert_type(await m.resident(0, None), int)
    await m.advise(Advice.RANDOM, 0, 5)
    await m.advise("sequential")
    await m.pin()
    await m.unpin()
    await m.resize(20)
    await m.set_protection("r")
    await m.flush()
    await m.flush_range(0, 5)
    assert_type(await m.flush_async(), PendingFlush)
    pending = await m.flush_async_range(0, 5)
    assert_type(pending.done, bool)
    await pending
    await pending.wait()
    await m.clear_flush_error()
    statistics = m.statistics()
    assert_type(statistics, MmapStatistics)
    assert_type(statistics.views, int)
    async for window in m.windows(1 << 20, offset=0, length=5):
        copy: bytes = bytes(window)
        del copy
    async with m.windows() as windows:
        async for _window in windows:
            break
    await m.aclose(flush=False)


async def views(m: AsyncMmap) -> None:
    async with m.view(0, 5, load=False) as v:
        assert_type(v, MmapView)
    async with m.view_mut() as v:
        assert_type(v, MmapView)
        assert_type(v[0], int)
        assert_type(v[-1], int)
        assert_type(v[0:5], bytes)
        assert_type(v[Index()], int)
        v[0] = 5
        v[0:3] = b"abc"
        v[0:4] = array.array("I", [1])
        assert_type(bytes(v), bytes)
        assert_type(len(v), int)
        assert_type(v.offset, int)
        assert_type(v.writable, bool)
        assert_type(v.closed, bool)
        buffer: memoryview = v.buffer
        buffer = v.as_slice()
        buffer = v.as_mut_slice()
        del buffer
        assert_type(v.ptr(), int)
        assert_type(await v.read(), bytes)
        assert_type(await v.read(None), bytes)
        assert_type(await v.readline(5), bytes)
        assert_type(await v.readinto(bytearray(5)), int)
        assert_type(await v.write(b"abc"), int)
        assert_type(await v.seek(0, 2), int)
        assert_type(await v.tell(), int)
        assert_type([line async for line in v], list[bytes])
        await v.flush()
        await v.flush_range(0, 5)
        assert_type(await v.flush_async(), PendingFlush)
        assert_type(await v.flush_async_range(0, 5), PendingFlush)
        v.downgrade()
        v.restrict(0, 5)
        left, right = v.split_at(3)
        assert_type(left, MmapView)
        assert_type(right, MmapView)
        await left.aclose()
    assert_type(await m.view(), MmapView)
    assert_type(m.view_nowait(), MmapView)
    assert_type(m.view_mut_nowait(0, 5), MmapView)
    assert_type(await m.into_view(), MmapView)
    sync = await m.into_view_sync()
    assert_type(sync, MmapViewSync)
    assert_type(sync.clone(), MmapViewSync)
    assert_type(sync.split_at(5), tuple[MmapViewSync, MmapViewSync])
    async with m.into_view_sync() as sync:
        assert_type(sync[0], int)


async def locks(lock: RegionLock) -> None:
    async with lock.shared(0, 5) as lease:
        assert_type(lease, RegionLease)
        assert_type((lease.start, lease.stop, lease.exclusive), tuple[int, int, bool])
    lease = await lock.exclusive(0, Index())
    assert_type(lease.split_at(2), tuple[RegionLease, RegionLease])
    assert_type(lock.shared_nowait(0, 5), RegionLease)
    assert_type(lock.exclusive_nowait(0, 5), RegionLease)
    lease.restrict(1, 2)
    lease.downgrade()
    lease.release()
    statistics = lock.statistics()
    assert_type(statistics, RegionLockStatistics)
    assert_type(statistics.waiting, int)
    RegionLock(fast_acquire=True)


def values(truncated: TruncatedError, flush: FlushError) -> None:
    assert_type(truncated.offset, int)
    assert_type(truncated.size, int)
    for offset, length in flush.ranges:
        assert_type((offset, length), tuple[int, int])
    assert_type(capabilities(), Capabilities)
    assert_type(capabilities("/tmp").populate, bool)
    assert_type(capabilities(Path("/tmp")).page_size, int)
    assert_type(Protection("r+"), Protection)
    assert_type(aiommap.__all__, list[str])
