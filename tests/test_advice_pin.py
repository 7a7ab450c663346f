"""Pages: load, resident, advise, pin and unpin, statistics, capabilities."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import anyio
import pytest
from anyio import ClosedResourceError
from anyio.lowlevel import checkpoint

from aiommap import (
    Advice,
    AsyncMmap,
    Capabilities,
    MmapStatistics,
    TruncatedError,
    capabilities,
)
from aiommap._event_loop import current_event_loop

from .content import file_of, inc, only_linux
from .fake_kernel import FakeKernel

pytestmark = pytest.mark.anyio

PAGE = mmap.PAGESIZE
N = 16 * PAGE


class Mmap(AsyncMmap):
    """A map on a kernel that a test can break."""


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    kernel = FakeKernel()
    monkeypatch.setattr(Mmap, "_kernel", kernel)
    return kernel


@pytest.fixture
async def m(tmp_path: Path) -> AsyncIterator[AsyncMmap]:
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N)), "r+") as m:
        yield m


def evict(path: Path) -> None:
    """Have the file's pages leave the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def smaps(m: AsyncMmap, field: str) -> int:
    """The sum of a field of /proc/self/smaps over the areas of the map, in bytes."""
    start = m.ptr() // PAGE * PAGE
    end = m.ptr() + len(m)
    total = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if first.endswith(":"):
            total += int(rest[0]) * 1024 if inside and first == f"{field}:" else 0
        else:
            low, high = (int(part, 16) for part in first.split("-"))
            inside = start <= low < end
            assert not inside or high <= end + PAGE
    return total


def vm_flags(m: AsyncMmap, offset: int = 0) -> set[str]:
    """The kernel's flags of the area that has a byte of the map in it."""
    address = m.ptr() + offset
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= address < high
        elif inside and first == "VmFlags:":
            return set(rest)
    raise AssertionError("no such area")


# load and resident


