"""Files are made here: with their blocks, under a durable name, or not at all.

Where the file system can (``O_TMPFILE``; ext4, xfs, btrfs, tmpfs) a new file has no name until it
is whole: nobody sees half of one, and a process that dies leaves nothing. Synchronous, for a
worker.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from ._file import SAFE_FLAGS, File, naming, open_descriptor
from ._kernel import Kernel

_UNNAMED: int = getattr(os, "O_TMPFILE", 0)

_ATTEMPTS = 10
"""To open or create a file that others create and remove meanwhile. Out of the air."""

# Written where blocks cannot be reserved, in pieces: 1 MiB is one bio on common disks.
_ZEROS = 1 << 20


def create_file(
    kernel: Kernel, path: str | bytes, length: int, *, exist_ok: bool, mode: int
) -> File:
    """
    A file of ``length`` bytes with blocks and a durable name.

    With ``exist_ok`` a file that is there keeps its content and grows; and a new one, once whole,
    is not taken back: whoever asked for it too may be using it.

    :raises FileExistsError: it is there, and ``exist_ok`` is false
    :raises ValueError: it is there and longer than ``length``
    :raises OSError: ENOSPC, EDQUOT, EFBIG...; no new file is left behind
    """
    location = _absolute(path)
    try:
        file = _open_or_make(kernel, location, path, length, exist_ok=exist_ok, mode=mode)
        try:
            kernel.sync_all(file.fd)
            kernel.sync_directory(_folder(location))
        except BaseException:
            withdraw(file)
            raise
    except OSError as exc:
        exc.filename = path  # as the caller calls it
        raise
    return file


def _folder(location: str | bytes) -> str | bytes:
    return os.path.dirname(location) or os.curdir


def _absolute(path: str | bytes) -> str | bytes:
    """
    The same name wherever os.chdir() leads meanwhile: for the removal, and the directory's flush.

    Not os.path.abspath(), which takes ".." for the way back from a symbolic link.
    """
    if not path or os.path.isabs(path):
        return path
    try:
        folder = os.getcwdb() if isinstance(path, bytes) else os.getcwd()
        os.stat(folder)  # fails below a directory that we may not search
    except OSError:
        return path
    return os.path.join(folder, path)  # type: ignore[arg-type]


def _open_or_make(
    kernel: Kernel,
    location: str | bytes,
    path: str | bytes,
    length: int,
    *,
    exist_ok: bool,
    mode: int,
) -> File:
    for _ in range(_ATTEMPTS):
        try:
            if exist_ok:
                with suppress(FileNotFoundError):
                    fd = open_descriptor(location, os.O_RDWR | SAFE_FLAGS)
                    return _whole(_file(kernel, fd, location, path), length)
            return _make(kernel, location, path, length, exist_ok=exist_ok, mode=mode)
        except FileExistsError:
            if not exist_ok:
                raise
        # Made by somebody else between the two calls. A symbolic link that leads nowhere is always
        # there for the one and never for the other.
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def _file(kernel: Kernel, fd: int, location: str | bytes, path: str | bytes) -> File:
    file = File(kernel, fd, path)
    file.location = location
    return file


def _make(
    kernel: Kernel,
    location: str | bytes,
    path: str | bytes,
    length: int,
    *,
    exist_ok: bool,
    mode: int,
) -> File:
    if os.path.lexists(location):  # before anything is reserved
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    unnamed = _open_unnamed(location, mode)
    if unnamed is not None:
        file = _whole(_file(kernel, unnamed, location, path), length, new=True)
        if _give_name(file, location):
            file.made = not exist_ok
            return file
        file.close()
    fd = os.open(location, os.O_RDWR | SAFE_FLAGS | os.O_CREAT | os.O_EXCL, mode)
    file = _file(kernel, fd, location, path)
    file.made = True  # who did not make it must not remove it
    file = _whole(file, length, new=True)
    file.made = not exist_ok
    return file


def _open_unnamed(location: str | bytes, mode: int) -> int | None:
    """A file that will be in the directory; None where there is no such thing."""
    if not _UNNAMED or not os.path.basename(location):
        return None
    try:
        return os.open(_folder(location), os.O_RDWR | SAFE_FLAGS | _UNNAMED, mode)
    except OSError:  # or for a reason that shows again
        return None


def _give_name(file: File, location: str | bytes) -> bool:
    """Whether that can be done. :raises FileExistsError: it is taken; the file is closed"""
    try:
        # With a descriptor for the directory, which an absolute path leaves unused, it is
        # linkat(), which can follow what link() would not.
        os.link(f"/proc/self/fd/{file.fd}", location, src_dir_fd=file.fd, follow_symlinks=True)
    except FileExistsError as exc:
        file.close()
        raise FileExistsError(exc.errno, exc.strerror) from None  # it names both
    except OSError:  # no /proc, or for a reason that shows again
        return False
    # Opened anew by its name: for as long as it lives, the first descriptor, and with it the map,
    # is shown as that of a deleted file.
    with suppress(OSError):
        fd = os.open(location, os.O_RDWR | SAFE_FLAGS)
        if os.path.samestat(os.fstat(fd), os.fstat(file.fd)):
            fd, file.fd = file.fd, fd
        os.close(fd)
    return True


def _whole(file: File, length: int, *, new: bool = False) -> File:
    """The file with its length and its blocks; else it is closed, and withdrawn if it was made."""
    try:
        file.inspect(writable=True)
        grow_file(file, length, new=new)
    except BaseException:
        withdraw(file)
        raise
    return file


def grow_file(file: File, length: int, *, new: bool) -> None:
    """Reserve blocks up to ``length``, then make the file as long; it is never cut."""
    size = file.size()
    if size > length:
        raise ValueError(
            f"the file has {size} bytes, more than the {length} asked for; open it instead, or "
            f"choose a length of at least {size}"
        )
    if (size == 0 or file.reserve(0, size)) and (size == length or file.grow(length)):
        return
    if new:
        _write_zeros(file, length)
    elif size < length:
        file.set_size(length)


def _write_zeros(file: File, length: int) -> None:
    # Only for a file that nobody else knows yet; in one that others have open it would race
    # with their writes. There the file only grows, and a full disk shows at the first store.
    with naming(file.filename), open(file.fd, "wb", buffering=0, closefd=False) as raw:
        zeros = memoryview(bytes(min(length, _ZEROS)))
        while length > 0:
            length -= raw.write(zeros[:length])


def withdraw(file: File) -> None:
    """Close a file that came to nothing; one that we made is removed."""
    if file.made:
        remove_file(file)
    else:
        file.close()


def remove_file(file: File) -> None:
    """
    Close a file that we created, and take it back unless the name is another file's by now.

    It must not be mapped any more: Windows keeps the name of what is mapped or open.
    """
    assert file.location is not None
    # Gone already, or it has to stay; the error on its way says more.
    with suppress(OSError):
        try:
            # Before it is closed: a number that is free is soon another file's.
            ours = os.fstat(file.fd)
            theirs = os.stat(file.location, follow_symlinks=False)
        finally:
            file.close()
        if os.path.samestat(ours, theirs):
            os.unlink(file.location)
