"""Tasks wait for claims: the rules in ``_region_queue.py``, with tasks parked and woken.

:class:`ClaimLock` is what the map uses. It deals in claims, one object per hold, and leaves to
its caller whatever makes a claim comfortable and safe (``_region_lock.py`` has that for users).

How a grant reaches its task. Whoever releases grants at once, in the queue, and wakes exactly
the tasks whose requests were granted; they hold their ranges from then on, running or not.
So a cancellation that arrives together with the grant finds a hold and gives it back (on
asyncio; on trio a task that has been woken is not cancelled before its next checkpoint).
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from inspect import CO_COROUTINE
from types import FrameType
from typing import Any, NoReturn
from weakref import WeakKeyDictionary, ref

from anyio import WouldBlock

from ._errors import DeadlockError
from ._event_loop import EventLoop, current_event_loop
from ._region_queue import RegionQueue, claims_for
from ._wait_graph import GONE, HELD, WAITING, Claim, WaitGraph

GRANTS_PER_YIELD = 128
"""After so many grants in a row without a yield, a fast lock yields once. tokio lets a task
make as many operations before it forces a yield (its "coop budget"); at 2 to 3 us a grant it
is 0.3 to 0.4 ms between two turns of the others."""

_TURNS_FOR_A_HEIR = 2
"""Turns of the event loop after which a task that was just started has run: a task of the first
turn may run before it (trio draws lots)."""

_graphs: WeakKeyDictionary[Any, ref[WaitGraph]] = WeakKeyDictionary()
"""One graph for all locks of an event loop, so that cycles through several locks are found. The
locks keep it. It leads to tasks that wait and so to the loop, which nothing here may keep."""


def _graph_of(loop: EventLoop) -> WaitGraph:
    known = _graphs.get(loop.itself)
    graph = None if known is None else known()
    if graph is None:
        graph = WaitGraph()
        _graphs[loop.itself] = ref(graph)
    return graph


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
    longest_queue: int = field(default=0, compare=False)


def _who_asks() -> object:
    return current_event_loop().asking_task()


_NOT_WITHIN = frozenset(
    f"{__package__}.{name}"
    for name in (
        "_claim_lock",
        "_event_loop",
        "_frontier",
        "_range_index",
        "_region_queue",
        "_wait_graph",
    )
) | {"trio._core._run"}


def _is_interrupted() -> bool:
    """
    Whether a finalizer that came here runs in the middle of the queue's work, or of what trio
    does for a task that calls it: its cancel() would find a task woken that it is about to wake.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals is globals():
        # On the way here. The finalizer is in another module, or the one coroutine of this one
        # that is being closed.
        is_closed = frame.f_code.co_flags & CO_COROUTINE
        frame = frame.f_back
        if is_closed:
            break
    while frame is not None and frame.f_code.co_name != "unrolled_run":  # which steps trio's tasks
        if frame.f_globals.get("__name__") in _NOT_WITHIN:
            return True
        frame = frame.f_back
    return False


class Holding:
    """A claim that the end of a ``with`` block releases: :meth:`ClaimLock.holding`."""

    __slots__ = ("_claim", "_lock")

    def __init__(self, lock: ClaimLock, claim: Claim) -> None:
        self._lock = lock
        self._claim = claim

    def __enter__(self) -> None:
        pass

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        self._lock.leave(self._claim, exc_type)


