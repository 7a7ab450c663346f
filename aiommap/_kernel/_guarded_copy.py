"""A copy that ends at the first missing page, out of one that only says "some page is missing"."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

Carry = Callable[[int, int, int], int]
"""
``carry(destination, source, length)``: the bytes copied, from the front; 0 where a page is
missing and nothing tells which.
"""


def copy_until_missing(
    destination: int, source: int, length: int, *, carry: Carry, most: int, page_size: int
) -> int:
    """
    Copy with as few calls as possible, and to the last byte that can be had.

    :param most: bytes for one call; at most one such piece is tried in vain before the missing
        page is approached page by page
    :return: the bytes copied
    :raises OSError: EFAULT where nothing could be copied; what ``carry`` raises
    """
    done = 0
    while done < length:
        piece = min(length - done, most)
        carried = carry(destination + done, source + done, piece)
        if carried == 0:
            # Up to the next page of either side it is all or nothing.
            piece = min(
                piece,
                page_size - (destination + done) % page_size,
                page_size - (source + done) % page_size,
            )
            carried = carry(destination + done, source + done, piece)
            if carried == 0:
                break
        done += carried
    if done == 0 and length:
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
    return done
