"""A small crash-safe key-value store: an append-only log, an index in a map, group commit.

    uv run examples/kv_store.py [demo] [--rounds N] [--clients N] [--backend asyncio|trio]
    uv run examples/kv_store.py put FOLDER KEY VALUE
    uv run examples/kv_store.py get FOLDER KEY
    uv run examples/kv_store.py list FOLDER

The demonstration lets hundreds of clients write into a store in another process, kills that
process at a random moment, opens the store again and checks that everything that was
acknowledged is there; several times, in the same store.

How it works
------------
*The log* has every change, in order. A record counts if its checksum fits, and the checksum
includes the one before, so what is left of a torn tail can never come back to life behind a
new record. A change is done when the log is flushed up to its record. Whoever comes first
stores what all have waiting, and all share the disk's flushes: with 300 clients, a few dozen
changes come to one flush.

*The index* says where the last record of a key is: a table of slots in a file of its own, open
addressing. It is never trusted after a crash. A clean close writes down how much of the log it
covers; if that is missing, it is made again from the log.
"""

from __future__ import annotations

import argparse
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import anyio

from aiommap import AsyncMmap, RegionLock

FIRST_LOG = 1 << 20  # bytes; doubled whenever it is full
FIRST_SLOTS = 1 << 10  # of 8 bytes; doubled whenever they are three quarters full


@dataclass(frozen=True)
class Record:
    """One change: the value of a key, or None for its end."""

    key: bytes
    value: bytes | None

    HEAD = struct.Struct("<III")  # bytes of the key, bytes of the value, checksum
    DELETED = 0xFFFFFFFF

    def encode(self, previous: int) -> tuple[bytes, int]:
        """Its bytes in the log and its checksum, behind a record with that checksum."""
        value = self.value
        size = self.DELETED if value is None else len(value)
        lengths = struct.pack("<II", len(self.key), size)
        body = self.key + (value or b"")
        crc = zlib.crc32(body, zlib.crc32(lengths, previous))
        return lengths + struct.pack("<I", crc) + body, crc


class Log:
    """Records one behind the other in a map."""

    def __init__(self, m: AsyncMmap, end: int = 0, crc: int = 0) -> None:
        self._m = m
        self._stored = self._end = end  # in the map, and with what waits to be stored
        self._crc = crc  # of the last record
        self._tail = bytearray()  # what waits to be stored
        self._turn = anyio.Lock()

    def again(self) -> Log:
        """The same log, to be read from its start."""
        return Log(self._m)

    @property
    def end(self) -> int:
        """Behind the last record."""
        return self._end

    @property
    def crc(self) -> int:
        """The checksum of the last record."""
        return self._crc

    async def read(self, offset: int) -> tuple[Record, int, int] | None:
        """The record at a place, its checksum and where it ends; None where none can be."""
        room = len(self._m) - offset
        if room < Record.HEAD.size:
            return None
        head = await self._m.read_at(offset, Record.HEAD.size)
        key_size, value_size, crc = Record.HEAD.unpack(head)
        size = key_size + (0 if value_size == Record.DELETED else value_size)
        if key_size == 0 or size > room - Record.HEAD.size:
            return None
        body = await self._m.read_at(offset + Record.HEAD.size, size)
        value = None if value_size == Record.DELETED else body[key_size:]
        return Record(body[:key_size], value), crc, offset + Record.HEAD.size + size

    async def scan(self) -> AsyncIterator[tuple[int, Record]]:
        """All records from the start with their places; sets the end."""
        self._stored = self._end = self._crc = 0
        while (found := await self.read(self._end)) is not None:
            record, crc, end = found
            if record.encode(self._crc)[1] != crc:
                return
            place = self._end
            self._stored = self._end = end
            self._crc = crc
            yield place, record

    async def append(self, record: Record) -> int:
        """Put a record behind the others, durably; its place."""
        data, self._crc = record.encode(self._crc)
        place = self._end
        self._tail += data
        end = self._end = place + len(data)
        async with self._turn:
            if self._stored < end:  # else somebody has stored it together with theirs
                await self._store()
        await self._m.flush_range(0, end)
        return place

    async def flush(self) -> None:
        """Store what puts that were cancelled have left, and make all of it durable."""
        async with self._turn:
            if self._tail:
                await self._store()
        await self._m.flush()

    async def _store(self) -> None:
        tail, self._tail = self._tail, bytearray()
        try:
            if len(tail) > len(self._m) - self._stored:
                await self._m.resize(max(2 * len(self._m), self._stored + len(tail)))
            await self._m.write_at(self._stored, tail)
        except BaseException:  # cancelled, or the disk is full: it still waits
            self._tail[:0] = tail
            raise
        self._stored += len(tail)


