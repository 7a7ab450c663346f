"""Which ranges overlap this one? An index that costs the same with 0 and with 100 000 ranges.

It keeps pieces: objects with a ``start`` and a ``stop`` (``start < stop``, any integers).

Pieces are kept apart by size class, the power of two that their length fits in. A class cuts
the integers into buckets of its own size, so a piece lies in one bucket or in two neighbours,
and whatever overlaps a range lies in the buckets that the range touches. Buckets are a hash
table: only those in use exist. A piece alone in its bucket *is* the bucket; several are
grouped by their exact range, so that a crowd of readers next to the range asked for costs one
comparison.

A search looks at each class in use (at most about 40 between a byte and a TiB, mostly one or
two). Where the range touches few buckets of the class, it looks them up. A wide one would touch
millions of small buckets, nearly all of them unused; so a class with more than :data:`FAN`
buckets keeps a trie over the numbers of those in use, ``FAN`` children to a node, and the wide
search descends only to what exists. Small locks have no trie, 100 000 buckets one of two or
three levels, and a bucket whose parent exists already costs one bit there.

Cost: O(1) hash operations to add and to remove (the trie's levels at worst), O(classes) for a
narrow search, O(classes * log n + found) for a wide one. To this comes a comparison for each
distinct range that shares a bucket with the range asked for without meeting it: thousands of wide
ranges that start a little apart each lie in the same two buckets, and a search that passes between
them looks at them all.

Rejected: a sorted list with binary search (simple, but 17 cache misses deep at 100 000: 2.3 us
per add and remove, against 0.7 us for the hash table); one list sorted by start with the
greatest length kept beside it (one wide range makes every search a scan); a balanced tree (5 to
10 times the cost in Python).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

FAN_BITS = 6
FAN = 1 << FAN_BITS
"""Children of a trie node. 16 to 256 measured the same."""

FEW = 8
"""
Nodes at the top of a trie of several levels, at most: a wide search tries them all. With 64 a
search of a TiB among 100 000 pages cost 1 us more; more levels cost those who come and go.
"""


class HasRange(Protocol):
    """A piece: it covers ``[start, stop)`` and does not change while it is in an index."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


Piece = TypeVar("Piece", bound=HasRange)
Group = dict[tuple[int, int], dict[Piece, None]]


