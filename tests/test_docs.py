"""The code in README.md and docs/ runs, and what the pages refer to exists.

How a page is run. Its Python fences are one script, from top to bottom: they share their names
and a folder that is empty at first, and may ``await`` at the top level. A fence that starts an
event loop itself (``anyio.run``) is a program, and runs alone. What stands behind ``python`` in
the fence's first line changes that:

* ``python asyncio``, ``python trio``: only there
* ``python linux``: only there
* ``python needs=numpy,pyarrow``: only where these are installed
* ``python norun``: never

A comment behind a ``print(...)`` is what it prints.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib.util
import inspect
import io
import os
import re
import subprocess
import sys
import types
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^(`{3,}|~{3,}|:{3,})\s*(.*)$")
_PROMISE = re.compile(r"^ *print\(.*\) +# (.*)$", re.MULTILINE)
_STARTS_A_LOOP = re.compile(r"^(anyio|asyncio|trio)\.run\(", re.MULTILINE)


@dataclass(frozen=True)
class Fence:
    """A fenced block: the first line's words, and the code at its place in the file."""

    page: Path
    line: int
    words: tuple[str, ...]
    code: str

    @property
    def needs(self) -> list[str]:
        """Packages that it imports and that need not be there."""
        found = [word[6:].split(",") for word in self.words if word.startswith("needs=")]
        return [name for names in found for name in names]

    def applies(self, backend: str) -> bool:
        """Whether it runs on this event loop, here."""
        loops = {"asyncio", "trio"}.intersection(self.words)
        return (
            "norun" not in self.words
            and (not loops or backend in loops)
            and ("linux" not in self.words or sys.platform == "linux")
            and all(importlib.util.find_spec(name) for name in self.needs)
        )


def fences(page: Path) -> Iterator[Fence]:
    """The fenced blocks of a page, those inside other blocks not looked into."""
    opened: tuple[str, int, tuple[str, ...]] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        match = _FENCE.match(line)
        if opened is None:
            if match:
                opened = match[1], number, tuple(match[2].split())
                lines = []
        elif match and match[1].startswith(opened[0]) and not match[2]:
            yield Fence(page, opened[1], opened[2], "\n".join(lines) + "\n")
            opened = None
        else:
            lines.append(line)
    assert opened is None, f"{page}: the block of line {opened[1]} does not end"


def python_fences(page: Path) -> list[Fence]:
    return [each for each in fences(page) if each.words[:1] == ("python",)]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


WITH_CODE = [page for page in PAGES if python_fences(page)]


