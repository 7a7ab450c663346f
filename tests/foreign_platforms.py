"""macOS and Windows on a Linux machine: their modules, over simulated system calls.

The modules are loaded as they are, with :data:`sys.platform` changed while they are imported. The
calls that Linux does not have are made by the classes here, out of those that it has, and are
recorded. So the conformance tests run on the modules' own code, and the order of calls can be
checked; what the real systems answer cannot.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import importlib.util
import os
import struct
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import aiommap._kernel
from aiommap._kernel import Capabilities, native

_FOLDER = Path(aiommap._kernel.__file__).parent


def load_module(platform: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fresh copy of a platform module, imported as on that platform."""
    monkeypatch.setattr(sys, "platform", platform)
    full_name = f"aiommap._kernel.{name}"
    spec = importlib.util.spec_from_file_location(full_name, _FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, full_name, module)
    monkeypatch.delattr(aiommap._kernel, name, raising=False)
    spec.loader.exec_module(module)
    monkeypatch.setattr(aiommap._kernel, name, module, raising=False)
    return module


class Darwin:
    """
    What macOS has and Linux has not.

    :ivar calls: ``("fcntl", command, ...)`` and ``("msync", flags)`` in order
    :ivar refused: commands of fcntl, and the errno that they fail with, next first
    :ivar read_only: the files are on a read-only HFS volume, which refuses even to flush
    """

    MSYNC_ASYNC, MSYNC_SYNC = 1, 0x10
    PREALLOCATE, RDADVISE, FULLFSYNC, OFD_GETLK = 42, 44, 51, 92

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.refused: dict[int, list[int]] = {}
        self.read_only = False
        self._fcntl = fcntl.fcntl
        portable = load_module("darwin", "_portable", monkeypatch)
        self.module = load_module("darwin", "_darwin", monkeypatch)
        self._real_msync: Callable[..., int] = portable._msync
        monkeypatch.setattr(portable, "_msync", self._msync)
        monkeypatch.setattr(fcntl, "fcntl", self._simulate_fcntl)
        monkeypatch.setattr(sys, "platform", "linux")

    def _msync(self, address: int, length: int, flags: int) -> int:
        self.calls.append(("msync", flags))
        return self._real_msync(address, length, {1: 1, 0x10: 4}[flags])

    def _simulate_fcntl(self, fd: int, command: int, argument: Any = 0) -> Any:
        if command not in (self.PREALLOCATE, self.RDADVISE, self.FULLFSYNC, self.OFD_GETLK):
            return self._fcntl(fd, command, argument)
        if self.refused.get(command):
            self.calls.append(("fcntl", command, "refused"))
            error = self.refused[command].pop(0)
            raise OSError(error, os.strerror(error))
        if self.read_only and command in (self.PREALLOCATE, self.FULLFSYNC):
            self.calls.append(("fcntl", command, "refused"))
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if command == self.FULLFSYNC:
            self.calls.append(("fcntl", command))
            os.fsync(fd)
        elif command == self.PREALLOCATE:
            flags, mode, offset, length, _ = struct.unpack("@Iiqqq", argument)
            assert (mode, offset) == (3, 0)
            self.calls.append(("fcntl", command, flags, length))
            end = max(os.fstat(fd).st_size, os.fstat(fd).st_blocks * 512)
            native_reserve(fd, end, length)
        else:
            self.calls.append(("fcntl", command, argument))
            os.fstat(fd)
        return 0


def native_reserve(fd: int, offset: int, length: int) -> None:
    assert native.reserve(fd, offset, length, grow=False)


class _Function:
    """A function of a library: ctypes sets its types, and reads nothing else of it."""

    argtypes: Any = None
    restype: Any = None

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)


