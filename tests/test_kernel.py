"""What each kernel function promises, on the real kernel and on every stand-in for it.

These tests run on the native module, on the portable module (which works on Linux), on the fake
kernel, and on the macOS and Windows modules over simulated system calls.
"""

from __future__ import annotations

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("the stand-ins are built out of Linux calls", allow_module_level=True)

import errno
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

from aiommap._kernel import Kernel, _portable, address_of, native
from aiommap._options import Advice, Protection

from .fake_kernel import FakeKernel
from .foreign_platforms import Darwin, Windows, is_capabilities
from .kernel_witnesses import PAGE, OpenFile, closed_descriptor, maps_flags, outcome, pattern, smaps
from .rigs.small_fs import small_fs

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
def file(tmp_path: Path) -> Iterator[OpenFile]:
    with OpenFile(tmp_path / "file") as opened:
        yield opened


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
    if not kernel.capabilities(str(file.path)).nowait_reads:
        with pytest.raises(OSError, match="not supported") as caught:
            kernel.read_nowait(file.fd, [buffer], 2 * PAGE)
        assert caught.value.errno == errno.EOPNOTSUPP
        return
    assert kernel.read_nowait(file.fd, [buffer], 2 * PAGE) == PAGE
    assert buffer == b"\2" * PAGE


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
    with pytest.raises(OSError, match=r"memory|implemented") as caught:
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
    """After it the pages are resident; a kernel that cannot do it says ENOSYS."""
    memory = kernel.map_file(file.fd, 4 * PAGE, Protection.READ_WRITE, 0)
    able = kernel.capabilities(None).populate
    error = outcome(getattr(kernel, name), address_of(memory), 4 * PAGE)
    assert error == (0 if able else errno.ENOSYS)
    assert smaps(address_of(memory))["Rss"] == f"{4 * PAGE // 1024 if able else 0} kB"


@pytest.mark.parametrize("name", ["populate_read", "populate_write"])
def test_populate_of_a_page_that_is_gone_is_efault(
    kernel: Kernel, file: OpenFile, name: str
) -> None:
    """Where touching a page would be SIGBUS, populating it is EFAULT, if it can be done."""
    memory = kernel.map_file(file.fd, 4 * PAGE, Protection.READ_WRITE, 0)
    os.ftruncate(file.fd, PAGE)
    able = kernel.capabilities(None).populate
    error = outcome(getattr(kernel, name), address_of(memory), 4 * PAGE)
    assert error == (errno.EFAULT if able else errno.ENOSYS)


def test_resident_has_a_byte_for_each_page(kernel: Kernel) -> None:
    """The lowest bit tells the touched pages from the others, also of a part of a page."""
    memory = kernel.map_memory(8 * PAGE, Protection.READ_WRITE, stack=False, huge=False)
    memory[2 * PAGE] = memory[5 * PAGE] = 1
    state = kernel.resident(address_of(memory), 7 * PAGE + 1)
    assert [byte & 1 for byte in state] == [0, 0, 1, 0, 0, 1, 0, 0]
    assert kernel.resident(address_of(memory), 0) == b""


def test_cached_pages_counts_or_cannot(kernel: Kernel, file: OpenFile) -> None:
    """Pages just written are in the cache; a kernel that does not tell says ENOSYS."""
    if not kernel.capabilities(str(file.path)).cachestat:
        with pytest.raises(OSError, match="not implemented"):
            kernel.cached_pages(file.fd, PAGE, 2 * PAGE)
        return
    assert kernel.cached_pages(file.fd, PAGE, 2 * PAGE) == 2
    assert kernel.cached_pages(file.fd, PAGE, 0) == 0


# Every kernel: copying and searching


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
    assert outcome(kernel.advise, address_of(memory), 4 * PAGE, advice) in (0, errno.ENOTSUP)
    assert memory[0:1] + memory[PAGE : PAGE + 1] == b"x\1"


def test_advise_reaches_the_kernel(kernel: Kernel, platform: str) -> None:
    """RANDOM is in the kernel's books, and NORMAL takes it out; Windows has no such advice."""
    memory = kernel.map_memory(PAGE, Protection.READ_WRITE, stack=False, huge=False)
    address = address_of(memory)
    expected = errno.ENOTSUP if platform == "windows" else 0
    assert outcome(kernel.advise, address, PAGE, Advice.RANDOM) == expected
    assert ("rr" in smaps(address)["VmFlags"].split()) == (expected == 0)
    kernel.advise(address, PAGE, Advice.NORMAL)
    assert "rr" not in smaps(address)["VmFlags"].split()


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
