"""Bad arguments of every public call: a clear error that names the value, and nothing changed."""

from __future__ import annotations

import array
import errno
import os
import re
import select
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread

from aiommap import AsyncMmap, MmapOptions, RegionLock, capabilities

from .content import file_of, inc, maps_of, only_linux, open_descriptors
from .processes import run_python

pytestmark = [pytest.mark.anyio, only_linux]

SIZE = 3 * 4096 + 5

Bad = tuple[object, type[Exception]]

NOT_INTEGERS: list[Bad] = [
    (True, TypeError),
    (False, TypeError),
    (1.0, TypeError),
    (float("nan"), TypeError),
    ("1", TypeError),
    (b"1", TypeError),
    ([1], TypeError),
    (1j, TypeError),
]
OUTSIDE: list[Bad] = [
    (-1, ValueError),
    (-(2**63), ValueError),
    (-(2**64), ValueError),
    (SIZE + 1, ValueError),
    (2**31, ValueError),
    (2**63 - 1, ValueError),
    (2**63, ValueError),
    (2**64, ValueError),
    (2**200, ValueError),
]
NO_LENGTH: list[Bad] = [
    (0, ValueError),
    (-1, ValueError),
    (2**63, ValueError),
    (2**64, ValueError),
]
MISSING: list[Bad] = [(None, TypeError)]
NO_BUFFER: list[Bad] = [
    (None, TypeError),
    (5, TypeError),
    ("text", TypeError),
    ([1, 2], TypeError),
    (memoryview(bytearray(8))[::2], BufferError),
    (memoryview(bytearray(8))[::-1], BufferError),
]
NO_PROTECTION: list[Bad] = [
    ("w", ValueError),
    ("", ValueError),
    ("R+", ValueError),
    (None, TypeError),
    (1, TypeError),
    (b"r", TypeError),
]
READ_ONLY: list[Bad] = [(b"bytes", TypeError), (memoryview(b"bytes"), TypeError)]
SIZES: list[Bad] = [(bytes(SIZE + 1), ValueError)]
NO_SEEK: list[Bad] = [(1, ValueError), (-SIZE - 1, ValueError)]
NO_WHENCE: list[Bad] = [(3, ValueError), (-1, ValueError)]
NOT_A_LIMITER: list[Bad] = [(1, TypeError), ("x", TypeError), (anyio.Lock, TypeError)]

INDEX = NOT_INTEGERS + OUTSIDE
Call = Callable[[Any, Any], object]

