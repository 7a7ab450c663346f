"""create(): a new file with blocks and a durable name, or none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import anyio
import pytest
from anyio.lowlevel import checkpoint

from aiommap import AsyncMmap, Protection, _file_creation
from aiommap._event_loop import current_event_loop

from .content import (
    file_descriptors,
    file_of,
    inc,
    maps_of,
    only_linux,
    open_descriptors,
    settled_descriptors,
    zeros,
)
from .fake_kernel import FakeKernel
from .flushing import begin
from .processes import run_python

pytestmark = pytest.mark.anyio

N = 100_000


class Mmap(AsyncMmap):
    """A map on a kernel that a test can break."""


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    kernel = FakeKernel(durability=True)
    monkeypatch.setattr(Mmap, "_kernel", kernel)
    return kernel


async def test_a_new_file(tmp_path: Path) -> None:
    """The file has its length, zeros, blocks for all of it, and is mapped READ_WRITE."""
    path = tmp_path / "new"
    async with AsyncMmap.create(path, N) as m:
        assert (len(m), m.protection, m.offset) == (N, Protection.READ_WRITE, 0)
        assert path.read_bytes() == zeros(N)
        assert path.stat().st_blocks * 512 >= N
        await m.write_at(0, inc(N))
    assert path.read_bytes() == inc(N)


async def test_awaited_too(tmp_path: Path) -> None:
    """create can be awaited."""
    m = await AsyncMmap.create(os.fsencode(tmp_path / "new"), 1)
    await m.aclose()
    assert (tmp_path / "new").stat().st_size == 1


async def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name without a directory is one in the current directory, as str and as bytes."""
    monkeypatch.chdir(tmp_path)
    for name in ("new", b"other"):
        async with AsyncMmap.create(name, 10):
            pass
    assert sorted(os.listdir(tmp_path)) == ["new", "other"]


@pytest.mark.parametrize("name", ["new", b"new", "link/../new"])
@pytest.mark.parametrize("call", ["sync_all", "sync_directory", "map_file"])
async def test_relative_path_and_another_directory_meanwhile(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kernel: FakeKernel,
    call: str,
    name: str | bytes,
) -> None:
    """The current directory changes between creation and failure: the file is removed all the
    same, and what would have been made durable is the directory that it was made in."""
    home, other = tmp_path / "home", tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    home.mkdir()
    (home / "link").symlink_to(other / "deep")
    monkeypatch.chdir(home)
    kernel.before("reserve", lambda _: os.chdir(tmp_path))
    kernel.fail(call, errno.EIO)
    with pytest.raises(OSError, match="Input/output error") as caught:
        await Mmap.create(name, N)
    assert caught.value.filename == name
    assert os.listdir(home) == ["link"]
    assert os.listdir(other) == ["deep"]
    for each in kernel.calls:
        if each.name == "sync_directory":
            (folder,) = each.arguments
            assert os.path.samefile(folder, other if "link" in str(name) else home)


@only_linux
async def test_relative_path_below_a_directory_that_may_not_be_searched(tmp_path: Path) -> None:
    """Where only the relative name leads to the file, that one is used."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    (tmp_path / "home").mkdir()
    os.chown(tmp_path / "home", 65534, 65534)
    tmp_path.chmod(0o700)
    done = run_python(_CREATE_AS_NOBODY, tmp_path / "home")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert os.listdir(tmp_path / "home") == ["new"]


_CREATE_AS_NOBODY = """
import os, sys
from aiommap._file_creation import create_file
from aiommap._kernel import native

