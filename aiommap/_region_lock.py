"""The region lock for users: leases that know when they are dropped, handed over or used twice.

The waiting is done in ``_claim_lock.py``, the rules are in ``_region_queue.py``.

A lease that is dropped is found by its finalizer, which may run in any thread and in the middle
of anything, also of the queue's own work or the event loop's: unless it is a task that lets go of
it, the release is only posted to the event loop. The queue must not keep the lease alive for that,
hence two objects, the claim that the queue knows and the lease that the user has.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self, SupportsIndex

from ._claim_lock import ClaimLock as ClaimLock
from ._claim_lock import RegionLockStatistics as RegionLockStatistics
from ._opening import NOTHING
from ._ranges import as_int
from ._uncopyable import Uncopyable
from ._wait_graph import Claim, spell


class RegionLease(Uncopyable):
    """
    A hold on the range ``[start, stop)`` of a :class:`RegionLock`.

    Comes from awaiting or entering :meth:`RegionLock.shared` and
    :meth:`RegionLock.exclusive`, and from :meth:`split_at`. Ends with :meth:`release`, or with
    the end of the ``async with`` block it was made or entered in. It may be released by any
    task of its event loop, but counts as a hold of one: the one that got it, or that entered
    it last (``async with lease:``), which is how another task takes it over. A half of a split
    goes to the first that uses it in any other way, too.

    A lease that is dropped without being released frees its range and issues a
    :exc:`ResourceWarning`.
    """

    __slots__ = ("__weakref__", "_claim", "_lock", "_split_off")

    def __init__(self, lock: ClaimLock, claim: Claim, *, split_off: bool = False) -> None:
        self._lock = lock
        self._claim: Claim | None = claim
        self._split_off = split_off  # and not used since

    @property
    def start(self) -> int:
        """First integer of the range. :raises RuntimeError: after the lease has ended"""
        return self._held().start

    @property
    def stop(self) -> int:
        """One after the last integer. :raises RuntimeError: after the lease has ended"""
        return self._held().stop

    @property
    def exclusive(self) -> bool:
        """True: nobody else; False: other readers. :raises RuntimeError: after the end"""
        return self._held().exclusive

    def release(self) -> None:
        """
        Free the range and wake those who may have it now.

        Not a checkpoint. O(log n + those who wait directly). Not for finalizers, nor for whatever
        else the garbage collector may run in the middle of anything: drop the lease there, which
        frees it when that is safe.

        :raises RuntimeError: if the lease has ended already: released, split, or left by its
            ``async with`` block; or in another thread or event loop than the lock's
        """
        self._lock.check_thread()
        claim = self._held()
        self._claim = None
        lock = self._lock
        if lock.queue.busy:  # from a finalizer all the same
            lock.drop(claim)
        else:
            lock.release(claim)

    def split_at(self, n: SupportsIndex) -> tuple[RegionLease, RegionLease]:
        """
        Cut the lease in two at ``n``, in the lock's own coordinates; this one ends.

        Each half counts as a hold of this lease's task until another one enters or uses it.
        Not a checkpoint; nobody else gets in between.

        :param n: from ``start`` to ``stop``, both included (then one half is empty)
        :return: leases of ``[start, n)`` and ``[n, stop)``
        :raises ValueError: if ``n`` is outside
        :raises RuntimeError: if the lease has ended, or in another thread or event loop
        """
        self._lock.check_thread()
        claim = self._used()
        n = as_int(n, "n")
        if not claim.start <= n <= claim.stop:
            raise ValueError(f"cannot split [{claim.start}, {claim.stop}) at {n}, which is outside")
        self._claim = None
        left, right = self._lock.split(claim, n)
        return (
            RegionLease(self._lock, left, split_off=True),
            RegionLease(self._lock, right, split_off=True),
        )

    def restrict(self, start: SupportsIndex, stop: SupportsIndex) -> None:
        """
        Keep ``[start, stop)`` and give the rest back, in the lock's own coordinates.

        Not a checkpoint.

        :raises ValueError: if the new range is not inside the old one
        :raises RuntimeError: if the lease has ended, or in another thread or event loop
        """
        self._lock.check_thread()
        claim = self._used()
        start, stop = _check_bounds(start, stop)
        if start < claim.start or stop > claim.stop:
            raise ValueError(
                f"[{start}, {stop}) is not inside the lease of [{claim.start}, {claim.stop})"
            )
        self._lock.restrict(claim, start, stop)

    def downgrade(self) -> None:
        """
        Turn exclusive into shared and let waiting readers in. Shared stays shared.

        Not a checkpoint. There is no way back but to release and ask again: two readers that
        both waited to become the writer would wait for ever.

        :raises RuntimeError: if the lease has ended, or in another thread or event loop
        """
        self._lock.check_thread()
        self._lock.downgrade(self._used())

    async def __aenter__(self) -> Self:
        self._lock.check_thread()
        self._lock.adopt(self._held())
        self._split_off = False
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        claim = self._claim
        if claim is not None:
            self._claim = None
            self._lock.leave(claim, exc_type)

    def _held(self) -> Claim:
        claim = self._claim
        if claim is None:
            raise RuntimeError("this lease has ended: it was released or split")
        return claim

    def _used(self) -> Claim:
        claim = self._held()
        if self._split_off:
            self._split_off = False
            self._lock.adopt(claim)
        return claim

    def __del__(self) -> None:
        try:
            claim = self._claim
        except AttributeError:  # __init__ did not get that far
            return
        if claim is not None:
            self._claim = None
            self._lock.drop(claim)
            warnings.warn(
                f"a region lease of {spell(claim)} was dropped without being released",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def __repr__(self) -> str:
        if self._claim is None:
            return f"<{self.__class__.__name__} ended>"
        return f"<{self.__class__.__name__} {spell(self._claim)}>"


class RegionRequest(Uncopyable):
    """
    A request for a range: await it or enter it, once.

    Nothing has been asked for until then, and a request that is never awaited leaves nothing
    behind.
    """

    __slots__ = ("_claim", "_lease", "_lock")

    def __init__(self, lock: ClaimLock, claim: Claim) -> None:
        self._lock = lock
        self._claim: Claim | None = claim
        self._lease: RegionLease

    def __await__(self) -> Generator[object, object, RegionLease]:
        return self._acquire().__await__()

    async def _acquire(self) -> RegionLease:
        # The lease is not kept here, so that dropping it is noticed.
        claim = self._claim
        if claim is None:
            self._refuse_reuse()
        self._claim = None
        lock = self._lock
        asker = claim.owner
        await lock.acquire_claim(claim)
        lock.hand_to(asker, claim, self)
        return RegionLease(lock, claim)

    async def __aenter__(self) -> RegionLease:
        claim = self._claim
        if claim is None:
            self._refuse_reuse()
        self._claim = None
        lock = self._lock
        # ClaimLock.acquire_claim, inlined: two frames less are a tenth of the whole.
        claim.owner = lock.check_entry()
        if not lock.queue.add_if_free(claim):
            await lock.wait_for((claim,))
        elif not lock.fast_acquire or lock.must_yield():
            try:
                await lock.checkpoint()
            except BaseException as error:
                lock.leave(claim, type(error))
                raise
        self._lease = lease = RegionLease(lock, claim)
        return lease

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
            lease = self._lease
            claim = lease._claim
            if claim is not None:
                lease._claim = None
                lock = lease._lock
                if exc_type is None:
                    granted = lock.queue.remove(claim)
                    if granted:
                        lock.wake(granted)
                else:
                    lock.leave(claim, exc_type)
            return NOTHING  # there is nothing to wait for

    def _refuse_reuse(self) -> NoReturn:
        raise RuntimeError("this request was awaited or entered already: make a new one")

    def __repr__(self) -> str:
        what = "used" if self._claim is None else spell(self._claim)
        return f"<{self.__class__.__name__} {what}>"


class RegionLock(Uncopyable):
    """
    A fair readers-writer lock on ranges of integers, for the tasks of one event loop.

    Use it where tasks share something that has parts: bytes of a map, rows of a table, pages
    of a cache. It does not know what the integers mean; they may be negative and of any size,
    and neither the extent nor the number of ranges in use matters for its cost.

    A request waits for every earlier request, held or waiting, that overlaps and conflicts
    with it (one of the two is exclusive), and for nothing else: nobody starves, and disjoint
    ranges never wait for each other. Empty ranges are granted at once.

    >>> import anyio
    >>> from aiommap import RegionLock
    >>> async def main() -> None:
    ...     rows = RegionLock()
    ...     async with rows.shared(0, 100), rows.exclusive(100, 200) as lease:
    ...         print(rows.statistics())
    ...         lease.restrict(100, 110)  # others may have the rest
    ...         lease.downgrade()  # and read these
    ...         async with rows.shared(50, 105):
    ...             print(lease)
    >>> anyio.run(main)
    RegionLockStatistics(held_shared=1, held_exclusive=1, waiting=0, longest_queue=0)
    <RegionLease [100, 110) shared>

    A task must not ask for what it holds in a conflicting way; nor may tasks wait for one
    another in a circle, in one lock or through several. The request that would do so raises
    :exc:`DeadlockError`, and the others go on. Bytes that a task holds shared are free for its
    further shared requests, whoever waits for them. Deadlocks are found for leases that stay
    with the task that got them, or that a task took over by entering them.

    The lock may be created anywhere; it belongs to the event loop that uses it first. It does
    not work across threads or processes.

    A grant costs O(log n) for n ranges held and waiting, plus the conflicts it has to wait for.

    :param fast_acquire: if True, what is free is granted without a yield to the event loop,
        but for one in 128 grants, so that a loop over free ranges lets others run as well. If
        False, each request is a checkpoint. As with :class:`anyio.Lock`; but a pending
        cancellation is not noticed without the yield.
    """

    __slots__ = ("__weakref__", "_claims")

    def __init__(self, *, fast_acquire: bool = False) -> None:
        self._claims = ClaimLock(fast_acquire=fast_acquire)

    def shared(self, start: SupportsIndex, stop: SupportsIndex) -> RegionRequest:
        """
        Hold ``[start, stop)`` together with other readers: await or ``async with`` the result.

        Awaiting is a checkpoint, unless ``fast_acquire`` spares it. Cancelled, it leaves
        nothing behind.

        :return: a request that gives a :class:`RegionLease`, once
        :raises TypeError: for what is not an integer
        :raises ValueError: if ``start`` is greater than ``stop``
        :raises DeadlockError: when awaited, if it would wait for its own task
        :raises RuntimeError: when awaited again, or in another event loop than the lock's
        """
        if type(start) is not int or type(stop) is not int or start > stop:
            start, stop = _check_bounds(start, stop)
        lock = self._claims
        try:
            asker = lock.asking_task()
        except RuntimeError:  # made outside of an event loop
            asker = None
        return RegionRequest(lock, Claim(start, stop, False, asker))

    def exclusive(self, start: SupportsIndex, stop: SupportsIndex) -> RegionRequest:
        """
        Hold ``[start, stop)`` alone: await or ``async with`` the result.

        As :meth:`shared` in all else.

        :return: a request that gives a :class:`RegionLease`, once
        :raises TypeError: for what is not an integer
        :raises ValueError: if ``start`` is greater than ``stop``
        :raises DeadlockError: when awaited, if it would wait for its own task
        :raises RuntimeError: when awaited again, or in another event loop than the lock's
        """
        if type(start) is not int or type(stop) is not int or start > stop:
            start, stop = _check_bounds(start, stop)
        lock = self._claims
        try:
            asker = lock.asking_task()
        except RuntimeError:  # made outside of an event loop
            asker = None
        return RegionRequest(lock, Claim(start, stop, True, asker))

    def shared_nowait(self, start: SupportsIndex, stop: SupportsIndex) -> RegionLease:
        """
        Hold ``[start, stop)`` together with other readers, at once. Not a checkpoint.

        :raises TypeError: for what is not an integer
        :raises ValueError: if ``start`` is greater than ``stop``
        :raises anyio.WouldBlock: if it would have to wait
        :raises DeadlockError: if the task holds some of it exclusively
        :raises RuntimeError: in another event loop than the lock's, or outside a task
        """
        start, stop = _check_bounds(start, stop)
        return RegionLease(self._claims, self._claims.acquire_nowait(start, stop, False))

    def exclusive_nowait(self, start: SupportsIndex, stop: SupportsIndex) -> RegionLease:
        """
        Hold ``[start, stop)`` alone, at once. Not a checkpoint.

        :raises TypeError: for what is not an integer
        :raises ValueError: if ``start`` is greater than ``stop``
        :raises anyio.WouldBlock: if it would have to wait
        :raises DeadlockError: if the task holds some of it
        :raises RuntimeError: in another event loop than the lock's, or outside a task
        """
        start, stop = _check_bounds(start, stop)
        return RegionLease(self._claims, self._claims.acquire_nowait(start, stop, True))

    def statistics(self) -> RegionLockStatistics:
        """How many ranges are held, and how many requests wait. O(1), not a checkpoint."""
        return self._claims.statistics()

    def __repr__(self) -> str:
        now = self.statistics()
        return (
            f"<{self.__class__.__name__} held shared {now.held_shared}, held exclusive "
            f"{now.held_exclusive}, waiting {now.waiting}>"
        )


def _check_bounds(start: SupportsIndex, stop: SupportsIndex) -> tuple[int, int]:
    start = as_int(start, "start")
    stop = as_int(stop, "stop")
    if start > stop:
        raise ValueError(f"start {start} is greater than stop {stop}")
    return start, stop
