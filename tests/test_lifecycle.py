"""However a map ends, everything ends well: in use, twice, forgotten, with its loop or process."""

from __future__ import annotations

import asyncio
import errno
import gc
import mmap
import os
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import ClosedResourceError, from_thread, to_thread

from aiommap import AsyncMmap, FlushError, MmapView, TruncatedError, _mapped_memory
from aiommap._file import File
from aiommap._range_index import RangeIndex

from .cancelling import let_others_run, on_asyncio
from .content import file_descriptors, file_of, gone, inc, maps_of, only_linux, open_descriptors
from .fake_kernel import FakeKernel
from .processes import run_python
from .test_cancellation import cold_kernel, map_class
from .test_conformance import in_a_forked_child

pytestmark = [pytest.mark.anyio, only_linux]

SIZE = 1 << 20

Use = Callable[[AsyncMmap], Awaitable[object]]


async def use_every_way(m: AsyncMmap) -> dict[str, Exception]:
    """What each public call of a map raises."""
    coroutines: dict[str, Callable[[], Awaitable[object]]] = {
        "read_at": lambda: m.read_at(0, 1),
        "readinto_at": lambda: m.readinto_at(0, bytearray(1)),
        "write_at": lambda: m.write_at(0, b"x"),
        "move": lambda: m.move(0, 1, 1),
        "find": lambda: m.find(b"x"),
        "rfind": lambda: m.rfind(b"x"),
        "load": lambda: m.load(),
        "resident": lambda: m.resident(),
        "advise": lambda: m.advise("normal"),
        "pin": lambda: m.pin(0, 1),
        "unpin": lambda: m.unpin(0, 1),
        "flush": lambda: m.flush(),
        "flush_range": lambda: m.flush_range(0, 1),
        "flush_async": lambda: m.flush_async(),
        "flush_async_range": lambda: m.flush_async_range(0, 1),
        "clear_flush_error": lambda: m.clear_flush_error(),
        "file_size": lambda: m.file_size(),
        "resize": lambda: m.resize(1),
        "set_protection": lambda: m.set_protection("r"),
        "view": lambda: m.view(),
        "view_mut": lambda: m.view_mut(),
        "into_view": lambda: m.into_view(),
        "into_view_sync": lambda: m.into_view_sync(),
        "windows": lambda: m.windows().__anext__(),
        "__aenter__": lambda: m.__aenter__(),
    }
    plain: dict[str, Callable[[], object]] = {
        "as_slice": m.as_slice,
        "as_mut_slice": m.as_mut_slice,
        "ptr": m.ptr,
        "mut_ptr": m.mut_ptr,
        "view_nowait": m.view_nowait,
        "view_mut_nowait": m.view_mut_nowait,
    }
    result: dict[str, Exception] = {}
    for name, call in coroutines.items():
        try:
            await call()
        except Exception as exc:
            result[name] = exc
    if not m.closed:
        # Raw memory is free to use in every thread.
        plain = {name: plain[name] for name in ("view_nowait", "view_mut_nowait")}
    for name, plain_call in plain.items():
        try:
            plain_call()
        except Exception as exc:
            result[name] = exc
    missing = (coroutines.keys() | plain.keys()) - result.keys()
    assert not missing, f"no error from {missing}"
    return result


