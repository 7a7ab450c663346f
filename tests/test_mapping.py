"""Mapping: one map of one file, synchronous, on the real kernel and on ones that lack things."""

from __future__ import annotations

import array
import errno
import gc
import mmap
import os
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from aiommap import _byte_search
from aiommap._byte_search import search
from aiommap._errors import TruncatedError
from aiommap._file import open_file
from aiommap._kernel import Kernel, native
from aiommap._map_making import map_file, map_memory, remap
from aiommap._mapped_memory import INLINE
from aiommap._mapping import Mapping
from aiommap._options import MmapOptions, Protection
from aiommap._reshaping import protected, resized

from .content import file_of, inc, maps_of, only_linux, settled_descriptors, zeros
from .fake_kernel import FakeKernel

N = 300_000
PAGE = mmap.PAGESIZE
READ, WRITE, COPY, EXECUTE = Protection

KERNELS: dict[str, Callable[[], Kernel]] = {
    "native": lambda: native,
    "fake": FakeKernel,
    "old": FakeKernel.old,
}


@pytest.fixture(params=list(KERNELS))
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return KERNELS[request.param]()


def mapped(
    kernel: Kernel,
    path: Path,
    protection: Protection = WRITE,
    offset: int = 0,
    length: int | None = None,
) -> Mapping:
    return map_file(open_file(kernel, str(path), protection), protection, offset, length)


@only_linux
def test_a_page_that_has_gone_is_not_taken_for_there(tmp_path: Path) -> None:
    """A read that would have to wait says that the page is not in memory, whatever the size is."""
    kernel = FakeKernel()
    mapping = mapped(kernel, file_of(tmp_path, inc(N)))
    assert mapping.reaches_nowait(0, PAGE)
    kernel.fail("read_nowait", errno.EAGAIN)
    assert not mapping.reaches_nowait(0, PAGE)


@pytest.mark.parametrize("protection", Protection)
@pytest.mark.parametrize(("offset", "length"), [(0, None), (1, 5), (PAGE - 1, 2), (5_000, None)])
def test_read(
    tmp_path: Path, kernel: Kernel, protection: Protection, offset: int, length: int | None
) -> None:
    """read, read_into and the buffer give the bytes of the file, from any offset."""
    mapping = mapped(kernel, file_of(tmp_path, inc(N)), protection, offset, length)
    size = N - offset if length is None else length
    assert (mapping.offset, mapping.length, mapping.protection) == (offset, size, protection)
    assert mapping.private == (protection is COPY)
    assert mapping.address % PAGE == offset % PAGE
    assert mapping.read(0, size) == inc(size, offset)
    assert mapping.read(0, 0) == b""
    buffer = bytearray(size)
    mapping.read_into(0, memoryview(buffer))
    assert buffer == inc(size, offset)
    with mapping.buffer(1, size - 1, writable=False) as view:
        assert view.readonly
        assert view == inc(size - 1, offset + 1)


@pytest.mark.parametrize("protection", [WRITE, COPY])
def test_write(tmp_path: Path, kernel: Kernel, protection: Protection) -> None:
    """write stores exactly, into the file or into the private copy."""
    path = file_of(tmp_path, N)
    mapping = mapped(kernel, path, protection, offset=3)
    expected = bytearray(N - 3)
    for offset, length in ((0, 1), (PAGE - 4, 9), (100, 200_000), (N - 4, 1), (5, 0)):
        mapping.write(offset, memoryview(inc(length, 7)))
        expected[offset : offset + length] = inc(length, 7)
        assert mapping.read(0, N - 3) == expected
    assert path.read_bytes() == (zeros(3) + expected if protection is WRITE else zeros(N))


