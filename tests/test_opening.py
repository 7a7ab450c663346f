"""Opening: what is mapped, what is refused, and what is left behind (nothing)."""

from __future__ import annotations

import errno
import fcntl
import gc
import io
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest
from anyio import CapacityLimiter
from anyio.lowlevel import checkpoint

from aiommap import AsyncMmap, Protection, TruncatedError
from aiommap._event_loop import current_event_loop

from .content import (
    file_of,
    gone,
    inc,
    maps_of,
    only_linux,
    open_descriptors,
    settled_descriptors,
)
from .fake_kernel import FakeKernel
from .flushing import mapped_by

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


# What is mapped


@pytest.mark.parametrize("protection", [*Protection, "r", "r+", "c", "rx"])
async def test_open_path(tmp_path: Path, protection: Protection | str) -> None:
    """A whole file by path, with each protection and its value."""
    async with AsyncMmap.open_path(file_of(tmp_path, inc(N)), protection) as m:
        assert m.protection is Protection(protection)
        assert (len(m), m.offset, m.closed) == (N, 0, False)
        assert m.private == (m.protection is COPY)
        assert await m.read_at(0, N) == inc(N)
    assert m.closed


async def test_read_is_the_default(tmp_path: Path) -> None:
    """Without a protection a map is READ."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path) as m:
        assert m.protection is READ
    with open(path, "rb") as file:
        async with AsyncMmap.open(file) as m:
            assert m.protection is READ


async def test_paths_of_every_kind(tmp_path: Path) -> None:
    """A path may be a str, bytes or any os.PathLike."""
    path = file_of(tmp_path, inc(N))
    with os.scandir(tmp_path) as entries:
        for each in (path, str(path), os.fsencode(path), next(entries)):
            async with AsyncMmap.open_path(each) as m:
                assert await m.read_at(0, N) == inc(N)


async def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    """A link to a file is that file."""
    (tmp_path / "link").symlink_to(file_of(tmp_path, inc(N)))
    async with AsyncMmap.open_path(tmp_path / "link") as m:
        assert await m.read_at(0, N) == inc(N)


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [(0, None, N), (1, None, N - 1), (4_095, 2, 2), (4_096, None, N - 4_096), (N - 1, None, 1)],
)
async def test_ranges(tmp_path: Path, offset: int, length: int | None, expected: int) -> None:
    """Any byte offset, any length, by path and by descriptor."""
    path = file_of(tmp_path, inc(N))
    async with AsyncMmap.open_path(path, offset=offset, length=length) as m:
        assert (m.offset, len(m)) == (offset, expected)
        assert await m.read_at(0, expected) == inc(expected, offset)
        assert m.as_slice() == inc(expected, offset)
    with open(path, "rb") as file:
        async with AsyncMmap.open_with_offset(file, "r", offset, length) as m:
            assert (m.offset, len(m)) == (offset, expected)
            assert await m.read_at(0, expected) == inc(expected, offset)


async def test_files_of_every_kind(tmp_path: Path) -> None:
    """A descriptor, a file object, an anyio.AsyncFile, whatever has fileno()."""
    path = file_of(tmp_path, inc(N))
    fd = os.open(path, os.O_RDONLY)
    try:
        async with AsyncMmap.open(fd) as m:
            assert await m.read_at(0, N) == inc(N)
            assert repr(m) == f"<AsyncMmap of {str(path)!r}, {N} bytes from 0, READ, 0 views>"
    finally:
        os.close(fd)
    async with await anyio.open_file(path, "rb") as file, AsyncMmap.open(file) as m:
        assert await m.read_at(0, N) == inc(N)
        assert repr(m) == f"<AsyncMmap of {str(path)!r}, {N} bytes from 0, READ, 0 views>"
    with tempfile.TemporaryFile() as temporary:
        temporary.write(inc(N))
        temporary.flush()
        async with AsyncMmap.open(temporary, "r+") as m:
            assert await m.read_at(0, N) == inc(N)
            assert repr(m) == f"<AsyncMmap of a file, {N} bytes from 0, READ_WRITE, 0 views>"
    with open(path, "rb", buffering=0) as raw:
        async with AsyncMmap.open(raw) as m:
            assert len(m) == N


@only_linux
@pytest.mark.parametrize("populates", [True, False])
async def test_a_descriptor_that_passes_memory_by(tmp_path: Path, populates: bool) -> None:
    """Of a file opened with O_DIRECT, whose reads want aligned buffers, everything works, also
    where the kernel cannot populate pages."""
    path = file_of(tmp_path, inc(N))
    kernel = FakeKernel()
    if not populates:
        kernel.lack("populate")
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError as exc:
        pytest.skip(f"the file system of {tmp_path} has no O_DIRECT: {exc}")
    try:
        m = await mapped_by(kernel).open(fd, "r+")
    finally:
        os.close(fd)
    async with m:
        assert await m.read_at(3, 100) == inc(100, 3)
        assert await m.read_at(0, N) == inc(N)
        buffer = bytearray(7)
        assert await m.readinto_at(9, buffer) == 7
        assert buffer == inc(7, 9)
        async with m.view(1, 8000) as v:
            assert await v.read(7) == inc(7, 1)
        assert await m.find(inc(20, 30)) == 30
        assert await m.write_at(5, b"x" * 5000) == 5000
        await m.move(7000, 5, 1000)
        assert await m.read_at(7000, 1000) == b"x" * 1000
        await m.flush()
        os.truncate(path, 4096)
        with pytest.raises(TruncatedError):
            await m.read_at(4000, 1000)
        with pytest.raises(TruncatedError):
            await m.load(8192, 1000)
        assert await m.read_at(4000, 96) == b"x" * 96
        os.truncate(path, N)


async def test_the_callers_descriptor_is_its_own(tmp_path: Path) -> None:
    """The map neither moves the caller's file position nor closes its descriptor."""
    with open(file_of(tmp_path, inc(N)), "r+b") as file:
        file.seek(5)
        async with AsyncMmap.open(file, "r+") as m:
            await m.read_at(0, 100)
            await m.write_at(0, b"\0")
        assert file.read(3) == inc(3, 5)


