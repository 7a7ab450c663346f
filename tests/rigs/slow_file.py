"""A file on a disk that is as slow, as broken and as full as a test wants, mapped like any other.

::

    with slow_file(64 << 20, read=0.02) as file:
        descriptor = os.open(file.path, os.O_RDWR)
        ...
"""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError("Linux only")

import contextlib
from collections.abc import Iterator

from .fuse_client import ServedFile, serve
from .fuse_protocol import Caching
from .fuse_server import Served
from .mounts import rig_directory
from .stores import content as content

MIB = 1 << 20


class SlowFile(ServedFile):
    """The served file at ``path``. It can be read, written, mapped, truncated and grown, but not
    renamed or unlinked. It starts with :func:`content` and with no page in the page cache."""


@contextlib.contextmanager
def slow_file(
    size: int = 16 * MIB,
    *,
    read: float = 0.0,
    write: float = 0.0,
    fsync: float = 0.0,
    max_readahead: int | None = None,
    write_back: bool = True,
    max_background: int = 1024,
) -> Iterator[SlowFile]:
    """Serve a file of ``size`` bytes for the length of a ``with`` block.

    Close maps and descriptors before the block ends; where they are left open, the mount is
    detached, and a later fault in such a map kills the process with SIGBUS.

    :param read: seconds a read request takes; requests overlap, see
        :meth:`~.fuse_client.ServedFile.set_latency`
    :param write: seconds a write request takes
    :param fsync: seconds an fsync takes
    :param max_readahead: bytes that the kernel may read ahead; 0: only the pages asked for, which
        makes populating or reading a range page after page. None: the kernel's default, 128 KiB.
        An explicit MADV_WILLNEED or POSIX_FADV_WILLNEED reads ahead in either case.
    :param max_background: read-ahead and write-back requests that the kernel has in flight at once;
        12 where a file system does not say it
    :param write_back: False: each ``write`` reaches the disk, and its error the caller, at once
    """
    directory = rig_directory("slow")
    caching = Caching(max_readahead, write_back, max_background)
    with serve(Served(directory, caching, size)) as (path, control, process):
        file = SlowFile(path, control, process)
        file.set_latency(read=read, write=write, fsync=fsync)
        yield file
    with contextlib.suppress(OSError):  # detached, but still in use
        directory.rmdir()