class Index:
    """Where the last record of each key is."""

    HEAD = struct.Struct("<8sQII")  # magic, end of the log covered, its checksum, slots used
    MAGIC = b"kvindex1"
    START = 4096

    def __init__(self, m: AsyncMmap, used: int = 0) -> None:
        self.m = m
        self.used = used
        self.slots = (len(m) - self.START) // 8

    @staticmethod
    def hash(key: bytes) -> tuple[int, bytes]:
        """Where the search for a key begins, and two bytes to know it by."""
        digest = blake2b(key, digest_size=8).digest()
        return int.from_bytes(digest, "little"), digest[6:]

    @classmethod
    async def create(cls, path: Path, places: dict[bytes, int], slots: int) -> Index:
        """A new index of at least so many slots."""
        while len(places) * 4 >= slots * 3:
            slots *= 2
        table = bytearray(8 * slots)
        for key, place in places.items():
            slot, tag = cls.hash(key)
            while any(table[8 * (slot % slots) : 8 * (slot % slots) + 8]):
                slot += 1
            table[8 * (slot % slots) : 8 * (slot % slots) + 8] = cls.entry(place, tag)
        m = await AsyncMmap.create(path, cls.START + len(table))
        await m.write_at(cls.START, table)
        return cls(m, len(places))

    @staticmethod
    def entry(place: int, tag: bytes) -> bytes:
        """What a slot has: six bytes of place, never 0, and the tag."""
        return (place + 1).to_bytes(6, "little") + tag

    async def find(self, key: bytes, log: Log) -> tuple[int, int | None]:
        """The slot of a key, and the place of its record if it has one."""
        slot, tag = self.hash(key)
        while True:
            offset = self.START + 8 * (slot % self.slots)
            entry = await self.m.read_at(offset, 8)
            if not any(entry):
                return offset, None
            if entry[6:] == tag:
                place = int.from_bytes(entry[:6], "little") - 1
                found = await log.read(place)
                if found is not None and found[0].key == key:
                    return offset, place
            slot += 1

    async def enter(self, key: bytes, place: int, log: Log) -> None:
        """Let a key lead to a place, unless it leads to a later one already."""
        offset, old = await self.find(key, log)
        if old is None or old < place:
            await self.m.write_at(offset, self.entry(place, self.hash(key)[1]))
            self.used += old is None


