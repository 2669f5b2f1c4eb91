"""The second tier: blocks that the prefix tree has no room for, in RAM and then on disk.

One thread encodes, writes and reads, so that a step never waits for a disk. Reading goes first.
What cannot be written is dropped, what cannot be read is a miss: the engine computes it.
"""

import contextlib
import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eloquent.errors import ConfigurationError
from eloquent_server.engine.attention import KvShape
from eloquent_server.engine.blockcodec import (
    DamagedBlockError,
    Encoding,
    decode,
    encode,
)
from eloquent_server.engine.radix import BLOCK_TOKENS
from eloquent_server.engine.settings import KvOptions

QUEUE_BYTES = 256 << 20
"Blocks that wait to be encoded; more are dropped."
RETRY_S = 30.0
"After a write that failed (a full disk, say), the disk is left alone for so long."

_SUFFIX = ".kv"
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class TierStats:
    """Counted since the start, in blocks."""

    stored: int = 0
    dropped: int = 0
    "The queue was full, or the disk took no more."
    read: int = 0
    damaged: int = 0


class DiskStore:
    """Files named by key in one directory, the least recently used deleted first.

    Its methods raise `OSError`. For one thread, but any may ask what it contains.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        """Take up what is in the directory already; make it, for this user only, if need be.

        Raises:
            OSError: the directory cannot be made or read.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._max_bytes = max_bytes
        self._sizes: OrderedDict[bytes, int] = OrderedDict()
        self._bytes = 0
        found = []
        for entry in os.scandir(directory):
            stem, suffix = os.path.splitext(entry.name)  # noqa: PTH122 (thousands of entries)
            try:
                key = bytes.fromhex(stem)
            except ValueError:
                key = b""
            if suffix == _SUFFIX and key:
                stat = entry.stat()
                found.append((stat.st_mtime, key, stat.st_size))
            elif suffix == ".tmp":
                os.unlink(entry.path)  # noqa: PTH108 (a write that a death cut short)
        for _, key, size in sorted(found):
            self._sizes[key] = size
            self._bytes += size
        self._trim()

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    @property
    def used_bytes(self) -> int:
        """What the files take."""
        return self._bytes

    def write(self, key: bytes, data: bytes) -> None:
        """Keep `data`; a reader sees all of it or nothing."""
        path = self._path(key)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        self._bytes += len(data) - self._sizes.pop(key, 0)
        self._sizes[key] = len(data)
        self._trim()

    def read(self, key: bytes) -> bytearray:
        """Return what was kept, and count it as used."""
        path = self._path(key)
        with path.open("rb", buffering=0) as file:
            data = bytearray(os.fstat(file.fileno()).st_size)
            file.readinto(data)
        os.utime(path)
        self._sizes.move_to_end(key)
        return data

    def delete(self, key: bytes) -> None:
        """Forget a block, whether or not its file goes away."""
        self._bytes -= self._sizes.pop(key, 0)
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def _trim(self) -> None:
        while self._bytes > self._max_bytes and self._sizes:
            self.delete(next(iter(self._sizes)))

    def _path(self, key: bytes) -> Path:
        return self._directory / (key.hex() + _SUFFIX)


@dataclass(frozen=True, slots=True)
class _Fetch:
    keys: Sequence[bytes]
    done: Callable[[list[torch.Tensor]], None]


