"""When a request of the served file is answered, and whether with an error: no clock, no I/O here.

A request arrives, waits until it is due, and is then done or refused. Three things delay it:

- *latency*: each request of a kind takes so long. Requests overlap as on a disk with a deep queue;
  with ``depth`` lanes, only so many are under way at a time and the others wait their turn.
- *hold*: requests of a kind wait until they are released: for tests that must know for certain that
  a read is under way. A hold ends by itself after ``HOLD_LIMIT``, because a process that waits for
  a page cannot even be killed before it is answered.

Whether a request fails is decided when it is done, not when it arrives, so that a fault which is
healed while a request is held does no harm.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

Kind = Literal["read", "write", "fsync"]
KINDS: tuple[Kind, ...] = ("read", "write", "fsync")
HOLD_LIMIT = 60.0
"""Seconds. Out of the air: far longer than a test, shorter than the patience of CI."""

T = TypeVar("T")


@dataclass
class _Line(Generic[T]):
    """The requests of one kind."""

    latency: float = 0.0
    lanes: list[float] | None = None
    """When each lane is free again; None: as many lanes as requests."""
    held_since: float | None = None
    held: list[T] = field(default_factory=list)
    under_way: int = 0


@dataclass(frozen=True)
class Fault:
    """Requests of one kind that fail."""

    kind: Kind
    number: int
    """The errno."""
    offset: int = 0
    length: int | None = None
    """In bytes; None: to the end."""
    containing: bytes | None = None
    """Only writes with these bytes in them: finds the data of a file wherever a file system puts
    it, and leaves its journal alone."""

    def hits(self, kind: Kind, offset: int, length: int, data: bytes) -> bool:
        if kind != self.kind:
            return False
        if kind == "fsync":
            return True
        if offset + length <= self.offset:
            return False
        if self.length is not None and self.offset + self.length <= offset:
            return False
        return self.containing is None or self.containing in data


class Service(Generic[T]):
    """The requests that are under way."""

    def __init__(self) -> None:
        self._lines: dict[Kind, _Line[T]] = {kind: _Line() for kind in KINDS}
        self._due: list[tuple[float, int, Kind, T]] = []
        self._arrivals = 0
        self._faults: list[tuple[Fault, int | None]] = []

    def set_latency(self, kind: Kind, seconds: float, depth: int | None) -> None:
        """For requests that arrive from now on."""
        line = self._lines[kind]
        line.latency = seconds
        line.lanes = None if depth is None else [0.0] * depth

    def arrive(self, kind: Kind, request: T, now: float) -> None:
        line = self._lines[kind]
        line.under_way += 1
        if line.held_since is not None:
            line.held.append(request)
            return
        start = now if line.lanes is None else max(now, heapq.heappop(line.lanes))
        if line.lanes is not None:
            heapq.heappush(line.lanes, start + line.latency)
        self._push(start + line.latency, kind, request)

    def _push(self, when: float, kind: Kind, request: T) -> None:
        # The count of arrivals keeps requests that are due together in order, uncompared.
        self._arrivals += 1
        heapq.heappush(self._due, (when, self._arrivals, kind, request))

    def hold(self, kind: Kind, now: float) -> None:
        self._lines[kind].held_since = now

    def release(self, kind: Kind, now: float) -> None:
        """Serve what was held at once, without its latency."""
        line = self._lines[kind]
        line.held_since = None
        for request in line.held:
            self._push(now, kind, request)
        line.held.clear()

    def held(self, kind: Kind) -> int:
        return len(self._lines[kind].held)

    def under_way(self, kind: Kind) -> int:
        return self._lines[kind].under_way

    def next_due(self) -> float | None:
        """When something is to be done next."""
        times = [
            line.held_since + HOLD_LIMIT
            for line in self._lines.values()
            if line.held_since is not None
        ]
        if self._due:
            times.append(self._due[0][0])
        return min(times, default=None)

    def pop_due(self, now: float) -> tuple[Kind, T] | None:
        """The next request to be answered now, or None."""
        for kind, line in self._lines.items():
            if line.held_since is not None and line.held_since + HOLD_LIMIT <= now:
                self.release(kind, now)
        if not self._due or self._due[0][0] > now:
            return None
        _, _, kind, request = heapq.heappop(self._due)
        self._lines[kind].under_way -= 1
        return kind, request

    def fail(self, fault: Fault, times: int | None) -> None:
        """Let requests fail, the next ``times`` that the fault hits or all until :meth:`heal`."""
        self._faults.append((fault, times))

    def heal(self) -> None:
        self._faults.clear()

    def error_of(self, kind: Kind, offset: int, length: int, data: bytes = b"") -> int:
        """The errno for a request that is about to be done; 0: it works."""
        for index, (fault, times) in enumerate(self._faults):
            if fault.hits(kind, offset, length, data):
                if times == 1:
                    del self._faults[index]
                elif times is not None:
                    self._faults[index] = (fault, times - 1)
                return fault.number
        return 0
