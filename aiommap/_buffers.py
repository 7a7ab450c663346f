"""Buffers that users hand in, and buffers of ours that they may still hold."""

from __future__ import annotations

import gc
import reprlib
from array import array

from ._typing import Buffer

_OWN_MEMORY = (bytes, bytearray, array)


def readable(data: Buffer, name: str = "data") -> memoryview:
    """
    The bytes of a buffer, without a copy.

    :raises TypeError: it is no buffer
    :raises BufferError: its bytes are not contiguous
    """
    view = _view_of(data, name)
    if view.format == "B" and view.ndim == 1 and view.c_contiguous:
        return view
    if not view.c_contiguous:
        raise BufferError(f"{name} must be contiguous, as bytes() of it would be")
    # A cast cannot take a shape with a zero in it.
    return view.cast("B") if view.nbytes else memoryview(b"")


def writable(buffer: Buffer, name: str = "buffer") -> memoryview:
    """
    The bytes of a buffer that can be stored to, without a copy.

    :raises TypeError: it is no buffer, or it is read-only
    :raises BufferError: its bytes are not contiguous
    """
    view = _view_of(buffer, name)
    if view.readonly:
        raise TypeError(f"{name} must be writable, not a read-only {type(buffer).__name__}")
    return readable(view, name)


def _view_of(data: Buffer, name: str) -> memoryview:
    try:
        return memoryview(data)
    except TypeError:
        raise TypeError(
            f"{name} must be bytes or another buffer, not {reprlib.repr(data)} of type "
            f"{type(data).__name__}"
        ) from None


def is_plain(view: memoryview) -> bool:
    """
    Whether its bytes are an object's own memory, as far as can be told.

    Those of a map may have to come from a disk when they are touched, and are SIGBUS if its
    file was truncated.
    """
    owner: object = view.obj
    while type(owner) not in _OWN_MEMORY:
        base = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", owner)
        if base is None:
            return True  # an array that owns its memory, as numpy says it
        if base is owner:
            return False
        owner = base
    return True


NONE: list[object] = []


def release(*views: memoryview) -> list[object]:
    """
    Release buffers of ours. What still refers to the memory, for :func:`alive`: nothing, once
    all buffers derived from them have gone.

    Releasing a memoryview does not revoke slices, casts and arrays made from it, and says
    nothing about them. CPython's memoryviews of one origin share an object that lets go of the
    memory with the last of them, and that the garbage collector can see: it still refers to
    the exporter while one is alive.
    """
    origins = gc.get_referents(*views)
    for view in views:
        try:
            view.release()
        except BufferError:
            # Arrays are made of it: its origin is alive.
            continue
    # One call in the usual case, which is on the path of every view.
    return alive(origins) if gc.get_referents(*origins) else NONE


def alive(origins: list[object]) -> list[object]:
    """Those of :func:`release` that still refer to the memory."""
    return [origin for origin in origins if gc.get_referents(origin)]
