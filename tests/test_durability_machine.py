"""Any sequence of stores, flushes, resizes, crashes and power cuts, against a byte model.

The model keeps, for each page and for the size, what was stored (volatile) and from which
version on it must survive (durable). After a crash or a power cut each page may have any version
from the durable one on: the kernel writes whenever it likes.

``AIOMMAP_HYPOTHESIS=thorough`` runs ten times as many sequences.
"""

from __future__ import annotations

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("the rigs need Linux", allow_module_level=True)

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import anyio
from anyio.from_thread import start_blocking_portal
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from aiommap import AsyncMmap, PendingFlush, TruncatedError
from aiommap._kernel import Kernel, native

from .conftest import BACKENDS
from .false_flushes import FALSE_FLUSHES
from .flushing import mapped_by
from .rigs.faults import PAGE
from .rigs.file_systems import FILE_SYSTEMS
from .rigs.logged_disk import LoggedDisk

MOST_PAGES = 12
T = TypeVar("T")

pages = st.tuples(st.integers(0, MOST_PAGES), st.integers(0, MOST_PAGES)).map(
    lambda pair: (min(pair), abs(pair[0] - pair[1]))
)


class BytesLostError(AssertionError):
    """The disk does not have what was promised."""


@dataclass(frozen=True)
class Snapshot:
    """What was stored at an instant: a version for each page, and how many resizes there were."""

    versions: list[int]
    resizes: int


