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

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

from anyio import CapacityLimiter

from ._byte_search import search
from ._crew import Request
from ._errors import Range, TruncatedError
from ._event_loop import EventLoop, Parking
from ._kernel import new_bytes
from ._mapping import Mapping
from ._piece_size import PieceSize
from ._readahead import Readahead
from ._slow_log import log_if_slow
from ._stream_crew import StreamCrew
from ._workers import forgetful

T = TypeVar("T")

THREADS = 2
"""
Of one map, that wait for the disk: one page that does not come leaves the other one. A third
thread starts the reads of those who come meanwhile. More only take the GIL from each other.
"""

AT_ONCE = THREADS + 1
"""Pieces of one stream under way: two are being done, and one is next while a result is handed
back."""

BATCH = 64
"""Reads started ahead: above the depth that disks answer in parallel, 32 on common ones."""

SMALL = 64 << 10
"""Bytes of what needs no pieces, and may be done together with others."""

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


class Access(Request, Generic[T]):
    """
    One use of a range of a mapping, in a worker.

    :ivar ahead: ranges to start reading before
    :ivar seconds: how long it took, from the start of those reads on
    :ivar starting: how long the start of those reads took of it
    """

    __slots__ = (
        "_call",
        "ahead",
        "length",
        "mapping",
        "offset",
        "result",
        "seconds",
        "starting",
        "together",
    )

    result: T

    def __init__(
        self,
        mapping: Mapping,
        offset: int,
        length: int,
        call: Callable[[], T],
        ahead: Sequence[Range] = (),
    ) -> None:
        super().__init__()
        self.mapping: Mapping | None = mapping
        self.offset: int = offset
        self.length: int = length
        self.ahead: Sequence[Range] = ahead
        self.seconds: float = 0.0
        self.starting: float = 0.0
        self.together: bool = length <= SMALL
        self._call: Callable[[], T] | None = call

    def forget(self) -> None:
        self.mapping = self._call = None

    def start_ahead(self) -> None:
        """Start reading what is to be read ahead."""
        if self.ahead and self.mapping is not None:
            began = time.monotonic()
            self.mapping.will_load(self.ahead)
            self.starting = time.monotonic() - began

    def perform(self) -> None:
        call, self._call = self._call, None
        assert call is not None
        try:
            self.start_ahead()
            began = time.monotonic()
            self.result = call()
            self.seconds = self.starting + time.monotonic() - began
        finally:
            # Should this be the last reference, the unmapping belongs into this thread.
            del call
            self.mapping = None


class Load(Access[None]):
    """
    A load of a moderate range, which can be waited for later, or together with others.

    :ivar finished: when, by the monotonic clock
    :ivar write: whether its pages are to be ready for stores
    """

    __slots__ = ("finished", "write")

    def __init__(self, mapping: Mapping, offset: int, length: int, write: bool = False) -> None:
        # As the classes above do it, without their calls: it is on the path of every cold view.
        self.together: bool = length <= SMALL
        self.done: bool = False
        self.error: BaseException | None = None
        self.parking: Parking | None = None
        self._taken = False
        self._abandoned = False
        self.mapping = mapping
        self.offset = offset
        self.length = length
        self.ahead: Sequence[Range] = ((offset, length),)
        self.result: None = None  # also where it failed: it may be waited for again
        self.seconds = self.starting = 0.0
        self.finished: float = 0.0
        self.write: bool = write

    def perform(self) -> None:
        assert self.mapping is not None
        try:
            # A look of the loop at a few pages, where it is allowed, has started to read them;
            # where not, to touch them reads ahead of who reads one after another. And what many
            # pages do by themselves is quicker where it is enough.
            if self.write or not (self.together or self.mapping.reads_far):
                self.start_ahead()
            began = time.monotonic()
            self.mapping.load(self.offset, self.length, write=self.write)
            self.finished = time.monotonic()
            self.seconds = self.starting + self.finished - began
        finally:
            self.mapping = None

    def perform_not(self) -> None:
        """It was done together with others."""
        self.finished = time.monotonic()
        self.mapping = None


