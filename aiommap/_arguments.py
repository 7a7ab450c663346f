"""The arguments that maps are opened with."""

from __future__ import annotations

import os
from typing import Any, Protocol, SupportsIndex

from anyio import AsyncFile, CapacityLimiter

from ._file import Filename
from ._ranges import LARGEST_OFFSET, as_int, check_length


class HasFileno(Protocol):
    """An open file: anything with a descriptor."""

    def fileno(self) -> int: ...


StrOrBytesPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_LARGEST_DESCRIPTOR = 2**31 - 1  # a C int


def check_path(path: StrOrBytesPath) -> str | bytes:
    try:
        name = os.fspath(path)
    except TypeError:
        raise TypeError(
            f"path must be a string, bytes or a path object, not {path!r} of type "
            f"{type(path).__name__}"
        ) from None
    if ("\0" if isinstance(name, str) else b"\0") in name:  # type: ignore[operator]
        raise ValueError(f"the path {name!r} has a NUL character in it, which no path can have")
    return name


def check_file_range(offset: SupportsIndex, length: SupportsIndex | None) -> tuple[int, int | None]:
    offset = as_int(offset, "offset")
    if not 0 <= offset <= LARGEST_OFFSET:
        raise ValueError(f"offset {offset} is not inside any file")
    return offset, None if length is None else check_length(length)


def check_limiter(limiter: CapacityLimiter | None) -> CapacityLimiter | None:
    if limiter is None or isinstance(limiter, CapacityLimiter):
        return limiter
    raise TypeError(f"limiter must be an anyio.CapacityLimiter or None, not {limiter!r}")


def descriptor(file: int | HasFileno | AsyncFile[Any]) -> tuple[int, Filename]:
    """The descriptor, and the path where the object knows one."""
    name = None
    if hasattr(file, "fileno"):
        fileno: Any = file.fileno  # an AsyncFile's is typed as object
        fd = as_int(fileno(), "fileno()")
        name = getattr(file, "name", None)
    elif isinstance(file, str | bytes | os.PathLike):
        raise TypeError(f"file must be a descriptor or have fileno(); for {file!r} use open_path()")
    else:
        fd = as_int(file, "file")
    if not 0 <= fd <= _LARGEST_DESCRIPTOR:
        raise ValueError(f"{fd} is no file descriptor; is the file closed?")
    return fd, name if isinstance(name, str | bytes) else None
