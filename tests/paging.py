"""What the tests of the pager and of the pieces it works in have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from anyio import to_thread

from .content import file_of
from .fake_kernel import FakeKernel

pytest.importorskip("tests.rigs.faults", reason="the pager's rigs need Linux")

from .rigs.faults import evict
from .rigs.slow_file import SlowFile


def cold_kernel() -> FakeKernel:
    """Nothing is known to be in memory, so that everything goes to a worker."""
    kernel = FakeKernel()
    kernel.lack("nowait_reads")
    kernel.wrap("resident", lambda real, address, length: bytes(len(real(address, length))))
    return kernel


def on_disk(folder: Path, data: bytes) -> Path:
    """A file none of whose pages is in memory; skips where there is no disk below."""
    path = file_of(folder, data)
    try:
        evict(path)
    except RuntimeError:
        pytest.skip("temporary files are in memory here: no page can be made cold")
    return path


async def held(file: SlowFile, count: int = 1) -> None:
    """Wait until so many reads wait for the disk."""
    await to_thread.run_sync(file.wait_held, "read", count)


@asynccontextmanager
async def holding(file: SlowFile) -> AsyncIterator[None]:
    """The disk answers no read while the block runs."""
    file.hold("read")
    try:
        yield
    finally:
        await to_thread.run_sync(file.release, "read")
