"""Maps are made here: of files that were opened, and of memory. Synchronous, for a worker."""

from __future__ import annotations

import errno

from ._errors import TruncatedError
from ._file import File, naming
from ._kernel import Kernel
from ._mapping import Mapping
from ._options import MmapOptions, Protection


def map_opened(file: File, protection: Protection, offset: int, length: int | None) -> Mapping:
    """As :func:`map_file`, for a file that was opened for it: closed if that fails."""
    try:
        return map_file(file, protection, offset, length)
    except BaseException:
        file.close()
        raise


def map_file(
    file: File, protection: Protection, offset: int = 0, length: int | None = None
) -> Mapping:
    """
    Map a range of a file, from any offset.

    :raises ValueError: the file is empty, or the range is not inside it
    :raises OSError: what the kernel says, with the path where it is known
    """
    file.inspect(writable=protection is Protection.READ_WRITE)
    size = file.size()
    if size == 0:
        raise ValueError(
            f"cannot map the empty file {file.filename!r}: a map has at least one byte; "
            f"AsyncMmap.create makes a file of a given length"
        )
    if offset >= size or (length is not None and length > size - offset):
        given = (
            f"offset {offset} is" if length is None else f"offset {offset} and length {length} are"
        )
        raise ValueError(f"{given} not inside the file of {size} bytes")
    return remap(file, protection, offset, size - offset if length is None else length)


def remap(file: File, protection: Protection, offset: int, length: int) -> Mapping:
    """
    Map a range that was inside the file a moment ago.

    :raises TruncatedError: it is not any more
    """
    kernel = file.kernel
    delta = offset % kernel.map_granularity
    with naming(file.filename):
        try:
            memory = kernel.map_file(file.fd, length + delta, protection, offset - delta)
        except ValueError:
            # CPython looks at the size too, and it has been cut since we did.
            size = min(max(file.size() - offset, 0), length)
            raise TruncatedError(0, length, size, file.filename) from None
    return Mapping(kernel, file, memory, protection, offset, length, delta)


def map_memory(
    kernel: Kernel, length: int, protection: Protection, options: MmapOptions
) -> Mapping:
    """
    Memory without a name, zero-filled; shared with forked children unless it is READ_COPY.

    On Linux it is a file in memory, which can be resized and mapped again with another
    protection.

    :raises OSError: ENOMEM, also when no huge pages are reserved
    """
    try:
        fd = None
        if protection is not Protection.READ_COPY and not options.stack:
            fd = kernel.memory_file(length, huge=options.huge)
        if fd is None:
            memory = kernel.map_memory(length, protection, stack=options.stack, huge=options.huge)
            mapping = Mapping(kernel, None, memory, protection, 0, length, 0)
        else:
            file = File(kernel, fd, anonymous=True)
            try:
                mapping = remap(file, protection, 0, length)
            except BaseException:
                file.close()
                raise
    except OSError as exc:
        if options.huge and exc.errno in (errno.ENOMEM, errno.EINVAL, errno.ENODEV, errno.ENOSYS):
            raise OSError(
                exc.errno,
                f"no huge pages for {length} bytes: the length must be a multiple of their "
                f"size, and the system must have some reserved (/proc/sys/vm/nr_hugepages)",
            ) from exc
        raise
    if options.populate:
        try:
            mapping.load(0, length, write=protection.writable)
        except BaseException:
            mapping.discard()
            raise
    return mapping
