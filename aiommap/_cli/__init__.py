"""The command line: ``aiommap`` and ``python -m aiommap``. It uses public names only.

Each command finds something out, as plain data, and then shows it: as JSON, or with rich, which
is imported only then.
"""

from __future__ import annotations

import argparse
import io
import json
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import anyio
from anyio.abc import TaskStatus

from . import _info, _pages, _stall
from ._wording import printable

DESCRIPTION = """\
Look at files in the page cache, bring them in and send them out, and see what a memory map does
to an event loop on your own disk.
"""

EPILOG = """\
Start with:

  aiommap residency FILE     which parts of a file are in memory?
  aiommap info FILE          what is this file, and what can be done with it here?
  aiommap stall FILE         how long does an event loop stand still for it?

Every command takes --json, for scripts. Exit codes: 0 all went well, 1 something could not be
done (and stderr says what), 2 the command was not understood, or rich is missing and --json was
not given, 130 interrupted.
"""


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="aiommap", description=DESCRIPTION, epilog=EPILOG, formatter_class=form
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(module: Any, name: str, summary: str, text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(
            name, help=summary, description=f"{summary}\n\n{text}", formatter_class=form
        )
        found.set_defaults(find=getattr(module, name), show=f"show_{name}")
        found.add_argument("--json", action="store_true", help="print JSON, for scripts")
        found.add_argument(
            "--backend", choices=("asyncio", "trio"), default="asyncio", help=argparse.SUPPRESS
        )
        return found

    residency = command(
        _pages,
        "residency",
        "Show which parts of files are in memory.",
        "A line for each file: a picture in which each place is an equal part of the file, and\n"
        "how much of it is in the page cache, which all processes share. Nothing is read.\n\n"
        "JSON: [{path, size, resident, parts: [bytes in memory, ...]}, ...]",
    )
    residency.add_argument("files", nargs="+", metavar="FILE")
    residency.add_argument(
        "--parts", type=_positive, default=60, help="places of the picture (default: 60)"
    )

    load = command(
        _pages,
        "load",
        "Bring files into memory.",
        "Reads them into the page cache, where they stay until memory is short. A bad sector or\n"
        "a file that is cut meanwhile is an error and not a crash.\n\n"
        "JSON: [{path, size, resident, seconds}, ...]",
    )
    load.add_argument("files", nargs="+", metavar="FILE")

    evict = command(
        _pages,
        "evict",
        "Send files out of memory.",
        "Writes what is dirty to the disk and asks the kernel to forget the pages, to measure\n"
        "with a cold cache for example. The files' content does not change. Pages that a process\n"
        "has mapped stay: `resident` says how much that is.\n\n"
        "JSON: [{path, size, resident, seconds}, ...]",
    )
    evict.add_argument("files", nargs="+", metavar="FILE")

    info = command(
        _info,
        "info",
        "Tell what a file is, and what can be done with it here.",
        "Size, space taken, holes, file system and page size; and what this kernel and this file\n"
        "system can do, found out by trying; of a directory only the latter.\n"
        "Without FILE: of the directory of temporary files.",
    )
    info.add_argument("file", nargs="?", metavar="FILE")

    stall = command(
        _stall,
        "stall",
        "Measure for how long an event loop stands still.",
        "Reads random parts of FILE with many tasks, each time from a cold cache: from a plain\n"
        "map on the event loop, from a plain map in threads, and with aiommap. Meanwhile a task\n"
        "that only waits a millisecond at a time notes for how long it did not get its turn.\n"
        "The file is not changed, but it leaves the page cache (see `aiommap evict`).",
    )
    stall.add_argument("file", metavar="FILE")
    stall.add_argument("--tasks", type=_positive, default=16, help="default: 16")
    stall.add_argument("--reads", type=_positive, default=400, help="in all; default: 400")
    stall.add_argument("--size", type=_positive, default=65536, help="bytes; default: 65536")
    stall.add_argument("--svg", metavar="FILE", help="save the picture as well; not with --json")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run one command.

    :param arguments: without the program's name; None for those of the process
    :return: the exit code
    """
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("aiommap: interrupted", file=sys.stderr)
        return 130


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.json and getattr(options, "svg", None) is not None:
        parser.error("argument --svg: not allowed with argument --json")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # not every terminal has all characters
    screen: Any = None
    if not options.json:
        try:
            from . import _screen as screen
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("rich"):
                raise
            print(
                "aiommap: pictures need rich (pip install rich); --json does without",
                file=sys.stderr,
            )
            return 2
    problems: list[str] = []
    watch = screen.Watch() if screen else None
    try:
        with watch or _Silent():
            find = partial(options.find, options, watch, problems.append)
            found = anyio.run(_until_interrupted, find, backend=options.backend)
        if options.json:
            print(json.dumps(found, indent=2))
        else:
            getattr(screen, options.show)(found, options)
    except BrokenPipeError:  # who read us has seen enough
        sys.stderr.close()
        return 1
    except (KeyboardInterrupt, OSError, ValueError, BaseExceptionGroup) as error:
        for each in _leaves(error):
            if isinstance(each, KeyboardInterrupt):
                raise each from None
            if not isinstance(each, OSError | ValueError):
                raise
            problems.append(str(each))
    for problem in dict.fromkeys(problems):
        print(f"aiommap: {printable(problem)}", file=sys.stderr)
    return 1 if problems else 0


async def _until_interrupted(find: Callable[[], Awaitable[object]]) -> object:
    """
    What ``find`` gives.

    Ctrl-C comes to a task of its own. asyncio's own handler can miss it: a signal between the
    interpreter's last look and the wait for events is seen at the next event, and with a disk
    that does not answer there is none.

    :raises KeyboardInterrupt: Ctrl-C
    """
    if sys.platform == "win32":
        return await find()
    interrupted = False

    async def listen(*, task_status: TaskStatus[None]) -> None:
        nonlocal interrupted
        with anyio.open_signal_receiver(signal.SIGINT) as signals:
            task_status.started()
            async for _ in signals:
                interrupted = True
                tasks.cancel_scope.cancel()

    found: object = None
    async with anyio.create_task_group() as tasks:
        await tasks.start(listen)
        found = await find()
        tasks.cancel_scope.cancel()
    if interrupted:
        raise KeyboardInterrupt
    return found


def _leaves(error: BaseException) -> list[BaseException]:
    """What a task group has collected."""
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for each in error.exceptions for leaf in _leaves(each)]


class _Silent:
    """The progress of a command that shows none."""

    def __enter__(self) -> None: ...

    def __exit__(self, *exc_info: object) -> None: ...
