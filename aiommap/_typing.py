"""Names for annotations that the oldest supported Python does not have."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if sys.version_info >= (3, 12):
    from collections.abc import Buffer as Buffer
elif TYPE_CHECKING:
    from typing_extensions import Buffer as Buffer
else:
    # Evaluated by nobody but tools that resolve annotations at run time.
    Buffer = Any