@only_linux
async def test_load_and_resident(tmp_path: Path) -> None:
    """load brings a range in; resident counts the bytes that are there, cut to the range."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path) as m:
        evict(path)
        assert await m.resident() == 0
        await m.load(5, PAGE)
        assert await m.resident(5, PAGE) == PAGE
        assert await m.resident(0, 1) == 1
        await m.load()
        assert await m.resident() == N
        assert await m.resident(PAGE - 1, 2) == 2
        assert await m.resident(7, 0) == 0


@pytest.mark.parametrize("there", [(), (0,), (1,), (2,), (3,), (0, 3), (0, 1, 2, 3), (1, 2)])
async def test_resident_counts_the_bytes_of_the_range(
    tmp_path: Path, kernel: FakeKernel, there: tuple[int, ...]
) -> None:
    """Of pages at the ends only those inside; the other bits of mincore's answer say nothing."""
    state = bytes(0xFF if page in there else 0xFE for page in range(4))
    async with Mmap.open_path(file_of(tmp_path, inc(N)), "r+", offset=100) as m:
        kernel.wrap("resident", lambda real, address, length: state[: -(-length // PAGE)])
        start, stop = 50, 3 * PAGE - 100 + 7  # of the map: bytes 150 to 3 PAGE + 7 of the file
        expected = sum(
            min((page + 1) * PAGE, 100 + stop) - max(page * PAGE, 100 + start) for page in there
        )
        assert await m.resident(start, stop - start) == expected


async def test_load_goes_off_the_loop_once(tmp_path: Path, kernel: FakeKernel) -> None:
    """What is in memory already needs no worker."""
    async with Mmap.open_path(file_of(tmp_path, inc(N)), "r+") as m:
        await m.load()
        before = m.statistics()
        await m.load()
        after = m.statistics()
        assert after.loads_off_loop == before.loads_off_loop
        assert after.loads_inline == before.loads_inline + 1


async def test_load_of_a_truncated_file(tmp_path: Path) -> None:
    """What the file does not reach is a TruncatedError; the rest can be loaded."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path) as m:
        os.truncate(path, PAGE + 100)
        for offset, length in ((0, N), (PAGE, 101), (2 * PAGE, 1), (N - 1, 1)):
            with pytest.raises(TruncatedError, match=f"reaches to byte {PAGE + 100}") as caught:
                await m.load(offset, length)
            assert caught.value.filename == str(path)
        await m.load(0, PAGE + 100)
        os.truncate(path, N)


async def test_load_under_a_writers_view(m: AsyncMmap) -> None:
    """load, resident, advise, pin and flushes take no region."""
    async with m.view_mut():
        await m.load()
        assert await m.resident() == N
        await m.advise(Advice.RANDOM)
        await m.pin(0, 1)
        await m.unpin(0, 1)
        await m.flush()
        await (await m.flush_async())
        await m.clear_flush_error()


async def test_anonymous_memory_is_loaded(kernel: FakeKernel) -> None:
    """load and resident work on anonymous memory, private too."""
    for protection in ("r+", "c"):
        async with Mmap.anonymous(N, protection) as m:
            await m.write_at(0, bytes(N))
            await m.load()
            assert await m.resident() == N


# advise


@only_linux
@pytest.mark.parametrize("advice", Advice)
@pytest.mark.parametrize("kind", ["file", "copy", "anonymous"])
async def test_no_advice_changes_bytes(tmp_path: Path, kind: str, advice: Advice) -> None:
    """Every advice is taken, or refused with ENOTSUP, and the bytes are the same after it."""
    if kind == "anonymous":
        opening = AsyncMmap.anonymous(N)
    else:
        opening = AsyncMmap.open_path(file_of(tmp_path, N), "r+" if kind == "file" else "c")
    async with opening as m:
        await m.write_at(0, inc(N))
        for argument in (advice, advice.value):
            # What a kernel may be built without, and file systems and private maps may lack.
            may_lack = "MERGEABLE" in advice.name or "HUGE" in advice.name
            with suppress(OSError) if may_lack else nullcontext():
                await m.advise(argument, 100, 5 * PAGE)
                await m.advise(argument)
        assert await m.read_at(0, N) == inc(N)


@only_linux
async def test_advice_reaches_the_kernel(m: AsyncMmap) -> None:
    """The kernel's flags of the pages show the advice, on the pages around the range only."""
    await m.advise("random", PAGE + 5, PAGE)
    assert "rr" in vm_flags(m, PAGE)
    assert "rr" in vm_flags(m, 2 * PAGE)
    assert "rr" not in vm_flags(m, 0)
    assert "rr" not in vm_flags(m, 3 * PAGE)
    await m.advise(Advice.NORMAL)
    assert "rr" not in vm_flags(m, PAGE)
    for advice, flag in (("sequential", "sr"), ("dont_fork", "dc"), ("dont_dump", "dd")):
        await m.advise(advice)
        assert flag in vm_flags(m)
    await m.advise("do_fork")
    await m.advise("do_dump")
    assert not {"dc", "dd"} & vm_flags(m)


async def test_unknown_advice(m: AsyncMmap) -> None:
    """Unknown advice raises before anything else."""
    with pytest.raises(ValueError, match="advice 'dont_need' is not known"):
        await m.advise("dont_need")
    with pytest.raises(TypeError, match="must be an Advice"):
        await m.advise(4)  # type: ignore[arg-type]


async def test_advice_that_the_platform_lacks(tmp_path: Path, kernel: FakeKernel) -> None:
    """Advice that the platform does not know is ENOTSUP with the path."""
    kernel.lack("madvise")
    path = file_of(tmp_path, inc(N))
    async with Mmap.open_path(path) as m:
        with pytest.raises(OSError, match="not supported") as caught:
            await m.advise("normal")
        assert (caught.value.errno, caught.value.filename) == (errno.ENOTSUP, str(path))
        await m.advise("normal", 5, 0)


# pin


@only_linux
async def test_pin_nests(m: AsyncMmap) -> None:
    """A range stays locked until it is unpinned as often as it was pinned."""
    await m.pin(0, 2 * PAGE)
    assert smaps(m, "Locked") == 2 * PAGE
    await m.pin(PAGE, 2 * PAGE)
    assert smaps(m, "Locked") == 3 * PAGE
    await m.unpin(0, 2 * PAGE)
    assert smaps(m, "Locked") == 2 * PAGE
    assert "lo" not in vm_flags(m, 0)
    await m.unpin(PAGE, 2 * PAGE)
    assert smaps(m, "Locked") == 0


@only_linux
async def test_pin_widens_to_pages(tmp_path: Path) -> None:
    """The pages that a range touches are pinned, in a map with an offset too."""
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N)), offset=PAGE + 10) as m:
        await m.pin(0, 1)
        await m.pin(PAGE - 10, 1)
        assert smaps(m, "Locked") == 2 * PAGE
        await m.unpin(5, PAGE - 15)
        await m.unpin(PAGE - 10, 1)
        assert smaps(m, "Locked") == 0


