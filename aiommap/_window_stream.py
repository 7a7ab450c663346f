"""Windows: a large range in consecutive pieces of memory, read ahead of the consumer.

A class and not an async generator: a generator left by ``break`` is finished by another task
on asyncio, and its region would stay locked until then.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import suppress
from math import inf
from time import monotonic
from types import TracebackType
from typing import Self

from anyio import BusyResourceError

from ._errors import Range
from ._open_map import OpenMap
from ._pager import AT_ONCE
from ._paging_crew import Load
from ._piece_size import AHEAD
from ._uncopyable import Uncopyable
from ._wait_graph import Claim
from ._workers import forgetful

READ_AHEAD = 16 << 20
"""
As long as fewer bytes than this are being read ahead of the window in hand, another piece is
begun: with the largest pieces this kept the disk busy at every size of window that was measured.
"""

_LOOKED_UP = 4 << 20
"""Bytes at the beginning that are looked up as they come, where they are in memory: no worker for
a short range, and for a long one a head start."""

_FRESH = 0.05
"""
Seconds after the end of a load for which its windows count as loaded, if the file still reaches
them; later ones are looked up again. Several times what the windows read ahead take where nothing
has to be read, 10 ms; and short for the kernel, which lets pages go that were not used for long.
"""


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
        "_doubtful_until",
        "_end",
        "_fresh_until",
        "_loaded_until",
        "_loads",
        "_loads_end",
        "_mapping",
        "_piece",
        "_pieces",
        "_position",
        "_size",
        "_stepping",
        "_window",
    )

    def __init__(self, core: OpenMap, size: int, offset: int, length: int) -> None:
        self._core = core
        self._mapping = weakref.ref(core.mapping)  # through which pieces were loaded
        self._size = size
        self._position = offset
        self._end = offset + length
        self._claim: Claim | None = None
        self._window: memoryview | None = None
        self._stepping = False
        # Pieces that are being loaded, in order; where the last one ends, and how large it is.
        self._loads: deque[Load] = deque()
        self._loads_end = offset
        self._piece = _LOOKED_UP // AHEAD
        self._pieces = core.pager.pieces_to_stream(offset, length)
        # Up to here they were waited for, until when that counts, and up to here windows are to be
        # looked up all the same.
        self._loaded_until = offset
        self._fresh_until = 0.0
        self._doubtful_until = offset

    def __aiter__(self) -> Self:
        return self

    @forgetful
    async def __anext__(self) -> memoryview:
        """
        The next window. A checkpoint.

        :raises BusyResourceError: another task waits for it
        :raises BufferError: the last window is exported, as far as it can tell: slices of it,
            and arrays of numpy's, are not seen, and stay valid memory without a lock
        :raises TruncatedError: the file does not reach it any more
        :raises OSError: what the disk says
        """
        if self._stepping:
            raise BusyResourceError("waiting for the next window of")
        self._stepping = True
        try:
            return await self._step()
        finally:
            self._stepping = False

    async def _step(self) -> memoryview:
        self._release()
        start = self._position
        stop = min(start + self._size, self._end)
        if start >= stop:
            self._read_no_more()
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
            if core.still_inside(start, stop - start) is not self._mapping():
                # Mapped anew, and what was loaded is not: it has to be looked up.
                self._mapping = weakref.ref(core.mapping)
                self._doubtful_until = max(self._doubtful_until, self._loads_end)
            if stop > self._loaded_until:
                await self._load(start, stop)
            if (
                start < self._doubtful_until
                or monotonic() > self._fresh_until
                or not core.mapping.reaches_nowait(start, stop - start)
            ):
                await self._look_up(start, stop)
            if self._loads_end < min(stop + self._ahead(), self._end):
                with suppress(RuntimeError):  # no threads: not the trouble of this window
                    self._read_ahead(stop)
            window = self._window = core.mapping.buffer(start, stop - start, False)
        except BaseException as error:
            self._claim = None
            lock.leave(claim, type(error))
            raise
        self._position = stop
        return window

    async def _load(self, start: int, stop: int) -> None:
        """Have the window's pages loaded ahead, or find them in memory where it all begins."""
        core = self._core
        if self._loads_end == start == self._doubtful_until and core.is_ready_nowait(
            start, stop - start
        ):
            # Not pieces of the stream: those begin behind, and what they read ahead with them.
            end = self._loads_end = max(stop, min(start + _LOOKED_UP, self._end))
            self._loaded_until = self._doubtful_until = end
            self._pieces.close()
            self._pieces = core.pager.pieces_to_stream(end, self._end - end)
            return
        fresh_until = self._fresh_until if start < self._loaded_until else inf
        while self._loaded_until < stop:
            self._read_ahead(stop)
            if not self._loads:
                break
            load = self._loads.popleft()
            end = load.offset + load.length
            try:
                await core.pager.loaded(load)
                fresh_until = min(fresh_until, load.finished + _FRESH)
            except BaseException as error:
                # What is wrong may be in another window of the piece; and if this is cancelled,
                # nobody can wait for it again.
                self._doubtful_until = max(self._doubtful_until, end)
                if not isinstance(error, OSError):
                    raise
            finally:
                self._loaded_until = end
        self._fresh_until = fresh_until

    async def _look_up(self, start: int, stop: int) -> None:
        core = self._core
        if not core.mapping.is_loaded_nowait(start, stop - start):
            # Gone again, or there is a reason, and it comes from here.
            await core.pager.load(core.mapping, start, stop - start)

    def _ahead(self) -> int:
        """How many bytes behind the window are to be on their way."""
        return min(AHEAD * self._piece, READ_AHEAD)

    def _read_ahead(self, stop: int) -> None:
        """Begin to load up to ``stop``, and what is to be on its way behind it."""
        mapping = self._core.mapping
        while self._loads_end < min(stop + self._ahead(), self._end):
            if len(self._loads) >= AT_ONCE and not self._loads[-AT_ONCE].done:
                break
            piece, ahead = self._next_piece()
            # The map may have been made smaller, and may grow again.
            count = min(len(piece), mapping.length - piece.start)
            try:
                if count > 0:
                    self._loads.append(
                        self._core.pager.load_soon(mapping, piece.start, count, ahead)
                    )
            except RuntimeError:  # no threads
                count = 0
                raise
            finally:
                if count < len(piece):
                    self._doubtful_until = max(self._doubtful_until, piece.stop)

    def _next_piece(self) -> tuple[range, Range]:
        piece, ahead = next(self._pieces)
        self._piece = len(piece)
        self._loads_end = piece.stop
        return piece, ahead

    def _read_no_more(self) -> None:
        self._pieces.close()
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

        :raises BusyResourceError: another task waits for the next window
        :raises BufferError: arrays over the last window are alive; its region is free
        """
        if self._stepping:
            raise BusyResourceError("waiting for the next window of")
        self._position = self._end
        self._read_no_more()
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
