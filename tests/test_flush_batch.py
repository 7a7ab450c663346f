"""Who is served by which flush and who is told of a failure, against a byte model."""

from __future__ import annotations

import errno
import gc
import weakref
from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from aiommap._flush_batch import (
    MOST_RANGES,
    FlushLog,
    Ticket,
    length_inside,
    merge,
    summary,
)

SIZE = 24
EIO = errno.EIO

ranges_in_size = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(
    lambda pair: (min(pair), abs(pair[0] - pair[1]))
)


def spread(count: int, step: int = 10) -> list[tuple[int, int]]:
    """Ranges that neither overlap nor touch."""
    return [(index * step, 1) for index in range(count)]


def flushed(log: FlushLog, covered: list[tuple[int, int]] | None) -> None:
    assert log.end(log.begin(), covered) is None
    log._check()


# Which flush serves whom


def test_a_flush_that_begins_later_serves() -> None:
    """A ticket is done when a flush has succeeded that began after it and covers it."""
    log = FlushLog()
    ticket = log.ticket(10, 5, "file")
    assert not ticket.done
    flushed(log, [(0, 20)])
    assert ticket.done
    assert ticket.failure is None
    assert log.succeeded == 1


def test_a_flush_that_began_earlier_does_not_serve() -> None:
    """What was under way when the ticket was made may have missed its stores."""
    log = FlushLog()
    number = log.begin()
    ticket = log.ticket(10, 5, "file")
    assert log.end(number, None) is None
    assert not ticket.done
    flushed(log, None)
    assert ticket.done


def test_only_what_covers_serves() -> None:
    """A flush of other bytes, or of a part, does not make a ticket done."""
    log = FlushLog()
    ticket = log.ticket(10, 5, "file")
    for covered in ([(0, 14)], [(11, 4)], [(0, 10), (15, 9)], [(0, 12), (13, 9)], []):
        flushed(log, covered)
        assert not ticket.done
    flushed(log, [(0, 12), (12, 3)])
    assert ticket.done


def test_a_gap_between_many_ranges_is_not_covered() -> None:
    """However many ranges a flush was for, it covers those and nothing between them."""
    log = FlushLog()
    covered = spread(MOST_RANGES * 2)
    between = log.ticket(5, 1, "file")
    across = log.ticket(0, 11, "file")
    inside = log.ticket(*covered[-1], "file")
    flushed(log, covered)
    assert not between.done
    assert not across.done
    assert inside.done


def test_an_empty_ticket_is_served_by_any_flush() -> None:
    """No bytes are durable with the first flush of anything."""
    log = FlushLog()
    ticket = log.ticket(7, 0, "file")
    flushed(log, [(0, 1)])
    assert ticket.done


def test_a_resolved_ticket_keeps_nothing() -> None:
    """Done or failed, a ticket lets go of the file it would have needed."""
    log = FlushLog()
    good = log.ticket(0, 1, "file")
    flushed(log, None)
    bad = log.ticket(0, 1, "file")
    log.fail(EIO, [])
    assert good.keeps is None
    assert bad.keeps is None


def test_dropped_tickets_are_forgotten() -> None:
    """Nobody needs to wait for a ticket, and a million dropped ones cost no memory."""
    log = FlushLog()
    kept = [log.ticket(0, 1, "file") for _ in range(10)]
    last: Ticket | None = None
    for _ in range(10_000):
        last = log.ticket(0, 1, "file")
    assert last is not None
    assert len(log._open) < 100
    log._check()
    reference = weakref.ref(last)
    last = None
    gc.collect()
    assert reference() is None
    flushed(log, None)
    assert all(ticket.done for ticket in kept)


# Failures


def test_the_first_failure_stays() -> None:
    """What is latched is what went wrong first; later failures do not replace it."""
    log = FlushLog()
    first = log.fail(errno.ENOSPC, [(0, 4)])
    assert log.fail(EIO, [(8, 4)]) is first
    assert log.failure is first
    assert first.errno == errno.ENOSPC
    log._check()


