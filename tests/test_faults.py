"""Storage that fails under the map: full data or an error, never a dead process."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread

from aiommap import AsyncMmap, FlushError, MmapView, TruncatedError
from aiommap._mapping import Mapping

from .content import file_of, inc, maps_of, only_linux
from .processes import run_python
from .rigs.plain_files import TOUCH, run_child

pytestmark = only_linux

PAGE = 4096
SIZE = 1 << 20

SWEEP = """
    # A file is truncated right before the first, the second... system call of an operation.
    import errno, os, sys, threading
    import anyio
    from functools import partial
    from pathlib import Path
    from aiommap import AsyncMmap, TruncatedError
    from tests.content import file_of, inc
    from tests.fake_kernel import FakeKernel
    from tests.test_cancellation import map_class

    path = file_of(Path(sys.argv[1]), inc(1 << 20))
    backend, cold, protection = sys.argv[2], sys.argv[3] == "cold", sys.argv[4]
    SIZE = 1 << 20
    CUT = SIZE // 2

    async def view(m):
        async with m.view() as v:
            return await v.read()

    async def view_mut(m):
        async with m.view_mut() as v:
            await v.write(bytes(len(v)))
            await v.flush()

    async def part(m):
        async with m.view_mut(CUT - 4096, 8192) as v:
            await v.readline()

    async def windows(m):
        seen = 0
        async for window in m.windows(1 << 18):
            seen += len(window)
        return seen

    async def readinto(m):
        buffer = bytearray(SIZE)
        await m.readinto_at(0, buffer)
        return bytes(buffer)

    async def pended(m):
        await m.write_at(SIZE - 1, b"x")
        await (await m.flush_async())

    calls = {
        "read_at": lambda m: m.read_at(0, SIZE),
        "read_at small": lambda m: m.read_at(SIZE - 10, 10),
        "readinto_at": readinto,
        "find": lambda m: m.find(bytes(3)),
        "rfind": lambda m: m.rfind(bytes(3)),
        "load": lambda m: m.load(),
        "resident": lambda m: m.resident(),
        "view": view,
        "windows": windows,
        "flush": lambda m: m.flush(),
        "file_size": lambda m: m.file_size(),
        "advise": lambda m: m.advise("will_need"),
        "pin": lambda m: m.pin(),
    }
    stores = {
        "write_at": lambda m: m.write_at(0, bytes(SIZE)),
        "write_at small": lambda m: m.write_at(SIZE - 10, b"x" * 10),
        "move": lambda m: m.move(0, 1000, SIZE - 1000),
        "view_mut": view_mut,
        "part": part,
        "pended": pended,
        "grow": lambda m: m.resize(SIZE + 8192),
        "shrink": lambda m: m.resize(SIZE - 8192),
    }
    if protection == "c":
        stores = {name: call for name, call in stores.items() if name not in ("grow", "shrink")}
    if protection != "r":
        calls |= stores

    def reset():
        with open(path, "r+b") as file:
            file.truncate(0)
            file.write(inc(SIZE))

    async def attempt(call, at):
        # The number of system calls, and what came of it.
        reset()
        kernel = FakeKernel()
        if cold:
            kernel.lack("nowait_reads")
            kernel.wrap("resident", lambda real, *arguments: bytes(len(real(*arguments))))
        async with map_class(kernel).open_path(path, protection) as m:
            count = 0
            turn = threading.Lock()
            def hook(_):
                nonlocal count
                with turn:
                    if count == at:
                        os.truncate(path, CUT)
                    count += 1
            for name in NAMES:
                kernel.before(name, hook)
            try:
                result = await call(m)
            except TruncatedError as exc:
                assert exc.filename == str(path), exc.filename
                assert exc.offset >= 0 and exc.length >= 0, exc
                result = exc
            with turn:
                done, count = count, -1_000_000  # from here on it heals
            os.truncate(path, max(len(m), SIZE))  # healed: all of it is usable again
            assert len(await m.read_at(0, len(m))) == len(m)
            async with m.view() as v:
                bytes(v)
            if protection == "r+":
                await m.write_at(0, bytes(len(m)))
                await m.flush()
        return done, result

    NAMES = ("file_size", "known_file_size", "set_file_size", "reserve", "sync_data", "sync_range",
             "start_write_back", "write_back", "read", "read_nowait", "map_file", "populate_read",
             "populate_write", "resident", "copy", "advise", "pin", "will_need")

    async def main():
        errors = 0
        for name, call in calls.items():
            at = 0
            while True:
                print(name, at, file=sys.stderr, flush=True)
                done, result = await attempt(call, at)
                if isinstance(result, TruncatedError):
                    errors += 1
                elif name in ("read_at", "readinto_at", "view"):
                    assert len(result) == SIZE
                    # What the file had, or zeros where it was cut and is long again.
                    assert result[:CUT] == inc(SIZE)[:CUT]
                elif name == "windows":
                    assert result == SIZE
                at += 1
                if done < at:
                    break
        print("alive", errors > 5)

    anyio.run(main, backend=backend)
