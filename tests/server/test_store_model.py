"""Both token stores against a model: any order of calls, restarts and crashes, and a plain dict."""

import asyncio
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from redis_server import RedisServer, command
from tools import needs_tool

from eloquent_server.store import TokenStore
from eloquent_server.store_redis import RedisTokenStore
from eloquent_server.store_redis_scripts import Keys
from eloquent_server.store_types import (
    StoreError,
    TurnEndedError,
    TurnExistsError,
    TurnRecord,
    TurnState,
    TurnStore,
)

TTL_S = 10.0
TOMBSTONE_TTL_S = 20.0
REDIS_SCALE = 1000
"A second here is so many of Redis's own, so that the time that a test takes is none."
HASH = hashlib.sha256(b"").digest()

Result = TypeVar("Result")

# Few, so that they meet.
KEYS = st.tuples(st.sampled_from(["local", "tenant"]), st.sampled_from([bytes(16), b"1" * 16]))


@dataclass
class ModelTurn:
    record: TurnRecord
    body: bytes
    log: bytes = b""
    continuations: list[bytes] = field(default_factory=list)
    state: TurnState = TurnState.OPEN
    since_s: float = 0.0
    "When the state began."

    def end(self, state: TurnState, now: float) -> None:
        self.state, self.since_s = state, now
        self.body, self.continuations = b"", []
        if state is TurnState.TOMBSTONE:
            self.log = b""

    @property
    def size(self) -> int:
        return len(self.body) + len(self.log) + sum(map(len, self.continuations))