class _SizeClass(Generic[Piece]):
    """
    The buckets of one size class, and the trie over their numbers.

    The node ``parents[number >> FAN_BITS]`` is an int with bit ``number % FAN`` set for each
    bucket in use: it costs a bit for a bucket, and few cache misses, which is what counts at
    100 000. ``levels[0]`` is ``parents``, ``levels[1]`` has the numbers of ``levels[0]``, and
    so on; without levels ``parents`` is empty.
    """

    __slots__ = ("buckets", "levels", "parents")

    def __init__(self) -> None:
        self.buckets: dict[int, Piece | Group[Piece]] = {}
        self.parents: dict[int, int] = {}
        self.levels: list[dict[int, int]] = []

    def put(self, number: int, piece: Piece) -> None:
        buckets = self.buckets
        there = buckets.get(number)
        if there is None:
            buckets[number] = piece
            if self.levels or len(buckets) > FAN:
                self._note(number)
            return
        if not isinstance(there, dict):
            # One piece to a bucket is by far the most frequent: no dict for it.
            there = {(there.start, there.stop): {there: None}}
            buckets[number] = there
        there.setdefault((piece.start, piece.stop), {})[piece] = None

    def take(self, number: int, piece: Piece) -> None:
        there = self.buckets[number]
        if isinstance(there, dict):
            group = there[piece.start, piece.stop]
            del group[piece]
            if not group:
                del there[piece.start, piece.stop]
            if there:
                return
        del self.buckets[number]
        if self.levels:
            self._forget(number)

    def _note(self, number: int) -> None:
        for level in self.levels:
            parent = number >> FAN_BITS
            siblings = level.get(parent, 0)
            level[parent] = siblings | 1 << number % FAN
            if siblings:
                return
            number = parent
        top = self.levels[-1] if self.levels else self.buckets
        if len(top) > (FEW if self.levels else FAN):
            level = {} if self.levels else self.parents
            for number in top:
                parent = number >> FAN_BITS
                level[parent] = level.get(parent, 0) | 1 << number % FAN
            self.levels.append(level)

    def _forget(self, number: int) -> None:
        for level in self.levels:
            parent = number >> FAN_BITS
            siblings = level[parent] ^ 1 << number % FAN
            if siblings:
                level[parent] = siblings
                return
            del level[parent]
            number = parent
        if not self.levels[-1]:
            # Nothing is left. Tables that were large stay large, and slow to look through.
            self.levels.clear()
            self.buckets = {}
            self.parents = {}

    def in_use(self, first: int, last: int) -> Iterable[int]:
        """The numbers of the buckets in use from ``first`` to ``last``, both included."""
        shift = FAN_BITS * len(self.levels)
        low, high = first >> shift, last >> shift
        top = self.levels[-1] if self.levels else self.buckets
        if high - low < len(top):
            numbers = [number for number in range(low, high + 1) if number in top]
        else:
            numbers = [number for number in top if low <= number <= high]
        if not numbers:
            return numbers
        for level in reversed(self.levels):
            shift -= FAN_BITS
            low, high = first >> shift, last >> shift
            children = []
            for number in numbers:
                siblings = level[number]
                child = number << FAN_BITS
                if child < low:
                    siblings &= -1 << low - child
                if child + FAN > high:
                    siblings &= (2 << high - child) - 1
                while siblings:
                    lowest = siblings & -siblings
                    siblings ^= lowest
                    children.append(child + lowest.bit_length() - 1)
            numbers = children
        return numbers

    def any_in_use(self, first: int, last: int) -> bool:
        """Whether a bucket from ``first`` to ``last``, both included, is in use."""
        shift = FAN_BITS * len(self.levels)
        low, high = first >> shift, last >> shift
        top = self.levels[-1] if self.levels else self.buckets
        # Below each node is a bucket in use; below the outermost two it may be out of the range.
        if high - low < len(top):
            numbers = [number for number in range(low, high + 1) if number in top]
        else:
            numbers = [number for number in top if low <= number <= high]
        if not numbers:
            return False
        outermost = {low, high}.intersection(numbers)
        if len(numbers) > len(outermost):
            return True
        for level in reversed(self.levels):
            shift -= FAN_BITS
            low, high = first >> shift, last >> shift
            ends = set()
            for number in outermost:
                siblings = level[number]
                child = number << FAN_BITS
                if child < low:
                    siblings &= -1 << low - child
                if child + FAN > high:
                    siblings &= (2 << high - child) - 1
                for end in (low, high):
                    if child <= end < child + FAN and siblings >> end - child & 1:
                        ends.add(end)
                        siblings &= ~(1 << end - child)
                if siblings:
                    return True
            outermost = ends
        return bool(outermost)


