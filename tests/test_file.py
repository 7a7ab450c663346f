"""File: one descriptor of ours, and how files are opened, grown and taken back. Synchronous."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from aiommap._file import File, duplicate_file, naming, open_file
from aiommap._file_creation import create_file, grow_file, remove_file, withdraw
from aiommap._kernel import native
from aiommap._options import Protection

from .content import file_of, inc, only_linux, settled_descriptors, zeros
from .fake_kernel import FakeKernel

N = 10_000


@only_linux
def test_it_closes_its_descriptor_when_the_last_user_lets_go(tmp_path: Path) -> None:
    """A File closes its descriptor when the last reference goes, or when told, once."""
    path = file_of(tmp_path, inc(N))
    before = settled_descriptors()
    file = open_file(native, str(path), Protection.READ)
    also = file
    del file
    assert settled_descriptors() != before
    del also
    assert settled_descriptors() == before
    file = open_file(native, str(path), Protection.READ)
    file.close()
    assert settled_descriptors() == before
    other = os.open(path, os.O_RDONLY)  # takes the number that became free
    file.close()
    del file
    os.fstat(other)
    os.close(other)


def test_naming() -> None:
    """Errors get the path that they are about, unless they have one."""
    with pytest.raises(OSError, match="Input/output") as caught, naming("name"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert caught.value.filename == "name"
    with pytest.raises(OSError, match="Input/output") as caught, naming("name"):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "other")
    assert caught.value.filename == "other"
    with pytest.raises(OSError, match="Input/output") as caught, naming(None):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert caught.value.filename is None


@only_linux
@pytest.mark.parametrize("protection", Protection)
def test_open_file_takes_no_more_rights_than_needed(tmp_path: Path, protection: Protection) -> None:
    """READ_WRITE opens read-write, the others read-only; closed on exec."""
    file = open_file(native, str(file_of(tmp_path, inc(N))), protection)
    mode = fcntl.fcntl(file.fd, fcntl.F_GETFL) & os.O_ACCMODE
    assert mode == (os.O_RDWR if protection is Protection.READ_WRITE else os.O_RDONLY)
    assert not os.get_inheritable(file.fd)


@only_linux
@pytest.mark.parametrize("create", [False, True])
def test_a_leased_file_is_opened_when_the_lease_is_given_back(tmp_path: Path, create: bool) -> None:
    """Samba and nfsd hold leases: who opens the file waits until they let go, and is let in."""
    path = file_of(tmp_path, inc(N))
    holder = os.open(path, os.O_RDWR)
    give_back = threading.Timer(0.05, fcntl.fcntl, (holder, fcntl.F_SETLEASE, fcntl.F_UNLCK))
    # The kernel tells the holder by a signal when somebody else opens the file.
    before = signal.signal(signal.SIGIO, lambda number, frame: give_back.start())
    try:
        fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        if create:
            file = create_file(native, str(path), N, exist_ok=True, mode=0o666)
        else:
            file = open_file(native, str(path), Protection.READ)
        assert file.size() == N
        give_back.join()  # it was started: there was a lease
    finally:
        os.close(holder)
        signal.signal(signal.SIGIO, before)


@only_linux
def test_no_second_try_for_a_fifo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no regular file is never opened in a way that may wait for ever."""
    path = tmp_path / "fifo"
    os.mkfifo(path)

    def refused(path: str, flags: int) -> int:
        assert flags & os.O_NONBLOCK
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(BlockingIOError, match="temporarily") as caught:
        open_file(native, str(path), Protection.READ)
    assert caught.value.filename == str(path)


def test_duplicate_shares_the_open_file(tmp_path: Path) -> None:
    """A duplicate is another descriptor of the same open file, and closed on exec."""
    with open(file_of(tmp_path, inc(N)), "rb") as original:
        file = duplicate_file(native, original.fileno(), "name")
        assert file.fd != original.fileno()
        assert not os.get_inheritable(file.fd)
        original.seek(5)
        assert os.lseek(file.fd, 0, os.SEEK_CUR) == 5
    assert file.size() == N
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        duplicate_file(native, 987_654, "name")
    assert caught.value.filename == "name"


def test_size_is_the_size_now(tmp_path: Path) -> None:
    """size asks the kernel each time."""
    path = file_of(tmp_path, inc(N))
    file = open_file(native, str(path), Protection.READ_WRITE)
    assert file.size() == N
    os.truncate(path, 5)
    assert file.size() == 5
    file.set_size(7)
    assert path.read_bytes() == inc(5) + zeros(2)


def test_errors_carry_the_path(tmp_path: Path) -> None:
    """Whatever the kernel says about the file has its path."""
    kernel = FakeKernel()
    file = open_file(kernel, str(file_of(tmp_path, inc(N))), Protection.READ_WRITE)
    for name, call in (
        ("file_size", file.size),
        ("set_file_size", lambda: file.set_size(1)),
        ("reserve", lambda: file.reserve(0, 5)),
        ("file_is_in_memory", lambda: file.inspect(writable=True)),
    ):
        kernel.fail(name, errno.EIO)
        with pytest.raises(OSError, match="Input/output") as caught:
            call()
        assert caught.value.filename == str(tmp_path / "data.bin")
        kernel.heal()


