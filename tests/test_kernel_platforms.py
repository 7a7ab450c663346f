"""The portable, macOS and Windows modules: which calls they make, in which order.

macOS and Windows run over simulated system calls (:mod:`tests.foreign_platforms`); what the real
systems answer is not tested here.
"""

from __future__ import annotations

import sys

import anyio
import pytest

if sys.platform != "linux":
    pytest.skip("the stand-ins are built out of Linux calls", allow_module_level=True)

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

from aiommap import AsyncMmap, FlushError, TruncatedError
from aiommap._event_loop import current_event_loop
from aiommap._kernel import _pipe_copy, _portable, _posix, address_of
from aiommap._kernel._guarded_copy import copy_until_missing
from aiommap._kernel._map_registry import MapRegistry
from aiommap._options import Advice, Protection

from .fake_kernel import FakeKernel
from .flushing import mapped_by
from .foreign_platforms import Darwin, Windows
from .kernel_witnesses import PAGE, Answers, OpenFile, pattern, run_python


@pytest.fixture
def darwin(monkeypatch: pytest.MonkeyPatch) -> Darwin:
    return Darwin(monkeypatch)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Windows:
    return Windows(monkeypatch)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[OpenFile]:
    with OpenFile(tmp_path / "file") as opened:
        yield opened


# The portable module


def test_portable_reads_without_preadv(monkeypatch: pytest.MonkeyPatch, file: OpenFile) -> None:
    """pread, which POSIX has, gives the same bytes into the same buffers."""
    monkeypatch.delattr(os, "preadv")
    first, second, third = bytearray(10), bytearray(b"x" * PAGE), bytearray(b"x")
    assert _portable.read(file.fd, [first, memoryview(second), third], 4 * PAGE - 15) == 15
    assert first == b"\3" * 10
    assert second[:6] == b"\3" * 5 + b"x"
    assert third == b"x"


def test_portable_never_asks_for_more_than_macos_reads(
    monkeypatch: pytest.MonkeyPatch, file: OpenFile
) -> None:
    """Buffers beyond the limit of one call are cut, and the read is short."""
    monkeypatch.setattr(_portable, "_READ_MOST", 15)
    first, second = bytearray(10), bytearray(b"x" * 10)
    assert _portable.read(file.fd, [first, second, bytearray(1)], PAGE) == 15
    assert second == b"\1" * 5 + b"x" * 5


@pytest.mark.parametrize("name", ["sync_data", "sync_all"])
def test_portable_hands_over_every_writable_map_before_it_syncs(
    monkeypatch: pytest.MonkeyPatch, file: OpenFile, name: str
) -> None:
    """POSIX lets fsync ignore stores through maps, so each map is msynced first, all of it."""
    order: list[object] = []
    real = _portable._msync
    assert real is not None

    def record(address: int, length: int, flags: int) -> int:
        order.append(address)
        return real(address, length, flags)

    monkeypatch.setattr(_portable, "_msync", record)
    monkeypatch.setattr(_portable, "_sync_descriptor", lambda fd: order.append("sync"))
    monkeypatch.setattr(os, "fsync", lambda fd: order.append("sync"))
    other_fd = os.open(file.path, os.O_RDWR)
    first = _portable.map_file(file.fd, PAGE, Protection.READ_WRITE, 0)
    second = _portable.map_file(other_fd, PAGE, Protection.READ_WRITE, 2 * PAGE)
    reader = _portable.map_file(file.fd, PAGE, Protection.READ, 0)
    getattr(_portable, name)(file.fd)
    assert order[-1] == "sync"
    assert set(order[:-1]) == {address_of(first), address_of(second)}
    assert len(reader) == PAGE
    order.clear()
    del first, second
    getattr(_portable, name)(file.fd)
    assert order == ["sync"]
    os.close(other_fd)


def test_portable_flushes_without_knowing_the_flags(
    monkeypatch: pytest.MonkeyPatch, file: OpenFile
) -> None:
    """On a system whose MS_SYNC we do not know, mmap.flush() does it, for the same range."""
    flushed: list[tuple[int, int]] = []

    class Memory(mmap.mmap):
        def flush(self, offset: int = 0, size: int = 0) -> None:
            flushed.append((offset, size))

    monkeypatch.setattr(_portable, "_MSYNC_FLAGS", None)
    registry = MapRegistry()
    monkeypatch.setattr(_portable, "maps", registry)
    memory = Memory(file.fd, 4 * PAGE)
    registry.add(file.fd, memory, 0, writable=True)
    _portable.sync_range(address_of(memory) + PAGE, 2 * PAGE)
    _portable.write_back(file.fd, address_of(memory), 0, PAGE)
    _portable.start_write_back(file.fd, address_of(memory), 0, PAGE)
    assert flushed == [(PAGE, 2 * PAGE)]
    assert not _portable.capabilities(None).write_back_start


