"""Offsets, lengths and page spans: the one place where they are checked and compared.

A range is ``(offset, length)`` in bytes and lies inside ``size`` bytes when
``0 <= offset <= size`` and ``0 <= length <= size - offset``. The comparison subtracts: the sum
``offset + length`` of two large values would wrap in C, and it did in three range checks of
memmap2 (RUSTSEC-2026-0186); Python's integers do not wrap, the system calls below them do.
"""

from __future__ import annotations

from operator import index
from typing import SupportsIndex

LARGEST_OFFSET = 2**63 - 1
"""``off_t`` is signed and 64 bits wide on every platform we know."""


def as_int(value: SupportsIndex, name: str) -> int:
    """
    ``value`` as an int: anything with ``__index__``, but no bool.

    :raises TypeError: for bool, float and whatever else is not an integer
    """
    if type(value) is int:  # the hot case
        return value
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        raise TypeError(f"{name} must be an integer, not {value!r} of type bool")
    try:
        return index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be an integer, not {value!r} of type {type(value).__name__}"
        ) from None


def check_range(
    offset: SupportsIndex, length: SupportsIndex, size: int, what: str = "map"
) -> tuple[int, int]:
    """
    ``(offset, length)`` as ints that lie inside ``size`` bytes.

    :raises TypeError: for what is not an integer
    :raises ValueError: when the range is not inside; names the numbers
    """
    if type(offset) is not int or type(length) is not int:  # seldom
        offset = as_int(offset, "offset")
        length = as_int(length, "length")
    if not 0 <= offset <= size or not 0 <= length <= size - offset:
        raise ValueError(
            f"offset {offset} and length {length} are not inside the {what} of {size} bytes"
        )
    return offset, length


def check_part(
    offset: SupportsIndex, length: SupportsIndex | None, size: int, what: str = "map"
) -> tuple[int, int]:
    """As :func:`check_range`, where None for the length is all the rest."""
    if length is None:
        offset = as_int(offset, "offset")
        length = max(size - offset, 0)
    return check_range(offset, length, size, what)


def check_length(length: SupportsIndex, name: str = "length") -> int:
    """
    A length that something can have: an int from 1 to the largest file.

    :raises TypeError: for what is not an integer
    :raises ValueError: when it is less than 1 or no file can be as long
    """
    length = as_int(length, name)
    if length <= 0:
        raise ValueError(f"{name} must be at least 1 byte, not {length}")
    if length > LARGEST_OFFSET:
        raise ValueError(f"{name} {length} is more than any file can have ({LARGEST_OFFSET})")
    return length


def page_span(offset: int, length: int, page_size: int) -> tuple[int, int]:
    """
    The whole pages around a range: ``(start, length)``, both multiples of ``page_size``.

    An empty range has an empty span.
    """
    start = offset - offset % page_size
    if length == 0:
        return start, 0
    return start, -(-(offset + length - start) // page_size) * page_size


def pieces(offset: int, length: int, size: int) -> list[tuple[int, int]]:
    """A range cut into consecutive pieces that end at multiples of ``size``."""
    result = []
    while length > 0:
        piece = min(length, size - offset % size)
        result.append((offset, piece))
        offset += piece
        length -= piece
    return result
