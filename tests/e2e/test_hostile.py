"""A real server with keys, and those who mean no good: refused cleanly, and others are unharmed.

While each attack runs, somebody with a good key reads answers and gets their exact text; after it
the server has the memory and the open files that it had before.
"""

import asyncio
import json
import os
import secrets
import signal
import socket
import ssl
import sys
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from urllib.request import urlopen

import pytest
import websockets
from prometheus_client.parser import text_string_to_metric_families

from eloquent.core.channel import MAX_TO_SERVER_BYTES
from eloquent.core.events import TextDelta
from eloquent.core.wire import MAX_REQUEST_BODY_BYTES, Request
from eloquent.errors import RequestError
from eloquent.handshakes import HANDSHAKE_S
from eloquent.quic.client import ClientConnection, client_configuration
from eloquent.quic.connect import connect as connect_quic
from eloquent.quic.listen import INITIAL_MIN_BYTES
from eloquent.quic.listen import MAX_HANDSHAKES as MAX_HALF_OPEN
from eloquent.session.session import Connector, Session
from eloquent.session.turn import ClientTurn
from eloquent.url import ServerUrl, parse_url
from eloquent.websocket.client import connect as connect_websocket
from eloquent.websocket.driver import SUBPROTOCOL
from eloquent.websocket.server import MAX_HANDSHAKES
from eloquent_server.keys import entry_for, new_key
from eloquent_server.serve import HTTP_PREFIX, READY_PREFIX

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="looks into /proc, and sends from many addresses of loopback"
)

DEADLINE_S = 120.0
"Ends a hang; decides nothing."
ATTEMPTS = 10_000
"Packets that begin nothing,"
HANDSHAKES = 600
"and clients that begin in earnest and then fall silent: more than the server has patience for,"
SOURCES = 100
"from so many addresses."
AT_ONCE = 32
"Under way: what fits the server's socket, so that none is lost before it is seen."
ANSWER_S = 1.0
"How long to wait for an answer before the next attempt."
HALF_OPEN = 300
"WebSockets that are begun and never opened: thrice as many as may be."

SLACK_FILES = 10
SLACK_BYTES = 32 << 20
"How much more the server may have after an attack: a half-open connection takes 100 to 400 KB."

LONG_HEADER_TYPE, RETRY = 0xF0, 0xF0
"Of a packet's first byte (RFC 9000 section 17.2.5)."

TEXT = " ".join(f"word{number}" for number in range(150))

ALICE, BOB, CARLA, DORA, EVE = (new_key() for _ in range(5))
KEYS = "\n".join(
    [
        entry_for(ALICE, "alice", "team"),
        entry_for(BOB, "bob", "team"),
        entry_for(CARLA, "carla"),
        entry_for(DORA, "dora"),
        "expires = 2020-01-01",
        entry_for(EVE, "eve"),
        "turns = 1\nrequests_per_minute = 1\nburst = 2",
    ]
)

QUIC, WEBSOCKET = "quic", "websocket"
CONNECTORS: dict[str, Connector] = {QUIC: connect_quic, WEBSOCKET: connect_websocket}
RUNGS = pytest.mark.parametrize("rung", CONNECTORS)


Counts = dict[tuple[str, ...], float]
"By the name of a figure and the values of its labels, in the order of their names."


@dataclass(frozen=True)
class Server:
    """A server process, and what can be seen of it from outside."""

    url: ServerUrl
    http: str
    pid: int
    log: Path

    @property
    def open_files(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    @property
    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")

    @property
    def log_lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    async def counted(self) -> Counts:
        """Return the figures of /metrics."""
        text = await asyncio.to_thread(lambda: urlopen(f"{self.http}/metrics").read().decode())
        return {
            (
                sample.name.removeprefix("eloquent:"),
                *dict(sorted(sample.labels.items())).values(),
            ): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    async def has_open_files(self, most: int) -> None:
        """Wait until it has no more open files than that."""
        async with asyncio.timeout(DEADLINE_S):
            while self.open_files > most:  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.2)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    keys, log = tmp_path / "keys.toml", tmp_path / "log"
    keys.write_text(KEYS)
    keys.chmod(0o600)
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "eloquent", "serve", "--model", "echo", "--port", "0"),
            *("--http", "0", "--exit-with-parent", "--keys", str(keys)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(DEADLINE_S):
            ready, http = [(await process.stdout.readline()).decode() for _ in range(2)]
        url = parse_url(ready.removeprefix(READY_PREFIX).strip())
        yield Server(url, http.removeprefix(HTTP_PREFIX).strip(), process.pid, log)
    finally:
        process.stdin.close()
        async with asyncio.timeout(DEADLINE_S):
            assert await process.wait() == 0


def any_server() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def chat(text: str) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}]}).encode()


