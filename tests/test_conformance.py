"""The behaviours ported from memmap's own suite, A1 to A26, on every event loop."""

from __future__ import annotations

import ctypes
import os
import platform
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anyio
import pytest
from anyio import from_thread, to_thread

from aiommap import AsyncMmap, MmapView, MmapViewSync, Protection

from .content import file_of, inc, only_linux, zeros

pytestmark = pytest.mark.anyio

INC128 = inc(128)


async def write_and_read_back(m: AsyncMmap) -> None:
    """Zeros at first, then INC everywhere, through every way to look at it."""
    n = len(m)
    assert await m.read_at(0, n) == zeros(n)
    async with m.view_mut() as v:
        assert bytes(v) == zeros(n)
        v[:] = inc(n)
        assert bytes(v) == inc(n)
    assert await m.read_at(0, n) == inc(n)
    with m.as_slice() as raw:
        assert raw == inc(n)


async def test_a1_file_by_path(tmp_path: Path) -> None:
    """A1: a file of 128 bytes, READ_WRITE by path: zeros, INC written and read back."""
    async with AsyncMmap.open_path(file_of(tmp_path, 128), Protection.READ_WRITE) as m:
        assert len(m) == 128
        await write_and_read_back(m)


async def test_a2_empty_file(tmp_path: Path) -> None:
    """A2: an empty file is a ValueError that says so and points at create."""
    path = file_of(tmp_path, b"")
    with pytest.raises(ValueError, match=r"empty file .*data\.bin.*AsyncMmap\.create"):
        await AsyncMmap.open_path(path)
    with open(path, "rb") as file, pytest.raises(ValueError, match=r"empty.*create"):
        await AsyncMmap.open(file)


async def test_a3_anonymous() -> None:
    """A3: anonymous memory of 128 bytes, READ_WRITE: zeros, INC written and read back."""
    async with AsyncMmap.anonymous(128, Protection.READ_WRITE) as m:
        assert len(m) == 128
        await write_and_read_back(m)


async def test_a4_flush_reaches_the_file(tmp_path: Path) -> None:
    """A4: what was written through the map and flushed is what an ordinary read gives."""
    path = file_of(tmp_path, 128)
    async with AsyncMmap.open_path(path, "r+") as m:
        await m.write_at(0, b"abc123")
        await m.flush()
        assert path.read_bytes() == b"abc123" + zeros(122)


async def test_a5_flush_of_an_unaligned_map(tmp_path: Path) -> None:
    """A5: flush_range and flush_async_range work on a map whose offset is not a page's."""
    path = file_of(tmp_path, 128)
    async with AsyncMmap.open_path(path, "r+", offset=2, length=6) as m:
        await m.write_at(0, b"abc123")
        await m.flush_range(0, 6)
        assert path.read_bytes()[:10] == b"\0\0abc123\0\0"
        pending = await m.flush_async_range(0, 6)
        await pending
        assert pending.done


async def test_a6_copy_on_write(tmp_path: Path) -> None:
    """A6: stores into READ_COPY show in the map, and neither in the file nor in a new map."""
    path = file_of(tmp_path, 128)
    async with AsyncMmap.open_path(path, Protection.READ_COPY) as m:
        await m.write_at(0, b"abc123")
        await m.flush()
        assert await m.read_at(0, 8) == b"abc123\0\0"
        async with m.view() as v:
            assert v[:6] == b"abc123"
        assert path.read_bytes() == zeros(128)
        async with AsyncMmap.open_path(path) as new:
            assert await new.read_at(0, 128) == zeros(128)
    assert path.read_bytes() == zeros(128)


async def test_a7_offset_and_length(tmp_path: Path) -> None:
    """A7: bytes 5 099 to 55 149 of a file of 500 000: zeros, INC written and read back."""
    path = file_of(tmp_path, 500_000)
    with open(path, "r+b") as file:
        async with AsyncMmap.open_with_offset(file, Protection.READ_WRITE, 5_099, 50_050) as m:
            assert (len(m), m.offset) == (50_050, 5_099)
            await write_and_read_back(m)
    expected = zeros(5_099) + inc(50_050) + zeros(500_000 - 5_099 - 50_050)
    assert path.read_bytes() == expected


async def test_a8_one_byte() -> None:
    """A8: byte 0 of anonymous memory, set to 42, reads 42."""
    async with AsyncMmap.anonymous(128) as m, m.view_mut() as v:
        v[0] = 42
        assert v[0] == 42


async def test_a9_read_from_a_thread() -> None:
    """A9: anonymous memory is read from a worker thread."""
    async with AsyncMmap.anonymous(128) as m:
        await m.write_at(0, INC128)
        with m.as_slice() as raw:
            assert await to_thread.run_sync(bytes, raw) == INC128


