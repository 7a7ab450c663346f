"""Linux: what the kernel's own books say, and how old and confined kernels are met."""

from __future__ import annotations

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("about Linux", allow_module_level=True)

import ctypes
import errno
import fcntl
import mmap
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from aiommap._kernel import _linux, _portable, _posix, address_of
from aiommap._options import Advice, Protection

from .kernel_witnesses import PAGE, Answers, OpenFile, closed_descriptor, pattern, run_python
from .paging import on_disk
from .rigs.mounts import mount
from .rigs.small_fs import small_fs


@pytest.fixture
def file(tmp_path: Path) -> Iterator[OpenFile]:
    with OpenFile(tmp_path / "file") as opened:
        yield opened


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


@pytest.mark.smallfs
def test_capabilities_of_a_file_system_that_cannot_be_written() -> None:
    """Mounted read-only, a directory and a file in it are told of; blocks cannot be reserved."""
    with small_fs("tmpfs", 16 * PAGE) as small:
        (small.path / "file").write_bytes(b"abc")
        mount("tmpfs", small.path, "tmpfs", flags=_MS_REMOUNT_READ_ONLY)
        for path in (small.path, small.path / "file"):
            answer = _linux.capabilities(str(path))
            assert not answer.reserve
            assert not answer.nowait_reads
            assert not answer.full_sync
            assert answer.write_back_start


_MS_REMOUNT_READ_ONLY = 32 | 1


@pytest.mark.parametrize("path", ["/proc", "/proc/self/fd", "/sys"])
def test_capabilities_of_what_has_no_files_of_ours(path: str) -> None:
    """Where no file can be made there is an answer all the same."""
    assert not _linux.capabilities(path).nowait_reads