class TierStore:
    """Implements `prefix.Tier`; its methods may be called from any thread.

    With a disk, every block that is offered is written there; RAM then holds the latest. Without,
    RAM holds all that there is.
    """

    def __init__(
        self,
        shape: KvShape,
        *,
        ram_bytes: int,
        disk: DiskStore | None = None,
        encoding: Encoding = "raw",
        queue_bytes: int = QUEUE_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the thread; `close` ends it."""
        self.stats = TierStats()
        self._shape = shape
        self._encoding: Encoding = encoding
        self._ram_bytes = ram_bytes
        self._ram: OrderedDict[bytes, bytes] = OrderedDict()
        self._ram_used = 0
        self._disk = disk
        self._clock = clock
        self._disk_rests_until = -1.0
        block_bytes = BLOCK_TOKENS * shape.token_bytes
        self._queue_blocks = max(1, queue_bytes // block_bytes)
        # Under the condition's lock: the two queues and `_closing`.
        self._condition = threading.Condition()
        self._fetches: deque[_Fetch] = deque()
        self._stores: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._closing = False
        self._working = False
        self._thread = threading.Thread(target=self._run, name="eloquent-kv-tier", daemon=True)
        self._thread.start()

    @property
    def durable(self) -> bool:
        """Whether blocks survive the process."""
        return self._disk is not None

    def holds(self, key: bytes) -> bool:
        """Return whether a block is there, or on its way in."""
        return (
            key in self._ram
            or key in self._stores
            or (self._disk is not None and key in self._disk)
        )

    def store(self, key: bytes, block: torch.Tensor) -> None:
        """Keep a block of 16 tokens, unless too many wait already; returns at once."""
        with self._condition:
            if self._closing or len(self._stores) >= self._queue_blocks:
                self.stats.dropped += 1
                return
            self._stores[key] = block
            self._condition.notify()

    def fetch(self, keys: Sequence[bytes], done: Callable[[list[torch.Tensor]], None]) -> None:
        """Call `done`, in the tier's thread, with the blocks up to the first that is not there."""
        with self._condition:
            if not self._closing:
                self._fetches.append(_Fetch(list(keys), done))
                self._condition.notify()
                return
        done([])

    def settle(self, timeout_s: float = 60.0) -> bool:
        """Wait until all that was offered is kept or dropped; False if that took too long."""
        with self._condition:
            return self._condition.wait_for(
                lambda: not (self._stores or self._fetches or self._working), timeout_s
            )

    def close(self) -> None:
        """Keep what was offered, answer what was asked, and end the thread."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(1)
        while True:
            with self._condition:
                self._working = False
                self._condition.notify_all()
                self._condition.wait_for(lambda: self._fetches or self._stores or self._closing)
                self._working = True
                fetch = self._fetches.popleft() if self._fetches else None
                # Left in the queue while it is encoded, so that `holds` and `fetch` see it.
                stored = None if fetch else next(iter(self._stores.items()), None)
            if fetch:
                fetch.done(self._collect(fetch.keys))
            elif stored:
                self._try_to_keep(*stored)
                with self._condition:
                    del self._stores[stored[0]]
            else:
                return

    def _collect(self, keys: Sequence[bytes]) -> list[torch.Tensor]:
        blocks: list[torch.Tensor] = []
        for key in keys:
            block = self._stores.get(key)
            if block is not None and self._encoding != "raw":
                block = None  # The same answer whether or not it has been encoded by now.
                self._try_to_keep(key, self._stores[key])
            if block is None:
                block = self._load(key)
            if block is None:
                break
            blocks.append(block)
            self.stats.read += 1
        return blocks

    def _load(self, key: bytes) -> torch.Tensor | None:
        data: bytes | bytearray | None = self._ram.get(key)
        try:
            if data is not None:
                self._ram.move_to_end(key)
            elif self._disk is not None and key in self._disk:
                data = self._disk.read(key)
            else:
                return None
            return decode(data, key, self._shape, self._encoding)
        except (OSError, DamagedBlockError, RuntimeError, MemoryError) as error:
            self.stats.damaged += 1
            _log.warning("A block of the second tier is computed again: %s", error)
            self._forget(key)
            return None

    def _try_to_keep(self, key: bytes, block: torch.Tensor) -> None:
        try:
            self._keep(key, block)
        except (RuntimeError, MemoryError) as error:  # torch's and Python's lack of memory
            self.stats.dropped += 1
            _log.warning("A block does not go to the second tier: %s", error)

    def _keep(self, key: bytes, block: torch.Tensor) -> None:
        if key in self._ram or (self._disk is not None and key in self._disk):
            return
        data = encode(block, key, self._encoding)
        kept = self._keep_on_disk(key, data)
        if len(data) <= self._ram_bytes:
            kept = True
            self._ram[key] = data
            self._ram_used += len(data)
            while self._ram_used > self._ram_bytes:
                self._ram_used -= len(self._ram.popitem(last=False)[1])
        if kept:
            self.stats.stored += 1
        else:
            self.stats.dropped += 1

    def _keep_on_disk(self, key: bytes, data: bytes) -> bool:
        if self._disk is None or self._clock() < self._disk_rests_until:
            return False
        try:
            self._disk.write(key, data)
        except OSError as error:
            self._disk_rests_until = self._clock() + RETRY_S
            _log.warning("The second tier cannot write (%s); it tries again in a while", error)
            return False
        return key in self._disk

    def _forget(self, key: bytes) -> None:
        if key in self._ram:
            self._ram_used -= len(self._ram.pop(key))
        if self._disk is not None:
            self._disk.delete(key)


def open_tier(shape: KvShape, options: KvOptions) -> TierStore | None:
    """Return a second tier as the options ask, or None if they ask for none.

    Raises:
        ConfigurationError: the directory cannot be made or read.
    """
    disk = None
    if options.directory is not None and options.disk_bytes > 0:
        # A directory for each encoding: an exact engine never takes an inexact block.
        directory = Path(options.directory) / options.encoding
        try:
            disk = DiskStore(directory, options.disk_bytes)
        except OSError as error:
            raise ConfigurationError(
                f"Keys and values cannot be kept in {directory} ({error}). Choose a directory that "
                "this user may write to, or leave --kv-dir out."
            ) from error
    if disk is None and options.ram_bytes <= 0:
        return None
    return TierStore(shape, ram_bytes=options.ram_bytes, disk=disk, encoding=options.encoding)