async def test_a10_into_view_and_split() -> None:
    """A10: into_view, split_at(32), restrict(10, 10) on the first half."""
    m = await AsyncMmap.anonymous(128)
    await m.write_at(0, INC128)
    view = await m.into_view()
    left, right = view.split_at(32)
    async with left, right:
        assert (len(left), len(right)) == (32, 96)
        assert (bytes(left), bytes(right)) == (INC128[:32], INC128[32:])
        left.restrict(10, 10)
        assert bytes(left) == INC128[10:20]


async def test_a11_into_view_sync_and_split() -> None:
    """A11: as A10 with into_view_sync."""
    m = await AsyncMmap.anonymous(128)
    await m.write_at(0, INC128)
    view = await m.into_view_sync()
    left, right = view.split_at(32)
    async with left, right:
        assert (len(left), len(right)) == (32, 96)
        assert (bytes(left), bytes(right)) == (INC128[:32], INC128[32:])
        left.restrict(10, 10)
        assert bytes(left) == INC128[10:20]


def fill(view: MmapViewSync, data: bytes) -> None:
    """In a thread: store, then flush through the event loop."""
    view[:] = data
    from_thread.run(view.flush)


@pytest.mark.parametrize("who", ["threads", "tasks"])
async def test_a12_two_write_their_halves(tmp_path: Path, who: str) -> None:
    """A12: two threads, or two tasks, write and flush the halves of a sync view."""
    size, middle = 131_072, 66_560
    path = file_of(tmp_path, size)
    m = await AsyncMmap.open_path(path, "r+")
    left, right = (await m.into_view_sync()).split_at(middle)

    async def work(view: MmapViewSync, data: bytes) -> None:
        if who == "threads":
            await to_thread.run_sync(fill, view, data)
        else:
            view[:] = data
            await view.flush()

    async with left, right, anyio.create_task_group() as tg:
        tg.start_soon(work, left, inc(size)[:middle])
        tg.start_soon(work, right, inc(size)[middle:])
    assert path.read_bytes() == inc(size)


async def test_a13_sync_view_read_in_a_thread() -> None:
    """A13: a sync view is read in another thread."""
    m = await AsyncMmap.anonymous(128)
    await m.write_at(0, INC128)
    async with m.into_view_sync() as view:
        assert await to_thread.run_sync(bytes, view) == INC128
        assert await to_thread.run_sync(lambda: view[100]) == 100


async def test_a14_set_protection_there_and_back() -> None:
    """A14: one READ byte becomes READ_WRITE, is set to 0xf1, and reads so as READ again."""
    async with AsyncMmap.anonymous(1, Protection.READ) as m:
        await m.set_protection(Protection.READ_WRITE)
        async with m.view_mut() as v:
            v[0] = 0xF1
        await m.set_protection(Protection.READ)
        assert m.protection is Protection.READ
        async with m.view() as v:
            assert v[0] == 0xF1


@only_linux
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 machine code")
async def test_a15_machine_code() -> None:
    """A15: machine code stored into anonymous memory runs once it is READ_EXECUTE."""
    async with AsyncMmap.anonymous(4_096) as m:
        await m.write_at(0, bytes.fromhex("B8AB000000C3"))  # mov eax, 0xab; ret
        await m.set_protection(Protection.READ_EXECUTE)
        assert ctypes.CFUNCTYPE(ctypes.c_int)(m.ptr())() == 0xAB
        with pytest.raises(PermissionError, match="not writable"):
            m.mut_ptr()


async def test_a16_content_stays_when_protected(tmp_path: Path) -> None:
    """A16: content written through an unaligned READ_WRITE map stays when it becomes READ."""
    path = file_of(tmp_path, 500_000)
    async with AsyncMmap.open_path(path, "r+", offset=5_099, length=50_050) as m:
        await m.write_at(0, inc(50_050))
        await m.set_protection("r")
        assert await m.read_at(0, 50_050) == inc(50_050)
        with pytest.raises(PermissionError, match="READ"):
            await m.write_at(0, b"x")
    assert path.read_bytes()[5_099:55_149] == inc(50_050)


async def test_a17_text() -> None:
    """A17: a map of a text file starts with its text; anonymous memory is padded by zeros."""
    text = Path(__file__).read_bytes()
    async with AsyncMmap.open_path(__file__) as m:
        assert await m.read_at(0, len(m)) == text
        assert (await m.read_at(0, 3)) == b'"""'
    async with AsyncMmap.anonymous(4_096) as m:
        await m.write_at(0, b"foo")
        assert await m.read_at(0, 5) == b"foo\0\0"