# What the call is made on, how, and the bad values for the argument.
OF_A_MAP: dict[str, tuple[Call, list[Bad]]] = {
    "read_at offset": (lambda m, x: m.read_at(x, 1), [*INDEX, *MISSING]),
    "read_at length": (lambda m, x: m.read_at(0, x), [*INDEX, *MISSING]),
    "readinto_at offset": (lambda m, x: m.readinto_at(x, bytearray(1)), [*INDEX, *MISSING]),
    "readinto_at buffer": (lambda m, x: m.readinto_at(0, x), [*NO_BUFFER, *READ_ONLY]),
    "write_at offset": (lambda m, x: m.write_at(x, b"x"), [*INDEX, *MISSING]),
    "write_at data": (lambda m, x: m.write_at(0, x), NO_BUFFER),
    "move dest": (lambda m, x: m.move(x, 0, 1), [*INDEX, *MISSING]),
    "move src": (lambda m, x: m.move(0, x, 1), [*INDEX, *MISSING]),
    "move length": (lambda m, x: m.move(0, 1, x), [*INDEX, *MISSING]),
    "find needle": (lambda m, x: m.find(x), NO_BUFFER),
    "find start": (lambda m, x: m.find(b"x", x), NOT_INTEGERS),
    "find end": (lambda m, x: m.find(b"x", 0, x), NOT_INTEGERS),
    "rfind needle": (lambda m, x: m.rfind(x), NO_BUFFER),
    "rfind start": (lambda m, x: m.rfind(b"x", x), NOT_INTEGERS),
    "view offset": (lambda m, x: m.view(x), INDEX),
    "view length": (lambda m, x: m.view(0, x), INDEX),
    "view_mut offset": (lambda m, x: m.view_mut(x), INDEX),
    "view_mut length": (lambda m, x: m.view_mut(0, x), INDEX),
    "view_nowait offset": (lambda m, x: m.view_nowait(x), INDEX),
    "view_nowait length": (lambda m, x: m.view_nowait(0, x), INDEX),
    "view_mut_nowait offset": (lambda m, x: m.view_mut_nowait(x), INDEX),
    "view_mut_nowait length": (lambda m, x: m.view_mut_nowait(0, x), INDEX),
    "windows size": (lambda m, x: m.windows(x), NOT_INTEGERS + NO_LENGTH),
    "windows offset": (lambda m, x: m.windows(offset=x), INDEX),
    "windows length": (lambda m, x: m.windows(length=x), INDEX),
    "load offset": (lambda m, x: m.load(x), INDEX),
    "load length": (lambda m, x: m.load(0, x), INDEX),
    "resident offset": (lambda m, x: m.resident(x), INDEX),
    "resident length": (lambda m, x: m.resident(0, x), INDEX),
    "advise advice": (
        lambda m, x: m.advise(x),
        [("dont_need", ValueError), ("", ValueError), (None, TypeError), (4, TypeError)],
    ),
    "advise offset": (lambda m, x: m.advise("normal", x), INDEX),
    "advise length": (lambda m, x: m.advise("normal", 0, x), INDEX),
    "pin offset": (lambda m, x: m.pin(x), INDEX),
    "pin length": (lambda m, x: m.pin(0, x), INDEX),
    "unpin offset": (lambda m, x: m.unpin(x), INDEX),
    "unpin length": (lambda m, x: m.unpin(0, x), INDEX),
    "flush_range offset": (lambda m, x: m.flush_range(x, 1), [*INDEX, *MISSING]),
    "flush_range length": (lambda m, x: m.flush_range(0, x), [*INDEX, *MISSING]),
    "flush_async_range offset": (lambda m, x: m.flush_async_range(x, 1), [*INDEX, *MISSING]),
    "flush_async_range length": (lambda m, x: m.flush_async_range(0, x), [*INDEX, *MISSING]),
    "resize length": (lambda m, x: m.resize(x), NOT_INTEGERS + NO_LENGTH + MISSING),
    "set_protection": (lambda m, x: m.set_protection(x), NO_PROTECTION),
}

OF_A_VIEW: dict[str, tuple[Call, list[Bad]]] = {
    "split_at": (lambda v, x: v.split_at(x), [*INDEX, *MISSING]),
    "restrict offset": (lambda v, x: v.restrict(x, 0), [*INDEX, *MISSING]),
    "restrict length": (lambda v, x: v.restrict(0, x), [*INDEX, *MISSING]),
    "read": (lambda v, x: v.read(x), NOT_INTEGERS),
    "readinto": (lambda v, x: v.readinto(x), [*NO_BUFFER, *READ_ONLY]),
    "readline": (lambda v, x: v.readline(x), NOT_INTEGERS),
    "write": (lambda v, x: v.write(x), NO_BUFFER),
    "write too much": (lambda v, x: v.write(x), SIZES),
    "seek": (lambda v, x: v.seek(x), [*INDEX, *MISSING]),
    "seek from the end": (lambda v, x: v.seek(x, 2), NO_SEEK),
    "seek whence": (lambda v, x: v.seek(0, x), NO_WHENCE),
    "flush_range offset": (lambda v, x: v.flush_range(x, 1), INDEX),
    "flush_range length": (lambda v, x: v.flush_range(0, x), [*INDEX, *MISSING]),
    "flush_async_range offset": (lambda v, x: v.flush_async_range(x, 1), INDEX),
    "index": (
        lambda v, x: v[x],
        [(1.0, TypeError), ("1", TypeError), (None, TypeError), (SIZE, IndexError)],
    ),
    "store": (
        lambda v, x: v.__setitem__(0, x),
        [(256, ValueError), (-1, ValueError), (1.0, TypeError), (None, TypeError)],
    ),
    "store of a slice": (
        lambda v, x: v.__setitem__(slice(0, 4), x),
        [(b"abc", ValueError), (b"abcde", ValueError), (None, TypeError), (5, TypeError)],
    ),
}