class Store:
    """
    The store in a folder. Any number of tasks may use it; one process at a time.

    ``get`` may give a value whose ``put`` has not returned yet; what ``put`` has returned for is
    on the disk. A ``put`` that is cancelled may be done or not.
    """

    def __init__(self, folder: Path, log: Log, index: Index) -> None:
        self._folder = folder
        self._log = log
        self._index = index
        self._entering = anyio.Lock()
        self._unfinished = 0  # puts that are in the log and not in the index
        self._swap = RegionLock()  # readers of the index, and who makes a larger one

    @classmethod
    @asynccontextmanager
    async def open(cls, folder: Path) -> AsyncIterator[Store]:
        """The store in a folder, which is made if it is not there."""
        await anyio.Path(folder).mkdir(exist_ok=True)
        async with await _open_or_create(folder / "log", FIRST_LOG) as log_map:
            path, smallest = anyio.Path(folder, "index"), Index.START + 8 * FIRST_SLOTS
            if await path.exists() and (await path.stat()).st_size < smallest:
                await path.unlink()  # no index at all
            index_map = await _open_or_create(folder / "index", smallest)
            head = await index_map.read_at(0, Index.HEAD.size)
            magic, end, crc, used = Index.HEAD.unpack(head)
            if magic == Index.MAGIC:
                store = cls(folder, Log(log_map, end, crc), Index(index_map, used))
                await store._mark(b"")  # not clean any more
            else:
                store = cls(folder, Log(log_map), Index(index_map))
                await store._make_index(store._log, store._index.slots)
            try:
                yield store
            finally:
                with anyio.CancelScope(shield=True):
                    await store._log.flush()
                    await store._index.m.flush()  # all of it, before it says that it is whole
                    if store._unfinished == 0:  # else the next one makes it from the log
                        await store._mark(Index.MAGIC)
                    await store._index.m.aclose()

    async def get(self, key: bytes) -> bytes | None:
        """The value of a key; None if it has none."""
        async with self._swap.shared(0, 1):
            _, place = await self._index.find(key, self._log)
            found = await self._log.read(place) if place is not None else None
        return found[0].value if found else None

    async def put(self, key: bytes, value: bytes | None) -> None:
        """Set the value of a key, or with None remove it. On the disk when it returns."""
        if not key:
            raise ValueError("a key has at least one byte")
        self._unfinished += 1  # and so it stays if the put is cancelled: the index lacks it
        place = await self._log.append(Record(key, value))
        async with self._entering:
            if self._index.used * 4 >= self._index.slots * 3:
                # Who is behind the end of this scan enters its key after us.
                await self._make_index(self._log.again(), 2 * self._index.slots)
            async with self._swap.shared(0, 1):
                await self._index.enter(key, place, self._log)
        self._unfinished -= 1

    async def items(self) -> AsyncIterator[tuple[bytes, bytes]]:
        """All keys that have a value, in the order of their last change."""
        place = 0
        while place < self._log.end:
            found = await self._log.read(place)
            if found is None:
                return
            record, _, end = found
            async with self._swap.shared(0, 1):
                _, last = await self._index.find(record.key, self._log)
            if last == place and record.value is not None:
                yield record.key, record.value
            place = end

    async def _make_index(self, log: Log, slots: int) -> None:
        """A new index, from the start of the log."""
        places = {record.key: place async for place, record in log.scan()}
        path = self._folder / "index"
        async with self._swap.exclusive(0, 1):
            await self._index.m.aclose(flush=False)
            await anyio.Path(path).unlink()
            self._index = await Index.create(path, places, slots)

    async def _mark(self, magic: bytes) -> None:
        head = Index.HEAD.pack(magic, self._log.end, self._log.crc, self._index.used)
        await self._index.m.write_at(0, head)
        await self._index.m.flush()


async def _open_or_create(path: Path, length: int) -> AsyncMmap:
    try:
        return await AsyncMmap.open_path(path, "r+")
    except FileNotFoundError:
        return await AsyncMmap.create(path, length)


# The demonstration


async def fill(folder: Path, clients: int) -> None:
    """Clients that change keys of their own for ever, and say what was acknowledged."""

    async def client(number: int, store: Store) -> None:
        counter = b"client %d" % number
        count = int(await store.get(counter) or b"0")
        while True:
            count += 1
            await store.put(b"entry %d of %d" % (count, number), os.urandom(count % 200 + 1))
            if count % 3 == 0:
                await store.put(b"entry %d of %d" % (count - 1, number), None)
            await store.put(counter, b"%d" % count)
            os.write(1, b"%d %d\n" % (number, count))  # one line at once, whole

    async with Store.open(folder) as store, anyio.create_task_group() as tasks:
        for number in range(clients):
            tasks.start_soon(client, number, store)