@pytest.mark.parametrize("kind", ["view", "sync"])
async def test_a18_split_and_restrict_at_the_edges(kind: str) -> None:
    """A18: halves may be empty; what is outside is a ValueError and the view stays usable."""
    m = await AsyncMmap.anonymous(128)
    await m.write_at(0, INC128)
    view: MmapView | MmapViewSync
    view = await (m.into_view() if kind == "view" else m.into_view_sync())
    for n in (129, -1, 2**63, 2**64):
        with pytest.raises(ValueError, match=rf"offset {n} and length .* view of 128 bytes"):
            view.split_at(n)
    for wrong in (True, 1.0, "1", None):
        with pytest.raises(TypeError, match="must be an integer"):
            view.split_at(wrong)  # type: ignore[arg-type]
    for offset, length in ((129, 0), (0, 129), (-1, 0), (0, -1), (2**63, 2**63), (64, 65)):
        with pytest.raises(ValueError, match=f"offset {offset} and length {length} .* 128"):
            view.restrict(offset, length)
    assert bytes(view) == INC128
    empty, rest = view.split_at(0)
    assert (bytes(empty), bytes(rest)) == (b"", INC128)
    rest, end = rest.split_at(128)
    assert (bytes(rest), bytes(end), end.offset) == (INC128, b"", 128)
    rest.restrict(128, 0)
    assert (bytes(rest), rest.offset) == (b"", 128)
    for each in (empty, rest, end):
        await each.aclose()


N = 10_000


def ranged_calls(m: AsyncMmap) -> dict[str, Callable[[int, int], object]]:
    """Every call that takes a range, as a function of it; what it gives may be awaitable."""
    return {
        "flush_range": m.flush_range,
        "flush_async_range": m.flush_async_range,
        "view": m.view,
        "view_mut": m.view_mut,
        "view_nowait": m.view_nowait,
        "view_mut_nowait": m.view_mut_nowait,
        "read_at": m.read_at,
        "advise": partial(m.advise, "normal"),
        "load": m.load,
        "resident": m.resident,
        "pin": m.pin,
        "unpin": m.unpin,
        "windows": lambda offset, length: m.windows(16, offset=offset, length=length),
        "move to": lambda offset, length: m.move(offset, 0, length),
        "move from": lambda offset, length: m.move(0, offset, length),
    }


CALLS = [
    "flush_range", "flush_async_range", "view", "view_mut", "view_nowait", "view_mut_nowait",
    "read_at", "advise", "load", "resident", "pin", "unpin", "windows", "move to", "move from",
]  # fmt: skip
OUTSIDE = [
    (N + 1, 0), (0, N + 1), (9_000, 9_000), (2**63, 0), (0, 2**63), (2**63, 2**63), (-1, 1),
    (0, -1), (-N, N), (N, 1), (1, N),
]  # fmt: skip
NO_INTEGERS = [(True, 0), (0, True), (0.0, 1), (0, 1.0), ("0", 1), (0, "1"), (None, 1)]


@pytest.mark.parametrize("name", CALLS)
async def test_a19_ranges(tmp_path: Path, name: str) -> None:
    """A19: empty ranges up to the end are no-ops; what is outside raises, whatever the call."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path, "r+") as m:
        calls = ranged_calls(m)
        assert list(calls) == CALLS
        call = calls[name]

        async def run(offset: object, length: object) -> object:
            got = call(offset, length)  # type: ignore[arg-type]
            if hasattr(got, "__await__"):
                got = await got
            if isinstance(got, MmapView):
                await got.aclose()
            return got

        for offset in (0, 17, N):
            await run(offset, 0)
        before = m.statistics()
        for offset, length in OUTSIDE:
            with pytest.raises(ValueError, match=rf"offset .* and length {length} .* {N} bytes"):
                await run(offset, length)
        for wrong in NO_INTEGERS:
            with pytest.raises(TypeError, match="must be an integer"):
                await run(*wrong)
        assert m.statistics() == before


async def test_a19_write_at_and_readinto_at(tmp_path: Path) -> None:
    """A19: the ranges of write_at and readinto_at, whose lengths are those of buffers."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path, "r+") as m:
        assert await m.write_at(N, b"") == 0
        assert await m.readinto_at(N, bytearray()) == 0
        assert await m.read_at(N, 0) == b""
        for offset, length in ((N + 1, 0), (0, N + 1), (9_000, 9_000), (2**63, 1), (-1, 1)):
            with pytest.raises(ValueError, match=rf"{offset} and length {length} .* {N} bytes"):
                await m.write_at(offset, bytes(length))
            with pytest.raises(ValueError, match=rf"{offset} and length {length} .* {N} bytes"):
                await m.readinto_at(offset, bytearray(length))
        for wrong in (True, 0.0, "0", None):
            with pytest.raises(TypeError, match="offset must be an integer"):
                await m.write_at(wrong, b"x")  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="offset must be an integer"):
                await m.readinto_at(wrong, bytearray(1))  # type: ignore[arg-type]
    assert path.read_bytes() == inc(N)