async def test_the_callers_descriptor_may_close_once_opening_waits(tmp_path: Path) -> None:
    """A descriptor that is closed while the opening is under way is no matter."""
    file = open(file_of(tmp_path, inc(N)), "rb")  # noqa: SIM115
    opened = []

    async def run() -> None:
        opened.append(await AsyncMmap.open(file))

    async with anyio.create_task_group() as tg:
        tg.start_soon(run)
        await checkpoint()
        await checkpoint()
        file.close()
    async with opened[0] as m:
        assert await m.read_at(0, N) == inc(N)


async def test_the_work_runs_in_a_thread(tmp_path: Path, kernel: FakeKernel) -> None:
    """Mapping happens in a worker; only the duplicate of a descriptor is made on the loop."""
    path = file_of(tmp_path, inc(N))
    async with Mmap.open_path(path) as m:
        assert len(m) == N
    with open(path, "rb") as file:
        async with Mmap.open(file) as m:
            assert len(m) == N
    here = threading.get_ident()
    assert {call.name for call in kernel.calls if call.thread == here} == {"duplicate"}
    assert {"map_file", "file_size"} <= {call.name for call in kernel.calls if call.thread != here}


async def test_limiter(tmp_path: Path, kernel: FakeKernel) -> None:
    """The limiter given bounds the threads of opening, and of everything afterwards."""
    path = file_of(tmp_path, inc(N))
    limiter = CapacityLimiter(1)
    loop = current_event_loop()
    entered = anyio.Event()
    seen = []

    async def run() -> None:
        async with Mmap.open_path(path, limiter=limiter) as m:
            await m.resident()

    with kernel.hold("map_file", on_enter=lambda: loop.post(entered.set)) as hold:
        async with anyio.create_task_group() as tg:
            tg.start_soon(run)
            tg.start_soon(run)
            await entered.wait()
            await anyio.wait_all_tasks_blocked()
            seen.append((limiter.borrowed_tokens, limiter.statistics().tasks_waiting))
            hold.release.set()
    assert seen == [(1, 1)]
    assert limiter.borrowed_tokens == 0


