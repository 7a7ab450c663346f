"""A server for byte ranges of one huge file, from a map, and a load generator to try it with.

    uv run --group examples examples/range_server.py serve FILE [--port N] [--how HOW]
    uv run --group examples examples/range_server.py load URL [--clients N] [--requests N]

``serve`` answers GET and HEAD with whole files, single ranges, several ranges in one answer
(``multipart/byteranges``) and conditions (``If-None-Match``, ``If-Modified-Since``, ``If-Match``,
``If-Unmodified-Since``, ``If-Range``), as RFC 9110 says, with Starlette and uvicorn. ``--how`` says
where the bytes come from: the map (``aiommap``), Starlette's own ``FileResponse`` (``file``), or a
plain ``mmap`` on the event loop (``plain``).

``load`` asks a server for ranges of random places, with many connections at once, and prints how
long the answers took. ``tests/benchmarks/bench_range_server.py`` compares the three on a slow disk.

The file should not change while it is served: its tag and size are taken when it is opened. A file
that is *replaced* (by rename) is served as it was. If it is truncated, the connections that need
the missing bytes break, which is how HTTP/1.1 says that an answer is not complete.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

import anyio
import uvicorn
from anyio.abc import SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from aiommap import AsyncMmap

PIECE = 256 << 10  # what is sent at once: about a socket's buffer
MOST_RANGES = 32  # asked for in one request; who wants more gets the whole file

Range = tuple[int, int]  # first and last byte, both included, as in HTTP
Read = Callable[[int, int], Awaitable[bytes]]


# What HTTP says about ranges and conditions; pure


def parse_ranges(header: str, size: int) -> list[Range] | None:
    """
    The ranges of a Range header that the file has, in order, overlapping ones made one.

    None if the header is to be ignored; empty if none of them can be served.
    """
    unit, _, specs = header.partition("=")
    parts = [part.strip() for part in specs.split(",") if part.strip()]
    if unit.strip().lower() != "bytes" or not parts or len(parts) > MOST_RANGES:
        return None
    found = []
    for part in parts:
        first, dash, last = part.partition("-")
        if not dash or not (first or last) or not (first + last).isdecimal():
            return None
        if not (first + last).isascii() or (first and last and int(last) < int(first)):
            return None
        if not first:  # the last bytes
            start, stop = max(size - int(last), 0), size - 1
            if int(last) == 0:
                continue
        else:
            start, stop = int(first), min(int(last), size - 1) if last else size - 1
        if start < size:
            found.append((start, stop))
    result: list[Range] = []
    for start, stop in sorted(found):
        if result and start <= result[-1][1] + 1:
            result[-1] = result[-1][0], max(result[-1][1], stop)
        else:
            result.append((start, stop))
    return result


@dataclass(frozen=True)
class Version:
    """What tells one state of a file from another."""

    size: int
    etag: str
    modified: int  # seconds since 1970, as HTTP dates count

    @classmethod
    def of(cls, status: os.stat_result) -> Version:
        return cls(
            status.st_size, f'"{status.st_mtime_ns:x}-{status.st_size:x}"', int(status.st_mtime)
        )

    def is_in(self, header: str, *, weak: bool) -> bool:
        """Whether a list of entity tags has this one."""
        tags = [tag.strip() for tag in header.split(",")]
        if weak:
            tags = [tag.removeprefix("W/") for tag in tags]
        return header.strip() == "*" or self.etag in tags

    def is_newer_than(self, header: str) -> bool | None:
        """Whether it changed after an HTTP date; None if that is no date."""
        try:
            return self.modified > parsedate_to_datetime(header).timestamp()
        except (TypeError, ValueError):
            return None

    def condition(self, request: Request) -> int:
        """The status that the conditions of a request call for: 200, 304 or 412."""
        headers = request.headers
        if "if-match" in headers:
            if not self.is_in(headers["if-match"], weak=False):
                return 412
        elif self.is_newer_than(headers.get("if-unmodified-since", "")):
            return 412
        if "if-none-match" in headers:
            if self.is_in(headers["if-none-match"], weak=True):
                return 304
        elif self.is_newer_than(headers.get("if-modified-since", "")) is False:
            return 304
        return 200

    def allows_range(self, request: Request) -> bool:
        """Whether the client's parts are of this version (If-Range)."""
        header = request.headers.get("if-range")
        if header is None or header == self.etag:
            return True
        # A date is as good as a strong tag only if it is the very one that was sent.
        return not header.startswith(('"', "W/")) and header == formatdate(
            self.modified, usegmt=True
        )


# Answers


async def pieces(read: Read, span: Range) -> AsyncIterator[bytes]:
    """The bytes of a range. Copies: a slow client must not keep a region of the map."""
    first, last = span
    while first <= last:
        size = min(PIECE, last - first + 1)
        yield await read(first, size)
        first += size


def multipart(read: Read, spans: list[Range], size: int) -> tuple[AsyncIterator[bytes], int, str]:
    """A body with several ranges, its length, and the boundary between them."""
    boundary = secrets.token_hex(12)
    heads = [
        f"\r\n--{boundary}\r\nContent-Type: application/octet-stream\r\n"
        f"Content-Range: bytes {first}-{last}/{size}\r\n\r\n".encode()
        for first, last in spans
    ]
    tail = f"\r\n--{boundary}--\r\n".encode()

    async def body() -> AsyncIterator[bytes]:
        for head, span in zip(heads, spans, strict=True):
            yield head
            async for piece in pieces(read, span):
                yield piece
        yield tail

    length = sum(map(len, heads)) + sum(last - first + 1 for first, last in spans) + len(tail)
    return body(), length, boundary