def test_capabilities_without_a_directory_for_temporary_files(
    file: OpenFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without an argument the current directory is asked then, and where that cannot be written
    either, it is told what can be."""

    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    assert _linux.capabilities(None) == _linux.capabilities(str(tmp_path))
    monkeypatch.chdir("/proc")
    assert not _linux.capabilities(None).reserve


def test_capabilities_without_proc(
    file: OpenFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are found out without /proc, as in a bare chroot."""
    expected = _linux.capabilities(str(file.path))
    readlink = os.readlink

    def no_proc(path: str) -> str:
        if path.startswith("/proc"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return readlink(path)

    monkeypatch.setattr(os, "readlink", no_proc)
    for path in (str(file.path), str(tmp_path)):
        assert _linux.capabilities(path) == expected
    assert expected.reserve


def test_capabilities_of_who_may_not_write() -> None:
    """A directory and a file of somebody else: reads are tried on the file; nothing raises."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    path = Path("/etc/passwd")
    script = f"""
        import os
        import encodings.ascii  # the library may be root's alone
        from aiommap._kernel import _linux
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        for path in ({str(path.parent)!r}, {str(path)!r}):
            answer = _linux.capabilities(path)
            print(answer.nowait_reads, answer.reserve)
        """
    nowait = _linux.capabilities(str(path)).nowait_reads
    assert run_python(script).split() == ["False", "False", str(nowait), "False"]


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS, errno.EOVERFLOW])
def test_what_cannot_be_told_is_not_in_memory(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """A container that refuses fstatfs, or a C library without it, is no error."""
    memory = _linux.memory_file(PAGE, huge=False)
    assert memory is not None
    try:
        assert _linux.file_is_in_memory(memory)
        monkeypatch.setattr(_linux, "_fstatfs", Answers(error))
        assert not _linux.file_is_in_memory(memory)
        monkeypatch.setattr(_linux, "_fstatfs", None)
        assert not _linux.file_is_in_memory(memory)
    finally:
        os.close(memory)


@pytest.mark.parametrize(("machine", "size"), [("s390x", 4), ("ppc64le", 8), ("x86_64", 8)])
def test_the_width_of_a_file_systems_type(machine: str, size: int) -> None:
    """s390x has an unsigned int where the others have a long: big-endian, it makes a difference."""
    script = f"""
        import ctypes, os
        os.uname = lambda: os.uname_result(("Linux", "", "", "", "{machine}"))
        from aiommap._kernel import _linux
        print(ctypes.sizeof(_linux._FileSystemType))
        """
    assert int(run_python(script)) == min(size, ctypes.sizeof(ctypes.c_long))


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


@pytest.mark.parametrize(
    ("module", "function", "name", "arguments"),
    [
        (_linux, "_msync", "sync_range", (0, PAGE)),
        (_linux, "_sync_file_range", "start_write_back", (0, 0, 0, PAGE)),
        (_linux, "_sync_file_range", "write_back", (0, 0, 0, PAGE)),
        (_posix, "_madvise", "populate_read", (0, PAGE)),
    ],
)
def test_linux_begins_again_after_a_signal(
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    function: str,
    name: str,
    arguments: tuple[int, ...],
) -> None:
    """EINTR is not an error: the call is made until it is through."""
    answers = Answers(errno.EINTR, errno.EINTR, 0)
    monkeypatch.setattr(module, function, answers)
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
    monkeypatch.setattr(_posix, "_madvise", passing)
    _linux.advise(0, PAGE, Advice.RANDOM)
    assert len(passing.calls) == 3
    staying = Answers(errno.EAGAIN)
    monkeypatch.setattr(_posix, "_madvise", staying)
    with pytest.raises(BlockingIOError, match="temporarily unavailable"):
        _linux.advise(0, PAGE, Advice.RANDOM)
    assert len(staying.calls) < 100


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
    monkeypatch.setattr(_posix, "_madvise", Answers(errno.EINVAL))
    with pytest.raises(OSError, match="not supported") as caught:
        module.advise(0, PAGE, Advice.RANDOM)
    assert caught.value.errno == errno.ENOTSUP


def test_linux_populate_keeps_einval(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel before 5.14 says EINVAL to MADV_POPULATE_READ, and the caller knows it by that."""
    monkeypatch.setattr(_posix, "_madvise", Answers(errno.EINVAL))
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
    failure = errno.ENOMEM
    with pytest.raises(OSError, match="allocate"):
        _linux.copy(0, 0, 3500)


@pytest.mark.parametrize("lacking", ["the function", "the permission"])
def test_linux_copy_where_it_must_not_read_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lacking: str
) -> None:
    """A seccomp filter that refuses process_vm_readv costs time, and no safety: bytes behind the
    end of a truncated file are EFAULT, or a short copy, and not SIGBUS."""
    if lacking == "the function":
        monkeypatch.setattr(_linux, "_process_vm_readv", None)
    else:
        monkeypatch.setattr(_linux, "_process_vm_readv", Answers(errno.EPERM))
    length = 3 * (1 << 16) + 5
    source, target = pattern(length), bytearray(length)
    assert _linux.copy(address_of(target), address_of(source), length) == length
    assert target == source
    path = tmp_path / "cut"
    path.write_bytes(source)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), length) as memory:
        file.truncate(PAGE)
        target = bytearray(length)
        assert _linux.copy(address_of(target), address_of(memory), length) == PAGE
        assert target[:PAGE] == source[:PAGE]
        with pytest.raises(OSError, match="Bad address"):
            _linux.copy(address_of(target), address_of(memory) + PAGE, PAGE)


