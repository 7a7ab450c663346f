"""Tasks wait for ranges: the region lock on top of the rules in ``_region_queue.py``.

:class:`ClaimLock` is what the map uses: it deals in claims, one object per hold, and parks and
wakes tasks. :class:`RegionLock` is the same for users: what it gives out are leases, which know
when they are dropped, handed over or used twice.

How a grant reaches its task. Whoever releases grants at once, in the queue, and wakes exactly
the tasks whose requests were granted; they hold their ranges from then on, running or not.
So a cancellation that arrives together with the grant finds a hold and gives it back (on
asyncio; on trio a task that has been woken is not cancelled before its next checkpoint).

A lease that is dropped is found by its finalizer, which may run in any thread and in the middle
of anything, also of the queue's own work: it only posts the release to the event loop. The
queue must not keep the lease alive for that, hence two objects, the claim that the queue knows
and the lease that the user has.
"""

from __future__ import annotations

import warnings
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, SupportsIndex

from anyio import WouldBlock

from ._event_loop import EventLoop, current_event_loop
from ._ranges import as_int
from ._region_queue import RegionQueue, claims_for
from ._wait_graph import GONE, HELD, WAITING, Claim, WaitGraph, spell

GRANTS_PER_YIELD = 128
"""After so many grants in a row without a yield, a fast lock yields once. tokio lets a task
make as many operations before it forces a yield (its "coop budget"); at 2 to 3 us a grant it
is 0.3 to 0.4 ms between two turns of the others."""

_graph = WaitGraph()
"""One for all locks, so that cycles through several locks are found. A claim is in it only
while somebody waits for it; tasks of different event loops never meet in it."""