def respond(request: Request, version: Version, read: Read) -> Response:
    """The answer to a GET or HEAD."""
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": version.etag,
        "Last-Modified": formatdate(version.modified, usegmt=True),
    }
    status = version.condition(request)
    if status != 200:
        return Response(status_code=status, headers=headers)
    spans: list[Range] | None = None
    if "range" in request.headers and request.method == "GET" and version.allows_range(request):
        spans = parse_ranges(request.headers["range"], version.size)
    headers["Content-Type"] = "application/octet-stream"
    if spans is None:
        body = pieces(read, (0, version.size - 1))
        length = version.size
    elif not spans:
        headers["Content-Range"] = f"bytes */{version.size}"
        return Response(status_code=416, headers=headers)
    elif len(spans) == 1:
        first, last = spans[0]
        status = 206
        body, length = pieces(read, spans[0]), last - first + 1
        headers["Content-Range"] = f"bytes {first}-{last}/{version.size}"
    else:
        status = 206
        body, length, boundary = multipart(read, spans, version.size)
        headers["Content-Type"] = f"multipart/byteranges; boundary={boundary}"
    headers["Content-Length"] = str(length)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)
    return StreamingResponse(body, status, headers)


# The three servers


def make_app(path: Path, how: str = "aiommap") -> Starlette:
    """An application that serves the file at ``/``."""

    @asynccontextmanager
    async def aiommap_reads() -> AsyncIterator[Read]:
        async with AsyncMmap.open_path(path) as m:
            yield m.read_at

    @asynccontextmanager
    async def plain_reads() -> AsyncIterator[Read]:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m:

            async def read(offset: int, size: int) -> bytes:
                return m[offset : offset + size]  # waits for the disk, and all clients with it

            yield read

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.version = Version.of(await anyio.Path(path).stat())
        async with aiommap_reads() if how == "aiommap" else plain_reads() as read:
            app.state.read = read
            yield

    async def serve(request: Request) -> Response:
        if how == "file":
            return FileResponse(path, media_type="application/octet-stream")
        return respond(request, request.app.state.version, request.app.state.read)

    return Starlette(routes=[Route("/", serve, methods=["GET", "HEAD"])], lifespan=lifespan)


def run_server(path: Path, how: str, port: int) -> None:
    """Serve until interrupted; the first line of output says where."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        address, port = listener.getsockname()
        print(f"http://{address}:{port}/", flush=True)
        config = uvicorn.Config(make_app(path, how), log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[listener])


# The load generator


@dataclass(frozen=True)
class Load:
    """How long answers took, in seconds."""

    answers: int
    seconds: float
    p50: float
    p99: float
    longest: float


async def exchange(
    stream: SocketStream, reader: BufferedByteReceiveStream, first: int, size: int
) -> bytes:
    """Ask for a range on an open connection. Just enough HTTP for a server that is known."""
    span = f"bytes={first}-{first + size - 1}"
    await stream.send(f"GET / HTTP/1.1\r\nHost: localhost\r\nRange: {span}\r\n\r\n".encode())
    head = (await reader.receive_until(b"\r\n\r\n", 1 << 16)).decode("latin-1")
    status, *lines = head.split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    if status.split()[1] != "206" or int(headers["content-length"]) != size:
        raise RuntimeError(f"the server answered {head!r}")
    return await reader.receive_exactly(size)


async def generate(url: str, clients: int, requests: int, size: int, seed: int) -> Load:
    """Ask for random ranges, each at a multiple of its size and no two the same, if possible."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    async with await anyio.connect_tcp(host, port) as stream:
        await stream.send(b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        reader = BufferedByteReceiveStream(stream)
        head = (await reader.receive_until(b"\r\n\r\n", 1 << 16)).decode("latin-1").lower()
        length = int(head.partition("content-length:")[2].split()[0])
    places = range(0, length - size + 1, size)
    rng = random.Random(seed)
    wanted = iter(
        rng.sample(places, requests) if requests <= len(places) else rng.choices(places, k=requests)
    )
    took: list[float] = []

    async def client() -> None:
        async with await anyio.connect_tcp(host, port) as stream:
            reader = BufferedByteReceiveStream(stream)
            for first in wanted:  # one iterator for all clients
                started = time.perf_counter()
                await exchange(stream, reader, first, size)
                took.append(time.perf_counter() - started)

    started = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        for _ in range(clients):
            tasks.start_soon(client)
    seconds = time.perf_counter() - started
    took.sort()
    return Load(len(took), seconds, took[len(took) // 2], took[len(took) * 99 // 100], took[-1])


def positive(text: str) -> int:
    """A type of argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve a file")
    serve.add_argument("file", type=Path)
    serve.add_argument("--port", type=int, default=0, help="0: any that is free")
    serve.add_argument("--how", choices=("aiommap", "file", "plain"), default="aiommap")
    load = commands.add_parser("load", help="ask a server for random ranges")
    load.add_argument("url")
    load.add_argument("--clients", type=positive, default=64)
    load.add_argument("--requests", type=positive, default=2000)
    load.add_argument("--size", type=positive, default=4096, help="bytes of a range")
    load.add_argument("--seed", type=int, default=0)
    load.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.command == "serve":
        run_server(options.file, options.how, options.port)
        return
    result = anyio.run(
        generate, options.url, options.clients, options.requests, options.size, options.seed
    )
    if options.json:
        print(json.dumps(asdict(result)))
    else:
        print(
            f"{result.answers} answers in {result.seconds:.2f} s: half of them within "
            f"{result.p50 * 1000:.1f} ms, 99 of 100 within {result.p99 * 1000:.1f} ms, the slowest "
            f"after {result.longest * 1000:.1f} ms"
        )


if __name__ == "__main__":
    main()
