"""A slow or failing disk, for tests of code that uses maps.

::

    @pytest.fixture
    def disk():
        with aiommap.testing.faulty_disk() as disk:
            yield disk

    @pytest.mark.anyio
    async def test_commit_reports_a_bad_disk(disk, tmp_path):
        async with await Store.open(tmp_path / "store") as store:
            disk.fail("flush", errno.EIO)
            with pytest.raises(aiommap.FlushError):
                await store.commit()

Files and memory are real; only the calls that would meet the disk are slowed down, stopped or
refused. So no root, no special file system and no sleeping are needed. What it cannot show:
SIGBUS, a power cut, and what a real kernel does after a failure.
"""

from __future__ import annotations

import errno as _errno
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import anyio.to_thread

from ._kernel import Buffer, Kernel, native
from ._mmap import AsyncMmap

__all__ = ["FaultyDisk", "Held", "Operation", "faulty_disk"]

Operation: TypeAlias = Literal["read", "store", "flush"]
"""
What a disk is asked for: ``read`` brings pages in; ``store`` finds room for stores (``create()``,
``resize()``, ``view_mut()``, ``write_at()``); ``flush`` makes durable.
"""

_CALLS: dict[str, Operation] = {
    "read": "read",
    "populate_read": "read",
    "populate_write": "store",
    "reserve": "store",
    "sync_all": "flush",
    "sync_data": "flush",
    "sync_range": "flush",
    "write_back": "flush",
}
_PATIENCE = 60.0  # seconds until a held call goes on, so that a broken test ends


class Held:
    """Calls that wait for the test, see :meth:`FaultyDisk.hold`."""

    def __init__(self) -> None:
        self._arrived = threading.Event()
        self._released = threading.Event()

    async def reached(self) -> None:
        """
        Wait until a call is being held. A checkpoint.

        :raises TimeoutError: none has come within a minute
        """
        wait = partial(self._arrived.wait, _PATIENCE)
        if not await anyio.to_thread.run_sync(wait, abandon_on_cancel=True):
            raise TimeoutError("nothing has asked the disk")

    def release(self) -> None:
        """Let the held calls go on; later ones pass. The end of the ``with`` block does so too."""
        self._released.set()

    def _block(self) -> None:
        self._arrived.set()
        self._released.wait(_PATIENCE)


class FaultyDisk:
    """
    The disk below all maps that are opened while :func:`faulty_disk` is in effect.

    It is a good one at first. Methods may be called at any time and from any thread, and take
    effect for the calls that begin after them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors: dict[Operation, int] = {}
        self._delays: dict[Operation, float] = {}
        self._holds: dict[Operation, Held] = {}
        self._asked: Counter[Operation] = Counter()

    def fail(self, operation: Operation, error: int = _errno.EIO) -> None:
        """
        Refuse an operation with an errno until :meth:`heal`.

        While reads fail or are slowed down, nothing counts as being in memory.

        :param error: ``EIO`` for a bad sector, ``ENOSPC`` or ``EDQUOT`` for a full disk
        :raises ValueError: that is no errno
        """
        if not isinstance(error, int) or isinstance(error, bool) or error < 1:
            raise ValueError(f"errno must be a positive integer such as errno.EIO, not {error!r}")
        self._errors[_checked(operation)] = error

    def delay(self, operation: Operation, seconds: float) -> None:
        """Let each call of an operation take so much longer, in its worker thread."""
        self._delays[_checked(operation)] = seconds

    @contextmanager
    def hold(self, operation: Operation) -> Iterator[Held]:
        """
        Keep an operation from answering while the block runs: a disk as slow as the test wants.

        ::

            with disk.hold("flush") as held:
                tasks.start_soon(store.commit)
                await held.reached()
                ...  # what does the program do meanwhile?
        """
        held = self._holds[_checked(operation)] = Held()
        try:
            yield held
        finally:
            held.release()
            if self._holds.get(operation) is held:
                del self._holds[operation]

    def heal(self) -> None:
        """Make it a good and quick disk again. A failed flush stays failed, as ever."""
        self._errors.clear()
        self._delays.clear()

    def asked(self, operation: Operation) -> int:
        """
        How often the disk was asked for an operation.

        One call of a map may ask several times, and one request may serve many calls.
        """
        return self._asked[_checked(operation)]

    def _is_bad(self, operation: Operation) -> bool:
        return any(operation in each for each in (self._errors, self._delays, self._holds))

    def _ask(self, operation: Operation) -> None:
        with self._lock:
            self._asked[operation] += 1
        held = self._holds.get(operation)
        if held is not None:
            held._block()
        delay = self._delays.get(operation)
        if delay:
            time.sleep(delay)
        error = self._errors.get(operation)
        if error is not None:
            raise OSError(error, os.strerror(error))


class _Kernel:
    """The real kernel, but for the calls that meet the disk."""

    def __init__(self, disk: FaultyDisk, kernel: Kernel) -> None:
        self._disk = disk
        self._kernel = kernel

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._kernel, name)
        operation = _CALLS.get(name)
        return real if operation is None else partial(self._ask, operation, real)

    def _ask(
        self, operation: Operation, real: Callable[..., Any], *arguments: Any, **options: Any
    ) -> Any:
        self._disk._ask(operation)
        return real(*arguments, **options)

    # Asked on the loop, where nothing may wait: what is in memory

    def read_nowait(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        if self._disk._is_bad("read"):
            raise BlockingIOError(_errno.EAGAIN, os.strerror(_errno.EAGAIN))
        return self._kernel.read_nowait(fd, buffers, offset)

    def resident(self, address: int, length: int) -> bytes:
        state = self._kernel.resident(address, length)
        return bytes(len(state)) if self._disk._is_bad("read") else state

    # Of many at a time, with an answer of its own

    def populate_many(self, spans: Sequence[tuple[int, int]], *, write: bool) -> bool:
        operation: Operation = "store" if write else "read"
        if self._disk._is_bad(operation):
            return False  # one by one, then, and each asks
        self._disk._ask(operation)
        return self._kernel.populate_many(spans, write=write)


def _checked(operation: Operation) -> Operation:
    if operation not in _CALLS.values():
        raise ValueError(f"operation must be 'read', 'store' or 'flush', not {operation!r}")
    return operation


@contextmanager
def faulty_disk() -> Iterator[FaultyDisk]:
    """
    Let maps that are opened inside of the block have a disk that does as the test says.

    Maps that are open already keep the real one; those opened here keep this one, also after
    the block, when it is good again.
    """
    disk = FaultyDisk()
    before = AsyncMmap._kernel
    AsyncMmap._kernel = cast(Kernel, _Kernel(disk, native))
    try:
        yield disk
    finally:
        AsyncMmap._kernel = before
        disk.heal()
