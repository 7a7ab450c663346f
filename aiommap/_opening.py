"""What can be awaited or entered: ``x = await f()`` and ``async with f() as x``."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from ._uncopyable import Uncopyable


class _Nothing:
    """What is awaited where there is nothing to wait for: cheaper than a coroutine."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, Any, None]:
        return iter(())  # type: ignore[return-value]


NOTHING = _Nothing()


class Closable(Protocol):
    """What an opening gives: something that ``async with`` can leave."""

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None: ...


C = TypeVar("C", bound=Closable)


class Opening(Uncopyable, Generic[C]):
    """
    Something that will be opened when it is awaited or entered, once.

    Its arguments are checked already. Never awaited, it leaves nothing behind: no descriptor,
    no region and no warning.
    """

    __slots__ = ("_start", "_value")

    def __init__(self, start: Callable[[], Coroutine[Any, Any, C]]) -> None:
        self._start: Callable[[], Coroutine[Any, Any, C]] | None = start

    def _begin(self) -> Coroutine[Any, Any, C]:
        start, self._start = self._start, None
        if start is None:
            raise RuntimeError("already awaited or entered: call again for another one")
        return start()

    def __await__(self) -> Generator[Any, Any, C]:
        return self._begin().__await__()

    def __repr__(self) -> str:
        state = "used already" if self._start is None else "await it, or enter it with async with"
        return f"<{type(self).__name__}: {state}>"

    async def __aenter__(self) -> C:
        self._value = await self._begin()
        return self._value

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._value.__aexit__(exc_type, exc_value, traceback)
