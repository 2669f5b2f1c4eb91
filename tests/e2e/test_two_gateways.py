"""Two gateways, each a process of its own, on one Redis: a reader goes on at the other."""

import asyncio
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from redis_server import RedisServer, command
from tools import needs_tool

from eloquent.core.events import End, EventDecoder, TextDelta
from eloquent.core.wire import Request
from eloquent_client import Client

pytestmark = needs_tool("redis-server")

WORDS = [f"word{number}" for number in range(250)]
"At the echo's 50 words a second, 5 s: a lease and more."
TEXT = " ".join(WORDS)
MESSAGES = [{"role": "user", "content": TEXT}]
READ_WORDS = 30
DEADLINE_S = 60.0
"Ends a hang; decides nothing."


class Gateway:
    """`eloquent serve` as a child process."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, log: Path) -> None:
        self._process = process
        self.url = url
        self._log = log

    @classmethod
    async def start(cls, redis: RedisServer, log: Path) -> "Gateway":
        options = ("--model", "echo", "--port", "0", "--store", redis.url, "--exit-with-parent")
        with log.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "eloquent", "serve", *options, "--log-level", "info"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
            )
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), DEADLINE_S)
        assert line.startswith(b"LISTENING"), "no start: see its log"
        return cls(process, line.split()[1].decode(), log)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def end(self) -> None:
        if self._process.returncode is None:
            self.send(signal.SIGCONT)
            self.send(signal.SIGKILL)
        await self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def gateways(redis: RedisServer, tmp_path: Path) -> AsyncIterator[tuple[Gateway, Gateway]]:
    async with AsyncExitStack() as stack:
        logs = tmp_path / "one.log", tmp_path / "other.log"
        one, other = await asyncio.gather(*(Gateway.start(redis, log) for log in logs))
        for gateway in (one, other):
            stack.push_async_callback(gateway.end)
        yield one, other


async def begin(gateway: Gateway) -> tuple[str, str]:
    """Ask, read some words, and leave; return what was read, and the token to go on with."""
    async with Client(gateway.url) as client, client.stream(messages=MESSAGES) as stream:
        stream.detach()
        seen = 0
        async for _ in stream.text_stream:
            seen += 1
            if seen == READ_WORDS:
                break
        return stream.text, stream.token


async def rest(gateway: Gateway, token: str, *, offset: int | None = None) -> tuple[str, str]:
    """Read a turn to its end; return the text and the finish reason."""
    async with (
        asyncio.timeout(DEADLINE_S),
        Client(gateway.url) as client,
        client.resume(token, offset=offset) as stream,
    ):
        message = await stream.get_final_message()
        assert (stream.stats.duplicates, stream.stats.missing) == (0, 0)
        return stream.text, message.finish_reason


def stored(redis: RedisServer, turn_id: str) -> tuple[str, int, End]:
    """Return what Redis has of a turn: its text, how many pieces of text, and its end."""
    key = f"eloquent:log:{turn_id}:local"
    script = "local log = '' for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '-', '+')) do"
    script += " if tonumber(entry[2][2]) ~= #log then return 'a gap' end log = log .. entry[2][4]"
    hexadecimal = " end return (log:gsub('.', function(c) return ('%02x'):format(c:byte()) end))"
    found = command(redis, "EVAL", script + hexadecimal, "1", key).decode()
    events = EventDecoder().feed(bytes.fromhex(found))
    end = events[-1]
    assert isinstance(end, End)
    pieces = [event.text for event in events if isinstance(event, TextDelta)]
    return "".join(pieces), len(pieces), end


def owners(redis: RedisServer) -> int:
    """Return how often a turn was begun or taken over."""
    return int(command(redis, "GET", "eloquent:fence"))


async def test_a_reader_of_a_gateway_that_is_killed_goes_on_at_the_other(
    redis: RedisServer, gateways: tuple[Gateway, Gateway]
) -> None:
    one, other = gateways
    before, token = await begin(one)
    one.send(signal.SIGKILL)
    after, reason = await rest(other, token)
    assert before + after == TEXT
    assert reason == "stop"
    assert owners(redis) == 2
    text, pieces, end = stored(redis, token[:32])
    assert (text, pieces, end.completion_tokens) == (TEXT, len(WORDS), len(WORDS))
    assert other.log.count("goes on where it was cut off") == 1
    assert (await rest(other, token, offset=0))[0] == TEXT


async def test_a_gateway_that_was_stopped_for_longer_than_its_lease_appends_nothing(
    redis: RedisServer, gateways: tuple[Gateway, Gateway]
) -> None:
    one, other = gateways
    before, token = await begin(one)
    one.send(signal.SIGSTOP)
    going_on = asyncio.ensure_future(rest(other, token))
    async with asyncio.timeout(DEADLINE_S):
        while owners(redis) < 2:  # noqa: ASYNC110 (another process's doing)
            await asyncio.sleep(0.05)
    one.send(signal.SIGCONT)
    # Its clock says that the lease is over, and what it has generated is refused: it follows.
    here = asyncio.ensure_future(rest(one, token, offset=0))
    after, reason = await going_on
    assert (before + after, reason) == (TEXT, "stop")
    assert await here == (TEXT, "stop")
    assert "its lease is lost" in one.log
    assert owners(redis) == 2
    text, pieces, end = stored(redis, token[:32])
    assert (text, pieces, end.completion_tokens) == (TEXT, len(WORDS), len(WORDS))


async def test_two_gateways_that_are_asked_for_a_turn_at_once_generate_it_once(
    redis: RedisServer, gateways: tuple[Gateway, Gateway]
) -> None:
    body = b'{"messages": [{"role": "user", "content": "%s"}]}' % TEXT.encode()
    request = Request(secrets.token_bytes(16), body, secrets.token_bytes(16))

    async def ask(gateway: Gateway) -> str:
        async with Client(gateway.url) as client, client.ask(request) as stream:
            await stream.get_final_message()
            return stream.text

    async with asyncio.timeout(DEADLINE_S):
        assert await asyncio.gather(*map(ask, gateways)) == [TEXT, TEXT]
    assert owners(redis) == 1
    assert stored(redis, request.turn_id.hex())[:2] == (TEXT, len(WORDS))


async def test_a_cancel_at_the_gateway_that_follows_stops_the_one_that_generates(
    redis: RedisServer, gateways: tuple[Gateway, Gateway]
) -> None:
    one, other = gateways
    before, token = await begin(one)
    async with Client(other.url) as client, client.resume(token) as stream:
        async for _ in stream.text_stream:
            break  # leaving cancels
        offset = stream.offset
    text, reason = await rest(one, token, offset=0)
    assert reason == "cancelled"
    assert before in text
    assert len(text) < len(TEXT)
    assert offset > int(token.rpartition(":")[2])
    assert owners(redis) == 1
    assert (await rest(other, token, offset=0)) == (text, "cancelled")


async def test_a_gateway_that_is_stopped_in_order_leaves_its_turns_to_the_other(
    redis: RedisServer, gateways: tuple[Gateway, Gateway]
) -> None:
    one, other = gateways
    before, token = await begin(one)
    one.send(signal.SIGINT)
    after, reason = await rest(other, token)
    assert (before + after, reason) == (TEXT, "stop")
    assert owners(redis) == 2