async def test_unpin_what_is_not_pinned(m: AsyncMmap) -> None:
    """Unpinning more than was pinned is a ValueError, and nothing is unpinned."""
    with pytest.raises(ValueError, match=r"offset 0 and length 65536 are not all pinned"):
        await m.unpin()
    await m.pin(0, PAGE)
    with pytest.raises(ValueError, match="are not all pinned"):
        await m.unpin(0, PAGE + 1)
    await m.unpin(0, PAGE)
    with pytest.raises(ValueError, match="are not all pinned"):
        await m.unpin(0, PAGE)


@only_linux
async def test_a_cancelled_pin_pins_nothing(tmp_path: Path, kernel: FakeKernel) -> None:
    """Cancelled before or while the kernel pins, nothing is pinned; an unpin is never half."""
    async with Mmap.open_path(file_of(tmp_path, inc(N))) as m:
        entered = anyio.Event()
        loop = current_event_loop()
        with kernel.hold("pin", on_enter=lambda: loop.post(entered.set)) as hold:
            async with anyio.create_task_group() as tg:
                tg.start_soon(m.pin)
                await entered.wait()
                tg.start_soon(m.pin, 0, PAGE)
                await anyio.wait_all_tasks_blocked()
                tg.cancel_scope.cancel()
                hold.release.set()
        assert smaps(m, "Locked") == 0
        with pytest.raises(ValueError, match="not all pinned"):
            await m.unpin(0, PAGE)
        await m.pin()
        async with anyio.create_task_group() as tg:
            tg.start_soon(m.unpin)
            await checkpoint()
            tg.cancel_scope.cancel()
        counted = True
        try:
            await m.unpin()
        except ValueError:
            counted = False
        assert smaps(m, "Locked") == 0, counted


@only_linux
async def test_pins_end_with_the_map(tmp_path: Path) -> None:
    """Closing unpins."""
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N))) as m:
        await m.pin()
    assert "Locked:                0 kB" in Path("/proc/self/smaps").read_text()


async def test_pin_says_the_limit(tmp_path: Path, kernel: FakeKernel) -> None:
    """Beyond RLIMIT_MEMLOCK the error has the kernel's errno and the limit, and changes nothing."""
    async with Mmap.open_path(file_of(tmp_path, inc(N))) as m:
        await m.pin(PAGE, PAGE)
        kernel.fail("pin", errno.ENOMEM, after=1)
        kernel.wrap("pin_limit", lambda real: 65536)
        with pytest.raises(
            OSError, match=r"pin 65536 bytes: .* up to 65536 bytes .*MEMLOCK"
        ) as caught:
            await m.pin()
        assert caught.value.filename == str(tmp_path / "data.bin")
        kernel.heal()
        # The first of the two runs was pinned and is not any more; nor is the one that failed,
        # which Linux leaves locked where a page of it cannot be had. It is tried a few times.
        tries = ["pin", "unpin"] * 4
        assert kernel.names("pin", "unpin") == ["pin", "pin", "pin", "unpin", "unpin", *tries]
        kernel.calls.clear()
        await m.pin(0, PAGE)
        await m.unpin(0, 2 * PAGE)
        assert kernel.names("pin", "unpin") == ["pin", "unpin"]


async def test_pin_where_the_file_was_cut_for_a_moment(tmp_path: Path, kernel: FakeKernel) -> None:
    """A page that was missing while the kernel looked, and is there again, is pinned."""
    path = file_of(tmp_path, inc(N))
    async with Mmap.open_path(path) as m:
        kernel.fail("pin", errno.ENOMEM, times=2)
        await m.pin(0, PAGE)
        await m.unpin(0, PAGE)


@only_linux
async def test_advice_that_does_not_fit_the_memory(tmp_path: Path) -> None:
    """What this kernel knows, and refuses for this memory, is its own EINVAL."""
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N))) as m:
        await m.pin(0, PAGE)
        for advice in (Advice.COLD, Advice.PAGE_OUT):
            with pytest.raises(OSError, match="Invalid argument"):
                await m.advise(advice, 0, PAGE)
        await m.unpin(0, PAGE)
        await m.advise(Advice.COLD, 0, PAGE)


