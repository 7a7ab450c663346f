"""A map takes another shape: another length, another protection, or a view for a map."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import SupportsIndex

from . import _reshaping, _workers
from ._map_access import MapAccess
from ._mapping import Mapping
from ._open_map import OpenMap
from ._opening import Opening
from ._options import Protection
from ._pins import Pins
from ._ranges import LARGEST_OFFSET, check_length
from ._view import MmapView
from ._view_sync import MmapViewSync
from ._wait_graph import Claim


class MapShape(MapAccess):
    """What needs the whole of the map: each call waits until no region is held."""

    __slots__ = ()

    @_workers.forgetful
    async def resize(self, length: SupportsIndex) -> None:
        """
        Give the map, and the file with it, another length. A checkpoint.

        Waits until no region is held. Growing reserves blocks; the new size is durable with
        the next flush. Addresses change, pins and advice end. After an error or a cancellation
        the map is the old or the new one, whole. On macOS it flushes what was written first.

        :param length: bytes, at least 1
        :raises DeadlockError: the task has a view of the map
        :raises BufferError: raw buffers are out; nothing has changed
        :raises PermissionError: the map is not writable
        :raises ValueError: READ_COPY of a file; or it would cut off what the file has behind
            the map
        :raises OSError: ENOSPC, EDQUOT, EFBIG, ENOMEM; ENOTSUP on Windows, where the file of a
            map cannot be made shorter: close all maps of it and truncate it
        """
        core = self._core
        core.check()
        core.check_writable()
        length = check_length(length)
        if core.mapping.private and core.mapping.file is not None:
            raise ValueError(
                "a READ_COPY map cannot be resized, because its stores are not in the file: "
                "open it again with the length it should have"
            )
        claim = await core.lock.acquire(0, LARGEST_OFFSET, True)
        with core.lock.holding(claim):
            core.check_writable()
            self._check_no_buffers()

            # The mapping in no variable of ours: its end is for a worker.
            def resized() -> Mapping:
                return _reshaping.resized(core.mapping, length)

            # The same length makes a file long again that was truncated.
            if length < core.mapping.length:
                await self._reshape(partial(core.flusher.cut, resized, length), resized=True)
            elif length > core.mapping.length or await core.run(core.mapping.reach) < length:
                await self._reshape(resized, resized=True)

    @_workers.forgetful
    async def set_protection(self, protection: Protection | str) -> None:
        """
        Map the same bytes with another protection. A checkpoint.

        Waits until no region is held. READ, READ_WRITE and READ_EXECUTE change into each
        other as far as the descriptor's rights go. Addresses change, pins and advice end. On
        macOS it flushes what was written first.

        :raises DeadlockError: the task has a view of the map
        :raises BufferError: raw buffers are out; nothing has changed
        :raises PermissionError: the file was opened with fewer rights; the map stays usable
        :raises ValueError: to or from READ_COPY, which is not the same memory
        """
        core = self._core
        core.check()
        protection = Protection.parse(protection)
        old = core.mapping.protection
        if protection is not old and Protection.READ_COPY in (protection, old):
            raise ValueError(
                f"{old.name} cannot become {protection.name}: private memory and the file's are "
                f"not the same bytes; open it again"
            )
        claim = await core.lock.acquire(0, LARGEST_OFFSET, True)
        with core.lock.holding(claim):
            self._check_no_buffers()
            if protection is not core.mapping.protection:
                await self._reshape(
                    lambda: _reshaping.protected(core.mapping, protection), resized=False
                )

    def _check_no_buffers(self) -> None:
        if self._core.mapping.exported():
            raise BufferError(
                "cannot change the map while buffers of its memory are out: release or delete "
                "slices and arrays over it first"
            )

    async def _reshape(self, change: Callable[[], Mapping], *, resized: bool) -> None:
        core = self._core
        await core.flush_before_mapping()
        self._check_no_buffers()
        made: list[Mapping] = []
        try:
            # A cancelled task stays until the worker has finished.
            await core.run(lambda: made.append(change()))
        except GeneratorExit:
            made.clear()  # forgotten: nothing can be awaited
            raise
        finally:
            if made:
                self._pins = Pins()
                old = core.replace(made.pop(), resized=resized)
                await _workers.finish(old.clear)

    def into_view(self) -> Opening[MmapView]:
        """
        Give the map up for one view of all of it, which can be split.

        The view is exclusive, or shared if the map is not writable; nothing is loaded. The
        map's own calls raise :exc:`~anyio.ClosedResourceError` from then on; it flushes and
        closes with the last view that was split from this one. A checkpoint.

        :raises DeadlockError: the task has a view of the map
        """
        self._core.check()
        return Opening(partial(_into_view, self._core))

    def into_view_sync(self) -> Opening[MmapViewSync]:
        """As :meth:`into_view`, for a view that several tasks and threads may use."""
        self._core.check()
        return Opening(partial(_into_view_sync, self._core))


async def _take_all(core: OpenMap) -> tuple[Claim, int, bool]:
    writable = core.mapping.protection.writable
    claim = await core.lock.acquire(0, LARGEST_OFFSET, writable)
    try:
        # Closed, consumed or changed by another task before this one went on?
        core.check()
        if core.mapping.protection.writable != writable:
            raise PermissionError("the map's protection was changed meanwhile: try again")
    except BaseException:
        core.lock.release(claim)
        raise
    core.begin_close(flush_at_end=True)
    length = core.mapping.length
    core.lock.restrict(claim, 0, length)
    return claim, length, writable


async def _into_view(core: OpenMap) -> MmapView:
    claim, length, writable = await _take_all(core)
    return MmapView(core, claim, 0, length, claim.owner, writable)


async def _into_view_sync(core: OpenMap) -> MmapViewSync:
    claim, length, writable = await _take_all(core)
    core.lock.disown(claim)
    return MmapViewSync(core, claim, 0, length, writable)
