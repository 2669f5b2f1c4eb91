"""Hubs of several gateways on one Redis: who generates, who follows, and what readers see."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from hub_readers import DEADLINE_S, Notes, Script, names
from redis_server import RedisServer, command, running
from tools import needs_tool

from eloquent.core.events import End, TextDelta
from eloquent.core.wire import Request
from eloquent_server import following
from eloquent_server.store_redis import RedisTokenStore
from eloquent_server.store_redis_scripts import Keys
from eloquent_server.turns import Turn, TurnHub

pytestmark = needs_tool("redis-server")

LONG_S = 3600.0
SHORT_S = 0.5
OVER = ("stop", 3)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running(tmp_path_factory.mktemp("redis")) as server:
        yield server


class Going:
    """A handler that goes on: it says the words that are missing."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.asked = 0

    async def __call__(self, turn: Turn) -> None:
        self.asked += 1
        assert turn.stored is not None
        said = sum(isinstance(event, TextDelta) for event in turn.stored.events)
        for word in self.words[said:]:
            turn.append(TextDelta(word))
            await asyncio.sleep(0)
        turn.close("stop", model="m", prompt_tokens=1, completion_tokens=len(self.words))


async def say_one_word(turn: Turn) -> None:
    """A handler that goes no further."""
    turn.append(TextDelta("one "))
    await asyncio.Event().wait()


class Gateways:
    """Hubs, each with a store of its own on the same Redis."""

    def __init__(self, server: RedisServer, stack: AsyncExitStack) -> None:
        self._server = server
        self._stack = stack

    async def open(
        self, handler: Any, *, go_on: Any = None, lease_s: float = LONG_S, grace_s: float = 60.0
    ) -> TurnHub:
        store = await RedisTokenStore.open(self._server.url, lease_s=lease_s)
        hub = TurnHub(handler, store, go_on=go_on, grace_s=grace_s)
        self._stack.push_async_callback(hub.close, is_restart=True)
        return hub


@pytest.fixture
async def gateways(server: RedisServer) -> AsyncIterator[Gateways]:
    command(server, "FLUSHALL")
    async with AsyncExitStack() as stack:
        yield Gateways(server, stack)


def finish(reader: Notes) -> tuple[str, int]:
    end = reader.events[-1]
    assert isinstance(end, End)
    return end.finish_reason, end.completion_tokens


async def test_a_reader_at_another_gateway_sees_each_word_as_it_is_said(
    gateways: Gateways,
) -> None:
    script = Script("one ", "two ", "three")
    one, other = await gateways.open(script), await gateways.open(script)
    turn_id, secret = names()
    near, far = Notes(turn_id, secret), Notes(turn_id, secret, body=b"")
    one.on_request(near)
    script.go(1)
    await near.until(lambda: near.text == "one ")
    other.on_request(far)
    await far.until(lambda: far.text == "one ")
    script.go(1)
    await far.until(lambda: far.text == "one two ")
    assert (one.generating, other.generating) == (1, 0)
    script.go()
    await asyncio.gather(near.finished(), far.finished())
    assert near.text == far.text == "one two three"
    assert finish(near) == finish(far) == OVER
    assert script.asked == 1
    other.on_gone(far)
    assert other.open == 0


async def test_a_turn_that_nobody_reads_at_the_following_gateway_leaves_its_memory(
    gateways: Gateways,
) -> None:
    script = Script("word")
    one, other = await gateways.open(script), await gateways.open(script)
    turn_id, secret = names()
    near, far = Notes(turn_id, secret), Notes(turn_id, secret, body=b"", is_owner=False)
    one.on_request(near)
    script.go(1)
    await near.until(lambda: near.text == "word")
    other.on_request(far)
    await far.until(lambda: far.text == "word")
    other.on_gone(far)
    assert (one.open, other.open, other.readers) == (1, 0, 0)
    script.go()
    await near.finished()
    assert finish(near)[0] == "stop"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"secret": bytes(16)}, "unknown_turn"),
        ({"body": b'{"messages": [1]}'}, "turn_conflict"),
        ({"offset": 1000}, "bad_offset"),
    ],
)
async def test_who_may_not_read_is_told_why_at_any_gateway(
    gateways: Gateways, change: dict[str, Any], code: str
) -> None:
    script = Script("word")
    one, other = await gateways.open(script), await gateways.open(script)
    turn_id, secret = names()
    owner = Notes(turn_id, secret)
    one.on_request(owner)
    script.go(1)
    await owner.until(lambda: owner.text == "word")
    stranger = Notes(**{"turn_id": turn_id, "secret": secret, "body": b"", **change})
    other.on_request(stranger)
    await stranger.finished()
    assert stranger.rejected is not None
    assert stranger.rejected[0] == code
    assert script.asked == 1


