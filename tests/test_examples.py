"""The programs in examples/ do what they say: run as programs, and looked at from inside."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, suppress
from email.utils import formatdate
from pathlib import Path
from typing import Any

import anyio
import pytest

from aiommap import AsyncMmap

EXAMPLES = Path(__file__).parent.parent / "examples"
PATIENCE = 120  # seconds until a program that hangs is ended


def load(name: str) -> Any:
    """An example as a module, freshly."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: object, code: int = 0, columns: int = 200) -> str:
    """Run an example as a user does; what it printed."""
    done = ended(name, *arguments, columns=columns)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def ended(name: str, *arguments: object, columns: int = 200) -> subprocess.CompletedProcess[str]:
    """An example that was run as a user does."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, "COLUMNS": str(columns)},
    )


def refused(name: str, *arguments: object) -> str:
    """Run an example that does not take its arguments; the last line of what it says to that."""
    done = ended(name, *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
    assert done.stderr.startswith("usage: ")
    return done.stderr.splitlines()[-1]


def need(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: uv run --group examples pytest")


BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Half a megabyte that is not the same anywhere."""
    path = tmp_path / "input.bin"
    path.write_bytes(random.Random(1).randbytes(500_001))
    return path


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("quickstart", ["--tasks"]),
        ("kv_store", ["--clients"]),
        ("kv_store", ["demo", "--rounds"]),
        ("parallel_search", ["pattern", "--tasks"]),
        ("parallel_search", ["pattern", "--longest"]),
        ("shared_counters", ["--workers"]),
        ("shared_counters", ["--clients"]),
        ("shared_counters", ["--requests"]),
        ("dask_scan", ["--workers"]),
        ("range_server", ["load", "http://127.0.0.1:1/", "--clients"]),
        ("range_server", ["load", "http://127.0.0.1:1/", "--requests"]),
        ("range_server", ["load", "http://127.0.0.1:1/", "--size"]),
    ],
)
def test_counts_are_positive(name: str, arguments: list[str]) -> None:
    """A number of tasks, workers, requests or bytes that is none is an error of usage."""
    need(*{"dask_scan": ["distributed"], "range_server": ["starlette", "uvicorn"]}.get(name, []))
    message = f"argument {arguments[-1]}: '0' is not a positive whole number"
    assert refused(name, *arguments, 0).endswith(message)


@pytest.mark.parametrize("what", ["nothing", "folder", "empty"])
@pytest.mark.parametrize("name", ["quickstart", "parallel_search", "dask_scan"])
def test_file_has_content(name: str, what: str, tmp_path: Path) -> None:
    """What cannot be mapped is an error of usage: no file, a directory, an empty file."""
    need(*{"dask_scan": ["distributed"]}.get(name, []))
    path = tmp_path / what
    if what == "folder":
        path.mkdir()
    elif what == "empty":
        path.touch()
    arguments = ["pattern", path] if name == "parallel_search" else [path]
    assert refused(name, *arguments).endswith(f"{path} is not a file with content")


# quickstart.py


@BACKENDS
def test_quickstart(backend: str, text: Path) -> None:
    """The quickstart edits a copy with many tasks, leaves the file alone and checks every byte."""
    before = text.read_bytes()
    output = run("quickstart", text, "--tasks", 4, "--backend", backend, columns=40)
    assert f"4 tasks on {backend} rewrote" in output
    assert "another process has checked every byte" in output
    # Lines are whole, however narrow the terminal is.
    assert len(re.findall(r"stood still for at most [\d.]+ ms$", output, re.MULTILINE)) == 2
    assert text.read_bytes() == before


@pytest.mark.parametrize("size", [1, 16 << 10, (16 << 10) + 1])
def test_quickstart_takes_small_files(size: int, tmp_path: Path) -> None:
    """A file of one byte, of one block and of a little more is edited like any other."""
    path = tmp_path / "small.bin"
    path.write_bytes(b"x" * size)
    assert "another process has checked" in run("quickstart", path, "--tasks", 2)


# kv_store.py


@BACKENDS
def test_store_survives_kills(backend: str) -> None:
    """Killed at random points with a hundred clients, the store has all it acknowledged."""
    output = run("kv_store", "--rounds", 2, "--clients", 100, "--backend", backend)
    assert output.count("nothing is missing") == 2


def test_store_from_command_line(tmp_path: Path) -> None:
    """``put``, ``get`` and ``list`` work on a store in a folder, one process after another."""
    store = tmp_path / "store"
    run("kv_store", "put", store, "colour", "blue")
    run("kv_store", "put", store, "colour", "green")
    run("kv_store", "put", store, "shape", "round")
    assert run("kv_store", "get", store, "colour") == "green\n"
    assert run("kv_store", "list", store) == "colour\tgreen\nshape\tround\n"
    run("kv_store", "get", store, "size", code=1)


