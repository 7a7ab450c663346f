"""A map takes another length or another protection: a new mapping of the same file.

Synchronous, for a worker that holds the whole region lock. Either the new mapping is returned
and the file fits it, or an error is raised and the old mapping is as it was.
"""

from __future__ import annotations

import errno
from contextlib import suppress

from ._file import File
from ._map_making import map_memory, remap
from ._mapping import Mapping
from ._options import MmapOptions, Protection


def resized(mapping: Mapping, length: int) -> Mapping:
    """
    The same bytes with another length, and the file with it.

    :raises ValueError: the file reaches beyond the map, so cutting it would lose what is there
    :raises OSError: ENOSPC, EDQUOT, EFBIG, ENOMEM; ENOTSUP: the platform cannot cut the file
    """
    file = mapping.file
    if file is None:
        return _copied(mapping, length, mapping.protection)
    if length < mapping.length and file.size() >= mapping.offset + length:
        return _shrunk(mapping, file, length)
    # Also to a smaller length that the file, truncated by somebody else, does not reach.
    return _grown(mapping, file, length)


def _shrunk(mapping: Mapping, file: File, length: int) -> Mapping:
    size = file.size()
    end = mapping.offset + mapping.length
    if size > end:
        raise ValueError(
            f"the map ends at byte {end} of the file, which has {size}: shrinking to {length} "
            f"bytes would cut off what others keep behind it; map the file to its end first"
        )
    if size > mapping.offset + length and not file.kernel.cuts_mapped_files:
        # To unmap it first would take the memory from calls that are using it, and leave no map
        # where it cannot be mapped again.
        raise OSError(
            errno.ENOTSUP,
            "this platform cannot cut a file that is mapped: close all maps of it, then truncate "
            "it and open it again",
            file.filename,
        )
    new = remap(file, mapping.protection, mapping.offset, length)
    # Last, because it is what cannot be taken back.
    if size > mapping.offset + length:
        file.set_size(mapping.offset + length)
    return new


def _grown(mapping: Mapping, file: File, length: int) -> Mapping:
    size = file.size()
    end = mapping.offset + length
    if end <= size:
        return remap(file, mapping.protection, mapping.offset, length)
    if file.anonymous or not file.grow(end):
        file.set_size(end)
    try:
        return remap(file, mapping.protection, mapping.offset, length)
    except BaseException:
        # Not on every platform while it is mapped; the error on its way says more.
        with suppress(OSError):
            if file.size() == end:
                file.set_size(size)
        raise


def protected(mapping: Mapping, protection: Protection) -> Mapping:
    """
    The same bytes with another protection.

    :raises PermissionError: the descriptor was opened with fewer rights
    :raises TruncatedError: the file does not reach the end of the map any more
    """
    if mapping.file is None:
        return _copied(mapping, mapping.length, protection)
    mapping.check_reach(0, mapping.length)
    return remap(mapping.file, protection, mapping.offset, mapping.length)


def _copied(mapping: Mapping, length: int, protection: Protection) -> Mapping:
    """Memory without a file cannot be mapped twice; its bytes move."""
    stored_with = protection if protection.writable else Protection.READ_WRITE
    new = map_memory(mapping.kernel, length, stored_with, MmapOptions())
    step = 1 << 20
    for offset in range(0, min(length, mapping.length), step):
        count = min(step, length - offset, mapping.length - offset)
        new.write(offset, memoryview(mapping.read(offset, count)))
    if stored_with is protection:
        return new
    if new.file is not None:
        return protected(new, protection)
    if protection is Protection.READ_EXECUTE:
        raise OSError(
            errno.ENOTSUP,
            "memory with content cannot be made executable on this platform: map a file instead",
        )
    # Nobody is given a way to store to it; to the hardware it stays writable.
    new.protection = protection
    return new
