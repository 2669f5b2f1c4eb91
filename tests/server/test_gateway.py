"""Server and client on loopback, over real sockets: answers, refusals, rude clients."""

import asyncio
import datetime
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from eloquent.core.events import End, Event, Failure, TextDelta
from eloquent.core.log import Log
from eloquent.core.wire import Request
from eloquent.errors import ConfigurationError, ConnectionFailedError, EloquentError, RequestError
from eloquent.quic.certificate import make_certificate
from eloquent.quic.listen import Listener, listen
from eloquent.session.session import Session
from eloquent.session.states import LinkState
from eloquent.session.turn import ClientTurn
from eloquent.url import ServerUrl
from eloquent_server.backends.base import ANYBODY, Asker, Backend, BackendEvent, Finish, Tenant
from eloquent_server.backends.echo import EchoBackend
from eloquent_server.gateway import Gateway
from eloquent_server.store import TokenStore
from eloquent_server.turns import TurnHub

DEADLINE_S = 20.0
"Ends a hang; decides nothing."

LONG_AGO = datetime.timedelta(days=1)


class ScriptedBackend:
    """Answers as the test says; the real gateway, transport and sockets are around it."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.behaviour = "wait"
        self.askers: list[Asker] = []

    @property
    def models(self) -> Sequence[str]:
        return ("scripted",)

    async def generate(self, body: bytes, asker: Asker = ANYBODY) -> AsyncGenerator[BackendEvent]:
        self.askers.append(asker)
        self.started.set()
        if self.behaviour == "fault":
            raise ZeroDivisionError("a fault of the backend's")
        yield TextDelta("first")
        if self.behaviour == "fault later":
            raise ZeroDivisionError("a fault of the backend's")
        if self.behaviour == "failure":
            yield Failure("engine_error", "The engine failed.")
            return
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
        yield Finish("stop", 1, 1)

    async def close(self) -> None:
        pass


@dataclass(eq=False)
class SilentReader:
    """A reader who says nothing."""

    request: Request
    is_silent = False
    report = None

    def accept(self, log: Log) -> None:
        pass

    def log_grew(self) -> None:
        pass

    def reject(self, code: str, message: str, retry_after_s: float = 0.0) -> None:
        pass


@dataclass
class Server:
    hub: TurnHub
    listener: Listener
    url: ServerUrl


@asynccontextmanager
async def serving(backend: Backend, *, grace_s: float = 60.0) -> AsyncIterator[Server]:
    certificate = make_certificate("127.0.0.1", datetime.datetime.now(datetime.UTC) - LONG_AGO)
    hub = TurnHub(Gateway(backend).handle, TokenStore.open(None), grace_s=grace_s)
    listener = await listen("127.0.0.1", 0, certificate=certificate, service=hub)
    try:
        yield Server(hub, listener, ServerUrl("127.0.0.1", listener.port, certificate.pin))
    finally:
        await hub.close()
        await listener.close()
        await backend.close()


@asynccontextmanager
async def linked(backend: Backend) -> AsyncIterator[tuple[Server, Session]]:
    async with serving(backend) as server:
        session = Session(server.url)
        try:
            yield server, session
        finally:
            await session.close()


async def connect(url: ServerUrl) -> Session:
    session = Session(url)
    try:
        await session.connect()
    except EloquentError:
        await session.close()
        raise
    return session


def ask(link: Session, body: object, turn_id: bytes | None = None) -> ClientTurn:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return link.open(Request(turn_id or secrets.token_bytes(16), raw))


def said(text: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}]}


async def events_of(turn: ClientTurn) -> list[Event]:
    async with asyncio.timeout(DEADLINE_S):
        return [event async for event in turn]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


async def test_an_answer_arrives_with_its_end() -> None:
    async with linked(EchoBackend(1000.0)) as (_, link):
        events = await events_of(ask(link, said("to be or not")))
    assert text_of(events) == "to be or not"
    end = events[-1]
    assert isinstance(end, End)
    assert (end.finish_reason, end.model, end.completion_tokens) == ("stop", "echo", 4)


async def test_many_turns_and_clients_at_once() -> None:
    async with serving(EchoBackend(500.0)) as server:
        links = [await connect(server.url) for _ in range(4)]
        texts = [f"client {one} turn {two} says this" for one in range(4) for two in range(5)]
        turns = [ask(links[index // 5], said(text)) for index, text in enumerate(texts)]
        answers = await asyncio.gather(*(events_of(turn) for turn in turns))
        for link in links:
            await link.close()
    assert [text_of(events) for events in answers] == texts


@pytest.mark.parametrize(
    ("body", "code", "named"),
    [
        (b"\xff\x00 no JSON", "invalid_request", "JSON"),
        (b"[" * 100_000, "invalid_request", "chat body"),
        ({}, "invalid_request", "messages"),
        ({"messages": []}, "invalid_request", "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "invalid_request", "king"),
        ({**said("x"), "temperature": 9}, "invalid_request", "temperature"),
        ({**said("x"), "tools": []}, "invalid_request", "tools"),
        ({**said("x"), "model": "nope"}, "unknown_model", "nope"),
    ],
    ids=["bytes", "deep", "{}", "none", "role", "temperature", "tools", "model"],
)
async def test_a_bad_body_is_declined_by_name_and_hurts_nobody(
    body: object, code: str, named: str
) -> None:
    async with linked(EchoBackend(1000.0)) as (_, link):
        good = ask(link, said("I am fine"))
        with pytest.raises(RequestError, match=named) as caught:
            await events_of(ask(link, body))
        assert caught.value.code == code
        assert text_of(await events_of(good)) == "I am fine"


async def test_the_backend_hears_whose_a_turn_is() -> None:
    backend, store = ScriptedBackend(), TokenStore.open(None)
    gateway = Gateway(backend, tenant_of=lambda who: Tenant(who.name[:4], weight=2.5))
    hub = TurnHub(gateway.handle, store)
    hub.on_request(SilentReader(Request(b"\xab" * 16, json.dumps(said("x")).encode())))
    await asyncio.wait_for(backend.started.wait(), DEADLINE_S)
    (asker,) = backend.askers
    assert asker.tenant == Tenant("loca", 2.5)
    assert asker.buffered_s() == 0
    await hub.close()


async def test_cancelling_a_turn_closes_its_generation() -> None:
    backend = ScriptedBackend()
    async with linked(backend) as (server, link):
        turn = ask(link, said("x"))
        async with asyncio.timeout(DEADLINE_S):
            await backend.started.wait()
            turn.cancel()
            await backend.cancelled.wait()
        assert server.hub.generating == 0
        assert server.listener.connections == 1


async def test_a_client_that_leaves_closes_its_generation_after_the_grace_time() -> None:
    backend = ScriptedBackend()
    async with serving(backend, grace_s=0.01) as server:
        link = await connect(server.url)
        ask(link, said("x"))
        async with asyncio.timeout(DEADLINE_S):
            await backend.started.wait()
            await link.close()
            await backend.cancelled.wait()
        assert link.state is LinkState.CLOSED


async def test_a_fault_before_the_first_token_declines_the_turn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = ScriptedBackend()
    backend.behaviour = "fault"
    async with linked(backend) as (_, link):
        with pytest.raises(RequestError) as caught:
            await events_of(ask(link, said("x")))
        assert caught.value.code == "internal_error"
        assert "ZeroDivisionError" in caplog.text


async def test_a_fault_in_mid_answer_fails_that_turn_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = ScriptedBackend()
    async with linked(backend) as (_, link):
        other = ask(link, said("x"))
        await asyncio.wait_for(backend.started.wait(), DEADLINE_S)
        backend.behaviour = "fault later"
        events = await events_of(ask(link, said("x")))
        assert [type(event) for event in events] == [TextDelta, Failure, End]
        assert not other.is_over
        backend.behaviour = "failure"
        events = await events_of(ask(link, said("x")))
    assert [type(event) for event in events] == [TextDelta, Failure, End]
    assert isinstance(events[-1], End)
    assert events[-1].finish_reason == "error"


async def test_a_wrong_pin_is_refused_by_the_client() -> None:
    async with serving(EchoBackend()) as server:
        url = server.url
        with pytest.raises(ConnectionFailedError, match="certificate"):
            await connect(ServerUrl(url.host, url.port, "0" * 64))


async def test_without_a_pin_a_self_signed_certificate_is_refused() -> None:
    async with serving(EchoBackend()) as server:
        url = server.url
        with pytest.raises(ConnectionFailedError):
            await connect(ServerUrl(url.host, url.port))


async def test_a_name_that_cannot_be_one_is_a_connection_error() -> None:
    with pytest.raises(ConnectionFailedError, match="Check the name"):
        await connect(ServerUrl("a..b", 4433))


async def test_cancelling_wakes_whoever_reads_and_keeps_the_counters() -> None:
    backend = ScriptedBackend()
    async with linked(backend) as (_, link):
        turn = ask(link, said("x"))
        async with asyncio.timeout(DEADLINE_S):
            events = aiter(turn)
            assert await anext(events) == TextDelta("first")
            asyncio.get_running_loop().call_soon(turn.cancel)
            assert [event async for event in events] == []
        assert turn.stats.datagrams > 0


@pytest.mark.parametrize(
    ("host", "port", "advice"),
    [
        ("127.0.0.1", 65536, "--port"),
        ("127.0.0.1", -1, "--port"),
        ("192.0.2.1", 0, "--host"),  # an address for documentation, which no machine has
        ("no..name", 0, "--host"),
    ],
)
async def test_an_address_that_cannot_be_had(host: str, port: int, advice: str) -> None:
    certificate = make_certificate("127.0.0.1", datetime.datetime.now(datetime.UTC) - LONG_AGO)
    hub = TurnHub(Gateway(EchoBackend()).handle, TokenStore.open(None))
    try:
        with pytest.raises(ConfigurationError, match=advice):
            await listen(host, port, certificate=certificate, service=hub)
    finally:
        await hub.close()


async def test_nobody_listens_there() -> None:
    async with serving(EchoBackend()) as server:
        url = server.url
    with pytest.raises(ConnectionFailedError, match="eloquent serve"):
        await connect(url)


async def test_a_port_in_use_is_named() -> None:
    async with serving(EchoBackend()) as server:
        listener = server.listener
        certificate = make_certificate("127.0.0.1", datetime.datetime.now(datetime.UTC))
        with pytest.raises(ConfigurationError, match=str(listener.port)):
            await listen(
                "127.0.0.1",
                listener.port,
                certificate=certificate,
                service=server.hub,
            )


async def test_stray_packets_hurt_nobody() -> None:
    async with linked(EchoBackend(200.0)) as (server, link):
        listener = server.listener
        turn = ask(link, said("still well after all of that"))
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(
            asyncio.DatagramProtocol, remote_addr=("127.0.0.1", listener.port)
        )
        for size in (0, 1, 20, 1200, 1400):
            for first in (0x00, 0x40, 0x7F, 0x80, 0xC0, 0xFF):
                transport.sendto(bytes((first,)) + secrets.token_bytes(size))
                transport.sendto((bytes((first, 0, 0, 0, 1, 8)) + bytes(1500))[: size + 6])
        events = await events_of(turn)
        transport.close()
    assert text_of(events) == "still well after all of that"


async def test_the_server_says_goodbye_when_it_stops() -> None:
    backend = ScriptedBackend()
    async with linked(backend) as (server, link):
        turn = ask(link, said("x"))
        await asyncio.wait_for(backend.started.wait(), DEADLINE_S)
        await server.hub.close()
        events = await events_of(turn)
        assert [type(event) for event in events] == [TextDelta, Failure, End]
        assert isinstance(events[1], Failure)
        assert events[1].code == "unavailable"
        with pytest.raises(RequestError, match="shutting down"):
            await events_of(ask(link, said("x")))