"""


class TestTruncation:
    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    @pytest.mark.parametrize(
        ("memory", "protection"), [("hot", "r"), ("hot", "r+"), ("cold", "r+"), ("cold", "c")]
    )
    def test_before_each_system_call(
        self, memory: str, protection: str, tmp_path: Path, backend: str
    ) -> None:
        """Cut at any moment of any operation: all the data or TruncatedError; healed by growing."""
        result = run_python(SWEEP, tmp_path, backend, memory, protection)
        assert (result.returncode, result.stdout) == (0, "alive True\n"), result.stderr[-2000:]

    @pytest.mark.anyio
    async def test_control(self, tmp_path: Path) -> None:
        """Control: a plain map of a truncated file is the end of a process."""
        path = file_of(tmp_path, inc(SIZE))
        code = TOUCH.replace("if value", "os.truncate(path, 0)\nif value", 1)
        result = await to_thread.run_sync(run_child, code, path, SIZE - 1, "read")
        assert result.returncode == -signal.SIGBUS

    @pytest.mark.anyio
    async def test_before(self, tmp_path: Path) -> None:
        """Every call that touches missing bytes says so, with the range and what is left."""
        path = file_of(tmp_path, inc(SIZE))
        async with AsyncMmap.open_path(path, "r+") as m:
            os.truncate(path, 5000)
            calls: list[Callable[[], Awaitable[object]]] = [
                lambda: m.read_at(PAGE, PAGE),
                lambda: m.readinto_at(PAGE, bytearray(PAGE)),
                lambda: m.write_at(PAGE, bytes(PAGE)),
                lambda: m.load(PAGE, PAGE),
                lambda: m.view(PAGE, PAGE),
                lambda: m.view_mut(PAGE, PAGE),
                lambda: m.flush_range(PAGE, PAGE),
                lambda: m.flush_async_range(PAGE, PAGE),
                lambda: m.windows(offset=PAGE, length=PAGE).__anext__(),
            ]
            for call in calls:
                with pytest.raises(TruncatedError, match="truncated") as caught:
                    await call()
                error = caught.value
                assert (error.offset, error.length, error.size) == (PAGE, PAGE, 5000)
                assert error.filename == str(path)
                assert error.errno == errno.ENODATA
                m.view_mut_nowait()._give_back()
            for anything in (m.move(0, PAGE, PAGE), m.move(PAGE, 0, PAGE), m.find(b"\xff\xff")):
                with pytest.raises(TruncatedError):
                    await anything
            assert await m.read_at(0, 5000) == inc(5000)
            await m.write_at(0, b"\0")
            await m.flush_range(0, 5000)
            assert await m.file_size() == 5000
            os.truncate(path, SIZE)
            for call in calls:
                result = await call()
                if isinstance(result, MmapView):
                    await result.aclose()
            assert await m.read_at(5000, 10) == bytes(10)

    @pytest.mark.anyio
    async def test_under_a_view(self, tmp_path: Path) -> None:
        """A view stays a view: its copies are errors, and it closes."""
        path = file_of(tmp_path, inc(SIZE))
        async with AsyncMmap.open_path(path, "r+") as m:
            async with m.view_mut() as v:
                os.truncate(path, 100)
                for call in (
                    lambda: v.read(),
                    lambda: v.readinto(bytearray(1000)),
                    lambda: v.write(bytes(1000)),
                    lambda: v.flush(),
                ):
                    with pytest.raises(TruncatedError):
                        await call()
                    assert await v.tell() == 0
                assert v[50] == 50
                assert await v.read(100) == inc(100)
                left, right = v.split_at(100)
                async with left, right:
                    with pytest.raises(TruncatedError):
                        await right.readline()
            os.truncate(path, SIZE)

    @pytest.mark.anyio
    async def test_planted_fault(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Control: without the check of the file's size a flush of lost bytes looks good."""
        path = file_of(tmp_path, inc(SIZE))
        m = await AsyncMmap.open_path(path, "r+")
        await m.write_at(SIZE - 1, b"x")
        os.truncate(path, 100)
        with pytest.raises(TruncatedError):
            await m.flush()
        monkeypatch.setattr(m._core.flusher, "_reach", lambda file: (SIZE, SIZE, SIZE))
        monkeypatch.setattr(Mapping, "reach", lambda mapping: mapping.length)
        await m.flush()  # durable, it says
        await m.aclose(flush=False)

    @pytest.mark.parametrize(("protection", "backend"), [("r+", "trio"), ("c", "asyncio")])
    def test_under_64_tasks(self, protection: str, backend: str, tmp_path: Path) -> None:
        """64 tasks at work while the file is cut and grown: data or an error, and no hang."""
        code = """
            import errno, os, random, sys, threading
            import anyio
            from pathlib import Path
            from aiommap import AsyncMmap, TruncatedError
            from tests.content import file_of, inc
            from tests.rigs.heartbeat import heartbeat

            SIZE = 4 << 20
            path = file_of(Path(sys.argv[1]), inc(SIZE))
            good = inc(SIZE)
            counts = {"data": 0, "error": 0}

            async def work(m, random, stop):
                while not stop.is_set():
                    offset = random.randrange(SIZE)
                    length = random.choice((1, 10, 5000, 300_000))
                    length = min(length, SIZE - offset)
                    try:
                        match random.randrange(7):
                            case 0 | 1:
                                got = await m.read_at(offset, length)
                                assert len(got) == length
                                for a, b in zip(got[:64], good[offset:offset + 64]):
                                    assert a in (0, b)
                            case 2:
                                part = good[offset:offset + length]
                                assert await m.write_at(offset, part) == length
                            case 3:
                                await m.load(offset, length)
                            case 4:
                                await m.flush_range(offset, length)
                            case 5:
                                async with m.view(offset, length) as v:
                                    assert len(await v.read()) == length
                            case 6:
                                await m.find(b"\\xfe\\xff\\x01", offset, offset + length)
                        counts["data"] += 1
                    except OSError as exc:
                        # EIO: missing each time it was touched, and there each time after that.
                        assert isinstance(exc, TruncatedError) or exc.errno == errno.EIO, exc
                        counts["error"] += 1

            def cut(stop):
                for _ in range(150):
                    os.truncate(path, SIZE // 3)
                    os.truncate(path, SIZE)

            async def main():
                stop = threading.Event()
                async with AsyncMmap.open_path(path, sys.argv[3]) as m:
                    async with heartbeat() as heart, anyio.create_task_group() as tasks:
                        for number in range(64):
                            tasks.start_soon(work, m, random.Random(number), stop)
                        for _ in range(10):
                            await anyio.to_thread.run_sync(cut, stop)
                            until = sum(counts.values()) + 64
                            while sum(counts.values()) < until:
                                await anyio.lowlevel.checkpoint()
                        stop.set()
                    beats = heart.beats
                    assert await m.read_at(0, SIZE)
                print(counts["data"] > 100, beats > 5)

            anyio.run(main, backend=sys.argv[2])
        """
        result = run_python(code, tmp_path, backend, protection)
        assert (result.returncode, result.stdout) == (0, "True True\n"), result.stderr[-3000:]


