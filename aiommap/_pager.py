"""Pages come in, and bytes are copied, off the loop: requests of many tasks in batches.

Rules
-----
* The loop only touches pages after a probe that cannot wait has shown them in memory
  (:meth:`Mapping.is_loaded_nowait`, :meth:`Mapping.read_nowait`). Everything else comes here.
* Requests that arrive together are taken together: the reads of all are started before the
  first is waited for, so the disk sees a queue and not one request after another. Small
  page-ins are waited for a few at a time, in one call of the kernel, as long as that is quick.
* Nothing large is asked for at once. A range is cut into pieces, one after another, so that a
  cancelled task leaves between two of them, a disk that does not answer holds up one piece,
  and other tasks get their turn. The piece grows while the disk is quick and shrinks when it
  is slow; the reads of the next few pieces are started ahead.
* What a request touches belongs to it: the mapping, its own result. A cancelled task leaves it
  behind. Only where the task's own buffer is read or written does the task stay.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from anyio import CapacityLimiter

from ._byte_search import search
from ._errors import Range, TruncatedError
from ._event_loop import EventLoop
from ._kernel import new_bytes
from ._mapping import Mapping
from ._paging_crew import SMALL, THREADS, Access, Load, PagingCrew, Store
from ._piece_size import PieceSize
from ._workers import forgetful

T = TypeVar("T")

AT_ONCE = THREADS + 1
"""Pieces of one stream under way: two are being done, and one is next while a result is handed
back."""

SMALLEST_PIECE = 128 << 10
"""Bytes: one request, of storage that has its own idea of one (network, FUSE)."""

FIRST_PIECE = 256 << 10
LARGEST_PIECE = 16 << 20

FIRST_STREAMED = 1 << 20
FIRST_STREAMED_FAR = 4 << 20
"""
Bytes at first of who goes through a range for long, a few pieces at a time; and where the disk
reads far ahead by itself, so that nobody has waited for it long: 1 MiB would take a tenth more
for the first 100 MiB.
"""

MOST_SEARCHED = 32 << 20
"""
Bytes that are searched at once: in memory up to 10 ms, and then others get their turn. Pieces of
16 MiB take a twelfth more in all.
"""


class Pager:
    """The page-ins and copies of one map. The mapping comes with every call: it may change."""

    def __init__(self, loop: EventLoop, limiter: CapacityLimiter, mapping: Mapping) -> None:
        first = FIRST_STREAMED_FAR if mapping.reads_far else FIRST_STREAMED
        self._crew = PagingCrew(loop, limiter)
        self._piece = PieceSize(FIRST_PIECE, SMALLEST_PIECE, LARGEST_PIECE)
        self._streamed = PieceSize(first, SMALLEST_PIECE, LARGEST_PIECE)
        self._searched = PieceSize(first, SMALLEST_PIECE, MOST_SEARCHED)
        self.loads: int = 0
        self.bytes_loaded: int = 0

    def close(self) -> None:
        """The map is gone: no thread waits for more to do. What is under way goes on."""
        self._crew.close()

    async def _do(self, request: Access[T], *, stay: bool = False) -> T:
        await self._crew.do(request, stay=stay)
        self._piece.took(request.length, request.seconds, request.starting)
        return request.result

    def _count(self, length: int) -> None:
        self.loads += 1
        self.bytes_loaded += length

    @forgetful
    async def load(
        self, mapping: Mapping, offset: int, length: int, *, write: bool = False
    ) -> None:
        """
        Bring the range in, ready for stores if ``write``. A checkpoint unless it is empty.

        :raises OSError: see :meth:`Mapping.load`
        """
        self._count(length)
        if length <= SMALL:
            await self._crew.do(Load(mapping, offset, length, write))
            return
        with _asked_for(offset, length):
            for piece, ahead in self._piece.pieces(offset, length):
                call = partial(mapping.load, piece.start, len(piece), write=write)
                await self._do(Access(mapping, piece.start, len(piece), call, (ahead,)))

    def pieces_to_stream(
        self, offset: int, length: int
    ) -> Generator[tuple[range, Range], None, None]:
        """The pieces for :meth:`load_soon`, see :meth:`PieceSize.pieces`."""
        return self._streamed.pieces(offset, length)

    def load_soon(self, mapping: Mapping, offset: int, length: int, ahead: Range) -> Load:
        """Begin to load a piece; :meth:`loaded` waits for it, or :meth:`abandon` it."""
        self._count(length)
        request = Load(mapping, offset, length)
        request.ahead = (_inside(mapping, ahead),)
        request.together = False  # it is to be known how long it took
        self._crew.submit(request)
        return request

    @forgetful
    async def loaded(self, load: Load) -> None:
        """Wait for a load. :raises OSError: see :meth:`Mapping.load`"""
        await self._crew.wait(load)
        self._streamed.took(load.length, load.seconds, load.starting)

    def pieces_to_search(
        self, offset: int, length: int, *, least: int, last: bool
    ) -> Generator[tuple[range, Range], None, None]:
        """The pieces of a search, see :meth:`PieceSize.pieces`; from the end on for the last."""
        return self._searched.pieces(offset, length, backwards=last, least=least)

    def search_soon(
        self,
        mapping: Mapping,
        offset: int,
        length: int,
        needle: bytes,
        ahead: Range,
        *,
        last: bool,
    ) -> Access[int]:
        """Begin a search: where the needle first, or last, is in the range, from it; or -1."""
        call = partial(search, mapping, offset, length, needle, last=last)
        request = Access(mapping, offset, length, call, (_inside(mapping, ahead),))
        self._crew.submit(request)
        return request

    @forgetful
    async def found(self, request: Access[int]) -> int:
        """Wait for a search. :raises OSError: see :meth:`Mapping.read_into`"""
        await self._crew.wait(request)
        self._searched.took(request.length, request.seconds, request.starting)
        return request.result

    def abandon(self, request: Access[Any]) -> None:
        """Nobody will wait for it."""
        self._crew.abandon(request)

    @forgetful
    async def read(self, mapping: Mapping, offset: int, length: int) -> bytes:
        """The range as bytes, all of it. :raises OSError: see :meth:`Mapping.read_into`"""
        self._count(length)
        if length <= SMALL:
            if mapping.shares_disk:
                # Loaded together with others, and copied here: fewer calls than to copy in the
                # worker.
                await self._crew.do(Load(mapping, offset, length))
                data = mapping.read_nowait(offset, length)
                if data is not None:
                    return data
            request = Access(mapping, offset, length, partial(mapping.read, offset, length))
            await self._crew.do(request)
            return request.result
        data, memory = new_bytes(length)
        with _asked_for(offset, length):
            for piece, ahead in self._piece.pieces(offset, length):
                part = memory[piece.start - offset : piece.stop - offset]
                call = partial(mapping.read_into, piece.start, part)
                await self._do(Access(mapping, piece.start, len(piece), call, (ahead,)))
        return data

    @forgetful
    async def read_into(self, mapping: Mapping, offset: int, buffer: memoryview) -> None:
        """Copy the range into the caller's buffer. :raises OSError: as :meth:`read`"""
        length = len(buffer)
        self._count(length)
        with _asked_for(offset, length):
            backwards = mapping.distance(offset, buffer) > 0  # as in write()
            for piece, ahead in self._piece.pieces(offset, length, backwards=backwards):
                part = buffer[piece.start - offset : piece.stop - offset]
                call = partial(mapping.read_into, piece.start, part)
                await self._do(Access(mapping, piece.start, len(piece), call, (ahead,)), stay=True)

    @forgetful
    async def write(self, mapping: Mapping, offset: int, data: memoryview) -> None:
        """Store the caller's bytes. :raises OSError: see :meth:`Mapping.write`"""
        self._count(len(data))
        if len(data) <= SMALL:
            await self._crew.do(Store(mapping, offset, data), stay=True)
            return
        with _asked_for(offset, len(data)):
            # The end that the copy runs into goes first, where the bytes are the map's own.
            backwards = mapping.distance(offset, data) < 0
            prepared = False
            for piece, ahead in self._piece.pieces(offset, len(data), backwards=backwards):
                if not prepared and len(piece) < len(data):
                    # It must not change anything if another one cannot be written for a reason
                    # that is known now; one alone finds out by itself.
                    prepare = partial(mapping.prepare_stores, offset, len(data))
                    await self._crew.do(Access(mapping, offset, len(data), prepare))
                    prepared = True
                part = data[piece.start - offset : piece.stop - offset]
                call = partial(mapping.write, piece.start, part)
                await self._do(Access(mapping, piece.start, len(piece), call, (ahead,)), stay=True)

    @forgetful
    async def move(self, mapping: Mapping, target: int, source: int, length: int) -> None:
        """Copy inside the map, as ``memmove``. :raises OSError: as :meth:`read`, :meth:`write`"""
        self._count(length)
        # As in write(): nothing is changed that could be known to fail.
        await self._crew.do(
            Access(mapping, source, length, partial(_prepare_move, mapping, target, source, length))
        )
        # The end that the copy runs into goes first, so that no byte is overwritten unread.
        away = target - source
        for piece, (start, count) in self._piece.pieces(source, length, backwards=away > 0):
            call = partial(_move, mapping, piece.start + away, piece.start, len(piece))
            ahead = (start, count), (start + away, count)
            await self._do(Access(mapping, piece.start, len(piece), call, ahead), stay=True)


def _inside(mapping: Mapping, ahead: Range) -> Range:
    """What of a range is not behind the end of a map that was made smaller meanwhile."""
    offset, length = ahead
    return offset, max(min(length, mapping.length - offset), 0)


@contextmanager
def _asked_for(offset: int, length: int) -> Iterator[None]:
    """Errors name the range that the user asked for, not the piece of it that was under way."""
    try:
        yield
    except TruncatedError as exc:
        raise TruncatedError(offset, length, exc.size, exc.filename) from None


def _prepare_move(mapping: Mapping, target: int, source: int, length: int) -> None:
    mapping.check_reach(source, length)
    mapping.prepare_stores(target, length)


def _move(mapping: Mapping, target: int, source: int, length: int) -> None:
    mapping.write(target, memoryview(mapping.read(source, length)))
