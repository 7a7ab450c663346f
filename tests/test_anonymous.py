"""Memory without a file."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from pathlib import Path

import pytest
from anyio import CapacityLimiter

from aiommap import AsyncMmap, MmapOptions, Protection, capabilities

from .content import at_rest, inc, only_linux, open_descriptors, settled_descriptors, zeros
from .fake_kernel import FakeKernel

pytestmark = pytest.mark.anyio

N = 10_000
READ, WRITE, COPY, EXECUTE = Protection


class Mmap(AsyncMmap):
    """A map on a kernel that a test can break."""


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    kernel = FakeKernel()
    monkeypatch.setattr(Mmap, "_kernel", kernel)
    return kernel


OPTIONS = [
    MmapOptions(),
    MmapOptions(stack=True),
    MmapOptions(populate=True),
    MmapOptions(stack=True, populate=True),
]


@pytest.mark.parametrize("protection", Protection)
@pytest.mark.parametrize("options", OPTIONS, ids=repr)
@pytest.mark.parametrize("length", [1, PAGE := mmap.PAGESIZE, PAGE + 1, 300_000])
async def test_zeros_whatever_it_is_made_of(
    protection: Protection, options: MmapOptions, length: int
) -> None:
    """Any length, protection and options give that many zeros, which take stores if writable."""
    async with AsyncMmap.anonymous_with_options(length, protection, options) as m:
        assert (len(m), m.offset, m.protection) == (length, 0, protection)
        assert m.private == (protection is COPY)
        assert await m.read_at(0, length) == zeros(length)
        if protection.writable:
            await m.write_at(0, inc(length))
            async with m.view_mut() as v:
                assert bytes(v) == inc(length)
        else:
            with pytest.raises(PermissionError, match=f"its protection is {protection.name}"):
                m.view_mut()
        await m.flush()
        assert (await m.flush_async()).done
        await m.load()
        assert m.statistics().flushes_requested == 0


async def test_defaults() -> None:
    """READ_WRITE and no options are the default; protections go by their values too."""
    async with AsyncMmap.anonymous(5) as m:
        assert m.protection is WRITE
    async with AsyncMmap.anonymous(5, "c") as m:
        assert m.protection is COPY
    async with AsyncMmap.anonymous_with_options(5) as m:
        assert m.protection is WRITE
    async with AsyncMmap.anonymous_with_options(5, "r", None) as m:
        assert m.protection is READ


@pytest.mark.parametrize(
    ("length", "error"),
    [(0, ValueError), (-1, ValueError), (2**63, ValueError), (True, TypeError), (1.5, TypeError)],
)
async def test_wrong_lengths(length: int, error: type[Exception]) -> None:
    """Lengths that no memory can have raise in the call."""
    with pytest.raises(error, match="length"):
        AsyncMmap.anonymous(length)
    with pytest.raises(error, match="length"):
        AsyncMmap.anonymous_with_options(length, "r+", MmapOptions())


async def test_wrong_options() -> None:
    """Options that are none, and unknown protections, raise in the call."""
    with pytest.raises(TypeError, match="options must be MmapOptions"):
        AsyncMmap.anonymous_with_options(1, "r+", {"huge": True})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="protection 'w' is not known"):
        AsyncMmap.anonymous(1, "w")


@only_linux
async def test_more_memory_than_there_is() -> None:
    """The kernel's OSError, and nothing is left behind."""
    before = settled_descriptors()
    for protection in (WRITE, COPY):
        with pytest.raises(OSError, match=r"\[Errno"):
            await AsyncMmap.anonymous(2**62, protection)
    assert open_descriptors() == before