# Openings


async def test_awaited_or_entered_once(tmp_path: Path) -> None:
    """An opening can be awaited or entered, once; a map can be entered later."""
    path = file_of(tmp_path, inc(N))
    opening = AsyncMmap.open_path(path)
    m = await opening
    async with m as entered:
        assert entered is m
    for _ in range(2):
        with pytest.raises(RuntimeError, match="already awaited or entered"):
            await opening
        with pytest.raises(RuntimeError, match="already awaited or entered"):
            async with opening:
                pass


@only_linux
async def test_never_awaited(tmp_path: Path) -> None:
    """Openings that nobody awaits leave nothing behind and warn of nothing."""
    path = file_of(tmp_path, inc(N))
    before = settled_descriptors()
    with open(path, "r+b") as file:
        AsyncMmap.open_path(path)
        AsyncMmap.open(file)
        AsyncMmap.open_with_offset(file, "r+", 1, 1)
        AsyncMmap.create(tmp_path / "new", 100)
        AsyncMmap.anonymous(100)
    gc.collect()
    assert open_descriptors() == before
    assert os.listdir(tmp_path) == ["data.bin"]


async def test_arguments_are_checked_when_called(tmp_path: Path) -> None:
    """Wrong arguments raise in the call, before anything is opened."""
    path = tmp_path / "missing"
    wrong: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: AsyncMmap.open_path(path, "w"), ValueError, "protection 'w' is not known"),
        (lambda: AsyncMmap.open_path(path, None), TypeError, "protection must be"),  # type: ignore[arg-type]
        (lambda: AsyncMmap.open_path(path, offset=-1), ValueError, "offset -1"),
        (lambda: AsyncMmap.open_path(path, offset=2**63), ValueError, "offset 9223372036854775808"),
        (lambda: AsyncMmap.open_path(path, length=0), ValueError, "length must be at least 1"),
        (lambda: AsyncMmap.open_path(path, length=-1), ValueError, "length must be at least 1"),
        (lambda: AsyncMmap.open_path(path, length=2**63), ValueError, "length 922337203"),
        (lambda: AsyncMmap.open_path(path, offset=True), TypeError, "offset must be an integer"),
        (lambda: AsyncMmap.open_path(path, length=1.0), TypeError, "length must be an integer"),  # type: ignore[arg-type]
        (lambda: AsyncMmap.open_path("a\0b"), ValueError, "NUL character"),
        (lambda: AsyncMmap.open_path(b"a\0b"), ValueError, "NUL character"),
        (lambda: AsyncMmap.open_path(3), TypeError, "path must be a string"),  # type: ignore[arg-type]
        (lambda: AsyncMmap.open(-1), ValueError, "-1 is no file descriptor"),
        (lambda: AsyncMmap.open(True), TypeError, "file must be an integer"),
        (lambda: AsyncMmap.open("name"), TypeError, r"for 'name' use open_path"),  # type: ignore[arg-type]
        (lambda: AsyncMmap.open(io.BytesIO()), io.UnsupportedOperation, "fileno"),
        (lambda: AsyncMmap.open_with_offset(0, "r", 0, 0), ValueError, "at least 1"),
    ]
    for call, error, message in wrong:
        with pytest.raises(error, match=message):
            call()


def test_maps_are_not_made_by_calling_the_class() -> None:
    """The class itself is not called by users, and says what is."""
    with pytest.raises(TypeError, match=r"use open_path\(\), open\(\)"):
        AsyncMmap("data.bin")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"use open_path\(\), open\(\)"):
        AsyncMmap()