async def test_a20_outlives_descriptor_and_name(tmp_path: Path) -> None:
    """A20: the map goes on after its file was closed and unlinked."""
    path = file_of(tmp_path, INC128)
    with open(path, "r+b") as file:
        m = await AsyncMmap.open(file, "r+")
    path.unlink()
    async with m:
        assert await m.read_at(0, 128) == INC128
        await m.write_at(0, b"abc123")
        await m.flush()
        assert await m.read_at(0, 6) == b"abc123"


@only_linux
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_a21_closes_with_the_last_view(tmp_path: Path, order: tuple[int, int]) -> None:
    """A21: after into_view the map closes when the last view closes, in both orders."""
    path = file_of(tmp_path, 128)
    mapped = f"{path}\n"

    def is_mapped() -> bool:
        return mapped in Path("/proc/self/maps").read_text()

    m = await AsyncMmap.open_path(path, "r+")
    views = (await m.into_view()).split_at(64)
    assert m.closed
    for index in order:
        assert is_mapped()
        views[index][:] = inc(64)
        await views[index].aclose()
    assert not is_mapped()
    assert path.read_bytes() == inc(64) * 2


async def test_a22_two_maps_of_one_file(tmp_path: Path) -> None:
    """A22: two maps of one file see each other's stores at once, without flush."""
    path = file_of(tmp_path, 128)
    async with AsyncMmap.open_path(path, "r+") as a, AsyncMmap.open_path(path, "r+") as b:
        async with a.view_mut() as store, b.view() as look:
            store[0:6] = b"abc123"
            assert look[0:6] == b"abc123"
        await b.write_at(3, b"xyz")
        assert await a.read_at(0, 6) == b"abcxyz"


async def test_a23_more_rights_than_the_descriptor(tmp_path: Path) -> None:
    """A23: set_protection above the descriptor's rights is a PermissionError; the map stays."""
    path = file_of(tmp_path, INC128)
    async with AsyncMmap.open_path(path, Protection.READ) as m:
        with pytest.raises(PermissionError) as caught:
            await m.set_protection(Protection.READ_WRITE)
        assert caught.value.filename == str(path)
        assert m.protection is Protection.READ
        assert await m.read_at(0, 128) == INC128


async def test_a24_range_past_the_end_of_the_file(tmp_path: Path) -> None:
    """A24: an offset or a length past the end of the file is a ValueError with the numbers."""
    path = file_of(tmp_path, 128)
    for offset, length in ((128, 1), (129, 1), (0, 129), (100, 29), (2**62, 1), (1, 2**62)):
        message = rf"offset {offset} and length {length} .*file of 128 bytes"
        with pytest.raises(ValueError, match=message):
            await AsyncMmap.open_path(path, offset=offset, length=length)
        with open(path, "rb") as file, pytest.raises(ValueError, match=message):
            await AsyncMmap.open_with_offset(file, Protection.READ, offset, length)
    with pytest.raises(ValueError, match=r"offset 128 .*file of 128 bytes"):
        await AsyncMmap.open_path(path, offset=128)


async def test_a25_offset_beyond_32_bits(tmp_path: Path) -> None:
    """A25: bytes behind 2**32 + 1 of a sparse file, with and without a length."""
    path = file_of(tmp_path, 2**32 + 1 + 5_432)
    async with AsyncMmap.open_path(path, "r+", offset=2**32 + 1, length=5_432) as m:
        assert (len(m), m.offset) == (5_432, 2**32 + 1)
        await m.write_at(0, inc(5_432))
    async with AsyncMmap.open_path(path, offset=2**32 + 1) as m:
        assert len(m) == 5_432
        assert await m.read_at(0, 5_432) == inc(5_432)


def in_a_forked_child(check: Callable[[], bool]) -> int:
    """The status of a forked child that ends with 0 if ``check`` says yes there."""
    with warnings.catch_warnings():
        # Worker threads are there; the child does nothing but look at memory.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 2
        try:
            status = 0 if check() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("protection", [Protection.READ_WRITE, Protection.READ_COPY])
async def test_a26_forked_child(protection: Protection) -> None:
    """A26: a forked child shares anonymous memory, and has its own READ_COPY memory."""
    async with AsyncMmap.anonymous(128, protection) as m:
        await m.write_at(0, INC128)
        with m.as_mut_slice() as raw:

            def store() -> bool:
                seen = bytes(raw) == INC128
                raw[0:6] = b"abc123"
                return seen and bytes(raw[:6]) == b"abc123"

            assert in_a_forked_child(store) == 0
            shared = protection is Protection.READ_WRITE
            assert bytes(raw) == (b"abc123" if shared else INC128[:6]) + INC128[6:]