def test_a_failure_names_what_was_started_since_the_last_good_flush() -> None:
    """The ranges of a failure are those of the flush and of write-backs nobody flushed yet."""
    log = FlushLog()
    log.ticket(0, 4, "file")
    flushed(log, [(0, 4)])
    log.ticket(100, 4, "file")
    log.ticket(104, 4, "file")
    log.ticket(200, 4, "file")
    flushed(log, [(200, 8)])
    assert log.fail(EIO, [(50, 1)]).ranges == ((50, 1), (100, 8))


def test_a_failure_names_no_more_than_a_few_ranges() -> None:
    """Many scattered ranges are named as the one range around them."""
    log = FlushLog()
    assert log.fail(EIO, spread(MOST_RANGES)).ranges == tuple(spread(MOST_RANGES))
    log.clear()
    assert log.fail(EIO, spread(MOST_RANGES + 1)).ranges == ((0, 10 * MOST_RANGES + 1),)


def test_ranges_of_write_backs_do_not_pile_up() -> None:
    """A program that starts write-backs for ever and never flushes costs no memory for it."""
    log = FlushLog()
    for index in range(10_000):
        log.ticket(index * 10, 1, "file")
        log._check()
    ranges = log.fail(EIO, []).ranges
    assert len(ranges) <= MOST_RANGES
    assert (ranges[0][0], sum(ranges[-1])) == (0, 9_999 * 10 + 1)


def test_open_tickets_fail_for_good() -> None:
    """A failure takes every open ticket with it, also those of other ranges, cleared or not."""
    log = FlushLog()
    done = log.ticket(0, 4, "file")
    flushed(log, None)
    open_one = log.ticket(500, 4, "file")
    failure = log.fail(EIO, [(0, 4)])
    assert open_one.failure is failure
    log.clear()
    flushed(log, None)
    assert open_one.failure is failure
    assert not open_one.done
    assert done.done


def test_a_ticket_of_a_tainted_map_has_failed() -> None:
    """A write-back that is started while a failure is latched can never be called durable."""
    log = FlushLog()
    failure = log.fail(EIO, [])
    ticket = log.ticket(0, 4, "file")
    log.clear()
    flushed(log, None)
    assert ticket.failure is failure
    assert not ticket.done


def test_a_failure_during_a_flush_is_its_failure_too() -> None:
    """A flush whose pages another write-back lost meanwhile is not good, whatever it says."""
    log = FlushLog()
    number = log.begin()
    failure = log.fail(EIO, [(0, 4)])
    assert log.end(number, None) is failure
    assert log.succeeded == 0
    log._check()


def test_a_failure_during_a_flush_counts_also_when_it_was_cleared_meanwhile() -> None:
    """Acknowledged or not, the flush that was under way cannot know what became of its pages."""
    log = FlushLog()
    number = log.begin()
    failure = log.fail(EIO, [(0, 4)])
    log.clear()
    ticket = log.ticket(0, 4, "file")
    assert log.end(number, None) is failure
    assert not ticket.done
    assert ticket.failure is None
    flushed(log, None)
    assert ticket.done


def test_a_failure_before_a_flush_is_not_its_failure() -> None:
    """A flush that begins after the failure was cleared is good again."""
    log = FlushLog()
    flushed(log, None)
    log.fail(EIO, [])
    log.clear()
    flushed(log, None)
    assert log.succeeded == 2


def test_who_asked_before_a_failure_is_told_of_it() -> None:
    """A request that waited through a failure and its acknowledgement is told all the same."""
    log = FlushLog()
    before = log.failures
    assert log.failure_since(before) is None
    failure = log.fail(EIO, [])
    after = log.failures
    assert log.failure_since(before) is failure
    assert log.failure_since(after) is failure  # latched
    log.clear()
    assert log.failure_since(before) is failure
    assert log.failure_since(after) is None


# Shrinking


