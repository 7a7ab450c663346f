"""A guarded copy that every POSIX system has: through a pipe."""

from __future__ import annotations

import sys

assert sys.platform != "win32"

import ctypes
import errno
import os
import threading
from contextlib import suppress

from ._guarded_copy import copy_until_missing
from ._memory import foreign
from ._posix import address_t, libc, page_size, size_t

_raw_write = foreign(libc, "write", ctypes.c_ssize_t, ctypes.c_int, address_t, size_t)
_raw_read = foreign(libc, "read", ctypes.c_ssize_t, ctypes.c_int, address_t, size_t)


class _Pipe:
    """
    Carries bytes between two places of our own memory.

    A kernel that finds a page missing while it copies from or to a process says EFAULT and
    does not signal, whatever the call: so ``write`` into a pipe and ``read`` out of it are a
    guarded copy that every POSIX system has. Between two copies the pipe is empty.
    """

    MOST = 1 << 16  # the capacity of a pipe on Linux, and the largest on macOS and FreeBSD

    def __init__(self) -> None:
        self.process = os.getpid()
        self._ends: tuple[int, ...] = ()
        self._ends = os.pipe()
        for end in self._ends:
            os.set_blocking(end, False)

    def __del__(self) -> None:
        for end in self._ends:
            os.close(end)

    def carry(self, destination: int, source: int, length: int) -> int:
        """Copy up to :attr:`MOST` bytes; 0 where the first page, of some or all, is missing."""
        assert _raw_write is not None
        assert _raw_read is not None
        outlet, inlet = self._ends
        # SAFETY: the caller's ranges are inside memory that it keeps alive; a page of it that
        # cannot be touched is EFAULT.
        written = _raw_write(inlet, source, min(length, self.MOST))
        done = 0
        while done < written:
            count = _raw_read(outlet, destination + done, written - done)
            if count <= 0:
                break
            done += count
        if written == -1 or done < written:
            error = ctypes.get_errno()
            # Nothing tells how much is left in the pipe, and the next copy must not find it.
            with suppress(BlockingIOError):
                while os.read(outlet, self.MOST):
                    pass
            if error != errno.EFAULT:
                raise OSError(error, os.strerror(error))
        return done


class _Thread(threading.local):
    """What each thread has of its own."""

    pipe: _Pipe | None = None


_thread = _Thread()


def _own_pipe() -> _Pipe:
    # Nor may a forked child share its parent's: they would get each other's bytes.
    pipe = _thread.pipe
    if pipe is None or pipe.process != os.getpid():
        pipe = _thread.pipe = _Pipe()
    return pipe


def copy(destination: int, source: int, length: int) -> int:
    return copy_until_missing(
        destination, source, length, carry=_own_pipe().carry, most=_Pipe.MOST, page_size=page_size
    )