async def test_what_was_not_awaited_says_so(tmp_path: Path) -> None:
    """Who forgets the await finds it out by printing."""
    opening = AsyncMmap.open_path(file_of(tmp_path, b"x"))
    assert "await it" in repr(opening)
    async with opening:
        assert "used already" in repr(opening)


# What is refused


async def test_empty_file(tmp_path: Path) -> None:
    """An empty file is a ValueError for each way to open it."""
    path = file_of(tmp_path, b"")
    for protection in Protection:
        with pytest.raises(ValueError, match="cannot map the empty file"):
            await AsyncMmap.open_path(path, protection)
    with pytest.raises(ValueError, match="cannot map the empty file"):
        await AsyncMmap.open_path(path, offset=1, length=1)


async def fails(opening: Awaitable[object]) -> OSError:
    """The OSError of an opening; nothing is left of it."""
    before = settled_descriptors() if sys.platform == "linux" else set()
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        await opening
    if sys.platform == "linux":
        assert open_descriptors() == before
    return caught.value


async def test_missing_file(tmp_path: Path) -> None:
    """A missing file is the kernel's error with the path."""
    error = await fails(AsyncMmap.open_path(tmp_path / "missing"))
    assert (error.errno, error.filename) == (errno.ENOENT, str(tmp_path / "missing"))
    error = await fails(AsyncMmap.open_path(os.fsencode(tmp_path / "missing")))
    assert error.filename == os.fsencode(tmp_path / "missing")


@pytest.mark.parametrize("protection", Protection)
async def test_directory(tmp_path: Path, protection: Protection) -> None:
    """A directory is the kernel's error with the path."""
    error = await fails(AsyncMmap.open_path(tmp_path, protection))
    assert error.errno in (errno.EISDIR, errno.ENODEV)
    assert error.filename == str(tmp_path)