class StoreMachine(RuleBasedStateMachine):
    """Calls on a store, and the same on a dict."""

    store: TurnStore

    def begin(self) -> None:
        """To be called first by each kind's `initialize`."""
        self.loop = asyncio.new_event_loop()
        self.now_s = 0.0
        self.turns: dict[tuple[str, bytes], ModelTurn] = {}
        self.calls = 0
        self.reports: list[StoreError | None] = []

    def _run(self, call: Callable[[], Result]) -> Result:
        """Make a call on the loop."""

        async def run() -> Result:
            return call()

        return self.loop.run_until_complete(run())

    @rule(key=KEYS, body=st.binary(max_size=3000))
    def create(self, key: tuple[str, bytes], body: bytes) -> None:
        try:
            record = self.loop.run_until_complete(self.store.begin(*key, HASH, body, HASH))
        except TurnExistsError:
            assert key in self.turns
        else:
            assert key not in self.turns
            self.turns[key] = ModelTurn(record, body)

    @rule(
        key=KEYS,
        data=st.binary(max_size=2000),
        continuation=st.none() | st.binary(max_size=50),
        ends=st.booleans(),
    )
    def append(
        self, key: tuple[str, bytes], data: bytes, continuation: bytes | None, ends: bool
    ) -> None:
        turn = self.turns.get(key)
        if turn is None:
            return
        offset = len(turn.log)

        def call() -> None:
            if ends:
                self.store.close_turn(turn.record, offset, data, on_stored=self.reports.append)
            else:
                self.store.append(
                    turn.record,
                    offset,
                    data,
                    continuation=continuation,
                    on_stored=self.reports.append,
                )

        try:
            self._run(call)
        except TurnEndedError:
            assert turn.state is not TurnState.OPEN
            return
        assert turn.state is TurnState.OPEN
        self.calls += 1
        turn.log += data
        if ends:
            turn.end(TurnState.ENDED, self.now_s)
        elif continuation is not None:
            turn.continuations.append(continuation)

    @rule(key=KEYS)
    def load(self, key: tuple[str, bytes]) -> None:
        found = self.loop.run_until_complete(self.store.load(*key))
        turn = self.turns.get(key)
        if turn is None or turn.state is TurnState.TOMBSTONE:
            assert found is None
            return
        assert found is not None
        assert (found.state, found.log, found.body) == (turn.state, turn.log, turn.body)
        assert found.continuations == tuple(turn.continuations)
        assert (found.record.length, found.record.size) == (len(turn.log), turn.size)

    @rule(key=KEYS)
    def let_go(self, key: tuple[str, bytes]) -> None:
        turn = self.turns.get(key)
        if turn is not None and turn.state is TurnState.OPEN and not turn.record.chunks:
            self._run(lambda: self.store.let_go(turn.record))
            del self.turns[key]

    @rule(key=KEYS)
    def delete(self, key: tuple[str, bytes]) -> None:
        assert self.loop.run_until_complete(self.store.delete(*key)) == (key in self.turns)
        if key in self.turns:
            self.turns[key].end(TurnState.TOMBSTONE, self.now_s)

    @rule(seconds=st.sampled_from([1.0, 5.0, TTL_S, TOMBSTONE_TTL_S]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self._pass(seconds)
        for key, turn in list(self.turns.items()):
            waited_s = self.now_s - turn.since_s
            if turn.state is TurnState.ENDED and waited_s >= TTL_S:
                turn.end(TurnState.TOMBSTONE, self._died_s(turn))
                waited_s = self.now_s - turn.since_s
            if turn.state is TurnState.TOMBSTONE and waited_s >= TOMBSTONE_TTL_S:
                del self.turns[key]

    def _claim_all(self) -> None:
        """Take up the open turns after a restart."""
        for key, turn in self.turns.items():
            stored = self.loop.run_until_complete(self.store.claim(*key))
            assert (stored is None) == (turn.state is TurnState.TOMBSTONE)
            if stored is not None:
                assert not stored.is_elsewhere
                turn.record = stored.record
        self.reports_are_complete()

    def reports_are_complete(self) -> None:
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.run_until_complete(asyncio.sleep(0))
        assert self.reports == [None] * self.calls

    def teardown(self) -> None:
        for key in list(self.turns):
            self.load(key)
        self.loop.run_until_complete(self.store.close())
        self.reports_are_complete()
        # to_thread has started a worker.
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    def _pass(self, seconds: float) -> None:
        """Have time pass for the store."""
        raise NotImplementedError

    def _died_s(self, turn: ModelTurn) -> float:
        """Return when an ended turn whose time is over became a tombstone."""
        raise NotImplementedError


class FileMachine(StoreMachine):
    """The store in a file."""

    store: TokenStore

    @initialize(durable=st.booleans())
    def open(self, durable: bool) -> None:
        self.begin()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "0.db"
        self.durable = durable
        self.store = self._open()

    def _open(self) -> TokenStore:
        return TokenStore.open(
            self.path,
            ttl_s=TTL_S,
            tombstone_ttl_s=TOMBSTONE_TTL_S,
            durable=self.durable,
            now=lambda: self.now_s,
        )

    @rule(is_crash=st.booleans())
    def reopen(self, is_crash: bool) -> None:
        old = self.path
        if is_crash:
            # What a killed process leaves: the files as they are, once the thread is done.
            self.loop.run_until_complete(self.store._read(lambda _: None))
            self.path = self.folder / f"{int(old.stem) + 1}.db"
            for suffix in ("", "-wal"):
                shutil.copy(f"{old}{suffix}", f"{self.path}{suffix}")
        self.loop.run_until_complete(self.store.close())
        self.store = self._open()
        for key, turn in self.turns.items():
            record = self.store.find(*key)
            assert record is not None
            turn.record = record
        self._claim_all()

    @invariant()
    def the_index_is_right(self) -> None:
        for key, turn in self.turns.items():
            record = self.store.find(*key)
            assert record is turn.record
            assert (record.state, record.length) == (turn.state, len(turn.log))
        is_open = [turn for turn in self.turns.values() if turn.state is TurnState.OPEN]
        assert len(self.store.unfinished()) == len(is_open)
        assert self.store.size == sum(turn.size for turn in self.turns.values())

    def _pass(self, seconds: float) -> None:
        self._run(self.store.expire)

    def _died_s(self, turn: ModelTurn) -> float:
        return self.now_s  # It is found out then.

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.folder)


class RedisMachine(StoreMachine):
    """The store in Redis; its clock is set forward by taking time off the keys."""

    store: RedisTokenStore
    server: ClassVar[RedisServer]

    @initialize()
    def open(self) -> None:
        self.begin()
        command(self.server, "FLUSHALL")
        self.store = self._open()

    def _open(self) -> RedisTokenStore:
        return self.loop.run_until_complete(
            RedisTokenStore.open(
                self.server.url,
                lease_s=REDIS_SCALE * TTL_S,
                ttl_s=REDIS_SCALE * TTL_S,
                tombstone_ttl_s=REDIS_SCALE * TOMBSTONE_TTL_S,
                now=lambda: self.now_s,
            )
        )

    @rule(is_crash=st.booleans())
    def reopen(self, is_crash: bool) -> None:
        if is_crash:
            # A killed process has sent all that was reported, and gives no lease back.
            self.loop.run_until_complete(self.store._writer.settled())
            for record in self.store._leases.held:
                self.store._leases.drop(record)
        self.loop.run_until_complete(self.store.close())
        for lease in command(self.server, "KEYS", "eloquent:lease:*").split():
            command(self.server, "DEL", lease)
        self.store = self._open()
        self._claim_all()

    @invariant()
    def open_turns_are_owned(self) -> None:
        turns = self.turns.values()
        is_open = {turn.record for turn in turns if turn.state is TurnState.OPEN}
        assert set(self.store._leases.held) >= is_open

    def _pass(self, seconds: float) -> None:
        self.loop.run_until_complete(self.store._writer.settled())
        is_open = [turn for turn in self.turns.values() if turn.state is TurnState.OPEN]
        renewed = {Keys(*turn.record.key).name for turn in is_open}
        for key in command(self.server, "KEYS", "eloquent:*:*").split():
            if key.split(b":", 2)[2] in renewed:
                continue  # Its owner lengthens its time.
            left_ms = int(command(self.server, "PTTL", key)) - 1000 * REDIS_SCALE * seconds
            command(self.server, "PEXPIRE", key, str(max(0, round(left_ms))))

    def _died_s(self, turn: ModelTurn) -> float:
        return turn.since_s + TTL_S


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if shutil.which("redis-server") is None:
        yield  # `TestRedisStoreModel` says so.
        return
    RedisMachine.server = RedisServer(tmp_path_factory.mktemp("redis"))
    RedisMachine.server.start()
    yield
    RedisMachine.server.stop()


TestStoreModel = FileMachine.TestCase
TestStoreModel.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, print_blob=True
)
TestRedisStoreModel = needs_tool("redis-server")(RedisMachine.TestCase)
TestRedisStoreModel.settings = settings(
    max_examples=30, stateful_step_count=40, deadline=None, print_blob=True
)
