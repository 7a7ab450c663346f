"""The house plan: a module imports only from lines above its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import aiommap

PACKAGE = Path(aiommap.__file__).parent

# A line's modules do not know each other. _kernel stands for the folder; inside of it a platform
# may import what the platforms share, never another platform's policy.
PLAN = """
_errors _options _range_sets _ranges _read_starts _slow_log _typing _uncopyable
_kernel _event_loop _buffers _opening _piece_size _readahead
_capabilities _range_index _wait_graph
_frontier
_region_queue _flush_batch
_claim_lock _file
_mapped_memory
_mapping
_byte_search _file_creation _map_making _workers
_crew
_batch_crew _stream_crew _reshaping
_paging_crew
_region_lock _pager _flusher
_open_map
_searching _pins _window_stream _region_view _arguments
_map_access _view
_view_sync
_map_shape
_mmap
__init__
_cli testing
__main__
"""
KERNEL_PLAN = """
_protocol _memory
_guarded_copy _map_registry _last_place
_posix
_pipe_copy
_portable
_linux _darwin _windows
__init__
"""

# Outside modules that a layer must not know, and why the plan says so.
FORBIDDEN = {
    "tasks and policy in the kernel": (
        {"_kernel"},
        {"anyio", "asyncio", "trio"},
    ),
    "tasks where files and addresses are": (
        {"_file", "_file_creation", "_mapped_memory", "_mapping", "_map_making", "_byte_search",
         "_reshaping"},
        {"anyio", "asyncio", "trio", "ctypes"},
    ),
    "anything but values in the rules": (
        {"_errors", "_ranges", "_range_sets", "_options", "_range_index", "_wait_graph",
         "_frontier", "_region_queue", "_flush_batch", "_read_starts", "_piece_size", "_readahead"},
        {"anyio", "asyncio", "trio", "ctypes", "mmap", "threading", "time"},
    ),
    "system calls where tasks are": (
        {"_claim_lock", "_region_lock", "_pager", "_flusher", "_open_map", "_searching", "_pins",
         "_window_stream", "_region_view", "_view", "_view_sync", "_arguments", "_map_access",
         "_map_shape", "_mmap"},
        {"ctypes", "mmap", "fcntl", "asyncio", "trio"},
    ),
    "the loop's own library outside of the one module for it": (
        {"_workers"},
        {"asyncio", "trio", "mmap", "ctypes"},
    ),
}  # fmt: skip


def levels(plan: str) -> dict[str, int]:
    return {
        name: level for level, line in enumerate(plan.strip().splitlines()) for name in line.split()
    }


def imported(source: str, package: str = "aiommap") -> set[tuple[str, str]]:
    """What a module imports: ``("own", module of its package)`` and ``("other", top level)``."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            names = (
                [f"{package}.{node.module}"]
                if node.module
                else [f"{package}.{alias.name}" for alias in node.names]
            )
        elif isinstance(node, ast.ImportFrom) and node.level == 2:
            names = [f"aiommap.{node.module}"]
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            names = [node.module]
        else:
            continue
        for name in names:
            if name == package:
                found.add(("own", "__init__"))
            elif name.startswith(f"{package}."):
                found.add(("own", name.removeprefix(f"{package}.").split(".")[0]))
            elif name.startswith("aiommap"):
                found.add(("above", name.removeprefix("aiommap").lstrip(".").split(".")[0]))
            else:
                found.add(("other", name.split(".")[0]))
    return found


def modules() -> dict[str, str]:
    """The source of each module by name; the kernel's as one."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in PACKAGE.glob("*.py")}
    for folder in ("_kernel", "_cli"):
        parts = sorted((PACKAGE / folder).glob("*.py"))
        if parts:
            sources[folder] = "\n".join(
                _flattened(path.read_text(encoding="utf-8")) for path in parts
            )
    return sources


def _flattened(source: str) -> str:
    # Seen from the package: `from .._options` of a module in a folder is `from ._options`, and
    # its own siblings are inside the folder.
    tree = ast.parse(source)
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 2:
            lines.append(f"from .{node.module} import x")
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            lines.append(f"from {node.module} import x")
        elif isinstance(node, ast.Import):
            lines += [f"import {alias.name}" for alias in node.names]
    return "\n".join(lines)


def violations(sources: dict[str, str], plan: str = PLAN) -> list[str]:
    """Imports that go sideways or upwards, and modules that the plan does not have."""
    order = levels(plan)
    found = [f"{name} is not in the house plan" for name in sources if name not in order]
    for name, source in sorted(sources.items()):
        for kind, other in sorted(imported(source)):
            if kind == "own" and order.get(other, -1) >= order.get(name, 99):
                found.append(f"{name} imports {other}, which is not above it")
    return found


def forbidden(sources: dict[str, str]) -> list[str]:
    """Imports of outside modules that a layer must not know."""
    return [
        f"{name} imports {other}: {what}"
        for what, (names, others) in FORBIDDEN.items()
        for name, source in sorted(sources.items())
        if name in names
        for kind, other in sorted(imported(source))
        if kind == "other" and other in others
    ]


def test_imports_go_upwards() -> None:
    """No module imports one of its own line or below; every module has a line."""
    assert violations(modules()) == []


def test_the_kernels_own_order() -> None:
    """Inside the kernel folder platforms import what they share, and nothing sideways."""
    order = levels(KERNEL_PLAN)
    for path in sorted((PACKAGE / "_kernel").glob("*.py")):
        for kind, other in imported(path.read_text(encoding="utf-8"), "aiommap._kernel"):
            if kind == "own":
                assert order[other] < order[path.stem], (path.stem, other)
            if kind == "above":
                assert other in ("_options", "_errors", "_ranges", "_typing"), (path.stem, other)


def test_layers_do_not_know_what_they_must_not() -> None:
    """The kernel knows no tasks, the rules know only values, what users hold no system calls."""
    assert forbidden(modules()) == []


def test_the_plan_has_no_module_that_is_not_there() -> None:
    """A line of the plan names modules that exist."""
    missing = set(levels(PLAN)) - set(modules())
    assert missing == set()


@pytest.mark.parametrize(
    ("module", "planted", "message"),
    [
        ("_ranges", "from ._mmap import AsyncMmap", "_ranges imports _mmap"),
        ("_pager", "from . import _flusher", "_pager imports _flusher"),
        ("_mapping", "import aiommap._view", "_mapping imports _view"),
        ("_mapping", "from aiommap import AsyncMmap", "_mapping imports __init__"),
        ("_view", "def f():\n    from ._map_access import WINDOW", "_view imports _map_access"),
        ("_kernel", "from ._workers import run", "_kernel imports _workers"),
    ],
)
def test_a_planted_violation_is_found(module: str, planted: str, message: str) -> None:
    """The checker fires on each way to import."""
    sources = modules()
    sources[module] += f"\n{planted}\n"
    assert violations(sources) == [f"{message}, which is not above it"]


def test_a_module_without_a_line_is_found() -> None:
    """A new module needs a place in the plan."""
    assert violations({**modules(), "_helpers": ""}) == ["_helpers is not in the house plan"]


@pytest.mark.parametrize(
    ("module", "planted"),
    [("_kernel", "anyio"), ("_region_queue", "threading"), ("_view", "mmap"), ("_file", "asyncio")],
)
def test_a_planted_forbidden_import_is_found(module: str, planted: str) -> None:
    """The checker of outside modules fires too."""
    sources = modules()
    sources[module] += f"\nimport {planted}\n"
    (found,) = forbidden(sources)
    assert found.startswith(f"{module} imports {planted}")
