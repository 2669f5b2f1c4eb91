"""Requests and handshakes that are begun and not finished: they hold little, and not for ever."""

import asyncio
from functools import partial

import pytest
import rungs
from half_open import HalfOpen, sent_by
from session_world import URL, World, in_world, now, read, tokens
from telling import Telling

from eloquent.core.receiver import Receiver
from eloquent.core.wire import REQUEST_S, Request, encode_request
from eloquent.errors import RequestError
from eloquent.handshakes import HANDSHAKE_S
from eloquent.quic import listen as quic_listen
from eloquent.quic.connect import QuicLink
from eloquent.quic.connect import connect as connect_quic
from eloquent.quic.listen import RETRY_FROM
from eloquent.session.session import Session
from eloquent.websocket import server as websocket
from eloquent.websocket.client import connect as connect_websocket
from eloquent_netem.vloop import VirtualNetwork

ALL = "".join(tokens(100))


def test_a_request_that_is_never_finished_is_declined_by_name() -> None:
    async def play(world: World) -> tuple[str, float, int]:
        failed: list[tuple[float, Exception]] = []
        whole = asyncio.ensure_future(read(world.session.ask(b"{}")))
        await asyncio.sleep(1.0)
        link = world.session.link
        assert isinstance(link, QuicLink)
        world.session.on_turn_failed = lambda _link, _turn, error: failed.append((now(), error))  # type: ignore[method-assign]
        raw = encode_request(Request(bytes(16), b"{}" * 100, bytes(16)))
        turn = link._connection.quic.get_next_available_stream_id() // 4
        link._connection._receivers[turn] = Receiver(turn)
        link._connection._replies[turn] = bytearray()
        link._connection.quic.send_stream_data(4 * turn, raw[:-1], end_stream=False)
        begun_s = now()
        link.pump()
        text = await whole
        await asyncio.sleep(REQUEST_S + 5.0)
        ((failed_s, error),) = failed
        assert isinstance(error, RequestError)
        assert error.code == "request_timeout"
        (peer,) = world.listener._peers  # type: ignore[union-attr]
        return text, failed_s - begun_s, len(peer.connection._requests)

    text, waited_s, held = in_world(play)
    assert text == ALL
    assert REQUEST_S <= waited_s < REQUEST_S + 0.3
    assert held == 0


def test_handshakes_from_made_up_addresses_leave_room_for_those_that_are_meant() -> None:
    async def play(world: World) -> tuple[int, str, int]:
        assert world.listener is not None
        sent = sent_by(world.listener)
        for number in range(3 * RETRY_FROM):
            HalfOpen(world.listener, number)
        half_open = world.listener.connections
        assert len(sent) >= 2 * RETRY_FROM  # a Retry each
        text = await read(world.session.ask(b"{}"))
        await asyncio.sleep(HANDSHAKE_S)
        return half_open, text, world.listener.connections

    half_open, text, left = in_world(play)
    assert half_open == RETRY_FROM
    assert text == ALL
    assert left == 1


def test_the_oldest_handshake_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quic_listen, "RETRY_FROM", 2)
    monkeypatch.setattr(quic_listen, "MAX_HANDSHAKES", 10)

    async def play(world: World) -> tuple[int, str, int]:
        assert world.listener is not None
        sent = sent_by(world.listener)
        for number in range(40):
            sent.clear()
            client = HalfOpen(world.listener, number)
            if number >= 2:
                ((retry, _),) = sent
                client.answer(retry)
            await asyncio.sleep(0.001)
        half_open = world.listener.connections
        text = await read(world.session.ask(b"{}"))
        await asyncio.sleep(HANDSHAKE_S)
        assert len(world.listener._routes) == len(next(iter(world.listener._peers)).connection_ids)
        return half_open, text, world.listener.connections

    half_open, text, left = in_world(play)
    assert half_open == 10
    assert text == ALL
    assert left == 1


def test_a_made_up_token_begins_nothing() -> None:
    async def play(world: World) -> int:
        assert world.listener is not None
        sent = sent_by(world.listener)
        for number in range(RETRY_FROM + 1):
            HalfOpen(world.listener, number)
        retry = sent[-1][0]
        HalfOpen(world.listener, 999).answer(retry)  # a token for another address
        return world.listener.connections

    assert in_world(play) == RETRY_FROM


def is_over(reader: asyncio.StreamReader) -> bool:
    return reader.exception() is not None or reader.at_eof()


@pytest.mark.parametrize("sent", [b"", bytes.fromhex("1603010200010001fc0303")])
def test_tls_handshakes_that_are_not_finished_are_few_and_leave_room(
    monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """They say nothing at all, or begin a ClientHello."""
    most = 20
    monkeypatch.setattr(websocket, "MAX_HANDSHAKES", most)

    async def main(network: VirtualNetwork) -> tuple[int, int, str, int]:
        with network.on("server"):
            listener = await websocket.listen(
                "server",
                rungs.PORT,
                certificate=rungs.CERTIFICATE,
                service=Telling(tokens(100), 0.05),
            )
        opened = []
        for _ in range(2 * most):
            reader, writer = await asyncio.open_connection("server", rungs.PORT)
            writer.write(sent)
            opened.append((reader, writer))
        await asyncio.sleep(1.0)
        half_open = len(listener._handshakes)
        closed = sum(is_over(reader) for reader, _ in opened)
        session = Session(rungs.URL, connector=connect_websocket)
        text = rungs.text_of(await rungs.collect(session.ask(b"{}")))
        await asyncio.sleep(HANDSHAKE_S)
        left = len(listener._handshakes)
        for _, writer in opened:
            writer.close()
        await session.close()
        await listener.close()
        return half_open, closed, text, left

    half_open, closed, text, left = rungs.virtually(main)
    assert half_open == most
    assert closed == most
    assert text == ALL
    assert left == 0


def test_a_server_that_stops_ends_half_open_connections() -> None:
    async def main(network: VirtualNetwork) -> bool:
        with network.on("server"):
            listener = await websocket.listen(
                "server", rungs.PORT, certificate=rungs.CERTIFICATE, service=Telling([], 0.0)
            )
        reader, writer = await asyncio.open_connection("server", rungs.PORT)
        await asyncio.sleep(1.0)
        await listener.close()
        await asyncio.sleep(1.0)
        writer.close()
        return is_over(reader)

    assert rungs.virtually(main)


def test_a_client_that_has_to_show_its_address_may_have_a_ticket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quic_listen, "RETRY_FROM", 0)

    async def play(world: World) -> list[str]:
        texts = [await read(world.session.ask(b"{}"))]
        await world.session.close()
        again = Session(URL, connector=partial(connect_quic, tickets=world.tickets))
        texts.append(await read(again.ask(b"{}")))
        assert isinstance(again.link, QuicLink)
        assert again.link._connection.quic.tls.session_resumed
        await again.close()
        return texts

    assert in_world(play) == [ALL, ALL]
