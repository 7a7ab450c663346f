"""Python in a process of its own: for what may die, hang, or needs limits of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

_PROJECT = Path(__file__).parents[1]

TIMEOUT = 60.0
"""Seconds after which a process counts as hung."""


def run_python(
    code: str, *arguments: object, timeout: float = TIMEOUT, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """
    Run code with this interpreter, with the project and the tests to import.

    :param arguments: its ``sys.argv[1:]``
    :param options: for the interpreter, such as ``-X dev``
    """
    environment = {**os.environ, "PYTHONFAULTHANDLER": "", "PYTHONPATH": str(_PROJECT)}
    environment.pop("PYTHONFAULTHANDLER")
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=_PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
