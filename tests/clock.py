"""A clock for tests, in the place of the module :mod:`time`."""

from __future__ import annotations


class Clock:
    """
    It stands still until a test moves it.

    :ivar now: what it says, in seconds
    """

    def __init__(self) -> None:
        self.now = 1.0

    def monotonic(self) -> float:
        return self.now