@only_linux
async def test_pin_beyond_the_real_limit() -> None:
    """A process without privileges is told its limit (run in a child that gives them up)."""
    script = (
        "import anyio, os, resource, sys\n"
        "from aiommap import AsyncMmap\n"
        "async def main():\n"
        "    async with AsyncMmap.anonymous(1 << 20) as m:\n"
        "        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))\n"
        "        if os.geteuid() == 0: os.setresuid(65534, 65534, 65534)\n"
        "        try:\n"
        "            await m.pin()\n"
        "        except OSError as exc:\n"
        "            print(exc)\n"
        "            await m.pin(0, 4096)\n"
        "anyio.run(main)\n"
    )
    done = await anyio.run_process([sys.executable, "-c", script], check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert (
        "cannot pin 1048576 bytes: this process may pin up to 65536 bytes" in done.stdout.decode()
    )


# What it tells


async def test_statistics(m: AsyncMmap) -> None:
    """statistics() is frozen and counts views, waiters, accesses, flushes."""
    assert [field.name for field in fields(MmapStatistics)] == [
        "views", "waiting", "loads_inline", "loads_off_loop", "bytes_loaded",
        "flushes_requested", "flushes_done", "writebacks_started",
    ]  # fmt: skip
    first = m.statistics()
    with pytest.raises(FrozenInstanceError, match="views"):
        first.views = 1  # type: ignore[misc]
    async with m.view_mut(0, 10) as v, m.view(10, 10):
        assert m.statistics().views == 2
        v[0] = 1
        await v.flush()
        await (await m.flush_async())
        async with anyio.create_task_group() as tg:
            tg.start_soon(m.read_at, 0, 1)
            await anyio.wait_all_tasks_blocked()
            assert m.statistics().waiting == 1
            tg.cancel_scope.cancel()
    last = m.statistics()
    assert (last.views, last.waiting) == (0, 0)
    assert last.flushes_requested == 2
    assert last.flushes_done in (1, 2)
    assert last.writebacks_started == 1
    assert last.loads_inline + last.loads_off_loop >= 2


async def test_file_size(tmp_path: Path) -> None:
    """file_size is what the file has now, whoever changed it."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path, offset=10, length=20) as m:
        assert await m.file_size() == N
        with open(path, "ab") as file:
            file.write(b"more")
        assert await m.file_size() == N + 4
        path.unlink()
        assert await m.file_size() == N + 4
    for protection in ("r+", "c"):
        async with AsyncMmap.anonymous(123, protection) as m:
            assert await m.file_size() == 123


def test_capabilities(tmp_path: Path) -> None:
    """capabilities() is frozen, and tells of a file, its directory, or temporary files."""
    names = [field.name for field in fields(Capabilities)]
    assert sorted(names) == sorted(
        ["populate", "nowait_reads", "cachestat", "mincore", "write_back_start", "full_sync",
         "huge_pages", "ofd_locks", "reserve", "page_size"]
    )  # fmt: skip
    path = file_of(tmp_path, b"abc")
    for where in (None, tmp_path, str(tmp_path), path, os.fsencode(path)):
        found = capabilities(where)
        assert found.page_size == PAGE
        assert all(type(getattr(found, name)) is bool for name in names if name != "page_size")
    with pytest.raises(FrozenInstanceError, match="populate"):
        found.populate = False  # type: ignore[misc]
    with pytest.raises(FileNotFoundError, match="missing"):
        capabilities(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"abc"


@only_linux
def test_capabilities_of_memory() -> None:
    """On a file system in memory a flush reaches no medium."""
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert not capabilities(folder).full_sync
    assert resource.getpagesize() == PAGE


async def test_after_close(tmp_path: Path) -> None:
    """A closed map refuses them."""
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N))) as m:
        pass
    for call in (
        m.load(),
        m.resident(),
        m.advise("normal"),
        m.pin(),
        m.unpin(),
        m.file_size(),
        m.clear_flush_error(),
    ):
        with pytest.raises(ClosedResourceError, match="the map is closed"):
            await call
    assert m.statistics().views == 0
