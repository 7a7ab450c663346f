"""The test's side of a file served by :mod:`.fuse_server`."""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError("Linux only")

import contextlib
import errno
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .fuse_protocol import FILE_NAME
from .fuse_server import Served, Statistics
from .mounts import unmount
from .service import Fault, Kind

_START = "from tests.rigs.fuse_server import main; main()"
_PROJECT = Path(__file__).parents[2]
_EXIT_LIMIT = 10.0
"""Seconds for the server to end after its client has hung up. Out of the air; it takes 10 ms."""


class ServedFile:
    """What every served file can be told. All methods may be called from any thread.

    Each is one message to the server and back, 0.1 ms; they block, but never for the disk, except
    for :meth:`evict` and :meth:`wait_held`.
    """

    def __init__(self, path: Path, control: Connection, process: subprocess.Popen[bytes]) -> None:
        self.path = path
        self.process = process
        """The server. Kill it (``process.kill()``) to see a disk that is gone: ENOTCONN for every
        access, closing a descriptor included (it is closed all the same)."""
        self._control = control
        self._lock = threading.Lock()

    def _ask(self, name: str, *arguments: object) -> Any:
        with self._lock:
            self._control.send((name, arguments))
            answer = self._control.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def set_latency(
        self,
        *,
        read: float | None = None,
        write: float | None = None,
        fsync: float | None = None,
        depth: int | None = None,
    ) -> None:
        """Let each request of a kind that arrives from now on take so many seconds.

        :param read: seconds for a read request, None: as before. The kernel makes one request of
            the pages it reads ahead: use ``max_readahead=0`` or MADV_RANDOM for one page each.
        :param write: seconds for a write request
        :param fsync: seconds for fsync, fdatasync and msync, on top of the writes they wait for
        :param depth: how many requests of these kinds are served at a time, None: all
        """
        for kind, seconds in (("read", read), ("write", write), ("fsync", fsync)):
            if seconds is not None:
                self._ask("set_latency", kind, seconds, depth)

    def fail_reads(
        self,
        offset: int = 0,
        length: int | None = None,
        *,
        number: int = errno.EIO,
        times: int | None = None,
    ) -> None:
        """Let reads of these bytes fail with errno ``number``, always or ``times``."""
        self._ask("fail", Fault("read", number, offset, length), times)

    def fail_writes(
        self,
        number: int,
        offset: int = 0,
        length: int | None = None,
        *,
        containing: bytes | None = None,
        times: int | None = None,
    ) -> None:
        """Let writes (and fallocate) of these bytes fail, for example with ENOSPC.

        :param containing: only writes with these bytes in them
        """
        self._ask("fail", Fault("write", number, offset, length, containing), times)

    def fail_fsync(self, number: int, *, times: int | None = None) -> None:
        """Let fsync fail although the writes before it worked."""
        self._ask("fail", Fault("fsync", number), times)

    def heal(self) -> None:
        """Let nothing fail any more."""
        self._ask("heal")

    def hold(self, kind: Kind) -> None:
        """Answer no request of this kind until :meth:`release`; after 60 s they go on anyhow."""
        self._ask("hold", kind)

    def release(self, kind: Kind | None = None) -> None:
        """Answer what was held, at once; without ``kind``: everything."""
        self._ask("release", kind)

    def wait_held(self, kind: Kind, count: int = 1, *, timeout: float = 10.0) -> None:
        """Wait until ``count`` requests of a kind are held: then someone waits for the disk.

        Holds up other calls to this object meanwhile.

        :raises TimeoutError: they did not come within ``timeout`` seconds
        """
        held = self._ask("wait_held", kind, count, timeout)
        if held < count:
            raise TimeoutError(f"{held} of {count} {kind} requests came within {timeout} s")

    def evict(self, offset: int = 0, length: int = 0) -> None:
        """Make pages cold: out of the page cache and of every mapping; dirty ones are written.

        Waits for requests in flight on them: not to be called while they are held. ``length`` 0
        goes to the end of the file.
        """
        self._ask("evict", offset, length)

    def statistics(self, *, reset: bool = False) -> Statistics:
        """What the file was asked for so far, or since the last ``reset``."""
        answer = self._ask("statistics", reset)
        assert isinstance(answer, Statistics)
        return answer

    def stored(self, offset: int, length: int) -> bytes:
        """What the server has for these bytes: dirty pages of the page cache are not in it."""
        answer = self._ask("stored", offset, length)
        assert isinstance(answer, bytes)
        return answer


def _lift_dirty_limit(path: Path) -> None:
    """Let the page cache hold as much unwritten data as for a disk.

    FUSE mounts are held to 1 % of it by default, so that a program that dirties 50 MiB is stopped
    until the server has written them: a stall that no disk has.
    """
    device = os.stat(path).st_dev
    bdi = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}")
    for name, value in (("strict_limit", "0"), ("max_ratio", "100")):
        with contextlib.suppress(OSError):  # kernels before 6.2 have no strict_limit
            (bdi / name).write_text(value)


@contextlib.contextmanager
def serve(served: Served) -> Iterator[tuple[Path, Connection, subprocess.Popen[bytes]]]:
    """Start a server, wait until its file is there, and end both with the block."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            # -S: no site-packages needed, 20 ms saved. -c and not -m: what is pickled must not
            # belong to __main__.
            [sys.executable, "-S", "-c", _START, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=_PROJECT,
            stdin=subprocess.DEVNULL,
        )
    control = Connection(ours.detach())
    try:
        control.send(served)
        answer = control.recv()  # after the handshake with the kernel
        if isinstance(answer, Exception):
            raise answer
        path = served.directory / FILE_NAME
        _lift_dirty_limit(path)
        yield path, control, process
    finally:
        with contextlib.suppress(OSError, EOFError):  # the test may have killed the server
            for command in (("release", (None,)), ("heal", ())):
                control.send(command)
                control.recv()
        unmount(served.directory)
        control.close()
        try:
            process.wait(_EXIT_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