NAMELESS = (BufferError, IndexError)
"""What memoryview says in its own words, or names the argument and not its value."""


def spelled(value: object) -> str | None:
    """What an error about this value has in its message, at least."""
    if isinstance(value, int | float | complex | str) and not isinstance(value, bool):
        return re.escape(str(value)) or None
    return None


async def resolved(result: object) -> object:
    return await result if isinstance(result, Awaitable) else result


def cases(table: dict[str, tuple[Call, list[Bad]]]) -> Iterator[Any]:
    for name, (call, values) in table.items():
        for value, error in values:
            shown = repr(value)[:24]
            yield pytest.param(call, value, error, id=f"{name}={shown}")


@contextmanager
def nothing_changes(path: Path) -> Iterator[None]:
    """Afterwards content, size and descriptors are as before."""
    content = path.read_bytes()
    descriptors = open_descriptors()
    maps = maps_of(path)
    yield
    assert path.read_bytes() == content
    assert open_descriptors() == descriptors
    assert maps_of(path) == maps


async def refused(
    call: Call, target: object, value: object, error: type[Exception], *, plain: bool = False
) -> None:
    nameless = issubclass(error, NAMELESS) or (error is ValueError and isinstance(value, bytes))
    match = None if nameless or plain else spelled(value)
    with pytest.raises(error, match=match) as caught:
        await resolved(call(target, value))
    assert type(caught.value) is error
    assert str(caught.value)


async def test_calls_of_a_map(tmp_path: Path) -> None:
    """Every argument of every call of a map, with values that it must refuse."""
    path = file_of(tmp_path, inc(SIZE))
    failures: list[str] = []
    async with AsyncMmap.open_path(path, "r+") as m:
        for case in cases(OF_A_MAP):
            call, value, error = case.values
            try:
                with nothing_changes(path):
                    await refused(call, m, value, error)
                m.view_mut_nowait()._give_back()
                assert len(m) == SIZE
                assert m.statistics().waiting == 0
            except BaseException as exc:
                failures.append(f"{case.id}: {type(exc).__name__} {exc}"[:300])
    assert failures == []


async def test_calls_of_a_view(tmp_path: Path) -> None:
    """The same for views."""
    path = file_of(tmp_path, inc(SIZE))
    failures: list[str] = []
    async with AsyncMmap.open_path(path, "r+") as m, m.view_mut() as v:
        for case in cases(OF_A_VIEW):
            call, value, error = case.values
            try:
                with nothing_changes(path):
                    # Plain memory speaks as memoryview does, and seek() names the place.
                    plain = str(case.id).startswith(("index", "store", "seek from"))
                    await refused(call, v, value, error, plain=plain)
                assert not v.closed
                assert (len(v), v.offset, await v.tell()) == (SIZE, 0, 0)
            except BaseException as exc:
                failures.append(f"{case.id}: {type(exc).__name__} {exc}"[:300])
    assert failures == []


