"""Views: a task's hold on a region, and the binary file that it is besides."""

from __future__ import annotations

import os
from collections.abc import Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

from anyio import BusyResourceError, ClosedResourceError

from . import _buffers
from ._open_map import OpenMap
from ._opening import NOTHING
from ._ranges import as_int, check_part
from ._region_view import RegionView
from ._typing import Buffer
from ._uncopyable import Uncopyable
from ._wait_graph import Claim, name_of

_LINE = 4096
"""Bytes that readline() looks at first; doubled until the line ends. A page."""


class View(RegionView):
    """
    What both kinds of view do: a hold on a region that is a binary file as well.

    As a binary :class:`anyio.AsyncFile` it copies, safe from SIGBUS, at a cursor of its own.
    """

    __slots__ = ()

    async def tell(self) -> int:
        """The cursor, in bytes from the start of the view. A checkpoint."""
        self._use_in_loop()
        await self._core.loop.checkpoint()
        return self._cursor

    async def seek(self, offset: SupportsIndex, whence: int = os.SEEK_SET) -> int:
        """
        Move the cursor. A checkpoint.

        :param offset: bytes from where ``whence`` says: 0 the start, 1 the cursor, 2 the end
        :return: the cursor
        :raises ValueError: the place is outside the view; the cursor stays
        """
        self._use_in_loop()
        offset = as_int(offset, "offset")
        if whence == os.SEEK_SET:
            target = offset
        elif whence == os.SEEK_CUR:
            target = self._cursor + offset
        elif whence == os.SEEK_END:
            target = self._length + offset
        else:
            raise ValueError(f"whence must be 0, 1 or 2, not {whence!r}")
        if not 0 <= target <= self._length:
            raise ValueError(f"cannot seek to {target} in a view of {self._length} bytes")
        await self._core.loop.checkpoint()
        self._cursor = target
        return target

    async def read(self, size: SupportsIndex | None = -1) -> bytes:
        """
        A copy of the next bytes, fewer at the end. A checkpoint.

        :param size: bytes at most; None or negative for all the rest
        :raises TruncatedError: the file does not reach them any more
        :raises OSError: what the disk says
        """
        self._use_in_loop()
        count = self._next_bytes(size)
        start = self._cursor
        async with _Copy(self):
            await self._core.loop.checkpoint()
            data = await self._core.read(self._offset + start, count)
        self._cursor = start + count
        return data

    def _next_bytes(self, size: SupportsIndex | None) -> int:
        rest = self._length - self._cursor
        if size is None:
            return rest
        size = as_int(size, "size")
        return rest if size < 0 else min(size, rest)

    async def readinto(self, buffer: Buffer) -> int:
        """
        Copy the next bytes into a buffer. A checkpoint.

        :return: bytes copied: the buffer's size, fewer at the end
        :raises OSError: as :meth:`read`
        """
        self._use_in_loop()
        target = _buffers.writable(buffer)
        count = self._next_bytes(len(target))
        start = self._cursor
        try:
            async with _Copy(self):
                await self._core.loop.checkpoint()
                await self._core.read_into(self._offset + start, target[:count])
        finally:
            del target  # who keeps an error, and this frame with it, may still resize the buffer
        self._cursor = start + count
        return count

    async def readline(self, size: SupportsIndex | None = -1) -> bytes:
        """
        The next bytes up to and with a newline, or to the end. A checkpoint.

        :param size: bytes at most; None or negative for no limit
        :raises OSError: as :meth:`read`
        """
        self._use_in_loop()
        most = self._next_bytes(size)
        start = self._cursor
        parts: list[bytes] = []
        count = 0
        step = _LINE
        async with _Copy(self):
            await self._core.loop.checkpoint()
            while count < most:
                part = await self._core.read(self._offset + start + count, min(step, most - count))
                end = part.find(b"\n") + 1
                part = part[:end] if end else part
                parts.append(part)
                count += len(part)
                if end:
                    break
                step *= 2
        self._cursor = start + count
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __aiter__(self) -> Self:
        """The lines from the cursor on."""
        return self

    async def __anext__(self) -> bytes:
        line = await self.readline()
        if not line:
            raise StopAsyncIteration
        return line

    async def write(self, data: Buffer) -> int:
        """
        Store bytes at the cursor, all of them. A checkpoint. The view never grows.

        :return: bytes stored
        :raises PermissionError: the view is read-only
        :raises ValueError: they do not fit; nothing was stored
        :raises TruncatedError: the file does not reach the place any more
        :raises OSError: ENOSPC for a hole without room, what the disk says otherwise
        """
        self._use_in_loop()
        self._check_writable()
        source = _buffers.readable(data)
        start = self._cursor
        if len(source) > self._length - start:
            raise ValueError(
                f"{len(source)} bytes do not fit at {start} in a view of {self._length} bytes"
            )
        count = len(source)
        try:
            async with _Copy(self):
                await self._core.loop.checkpoint()
                await self._core.write(self._offset + start, source)
        finally:
            del source  # as in readinto()
        self._cursor = start + count
        return count


