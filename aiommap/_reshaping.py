"""A map takes another length or another protection: a new mapping of the same file.

Synchronous, for a worker that holds the whole region lock. Either the new mapping is returned
and the file fits it, or an error is raised and the old mapping is as it was.
"""

from __future__ import annotations

from ._file import File
from ._mapping import Mapping, map_memory, remap
from ._options import MmapOptions, Protection


def resized(mapping: Mapping, length: int) -> Mapping:
    """
    The same bytes with another length, and the file with it.

    :raises ValueError: the file reaches beyond the map, so cutting it would lose what is there
    :raises OSError: ENOSPC, EDQUOT, EFBIG, ENOMEM
    """
    file = mapping.file
    if file is None:
        return _copied(mapping, length, mapping.protection)
    if length < mapping.length:
        return _shrunk(mapping, file, length)
    return _grown(mapping, file, length)


def _shrunk(mapping: Mapping, file: File, length: int) -> Mapping:
    size = file.size()
    end = mapping.offset + mapping.length
    if size > end:
        raise ValueError(
            f"the map ends at byte {end} of the file, which has {size}: shrinking to {length} "
            f"bytes would cut off what others keep behind it; map the file to its end first"
        )
    new = remap(file, mapping.protection, mapping.offset, length)
    # Last, because it is what cannot be taken back.
    if size > mapping.offset + length:
        file.kernel.set_file_size(file.fd, mapping.offset + length)
    return new


def _grown(mapping: Mapping, file: File, length: int) -> Mapping:
    size = file.size()
    end = mapping.offset + length
    if end > size:
        if not (
            not file.anonymous
            and file.reserve(size, end - size)
            and file.reserve(size, end - size, grow=True)
        ):
            file.kernel.set_file_size(file.fd, end)
        try:
            return remap(file, mapping.protection, mapping.offset, length)
        except BaseException:
            if file.size() == end:
                file.kernel.set_file_size(file.fd, size)
            raise
    return remap(file, mapping.protection, mapping.offset, length)


def protected(mapping: Mapping, protection: Protection) -> Mapping:
    """
    The same bytes with another protection.

    :raises PermissionError: the descriptor was opened with fewer rights
    """
    if mapping.file is None:
        return _copied(mapping, mapping.length, protection)
    return remap(mapping.file, protection, mapping.offset, mapping.length)


def _copied(mapping: Mapping, length: int, protection: Protection) -> Mapping:
    """Memory without a file cannot be mapped twice; its bytes move."""
    stored_with = protection if protection.writable else Protection.READ_WRITE
    new = map_memory(mapping.kernel, length, stored_with, MmapOptions())
    step = 1 << 20
    for offset in range(0, min(length, mapping.length), step):
        count = min(step, length - offset, mapping.length - offset)
        new.write(offset, memoryview(mapping.read(offset, count)))
    return new if stored_with is protection else protected(new, protection)