class RangeIndex(Generic[Piece]):
    """
    Pieces, to be found by what they overlap. Several of the very same range are fine.

    :ivar classes: the size classes in use; empty when there are no pieces
    """

    __slots__ = ("_spare", "classes")

    def __init__(self) -> None:
        self.classes: dict[int, _SizeClass[Piece]] = {}
        # A lone range that comes and goes should not build its class each time.
        self._spare: _SizeClass[Piece] | None = None

    def add(self, piece: Piece) -> None:
        """Insert a piece that is not there yet."""
        start = piece.start
        last = piece.stop - 1
        exponent = (last - start).bit_length()
        size = self.classes.get(exponent)
        if size is None:
            size = self._spare or _SizeClass()
            self._spare = None
            self.classes[exponent] = size
        number = start >> exponent
        buckets = size.buckets
        if number in buckets or size.levels or len(buckets) >= FAN:
            size.put(number, piece)
        else:
            buckets[number] = piece
        if last >> exponent != number:
            size.put(last >> exponent, piece)

    def add_if_free(self, piece: Piece) -> bool:
        """Insert the piece unless it overlaps another one; whether it was inserted."""
        classes = self.classes
        if not classes:
            self.add(piece)
            return True
        start = piece.start
        if len(classes) == 1:
            # The hot path, where all pieces are of one size and this one lies in one bucket:
            # whatever overlaps it would be in that bucket, too.
            last = piece.stop - 1
            exponent = (last - start).bit_length()
            number = start >> exponent
            size = classes.get(exponent)
            if size is not None and last >> exponent == number and number not in size.buckets:
                siblings = size.parents.get(number >> FAN_BITS)
                if siblings is not None:  # put(), inlined as far as it goes nearly always
                    size.buckets[number] = piece
                    size.parents[number >> FAN_BITS] = siblings | 1 << number % FAN
                elif size.levels or len(size.buckets) >= FAN:
                    size.put(number, piece)
                else:
                    size.buckets[number] = piece
                return True
        if self.overlaps(start, piece.stop):
            return False
        self.add(piece)
        return True

    def remove(self, piece: Piece) -> None:
        """Take out a piece that is there."""
        start = piece.start
        last = piece.stop - 1
        exponent = (last - start).bit_length()
        size = self.classes[exponent]
        number = start >> exponent
        buckets = size.buckets
        if buckets[number] is not piece:
            size.take(number, piece)
        elif not size.levels:
            del buckets[number]
        else:
            siblings = size.parents[number >> FAN_BITS] ^ 1 << number % FAN
            if siblings:
                del buckets[number]
                size.parents[number >> FAN_BITS] = siblings
            else:
                size.take(number, piece)
        if last >> exponent != number:
            size.take(last >> exponent, piece)
        if not buckets:
            self._spare = size
            del self.classes[exponent]

    def overlaps(self, start: int, stop: int) -> bool:
        """Whether any piece overlaps ``[start, stop)``."""
        for exponent, size in self.classes.items():
            first = start >> exponent
            last = (stop - 1) >> exponent
            numbers: Iterable[int]
            if last - first < 3:
                numbers = range(first, last + 1)
            elif not size.any_in_use(first, last):
                continue
            elif size.any_in_use(first + 1, last - 1):
                return True  # in all but the outermost buckets a piece overlaps as it is there
            else:
                numbers = (first, last)
            for number in numbers:
                there = size.buckets.get(number)
                if there is None:
                    continue
                if not isinstance(there, dict):
                    if there.start < stop and start < there.stop:
                        return True
                elif any(low < stop and start < high for low, high in there):
                    return True
        return False

    def overlapping(self, start: int, stop: int) -> list[Piece]:
        """The pieces that overlap ``[start, stop)``."""
        found: list[Piece] = []
        for exponent, size in self.classes.items():
            first = start >> exponent
            for number in size.in_use(first, (stop - 1) >> exponent):
                there = size.buckets[number]
                if not isinstance(there, dict):
                    # A piece in two buckets counts in the first one that is looked at.
                    low, high = there.start, there.stop
                    if (
                        low < stop
                        and start < high
                        and (low >> exponent == number or first == number)
                    ):
                        found.append(there)
                    continue
                for (low, high), group in there.items():
                    if (
                        low < stop
                        and start < high
                        and (low >> exponent == number or first == number)
                    ):
                        found += group
        return found

    def pieces(self) -> list[Piece]:
        """Every piece."""
        found: dict[Piece, None] = {}
        for size in self.classes.values():
            for there in size.buckets.values():
                if not isinstance(there, dict):
                    found[there] = None
                    continue
                for group in there.values():
                    found |= group
        return list(found)

    def check(self) -> None:
        """Assert every invariant. For tests: O(n)."""
        pieces = self.pieces()
        for exponent, size in self.classes.items():
            assert size.buckets, "an empty class is spare"
            expected: dict[int, set[Piece]] = {}
            for piece in pieces:
                assert piece.start < piece.stop
                if (piece.stop - piece.start - 1).bit_length() == exponent:
                    for number in (piece.start >> exponent, (piece.stop - 1) >> exponent):
                        expected.setdefault(number, set()).add(piece)
            found = {}
            for number, there in size.buckets.items():
                groups = there.items() if isinstance(there, dict) else [((0, 0), {there: None})]
                found[number] = {piece for _, group in groups for piece in group}
                for key, group in groups:
                    assert group
                    assert key == (0, 0) or {(p.start, p.stop) for p in group} == {key}
            assert found == expected
            below = set(size.buckets)
            assert size.levels[:1] == ([size.parents] if size.parents else [])
            assert size.levels or len(below) <= FAN
            for level in size.levels:
                children = {
                    (number << FAN_BITS) + bit
                    for number, siblings in level.items()
                    for bit in range(FAN)
                    if siblings >> bit & 1
                }
                assert children == below
                assert all(0 < siblings < 1 << FAN for siblings in level.values())
                below = set(level)


def finder(pieces: Sequence[Piece]) -> Callable[[int, int], list[Piece]]:
    """A search for those of a few or many pieces that overlap a range."""
    if len(pieces) > 8:  # out of the air; an index costs a few microseconds to build
        index: RangeIndex[Piece] = RangeIndex()
        for piece in pieces:
            index.add(piece)
        return index.overlapping
    return lambda start, stop: [p for p in pieces if p.start < stop and start < p.stop]
