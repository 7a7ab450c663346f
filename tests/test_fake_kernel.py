"""The fake kernel does what a test tells it, and nothing else."""

from __future__ import annotations

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("the stand-ins are built out of Linux calls", allow_module_level=True)

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from aiommap._kernel import Kernel, address_of
from aiommap._options import Protection

from .fake_kernel import Call, FakeKernel
from .kernel_witnesses import PAGE, OpenFile


@pytest.fixture
def file(tmp_path: Path) -> Iterator[OpenFile]:
    with OpenFile(tmp_path / "file") as opened:
        yield opened


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

    def sync() -> None:
        fake.sync_data(file.fd)
        seen.append("done")

    with fake.hold("sync_data", on_enter=lambda: seen.append("entered")) as disk:
        thread = threading.Thread(target=sync)
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
    for feature in ("populate", "nowait_reads", "cachestat", "reserve", "write_back_start"):
        assert not getattr(answer, feature), feature
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