async def check(folder: Path, acknowledged: dict[int, int]) -> int:
    """Look for everything that was acknowledged; how many keys there are."""
    async with Store.open(folder) as store:
        for number, count in acknowledged.items():
            found = int(await store.get(b"client %d" % number) or b"0")
            if found not in (count, count + 1):  # the one after it may have been under way
                raise AssertionError(f"client {number} was told {count}, and {found} is there")
            for each in range(max(1, count - 10), count + 1):
                value = await store.get(b"entry %d of %d" % (each, number))
                if each % 3 == 2 and each < count:  # removed by the next step
                    right = value is None
                elif each % 3 == 2 and value is None:  # the next step was under way
                    right = True
                else:
                    right = value is not None and len(value) == each % 200 + 1
                if not right:
                    raise AssertionError(f"entry {each} of client {number} is {value!r}")
            acknowledged[number] = found  # where the client will go on
        return len([key async for key, _ in store.items()])


def kill_and_check(folder: Path, rounds: int, clients: int, backend: str) -> None:
    """The rounds of the demonstration."""
    acknowledged: dict[int, int] = {}
    command = [sys.executable, __file__, "fill", str(folder), "--clients", str(clients)]
    for number in range(rounds):
        moment = random.uniform(0.2, 1.0)
        process = subprocess.Popen([*command, "--backend", backend], stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process, process.stdout as output:
            lines = [output.readline()]  # it has begun
            started = time.perf_counter()
            while time.perf_counter() - started < moment:
                lines.append(output.readline())
            process.kill()
            lines += output.readlines()
        for line in lines:
            client, count = map(int, line.split())
            acknowledged[client] = count
        began = time.perf_counter()
        keys = anyio.run(check, folder, acknowledged, backend=backend)
        took = time.perf_counter() - began
        print(
            f"round {number + 1}: killed after {moment:.2f} s and {len(lines)} acknowledged steps "
            f"({len(lines) / moment:.0f}/s); opened and checked in {took:.2f} s, {keys} keys, "
            f"nothing is missing"
        )


async def put(folder: Path, key: str, value: str) -> None:
    async with Store.open(folder) as store:
        await store.put(os.fsencode(key), os.fsencode(value))


async def get(folder: Path, key: str) -> bytes | None:
    async with Store.open(folder) as store:
        return await store.get(os.fsencode(key))


async def show(folder: Path) -> None:
    async with Store.open(folder) as store:
        async for key, value in store.items():
            print(key.decode(errors="replace"), value.decode(errors="replace"), sep="\t")


def positive(text: str) -> int:
    """A type of argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def main() -> None:
    title, usage, _ = __doc__.split("\n\n", 2)
    parser = argparse.ArgumentParser(description=title, usage=usage.strip())
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio")
    parser.add_argument("--clients", type=positive, default=300)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("command", nargs="?", default="demo", help="demo, put, get or list")
    parser.add_argument("words", nargs="*", metavar="FOLDER KEY VALUE")
    options = parser.parse_intermixed_args()
    words = options.words
    if options.command in ("get", "list") and words and not Path(words[0], "log").is_file():
        parser.error(f"{words[0]} is not the folder of a store")
    match options.command, len(words):
        case "demo", 0:
            with tempfile.TemporaryDirectory() as folder:
                store = Path(folder, "store")
                kill_and_check(store, options.rounds, options.clients, options.backend)
        case "fill", 1:
            anyio.run(fill, Path(words[0]), options.clients, backend=options.backend)
        case "put", 3:
            anyio.run(put, Path(words[0]), words[1], words[2], backend=options.backend)
        case "get", 2:
            value = anyio.run(get, Path(words[0]), words[1], backend=options.backend)
            if value is None:
                sys.exit(f"{words[1]!r} has no value")
            print(value.decode(errors="replace"))
        case "list", 1:
            anyio.run(show, Path(words[0]), backend=options.backend)
        case _:
            parser.error(f"not understood: {' '.join([options.command, *words])}")


if __name__ == "__main__":
    main()
