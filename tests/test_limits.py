"""At the limits of the process and of the kernel: errors that say so, and many of everything."""

from __future__ import annotations

import errno
import platform
from pathlib import Path

import anyio
import pytest

from aiommap import AsyncMmap, TruncatedError

from .content import file_of, inc, only_linux
from .fake_kernel import FakeKernel
from .processes import run_python
from .test_cancellation import map_class

pytestmark = only_linux

SIZE = 1 << 20

PRELUDE = """
    import errno, os, resource, sys, threading
    import anyio
    from pathlib import Path
    from aiommap import AsyncMmap
    from tests.content import file_of, inc, open_descriptors

    folder = Path(sys.argv[1])
    backend = sys.argv[2]
    SIZE = 1 << 20

    def limit(which, soft):
        resource.setrlimit(which, (soft, resource.getrlimit(which)[1]))

    def status(name):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

    async def raises(number, call):
        try:
            await call
        except OSError as exc:
            assert exc.errno == number, exc
            return exc
        raise AssertionError(f"no {errno.errorcode[number]}")

    async def works(m):
        # Everything a map does, on bytes that are inc().
        n = len(m)
        assert await m.read_at(0, n) == inc(n)
        buffer = bytearray(n)
        assert await m.readinto_at(0, buffer) == n and buffer == inc(n)
        assert await m.find(inc(3, 254)) == 254
        await m.load()
        async with m.view(5, 5000) as v:
            assert bytes(v) == inc(5000, 5) == await v.read()
        if m.protection.writable:
            await m.write_at(100, inc(n - 100, 100))
            await m.move(256, 0, 256)
            async with m.view_mut(0, 5000) as v:
                v[:] = inc(5000)
                await v.flush()
            await m.flush()
            await (await m.flush_async())
"""

NO_FILES = """
    async def main():
        path = file_of(folder, inc(SIZE))
        async with AsyncMmap.open_path(path, "r+") as first:
            await works(first)
            limit(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) + 9)
            maps = []
            while True:
                try:
                    maps.append(await AsyncMmap.open_path(path))
                except OSError as exc:
                    assert exc.errno == errno.EMFILE, exc
                    assert exc.filename == str(path), exc.filename
                    break
            for _ in range(50):  # nothing is lost by failing
                await raises(errno.EMFILE, AsyncMmap.open_path(path))
                await raises(errno.EMFILE, AsyncMmap.create(folder / "new", 10))
                await raises(errno.EMFILE, AsyncMmap.open(first._core.mapping.file.fd))
                await raises(errno.EMFILE, AsyncMmap.anonymous(10))
                assert not (folder / "new").exists()
            await works(first)
            assert len(maps) >= 3
            for m in maps:
                await works(m)
                await m.aclose()
            async with AsyncMmap.open_path(path) as again:
                await works(again)
"""

NO_SPACE = """
    async def main():
        path = file_of(folder, inc(SIZE))
        large = file_of(folder, 1 << 40, "large")
        async with AsyncMmap.open_path(path, "r+") as m:
            await works(m)
            limit(resource.RLIMIT_AS, status("VmSize") + (96 << 20))
            for _ in range(5):
                error = await raises(errno.ENOMEM, AsyncMmap.open_path(large))
                assert error.filename == str(large)
                await raises(errno.ENOMEM, AsyncMmap.anonymous(1 << 40))
                await raises(errno.ENOMEM, m.resize(1 << 30))
                assert path.stat().st_size == len(m) == SIZE
            await works(m)
        assert not [each for each in open_descriptors() if str(folder) in each]
"""

NO_THREADS = """
    async def main():
        from aiommap import _workers
        _workers.IDLE_SECONDS = 0.01
        path = file_of(folder, inc(SIZE))
        m = await AsyncMmap.open_path(path, "r+")
        view = await m.view(SIZE // 2, 10)
        while threading.active_count() > 1:
            await anyio.sleep(0.001)  # until the threads have ended
        # Only who is not root is held to the number of threads.
        limit(resource.RLIMIT_NPROC, 1)
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)
        for _ in range(5):
            for call in (lambda: m.write_at(0, b"x"), lambda: m.flush(), lambda: m.file_size(),
                         lambda: m.read_at(0, SIZE), lambda: m.resident(), lambda: m.pin(0, 1),
                         lambda: AsyncMmap.open(m._core.mapping.file.fd)):
                try:
                    await call()
                except RuntimeError as exc:
                    assert "thread" in str(exc), exc
                else:
                    raise AssertionError(f"a thread for {call.__code__.co_names}")
            m.view_mut_nowait(100, 10)._give_back()
        assert await m.read_at(0, 10) == inc(10)
        # What must happen happens all the same.
        await m.aclose(flush=False)
        await view.aclose()
        assert not [each for each in open_descriptors() if str(path) in each]
"""