def test_portable_without_posix_fallocate_reserves_nothing(
    monkeypatch: pytest.MonkeyPatch, file: OpenFile
) -> None:
    """False, and the file is as it was."""
    monkeypatch.delattr(os, "posix_fallocate")
    assert not _portable.reserve(file.fd, 0, 16 * PAGE, grow=True)
    assert os.fstat(file.fd).st_size == 4 * PAGE


@pytest.mark.parametrize(
    ("function", "name", "error"),
    [
        ("_mincore", "resident", errno.ENOSYS),
        ("_mlock", "pin", errno.ENOSYS),
        ("_munlock", "unpin", errno.ENOSYS),
    ],
)
def test_portable_without_a_call_is_an_error(
    monkeypatch: pytest.MonkeyPatch, function: str, name: str, error: int
) -> None:
    """A C library without mincore (OpenBSD) or mlock is an error that says so."""
    monkeypatch.setattr(_posix, function, None)
    with pytest.raises(OSError, match="not implemented") as caught:
        getattr(_portable, name)(0, PAGE)
    assert caught.value.errno == error


def test_portable_search_without_memmem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every C library has memmem; bytearray.find gives the same answer."""
    monkeypatch.setattr(_posix, "_memmem", None)
    assert _portable.search(bytearray(b"xaxa"), 4, b"xa", last=False) == 0
    assert _portable.search(bytearray(b"xaxa"), 4, b"xa", last=True) == 2


def test_a_forked_child_has_a_pipe_of_its_own() -> None:
    """Two processes that copied through one pipe would get each other's bytes."""
    script = """
        import os, sys
        from aiommap._kernel import _portable, address_of

        def rounds(byte):
            source, target = bytes([byte]) * 60_000, bytearray(60_000)
            for _ in range(300):
                assert _portable.copy(address_of(target), address_of(source), 60_000) == 60_000
                if target != source:
                    return False
            return True

        assert rounds(1)
        child = os.fork()
        good = rounds(2 if child else 3)
        if child == 0:
            os._exit(0 if good else 1)
        status = os.waitpid(child, 0)[1]
        print(good, os.waitstatus_to_exitcode(status))
        """
    assert run_python(script).split() == ["True", "0"]


def test_a_thread_takes_its_pipe_with_it() -> None:
    """The descriptors of the guarded copy are closed when the thread has ended."""
    target = bytearray(1)
    _portable.copy(address_of(target), address_of(b"x"), 1)
    before = len(os.listdir("/proc/self/fd"))

    def work() -> None:
        _portable.copy(address_of(target), address_of(b"x"), 1)

    for _ in range(5):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_pipe_reports_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not EFAULT is no missing page."""
    monkeypatch.setattr(_pipe_copy, "_raw_write", Answers(errno.EBADF))
    with pytest.raises(OSError, match="Bad file descriptor"):
        _portable.copy(0, 0, 10)


# What the platform modules share


@pytest.mark.parametrize("missing", [0, 1, 99, 100, 350, 999])
def test_copy_until_missing_ends_at_the_page(missing: int) -> None:
    """The copy stops at the missing page's first byte, wherever the pieces begin."""
    tried: list[tuple[int, int]] = []

    def carry(destination: int, source: int, length: int) -> int:
        tried.append((source, length))
        first_missing = missing - missing % 100
        return 0 if source + length > first_missing else length

    if missing < 100:
        with pytest.raises(OSError, match="Bad address"):
            copy_until_missing(40, 0, 1000, carry=carry, most=400, page_size=100)
    else:
        done = copy_until_missing(40, 0, 1000, carry=carry, most=400, page_size=100)
        assert done == missing - missing % 100
    assert all(length <= 400 for _, length in tried)


def test_the_registry_forgets_maps_that_are_gone(file: OpenFile) -> None:
    """Maps are found by file and by address while they live, and no longer."""
    registry = MapRegistry()
    memory = mmap.mmap(file.fd, 2 * PAGE)
    registry.add(file.fd, memory, 0, writable=True)
    address = address_of(memory)
    other = os.open(file.path, os.O_RDONLY)
    assert [found.memory for found in registry.of_file(other)] == [memory]
    found = registry.at(address + 2 * PAGE - 1)
    assert found is not None
    assert (found.fd, found.offset, found.writable) == (file.fd, 0, True)
    assert registry.at(address + 2 * PAGE) is None
    del found, memory
    assert registry.of_file(other) == []
    assert registry.at(address) is None
    os.close(other)


