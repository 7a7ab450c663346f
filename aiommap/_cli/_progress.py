"""How far a command is: what the commands need of whatever shows it."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

Complain = Callable[[str], object]
"""Called with what could not be done."""


class Progress(Protocol):
    """Shows how far a command is."""

    def begin(self, name: str, total: int) -> None:
        """The next part of the work, and how much it is."""

    def advance(self, amount: int) -> None:
        """So much more of it is done."""


async def for_each_file(
    options: argparse.Namespace,
    complain: Complain,
    find: Callable[[str], Awaitable[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """What is found for each file; files that cannot be looked at are complained about."""
    found = []
    for path in options.files:
        try:
            found.append(await find(path))
        except (OSError, ValueError) as error:
            complain(str(error) if path in str(error) else f"{path}: {error}")
    return found
