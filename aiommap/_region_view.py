"""A hold on a region: its memory, its shape, its flushes and its end.

A view is a claim on the region, a buffer over its bytes and a cursor. It is closed without
waiting for anything: buffer, claim, count, in that order and before the first await, so that
no cancellation can come between. Only the last view of a map that was closed before it has
more to do, and waits for it. What makes it a file, and whose it is, is in ``_view.py``.
"""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Self, SupportsIndex, overload

from . import _buffers
from ._flusher import PendingFlush
from ._open_map import OpenMap
from ._ranges import check_part, check_range
from ._typing import Buffer
from ._uncopyable import Uncopyable
from ._wait_graph import Claim

_NO_STRAYS = _buffers.NONE


class RegionView(Uncopyable):
    """What a view holds, and how that ends. Subclasses say who may use it."""

    __slots__ = (
        "__weakref__",
        "_buffer",
        "_claim",
        "_copies",
        "_core",
        "_cursor",
        "_leaving",
        "_length",
        "_offset",
        "_owner",
        "_read_only",
        "_strays",
        "_taker",
        "_writable",
    )

    def __init__(
        self, core: OpenMap, claim: Claim, offset: int, length: int, owner: object, writable: bool
    ) -> None:
        self._core = core
        self._claim: Claim | None = claim
        self._offset = offset
        self._length = length
        self._owner = self._taker = owner
        self._writable = writable
        self._cursor = 0
        # Copies under way, and the claim that the last of them gives back, should the view be
        # closed meanwhile: they are in the region until then.
        self._copies = 0
        self._leaving: Claim | None = None
        self._buffer = core.mapping.buffer(offset, length, writable)
        self._read_only: memoryview | None = None  # what as_slice() gave of a writable view
        # Origins of buffers that were withdrawn in vain, see _withdraw_buffer().
        self._strays: list[object] = _NO_STRAYS
        core.views += 1
        if writable:
            core.written = True

    def _use(self) -> Claim:
        """Check that the caller may use the view's memory now."""
        raise NotImplementedError

    def _use_in_loop(self) -> Claim:
        """Check that the caller may use the view now, in the map's event loop."""
        raise NotImplementedError

    def _check_writable(self) -> None:
        if not self._writable:
            raise PermissionError("the view is read-only: take it with view_mut()")

    # What it is

    def __len__(self) -> int:
        """Bytes of the region."""
        return self._length

    @property
    def offset(self) -> int:
        """Where the region begins, in bytes from the start of the map."""
        return self._offset

    @property
    def writable(self) -> bool:
        """Whether the region is held exclusively and takes stores."""
        return self._writable

    @property
    def closed(self) -> bool:
        """Whether the region was given back."""
        return self._claim is None

    def __repr__(self) -> str:
        kind = "closed" if self.closed else "exclusive" if self._writable else "shared"
        end = self._offset + self._length
        return f"<{type(self).__name__} of bytes {self._offset} to {end}, {kind}>"

    # Plain memory

    @property
    def buffer(self) -> memoryview:
        """
        The bytes themselves, without a copy; writable if the view is.

        Plain memory, and so are arrays and slices over it: nobody checks who touches it, and
        touching bytes that another process truncates away is SIGBUS. It is released when the
        view closes, or by the caller (``with v.buffer as memory:``): then the view has another.

        :raises ClosedResourceError: the view is closed
        :raises BusyResourceError: the view belongs to another task
        """
        self._use()
        return self._memory()

    def _memory(self) -> memoryview:
        """The buffer, or another one if the user has released it: it may be entered, too."""
        try:
            self._buffer.nbytes  # noqa: B018
        except ValueError:
            strays = _buffers.release(self._buffer)
            if strays:  # what was made from it still counts
                self._strays = [*self._strays, *strays]
            self._make_buffer()
        return self._buffer

    @overload
    def __getitem__(self, key: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> bytes: ...
    def __getitem__(self, key: SupportsIndex | slice) -> int | bytes:
        """An int for an index, a copy for a slice; indices as in :class:`mmap.mmap`."""
        self._use()
        buffer = self._memory()
        if isinstance(key, slice):
            return bytes(buffer[key])
        return buffer[key]

    @overload
    def __setitem__(self, key: SupportsIndex, value: SupportsIndex) -> None: ...
    @overload
    def __setitem__(self, key: slice, value: Buffer) -> None: ...
    def __setitem__(self, key: SupportsIndex | slice, value: SupportsIndex | Buffer) -> None:
        """
        Store a byte, or as many bytes as the slice has.

        :raises TypeError: the view is read-only
        :raises ValueError: the sizes differ
        """
        self._use()
        buffer = self._memory()
        if isinstance(key, slice):
            if buffer.readonly:
                raise TypeError("cannot modify read-only memory")
            buffer[key] = _buffers.readable(value, "value")  # type: ignore[arg-type]
        else:
            buffer[key] = value  # type: ignore[call-overload]

    if not TYPE_CHECKING:  # there it is an error as it is

        def __delitem__(self, key):
            raise TypeError("a view does not lose bytes by del: use restrict()")

    # Indexing would make it iterable, byte by byte and slowly; lines are what files give.
    __iter__ = None

    def __bytes__(self) -> bytes:
        """A copy of the region."""
        self._use()
        return bytes(self._memory())

    def __buffer__(self, flags: int) -> memoryview:
        """``memoryview(view)``, from Python 3.12."""
        self._use()
        return self._memory()[:]

    def __release_buffer__(self, buffer: memoryview) -> None:
        # NumPy keeps the buffer of an object that would be told of its release, and of another one
        # no more than the address.
        buffer.release()

    def as_slice(self) -> memoryview:
        """The bytes without a copy, read-only. See :attr:`buffer`."""
        self._use()
        buffer = self._memory()
        if not self._writable:
            return buffer
        try:
            if self._read_only is not None and self._read_only.nbytes:
                return self._read_only
        except ValueError:  # as in _memory(); it shares its origin with the buffer
            pass
        self._read_only = buffer.toreadonly()
        return self._read_only

    def as_mut_slice(self) -> memoryview:
        """
        The bytes without a copy, writable. See :attr:`buffer`.

        :raises PermissionError: the view is read-only
        """
        self._use()
        self._check_writable()
        return self._memory()

    def ptr(self) -> int:
        """The address of the first byte, valid while the view is open."""
        self._use()
        return self._core.mapping.address + self._offset

    def mut_ptr(self) -> int:
        """
        As :meth:`ptr`, to store to.

        :raises PermissionError: the view is read-only
        """
        address = self.ptr()
        self._check_writable()
        return address

    # Flushes

    async def flush(self) -> None:
        """Make the region durable, see :meth:`~aiommap.AsyncMmap.flush_range`. A checkpoint."""
        self._use_in_loop()
        await self._core.flush(self._offset, self._length)

    async def flush_range(self, offset: SupportsIndex, length: SupportsIndex) -> None:
        """Make a part durable; the offset is relative to the view. A checkpoint."""
        self._use_in_loop()
        offset, length = check_range(offset, length, self._length, "view")
        await self._core.flush(self._offset + offset, length)

    async def flush_async(self) -> PendingFlush:
        """
        Start the write-back, see :meth:`~aiommap.AsyncMmap.flush_async_range`. A checkpoint.
        """
        self._use_in_loop()
        return await self._core.flush_async(self._offset, self._length)

    async def flush_async_range(self, offset: SupportsIndex, length: SupportsIndex) -> PendingFlush:
        """Start the write-back of a part; the offset is relative to the view. A checkpoint."""
        self._use_in_loop()
        offset, length = check_range(offset, length, self._length, "view")
        return await self._core.flush_async(self._offset + offset, length)

    # Shape

    def _part(self, claim: Claim, offset: int, length: int) -> Self:
        """A view of a part of this one, of the same kind, on a claim of its own."""
        raise NotImplementedError

    def _release_buffer(self) -> bool:
        """Release what was given out. Whether no slice or array made from it is left."""
        if self._read_only is None and self._strays is _NO_STRAYS:  # nearly always
            self._strays = _buffers.release(self._buffer)
            return not self._strays
        read_only, self._read_only = self._read_only, None
        given = (self._buffer,) if read_only is None else (self._buffer, read_only)
        strays = _buffers.release(*given)
        if strays or self._strays:
            self._strays = _buffers.alive([*self._strays, *strays])
        return not self._strays

    def _withdraw_buffer(self, what: str) -> None:
        """:raises BufferError: slices or arrays made from it are alive; the view has a new one"""
        if not self._release_buffer():
            self._make_buffer()
            raise BufferError(
                f"cannot {what} while slices or arrays over the view's buffer are alive: release "
                f"or delete them first"
            )

    def _make_buffer(self) -> None:
        self._buffer = self._core.mapping.buffer(
            self._offset, self._length, writable=self._writable
        )

    def split_at(self, n: SupportsIndex) -> tuple[Self, Self]:
        """
        Two views, of the first ``n`` bytes and of the rest; this one is closed.

        Nobody else gets in between. Each half belongs to the first task that enters or uses
        it, and has its cursor at 0. Not a checkpoint.

        :param n: from 0 to the length; a half may be empty
        :raises ValueError: ``n`` is outside; the view stays usable
        :raises BufferError: buffers made from the view's are alive; the view stays usable
        """
        claim = self._use_in_loop()
        n, rest = check_part(n, None, self._length, "view")
        self._withdraw_buffer("split the view")
        self._claim = None
        left, right = self._core.lock.split(claim, self._offset + n)
        halves = self._part(left, self._offset, n), self._part(right, self._offset + n, rest)
        self._core.views -= 1
        return halves

    def restrict(self, offset: SupportsIndex, length: SupportsIndex) -> None:
        """
        Keep a part of the region and give the rest back. Not a checkpoint.

        The cursor stays on its byte, or moves to the end of the part that is nearer.

        :param offset: where the part begins, in bytes from the start of the view
        :raises ValueError: the part is not inside; the view stays as it was
        :raises BufferError: buffers made from the view's are alive; the view stays as it was
        """
        claim = self._use_in_loop()
        offset, length = check_range(offset, length, self._length, "view")
        self._withdraw_buffer("restrict the view")
        self._offset += offset
        self._length = length
        self._cursor = min(max(self._cursor - offset, 0), length)
        self._make_buffer()
        self._core.lock.restrict(claim, self._offset, self._offset + length)

    def downgrade(self) -> None:
        """
        Hold the region shared from now on, and let waiting readers in. Not a checkpoint.

        The buffer becomes read-only. There is no way back but to close and ask again.

        :raises BufferError: buffers made from the view's are alive; the view stays as it was
        """
        claim = self._use_in_loop()
        if self._writable:
            self._withdraw_buffer("downgrade the view")
            self._writable = False
            self._make_buffer()
        self._core.lock.downgrade(claim)

    # The end

    def _give_back(self) -> bool:
        """Free the region; whether no derived buffer is left. Safe to call again."""
        claim = self._claim
        if claim is None:
            return True
        self._claim = None
        clean = self._release_buffer()
        if not clean and self._writable:
            self._core.raw_stores()  # through what is still alive
        if self._copies:
            self._leaving = claim
        else:
            self._leave(claim)
        return clean

    def _leave(self, claim: Claim) -> None:
        self._core.leave(claim)

    def _leave_soon(self, claim: Claim) -> None:
        """As :meth:`_leave`, from any thread and at any moment."""
        self._core.forget(claim)

    async def aclose(self) -> None:
        """
        Give the region back. Safe to call again, and from any task of the event loop.

        The region is free before anything is waited for, unless another task is in the middle
        of a copy of the view's: then that frees it when it has ended. Not a checkpoint, unless
        this is the last view of a map that is closed or was consumed by ``into_view()``: then it,
        or that copy, flushes what was written, and unmaps.

        :raises BufferError: slices or arrays over the buffer are alive (the region is free all
            the same, and they stay valid memory without a lock)
        :raises FlushError: the last flush failed
        """
        self._core.check_loop()
        if self._claim is not None:
            await self._finish(self._give_back(), failed=False)

    async def _finish(self, clean: bool, *, failed: bool) -> None:
        core = self._core
        if core.closed:
            await core.end_of_use(stored=self._writable, failed=failed)
        if not clean and not failed:
            raise BufferError(
                f"slices or arrays over the buffer of {self!r} are alive: the region is free for "
                f"others now; release or delete them before the view closes"
            )

    async def __aenter__(self) -> Self:
        self._use()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._claim is None:
            return
        if exc_type is GeneratorExit and self._is_forgotten(self._claim):
            self._forget()
            return
        clean = self._give_back()
        if not clean or self._core.closed:
            await self._finish(clean, failed=exc_type is not None)

    def _is_forgotten(self, claim: Claim) -> bool:
        """
        Whether it is the garbage collector that closes the coroutine of the block, in any
        thread and in the middle of anything: then nothing can be awaited, nor the lock touched.
        """
        loop = self._core.loop
        try:
            return claim.owner is None or claim.owner is not loop.current_task()
        except RuntimeError:  # no event loop here, or between its tasks
            return True

    def _forget(self) -> None:
        """Have the loop free the region soon."""
        claim, self._claim = self._claim, None
        if claim is not None:
            self._release_buffer()
            if self._copies:
                self._leaving = claim
            else:
                self._leave_soon(claim)

    def __del__(self) -> None:
        try:
            claim = self._claim
        except AttributeError:  # __init__ did not get that far
            return
        if claim is not None:
            self._forget()
            warnings.warn(
                f"{type(self).__name__} of bytes {self._offset} to "
                f"{self._offset + self._length} was dropped without being closed",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
