"""The public interface as type checkers see it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "typing"
ROOT = FOLDER.parent.parent


def run_mypy(*arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("mypy", reason="mypy is in the dev group")
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_user_code(platform: str) -> None:
    """Types of all public calls are those that user code asserts, on each platform."""
    done = run_mypy("--platform", platform, str(FOLDER / "user_code.py"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_misuse_is_found() -> None:
    """What a type checker can find of misuse it finds, and it complains of nothing else."""
    path = FOLDER / "misuse.py"
    lines = path.read_text(encoding="utf-8").splitlines()
    expected = {number for number, line in enumerate(lines, 1) if line.endswith("# error")}
    done = run_mypy(str(path))
    found = {int(line) for line in re.findall(r"misuse\.py:(\d+): error", done.stdout)}
    assert found == expected, done.stdout


def test_pyright_knows_every_type() -> None:
    """``--verifytypes`` finds 100 % of the public interface typed."""
    program = shutil.which("basedpyright", path=os.path.join(sys.prefix, "bin"))
    if program is None:
        pytest.skip("run with `uv run --with basedpyright` to have it")
    environment = {
        **os.environ,
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{os.path.join(sys.prefix, 'bin')}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        [program, "--verifytypes", "aiommap", "--ignoreexternal"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Type completeness score: 100%" in done.stdout, done.stdout