def test_the_registry_does_not_hand_out_a_number_that_is_another_file_now(
    file: OpenFile, tmp_path: Path
) -> None:
    """A map that outlives its descriptor is not synced through whoever has the number next."""
    registry = MapRegistry()
    fd = os.open(file.path, os.O_RDWR)
    memory = mmap.mmap(fd, PAGE)
    registry.add(fd, memory, 0, writable=True)
    assert registry.at(address_of(memory)) is not None
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    os.dup2(other, fd)
    assert registry.at(address_of(memory)) is None
    os.close(other)
    os.close(fd)


@pytest.mark.parametrize(
    ("system", "module"),
    [("linux", "_linux"), ("darwin", "_darwin"), ("freebsd14", "_portable")],
)
def test_the_platform_chooses_the_module(system: str, module: str) -> None:
    """Each system gets its own file, and one without a file the portable one."""
    script = f"""
        import ctypes, fcntl, mmap, os, resource, sys, tempfile, threading
        sys.platform = {system!r}
        from aiommap._kernel import native
        print(native.__name__)
        """
    assert run_python(script).split() == [f"aiommap._kernel.{module}"]


def test_windows_chooses_the_windows_module() -> None:
    """With kernel32 and msvcrt there, the Windows module is the native one."""
    script = """
        import array, ctypes, mmap, os, shutil, sys, tempfile, types
        sys.platform = "win32"
        sys.modules["msvcrt"] = types.ModuleType("msvcrt")

        class Library:
            def __getitem__(self, name):
                return types.SimpleNamespace()

        ctypes.WinDLL = lambda name, use_last_error: Library()
        from aiommap._kernel import native
        print(native.__name__)
        """
    assert run_python(script).split() == ["aiommap._kernel._windows"]


# macOS


@pytest.mark.parametrize("name", ["sync_data", "sync_all"])
def test_darwin_syncs_maps_first_and_then_to_the_medium(
    darwin: Darwin, file: OpenFile, name: str
) -> None:
    """msync with MS_SYNC for each writable map, then F_FULLFSYNC; fsync would stop short."""
    maps = [darwin.module.map_file(file.fd, PAGE, Protection.READ_WRITE, 0) for _ in range(2)]
    maps.append(darwin.module.map_file(file.fd, PAGE, Protection.READ, 0))
    darwin.calls.clear()
    getattr(darwin.module, name)(file.fd)
    assert darwin.calls == [
        ("msync", Darwin.MSYNC_SYNC),
        ("msync", Darwin.MSYNC_SYNC),
        ("fcntl", Darwin.FULLFSYNC),
    ]


def test_darwin_syncs_a_range_to_the_medium(darwin: Darwin, file: OpenFile) -> None:
    """msync of the range, then F_FULLFSYNC of the map's file; memory has no file."""
    memory = darwin.module.map_file(file.fd, 4 * PAGE, Protection.READ_WRITE, 0)
    anonymous = darwin.module.map_memory(PAGE, Protection.READ_WRITE, stack=False, huge=False)
    darwin.calls.clear()
    darwin.module.sync_range(address_of(memory) + PAGE, PAGE)
    assert darwin.calls == [("msync", Darwin.MSYNC_SYNC), ("fcntl", Darwin.FULLFSYNC)]
    darwin.calls.clear()
    darwin.module.sync_range(address_of(anonymous), PAGE)
    assert darwin.calls == [("msync", Darwin.MSYNC_SYNC)]


