"""Kernels whose flushes are the classic mistakes: a proof of durability must fail with each."""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError("Linux only")

import ctypes
from collections.abc import Callable
from typing import Any

from .fake_kernel import FakeKernel
from .rigs.faults import write_back

_MS_ASYNC = 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _msync_async(address: int, length: int) -> None:
    if _libc.msync(address, length, _MS_ASYNC):
        raise OSError(ctypes.get_errno(), "msync(MS_ASYNC)")


def no_flush() -> FakeKernel:
    """Nothing is flushed at all."""
    fake = FakeKernel()
    for name in ("sync_data", "sync_range", "sync_all", "sync_directory"):
        fake.wrap(name, lambda real, *arguments: None)
    for name in ("start_write_back", "write_back"):
        fake.wrap(name, lambda real, *arguments: None)
    return fake


def only_ms_async() -> FakeKernel:
    """``msync(MS_ASYNC)`` in the place of every flush."""
    fake = no_flush()

    def sync_range(real: Any, address: int, length: int) -> None:
        _msync_async(address, length)

    def sync_data(real: Any, fd: int) -> None:
        for found in fake.maps.of_file(fd):
            _msync_async(found.address, found.length)

    fake.wrap("sync_range", sync_range)
    fake.wrap("sync_data", sync_data)
    return fake


def only_sync_file_range() -> FakeKernel:
    """``sync_file_range``, and wait until the disk has taken the pages, but no device flush."""
    fake = no_flush()

    def sync_range(real: Any, address: int, length: int) -> None:
        found = fake.maps.at(address)
        assert found is not None
        write_back(found.fd, found.offset + address - found.address, length)

    def sync_data(real: Any, fd: int) -> None:
        write_back(fd)

    fake.wrap("sync_range", sync_range)
    fake.wrap("sync_data", sync_data)
    fake.wrap("sync_all", sync_data)
    return fake


FALSE_FLUSHES: dict[str, Callable[[], FakeKernel]] = {
    "no flush": no_flush,
    "MS_ASYNC": only_ms_async,
    "sync_file_range": only_sync_file_range,
}
