"""Each rig works and each fault fires, shown with the kernel's own calls and nothing of ours.

What is proved here is what the proofs elsewhere stand on, controls included: a counter that never
counts and a power cut that loses nothing would prove anything.
"""

from __future__ import annotations

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("the rigs need Linux", allow_module_level=True)

import contextlib
import errno
import mmap
import os
import select
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio

from tests.rigs import availability, plugin, probes
from tests.rigs.faults import (
    PAGE,
    dirty_pages,
    evict,
    heartbeat,
    major_faults_of_this_thread,
    residency,
    resident_pages,
    write_back,
)
from tests.rigs.file_systems import FILE_SYSTEMS
from tests.rigs.mounts import remove_stale_homes
from tests.rigs.plain_files import TOUCH, mapped, opened, run_child, seconds
from tests.rigs.service import HOLD_LIMIT, Fault, Service
from tests.rigs.slow_file import SlowFile, content, slow_file
from tests.rigs.small_fs import SmallFileSystem

MIB = 1 << 20
every_file_system = pytest.mark.parametrize("kind", list(FILE_SYSTEMS))


class TestGate:
    def test_a_missing_rig_skips_with_the_remedy(
        self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without the rig a marked test is skipped, and the reason says what to do."""
        monkeypatch.delenv(plugin.REQUIRE, raising=False)
        monkeypatch.setattr(plugin, "missing", lambda rig: f"no {rig}: {probes.INSTALL}")
        request.node.add_marker("loopdev")
        with pytest.raises(pytest.skip.Exception, match=r"no loopdev: run \.ci/install-rigs"):
            plugin.pytest_runtest_setup(request.node)

    def test_a_missing_rig_fails_where_rigs_are_required(
        self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With AIOMMAP_REQUIRE_RIGS=1 the same skip is a failure."""
        monkeypatch.setenv(plugin.REQUIRE, "1")
        monkeypatch.setattr(plugin, "missing", lambda rig: f"no {rig}")
        request.node.add_marker("fuse")
        with pytest.raises(pytest.fail.Exception, match=r"no fuse .*forbids skipping"):
            plugin.pytest_runtest_setup(request.node)

    def test_an_unmarked_test_passes_the_gate(
        self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Tests that need no rig run everywhere."""
        monkeypatch.setattr(plugin, "missing", lambda rig: f"no {rig}")
        plugin.pytest_runtest_setup(request.node)

    def test_a_fixture_refuses_an_unmarked_test(self, request: pytest.FixtureRequest) -> None:
        """A test that forgets its marker fails here, not first on a machine without the rig."""
        with pytest.raises(pytest.fail.Exception, match=r"@pytest\.mark\.fuse"):
            request.getfixturevalue("make_slow_file")

    @pytest.mark.parametrize("rig", availability.RIGS)
    def test_users_other_than_root_are_told(
        self, rig: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Mounting needs root, and the reason names it."""
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        reason = availability.missing.__wrapped__(rig)
        assert reason is not None
        assert "run the tests as root" in reason

    @pytest.mark.loopdev
    def test_a_missing_mkfs_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The reason names the tool that is not there and how to install it."""
        monkeypatch.setattr(shutil, "which", lambda name, path: None)
        reason = availability.missing.__wrapped__("loopdev")
        assert reason == f"mkfs.ext4 is not installed: {probes.INSTALL}"


class TestService:
    """The queue of requests, by itself, with a clock of its own."""

    def test_requests_overlap(self) -> None:
        """Latency is per request: two that arrive together are done together."""
        service: Service[str] = Service()
        service.set_latency("read", 2.0, None)
        service.arrive("read", "a", 10.0)
        service.arrive("read", "b", 10.0)
        assert service.next_due() == 12.0
        assert service.pop_due(11.9) is None
        assert [service.pop_due(12.0), service.pop_due(12.0)] == [("read", "a"), ("read", "b")]

    def test_depth_makes_them_queue(self) -> None:
        """With one lane, the second starts when the first is done."""
        service: Service[str] = Service()
        service.set_latency("read", 2.0, 1)
        service.arrive("read", "a", 10.0)
        service.arrive("read", "b", 10.0)
        assert service.pop_due(12.0) == ("read", "a")
        assert service.pop_due(13.9) is None
        assert service.pop_due(14.0) == ("read", "b")

    def test_a_hold_ends_by_itself(self) -> None:
        """A forgotten hold does not leave unkillable processes behind."""
        service: Service[str] = Service()
        service.hold("fsync", 10.0)
        service.arrive("fsync", "a", 11.0)
        assert service.held("fsync") == 1
        assert service.next_due() == 10.0 + HOLD_LIMIT
        assert service.pop_due(10.0 + HOLD_LIMIT) == ("fsync", "a")

    def test_a_fault_can_be_counted(self) -> None:
        """``times=2`` fails two requests that it hits, and not those beside it."""
        service: Service[str] = Service()
        service.fail(Fault("read", errno.EIO, 4096, 4096), 2)
        assert service.error_of("read", 0, 4096) == 0
        assert service.error_of("read", 0, 8192) == errno.EIO
        assert service.error_of("write", 4096, 4096) == 0
        assert service.error_of("read", 8191, 1) == errno.EIO
        assert service.error_of("read", 4096, 1) == 0


@pytest.mark.fuse
class TestSlowFile:
    def test_a_page_takes_its_latency(self, make_slow_file: Callable[..., SlowFile]) -> None:
        """Each cold page of a map takes 20 ms, a warm one nothing."""
        file = make_slow_file(read=0.02)
        with opened(file.path) as descriptor, mapped(descriptor) as pages:
            for index in (0, 7, 300):
                start = time.perf_counter()
                pages[index * PAGE]
                assert time.perf_counter() - start >= 0.02
            pages[7 * PAGE]
        assert file.statistics().reads == 3

    def test_reads_overlap(self, make_slow_file: Callable[..., SlowFile]) -> None:
        """64 pages that are asked for together take one latency, not 64."""
        file = make_slow_file(read=0.05, max_readahead=0)
        with opened(file.path) as descriptor, ThreadPoolExecutor(64) as threads:
            start = time.perf_counter()
            list(threads.map(lambda index: os.pread(descriptor, 1, index * 8 * PAGE), range(64)))
            assert 0.05 <= time.perf_counter() - start < 64 * 0.05 / 2

    def test_advice_starts_reads(self, make_slow_file: Callable[..., SlowFile]) -> None:
        """WILLNEED on 64 scattered pages has 64 reads under way and waits for none of them."""
        file = make_slow_file(max_readahead=0)
        file.hold("read")
        with opened(file.path) as descriptor:
            for index in range(64):
                os.posix_fadvise(descriptor, index * 8 * PAGE, PAGE, os.POSIX_FADV_WILLNEED)
            file.wait_held("read", 64)
            file.release("read")
            for index in range(64):
                assert os.pread(descriptor, 1, index * 8 * PAGE) == content(index * 8 * PAGE, 1)
        statistics = file.statistics()
        assert (statistics.reads, statistics.most_reads_at_once) == (64, 64)

    def test_depth_takes_turns(self, make_slow_file: Callable[..., SlowFile]) -> None:
        """With ``depth=1`` eight threads wait eight latencies."""
        file = make_slow_file(max_readahead=0)
        file.set_latency(read=0.01, depth=1)
        with opened(file.path) as descriptor, ThreadPoolExecutor(8) as threads:
            start = time.perf_counter()
            list(threads.map(lambda index: os.pread(descriptor, 1, index * MIB), range(8)))
            assert time.perf_counter() - start >= 0.08

    def test_read_ahead_can_be_off(self, make_slow_file: Callable[..., SlowFile]) -> None:
        """``max_readahead=0`` reads the page that was asked for; the default reads more."""
        alone, ahead = make_slow_file(max_readahead=0), make_slow_file()
        for file in (alone, ahead):
            with opened(file.path) as descriptor, mmap.mmap(descriptor, 0) as pages:
                pages[5 * PAGE]
                if file is alone:
                    assert residency(descriptor)[:8] == [index == 5 for index in range(8)]
        assert alone.statistics().read_bytes == PAGE
        assert ahead.statistics().read_bytes > PAGE

    def test_content(self, slow_file: SlowFile) -> None:
        """The file holds its pattern, through pread and through a map, and no two pages agree."""
        with opened(slow_file.path) as descriptor, mapped(descriptor) as pages:
            assert os.pread(descriptor, 9000, 12_345) == content(12_345, 9000)
            assert pages[12_345 : 12_345 + 9000] == content(12_345, 9000)
            assert len({content(index * PAGE, PAGE) for index in range(4096)}) == 4096

    def test_shared_stores_reach_the_disk(self, slow_file: SlowFile) -> None:
        """A store into a shared map is dirty until msync, then it is with the server."""
        with opened(slow_file.path) as descriptor, mapped(descriptor) as pages:
            pages[PAGE : PAGE + 5] = b"store"
            assert dirty_pages(descriptor) == 1
            assert slow_file.stored(PAGE, 5) == content(PAGE, 5)
            pages.flush()
            assert dirty_pages(descriptor) == 0
        assert slow_file.stored(PAGE, 5) == b"store"
        assert slow_file.statistics().fsyncs == 1

    @pytest.mark.parametrize("write_back", [True, False])
    def test_write_back_is_optional(
        self, write_back: bool, make_slow_file: Callable[..., SlowFile]
    ) -> None:
        """With write-back, a write waits in the page cache for fsync; without, it goes through."""
        file = make_slow_file(write_back=write_back)
        with opened(file.path) as descriptor:
            os.pwrite(descriptor, b"new", 0)
            assert (file.stored(0, 3) == b"new") is not write_back
            os.fdatasync(descriptor)
        assert file.stored(0, 3) == b"new"
        assert file.statistics().data_fsyncs == 1

    def test_the_file_shrinks_and_grows(self, slow_file: SlowFile) -> None:
        """Truncated content is gone for good: what grows again is zero."""
        with opened(slow_file.path) as descriptor:
            os.ftruncate(descriptor, 5000)
            os.ftruncate(descriptor, 12_000)
            assert os.pread(descriptor, MIB, 0) == content(0, 5000) + bytes(7000)
            os.posix_fallocate(descriptor, 0, 20_000)
            assert os.fstat(descriptor).st_size == 20_000

    def test_fsync_takes_its_latency(self, slow_file: SlowFile) -> None:
        """A flush takes what it was told."""
        slow_file.set_latency(fsync=0.1)
        with opened(slow_file.path) as descriptor, mapped(descriptor) as pages:
            pages[0] = 1
            assert seconds(pages.flush) >= 0.1

    def test_a_bad_page_kills_a_map_but_not_pread(self, slow_file: SlowFile) -> None:
        """EIO on a page: SIGBUS through a map, EIO through preadv, and its neighbours work."""
        slow_file.fail_reads(8 * PAGE, PAGE)
        with opened(slow_file.path) as descriptor:
            with pytest.raises(OSError, match="Input/output error"):
                os.preadv(descriptor, [bytearray(1)], 8 * PAGE)
            assert os.pread(descriptor, 1, 9 * PAGE) == content(9 * PAGE, 1)
        assert run_child(TOUCH, slow_file.path, 8 * PAGE, "read").returncode == -signal.SIGBUS
        assert run_child(TOUCH, slow_file.path, 7 * PAGE, "read").returncode == 0
        assert slow_file.statistics().failed >= 2

    def test_a_healed_page_reads(self, slow_file: SlowFile) -> None:
        """After the disk heals the same read succeeds."""
        slow_file.fail_reads(0, PAGE)
        with opened(slow_file.path) as descriptor:
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(descriptor, 1, 0)
            slow_file.heal()
            assert os.pread(descriptor, 3, 0) == content(0, 3)

    @pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
    def test_a_failed_write_back_is_told_once(self, number: int, slow_file: SlowFile) -> None:
        """msync gives the errno, the retry says 0, and nothing is on the disk: the kernel's lie."""
        slow_file.fail_writes(number)
        with opened(slow_file.path) as descriptor, mapped(descriptor) as pages:
            pages[0:3] = b"new"
            with pytest.raises(OSError, match=os.strerror(number)):
                pages.flush()
            pages.flush()
        assert slow_file.stored(0, 3) == content(0, 3)

    def test_only_marked_writes_fail(self, slow_file: SlowFile) -> None:
        """``containing`` picks writes by their data."""
        slow_file.fail_writes(errno.EIO, containing=b"poison", times=1)
        with opened(slow_file.path) as descriptor:
            os.pwrite(descriptor, b"harmless", 0)
            os.fsync(descriptor)
            os.pwrite(descriptor, b"a poison", 0)
            with pytest.raises(OSError, match="Input/output error"):
                os.fsync(descriptor)
            os.pwrite(descriptor, b"a poison", 0)
            os.fsync(descriptor)

    def test_fsync_itself_fails(self, slow_file: SlowFile) -> None:
        """The device flush fails after the writes worked, once."""
        slow_file.fail_fsync(errno.EIO, times=1)
        with opened(slow_file.path) as descriptor:
            os.pwrite(descriptor, b"new", 0)
            with pytest.raises(OSError, match="Input/output error"):
                os.fsync(descriptor)
            os.fsync(descriptor)
        assert slow_file.stored(0, 3) == b"new"

    def test_evict_takes_mapped_and_dirty_pages(self, slow_file: SlowFile) -> None:
        """After evict no page is resident, not even mapped ones, and dirty ones were written."""
        with opened(slow_file.path) as descriptor, mapped(descriptor) as pages:
            assert len(bytes(pages)) == 16 * MIB
            pages[0:3] = b"new"
            assert resident_pages(descriptor) == 16 * MIB // PAGE
            slow_file.evict()
            assert resident_pages(descriptor) == 0
            assert slow_file.stored(0, 3) == b"new"
            faults = major_faults_of_this_thread()
            assert pages[0:3] == b"new"
            assert major_faults_of_this_thread() - faults == 1

    def test_a_held_read_waits_to_be_released(self, slow_file: SlowFile) -> None:
        """``hold`` and ``wait_held`` put a reader at the disk for certain, without a clock."""
        slow_file.hold("read")
        got: list[bytes] = []
        with opened(slow_file.path) as descriptor:
            reader = threading.Thread(target=lambda: got.append(os.pread(descriptor, 3, 0)))
            reader.start()
            slow_file.wait_held("read")
            assert got == []
            slow_file.release("read")
            reader.join(10)
        assert got == [content(0, 3)]

    def test_waiting_for_a_read_that_does_not_come(self, slow_file: SlowFile) -> None:
        """``wait_held`` does not wait for ever."""
        slow_file.hold("read")
        with pytest.raises(TimeoutError, match="0 of 2 read requests"):
            slow_file.wait_held("read", 2, timeout=0.01)

    def test_the_disk_can_disappear(self, slow_file: SlowFile) -> None:
        """Without its server the file answers ENOTCONN, and the test still ends."""
        descriptor = os.open(slow_file.path, os.O_RDONLY | os.O_CLOEXEC)
        slow_file.process.kill()
        slow_file.process.wait()
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            os.pread(descriptor, 1, 0)
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            os.close(descriptor)

    def test_the_block_ends_under_an_open_map(self) -> None:
        """A map left open neither hangs the end of the rig nor leaves the mount."""
        with slow_file() as file, opened(file.path) as descriptor:
            pages = mmap.mmap(descriptor, 0)
            pages[0] = 1
            directory = file.path.parent
        assert str(directory) not in Path("/proc/self/mounts").read_text()
        pages.close()


STALE = """
import os, sys
from tests.rigs.crash_image import crash_image
from tests.rigs.slow_file import slow_file
with slow_file() as file, crash_image() as image:
    print(file.process.pid, file.path, image.path, image._counters, flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.fuse
@pytest.mark.loopdev
def test_a_killed_run_leaves_nothing_in_the_way() -> None:
    """After SIGKILL the server ends by itself; the next run removes the mounts and loop devices."""
    child = run_child(STALE)
    assert child.returncode == -signal.SIGKILL
    pid, file, root, counters = child.stdout.split()
    with contextlib.suppress(ProcessLookupError):
        server = os.pidfd_open(int(pid))
        try:
            assert select.select([server], [], [], 10)[0], "the server goes on"
        finally:
            os.close(server)
    mounts = Path("/proc/self/mounts")
    assert file.rpartition("/")[0] not in mounts.read_text()
    assert root in mounts.read_text()
    remove_stale_homes(Path(tempfile.gettempdir()))
    assert root not in mounts.read_text()
    backing = Path(counters) / "loop" / "backing_file"
    assert not backing.exists() or root.split("/mnt-")[0] not in backing.read_text()


@pytest.mark.loopdev
class TestFaults:
    def test_major_faults_count_cold_pages(
        self, make_small_fs: Callable[..., SmallFileSystem]
    ) -> None:
        """1 024 cold pages under MADV_RANDOM are 1 024 major faults, warm ones none."""
        path = make_small_fs("ext4").path / "file"
        path.write_bytes(os.urandom(1024 * PAGE))
        with opened(path) as descriptor, mapped(descriptor) as pages:
            for expected in (1024, 0):
                if expected:
                    evict(descriptor)
                    assert resident_pages(descriptor) == 0
                faults = major_faults_of_this_thread()
                for index in range(1024):
                    pages[index * PAGE]
                assert major_faults_of_this_thread() - faults == expected
                assert resident_pages(descriptor) == 1024

    def test_faults_of_another_thread_do_not_count(
        self, make_small_fs: Callable[..., SmallFileSystem]
    ) -> None:
        """The counter is the thread's own: a worker that waits leaves the loop's at zero."""
        path = make_small_fs("ext4").path / "file"
        path.write_bytes(bytes(PAGE))
        evict(path)
        with opened(path) as descriptor, mapped(descriptor) as pages:
            faults = major_faults_of_this_thread()
            with ThreadPoolExecutor(1) as threads:
                threads.submit(lambda: pages[0]).result()
            assert major_faults_of_this_thread() == faults

    @every_file_system
    def test_evict_takes_pages_that_this_process_has_mapped(
        self, kind: str, make_small_fs: Callable[..., SmallFileSystem]
    ) -> None:
        """Pages in our own page tables become cold too, and nothing that was stored is lost."""
        path = make_small_fs(kind).path / "file"
        path.write_bytes(bytes(64 * PAGE))
        with opened(path) as descriptor, mapped(descriptor) as pages:
            pages[0:3] = b"new"
            evict(path)
            assert resident_pages(descriptor) == 0
            assert pages[0:3] == b"new"
            assert residency(descriptor)[:2] == [True, False]

    @pytest.mark.smallfs
    def test_evict_says_when_it_cannot(self, make_small_fs: Callable[..., SmallFileSystem]) -> None:
        """tmpfs has no cold pages: an error, not a benchmark of warm ones."""
        path = make_small_fs().path / "file"
        path.write_bytes(bytes(4 * PAGE))
        with pytest.raises(RuntimeError, match="4 pages could not be evicted"):
            evict(path)

    def test_dirty_pages(self, make_small_fs: Callable[..., SmallFileSystem]) -> None:
        """Stores make pages dirty, sync_file_range takes the dirt away."""
        path = make_small_fs("ext4").path / "file"
        path.write_bytes(bytes(16 * PAGE))
        evict(path)
        with opened(path) as descriptor, mapped(descriptor) as pages:
            assert dirty_pages(descriptor) == 0
            pages[0] = pages[5 * PAGE] = 1
            assert dirty_pages(descriptor) == 2
            assert dirty_pages(descriptor, 0, PAGE) == 1
            write_back(descriptor)
            assert dirty_pages(descriptor) == 0


class TestHeartbeat:
    @pytest.mark.anyio
    async def test_a_blocked_loop_is_a_gap(self) -> None:
        """50 ms in the loop's thread are a gap of 50 ms."""
        async with heartbeat() as heart:
            time.sleep(0.05)  # noqa: ASYNC251 - the fault that is to be seen
        assert heart.longest_gap >= 0.05

    @pytest.mark.anyio
    async def test_a_worker_is_no_gap(self) -> None:
        """The same 200 ms in a worker thread leave the loop beating."""
        async with heartbeat() as heart:
            await anyio.to_thread.run_sync(time.sleep, 0.2)
        assert heart.longest_gap < 0.2
        assert heart.beats > 10

    @pytest.mark.anyio
    @pytest.mark.fuse
    async def test_a_cold_page_on_the_loop_is_a_gap(self, slow_file: SlowFile) -> None:
        """The control of every stall test: a plain map freezes the loop for the disk's 20 ms."""
        slow_file.set_latency(read=0.02)
        with opened(slow_file.path) as descriptor, mapped(descriptor) as pages:
            faults = major_faults_of_this_thread()
            async with heartbeat() as heart:
                pages[0]
            assert heart.longest_gap >= 0.02
            assert major_faults_of_this_thread() - faults == 1