@only_linux
@pytest.mark.parametrize("protection", Protection)
async def test_fifo_does_not_hang(tmp_path: Path, protection: Protection) -> None:
    """A FIFO without a writer is an error at once, with the path."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    error = await fails(AsyncMmap.open_path(path, protection))
    assert (error.errno, error.filename) == (errno.ENODEV, str(path))


@only_linux
async def test_pipes_sockets_and_devices(tmp_path: Path) -> None:
    """Descriptors of what has no pages are ENODEV, and so are device files."""
    for read, write in (os.pipe(), [s.detach() for s in socket.socketpair()]):
        for fd in (read, write):
            assert (await fails(AsyncMmap.open(fd))).errno == errno.ENODEV
            os.close(fd)
    for device in ("/dev/null", "/dev/zero"):
        error = await fails(AsyncMmap.open_path(device))
        assert (error.errno, error.filename) == (errno.ENODEV, device)


async def test_write_only_descriptor(tmp_path: Path) -> None:
    """A write-only descriptor is PermissionError, with the path where the object knows it."""
    path = file_of(tmp_path, inc(N))
    for protection in (READ, WRITE, COPY):
        with open(path, "ab") as file:
            error = await fails(AsyncMmap.open(file, protection))
        assert isinstance(error, PermissionError)
        assert error.filename == str(path)


async def test_rights_of_the_descriptor(tmp_path: Path) -> None:
    """A read-only descriptor gives READ and READ_COPY maps, no READ_WRITE."""
    path = file_of(tmp_path, inc(N))
    with open(path, "rb") as file:
        for protection in (READ, COPY, EXECUTE):
            async with AsyncMmap.open(file, protection) as m:
                assert await m.read_at(0, 3) == inc(3)
        assert isinstance(await fails(AsyncMmap.open(file, WRITE)), PermissionError)


async def test_closed_descriptor() -> None:
    """A descriptor that is closed is EBADF; a closed file object says so itself."""
    fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    assert (await fails(AsyncMmap.open(fd))).errno == errno.EBADF
    with open(os.devnull, "rb") as file:
        pass
    with pytest.raises(ValueError, match="closed file"):
        AsyncMmap.open(file)


async def test_copy_needs_permission_to_read_only(tmp_path: Path) -> None:
    """READ_COPY opens the file read-only, as the descriptor shows."""
    path = file_of(tmp_path, inc(N))
    path.chmod(0o444)
    for protection, mode in ((READ, os.O_RDONLY), (COPY, os.O_RDONLY)):
        async with AsyncMmap.open_path(path, protection) as m:
            file = m._core.mapping.file
            assert file is not None
            assert fcntl.fcntl(file.fd, fcntl.F_GETFL) & os.O_ACCMODE == mode
            assert fcntl.fcntl(file.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


# What is left behind


@only_linux
@pytest.mark.parametrize("call", ["file_size", "map_file", "file_is_in_memory"])
async def test_failures_leave_nothing(tmp_path: Path, kernel: FakeKernel, call: str) -> None:
    """Wherever opening fails, descriptor and map are gone, and the error has the path."""
    path = file_of(tmp_path, inc(N))
    before = settled_descriptors()
    kernel.fail(call, errno.EIO)
    error = await fails(Mmap.open_path(path))
    assert (error.errno, error.filename) == (errno.EIO, str(path))
    with open(path, "rb") as file:
        error = await fails(Mmap.open(file))
        assert (error.errno, error.filename) == (errno.EIO, str(path))
    assert open_descriptors() == before
    assert maps_of(path) == 0


@only_linux
async def test_cancelled_before_it_begins(tmp_path: Path, kernel: FakeKernel) -> None:
    """In a cancelled scope nothing is opened."""
    path = file_of(tmp_path, inc(N))
    before = settled_descriptors()
    with open(path, "rb") as file:
        for opening in (Mmap.open_path(path), Mmap.open(file), Mmap.anonymous(10)):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await opening
            assert scope.cancelled_caught
    assert kernel.names("map_file", "map_memory", "memory_file") == []
    assert open_descriptors() == before


@only_linux
@pytest.mark.parametrize("call", ["file_size", "map_file"])
async def test_cancelled_in_the_middle(tmp_path: Path, kernel: FakeKernel, call: str) -> None:
    """Cancelled while the worker is at it, the worker is waited for, and nothing is left."""
    path = file_of(tmp_path, inc(N))
    before = settled_descriptors()
    loop = current_event_loop()
    entered = anyio.Event()
    with kernel.hold(call, on_enter=lambda: loop.post(entered.set)) as hold:
        async with anyio.create_task_group() as tg:

            async def run() -> None:
                await Mmap.open_path(path)

            tg.start_soon(run)
            await entered.wait()
            tg.cancel_scope.cancel()
            hold.release.set()
    with anyio.fail_after(10):
        while maps_of(path) or open_descriptors() != before:
            await checkpoint()


@only_linux
async def test_opening_and_closing_leaves_nothing(tmp_path: Path) -> None:
    """After the block descriptor and map are gone at once."""
    path = file_of(tmp_path, inc(N))
    before = settled_descriptors()
    for protection in Protection:
        async with AsyncMmap.open_path(path, protection) as m:
            await m.read_at(0, N)
            assert maps_of(path) == 1
        assert maps_of(path) == 0
        assert open_descriptors() == before


@only_linux
async def test_a_dropped_map_warns_and_is_unmapped(tmp_path: Path) -> None:
    """A map that is dropped without being closed is a ResourceWarning, and goes."""
    path = file_of(tmp_path, inc(N))
    before = settled_descriptors()
    m = await AsyncMmap.open_path(path)
    with pytest.warns(ResourceWarning, match=r"AsyncMmap of .* was dropped without being closed"):
        del m
        gc.collect()
    gc.collect()  # the recorded warning has the map as its source
    await gone(path)  # a worker unmaps
    assert open_descriptors() == before
