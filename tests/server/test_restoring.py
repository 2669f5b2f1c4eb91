"""Long logs are decoded beside the event loop; what can become of their turns meanwhile."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_readers import DEADLINE_S, Notes, Script, names
from redis_server import RedisServer, command, running
from tools import needs_tool

from eloquent.core.events import TextDelta
from eloquent.core.log import TokenLog
from eloquent_server import restoring
from eloquent_server.store import TokenStore
from eloquent_server.store_redis import RedisTokenStore
from eloquent_server.store_redis_scripts import Keys
from eloquent_server.turns import Turn, TurnHub

SHORT_S = 0.5


@pytest.fixture(autouse=True)
def short_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restoring, "LONG_BYTES", 1)


class Decoding:
    """Does something before a log is decoded, in the thread that decodes it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: list[threading.Thread] = []
        self.first: Callable[[], None] | None = None
        decode = TokenLog.restored

        def restored(data: bytes, **options: Any) -> Any:
            self.threads.append(threading.current_thread())
            first, self.first = self.first, None
            if first is not None:
                first()
            return decode(data, **options)

        monkeypatch.setattr(TokenLog, "restored", restored)


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> Decoding:
    return Decoding(monkeypatch)


async def one_two(turn: Turn) -> None:
    """Say "one", or what is missing."""
    if turn.stored is None:
        turn.append(TextDelta("one "))
        await asyncio.Event().wait()
    turn.append(TextDelta("two"))
    turn.close("stop", model="m", prompt_tokens=1, completion_tokens=2)


async def test_the_loop_goes_on_while_a_long_log_is_decoded(
    tmp_path: Path, decoding: Decoding
) -> None:
    script = Script("to ", "be")
    hub = TurnHub(script, TokenStore.open(tmp_path / "t"))
    turn_id, secret = names()
    first, again = Notes(turn_id, secret), Notes(turn_id, secret, body=b"")
    hub.on_request(first)
    script.go()
    await first.finished()
    hub.on_gone(first)
    has_run = threading.Event()
    decoding.first = lambda: has_run.wait(DEADLINE_S) or None
    hub.on_request(again)
    while not decoding.threads:  # noqa: ASYNC110 (in another thread)
        await asyncio.sleep(0)
    has_run.set()
    await again.finished()
    assert again.events == first.events
    assert threading.current_thread() not in decoding.threads
    await hub.close()


class Pair:
    """Two gateways on one Redis."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self.hubs: list[TurnHub] = []
        self.stores: list[RedisTokenStore] = []

    async def open(self, lease_s: float = 3600.0) -> TurnHub:
        store = await RedisTokenStore.open(self.server.url, lease_s=lease_s)
        hub = TurnHub(one_two, store, go_on=one_two)
        self.stores.append(store)
        self.hubs.append(hub)
        return hub


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
async def pair(server: RedisServer) -> AsyncIterator[Pair]:
    pair = Pair(server)
    yield pair
    for hub in pair.hubs:
        await hub.close(is_restart=True)


@needs_tool("redis-server")
@pytest.mark.parametrize("follows", [False, True])
async def test_a_lease_that_is_lost_while_a_log_is_decoded_is_asked_for_again(
    pair: Pair, decoding: Decoding, follows: bool
) -> None:
    one, other = await pair.open(), await pair.open(SHORT_S)
    turn_id, secret = names()
    lease = Keys("local", turn_id).lease
    near, far = Notes(turn_id, secret), Notes(turn_id, secret, body=b"")
    one.on_request(near)
    await near.until(lambda: near.text == "one ")
    lost = threading.Event()

    def lose() -> None:
        command(pair.server, "DEL", lease)  # then it cannot be renewed
        asyncio.run_coroutine_threadsafe(until_lost(), loop).result(DEADLINE_S)
        lost.set()

    async def until_lost() -> None:
        async with asyncio.timeout(DEADLINE_S):
            while pair.stores[1].turns:  # noqa: ASYNC110 (its own clock decides)
                await asyncio.sleep(0.01)

    loop = asyncio.get_running_loop()
    if follows:
        other.on_request(far)
        await far.until(lambda: far.text == "one ")
    decoding.first = lose
    await one.close(is_restart=True)
    if not follows:
        other.on_request(far)
    await far.finished()
    assert far.text == "one two"
    assert lost.is_set()


@needs_tool("redis-server")
async def test_a_turn_that_nobody_wants_any_more_when_it_is_decoded_is_nobody_s(
    pair: Pair, decoding: Decoding
) -> None:
    one, other = await pair.open(), await pair.open()
    turn_id, secret = names()
    near, far = Notes(turn_id, secret), Notes(turn_id, secret, body=b"")
    one.on_request(near)
    await near.until(lambda: near.text == "one ")
    other.on_request(far)
    await far.until(lambda: far.text == "one ")
    is_decoding, is_over = threading.Event(), threading.Event()

    def decode_slowly() -> None:
        is_decoding.set()
        is_over.wait(DEADLINE_S)

    decoding.first = decode_slowly
    await one.close(is_restart=True)
    await asyncio.to_thread(is_decoding.wait, DEADLINE_S)
    assert pair.stores[1].turns == 1
    other.on_gone(far)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert pair.stores[1].turns == 0
    is_over.set()