@pytest.mark.parametrize("arguments", [["list"], ["get", "key"]])
def test_store_is_made_by_putting_only(arguments: list[str], tmp_path: Path) -> None:
    """To look into a store that is not there is an error, and makes none."""
    command, *rest = arguments
    store = tmp_path / "store"
    assert refused("kv_store", command, store, *rest).endswith("is not the folder of a store")
    assert not store.exists()


@pytest.mark.parametrize("arguments", [["dance"], ["put", "folder", "key"], ["list"]])
def test_store_shows_its_usage(arguments: list[str]) -> None:
    """A command that does not exist, or lacks words, is answered with what there is."""
    done = ended("kv_store", *arguments)
    assert done.returncode == 2
    assert "kv_store.py put FOLDER KEY VALUE" in done.stderr
    assert done.stderr.endswith(f"not understood: {' '.join(arguments)}\n")


async def contents(kv: Any, folder: Path) -> dict[bytes, bytes]:
    async with kv.Store.open(folder) as store, aclosing(store.items()) as items:
        return {key: value async for key, value in items}


@pytest.mark.anyio
async def test_store_grows_with_its_content(
    anyio_backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log and index grow while hundreds of clients write; values can be changed and removed."""
    kv = load("kv_store")
    monkeypatch.setattr(kv, "FIRST_LOG", 256)
    monkeypatch.setattr(kv, "FIRST_SLOTS", 4)
    expected = {b"key %d" % n: b"value " * (n % 7) for n in range(150)}
    async with kv.Store.open(tmp_path / "store") as store:
        async with anyio.create_task_group() as tasks:
            for key, value in expected.items():
                tasks.start_soon(store.put, key, value)
        await store.put(b"key 3", None)
        await store.put(b"key 4", b"changed")
        assert await store.get(b"key 3") is None
        assert await store.get(b"key 4") == b"changed"
        assert await store.get(b"never") is None
    del expected[b"key 3"]
    expected[b"key 4"] = b"changed"
    assert await contents(kv, tmp_path / "store") == expected


@pytest.mark.anyio
async def test_store_uses_index_only_after_clean_close(anyio_backend: Any, tmp_path: Path) -> None:
    """An index that was not closed is made again; one that was closed is used as it is."""
    kv = load("kv_store")
    folder = tmp_path / "store"
    async with kv.Store.open(folder) as store:
        await store.put(b"a", b"1")
    index = folder / "index"
    clean = index.read_bytes()
    assert await contents(kv, folder) == {b"a": b"1"}
    assert index.read_bytes() == clean
    index.write_bytes(b"garbage!" * (len(clean) // 8))  # not marked as clean
    assert await contents(kv, folder) == {b"a": b"1"}
    index.unlink()
    assert await contents(kv, folder) == {b"a": b"1"}
    for rest in (b"", b"ten bytes.", clean[:4096]):  # too short to be one
        index.write_bytes(rest)
        assert await contents(kv, folder) == {b"a": b"1"}


@pytest.mark.anyio
async def test_store_forgets_torn_tail_for_good(anyio_backend: Any, tmp_path: Path) -> None:
    """What follows a damaged record is gone, and stays gone when its place is used again."""
    kv = load("kv_store")
    folder = tmp_path / "store"
    async with kv.Store.open(folder) as store:
        for key in (b"first", b"torn!", b"after"):
            await store.put(key, b"value")
    log = bytearray((folder / "log").read_bytes())
    log[log.index(b"torn!")] ^= 1
    (folder / "log").write_bytes(log)
    (folder / "index").unlink()
    async with kv.Store.open(folder) as store:
        assert await store.get(b"after") is None
        await store.put(b"newer", b"value")  # as long as the damaged one
    (folder / "index").unlink()
    assert await contents(kv, folder) == {b"first": b"value", b"newer": b"value"}


@pytest.mark.anyio
async def test_store_after_a_put_that_was_cancelled(anyio_backend: Any, tmp_path: Path) -> None:
    """It may be there or not; what others put afterwards is there for good."""
    kv = load("kv_store")
    folder = tmp_path / "store"
    async with kv.Store.open(folder) as store:
        await store.put(b"before", b"value")
        async with store._log._turn, anyio.create_task_group() as tasks:
            tasks.start_soon(store.put, b"cancelled", b"value")
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
    async with kv.Store.open(folder) as store:
        await store.put(b"after", b"value")
    (folder / "index").unlink()
    found = await contents(kv, folder)
    assert found.pop(b"cancelled", b"value") == b"value"
    assert found == {b"before": b"value", b"after": b"value"}


@pytest.mark.fuse
@pytest.mark.loopdev
@BACKENDS
def test_store_survives_power_cut(
    backend: str, make_logged_disk: Callable[..., Any], tmp_path: Path
) -> None:
    """What was acknowledged is on a disk that loses all that was not flushed."""
    kv = load("kv_store")
    disk = make_logged_disk("ext4")
    folder = Path(disk.path) / "store"
    acknowledged: dict[bytes, bytes] = {}
    copies: list[tuple[dict[bytes, bytes], bytes]] = []

    async def client(store: Any, number: int) -> None:
        for step in range(3):
            key = b"key %d of %d" % (step, number)
            await store.put(key, b"value of " + key)
            acknowledged[key] = b"value of " + key

    async def cut() -> None:
        known = dict(acknowledged)
        log = await anyio.to_thread.run_sync(disk.after_power_cut, "store/log")
        copies.append((known, log))

    async def main() -> None:
        async with kv.Store.open(folder) as store:
            for _ in range(2):
                async with anyio.create_task_group() as tasks:
                    for number in range(20):
                        tasks.start_soon(client, store, number)
                await cut()

    async def check(copy: Path, known: dict[bytes, bytes]) -> None:
        found = await contents(kv, copy)
        assert known.items() <= found.items()

    anyio.run(main, backend=backend)
    for number, (known, log) in enumerate(copies):
        copy = tmp_path / f"copy {number}"
        copy.mkdir()
        (copy / "log").write_bytes(log)
        assert len(known) == 60
        anyio.run(check, copy, known, backend=backend)


# parallel_search.py


@BACKENDS
def test_search_prints_matches_in_order(backend: str, text: Path) -> None:
    """Matches come in the order of the file, with what stands around them."""
    data = bytearray(text.read_bytes())
    places = [0, 1000, 250_000, len(data) - 6]
    for place in places:
        data[place : place + 6] = b"NEEDLE"
    text.write_bytes(data)
    output = run("parallel_search", "NEEDLE", text, "--tasks", 3, "--backend", backend)
    assert [int(line.split("\t")[0]) for line in output.splitlines()] == places
    assert all("NEEDLE" in line for line in output.splitlines())


def test_search_says_that_nothing_was_found(text: Path) -> None:
    """The exit code is 1 if there is no match."""
    assert run("parallel_search", "this is not in the file", text, code=1) == ""


def test_search_refuses_a_wrong_expression(text: Path) -> None:
    """A regular expression that is none is an error of usage."""
    assert "not a regular expression" in refused("parallel_search", "--regex", "(", text)


@pytest.mark.parametrize("regex", [False, True])
def test_search_takes_any_bytes(regex: bool, text: Path) -> None:
    """A pattern need not be text: what was typed is searched for, byte for byte."""
    text.write_bytes(text.read_bytes() + b"\xff\xfe\xff\xfd")
    pattern = os.fsdecode(b"\xff\xfe\xff\xfd")
    output = run("parallel_search", pattern, text, *(["--regex"] if regex else []))
    assert output.split()[0] == "500001"


@pytest.mark.parametrize("regex", [False, True])
@BACKENDS
def test_search_sees_matches_across_pieces(
    regex: bool,
    backend: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A match that lies across two pieces is found once, wherever the border is."""
    example = load("parallel_search")
    monkeypatch.setattr(example, "PIECE", 64)
    monkeypatch.setattr(sys, "argv", ["x", "ab+c", "file"] if regex else ["x", "abbc", "file"])
    data = b"".join(b"." * gap + b"abbc" for gap in range(70))
    path = tmp_path / "file"
    path.write_bytes(data)
    monkeypatch.chdir(tmp_path)
    sys.argv += ["--backend", backend, *(["--regex"] if regex else [])]
    with pytest.raises(SystemExit, match="0"):
        example.main()
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split("\t")[0]) for line in lines] == [
        match.start() for match in re.finditer(b"abbc", data)
    ]


