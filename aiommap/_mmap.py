"""The map that users open."""

from __future__ import annotations

import warnings
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Never, Self, SupportsIndex

from anyio import AsyncFile, CapacityLimiter
from anyio.lowlevel import checkpoint_if_cancelled

from . import _kernel, _workers
from ._arguments import (
    HasFileno,
    StrOrBytesPath,
    check_file_range,
    check_limiter,
    check_path,
    descriptor,
)
from ._file import duplicate_file, open_file
from ._file_creation import create_file, remove_file, withdraw
from ._map_making import map_file, map_memory, map_opened
from ._map_shape import MapShape
from ._mapping import Mapping
from ._open_map import MmapStatistics, OpenMap
from ._opening import Opening
from ._options import MmapOptions, Protection
from ._ranges import as_int, check_length, check_part
from ._view import MmapView, ViewOpening

if TYPE_CHECKING:
    from collections.abc import Callable


class AsyncMmap(MapShape):
    """
    A file, or memory without one, mapped for the tasks of an event loop.

    Comes from :meth:`open_path`, :meth:`open`, :meth:`open_with_offset`, :meth:`create` and
    :meth:`anonymous`, each of which can be awaited or entered::

        async with AsyncMmap.open_path("data.bin", "r+") as m:
            async with m.view_mut(0, 4096) as v:
                v[0:5] = b"hello"
            await m.flush()

    The event loop never waits for the disk: pages come in, bytes are copied and flushes run in
    worker threads. A map belongs to the event loop that opened it. Offsets and lengths are in
    bytes from the start of the map.
    """

    __slots__ = ()

    _kernel: ClassVar[_kernel.Kernel] = _kernel.native

    def __init__(self, core: OpenMap | None = None, *_: Never) -> None:
        """Not for users: the ``open`` methods make maps."""
        if not isinstance(core, OpenMap):
            raise TypeError(
                f"{type(self).__name__} is not made by calling it: use open_path(), open(), "
                f"open_with_offset(), create() or anonymous()"
            )
        super().__init__(core)

    # Opening

    @classmethod
    def open(
        cls,
        file: int | HasFileno | AsyncFile[Any],
        protection: Protection | str = Protection.READ,
        *,
        limiter: CapacityLimiter | None = None,
    ) -> Opening[Self]:
        """
        Map the whole of a file that is open already.

        The map has a descriptor of its own and outlives the caller's. On Linux the file is
        opened once more where that is allowed, with the same rights. Where it is not (rights
        that the process has given up, other systems), the map shares the caller's open file, and
        with it the kernel's one report of a failed write-back.

        :param file: a descriptor, or anything with ``fileno()``, an :class:`anyio.AsyncFile`
            too
        :param protection: a :class:`Protection` or its value
        :param limiter: how many threads the map's work may use at once; one limiter of the
            event loop for all maps by default
        :raises ValueError: the file is empty
        :raises OSError: what the kernel says, with the path where it is known
        """
        return cls._open_descriptor(file, protection, 0, None, limiter)

    @classmethod
    def open_with_offset(
        cls,
        file: int | HasFileno | AsyncFile[Any],
        protection: Protection | str,
        offset: SupportsIndex,
        length: SupportsIndex | None = None,
        *,
        limiter: CapacityLimiter | None = None,
    ) -> Opening[Self]:
        """
        Map a range of a file that is open already, from any byte. See :meth:`open`.

        :param offset: first byte of the file to map; need not be a multiple of anything
        :param length: bytes, at least 1; None for the rest of the file
        :raises ValueError: the range is not inside the file
        """
        return cls._open_descriptor(file, protection, offset, length, limiter)

    @classmethod
    def _open_descriptor(
        cls,
        file: int | HasFileno | AsyncFile[Any],
        protection: Protection | str,
        offset: SupportsIndex,
        length: SupportsIndex | None,
        limiter: CapacityLimiter | None,
    ) -> Opening[Self]:
        protection = Protection.parse(protection)
        offset, length = check_file_range(offset, length)
        descriptor(file)
        kernel = cls._kernel

        def prepare() -> Callable[[], Mapping]:
            # On the loop, which it does not hold up, and before the first await: the caller
            # may close the descriptor once we wait. Asked again, because the file may have been
            # closed since, and its descriptor be another file's by now.
            fd, filename = descriptor(file)
            ours = duplicate_file(kernel, fd, filename)
            return partial(map_opened, ours, protection, offset, length)

        return Opening(partial(cls._open, prepare, check_limiter(limiter)))

    @classmethod
    def open_path(
        cls,
        path: StrOrBytesPath,
        protection: Protection | str = Protection.READ,
        *,
        offset: SupportsIndex = 0,
        length: SupportsIndex | None = None,
        limiter: CapacityLimiter | None = None,
    ) -> Opening[Self]:
        """
        Map a file, or a range of it, by path.

        Symbolic links are followed. READ_COPY needs no more than permission to read.

        :param path: of a regular file that is not empty
        :param protection: a :class:`Protection` or its value
        :param offset: first byte of the file to map; need not be a multiple of anything
        :param length: bytes, at least 1; None for the rest of the file
        :param limiter: see :meth:`open`
        :raises ValueError: the file is empty, or the range is not inside it
        :raises OSError: what the kernel says, with the path; ENODEV for what is no file
        """
        protection = Protection.parse(protection)
        offset, length = check_file_range(offset, length)
        name = check_path(path)
        kernel = cls._kernel

        def opened() -> Mapping:
            return map_opened(open_file(kernel, name, protection), protection, offset, length)

        return Opening(partial(cls._open, lambda: opened, check_limiter(limiter)))

    @classmethod
    def create(
        cls,
        path: StrOrBytesPath,
        length: SupportsIndex,
        *,
        exist_ok: bool = False,
        mode: int = 0o666,
        limiter: CapacityLimiter | None = None,
    ) -> Opening[Self]:
        """
        Make a file of a given length and map it READ_WRITE.

        Its blocks are reserved, so that a full disk is an error here and not a crash at a
        store later; file and name are durable when this returns. No new file is left behind
        when it fails or is cancelled, but with ``exist_ok`` one that was whole by then: others
        may be using it.

        :param path: a relative one leads on from the directory that is current when the work
            begins
        :param length: bytes, at least 1
        :param exist_ok: map the file that is there, if one is: it keeps its content and grows,
            and may have grown when this fails
        :param mode: permissions of a new file, before the umask
        :raises FileExistsError: it is there, and ``exist_ok`` is false
        :raises ValueError: it is there and longer than ``length``
        :raises OSError: ENOSPC, EDQUOT: there is no room for it
        """
        name = check_path(path)
        length = check_length(length)
        mode = as_int(mode, "mode")
        if not 0 <= mode <= 0o7777:
            raise ValueError(f"mode must be from 0 to 0o7777, not {mode}")
        kernel = cls._kernel

        def created() -> Mapping:
            file = create_file(kernel, name, length, exist_ok=exist_ok, mode=mode)
            try:
                return map_file(file, Protection.READ_WRITE, 0, length)
            except BaseException:
                withdraw(file)
                raise

        def discard(mapping: Mapping) -> None:
            if mapping.file is not None and mapping.file.made:
                mapping.unmap()
                remove_file(mapping.file)

        return Opening(partial(cls._open, lambda: created, check_limiter(limiter), discard))

    @classmethod
    def anonymous(
        cls,
        length: SupportsIndex,
        protection: Protection | str = Protection.READ_WRITE,
        *,
        limiter: CapacityLimiter | None = None,
    ) -> Opening[Self]:
        """
        Zero-filled memory without a name, shared with forked children.

        READ_COPY memory is private to each process instead.

        :param length: bytes, at least 1
        :raises OSError: ENOMEM
        """
        return cls.anonymous_with_options(length, protection, MmapOptions(), limiter=limiter)

    @classmethod
    def anonymous_with_options(
        cls,
        length: SupportsIndex,
        protection: Protection | str = Protection.READ_WRITE,
        options: MmapOptions | None = None,
        *,
        limiter: CapacityLimiter | None = None,
    ) -> Opening[Self]:
        """
        As :meth:`anonymous`, made as ``options`` say.

        :raises OSError: ENOMEM; with ``huge`` also when no huge pages are reserved
        """
        length = check_length(length)
        protection = Protection.parse(protection)
        if options is None:
            options = MmapOptions()
        elif not isinstance(options, MmapOptions):
            raise TypeError(f"options must be MmapOptions, not {options!r}")
        made = partial(map_memory, cls._kernel, length, protection, options)
        return Opening(partial(cls._open, lambda: made, check_limiter(limiter)))

    @classmethod
    async def _open(
        cls,
        prepare: Callable[[], Callable[[], Mapping]],
        limiter: CapacityLimiter | None,
        discard: Callable[[Mapping], object] = lambda mapping: None,
    ) -> Self:
        await checkpoint_if_cancelled()  # of a task that is cancelled already nothing begins
        calls = [prepare()]
        try:
            mapping = await _workers.run(calls[0], limiter=limiter, discard=discard)
        except GeneratorExit:
            raise
        except BaseException:
            # It never began: a descriptor that was duplicated for it is closed by a worker.
            await _workers.finish(calls.clear)
            raise
        return cls(OpenMap(cls._kernel, mapping, limiter))

    # What it is

    def __len__(self) -> int:
        """
        Bytes of the map.

        :raises ClosedResourceError: it is closed and gone
        """
        return self._core.mapping.length

    @property
    def protection(self) -> Protection:
        """What may be done with the memory."""
        return self._core.mapping.protection

    @property
    def offset(self) -> int:
        """Where the map begins in its file, in bytes."""
        return self._core.mapping.offset

    @property
    def private(self) -> bool:
        """Whether stores stay in this process: READ_COPY, of a file or of memory."""
        return self._core.mapping.private

    @property
    def closed(self) -> bool:
        """Whether the map was closed, or consumed by :meth:`into_view`."""
        return self._core.closed

    def ptr(self) -> int:
        """The address of the first byte, valid while the map is open and not resized."""
        self._core.check_open()
        return self._core.mapping.address

    def mut_ptr(self) -> int:
        """
        As :meth:`ptr`, to store to.

        :raises PermissionError: the map is not writable
        """
        self._core.check_open()
        self._core.check_writable()
        self._core.raw_stores()
        return self._core.mapping.address

    def as_slice(self) -> memoryview:
        """
        The memory of the whole map, read-only: no lock, no page-in, no checks.

        Touching it may wait for the disk with the event loop, and is SIGBUS where the file was
        truncated: the caller's responsibility, as ``unsafe`` is in Rust. It keeps the memory
        mapped, also after the map was closed. May be called in any thread.
        """
        self._core.check_open()
        mapping = self._core.mapping
        return mapping.buffer(0, mapping.length, writable=False)

    def as_mut_slice(self) -> memoryview:
        """
        As :meth:`as_slice`, writable.

        :raises PermissionError: the map is not writable
        """
        self._core.check_open()
        self._core.check_writable()
        self._core.raw_stores()
        mapping = self._core.mapping
        return mapping.buffer(0, mapping.length, writable=True)

    def statistics(self) -> MmapStatistics:
        """What the map has done so far, and what waits."""
        return self._core.statistics()

    @_workers.forgetful
    async def file_size(self) -> int:
        """
        Bytes of the file now, which another process may have changed. A checkpoint.

        The map's own length for memory without a file.
        """
        mapping = self._checked()
        file = mapping.file
        if file is None:
            await self._core.loop.checkpoint()
            return mapping.length
        return await self._core.run(file.size)

    def __repr__(self) -> str:
        core = self._core
        if core.closed:
            return f"<{type(self).__name__} closed>"
        mapping = core.mapping
        name = "anonymous memory"
        if mapping.file is not None and not mapping.file.anonymous:
            name = repr(mapping.file.filename) if mapping.file.filename else "a file"
        return (
            f"<{type(self).__name__} of {name}, {mapping.length} bytes from {mapping.offset}, "
            f"{mapping.protection.name}, {core.views} views>"
        )

    # Views

    def view(
        self, offset: SupportsIndex = 0, length: SupportsIndex | None = None, *, load: bool = True
    ) -> ViewOpening:
        """
        A view of a region, held shared: other readers may hold it too, writers wait.

        Awaited or entered. A checkpoint; O(log n) in the number of regions held.

        :param length: bytes; None for the rest of the map
        :param load: bring the region's pages in first, off the loop. False for regions too
            large for that: touching a page that is not there stops the event loop
        :raises ValueError: the region is not inside the map
        :raises DeadlockError: the task holds the region exclusively, or tasks wait in a circle
        :raises TruncatedError: the file does not reach the region (with ``load``)
        :raises OSError: what the disk says (with ``load``)
        :raises ClosedResourceError: the map is closed, or was while this waited
        """
        return ViewOpening(self._core, offset, length, False, load)

    def view_mut(
        self, offset: SupportsIndex = 0, length: SupportsIndex | None = None, *, load: bool = True
    ) -> ViewOpening:
        """
        A view of a region, held exclusively, with a writable buffer. See :meth:`view`.

        With ``load``, regions up to 256 KiB come with their pages ready for stores, which
        dirties them; in larger ones holes are filled, and the first store into a page may
        wait for the file system.

        :raises PermissionError: the map is not writable
        :raises OSError: also ENOSPC, for a hole that has no room
        """
        self._core.check_writable()
        return ViewOpening(self._core, offset, length, True, load)

    def view_nowait(
        self, offset: SupportsIndex = 0, length: SupportsIndex | None = None
    ) -> MmapView:
        """
        As :meth:`view`, at once and without loading pages. Not a checkpoint.

        :raises ValueError: the region is not inside the map
        :raises ClosedResourceError: the map is closed
        :raises WouldBlock: the region is not free
        :raises DeadlockError: the task holds it in a conflicting way
        """
        return self._view_nowait(offset, length, False)

    def view_mut_nowait(
        self, offset: SupportsIndex = 0, length: SupportsIndex | None = None
    ) -> MmapView:
        """
        As :meth:`view_mut`, at once and without loading pages. See :meth:`view_nowait`.

        :raises PermissionError: the map is not writable
        """
        self._core.check_writable()
        return self._view_nowait(offset, length, True)

    def _view_nowait(
        self, offset: SupportsIndex, length: SupportsIndex | None, exclusive: bool
    ) -> MmapView:
        core = self._core
        core.check()
        offset, length = check_part(offset, length, core.mapping.length)
        claim = core.lock.acquire_nowait(offset, offset + length, exclusive)
        return MmapView(core, claim, offset, length, claim.owner, exclusive)

    # The end

    async def aclose(self, *, flush: bool = True) -> None:
        """
        Close the map. Safe to call again; while the first call flushes, a second one returns.

        New requests, and those that wait for a region, get
        :exc:`~anyio.ClosedResourceError`. Views that are out stay usable; memory and
        descriptor go with the last of them, or with the last raw buffer. It closes under every
        cancellation, and then does not flush.

        :param flush: make durable what was written
        :raises FlushError: this flush failed, or an earlier one that was not cleared; the map
            is closed
        """
        core = self._core
        core.check_loop()
        if core.closed:
            await core.loop.checkpoint()
            return
        core.begin_close(flush_at_end=flush)
        await core.end(flush=flush)

    async def __aenter__(self) -> Self:
        self._core.check()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is GeneratorExit:
            # The coroutine of the block is being closed, by the garbage collector maybe, in any
            # thread and in the middle of anything: nothing can be awaited.
            self._core.close_forgotten()
        else:
            await self.aclose(flush=exc_type is None)

    def __del__(self) -> None:
        core = getattr(self, "_core", None)
        if core is not None and not core.closed and not core.closing:
            warnings.warn(
                f"{self!r} was dropped without being closed",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
