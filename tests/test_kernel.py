"""What each kernel function promises, on the real kernel and on every stand-in for it.

The conformance tests run on the native module, on the portable module (which works on Linux), on
the fake kernel, and on the macOS and Windows modules over simulated system calls.
"""

from __future__ import annotations

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("the stand-ins are built out of Linux calls", allow_module_level=True)

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import subprocess
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiommap._kernel import Kernel, _linux, _portable, address_of, native
from aiommap._kernel._guarded_copy import copy_until_missing
from aiommap._kernel._map_registry import MapRegistry
from aiommap._options import Advice, Protection

from .fake_kernel import Call, FakeKernel
from .foreign_platforms import Darwin, Windows, is_capabilities
from .rigs.small_fs import small_fs

PAGE = mmap.PAGESIZE
PLATFORMS = ("linux", "portable", "fake", "darwin", "windows")


@pytest.fixture(params=PLATFORMS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Each implementation of Kernel in turn."""
    chosen: Kernel
    match request.param:
        case "linux":
            chosen = native
        case "portable":
            chosen = _portable
        case "fake":
            chosen = FakeKernel()
        case "darwin":
            chosen = Darwin(monkeypatch).module
        case _:
            chosen = Windows(monkeypatch).module
    return chosen


@pytest.fixture
def platform(request: pytest.FixtureRequest, kernel: Kernel) -> str:
    """Which one ``kernel`` is."""
    name: str = request.node.callspec.params["kernel"]
    return name


@pytest.fixture
def darwin(monkeypatch: pytest.MonkeyPatch) -> Darwin:
    return Darwin(monkeypatch)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Windows:
    return Windows(monkeypatch)


class OpenFile:
    """A file of four pages, each full of its number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(b"".join(bytes([number]) * PAGE for number in range(4)))
        self.fd = os.open(path, os.O_RDWR)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[OpenFile]:
    opened = OpenFile(tmp_path / "file")
    yield opened
    os.close(opened.fd)


def maps_flags(address: int) -> str:
    """Permissions of the map at an address, and ``s`` or ``p``, by the kernel's own books."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, flags = line.split()[:2]
        start, stop = (int(number, 16) for number in span.split("-"))
        if start <= address < stop:
            return flags
    raise AssertionError(f"nothing is mapped at {address:#x}")


def smaps(address: int) -> dict[str, str]:
    """What /proc/self/smaps says about the map at an address."""
    found: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, value = line.partition(" ")
        if not key.endswith(":"):
            start, stop = (int(number, 16) for number in key.split("-"))
            inside = start <= address < stop
        elif inside:
            found[key[:-1]] = value.strip()
    return found


def closed_descriptor() -> int:
    """A number that no descriptor has."""
    fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    return fd


# Every kernel: files


def test_page_size_and_granularity(kernel: Kernel) -> None:
    """The page size is the system's, and the granularity is a multiple of it."""
    assert kernel.page_size == os.sysconf("SC_PAGE_SIZE")
    assert kernel.map_granularity % kernel.page_size == 0


def test_duplicate_is_the_same_open_file_closed_on_exec(kernel: Kernel, file: OpenFile) -> None:
    """A duplicate shares the file, is not inherited, and lives on without the first."""
    other = os.open(file.path, os.O_RDONLY)
    copy = kernel.duplicate(other)
    os.close(other)
    try:
        assert os.path.sameopenfile(copy, file.fd)
        assert not os.get_inheritable(copy)
        assert os.pread(copy, 1, PAGE) == b"\1"
    finally:
        os.close(copy)


def test_duplicate_of_a_closed_descriptor_is_an_error(kernel: Kernel) -> None:
    """There is nothing to duplicate: EBADF."""
    with pytest.raises(OSError, match="Bad file descriptor"):
        kernel.duplicate(closed_descriptor())


def test_file_size_follows_set_file_size(kernel: Kernel, file: OpenFile) -> None:
    """A file grows with zeros and is cut, and the size says so."""
    kernel.set_file_size(file.fd, 6 * PAGE + 1)
    assert kernel.file_size(file.fd) == 6 * PAGE + 1
    assert os.pread(file.fd, 2 * PAGE, 5 * PAGE) == bytes(PAGE + 1)
    kernel.set_file_size(file.fd, PAGE)
    assert kernel.file_size(file.fd) == PAGE
    assert file.path.read_bytes() == bytes(PAGE)


def test_reserve_inside_the_file_changes_no_byte(
    kernel: Kernel, platform: str, file: OpenFile
) -> None:
    """A hole gets blocks; neither bytes nor size change. macOS cannot fill holes and says so."""
    os.ftruncate(file.fd, 64 * PAGE)
    before = file.path.read_bytes()
    blocks = os.fstat(file.fd).st_blocks
    done = kernel.reserve(file.fd, 8 * PAGE, 16 * PAGE, grow=False)
    assert file.path.read_bytes() == before
    if platform == "darwin":
        assert not done
    elif platform != "windows":  # where files have no holes
        assert done
        assert os.fstat(file.fd).st_blocks >= blocks + 16 * PAGE // 512


def test_reserve_does_not_grow_unless_asked(kernel: Kernel, platform: str, file: OpenFile) -> None:
    """Without ``grow`` the size stays; POSIX has no such call, and False says so."""
    done = kernel.reserve(file.fd, 0, 16 * PAGE, grow=False)
    assert done == (platform != "portable")
    assert os.fstat(file.fd).st_size == 4 * PAGE
    if done:
        assert os.fstat(file.fd).st_blocks >= 16 * PAGE // 512


def test_reserve_grows_when_asked_and_keeps_what_is_there(kernel: Kernel, file: OpenFile) -> None:
    """With ``grow`` the file reaches the end of the range, and its bytes stay."""
    before = file.path.read_bytes()
    assert kernel.reserve(file.fd, 0, 16 * PAGE, grow=True)
    assert file.path.read_bytes() == before + bytes(12 * PAGE)
    assert os.fstat(file.fd).st_blocks >= 16 * PAGE // 512


def test_reserve_never_cuts(kernel: Kernel, file: OpenFile) -> None:
    """A range that ends before the end of the file leaves the size alone, grow or not."""
    before = file.path.read_bytes()
    for grow in (False, True):
        assert kernel.reserve(file.fd, 0, PAGE, grow=grow)
        assert kernel.reserve(file.fd, PAGE, 0, grow=grow)
    assert file.path.read_bytes() == before


@pytest.mark.smallfs
def test_reserve_says_when_the_disk_is_full(kernel: Kernel) -> None:
    """More blocks than there are is ENOSPC, and the file is as it was."""
    with small_fs("tmpfs", 64 * PAGE) as full:
        file = OpenFile(full.path / "file")
        try:
            with pytest.raises(OSError, match="No space left") as caught:
                kernel.reserve(file.fd, 0, 4096 * PAGE, grow=True)
            assert caught.value.errno == errno.ENOSPC
            assert os.fstat(file.fd).st_size == 4 * PAGE
        finally:
            os.close(file.fd)


def test_free_blocks_is_what_the_file_system_says(kernel: Kernel, file: OpenFile) -> None:
    """There is room on the disk of the tests."""
    assert kernel.free_blocks(file.fd) > 0


def test_only_a_file_in_memory_is_in_memory(kernel: Kernel, file: OpenFile) -> None:
    """A file on a disk is never said to be in memory."""
    assert not kernel.file_is_in_memory(file.fd)


@pytest.mark.parametrize("name", ["sync_data", "sync_all"])
def test_sync_takes_files_and_refuses_closed_descriptors(
    kernel: Kernel, file: OpenFile, name: str
) -> None:
    """A sync of a good file returns; of a closed descriptor it is EBADF."""
    sync = getattr(kernel, name)
    os.pwrite(file.fd, b"new", 0)
    sync(file.fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        sync(closed_descriptor())


def test_sync_directory(kernel: Kernel, tmp_path: Path) -> None:
    """A directory is synced by name, str or bytes; one that is not there is an error."""
    kernel.sync_directory(str(tmp_path))
    kernel.sync_directory(os.fsencode(tmp_path))
    with pytest.raises(FileNotFoundError, match="missing"):
        kernel.sync_directory(str(tmp_path / "missing"))


def test_write_back_keeps_the_bytes(kernel: Kernel, file: OpenFile) -> None:
    """Started or awaited write-back changes nothing that can be read."""
    memory = kernel.map_file(file.fd, 4 * PAGE, Protection.READ_WRITE, 0)
    address = address_of(memory)
    memory[PAGE : PAGE + 5] = b"fresh"
    kernel.start_write_back(file.fd, address + PAGE, PAGE, PAGE)
    kernel.write_back(file.fd, address + PAGE, PAGE, PAGE)
    kernel.start_write_back(file.fd, address, 0, 0)
    kernel.write_back(file.fd, address, 0, 0)
    assert os.pread(file.fd, 5, PAGE) == b"fresh"


# Every kernel: reading without a map


def test_read_fills_the_buffers_in_turn(kernel: Kernel, file: OpenFile) -> None:
    """One read goes on from one buffer to the next, of any writable kind."""
    first, second = bytearray(10), bytearray(20)
    assert kernel.read(file.fd, [first, memoryview(second)[5:15]], PAGE - 10) == 20
    assert first == bytes(10)
    assert second == bytes(5) + b"\1" * 10 + bytes(5)


def test_read_is_short_at_the_end_of_the_file(kernel: Kernel, file: OpenFile) -> None:
    """What is past the end is not read; past all of it nothing is."""
    buffer, unused = bytearray(b"x" * 100), bytearray(b"x")
    assert kernel.read(file.fd, [buffer, unused], 4 * PAGE - 60) == 60
    assert buffer == b"\3" * 60 + b"x" * 40
    assert unused == b"x"
    assert kernel.read(file.fd, [buffer], 4 * PAGE) == 0
    assert kernel.read(file.fd, [buffer], 1 << 40) == 0


def test_read_of_a_closed_descriptor_is_an_error(kernel: Kernel) -> None:
    """A read raises what the kernel says."""
    with pytest.raises(OSError, match="Bad file descriptor"):
        kernel.read(closed_descriptor(), [bytearray(1)], 0)


def test_read_nowait_reads_memory_or_refuses(kernel: Kernel, file: OpenFile) -> None:
    """What was just written is in memory: it is read, unless the platform cannot tell."""
    buffer = bytearray(PAGE)
    try:
        count = kernel.read_nowait(file.fd, [buffer], 2 * PAGE)
    except OSError as exc:
        assert exc.errno == errno.EOPNOTSUPP
        assert not kernel.capabilities(str(file.path)).nowait_reads
    else:
        assert count == PAGE
        assert buffer == b"\2" * PAGE
        assert kernel.capabilities(str(file.path)).nowait_reads


def test_will_need_never_fails(kernel: Kernel, file: OpenFile) -> None:
    """A hint about good ranges, and about ranges that are nowhere."""
    kernel.will_need(file.fd, 0, 4 * PAGE)
    kernel.will_need(file.fd, 1 << 40, PAGE)
    kernel.will_need(file.fd, 0, 0)


# Every kernel: maps


@pytest.mark.parametrize(
    ("protection", "flags"),
    [
        (Protection.READ, "r--s"),
        (Protection.READ_WRITE, "rw-s"),
        (Protection.READ_COPY, "rw-p"),
        (Protection.READ_EXECUTE, "r-xs"),
    ],
)
def test_map_file_maps_with_the_protection(
    kernel: Kernel, platform: str, file: OpenFile, protection: Protection, flags: str
) -> None:
    """The kernel's books show the protection; an executable map is not to be had on Windows."""
    if platform == "windows" and protection is Protection.READ_EXECUTE:
        with pytest.raises(OSError, match="not supported"):
            kernel.map_file(file.fd, PAGE, protection, 0)
        return
    memory = kernel.map_file(file.fd, 2 * PAGE, protection, PAGE)
    assert maps_flags(address_of(memory)) == flags
    assert len(memory) == 2 * PAGE
    assert memory[0] == 1
    with memoryview(memory) as view:
        assert view.readonly is not protection.writable


def test_stores_reach_the_file_or_stay_private(kernel: Kernel, file: OpenFile) -> None:
    """READ_WRITE changes the file, READ_COPY does not."""
    shared = kernel.map_file(file.fd, PAGE, Protection.READ_WRITE, 0)
    private = kernel.map_file(file.fd, PAGE, Protection.READ_COPY, 0)
    private[0:1] = b"p"
    assert os.pread(file.fd, 1, 0) == b"\0"
    shared[0:1] = b"s"
    assert os.pread(file.fd, 1, 0) == b"s"
    assert private[0:1] == b"p"


def test_a_map_outlives_its_descriptor(kernel: Kernel, file: OpenFile) -> None:
    """The memory is the file's after the descriptor has been closed."""
    fd = os.open(file.path, os.O_RDWR)
    memory = kernel.map_file(fd, PAGE, Protection.READ_WRITE, 3 * PAGE)
    os.close(fd)
    memory[0:1] = b"z"
    assert os.pread(file.fd, 1, 3 * PAGE) == b"z"


def test_map_file_needs_the_rights(kernel: Kernel, file: OpenFile) -> None:
    """A shared writable map of a descriptor that cannot write is EACCES."""
    fd = os.open(file.path, os.O_RDONLY)
    try:
        with pytest.raises(PermissionError, match="Permission denied"):
            kernel.map_file(fd, PAGE, Protection.READ_WRITE, 0)
        kernel.map_file(fd, PAGE, Protection.READ_COPY, 0)[0:1] = b"x"
    finally:
        os.close(fd)


def test_memory_file(kernel: Kernel) -> None:
    """A file of the size, of zeros, not inherited and in memory; or None."""
    fd = kernel.memory_file(3 * PAGE, huge=False)
    if fd is None:
        return
    try:
        assert kernel.file_size(fd) == 3 * PAGE
        assert kernel.file_is_in_memory(fd)
        assert not os.get_inheritable(fd)
        memory = kernel.map_file(fd, 3 * PAGE, Protection.READ_WRITE, 0)
        assert memory[:] == bytes(3 * PAGE)
        kernel.set_file_size(fd, 5 * PAGE)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("protection", "flags"),
    [
        (Protection.READ, "r--s"),
        (Protection.READ_WRITE, "rw-s"),
        (Protection.READ_COPY, "rw-p"),
    ],
)
@pytest.mark.parametrize("stack", [False, True])
def test_map_memory(kernel: Kernel, protection: Protection, flags: str, stack: bool) -> None:
    """Zeros, shared with children, but private for READ_COPY."""
    memory = kernel.map_memory(3 * PAGE, protection, stack=stack, huge=False)
    assert maps_flags(address_of(memory)) == flags
    assert memory[:] == bytes(3 * PAGE)


def test_huge_memory_is_an_error_where_there_is_none(kernel: Kernel) -> None:
    """Nothing is reserved here, and the error is one that names no other cause."""
    if kernel.capabilities(None).huge_pages:
        pytest.skip("this machine has huge pages")
    with pytest.raises(OSError, match="memory|implemented") as caught:
        kernel.map_memory(1 << 21, Protection.READ_WRITE, stack=False, huge=True)
    assert caught.value.errno in (errno.ENOMEM, errno.ENOSYS)


def test_sync_range_of_a_file_and_of_memory(kernel: Kernel, file: OpenFile) -> None:
    """The range of a file's map is synced; memory without a file has nothing to sync."""
    memory = kernel.map_file(file.fd, 4 * PAGE, Protection.READ_WRITE, 0)
    memory[PAGE : PAGE + 3] = b"new"
    kernel.sync_range(address_of(memory) + PAGE, PAGE)
    kernel.sync_range(address_of(memory), 0)
    anonymous = kernel.map_memory(PAGE, Protection.READ_WRITE, stack=False, huge=False)
    kernel.sync_range(address_of(anonymous), PAGE)
    assert os.pread(file.fd, 3, PAGE) == b"new"


@pytest.mark.parametrize("name", ["populate_read", "populate_write"])
def test_populate_brings_in_or_cannot(kernel: Kernel, file: OpenFile, name: str) -> None:
    """After it the pages are resident; a kernel that cannot do it says EINVAL or ENOSYS."""
    memory = kernel.map_file(file.fd, 4 * PAGE, Protection.READ_WRITE, 0)
    populate = getattr(kernel, name)
    if not kernel.capabilities(None).populate:
        with pytest.raises(OSError, match="Invalid argument|not implemented") as caught:
            populate(address_of(memory), PAGE)
        assert caught.value.errno in (errno.EINVAL, errno.ENOSYS)
        return
    populate(address_of(memory), 4 * PAGE)
    assert smaps(address_of(memory))["Rss"] == f"{4 * PAGE // 1024} kB"


@pytest.mark.parametrize("name", ["populate_read", "populate_write"])
def test_populate_of_a_page_that_is_gone_is_efault(
    kernel: Kernel, file: OpenFile, name: str
) -> None:
    """Where touching a page would be SIGBUS, populating it is EFAULT."""
    if not kernel.capabilities(None).populate:
        pytest.skip("cannot populate")
    memory = kernel.map_file(file.fd, 4 * PAGE, Protection.READ_WRITE, 0)
    os.ftruncate(file.fd, PAGE)
    with pytest.raises(OSError, match="Bad address") as caught:
        getattr(kernel, name)(address_of(memory), 4 * PAGE)
    assert caught.value.errno == errno.EFAULT


def test_resident_has_a_byte_for_each_page(kernel: Kernel) -> None:
    """The lowest bit tells the touched pages from the others, also of a part of a page."""
    memory = kernel.map_memory(8 * PAGE, Protection.READ_WRITE, stack=False, huge=False)
    memory[2 * PAGE] = memory[5 * PAGE] = 1
    state = kernel.resident(address_of(memory), 7 * PAGE + 1)
    assert [byte & 1 for byte in state] == [0, 0, 1, 0, 0, 1, 0, 0]
    assert kernel.resident(address_of(memory), 0) == b""


def test_cached_pages_counts_or_cannot(kernel: Kernel, file: OpenFile) -> None:
    """Pages just written are in the cache; a kernel that does not tell says ENOSYS."""
    try:
        count = kernel.cached_pages(file.fd, PAGE, 2 * PAGE)
    except OSError as exc:
        assert exc.errno == errno.ENOSYS
        assert not kernel.capabilities(None).cachestat
    else:
        assert count == 2
        assert kernel.cached_pages(file.fd, PAGE, 0) == 0


# Every kernel: copying and searching


def pattern(length: int, seed: int = 7) -> bytes:
    """Bytes in which every page differs from every other."""
    period = bytes((seed * number * number + number) % 251 for number in range(65_521))
    return (period * (length // len(period) + 1))[:length]


@pytest.mark.parametrize("length", [1, 100, PAGE, PAGE + 1, 1 << 16, (1 << 16) + 1, 3_000_001])
@pytest.mark.parametrize("skew", [0, 1, 2049])
def test_copy_copies_exactly(kernel: Kernel, length: int, skew: int) -> None:
    """Any length from and to any address: those bytes, and none beside them."""
    source = pattern(length + skew)
    target = bytearray(b"\xff" * (length + 2))
    assert kernel.copy(address_of(target) + 1, address_of(source) + skew, length) == length
    assert target == b"\xff" + source[skew:] + b"\xff"


def test_copy_of_nothing(kernel: Kernel) -> None:
    """No bytes are no error."""
    target = bytearray(b"x")
    assert kernel.copy(address_of(target), address_of(b"y"), 0) == 0
    assert target == b"x"


@pytest.mark.parametrize("protection", [Protection.READ, Protection.READ_COPY])
def test_copy_from_a_truncated_file_is_short_then_efault(
    kernel: Kernel, tmp_path: Path, protection: Protection
) -> None:
    """A source page that is gone ends the copy at its beginning, far in as well."""
    content = pattern(100 * PAGE)
    path = tmp_path / "file"
    path.write_bytes(content)
    with path.open("rb+") as opened:
        memory = kernel.map_file(opened.fileno(), 100 * PAGE, protection, 0)
        opened.truncate(70 * PAGE + 1)
        target = bytearray(100 * PAGE)
        start = 123
        copied = kernel.copy(address_of(target), address_of(memory) + start, 99 * PAGE)
        assert copied == 71 * PAGE - start
        there = content[start : 70 * PAGE + 1]
        assert target[:copied] == there + bytes(copied - len(there))
        with pytest.raises(OSError, match="Bad address") as caught:
            kernel.copy(address_of(target), address_of(memory) + 71 * PAGE, 10)
        assert caught.value.errno == errno.EFAULT


def test_copy_into_a_truncated_file_is_short_then_efault(kernel: Kernel, file: OpenFile) -> None:
    """A destination page that is gone ends the copy, and the process lives."""
    memory = kernel.map_file(file.fd, 4 * PAGE, Protection.READ_WRITE, 0)
    os.ftruncate(file.fd, 2 * PAGE)
    source = pattern(4 * PAGE)
    assert kernel.copy(address_of(memory), address_of(source), 4 * PAGE) == 2 * PAGE
    assert os.pread(file.fd, 4 * PAGE, 0) == source[: 2 * PAGE]
    with pytest.raises(OSError, match="Bad address"):
        kernel.copy(address_of(memory) + 2 * PAGE, address_of(source), 1)


def test_copy_after_a_failed_one_has_nothing_of_it(kernel: Kernel, file: OpenFile) -> None:
    """What a failed copy had under way does not show up in the next."""
    memory = kernel.map_file(file.fd, 4 * PAGE, Protection.READ_WRITE, 0)
    os.ftruncate(file.fd, PAGE)
    with pytest.raises(OSError, match="Bad address"):
        kernel.copy(address_of(memory) + 2 * PAGE, address_of(b"stale" * 100), 500)
    target = bytearray(5)
    assert kernel.copy(address_of(target), address_of(b"fresh"), 5) == 5
    assert target == b"fresh"


def test_copy_into_read_only_memory_is_efault(kernel: Kernel, file: OpenFile) -> None:
    """The kernel refuses to store where the process may not."""
    memory = kernel.map_file(file.fd, PAGE, Protection.READ, 0)
    with pytest.raises(OSError, match="Bad address"):
        kernel.copy(address_of(memory), address_of(b"x"), 1)
    assert os.pread(file.fd, 1, 0) == b"\0"


def test_copies_in_threads_do_not_mix(kernel: Kernel) -> None:
    """Each of eight threads gets its own bytes, two hundred times."""
    start = threading.Barrier(8)
    wrong: list[int] = []

    def work(seed: int) -> None:
        source, target = pattern(50_000, seed), bytearray(50_000)
        start.wait()
        for _ in range(200):
            count = kernel.copy(address_of(target), address_of(source), len(source))
            if count != len(source) or target != source:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_move_takes_overlapping_ranges(kernel: Kernel) -> None:
    """As memmove, up and down."""
    data = bytearray(b"0123456789")
    kernel.move(address_of(data) + 2, address_of(data), 5)
    assert data == b"0101234789"
    kernel.move(address_of(data), address_of(data) + 3, 6)
    assert data == b"123478" + b"4789"


@pytest.mark.parametrize(
    ("needle", "length", "first", "last"),
    [
        (b"ab", 10, 0, 6),
        (b"ab", 7, 0, 3),
        (b"\0b", 10, 8, 8),
        (b"\0b", 9, -1, -1),
        (b"nowhere", 10, -1, -1),
        (b"abcabcab\0b", 10, 0, 0),
        (b"longer than the data", 10, -1, -1),
        (b"a", 0, -1, -1),
    ],
)
def test_search_finds_the_first_and_the_last(
    kernel: Kernel, needle: bytes, length: int, first: int, last: int
) -> None:
    """Inside the first ``length`` bytes only, with zero bytes as good as any."""
    data = bytearray(b"abcabcab\0bab")
    assert kernel.search(data, length, needle, last=False) == first
    assert kernel.search(data, length, needle, last=True) == last


# Every kernel: hints


@pytest.mark.parametrize("advice", list(Advice))
def test_advise_is_taken_or_enotsup(kernel: Kernel, file: OpenFile, advice: Advice) -> None:
    """No advice changes a byte; what is not known is ENOTSUP and nothing else."""
    memory = kernel.map_file(file.fd, 4 * PAGE, Protection.READ_COPY, 0)
    memory[0:1] = b"x"
    try:
        kernel.advise(address_of(memory), 4 * PAGE, advice)
    except OSError as exc:
        assert exc.errno == errno.ENOTSUP
    assert memory[0:1] + memory[PAGE : PAGE + 1] == b"x\1"


def test_advise_reaches_the_kernel(kernel: Kernel, platform: str) -> None:
    """RANDOM is in the kernel's books, and NORMAL takes it out."""
    if platform == "windows":
        pytest.skip("has no such advice")
    memory = kernel.map_memory(PAGE, Protection.READ_WRITE, stack=False, huge=False)
    kernel.advise(address_of(memory), PAGE, Advice.RANDOM)
    assert "rr" in smaps(address_of(memory))["VmFlags"].split()
    kernel.advise(address_of(memory), PAGE, Advice.NORMAL)
    assert "rr" not in smaps(address_of(memory))["VmFlags"].split()


def test_pin_and_unpin(kernel: Kernel) -> None:
    """Pinned pages are locked in the kernel's books; unpinning twice is no error."""
    memory = kernel.map_memory(4 * PAGE, Protection.READ_WRITE, stack=False, huge=False)
    address = address_of(memory)
    kernel.pin(address + PAGE, 2 * PAGE)
    assert smaps(address + PAGE)["Locked"] == f"{2 * PAGE // 1024} kB"
    for _ in range(2):
        kernel.unpin(address + PAGE, 2 * PAGE)
        assert smaps(address + PAGE)["Locked"] == "0 kB"


def test_pin_of_nothing_mapped_is_an_error(kernel: Kernel, platform: str) -> None:
    """Pages that are not there cannot be pinned: ENOMEM."""
    memory = kernel.map_memory(2 * PAGE, Protection.READ_WRITE, stack=False, huge=False)
    top = max(
        int(line.split("-")[1].split()[0], 16)
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "[" not in line
    )
    with pytest.raises(OSError, match="Cannot allocate memory"):
        kernel.pin(top + (1 << 30), PAGE)
    assert len(memory) == 2 * PAGE


def test_pin_limit(kernel: Kernel, platform: str) -> None:
    """The limit of the process in bytes, or None for no limit."""
    limit = kernel.pin_limit()
    if platform == "windows":
        assert limit == 204_800
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    assert limit == (None if soft == resource.RLIM_INFINITY else soft)


# Every kernel: capabilities


def test_capabilities_of_the_system_and_of_paths(
    kernel: Kernel, file: OpenFile, tmp_path: Path
) -> None:
    """Answered for no path, for a file and for a directory, str or bytes."""
    for path in (None, str(file.path), os.fsencode(file.path), str(tmp_path)):
        answer = kernel.capabilities(path)
        assert is_capabilities(answer)
        assert answer.page_size == PAGE
    assert file.path.read_bytes()[:PAGE] == bytes(PAGE)
    assert os.listdir(tmp_path) == ["file"]


def test_capabilities_of_a_missing_path_is_an_error(kernel: Kernel, tmp_path: Path) -> None:
    """There is nothing to ask about."""
    with pytest.raises(FileNotFoundError, match="missing"):
        kernel.capabilities(str(tmp_path / "missing"))


# Linux


def test_capabilities_agree_with_the_calls(file: OpenFile, tmp_path: Path) -> None:
    """On this machine everything that Linux 6.5 can do is found, in a directory as in a file."""
    for path in (str(file.path), str(tmp_path)):
        answer = _linux.capabilities(path)
        assert answer.nowait_reads
        assert answer.write_back_start
        assert answer.full_sync
        assert answer.ofd_locks
        assert answer.reserve


@pytest.mark.smallfs
def test_tmpfs_is_in_memory_and_can_do_less() -> None:
    """tmpfs refuses RWF_NOWAIT, has no medium to sync to, and says when it is full."""
    with small_fs("tmpfs", 16 * PAGE) as small:
        file = OpenFile(small.path / "file")
        try:
            assert _linux.file_is_in_memory(file.fd)
            answer = _linux.capabilities(str(small.path))
            assert not answer.nowait_reads
            assert not answer.full_sync
            small.fill()
            assert _linux.free_blocks(file.fd) == 0
        finally:
            os.close(file.fd)


def dirty_pages(fd: int) -> int:
    """Pages of a file that the kernel has still to write, or is writing."""
    answer = _linux._Cachestat()
    wanted = _linux._CachestatRange(0, 1 << 40)
    assert _linux._syscall is not None
    assert _linux._syscall(451, fd, ctypes.addressof(wanted), ctypes.addressof(answer), 0) == 0
    return int(answer.dirty + answer.writeback)


@pytest.mark.parametrize("how", ["sync_data", "sync_all", "write_back", "sync_range"])
def test_what_is_written_is_not_dirty_any_more(file: OpenFile, how: str) -> None:
    """The kernel counts no dirty page after the call, and did before."""
    if not _linux.capabilities(str(file.path)).cachestat:
        pytest.skip("needs cachestat")
    memory = _linux.map_file(file.fd, 4 * PAGE, Protection.READ_WRITE, 0)
    memory[0:1] = b"x"
    assert dirty_pages(file.fd) > 0
    match how:
        case "write_back":
            _linux.write_back(file.fd, address_of(memory), 0, 4 * PAGE)
        case "sync_range":
            _linux.sync_range(address_of(memory), 4 * PAGE)
        case _:
            getattr(_linux, how)(file.fd)
    assert dirty_pages(file.fd) == 0


class Answers:
    """A C function that answers with these errnos in turn (0: well), the last one for ever."""

    def __init__(self, *errors: int) -> None:
        self.errors = list(errors)
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *arguments: Any) -> int:
        self.calls.append(arguments)
        error = self.errors.pop(0) if len(self.errors) > 1 else self.errors[0]
        ctypes.set_errno(error)
        return -1 if error else 0


@pytest.mark.parametrize(
    ("function", "name", "arguments"),
    [
        ("_msync", "sync_range", (0, PAGE)),
        ("_sync_file_range", "start_write_back", (0, 0, 0, PAGE)),
        ("_sync_file_range", "write_back", (0, 0, 0, PAGE)),
        ("_madvise", "populate_read", (0, PAGE)),
    ],
)
def test_linux_begins_again_after_a_signal(
    monkeypatch: pytest.MonkeyPatch, function: str, name: str, arguments: tuple[int, ...]
) -> None:
    """EINTR is not an error: the call is made until it is through."""
    answers = Answers(errno.EINTR, errno.EINTR, 0)
    monkeypatch.setattr(_linux, function, answers)
    getattr(_linux, name)(*arguments)
    assert len(answers.calls) == 3


def test_linux_reserve_begins_again_after_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """fallocate is interrupted by signals on some file systems."""
    answers = Answers(errno.EINTR, 0)
    monkeypatch.setattr(_linux, "_fallocate", answers)
    assert _linux.reserve(0, 0, PAGE, grow=False)
    assert [call[1] for call in answers.calls] == [1, 1]


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_linux_reserve_says_false_where_fallocate_is_missing(
    monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """A file system without fallocate is no error."""
    monkeypatch.setattr(_linux, "_fallocate", Answers(error))
    assert not _linux.reserve(0, 0, PAGE, grow=True)


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ESPIPE, errno.EPERM])
def test_linux_write_back_is_left_out_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """No sync_file_range, or a sandbox that forbids it: the flush will do it."""
    monkeypatch.setattr(_linux, "_sync_file_range", Answers(error))
    _linux.start_write_back(0, 0, 0, PAGE)
    _linux.write_back(0, 0, 0, PAGE)
    assert not _linux.capabilities(None).write_back_start
    monkeypatch.setattr(_linux, "_sync_file_range", None)
    _linux.start_write_back(0, 0, 0, PAGE)
    assert not _linux.capabilities(None).write_back_start


def test_linux_write_back_reports_a_bad_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO is an error, not a missing feature."""
    monkeypatch.setattr(_linux, "_sync_file_range", Answers(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        _linux.write_back(0, 0, 0, PAGE)


def test_linux_ranges_of_nothing_do_not_mean_the_rest_of_the_file(
    monkeypatch: pytest.MonkeyPatch, file: OpenFile
) -> None:
    """sync_file_range and posix_fadvise take a length of 0 for everything up to the end."""
    answers = Answers(errno.EIO)
    monkeypatch.setattr(_linux, "_sync_file_range", answers)
    monkeypatch.setattr(os, "posix_fadvise", answers)
    _linux.start_write_back(file.fd, 0, 0, 0)
    _linux.write_back(file.fd, 0, 0, 0)
    _linux.will_need(file.fd, 0, 0)
    assert answers.calls == []


def test_linux_advise_believes_eagain_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few EAGAIN are tried again; one that does not pass is the caller's."""
    passing = Answers(errno.EAGAIN, errno.EAGAIN, 0)
    monkeypatch.setattr(_linux, "_madvise", passing)
    _linux.advise(0, PAGE, Advice.RANDOM)
    assert len(passing.calls) == 3
    staying = Answers(errno.EAGAIN)
    monkeypatch.setattr(_linux, "_madvise", staying)
    with pytest.raises(BlockingIOError, match="temporarily unavailable"):
        _linux.advise(0, PAGE, Advice.RANDOM)
    assert len(staying.calls) < 100


def run_python(script: str) -> str:
    """What a program prints, in a process of its own; an error of it is one here."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_linux_advise_ends_when_the_process_may_have_no_more_maps() -> None:
    """Advice for every second page splits the map until vm.max_map_count; then it is EAGAIN."""
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 1 << 17:
        pytest.skip("too many maps are allowed here")
    script = f"""
        import errno, mmap
        from aiommap._kernel import address_of, native
        from aiommap._options import Advice, Protection
        page = native.page_size
        memory = native.map_memory(
            {limit} * 2 * page, Protection.READ_WRITE, stack=False, huge=False
        )
        address = address_of(memory)
        try:
            for number in range({limit}):
                native.advise(address + 2 * number * page, page, Advice.RANDOM)
        except BlockingIOError as exc:
            print(errno.errorcode[exc.errno])
        """
    assert run_python(script).split() == ["EAGAIN"]


@pytest.mark.parametrize("kind", ["linux", "portable"])
def test_advice_that_the_kernel_lacks_is_enotsup(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """madvise says EINVAL to advice that is too new or not built in."""
    module = _linux if kind == "linux" else _portable
    monkeypatch.setattr(module, "_madvise", Answers(errno.EINVAL))
    with pytest.raises(OSError, match="not supported") as caught:
        module.advise(0, PAGE, Advice.RANDOM)
    assert caught.value.errno == errno.ENOTSUP


def test_linux_populate_keeps_einval(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel before 5.14 says EINVAL to MADV_POPULATE_READ, and the caller knows it by that."""
    monkeypatch.setattr(_linux, "_madvise", Answers(errno.EINVAL))
    with pytest.raises(OSError, match="Invalid argument"):
        _linux.populate_read(0, PAGE)


def test_linux_copy_goes_on_where_the_kernel_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a single call moves is copied by several, and the end is still found."""
    monkeypatch.setattr(_linux, "_COPY_MOST", 1000)
    once = _linux._copy_once
    monkeypatch.setattr(
        _linux, "_copy_once", lambda to, source, length: once(to, source, min(length, 1000))
    )
    source, target = pattern(3500), bytearray(3500)
    assert _linux.copy(address_of(target), address_of(source), 3500) == 3500
    assert target == source


def test_linux_copy_keeps_what_it_has_when_a_later_call_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """EFAULT after the first piece is a short copy; anything else is an error."""
    monkeypatch.setattr(_linux, "_COPY_MOST", 1000)
    monkeypatch.setattr(_linux, "_copy_once", lambda to, source, length: raise_after(to))

    def raise_after(to: int) -> int:
        if to:
            raise OSError(failure, os.strerror(failure))
        return 1000

    failure = errno.EFAULT
    assert _linux.copy(0, 0, 3500) == 1000
    failure = errno.EPERM
    with pytest.raises(PermissionError, match="not permitted"):
        _linux.copy(0, 0, 3500)


@pytest.mark.parametrize(
    ("function", "name", "arguments"),
    [
        ("_process_vm_readv", "copy", (0, 0, 1)),
        ("_syscall", "cached_pages", (0, 0, 1)),
    ],
)
def test_linux_without_a_call_is_enosys(
    monkeypatch: pytest.MonkeyPatch, function: str, name: str, arguments: tuple[int, ...]
) -> None:
    """A C library without the function is as a kernel without it."""
    monkeypatch.setattr(_linux, function, None)
    with pytest.raises(OSError, match="not implemented"):
        getattr(_linux, name)(*arguments)


def test_linux_memory_file_of_old_and_confined_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A flag too new is left out; a memfd that is missing or forbidden is None."""
    create = os.memfd_create
    asked: list[int] = []

    def old(name: str, flags: int) -> int:
        asked.append(flags)
        if flags & 8:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", old)
    fd = _linux.memory_file(PAGE, huge=False)
    assert fd is not None
    os.close(fd)
    assert len(asked) == 2

    def missing(name: str, flags: int) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "memfd_create", missing)
    assert _linux.memory_file(PAGE, huge=False) is None