async def test_opening(tmp_path: Path) -> None:
    """Arguments of the calls that open maps; they are refused before anything is awaited."""
    path = file_of(tmp_path, inc(SIZE))
    new = tmp_path / "new"
    any_offset: list[Bad] = [
        *NOT_INTEGERS,
        (-1, ValueError),
        (2**63, ValueError),
        (2**64, ValueError),
    ]
    any_length: list[Bad] = [*NOT_INTEGERS, *NO_LENGTH]
    paths: list[Bad] = [
        ("a\0b", ValueError),
        (b"a\0b", ValueError),
        (None, TypeError),
        (5, TypeError),
        (1.5, TypeError),
        (["x"], TypeError),
    ]
    files: list[Bad] = [
        (None, TypeError),
        (True, TypeError),
        (1.0, TypeError),
        ("data.bin", TypeError),
        (path, TypeError),
        (-1, ValueError),
        (-(2**31), ValueError),
        (2**31, ValueError),
        (2**64, ValueError),
    ]
    modes: list[Bad] = [*NOT_INTEGERS, (-1, ValueError), (0o20000, ValueError), (2**40, ValueError)]
    failures: list[str] = []
    with open(path, "r+b") as file:
        fd = file.fileno()
        table: dict[str, tuple[Call, list[Bad]]] = {
            "open_path path": (lambda o, x: o.open_path(x), paths),
            "open_path protection": (lambda o, x: o.open_path(path, x), NO_PROTECTION),
            "open_path offset": (lambda o, x: o.open_path(path, offset=x), any_offset),
            "open_path length": (lambda o, x: o.open_path(path, length=x), any_length),
            "open_path limiter": (lambda o, x: o.open_path(path, limiter=x), NOT_A_LIMITER),
            "open file": (lambda o, x: o.open(x), files),
            "open protection": (lambda o, x: o.open(fd, x), NO_PROTECTION),
            "open limiter": (lambda o, x: o.open(fd, limiter=x), NOT_A_LIMITER),
            "open_with_offset file": (lambda o, x: o.open_with_offset(x, "r", 0, 1), files),
            "open_with_offset protection": (
                lambda o, x: o.open_with_offset(fd, x, 0, 1),
                NO_PROTECTION,
            ),
            "open_with_offset offset": (
                lambda o, x: o.open_with_offset(fd, "r", x, 1),
                any_offset,
            ),
            "open_with_offset length": (
                lambda o, x: o.open_with_offset(fd, "r", 0, x),
                any_length,
            ),
            "create path": (lambda o, x: o.create(x, 10), paths),
            "create length": (lambda o, x: o.create(new, x), [*any_length, *MISSING]),
            "create mode": (lambda o, x: o.create(new, 10, mode=x), modes),
            "create limiter": (lambda o, x: o.create(new, 10, limiter=x), NOT_A_LIMITER),
            "anonymous length": (lambda o, x: o.anonymous(x), [*any_length, *MISSING]),
            "anonymous protection": (lambda o, x: o.anonymous(10, x), NO_PROTECTION),
            "anonymous limiter": (lambda o, x: o.anonymous(10, limiter=x), NOT_A_LIMITER),
            "anonymous options": (
                lambda o, x: o.anonymous_with_options(10, "r+", x),
                [("x", TypeError), (1, TypeError), ({}, TypeError)],
            ),
        }
        for case in cases(table):
            call, value, error = case.values
            try:
                with nothing_changes(path):
                    match = None if value == "a\0b" else spelled(value)
                    # When called, not when awaited.
                    with pytest.raises(error, match=match):
                        call(AsyncMmap, value)
                assert not new.exists()
            except BaseException as exc:
                failures.append(f"{case.id}: {type(exc).__name__} {exc}"[:300])
    assert failures == []


async def test_values(tmp_path: Path) -> None:
    """Options, the lock, capabilities: the same."""
    for name in ("stack", "huge", "populate"):
        for option in (1, 0, None, "yes"):
            with pytest.raises(TypeError, match=rf"{name} must be True or False, not {option!r}"):
                MmapOptions(**{name: option})  # type: ignore[arg-type]
    lock = RegionLock()
    for call in (lock.shared, lock.exclusive, lock.shared_nowait, lock.exclusive_nowait):
        for value, error in [*NOT_INTEGERS, *MISSING]:
            with pytest.raises(error, match="must be an integer"):
                call(value, 10)  # type: ignore[arg-type]
            with pytest.raises(error, match="must be an integer"):
                call(0, value)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="start 5 is greater than stop 4"):
            call(5, 4)
    assert lock.statistics().held_shared == 0
    with pytest.raises(FileNotFoundError, match="nowhere"):
        await to_thread.run_sync(capabilities, tmp_path / "nowhere")