class Store(Access[None]):
    """Few bytes that are stored, together with others. The caller stays: they are its own."""

    __slots__ = ("data",)

    def __init__(self, mapping: Mapping, offset: int, data: memoryview) -> None:
        write = partial(mapping.write, offset, data)
        super().__init__(mapping, offset, len(data), write, ((offset, len(data)),))
        self.data: memoryview | None = data

    def forget(self) -> None:
        super().forget()
        self.data = None

    def perform(self) -> None:
        try:
            super().perform()
        finally:
            self.data = None

    def perform_not(self) -> None:
        """It was done together with others."""
        self.result = None
        self.forget()


class _PagingCrew(StreamCrew[Access[Any]]):
    """A crew that knows what page-ins have in common: one call for many of them."""

    def __init__(self, loop: EventLoop, limiter: CapacityLimiter) -> None:
        super().__init__(loop, limiter, threads=THREADS, batch=BATCH, announcer=True)
        self._readahead = Readahead()

    def announce(self, requests: Sequence[Access[Any]]) -> None:
        # Large ones last: they may wait for a place in the storage's queue. What they have read
        # farther ahead, and whether that waits, is for who does them.
        wanted = [each for each in requests if each.ahead]
        for mapping, group in _by_mapping([each for each in wanted if each.together]):
            looked = mapping.starts_reads  # then the kernel knows of those who read
            for each in group:
                if not (looked and isinstance(each, Load) and not each.write):
                    self._read_on(mapping, each)
            mapping.will_load([each.ahead[0] for each in group])
        for mapping, group in _by_mapping([each for each in wanted if not each.together]):
            if not mapping.reads_far:
                mapping.will_load([(each.offset, each.length) for each in group])

    def _read_on(self, mapping: Mapping, request: Access[Any]) -> None:
        """Have more read ahead where the request continues another one; again, as much as then."""
        offset, length = request.offset, request.length
        most = mapping.readahead
        if most and request.ahead == ((offset, length),):
            stop = self._readahead.stop(*mapping.page_numbers(offset, length), most)
            request.ahead = ((offset, mapping.up_to_page(stop) - offset),)

    def perform_some(self, requests: Sequence[Access[Any]]) -> None:
        began = time.monotonic()
        first = requests[0]
        filename = None if first.mapping is None else first.mapping.filename
        self._perform_some(requests)
        log_if_slow(
            began,
            "batch of %d loads or copies, the first of %d bytes at %d, in %r",
            len(requests),
            first.length,
            first.offset,
            filename,
        )

    def _perform_some(self, requests: Sequence[Access[Any]]) -> None:
        small = [each for each in requests if isinstance(each, Load) and each.together]
        for write in (False, True):
            some = [each for each in small if each.write is write]
            if len(some) < 2:
                continue
            for mapping, group in _by_mapping(some):
                if mapping.load_many([(each.offset, each.length) for each in group], write=write):
                    for each in group:
                        each.perform_not()
        stores = [each for each in requests if isinstance(each, Store)]
        if len(stores) > 1:
            for mapping, of_it in _by_mapping(stores):
                parts = [(each.offset, each.data) for each in of_it if each.data is not None]
                if mapping.write_many(parts):
                    for store in of_it:
                        store.perform_not()
                del parts  # the callers' buffers
        super().perform_some([each for each in requests if each.mapping is not None])


A = TypeVar("A", bound=Access[Any])


def _by_mapping(requests: Sequence[A]) -> Iterator[tuple[Mapping, list[A]]]:
    """The requests of each mapping: of one, unless the map was just resized."""
    groups: dict[int, tuple[Mapping, list[A]]] = {}
    for request in requests:
        mapping = request.mapping
        if mapping is not None:
            groups.setdefault(id(mapping), (mapping, []))[1].append(request)
    return iter(groups.values())


