"""The WebSocket rung: real `websockets`, real TLS, over TCP in virtual time."""

import asyncio
import dataclasses
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from rungs import CERTIFICATE, PORT, RTT_S, URL, collect, now, text_of, virtually
from telling import Telling
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_plainly
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.protocol import State

from eloquent.core.channel import MESSAGE_OPEN
from eloquent.core.events import End
from eloquent.core.turns import SLOW_READER_S
from eloquent.core.wire import Request, encode_request
from eloquent.errors import (
    ConfigurationError,
    ConnectionFailedError,
    RequestError,
    ServerRefusedError,
)
from eloquent.link import Rung
from eloquent.session.session import Session
from eloquent.session.states import LinkState
from eloquent.websocket import server as websocket_server
from eloquent.websocket.client import connect
from eloquent.websocket.driver import SUBPROTOCOL
from eloquent.websocket.server import SILENT_S, WebSocketListener, listen
from eloquent_netem.link import Link
from eloquent_netem.packet import Packet
from eloquent_netem.rate import FixedRate
from eloquent_netem.vloop import VirtualNetwork, run

TOKENS = [f"token {index} " for index in range(100)]


@asynccontextmanager
async def serving(network: VirtualNetwork, telling: Telling) -> AsyncIterator[WebSocketListener]:
    with network.on("server"):
        listener = await listen("server", PORT, certificate=CERTIFICATE, service=telling)
    try:
        yield listener
    finally:
        await listener.close()


@asynccontextmanager
async def joined(
    network: VirtualNetwork, telling: Telling
) -> AsyncIterator[tuple[Session, WebSocketListener]]:
    async with serving(network, telling) as listener:
        session = Session(URL, connector=connect)
        try:
            yield session, listener
        finally:
            await session.close()


def test_a_whole_turn() -> None:
    async def main(network: VirtualNetwork) -> None:
        telling = Telling(TOKENS, 0.05)
        async with joined(network, telling) as (session, listener):
            events = await collect(session.ask(b"{}"))
            assert text_of(events) == "".join(TOKENS)
            assert isinstance(events[-1], End)
            assert session.link is not None
            assert session.link.rung is Rung.WEBSOCKET
            assert session.link.srtt_s == pytest.approx(RTT_S, abs=1e-3)
            assert listener.connections == 1
            assert listener.port == PORT
            await asyncio.sleep(1)
            assert len(telling.gone) == 1
            assert telling.cancelled == []

    virtually(main)


def test_it_takes_four_round_trips_to_the_first_token() -> None:
    """TCP, TLS 1.3 and WebSocket take one each; then the request goes out."""

    async def main(network: VirtualNetwork) -> None:
        async with joined(network, Telling(TOKENS, 0.05)) as (session, _):
            turn = session.ask(b"{}")
            async for _ in turn:
                break
            assert now() == pytest.approx(4 * RTT_S, abs=2e-3)

    virtually(main)


def test_many_turns_at_once() -> None:
    async def main(network: VirtualNetwork) -> None:
        async with joined(network, Telling(TOKENS, 0.01)) as (session, _):
            answers = await asyncio.gather(*(collect(session.ask(b"{}")) for _ in range(200)))
            assert {text_of(events) for events in answers} == {"".join(TOKENS)}

    virtually(main)


def test_a_model_that_says_nothing_for_long_is_no_dead_link() -> None:
    states: list[LinkState] = []

    async def main(network: VirtualNetwork) -> None:
        async with serving(network, Telling(["one ", "two"], 30.0)):
            session = Session(URL, connector=connect, on_state=states.append)
            assert text_of(await collect(session.ask(b"{}"))) == "one two"
            await session.close()

    virtually(main)
    assert states == [LinkState.CONNECTING, LinkState.UP, LinkState.CLOSED]


def test_an_idle_connection_stays() -> None:
    async def main(network: VirtualNetwork) -> None:
        async with joined(network, Telling(TOKENS, 0.01)) as (session, listener):
            await session.connect()
            await asyncio.sleep(600)
            assert session.state is LinkState.UP
            assert listener.connections == 1

    virtually(main)


def test_a_cancel_reaches_the_server_even_if_the_session_closes_at_once() -> None:
    async def main(network: VirtualNetwork) -> None:
        telling = Telling(TOKENS, 0.05)
        async with joined(network, telling) as (session, listener):
            turn = session.ask(b"{}")
            async for _ in turn:
                break
            turn.cancel()
            before = now()
            await session.close()
            assert now() - before <= 0.5
            assert len(telling.cancelled) == 1
            await asyncio.sleep(1)
            assert listener.connections == 0

    virtually(main)