class ClaimLock:
    """
    Claims on ranges, for the map: the region lock without leases.

    It belongs to the first event loop that uses it. Every method is for that loop's thread,
    but for :meth:`abandon`. Arguments are ints, ``start <= stop``, unchecked.

    :param known_as: what its users know it by, for errors
    :ivar queue: the rules and the state
    :ivar fast_acquire: whether free ranges are granted without a yield
    """

    __slots__ = (
        "__weakref__",
        "_abandoned",
        "_closed",
        "_current_task",
        "_grants_left",
        "_is_running_here",
        "_known_as",
        "_loop",
        "_task_here",
        "asking_task",
        "checkpoint",
        "fast_acquire",
        "queue",
    )

    def __init__(self, *, fast_acquire: bool = False, known_as: str = "region lock") -> None:
        self._known_as = known_as
        self.queue: RegionQueue = RegionQueue()
        self.fast_acquire: bool = fast_acquire
        self._loop: EventLoop | None = None
        self._closed: Callable[[], BaseException] | None = None
        # Claims to be released as soon as it is safe, each with how.
        self._abandoned: deque[tuple[Claim, Callable[[Claim], object]]] = deque()
        self._grants_left = GRANTS_PER_YIELD
        self._is_running_here: Callable[[], bool] = self._bind
        self._current_task: Callable[[], object]
        self._task_here: Callable[[], object]
        self.asking_task: Callable[[], object] = _who_asks  # the loop's own, once it is known
        self.checkpoint: Callable[[], Awaitable[object]]  # the loop's own

    # Asking

    async def acquire(self, start: int, stop: int, exclusive: bool) -> Claim:
        """
        Hold one range for the current task.

        A checkpoint; with ``fast_acquire`` only when it waits, and once every
        :data:`GRANTS_PER_YIELD` grants.

        :raises DeadlockError: if it conflicts with a hold of the task or closes a cycle
        :raises BaseException: what :meth:`close` was given, once closed
        """
        claim = Claim(start, stop, exclusive)
        await self.acquire_claim(claim)
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
            self.release_abandoned()
            if not self.queue.would_grant((claim,)):
                raise WouldBlock
            self.queue.add((claim,))
        return claim

    def check_free(self, start: int, stop: int, exclusive: bool) -> bool:
        """
        Whether a request of the current task would be granted at once. Makes no claim.

        For an access that has no await in it: what is free now stays free until then. Does not
        check that the caller runs in the lock's event loop, nor whether the lock is closed.
        """
        queue = self.queue
        if queue.is_free(start, stop, exclusive):
            return True
        try:
            return queue.would_grant((Claim(start, stop, exclusive, self._current_task()),))
        except DeadlockError:
            return False  # acquire() says so

    # Giving back, all without waiting

    def release(self, claim: Claim) -> None:
        """Release a held claim, whoever holds it, and wake those who may go."""
        self.wake(self.queue.remove(claim))

    def wake(self, granted: Iterable[Claim]) -> None:
        """Wake the tasks whose requests the queue has granted."""
        for lead in granted:
            lead.links.waiter.wake()  # type: ignore[union-attr]

    def split(self, claim: Claim, at: int) -> tuple[Claim, Claim]:
        """Cut a held claim in two, ``start <= at <= stop``; the claim is one of them then."""
        return self.queue.split(claim, at)

    def restrict(self, claim: Claim, start: int, stop: int) -> None:
        """Keep ``[start, stop)`` of a held claim and wake those who may have the rest."""
        self.wake(self.queue.restrict(claim, start, stop))

    def downgrade(self, claim: Claim) -> None:
        """Make a held claim shared and wake the readers who may join."""
        self.wake(self.queue.downgrade(claim))

    def adopt(self, claim: Claim) -> None:
        """Have a held claim belong to the current task, if there is one."""
        with suppress(RuntimeError):  # trio, between its tasks
            task = self._current_task()
            if task is not None:
                self.queue.hand_over(claim, task)

    def hand_to(self, asker: object, claim: Claim, awaitable: object) -> None:
        """
        Have a claim that the current task got belong to the one that asked for it, if the
        current one does nothing but await what that made: ``asyncio.gather()``.
        """
        loop = self._loop
        assert loop is not None
        if (
            asker is not None
            and asker is not claim.owner
            and loop.is_around(claim.owner, awaitable)
            and not loop.has_ended(asker)
        ):
            self.queue.hand_over(claim, asker)

    def disown(self, claim: Claim) -> None:
        """Have a held claim belong to no task: deadlocks through it are not found."""
        self.queue.hand_over(claim, None)

    def abandon(self, claim: Claim, release: Callable[[Claim], object] | None = None) -> None:
        """
        Release a claim soon, if it is still held then, and before anybody has to wait for it.
        From any thread, also from a finalizer.

        :param release: how, in the loop; :meth:`release` by default
        """
        if self._loop is not None:
            self._abandoned.append((claim, release or self.release))
            if not self._loop.post(self.release_abandoned):
                self._abandoned.clear()  # with the loop

    def release_abandoned(self) -> None:
        """Release now what :meth:`abandon` was given. In the loop."""
        while self._abandoned:
            claim, release = self._abandoned.popleft()
            if claim.state in (WAITING, HELD):
                release(claim)

    def drop(self, claim: Claim, release: Callable[[Claim], object] | None = None) -> None:
        """
        Release a claim whose holder was dropped, for finalizers: at once if that is safe, which
        it is where the last reference went in a task of the loop, else :meth:`abandon` it.
        """
        if self.is_safe_here():
            self._abandoned.append((claim, release or self.release))
            self.release_abandoned()
        else:
            self.abandon(claim, release)

    def is_safe_here(self) -> bool:
        """
        Whether a finalizer may use the lock now.

        The garbage collector runs finalizers in any thread and in the middle of anything: of the
        queue's own work, which must not find another piece gone than it put there, or of the
        event loop's. A task that is woken between two steps is overlooked where asyncio has made
        out already how long it may sleep, or trio has listed the tasks that are to run.
        """
        if not self._is_running_here() or _is_interrupted():
            return False
        try:
            return self._task_here() is not None
        except RuntimeError:  # trio, between its tasks
            return False

    def leave(self, claim: Claim, reason: type[BaseException] | None) -> None:
        """
        Release a claim at the end of a block, or while an exception passes.

        GeneratorExit may come from the garbage collector, which closes the coroutines of
        tasks that were forgotten, as from a task that closes an async generator: :meth:`drop`.
        """
        if reason is GeneratorExit:
            self.drop(claim)
        else:
            self.release(claim)

    def holding(self, claim: Claim) -> Holding:
        """The claim for the length of a ``with`` block, and then :meth:`leave`."""
        return Holding(self, claim)

    def close(self, make_error: Callable[[], BaseException]) -> None:
        """
        Refuse new requests and wake all waiting ones, with ``make_error()`` each.

        What is held stays held. Closing again does nothing.
        """
        if self._closed is None:
            self._closed = make_error
            self.wake(self.queue.remove_waiting())

    def statistics(self) -> RegionLockStatistics:
        """How many ranges are held, and how many requests wait."""
        queue = self.queue
        return RegionLockStatistics(
            queue.held_shared, queue.held_exclusive, queue.waiting, queue.longest_queue
        )

    # The parts of acquire, for those who inline it

    async def acquire_claim(self, claim: Claim) -> None:
        """Hold what a new claim says, for the current task: :meth:`acquire`."""
        claim.owner = self.check_entry()
        if not self.queue.add_if_free(claim):
            await self.wait_for((claim,))
        elif self.must_yield():
            await self.yield_holding(claim)

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
        return self._task_here()

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
            await self.checkpoint()
        except BaseException as error:
            self.leave(claim, type(error))
            raise

    async def wait_for(self, claims: Sequence[Claim]) -> None:
        """Grant a request or wait until it is granted; cancelled, it leaves no trace."""
        lead = claims[0]
        self.release_abandoned()
        try:
            granted: bool | None = self.queue.add(claims)
        except DeadlockError:
            granted = None  # what is met below has nothing to do with this error
        if granted is None:
            granted = await self._add_after_heirs(claims)
        if granted:
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

    async def _add_after_heirs(self, claims: Sequence[Claim]) -> bool:
        """
        Ask again, when the tasks that were started just now have run: the half of a split hold
        counts for the task that split it until another one takes it over. Who asks meanwhile is
        served first.
        """
        for _ in range(_TURNS_FOR_A_HEIR):
            await self.checkpoint()
        if self._closed is not None:
            raise self._closed()
        self.release_abandoned()
        return self.queue.add(claims)

    def _bind(self) -> bool:
        loop = current_event_loop()
        self._loop = loop
        self.queue.graph = _graph_of(loop)
        self._current_task = loop.current_task
        self._task_here = loop.task_here
        self.asking_task = loop.asking_task
        self.checkpoint = loop.checkpoint
        self._is_running_here = loop.is_running_here
        return True

    def refuse_stranger(self) -> NoReturn:
        raise RuntimeError(
            f"this {self._known_as} belongs to the event loop that used it first: use it from "
            f"there, or from a thread through anyio.from_thread"
        )