def test_truncated(tmp_path: Path, kernel: Kernel) -> None:
    """What the file does not reach is a TruncatedError with the place where it ends."""
    path = file_of(tmp_path, inc(N))
    for protection in (READ, WRITE, COPY):
        os.truncate(path, N)
        path.write_bytes(inc(N))
        mapping = mapped(kernel, path, protection, offset=100)
        os.truncate(path, 10_100)
        assert mapping.reach() == 10_000
        assert mapping.read(0, 10_000) == inc(10_000, 100)
        calls: list[Callable[[], object]] = [
            partial(mapping.read, 9_999, 2),
            partial(mapping.read, 200_000, 5),
            partial(mapping.load, 0, 20_000),
            partial(mapping.load, 9_999, 2),
            partial(mapping.check_reach, 0, 10_001),
            partial(search, mapping, 0, 20_000, b"nowhere", last=True),
        ]
        if protection.writable:
            calls += [
                partial(mapping.write, 9_999, memoryview(b"ab")),
                partial(mapping.write, 200_000, memoryview(b"ab")),
                partial(mapping.load, 0, 20_000, write=True),
            ]
        for call in calls:
            with pytest.raises(TruncatedError, match="reaches to byte 10000") as caught:
                call()
            assert caught.value.filename == str(path)
        assert not mapping.is_loaded_nowait(9_999, 2)
        assert mapping.read_nowait(9_999, 2) is None
        mapping.check_reach(10_000, 0)
        os.truncate(path, 50)
        assert mapping.reach() == 0


@only_linux
def test_no_weak_reference_leads_to_memory_that_is_unmapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flush that comes by one would sync what is at the address by then."""
    mapping = mapped(native, file_of(tmp_path, inc(N)))
    reference = weakref.ref(mapping)
    seen: list[object] = []

    def finisher(end: Callable[[], object]) -> None:
        seen.append(reference())
        end()

    monkeypatch.setattr(Mapping, "finisher", staticmethod(finisher))
    del mapping
    assert set(seen) == {None}


@only_linux
def test_nowait_answers_without_a_wait(tmp_path: Path) -> None:
    """Where pages are not in memory, the nowait calls say no, and change nothing."""
    path = file_of(tmp_path, inc(N))
    mapping = mapped(native, path)
    assert mapping.is_loaded_nowait(0, 0)
    mapping.load(0, N)
    for offset, length in ((0, 1), (PAGE - 1, 2), (0, 3 * PAGE), (5, INLINE), (0, N)):
        assert mapping.is_loaded_nowait(offset, length)
        if length <= INLINE:
            assert mapping.read_nowait(offset, length) == inc(length, offset)
    assert mapping.read_nowait(0, INLINE + 1) is None
    os.sync()
    os.posix_fadvise(mapping.file.fd, 0, 0, os.POSIX_FADV_DONTNEED)  # type: ignore[union-attr]
    # Pages that are mapped stay; a new map sees the others gone.
    other = mapped(native, path)
    del mapping
    os.posix_fadvise(other.file.fd, 0, 0, os.POSIX_FADV_DONTNEED)  # type: ignore[union-attr]
    if other.resident_bytes(0, N) == 0:
        other.starts.under_way = other.starts.most
        assert not other.is_loaded_nowait(N - 1, 1)
        assert other.resident_bytes(0, N) == 0
        # With a place left, a look starts the read, which may be done before the answer.
        other.starts.under_way = 0
        other.is_loaded_nowait(N - 1, 1)
        assert other.read_nowait(N - 1, 1) in (None, inc(1, N - 1))


def test_write_nowait_only_where_a_store_cannot_wait(tmp_path: Path, kernel: Kernel) -> None:
    """A file's pages are stored to in a worker; small stores into loaded memory on the loop."""
    path = file_of(tmp_path, inc(N))
    mapping = mapped(kernel, path)
    if mapping.shares_disk:
        assert not mapping.write_nowait(0, memoryview(b"abc"))
        assert mapping.read(0, 3) == inc(3)
    memory = map_memory(kernel, N, WRITE, MmapOptions())
    memory.load(0, N, write=True)
    stored = memory.write_nowait(0, memoryview(b"abc"))
    assert memory.read(0, 3) == (b"abc" if stored else zeros(3))
    assert not memory.write_nowait(0, memoryview(bytes(INLINE + 1)))


@only_linux
def test_exported(tmp_path: Path) -> None:
    """exported() sees buffers and slices of them, has no side effects, and no false alarm."""
    mapping = mapped(native, file_of(tmp_path, inc(N)))
    assert not mapping.exported()
    buffer = mapping.buffer(5, 10, writable=True)
    part = buffer[2:]
    assert mapping.exported()
    buffer.release()
    assert mapping.exported()
    part.release()
    assert not mapping.exported()
    nothing = mapping.buffer(5, 0, writable=True)
    assert not mapping.exported()
    assert not nothing.readonly
    assert len(nothing) == 0
    assert mapping.read(0, 3) == inc(3)


