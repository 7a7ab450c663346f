"""The command line: what it finds, how it says so, and how it ends."""

from __future__ import annotations

import ast
import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import aiommap
import aiommap._cli
from aiommap._cli import _pages, _screen, _stall, main

from .content import file_of, inc, only_linux

PAGE = 4096
SIZE = 64 * PAGE

BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """64 pages, durable."""
    path = file_of(tmp_path, inc(SIZE))
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return path


def found(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """The JSON of a command that goes well."""
    assert main([*map(str, arguments), "--json"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return json.loads(output.out)


@only_linux
@BACKENDS
def test_pages_go_out_and_come_in(
    backend: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``evict`` sends a file out, ``residency`` sees that, ``load`` brings it back."""
    (out,) = found(capsys, "evict", file, "--backend", backend)
    assert (out["size"], out["resident"]) == (SIZE, 0)
    (cold,) = found(capsys, "residency", file, "--parts", 4, "--backend", backend)
    assert cold == {"path": str(file), "size": SIZE, "resident": 0, "parts": [0] * 4}
    (loaded,) = found(capsys, "load", file, "--backend", backend)
    assert loaded["resident"] == SIZE
    (warm,) = found(capsys, "residency", file, "--parts", 4, "--backend", backend)
    assert warm["parts"] == [SIZE // 4] * 4


def test_residency_tells_the_parts(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A part that was read is in memory, one that was not is not."""
    if sys.platform != "linux":
        pytest.skip("looks at Linux's page cache")
    assert main(["evict", str(file), "--json"]) == 0
    with file.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(stream.fileno(), 1, SIZE // 2)
    capsys.readouterr()
    (half,) = found(capsys, "residency", file, "--parts", 2)
    assert half["parts"][0] == 0
    assert half["parts"][1] >= PAGE


def test_picture_is_not_longer_than_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of three bytes has a picture of three places."""
    (each,) = found(capsys, "residency", file_of(tmp_path, b"abc"), "--parts", 60)
    assert len(each["parts"]) == 3


@only_linux
def test_what_people_see(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without ``--json`` each command has a line or a table for people."""
    name = str(file)
    assert main(["evict", name]) == 0
    assert "0% of 262.1 kB in memory still" in capsys.readouterr().out
    assert main(["residency", name, "--parts", "8"]) == 0
    assert capsys.readouterr().out.startswith("[        ]   0% of 262.1 kB")
    assert main(["load", name]) == 0
    assert "100% of 262.1 kB in memory" in capsys.readouterr().out
    assert main(["residency", name, "--parts", "8"]) == 0
    assert capsys.readouterr().out.startswith("[████████] 100% of 262.1 kB")
    assert main(["info", name]) == 0
    shown = capsys.readouterr().out
    assert "262144 bytes" in shown
    assert "full_sync" in shown


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [(0, 9, " "), (1, 9, "░"), (3, 9, "▒"), (6, 9, "▓"), (8, 9, "▓"), (9, 9, "█"), (1, 10**9, "░")],
)
def test_shades(count: int, size: int, expected: str) -> None:
    """A place is empty only if nothing is in memory, and full only if all is."""
    assert _screen.shade(count, size) == expected


def test_parts_cover_the_file() -> None:
    """The parts of a size are in order, without gaps, and as equal as bytes allow."""
    for size in (1, 2, 59, 60, 61, 1000, 2**40 + 7):
        parts = _pages.cut(size, 60)
        assert sum(length for _, length in parts) == size
        assert [offset for offset, _ in parts][1:] == [offset + n for offset, n in parts][:-1]
        assert max(n for _, n in parts) - min(n for _, n in parts) <= 1


def test_heights_show_every_gap() -> None:
    """A long gap fills the places of its time; the longest of all is the highest."""
    assert _screen.heights([0.001] * 50 + [0.05], 0.05, places=10) == "▁▁▁▁▁█████"


@only_linux
def test_info_knows_holes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sparse file's holes are found; data at both ends is not counted."""
    path = tmp_path / "sparse"
    with path.open("wb") as stream:
        stream.write(inc(PAGE))
        stream.seek(100 * PAGE)
        stream.write(inc(PAGE))
        stream.truncate(200 * PAGE)
    about = found(capsys, "info", path)
    assert about["size"] == 200 * PAGE
    assert about["holes"] == 198 * PAGE
    assert about["allocated"] == 2 * PAGE
    assert about["capabilities"]["page_size"] == mmap.PAGESIZE
    assert isinstance(about["file_system"], str)


def test_info_needs_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a file it tells about the place for temporary ones; an empty file is fine too."""
    assert "size" not in found(capsys, "info")
    assert main(["info"]) == 0
    capsys.readouterr()
    assert found(capsys, "info", file_of(tmp_path, b""))["size"] == 0


def test_info_of_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a directory it tells what can be done with files there, for people and for scripts."""
    about = found(capsys, "info", tmp_path)
    assert about.keys() == {"path", "file_system", "capabilities"}
    assert about["path"] == str(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    assert "page size" in capsys.readouterr().out


@only_linux
@BACKENDS
def test_stall_measures_three_ways(
    backend: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same reads are made in three ways, and gaps were noted beside each."""
    stalls = found(
        capsys, "stall", file, "--reads", 5, "--size", PAGE, "--tasks", 2, "--backend", backend
    )
    assert (stalls["reads"], stalls["bytes"]) == (5, PAGE)
    assert list(stalls["ways"]) == ["plain map on the loop", "plain map in threads", "aiommap"]
    for way in stalls["ways"].values():
        assert way["longest_gap"] == max(way["gaps"])
        assert way["seconds"] > 0


@only_linux
def test_stall_draws(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table is shown, and saved as a picture with ``--svg``."""
    picture = tmp_path / "picture.svg"
    assert main(["stall", str(file), "--reads", "3", "--svg", str(picture)]) == 0
    assert "plain map in threads" in capsys.readouterr().out
    assert picture.read_text(encoding="utf-8").startswith("<svg")


@only_linux
def test_stall_measures_only_what_it_can_save(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A picture that cannot be saved is an error before anything is measured, or of usage."""

    async def never(*arguments: object) -> None:
        raise OSError("it measures")

    monkeypatch.setattr(_stall, "measure", never)
    assert main(["stall", str(file), "--svg", str(tmp_path / "missing" / "picture.svg")]) == 1
    assert "picture.svg" in capsys.readouterr().err  # and no word of measuring
    picture = tmp_path / "picture.svg"
    with pytest.raises(SystemExit, match="2"):
        main(["stall", str(file), "--json", "--svg", str(picture)])
    assert "argument --svg: not allowed with argument --json" in capsys.readouterr().err
    assert main(["stall", str(file), "--svg", str(picture)]) == 1
    assert capsys.readouterr().err == "aiommap: it measures\n"
    assert not picture.exists()


@only_linux
def test_one_is_singular(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One byte, one read and one task are that."""
    path = str(file_of(tmp_path, b"x"))
    assert main(["stall", path, "--reads", "1", "--tasks", "1"]) == 0
    assert "1 read of 1 byte, 1 task, cold cache" in capsys.readouterr().out
    assert main(["info", path]) == 0
    shown = capsys.readouterr().out
    assert "1 byte " in shown
    assert "1 bytes" not in shown


def test_names_do_not_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a name has that is no text is shown as escapes, in results and in complaints."""
    path = tmp_path / "red\x1b[31m\n\udcff"
    path.write_bytes(b"x")
    for command in ("residency", "load", "evict", "info"):
        if command != "evict" or sys.platform == "linux":
            assert main([command, str(path)]) == 0
            assert "\x1b" not in capsys.readouterr().out
    assert main(["residency", str(path)]) == 0
    assert capsys.readouterr().out.endswith(r"red\x1b[31m\n\udcff" + "\n")
    path.write_bytes(b"")
    assert main(["residency", str(path), f"{path}?"]) == 1
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert said.count("\n") == 2


@pytest.mark.parametrize("command", ["residency", "load", "evict", "stall"])
@only_linux
def test_empty_file(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file without content is said to be that, and nothing about maps."""
    path = str(file_of(tmp_path, b""))
    assert main([command, path]) == 1
    what = "measure" if command == "stall" else "show"
    assert capsys.readouterr().err == f"aiommap: {path!r} is empty: nothing to {what}\n"


def test_plain_characters(file: Path) -> None:
    """A terminal that has no blocks gets a picture of characters that it has, and no error."""
    named = file.with_name("größe")
    file.rename(named)
    for command in ("residency", "info"):
        done = subprocess.run(
            [sys.executable, "-m", "aiommap", command, str(named)],
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )
        assert done.stdout.isascii()
    warm = _screen.drawn(" ░▒▓█", Console(file=TextIOWrapper(BytesIO(), encoding="ascii")))
    assert warm == " .:+#"


# How it ends


@pytest.mark.parametrize("command", ["residency", "load", "evict"])
@only_linux
def test_one_bad_file_of_several(
    command: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be opened is complained about, the others are looked at; exit code 1."""
    missing = tmp_path / "missing"
    assert main([command, str(missing), str(file), str(tmp_path), "--json"]) == 1
    output = capsys.readouterr()
    assert [each["path"] for each in json.loads(output.out)] == [str(file)]
    assert output.err.count("aiommap: ") == 2
    assert str(missing) in output.err


@pytest.mark.parametrize("command", ["info", "stall"])
def test_missing_file(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command for one file fails with its name, in one line and without a traceback."""
    assert main([command, str(tmp_path / "missing")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "missing" in lines[0]


@pytest.mark.parametrize(
    "arguments", [[], ["dance"], ["load"], ["residency", "x", "--parts", "0"], ["stall"]]
)
def test_what_is_not_understood(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 for a command that does not exist, or lacks its file."""
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: aiommap" in capsys.readouterr().err


def test_numbers_are_positive(capsys: pytest.CaptureFixture[str]) -> None:
    """A number that is none is quoted, and said what it should be."""
    for number in ("abc", "0", "-1"):
        with pytest.raises(SystemExit, match="2"):
            main(["residency", "x", "--parts", number])
        message = f"argument --parts: {number!r} is not a positive whole number\n"
        assert capsys.readouterr().err.endswith(message)


@BACKENDS
def test_interruption_inside_of_tasks(
    backend: str,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An interruption that a task group wrapped is one all the same: 130, one line."""

    async def interrupted(*arguments: object) -> None:
        raise BaseExceptionGroup("tasks", [BaseExceptionGroup("more", [KeyboardInterrupt()])])

    monkeypatch.setattr(_pages, "load", interrupted)
    assert main(["load", str(file), "--backend", backend]) == 130
    assert capsys.readouterr().err == "aiommap: interrupted\n"


def test_mistakes_of_ours_are_shown(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that nobody expects is not made into a short message."""

    async def broken(*arguments: object) -> None:
        raise ExceptionGroup("tasks", [RuntimeError("a mistake")])

    monkeypatch.setattr(_pages, "load", broken)
    with pytest.raises(ExceptionGroup) as raised:
        main(["load", str(file)])
    assert raised.group_contains(RuntimeError, match="a mistake")


@pytest.mark.fuse
@BACKENDS
def test_ctrl_c_while_the_disk_does_not_answer(
    backend: str, make_slow_file: Callable[..., Any]
) -> None:
    """SIGINT ends a load that hangs on the disk: one line, no traceback, exit code 130."""
    slow = make_slow_file(1 << 20)
    slow.hold("read")
    command = [sys.executable, "-m", "aiommap", "load", str(slow.path), "--backend", backend]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            slow.wait_held("read")
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            assert process.stderr.readline() == "aiommap: interrupted\n"
        finally:
            slow.release("read")
        rest = process.stderr.read()
    assert (process.returncode, rest) == (130, "")


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    """``--help`` says what to start with, and each command's what it does and what JSON it has."""
    for arguments in ([], ["residency"], ["load"], ["evict"], ["info"], ["stall"]):
        with pytest.raises(SystemExit, match="0"):
            main([*arguments, "--help"])
        text = capsys.readouterr().out
        assert "--json" in text
        assert arguments or "rich is missing" in text
        assert "{" not in text or arguments
        assert len(text.splitlines()) > 8


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def test_json_needs_no_rich(file: Path) -> None:
    """Without rich, JSON is printed as ever, and pictures say what to install; exit code 2."""
    code = "import sys; sys.modules['rich'] = None; from aiommap._cli import main; sys.exit(main())"
    plain = run(code, "residency", "--json", str(file))
    assert (plain.returncode, plain.stderr) == (0, "")
    assert json.loads(plain.stdout)[0]["size"] == SIZE
    pictures = run(code, "residency", str(file))
    assert (pictures.returncode, pictures.stdout) == (2, "")
    assert pictures.stderr == (
        "aiommap: pictures need rich (pip install rich); --json does without\n"
    )


def test_ctrl_c_while_rich_comes_in(file: Path) -> None:
    """Ctrl-C before the command has begun is one line too."""
    code = (
        "import sys; from aiommap._cli import main\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *more):\n"
        "        if name.startswith('rich'): raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted()); sys.exit(main())"
    )
    done = run(code, "residency", str(file))
    assert (done.returncode, done.stderr) == (130, "aiommap: interrupted\n")


def test_module_is_the_command(file: Path) -> None:
    """``python -m aiommap`` is the same command."""
    command = [sys.executable, "-m", "aiommap", "info", str(file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["path"] == str(file)


def test_reader_that_stops_is_no_error(file: Path) -> None:
    """Output into a pipe that nobody reads any more ends quietly."""
    code = "import sys; from aiommap._cli import main; sys.stdin.read(); sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", code, "residency", str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stdin is not None
        process.stdin.close()
        assert "Traceback" not in process.stderr.read()


def test_only_public_names_are_used() -> None:
    """The command line imports from aiommap what users import, and nothing private."""
    for path in Path(aiommap._cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "aiommap":
                assert {alias.name for alias in node.names} <= set(aiommap.__all__), path
            elif isinstance(node, ast.ImportFrom):
                assert node.level < 2, path
                assert not (node.module or "").startswith("aiommap."), path
