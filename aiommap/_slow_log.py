"""What took long is told to the log ``aiommap``, at debug level, by the worker that waited.

Never from the event loop: a handler may write to the very disk that is slow.
"""

from __future__ import annotations

import logging
import time

SLOW_SECONDS = 0.1
"""What a program notices: a disk's seek takes a tenth of it, its cache's flush a third."""

_logger = logging.getLogger("aiommap")


def log_if_slow(began: float, message: str, *args: object) -> None:
    """
    Tell the log if it took :data:`SLOW_SECONDS` or more.

    :param began: by ``time.monotonic()``
    :param message: with ``%``-placeholders for ``args``
    """
    seconds = time.monotonic() - began
    if seconds >= SLOW_SECONDS:
        _logger.debug(message + ": %.3f s", *args, seconds)