def test_a_client_that_vanishes_is_given_up() -> None:
    def drops(time: float, packet: Packet) -> bool:
        return time > 2

    async def main(network: VirtualNetwork) -> None:
        telling = Telling(["word "] * 100_000, 0.05)
        async with serving(network, telling):
            session = Session(URL, connector=connect)
            turn = session.ask(b"{}")
            async for _ in turn:
                break
            await asyncio.sleep(SILENT_S + 1)
            assert telling.gone == []
            await asyncio.sleep(3)
            assert len(telling.gone) == 1
            await session.close()

    virtually(main, drops)


def test_a_server_that_vanishes_is_noticed_within_two_seconds_and_closing_does_not_hang() -> None:
    states: list[tuple[float, LinkState]] = []

    def drops(time: float, packet: Packet) -> bool:
        return time > 2

    async def main(network: VirtualNetwork) -> None:
        async with serving(network, Telling(TOKENS, 0.5)):
            session = Session(
                URL, connector=connect, on_state=lambda state: states.append((now(), state))
            )
            session.ask(b"{}")
            await asyncio.sleep(5)
            silent_at = next(time for time, state in states if state is LinkState.SILENT)
            assert 2.0 < silent_at < 4.1
            before = now()
            await session.close()
            assert now() - before < 0.6

    virtually(main, drops)


def test_a_turn_goes_on_after_an_outage() -> None:
    def drops(time: float, packet: Packet) -> bool:
        return 2 < time < 12

    async def main(network: VirtualNetwork) -> None:
        async with joined(network, Telling(TOKENS, 0.2)) as (session, _):
            assert text_of(await collect(session.ask(b"{}"))) == "".join(TOKENS)

    virtually(main, drops)


def test_a_slow_link_full_of_answer_is_no_dead_link() -> None:
    states: list[LinkState] = []
    made = VirtualNetwork.between(
        Link(delay_s=RTT_S / 2, seed=1, name="up"),
        Link(delay_s=RTT_S / 2, seed=1, name="down", rate=FixedRate(48_000)),
    )

    async def main() -> None:
        async with serving(made, Telling(["x" * 50_000, "y" * 50_000], 0.0)):
            session = Session(URL, connector=connect, on_state=states.append)
            assert len(text_of(await collect(session.ask(b"{}")))) == 100_000
            assert now() > 15
            await session.close()

    run(main(), made)
    assert states == [LinkState.CONNECTING, LinkState.UP, LinkState.CLOSED]


def test_a_reader_that_takes_nothing_is_told_so() -> None:
    async def main(network: VirtualNetwork) -> None:
        telling = Telling(["x" * 10_000] * 100, 0.0)
        async with joined(network, telling) as (session, _):
            turn = session.ask(b"{}")
            async for _ in turn:
                break
            await asyncio.sleep(SLOW_READER_S + 2)
            with pytest.raises(RequestError, match="Nothing of the answer was read"):
                await collect(turn)

    virtually(main)


# Who is let in, and who is believed.


def test_a_server_with_another_certificate_is_refused_before_anything_is_asked() -> None:
    async def main(network: VirtualNetwork) -> None:
        telling = Telling(TOKENS, 0.01)
        async with serving(network, telling):
            url = dataclasses.replace(URL, pin="0" * 64)
            session = Session(url, connector=connect)
            with pytest.raises(ServerRefusedError, match="not the pinned one"):
                await session.connect()
            await session.close()
            assert telling.logs == {}

    virtually(main)


def test_without_a_pin_the_authorities_are_asked() -> None:
    async def main(network: VirtualNetwork) -> None:
        async with serving(network, Telling(TOKENS, 0.01)):
            session = Session(dataclasses.replace(URL, pin=None), connector=connect)
            with pytest.raises(ServerRefusedError, match="No TLS with server"):
                await session.connect()
            await session.close()

    virtually(main)


def test_nobody_listens() -> None:
    async def main(network: VirtualNetwork) -> None:
        session = Session(URL, connector=connect)
        with pytest.raises(ServerRefusedError, match="Nothing listens on server, TCP port 4433"):
            await session.connect()
        await session.close()

    virtually(main)


def test_nobody_answers() -> None:
    async def main(network: VirtualNetwork) -> None:
        session = Session(URL, connector=connect)
        with pytest.raises(ConnectionFailedError, match="No answer from server, TCP port 4433"):
            await session.connect()
        assert now() == pytest.approx(5.0)
        await session.close()

    virtually(main, lambda time, packet: True)


def plain_tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def drain(websocket: ClientConnection) -> None:
    while True:
        await websocket.recv()


async def dial(**options: object) -> ClientConnection:
    wanted = {"subprotocols": [SUBPROTOCOL], "proxy": None, "compression": None, **options}
    return await connect_plainly("wss://server:4433/", ssl=plain_tls(), **wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"subprotocols": ["chat"]}, {"subprotocols": None}, {"origin": "https://evil.test"}]
)
def test_a_web_page_and_a_client_of_another_protocol_are_refused(
    options: dict[str, object],
) -> None:
    async def main(network: VirtualNetwork) -> None:
        async with serving(network, Telling(TOKENS, 0.01)):
            with pytest.raises(InvalidStatus):
                await dial(**options)

    virtually(main)


