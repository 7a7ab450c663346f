"""What a served file holds: a pattern to read from, or a disk that knows what was flushed."""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError("Linux only")

import functools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .file_systems import copy_sparse

PAGE = 4096
"""Of the served file, whatever the processor's is."""
_PATTERN_LENGTH = 1 << 20


@functools.cache
def _pattern() -> bytes:
    return random.Random(0).randbytes(_PATTERN_LENGTH + PAGE)


def _pattern_page(index: int) -> bytes:
    # An odd factor: a million pages in a row (4 GiB) all differ.
    start = index * 40_503 % _PATTERN_LENGTH
    return _pattern()[start : start + PAGE]


def content(offset: int, length: int) -> bytes:
    """What the slow file holds at ``offset`` as long as nothing was written there."""
    first, last = offset // PAGE, -(-(offset + length) // PAGE)
    start = offset - first * PAGE
    return b"".join(map(_pattern_page, range(first, last)))[start : start + length]


class Store(Protocol):
    """The content of a served file."""

    size: int

    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes) -> None: ...
    def zero(self, offset: int, length: int) -> None: ...
    def resize(self, size: int) -> None: ...
    def begin_flush(self) -> int:
        """A flush arrives: it will cover what was written by now."""

    def end_flush(self, mark: int) -> None:
        """The flush that gave ``mark`` is done."""


class PatternStore:
    """Pages of :func:`content` and, where something was written, what was written."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pattern_end = size
        self._written: dict[int, bytearray] = {}

    def _page(self, index: int) -> bytes | bytearray:
        page = self._written.get(index)
        if page is not None:
            return page
        start = index * PAGE
        return _pattern_page(index)[: max(0, self._pattern_end - start)].ljust(PAGE, b"\0")

    def read(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        first, last = offset // PAGE, -(-(offset + length) // PAGE)
        start = offset - first * PAGE
        return b"".join(map(self._page, range(first, last)))[start : start + length]

    def write(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            index, start = divmod(offset, PAGE)
            piece = view[: PAGE - start]
            if index not in self._written:
                self._written[index] = bytearray(self._page(index))
            self._written[index][start : start + len(piece)] = piece
            view = view[len(piece) :]
            offset += len(piece)
        self.size = max(self.size, offset)

    def zero(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def resize(self, size: int) -> None:
        if size < self.size:
            self._pattern_end = min(self._pattern_end, size)
            for index in [index for index in self._written if index * PAGE >= size]:
                del self._written[index]
            last = self._written.get(size // PAGE)
            if last is not None:
                last[size % PAGE :] = bytes(PAGE - size % PAGE)
        self.size = size

    def begin_flush(self) -> int:
        return 0

    def end_flush(self, mark: int) -> None:
        pass


@dataclass(frozen=True)
class Record:
    """Something that reached the disk."""

    kind: str
    """``write`` or ``flush``."""
    offset: int = 0
    length: int = 0


class LoggedStore:
    """A disk that remembers what would be there after a power cut: what the last flush covered.

    Strict on purpose. A real disk may keep an unflushed write, or some of them in any order; a
    program that is right must live with the loss of all of them.
    """

    def __init__(self, image: Path) -> None:
        self._now = os.open(image, os.O_RDWR | os.O_CLOEXEC)
        kept = image.with_suffix(".kept")
        copy_sparse(self._now, kept)
        self._kept = os.open(kept, os.O_RDWR | os.O_CLOEXEC)
        self.size = os.fstat(self._now).st_size
        self._pending: list[tuple[int, bytes]] = []
        self._flushed = 0
        """How many writes ever were taken from the front of ``_pending``."""
        self.log: list[Record] = []

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._now, length, offset)

    def write(self, offset: int, data: bytes) -> None:
        os.pwrite(self._now, data, offset)
        self._pending.append((offset, data))
        self.log.append(Record("write", offset, len(data)))

    def zero(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def resize(self, size: int) -> None:
        raise PermissionError("a disk has one size")

    def begin_flush(self) -> int:
        return self._flushed + len(self._pending)

    def end_flush(self, mark: int) -> None:
        count = mark - self._flushed
        if count > 0:  # a flush that began later may have ended earlier
            for offset, data in self._pending[:count]:
                os.pwrite(self._kept, data, offset)
            del self._pending[:count]
            self._flushed = mark
        self.log.append(Record("flush"))

    def copy(self, target: Path, *, after_power_cut: bool) -> None:
        copy_sparse(self._kept if after_power_cut else self._now, target)

    def unflushed(self) -> Iterator[Record]:
        """The writes that a power cut would lose."""
        for offset, data in self._pending:
            yield Record("write", offset, len(data))