def asking(key: str, text: str = TEXT) -> Request:
    return Request(secrets.token_bytes(16), chat(text), secrets.token_bytes(16), key=key)


async def read(turn: ClientTurn) -> str:
    async with asyncio.timeout(DEADLINE_S):
        return "".join([event.text async for event in turn if isinstance(event, TextDelta)])


async def refusal(session: Session, request: Request) -> RequestError:
    with pytest.raises(RequestError) as raised:
        await read(session.open(request))
    return raised.value


async def is_let_in(session: Session, request: Request) -> bool:
    try:
        await read(session.open(request))
    except RequestError as error:
        return error.code != "unauthorized"
    return True


@asynccontextmanager
async def connected(server: Server, rung: str) -> AsyncIterator[Session]:
    session = Session(server.url, connector=CONNECTORS[rung])
    try:
        async with asyncio.timeout(DEADLINE_S):
            await session.connect()
        yield session
    finally:
        await session.close()


@asynccontextmanager
async def somebody_reads(server: Server, rung: str) -> AsyncIterator[None]:
    """Somebody reads answers from before the attack until after it, and each is exact."""
    async with connected(server, rung) as session:
        is_over = asyncio.Event()

        async def read_on() -> None:
            is_last = False
            while not is_last:
                is_last = is_over.is_set()
                assert await read(session.open(asking(ALICE))) == TEXT

        reading = asyncio.ensure_future(read_on())
        try:
            yield
        finally:
            is_over.set()
            await reading


@RUNGS
async def test_who_has_no_good_key_gets_nothing(server: Server, rung: str) -> None:
    before = server.open_files
    async with somebody_reads(server, rung), connected(server, rung) as session:
        for key in ("", new_key(), ALICE[:-1], DORA, "ä" * 100):
            assert (await refusal(session, asking(key))).code == "unauthorized"
        for _ in range(300):
            await refusal(session, asking(new_key()))
        assert await read(session.open(asking(CARLA, "and mine"))) == "and mine"
    await server.has_open_files(before)
    refused = [line for line in server.log_lines if "refused" in line]
    assert 0 < len(refused) < 100  # one a second
    assert not any(key in line for key in (ALICE, DORA) for line in refused)
    counted = await server.counted()
    assert counted["refusals_total", "unauthorized", rung] == 305
    for reason, count in (("no_key", 1), ("wrong_key", 303), ("expired_key", 1)):
        assert counted["requests_refused_total", reason] == count


@RUNGS
async def test_a_turn_is_read_with_its_secret_by_its_tenant_and_else_there_is_none(
    server: Server, rung: str
) -> None:
    asked = asking(ALICE)
    turn_id, secret = asked.turn_id, asked.secret
    async with somebody_reads(server, rung), connected(server, rung) as session:
        assert await read(session.open(asked)) == TEXT
        foreign = [
            Request(turn_id, b"", secret, key=CARLA),
            Request(turn_id, b"", secrets.token_bytes(16), key=ALICE),
            Request(turn_id, b"", secrets.token_bytes(16), key=BOB),
            Request(secrets.token_bytes(16), b"", secret, key=ALICE),
            Request(turn_id, b"", secret, offset=10, key=CARLA),
        ]
        refused = [await refusal(session, request) for request in foreign]
        assert {error.code for error in refused} == {"unknown_turn"}
        assert len({error.message for error in refused}) == 1
        for key in ("", DORA, new_key()):
            error = await refusal(session, Request(turn_id, b"", secret, key=key))
            assert error.code == "unauthorized"
        for key in (ALICE, BOB):
            assert await read(session.open(Request(turn_id, b"", secret, key=key))) == TEXT
    assert (await server.counted())["refusals_total", "unknown_turn", rung] == len(foreign)


