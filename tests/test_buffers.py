"""Buffers that users hand in, and buffers of ours that they may still hold."""

from __future__ import annotations

import array
import ctypes
import gc
import mmap
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import anyio
import pytest

from aiommap import AsyncMmap, DeadlockError, _buffers

from .content import file_of


class Point(ctypes.Structure):
    _fields_ = (("x", ctypes.c_int16), ("y", ctypes.c_int32))


class BigEndian(ctypes.BigEndianStructure):
    _fields_ = (("x", ctypes.c_uint16), ("y", ctypes.c_uint16))


@pytest.mark.parametrize(
    "data",
    [
        b"abcd",
        bytearray(b"abcd"),
        memoryview(b"abcd"),
        memoryview(b"abcdefgh")[2:6],
        memoryview(b"abcdefgh").cast("B", (2, 4)),
        memoryview(b"abcdefgh").cast("H"),
        array.array("d", [1.0, 2.0]),
        ctypes.c_int(5),
        (ctypes.c_int * 3)(1, 2, 3),
        (ctypes.c_char * 3)(),
        Point(1, 2),
        (Point * 2)(),
        BigEndian(1, 2),
        b"",
        bytearray(),
        array.array("d"),
        memoryview(b"").cast("H"),
    ],
    ids=repr,
)
def test_readable_gives_the_bytes_of_any_contiguous_buffer(data: bytes) -> None:
    """Whatever its item type and shape, a contiguous buffer is taken as its bytes, uncopied."""
    view = _buffers.readable(data)
    assert (view.format, view.ndim, view.itemsize) == ("B", 1, 1)
    assert bytes(view) == bytes(data) if not isinstance(data, ctypes.c_int) else len(view) == 4


def test_readable_does_not_copy() -> None:
    """A store into the buffer shows in what readable() gave."""
    data = array.array("H", [0, 0])
    view = _buffers.readable(data)
    data[1] = 0x0101
    assert bytes(view) == b"\0\0\1\1"


@pytest.mark.anyio
@pytest.mark.parametrize("size", [10, 100_000])
async def test_a_kept_error_does_not_lock_the_buffer(tmp_path: Path, size: int) -> None:
    """Who keeps the error of a call may change the size of the buffer that it was given."""
    async with AsyncMmap.open_path(file_of(tmp_path, 200_000), "r+") as m:
        kept = []
        calls: list[tuple[Callable[[bytearray], Awaitable[int]], type[Exception]]] = [
            (lambda data: m.write_at(199_999, data), ValueError),
            (lambda data: m.readinto_at(199_999, data), ValueError),
            (lambda data: m.write_at(0, data), DeadlockError),
            (lambda data: m.readinto_at(0, data), DeadlockError),
            (lambda data: m.find(data), DeadlockError),
        ]
        for call, error in calls:
            data = bytearray(size)
            async with m.view_mut():
                with pytest.raises(error) as caught:
                    await call(data)
                kept.append(caught)
                data.append(0)


@pytest.mark.anyio
async def test_a_search_does_not_lock_its_needle(tmp_path: Path) -> None:
    """It has a copy: the buffer may be changed meanwhile."""
    async with AsyncMmap.open_path(file_of(tmp_path, 200_000), "r+") as m:
        needle = bytearray(b"needle")
        held = await m.view_mut()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(m.find, needle)
            await anyio.wait_all_tasks_blocked()
            needle.clear()
            await held.aclose()


@pytest.mark.parametrize("data", ["abc", None, 5, [1, 2], object()])
def test_readable_wants_a_buffer(data: object) -> None:
    """What is no buffer, a string included, is a TypeError."""
    with pytest.raises(TypeError, match="must be bytes or another buffer"):
        _buffers.readable(data)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [2, -1])
def test_readable_wants_contiguous_bytes(step: int) -> None:
    """Bytes that are not next to each other are a BufferError that names the argument."""
    with pytest.raises(BufferError, match="needle must be contiguous"):
        _buffers.readable(memoryview(b"abcdef")[::step], "needle")


def test_writable_wants_a_writable_buffer() -> None:
    """A read-only buffer is a TypeError that names the argument and the type."""
    assert not _buffers.writable(bytearray(3)).readonly
    assert not _buffers.writable(array.array("I", [1])).readonly
    with pytest.raises(TypeError, match="buffer must be writable, not a read-only bytes"):
        _buffers.writable(b"abc")


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, 4096) as memory:
        yield memory
        gc.collect()


def test_release_of_a_buffer_that_nobody_uses(memory: mmap.mmap) -> None:
    """A buffer of which nothing was made leaves nothing behind."""
    view = memoryview(memory)[10:20]
    assert _buffers.release(view) == []
    with pytest.raises(ValueError, match="released"):
        view[0]


@pytest.mark.parametrize(
    "derive",
    [
        lambda view: view[2:4],
        lambda view: view[:0],
        lambda view: view[::-1],
        lambda view: view.cast("H"),
        lambda view: view.toreadonly(),
        lambda view: memoryview(view),
        lambda view: (ctypes.c_char * 10).from_buffer(view),
    ],
    ids=["slice", "empty slice", "steps", "cast", "read-only", "memoryview", "ctypes array"],
)
def test_release_finds_what_was_derived(
    memory: mmap.mmap, derive: Callable[[memoryview], object]
) -> None:
    """Slices, casts and arrays that outlive the buffer are found, and found gone later."""
    view = memoryview(memory)[10:20]
    derived = derive(view)
    strays = _buffers.release(view)
    assert strays
    assert _buffers.alive(strays) == strays
    del derived
    view.release()
    gc.collect()
    assert _buffers.alive(strays) == []


def test_release_of_several_buffers_of_one_origin(memory: mmap.mmap) -> None:
    """Buffers made from each other by us are no strays when all of them are released."""
    view = memoryview(memory)[10:20]
    assert _buffers.release(view, view.toreadonly()) == []


def test_release_of_a_released_buffer(memory: mmap.mmap) -> None:
    """A buffer that its user has released already is no stray."""
    view = memoryview(memory)[10:20]
    with view:
        pass
    assert _buffers.release(view) == []
