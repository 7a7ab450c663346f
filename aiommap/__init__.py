"""Memory-mapped files for asyncio and trio: the event loop never waits for the disk."""

from __future__ import annotations

from ._capabilities import capabilities as capabilities
from ._errors import DeadlockError as DeadlockError
from ._errors import FlushError as FlushError
from ._errors import TruncatedError as TruncatedError
from ._flusher import PendingFlush as PendingFlush
from ._kernel import Capabilities as Capabilities
from ._mmap import AsyncMmap as AsyncMmap
from ._open_map import MmapStatistics as MmapStatistics
from ._options import Advice as Advice
from ._options import MmapOptions as MmapOptions
from ._options import Protection as Protection
from ._region_lock import RegionLease as RegionLease
from ._region_lock import RegionLock as RegionLock
from ._region_lock import RegionLockStatistics as RegionLockStatistics
from ._view import MmapView as MmapView
from ._view_sync import MmapViewSync as MmapViewSync

__all__ = [
    "Advice",
    "AsyncMmap",
    "Capabilities",
    "DeadlockError",
    "FlushError",
    "MmapOptions",
    "MmapStatistics",
    "MmapView",
    "MmapViewSync",
    "PendingFlush",
    "Protection",
    "RegionLease",
    "RegionLock",
    "RegionLockStatistics",
    "TruncatedError",
    "capabilities",
]

# Shown, pickled and documented under the address that users import from.
for _name in __all__:
    globals()[_name].__module__ = __name__
del _name