@pytest.mark.parametrize(
    ("function", "name", "arguments"),
    [
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


def test_the_known_size_is_the_size(file: OpenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """statx tells what fstat tells, and where the C library has no statx fstat does."""
    for size in (PAGE + 1, 3, 1 << 40):
        os.truncate(file.path, size)
        assert _linux.known_file_size(file.fd) == size
    monkeypatch.setattr(_linux, "_statx", None)
    assert _linux.known_file_size(file.fd) == 1 << 40
    monkeypatch.undo()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        _linux.known_file_size(closed_descriptor())


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM])
def test_the_size_without_statx_in_the_kernel(
    file: OpenFile, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """Before Linux 4.11 statx is ENOSYS, in some containers EPERM, and fstat answers."""
    os.truncate(file.path, 7)

    def missing(*arguments: object) -> int:
        ctypes.set_errno(error)
        return -1

    monkeypatch.setattr(_linux, "_statx", missing)
    assert _linux.known_file_size(file.fd) == _linux.file_size(file.fd) == 7


def test_who_asks_for_the_size_does_not_ask_for_the_times(file: OpenFile) -> None:
    """Else the next store changes them (multigrain timestamps), and its flush costs more."""

    def changed(ask: Callable[[int], object]) -> int:
        times = 0
        for _ in range(20):
            os.fstat(file.fd)
            os.pwrite(file.fd, b"x", 0)  # has a time of its own, because of that
            ask(file.fd)
            before = time.time_ns()
            os.pwrite(file.fd, b"x", 0)
            times += os.fstat(file.fd).st_ctime_ns >= before
        return times

    if changed(os.fstat) < 10:
        pytest.skip("no multigrain timestamps: Linux before 6.13, or a file system without them")
    # A tick of the clock may come in between.
    assert changed(_linux.file_size) < 10
    assert changed(_linux.known_file_size) < 10


def test_the_queue_of_a_disk(file: OpenFile) -> None:
    """A disk's queue is what sysfs says, and a guess for what is no disk."""
    device = os.fstat(file.fd).st_dev
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    said = [
        int(path.read_text())
        for path in (folder / "queue/nr_requests", folder.resolve().parent / "queue/nr_requests")
        if path.exists()
    ]
    assert _linux.disk_queue(file.fd) == (said[0] if said else 32)
    memory = _linux.memory_file(PAGE, huge=False)
    assert memory is not None
    try:
        assert _linux.disk_queue(memory) == 32
    finally:
        os.close(memory)


def test_what_is_read_ahead_and_the_longest_hint(file: OpenFile) -> None:
    """As far as sysfs says that the disk reads ahead, at least the 128 KiB of what is no disk."""
    device = os.fstat(file.fd).st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    disk = Path(f"/sys/dev/block/{name}")
    settings = (
        disk / "queue/read_ahead_kb",
        disk.resolve().parent / "queue/read_ahead_kb",
        Path(f"/sys/class/bdi/{name}/read_ahead_kb"),
    )
    said = [int(path.read_text()) << 10 for path in settings if path.exists()]
    ahead = _linux.read_ahead(file.fd)
    assert ahead == (said[0] if said else 128 << 10)
    longest = _linux.longest_hint(ahead)
    assert longest == max(128 << 10, ahead)
    assert longest % PAGE == 0
    assert _linux.longest_hint(0) == 128 << 10
    memory = _linux.memory_file(PAGE, huge=False)
    assert memory is not None
    try:
        assert _linux.read_ahead(memory) == 128 << 10
    finally:
        os.close(memory)


def test_more_hints_than_one_call_takes(file: OpenFile) -> None:
    """The kernel takes 1024 spans in one call; more are several calls."""
    if not _linux.populate_many([], write=False):
        pytest.skip("needs process_madvise on ourselves, Linux 6.14")
    memory = _linux.map_file(file.fd, 4 * PAGE, Protection.READ, 0)
    try:
        assert _linux.will_need_many([(address_of(memory), PAGE)] * 3000)
    finally:
        memory.close()


def test_many_page_ins_in_one_call(file: OpenFile) -> None:
    """All pages of all spans are mapped; a span behind the end of the file is False."""
    if not _linux.populate_many([], write=False):
        pytest.skip("needs process_madvise on ourselves, Linux 6.14")
    os.truncate(file.path, 64 * PAGE)
    memory = _linux.map_file(file.fd, 64 * PAGE, Protection.READ, 0)
    address = address_of(memory)
    spans = [(address + number * PAGE, 2 * PAGE) for number in range(0, 64, 8)]
    assert _linux.will_need_many(spans)
    assert _linux.populate_many(spans, write=False)
    state = _linux.resident(address, 64 * PAGE)
    assert all(state[number] & 1 and state[number + 1] & 1 for number in range(0, 64, 8))
    os.truncate(file.path, 20 * PAGE)
    assert not _linux.populate_many(spans, write=False)
    memory.close()


def test_many_pages_ready_for_stores_in_one_call(file: OpenFile) -> None:
    """All pages of all spans can be stored to; a span behind the end of the file is False."""
    if not _linux.populate_many([], write=True):
        pytest.skip("needs process_madvise on ourselves, Linux 6.14")
    os.truncate(file.path, 64 * PAGE)
    memory = _linux.map_file(file.fd, 64 * PAGE, Protection.READ_WRITE, 0)
    address = address_of(memory)
    spans = [(address + number * PAGE, PAGE) for number in range(0, 64, 8)]
    before = os.stat(file.path).st_blocks
    assert _linux.populate_many(spans, write=True)
    os.fsync(file.fd)
    assert os.stat(file.path).st_blocks > before  # the holes have blocks
    os.truncate(file.path, 20 * PAGE)
    assert not _linux.populate_many(spans, write=True)
    memory.close()


def test_many_copies_in_one_call(file: OpenFile) -> None:
    """Each to its place; False where a page of one cannot be touched, or without the call."""
    os.truncate(file.path, 4 * PAGE)
    memory = _linux.map_file(file.fd, 4 * PAGE, Protection.READ_WRITE, 0)
    address = address_of(memory)
    source = bytes(range(256))
    start = address_of(source)
    copies = [(address + number * PAGE + 5, start + number, 10 + number) for number in range(4)]
    assert _linux.copy_many(copies)
    for number in range(4):
        first = number * PAGE + 5
        assert memory[first : first + 10 + number] == source[number : 10 + 2 * number]
    assert _linux.copy_many([])
    os.truncate(file.path, PAGE)
    assert not _linux.copy_many(copies)
    memory.close()


def test_many_copies_on_older_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the call is missing or refused it is False, and nothing raises."""
    monkeypatch.setattr(_linux, "_process_vm_readv", lambda *arguments: -1)
    assert not _linux.copy_many([(0, 0, 1)])
    monkeypatch.setattr(_linux, "_process_vm_readv", None)
    assert not _linux.copy_many([(0, 0, 1)])


def test_many_page_ins_on_older_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the call is missing or refused it is False, and nothing raises."""
    monkeypatch.setattr(_linux, "_process_madvise", lambda *arguments: -1)
    assert not _linux.will_need_many([(0, PAGE)])
    assert not _linux.populate_many([(0, PAGE)], write=False)
    monkeypatch.setattr(_linux, "_process_madvise", None)
    assert not _linux.will_need_many([(0, PAGE)])
    assert not _linux.populate_many([(0, PAGE)], write=False)


def test_linux_memory_file_of_old_and_confined_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A flag too new is left out; a memfd that is missing or forbidden is None."""
    create = _linux.create_memory_file
    asked: list[int] = []

    def old(flags: int) -> int:
        asked.append(flags)
        if flags & 8:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return create(flags)

    monkeypatch.setattr(_linux, "create_memory_file", old)
    fd = _linux.memory_file(PAGE, huge=False)
    assert fd is not None
    os.close(fd)
    assert len(asked) == 2

    monkeypatch.setattr(_linux, "create_memory_file", create)
    monkeypatch.setattr(_linux, "_memfd_create", None)
    assert _linux.memory_file(PAGE, huge=False) is None


def test_reading_without_waiting_by_libc(file: OpenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """What os.preadv does is done without it, too: whole, short, refused and wrong."""
    os.pwrite(file.fd, bytes(range(100)), 0)
    for buffers, offset in (([10, 20], 3), ([1], 99), ([200], 50), ([5], 1 << 40)):
        expected = [bytearray(length) for length in buffers]
        found = [bytearray(length) for length in buffers]
        count = _linux.read_nowait(file.fd, expected, offset)
        assert _linux.read_nowait_by_libc(file.fd, found, offset) == count
        assert found == expected
    with pytest.raises(OSError, match="Bad file descriptor"):
        _linux.read_nowait_by_libc(closed_descriptor(), [bytearray(1)], 0)
    monkeypatch.setattr(_linux, "_preadv2", None)
    with pytest.raises(OSError) as caught:
        _linux.read_nowait_by_libc(file.fd, [bytearray(1)], 0)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_reading_without_waiting_by_libc_waits_for_no_disk(tmp_path: Path) -> None:
    """A page that is not in memory is refused."""
    path = on_disk(tmp_path, bytes(PAGE))
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            _linux.read_nowait_by_libc(fd, [bytearray(1)], 0)
    finally:
        os.close(fd)


def test_a_python_that_was_built_for_an_old_system(tmp_path: Path) -> None:
    """uv's interpreters know of neither preadv2 nor memfd_create; the system here does."""
    script = """
import os, sys
for name in ("RWF_NOWAIT", "MFD_CLOEXEC", "MFD_HUGETLB", "memfd_create"):
    delattr(os, name)
import anyio, aiommap
async def main():
    async with aiommap.AsyncMmap.create(sys.argv[1], 100000) as m:
        await m.write_at(0, b"data")
        before = m.statistics().loads_off_loop
        assert await m.read_at(0, 4) == b"data"
        async with m.view(0, 4) as v:
            assert bytes(v) == b"data"
        assert m.statistics().loads_off_loop == before
        await m.flush()
    async with aiommap.AsyncMmap.anonymous(4096) as m:
        await m.resize(8192)
    assert aiommap.capabilities(sys.argv[1]).nowait_reads
anyio.run(main)
"""
    subprocess.run([sys.executable, "-c", script, tmp_path / "file"], check=True)


def test_linux_memory_file_leaves_no_descriptor_when_it_cannot_grow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error is raised, and the descriptor is closed."""
    monkeypatch.setattr(os, "ftruncate", lambda fd, size: os.fstat(closed_descriptor()))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="Bad file descriptor"):
        _linux.memory_file(PAGE, huge=False)
    assert os.listdir("/proc/self/fd") == before


# An open file of one's own


def test_linux_reopens_what_may_be_written(file: OpenFile) -> None:
    """Another open file of the same file, with the same rights, closed on exec."""
    writable = os.open(file.path, os.O_RDWR | os.O_NOATIME)
    fd = _linux.reopen(writable)
    assert fd is not None
    os.lseek(writable, 5, os.SEEK_SET)
    assert os.lseek(fd, 0, os.SEEK_CUR) == 0
    assert not os.get_inheritable(fd)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    assert flags & os.O_ACCMODE == os.O_RDWR
    assert flags & os.O_NOATIME
    assert os.path.sameopenfile(fd, writable)
    os.unlink(file.path)
    again = _linux.reopen(writable)
    assert again is not None
    for each in (fd, again, writable):
        os.close(each)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY])
def test_linux_reopens_nothing_else(file: OpenFile, flags: int) -> None:
    """Who cannot write through a map has nothing to flush."""
    fd = os.open(file.path, flags)
    assert _linux.reopen(fd) is None
    os.close(fd)
    assert _linux.reopen(closed_descriptor()) is None


def test_linux_leaves_leases_alone(tmp_path: Path) -> None:
    """Opening a file breaks a lease on it, and the signal that tells so may end the process."""
    fd = os.open(tmp_path / "leased", os.O_RDWR | os.O_CREAT)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    assert _linux.reopen(fd) is None
    assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    again = _linux.reopen(fd)
    assert again is not None
    os.close(again)
    os.close(fd)