os.chdir(sys.argv[1])
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
assert create_file(native, "new", 10, exist_ok=False, mode=0o666).made
"""


@pytest.mark.parametrize("name", ["missing/new", b"old"])
async def test_errors_have_a_relative_path_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | bytes
) -> None:
    """Also where the file cannot be made."""
    monkeypatch.chdir(tmp_path)
    file_of(tmp_path, inc(100), "old")
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        await AsyncMmap.create(name, N)
    assert caught.value.errno in (errno.ENOENT, errno.EEXIST)
    assert caught.value.filename == name


async def test_file_and_name_are_durable(tmp_path: Path, kernel: FakeKernel) -> None:
    """File, then directory are synced, after the blocks are there."""
    path = tmp_path / "new"
    async with Mmap.create(path, N):
        assert kernel.names("reserve", "sync_all", "sync_directory", "map_file")[-3:] == [
            "sync_all",
            "sync_directory",
            "map_file",
        ]
        assert kernel.names("reserve") != []
        assert kernel.disk.durable(path) == zeros(N)
        (call,) = [call for call in kernel.calls if call.name == "sync_directory"]
        assert call.arguments[0] == str(tmp_path)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
async def test_mode(tmp_path: Path, mode: int) -> None:
    """The mode is that of a new file, before the umask."""
    umask = os.umask(0o027)
    try:
        async with AsyncMmap.create(tmp_path / "new", 10, mode=mode):
            pass
    finally:
        os.umask(umask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == mode & ~0o027


async def test_the_file_is_there(tmp_path: Path) -> None:
    """Without exist_ok, a file that is there is FileExistsError with the path, untouched."""
    path = file_of(tmp_path, inc(100))
    with pytest.raises(FileExistsError, match="File exists") as caught:
        await AsyncMmap.create(path, N)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == inc(100)


@pytest.mark.parametrize("size", [0, 1, 100, N - 1, N])
async def test_exist_ok_keeps_content_and_grows(tmp_path: Path, size: int) -> None:
    """With exist_ok a shorter file keeps its content and is filled up with zeros."""
    path = file_of(tmp_path, inc(size))
    async with AsyncMmap.create(path, N, exist_ok=True) as m:
        assert await m.read_at(0, N) == inc(size) + zeros(N - size)
        assert path.stat().st_blocks * 512 >= N
    assert path.read_bytes() == inc(size) + zeros(N - size)


async def test_exist_ok_makes_a_new_one(tmp_path: Path) -> None:
    """With exist_ok a missing file is made."""
    async with AsyncMmap.create(tmp_path / "new", 10, exist_ok=True) as m:
        assert await m.read_at(0, 10) == zeros(10)


async def test_exist_ok_refuses_a_longer_file(tmp_path: Path) -> None:
    """A longer file is a ValueError with both lengths; it is not cut."""
    path = file_of(tmp_path, inc(N))
    with pytest.raises(ValueError, match=f"the file has {N} bytes, more than the {N - 1} asked"):
        await AsyncMmap.create(path, N - 1, exist_ok=True)
    assert path.read_bytes() == inc(N)


async def test_a_hole_is_filled(tmp_path: Path) -> None:
    """exist_ok reserves blocks of a sparse file too, and changes no byte."""
    path = file_of(tmp_path, N)
    with open(path, "r+b") as file:
        file.seek(50_000)
        file.write(b"abc")
    async with AsyncMmap.create(path, N, exist_ok=True):
        assert path.stat().st_blocks * 512 >= N
    assert path.read_bytes() == zeros(50_000) + b"abc" + zeros(N - 50_003)


async def test_wrong_arguments(tmp_path: Path) -> None:
    """Lengths and modes that cannot be raise in the call, and make no file."""
    for length, error in ((0, ValueError), (-1, ValueError), (2**63, ValueError), (1.0, TypeError)):
        with pytest.raises(error, match="length"):
            AsyncMmap.create(tmp_path / "new", length)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="length must be an integer"):
        AsyncMmap.create(tmp_path / "new", True)
    with pytest.raises(TypeError, match="mode must be an integer"):
        AsyncMmap.create(tmp_path / "new", 1, mode="rw")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NUL"):
        AsyncMmap.create("a\0b", 1)
    with pytest.raises(FileNotFoundError):
        await AsyncMmap.create("", 1)
    assert os.listdir(tmp_path) == []


async def test_missing_directory(tmp_path: Path) -> None:
    """A directory that is not there is the kernel's error with the path."""
    path = tmp_path / "missing" / "new"
    with pytest.raises(FileNotFoundError, match="No such file") as caught:
        await AsyncMmap.create(path, 10)
    assert caught.value.filename == str(path)