RANGES = [
    ((0, SIZE + 1), "length 12294"),
    ((SIZE, 1), "offset 12293 and length 1"),
    ((SIZE + 1, 0), "offset 12294"),
    ((1, SIZE), "offset 1 and length 12293"),
    ((2**63 - 1, 1), f"offset {2**63 - 1}"),
    ((1, 2**63 - 1), f"length {2**63 - 1}"),
]


@pytest.mark.parametrize(("bounds", "match"), RANGES)
async def test_ranges_together(bounds: tuple[int, int], match: str, tmp_path: Path) -> None:
    """Offset and length that are good by themselves and not together; both are named."""
    path = file_of(tmp_path, inc(SIZE))
    async with AsyncMmap.open_path(path, "r+") as m:
        calls: list[Callable[[], object]] = [
            lambda: m.read_at(*bounds),
            lambda: m.view(*bounds),
            lambda: m.view_mut_nowait(*bounds),
            lambda: m.load(*bounds),
            lambda: m.resident(*bounds),
            lambda: m.advise("normal", *bounds),
            lambda: m.pin(*bounds),
            lambda: m.unpin(*bounds),
            lambda: m.flush_range(*bounds),
            lambda: m.flush_async_range(*bounds),
            lambda: m.windows(offset=bounds[0], length=bounds[1]),
            lambda: m.move(bounds[0], 0, bounds[1]),
            lambda: m.move(0, bounds[0], bounds[1]),
        ]
        for call in calls:
            with pytest.raises(ValueError, match=rf"{match}.* {SIZE} bytes"):
                await resolved(call())
        if bounds[1] < 2**40:
            with pytest.raises(ValueError, match=rf"{match}.* {SIZE} bytes"):
                await m.write_at(bounds[0], bytes(bounds[1]))
    if bounds[1] and bounds[0] + bounds[1] > SIZE:
        with pytest.raises(ValueError, match=rf"{match}.*file of {SIZE} bytes"):
            await AsyncMmap.open_path(path, offset=bounds[0], length=bounds[1])


