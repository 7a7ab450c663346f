"""A kernel for tests: the real one, which can be told to fail, to wait, to be old or to forget.

:class:`FakeKernel` satisfies :class:`aiommap._kernel.Kernel` and hands every call on to the real
kernel, so that files and memory are real. What a test adds comes before or instead of that, in
this order: the call is recorded, hooks run, a :class:`Hold` blocks it, a failure is raised, a
wrapper or the real function runs.

With ``durability=True`` it also keeps a :class:`Disk`: what each file would be after a power
loss.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeVar

from aiommap._kernel import Buffer, Capabilities, Kernel, Scratch, native
from aiommap._kernel._map_registry import MapRegistry
from aiommap._options import Advice, Protection

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds until a held call gives up, so that a broken test fails instead of hanging."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the kernel, with the thread that made it."""

    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    thread: int


@dataclass(slots=True)
class _Rule:
    """Applies to calls of one function: not to the first ``after``, then to ``times`` of them."""

    name: str
    after: int
    times: int | None

    def applies(self) -> bool:
        if self.after > 0:
            self.after -= 1
            return False
        if self.times is None:
            return True
        self.times -= 1
        return self.times >= 0


@dataclass(slots=True)
class _Failure:
    rule: _Rule
    error: int


class Hold:
    """
    A call that does not return until the test lets it.

    :ivar entered: set when a call is waiting
    :ivar release: set it to let them all go on, and later ones pass; leaving the ``with`` block
        does so too
    """

    def __init__(self, rule: _Rule, on_enter: Callable[[], object] | None) -> None:
        self._rule = rule
        self._on_enter = on_enter
        self._lock = threading.Lock()
        self.entered = threading.Event()
        self.release = threading.Event()
        self.waiting = 0

    def wait_entered(self) -> None:
        """Wait, in a thread, until a call has arrived."""
        if not self.entered.wait(PATIENCE):
            raise AssertionError(f"nobody called {self._rule.name}")

    def applies(self, name: str) -> bool:
        return self._rule.name == name and not self.release.is_set() and self._rule.applies()

    def block(self) -> None:
        with self._lock:
            self.waiting += 1
        try:
            self.entered.set()
            if self._on_enter is not None:
                self._on_enter()
            if not self.release.wait(PATIENCE):
                raise AssertionError(f"nobody released {self._rule.name}")
        finally:
            with self._lock:
                self.waiting -= 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release.set()


@dataclass(slots=True)
class _FileOnDisk:
    durable: bytearray
    clean: bytes  # what the kernel believes to be on the disk


class Disk:
    """
    What a power loss would leave of each file: the worst that the promises allow.

    * Nothing becomes durable but by ``sync_data``, ``sync_all`` or ``sync_range``, and by them
      only what was stored before they began. Started write-back alone makes nothing durable.
    * A sync that fails loses the pages it was to write: the kernel holds them for clean, and a
      later sync that succeeds does not write them (https://lwn.net/Articles/752063/), unless
      something is stored into them again.

    A file is known from the first call on its descriptor; what it has then counts as durable.
    O(bytes of the file) for each sync.
    """

    def __init__(self, page_size: int) -> None:
        self._page = page_size
        self._lock = threading.Lock()
        self._files: dict[tuple[int, int], _FileOnDisk] = {}

    def track(self, fd: int) -> None:
        with self._lock:
            key = _identity(fd)
            if key not in self._files:
                content = _content(fd)
                self._files[key] = _FileOnDisk(bytearray(content), content)

    def volatile(self, file: int | str | os.PathLike[str]) -> bytes:
        """The file as everybody sees it now."""
        if isinstance(file, int):
            return _content(file)
        with open(file, "rb") as stream:
            return stream.read()

    def durable(self, file: int | str | os.PathLike[str]) -> bytes:
        """The file as it would be after a power loss now."""
        with self._lock:
            return bytes(self._files[_identity(file)].durable)

    def begin(self, fd: int) -> bytes:
        """What a sync that begins now is about."""
        return _content(fd)

    def end(
        self, fd: int, content: bytes, offset: int, length: int | None, *, written: bool
    ) -> None:
        """The sync of a range, or with None of everything, has ended."""
        with self._lock:
            state = self._files[_identity(fd)]
            stop = len(content) if length is None else min(offset + length, len(content))
            if written:
                if len(state.durable) < stop:
                    state.durable.extend(bytes(stop - len(state.durable)))
                if length is None:
                    del state.durable[len(content) :]
            clean = bytearray(state.clean[: len(content)])
            clean.extend(bytes(len(content) - len(clean)))
            for start in range(offset - offset % self._page, stop, self._page):
                page = slice(start, min(start + self._page, len(content)))
                if written and (content[page] != clean[page] or start >= len(state.clean)):
                    end = min(page.stop, len(state.durable))
                    state.durable[start:end] = content[start:end]
                clean[page] = content[page]
            state.clean = bytes(clean)


