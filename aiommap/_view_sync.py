"""The view without the one-task rule: for several tasks, and for worker threads."""

from __future__ import annotations

import os
from typing import Self, SupportsIndex

import anyio
from anyio import ClosedResourceError

from ._open_map import OpenMap
from ._typing import Buffer
from ._view import View
from ._wait_graph import Claim


class MmapViewSync(View):
    """
    A hold on a region that several tasks and worker threads use together.

    Comes from :meth:`AsyncMmap.into_view_sync <aiommap.AsyncMmap.into_view_sync>`. Its buffer,
    items and slices are free to use in any thread; whatever is awaited belongs to the map's
    event loop, and a thread calls it with :func:`anyio.from_thread.run`. Calls that move the
    cursor take turns. Who touches which bytes is up to its users: :meth:`split_at` gives each
    its own part.
    """

    __slots__ = ("_handles", "_turn")

    def __init__(
        self, core: OpenMap, claim: Claim, offset: int, length: int, writable: bool
    ) -> None:
        # How many handles the claim has, shared by them; counted in the map's event loop alone.
        self._handles = [1]
        self._turn = anyio.Lock()
        super().__init__(core, claim, offset, length, None, writable)

    def _use(self) -> Claim:
        claim = self._claim
        if claim is None:
            raise ClosedResourceError("the view is closed")
        return claim

    def _use_in_loop(self) -> Claim:
        claim = self._use()
        self._core.check_loop()
        return claim

    def _part(self, claim: Claim, offset: int, length: int) -> MmapViewSync:
        return MmapViewSync(self._core, claim, offset, length, self._writable)

    def _check_alone(self, what: str) -> None:
        self._use_in_loop()
        if self._handles[0] > 1:
            self._core.lock.release_abandoned()  # clones that were dropped
        if self._handles[0] > 1:
            raise BufferError(
                f"cannot {what} while {self._handles[0] - 1} clones of it are open: close them "
                f"first"
            )
        if self._copies:
            raise BufferError(f"cannot {what} while another task reads or writes through it")

    def clone(self) -> MmapViewSync:
        """
        Another handle on the same region; the region is free when the last one closes.

        Each has its own buffer and cursor. Not a checkpoint.
        """
        claim = self._use_in_loop()
        clone = MmapViewSync(self._core, claim, self._offset, self._length, self._writable)
        clone._handles = self._handles
        self._handles[0] += 1
        return clone

    def split_at(self, n: SupportsIndex) -> tuple[Self, Self]:
        self._check_alone("split the view")
        return super().split_at(n)

    def restrict(self, offset: SupportsIndex, length: SupportsIndex) -> None:
        self._check_alone("restrict the view")
        super().restrict(offset, length)

    def downgrade(self) -> None:
        self._check_alone("downgrade the view")
        super().downgrade()

    def _leave(self, claim: Claim) -> None:
        if not _leave_to_others(self._core, self._handles):
            super()._leave(claim)

    def _leave_soon(self, claim: Claim) -> None:
        core, handles = self._core, self._handles  # not the view: it is gone by then

        def leave(claim: Claim) -> None:
            if not _leave_to_others(core, handles):
                core.leave_forgotten(claim)

        # Two threads may drop the last two at the same time.
        core.lock.drop(claim, leave)

    # One call at a time moves the cursor: each sees it where the one before has left it.

    async def seek(self, offset: SupportsIndex, whence: int = os.SEEK_SET) -> int:
        self._use_in_loop()
        async with self._turn:
            return await super().seek(offset, whence)

    async def read(self, size: SupportsIndex | None = -1) -> bytes:
        self._use_in_loop()
        async with self._turn:
            return await super().read(size)

    async def readinto(self, buffer: Buffer) -> int:
        self._use_in_loop()
        async with self._turn:
            return await super().readinto(buffer)

    async def readline(self, size: SupportsIndex | None = -1) -> bytes:
        self._use_in_loop()
        async with self._turn:
            return await super().readline(size)

    async def write(self, data: Buffer) -> int:
        self._use_in_loop()
        async with self._turn:
            return await super().write(data)


def _leave_to_others(core: OpenMap, handles: list[int]) -> bool:
    """A handle is gone; whether others keep the region."""
    if handles[0] == 1:
        return False
    handles[0] -= 1
    core.views -= 1
    return True