class Integer:
    """An integer that is not an int, as numpy's are."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


async def test_what_is_fine(tmp_path: Path) -> None:
    """Anything with __index__, any contiguous buffer of any format, and empty ranges."""
    path = file_of(tmp_path, inc(SIZE))
    async with AsyncMmap.open_path(path, "r+", offset=Integer(5), length=Integer(100)) as m:
        assert await m.read_at(Integer(1), Integer(2)) == inc(2, 6)
        assert await m.write_at(Integer(0), array.array("i", [1, 2, 3])) == 12
        numbers = array.array("d", [0.0, 0.0])
        assert await m.readinto_at(0, numbers) == 16
        assert numbers.tobytes()[:12] == array.array("i", [1, 2, 3]).tobytes()
        for end in (0, 100):
            assert await m.read_at(end, 0) == b""
            assert await m.readinto_at(end, bytearray()) == 0
            assert await m.write_at(end, b"") == 0
            await m.load(end, 0)
            assert await m.resident(end, 0) == 0
            await m.advise("random", end, 0)
            await m.pin(end, 0)
            await m.unpin(end, 0)
            await m.flush_range(end, 0)
            await (await m.flush_async_range(end, 0))
            await m.move(end, 0, 0)
            async with m.view_mut(end, 0) as v:
                assert (len(v), bytes(v), await v.read()) == (0, b"", b"")
                async with m.view_mut(0, 100):
                    pass
            assert [window async for window in m.windows(offset=end, length=0)] == []
        assert await m.find(b"", 1000) == b"x".find(b"", 1000) == -1
        assert await m.find(b"", 100) == 100
        assert await m.find(b"x" * 101) == -1


class TestFiles:
    """What can be opened by path and is no file to map."""

    @pytest.mark.parametrize("protection", ["r", "r+", "c", "rx"])
    async def test_paths(self, protection: str, tmp_path: Path) -> None:
        """Directory, FIFO, socket, devices, /proc, loops, gaps: an error with path and errno."""
        os.mkfifo(tmp_path / "fifo")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "socket"))
            (tmp_path / "loop").symlink_to("loop")
            (tmp_path / "broken").symlink_to("nowhere")
            (tmp_path / "file").write_bytes(b"x")
            directory = errno.EISDIR if protection == "r+" else errno.ENODEV
            expected: dict[str, int] = {
                str(tmp_path): directory,
                str(tmp_path / "fifo"): errno.ENODEV,
                str(tmp_path / "socket"): errno.ENXIO,
                "/dev/null": errno.ENODEV,
                "/dev/zero": errno.ENODEV,
                str(tmp_path / "loop"): errno.ELOOP,
                str(tmp_path / "broken"): errno.ENOENT,
                str(tmp_path / "nowhere"): errno.ENOENT,
                str(tmp_path / "file/below"): errno.ENOTDIR,
                str(tmp_path / ("n" * 300)): errno.ENAMETOOLONG,
                "": errno.ENOENT,
            }
            descriptors = open_descriptors()
            with anyio.fail_after(30):
                for path, number in expected.items():
                    with pytest.raises(OSError, match=re.escape(path or "''")) as caught:
                        await AsyncMmap.open_path(path, protection)
                    assert (path, caught.value.errno) == (path, number)
                    assert caught.value.filename == path
            assert open_descriptors() == descriptors

    @pytest.mark.parametrize("path", ["/proc/self/status", "/proc/self/maps", "/proc/meminfo"])
    async def test_proc(self, path: str) -> None:
        """Files of /proc have no size: they are empty, and the error names them."""
        with pytest.raises(ValueError, match=rf"empty file .*{path}"):
            await AsyncMmap.open_path(path)

    async def test_create(self, tmp_path: Path) -> None:
        """create() where there is something else already, or no directory."""
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "long").write_bytes(bytes(100))
        (tmp_path / "broken").symlink_to("nowhere")
        for name in ("fifo", "long", "broken", "."):
            with pytest.raises(FileExistsError, match=re.escape(str(tmp_path / name))):
                await AsyncMmap.create(tmp_path / name, 10)
        with anyio.fail_after(30), pytest.raises(OSError, match="fifo") as caught:
            await AsyncMmap.create(tmp_path / "fifo", 10, exist_ok=True)
        assert caught.value.errno == errno.ENODEV
        with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
            await AsyncMmap.create(tmp_path, 10, exist_ok=True)
        with pytest.raises(ValueError, match="100 bytes, more than the 10 asked for"):
            await AsyncMmap.create(tmp_path / "long", 10, exist_ok=True)
        with pytest.raises(FileNotFoundError, match="no/where"):
            await AsyncMmap.create(tmp_path / "no/where", 10)
        with pytest.raises(OSError, match="huge") as caught:
            await AsyncMmap.create(tmp_path / "huge", 2**62)
        assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
        assert sorted(os.listdir(tmp_path)) == ["broken", "fifo", "long"]

    async def test_no_memory(self) -> None:
        """More anonymous memory than there is address space: OSError, and nothing is kept."""
        descriptors = open_descriptors()
        for protection in ("r+", "c"):
            with pytest.raises(OSError, match=r"\w"):
                await AsyncMmap.anonymous(2**62, protection)
        assert open_descriptors() == descriptors


class TestDescriptors:
    """What can be open and is nothing to map."""

    async def test_kinds(self, tmp_path: Path) -> None:
        """Pipes, sockets, directories, event and epoll descriptors: ENODEV, and no hang."""
        reading, writing = os.pipe()
        directory = os.open(tmp_path, os.O_RDONLY)
        event = os.eventfd(0)
        one, other = socket.socketpair()
        with one, other, select.epoll() as epoll:
            try:
                for fd in (reading, writing, directory, event, one.fileno(), epoll.fileno()):
                    descriptors = open_descriptors()
                    with anyio.fail_after(30), pytest.raises(OSError, match=r"\w") as caught:
                        await AsyncMmap.open(fd)
                    assert caught.value.errno == errno.ENODEV
                    assert open_descriptors() == descriptors
            finally:
                for fd in (reading, writing, directory, event):
                    os.close(fd)

    async def test_rights(self, tmp_path: Path) -> None:
        """Write-only, read-only to be written, O_PATH, closed: the kernel's errno."""
        path = file_of(tmp_path, inc(SIZE))
        expected = [
            (os.O_WRONLY, "r", errno.EACCES),
            (os.O_WRONLY, "r+", errno.EACCES),
            (os.O_WRONLY, "c", errno.EACCES),
            (os.O_RDONLY, "r+", errno.EACCES),
            (os.O_PATH, "r", errno.EBADF),
        ]
        for flags, protection, number in expected:
            fd = os.open(path, flags)
            try:
                with nothing_changes(path), pytest.raises(OSError, match=r"\w") as caught:
                    await AsyncMmap.open(fd, protection)
                assert caught.value.errno == number, (flags, protection)
                assert caught.value.filename == str(path)
            finally:
                os.close(fd)
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            await AsyncMmap.open(fd)
        assert caught.value.errno == errno.EBADF
        fd = os.open(path, os.O_RDONLY)
        async with AsyncMmap.open(fd, "c") as m:  # copy on write needs no more
            await m.write_at(0, b"x")
        os.close(fd)
        assert path.read_bytes() == inc(SIZE)

    async def test_objects(self, tmp_path: Path) -> None:
        """What fileno() raises, or gives, that is no descriptor."""
        path = file_of(tmp_path, inc(SIZE))

        class Says:
            def __init__(self, answer: object) -> None:
                self.answer = answer

            def fileno(self) -> Any:
                if isinstance(self.answer, Exception):
                    raise self.answer
                return self.answer

        with open(path, "rb") as file:
            pass
        with pytest.raises(ValueError, match="closed file"):
            AsyncMmap.open(file)
        with pytest.raises(OSError, match="no descriptor"):
            AsyncMmap.open(Says(OSError("no descriptor")))
        for answer, error in [("3", TypeError), (None, TypeError), (-1, ValueError)]:
            with pytest.raises(error, match=str(answer)):
                AsyncMmap.open(Says(answer))

    async def test_read_only_maps(self, tmp_path: Path) -> None:
        """Everything that stores is PermissionError where nothing may be stored."""
        path = file_of(tmp_path, inc(SIZE))
        for protection in ("r", "rx"):
            async with AsyncMmap.open_path(path, protection) as m:
                calls: list[Callable[[], object]] = [
                    partial(m.write_at, 0, b"x"),
                    partial(m.move, 0, 1, 1),
                    m.view_mut,
                    m.view_mut_nowait,
                    m.as_mut_slice,
                    m.mut_ptr,
                    partial(m.resize, 10),
                ]
                for call in calls:
                    with pytest.raises(PermissionError, match="not writable"):
                        await resolved(call())
                async with m.view() as view:
                    v: Any = view
                    for call in (partial(v.write, b"x"), v.as_mut_slice, v.mut_ptr):
                        with pytest.raises(PermissionError, match="read-only"):
                            await resolved(call())
                    for key in (0, slice(0, 1)):
                        with pytest.raises(TypeError, match="read-only"):
                            v[key] = b"x" if isinstance(key, slice) else 1
                        with pytest.raises(TypeError, match="read-only"):
                            v.buffer[key] = b"x" if isinstance(key, slice) else 1
                assert m.as_slice().readonly
        assert path.read_bytes() == inc(SIZE)


