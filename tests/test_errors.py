"""The errors that are ours."""

from __future__ import annotations

import copy
import errno
import os
import pickle

import pytest

from aiommap import DeadlockError, FlushError, TruncatedError


@pytest.mark.parametrize("filename", [None, "/some/file", b"/some/\xff"])
@pytest.mark.parametrize("through", ["pickle", "copy"])
def test_truncated_error_round_trip(filename: str | bytes | None, through: str) -> None:
    """A TruncatedError keeps its fields and its message through pickle and copy."""
    error = TruncatedError(10, 20, 15, filename)
    again = pickle.loads(pickle.dumps(error)) if through == "pickle" else copy.copy(error)
    assert type(again) is TruncatedError
    assert (again.offset, again.length, again.size) == (10, 20, 15)
    assert again.filename == filename
    assert again.errno == error.errno == errno.ENODATA
    assert str(again) == str(error)


def test_truncated_error_says_what_to_do() -> None:
    """The message names the bytes, where the file ends, the path, and the ways out."""
    message = str(TruncatedError(10, 20, 15, "/some/file"))
    assert "bytes 10 to 30 of the map are not in the file any more" in message
    assert "reaches to byte 15" in message
    assert "/some/file" in message
    assert "resize()" in message
    assert "reopen" in message


@pytest.mark.parametrize("filename", [None, "/some/file"])
@pytest.mark.parametrize("ranges", [(), ((0, 5),), tuple((10 * i, 5) for i in range(9))])
@pytest.mark.parametrize("through", ["pickle", "copy"])
def test_flush_error_round_trip(
    filename: str | None, ranges: tuple[tuple[int, int], ...], through: str
) -> None:
    """A FlushError keeps errno, filename, ranges and message through pickle and copy."""
    error = FlushError(errno.EIO, ranges, filename)
    again = pickle.loads(pickle.dumps(error)) if through == "pickle" else copy.copy(error)
    assert type(again) is FlushError
    assert (again.errno, again.filename, again.ranges) == (errno.EIO, filename, ranges)
    assert str(again) == str(error)


def test_flush_error_says_what_is_lost_and_what_to_do() -> None:
    """The message has the kernel's reason, the ranges (the first four), and the way out."""
    message = str(FlushError(errno.ENOSPC, [(0, 5), (10, 10)]))
    assert os.strerror(errno.ENOSPC) in message
    assert "[0, 5), [10, 20)" in message
    assert "clear_flush_error()" in message
    message = str(FlushError(errno.EIO, [(10 * i, 5) for i in range(9)]))
    assert "[30, 35) and 5 more ranges" in message
    assert "stores into the map" in str(FlushError(errno.EIO))


def test_their_places_among_exceptions() -> None:
    """Errors of storage are OSErrors, a deadlock is a RuntimeError."""
    assert issubclass(TruncatedError, OSError)
    assert issubclass(FlushError, OSError)
    assert issubclass(DeadlockError, RuntimeError)
    with pytest.raises(OSError, match="may be lost"):
        raise FlushError(errno.EIO)


def test_deadlock_error_round_trip() -> None:
    """A DeadlockError goes through pickle."""
    assert str(pickle.loads(pickle.dumps(DeadlockError("why")))) == "why"