def test_cut_bytes_are_not_waited_for() -> None:
    """What the map's own resize cut off is durable, or not, without anybody asking."""
    log = FlushLog()
    across = log.ticket(0, 100, "file")
    behind = log.ticket(80, 10, "file")
    log.cut(50)
    flushed(log, [(0, 50)])
    assert across.done
    assert behind.done
    log.ticket(10, 90, "file")
    log.cut(50)
    assert log.fail(EIO, []).ranges == ((10, 40),)


# The arithmetic


@given(st.lists(ranges_in_size))
def test_merge_keeps_exactly_the_bytes(ranges: list[tuple[int, int]]) -> None:
    """merge: the same bytes, in order, nothing overlapping or touching, nothing empty."""
    merged = merge(ranges)
    whole = {byte for offset, length in ranges for byte in range(offset, offset + length)}
    assert [byte for offset, length in merged for byte in range(offset, offset + length)] == sorted(
        whole
    )
    for (offset, length), (following, _) in pairwise(merged):
        assert offset + length < following
    assert all(length > 0 for _, length in merged)
    assert summary(ranges) == merged


@given(ranges_in_size, st.integers(0, SIZE + 5))
def test_length_inside(asked: tuple[int, int], size: int) -> None:
    """length_inside: how many bytes of a range lie below a size."""
    offset, length = asked
    assert length_inside(offset, length, size) == len(
        [byte for byte in range(offset, offset + length) if byte < size]
    )


# The machine


@dataclass
class Asked:
    """Somebody who wants bytes durable, and what they knew."""

    offset: int
    length: int
    versions: list[int]  # of every byte when it was asked
    failures: int
    ticket: Ticket | None = None
    sure: list[bool] = field(default_factory=list)  # not lost by a failure known then

    def bytes(self) -> range:
        return range(self.offset, self.offset + self.length)


class Kernel:
    """
    Bytes with a version each. As bad as the real one: pages whose write-back failed count as
    clean, a flush that runs beside it finds them clean and is content.
    """

    def __init__(self) -> None:
        self.stored = [0] * SIZE
        self.durable = [0] * SIZE
        self.dirty: set[int] = set()
        self.lost: set[int] = set()  # by a failure, and not stored again since
        self.writing: dict[int, int] | None = None

    def store(self, offset: int, length: int) -> None:
        for byte in range(offset, offset + length):
            self.stored[byte] += 1
            self.dirty.add(byte)
            self.lost.discard(byte)

    def begin(self, ranges: list[tuple[int, int]] | None) -> None:
        covered = [(0, SIZE)] if ranges is None else ranges
        wanted = {byte for offset, length in covered for byte in range(offset, offset + length)}
        self.writing = {byte: self.stored[byte] for byte in wanted & self.dirty}

    def end(self, *, good: bool) -> None:
        assert self.writing is not None
        for byte, version in self.writing.items():
            if good:
                self.durable[byte] = version
            if self.stored[byte] == version:
                self.dirty.discard(byte)
                if not good:
                    self.lost.add(byte)
        self.writing = None

    def lose(self, offset: int, length: int) -> None:
        for byte in self.dirty & set(range(offset, offset + length)):
            self.dirty.discard(byte)
            self.lost.add(byte)
            if self.writing is not None:
                self.writing.pop(byte, None)