NO_LENGTH = """
    async def main():
        path = file_of(folder, inc(SIZE))
        async with AsyncMmap.open_path(path, "r+") as m:
            limit(resource.RLIMIT_FSIZE, SIZE + 4096)
            for _ in range(3):
                error = await raises(errno.EFBIG, m.resize(2 * SIZE))
                assert error.filename == str(path)
                assert path.stat().st_size == len(m) == SIZE
                error = await raises(errno.EFBIG, AsyncMmap.create(folder / "new", 2 * SIZE))
                assert error.filename == str(folder / "new")
                assert not (folder / "new").exists()
            await m.resize(SIZE + 4096)
            await m.resize(SIZE)
            await works(m)
"""

NO_LOCKED_MEMORY = """
    async def main():
        path = file_of(folder, inc(SIZE))
        os.chmod(folder, 0o777)
        os.chown(path, 65534, 65534)
        async with AsyncMmap.open_path(path, "r+") as m:
            limit(resource.RLIMIT_MEMLOCK, 65536)
            if os.geteuid() == 0:
                os.setresuid(65534, 65534, 65534)
            await m.pin(0, 32768)
            for _ in range(3):
                await raises(errno.ENOMEM, m.pin())
                assert status("VmLck") == 32768
            await m.pin(0, 32768)  # nests
            await m.unpin(0, 32768)
            assert status("VmLck") == 32768
            await m.unpin(0, 32768)
            assert status("VmLck") == 0
            await m.pin(65536, 65536)
            await works(m)
        assert status("VmLck") == 0
"""

NO_AREAS = """
    async def main():
        import ctypes, mmap
        path = file_of(folder, inc(SIZE))
        most = int(Path("/proc/sys/vm/max_map_count").read_text())
        if most > 200_000:
            return  # more than a test should make
        async with AsyncMmap.open_path(path, "r+") as m:
            await works(m)
            madvise = ctypes.CDLL(None).madvise
            memory = mmap.mmap(-1, 4096 * 2 * (most + 100))
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            for page in range(0, 2 * (most + 50), 2):  # DONTFORK splits
                if madvise(ctypes.c_void_p(address + page * 4096), ctypes.c_size_t(4096), 10):
                    break
            more = []
            try:
                while True:
                    more.append(await AsyncMmap.open_path(path))
                    assert len(more) < 200
            except (OSError, RuntimeError) as exc:
                assert isinstance(exc, RuntimeError) or exc.errno == errno.ENOMEM, exc
            try:
                await raises(errno.ENOMEM, m.resize(SIZE + 4096))
            except RuntimeError as exc:  # a new thread needs an area too
                assert "thread" in str(exc), exc
            for other in more:
                await other.aclose()
            assert path.stat().st_size == len(m) == SIZE
            assert await m.read_at(0, SIZE) == inc(SIZE)
            await m.write_at(0, inc(SIZE))
            await m.flush()
        assert not [each for each in open_descriptors() if str(path) in each]
"""

REFUSED_CALLS = """
    # The system calls that containers refuse, refused by a real seccomp filter.
    import ctypes, struct
    number = int(sys.argv[3])
    refused = {"mincore": 27, "sync_file_range": 277, "fallocate": 285, "process_vm_readv": 310,
               "memfd_create": 319, "preadv2": 327, "cachestat": 451}

    def install():
        ins = [struct.pack("HBBI", 0x20, 0, 0, 0)]  # the call's number
        for call in refused.values():
            ins.append(struct.pack("HBBI", 0x15, 0, 1, call))
            ins.append(struct.pack("HBBI", 0x06, 0, 0, 0x00050000 | number))  # errno
        ins.append(struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000))  # allow
        code = ctypes.create_string_buffer(b"".join(ins))
        program = ctypes.create_string_buffer(
            struct.pack("HxxxxxxQ", len(ins), ctypes.addressof(code)))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        # For all threads.
        assert libc.syscall(317, 1, 1, program) == 0, ctypes.get_errno()

    async def main():
        install()
        path = file_of(folder, inc(SIZE))
        for protection in ("r", "r+", "c"):
            async with AsyncMmap.open_path(path, protection) as m:
                await works(m)
                # The three witnesses of residency are refused.
                await raises(number, m.resident())
        async with AsyncMmap.open_path(path, "r+") as m:
            await m.resize(SIZE + 5000)
            await m.resize(SIZE)
            await works(m)
        for protection in ("r+", "c"):
            async with AsyncMmap.anonymous(SIZE, protection) as m:
                await m.write_at(0, inc(SIZE))
                await works(m)
        async with AsyncMmap.create(folder / "new", SIZE) as m:
            await m.write_at(0, inc(SIZE))
            await works(m)
"""


