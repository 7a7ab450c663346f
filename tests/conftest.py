"""The event loops that every async test runs on."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.rigs.plugin"]

# No deadlines: the machines that run this are shared. AIOMMAP_HYPOTHESIS=thorough runs as many
# random sequences as the issues ask for.
settings.register_profile(
    "quick", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=100
)
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=1000)
settings.load_profile(os.environ.get("AIOMMAP_HYPOTHESIS", "quick"))


def eager_loop() -> asyncio.AbstractEventLoop:
    """An asyncio loop whose tasks start running inside ``create_task`` (3.12 and later)."""
    loop = asyncio.new_event_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined, unused-ignore]
    return loop


BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {"asyncio": ("asyncio", {})}
if sys.version_info >= (3, 12):
    BACKENDS["eager"] = ("asyncio", {"loop_factory": eager_loop})
if sys.platform != "win32":
    BACKENDS["uvloop"] = ("asyncio", {"use_uvloop": True})
BACKENDS["trio"] = ("trio", {})


@pytest.fixture(params=list(BACKENDS.values()), ids=list(BACKENDS))
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def backend_name(anyio_backend: tuple[str, dict[str, Any]]) -> str:
    """``asyncio`` or ``trio``."""
    return anyio_backend[0]