LARGE = 3 << 20


class TestOverlap:
    """Memory of the map itself as a source or a target."""

    @staticmethod
    async def _filled(kind: str, folder: Path) -> AsyncMmap:
        if kind == "anonymous":
            m = await AsyncMmap.anonymous(LARGE)
            await m.write_at(0, inc(LARGE))
            return m
        return await AsyncMmap.open_path(
            file_of(folder, inc(LARGE)), "r+" if kind == "file" else "c"
        )

    @pytest.mark.parametrize("kind", ["file", "anonymous", "copy"])
    async def test_both_ways(self, kind: str, tmp_path: Path) -> None:
        """write_at() from and readinto_at() into the map itself are as memmove()."""
        start = 1 << 20
        for length in (100, (1 << 20) + 77):
            for distance in (-300_000, -4096, 0, 1, 300_000):
                expected = bytearray(inc(LARGE))
                moved = bytes(expected[start : start + length])
                expected[start + distance : start + distance + length] = moved
                for reading in (False, True):
                    async with await self._filled(kind, tmp_path) as m:
                        memory = m.as_mut_slice()
                        if reading:
                            target = memory[start + distance : start + distance + length]
                            await m.readinto_at(start, target)
                        else:
                            await m.write_at(start + distance, memory[start : start + length])
                        got = await m.read_at(0, LARGE)
                        assert got == expected, (length, distance, reading)


