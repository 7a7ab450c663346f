"""What takes long is told to the log ``aiommap``."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from aiommap import AsyncMmap, _flusher, _slow_log

from .content import file_of, inc

pytestmark = pytest.mark.anyio

N = 100_000


@pytest.fixture(autouse=True)
def _debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "aiommap")


async def work(path: Path) -> None:
    async with AsyncMmap.open_path(path, "r+") as m:
        await m.find(b"not there")
        await m.write_at(0, b"new")
        await m.flush_range(0, 3)
        await m.write_at(0, b"newer")
        await m.flush()


async def test_slow_work_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Loads, copies and flushes, by the worker and not by the loop; name and time are in it."""
    monkeypatch.setattr(_slow_log, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(_flusher, "BULK", N // 2)
    path = file_of(tmp_path, inc(N))
    await work(path)
    messages = [record.getMessage() for record in caplog.records]
    for beginning in (
        f"batch of 1 loads or copies, the first of {N} bytes at 0, in ",
        "flush for 1 tasks, 1 ranges of ",
        f"write-back of {N // 2} bytes at 0 of ",
    ):
        found = [each for each in messages if each.startswith(beginning)]
        assert found
        assert all(f"{str(path)!r}: 0." in each for each in found)
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}
    assert threading.get_ident() not in {record.thread for record in caplog.records}


async def test_quick_work_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Below the limit the log stays empty."""
    monkeypatch.setattr(_slow_log, "SLOW_SECONDS", 1e9)
    await work(file_of(tmp_path, inc(N)))
    assert caplog.records == []
