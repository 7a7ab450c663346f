"""Whether a rig can work on this machine."""

from __future__ import annotations

import functools
import os
import sys

RIGS = ("fuse", "loopdev", "smallfs")
"""The markers."""


@functools.cache
def missing(rig: str) -> str | None:
    """Why tests with the marker ``rig`` cannot run here and how to change that; None: they can."""
    if sys.platform != "linux":
        return f"the {rig} rig needs Linux"
    if os.geteuid() != 0:
        return f"the {rig} rig mounts file systems: run the tests as root"
    from .probes import PROBES

    return PROBES["smallfs"]() or PROBES[rig]()
