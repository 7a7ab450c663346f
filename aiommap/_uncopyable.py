"""Objects of which there is one: a copy would give back what it holds a second time."""

from __future__ import annotations

from typing import NoReturn


class Uncopyable:
    """Refuses to be copied and pickled, as :class:`mmap.mmap` does."""

    __slots__ = ()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"cannot copy or pickle {type(self).__name__} objects")