@only_linux
def test_lifetime(tmp_path: Path) -> None:
    """The memory goes with the mapping, or with the last buffer."""
    path = file_of(tmp_path, inc(N))
    before = settled_descriptors()
    mapping = mapped(native, path)
    assert maps_of(path) == 1
    del mapping
    assert maps_of(path) == 0
    mapping = mapped(native, path)
    buffer = mapping.buffer(5, 10, writable=True)
    del mapping
    gc.collect()
    assert maps_of(path) == 1
    assert buffer == inc(10, 5)
    del buffer
    assert maps_of(path) == 0
    assert settled_descriptors() == before


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("needle", [b"x", b"the needle", b"the needle" * 50_000])
def test_search(kernel: Kernel, last: bool, needle: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """search gives the first or last place from the range's start, across its windows."""
    monkeypatch.setattr(_byte_search, "_WINDOW", 256 << 10)
    size = (1 << 20) + 5
    memory = map_memory(kernel, size, WRITE, MmapOptions())
    places = [0, 3, (256 << 10) - 4, (256 << 10) + 11, size - len(needle)]
    for place in places:
        if place + len(needle) > size:
            continue
        memory.write(place, memoryview(needle))
        find = bytes.rfind if last else bytes.find
        content = memory.read(0, size)
        assert search(memory, 0, size, needle, last=last) == find(content, needle)
        assert search(memory, 3, size - 5, needle, last=last) == find(content[3 : size - 2], needle)
        memory.write(place, memoryview(bytes(len(needle))))
    assert search(memory, 0, size, needle, last=last) == -1
    assert search(memory, 0, len(needle) - 1, needle, last=last) == -1


def test_write_of_bytes_of_its_own(kernel: Kernel) -> None:
    """A source that overlaps its target is copied as if it were somewhere else."""
    memory = map_memory(kernel, N, WRITE, MmapOptions())
    data = inc(N - 5) + b"12345"
    for source, target, length in ((0, 5, 100_000), (5, 0, 100_000), (7, 7, 10)):
        memory.write(0, memoryview(data))
        memory.write(target, memory.buffer(source, length, writable=False))
        expected = bytearray(data)
        expected[target : target + length] = data[source : source + length]
        assert memory.read(0, N) == expected


@only_linux
def test_a_bad_buffer_is_an_error(tmp_path: Path) -> None:
    """A caller's buffer over a truncated map is EFAULT, not a crash and not a TruncatedError."""
    path = file_of(tmp_path, inc(N))
    theirs = mapped(native, path)
    source = theirs.buffer(100_000, 10, writable=True)
    memory = map_memory(native, N, WRITE, MmapOptions())
    os.truncate(path, 5)
    with pytest.raises(OSError, match="memory of the buffer given") as caught:
        memory.write(0, source)
    assert caught.value.errno == errno.EFAULT
    for call in (memory.read_into, map_memory(native, N, COPY, MmapOptions()).read_into):
        with pytest.raises(OSError, match=r"Bad address|memory of the buffer given"):
            call(0, source)
    ours = mapped(native, file_of(tmp_path, inc(N), "other"))
    with pytest.raises(OSError, match=r"Bad address|memory of the buffer given"):
        ours.read_into(0, source)


def test_resident_bytes(kernel: Kernel) -> None:
    """Loaded memory is resident, cut to the range that was asked for."""
    memory = map_memory(kernel, 5 * PAGE, WRITE, MmapOptions())
    memory.write(0, memoryview(inc(5 * PAGE)))
    assert memory.resident_bytes(0, 5 * PAGE) == 5 * PAGE
    assert memory.resident_bytes(PAGE - 1, 2) == 2
    assert memory.resident_bytes(3, 0) == 0


def test_page_numbers(tmp_path: Path) -> None:
    """Pages are counted from the one that the map begins in."""
    mapping = mapped(native, file_of(tmp_path, inc(N)), offset=PAGE + 10)
    assert mapping.page_numbers(0, 1) == (0, 1)
    assert mapping.page_numbers(0, PAGE - 10) == (0, 1)
    assert mapping.page_numbers(0, PAGE - 9) == (0, 2)
    assert mapping.page_numbers(PAGE - 10, 1) == (1, 2)


def test_syncable(tmp_path: Path) -> None:
    """Only stores into a READ_WRITE map of a named file can be made durable."""
    path = file_of(tmp_path, inc(N))
    for protection in Protection:
        assert mapped(native, path, protection).syncable == (protection is WRITE)
        assert not map_memory(native, N, protection, MmapOptions()).syncable


def test_write_back_and_sync(tmp_path: Path) -> None:
    """What was synced is what a power loss leaves; started write-back alone is not."""
    kernel = FakeKernel(durability=True)
    path = file_of(tmp_path, N)
    mapping = mapped(kernel, path, offset=10)
    mapping.write(5, memoryview(b"abc"))
    mapping.start_write_back(5, 3)
    mapping.write_back(5, 3)
    assert kernel.disk.durable(path)[15:18] == zeros(3)
    mapping.sync_range(5, 3)
    assert kernel.disk.durable(path)[15:18] == b"abc"


@pytest.mark.parametrize("call", ["start_write_back", "write_back"])
def test_errors_of_write_back_carry_the_path(tmp_path: Path, call: str) -> None:
    """The kernel's errors have the path."""
    kernel = FakeKernel()
    path = file_of(tmp_path, inc(N))
    mapping = mapped(kernel, path)
    kernel.fail(call, errno.EIO)
    with pytest.raises(OSError, match="Input/output") as caught:
        getattr(mapping, call)(0, N)
    assert caught.value.filename == str(path)


@pytest.mark.parametrize("error", [errno.EFAULT, errno.EIO, errno.EINVAL, errno.ENOSYS])
def test_load_explains_itself(tmp_path: Path, error: int) -> None:
    """EFAULT becomes what reading the file says; a kernel that cannot populate reads instead."""
    kernel = FakeKernel()
    path = file_of(tmp_path, inc(N))
    mapping = mapped(kernel, path)
    kernel.fail("populate_read", error)
    if error in (errno.EINVAL, errno.ENOSYS):
        mapping.load(0, N)
        kernel.calls.clear()
        mapping.load(0, N)
        assert "populate_read" not in kernel.names()
        return
    kernel.fail("read", errno.EIO)
    with pytest.raises(OSError, match="Input/output") as caught:
        mapping.load(0, N)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))
    kernel.heal("read")
    with pytest.raises(OSError, match="Input/output"):
        mapping.load(0, N)