@RUNGS
async def test_a_key_gets_what_its_limits_allow(server: Server, rung: str) -> None:
    async with somebody_reads(server, rung), connected(server, rung) as session:
        running = session.open(asking(EVE))
        first = await anext(aiter(running))
        assert isinstance(first, TextDelta)
        error = await refusal(session, asking(EVE))
        assert error.code == "too_many_turns"
        assert first.text + await read(running) == TEXT
        assert await read(session.open(asking(EVE, "one more"))) == "one more"
        error = await refusal(session, asking(EVE))
        assert error.code == "rate_limited"
        assert 0 < error.retry_after_s <= 60
    counted = await server.counted()
    for reason, code in (("turns", "too_many_turns"), ("requests", "rate_limited")):
        assert counted["requests_refused_total", reason] == 1
        assert counted["refusals_total", code, rung] == 1


async def test_a_key_that_is_taken_away_asks_nothing_more(server: Server) -> None:
    """What it asked before goes on to its end."""
    async with somebody_reads(server, QUIC), connected(server, QUIC) as session:
        running = session.open(asking(CARLA))
        first = await anext(aiter(running))
        assert isinstance(first, TextDelta)
        keys = server.log.with_name("keys.toml")
        keys.write_text(KEYS.replace(entry_for(CARLA, "carla"), ""))
        os.kill(server.pid, signal.SIGHUP)
        async with asyncio.timeout(DEADLINE_S):
            while await is_let_in(session, asking(CARLA, "still there?")):
                pass
        assert first.text + await read(running) == TEXT
        keys.write_text("[[key]]\nbroken")
        os.kill(server.pid, signal.SIGHUP)
        assert await read(session.open(asking(BOB, "and I"))) == "and I"


@RUNGS
@pytest.mark.parametrize("size", [MAX_REQUEST_BODY_BYTES + 1, 3 * MAX_REQUEST_BODY_BYTES])
async def test_an_oversized_request_is_declined(server: Server, rung: str, size: int) -> None:
    large = Request(secrets.token_bytes(16), b"x" * size, secrets.token_bytes(16), key=ALICE)
    before = server.open_files
    async with somebody_reads(server, rung), connected(server, rung) as session:
        assert (await refusal(session, large)).code == "request_too_large"
        assert await read(session.open(asking(BOB, "a short one"))) == "a short one"
    await server.has_open_files(before)
    assert (await server.counted())["refusals_total", "request_too_large", rung] == 1


async def test_a_message_without_bounds_ends_its_own_connection_alone(server: Server) -> None:
    before = server.open_files
    async with somebody_reads(server, WEBSOCKET):
        rude = await websockets.connect(
            f"wss://{server.url.host}:{server.url.port}/",
            ssl=any_server(),
            subprotocols=[SUBPROTOCOL],
            proxy=None,
        )
        # The server closes after the head of the message, so its word may be lost to a reset.
        await rude.send(bytes(MAX_TO_SERVER_BYTES + 1))
        async with asyncio.timeout(DEADLINE_S):
            await rude.wait_closed()
        assert rude.close_code in (1006, 1009)
    await server.has_open_files(before)


def initial(rng: Random) -> bytes:
    """Return what looks like a client's first packet and holds noise (RFC 9000 section 17.2.2)."""
    destination, source = rng.randbytes(8), rng.randbytes(8)
    head = b"\xc3" + (1).to_bytes(4) + b"\x08" + destination + b"\x08" + source + b"\x00"
    rest = INITIAL_MIN_BYTES - len(head) - 2
    return head + (0x4000 | rest).to_bytes(2) + rng.randbytes(rest)


def udp_socket(address: str, server: ServerUrl) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind((address, 0))
    sock.connect((server.host, server.port))
    return sock