class TestOtherFiles:
    @pytest.mark.anyio
    async def test_unlinked(self, tmp_path: Path) -> None:
        """A map of a file without a name works on, and closes."""
        path = file_of(tmp_path, inc(SIZE))
        async with AsyncMmap.open_path(path, "r+") as m:
            path.unlink()
            await m.write_at(0, b"still")
            await m.flush()
            await m.resize(SIZE + PAGE)
            assert await m.read_at(0, 5) == b"still"
            assert await m.file_size() == SIZE + PAGE
            async with m.view_mut() as v:
                await v.write(b"here")
        assert not path.exists()

    @pytest.mark.anyio
    async def test_replaced(self, tmp_path: Path) -> None:
        """A file renamed over the path is another one: the map keeps the old one."""
        path = file_of(tmp_path, inc(SIZE))
        other = file_of(tmp_path, b"other", "other.bin")
        async with AsyncMmap.open_path(path, "r+") as m:
            other.rename(path)
            assert await m.read_at(0, 5) == inc(5)
            await m.write_at(0, b"x" * SIZE)
            await m.flush()
            await m.resize(10)
        assert path.read_bytes() == b"other"


@pytest.mark.smallfs
@pytest.mark.loopdev
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
class TestFullDisk:
    """Holes in a sparse file on a disk that is full."""

    @pytest.mark.anyio
    async def test_holes(self, kind: str, make_small_fs: Callable[..., Any]) -> None:
        """A store into a hole is ENOSPC and changes nothing; blocks that are there still work."""
        small = make_small_fs(kind)
        path = small.path / "sparse"
        with open(path, "wb") as file:
            file.write(b"a" * PAGE)
            file.truncate(SIZE)
        async with AsyncMmap.open_path(path, "r+") as m:
            small.fill()
            calls: list[Callable[[], Awaitable[object]]] = [
                lambda: m.write_at(SIZE // 2, b"x"),
                lambda: m.write_at(SIZE // 2, bytes(300_000)),
                lambda: m.move(SIZE // 2, 0, 100),
                lambda: m.view_mut(SIZE // 2, PAGE),
                lambda: m.view_mut(SIZE // 4, SIZE // 2),
                lambda: m.resize(SIZE + (4 << 20)),
            ]
            for number, call in enumerate(calls):
                with pytest.raises(OSError, match="No space") as caught:
                    await call()
                assert caught.value.errno == errno.ENOSPC, number
                assert caught.value.filename == str(path), number
                assert len(m) == SIZE
                assert path.stat().st_size == SIZE
                m.view_mut_nowait()._give_back()
            assert await m.read_at(0, PAGE) == b"a" * PAGE
            assert await m.write_at(0, b"b" * PAGE) == PAGE
            assert await m.read_at(SIZE // 2, 100) == bytes(100)
            try:
                async with m.view(SIZE // 2, PAGE) as v:  # on tmpfs, a read hole takes a page
                    assert bytes(v) == bytes(PAGE)
            except OSError as exc:
                assert exc.errno == errno.ENOSPC  # noqa: PT017
            await m.flush_range(0, PAGE)
            small.free()
            for call in calls:
                result = await call()
                if isinstance(result, MmapView):
                    await result.aclose()
            await m.flush()
        assert path.read_bytes()[:PAGE] == b"b" * PAGE

    @pytest.mark.anyio
    async def test_create(self, kind: str, make_small_fs: Callable[..., Any]) -> None:
        """No room for a new file: ENOSPC, and no file."""
        small = make_small_fs(kind)
        small.fill(leave=1 << 20)
        for _ in range(3):
            with pytest.raises(OSError, match="No space") as caught:
                await AsyncMmap.create(small.path / "new", 16 << 20)
            assert caught.value.errno == errno.ENOSPC
            assert not (small.path / "new").exists()
        async with AsyncMmap.create(small.path / "new", 256 << 10) as m:
            await m.write_at(0, b"x" * len(m))

    @pytest.mark.anyio
    async def test_room_for_half_of_it(self, kind: str, make_small_fs: Callable[..., Any]) -> None:
        """A store of which only the first pages find room changes none of them."""
        small = make_small_fs(kind)
        async with AsyncMmap.open_path(file_of(small.path, SIZE), "r+") as m:
            small.fill(leave=8 << 10)
            with pytest.raises(OSError) as caught:
                await m.write_at(0, b"x" * (64 << 10))
            assert caught.value.errno == errno.ENOSPC
            assert await m.read_at(0, 4096) == bytes(4096)

    @pytest.mark.anyio
    async def test_64_tasks(self, kind: str, make_small_fs: Callable[..., Any]) -> None:
        """Tasks that store into holes while the disk fills up and is freed: data or ENOSPC."""
        small = make_small_fs(kind)
        path = small.path / "sparse"
        with open(path, "wb") as file:
            file.truncate(SIZE)
        results: dict[int, bool] = {}
        async with AsyncMmap.open_path(path, "r+") as m:
            small.fill(leave=128 << 10)

            async def store(number: int) -> None:
                try:
                    await m.write_at(number * 16384, bytes([number + 1]) * 16384)
                    results[number] = True
                except OSError as exc:
                    assert exc.errno == errno.ENOSPC  # noqa: PT017
                    results[number] = False

            async with anyio.create_task_group() as tasks:
                for number in range(64):
                    tasks.start_soon(store, number)
            assert set(results.values()) == {True, False}
            for number, stored in results.items():
                got = await m.read_at(number * 16384, 16384)
                assert got == (bytes([number + 1]) if stored else bytes(1)) * 16384
            small.free()
            async with anyio.create_task_group() as tasks:
                for number in range(64):
                    tasks.start_soon(store, number)
            assert set(results.values()) == {True}
            await m.flush()


@pytest.mark.fuse
class TestBadDisk:
    """Pages that the disk cannot read or write."""

    @pytest.mark.anyio
    async def test_reads(self, make_slow_file: Callable[..., Any]) -> None:
        """EIO of one page is an error of the calls that touch it, until it heals."""
        file = make_slow_file(SIZE, max_readahead=0)
        good = file.stored(0, SIZE)
        async with AsyncMmap.open_path(file.path, "r+") as m:
            file.fail_reads(8 * PAGE, PAGE)
            calls: list[Callable[[], Awaitable[object]]] = [
                lambda: m.read_at(8 * PAGE, 10),
                lambda: m.read_at(0, SIZE),
                lambda: m.readinto_at(8 * PAGE, bytearray(10)),
                lambda: m.write_at(8 * PAGE, b"x"),
                lambda: m.load(),
                lambda: m.load(8 * PAGE, 1),
                lambda: m.view(8 * PAGE, 1),
                lambda: m.view_mut(7 * PAGE, 2 * PAGE),
                lambda: m.find(b"\0" * 30, 8 * PAGE),
                lambda: m.move(0, 8 * PAGE, 10),
                lambda: m.windows(offset=8 * PAGE).__anext__(),
            ]
            for number, call in enumerate(calls):
                with pytest.raises(OSError, match="Input/output error") as caught:
                    await call()
                assert caught.value.errno == errno.EIO, number
                assert os.fspath(caught.value.filename) == str(file.path), number
                m.view_mut_nowait()._give_back()
            assert await m.read_at(0, 8 * PAGE) == good[: 8 * PAGE]
            async with m.view(9 * PAGE, PAGE) as v:
                assert bytes(v) == good[9 * PAGE : 10 * PAGE]
            file.heal()
            for call in calls:
                result = await call()
                if isinstance(result, MmapView):
                    await result.aclose()

    @pytest.mark.anyio
    async def test_64_tasks(self, make_slow_file: Callable[..., Any]) -> None:
        """Every task whose pages are bad gets EIO, every other one its data."""
        file = make_slow_file(SIZE, read=0.001, max_readahead=0)
        good = file.stored(0, SIZE)
        bad = set(range(0, 256, 5))
        for page in bad:
            file.fail_reads(page * PAGE, PAGE)
        results: dict[int, object] = {}

        async def read(page: int) -> None:
            try:
                results[page] = await m.read_at(page * PAGE + 100, 1000)
            except OSError as exc:
                results[page] = exc.errno

        async with AsyncMmap.open_path(file.path) as m:
            for healed in (False, True):
                with anyio.fail_after(30):
                    async with anyio.create_task_group() as tasks:
                        for page in range(64):
                            tasks.start_soon(read, page)
                for page in range(64):
                    data = good[page * PAGE + 100 : page * PAGE + 1100]
                    expected = errno.EIO if page in bad and not healed else data
                    assert results[page] == expected, page
                file.heal()

    @pytest.mark.anyio
    async def test_writes(self, make_slow_file: Callable[..., Any]) -> None:
        """A flush that the disk refuses is FlushError, and stays one until it is cleared."""
        file = make_slow_file(SIZE)
        async with AsyncMmap.open_path(file.path, "r+") as m:
            await m.write_at(0, b"poison")
            pending = await m.flush_async_range(SIZE // 2, PAGE)
            file.fail_fsync(errno.EIO)
            for _ in range(2):
                with pytest.raises(FlushError) as caught:
                    await m.flush()
                assert caught.value.errno == errno.EIO
            file.heal()
            with pytest.raises(FlushError):
                await m.flush()
            await m.clear_flush_error()
            await m.flush()
            with pytest.raises(FlushError):
                await pending

    @pytest.mark.anyio
    async def test_disk_that_does_not_answer(self, make_slow_file: Callable[..., Any]) -> None:
        """Tasks that wait for it can leave, the map can be closed, and others go on."""
        file = make_slow_file(SIZE, max_readahead=0)
        m = await AsyncMmap.open_path(file.path, "r+")
        other = await AsyncMmap.anonymous(PAGE)
        await m.load(0, PAGE)
        file.hold("read")

        async def view() -> None:
            async with m.view(20 * PAGE, 10):
                raise AssertionError("its page cannot be there")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(m.read_at, 10 * PAGE, 10)
            tasks.start_soon(view)
            await to_thread.run_sync(file.wait_held, "read")
            await other.write_at(0, b"on")
            assert await other.read_at(0, 2) == b"on"
            tasks.cancel_scope.cancel()
        with anyio.fail_after(30):
            await m.aclose(flush=False)
        await other.aclose()
        file.release("read")
        for _ in range(1000):
            if not maps_of(file.path):
                break
            await to_thread.run_sync(lambda: None)
        assert maps_of(file.path) == 0