@only_linux
async def test_a_name_that_is_no_file(tmp_path: Path) -> None:
    """Directories, FIFOs and links that lead nowhere are errors, and stay."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, expected in (
        ("folder", {errno.EISDIR}),
        ("fifo", {errno.ENODEV}),
        ("link", {errno.ENOENT, errno.EEXIST}),
    ):
        with pytest.raises(OSError, match=r"\[Errno") as caught:
            await AsyncMmap.create(tmp_path / name, 10, exist_ok=True)
        assert caught.value.errno in expected
        assert caught.value.filename == str(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "folder", "link"]


async def test_longer_than_the_file_system_allows(tmp_path: Path) -> None:
    """Too long a file is the kernel's error with the path, and leaves no file."""
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        await AsyncMmap.create(tmp_path / "new", 2**62)
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert caught.value.filename == str(tmp_path / "new")
    assert os.listdir(tmp_path) == []


CALLS = ["reserve", "sync_all", "sync_directory", "map_file", "file_is_in_memory", "file_size"]


@only_linux
@pytest.mark.parametrize("call", CALLS)
async def test_failures_leave_no_file(tmp_path: Path, kernel: FakeKernel, call: str) -> None:
    """Wherever it fails, the new file, the descriptor and the map are gone."""
    before = settled_descriptors()
    kernel.fail(call, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left") as caught:
        await Mmap.create(tmp_path / "new", N)
    assert caught.value.filename == str(tmp_path / "new")
    assert os.listdir(tmp_path) == []
    assert open_descriptors() == before


@pytest.mark.parametrize("call", CALLS)
async def test_failures_keep_a_file_that_was_there(
    tmp_path: Path, kernel: FakeKernel, call: str
) -> None:
    """With exist_ok, a failure leaves the file that was there, with its content."""
    path = file_of(tmp_path, inc(100))
    kernel.fail(call, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        await Mmap.create(path, N, exist_ok=True)
    assert path.read_bytes()[:100] == inc(100)


async def test_where_blocks_cannot_be_reserved(tmp_path: Path, kernel: FakeKernel) -> None:
    """Without fallocate a new file is written full of zeros; an old one only grows."""
    kernel.lack("fallocate")
    async with Mmap.create(tmp_path / "new", (2 << 20) + 5) as m:
        assert len(m) == (2 << 20) + 5
        assert (tmp_path / "new").stat().st_blocks * 512 >= 2 << 20
        assert await m.find(b"\1") == -1
    path = file_of(tmp_path, inc(100))
    async with Mmap.create(path, N, exist_ok=True) as m:
        assert await m.read_at(0, N) == inc(100) + zeros(N - 100)


@only_linux
@pytest.mark.parametrize("call", CALLS)
async def test_cancelled_in_the_middle(tmp_path: Path, kernel: FakeKernel, call: str) -> None:
    """Cancelled while the worker is at it, no file, descriptor or map is left."""
    before = settled_descriptors()
    loop = current_event_loop()
    entered = anyio.Event()
    with kernel.hold(call, on_enter=lambda: loop.post(entered.set)) as hold:
        async with anyio.create_task_group() as tg:

            async def run() -> None:
                await Mmap.create(tmp_path / "new", N)

            tg.start_soon(run)
            await entered.wait()
            tg.cancel_scope.cancel()
            hold.release.set()
    with anyio.fail_after(10):
        while os.listdir(tmp_path) or open_descriptors() != before:
            await checkpoint()


async def test_cancelled_with_a_file_that_was_there(tmp_path: Path, kernel: FakeKernel) -> None:
    """Cancelled with exist_ok, a file that was there stays."""
    path = file_of(tmp_path, inc(100))
    loop = current_event_loop()
    entered = anyio.Event()
    with kernel.hold("map_file", on_enter=lambda: loop.post(entered.set)) as hold:
        async with anyio.create_task_group() as tg:

            async def run() -> None:
                await Mmap.create(path, N, exist_ok=True)

            tg.start_soon(run)
            await entered.wait()
            tg.cancel_scope.cancel()
            hold.release.set()
    assert path.read_bytes()[:100] == inc(100)


@only_linux
async def test_a_file_that_took_the_name_meanwhile_stays(
    tmp_path: Path, kernel: FakeKernel
) -> None:
    """When creating fails after somebody replaced the file, theirs is not removed."""
    path = tmp_path / "new"

    def replace(_: object) -> None:
        path.unlink()
        path.write_bytes(b"theirs")

    kernel.before("sync_all", replace)
    kernel.fail("sync_directory", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        await Mmap.create(path, N)
    assert path.read_bytes() == b"theirs"


# Others who look at the same name meanwhile


@only_linux
async def test_nobody_sees_half_of_a_file(tmp_path: Path, kernel: FakeKernel) -> None:
    """Until it has its blocks and its length, a new file has no name."""
    seen: list[list[str]] = []
    kernel.before("reserve", lambda _: seen.append(os.listdir(tmp_path)))
    kernel.before("sync_all", lambda _: seen.append(os.listdir(tmp_path)))
    async with Mmap.create(tmp_path / "new", N):
        assert maps_of(tmp_path / "new") == 1
        assert len(file_descriptors(tmp_path / "new")) >= 1
    assert seen[0] == []
    assert seen[-1] == ["new"]
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize("exist_ok", [False, True])
@pytest.mark.parametrize("lacking", ["O_TMPFILE", "/proc"])
async def test_where_files_have_a_name_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str, exist_ok: bool
) -> None:
    """File systems, and systems, without files that have no name yet; and where there is no /proc
    to name them through."""

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    if lacking == "/proc":
        monkeypatch.setattr(os, "link", refuse)
    else:
        monkeypatch.setattr(_file_creation, "_UNNAMED", 0)
    before = settled_descriptors()
    async with AsyncMmap.create(tmp_path / "new", N, exist_ok=exist_ok) as m:
        assert await m.read_at(0, N) == zeros(N)
    with pytest.raises(OSError, match=r"\[Errno"):
        await AsyncMmap.create(tmp_path / "other", 2**62, exist_ok=exist_ok)
    assert os.listdir(tmp_path) == ["new"]
    assert settled_descriptors() == before


@pytest.mark.parametrize("exist_ok", [False, True])
async def test_somebody_takes_the_name_meanwhile(
    tmp_path: Path, kernel: FakeKernel, exist_ok: bool
) -> None:
    """The file that is there when ours is whole stays: it is mapped, or an error."""
    path = tmp_path / "new"
    taken: list[int] = []

    def take(_: object) -> None:
        if not path.exists():
            taken.append(path.write_bytes(b"theirs"))

    kernel.before("reserve", take)
    if exist_ok:
        async with Mmap.create(path, N, exist_ok=True) as m:
            assert await m.read_at(0, 10) == b"theirs" + zeros(4)
    else:
        with pytest.raises(FileExistsError) as caught:
            await Mmap.create(path, N)
        assert (caught.value.filename, caught.value.filename2) == (str(path), None)
        assert path.read_bytes() == b"theirs"
    assert taken == [6]
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
async def test_two_who_make_the_same_file(tmp_path: Path, kernel: FakeKernel, how: str) -> None:
    """One finds the file of the other, stores and flushes; what becomes of the other then takes
    nothing away from it."""
    path = tmp_path / "new"
    loop = current_event_loop()
    made = anyio.Event()
    with kernel.hold("sync_all", times=1, on_enter=lambda: loop.post(made.set)) as hold:
        async with anyio.create_task_group() as tasks:
            other = begin(tasks, lambda: Mmap.create(path, N, exist_ok=True))
            await made.wait()
            async with Mmap.create(path, N, exist_ok=True) as m:
                await m.write_at(0, b"durable")
                await m.flush()
                if how == "fails":
                    kernel.fail("sync_directory", errno.EIO, times=1)
                else:
                    other.scope.cancel()
                hold.release.set()
                await other.done.wait()
    assert (other.error is not None) is (how == "fails")
    assert path.read_bytes()[:7] == b"durable"