in_a_process = pytest.mark.parametrize("backend", ["asyncio", "trio"])


def run_limited(body: str, folder: Path, backend: str, *arguments: object) -> None:
    code = PRELUDE + body + '\n    anyio.run(main, backend=backend)\n    print("ok")\n'
    result = run_python(code, folder, backend, *arguments)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr[-2000:]


@in_a_process
def test_descriptors(tmp_path: Path, backend: str) -> None:
    """RLIMIT_NOFILE: EMFILE with the path; nothing leaks, and what is open works on."""
    run_limited(NO_FILES, tmp_path, backend)


@in_a_process
def test_address_space(tmp_path: Path, backend: str) -> None:
    """RLIMIT_AS: ENOMEM; a resize that fails changes neither the map nor the file."""
    run_limited(NO_SPACE, tmp_path, backend)


@in_a_process
def test_threads(tmp_path: Path, backend: str) -> None:
    """No thread to be had: RuntimeError, and yet a map closes."""
    run_limited(NO_THREADS, tmp_path, backend)


@in_a_process
def test_file_size(tmp_path: Path, backend: str) -> None:
    """RLIMIT_FSIZE: EFBIG and not a signal, and no file is left behind."""
    run_limited(NO_LENGTH, tmp_path, backend)


@in_a_process
def test_locked_memory(tmp_path: Path, backend: str) -> None:
    """RLIMIT_MEMLOCK: ENOMEM; what was pinned is, and nothing else counts as locked."""
    run_limited(NO_LOCKED_MEMORY, tmp_path, backend)


@in_a_process
def test_memory_areas(tmp_path: Path, backend: str) -> None:
    """vm.max_map_count: no new map, and the one that is open works and closes."""
    run_limited(NO_AREAS, tmp_path, backend)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of system calls")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
@in_a_process
def test_refused_system_calls(number: int, tmp_path: Path, backend: str) -> None:
    """A container that refuses every optional call: slower, and everything works."""
    run_limited(REFUSED_CALLS, tmp_path, backend, number)


FEATURES = {
    "populate": (errno.EINVAL, errno.ENOSYS, errno.EPERM),
    "nowait_reads": (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM),
    "cachestat": (errno.ENOSYS, errno.EPERM),
    "mincore": (errno.ENOSYS, errno.EPERM),
    "process_vm": (errno.ENOSYS, errno.EPERM),
    "memfd": (None,),
    "fallocate": (None,),
    "sync_file_range": (None,),
}


@pytest.mark.parametrize("number", FEATURES["nowait_reads"])
@pytest.mark.anyio
async def test_refused_looks_are_remembered(number: int, tmp_path: Path) -> None:
    """Where reads that do not wait cannot be had, they are not tried again: mincore is asked."""
    kernel = FakeKernel()
    kernel.lack("nowait_reads", error=number)
    async with map_class(kernel).open_path(file_of(tmp_path, inc(SIZE))) as m:
        await m.load()
        assert await m.read_at(0, 100) == inc(100)
        assert kernel.names("read_nowait")
        kernel.calls.clear()
        before = m.statistics().loads_off_loop
        for _ in range(5):
            assert await m.read_at(0, 100) == inc(100)
        assert not kernel.names("read_nowait")
        assert m.statistics().loads_off_loop == before


