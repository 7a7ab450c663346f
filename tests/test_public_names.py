"""What users import: names, addresses, docstrings."""

from __future__ import annotations

import enum
import importlib
import inspect
import pickle
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

import aiommap

PUBLIC = [
    "Advice", "AsyncMmap", "Capabilities", "DeadlockError", "FlushError", "MmapOptions",
    "MmapStatistics", "MmapView", "MmapViewSync", "PendingFlush", "Protection", "RegionLease",
    "RegionLock", "RegionLockStatistics", "TruncatedError", "capabilities",
]  # fmt: skip


def members(cls: type) -> Iterator[tuple[str, object]]:
    """The public members of a class, its special methods that users call included."""
    for name, value in inspect.getmembers(cls):
        if not name.startswith("_"):
            yield name, value


def test_all_is_what_the_contract_lists() -> None:
    """``__all__`` is sorted and has the names of the contract, no more and no fewer."""
    assert aiommap.__all__ == PUBLIC
    assert sorted(aiommap.__all__) == aiommap.__all__


def test_nothing_else_is_public() -> None:
    """Every other name of the package is a module of it, private, or from __future__."""
    others = {name for name in vars(aiommap) if not name.startswith("_")} - set(PUBLIC)
    assert others <= {"annotations", "testing"}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_address(name: str) -> None:
    """Names say that they live where users import them from."""
    value = getattr(aiommap, name)
    assert value.__module__ == "aiommap"
    assert value.__qualname__ == name
    assert pickle.loads(pickle.dumps(value)) is value


def test_errors_of_anyio_are_used_as_they_are() -> None:
    """ClosedResourceError, BusyResourceError and WouldBlock are anyio's, not ours."""
    for name in ("ClosedResourceError", "BusyResourceError", "WouldBlock"):
        assert hasattr(anyio, name)
        assert not hasattr(aiommap, name)


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings(name: str) -> None:
    """Every public class, function, method and property says what it does."""
    value = getattr(aiommap, name)
    assert (value.__doc__ or "").strip(), name
    assert not (value.__doc__ or "").startswith(f"{name}("), "the dataclass's own"
    if not inspect.isclass(value):
        return
    without = []
    for member, function in members(value):
        if issubclass(value, enum.Enum) and member in ("name", "value"):
            continue
        if not (inspect.isroutine(function) or isinstance(function, property)):
            continue
        if issubclass(value, OSError) and member in dir(OSError):
            continue
        if not inspect.getdoc(function):
            without.append(member)
    assert without == []


@pytest.mark.parametrize("name", PUBLIC)
def test_parameters_named_in_docstrings_exist(name: str) -> None:
    """A ``:param x:`` in a docstring is a parameter of the function."""
    value = getattr(aiommap, name)
    functions = [value] if inspect.isfunction(value) else [
        getattr(function, "__func__", function)
        for _, function in members(value)
        if inspect.isroutine(function)
    ]  # fmt: skip
    for function in functions:
        named = set(re.findall(r":param (\w+):", function.__doc__ or ""))
        if named:
            assert named <= set(inspect.signature(function).parameters), function


def test_boolean_and_limiter_parameters_are_keyword_only() -> None:
    """``limiter`` and whatever is true or false are given by name."""
    for name in PUBLIC:
        value = getattr(aiommap, name)
        if not inspect.isclass(value) or issubclass(value, (enum.Enum, BaseException)):
            continue
        for member, function in members(value):
            if not inspect.isroutine(function):
                continue
            for parameter in inspect.signature(function).parameters.values():
                if parameter.name == "limiter" or isinstance(parameter.default, bool):
                    assert parameter.kind is parameter.KEYWORD_ONLY, (name, member, parameter)


METHODS = {
    "AsyncMmap": """
        open open_path open_with_offset create anonymous anonymous_with_options protection offset
        private closed ptr mut_ptr as_slice as_mut_slice flush flush_range flush_async
        flush_async_range view view_mut view_nowait view_mut_nowait into_view into_view_sync
        read_at readinto_at write_at windows find rfind move load resident advise pin unpin resize
        set_protection clear_flush_error statistics file_size aclose
        """,
    "MmapView": """
        offset writable closed buffer as_slice as_mut_slice ptr mut_ptr split_at restrict flush
        flush_range flush_async flush_async_range downgrade aclose read readinto readline write
        seek tell
        """,
    "PendingFlush": "wait done",
    "RegionLock": "shared exclusive shared_nowait exclusive_nowait statistics",
    "RegionLease": "release split_at restrict downgrade start stop exclusive",
    "Capabilities": """
        populate nowait_reads cachestat mincore write_back_start full_sync huge_pages ofd_locks
        reserve page_size
        """,
    "MmapStatistics": """
        views waiting loads_inline loads_off_loop bytes_loaded flushes_requested flushes_done
        writebacks_started
        """,
}
METHODS["MmapViewSync"] = METHODS["MmapView"] + " clone"


@pytest.mark.parametrize("name", METHODS)
def test_members_are_those_of_the_contract(name: str) -> None:
    """Each class has the members that the contract's tables list, and no others."""
    assert {member for member, _ in members(getattr(aiommap, name))} == set(METHODS[name].split())


def test_special_methods() -> None:
    """len, items, async with, async for, await, bytes: as the contract says."""
    for cls in (aiommap.MmapView, aiommap.MmapViewSync):
        for name in (
            "__len__", "__getitem__", "__setitem__", "__bytes__", "__buffer__", "__aenter__",
            "__aexit__", "__aiter__", "__anext__",
        ):  # fmt: skip
            assert callable(getattr(cls, name))
        assert cls.__iter__ is None
    assert hasattr(aiommap.PendingFlush, "__await__")
    assert hasattr(aiommap.AsyncMmap, "__aenter__")


def test_every_module_can_be_imported() -> None:
    """Modules import nothing that is not installed with us."""
    for module in pkgutil.walk_packages(aiommap.__path__, "aiommap."):
        other_platform = {"_windows": "win32", "_darwin": "darwin", "_linux": "linux"}.get(
            module.name.rsplit(".")[-1], sys.platform
        )
        # The command line has libraries of its own, and runs when it is imported as __main__.
        if other_platform == sys.platform and not re.search("_cli|__main__", module.name):
            importlib.import_module(module.name)


def test_typed() -> None:
    """The package says that it is typed."""
    assert (Path(aiommap.__file__).parent / "py.typed").exists()