@pytest.mark.parametrize("error", [errno.ENOTSUP, errno.EINVAL, errno.ENOTTY])
def test_darwin_goes_as_far_as_the_file_system_can(
    darwin: Darwin, file: OpenFile, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """Network and FUSE file systems have no F_FULLFSYNC: fsync, which they have."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    darwin.refused[Darwin.FULLFSYNC] = [error]
    darwin.module.sync_data(file.fd)
    assert synced == [file.fd]
    darwin.refused[Darwin.FULLFSYNC] = [error]
    assert not darwin.module.capabilities(str(file.path)).full_sync


def test_darwin_reports_what_the_medium_says(darwin: Darwin, file: OpenFile) -> None:
    """EIO is no missing feature, and no fsync may paint it over."""
    darwin.refused[Darwin.FULLFSYNC] = [errno.EIO]
    with pytest.raises(OSError, match="Input/output error"):
        darwin.module.sync_data(file.fd)
    assert darwin.calls == [("fcntl", Darwin.FULLFSYNC, "refused")]


def test_darwin_flushes_before_it_maps(darwin: Darwin, file: OpenFile) -> None:
    """mmap.mmap() flushes the file with the GIL held and drops the error; ours comes before."""
    memory = darwin.module.map_file(file.fd, PAGE, Protection.READ_WRITE, 0)
    assert len(memory) == PAGE
    assert darwin.calls == [("fcntl", Darwin.FULLFSYNC)]
    darwin.refused[Darwin.FULLFSYNC] = [errno.EIO]
    with pytest.raises(OSError, match="Input/output error"):
        darwin.module.map_file(file.fd, PAGE, Protection.READ_WRITE, 0)


READING = [each for each in Protection if each is not Protection.READ_WRITE]


@pytest.mark.parametrize("protection", READING)
@pytest.mark.parametrize("error", [errno.EROFS, errno.EIO])
def test_darwin_maps_for_reading_what_it_cannot_flush(
    darwin: Darwin, file: OpenFile, protection: Protection, error: int
) -> None:
    """Who only reads the file has nothing to flush, and no use for the error."""
    darwin.refused[Darwin.FULLFSYNC] = [error]
    memory = darwin.module.map_file(file.fd, PAGE, protection, 0)
    assert len(memory) == PAGE
    assert darwin.calls == [("fcntl", Darwin.FULLFSYNC, "refused")]


@pytest.mark.anyio
@pytest.mark.parametrize("protection", READING)
async def test_darwin_opens_files_on_a_read_only_volume(
    darwin: Darwin, file: OpenFile, protection: Protection
) -> None:
    """HFS answers every flush there with EROFS; reading takes none."""
    darwin.read_only = True
    async with mapped_by(darwin.module).open_path(file.path, protection) as m:
        assert await m.read_at(PAGE, 3) == b"\1\1\1"
        await m.flush()


def _set_read_only(m: AsyncMmap) -> Awaitable[None]:
    return m.set_protection("r")


def _shrink(m: AsyncMmap) -> Awaitable[None]:
    return m.resize(PAGE)


def _grow(m: AsyncMmap) -> Awaitable[None]:
    return m.resize(8 * PAGE)


@pytest.mark.anyio
@pytest.mark.parametrize("change", [_set_read_only, _shrink, _grow])
@pytest.mark.parametrize("cut", [False, True])
async def test_darwin_a_flush_that_fails_in_a_change_stays_failed(
    darwin: Darwin, file: OpenFile, change: Callable[[AsyncMmap], Awaitable[None]], cut: bool
) -> None:
    """The device says once that it could not write; every flush from then on is a FlushError."""
    async with mapped_by(darwin.module).open_path(file.path, "r+") as m:
        await m.write_at(0, b"data")
        if cut:  # by somebody else, to less than half
            os.ftruncate(file.fd, PAGE)
        darwin.refused[Darwin.FULLFSYNC] = [errno.EIO]
        with suppress(TruncatedError):
            await change(m)
        assert darwin.refused[Darwin.FULLFSYNC] == []
        for _ in range(2):
            with pytest.raises(FlushError, match="Input/output error"):
                await m.flush()
        await m.clear_flush_error()
        os.ftruncate(file.fd, 8 * PAGE)
        await m.flush()


@pytest.mark.anyio
async def test_darwin_flushes_before_a_change_what_was_written(
    darwin: Darwin, file: OpenFile
) -> None:
    """The maps are handed over first, as by any flush; without a store there is nothing to do."""
    async with mapped_by(darwin.module).open_path(file.path, "r+") as m:
        darwin.calls.clear()
        await m.set_protection("r")
        assert darwin.calls == [("fcntl", Darwin.FULLFSYNC)]
        await m.set_protection("r+")
        await m.write_at(0, b"data")
        darwin.calls.clear()
        await m.set_protection("r")
        assert darwin.calls == [
            ("msync", Darwin.MSYNC_SYNC),
            ("fcntl", Darwin.FULLFSYNC),
            ("fcntl", Darwin.FULLFSYNC),
        ]


def test_darwin_syncs_directories_to_the_medium(darwin: Darwin, tmp_path: Path) -> None:
    """A name is durable by F_FULLFSYNC too."""
    darwin.module.sync_directory(str(tmp_path))
    assert darwin.calls == [("fcntl", Darwin.FULLFSYNC)]


def test_darwin_starts_write_back_without_waiting(darwin: Darwin, file: OpenFile) -> None:
    """MS_ASYNC starts it, MS_SYNC waits for it."""
    memory = darwin.module.map_file(file.fd, PAGE, Protection.READ_WRITE, 0)
    darwin.calls.clear()
    darwin.module.start_write_back(file.fd, address_of(memory), 0, PAGE)
    darwin.module.write_back(file.fd, address_of(memory), 0, PAGE)
    assert darwin.calls == [("msync", Darwin.MSYNC_ASYNC), ("msync", Darwin.MSYNC_SYNC)]


def test_darwin_preallocates_in_one_piece_or_in_several(darwin: Darwin, file: OpenFile) -> None:
    """F_ALLOCATECONTIG first; a disk that is too scattered gets F_ALLOCATEALL."""
    darwin.refused[Darwin.PREALLOCATE] = [errno.ENOSPC]
    assert darwin.module.reserve(file.fd, 0, 16 * PAGE, grow=True)
    assert darwin.calls == [
        ("fcntl", Darwin.PREALLOCATE, "refused"),
        ("fcntl", Darwin.PREALLOCATE, 4, 12 * PAGE),
    ]
    assert os.fstat(file.fd).st_size == 16 * PAGE


def test_darwin_asks_only_for_what_is_missing(darwin: Darwin, file: OpenFile) -> None:
    """Blocks are counted from the end of those that the file has, so a second call adds none."""
    assert darwin.module.reserve(file.fd, 0, 16 * PAGE, grow=False)
    assert darwin.module.reserve(file.fd, 0, 16 * PAGE, grow=True)
    assert darwin.calls == [("fcntl", Darwin.PREALLOCATE, 6, 12 * PAGE)]


def test_darwin_full_disk_and_missing_preallocation(darwin: Darwin, file: OpenFile) -> None:
    """ENOSPC both ways is the caller's; a file system without it is False."""
    darwin.refused[Darwin.PREALLOCATE] = [errno.ENOSPC, errno.ENOSPC]
    with pytest.raises(OSError, match="No space left"):
        darwin.module.reserve(file.fd, 0, 16 * PAGE, grow=True)
    assert os.fstat(file.fd).st_size == 4 * PAGE
    darwin.refused[Darwin.PREALLOCATE] = [errno.ENOTSUP]
    assert not darwin.module.reserve(file.fd, 0, 16 * PAGE, grow=True)
    assert os.fstat(file.fd).st_size == 4 * PAGE


def test_darwin_reads_ahead_in_pieces_that_fit_an_int(darwin: Darwin, file: OpenFile) -> None:
    """struct radvisory counts in an int: larger ranges take several calls."""
    darwin.module.will_need(file.fd, PAGE, (1 << 32) + 1)
    pieces = [int.from_bytes(call[2][8:12], "little") for call in darwin.calls]
    starts = [int.from_bytes(call[2][:8], "little") for call in darwin.calls]
    assert all(len(call[2]) == 16 for call in darwin.calls)
    assert pieces == [2**31 - 1, 2**31 - 1, 3]
    assert starts == [PAGE, PAGE + 2**31 - 1, PAGE + 2**32 - 2]


# Windows


@pytest.mark.parametrize("name", ["sync_data", "sync_all"])
def test_windows_flushes_views_and_then_the_file(
    windows: Windows, file: OpenFile, name: str
) -> None:
    """FlushViewOfFile writes each writable view, FlushFileBuffers makes it durable."""
    memory = windows.module.map_file(file.fd, 2 * PAGE, Protection.READ_WRITE, PAGE)
    reader = windows.module.map_file(file.fd, PAGE, Protection.READ, 0)
    getattr(windows.module, name)(file.fd)
    assert windows.calls == [
        ("FlushViewOfFile", address_of(memory), 2 * PAGE),
        ("FlushFileBuffers", file.fd),
    ]
    assert len(reader) == PAGE


def test_windows_syncs_a_range(windows: Windows, file: OpenFile) -> None:
    """The range's view, then its file; a length of 0 would be the whole view and is nothing."""
    memory = windows.module.map_file(file.fd, 4 * PAGE, Protection.READ_WRITE, 0)
    address = address_of(memory)
    windows.module.sync_range(address + PAGE, PAGE)
    windows.module.sync_range(address, 0)
    windows.module.write_back(file.fd, address, 0, 0)
    assert windows.calls == [
        ("FlushViewOfFile", address + PAGE, PAGE),
        ("FlushFileBuffers", file.fd),
    ]


def test_windows_tries_again_after_a_lock_violation(windows: Windows, file: OpenFile) -> None:
    """ERROR_LOCK_VIOLATION passes, so the flush is tried again after growing pauses."""
    memory = windows.module.map_file(file.fd, PAGE, Protection.READ_WRITE, 0)
    windows.refused["FlushViewOfFile"] = [Windows.ERROR_LOCK_VIOLATION] * 3
    windows.module.sync_data(file.fd)
    assert windows.calls == [
        ("FlushViewOfFile", "refused"),
        ("Sleep", 0),
        ("FlushViewOfFile", "refused"),
        ("Sleep", 1),
        ("FlushViewOfFile", "refused"),
        ("Sleep", 2),
        ("FlushViewOfFile", address_of(memory), PAGE),
        ("FlushFileBuffers", file.fd),
    ]


def test_windows_gives_up_on_a_lock_violation_that_stays(windows: Windows, file: OpenFile) -> None:
    """After a bounded time the error is the caller's, and the file was not called flushed."""
    memory = windows.module.map_file(file.fd, PAGE, Protection.READ_WRITE, 0)
    windows.refused["FlushViewOfFile"] = [Windows.ERROR_LOCK_VIOLATION] * 1000
    with pytest.raises(OSError, match="error 33") as caught:
        windows.module.sync_data(file.fd)
    assert getattr(caught.value, "winerror", None) == Windows.ERROR_LOCK_VIOLATION
    pauses = [call[1] for call in windows.calls if call[0] == "Sleep"]
    assert sum(pauses) < 1000
    assert ("FlushFileBuffers", file.fd) not in windows.calls
    assert len(memory) == PAGE


def test_windows_other_errors_are_not_tried_again(windows: Windows, file: OpenFile) -> None:
    """A disk error is an error at once, with an errno that means it."""
    memory = windows.module.map_file(file.fd, PAGE, Protection.READ_WRITE, 0)
    windows.refused["FlushViewOfFile"] = [1117]
    with pytest.raises(OSError, match="error 1117 of Windows") as caught:
        windows.module.sync_data(file.fd)
    assert caught.value.errno == errno.EIO
    windows.refused["FlushFileBuffers"] = [112]
    with pytest.raises(OSError, match="error 112 of Windows") as caught:
        windows.module.sync_data(file.fd)
    assert caught.value.errno == errno.ENOSPC
    assert len(memory) == PAGE


def test_windows_reads_by_offset_beyond_32_bits(windows: Windows, file: OpenFile) -> None:
    """The offset is split into the two halves of OVERLAPPED."""
    os.ftruncate(file.fd, (5 << 32) + 3)
    os.pwrite(file.fd, b"far", 5 << 32)
    buffer = bytearray(10)
    assert windows.module.read(file.fd, [buffer], 5 << 32) == 3
    assert buffer[:3] == b"far"
    assert windows.calls == [("ReadFile", 10, 5 << 32)]


def test_windows_grows_without_writing_zeros(windows: Windows, file: OpenFile) -> None:
    """The size is set, not written: FileEndOfFileInfo."""
    windows.module.set_file_size(file.fd, 1 << 30)
    assert windows.calls == [("SetFileInformationByHandle", 6, 1 << 30)]


def test_windows_does_not_cut_a_file_that_is_mapped(windows: Windows, file: OpenFile) -> None:
    """ERROR_USER_MAPPED_FILE, as long as there is a map of whatever part of it."""
    assert not windows.module.cuts_mapped_files
    memory = windows.module.map_file(file.fd, PAGE, Protection.READ, 0)
    with pytest.raises(OSError, match="error 1224"):
        windows.module.set_file_size(file.fd, 3 * PAGE)
    windows.module.set_file_size(file.fd, 5 * PAGE)
    memory.close()
    del memory
    windows.module.set_file_size(file.fd, PAGE)
    assert os.fstat(file.fd).st_size == PAGE


@pytest.mark.anyio
async def test_windows_refuses_to_shrink_a_map_of_a_file(windows: Windows, file: OpenFile) -> None:
    """An error with the path, before anything has changed; growing, and memory, are fine."""
    async with mapped_by(windows.module).open_path(file.path, "r+", offset=PAGE) as m:
        address = m.ptr()
        with pytest.raises(OSError, match="cannot cut a file that is mapped") as caught:
            await m.resize(PAGE)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOTSUP, str(file.path))
        assert (m.ptr(), len(m), os.fstat(file.fd).st_size) == (address, 3 * PAGE, 4 * PAGE)
        assert windows.calls == []
        await m.resize(5 * PAGE)
        assert (len(m), os.fstat(file.fd).st_size) == (5 * PAGE, 6 * PAGE)
        assert await m.read_at(0, 1) == b"\1"
    async with mapped_by(windows.module).anonymous(3 * PAGE) as m:
        await m.resize(PAGE)
        assert len(m) == PAGE