@pytest.mark.parametrize("protection", [WRITE, COPY])
@pytest.mark.parametrize("length", [1, 2 << 20])
async def test_no_huge_pages(kernel: FakeKernel, protection: Protection, length: int) -> None:
    """Where no huge pages can be had, the error says what to do."""
    kernel.fail("map_memory", errno.ENOMEM)
    kernel.fail("map_file", errno.ENOMEM)
    with pytest.raises(OSError, match=rf"no huge pages for {length} bytes.*nr_hugepages") as caught:
        await Mmap.anonymous_with_options(length, protection, MmapOptions(huge=True))
    assert caught.value.errno in (errno.ENOMEM, errno.EINVAL)


@only_linux
async def test_real_huge_pages() -> None:
    """With huge pages reserved they are used; without, the error says so; a small length never."""
    with pytest.raises(OSError, match="no huge pages for 1 bytes"):
        await AsyncMmap.anonymous_with_options(1, "r+", MmapOptions(huge=True))
    opening = AsyncMmap.anonymous_with_options(2 << 20, "r+", MmapOptions(huge=True))
    if capabilities().huge_pages:
        async with opening as m:
            await m.write_at(0, b"abc")
    else:
        with pytest.raises(OSError, match="nr_hugepages"):
            await opening


@only_linux
@pytest.mark.parametrize("protection", [WRITE, COPY, READ])
async def test_populate_brings_every_page_in(protection: Protection) -> None:
    """With populate all of the memory is resident, without none of it."""
    for populate in (False, True):
        options = MmapOptions(populate=populate)
        async with AsyncMmap.anonymous_with_options(64 * PAGE, protection, options) as m:
            assert await m.resident() == (64 * PAGE if populate else 0)


@only_linux
async def test_populate_that_fails_leaves_nothing(kernel: FakeKernel) -> None:
    """When the pages cannot be had, the error shows and memory and descriptor are gone."""
    before = settled_descriptors()
    kernel.fail("populate_write", errno.ENOMEM)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        await Mmap.anonymous_with_options(N, "r+", MmapOptions(populate=True))
    assert open_descriptors() == before
    assert "memfd:aiommap" not in Path("/proc/self/maps").read_text()


@only_linux
async def test_shared_memory_is_a_file_in_memory() -> None:
    """Shared memory is a memfd that is closed on exec and not executable as a file."""
    before = settled_descriptors()
    async with AsyncMmap.anonymous(N):
        # Up to Python 3.12 an mmap object keeps a descriptor of its own.
        new = open_descriptors() - before
        assert len(new) == (1 if sys.version_info >= (3, 13) else 2)
        for each in new:
            number, name = each.split(maxsplit=1)
            assert "memfd:aiommap" in name
            assert not os.get_inheritable(int(number))
    assert open_descriptors() == before


@pytest.mark.parametrize("protection", [WRITE, COPY])
async def test_where_there_are_no_files_in_memory(
    kernel: FakeKernel, protection: Protection
) -> None:
    """Without memfd everything works the same, resize and set_protection by a copy."""
    kernel.lack("memfd")
    async with Mmap.anonymous(N, protection) as m:
        await m.write_at(0, inc(N))
        await m.resize(2 * N)
        assert await m.read_at(0, 2 * N) == inc(N) + zeros(N)
        await m.resize(N)
        if protection is WRITE:
            await m.set_protection("r")
            with pytest.raises(PermissionError, match="its protection is READ"):
                await m.write_at(0, b"x")
            with m.as_slice() as raw:
                assert raw.readonly
            await m.set_protection("r+")
            await m.write_at(0, b"\0")
            with pytest.raises(OSError, match="cannot be made executable"):
                await m.set_protection("rx")
            assert m.protection is WRITE
        assert await m.read_at(0, N) == inc(N)


async def test_a_limiter_of_ones_own() -> None:
    """All anonymous memory takes a limiter for its work."""
    limiter = CapacityLimiter(1)
    async with AsyncMmap.anonymous(N, limiter=limiter) as m:
        await m.resize(2 * N)
        await m.write_at(0, inc(2 * N))
    async with AsyncMmap.anonymous_with_options(N, limiter=limiter) as m:
        assert await m.find(b"x") == -1
    await at_rest(limiter)