def test_a_full_disk_shows_before_anything_is_stored(tmp_path: Path) -> None:
    """A hole without room is ENOSPC with the path, and no byte has changed."""
    kernel = FakeKernel()
    path = file_of(tmp_path, N)
    mapping = mapped(kernel, path)
    kernel.fail("populate_write", errno.EFAULT)
    kernel.fail("reserve", errno.ENOSPC)
    with pytest.raises(OSError, match="No space left") as caught:
        mapping.write(0, memoryview(b"abc"))
    assert caught.value.filename == str(path)
    assert path.read_bytes() == zeros(N)


def test_map_file_refuses(tmp_path: Path) -> None:
    """Empty files, and ranges that are not inside."""
    with pytest.raises(ValueError, match="empty file"):
        mapped(native, file_of(tmp_path, b""))
    path = file_of(tmp_path, inc(10))
    for offset, length in ((10, None), (11, 1), (0, 11), (5, 6)):
        with pytest.raises(ValueError, match="not inside the file of 10 bytes"):
            mapped(native, path, offset=offset, length=length)


def test_remap_and_reshaping(tmp_path: Path) -> None:
    """Two mappings of one file share bytes; resized and protected ones have the same."""
    path = file_of(tmp_path, inc(N))
    mapping = mapped(native, path)
    assert mapping.file is not None
    other = remap(mapping.file, READ, 5, 10)
    mapping.write(5, memoryview(b"abc"))
    assert other.read(0, 4) == b"abc" + inc(1, 8)
    assert other.file is mapping.file
    longer = resized(mapping, N + 5)
    assert (longer.length, path.stat().st_size) == (N + 5, N + 5)
    assert protected(longer, READ).read(N - 1, 6) == inc(1, N - 1) + zeros(5)
    shorter = resized(longer, 5)
    assert (shorter.length, path.stat().st_size) == (5, 5)
    memory = map_memory(FakeKernel.old(), N, WRITE, MmapOptions())
    memory.write(0, memoryview(array.array("B", inc(N))))
    assert resized(memory, N + 3).read(0, N + 3) == inc(N) + zeros(3)
    assert protected(memory, READ).protection is READ