class Pages:
    """What may be on the disk, page by page."""

    def __init__(self, count: int) -> None:
        self.version = 0
        self.empty = {0}  # the versions that are zeros
        # For each page the versions that a crash may leave, the oldest first.
        self.possible = [[0] for _ in range(count)]
        self.cut: dict[int, list[int]] = {}  # the same for pages that were cut off
        self.sizes = [count]
        self.resizes = 0

    @property
    def size(self) -> int:
        return len(self.possible)

    def page(self, version: int) -> bytes:
        return bytes(PAGE) if version in self.empty else version.to_bytes(8, "big") * (PAGE // 8)

    def store(self, first: int, count: int) -> bytes:
        self.version += 1
        for page in self.possible[first : first + count]:
            page.append(self.version)
        return self.page(self.version) * count

    def resize(self, size: int) -> None:
        self.version += 1
        self.empty.add(self.version)
        self.cut.update(enumerate(self.possible[size:], size))
        del self.possible[size:]
        for index in range(self.size, size):
            # Zeros now; a crash may bring back what was cut off before.
            self.possible.append([*self.cut.get(index, [0]), self.version])
        self.sizes.append(size)
        self.resizes += 1

    def snapshot(self) -> Snapshot:
        return Snapshot([page[-1] for page in self.possible], self.resizes)

    def made_durable(self, what: Snapshot, first: int, count: int) -> None:
        """A range, as it was then, has reached the disk, and the size that it had then."""
        stop = first + count
        for page, version in list(zip(self.possible, what.versions, strict=False))[first:stop]:
            if version in page:
                del page[: page.index(version)]
        if count and what.resizes == self.resizes:
            del self.sizes[:-1]

    def content(self) -> bytes:
        return b"".join(self.page(versions[-1]) for versions in self.possible)

    def check(self, content: bytes | None, what: str) -> None:
        """:raises BytesLostError: this cannot be what a crash leaves"""
        if content is None:
            raise BytesLostError(f"the file is gone after {what}")
        size, rest = divmod(len(content), PAGE)
        if rest or size not in self.sizes:
            raise BytesLostError(f"{len(content)} bytes after {what}; possible: {self.sizes} pages")
        for index, versions in enumerate(self.possible[:size]):
            found = content[index * PAGE : (index + 1) * PAGE]
            # A size that was not flushed may be on the disk before the page is.
            unwritten = [0] if min(self.sizes) <= index else []
            if found not in map(self.page, [*unwritten, *versions]):
                version = int.from_bytes(found[:8], "big")
                raise BytesLostError(f"page {index} has {version} after {what}, not {versions}")


@dataclass(frozen=True)
class Waiting:
    """A flush that was started, and what it is about."""

    pending: PendingFlush
    map: AsyncMmap
    snapshot: Snapshot
    first: int
    count: int


class DurabilityMachine(RuleBasedStateMachine):
    """One file on one disk; the class attributes are set by the test."""

    disk: LoggedDisk
    kernel: Kernel = native
    call: Callable[..., Any]
    files = 0

    pendings = Bundle("pendings")

    def __init__(self) -> None:
        super().__init__()
        type(self).files += 1
        self.path = self.disk.path / f"file{self.files}"
        self.m: AsyncMmap | None = None
        self.written = False  # through this map

    def run(self, call: Callable[..., Awaitable[T]], *arguments: object) -> T:
        result: T = type(self).call(call, *arguments)
        return result

    def teardown(self) -> None:
        if self.m is not None:
            self.run(self.close, False)
        self.path.unlink(missing_ok=True)

    @initialize(count=st.integers(1, MOST_PAGES))
    def create(self, count: int) -> None:
        self.model = Pages(count)
        self.m = self.run(_opened, mapped_by(self.kernel).create, self.path, count * PAGE)

    def inside(self, where: tuple[int, int]) -> tuple[int, int]:
        first = min(where[0], self.model.size)
        return first, min(where[1], self.model.size - first)

    @rule(where=pages, way=st.sampled_from(["write_at", "view"]))
    def store(self, where: tuple[int, int], way: str) -> None:
        first, count = self.inside(where)
        data = self.model.store(first, count)
        self.written = self.written or count > 0

        async def write_through_a_view() -> None:
            async with self.map.view_mut(first * PAGE, count * PAGE) as view:
                view[:] = data

        if way == "view":
            self.run(write_through_a_view)
        else:
            self.run(self.map.write_at, first * PAGE, data)

    @property
    def map(self) -> AsyncMmap:
        assert self.m is not None
        return self.m

    @rule()
    def flush(self) -> None:
        snapshot = self.model.snapshot()
        self.run(self.map.flush)
        self.model.made_durable(snapshot, 0, self.model.size)

    @rule(where=pages)
    def flush_range(self, where: tuple[int, int]) -> None:
        first, count = self.inside(where)
        snapshot = self.model.snapshot()
        self.run(self.map.flush_range, first * PAGE, count * PAGE)
        self.model.made_durable(snapshot, first, count)

    @rule(wheres=st.lists(pages, min_size=2, max_size=5))
    def commit_together(self, wheres: list[tuple[int, int]]) -> None:
        ranges = [self.inside(where) for where in wheres]
        snapshot = self.model.snapshot()

        async def all_of_them() -> None:
            async with anyio.create_task_group() as tasks:
                for first, count in ranges:
                    tasks.start_soon(self.map.flush_range, first * PAGE, count * PAGE)

        self.run(all_of_them)
        for first, count in ranges:
            self.model.made_durable(snapshot, first, count)

    @rule(target=pendings, where=pages)
    def flush_async(self, where: tuple[int, int]) -> object:
        first, count = self.inside(where)
        snapshot = self.model.snapshot()
        pending = self.run(self.map.flush_async_range, first * PAGE, count * PAGE)
        return Waiting(pending, self.map, snapshot, first, count)

    @rule(waiting=consumes(pendings))
    def wait(self, waiting: Waiting) -> None:
        try:
            self.run(waiting.pending.wait)
        except TruncatedError:
            # For a map that was closed, the one that was opened after it is somebody else.
            assert waiting.map is not self.m
            assert waiting.first + waiting.count > self.model.size
            return
        assert waiting.pending.done
        self.model.made_durable(waiting.snapshot, waiting.first, waiting.count)

    @rule(size=st.integers(1, MOST_PAGES))
    def resize(self, size: int) -> None:
        if size != self.model.size:
            self.run(self.map.resize, size * PAGE)
            self.model.resize(size)
            self.written = True

    async def close(self, flush: bool) -> None:
        assert self.m is not None
        await self.m.aclose(flush=flush)
        self.m = None

    @rule(flush=st.booleans())
    def reopen(self, flush: bool) -> None:
        snapshot = self.model.snapshot()
        self.run(self.close, flush)
        # Leaving flushes what was written through the map, and no more than that.
        flush, self.written = flush and self.written, False
        if flush:
            self.model.made_durable(snapshot, 0, self.model.size)
        self.m = self.run(_opened, mapped_by(self.kernel).open_path, self.path, "r+")
        assert self.run(self.map.read_at, 0, len(self.map)) == self.model.content()

    def survivor(self, copy: Path) -> bytes | None:
        """What a map of the file has after the file system has recovered."""
        with self.disk.mounted(copy) as root:
            path = root / self.path.name
            return self.run(_content, path) if path.exists() else None

    @rule()
    def power_cut(self) -> None:
        self.model.check(self.survivor(self.disk.power_loss_view()), "a power cut")

    @precondition(lambda self: self.disk.kind != "btrfs")  # crash copies there are costly
    @rule()
    def crash(self) -> None:
        self.model.check(self.survivor(self.disk.crash_copy()), "a crash")


async def _opened(opening: Callable[..., Any], *arguments: object) -> AsyncMmap:
    m: AsyncMmap = await opening(*arguments)
    return m


async def _content(path: Path) -> bytes:
    async with AsyncMmap.open_path(path) as m:
        return await m.read_at(0, len(m))


def machine(
    stack: ExitStack, disk: LoggedDisk, backend: str, kernel: Kernel = native
) -> type[DurabilityMachine]:
    name, options = BACKENDS[backend]
    portal = stack.enter_context(start_blocking_portal(name, options))

    class Machine(DurabilityMachine):
        pass

    Machine.disk = disk
    Machine.kernel = kernel
    Machine.call = staticmethod(portal.call)
    return Machine


@pytest.mark.fuse
@pytest.mark.loopdev
@pytest.mark.parametrize(
    ("kind", "backend"), [("ext4", "asyncio"), ("xfs", "trio"), ("btrfs", "uvloop")]
)
def test_nothing_durable_is_lost(
    kind: str, backend: str, make_logged_disk: Callable[..., LoggedDisk], rig_stack: ExitStack
) -> None:
    """Whatever is done in whatever order, what was reported durable is there after a crash."""
    tested = machine(rig_stack, make_logged_disk(kind), backend)
    run_state_machine_as_test(
        tested,
        settings=settings(
            max_examples=max(settings().max_examples // 10, 1),
            stateful_step_count=30,
            phases=[Phase.generate, Phase.shrink],
            database=None,
        ),
    )


@pytest.mark.fuse
@pytest.mark.loopdev
@pytest.mark.parametrize("kind", list(FILE_SYSTEMS))
@pytest.mark.parametrize("false", list(FALSE_FLUSHES))
def test_the_machine_notices(
    kind: str, false: str, make_logged_disk: Callable[..., LoggedDisk], rig_stack: ExitStack
) -> None:
    """The control: with a false flush, after any way of committing, the machine finds a loss."""
    tested = machine(rig_stack, make_logged_disk(kind), "asyncio", FALSE_FLUSHES[false]())
    ways: list[Callable[[DurabilityMachine], object]] = [
        lambda each: each.flush(),
        lambda each: each.flush_range((1, 2)),
        lambda each: each.commit_together([(1, 1), (3, 1)]),
        lambda each: each.wait(each.flush_async((1, 2))),
        lambda each: each.reopen(True),
        lambda each: (each.resize(8), each.flush()),
    ]
    for way in ways:
        each = tested()
        # The file itself is made durable, or its name alone would be missed.
        each.kernel = native
        each.create(4)
        each.flush()
        each.run(each.close, True)
        each.kernel = tested.kernel
        each.m = each.run(_opened, mapped_by(tested.kernel).open_path, each.path, "r+")
        each.store((0, 4), "view")
        each.power_cut()
        way(each)
        with pytest.raises(BytesLostError):
            each.power_cut()
        each.teardown()
