"""What is possible here."""

from __future__ import annotations

import os

from ._kernel import Capabilities, native


def capabilities(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes] | None = None,
) -> Capabilities:
    """
    What this kernel, and the file system of a path, can do. Found out by trying.

    It opens files, and makes a nameless temporary one beside ``path`` to try reservation on,
    so it may wait for the disk: in an event loop, call it with
    :func:`anyio.to_thread.run_sync`.

    What cannot be tried is False: ``reserve`` where the directory of ``path`` cannot be written,
    as on a file system that is mounted read-only, and ``nowait_reads`` if ``path`` is such a
    directory itself. A file in it can still be asked for ``nowait_reads``.

    :param path: a file or directory; None for the directory of temporary files, or where there
        is none that can be written the current one
    :raises OSError: the path cannot be opened
    """
    return native.capabilities(None if path is None else os.fspath(path))