@pytest.mark.parametrize(
    ("feature", "number"),
    [(feature, number) for feature, numbers in FEATURES.items() for number in numbers],
)
@pytest.mark.anyio
async def test_old_kernels(feature: str, number: int | None, tmp_path: Path) -> None:
    """Without one optional feature, refused in each way, everything works."""
    kernel = FakeKernel()
    kernel.lack(feature, error=number)
    opener = map_class(kernel)
    path = file_of(tmp_path, inc(SIZE))
    openings = [opener.open_path(path, protection) for protection in ("r", "r+", "c")]
    openings.append(opener.anonymous(SIZE))
    openings.append(opener.create(tmp_path / "new", SIZE))
    for opening in openings:
        async with opening as m:
            if m.protection.writable:
                await m.write_at(0, inc(SIZE))
                async with m.view_mut(100, SIZE - 100) as v:
                    await v.write(inc(SIZE - 100, 100))
                    await v.flush()
                await m.move(256, 0, 512)
            assert await m.read_at(0, SIZE) == inc(SIZE)
            assert await m.find(inc(3, 254)) == 254
            await m.load()
            async with m.view() as v:
                assert v.buffer == inc(SIZE)
            assert b"".join([bytes(window) async for window in m.windows(300_000)]) == inc(SIZE)
            await m.flush()
            if m.protection.value == "r+":
                await m.resize(SIZE + 5000)
                await m.resize(SIZE)
                await m.set_protection("r")
            if feature != "mincore" or m._core.mapping.file is not None:
                assert 0 <= await m.resident() <= SIZE
    if feature != "process_vm":
        async with opener.open_path(path, "r+") as m:
            path.write_bytes(b"short")
            with pytest.raises(TruncatedError):
                await m.read_at(0, SIZE)
            with pytest.raises(TruncatedError):
                await m.write_at(0, inc(SIZE))
            path.write_bytes(inc(SIZE))


@pytest.mark.anyio
async def test_ten_thousand_tasks_with_views(tmp_path: Path) -> None:
    """Ten thousand tasks hold a region each, all at once; all regions are free afterwards."""
    number = 10_000
    path = file_of(tmp_path, number * 64)
    started = 0
    all_there = anyio.Event()

    async def task(index: int) -> None:
        nonlocal started
        async with m.view_mut(index * 64, 64, load=False) as v:
            v[:] = index.to_bytes(64, "little")
            started += 1
            if started == number:
                all_there.set()
            await all_there.wait()

    async with AsyncMmap.open_path(path, "r+") as m:
        async with anyio.create_task_group() as tasks:
            for index in range(number):
                tasks.start_soon(task, index)
        assert m.statistics().views == 0
        async with m.view_mut() as v:
            for index in (0, 1, 4711, number - 1):
                assert v[index * 64 : index * 64 + 64] == index.to_bytes(64, "little")


@pytest.mark.anyio
async def test_ten_thousand_tasks_for_one_region(tmp_path: Path) -> None:
    """Ten thousand tasks add to one number, each under the lock: none is lost."""
    number = 10_000
    path = file_of(tmp_path, 4096)

    async def task() -> None:
        async with m.view_mut(0, 8) as v:
            v[:] = (int.from_bytes(v.buffer, "little") + 1).to_bytes(8, "little")

    async with AsyncMmap.anonymous(4096) as m:
        async with anyio.create_task_group() as tasks:
            for _ in range(number):
                tasks.start_soon(task)
        assert int.from_bytes(await m.read_at(0, 8), "little") == number
    assert path.stat().st_size == 4096


MAPS = """
    async def main():
        from anyio import CapacityLimiter
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 5000), hard))
        path = file_of(folder, inc(SIZE))
        before = open_descriptors()
        maps = []
        async def use(number):
            m = await AsyncMmap.open_path(path, "r+")
            maps.append(m)
            await m.write_at(number * 100, b"%d" % number)
            async with m.view(number * 100, 10) as v:
                await v.read()
            await m.load()
            if number % 10 == 0:
                await m.flush()
        async with anyio.create_task_group() as tasks:
            for number in range(1000):
                tasks.start_soon(use, number)
        assert threading.active_count() <= 50, threading.active_count()
        for m in maps:
            assert await m.read_at(4200, 2) == b"42"
        async with anyio.create_task_group() as tasks:
            for m in maps:
                tasks.start_soon(m.aclose)
        assert open_descriptors() == before
        with open("/proc/self/maps") as file:
            assert str(path) not in file.read()
"""


@in_a_process
def test_thousand_maps(tmp_path: Path, backend: str) -> None:
    """A thousand maps of a file at once share the threads of their loop, and all close."""
    run_limited(MAPS, tmp_path, backend)