# shared_counters.py


@pytest.mark.skipif(sys.platform == "win32", reason="SO_REUSEPORT")
@BACKENDS
def test_counters_survive_a_worker(backend: str) -> None:
    """Several processes count in one map, and nothing is lost when one of them is killed."""
    output = run("shared_counters", "--clients", 8, "--requests", 100, "--backend", backend)
    assert "worker 0 was killed half-way" in output
    assert "8 clients got 800 answers from 3 workers" in output


@pytest.mark.skipif(sys.platform == "win32", reason="SO_REUSEPORT")
@BACKENDS
def test_counters_end_with_their_parent(backend: str) -> None:
    """Whoever ends the first process in the middle, by SIGKILL even, leaves no worker behind."""
    command = [sys.executable, "-u", str(EXAMPLES / "shared_counters.py"), "--backend", backend]
    with subprocess.Popen(
        [*command, "--clients", "8", "--requests", "2000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        process_group=0,
    ) as process:
        try:
            output = process.stdout
            assert output is not None
            assert output.readline() == b"worker 0 was killed half-way\n"
            process.kill()
            # All processes have this pipe: it ends with the last of them.
            assert select.select([output], [], [], PATIENCE / 4) == ([output], [], [])
            assert output.read() == b""
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


# dask_scan.py


def test_dask_scan_counts_right(text: Path) -> None:
    """A cluster counts what a plain loop counts, whoever has the port of Dask's dashboard."""
    need("distributed")
    with socket.socket() as dashboard:
        with suppress(OSError):  # somebody else has it: as good
            dashboard.bind(("127.0.0.1", 8787))
            dashboard.listen()
        assert "500001 bytes, counted right" in run("dask_scan", text)


def test_dask_scan_finds_each_word_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A word across the border of two regions is counted where it begins, and whole."""
    need("distributed")
    example = load("dask_scan")
    data = b"some words across borders " * 10
    whole = example.count(memoryview(data), 0, len(data))
    for border in range(1, 60):
        ahead = border + example.LONGEST_WORD
        left = example.count(memoryview(data)[:ahead], 0, border)
        right = example.count(memoryview(data)[border - 1 :], 1, len(data) - border + 1)
        assert left[0] + right[0] == whole[0]
        assert left[1] + right[1] == whole[1]


# range_server.py


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, bytes]]:
    """The address of a server in another process, and what it serves."""
    need("starlette", "uvicorn", "httpx")
    path = tmp_path_factory.mktemp("served") / "file.bin"
    data = random.Random(2).randbytes(1_000_003)
    path.write_bytes(data)
    command = [sys.executable, str(EXAMPLES / "range_server.py"), "serve", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), data
        finally:
            process.terminate()


def get(url: str, method: str = "GET", **headers: str) -> Any:
    import httpx

    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with httpx.Client(trust_env=False, transport=httpx.HTTPTransport(retries=10)) as client:
        return client.request(method, url, headers=named)


def test_server_sends_whole_file(served: tuple[str, bytes]) -> None:
    """Without a range the whole file comes, and HEAD gives its size and tag."""
    url, data = served
    answer = get(url)
    assert (answer.status_code, answer.content) == (200, data)
    head = get(url, "HEAD", Range="bytes=0-9")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(data))
    assert head.headers["accept-ranges"] == "bytes"
    assert head.headers["etag"] == answer.headers["etag"]
    assert get(url, "POST").status_code == 405


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=10-19", 10, 19),
        ("bytes=999990-", 999_990, 1_000_002),
        ("bytes=-5", 999_998, 1_000_002),
        ("bytes=-9999999", 0, 1_000_002),
        ("bytes=1000000-9999999", 1_000_000, 1_000_002),
        ("bytes=100-700000", 100, 700_000),
        ("bytes= 5-9 , 3-6", 3, 9),
        ("bytes=0-4,5-9", 0, 9),
        ("BYTES=3-3", 3, 3),
        ("bytes=5000000-,1-2", 1, 2),
    ],
)
def test_server_sends_one_range(
    served: tuple[str, bytes], asked: str, first: int, last: int
) -> None:
    """A range is cut to the file; ranges that overlap or touch are one."""
    url, data = served
    answer = get(url, Range=asked)
    assert answer.status_code == 206
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(data)}"
    assert answer.content == data[first : last + 1]


def test_server_sends_several_ranges(served: tuple[str, bytes]) -> None:
    """Several ranges come as parts of one answer, whose length was announced."""
    url, data = served
    answer = get(url, Range="bytes=0-4, 300000-600000,-3")
    assert answer.status_code == 206
    assert answer.headers["content-length"] == str(len(answer.content))
    kind, _, boundary = answer.headers["content-type"].partition("; boundary=")
    assert kind == "multipart/byteranges"
    before, *parts, after = answer.content.split(b"--" + boundary.encode())
    assert (before, after) == (b"\r\n", b"--\r\n")
    found = []
    for part in parts:
        head, _, body = part.removesuffix(b"\r\n").partition(b"\r\n\r\n")
        span = re.search(rb"Content-Range: bytes (\d+)-(\d+)/1000003", head)
        assert span is not None
        found.append((int(span[1]), int(span[2])))
        assert body == data[int(span[1]) : int(span[2]) + 1]
    assert found == [(0, 4), (300_000, 600_000), (1_000_000, 1_000_002)]


@pytest.mark.parametrize("asked", ["bytes=2000000-", "bytes=1000003-", "bytes=-0"])
def test_server_refuses_ranges_outside(served: tuple[str, bytes], asked: str) -> None:
    """A range that the file does not reach is 416, with the file's size."""
    answer = get(served[0], Range=asked)
    assert answer.status_code == 416
    assert answer.headers["content-range"] == "bytes */1000003"


@pytest.mark.parametrize(
    "asked",
    [
        "bytes=9-5",
        "bytes=a-b",
        "bytes=1",
        "bytes=-",
        "bytes=",
        "lines=1-2",
        "bytes=1-2-3",
        "bytes=" + ",".join(f"{n}-{n}" for n in range(0, 200, 2)),
    ],
)
def test_server_ignores_what_is_no_range(served: tuple[str, bytes], asked: str) -> None:
    """A header that is wrong, of another unit, or too long is as if it were not there."""
    assert get(served[0], Range=asked).status_code == 200


def test_server_minds_conditions(served: tuple[str, bytes]) -> None:
    """Conditions decide between the answer, 304 and 412, tags before dates."""
    url, data = served
    fresh = get(url, "HEAD").headers
    etag, date = fresh["etag"], fresh["last-modified"]
    old, new = formatdate(0, usegmt=True), formatdate(2**33, usegmt=True)
    for headers, status in [
        ({"If-None-Match": etag}, 304),
        ({"If-None-Match": f'"other", W/{etag}'}, 304),
        ({"If-None-Match": "*"}, 304),
        ({"If-None-Match": '"other"'}, 200),
        ({"If-None-Match": '"other"', "If-Modified-Since": new}, 200),
        ({"If-Modified-Since": date}, 304),
        ({"If-Modified-Since": old}, 200),
        ({"If-Modified-Since": "yesterday"}, 200),
        ({"If-Match": etag}, 200),
        ({"If-Match": "*"}, 200),
        ({"If-Match": f"W/{etag}"}, 412),
        ({"If-Match": '"other"'}, 412),
        ({"If-Match": etag, "If-Unmodified-Since": old}, 200),
        ({"If-Unmodified-Since": old}, 412),
        ({"If-Unmodified-Since": date}, 200),
        ({"Range": "bytes=0-1", "If-Range": etag}, 206),
        ({"Range": "bytes=0-1", "If-Range": date}, 206),
        ({"Range": "bytes=0-1", "If-Range": '"other"'}, 200),
        ({"Range": "bytes=0-1", "If-Range": f"W/{etag}"}, 200),
        ({"Range": "bytes=0-1", "If-Range": new}, 200),
        ({"Range": "bytes=0-1", "If-None-Match": etag}, 304),
    ]:
        answer = get(url, **headers)
        assert answer.status_code == status, headers
        assert answer.content == {200: data, 206: data[:2]}.get(status, b"")
        assert answer.headers["etag"] == etag


def test_load_generator_measures(served: tuple[str, bytes]) -> None:
    """The load generator gets all its answers and says how long they took."""
    output = run("range_server", "load", served[0], "--clients", 8, "--requests", 100)
    assert output.startswith("100 answers in")


@pytest.mark.parametrize("how", ["file", "plain"])
def test_contenders_serve_the_same(how: str, tmp_path: Path) -> None:
    """The servers that the benchmark compares with give the same bytes for a range."""
    need("starlette", "uvicorn", "httpx")
    path = tmp_path / "file.bin"
    path.write_bytes(b"0123456789" * 100)
    command = [sys.executable, str(EXAMPLES / "range_server.py"), "serve", str(path), "--how", how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            answer = get(process.stdout.readline().strip(), Range="bytes=13-17")
        finally:
            process.terminate()
    assert (answer.status_code, answer.content) == (206, b"34567")


@pytest.mark.anyio
async def test_server_breaks_off_when_file_is_cut(anyio_backend: Any, tmp_path: Path) -> None:
    """A body whose bytes are gone ends in an error, and not early and quietly."""
    need("starlette", "uvicorn")
    server = load("range_server")
    path = tmp_path / "file.bin"
    path.write_bytes(bytes(1 << 20))
    async with AsyncMmap.open_path(path) as m:
        body: AsyncIterator[bytes] = server.pieces(m.read_at, (0, (1 << 20) - 1))
        await anext(body)
        os.truncate(path, 1 << 18)
        with pytest.raises(OSError, match="truncated"):
            await anext(body)