def test_connections_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket_server, "MAX_CONNECTIONS", 2)

    async def main(network: VirtualNetwork) -> None:
        async with serving(network, Telling(TOKENS, 0.01)):
            held = [await dial(), await dial()]
            for websocket in held:
                await websocket.send(
                    bytes((MESSAGE_OPEN, 0)) + encode_request(Request(bytes(16), b"{}"))
                )
            await asyncio.sleep(0.1)
            with pytest.raises(InvalidStatus, match="503"):
                await dial()
            for websocket in held:
                await websocket.close()

    virtually(main)


def test_an_idle_connection_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket_server, "MAX_CONNECTIONS", 2)

    async def main(network: VirtualNetwork) -> None:
        async with serving(network, Telling(TOKENS, 0.01)):
            oldest, newer = await dial(), await dial()
            newest = await dial()
            with pytest.raises(ConnectionClosedError):
                await drain(oldest)
            for websocket in (newer, newest):
                assert websocket.state is State.OPEN
                await websocket.close()

    virtually(main)


@pytest.mark.parametrize(
    ("message", "reason"), [(b"\x09", "unknown type"), (b"", "empty"), ("text", "text message")]
)
def test_a_client_that_breaks_the_protocol_is_told_why(message: bytes | str, reason: str) -> None:
    async def main(network: VirtualNetwork) -> None:
        telling = Telling(TOKENS, 0.05)
        async with serving(network, telling):
            websocket = await dial()
            await websocket.send(
                bytes((MESSAGE_OPEN, 0)) + encode_request(Request(bytes(16), b"{}"))
            )
            await websocket.send(message)
            with pytest.raises(ConnectionClosedError, match=reason):
                await drain(websocket)
            await asyncio.sleep(1)
            assert len(telling.gone) == 1

    virtually(main)


def test_a_server_that_breaks_the_protocol_ends_the_connection_and_not_the_session() -> None:
    async def main(network: VirtualNetwork) -> None:
        async def babble(websocket: ServerConnection) -> None:
            await websocket.send(b"\x09")
            await websocket.wait_closed()

        context = CERTIFICATE.tls()
        with network.on("server"):
            server = await serve(babble, "server", PORT, ssl=context, subprotocols=[SUBPROTOCOL])
        session = Session(URL, connector=connect)
        await session.connect()
        await asyncio.sleep(1)
        assert session.link is None
        await session.close()
        server.close()
        await server.wait_closed()

    virtually(main)


def test_something_else_on_the_port_is_named() -> None:
    async def main(network: VirtualNetwork) -> None:
        async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 mail.test\r\n")
            writer.close()

        with network.on("server"):
            server = await asyncio.start_server(hello, "server", PORT)
        session = Session(URL, connector=connect)
        with pytest.raises(ConnectionFailedError):
            await session.connect()
        await session.close()
        server.close()
        await server.wait_closed()

    virtually(main)


# Over real sockets.


async def test_a_turn_over_loopback() -> None:
    telling = Telling(TOKENS, 0.001)
    listener = await listen("127.0.0.1", 0, certificate=CERTIFICATE, service=telling)
    url = dataclasses.replace(URL, host="127.0.0.1", port=listener.port)
    session = Session(url, connector=connect)
    try:
        async with asyncio.timeout(30):
            assert text_of(await collect(session.ask(b"{}"))) == "".join(TOKENS)
        with pytest.raises(ConfigurationError, match=str(listener.port)):
            await listen("127.0.0.1", listener.port, certificate=CERTIFICATE, service=telling)
    finally:
        await session.close()
        await listener.close()


async def test_what_waits_for_a_reader_that_does_not_read_is_bounded() -> None:
    """The server's buffers and the kernel's take some; the rest stays in the log."""
    telling = Telling(["x" * 100_000] * 20, 0.0)
    listener = await listen("127.0.0.1", 0, certificate=CERTIFICATE, service=telling)
    websocket = await connect_plainly(
        f"wss://127.0.0.1:{listener.port}/",
        ssl=plain_tls(),
        subprotocols=[SUBPROTOCOL],
        proxy=None,
        compression=None,
    )
    try:
        await websocket.send(bytes((MESSAGE_OPEN, 0)) + encode_request(Request(bytes(16), b"{}")))
        await asyncio.sleep(0.5)
        total = 0
        async with asyncio.timeout(30):
            while total < 262_144:
                message = await websocket.recv()
                total += len(message)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(websocket.recv(), 0.3)
        assert total < 262_144 + 2000
    finally:
        await websocket.close()
        await listener.close()
