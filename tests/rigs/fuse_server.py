"""The process behind a served file; :mod:`.fuse_client` starts it and tells it what to do.

It is a process of its own because a program that waits for a page of a file cannot serve that page:
the fault is taken with the GIL held. It ends when its client is gone, and takes the mount with it.
"""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError("Linux only")

import contextlib
import errno
import select
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .fuse_protocol import Caching, FuseConnection, Op, Request
from .mounts import unmount
from .service import KINDS, Fault, Kind, Service
from .stores import LoggedStore, PatternStore, Record, Store

_KIND_OF: dict[int, Kind] = {Op.READ: "read", Op.WRITE: "write", Op.FSYNC: "fsync"}


@dataclass
class Statistics:
    """What the served file was asked for since it was mounted, or since the last reset.

    A request is what the kernel makes of an access: one for several pages where it reads ahead.
    """

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    fsyncs: int = 0
    data_fsyncs: int = 0
    """How many of ``fsyncs`` were fdatasync or msync on a range."""
    failed: int = 0
    most_reads_at_once: int = 0


@dataclass(frozen=True)
class Served:
    """What the client asks the server to serve."""

    directory: Path
    """Where to mount it."""
    caching: Caching
    size: int = 0
    image: Path | None = None
    """A disk image to serve as a logged disk, instead of ``size`` bytes of the pattern."""


@dataclass
class _Waiter:
    kind: Kind
    count: int
    deadline: float