class TestClose:
    async def test_use_after_close(self, tmp_path: Path) -> None:
        """Every call of a closed map is ClosedResourceError; closing again is fine."""
        m = await AsyncMmap.open_path(file_of(tmp_path, inc(SIZE)), "r+")
        await m.aclose()
        for name, error in (await use_every_way(m)).items():
            assert type(error) is ClosedResourceError, (name, error)
        with pytest.raises(ClosedResourceError):
            len(m)
        assert m.closed
        assert "closed" in repr(m)
        m.statistics()
        await m.aclose()
        await m.aclose(flush=False)

    async def test_use_after_into_view(self, tmp_path: Path) -> None:
        """A consumed map is as a closed one."""
        m = await AsyncMmap.open_path(file_of(tmp_path, inc(SIZE)), "r+")
        async with m.into_view() as v:
            for name, error in (await use_every_way(m)).items():
                assert type(error) is ClosedResourceError, (name, error)
            assert v[0] == 0
        await m.aclose()

    @pytest.mark.parametrize(
        "name", ["read", "readinto", "write", "find", "load", "flush", "windows", "resize"]
    )
    async def test_with_a_call_in_a_thread(self, name: str, tmp_path: Path) -> None:
        """Closed from another task meanwhile, a call gives all it should, or an error."""
        path = file_of(tmp_path, inc(SIZE))
        kernel = cold_kernel()
        uses: dict[str, tuple[str, Use]] = {
            "read": ("read", lambda m: m.read_at(0, SIZE)),
            "readinto": ("read", lambda m: m.readinto_at(0, bytearray(SIZE))),
            "write": ("populate_write", lambda m: m.write_at(0, b"x" * SIZE)),
            "find": ("read", lambda m: m.find(b"not there")),
            "load": ("populate_read", lambda m: m.load()),
            "flush": ("sync_data", lambda m: m.flush()),
            "windows": ("populate_read", lambda m: m.windows(1 << 18).__anext__()),
            "resize": ("map_file", lambda m: m.resize(SIZE + 1)),
        }
        function, use = uses[name]
        results: list[object] = []
        m = await map_class(kernel).open_path(path, "r+")
        await m.write_at(0, b"\0")

        async def caller() -> None:
            try:
                results.append(await use(m))
            except (ClosedResourceError, OSError) as exc:
                results.append(exc)

        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                with kernel.hold(function) as hold:
                    tasks.start_soon(caller)
                    await to_thread.run_sync(hold.wait_entered)
                    tasks.start_soon(m.aclose)
                    await let_others_run()
                    with pytest.raises(ClosedResourceError):
                        await m.read_at(0, 1)
        assert m.closed
        (result,) = results
        results.clear()
        if name == "read" and not isinstance(result, Exception):
            assert result == inc(SIZE)
        kernel.calls.clear()
        del result
        await gone(path)

    async def test_with_waiters(self, tmp_path: Path) -> None:
        """Who waits for a region gets ClosedResourceError; the view that holds it goes on."""
        m = await AsyncMmap.open_path(file_of(tmp_path, inc(SIZE)), "r+")
        refused: list[int] = []

        async def waiter(number: int) -> None:
            with pytest.raises(ClosedResourceError, match="closed"):
                async with m.view_mut(number):
                    raise AssertionError("got in")
            refused.append(number)

        async with anyio.create_task_group() as tasks:
            async with m.view_mut() as v:
                for number in range(20):
                    tasks.start_soon(waiter, number)
                await let_others_run()
                await m.aclose()
                await let_others_run()
                assert len(refused) == 20
                v[0:5] = b"after"
                await v.flush()
                assert await v.read(5) == b"after"
        assert (tmp_path / "data.bin").read_bytes()[:5] == b"after"
        await gone(tmp_path / "data.bin")

    async def test_with_views(self, tmp_path: Path) -> None:
        """Views outlive the map; descriptor and memory go with the last of them."""
        path = file_of(tmp_path, inc(SIZE))
        m = await AsyncMmap.open_path(path, "r+")
        first = await m.view(0, 10)
        second = await m.view_mut(10, 10)
        await m.aclose()
        assert len(file_descriptors(path)) >= 1
        assert bytes(first) == inc(10)
        await first.aclose()
        second[:] = b"x" * 10
        assert maps_of(path) == 1
        await second.aclose()
        assert maps_of(path) == 0
        assert file_descriptors(path) == []
        assert path.read_bytes()[10:20] == b"x" * 10
        await first.aclose()
        await second.aclose()

    async def test_concurrently(self, tmp_path: Path) -> None:
        """Twenty tasks close the map at once: it is closed once, without an error."""
        path = file_of(tmp_path, inc(SIZE))
        m = await AsyncMmap.open_path(path, "r+")
        await m.write_at(0, b"x")
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(m.aclose)
        assert path.read_bytes()[:1] == b"x"
        await gone(path)

    async def test_map_and_last_view_at_once(self, tmp_path: Path) -> None:
        """The last view closes while the map's own closing flushes: both end well."""
        path = file_of(tmp_path, inc(SIZE))
        kernel = FakeKernel()
        m = await map_class(kernel).open_path(path, "r+")
        view = await m.view_mut(0, 10)
        view[0] = 1
        async with anyio.create_task_group() as tasks:
            with kernel.hold("sync_data") as hold:
                tasks.start_soon(m.aclose)
                await to_thread.run_sync(hold.wait_entered)
                tasks.start_soon(view.aclose)
                tasks.start_soon(view.aclose)
                await let_others_run()
        assert file_descriptors(path) == []
        assert maps_of(path) == 0

    async def test_last_view_twice(self, tmp_path: Path) -> None:
        """The last view of a consumed map may be closed again, and by two tasks at once."""
        m = await AsyncMmap.open_path(file_of(tmp_path, inc(SIZE)), "r+")
        v = await m.into_view()
        v[0] = 7
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(v.aclose)
            tasks.start_soon(v.aclose)
        await v.aclose()

    async def test_in_a_cancelled_scope(self, tmp_path: Path) -> None:
        """It closes, without a flush, before the cancellation goes on."""
        path = file_of(tmp_path, inc(SIZE))
        kernel = FakeKernel()
        m = await map_class(kernel).open_path(path, "r+")
        await m.write_at(0, b"x")
        with anyio.CancelScope() as scope:
            scope.cancel()
            await m.aclose()
        assert scope.cancelled_caught
        assert m.closed
        assert file_descriptors(path) == []
        assert kernel.names("sync_data", "sync_range") == []

    async def test_block_that_failed(self, tmp_path: Path) -> None:
        """The block's exception comes out, without a flush and without another error."""
        kernel = FakeKernel()
        kernel.fail("sync_data", errno.EIO)
        path = file_of(tmp_path, inc(SIZE))
        with pytest.raises(ZeroDivisionError):
            async with map_class(kernel).open_path(path, "r+") as m:
                await m.write_at(0, b"x")
                raise ZeroDivisionError
        assert kernel.names("sync_data") == []
        assert file_descriptors(path) == []

    async def test_flush_that_fails(self, tmp_path: Path) -> None:
        """The error comes after everything is closed."""
        kernel = FakeKernel()
        kernel.fail("sync_data", errno.EIO)
        path = file_of(tmp_path, inc(SIZE))
        with pytest.raises(FlushError) as caught:
            async with map_class(kernel).open_path(path, "r+") as m:
                await m.write_at(0, b"x")
        assert caught.value.errno == errno.EIO
        assert m.closed
        assert file_descriptors(path) == []
        assert maps_of(path) == 0

    async def test_truncated_before_the_end(self, tmp_path: Path) -> None:
        """A closing flush of a truncated file is TruncatedError, and the map is closed."""
        path = file_of(tmp_path, inc(SIZE))
        with pytest.raises(TruncatedError, match="truncated"):
            async with AsyncMmap.open_path(path, "r+") as m:
                await m.write_at(0, b"x")
                os.truncate(path, 10)
        assert m.closed
        assert file_descriptors(path) == []

    async def test_a_kept_error_keeps_no_descriptor(self, tmp_path: Path) -> None:
        """Who keeps the errors of a map does not keep its memory or its descriptor."""
        path = file_of(tmp_path, inc(SIZE))
        kernel = cold_kernel()
        kept: list[BaseException] = []
        async with map_class(kernel).open_path(path, "r+") as m:
            os.truncate(path, 0)
            for call in (
                lambda: m.read_at(0, 10),
                lambda: m.readinto_at(0, bytearray(SIZE)),
                lambda: m.write_at(0, b"x"),
                lambda: m.move(0, 100, 100),
                lambda: m.find(b"x"),
                lambda: m.load(),
                lambda: m.view(),
                lambda: m.view_mut(),
                lambda: m.flush(),
                lambda: m.flush_async(),
                lambda: m.windows().__anext__(),
                lambda: m.set_protection("r"),
            ):
                with pytest.raises(TruncatedError) as caught:
                    await call()
                kept.append(caught.value)
                del caught
            os.truncate(path, SIZE)
            kernel.fail("advise", errno.EINVAL)
            kernel.fail("pin", errno.ENOMEM)
            kernel.fail("resident", errno.EIO)
            kernel.fail("cached_pages", errno.EIO)
            kernel.fail("map_file", errno.ENOMEM)
            for call in (
                lambda: m.advise("random"),
                lambda: m.pin(),
                lambda: m.resident(),
                lambda: m.resize(SIZE + 1),
            ):
                with pytest.raises(OSError, match=r"\w") as failed:
                    await call()
                kept.append(failed.value)
        kernel.calls.clear()
        assert len(kept) == 16
        assert maps_of(path) == 0
        assert file_descriptors(path) == []

    async def test_pending_flush_after_close(self, tmp_path: Path) -> None:
        """A pending flush can be awaited when its map is gone, and keeps no descriptor then."""
        path = file_of(tmp_path, inc(SIZE))
        m = await AsyncMmap.open_path(path, "r+")
        await m.write_at(0, b"x")
        pending = await m.flush_async()
        await m.aclose(flush=False)
        assert maps_of(path) == 0
        assert not pending.done
        await pending
        await pending.wait()
        assert pending.done
        assert file_descriptors(path) == []

    async def test_pending_flush_of_a_truncated_file(self, tmp_path: Path) -> None:
        """Truncated after its map was closed, it is not called durable."""
        path = file_of(tmp_path, inc(SIZE))
        m = await AsyncMmap.open_path(path, "r+")
        await m.write_at(SIZE - 1, b"x")
        pending = await m.flush_async()
        await m.aclose(flush=False)
        os.truncate(path, 100)
        with pytest.raises(TruncatedError, match="truncated"):
            await pending
        assert not pending.done

    async def test_last_raw_buffer(self, tmp_path: Path) -> None:
        """A raw buffer keeps the memory, and nothing else, until it is released."""
        path = file_of(tmp_path, inc(SIZE))
        m = await AsyncMmap.open_path(path, "r+")
        raw = m.as_mut_slice()
        part = raw[10:20]
        raw.release()
        await m.aclose()
        assert maps_of(path) == 1
        assert part == inc(10, 10)
        part[:] = b"y" * 10
        part.release()
        assert maps_of(path) == 0
        assert path.read_bytes()[10:20] == b"y" * 10

    async def test_the_loop_does_not_unmap(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Memory is unmapped in a worker: when closed, and when a read outlives the closing."""
        path = file_of(tmp_path, inc(SIZE))
        kernel = cold_kernel()
        ended_in: list[int] = []
        unmap = _mapped_memory._unmap

        def watched(memory: mmap.mmap, file: File | None) -> None:
            if file is not None and file.filename == str(path):  # else an earlier test's
                ended_in.append(threading.get_ident())
            unmap(memory, file)

        monkeypatch.setattr(_mapped_memory, "_unmap", watched)
        async with map_class(kernel).open_path(path, "r+"):
            pass
        assert len(ended_in) == 1
        m = await map_class(kernel).open_path(path, "r+")
        async with anyio.create_task_group() as tasks:
            with kernel.hold("read") as hold:
                tasks.start_soon(m.read_at, 0, 100)
                await to_thread.run_sync(hold.wait_entered)
                await m.aclose()
        kernel.calls.clear()
        m = await map_class(kernel).open_path(path, "r+")
        async with anyio.create_task_group() as tasks:
            with kernel.hold("populate_read") as hold:
                tasks.start_soon(m.load)
                await to_thread.run_sync(hold.wait_entered)
                await m.aclose()
        await gone(path)
        assert len(ended_in) == 3
        assert threading.get_ident() not in ended_in


class TestForgotten:
    async def test_map(self, tmp_path: Path) -> None:
        """A map that is dropped without being closed warns, and leaves nothing."""
        path = file_of(tmp_path, inc(SIZE))
        m = await AsyncMmap.open_path(path, "r+")
        with pytest.warns(ResourceWarning, match=r"data\.bin.* was dropped without being closed"):
            del m
        await gone(path)

    async def test_map_in_a_cycle(self, tmp_path: Path) -> None:
        """Also by the garbage collector."""
        path = file_of(tmp_path, inc(SIZE))

        async def forget() -> None:
            cycle: list[object] = [await AsyncMmap.open_path(path, "r+")]
            cycle.append(cycle)

        await forget()
        with pytest.warns(ResourceWarning, match="dropped without being closed"):
            gc.collect()
        await gone(path)

    async def test_view(self, tmp_path: Path) -> None:
        """A view that is dropped warns and frees its region; a closed map goes with it."""
        path = file_of(tmp_path, inc(SIZE))
        m = await AsyncMmap.open_path(path, "r+")
        view = await m.view_mut()
        with pytest.warns(ResourceWarning, match="dropped without being closed"):
            del view
        await let_others_run()  # the finalizer only tells the loop
        async with m.view_mut():
            pass
        view = await m.view_mut()
        await m.aclose()
        with pytest.warns(ResourceWarning, match="dropped without being closed"):
            del view
        await gone(path)

    async def test_clones(self, tmp_path: Path) -> None:
        """Every handle of a sync view that is dropped warns; the last one frees the region."""
        path = file_of(tmp_path, inc(SIZE))
        m = await AsyncMmap.open_path(path, "r+")
        first = await m.into_view_sync()
        second = first.clone()
        third = first.clone()
        with pytest.warns(ResourceWarning, match="dropped without being closed"):
            del second
        await let_others_run()
        assert first[0] == 0
        with pytest.warns(ResourceWarning, match="dropped without being closed"):
            del first
        await let_others_run()
        assert maps_of(path) == 1
        await third.aclose()
        await gone(path)

    async def test_clones_in_threads(self, tmp_path: Path) -> None:
        """Handles that are dropped in many threads at once are all counted."""
        path = file_of(tmp_path, inc(SIZE))
        m = await AsyncMmap.open_path(path, "r+")
        with pytest.warns(ResourceWarning, match="dropped without being closed"):
            async with m.into_view_sync() as view:
                for _ in range(20):
                    boxes = [[view.clone()] for _ in range(20)]
                    async with anyio.create_task_group() as tasks:
                        for box in boxes:
                            tasks.start_soon(to_thread.run_sync, box.clear)
                await let_others_run()
                assert m.statistics().views == 1
        await gone(path)

    async def test_windows_collected_in_the_middle_of_the_queue(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Garbage that holds a region is found while another task asks for it: it gets it."""
        path = file_of(tmp_path, inc(SIZE))
        real = RangeIndex.overlapping

        def overlapping(index: RangeIndex[Any], start: int, stop: int) -> list[Any]:
            found = real(index, start, stop)
            if found:
                gc.collect()  # between the look and the leap
            return found

        async def forget() -> None:
            windows = m.windows(1 << 16)
            cycle: list[object] = [windows]
            cycle.append(cycle)
            await windows.__anext__()

        async with AsyncMmap.open_path(path, "r+") as m:
            gc.disable()
            try:
                await forget()
                monkeypatch.setattr(RangeIndex, "overlapping", overlapping)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(m.write_at, 0, b"x")
            finally:
                gc.enable()
                monkeypatch.undo()
            m._core.lock.queue._check()
            m.view_mut_nowait()._give_back()
        assert path.read_bytes()[:1] == b"x"

    async def test_windows_left_by_break(self, tmp_path: Path) -> None:
        """Leaving the loop early frees the region at once."""
        async with AsyncMmap.open_path(file_of(tmp_path, inc(SIZE)), "r+") as m:
            async for window in m.windows(1 << 16):
                assert window[0] == 0
                break
            m.view_mut_nowait()._give_back()

    async def test_openings(self, tmp_path: Path) -> None:
        """What is never awaited leaves nothing behind, not even a warning."""
        path = file_of(tmp_path, inc(SIZE))
        descriptors = open_descriptors()
        async with AsyncMmap.anonymous(10) as m:
            AsyncMmap.open_path(path)
            with open(path, "rb") as file:
                AsyncMmap.open(file)
            AsyncMmap.create(tmp_path / "never", 10)
            AsyncMmap.anonymous(10)
            m.view()
            m.view_mut()
            m.into_view()
            m.windows()
            gc.collect()
            m.view_mut_nowait()._give_back()
        assert open_descriptors() == descriptors
        assert not (tmp_path / "never").exists()

    async def test_async_generator(self, tmp_path: Path) -> None:
        """A map in an async generator that is closed at a yield closes, without a warning."""
        path = file_of(tmp_path, inc(SIZE))

        async def generate() -> AsyncGenerator[int, None]:
            async with AsyncMmap.open_path(path, "r+") as m, m.view_mut(0, 10) as v:
                maps.append(m)
                while True:
                    yield v[0]

        maps: list[AsyncMmap] = []

        generator = generate()
        assert await generator.__anext__() == 0
        await generator.aclose()
        assert maps[0].closed  # at once: it is its own task that closes it
        with pytest.raises(ClosedResourceError):
            await maps[0].read_at(0, 1)
        del generator
        await gone(path)

    @on_asyncio
    async def test_coroutines(self, tmp_path: Path) -> None:
        """Calls whose coroutine is closed at any await free their regions."""
        path = file_of(tmp_path, inc(SIZE))
        async with map_class(cold_kernel()).open_path(path, "r+") as m:
            calls: list[Callable[[], Awaitable[object]]] = [
                lambda: m.read_at(0, 100),
                lambda: m.readinto_at(0, bytearray(100)),
                lambda: m.write_at(0, b"x"),
                lambda: m.move(0, 100, 100),
                lambda: m.find(b"x"),
                lambda: m.load(),
                lambda: m.flush(),
                lambda: m.flush_async(),
                lambda: m.view(),
                lambda: m.pin(0, 10),
                lambda: m.resize(SIZE),
                lambda: m.windows().__anext__(),
            ]
            for call in calls:
                for steps in range(1, 4):
                    waiting = call().__await__()
                    try:
                        for _ in range(steps):
                            waiting.send(None)
                    except (StopIteration, RuntimeError):
                        pass  # it ended; or was driven on before it was woken
                    waiting.close()
                    with anyio.fail_after(30):
                        async with m.view_mut(load=False):
                            pass
            assert m.statistics().waiting == 0

    @pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
    def test_tasks_of_a_loop_that_was_closed(self, loop: str, tmp_path: Path) -> None:
        """A loop that is closed with tasks in the middle of everything ends in silence."""
        code = """
            import asyncio, gc, sys
            from tests.content import file_of, inc
            from tests.test_cancellation import cold_kernel, map_class
            from aiommap import AsyncMmap
            from pathlib import Path
            if sys.argv[2] == "uvloop":
                import uvloop
                loop = uvloop.new_event_loop()
            else:
                loop = asyncio.new_event_loop()
            kernel = cold_kernel()
            path = sys.argv[1]
            tasks = []
            async def main():
                m = await map_class(kernel).open_path(path, "r+")
                async def hold():
                    async with m.view_mut(0, 10):
                        await asyncio.sleep(3600)
                async def consumed():
                    other = await AsyncMmap.open_path(path, "r+")
                    async with other.into_view() as v:
                        v[0] = 1
                        await asyncio.sleep(3600)
                async def entered():
                    async with AsyncMmap.open_path(path, "r+") as other:
                        await other.write_at(0, b"x")
                        async for window in other.windows(4096):
                            await asyncio.sleep(3600)
                holds.append(kernel.hold("read"))
                for call in (hold(), consumed(), entered(), m.read_at(100, 10), m.read_at(0, 10),
                             m.readinto_at(200, bytearray(10)), m.write_at(5, b"x"), m.find(b"y"),
                             m.move(0, 100, 10), m.resize(10)):
                    tasks.append(loop.create_task(call))
                    tasks[-1]._log_destroy_pending = False
                holds[0].entered.wait
                for _ in range(10):
                    await asyncio.sleep(0.001)
            holds = []
            loop.run_until_complete(main())
            loop.close()
            tasks.clear()
            gc.collect()
            holds[0].release.set()
            print("ok")
        """
        path = file_of(tmp_path, inc(SIZE))
        result = run_python(code, path, loop)
        assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")


class TestExit:
    CASES = {  # noqa: RUF012
        "a global": """
            async def main():
                global m, v, raw
                m = await AsyncMmap.open_path(path, "r+")
                v = await m.view_mut(0, 10)
                raw = m.as_slice()
                await m.write_at(100, b"x")
            run(main)
        """,
        "a cycle": """
            class Node: pass
            async def main():
                node = Node()
                node.me = node
                node.m = await AsyncMmap.open_path(path, "r+")
                node.v = await node.m.view()
                sys.keep = node
            run(main)
        """,
        "a thread that hangs": """
            from tests.test_cancellation import cold_kernel, map_class
            kernel = cold_kernel()
            hold = kernel.hold("read")
            async def main():
                global m
                m = await map_class(kernel).open_path(path, "r+")
                with anyio.CancelScope() as scope:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(m.read_at, 0, 10)
                        await anyio.to_thread.run_sync(hold.wait_entered)
                        tasks.cancel_scope.cancel()
            run(main)
        """,
        "tasks in flight": """
            async def main():
                m = await AsyncMmap.open_path(path, "r+")
                async def forever():
                    while True:
                        async with m.view_mut(0, 100) as v:
                            await v.write(b"x")
                            await v.flush()
                async with anyio.create_task_group() as tasks:
                    for _ in range(10):
                        tasks.start_soon(forever)
                    await anyio.sleep(0.05)
                    tasks.cancel_scope.cancel()
            run(main)
        """,
        "sys.exit": """
            async def main():
                async with AsyncMmap.open_path(path, "r+") as m:
                    await m.write_at(0, b"x")
                    async with m.view_mut(0, 10):
                        raise SystemExit(0)
            run(main)
        """,
    }

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    @pytest.mark.parametrize("case", CASES)
    def test_interpreter(self, case: str, tmp_path: Path, backend: str) -> None:
        """An interpreter that exits with open maps has status 0 and nothing to say."""
        path = file_of(tmp_path, inc(SIZE))
        code = f"""
import sys, anyio
from functools import partial
from aiommap import AsyncMmap
path = sys.argv[1]
run = partial(anyio.run, backend={backend!r})
"""
        import textwrap

        code += textwrap.dedent(self.CASES[case])
        result = run_python(code, path)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


class TestStrangers:
    """A map belongs to the event loop that opened it."""

    def test_another_loop(self, tmp_path: Path) -> None:
        """Used from a later event loop, every call is a RuntimeError that says so."""
        path = file_of(tmp_path, inc(SIZE))
        made: list[AsyncMmap] = []

        async def first() -> None:
            made.append(await AsyncMmap.open_path(path, "r+"))

        async def second() -> None:
            for name, error in (await use_every_way(made[0])).items():
                assert type(error) is RuntimeError, (name, error)
                assert "event loop" in str(error), (name, error)
            with pytest.raises(RuntimeError, match="event loop"):
                await made[0].aclose()

        for backend in ("asyncio", "trio"):
            anyio.run(first)
            anyio.run(second, backend=backend)
            with pytest.warns(ResourceWarning, match="without being closed"):
                made.clear()
                gc.collect()

    def test_views_of_another_loop(self, tmp_path: Path) -> None:
        """So are its views and its pending flushes."""
        path = file_of(tmp_path, inc(SIZE))
        made: list[AsyncMmap] = []
        views: list[MmapView] = []

        async def first() -> None:
            made.append(await AsyncMmap.open_path(path, "r+"))
            views.append(await made[0].view_mut(0, 10))

        async def second() -> None:
            v = views[0]
            calls: list[Callable[[], Awaitable[object]]] = [
                lambda: v.read(1),
                lambda: v.readinto(bytearray(1)),
                lambda: v.readline(),
                lambda: v.write(b"x"),
                lambda: v.seek(0),
                lambda: v.tell(),
                lambda: v.flush(),
                lambda: v.flush_async(),
                lambda: v.aclose(),
            ]
            for call in calls:
                with pytest.raises(RuntimeError, match="event loop"):
                    await call()
            with pytest.raises(RuntimeError, match="event loop"):
                v.split_at(1)
            with pytest.raises(RuntimeError, match="event loop"):
                v[0]

        for backend in ("asyncio", "trio"):
            anyio.run(first)
            anyio.run(second, backend=backend)
            with pytest.warns(ResourceWarning, match="without being closed"):
                views.clear()
                made.clear()

    async def test_thread(self, tmp_path: Path) -> None:
        """Used from a foreign thread too; through from_thread it works."""
        path = file_of(tmp_path, inc(SIZE))
        async with AsyncMmap.open_path(path, "r+") as m, m.view_mut(0, 10) as v:

            def foreign() -> None:
                for call in (m.view_nowait, m.view_mut_nowait):
                    with pytest.raises(RuntimeError, match="event loop"):
                        call()
                with pytest.raises(RuntimeError, match="event loop"):
                    v[0]
                with pytest.raises(RuntimeError, match="event loop"):
                    m.read_at(0, 1).send(None)
                assert from_thread.run(m.read_at, 100, 1) == inc(1, 100)

            await to_thread.run_sync(foreign)

    async def test_sync_view_in_a_loop_of_its_own(self, tmp_path: Path) -> None:
        """What is awaited of a sync view belongs to the map's loop, its memory to nobody."""
        path = file_of(tmp_path, inc(SIZE))
        m = await AsyncMmap.open_path(path, "r+")
        async with m.into_view_sync() as v:

            async def other() -> None:
                assert v[5] == 5
                v[5] = 6
                for call in (lambda: v.read(1), lambda: v.flush(), lambda: v.aclose()):
                    with pytest.raises(RuntimeError, match="event loop"):
                        await call()

            await to_thread.run_sync(lambda: anyio.run(other))
            assert v[5] == 6


class TestDescriptors:
    """What the caller does with a descriptor is the caller's business."""

    async def test_file_object_that_nobody_holds(self, tmp_path: Path) -> None:
        """open(file) keeps the file until it has a descriptor of its own."""
        path = file_of(tmp_path, inc(SIZE))

        class OpenFile:
            def __init__(self) -> None:
                self._fd = os.open(path, os.O_RDONLY)

            def fileno(self) -> int:
                return self._fd

            def __del__(self) -> None:
                os.close(self._fd)

        opening = AsyncMmap.open(OpenFile())
        with open(tmp_path / "other", "wb"):
            m = await opening
        assert await m.read_at(0, 10) == inc(10)
        await m.aclose()
        assert file_descriptors(path) == []

    async def test_closed_when_opened(self, tmp_path: Path) -> None:
        """The caller's descriptor can be closed, and its number reused, at once."""
        path = file_of(tmp_path, inc(SIZE))
        other = file_of(tmp_path, b"other" * 1000, "other.bin")
        descriptor = os.open(path, os.O_RDWR)
        m = await AsyncMmap.open(descriptor, "r+")
        os.close(descriptor)
        again = os.open(other, os.O_RDWR)
        try:
            assert again == descriptor or sys.platform != "linux"
            assert await m.read_at(0, 10) == inc(10)
            await m.write_at(0, b"x")
            await m.flush()
            await m.resize(SIZE + 10)
            await m.aclose()
        finally:
            os.close(again)
        assert path.stat().st_size == SIZE + 10
        assert other.read_bytes() == b"other" * 1000

    async def test_closed_while_it_opens(self, tmp_path: Path) -> None:
        """Also while the opening is under way."""
        path = file_of(tmp_path, inc(SIZE))
        other = file_of(tmp_path, b"other" * 1000, "other.bin")
        kernel = FakeKernel()
        descriptor = os.open(path, os.O_RDWR)
        maps: list[AsyncMmap] = []

        async def opened() -> None:
            maps.append(await map_class(kernel).open(descriptor, "r+"))

        async with anyio.create_task_group() as tasks:
            with kernel.hold("map_file") as hold:
                tasks.start_soon(opened)
                await to_thread.run_sync(hold.wait_entered)
                os.close(descriptor)
                again = os.open(other, os.O_RDWR)
        os.close(again)
        assert await maps[0].read_at(0, 10) == inc(10)
        await maps[0].aclose()

    async def _failed_opens_leak(self, path: Path) -> bool:
        """Open files that cannot be mapped, and keep the errors: are descriptors left?"""
        empty = file_of(path.parent, b"", "empty")
        before = open_descriptors()
        kept: list[BaseException] = []
        with open(path, "rb") as file:
            for opening in (
                AsyncMmap.open_path(empty),
                AsyncMmap.open_path(path, offset=SIZE),
                AsyncMmap.open_path(path.parent),
                AsyncMmap.open(file, "r+"),
                AsyncMmap.create(path, 10, exist_ok=True),
            ):
                with pytest.raises((OSError, ValueError)) as caught:
                    await opening
                kept.append(caught.value)
        return open_descriptors() != before and len(kept) == 5

    async def test_failed_opens(self, tmp_path: Path) -> None:
        """An opening that fails leaves no descriptor, even while its error is kept."""
        assert not await self._failed_opens_leak(file_of(tmp_path, inc(SIZE)))

    async def test_failed_opens_planted_fault(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Control: files that are not closed when an opening fails are seen."""
        leaked: list[int] = []

        def close(file: File) -> None:
            leaked.append(file.fd)
            file.fd = -1

        monkeypatch.setattr(File, "close", close)
        try:
            assert await self._failed_opens_leak(file_of(tmp_path, inc(SIZE)))
        finally:
            for fd in leaked:
                if fd != -1:
                    os.close(fd)

    async def test_closed_before_it_opens(self, tmp_path: Path) -> None:
        """A file that was closed between call and await is an error, not another file."""
        path = file_of(tmp_path, inc(SIZE))
        other = file_of(tmp_path, b"other" * 1000, "other.bin")
        with open(path, "rb") as file:
            opening = AsyncMmap.open(file)
        with open(other, "rb"), pytest.raises(ValueError, match="closed"):
            await opening

    async def test_close_on_exec(self, tmp_path: Path) -> None:
        """No descriptor of ours is inherited by a program that is started."""
        path = file_of(tmp_path, inc(SIZE))
        with open(path, "r+b") as file:
            async with (
                AsyncMmap.open_path(path, "r+"),
                AsyncMmap.open(file, "r+"),
                AsyncMmap.create(tmp_path / "new", 10),
                AsyncMmap.anonymous(10),
            ):
                for name in os.listdir("/proc/self/fd"):
                    try:
                        link = os.readlink(f"/proc/self/fd/{name}")
                    except FileNotFoundError:
                        continue
                    if str(tmp_path) in link or "memfd" in link:
                        assert not os.get_inheritable(int(name)), link

    async def test_no_memory_is_writable_and_executable(self, tmp_path: Path) -> None:
        """Under no protection, nor after any change of it."""
        path = file_of(tmp_path, inc(SIZE))
        async with AsyncMmap.open_path(path, "r+") as m, AsyncMmap.anonymous(4096) as a:
            for protection in ("rx", "r", "r+", "rx", "r+"):
                await m.set_protection(protection)
                await a.set_protection(protection)
                with open("/proc/self/maps", encoding="utf-8") as maps:
                    for line in maps:
                        if str(path) in line or "aiommap" in line:
                            assert "wx" not in line.split()[1], line


class TestFork:
    def test_child_of_a_running_map(self, tmp_path: Path) -> None:
        """A child forked in the middle of everything exits cleanly; the parent goes on."""
        code = """
            import os, sys, warnings
            import anyio
            from aiommap import AsyncMmap
            warnings.simplefilter("ignore")
            path = sys.argv[1]
            async def child_main():
                async with AsyncMmap.open_path(path, "r+") as m:
                    await m.write_at(0, b"child")
                    await m.flush()
                    return await m.find(b"child")
            async def main():
                async with AsyncMmap.open_path(path, "r+") as m, AsyncMmap.anonymous(4096) as a:
                    stop = False
                    async def busy(number):
                        while not stop:
                            async with m.view_mut(4096 * (number + 1), 100) as v:
                                await v.write(bytes(100))
                                await v.flush()
                                await m.read_at(1 << 19, 1 << 18)
                    async with anyio.create_task_group() as tasks:
                        for number in range(8):
                            tasks.start_soon(busy, number)
                        for _ in range(5):
                            await anyio.sleep(0.005)
                            child = os.fork()
                            if child == 0:
                                # No task of the parent's goes on here, and its loop is not ours.
                                from threading import Thread
                                status = []
                                thread = Thread(target=lambda: status.append(anyio.run(child_main)))
                                thread.start()
                                thread.join()
                                raw = a.as_mut_slice()
                                raw[:5] = b"child"
                                os._exit(status[0] if status else 9)
                            _, status = await anyio.to_thread.run_sync(os.waitpid, child, 0)
                            assert status == 0, status
                        stop = True
                    assert await a.read_at(0, 5) == b"child"
                    assert await m.read_at(0, 5) == b"child"
            anyio.run(main)
            print("ok")
        """
        path = file_of(tmp_path, inc(SIZE))
        result = run_python(code, path)
        assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")


async def test_a_forked_child_does_not_use_the_parents_map(tmp_path: Path) -> None:
    """The task that goes on in the child is no task of the map's: its calls are refused, also on
    trio, which still runs there as far as it can tell."""
    path = file_of(tmp_path, inc(SIZE))
    async with AsyncMmap.open_path(path, "r+") as m, m.view_mut(0, 100) as v:

        def all_refused() -> bool:
            uses: tuple[Callable[[], object], ...] = (
                lambda: m.view_nowait(200, 10),
                lambda: v[0],
                lambda: v.split_at(5),
            )
            for use in uses:
                try:
                    use()
                except RuntimeError as exc:
                    if "forked process" not in str(exc):
                        return False
                else:
                    return False
            return True

        assert in_a_forked_child(all_refused) == 0
        assert (v[0], len(v)) == (0, 100)


@on_asyncio
async def test_two_into_views_at_once(tmp_path: Path) -> None:
    """Of two tasks that consume a map, one gets it, also where it is only read."""
    path = file_of(tmp_path, inc(SIZE))
    m = await AsyncMmap.open_path(path)
    results = await asyncio.gather(m.into_view(), m.into_view(), return_exceptions=True)
    views = [each for each in results if isinstance(each, MmapView)]
    assert len(views) == 1
    assert sum(isinstance(each, ClosedResourceError) for each in results) == 1
    await views[0].aclose()
    await gone(path)


async def test_into_view_of_a_map_that_closes(tmp_path: Path) -> None:
    """A map that is closed while it is being consumed is closed."""
    path = file_of(tmp_path, inc(SIZE))
    m = await AsyncMmap.open_path(path)
    outcome: list[object] = []

    async def consume() -> None:
        try:
            async with m.into_view() as v:
                outcome.append(bytes(v[0:1]))
        except ClosedResourceError as exc:
            outcome.append(exc)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(consume)
        tasks.start_soon(m.aclose)
    assert len(outcome) == 1
    await gone(path)