@pytest.mark.anyio
async def test_windows_a_map_that_cannot_grow_says_why(
    windows: Windows, file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file keeps its new size where it cannot be cut; the first error is the caller's."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    async with mapped_by(windows.module).open_path(file.path, "r+") as m:
        monkeypatch.setattr(windows.module, "map_file", refuse)
        with pytest.raises(OSError, match="Cannot allocate memory"):
            await m.resize(8 * PAGE)
        assert (len(m), os.fstat(file.fd).st_size) == (4 * PAGE, 8 * PAGE)


def test_windows_keeps_the_name_of_a_file_in_use(windows: Windows, tmp_path: Path) -> None:
    """ERROR_SHARING_VIOLATION, for what is open and for what is only mapped."""
    path = tmp_path / "file"
    with OpenFile(path) as opened:
        with pytest.raises(PermissionError, match="error 32"):
            os.unlink(path)
        memory = windows.module.map_file(opened.fd, PAGE, Protection.READ, 0)
    with pytest.raises(PermissionError, match="error 32"):
        os.unlink(path)
    memory.close()
    os.unlink(path)
    assert os.listdir(tmp_path) == []


CREATING = ("reserve", "sync_all", "sync_directory", "map_file")


@pytest.mark.anyio
@pytest.mark.parametrize("call", CREATING)
async def test_windows_a_create_that_fails_leaves_no_file(
    windows: Windows, tmp_path: Path, call: str
) -> None:
    """It is unlinked after it was closed; a file that was there stays."""
    kernel = FakeKernel(windows.module)
    kernel.fail(call, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        await mapped_by(kernel).create(tmp_path / "new", PAGE)
    assert os.listdir(tmp_path) == []
    (tmp_path / "old").write_bytes(b"old")
    with pytest.raises(OSError, match="Input/output error"):
        await mapped_by(kernel).create(tmp_path / "old", PAGE, exist_ok=True)
    assert (tmp_path / "old").read_bytes()[:3] == b"old"
    os.unlink(tmp_path / "old")  # it is closed


@pytest.mark.anyio
@pytest.mark.parametrize("call", CREATING)
async def test_windows_a_create_that_is_cancelled_leaves_no_file(
    windows: Windows, tmp_path: Path, call: str
) -> None:
    """It is unlinked after it was unmapped and closed."""
    kernel = FakeKernel(windows.module)
    loop = current_event_loop()
    entered = anyio.Event()
    with kernel.hold(call, on_enter=lambda: loop.post(entered.set)) as hold:
        async with anyio.create_task_group() as tg:

            async def run() -> None:
                await mapped_by(kernel).create(tmp_path / "new", PAGE)

            tg.start_soon(run)
            await entered.wait()
            tg.cancel_scope.cancel()
            hold.release.set()
    assert os.listdir(tmp_path) == []


def test_windows_reserves_upwards_only(windows: Windows, file: OpenFile) -> None:
    """The allocation grows to the end of the range; below the size it would cut the file."""
    assert windows.module.reserve(file.fd, 0, PAGE, grow=True)
    assert windows.calls == []
    assert windows.module.reserve(file.fd, 0, 16 * PAGE, grow=False)
    assert windows.module.reserve(file.fd, 0, 16 * PAGE, grow=True)
    assert windows.calls == [
        ("SetFileInformationByHandle", 5, 16 * PAGE),
        ("SetFileInformationByHandle", 6, 16 * PAGE),
    ]


@pytest.mark.parametrize("attribute", [0x200, 0x800])
def test_windows_cannot_reserve_in_sparse_and_compressed_files(
    windows: Windows, file: OpenFile, attribute: int
) -> None:
    """They can have holes, which nothing fills in place."""
    windows.attributes |= attribute
    assert not windows.module.reserve(file.fd, 0, PAGE, grow=False)


def test_windows_reserves_on_fat(windows: Windows, file: OpenFile) -> None:
    """FAT and exFAT do not know every query; what they cannot tell is False and no error."""
    windows.fat = True
    assert windows.module.reserve(file.fd, 0, 16 * PAGE, grow=True)
    assert os.fstat(file.fd).st_size == 16 * PAGE
    for answers in ([87], [0, 87]):
        windows.refused["GetFileInformationByHandleEx"] = answers
        assert not windows.module.reserve(file.fd, 0, 32 * PAGE, grow=True)
    assert os.fstat(file.fd).st_size == 16 * PAGE


@pytest.mark.anyio
async def test_windows_creates_and_grows_on_fat(windows: Windows, tmp_path: Path) -> None:
    """create() and resize() make files on a memory card too."""
    windows.fat = True
    async with mapped_by(windows.module).create(tmp_path / "new", 4 * PAGE) as m:
        await m.resize(16 * PAGE)
    assert (tmp_path / "new").stat().st_size == 16 * PAGE


def test_windows_reports_a_full_disk_and_a_file_system_that_cannot(
    windows: Windows, file: OpenFile
) -> None:
    """ERROR_DISK_FULL is ENOSPC, ERROR_NOT_SUPPORTED is False."""
    windows.refused["SetFileInformationByHandle"] = [112]
    with pytest.raises(OSError, match="error 112 of Windows") as caught:
        windows.module.reserve(file.fd, 0, 16 * PAGE, grow=True)
    assert caught.value.errno == errno.ENOSPC
    windows.refused["SetFileInformationByHandle"] = [50]
    assert not windows.module.reserve(file.fd, 0, 16 * PAGE, grow=True)
    assert os.fstat(file.fd).st_size == 4 * PAGE


def test_windows_prefetches_what_is_mapped(windows: Windows, file: OpenFile) -> None:
    """will_need of a file range becomes a prefetch of the map's part of it."""
    memory = windows.module.map_file(file.fd, 2 * PAGE, Protection.READ, PAGE)
    windows.module.will_need(file.fd, 2 * PAGE, 8 * PAGE)
    windows.module.will_need(file.fd, 0, PAGE)
    windows.module.advise(address_of(memory), PAGE, Advice.WILL_NEED)
    assert windows.calls == [
        ("PrefetchVirtualMemory", address_of(memory) + PAGE, PAGE),
        ("PrefetchVirtualMemory", address_of(memory), PAGE),
    ]


def test_windows_7_has_no_prefetch(monkeypatch: pytest.MonkeyPatch, file: OpenFile) -> None:
    """Functions that an older Windows lacks are left out, or are an error that says so."""
    windows = Windows(monkeypatch, "PrefetchVirtualMemory", "K32QueryWorkingSetEx")
    memory = windows.module.map_file(file.fd, PAGE, Protection.READ, 0)
    windows.module.will_need(file.fd, 0, PAGE)
    with pytest.raises(OSError, match="not supported"):
        windows.module.advise(address_of(memory), PAGE, Advice.WILL_NEED)
    with pytest.raises(OSError, match="not implemented"):
        windows.module.resident(address_of(memory), PAGE)
    assert not windows.module.capabilities(None).mincore


def test_windows_copy_does_not_believe_the_count_of_a_failed_call(
    windows: Windows, file: OpenFile
) -> None:
    """The count is reckoned from the source even when the destination failed."""
    memory = windows.module.map_file(file.fd, 4 * PAGE, Protection.READ_WRITE, 0)
    os.ftruncate(file.fd, 2 * PAGE)
    source = pattern(4 * PAGE)
    assert windows.module.copy(address_of(memory), address_of(source), 4 * PAGE) == 2 * PAGE
    assert os.pread(file.fd, 4 * PAGE, 0) == source[: 2 * PAGE]


def test_windows_copy_reports_other_errors(windows: Windows) -> None:
    """What is not a missing page is an error."""
    windows.refused["ReadProcessMemory"] = [5]
    with pytest.raises(OSError, match="error 5"):
        windows.module.copy(0, 0, 10)


def test_windows_unpin_of_what_is_not_pinned_is_no_error(windows: Windows) -> None:
    """ERROR_NOT_LOCKED is success elsewhere; a real failure of VirtualLock is ENOMEM."""
    memory = windows.module.map_memory(PAGE, Protection.READ_WRITE, stack=False, huge=False)
    windows.refused["VirtualUnlock"] = [158, 487]
    windows.module.unpin(address_of(memory), PAGE)
    with pytest.raises(OSError, match="error 487 of Windows"):
        windows.module.unpin(address_of(memory), PAGE)
    windows.refused["VirtualLock"] = [1453]
    with pytest.raises(OSError, match="error 1453 of Windows") as caught:
        windows.module.pin(address_of(memory), PAGE)
    assert caught.value.errno == errno.ENOMEM


def test_fcntl_is_the_real_one_after_the_simulations() -> None:
    """The simulated platforms leave nothing behind."""
    assert fcntl.fcntl.__module__ == "fcntl"
    assert sys.platform == "linux"
    assert not hasattr(ctypes, "WinDLL")
