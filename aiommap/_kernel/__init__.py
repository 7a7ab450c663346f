"""The kernel under us: one file per platform with the same functions, chosen once at import."""

from __future__ import annotations

import sys

from ._memory import address_of as address_of
from ._memory import new_bytes as new_bytes
from ._protocol import Buffer as Buffer
from ._protocol import Capabilities as Capabilities
from ._protocol import Kernel as Kernel
from ._protocol import Scratch as Scratch

if sys.platform == "linux":
    from . import _linux as _platform
elif sys.platform == "darwin":
    from . import _darwin as _platform
elif sys.platform == "win32":
    from . import _windows as _platform
else:
    from . import _portable as _platform

native: Kernel = _platform

__all__ = ["Buffer", "Capabilities", "Kernel", "Scratch", "address_of", "native", "new_bytes"]