@only_linux
def test_inspect(tmp_path: Path) -> None:
    """inspect tells memory from disks, and who may trust mincore; what is no file is ENODEV."""
    file = open_file(native, str(file_of(tmp_path, inc(N))), Protection.READ)
    file.inspect(writable=False)
    assert file.in_memory == native.file_is_in_memory(file.fd)
    assert file.mincore_is_honest  # it is our own
    memory = File(native, os.memfd_create("x"))
    memory.inspect(writable=True)
    assert memory.in_memory
    folder = File(native, os.open(tmp_path, os.O_RDONLY), str(tmp_path))
    with pytest.raises(OSError, match="No such device") as caught:
        folder.inspect(writable=False)
    assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, str(tmp_path))


@only_linux
def test_inspect_names_the_file_when_it_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS and FUSE answer fstat with errors too, and these have the path."""

    def stale(fd: int) -> os.stat_result:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    file = open_file(native, str(file_of(tmp_path, inc(N))), Protection.READ)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", stale)
        with pytest.raises(OSError, match="Stale") as caught:
            file.inspect(writable=False)
    assert caught.value.filename == str(tmp_path / "data.bin")


@only_linux
def test_an_owner_without_a_number_may_be_anybody(tmp_path: Path) -> None:
    """In a user namespace without numbers for users, ourselves and the file's owner are both
    shown as 65534: it is not ours because of that, and mincore would lie."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to give the file to somebody else")
    path = file_of(tmp_path, inc(N))
    os.chmod(path, 0o644)
    os.chown(path, 12345, 12345)
    fd = os.open(path, os.O_RDONLY)
    try:
        done = subprocess.run(
            ["unshare", "--user", sys.executable, "-c", _IN_A_USER_NAMESPACE],
            stdin=fd,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[1],
            timeout=60,
            check=False,
        )
    finally:
        os.close(fd)
    if "unshare failed" in done.stderr:
        pytest.skip(f"no user namespaces: {done.stderr}")
    assert (done.returncode, done.stdout.split()) == (0, ["True", "False", "True"]), done.stderr


_IN_A_USER_NAMESPACE = """
import os
from aiommap._file import File
from aiommap._kernel import native

file = File(native, os.dup(0))
print(os.fstat(0).st_uid == os.geteuid())
file.inspect(writable=False)
print(file.mincore_is_honest)
file.inspect(writable=True)
print(file.mincore_is_honest)
"""


@pytest.mark.parametrize(("size", "length"), [(0, N), (5, N), (N, N), (N - 1, N)])
def test_grow_file(tmp_path: Path, size: int, length: int) -> None:
    """A file grows to the length, with blocks, and keeps its bytes."""
    path = file_of(tmp_path, inc(size))
    file = open_file(native, str(path), Protection.READ_WRITE)
    grow_file(file, length, new=False)
    assert path.read_bytes() == inc(size) + zeros(length - size)
    assert path.stat().st_blocks * 512 >= length


def test_grow_file_never_cuts(tmp_path: Path) -> None:
    """A file that is longer is a ValueError, and one that grows meanwhile is not cut."""
    path = file_of(tmp_path, inc(N))
    file = open_file(native, str(path), Protection.READ_WRITE)
    with pytest.raises(ValueError, match=f"the file has {N} bytes, more than the 5 asked for"):
        grow_file(file, 5, new=False)
    kernel = FakeKernel()
    raced = open_file(kernel, str(path), Protection.READ_WRITE)
    kernel.before("reserve", lambda call: os.truncate(path, 3 * N))
    grow_file(raced, 2 * N, new=False)
    assert path.stat().st_size == 3 * N


def test_a_reservation_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """ENOSPC in the middle gives the blocks back and keeps the size."""
    path = file_of(tmp_path, inc(N))
    kernel = FakeKernel()
    file = open_file(kernel, str(path), Protection.READ_WRITE)
    kernel.fail("reserve", errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        file.grow(2 * N)
    assert path.stat().st_size == N
    assert path.read_bytes() == inc(N)


def test_create_file_tells_whether_it_is_to_be_taken_back(tmp_path: Path) -> None:
    """Who made the file knows it: only a new one may be taken back, and not with exist_ok."""
    path = str(tmp_path / "new")
    file = create_file(native, path, N, exist_ok=False, mode=0o666)
    assert file.made
    again = create_file(native, path, N, exist_ok=True, mode=0o666)
    assert not again.made
    with pytest.raises(FileExistsError, match="File exists"):
        create_file(native, path, N, exist_ok=False, mode=0o666)
    withdraw(file)
    assert os.listdir(tmp_path) == []
    remove_file(file)  # gone already
    Path(path).write_bytes(b"theirs")
    remove_file(again)
    assert Path(path).read_bytes() == b"theirs"
    assert not create_file(native, path + "2", N, exist_ok=True, mode=0o666).made
