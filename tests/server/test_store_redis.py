"""The token store in a real Redis: several gateways, one owner of each turn."""

import asyncio
import hashlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import pytest
from redis_server import RedisServer, command, running
from tools import needs_tool

from eloquent_server import store_redis
from eloquent_server.store_redis import RedisTokenStore
from eloquent_server.store_redis_scripts import READ, Keys, Script
from eloquent_server.store_types import (
    StaleOwnerError,
    StoreAwayError,
    StoreClosedError,
    StoredTurn,
    StoreError,
    StoreFullError,
    TurnEndedError,
    TurnExistsError,
    TurnRecord,
    TurnState,
    TurnTooLargeError,
)

pytestmark = needs_tool("redis-server")

TURN = bytes(range(16))
OTHER = bytes(range(1, 17))
KEYS = Keys("local", TURN)
BODY = b'{"messages": []}'
SECRET_HASH = hashlib.sha256(b"secret").digest()
BODY_HASH = hashlib.sha256(BODY).digest()
LONG_S = 3600.0
"A lease that does not end in a test."
SHORT_S = 0.5
LIVELY_S = 2.0
DEADLINE_S = 20.0
"Ends a hang; decides nothing."

Open = Callable[..., Awaitable[RedisTokenStore]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
async def gateway(server: RedisServer) -> AsyncIterator[Open]:
    """Opens one gateway's store after another on the same, empty Redis."""
    command(server, "FLUSHALL")
    async with AsyncExitStack() as stack:

        async def open_store(**options: Any) -> RedisTokenStore:
            store = await RedisTokenStore.open(server.url, **{"lease_s": LONG_S, **options})
            stack.push_async_callback(store.close)
            return store

        yield open_store


def begin(store: RedisTokenStore, turn_id: bytes = TURN) -> Awaitable[TurnRecord]:
    return store.begin("local", turn_id, SECRET_HASH, BODY, BODY_HASH)


async def stored(call: Callable[..., None], *arguments: Any, **named: Any) -> StoreError | None:
    """Call `append` or `close_turn`, and wait for what `on_stored` says."""
    outcome: asyncio.Future[StoreError | None] = asyncio.get_running_loop().create_future()
    call(*arguments, **named, on_stored=outcome.set_result)
    return await asyncio.wait_for(outcome, DEADLINE_S)


async def claim(store: RedisTokenStore, turn_id: bytes = TURN) -> StoredTurn:
    turn = await asyncio.wait_for(store.claim("local", turn_id), DEADLINE_S)
    assert turn is not None
    return turn


def ttl_s(server: RedisServer, key: bytes) -> float:
    return int(command(server, "PTTL", key)) / 1000


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 (another process's doing)
            await asyncio.sleep(0.01)


async def test_a_turn_is_read_at_another_gateway_as_it_was_written(gateway: Open) -> None:
    one, other = await gateway(), await gateway()
    record = await begin(one)
    one.append(record, 0, b"Hel", continuation=b"ids 1 2")
    one.append(record, 3, b"", continuation=b"")
    assert await stored(one.append, record, 3, b"lo") is None
    turn = await claim(other)
    assert (turn.log, turn.body, turn.state) == (b"Hello", BODY, TurnState.OPEN)
    assert turn.continuations == (b"ids 1 2", b"")
    assert turn.is_elsewhere
    assert (turn.record.secret_hash, turn.record.body_hash) == (SECRET_HASH, BODY_HASH)
    assert (turn.record.chunks, turn.record.size) == (3, record.size)


async def test_an_ended_turn_keeps_its_log_and_loses_its_request(
    gateway: Open, server: RedisServer
) -> None:
    one, other = await gateway(), await gateway()
    record = await begin(one)
    one.append(record, 0, b"Hello", continuation=b"state")
    assert await stored(one.close_turn, record, 5, b"!") is None
    turn = await claim(other)
    assert (turn.state, turn.log, turn.body) == (TurnState.ENDED, b"Hello!", b"")
    assert (turn.continuations, turn.is_elsewhere, turn.record.size) == ((), False, 6)
    assert command(server, "EXISTS", KEYS.continuations, KEYS.lease) == b"0"
    with pytest.raises(TurnEndedError, match="ended"):
        one.append(record, 6, b"more")
    assert one.turns == other.turns == 0


async def test_of_two_gateways_that_begin_a_turn_at_once_one_does(gateway: Open) -> None:
    stores = [await gateway() for _ in range(4)]
    outcomes = await asyncio.gather(*map(begin, stores), return_exceptions=True)
    assert sum(isinstance(outcome, TurnRecord) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, TurnExistsError) for outcome in outcomes) == 3
    turns = [await claim(store) for store in stores]
    assert [turn.is_elsewhere for turn in turns].count(False) == 1


async def test_what_a_stale_owner_appends_is_refused_and_it_hears_so_once(
    gateway: Open, server: RedisServer
) -> None:
    old, new = await gateway(), await gateway()
    lost: list[TurnRecord] = []
    old.attend(lost.append, lost.append)
    record = await begin(old)
    assert await stored(old.append, record, 0, b"before ") is None
    command(server, "DEL", KEYS.lease)  # as if its time were over
    taken = await claim(new)
    assert not taken.is_elsewhere
    assert taken.record.fence > record.fence
    assert isinstance(await stored(old.append, record, 7, b"stale"), StaleOwnerError)
    with pytest.raises(StaleOwnerError):
        old.append(record, 12, b"stale")
    with pytest.raises(StaleOwnerError):
        old.close_turn(record, 12, b"stale")
    assert lost == [record]
    assert await stored(new.close_turn, taken.record, 7, b"after") is None
    assert (await claim(old)).log == b"before after"


async def test_an_end_on_its_way_from_a_stale_owner_is_refused(
    gateway: Open, server: RedisServer
) -> None:
    old, new = await gateway(), await gateway()
    record = await begin(old)
    command(server, "DEL", KEYS.lease)
    taken = await claim(new)
    assert isinstance(await stored(old.close_turn, record, 0, b"stale"), StaleOwnerError)
    assert await stored(new.append, taken.record, 0, b"good") is None
    turn = await claim(new)
    assert (turn.log, turn.state) == (b"good", TurnState.OPEN)


async def test_an_owner_may_claim_its_own_turn_and_its_earlier_self_is_stale(
    gateway: Open,
) -> None:
    store = await gateway()
    record = await begin(store)
    assert await stored(store.append, record, 0, b"one ") is None
    again = await claim(store)
    assert not again.is_elsewhere
    with pytest.raises(StaleOwnerError):
        store.append(record, 4, b"stale")
    assert await stored(store.append, again.record, 4, b"two") is None
    assert (await claim(store)).log == b"one two"


async def test_a_lease_is_renewed_for_as_long_as_its_owner_runs(
    gateway: Open, server: RedisServer
) -> None:
    one, other = await gateway(lease_s=LIVELY_S), await gateway(lease_s=LIVELY_S)
    lost: list[TurnRecord] = []
    one.attend(lost.append, lost.append)
    records = [await begin(one, number.to_bytes(16)) for number in range(300)]
    await asyncio.sleep(2 * LIVELY_S)
    assert lost == []
    turns = [await claim(other, record.turn_id) for record in records[::50]]
    assert all(turn.is_elsewhere for turn in turns)


async def test_a_lease_that_cannot_be_renewed_is_lost_by_the_owner_s_own_clock(
    gateway: Open, server: RedisServer
) -> None:
    store = await gateway(lease_s=SHORT_S)
    lost: list[TurnRecord] = []
    store.attend(lost.append, lost.append)
    record = await begin(store)
    assert await stored(store.append, record, 0, b"before ") is None
    server.send(signal.SIGSTOP)
    try:
        outcome = asyncio.ensure_future(stored(store.append, record, 7, b"unsure"))
        await until(lambda: lost == [record])
    finally:
        server.send(signal.SIGCONT)
    assert isinstance(await outcome, StaleOwnerError)
    again = await claim(store)
    assert not again.is_elsewhere
    assert again.log in (b"before ", b"before unsure")  # it was on its way


async def test_writes_wait_for_a_redis_that_is_started_again(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    store = await RedisTokenStore.open(server.url, lease_s=LONG_S)
    try:
        record = await begin(store)
        assert await stored(store.append, record, 0, b"before ") is None
        server.stop(signal.SIGKILL)
        outcome = asyncio.ensure_future(stored(store.append, record, 7, b"meanwhile "))
        with pytest.raises(StoreAwayError, match="cannot be reached"):
            await store.claim("local", OTHER)
        assert not outcome.done()
        await until(lambda: store.meters.failures > 0)
        server.start()
        assert await outcome is None
        failures = store.meters.failures
        assert await stored(store.close_turn, record, 17, b"after") is None
        assert (await claim(store)).log == b"before meanwhile after"
        assert store.meters.failures == failures
    finally:
        await store.close()
        server.stop()


async def test_a_write_whose_answer_was_lost_is_sent_again_and_stored_once(
    gateway: Open, server: RedisServer
) -> None:
    lose = asyncio.Event()

    async def copy(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            if lose.is_set() and b"stored" in data:
                lose.clear()
                break
            to.write(data)
        to.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(copy(reader, behind[1]), copy(behind[0], writer))

    async with await asyncio.start_server(forward, "127.0.0.1", 0) as forwarder:
        port = forwarder.sockets[0].getsockname()[1]
        store = await RedisTokenStore.open(f"redis://127.0.0.1:{port}/0", lease_s=LONG_S)
        record = await begin(store)
        assert await stored(store.append, record, 0, b"one ") is None
        lose.set()
        store.append(record, 4, b"two ", continuation=b"state")
        assert await stored(store.append, record, 8, b"three ") is None
        assert not lose.is_set()
        lose.set()
        assert await stored(store.close_turn, record, 14, b"four") is None
        assert not lose.is_set()
        await store.close()
    turn = await claim(await gateway())
    assert (turn.log, turn.state) == (b"one two three four", TurnState.ENDED)
    assert int(command(server, "XLEN", KEYS.log)) == 4


async def test_a_turn_of_a_redis_that_has_lost_it_is_not_gone_on_with(
    gateway: Open, server: RedisServer
) -> None:
    store = await gateway()
    record, other = await begin(store), await begin(store, OTHER)
    assert await stored(store.append, record, 0, b"lost") is None
    assert await stored(store.append, other, 0, b"lost") is None
    command(server, "DEL", KEYS.turn)
    command(server, "HSET", Keys("local", OTHER).turn, "chunks", "0", "length", "0")
    assert isinstance(await stored(store.append, record, 4, b"x"), StaleOwnerError)
    error = await stored(store.append, other, 4, b"x")
    assert not isinstance(error, StaleOwnerError)
    assert "appendfsync" in str(error)


async def test_more_than_a_batch_is_stored_in_order_in_few_round_trips(gateway: Open) -> None:
    store = await gateway()
    record = await begin(store)
    outcomes: list[StoreError | None] = []
    for number in range(1000):
        store.append(record, 4 * number, b"%04d" % number, on_stored=outcomes.append)
    assert outcomes == []
    assert (await claim(store)).log == b"".join(b"%04d" % number for number in range(1000))
    assert outcomes == [None] * 1000
    assert sum(store.meters.flush.counts) <= 6


async def test_many_turns_at_once_leave_a_connection_for_what_is_written(
    gateway: Open, server: RedisServer
) -> None:
    store = await gateway()
    first = await begin(store)
    ids = [number.to_bytes(16) for number in range(1, 301)]
    beginning = [asyncio.ensure_future(begin(store, turn_id)) for turn_id in ids]
    assert await stored(store.append, first, 0, b"x") is None
    assert not all(each.done() for each in beginning)
    assert len(await asyncio.gather(*beginning)) == 300
    turns = await asyncio.gather(*(claim(store, turn_id) for turn_id in ids))
    assert not any(turn.is_elsewhere for turn in turns)
    connections = command(server, "CLIENT", "LIST").splitlines()
    assert len(connections) <= 17  # redis-cli's own, too


async def test_everything_expires(gateway: Open, server: RedisServer) -> None:
    store = await gateway(ttl_s=100.0, tombstone_ttl_s=1000.0)
    record, other = await begin(store), await begin(store, OTHER)
    assert await stored(store.append, record, 0, b"x", continuation=b"y") is None
    names = command(server, "KEYS", "eloquent:*").split()
    lasting = {name for name in names if ttl_s(server, name) < 0}
    assert lasting == {b"eloquent:fence", b"eloquent:open"}
    assert ttl_s(server, KEYS.grave) > 1000
    assert await stored(store.close_turn, record, 1, b"!") is None
    store.close_turn(other, 0, b"!")
    await claim(store)
    assert 90 < ttl_s(server, KEYS.log) <= 100
    assert 90 < ttl_s(server, KEYS.turn) <= 100
    command(server, "DEL", KEYS.turn, KEYS.log)  # as Redis does when their time is over
    assert await store.claim("local", TURN) is None
    with pytest.raises(TurnExistsError):
        await begin(store)


async def test_deletion_leaves_a_tombstone_wherever_it_is_asked(
    gateway: Open, server: RedisServer
) -> None:
    one, other = await gateway(), await gateway()
    record = await begin(one)
    assert await stored(one.append, record, 0, b"a secret text", continuation=b"state") is None
    assert await other.delete("local", TURN)
    assert not await other.delete("local", OTHER)
    assert isinstance(await stored(one.append, record, 13, b"more"), StaleOwnerError)
    assert await one.claim("local", TURN) is None
    with pytest.raises(TurnExistsError):
        await begin(one)
    assert set(command(server, "KEYS", "eloquent:*").split()) == {KEYS.grave, b"eloquent:fence"}


async def test_a_turn_that_was_declined_leaves_its_id_free(
    gateway: Open, server: RedisServer
) -> None:
    store = await gateway()
    store.let_go(await begin(store))
    assert await store.claim("local", TURN) is None
    assert command(server, "KEYS", "eloquent:*:*") == b""
    await begin(store)


async def test_a_turn_that_is_let_go_is_anybody_s_who_asks_for_it(gateway: Open) -> None:
    one, other = await gateway(), await gateway()
    record = await begin(one)
    assert await stored(one.append, record, 0, b"so far") is None
    one.let_go(record)
    await one.close()
    async with aclosing(other.abandoned()) as turns:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(turns), 0.2)
    turn = await claim(other)
    assert (turn.log, turn.is_elsewhere) == (b"so far", False)


async def test_turns_of_a_gateway_that_is_gone_are_found(
    gateway: Open, server: RedisServer
) -> None:
    one, other = await gateway(), await gateway()
    await begin(one)
    ended = await begin(one, OTHER)
    assert await stored(one.close_turn, ended, 0, b"!") is None
    async with aclosing(other.abandoned()) as turns:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(turns), 0.2)
    await one.close()
    async with aclosing(other.abandoned()) as turns:
        assert await asyncio.wait_for(anext(turns), DEADLINE_S) == ("local", TURN)
    assert not (await claim(other)).is_elsewhere


async def test_all_pages_of_open_turns_are_looked_at(
    gateway: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_redis, "SCAN_TURNS", 3)
    one, other = await gateway(), await gateway()
    free = [await begin(one, number.to_bytes(16)) for number in range(4)]
    held = [await begin(other, number.to_bytes(16)) for number in range(4, 8)]
    await one.close()
    found = set()
    async with aclosing(other.abandoned()) as turns:
        for _ in free:
            found.add(await asyncio.wait_for(anext(turns), DEADLINE_S))
    assert found == {record.key for record in free}
    assert len(held) == other.turns


async def test_a_turn_is_followed_until_its_owner_is_gone(gateway: Open) -> None:
    one, other = await gateway(), await gateway()
    record = await begin(one)
    assert await stored(one.append, record, 0, b"before ") is None
    turn = await claim(other)
    pieces: list[bytes] = []

    async def follow() -> None:
        async with aclosing(other.follow(turn.record)) as news:
            async for data in news:
                pieces.append(data)  # noqa: PERF401 (looked at meanwhile)

    following = asyncio.ensure_future(follow())
    for number in range(500):
        one.append(record, 7 + 4 * number, b"%04d" % number)
    await until(lambda: sum(map(len, pieces)) == 2000)
    assert b"".join(pieces) == b"".join(b"%04d" % number for number in range(500))
    await until(lambda: one.turns == 1)
    async with asyncio.timeout(DEADLINE_S):
        while not await one.is_read_elsewhere(record):  # noqa: ASYNC110 (as above)
            await asyncio.sleep(0.05)
    assert not following.done()
    await one.close()
    await asyncio.wait_for(following, DEADLINE_S)


async def test_a_cancel_reaches_the_owner(gateway: Open) -> None:
    one, other = await gateway(), await gateway()
    cancelled: list[TurnRecord] = []
    one.attend(cancelled.clear, cancelled.append)  # type: ignore[arg-type]
    record = await begin(one)
    await begin(one, OTHER)
    await other.cancel_elsewhere((await claim(other)).record)
    await until(lambda: cancelled == [record])


@pytest.mark.parametrize("count", [1, 4, 5, 11])
async def test_a_long_turn_is_read_in_parts(
    gateway: Open, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(store_redis, "READ_ENTRIES", 5)
    store = await gateway()
    record = await begin(store)
    words = [b"word %d " % number for number in range(count)]
    for word in words:
        store.append(record, record.length, word, continuation=word)
    found = await claim(store)
    assert (found.log, found.continuations) == (b"".join(words), tuple(words))
    assert await stored(store.close_turn, found.record, found.record.length, b"end") is None
    found = await claim(store)
    assert (found.log, found.continuations) == (b"".join(words) + b"end", ())


async def test_a_turn_that_is_deleted_while_it_is_read_is_not_there(
    gateway: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = await gateway(), await gateway()
    record = await begin(one)
    assert await stored(one.append, record, 0, b"text") is None
    run = other._link.run

    async def delete_first(script: Script, *arguments: Any) -> Any:
        if script is READ:
            assert await one.delete("local", TURN)
        return await run(script, *arguments)

    monkeypatch.setattr(other._link, "run", delete_first)
    assert await other.load("local", TURN) is None


async def test_a_turn_has_a_size_limit(gateway: Open) -> None:
    store = await gateway(max_turn_bytes=len(BODY) + 10)
    record = await begin(store)
    store.append(record, 0, b"12345", continuation=b"123")
    with pytest.raises(TurnTooLargeError, match="shorter answer"):
        store.append(record, 5, b"678")
    with pytest.raises(TurnTooLargeError, match="shorter answer"):
        await store.begin("local", OTHER, SECRET_HASH, BODY + bytes(11), BODY_HASH)
    assert await stored(store.append, record, 5, b"67") is None
    assert await stored(store.close_turn, record, 7, b"the end") is None
    assert (await claim(store)).log == b"1234567the end"


async def test_a_full_redis_takes_nothing_and_says_so(gateway: Open, server: RedisServer) -> None:
    store = await gateway()
    record = await begin(store)
    command(server, "CONFIG", "SET", "maxmemory", "1")
    try:
        assert isinstance(await stored(store.append, record, 0, b"x"), StoreFullError)
        assert store.meters.failures == 1
        with pytest.raises(StoreFullError, match="maxmemory"):
            await begin(store, OTHER)
        with pytest.raises(StoreFullError, match="maxmemory"):
            await store.check()
    finally:
        command(server, "CONFIG", "SET", "maxmemory", "0")
    await store.check()
    assert (await claim(store)).log == b""


@pytest.mark.parametrize("offset", [1, 100])
async def test_an_append_must_follow_the_log(gateway: Open, offset: int) -> None:
    store = await gateway()
    record = await begin(store)
    with pytest.raises(ValueError, match="does not follow"):
        store.append(record, offset, b"x")


async def test_a_closed_store_takes_nothing(gateway: Open) -> None:
    store = await gateway()
    record = await begin(store)
    await store.close()
    await store.close()
    with pytest.raises(StoreClosedError, match="shutting down"):
        store.append(record, 0, b"x")
    with pytest.raises(StoreClosedError, match="shutting down"):
        await store.claim("local", TURN)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_store_closes_without_its_redis_too(tmp_path: Path, number: signal.Signals) -> None:
    server = RedisServer(tmp_path)
    server.start()
    store = await RedisTokenStore.open(server.url)
    try:
        record = await begin(store)
        assert await stored(store.append, record, 0, b"x") is None
        if number is signal.SIGKILL:
            server.stop(number)
        else:
            server.send(number)
        store.append(record, 1, b"never stored")
        await asyncio.wait_for(store.close(), DEADLINE_S)
    finally:
        server.stop()


async def test_principals_have_turns_of_their_own(gateway: Open) -> None:
    store = await gateway()
    await begin(store)
    assert await store.claim("another", TURN) is None
    record = await store.begin("another: one", TURN, SECRET_HASH, BODY, BODY_HASH)
    assert await stored(store.append, record, 0, b"theirs") is None
    assert (await claim(store)).log == b""


async def test_a_password_is_asked_for_taken_from_the_environment_and_never_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = RedisServer(tmp_path, "--requirepass", "sesame")
    server.start()
    try:
        with pytest.raises(StoreError, match="ELOQUENT_REDIS_PASSWORD"):
            await RedisTokenStore.open(server.url)
        wrong = server.url.replace("//", "//:a-wrong-one@")
        with pytest.raises(StoreError, match="does not let this server in") as caught:
            await RedisTokenStore.open(wrong)
        assert "a-wrong-one" not in str(caught.value)
        monkeypatch.setenv("ELOQUENT_REDIS_PASSWORD", "sesame")
        store = await RedisTokenStore.open(server.url)
        await store.close()
    finally:
        server.stop()


async def test_a_unix_socket_and_another_database_serve_as_well(tmp_path: Path) -> None:
    socket = tmp_path / "socket"
    server = RedisServer(tmp_path, "--unixsocket", str(socket))
    server.start()
    try:
        store = await RedisTokenStore.open(f"unix://{socket}?db=3")
        record = await begin(store)
        assert await stored(store.append, record, 0, b"x") is None
        await store.close()
        assert command(server, "-n", "3", "EXISTS", KEYS.log) == b"1"
        assert command(server, "EXISTS", KEYS.log) == b"0"
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgres://127.0.0.1", "not known"),
        ("redis://127.0.0.1:1/0", "cannot be reached"),
        ("redis://127.0.0.1:1/zero", "no URL"),
        ("redis://127.0.0.1:port/0", "no URL"),
        ("redis://[::1/0", "no URL"),
    ],
)
async def test_a_url_that_leads_nowhere_is_one_sentence(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        await RedisTokenStore.open(url)