def _identity(file: int | str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_dev, status.st_ino


def _content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


# What an old or confined kernel lacks: the functions, and what they then do. An errno is
# raised; anything else is the answer.
_LACKING: dict[str, dict[str, Any]] = {
    "populate": {
        "populate_read": errno.EINVAL,
        "populate_write": errno.EINVAL,
        "populate_many": False,
    },
    "process_madvise": {"will_need_many": False, "populate_many": False},
    "nowait_reads": {"read_nowait": errno.EOPNOTSUPP},
    "cachestat": {"cached_pages": errno.ENOSYS},
    "mincore": {"resident": errno.ENOSYS},
    "process_vm": {"copy": errno.ENOSYS, "copy_many": False},
    "memfd": {"memory_file": None},
    "fallocate": {"reserve": False},
    "sync_file_range": {"start_write_back": None, "write_back": None},
    "madvise": {"advise": errno.ENOTSUP},
}
_CAPABILITY = {
    "populate": "populate",
    "nowait_reads": "nowait_reads",
    "cachestat": "cachestat",
    "mincore": "mincore",
    "fallocate": "reserve",
    "sync_file_range": "write_back_start",
}


class FakeKernel:
    """
    A kernel that does as the test says.

    :param kernel: who does the real work
    :param durability: keep a :class:`Disk`
    :ivar calls: every call so far, in the order in which they began
    """

    def __init__(self, kernel: Kernel = native, *, durability: bool = False) -> None:
        self.kernel = kernel
        self.calls: deque[Call] = deque()
        self.maps = MapRegistry()
        self._disk = Disk(kernel.page_size) if durability else None
        self._lock = threading.Lock()
        self._failures: list[_Failure] = []
        self._holds: list[Hold] = []
        self._hooks: list[tuple[str, Callable[[Call], object]]] = []
        self._wrappers: dict[str, Callable[..., Any]] = {}
        self._lacking: set[str] = set()

    # What the test says

    @property
    def disk(self) -> Disk:
        assert self._disk is not None, "ask for FakeKernel(durability=True)"
        return self._disk

    @classmethod
    def old(cls, kernel: Kernel = native) -> FakeKernel:
        """A Linux of about 4.9 in a container: everything that is optional is missing."""
        fake = cls(kernel)
        fake.lack(
            "populate",
            "nowait_reads",
            "cachestat",
            "process_vm",
            "memfd",
            "fallocate",
            "sync_file_range",
        )
        return fake

    def names(self, *only: str) -> list[str]:
        """The names of the calls so far, in order; only those, if some are given."""
        return [call.name for call in list(self.calls) if not only or call.name in only]

    def fail(self, name: str, error: int, *, after: int = 0, times: int | None = None) -> None:
        """
        Make a function raise ``OSError(error)``.

        :param after: calls that still go well
        :param times: how many then fail; None for all
        """
        self._check(name)
        with self._lock:
            self._failures.append(_Failure(_Rule(name, after, times), error))

    def heal(self, name: str | None = None) -> None:
        """Forget the failures of a function, or of all."""
        with self._lock:
            self._failures = [
                failure for failure in self._failures if name not in (None, failure.rule.name)
            ]

    def hold(
        self,
        name: str,
        *,
        after: int = 0,
        times: int | None = None,
        on_enter: Callable[[], object] | None = None,
    ) -> Hold:
        """
        Make a function wait until the test releases it, as if the disk were slow.

        :param on_enter: run in the waiting call's thread when it has arrived
        """
        self._check(name)
        hold = Hold(_Rule(name, after, times), on_enter)
        with self._lock:
            self._holds.append(hold)
        return hold

    def before(self, name: str, hook: Callable[[Call], object]) -> None:
        """Run something in the calling thread before each call of a function."""
        self._check(name)
        with self._lock:
            self._hooks.append((name, hook))

    def wrap(self, name: str, wrapper: Callable[..., Any]) -> None:
        """Call ``wrapper(real, *arguments)`` in the place of a function."""
        self._check(name)
        self._wrappers[name] = wrapper

    def lack(self, *features: str, error: int | None = None) -> None:
        """
        Do as a kernel without these features does.

        :param features: ``populate``, ``nowait_reads``, ``cachestat``, ``mincore``,
            ``process_vm``, ``memfd``, ``fallocate``, ``sync_file_range``, ``madvise``
        :param error: raise this errno instead of the usual one
        """
        for feature in features:
            for name, answer in _LACKING[feature].items():
                if type(answer) is int or (error is not None and answer is not False):
                    self.fail(name, answer if error is None else error)
                else:
                    self.wrap(name, lambda real, *arguments, answer=answer, **options: answer)
            self._lacking.add(feature)

    def _check(self, name: str) -> None:
        if not callable(getattr(Kernel, name, None)):
            raise AttributeError(f"the kernel has no function {name!r}")

    # How it is done

    def _call(self, real: Callable[..., T], name: str, *arguments: Any, **options: Any) -> T:
        call = Call(name, arguments, options, threading.get_ident())
        with self._lock:
            self.calls.append(call)
            hooks = [hook for hooked, hook in self._hooks if hooked == name]
            holds = [hold for hold in self._holds if hold.applies(name)]
        for hook in hooks:
            hook(call)
        for hold in holds:
            hold.block()
        with self._lock:
            failing = [
                failure.error
                for failure in self._failures
                if failure.rule.name == name and failure.rule.applies()
            ]
        if failing:
            raise OSError(failing[0], os.strerror(failing[0]))
        wrapper = self._wrappers.get(name)
        if wrapper is None:
            return real(*arguments, **options)
        answer: T = wrapper(real, *arguments, **options)
        return answer

    def _track(self, fd: int) -> None:
        if self._disk is not None:
            self._disk.track(fd)

    def _sync(
        self,
        real: Callable[..., None],
        name: str,
        fd: int,
        offset: int,
        length: int | None,
        *arguments: int,
    ) -> None:
        if self._disk is None:
            self._call(real, name, *arguments)
            return
        self._disk.track(fd)
        content = self._disk.begin(fd)
        written = False
        try:
            self._call(real, name, *arguments)
            written = True
        finally:
            self._disk.end(fd, content, offset, length, written=written)

    # Kernel

    @property
    def page_size(self) -> int:
        return self.kernel.page_size

    @property
    def map_granularity(self) -> int:
        return self.kernel.map_granularity

    @property
    def map_file_flushes(self) -> bool:
        return self.kernel.map_file_flushes

    @property
    def cuts_mapped_files(self) -> bool:
        return self.kernel.cuts_mapped_files

    def duplicate(self, fd: int) -> int:
        self._track(fd)
        return self._call(self.kernel.duplicate, "duplicate", fd)

    def reopen(self, fd: int) -> int | None:
        return self._call(self.kernel.reopen, "reopen", fd)

    def path_of(self, fd: int) -> str | None:
        return self._call(self.kernel.path_of, "path_of", fd)

    def file_size(self, fd: int) -> int:
        self._track(fd)
        return self._call(self.kernel.file_size, "file_size", fd)

    def known_file_size(self, fd: int) -> int:
        self._track(fd)
        return self._call(self.kernel.known_file_size, "known_file_size", fd)

    def set_file_size(self, fd: int, size: int) -> None:
        self._track(fd)
        self._call(self.kernel.set_file_size, "set_file_size", fd, size)

    def reserve(self, fd: int, offset: int, length: int, *, grow: bool) -> bool:
        self._track(fd)
        return self._call(self.kernel.reserve, "reserve", fd, offset, length, grow=grow)

    def file_is_in_memory(self, fd: int) -> bool:
        self._track(fd)
        return self._call(self.kernel.file_is_in_memory, "file_is_in_memory", fd)

    def reads_directly(self, fd: int) -> bool:
        return self._call(self.kernel.reads_directly, "reads_directly", fd)

    def disk_queue(self, fd: int) -> int:
        return self._call(self.kernel.disk_queue, "disk_queue", fd)

    def read_ahead(self, fd: int) -> int:
        return self._call(self.kernel.read_ahead, "read_ahead", fd)

    def longest_hint(self, read_ahead: int) -> int:
        return self._call(self.kernel.longest_hint, "longest_hint", read_ahead)

    def free_blocks(self, fd: int) -> int:
        return self._call(self.kernel.free_blocks, "free_blocks", fd)

    def sync_data(self, fd: int) -> None:
        self._sync(self.kernel.sync_data, "sync_data", fd, 0, None, fd)

    def sync_all(self, fd: int) -> None:
        self._sync(self.kernel.sync_all, "sync_all", fd, 0, None, fd)

    def sync_directory(self, path: str | bytes) -> None:
        self._call(self.kernel.sync_directory, "sync_directory", path)

    def start_write_back(self, fd: int, address: int, offset: int, length: int) -> None:
        self._call(self.kernel.start_write_back, "start_write_back", fd, address, offset, length)

    def write_back(self, fd: int, address: int, offset: int, length: int) -> None:
        self._call(self.kernel.write_back, "write_back", fd, address, offset, length)

    def read(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        return self._call(self.kernel.read, "read", fd, buffers, offset)

    def read_nowait(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        return self._call(self.kernel.read_nowait, "read_nowait", fd, buffers, offset)

    def will_need(self, fd: int, offset: int, length: int) -> None:
        self._call(self.kernel.will_need, "will_need", fd, offset, length)

    def map_file(self, fd: int, length: int, protection: Protection, offset: int) -> mmap.mmap:
        self._track(fd)
        memory = self._call(self.kernel.map_file, "map_file", fd, length, protection, offset)
        self.maps.add(fd, memory, offset, writable=protection is Protection.READ_WRITE)
        return memory

    def memory_file(self, length: int, *, huge: bool) -> int | None:
        return self._call(self.kernel.memory_file, "memory_file", length, huge=huge)

    def map_memory(
        self, length: int, protection: Protection, *, stack: bool, huge: bool
    ) -> mmap.mmap:
        return self._call(
            self.kernel.map_memory, "map_memory", length, protection, stack=stack, huge=huge
        )

    def sync_range(self, address: int, length: int) -> None:
        found = self.maps.at(address)
        if found is None or not found.writable:
            self._call(self.kernel.sync_range, "sync_range", address, length)
            return
        offset = found.offset + address - found.address
        self._sync(self.kernel.sync_range, "sync_range", found.fd, offset, length, address, length)

    def populate_read(self, address: int, length: int) -> None:
        self._call(self.kernel.populate_read, "populate_read", address, length)

    def populate_write(self, address: int, length: int) -> None:
        self._call(self.kernel.populate_write, "populate_write", address, length)

    def will_need_many(self, spans: Sequence[tuple[int, int]]) -> bool:
        return self._call(self.kernel.will_need_many, "will_need_many", spans)

    def copy_many(self, copies: Sequence[tuple[int, int, int]]) -> bool:
        return self._call(self.kernel.copy_many, "copy_many", copies)

    def populate_many(self, spans: Sequence[tuple[int, int]], *, write: bool) -> bool:
        return self._call(self.kernel.populate_many, "populate_many", spans, write=write)

    def resident(self, address: int, length: int) -> bytes:
        return self._call(self.kernel.resident, "resident", address, length)

    def cached_pages(self, fd: int, offset: int, length: int) -> int:
        return self._call(self.kernel.cached_pages, "cached_pages", fd, offset, length)

    def copy(self, destination: int, source: int, length: int) -> int:
        return self._call(self.kernel.copy, "copy", destination, source, length)

    def move(self, destination: int, source: int, length: int) -> None:
        self._call(self.kernel.move, "move", destination, source, length)

    def search(self, data: Scratch, length: int, needle: bytes, *, last: bool) -> int:
        return self._call(self.kernel.search, "search", data, length, needle, last=last)

    def advise(self, address: int, length: int, advice: Advice) -> None:
        self._call(self.kernel.advise, "advise", address, length, advice)

    def pin(self, address: int, length: int) -> None:
        self._call(self.kernel.pin, "pin", address, length)

    def unpin(self, address: int, length: int) -> None:
        self._call(self.kernel.unpin, "unpin", address, length)

    def pin_limit(self) -> int | None:
        return self._call(self.kernel.pin_limit, "pin_limit")

    def capabilities(self, path: str | bytes | None) -> Capabilities:
        known = self._call(self.kernel.capabilities, "capabilities", path)
        missing = {
            _CAPABILITY[feature]: False for feature in self._lacking if feature in _CAPABILITY
        }
        return replace(known, **missing)
