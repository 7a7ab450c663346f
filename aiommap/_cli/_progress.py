"""How far a command is: what the commands need of whatever shows it."""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import anyio

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
            if await anyio.to_thread.run_sync(is_empty, path):
                complain(f"{path!r} is empty: nothing to show")
            else:
                found.append(await find(path))
        except OSError as error:
            complain(str(error) if error.filename is not None else f"{path}: {error}")
        except ValueError as error:
            complain(f"{path}: {error}")
    return found


def is_empty(path: str) -> bool:
    """Whether it is a file without content. :raises OSError: there is none"""
    status = os.stat(path)
    return stat.S_ISREG(status.st_mode) and status.st_size == 0
