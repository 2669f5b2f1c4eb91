"""The token store: what is stored, refused, reported, expired and deleted."""

import asyncio
import hashlib
import stat
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from eloquent_server import store as store_module
from eloquent_server.store import (
    StoreClosedError,
    StoredTurn,
    StoreError,
    StoreFullError,
    TokenStore,
    TurnEndedError,
    TurnExistsError,
    TurnRecord,
    TurnState,
    TurnTooLargeError,
)

TURN = bytes(range(16))
OTHER = bytes(range(1, 17))
BODY = b'{"messages": []}'
SECRET_HASH = hashlib.sha256(b"secret").digest()
BODY_HASH = hashlib.sha256(BODY).digest()
TTL_S = 100.0
TOMBSTONE_TTL_S = 1000.0
DEADLINE_S = 20.0
"Ends a hang; decides nothing."


@dataclass
class Clock:
    """A wall clock that the test sets."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "turns" / "tokens.db"


@pytest.fixture
async def store(path: Path, clock: Clock) -> AsyncIterator[TokenStore]:
    store = open_store(path, clock)
    yield store
    await store.close()


def open_store(path: Path | None, clock: Clock, **limits: Any) -> TokenStore:
    return TokenStore.open(path, ttl_s=TTL_S, tombstone_ttl_s=TOMBSTONE_TTL_S, now=clock, **limits)


def create(store: TokenStore, turn_id: bytes = TURN, principal: str = "local") -> TurnRecord:
    return store.create(principal, turn_id, SECRET_HASH, BODY, BODY_HASH)


async def stored(call: Callable[..., None], *arguments: Any, **named: Any) -> StoreError | None:
    """Call `append` or `close_turn`, and wait for what `on_stored` says."""
    outcome: asyncio.Future[StoreError | None] = asyncio.get_running_loop().create_future()
    call(*arguments, **named, on_stored=outcome.set_result)
    return await asyncio.wait_for(outcome, DEADLINE_S)


async def load(store: TokenStore, turn_id: bytes = TURN, principal: str = "local") -> StoredTurn:
    turn = await asyncio.wait_for(store.load(principal, turn_id), DEADLINE_S)
    assert turn is not None
    return turn


def has(path: Path, text: bytes) -> bool:
    """Whether `text` stands anywhere in the file."""
    return text in path.read_bytes()


def loosen(path: Path) -> None:
    path.chmod(0o644)


def modes(folder: Path) -> dict[str, int]:
    """The rights of the files in a folder, and its own under "."."""
    rights = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    return rights | {".": stat.S_IMODE(folder.stat().st_mode)}


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("is_private", [False, True])
async def test_a_turn_is_read_as_it_was_written(
    path: Path, clock: Clock, is_private: bool, durable: bool
) -> None:
    store = open_store(None if is_private else path, clock, durable=durable)
    record = create(store)
    store.append(record, 0, b"Hel", continuation=b"ids 1 2")
    store.append(record, 3, b"", continuation=b"ids 3")
    assert await stored(store.append, record, 3, b"lo") is None
    turn = await load(store)
    assert (turn.log, turn.body, turn.state) == (b"Hello", BODY, TurnState.OPEN)
    assert turn.continuations == (b"ids 1 2", b"ids 3")
    assert turn.record is record
    assert (record.secret_hash, record.body_hash) == (SECRET_HASH, BODY_HASH)
    await store.close()


async def test_reading_sees_all_that_was_appended_before_it(store: TokenStore) -> None:
    record = create(store)
    for number in range(2500):  # more than one transaction holds
        store.append(record, 4 * number, b"%04d" % number)
    reading = asyncio.ensure_future(store.load("local", TURN))
    await asyncio.sleep(0)
    store.append(record, 10_000, b"later")
    turn = await reading
    assert turn is not None
    assert turn.log == b"".join(b"%04d" % number for number in range(2500))
    assert (await load(store)).log.endswith(b"later")


async def test_reports_come_in_order_and_on_the_loop(store: TokenStore) -> None:
    record = create(store)
    reports: list[tuple[int, StoreError | None, threading.Thread]] = []

    def report(number: int, error: StoreError | None) -> None:
        reports.append((number, error, threading.current_thread()))

    for number in range(50):
        store.append(record, number, b"x", on_stored=partial(report, number))
    assert reports == []
    await load(store)
    await asyncio.sleep(0)
    assert reports == [(number, None, threading.main_thread()) for number in range(50)]


async def test_a_callback_that_raises_does_not_silence_the_next(store: TokenStore) -> None:
    faults: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    record = create(store)

    def raises(_: StoreError | None) -> None:
        raise ZeroDivisionError

    store.append(record, 0, b"a", on_stored=raises)
    assert await stored(store.append, record, 1, b"b") is None
    assert isinstance(faults[0]["exception"], ZeroDivisionError)


async def test_an_open_turn_goes_on_after_a_restart(path: Path, clock: Clock) -> None:
    store = open_store(path, clock)
    record = create(store)
    ended = create(store, OTHER)
    store.close_turn(ended, 0, b"end")
    clock.now += 5
    store.append(record, 0, b"Hel", continuation=b"state")
    clock.now += 5
    size = store.size
    await store.close()

    store = open_store(path, clock)
    assert store.size == size
    (record,) = store.unfinished()
    assert (record.turn_id, record.length) == (TURN, 3)
    assert (record.created_s, record.updated_s) == (1_000_000.0, 1_000_005.0)
    turn = await load(store)
    assert (turn.log, turn.body, turn.continuations) == (b"Hel", BODY, (b"state",))
    store.append(record, 3, b"lo")
    assert await stored(store.close_turn, record, 5, b"!") is None
    assert (await load(store)).log == b"Hello!"
    assert store.unfinished() == []
    await store.close()


async def test_an_ended_turn_keeps_its_log_and_loses_its_request(store: TokenStore) -> None:
    record = create(store)
    store.append(record, 0, b"Hello", continuation=b"state")
    assert await stored(store.close_turn, record, 5, b"!") is None
    turn = await load(store)
    assert (turn.state, turn.log, turn.body) == (TurnState.ENDED, b"Hello!", b"")
    assert turn.continuations == ()
    assert turn.record.body_hash == BODY_HASH
    assert store.size == 6
    with pytest.raises(TurnEndedError, match="ended"):
        store.append(record, 6, b"more")
    with pytest.raises(TurnEndedError, match="ended"):
        store.close_turn(record, 6)


async def test_a_turn_id_is_taken_at_once_and_for_its_principal_only(store: TokenStore) -> None:
    record = create(store)
    with pytest.raises(TurnExistsError, match="not generated twice") as caught:
        create(store)
    assert caught.value.record is record
    other = create(store, principal="another")
    store.append(record, 0, b"mine")
    store.append(other, 0, b"theirs")
    assert (await load(store)).log == b"mine"
    assert (await load(store, principal="another")).log == b"theirs"
    assert await store.load("a third", TURN) is None
    assert store.find("a third", TURN) is None


async def test_an_append_must_follow_the_log(store: TokenStore) -> None:
    record = create(store)
    store.append(record, 0, b"Hello")
    for offset in (0, 4, 6):
        with pytest.raises(ValueError, match="does not follow"):
            store.append(record, offset, b"x")
    assert (await load(store)).log == b"Hello"


@pytest.mark.parametrize(
    ("turn_id", "secret_hash", "body_hash"),
    [
        (TURN[:15], SECRET_HASH, BODY_HASH),
        (TURN, b"secret", BODY_HASH),
        (TURN, SECRET_HASH, BODY_HASH + b"x"),
    ],
)
async def test_ids_and_hashes_have_their_lengths(
    store: TokenStore, turn_id: bytes, secret_hash: bytes, body_hash: bytes
) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        store.create("local", turn_id, secret_hash, BODY, body_hash)


async def test_a_turn_has_a_size_limit(path: Path, clock: Clock) -> None:
    store = open_store(path, clock, max_turn_bytes=len(BODY) + 10)
    record = create(store)
    store.append(record, 0, b"12345", continuation=b"123")
    with pytest.raises(TurnTooLargeError, match="shorter answer"):
        store.append(record, 5, b"678")
    with pytest.raises(TurnTooLargeError, match="shorter answer"):
        store.create("local", OTHER, SECRET_HASH, BODY + bytes(11), BODY_HASH)
    assert store.find("local", OTHER) is None
    assert await stored(store.append, record, 5, b"67") is None
    assert (await load(store)).log == b"1234567"
    assert await stored(store.close_turn, record, 7, b"the end") is None
    assert (await load(store)).log == b"1234567the end"
    await store.close()


async def test_the_store_has_a_size_limit_and_ended_turns_make_room(
    path: Path, clock: Clock
) -> None:
    store = open_store(path, clock, max_bytes=2 * len(BODY) + 4)
    first, second = create(store), create(store, OTHER)
    store.append(first, 0, b"1234")
    with pytest.raises(StoreFullError, match="may hold"):
        store.append(second, 0, b"5")
    with pytest.raises(StoreFullError, match="may hold"):
        create(store, bytes(16))
    store.close_turn(first, 4, b"5")  # the end of a turn always has room
    store.append(second, 0, b"5")
    await store.delete("local", OTHER)
    assert store.size == 5
    await store.close()
    store = open_store(path, clock)
    assert store.size == 5
    await store.close()


async def test_ended_turns_take_about_as_much_of_the_disk_as_they_count(
    path: Path, clock: Clock
) -> None:
    store = open_store(path, clock)
    for number in range(20):
        record = create(store, bytes([number]) * 16)
        for token in range(500):
            store.append(record, 7 * token, b"a token", continuation=b"id")
        assert await stored(store.close_turn, record, 3500, b"the end") is None
        found = await load(store, record.turn_id)
        assert found.log == 500 * b"a token" + b"the end"
    size = store.size
    await store.close()
    assert path.stat().st_size < 2 * size  # noqa: ASYNC240 (nothing else runs)


async def test_an_ended_turn_expires_and_leaves_a_tombstone(
    store: TokenStore, clock: Clock
) -> None:
    ended, running = create(store), create(store, OTHER)
    store.append(running, 0, b"still running")
    assert await stored(store.close_turn, ended, 0, b"text") is None
    clock.now += TTL_S - 1
    assert (await load(store)).log == b"text"
    clock.now += 1
    assert await store.load("local", TURN) is None
    with pytest.raises(TurnExistsError, match="tombstone") as caught:
        create(store)
    tombstone = caught.value.record
    assert tombstone.state is TurnState.TOMBSTONE
    assert (tombstone.secret_hash, tombstone.body_hash, tombstone.length) == (b"", b"", 0)
    assert store.size == len(BODY) + len(b"still running")
    clock.now += TOMBSTONE_TTL_S
    assert store.find("local", TURN) is None
    assert store.find("local", OTHER) is running
    record = create(store)
    store.append(record, 0, b"anew")
    assert (await load(store)).log == b"anew"


async def test_time_to_live_and_tombstones_outlast_a_restart(path: Path, clock: Clock) -> None:
    store = open_store(path, clock)
    store.close_turn(create(store), 0, b"text")
    await store.close()
    clock.now += TTL_S
    store = open_store(path, clock)
    found = store.find("local", TURN)
    assert found is not None
    assert found.state is TurnState.TOMBSTONE
    await store.close()
    clock.now += TOMBSTONE_TTL_S - 1
    store = open_store(path, clock)
    assert store.find("local", TURN) is not None
    clock.now += 1
    assert store.find("local", TURN) is None
    await store.close()
    assert not has(path, TURN)


async def test_expiry_takes_the_text_out_of_the_file(path: Path, clock: Clock) -> None:
    store = open_store(path, clock)
    record = create(store)
    store.append(record, 0, b"a secret text", continuation=b"a secret state")
    await load(store)
    store.close_turn(record, 13)
    await store.close()
    assert has(path, b"a secret text")
    assert not has(path, b"messages")
    assert not has(path, b"a secret state")
    clock.now += TTL_S
    store = open_store(path, clock)
    store.expire()
    await store.close()
    assert not has(path, b"a secret text")
    assert has(path, TURN)


@pytest.mark.parametrize("is_ended", [False, True])
async def test_deletion_leaves_a_tombstone(store: TokenStore, path: Path, is_ended: bool) -> None:
    record = create(store)
    store.append(record, 0, b"a secret text")
    if is_ended:
        store.close_turn(record, 13)
    assert await store.delete("local", TURN)
    assert not await store.delete("local", OTHER)
    assert await store.load("local", TURN) is None
    with pytest.raises(TurnEndedError, match="tombstone"):
        store.append(record, 13, b"more")
    with pytest.raises(TurnExistsError):
        create(store)
    assert store.unfinished() == []
    assert store.size == 0
    await store.close()
    assert not has(path, b"a secret text")


async def test_the_files_are_the_owners_only(path: Path, clock: Clock) -> None:
    for turn_id in (TURN, OTHER):
        store = open_store(path, clock)
        assert await stored(store.append, create(store, turn_id), 0, b"text") is None
        assert modes(path.parent) == {"tokens.db": 0o600, "tokens.db-wal": 0o600, ".": 0o700}
        await store.close()
        loosen(path)  # as a copy would be


async def test_closing_stores_all_and_ends_the_thread(path: Path, clock: Clock) -> None:
    before = set(threading.enumerate())
    store = open_store(path, clock)
    (thread,) = set(threading.enumerate()) - before
    record = create(store)
    outcomes: list[StoreError | None] = []
    for offset in range(100):
        store.append(record, offset, b"x", on_stored=outcomes.append)
    await store.close()
    await store.close()
    await asyncio.sleep(0)
    assert outcomes == [None] * 100
    assert not thread.is_alive()
    with pytest.raises(StoreClosedError, match="shutting down"):
        store.append(record, 100, b"x")
    with pytest.raises(StoreClosedError, match="shutting down"):
        create(store, OTHER)
    with pytest.raises(StoreClosedError, match="shutting down"):
        await store.load("local", TURN)
    with pytest.raises(StoreClosedError, match="shutting down"):
        await store.delete("local", TURN)
    store = open_store(path, clock)
    assert (await load(store)).log == b"x" * 100
    await store.close()


def test_a_loop_that_closed_takes_nothing_with_it(path: Path, clock: Clock) -> None:
    heard: list[StoreError | None] = []

    async def leave(store: TokenStore) -> None:
        record = create(store)
        for offset in range(100):
            store.append(record, offset, b"x", on_stored=heard.append)
        reading = asyncio.ensure_future(store.load("local", TURN))
        await asyncio.sleep(0)
        reading.cancel()

    async def finish(store: TokenStore) -> bytes:
        log = (await load(store)).log
        await store.close()
        return log

    store = open_store(path, clock)
    asyncio.run(leave(store))
    heard_then = len(heard)
    assert asyncio.run(finish(store)) == b"x" * 100
    assert len(heard) == heard_then


async def test_who_waits_may_be_cancelled(store: TokenStore) -> None:
    faults: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    create(store)
    reading = asyncio.ensure_future(store.load("local", TURN))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await load(store)
    assert faults == []


def test_everything_exported_is_there() -> None:
    assert all(hasattr(store_module, name) for name in store_module.__all__)
