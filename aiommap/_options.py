"""How a map is opened and what the kernel is told about it. Pure values."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Protection(enum.Enum):
    """
    What may be done with the memory of a map. Every call that takes one also takes its value.

    There is no member that is writable and executable at once.
    """

    READ = "r"
    """Reads. Needs a readable descriptor."""
    READ_WRITE = "r+"
    """Reads, and stores that reach the file. Needs a readable and writable descriptor."""
    READ_COPY = "c"
    """Reads, and private stores that never reach the file (copy on write)."""
    READ_EXECUTE = "rx"
    """Reads and execution of the bytes as machine code."""

    @property
    def writable(self) -> bool:
        """Whether the memory takes stores: READ_WRITE and READ_COPY."""
        return self in (Protection.READ_WRITE, Protection.READ_COPY)

    @classmethod
    def parse(cls, value: Protection | str) -> Protection:
        """
        A member, from itself or from its value.

        :raises ValueError: for a string that is no member's value; lists those that are
        :raises TypeError: for anything else
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            raise TypeError(f"protection must be a Protection or a string, not {value!r}")
        try:
            return cls(value)
        except ValueError:
            known = ", ".join(f"{member.value!r} ({member.name})" for member in cls)
            raise ValueError(f"protection {value!r} is not known; use one of {known}") from None


class Advice(enum.Enum):
    """
    Hints to the kernel about a range. None of them can change the bytes of a map.

    The names are those of ``madvise(2)``; what a platform does not know is OSError with
    ``ENOTSUP``.
    """

    NORMAL = "normal"
    RANDOM = "random"
    """Pages are touched in no order: no read-ahead."""
    SEQUENTIAL = "sequential"
    """Pages are touched in order: read ahead more."""
    WILL_NEED = "will_need"
    """Start reading. A hint with a cap; :meth:`~aiommap.AsyncMmap.load` waits and is sure."""
    COLD = "cold"
    """First to go when memory is short."""
    PAGE_OUT = "page_out"
    """Write back and let go now."""
    HUGE_PAGE = "huge_page"
    NO_HUGE_PAGE = "no_huge_page"
    DONT_FORK = "dont_fork"
    """A forked child does not get the range; touching it there is a fault."""
    DO_FORK = "do_fork"
    DONT_DUMP = "dont_dump"
    """Leave the range out of core dumps."""
    DO_DUMP = "do_dump"
    MERGEABLE = "mergeable"
    UNMERGEABLE = "unmergeable"

    @classmethod
    def parse(cls, value: Advice | str) -> Advice:
        """
        A member, from itself or from its value.

        :raises ValueError: for a string that is no member's value
        :raises TypeError: for anything else
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            raise TypeError(f"advice must be an Advice or a string, not {value!r}")
        try:
            return cls(value)
        except ValueError:
            known = ", ".join(repr(member.value) for member in cls)
            raise ValueError(f"advice {value!r} is not known; use one of {known}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class MmapOptions:
    """
    How anonymous memory is made.

    :ivar stack: the memory will be a stack (``MAP_STACK``; Linux takes it as a hint)
    :ivar huge: huge pages (``MAP_HUGETLB``); the length must be a multiple of their size and
        the system must have some reserved, else opening raises OSError
    :ivar populate: bring every page in before the map is handed out
    """

    stack: bool = False
    huge: bool = False
    populate: bool = False

    def __post_init__(self) -> None:
        for name in ("stack", "huge", "populate"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, not {value!r}")