def compiled(fence: Fence) -> types.CodeType:
    """The code, which knows its lines in the page."""
    tree = ast.parse("\n" * fence.line + fence.code, str(fence.page))
    code = compile(tree, str(fence.page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    assert isinstance(code, types.CodeType)
    return code


def check_output(fence: Fence, output: str) -> None:
    """What the comments behind ``print(...)`` promise was printed, in that order."""
    lines = iter(output.splitlines())
    for promised in _PROMISE.findall(fence.code):
        assert promised in lines, f"{fence.page}:{fence.line} prints {output!r}, not {promised!r}"


async def execute(fence: Fence, names: dict[str, Any]) -> None:
    """Run one fence; a failure points at its line in the page."""
    code = compiled(fence)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        result = types.FunctionType(code, names)()
        if code.co_flags & inspect.CO_COROUTINE:
            assert isinstance(result, Awaitable)
            await result
    check_output(fence, output.getvalue())


async def run_page(page: Path, backend: str) -> None:
    """Run the fences of a page that are not programs."""
    names: dict[str, Any] = {"__name__": "__docs__", "__builtins__": builtins}
    for fence in python_fences(page):
        if fence.applies(backend) and not _STARTS_A_LOOP.search(fence.code):
            await execute(fence, names)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_of_page_runs(
    page: Path, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every Python block of a page runs, on both event loops."""
    monkeypatch.chdir(tmp_path)
    anyio.run(run_page, page, backend, backend=backend)
    missing = {
        name
        for fence in python_fences(page)
        for name in fence.needs
        if importlib.util.find_spec(name) is None
    }
    if missing:
        names = ", ".join(sorted(missing))
        pytest.skip(f"all but the blocks for {names} ran: uv run --group examples pytest")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_programs_of_page_run(
    page: Path, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every whole program of a page runs in an empty folder, on both event loops."""
    monkeypatch.setattr(anyio, "run", partial(anyio.run, backend=backend))
    for number, fence in enumerate(python_fences(page)):
        if fence.applies(backend) and _STARTS_A_LOOP.search(fence.code):
            folder = tmp_path / str(number)
            folder.mkdir()
            monkeypatch.chdir(folder)
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compiled(fence), {"__name__": "__main__"})
            check_output(fence, output.getvalue())


# From 3.13 on the prompt without a terminal takes no block (python/cpython#140013), so it is given
# whole statements, as the one in a terminal does.
_PROMPT_OF_STATEMENTS = """
import ast, builtins, runpy, sys

def ask(prompt):
    print(prompt, end="")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return ast.literal_eval(line)

builtins.input = ask
runpy.run_module("asyncio", run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the prompt goes to the console there")
def test_tutorial_can_be_typed(tmp_path: Path) -> None:
    """The tutorial's blocks, typed into ``python -m asyncio``, print what their comments say."""
    typed = python_fences(ROOT / "docs" / "tutorial.md")
    assert not [fence.line for fence in typed if len(fence.words) > 1]
    command = [sys.executable, "-m", "asyncio"]
    given = "\n".join(fence.code for fence in typed)  # an empty line ends what is indented
    if sys.version_info >= (3, 13):
        command[1:] = ["-c", _PROMPT_OF_STATEMENTS]
        statements = [ast.get_source_segment(given, each) for each in ast.parse(given).body]
        given = "\n".join(repr(f"{each}\n") for each in statements)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        command,
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
        env={**environment, "PYTHON_BASIC_REPL": "1", "PYTHON_COLORS": "0"},
    )
    assert (done.returncode, "Error" in done.stderr) == (0, False), done.stderr
    output = re.sub(r"^(>>> |\.\.\. )*", "", done.stdout, flags=re.MULTILINE)
    for fence in typed:
        check_output(fence, output)
    assert "True" in output.splitlines()[-3:]  # m.statistics(), at the page's end


def test_readme_shows_first_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first program of the README prints what its comment says, in a dozen lines."""
    monkeypatch.chdir(tmp_path)
    fence = python_fences(ROOT / "README.md")[0]
    exec(fence.code, {"__name__": "__main__"})
    assert capsys.readouterr().out == "b'hello'\n"
    assert len([line for line in fence.code.splitlines() if line]) <= 12


def test_few_blocks_are_not_run() -> None:
    """Blocks that no test runs are the exception."""
    blocks = [fence for page in PAGES for fence in python_fences(page)]
    skipped = [f"{name_of(each.page)}:{each.line}" for each in blocks if "norun" in each.words]
    assert len(skipped) <= len(blocks) // 20, skipped


def test_broken_block_is_noticed(tmp_path: Path) -> None:
    """The control: a block that raises fails the page, at the block's own line."""
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as raised:
        anyio.run(run_page, page, "asyncio")
    assert raised.traceback[-1].lineno == 7  # counted from 0
    assert str(raised.traceback[-1].path) == str(page)


def test_wrong_comment_is_noticed(tmp_path: Path) -> None:
    """The control: a comment that is not what was printed fails the page."""
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)  # 3\n```\n")
    with pytest.raises(AssertionError, match="not '3'"):
        anyio.run(run_page, page, "asyncio")


_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Links of a page to files of the project lead to files that exist."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in _LINK.findall(text):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), target
