"""Misuse that a type checker has to find: each line that ends in ``# error`` and no other."""

from __future__ import annotations

from aiommap import AsyncMmap, MmapOptions, RegionLock


async def misuse(m: AsyncMmap, lock: RegionLock) -> None:
    await AsyncMmap.open("name")  # error
    await AsyncMmap.open_path(3)  # error
    AsyncMmap.anonymous("10")  # error
    await m.write_at(0, "text")  # error
    await m.find("text")  # error
    await m.read_at(1.5, 3)  # error
    await m.aclose(False)  # error
    MmapOptions(True)  # error
    async with m.view() as v:
        v[0] = b"a"  # error
        v[0:1] = 3  # error
        for _line in v:  # error
            pass
        with v:  # error
            pass
    lock.shared("a", "b")  # error
    m.protection = "r"  # error
