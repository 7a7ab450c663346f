"""Requests of pages, and the threads that do many of them together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from anyio import CapacityLimiter

from ._crew import Request
from ._errors import Range
from ._event_loop import EventLoop, Parking
from ._mapping import Mapping
from ._readahead import Readahead
from ._slow_log import log_if_slow
from ._stream_crew import StreamCrew

T = TypeVar("T")

THREADS = 2
"""
Of one map, that wait for the disk: one page that does not come leaves the other one. A third
thread starts the reads of those who come meanwhile. More only take the GIL from each other.
"""

BATCH = 64
"""Reads started ahead: above the depth that disks answer in parallel, 32 on common ones."""

SMALL = 64 << 10
"""Bytes of what needs no pieces, and may be done together with others."""


class Access(Request, Generic[T]):
    """
    One use of a range of a mapping, in a worker.

    :ivar ahead: ranges to start reading before; of a large one, by who does it
    :ivar announced: whether its pages, and if it is small all of those, have been started
    :ivar seconds: how long it took, from the start of those reads on
    :ivar starting: how long the start of those reads took of it
    """

    __slots__ = (
        "_call",
        "ahead",
        "announced",
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
        self.announced: bool = False
        self.seconds: float = 0.0
        self.starting: float = 0.0
        self.together: bool = length <= SMALL
        self._call: Callable[[], T] | None = call

    def forget(self) -> None:
        self.mapping = self._call = None

    def start_ahead(self) -> None:
        """Start reading what is to be read ahead, unless that was done with others'."""
        if self.ahead and self.mapping is not None and not (self.together and self.announced):
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
    A load of a page or a piece, which can be waited for later, or together with others.

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
        self.announced: bool = False
        self.result: None = None  # also where it failed: it may be waited for again
        self.seconds: float = 0.0
        self.starting: float = 0.0
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


class PagingCrew(StreamCrew[Access[Any]]):
    """A crew that knows what page-ins have in common: one call for many of them."""

    def __init__(self, loop: EventLoop, limiter: CapacityLimiter) -> None:
        super().__init__(loop, limiter, threads=THREADS, batch=BATCH, announcer=True)
        self._readahead = Readahead()

    def announce(self, requests: Sequence[Access[Any]]) -> None:
        # Small ones again and again, while they wait; and large ones last, once: they may wait for
        # a place in the storage's queue. What those have read farther ahead, and whether that
        # waits, is for who does them.
        wanted = [each for each in requests if each.ahead]
        for mapping, group in _by_mapping([each for each in wanted if each.together]):
            looked = mapping.starts_reads  # then the kernel knows of those who read
            for each in group:
                if not (looked and isinstance(each, Load) and not each.write):
                    self._read_on(mapping, each)
                each.announced = True
            mapping.will_load([ahead for each in group for ahead in each.ahead])
        large = [each for each in wanted if not (each.together or each.announced)]
        for mapping, group in _by_mapping(large):
            for each in group:
                each.announced = True
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
