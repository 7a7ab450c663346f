"""Pages come in, and bytes are copied, off the loop: requests of many tasks in batches.

Rules
-----
* The loop only touches pages after a probe that cannot wait has shown them in memory
  (:meth:`Mapping.is_loaded_nowait`, :meth:`Mapping.read_nowait`). Everything else comes here.
* Requests that arrive together are taken together: the reads of all are started before the
  first is waited for, so the disk sees a queue and not one request after another.
* Nothing large is asked for at once. A range is cut into pieces, one after another, so that a
  cancelled task leaves between two of them, a disk that does not answer holds up one piece,
  and other tasks get their turn. The piece grows while the disk is quick and shrinks when it
  is slow.
* What a request touches belongs to it: the mapping, its own result. A cancelled task leaves it
  behind. Only where the task's own buffer is read or written does the task stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Generic, TypeVar

from anyio import CapacityLimiter

from ._event_loop import EventLoop
from ._kernel import new_bytes
from ._mapping import Mapping
from ._workers import Crew, Request

T = TypeVar("T")

THREADS = 2
"""
Of one map. Two keep the disk's queue full while one of them hands its batch back; more only
take the GIL from each other (docs/design.md has the figures).
"""

BATCH = 64
"""Requests taken at once: above the depth that disks answer in parallel, 32 on common ones."""

SMALLEST_PIECE = 64 << 10
FIRST_PIECE = 256 << 10
LARGEST_PIECE = 16 << 20
_QUICK = 0.005  # seconds for a piece: below it the next one may be larger,
_SLOW = 0.05  # above it the next one is smaller. Both out of the air, a decade apart.


class _Access(Request, Generic[T]):
    """One use of a range of a mapping, in a worker."""

    __slots__ = ("_call", "_length", "_mapping", "_offset", "result")

    result: T

    def __init__(self, mapping: Mapping, offset: int, length: int, call: Callable[[], T]) -> None:
        super().__init__()
        self._mapping: Mapping | None = mapping
        self._offset = offset
        self._length = length
        self._call: Callable[[], T] | None = call

    def announce(self) -> None:
        if self._mapping is not None:
            self._mapping.will_load(self._offset, self._length)

    def perform(self) -> None:
        call, self._call = self._call, None
        assert call is not None
        try:
            self.result = call()
        finally:
            # Should this be the last reference, the unmapping belongs into this thread.
            del call
            self._mapping = None


Load = _Access[None]
"""A load that was begun and can be waited for."""


class Pager:
    """The page-ins and copies of one map. The mapping comes with every call: it may change."""

    def __init__(self, loop: EventLoop, limiter: CapacityLimiter) -> None:
        self._crew: Crew[_Access[object]] = Crew(loop, limiter, threads=THREADS, batch=BATCH)
        self._piece = FIRST_PIECE
        self.loads = 0
        self.bytes_loaded = 0

    def _pieces(self, offset: int, length: int, *, backwards: bool = False) -> Iterator[range]:
        """A range in consecutive pieces, each as large as the time of the last one allows."""
        end = offset + length
        while offset < end:
            count = min(self._piece, end - offset)
            start = end - count if backwards else offset
            began = time.monotonic()
            yield range(start, start + count)
            took = time.monotonic() - began
            if took < _QUICK and count == self._piece:
                self._piece = min(self._piece * 2, LARGEST_PIECE)
            elif took > _SLOW:
                self._piece = max(self._piece // 2, SMALLEST_PIECE)
            if backwards:
                end = start
            else:
                offset += count

    async def _do(
        self, mapping: Mapping, offset: int, length: int, call: Callable[[], T], stay: bool = False
    ) -> T:
        request = _Access(mapping, offset, length, call)
        await self._crew.do(request, stay=stay)  # type: ignore[arg-type]
        return request.result

    def _count(self, length: int) -> None:
        self.loads += 1
        self.bytes_loaded += length

    async def load(
        self, mapping: Mapping, offset: int, length: int, *, write: bool = False
    ) -> None:
        """
        Bring the range in, ready for stores if ``write``. A checkpoint unless it is empty.

        :raises OSError: see :meth:`Mapping.load`
        """
        self._count(length)
        end = offset + length
        for piece in self._pieces(offset, length):
            ahead = min(end - piece.start, 2 * len(piece))
            call = partial(_load, mapping, piece.start, len(piece), ahead, write)
            await self._do(mapping, piece.start, len(piece), call)

    def load_soon(self, mapping: Mapping, offset: int, length: int) -> Load:
        """Begin to load a range of moderate size; :meth:`wait` for it, or :meth:`abandon` it."""
        self._count(length)
        call = partial(_load, mapping, offset, length, length, False)
        request = _Access(mapping, offset, length, call)
        self._crew.submit(request)  # type: ignore[arg-type]
        return request

    async def wait(self, request: Load) -> None:
        """Wait for :meth:`load_soon`. :raises OSError: see :meth:`Mapping.load`"""
        await self._crew.wait(request)  # type: ignore[arg-type]

    def abandon(self, request: Load) -> None:
        """Nobody will wait for it."""
        self._crew.abandon(request)  # type: ignore[arg-type]

    async def read(self, mapping: Mapping, offset: int, length: int) -> bytes:
        """The range as bytes, all of it. :raises OSError: see :meth:`Mapping.read_into`"""
        self._count(length)
        if length <= SMALLEST_PIECE:
            return await self._do(mapping, offset, length, partial(mapping.read, offset, length))
        data, memory = new_bytes(length)
        for piece in self._pieces(offset, length):
            part = memory[piece.start - offset : piece.stop - offset]
            call = partial(mapping.read_into, piece.start, part)
            await self._do(mapping, piece.start, len(piece), call)
        return data

    async def read_into(self, mapping: Mapping, offset: int, buffer: memoryview) -> None:
        """Copy the range into the caller's buffer. :raises OSError: as :meth:`read`"""
        self._count(len(buffer))
        for piece in self._pieces(offset, len(buffer)):
            part = buffer[piece.start - offset : piece.stop - offset]
            call = partial(mapping.read_into, piece.start, part)
            await self._do(mapping, piece.start, len(piece), call, stay=True)

    async def write(self, mapping: Mapping, offset: int, data: memoryview) -> None:
        """Store the caller's bytes. :raises OSError: see :meth:`Mapping.write`"""
        self._count(len(data))
        # The first piece must not change anything if the last one cannot be written for a
        # reason that is known now.
        if len(data) > self._piece:
            call = partial(_prepare_stores, mapping, offset, len(data))
            await self._do(mapping, offset, 0, call)
        for piece in self._pieces(offset, len(data)):
            part = data[piece.start - offset : piece.stop - offset]
            await self._do(
                mapping, piece.start, len(piece), partial(mapping.write, piece.start, part), True
            )

    async def search(
        self, mapping: Mapping, offset: int, length: int, needle: bytes, *, last: bool
    ) -> int:
        """Where the needle first, or last, occurs inside the range, from the range; or -1."""
        call = partial(mapping.search, offset, length, needle, last=last)
        return await self._do(mapping, offset, length, call)

    async def move(self, mapping: Mapping, target: int, source: int, length: int) -> None:
        """Copy inside the map, as ``memmove``. :raises OSError: as :meth:`read`, :meth:`write`"""
        self._count(length)
        prepare = partial(_prepare_stores, mapping, target, length)
        await self._do(mapping, source, 0, prepare)
        # The end that the copy runs into goes first, so that no byte is overwritten unread.
        for piece in self._pieces(source, length, backwards=target > source):
            call = partial(_move, mapping, piece.start + target - source, piece.start, len(piece))
            await self._do(mapping, piece.start, len(piece), call, stay=True)

    @property
    def piece(self) -> int:
        """Bytes that a search takes at once, see the theory above."""
        return max(self._piece, FIRST_PIECE)


def _load(mapping: Mapping, offset: int, length: int, ahead: int, write: bool) -> None:
    if ahead > SMALLEST_PIECE:
        # Faults read one window of the file system's read-ahead at a time; this asks for all.
        mapping.will_load(offset, ahead)
    mapping.load(offset, length, write=write)


def _prepare_stores(mapping: Mapping, offset: int, length: int) -> None:
    mapping.check_reach(offset, length)
    mapping.reserve(offset, length)


def _move(mapping: Mapping, target: int, source: int, length: int) -> None:
    mapping.write(target, memoryview(mapping.read(source, length)))
