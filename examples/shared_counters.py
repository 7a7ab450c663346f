"""Worker processes of one server count in one shared map, and any of them knows the total.

    uv run examples/shared_counters.py [--workers N] [--clients N] [--requests N] [--backend NAME]

Starts a server of several processes that all accept on the same port, lets clients ask it, kills
one worker with SIGKILL half-way and starts another in its place. At the end the total in the map
must be the number of answers that the clients got: a counter in a file does not die with its
process.

Each worker has a block of its own in the map, so no lock between processes is needed; readers add
the blocks up. The map is a file on tmpfs where there is one: nobody wants these numbers to survive
a power cut, and stores there never wait for a disk.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import anyio
from anyio.abc import SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream

from aiommap import AsyncMmap

BLOCK = struct.Struct("<QQ48x")  # requests, bytes received: a cache line for each worker


async def count(m: AsyncMmap, worker: int, size: int) -> int:
    """One more request for this worker; the number that it is of this worker's."""
    # Exclusive among the tasks of this process. Other processes stay out by agreement.
    async with m.view_mut(worker * BLOCK.size, BLOCK.size) as block:
        requests, received = BLOCK.unpack_from(block.buffer)
        BLOCK.pack_into(block.buffer, 0, requests + 1, received + size)
    return int(requests) + 1


async def totals(m: AsyncMmap) -> tuple[int, int]:
    """Requests and bytes of all workers."""
    blocks = list(BLOCK.iter_unpack(await m.read_at(0, len(m))))
    return sum(each[0] for each in blocks), sum(each[1] for each in blocks)


# A worker


async def serve(path: str, worker: int, port: int) -> None:
    """Answer lines: ``total`` with the sum over all workers, anything else with a number."""
    async with AsyncMmap.open_path(path, "r+") as m:

        async def handle(client: SocketStream) -> None:
            lines = BufferedByteReceiveStream(client)
            with contextlib.suppress(anyio.IncompleteRead, anyio.BrokenResourceError):
                async with client:
                    while True:
                        line = await lines.receive_until(b"\n", 1000)
                        if line == b"total":
                            await client.send(b"%d %d\n" % await totals(m))
                        else:
                            number = await count(m, worker, len(line))
                            await client.send(b"worker %d, request %d\n" % (worker, number))

        listener = await anyio.create_tcp_listener(
            local_host="127.0.0.1", local_port=port, reuse_port=True
        )
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(end_with_parent, tasks.cancel_scope)
            await listener.serve(handle)


async def end_with_parent(scope: anyio.CancelScope) -> None:
    """Cancel when the process that started this one is gone, however it ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    await anyio.wait_readable(parent.sentinel)  # a pipe: its other end closes with the parent
    scope.cancel()


def run_worker(path: str, worker: int, port: int, backend: str) -> None:
    """The main function of a worker process."""
    with contextlib.suppress(KeyboardInterrupt):
        anyio.run(serve, path, worker, port, backend=backend)


@contextmanager
def started(path: Path, worker: int, port: int, backend: str) -> Iterator[BaseProcess]:
    """A worker process, for the length of a block."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=run_worker, args=(str(path), worker, port, backend))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


# The clients


async def connect(port: int) -> SocketStream:
    """A connection, as soon as a worker accepts."""
    while True:
        with contextlib.suppress(OSError):
            return await anyio.connect_tcp("127.0.0.1", port)
        await anyio.sleep(0.02)


class Answers:
    """What the clients were told."""

    def __init__(self, half: int) -> None:
        self.all: list[bytes] = []
        self.half_way = anyio.Event()
        self._half = half

    def add(self, answer: bytes) -> None:
        self.all.append(answer)
        if len(self.all) > self._half:
            self.half_way.set()


async def ask(port: int, requests: int, answers: Answers) -> None:
    """Ask until that many answers have come; a worker that dies is a reason to connect again."""
    left = requests
    while left:
        try:
            async with await connect(port) as stream:
                lines = BufferedByteReceiveStream(stream)
                while left:
                    await stream.send(b"count this\n")
                    answers.add(await lines.receive_until(b"\n", 1000))
                    left -= 1
        except (anyio.IncompleteRead, anyio.BrokenResourceError, anyio.EndOfStream):
            continue


async def load(
    port: int, clients: int, requests: int, half_way: Callable[[], object]
) -> list[bytes]:
    """All answers; ``half_way`` is called in a thread when half of them are there."""
    answers = Answers(clients * requests // 2)
    async with anyio.create_task_group() as tasks:
        for _ in range(clients):
            tasks.start_soon(ask, port, requests, answers)
        await answers.half_way.wait()
        await anyio.to_thread.run_sync(half_way)
    return answers.all


async def total_of(port: int) -> tuple[int, int]:
    async with await connect(port) as stream:
        await stream.send(b"total\n")
        requests, received = (
            await BufferedByteReceiveStream(stream).receive_until(b"\n", 1000)
        ).split()
        return int(requests), int(received)


async def make(path: Path, workers: int) -> None:
    async with AsyncMmap.create(path, workers * BLOCK.size):
        pass


def positive(text: str) -> int:
    """A type of argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=positive, default=3)
    parser.add_argument("--clients", type=positive, default=32)
    parser.add_argument("--requests", type=positive, default=200, help="of each client")
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio")
    options = parser.parse_args()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    memory = Path("/dev/shm")
    where = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder, contextlib.ExitStack() as running:
        path = Path(folder, "counters")
        anyio.run(make, path, options.workers, backend=options.backend)
        workers = [
            running.enter_context(started(path, number, port, options.backend))
            for number in range(options.workers)
        ]

        def replace_worker() -> None:
            workers[0].kill()
            workers[0].join()
            print("worker 0 was killed half-way")
            running.enter_context(started(path, 0, port, options.backend))

        answers = anyio.run(
            load, port, options.clients, options.requests, replace_worker, backend=options.backend
        )
        requests, received = anyio.run(total_of, port, backend=options.backend)

    print(
        f"{options.clients} clients got {len(answers)} answers from {options.workers} workers; "
        f"the shared map has counted {requests} requests with {received} bytes"
    )
    # A worker may have counted a request and died before it could answer.
    if not len(answers) <= requests <= len(answers) + options.clients:
        raise SystemExit("these numbers do not fit")


if __name__ == "__main__":
    main()