def test_linux_memory_file_leaves_no_descriptor_when_it_cannot_grow() -> None:
    """A size that no file can have is an error, and the descriptor is closed."""
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="File too large|Invalid argument"):
        _linux.memory_file(1 << 63, huge=False) if sys.maxsize < 1 << 63 - 1 else (
            _linux.memory_file((1 << 63) - 1 - PAGE // 2, huge=False)
        )
    assert set(os.listdir("/proc/self/fd")) <= before


# The portable module


def test_portable_reads_without_preadv(monkeypatch: pytest.MonkeyPatch, file: OpenFile) -> None:
    """pread, which POSIX has, gives the same bytes into the same buffers."""
    monkeypatch.delattr(os, "preadv")
    first, second, third = bytearray(10), bytearray(b"x" * PAGE), bytearray(b"x")
    buffers = [first, memoryview(second), third]
    assert _portable.read(file.fd, buffers, 4 * PAGE - 15) == 15
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
    kept = [_portable.map_file(file.fd, PAGE, kind, 0) for kind in (Protection.READ, "c")[:1]]
    getattr(_portable, name)(file.fd)
    assert order[-1] == "sync"
    assert set(order[:-1]) == {address_of(first), address_of(second)}
    assert len(kept) == 1
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
    monkeypatch.setattr(_portable, function, None)
    with pytest.raises(OSError, match="not implemented") as caught:
        getattr(_portable, name)(0, PAGE)
    assert caught.value.errno == error


def test_portable_search_without_memmem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every C library has memmem; bytearray.find gives the same answer."""
    monkeypatch.setattr(_portable, "_memmem", None)
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
    monkeypatch.setattr(_portable, "_raw_write", Answers(errno.EBADF))
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
    memory = darwin.module.map_file(file.fd, PAGE, Protection.READ, 0)
    assert len(memory) == PAGE
    assert darwin.calls == [("fcntl", Darwin.FULLFSYNC)]
    darwin.refused[Darwin.FULLFSYNC] = [errno.EIO]
    with pytest.raises(OSError, match="Input/output error"):
        darwin.module.map_file(file.fd, PAGE, Protection.READ, 0)


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


# The fake kernel


def test_fake_has_every_function() -> None:
    """What the protocol asks for is there, and mypy checks the types."""
    fake: Kernel = FakeKernel()
    for name in vars(Kernel):
        if not name.startswith("_"):
            assert hasattr(fake, name), name


def test_fake_records_calls_in_order(file: OpenFile) -> None:
    """Names, arguments and the thread, also of calls that fail."""
    fake = FakeKernel()
    fake.file_size(file.fd)
    fake.fail("sync_data", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        fake.sync_data(file.fd)
    fake.reserve(file.fd, 0, PAGE, grow=True)
    assert fake.names() == ["file_size", "sync_data", "reserve"]
    assert fake.names("sync_data") == ["sync_data"]
    assert fake.calls[-1] == Call(
        "reserve", (file.fd, 0, PAGE), {"grow": True}, threading.get_ident()
    )


def test_fake_fails_after_some_calls_some_times_and_heals(file: OpenFile) -> None:
    """Exactly those calls fail that the test says."""
    fake = FakeKernel()
    fake.fail("file_size", errno.EIO, after=1, times=2)
    answers: list[object] = []
    for _ in range(5):
        try:
            answers.append(fake.file_size(file.fd))
        except OSError as exc:
            answers.append(exc.errno)
    assert answers == [4 * PAGE, errno.EIO, errno.EIO, 4 * PAGE, 4 * PAGE]
    fake.fail("file_size", errno.EIO)
    fake.heal("file_size")
    assert fake.file_size(file.fd) == 4 * PAGE


def test_fake_raises_the_fitting_subclass(file: OpenFile) -> None:
    """EAGAIN is BlockingIOError, as from the kernel."""
    fake = FakeKernel()
    fake.fail("read_nowait", errno.EAGAIN)
    with pytest.raises(BlockingIOError, match="temporarily unavailable"):
        fake.read_nowait(file.fd, [bytearray(1)], 0)


def test_fake_refuses_unknown_functions() -> None:
    """A misspelt name is an error in the test, not a failure that never comes."""
    fake = FakeKernel()
    with pytest.raises(AttributeError, match="no function 'snyc_data'"):
        fake.fail("snyc_data", errno.EIO)


def test_fake_holds_a_call_until_it_is_released(file: OpenFile) -> None:
    """The call arrives, waits, and goes on when the test says so."""
    fake = FakeKernel()
    seen: list[str] = []
    with fake.hold("sync_data", on_enter=lambda: seen.append("entered")) as disk:
        thread = threading.Thread(target=lambda: (fake.sync_data(file.fd), seen.append("done")))
        thread.start()
        disk.wait_entered()
        assert seen == ["entered"]
        assert disk.waiting == 1
        disk.release.set()
        thread.join()
    assert seen == ["entered", "done"]
    fake.sync_data(file.fd)
    assert disk.waiting == 0


def test_fake_runs_hooks_and_wrappers(file: OpenFile) -> None:
    """A hook runs in the caller before the call, a wrapper in the place of it."""
    fake = FakeKernel()
    hooked: list[str] = []
    fake.before("file_size", lambda call: hooked.append(call.name))
    fake.wrap("file_size", lambda real, fd: real(fd) + 1)
    assert fake.file_size(file.fd) == 4 * PAGE + 1
    assert hooked == ["file_size"]


def test_fake_old_kernel_lacks_what_is_optional(file: OpenFile) -> None:
    """Each missing feature answers as the real module does on such a kernel."""
    fake = FakeKernel.old()
    memory = fake.map_file(file.fd, PAGE, Protection.READ_WRITE, 0)
    address = address_of(memory)
    for call, error in (
        (lambda: fake.populate_read(address, PAGE), errno.EINVAL),
        (lambda: fake.populate_write(address, PAGE), errno.EINVAL),
        (lambda: fake.copy(address, address, 1), errno.ENOSYS),
        (lambda: fake.cached_pages(file.fd, 0, PAGE), errno.ENOSYS),
        (lambda: fake.read_nowait(file.fd, [bytearray(1)], 0), errno.EOPNOTSUPP),
    ):
        with pytest.raises(OSError, match=os.strerror(error)):
            call()
    assert fake.memory_file(PAGE, huge=False) is None
    assert not fake.reserve(file.fd, 0, PAGE, grow=True)
    fake.start_write_back(file.fd, address, 0, PAGE)
    answer = fake.capabilities(None)
    assert not (answer.populate or answer.nowait_reads or answer.cachestat or answer.reserve)
    assert answer.mincore
    confined = FakeKernel()
    confined.lack("process_vm", error=errno.EPERM)
    with pytest.raises(PermissionError, match="not permitted"):
        confined.copy(address, address, 1)


def test_fake_disk_keeps_what_was_stored_before_the_sync(file: OpenFile) -> None:
    """Stores are volatile until a sync that began after them has returned."""
    fake = FakeKernel(durability=True)
    memory = fake.map_file(file.fd, 4 * PAGE, Protection.READ_WRITE, 0)
    memory[0:3] = b"one"
    assert fake.disk.durable(file.path)[:3] == bytes(3)
    assert fake.disk.volatile(file.path)[:3] == b"one"
    fake.before("sync_data", lambda call: memory.__setitem__(slice(0, 3), b"two"))
    fake.sync_data(file.fd)
    assert fake.disk.durable(file.fd)[:3] == b"one"
    fake.sync_data(file.fd)
    assert fake.disk.durable(file.fd)[:3] == b"two"


def test_fake_disk_is_not_written_by_started_write_back(file: OpenFile) -> None:
    """Write-back alone promises nothing."""
    fake = FakeKernel(durability=True)
    memory = fake.map_file(file.fd, 4 * PAGE, Protection.READ_WRITE, 0)
    memory[0:3] = b"new"
    fake.start_write_back(file.fd, address_of(memory), 0, PAGE)
    fake.write_back(file.fd, address_of(memory), 0, PAGE)
    assert fake.disk.durable(file.fd)[:3] == bytes(3)


def test_fake_disk_syncs_a_range_alone(file: OpenFile) -> None:
    """Pages outside the range stay as they were."""
    fake = FakeKernel(durability=True)
    memory = fake.map_file(file.fd, 3 * PAGE, Protection.READ_WRITE, PAGE)
    memory[0:1] = memory[PAGE : PAGE + 1] = memory[2 * PAGE : 2 * PAGE + 1] = b"x"
    fake.sync_range(address_of(memory) + PAGE, PAGE)
    durable = fake.disk.durable(file.fd)
    assert [durable[number * PAGE] for number in range(4)] == [0, 1, ord("x"), 3]


def test_fake_disk_loses_the_pages_of_a_failed_sync(file: OpenFile) -> None:
    """The retry lies: it succeeds and writes nothing, until something is stored again."""
    fake = FakeKernel(durability=True)
    memory = fake.map_file(file.fd, 4 * PAGE, Protection.READ_WRITE, 0)
    memory[0:4] = b"lost"
    fake.fail("sync_data", errno.EIO, times=1)
    with pytest.raises(OSError, match="Input/output error"):
        fake.sync_data(file.fd)
    memory[PAGE : PAGE + 4] = b"kept"
    fake.sync_data(file.fd)
    assert fake.disk.durable(file.fd)[:4] == bytes(4)
    assert fake.disk.durable(file.fd)[PAGE : PAGE + 4] == b"kept"
    memory[100:101] = b"!"
    fake.sync_data(file.fd)
    assert fake.disk.durable(file.fd)[:4] == b"lost"


def test_fake_disk_knows_the_size(file: OpenFile) -> None:
    """A size is durable with the sync that follows it, growing and shrinking."""
    fake = FakeKernel(durability=True)
    fake.file_size(file.fd)
    fake.set_file_size(file.fd, 6 * PAGE)
    os.pwrite(file.fd, b"end", 6 * PAGE - 3)
    assert len(fake.disk.durable(file.fd)) == 4 * PAGE
    fake.sync_data(file.fd)
    assert fake.disk.durable(file.fd) == file.path.read_bytes()
    fake.set_file_size(file.fd, 10)
    assert len(fake.disk.durable(file.fd)) == 6 * PAGE
    fake.sync_all(file.fd)
    assert fake.disk.durable(file.fd) == bytes(10)


def test_fcntl_is_the_real_one_after_the_simulations() -> None:
    """The simulated platforms leave nothing behind."""
    assert fcntl.fcntl.__module__ == "fcntl"
    assert sys.platform == "linux"
    assert not hasattr(ctypes, "WinDLL")
