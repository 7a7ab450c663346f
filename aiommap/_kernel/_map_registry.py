"""Which maps this process has of which file.

Linux needs none of this: there a flush of the file writes what was stored through its maps. POSIX
does not ask for that, macOS and Windows do not do it: the memory must be handed over first
(``msync``, ``FlushViewOfFile``, which take addresses), then the file (``F_FULLFSYNC``,
``FlushFileBuffers``, which take a descriptor). The functions of :class:`~._protocol.Kernel`
take the one or the other, so those platforms look up here what they were not given.

Without a lock, because a forked child would inherit a held one: every access is one step of a
dict.
"""

from __future__ import annotations

import mmap
import os
import weakref
from dataclasses import dataclass

from ._memory import address_of

_Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Place:
    file: _Identity
    fd: int
    offset: int
    address: int
    length: int
    writable: bool


@dataclass(frozen=True, slots=True)
class FileMap:
    """
    One live map; holding this keeps the memory mapped.

    :ivar fd: the descriptor it was mapped from, which its owner keeps open as long as it flushes
    :ivar offset: of the map's first byte in the file
    :ivar writable: whether stores reach the file
    """

    memory: mmap.mmap
    fd: int
    offset: int
    address: int
    length: int
    writable: bool


class MapRegistry:
    """The maps made by one platform module; each is forgotten when its memory is unmapped."""

    def __init__(self) -> None:
        self._places: dict[weakref.ref[mmap.mmap], _Place] = {}

    def add(self, fd: int, memory: mmap.mmap, offset: int, *, writable: bool) -> None:
        """Remember a map of the file that is open as ``fd``. O(1)."""
        place = _Place(_identity(fd), fd, offset, address_of(memory), len(memory), writable)
        reference = weakref.ref(memory, self._forget)
        hash(reference)  # can only be computed while the memory lives; it is kept
        self._places[reference] = place

    def _forget(self, reference: weakref.ref[mmap.mmap]) -> None:
        self._places.pop(reference, None)

    def of_file(self, fd: int) -> list[FileMap]:
        """All maps of the file, from whatever descriptor they were made. O(maps)."""
        file = _identity(fd)
        return [
            found
            for reference, place in list(self._places.items())
            if place.file == file and (found := _found(reference, place)) is not None
        ]

    def at(self, address: int) -> FileMap | None:
        """
        The map that the address is in; None for memory without a file. O(maps).

        The descriptor is the one of the map, and still the same file's.
        """
        for reference, place in list(self._places.items()):
            if place.address <= address < place.address + place.length:
                found = _found(reference, place)
                if found is not None:
                    return found if _identity(place.fd) == place.file else None
        return None


def _found(reference: weakref.ref[mmap.mmap], place: _Place) -> FileMap | None:
    memory = reference()
    if memory is None:
        return None
    return FileMap(memory, place.fd, place.offset, place.address, place.length, place.writable)


def _identity(fd: int) -> _Identity:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