TRUNCATED = """
    import ctypes, errno, mmap, os, sys
    import anyio
    from pathlib import Path
    from aiommap import AsyncMmap
    from tests.content import file_of, inc

    folder, control = Path(sys.argv[1]), sys.argv[2] == "control"
    path = file_of(folder, inc(1 << 21), "source.bin")
    descriptor = os.open(path, os.O_RDWR)
    memory = mmap.mmap(descriptor, 0)
    view = memoryview(memory)
    view[:10] = view[:10]
    os.truncate(path, 0)
    if control:
        bytes(view[:10])  # dies

    async def write(m, bad):
        async with m.view_mut() as v:
            await v.write(bad)

    async def readinto(m, bad):
        async with m.view() as v:
            await v.readinto(bad)

    calls = {
        "write_at": lambda m, bad: m.write_at(0, bad),
        "readinto_at": lambda m, bad: m.readinto_at(0, bad),
        "find": lambda m, bad: m.find(bad),
        "rfind": lambda m, bad: m.rfind(bad),
        "write": write,
        "readinto": readinto,
    }

    async def main():
        opened = [
            await AsyncMmap.anonymous(1 << 21),
            await AsyncMmap.open_path(file_of(folder, bytes(1 << 21), "r"), "r+"),
            await AsyncMmap.open_path(file_of(folder, bytes(1 << 21), "c"), "c"),
        ]
        for m in opened:
            async with m:
                for name, call in calls.items():
                    for length in (10, 1 << 20):
                        for bad in (
                            view[:length],
                            (ctypes.c_char * length).from_buffer(view[:length]),
                        ):
                            what = f"{m!r} {name} {length} {type(bad).__name__}"
                            print(what, file=sys.stderr, flush=True)
                            try:
                                await call(m, bad)
                            except OSError as exc:
                                assert exc.errno == errno.EFAULT, exc
                                assert "truncated" in str(exc), exc
                            else:
                                raise AssertionError(what)
                await m.load()
                async with m.view_mut(load=False):
                    pass
        print("alive")
    anyio.run(main)
"""


class TestTruncatedSource:
    """A buffer of the caller's that is a map of a file that was truncated."""

    def test_is_an_error(self, tmp_path: Path) -> None:
        """EFAULT and not SIGBUS, small and large, from or to it; the map stays usable."""
        result = run_python(TRUNCATED, tmp_path, "no")
        assert (result.returncode, result.stdout) == (0, "alive\n"), result.stderr[-500:]

    def test_control(self, tmp_path: Path) -> None:
        """Control: touching that memory kills a process."""
        result = run_python(TRUNCATED, tmp_path, "control")
        assert result.returncode == -signal.SIGBUS