class ClaimLock:
    """
    Claims on ranges, for the map: the region lock without leases.

    It belongs to the first event loop that uses it. Every method is for that loop's thread,
    but for :meth:`abandon`. Arguments are ints, ``start <= stop``, unchecked.

    :ivar queue: the rules and the state
    :ivar fast_acquire: whether free ranges are granted without a yield
    """

    __slots__ = (
        "__weakref__",
        "_checkpoint",
        "_closed",
        "_current_task",
        "_grants_left",
        "_is_running_here",
        "_loop",
        "fast_acquire",
        "queue",
    )

    def __init__(self, *, fast_acquire: bool = False) -> None:
        self.queue = RegionQueue(_graph)
        self.fast_acquire = fast_acquire
        self._loop: EventLoop | None = None
        self._closed: Callable[[], BaseException] | None = None
        self._grants_left = GRANTS_PER_YIELD
        self._is_running_here: Callable[[], bool] = self._bind
        self._current_task: Callable[[], object]
        self._checkpoint: Callable[[], Awaitable[object]]

    # Asking

    async def acquire(self, start: int, stop: int, exclusive: bool) -> Claim:
        """
        Hold one range for the current task.

        A checkpoint; with ``fast_acquire`` only when it waits, and once every
        :data:`GRANTS_PER_YIELD` grants.

        :raises DeadlockError: if it conflicts with a hold of the task or closes a cycle
        :raises BaseException: what :meth:`close` was given, once closed
        """
        claim = Claim(start, stop, exclusive, self.check_entry())
        if not self.queue.add_if_free(claim):
            await self.wait_for((claim,))
        elif self.must_yield():
            await self.yield_holding(claim)
        return claim

    async def acquire_ranges(self, ranges: Iterable[tuple[int, int, bool]]) -> Claim:
        """
        Hold several ranges ``(start, stop, exclusive)``, granted together or not at all.

        A checkpoint, as :meth:`acquire`. The claim stands for all of them: it can be released,
        downgraded and handed over, not split or restricted.

        :raises DeadlockError: if one conflicts with a hold of the task or closes a cycle
        :raises BaseException: what :meth:`close` was given, once closed
        """
        claims = claims_for(ranges, self.check_entry())
        await self.wait_for(claims)
        return claims[0]

    def acquire_nowait(self, start: int, stop: int, exclusive: bool) -> Claim:
        """
        Hold one range for the current task, at once.

        :raises WouldBlock: if it would have to wait
        :raises DeadlockError: if it conflicts with a hold of the task
        :raises BaseException: what :meth:`close` was given, once closed
        """
        claim = Claim(start, stop, exclusive, self.check_entry())
        if not self.queue.add_if_free(claim):
            if not self.queue.would_grant((claim,)):
                raise WouldBlock
            self.queue.add((claim,))
        return claim

    def acquire_ranges_nowait(self, ranges: Iterable[tuple[int, int, bool]]) -> Claim:
        """Hold several ranges at once: :meth:`acquire_ranges` as :meth:`acquire_nowait`."""
        claims = claims_for(ranges, self.check_entry())
        if not self.queue.would_grant(claims):
            raise WouldBlock
        self.queue.add(claims)
        return claims[0]

    def check_free(self, start: int, stop: int, exclusive: bool) -> bool:
        """
        Whether a request of the current task would be granted at once. Makes no claim.

        For an access that has no await in it: what is free now stays free until then. Does not
        check that the caller runs in the lock's event loop, nor whether the lock is closed.

        :raises DeadlockError: if the request conflicts with a hold of the task
        """
        queue = self.queue
        if queue.is_free(start, stop, exclusive):
            return True
        return queue.would_grant((Claim(start, stop, exclusive, self._current_task()),))

    # Giving back, all without waiting

    def release(self, claim: Claim) -> None:
        """Release a held claim, whoever holds it, and wake those who may go."""
        for lead in self.queue.remove(claim):
            lead.links.waiter.wake()  # type: ignore[union-attr]

    def split(self, claim: Claim, at: int) -> tuple[Claim, Claim]:
        """Cut a held claim in two, ``start <= at <= stop``; the claim itself is gone."""
        return self.queue.split(claim, at)

    def restrict(self, claim: Claim, start: int, stop: int) -> None:
        """Keep ``[start, stop)`` of a held claim and wake those who may have the rest."""
        for lead in self.queue.restrict(claim, start, stop):
            lead.links.waiter.wake()  # type: ignore[union-attr]

    def downgrade(self, claim: Claim) -> None:
        """Make a held claim shared and wake the readers who may join."""
        for lead in self.queue.downgrade(claim):
            lead.links.waiter.wake()  # type: ignore[union-attr]

    def adopt(self, claim: Claim) -> None:
        """Have a held claim belong to the current task."""
        self.queue.hand_over(claim, self._current_task())

    def disown(self, claim: Claim) -> None:
        """Have a held claim belong to no task: deadlocks through it are not found."""
        self.queue.hand_over(claim, None)

    def abandon(self, claim: Claim) -> None:
        """
        Release a claim soon, if it is still held then. From any thread, also from a finalizer.
        """
        if self._loop is not None:
            self._loop.post(self._release_abandoned, claim)

    def _release_abandoned(self, claim: Claim) -> None:
        if claim.state in (WAITING, HELD):
            self.release(claim)

    def leave(self, claim: Claim, reason: type[BaseException] | None) -> None:
        """
        Release a claim at the end of a block, or while an exception passes.

        GeneratorExit may come from the garbage collector, which closes the coroutines of
        tasks that were forgotten, in the middle of anything: then the release is posted. Only
        the task itself (it closes an async generator) knows that it is not in the queue.
        """
        if reason is GeneratorExit and not (
            self._is_running_here() and claim.owner is self._current_task()
        ):
            self.abandon(claim)
        else:
            self.release(claim)

    def close(self, make_error: Callable[[], BaseException]) -> None:
        """
        Refuse new requests and wake all waiting ones, with ``make_error()`` each.

        What is held stays held. Closing again does nothing.
        """
        if self._closed is None:
            self._closed = make_error
            for lead in self.queue.remove_waiting():
                lead.links.waiter.wake()  # type: ignore[union-attr]

    def statistics(self) -> RegionLockStatistics:
        """How many ranges are held, and how many requests wait."""
        queue = self.queue
        return RegionLockStatistics(
            queue.held_shared, queue.held_exclusive, queue.waiting, queue.longest_queue
        )

    # The parts of acquire, for those who inline it

    def check_entry(self) -> object:
        """
        Make sure that the caller may ask. :return: the current task

        :raises RuntimeError: in another event loop than the first one, or outside a task
        :raises BaseException: what :meth:`close` was given, once closed
        """
        if not self._is_running_here():
            self.refuse_stranger()
        if self._closed is not None:
            raise self._closed()
        return self._current_task()

    def check_thread(self) -> None:
        """
        Make sure that the caller runs in the lock's event loop.

        :raises RuntimeError: anywhere else
        """
        if not self._is_running_here():
            self.refuse_stranger()

    def must_yield(self) -> bool:
        """Whether the task that was just granted something at once has to let others run."""
        if self.fast_acquire:
            self._grants_left -= 1
            if self._grants_left:
                return False
            self._grants_left = GRANTS_PER_YIELD
        return True

    async def yield_holding(self, claim: Claim) -> None:
        """Let others run once; a cancellation met there gives the claim back."""
        try:
            await self._checkpoint()
        except BaseException as error:
            self.leave(claim, type(error))
            raise

    async def wait_for(self, claims: Sequence[Claim]) -> None:
        """Grant a request or wait until it is granted; cancelled, it leaves no trace."""
        lead = claims[0]
        if self.queue.add(claims):
            if self.must_yield():
                await self.yield_holding(lead)
            return
        assert self._loop is not None
        assert lead.links is not None
        parking = lead.links.waiter = self._loop.parking()
        try:
            await parking.park()
        except BaseException as error:
            # Waiting still, or granted in this very moment: either way it is passed on. GONE
            # if the lock was closed in this very moment.
            if lead.state != GONE:
                self.leave(lead, type(error))
            raise
        if lead.state == GONE:
            assert self._closed is not None
            raise self._closed()

    def _bind(self) -> bool:
        loop = current_event_loop()
        self._loop = loop
        self._current_task = loop.current_task
        self._checkpoint = loop.checkpoint
        self._is_running_here = loop.is_running_here
        return True

    def refuse_stranger(self) -> None:
        raise RuntimeError(
            "this region lock belongs to the event loop that used it first: use it from there, "
            "or from a thread through anyio.from_thread"
        )


