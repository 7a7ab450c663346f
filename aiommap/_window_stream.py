"""Windows: a large range in consecutive pieces of memory, read ahead of the consumer.

A class and not an async generator: a generator left by ``break`` is finished by another task
on asyncio, and its region would stay locked until then.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import Self

from ._open_map import OpenMap
from ._pager import Load
from ._uncopyable import Uncopyable
from ._wait_graph import Claim

READ_AHEAD = 32 << 20
"""
Bytes that are being read ahead of the window in hand: 8 pieces of 4 MiB kept the disk busy at
every size of window that was measured.
"""

_PIECE = 4 << 20


class Windows(Uncopyable):
    """
    The windows of a range, in order: ``async for window in m.windows():``.

    Each is a read-only :class:`memoryview` whose region is held shared and whose pages are in
    memory when it is handed out. The next step, and leaving in whatever way, releases the
    window and its region. Can also be entered with ``async with`` or closed with
    :meth:`aclose`. It belongs to one task; memory in hand is plain memory.
    """

    __slots__ = (
        "__weakref__",
        "_claim",
        "_core",
        "_end",
        "_loads",
        "_loads_end",
        "_position",
        "_size",
        "_window",
    )

    def __init__(self, core: OpenMap, size: int, offset: int, length: int) -> None:
        self._core = core
        self._size = size
        self._position = offset
        self._end = offset + length
        self._claim: Claim | None = None
        self._window: memoryview | None = None
        # Pieces that are loaded, in order, and where the last of them ends. None until a window is
        # found that is not in memory: what is there already needs no read-ahead.
        self._loads: deque[Load] = deque()
        self._loads_end: int | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> memoryview:
        """
        The next window. A checkpoint.

        :raises BufferError: the last window is exported, as far as it can tell: slices of it,
            and arrays of numpy's, are not seen, and stay valid memory without a lock
        :raises TruncatedError: the file does not reach it any more
        :raises OSError: what the disk says
        """
        self._release()
        start = self._position
        stop = min(start + self._size, self._end)
        if start >= stop:
            self._drop_loads()
            await self._core.loop.checkpoint()
            raise StopAsyncIteration
        core = self._core
        core.check()
        # As lock.acquire(), without its coroutines.
        lock = core.lock
        claim = Claim(start, stop, False, lock.check_entry())
        if not lock.queue.add_if_free(claim):
            await lock.wait_for((claim,))
            self._claim = claim
        else:
            self._claim = claim
            try:
                await core.loop.checkpoint()
            except BaseException as error:
                self._claim = None
                lock.leave(claim, type(error))
                raise
        try:
            if self._loads_end is None and not core.is_ready_nowait(start, stop - start):
                self._loads_end = start
            if self._loads_end is not None:
                await self._load(start, stop)
            window = self._window = core.still_inside(start, stop - start).buffer(
                start, stop - start, False
            )
        except BaseException as error:
            self._claim = None
            lock.leave(claim, type(error))
            raise
        self._position = stop
        return window

    async def _load(self, start: int, stop: int) -> None:
        core = self._core
        self._read_ahead(max(stop, min(start + READ_AHEAD, self._end)))
        while self._loads and self._loads[0].offset < stop:
            load = self._loads.popleft()  # cancelled, nobody can wait for it again
            with suppress(OSError):  # what is wrong may be in another window of the piece
                await core.pager.wait(load)
            if load.offset + load.length > stop:
                self._loads.appendleft(load)  # the next window is in it, too
                break
        if not core.mapping.is_loaded_nowait(start, stop - start):
            # Read ahead and gone again, or there is a reason, and it comes from here.
            await core.pager.load(core.mapping, start, stop - start)

    def _read_ahead(self, until: int) -> None:
        assert self._loads_end is not None
        mapping = self._core.mapping
        end = min(self._end, mapping.length)
        while self._loads_end < until and self._loads_end < end:
            count = min(_PIECE, end - self._loads_end)
            self._loads.append(self._core.pager.load_soon(mapping, self._loads_end, count))
            self._loads_end += count

    def _drop_loads(self) -> None:
        while self._loads:
            self._core.pager.abandon(self._loads.pop())

    def _release(self) -> None:
        claim, self._claim = self._claim, None
        window, self._window = self._window, None
        if claim is not None:
            self._core.lock.release(claim)
        if window is not None:
            window.release()

    async def aclose(self) -> None:
        """
        Release the window in hand and stop reading ahead. Safe to call again; no checkpoint.

        :raises BufferError: arrays over the last window are alive; its region is free
        """
        self._position = self._end
        self._drop_loads()
        self._release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # The usual end: `break` drops the iterator. Its task's region is free at once.
        claim = getattr(self, "_claim", None)
        if claim is not None:
            self._claim = None
            self._core.lock.drop(claim)
        window = getattr(self, "_window", None)
        if window is not None:
            with suppress(BufferError):  # nobody could handle it here
                window.release()
        for load in getattr(self, "_loads", ()):
            self._core.pager.abandon(load)