class Windows:
    """
    kernel32, over Linux; a handle is the descriptor.

    :ivar calls: the names of the functions called, in order, with what matters of their
        arguments
    :ivar refused: per function, the errors that its next calls fail with; 0 goes well
    :ivar missing: functions that this Windows does not have
    :ivar fat: the files are on FAT or exFAT, which do not know all queries
    """

    ERROR_HANDLE_EOF, ERROR_PARTIAL_COPY, ERROR_LOCK_VIOLATION = 38, 299, 33
    ERROR_SHARING_VIOLATION, ERROR_INVALID_PARAMETER, ERROR_USER_MAPPED_FILE = 32, 87, 1224

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.refused: dict[str, list[int]] = {}
        self.missing = missing
        self.fat = False
        self.attributes = 0x20
        self.allocated: dict[int, int] = {}
        self._last_error = 0
        msvcrt = types.ModuleType("msvcrt")
        msvcrt.get_osfhandle = lambda fd: os.fstat(fd) and fd  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
        for name, value in {
            "WinDLL": lambda name, use_last_error: self,
            "get_last_error": lambda: self._last_error,
            "FormatError": lambda code: f"error {code} of Windows\r\n",
            "WinError": self._win_error,
        }.items():
            monkeypatch.setattr(ctypes, name, value, raising=False)
        self.module = load_module("win32", "_windows", monkeypatch)
        monkeypatch.setattr(sys, "platform", "linux")
        self._real_unlink = os.unlink
        monkeypatch.setattr(os, "unlink", self._unlink)

    def _unlink(self, path: Any, **options: Any) -> None:
        if _is_open(path):
            error = PermissionError(errno.EACCES, "error 32 of Windows", path)
            error.winerror = self.ERROR_SHARING_VIOLATION  # type: ignore[attr-defined]
            raise error
        self._real_unlink(path, **options)

    @staticmethod
    def _win_error(code: int) -> OSError:
        error = OSError(errno.EACCES if 19 <= code <= 36 else errno.EINVAL, f"error {code}")
        error.winerror = code  # type: ignore[attr-defined]
        return error

    def __getitem__(self, name: str) -> _Function:
        if name in self.missing:
            raise AttributeError(name)
        return _Function(lambda *arguments: self._called(name, *arguments))

    def _called(self, name: str, *arguments: Any) -> Any:
        if self.refused.get(name):
            self._last_error = self.refused[name].pop(0)
            if self._last_error:
                self.calls.append((name, "refused"))
                return 0
        return getattr(self, f"_{name}")(*arguments)

    def _fails(self, error: int) -> int:
        self._last_error = error
        return 0

    def _FlushViewOfFile(self, address: int, length: int) -> int:  # noqa: N802
        self.calls.append(("FlushViewOfFile", address, length))
        return 1

    def _FlushFileBuffers(self, handle: int) -> int:  # noqa: N802
        self.calls.append(("FlushFileBuffers", handle))
        os.fsync(handle)
        return 1

    def _Sleep(self, milliseconds: int) -> None:  # noqa: N802
        self.calls.append(("Sleep", milliseconds))

    def _ReadFile(  # noqa: N802
        self, handle: int, address: int, length: int, count: int, overlapped: int
    ) -> int:
        low, high = struct.unpack_from("@II", ctypes.string_at(overlapped, 24), 16)
        self.calls.append(("ReadFile", length, high << 32 | low))
        buffer = (ctypes.c_char * length).from_address(address)
        try:
            done = os.preadv(handle, [buffer], high << 32 | low)
        except OSError:
            return self._fails(6)
        ctypes.c_uint32.from_address(count).value = done
        return 1 if done or not length else self._fails(self.ERROR_HANDLE_EOF)

    def _GetFileInformationByHandleEx(  # noqa: N802
        self, handle: int, kind: int, info: int, size: int
    ) -> int:
        status = os.fstat(handle)
        if kind == 9 and self.fat:
            return self._fails(self.ERROR_INVALID_PARAMETER)
        if kind == 9:
            data = struct.pack("@II", self.attributes, 0)
        elif kind == 0:
            data = struct.pack("@qqqqI4x", 0, 0, 0, 0, self.attributes)
        else:
            assert kind == 1
            allocated = self.allocated.get(status.st_ino, status.st_size)
            data = struct.pack("@qqIBB2x", allocated, status.st_size, 1, 0, 0)
        assert size == len(data)
        ctypes.memmove(info, data, size)
        return 1

    def _SetFileInformationByHandle(  # noqa: N802
        self, handle: int, kind: int, info: int, size: int
    ) -> int:
        value = ctypes.c_int64.from_address(info).value
        self.calls.append(("SetFileInformationByHandle", kind, value))
        assert size == 8
        if kind == 6:
            if value < os.fstat(handle).st_size and self.module.maps.of_file(handle):
                return self._fails(self.ERROR_USER_MAPPED_FILE)
            os.ftruncate(handle, value)
        else:
            assert kind == 5
            assert value >= os.fstat(handle).st_size, "would cut the file"
            self.allocated[os.fstat(handle).st_ino] = value
            native_reserve(handle, 0, value)
        return 1

    def _GetFinalPathNameByHandleW(  # noqa: N802
        self, handle: int, name: int, length: int, flags: int
    ) -> int:
        path = os.readlink(f"/proc/self/fd/{handle}").removesuffix(" (deleted)")
        path = path if os.path.exists(path) else os.path.dirname(path)
        buffer = (ctypes.c_wchar * length).from_address(name)
        buffer.value = path
        return len(path)

    def _GetCurrentProcess(self) -> int:  # noqa: N802
        return -1

    def _ReadProcessMemory(  # noqa: N802
        self, process: int, source: int, destination: int, length: int, count: int
    ) -> int:
        assert process == -1
        self.calls.append(("ReadProcessMemory", length))
        try:
            done = native.copy(destination, source, length)
        except OSError:
            done = 0
        # As the real one: wrong when it was the destination that failed.
        ctypes.c_size_t.from_address(count).value = done if done == length else 0xDEAD
        return 1 if done == length else self._fails(self.ERROR_PARTIAL_COPY)

    def _PrefetchVirtualMemory(  # noqa: N802
        self, process: int, number: int, ranges: int, flags: int
    ) -> int:
        assert (process, number, flags) == (-1, 1, 0)
        self.calls.append(
            ("PrefetchVirtualMemory", *struct.unpack("@NN", ctypes.string_at(ranges, 16)))
        )
        return 1

    def _K32QueryWorkingSetEx(self, process: int, entries: int, size: int) -> int:  # noqa: N802
        page = native.page_size
        for entry in range(entries, entries + size, 16):
            address = ctypes.c_size_t.from_address(entry).value
            assert address % page == 0
            state = native.resident(address, page)[0]
            ctypes.c_size_t.from_address(entry + 8).value = 0x1230 | state & 1
        return 1

    def _GetProcessWorkingSetSize(self, process: int, least: int, most: int) -> int:  # noqa: N802
        ctypes.c_size_t.from_address(least).value = 204_800
        ctypes.c_size_t.from_address(most).value = 1_413_120
        return 1

    def _VirtualLock(self, address: int, length: int) -> int:  # noqa: N802
        self.calls.append(("VirtualLock", address, length))
        native.pin(address, length)
        return 1

    def _VirtualUnlock(self, address: int, length: int) -> int:  # noqa: N802
        self.calls.append(("VirtualUnlock", address, length))
        native.unpin(address, length)
        return 1


def _is_open(path: Any) -> bool:
    """Whether this process has the file open, or mapped: maps have a descriptor each."""
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # of the listing itself, or a path that leads nowhere
            if os.path.samestat(os.fstat(int(fd)), os.lstat(path)):
                return True
    return False


def is_capabilities(value: Capabilities) -> bool:
    """Whether every field has a value of its type."""
    return isinstance(value.page_size, int) and all(
        isinstance(getattr(value, name), bool)
        for name in Capabilities.__slots__
        if name != "page_size"
    )