class _Server:
    def __init__(self, served: Served, control: Connection) -> None:
        self._control = control
        self._store: Store = (
            PatternStore(served.size) if served.image is None else LoggedStore(served.image)
        )
        self._service: Service[tuple[Request, int]] = Service()
        self._statistics = Statistics()
        self._fuse = FuseConnection(served.directory, self._store.size, served.caching)
        self._ready = False
        self._waiter: _Waiter | None = None

    def run(self) -> None:
        """Serve until the client closes its end of the control connection."""
        fuse, control = self._fuse.descriptor, self._control.fileno()
        sources = [fuse, control]
        while True:
            due = self._service.next_due()
            if self._waiter is not None:
                due = min(self._waiter.deadline, due or self._waiter.deadline)
            timeout = None if due is None else max(0.0, due - time.monotonic())
            # select, because its timeout counts microseconds and epoll's milliseconds.
            readable, _, _ = select.select(sources, [], [], timeout)
            if control in readable:
                try:
                    name, arguments = self._control.recv()
                except (EOFError, ConnectionError):
                    return
                self._command(name, arguments)
            if fuse in readable and not self._receive():
                sources.remove(fuse)
            now = time.monotonic()
            while (item := self._service.pop_due(now)) is not None:
                self._done(*item)
            self._answer_waiter(now)

    def _receive(self) -> bool:
        """Take in all requests that are there; False: unmounted."""
        while True:
            try:
                request = self._fuse.receive()
            except OSError as error:
                if error.errno != errno.ENODEV:
                    raise
                return False
            if request is None:
                return True
            kind = _KIND_OF.get(request.kind)
            if kind is not None:
                self._count(kind, request)
                mark = self._store.begin_flush() if kind == "fsync" else 0
                self._service.arrive(kind, (request, mark), time.monotonic())
                if kind == "read":
                    self._statistics.most_reads_at_once = max(
                        self._statistics.most_reads_at_once, self._service.under_way("read")
                    )
            elif request.kind == Op.FALLOCATE:
                self._fallocate(request)
            else:
                if request.kind == Op.SETATTR and request.flags:
                    self._store.resize(request.length)
                    self._fuse.size = self._store.size
                self._fuse.serve_metadata(request)
                if request.kind == Op.INIT and not self._ready:
                    self._ready = True
                    self._control.send(None)

    def _count(self, kind: Kind, request: Request) -> None:
        statistics = self._statistics
        if kind == "read":
            statistics.reads += 1
            statistics.read_bytes += request.length
        elif kind == "write":
            statistics.writes += 1
            statistics.written_bytes += request.length
        else:
            statistics.fsyncs += 1
            statistics.data_fsyncs += request.flags & 1

    def _done(self, kind: Kind, item: tuple[Request, int]) -> None:
        request, mark = item
        number = self._service.error_of(kind, request.offset, request.length, request.data)
        if number:
            self._statistics.failed += 1
            self._fuse.reply_error(request, number)
        elif kind == "read":
            self._fuse.reply(request, self._store.read(request.offset, request.length))
        elif kind == "write":
            self._store.write(request.offset, request.data)
            self._fuse.size = self._store.size
            self._fuse.reply_written(request)
        else:
            self._store.end_flush(mark)
            self._fuse.reply(request)

    def _fallocate(self, request: Request) -> None:
        keep_size, punch_hole, zero_range = 1, 2, 16
        number = self._service.error_of("write", request.offset, request.length)
        if number:
            self._statistics.failed += 1
            self._fuse.reply_error(request, number)
            return
        end = request.offset + request.length
        if request.flags & (punch_hole | zero_range):
            stop = min(end, self._store.size) if request.flags & keep_size else end
            self._store.zero(request.offset, max(0, stop - request.offset))
        elif not request.flags & keep_size and end > self._store.size:
            self._store.resize(end)
        self._fuse.size = self._store.size
        self._fuse.reply(request)

    # What the client can ask for.

    def _command(self, name: str, arguments: tuple[Any, ...]) -> None:
        handler = getattr(self, f"_on_{name}")
        try:
            answer = handler(*arguments)
        except Exception as error:  # the client raises it
            answer = error
        if answer is not NotImplemented:
            self._control.send(answer)

    def _on_set_latency(self, kind: Kind, seconds: float, depth: int | None) -> None:
        self._service.set_latency(kind, seconds, depth)

    def _on_fail(self, fault: Fault, times: int | None) -> None:
        self._service.fail(fault, times)

    def _on_heal(self) -> None:
        self._service.heal()

    def _on_hold(self, kind: Kind) -> None:
        self._service.hold(kind, time.monotonic())

    def _on_release(self, kind: Kind | None) -> None:
        for each in KINDS if kind is None else (kind,):
            self._service.release(each, time.monotonic())

    def _on_wait_held(self, kind: Kind, count: int, timeout: float) -> Any:
        self._waiter = _Waiter(kind, count, time.monotonic() + timeout)
        return NotImplemented  # answered later

    def _answer_waiter(self, now: float) -> None:
        waiter = self._waiter
        if waiter is None:
            return
        held = self._service.held(waiter.kind)
        if held >= waiter.count or waiter.deadline <= now:
            self._waiter = None
            self._control.send(held)

    def _on_statistics(self, reset: bool) -> Statistics:
        statistics = self._statistics
        if reset:
            self._statistics = Statistics()
        return statistics

    def _on_evict(self, offset: int, length: int) -> Any:
        def evict() -> None:
            try:
                self._fuse.invalidate(offset, length)
            except OSError as error:
                self._control.send(error)
            else:
                self._control.send(None)

        # In a thread: the kernel waits for requests on those pages, which this one has to serve.
        threading.Thread(target=evict, daemon=True).start()
        return NotImplemented  # answered by the thread

    def _on_stored(self, offset: int, length: int) -> bytes:
        return self._store.read(offset, length)

    def _disk(self) -> LoggedStore:
        assert isinstance(self._store, LoggedStore)
        return self._store

    def _on_copy(self, target: Path, after_power_cut: bool) -> None:
        self._disk().copy(target, after_power_cut=after_power_cut)

    def _on_log(self) -> list[Record]:
        return self._disk().log

    def _on_unflushed(self) -> list[Record]:
        return list(self._disk().unflushed())


def main() -> None:
    control = Connection(int(sys.argv[1]))
    served = control.recv()
    try:
        try:
            server = _Server(served, control)
        except OSError as error:
            control.send(error)
            return
        server.run()
    finally:
        # A client that was killed cannot unmount.
        with contextlib.suppress(OSError):
            unmount(served.directory)
