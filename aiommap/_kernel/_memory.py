"""Addresses of Python buffers, and errno as OSError: what all platforms do the same way."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any


class _PyBuffer(ctypes.Structure):
    # Py_buffer of the stable ABI: https://docs.python.org/3/c-api/buffer.html
    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)
_get_buffer.restype = ctypes.c_int
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_PyBuffer),)
_release_buffer.restype = None

_PYBUF_SIMPLE = 0


def address_of(buffer: object) -> int:
    """
    Where the bytes of a contiguous buffer are, read-only ones too.

    The export is given back before this returns: the caller keeps the object alive, and, if it
    can be resized, exported, for as long as the address is in use.
    """
    # `c_char.from_buffer` would refuse read-only buffers.
    view = _PyBuffer()
    _get_buffer(buffer, ctypes.byref(view), _PYBUF_SIMPLE)
    try:
        return view.buf or 0
    finally:
        _release_buffer(ctypes.byref(view))


def error_from_errno() -> OSError:
    """The calling thread's errno, as the fitting subclass of OSError."""
    error = ctypes.get_errno()
    return OSError(error, os.strerror(error))


def foreign(
    library: ctypes.CDLL, name: str, result: Any, *arguments: Any
) -> Callable[..., int] | None:
    """A function of a C library with its types set, or None where the library lacks it."""
    try:
        function = library[name]
    except AttributeError:
        return None
    function.argtypes = arguments
    function.restype = result
    return function  # type: ignore[no-any-return, unused-ignore]


_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.argtypes = (ctypes.c_char_p, ctypes.c_ssize_t)
_new_bytes.restype = ctypes.py_object


def new_bytes(length: int) -> tuple[bytes, memoryview]:
    """
    A bytes object whose content is still to be written, and the memory to write it to.

    For large reads: filling it in place, in a worker and without the GIL, saves the copy out
    of a bytearray, which would hold the GIL for as long as it takes (100 ms and more for a
    GiB). Nobody else may see the object before it is full, as the C API asks
    (https://docs.python.org/3/c-api/bytes.html#c.PyBytes_FromStringAndSize).

    The memory keeps the object alive: a task that was cancelled lets go of both while a worker
    still writes to a part of the memory.
    """
    data: bytes = _new_bytes(None, length)
    # SAFETY: the array is as long as the object, and keeps it.
    memory = (ctypes.c_char * length).from_address(address_of(data))
    memory.of = data  # type: ignore[attr-defined]
    return data, memoryview(memory).cast("B")