@dataclass(frozen=True)
class RegionLockStatistics:
    """
    What a :class:`RegionLock` has to do at the moment.

    :ivar held_shared: number of ranges held shared
    :ivar held_exclusive: number of ranges held exclusively
    :ivar waiting: number of requests that wait
    :ivar longest_queue: the most requests that ever waited at one time
    """

    held_shared: int
    held_exclusive: int
    waiting: int
    longest_queue: int


class RegionLease:
    """
    A hold on the range ``[start, stop)`` of a :class:`RegionLock`.

    Comes from awaiting or entering :meth:`RegionLock.shared` and
    :meth:`RegionLock.exclusive`, and from :meth:`split_at`. Ends with :meth:`release`, or with
    the end of the ``async with`` block it was made or entered in. It may be released by any
    task of its event loop, but counts as a hold of one: the one that got it, or that entered
    it last (``async with lease:``), which is how another task takes it over.

    A lease that is dropped without being released frees its range, a little later, and issues
    a :exc:`ResourceWarning`.
    """

    __slots__ = ("__weakref__", "_claim", "_lock")

    def __init__(self, lock: ClaimLock, claim: Claim) -> None:
        self._lock = lock
        self._claim: Claim | None = claim

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

        Not a checkpoint. O(log n + those who wait directly).

        :raises RuntimeError: if the lease has ended already: released, split, or left by its
            ``async with`` block; or in another thread or event loop than the lock's
        """
        self._lock.check_thread()
        claim = self._held()
        self._claim = None
        self._lock.release(claim)

    def split_at(self, n: SupportsIndex) -> tuple[RegionLease, RegionLease]:
        """
        Cut the lease in two at ``n``, in the lock's own coordinates; this one ends.

        Each half counts as a hold of this lease's task until another one enters it. Not a
        checkpoint; nobody else gets in between.

        :param n: from ``start`` to ``stop``, both included (then one half is empty)
        :return: leases of ``[start, n)`` and ``[n, stop)``
        :raises ValueError: if ``n`` is outside
        :raises RuntimeError: if the lease has ended, or in another thread or event loop
        """
        self._lock.check_thread()
        claim = self._held()
        n = as_int(n, "n")
        if not claim.start <= n <= claim.stop:
            raise ValueError(f"cannot split [{claim.start}, {claim.stop}) at {n}, which is outside")
        self._claim = None
        left, right = self._lock.split(claim, n)
        return RegionLease(self._lock, left), RegionLease(self._lock, right)

    def restrict(self, start: SupportsIndex, stop: SupportsIndex) -> None:
        """
        Keep ``[start, stop)`` and give the rest back, in the lock's own coordinates.

        Not a checkpoint.

        :raises ValueError: if the new range is not inside the old one
        :raises RuntimeError: if the lease has ended, or in another thread or event loop
        """
        self._lock.check_thread()
        claim = self._held()
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
        self._lock.downgrade(self._held())

    async def __aenter__(self) -> Self:
        self._lock.check_thread()
        self._lock.adopt(self._held())
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

    def __del__(self) -> None:
        claim = self._claim
        if claim is not None:
            self._claim = None
            self._lock.abandon(claim)
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


class RegionRequest:
    """
    A request for a range: await it or enter it, once.

    Nothing has been asked for until then, and a request that is never awaited leaves nothing
    behind.
    """

    __slots__ = ("_exclusive", "_lease", "_lock", "_start", "_stop")

    def __init__(self, lock: ClaimLock, start: int, stop: int, exclusive: bool) -> None:
        self._lock: ClaimLock | None = lock
        self._start = start
        self._stop = stop
        self._exclusive = exclusive
        self._lease: RegionLease

    def __await__(self) -> Generator[object, object, RegionLease]:
        return self._acquire().__await__()

    async def _acquire(self) -> RegionLease:
        lock = self._take_lock()
        return RegionLease(lock, await lock.acquire(self._start, self._stop, self._exclusive))

    async def __aenter__(self) -> RegionLease:
        # ClaimLock.acquire, inlined: the frame it saves is a tenth of all this.
        lock = self._take_lock()
        claim = Claim(self._start, self._stop, self._exclusive, lock.check_entry())
        if not lock.queue.add_if_free(claim):
            await lock.wait_for((claim,))
        elif lock.must_yield():
            await lock.yield_holding(claim)
        self._lease = RegionLease(lock, claim)
        return self._lease

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        lease = self._lease
        claim = lease._claim
        if claim is not None:
            lease._claim = None
            lease._lock.leave(claim, exc_type)

    def _take_lock(self) -> ClaimLock:
        lock = self._lock
        if lock is None:
            raise RuntimeError("this request was awaited or entered already: make a new one")
        self._lock = None
        return lock

    def __repr__(self) -> str:
        mode = "exclusive" if self._exclusive else "shared"
        done = " (used)" if self._lock is None else ""
        return f"<{self.__class__.__name__} [{self._start}, {self._stop}) {mode}{done}>"


class RegionLock:
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
        return RegionRequest(self._claims, start, stop, False)

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
        return RegionRequest(self._claims, start, stop, True)

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