class LogAgainstKernel(RuleBasedStateMachine):
    """The protocol of the flusher over a log; nobody may be told that lost bytes are durable."""

    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.kernel = Kernel()
        self.log = FlushLog()
        self.waiting: list[Asked] = []
        self.flushing: list[Asked] = []
        self.covered: list[tuple[int, int]] | None = None
        self.number = 0
        self.open: list[Asked] = []
        self.failed: list[Ticket] = []

    def ask(self, offset: int, length: int) -> Asked:
        kernel = self.kernel
        return Asked(
            offset,
            length,
            list(kernel.stored),
            self.log.failures,
            # What a failure took before is known to whoever asks now: it was latched, and they
            # had to clear it.
            sure=[byte not in kernel.lost for byte in range(SIZE)],
        )

    def assert_durable(self, asked: Asked) -> None:
        for byte in asked.bytes():
            if asked.sure[byte]:
                assert self.kernel.durable[byte] >= asked.versions[byte], byte

    @rule(where=ranges_in_size)
    def store(self, where: tuple[int, int]) -> None:
        self.kernel.store(*where)

    @precondition(lambda self: self.log.failure is None)
    @rule(where=ranges_in_size)
    def ask_for_a_flush(self, where: tuple[int, int]) -> None:
        self.waiting.append(self.ask(*where))

    @rule(target=tickets, where=ranges_in_size)
    def start_write_back(self, where: tuple[int, int]) -> object:
        if self.log.failure is not None:
            return multiple()
        asked = self.ask(*where)
        asked.ticket = self.log.ticket(*where, "file")
        self.open.append(asked)
        return asked

    @rule(asked=tickets)
    def wait_for_a_ticket(self, asked: Asked) -> None:
        ticket = asked.ticket
        assert ticket is not None
        if not ticket.done and ticket.failure is None:
            self.waiting.append(asked)

    @rule(asked=consumes(tickets))
    def drop_a_ticket(self, asked: Asked) -> None:
        self.open = [each for each in self.open if each is not asked]

    @precondition(lambda self: not self.number and self.waiting)
    @rule(by_range=st.booleans())
    def begin(self, by_range: bool) -> None:
        for asked in self.waiting:
            ticket = asked.ticket
            if ticket is not None and ticket.done:
                self.assert_durable(asked)
            elif self.log.failure_since(asked.failures) is None:
                self.flushing.append(asked)
        self.waiting.clear()
        if not self.flushing:
            return
        self.number = self.log.begin()
        ranges = merge((each.offset, each.length) for each in self.flushing)
        self.covered = ranges if by_range else None
        self.kernel.begin(self.covered)

    @precondition(lambda self: self.number)
    @rule()
    def flush_succeeds(self) -> None:
        self.kernel.end(good=True)
        if self.log.end(self.number, self.covered) is None:
            for asked in self.flushing:
                self.assert_durable(asked)
                assert asked.ticket is None or asked.ticket.done
        self.number = 0
        self.flushing.clear()

    @precondition(lambda self: self.number)
    @rule()
    def flush_fails(self) -> None:
        self.kernel.end(good=False)
        self.log.fail(EIO, [(each.offset, each.length) for each in self.flushing])
        assert self.log.end(self.number, []) is not None
        self.number = 0
        self.flushing.clear()

    @rule(where=ranges_in_size)
    def write_back_fails(self, where: tuple[int, int]) -> None:
        self.kernel.lose(*where)
        self.log.fail(EIO, [where])
        assert all(each.ticket and each.ticket.failure for each in self.open)

    @rule()
    def clear(self) -> None:
        self.log.clear()

    @rule(where=ranges_in_size)
    def write_back_fails_unnoticed(self, where: tuple[int, int]) -> None:
        """Somebody acknowledges the failure before those who wait hear of it."""
        self.kernel.store(*where)
        if self.log.failure is None:
            self.waiting.append(self.ask(*where))
        self.write_back_fails(where)
        self.log.clear()

    @invariant()
    def the_log_is_sound(self) -> None:
        self.log._check()

    @invariant()
    def what_is_done_is_durable(self) -> None:
        for asked in self.open:
            ticket = asked.ticket
            assert ticket is not None
            if ticket.done:
                assert ticket.failure is None
                self.assert_durable(asked)
            if ticket.failure is not None:
                self.failed.append(ticket)
        self.open = [
            each
            for each in self.open
            if each.ticket is not None and not each.ticket.done and each.ticket.failure is None
        ]

    @invariant()
    def what_failed_stays_failed(self) -> None:
        for ticket in self.failed:
            assert ticket.failure is not None
            assert not ticket.done


TestLogAgainstKernel = LogAgainstKernel.TestCase