class Pager:
    """The page-ins and copies of one map. The mapping comes with every call: it may change."""

    def __init__(self, loop: EventLoop, limiter: CapacityLimiter, mapping: Mapping) -> None:
        first = FIRST_STREAMED_FAR if mapping.reads_far else FIRST_STREAMED
        self._crew = _PagingCrew(loop, limiter)
        self._piece = PieceSize(FIRST_PIECE, SMALLEST_PIECE, LARGEST_PIECE)
        self._streamed = PieceSize(first, SMALLEST_PIECE, LARGEST_PIECE)
        self._searched = PieceSize(first, SMALLEST_PIECE, MOST_SEARCHED)
        self.loads: int = 0
        self.bytes_loaded: int = 0

    def close(self) -> None:
        """The map is gone: no thread waits for more to do. What is under way goes on."""
        self._crew.close()

    async def _do(
        self,
        mapping: Mapping,
        offset: int,
        length: int,
        call: Callable[[], T],
        ahead: Sequence[Range] = (),
        *,
        stay: bool = False,
    ) -> T:
        request = Access(mapping, offset, length, call, ahead)
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
                await self._do(mapping, piece.start, len(piece), call, (ahead,))

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
            if mapping.pages_are_files:
                # Loaded together with others, and copied here: fewer calls than to copy in the
                # worker.
                await self._crew.do(Load(mapping, offset, length))
                data = mapping.read_nowait(offset, length)
                if data is not None:
                    return data
            return await self._do(mapping, offset, length, partial(mapping.read, offset, length))
        data, memory = new_bytes(length)
        with _asked_for(offset, length):
            for piece, ahead in self._piece.pieces(offset, length):
                part = memory[piece.start - offset : piece.stop - offset]
                call = partial(mapping.read_into, piece.start, part)
                await self._do(mapping, piece.start, len(piece), call, (ahead,))
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
                await self._do(mapping, piece.start, len(piece), call, (ahead,), stay=True)

    @forgetful
    async def write(self, mapping: Mapping, offset: int, data: memoryview) -> None:
        """Store the caller's bytes. :raises OSError: see :meth:`Mapping.write`"""
        self._count(len(data))
        if len(data) <= SMALL:
            await self._crew.do(Store(mapping, offset, data), stay=True)
            return
        # The first piece must not change anything if the last one cannot be written for a
        # reason that is known now.
        if len(data) > self._piece.bytes:
            call = partial(_prepare_stores, mapping, offset, len(data))
            await self._do(mapping, offset, 0, call)
        with _asked_for(offset, len(data)):
            # The end that the copy runs into goes first, where the bytes are the map's own.
            backwards = mapping.distance(offset, data) < 0
            for piece, ahead in self._piece.pieces(offset, len(data), backwards=backwards):
                part = data[piece.start - offset : piece.stop - offset]
                call = partial(mapping.write, piece.start, part)
                await self._do(mapping, piece.start, len(piece), call, (ahead,), stay=True)

    @forgetful
    async def move(self, mapping: Mapping, target: int, source: int, length: int) -> None:
        """Copy inside the map, as ``memmove``. :raises OSError: as :meth:`read`, :meth:`write`"""
        self._count(length)
        prepare = partial(_prepare_stores, mapping, target, length)
        await self._do(mapping, source, 0, prepare)
        # The end that the copy runs into goes first, so that no byte is overwritten unread.
        away = target - source
        for piece, (start, count) in self._piece.pieces(source, length, backwards=away > 0):
            call = partial(_move, mapping, piece.start + away, piece.start, len(piece))
            ahead = (start, count), (start + away, count)
            await self._do(mapping, piece.start, len(piece), call, ahead, stay=True)


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


def _prepare_stores(mapping: Mapping, offset: int, length: int) -> None:
    mapping.check_reach(offset, length)
    mapping.reserve(offset, length)


def _move(mapping: Mapping, target: int, source: int, length: int) -> None:
    mapping.write(target, memoryview(mapping.read(source, length)))