class _Copy:
    """A copy of a view's that is under way: who ends the last one ends a view closed meanwhile."""

    __slots__ = ("_view",)

    def __init__(self, view: View) -> None:
        self._view = view

    async def __aenter__(self) -> None:
        self._view._copies += 1

    async def __aexit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        view = self._view
        view._copies -= 1
        claim = view._leaving
        if claim is None or view._copies:
            return
        view._leaving = None
        if exc_type is GeneratorExit:  # forgotten, and closed in any thread
            view._leave_soon(claim)
        else:
            view._leave(claim)
            await view._finish(True, failed=exc_type is not None)


class MmapView(View):
    """
    A task's hold on a region of a map: shared and read-only, or exclusive and writable.

    Comes from :meth:`AsyncMmap.view <aiommap.AsyncMmap.view>` and its siblings, with the pages
    of the region in memory::

        async with m.view_mut(0, 4096) as v:
            v[0:5] = b"hello"
            await v.flush()

    It belongs to the task that took it, or, should that end without having closed it
    (``asyncio.gather()`` puts one around), to the next one that uses it; the halves of
    :meth:`split_at` belong to the first task that enters or uses them. The memory itself
    (:attr:`buffer`) is not guarded: who hands it on has to see to that.
    """

    __slots__ = ()

    def _use(self) -> Claim:
        claim = self._claim
        if claim is None:
            raise ClosedResourceError("the view is closed")
        core = self._core
        try:
            task = core.loop.current_task()
        except RuntimeError:  # no event loop here
            task = None
        if task is not self._owner or task is None:
            core.check_loop()
            if task is None or not (self._owner is None or self._was_taken_for_another()):
                raise self._busy()
            self._owner = task
            core.lock.adopt(claim)
        return claim

    _use_in_loop = _use

    def _was_taken_for_another(self) -> bool:
        """
        Whether the task that took it was one around that await only, and has ended:
        ``asyncio.gather()``, ``asyncio.wait_for()`` before Python 3.12.
        """
        return self._owner is self._taker and self._core.loop.has_ended(self._owner)

    def _busy(self) -> BusyResourceError:
        error = BusyResourceError("using")
        whose = "no task yet" if self._owner is None else name_of(self._owner)
        error.add_note(
            f"{self!r} belongs to {whose}, and this is another one or none: take a view in the "
            f"task that uses it, or hand over parts with split_at()"
        )
        return error

    def _part(self, claim: Claim, offset: int, length: int) -> MmapView:
        return MmapView(self._core, claim, offset, length, None, self._writable)


class ViewOpening(Uncopyable):
    """
    A view that will be taken when this is awaited or entered, once.

    An :class:`~aiommap._opening.Opening`, written out: taking a view is the most frequent
    thing that a program does with a map, and every coroutine on the way costs.
    """

    __slots__ = ("_asker", "_core", "_exclusive", "_length", "_load", "_offset", "_view")

    def __init__(
        self,
        core: OpenMap,
        offset: SupportsIndex,
        length: SupportsIndex | None,
        exclusive: bool,
        load: bool,
    ) -> None:
        if core.closed:
            core.check()  # raises
        self._core: OpenMap | None = core
        self._offset, self._length = check_part(offset, length, core.mapping.length)
        self._exclusive = exclusive
        self._load = load
        try:
            self._asker = core.lock.asking_task()
        except RuntimeError:  # made outside of an event loop
            self._asker = None

    async def __aenter__(self) -> MmapView:
        core, self._core = self._core, None
        if core is None:
            raise RuntimeError("already awaited or entered: call again for another one")
        lock = core.lock
        offset = self._offset
        length = self._length
        exclusive = self._exclusive
        task = lock.check_entry()
        claim = Claim(offset, offset + length, exclusive, task)
        waited = not lock.queue.add_if_free(claim)
        if waited:
            await lock.wait_for((claim,))
        try:
            if not waited:
                await core.loop.checkpoint()
            if not self._load:
                core.still_inside(offset, length)
            elif not core.is_ready_nowait(offset, length, exclusive):
                await core.make_ready(offset, length, write=exclusive)
                core.still_inside(offset, length)
            if exclusive:
                core.check_writable()
            view = self._view = MmapView(core, claim, offset, length, task, exclusive)
        except BaseException as error:
            lock.leave(claim, type(error))
            raise
        return view

    def __await__(self) -> Generator[Any, Any, MmapView]:
        return self._take().__await__()

    async def _take(self) -> MmapView:
        view = await self.__aenter__()
        del self._view  # so that dropping it is noticed
        # Its region counts as held by that task, until one uses or enters the view.
        claim = view._claim
        assert claim is not None
        view._core.lock.hand_to(self._asker, claim, self)
        view._owner = view._taker = claim.owner
        return view

    if TYPE_CHECKING:
        # As AbstractAsyncContextManager has it, for AsyncExitStack and its like.
        async def __aexit__(
            self,
            exc_type: type[BaseException] | None,
            exc_value: BaseException | None,
            traceback: TracebackType | None,
        ) -> None: ...

    else:

        def __aexit__(self, exc_type, exc_value, traceback):
            view = self._view
            if exc_type is None and view._claim is not None and not view._core.closed:
                # As the view's own, without a coroutine where there is nothing to wait for.
                return NOTHING if view._give_back() else view._finish(False, failed=False)
            return view.__aexit__(exc_type, exc_value, traceback)
