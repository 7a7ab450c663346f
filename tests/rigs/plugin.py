"""The pytest plugin of the rigs: fixtures, and the gate that skips tests whose rig is missing.

A test says what it needs by ``@pytest.mark.fuse``, ``loopdev`` or ``smallfs``. On a machine without
it, the test is skipped with the reason and the remedy; with ``AIOMMAP_REQUIRE_RIGS=1`` (CI) it
fails instead, so that no machine can drop the proofs by accident. A fixture of a rig refuses a test
that lacks the marker, for the same reason.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import ParamSpec, TypeVar

import pytest

from .availability import RIGS, missing

P = ParamSpec("P")
T = TypeVar("T")

REQUIRE = "AIOMMAP_REQUIRE_RIGS"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for rig in RIGS:
        if item.get_closest_marker(rig) is None:
            continue
        reason = missing(rig)
        if reason is not None:
            if os.environ.get(REQUIRE) == "1":
                pytest.fail(f"{reason} ({REQUIRE}=1 forbids skipping)", pytrace=False)
            pytest.skip(reason)


@pytest.fixture
def rig_stack() -> Iterator[ExitStack]:
    """Holds what a test starts and ends it, in reverse order, whatever became of the test."""
    with ExitStack() as stack:
        yield stack


def _needs(request: pytest.FixtureRequest, *rigs: str) -> None:
    if not any(request.node.get_closest_marker(rig) for rig in rigs):
        pytest.fail(f"mark this test with @pytest.mark.{' or '.join(rigs)}", pytrace=False)


if sys.platform == "linux":
    from .crash_image import CrashImage, crash_image
    from .logged_disk import LoggedDisk, logged_disk
    from .slow_file import SlowFile, slow_file
    from .small_fs import SmallFileSystem, small_fs

    def _maker(stack: ExitStack, make: Callable[P, AbstractContextManager[T]]) -> Callable[P, T]:
        def start(*args: P.args, **kwargs: P.kwargs) -> T:
            return stack.enter_context(make(*args, **kwargs))

        return start

    @pytest.fixture
    def make_slow_file(
        request: pytest.FixtureRequest, rig_stack: ExitStack
    ) -> Callable[..., SlowFile]:
        """:func:`~tests.rigs.slow_file.slow_file`, ended with the test."""
        _needs(request, "fuse")
        return _maker(rig_stack, slow_file)

    @pytest.fixture(name="slow_file")
    def _slow_file(make_slow_file: Callable[..., SlowFile]) -> SlowFile:
        """A file of 16 MiB that is not slow yet."""
        return make_slow_file()

    @pytest.fixture
    def make_small_fs(
        request: pytest.FixtureRequest, rig_stack: ExitStack
    ) -> Callable[..., SmallFileSystem]:
        """:func:`~tests.rigs.small_fs.small_fs`, ended with the test."""
        _needs(request, "smallfs", "loopdev")
        return _maker(rig_stack, small_fs)

    @pytest.fixture
    def make_crash_image(
        request: pytest.FixtureRequest, rig_stack: ExitStack
    ) -> Callable[..., CrashImage]:
        """:func:`~tests.rigs.crash_image.crash_image`, ended with the test."""
        _needs(request, "loopdev")
        return _maker(rig_stack, crash_image)

    @pytest.fixture
    def make_logged_disk(
        request: pytest.FixtureRequest, rig_stack: ExitStack
    ) -> Callable[..., LoggedDisk]:
        """:func:`~tests.rigs.logged_disk.logged_disk`, ended with the test."""
        _needs(request, "fuse")
        _needs(request, "loopdev")
        return _maker(rig_stack, logged_disk)