async def test_a_reader_that_is_ahead_of_what_has_come_to_its_gateway_waits_for_that(
    gateways: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script("one ", "two ", "three")
    one, other = await gateways.open(script), await gateways.open(script)
    turn_id, secret = names()
    near, far = Notes(turn_id, secret), Notes(turn_id, secret, body=b"", is_owner=False)
    one.on_request(near)
    script.go(1)
    await near.until(lambda: near.text == "one ")
    other.on_request(far)
    await far.until(lambda: far.text == "one ")
    script.go(1)
    ahead = Notes(turn_id, secret, body=b"", offset=2 * near.offset)  # words of the same length
    leaving = Notes(turn_id, secret, body=b"", offset=2 * near.offset)
    other.on_request(ahead)
    other.on_request(leaving)
    other.on_gone(leaving)
    script.go()
    await ahead.finished()
    assert (ahead.text, ahead.rejected) == ("three", None)
    assert leaving.events == []


async def test_what_an_owner_loses_the_lease_of_goes_on_elsewhere_and_its_readers_stay(
    gateways: Gateways, server: RedisServer
) -> None:
    words = ("one ", "two ", "three")
    script, going = Script(*words), Going(*words)
    one, other = await gateways.open(script), await gateways.open(script, go_on=going)
    turn_id, secret = names()
    near, far = Notes(turn_id, secret), Notes(turn_id, secret, body=b"")
    one.on_request(near)
    script.go(1)
    await near.until(lambda: near.text == "one ")
    command(server, "DEL", Keys("local", turn_id).lease)  # as if its time were over
    other.on_request(far)
    await far.finished()
    script.go()  # the stale owner says a word, and hears that it is refused
    await near.finished()
    assert near.text == far.text == "one two three"
    assert finish(near) == finish(far) == OVER
    assert (script.asked, going.asked) == (1, 1)
    await asyncio.wait_for(script.ended.wait(), DEADLINE_S)


async def test_a_turn_goes_on_after_a_redis_that_was_away_for_longer_than_the_lease(
    gateways: Gateways, server: RedisServer
) -> None:
    words = ("one ", "two ", "three")
    script, going = Script(*words), Going(*words)
    hub = await gateways.open(script, go_on=going, lease_s=SHORT_S)
    turn_id, secret = names()
    reader = Notes(turn_id, secret)
    hub.on_request(reader)
    script.go(1)
    await reader.until(lambda: reader.text == "one ")
    server.send(signal.SIGSTOP)
    try:
        script.go(1)
        await asyncio.wait_for(script.ended.wait(), DEADLINE_S)  # stopped: its lease is over
        assert hub.generating == 0
        assert reader.text == "one "
    finally:
        server.send(signal.SIGCONT)
    await reader.finished()
    assert reader.text == "one two three"
    assert finish(reader) == OVER
    assert going.asked == 1


async def test_a_turn_that_nobody_reads_goes_on_after_its_lease_was_lost(
    gateways: Gateways, server: RedisServer
) -> None:
    words = ("one ", "two ", "three")
    script, going = Script(*words), Going(*words)
    hub = await gateways.open(script, go_on=going, lease_s=SHORT_S)
    turn_id, secret = names()
    reader = Notes(turn_id, secret)
    hub.on_request(reader)
    script.go(1)
    await reader.until(lambda: reader.text == "one ")
    hub.on_gone(reader)
    command(server, "DEL", Keys("local", turn_id).lease)
    async with asyncio.timeout(DEADLINE_S):
        while hub.open:  # noqa: ASYNC110 (nobody reads it)
            await asyncio.sleep(0.01)
    assert going.asked == 1
    late = Notes(turn_id, secret, body=b"")
    hub.on_request(late)
    await late.finished()
    assert late.text == "one two three"
    assert finish(late) == OVER


async def test_a_redis_that_stays_away_ends_the_waiting(
    gateways: Gateways, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "AWAY_S", 0.1)
    script = Script("one ", "two")
    hub = await gateways.open(script, go_on=script, lease_s=SHORT_S)
    reader, late = Notes(*names()), Notes(*names())
    hub.on_request(reader)
    script.go(1)
    await reader.until(lambda: reader.text == "one ")
    server.send(signal.SIGSTOP)
    try:
        hub.on_request(late)
        await asyncio.gather(reader.finished(), late.finished())
    finally:
        server.send(signal.SIGCONT)
    assert reader.rejected is not None
    assert late.rejected is not None
    assert (reader.rejected[0], late.rejected[0]) == ("not_stored", "overloaded")
    assert "does not reach its token store" in reader.rejected[1]  # it may well have all
    assert hub.open == 0


async def test_a_turn_that_redis_has_lost_a_part_of_ends_and_is_nobody_s(
    gateways: Gateways, server: RedisServer
) -> None:
    words = ("one ", "two ", "three")
    script, going = Script(*words), Going(*words)
    one, other = await gateways.open(script), await gateways.open(script, go_on=going)
    turn_id, secret = names()
    near, far = Notes(turn_id, secret), Notes(turn_id, secret, body=b"")
    one.on_request(near)
    script.go(2)
    await near.until(lambda: near.text == "one two ")
    other.on_request(far)
    await far.until(lambda: far.text == "one two ")
    keys = Keys("local", turn_id)  # as after a failover to a replica that was behind
    command(server, "XDEL", keys.log, "2-0")
    command(server, "HSET", keys.turn, "chunks", "1", "length", str(near.offset // 2))
    command(server, "DEL", keys.lease)
    await far.finished()
    assert far.rejected is not None
    assert (far.rejected[0], going.asked) == ("not_stored", 0)
    async with asyncio.timeout(DEADLINE_S):
        while command(server, "EXISTS", keys.lease) == b"1":  # noqa: ASYNC110 (in Redis)
            await asyncio.sleep(0.01)


async def test_a_turn_that_nobody_owns_does_not_go_on_in_a_full_redis_and_says_why(
    gateways: Gateways, server: RedisServer
) -> None:
    one, other = await gateways.open(say_one_word, go_on=Going("one ")), await gateways.open(None)
    turn_id, secret = names()
    near, far = Notes(turn_id, secret), Notes(turn_id, secret, body=b"")
    one.on_request(near)
    await near.until(lambda: near.text == "one ")
    await one.close(is_restart=True)
    command(server, "CONFIG", "SET", "maxmemory", "1")
    try:
        other.on_request(far)
        await far.finished()
    finally:
        command(server, "CONFIG", "SET", "maxmemory", "0")
    assert far.rejected is not None
    assert far.rejected[0] == "not_stored"


@pytest.mark.parametrize("is_at_once", [True, False])
async def test_a_cancel_at_the_following_gateway_stops_the_generation(
    gateways: Gateways, is_at_once: bool
) -> None:
    script = Script("so far", " and on")
    one, other = await gateways.open(script), await gateways.open(script)
    turn_id, secret = names()
    guest, owner = Notes(turn_id, secret, is_owner=False), Notes(turn_id, secret, body=b"")
    one.on_request(guest)
    script.go(1)
    await guest.until(lambda: guest.text == "so far")
    other.on_request(owner)
    if not is_at_once:
        await owner.until(lambda: owner.text == "so far")
    other.on_cancel(owner)
    if is_at_once:
        await guest.finished()
    other.on_gone(owner)
    await guest.finished()
    assert (guest.text, finish(guest)[0]) == ("so far", "cancelled")
    await asyncio.wait_for(script.ended.wait(), DEADLINE_S)


async def test_a_turn_that_was_cancelled_and_loses_its_owner_is_not_gone_on_with(
    gateways: Gateways, server: RedisServer
) -> None:
    script, going = Script("so far", " and on"), Going("so far", " and on")
    one, other = await gateways.open(script), await gateways.open(script, go_on=going)
    turn_id, secret = names()
    first, owner = Notes(turn_id, secret), Notes(turn_id, secret, body=b"")
    one.on_request(first)
    script.go(1)
    await first.until(lambda: first.text == "so far")
    other.on_request(owner)
    await owner.until(lambda: owner.text == "so far")
    command(server, "DEL", Keys("local", turn_id).lease)  # nobody is there to be told
    other.on_cancel(owner)
    await owner.finished()
    assert (owner.text, finish(owner)[0], going.asked) == ("so far", "cancelled", 0)


async def test_a_turn_that_is_read_at_another_gateway_is_not_given_up(
    gateways: Gateways, server: RedisServer
) -> None:
    script = Script("one ", "two")
    one = await gateways.open(script, grace_s=0.3)
    other = await gateways.open(script)
    turn_id, secret = names()
    near, far = Notes(turn_id, secret), Notes(turn_id, secret, body=b"", is_owner=False)
    one.on_request(near)
    script.go(1)
    await near.until(lambda: near.text == "one ")
    other.on_request(far)
    await far.until(lambda: far.text == "one ")
    read = Keys("local", turn_id).read
    async with asyncio.timeout(DEADLINE_S):
        while command(server, "EXISTS", read) == b"0":  # noqa: ASYNC110 (in another process)
            await asyncio.sleep(0.05)
    one.on_gone(near)
    await asyncio.sleep(0.7)
    assert one.generating == 1
    other.on_gone(far)
    command(server, "DEL", read)  # as Redis does in 10 s
    await asyncio.wait_for(script.ended.wait(), DEADLINE_S)
    late = Notes(turn_id, secret, body=b"")
    other.on_request(late)
    await late.finished()
    assert finish(late)[0] == "cancelled"


async def test_turns_of_a_gateway_that_is_gone_are_taken_up_without_a_reader(
    gateways: Gateways,
) -> None:
    going = Going("one ", "two ", "three")
    one = await gateways.open(say_one_word, go_on=going)
    readers = [Notes(*names()) for _ in range(5)]
    for reader in readers:
        one.on_request(reader)
        await reader.until(lambda reader=reader: reader.text == "one ")
    await one.close(is_restart=True)
    others = [await gateways.open(say_one_word, go_on=going) for _ in range(2)]
    for hub in others:
        hub.recover()
    async with asyncio.timeout(DEADLINE_S):
        while going.asked < 5:  # noqa: ASYNC110 (nobody reads them)
            await asyncio.sleep(0.01)
    for reader in readers:
        late = Notes(reader.request.turn_id, reader.request.secret, body=b"")
        others[0].on_request(late)
        await late.finished()
        assert late.text == "one two three"
    assert going.asked == 5


async def test_a_turn_that_is_deleted_at_another_gateway_is_generated_no_further(
    gateways: Gateways,
) -> None:
    script = Script("so far", " and on")
    one, other = await gateways.open(script), await gateways.open(script)
    turn_id, secret = names()
    reader = Notes(turn_id, secret)
    one.on_request(reader)
    script.go(1)
    await reader.until(lambda: reader.text == "so far")
    await other.delete(Request(turn_id, b"", secret))
    script.go(1)
    await reader.finished()
    assert reader.rejected is not None
    assert reader.rejected[0] == "unknown_turn"
    await asyncio.wait_for(script.ended.wait(), DEADLINE_S)
    again = Notes(turn_id, secret)
    other.on_request(again)
    await again.finished()
    assert again.rejected is not None
    assert script.asked == 1