@dataclass
class Flood:
    """Attempts to connect over UDP, from many addresses."""

    server: Server
    rng: Random
    room: asyncio.Semaphore
    sent: int = 0
    answered: int = 0

    async def ask(self, sock: socket.socket, packet: bytes) -> bytes | None:
        """Send a packet and wait for what the server says; None: nothing."""
        loop = asyncio.get_running_loop()
        async with self.room:
            self.sent += 1
            await loop.sock_sendall(sock, packet)
            try:
                async with asyncio.timeout(ANSWER_S):
                    answer = await loop.sock_recv(sock, 2048)
            except TimeoutError:
                return None
            self.answered += 1
            return answer

    async def begin_handshake(self, address: str) -> None:
        """Show the address if need be, and then say nothing more."""
        server = self.server.url
        configuration = client_configuration(server.host, pin=server.pin)
        connection = ClientConnection(configuration, pin=server.pin)
        connection.connect((server.host, server.port), 0.0)
        ((first, _, _),) = connection.send(0.0)
        with udp_socket(address, server) as sock:
            answer = await self.ask(sock, first)
            if answer is not None and answer[0] & LONG_HEADER_TYPE == RETRY:
                connection.receive(answer, (server.host, server.port), 0.1)
                for packet, _, _ in connection.send(0.1):
                    await self.ask(sock, packet)

    async def come_from(self, address: str, attempts: int) -> None:
        with udp_socket(address, self.server.url) as sock:
            for _ in range(attempts):
                await self.ask(sock, initial(self.rng))
        for _ in range(HANDSHAKES // SOURCES):
            await self.begin_handshake(address)

    async def rage(self, attempts: int) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(SOURCES):
                group.create_task(self.come_from(f"127.0.1.{number + 1}", attempts // SOURCES))


async def test_ten_thousand_connection_attempts(server: Server) -> None:
    """After a first taste, which fills the pools of memory, ten thousand take no more of it."""
    seed, before = 8, server.open_files
    print(f"seed {seed}")  # noqa: T201
    flood = Flood(server, Random(seed), asyncio.Semaphore(AT_ONCE))
    async with somebody_reads(server, QUIC):
        await flood.rage(SOURCES)
        tasted = server.resident_bytes
        await flood.rage(ATTEMPTS)
        async with connected(server, QUIC) as session:
            assert await read(session.open(asking(BOB, "a short one"))) == "a short one"
        assert server.open_files <= before + SLACK_FILES
    await asyncio.sleep(HANDSHAKE_S + 1)
    counted = await server.counted()
    assert counted["handshakes_total", "retried", QUIC] > 0.9 * ATTEMPTS
    assert counted["handshakes_total", "given_up", QUIC] > MAX_HALF_OPEN
    assert counted["connections", "datagrams"] == 0
    assert server.resident_bytes <= tasted + SLACK_BYTES
    assert len(server.log_lines) < 100


async def half_open(server: Server, number: int) -> tuple[StreamReader, StreamWriter] | None:
    """Begin a WebSocket and leave off: after TCP, amid TLS or after it."""
    stage = number % 3
    try:
        reader, writer = await asyncio.open_connection(
            server.url.host,
            server.url.port,
            ssl=any_server() if stage == 2 else None,
            local_addr=(f"127.0.1.{number % SOURCES + 1}", 0),
        )
    except OSError:  # it had to make room in the midst of TLS
        return None
    if stage == 1:
        writer.write(bytes.fromhex("1603010200010001fc0303"))
    return reader, writer


async def test_websockets_that_are_never_opened(server: Server) -> None:
    """Twice: the second time they take no more memory."""
    before, resident = server.open_files, []
    for _ in range(2):
        async with somebody_reads(server, WEBSOCKET):
            opened = [await half_open(server, number) for number in range(HALF_OPEN)]
            assert server.open_files <= before + MAX_HANDSHAKES + SLACK_FILES
            async with connected(server, WEBSOCKET) as session:
                assert await read(session.open(asking(BOB, "a short one"))) == "a short one"
            for reader, writer in filter(None, opened):
                async with asyncio.timeout(DEADLINE_S):  # the server ends them
                    with suppress(ConnectionResetError):
                        assert await reader.read() == b""
                writer.close()
        await server.has_open_files(before)
        resident.append(server.resident_bytes)
    assert resident[1] <= resident[0] + SLACK_BYTES
    assert (await server.counted())["handshakes_total", "given_up", WEBSOCKET] == 2 * HALF_OPEN
    assert len(server.log_lines) < 100
