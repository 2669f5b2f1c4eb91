"""The middle rung: a server that takes no datagrams, and one that meets such clients."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import StreamDataReceived
from rungs import CERTIFICATE, DELAY_S, PORT, RTT_S, URL, collect, now, racing, text_of, virtually
from telling import Telling

from eloquent.core.channel import MESSAGE_OPEN, with_length
from eloquent.core.events import End, Event
from eloquent.core.turns import SLOW_READER_S, TurnRequested
from eloquent.core.wire import Request, encode_request
from eloquent.errors import RequestError
from eloquent.link import Rung
from eloquent.quic.client import ClientConnection, client_configuration
from eloquent.quic.connect import connect
from eloquent.quic.listen import Listener, listen
from eloquent.quic.server import ServerConnection, server_configuration
from eloquent.quic.stream import CHANNEL_MARK, CHANNEL_STREAM
from eloquent.session.session import Session
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import IndependentLoss
from eloquent_netem.packet import Packet
from eloquent_netem.vloop import VirtualNetwork, run

TOKENS = [f"token {index} " for index in range(200)]
TEXT = "".join(TOKENS)


@asynccontextmanager
async def serving(network: VirtualNetwork, telling: Telling) -> AsyncIterator[Listener]:
    """Serve without datagrams."""
    with network.on("server"):
        listener = await listen("server", PORT, certificate=CERTIFICATE, service=telling)
    listener._configuration.max_datagram_frame_size = None
    try:
        yield listener
    finally:
        await listener.close()


async def whole_turn(network: VirtualNetwork, telling: Telling) -> list[Event]:
    async with serving(network, telling):
        session = Session(URL, connector=connect)
        events = await collect(session.ask(b"{}"))
        assert session.link is not None
        assert session.link.rung is Rung.STREAM
        await asyncio.sleep(1)
        assert len(telling.gone) == 1
        assert telling.cancelled == []
        await session.close()
        return events


def test_a_server_that_refuses_datagrams_answers_by_a_stream() -> None:
    async def main(network: VirtualNetwork) -> None:
        events = await whole_turn(network, Telling(TOKENS, 0.05))
        assert text_of(events) == TEXT
        assert isinstance(events[-1], End)

    virtually(main)


def test_the_race_takes_the_stream_too() -> None:
    async def main(network: VirtualNetwork) -> None:
        async with serving(network, Telling(TOKENS, 0.05)):
            session = racing()
            async for _ in session.ask(b"{}"):
                break
            assert now() == pytest.approx(2 * RTT_S, abs=2e-3)
            assert session.link is not None
            assert session.link.rung is Rung.STREAM
            await session.close()

    virtually(main)


@pytest.mark.parametrize("seed", range(5))
def test_over_a_lossy_link_all_comes_once(seed: int) -> None:
    print(f"seed {seed}")  # noqa: T201
    links = [
        Link(
            delay_s=DELAY_S,
            seed=seed,
            name=name,
            loss=IndependentLoss(0.1, stage_rng(seed, name, "loss")),
        )
        for name in ("up", "down")
    ]
    network = VirtualNetwork.between(*links)
    assert text_of(run(whole_turn(network, Telling(TOKENS, 0.05)), network)) == TEXT


def test_a_long_answer_that_is_there_at_once() -> None:
    tokens = ["x" * 10_000] * 100

    async def main(network: VirtualNetwork) -> None:
        assert len(text_of(await whole_turn(network, Telling(tokens, 0.0)))) == 1_000_000

    virtually(main)


def test_turns_at_once_share_the_stream() -> None:
    async def main(network: VirtualNetwork) -> None:
        async with serving(network, Telling(TOKENS, 0.01)):
            session = Session(URL, connector=connect)
            answers = await asyncio.gather(*(collect(session.ask(b"{}")) for _ in range(150)))
            assert {text_of(events) for events in answers} == {TEXT}
            await session.close()

    virtually(main)


def test_a_cancel_reaches_the_server() -> None:
    async def main(network: VirtualNetwork) -> None:
        telling = Telling(TOKENS, 0.05)
        async with serving(network, telling):
            session = Session(URL, connector=connect)
            turn = session.ask(b"{}")
            async for _ in turn:
                break
            turn.cancel()
            await asyncio.sleep(DELAY_S + 0.005)
            assert len(telling.cancelled) == 1
            await session.close()

    virtually(main)


def test_a_reader_that_takes_nothing_is_told_so() -> None:
    async def main(network: VirtualNetwork) -> None:
        async with serving(network, Telling(["x" * 10_000] * 100, 0.0)):
            session = Session(URL, connector=connect)
            turn = session.ask(b"{}")
            async for _ in turn:
                break
            await asyncio.sleep(SLOW_READER_S + 2)
            with pytest.raises(RequestError, match="Nothing of the answer was read"):
                await collect(turn)
            await session.close()

    virtually(main)


def test_a_silent_model_is_no_dead_link_and_an_outage_is_survived() -> None:
    def drops(time: float, packet: Packet) -> bool:
        return 40 < time < 50

    async def main(network: VirtualNetwork) -> None:
        async with serving(network, Telling(["one ", "two ", "three"], 30.0)):
            session = Session(URL, connector=connect)
            assert text_of(await collect(session.ask(b"{}"))) == "one two three"
            await session.close()

    virtually(main, drops)


def broken(*writes: tuple[int, bytes, bool]) -> str:
    """Write to the streams of a connection; return why the server ended it."""

    async def main(network: VirtualNetwork) -> str:
        async with serving(network, Telling(TOKENS, 0.05)) as listener:
            session = Session(URL, connector=connect)
            await session.connect()
            connection: ClientConnection = session.link._connection  # type: ignore[union-attr]
            for stream_id, data, is_end in writes:
                connection.quic.send_stream_data(stream_id, data, end_stream=is_end)
            reasons: list[str] = []
            session.on_link_ended = lambda link, error: reasons.append(str(error))  # type: ignore[method-assign]
            session.link.pump()  # type: ignore[union-attr]
            await asyncio.sleep(1)
            assert listener.connections == 0 or reasons
            await session.close()
            return reasons[0]

    return virtually(main)


def test_what_breaks_the_protocol_ends_the_connection() -> None:
    # The client's own mark has made the first stream a channel.
    assert "unknown type" in broken((0, with_length(b"\x09"), False))
    assert "longer than the protocol allows" in broken((0, b"\xbf\xff\xff\xff", False))
    assert "another one beside it" in broken((4, encode_request(Request(bytes(16), b"{}")), True))
    assert "stream ended" in broken((0, b"", True))


def test_a_client_that_takes_no_datagrams_and_opens_no_channel_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_datagrams(server_name: str, *, pin: str | None) -> QuicConfiguration:
        configuration = client_configuration(server_name, pin=pin)
        configuration.max_datagram_frame_size = None
        return configuration

    monkeypatch.setattr("eloquent.quic.connect.client_configuration", without_datagrams)

    async def main(network: VirtualNetwork) -> None:
        with network.on("server"):
            listener = await listen(
                "server", PORT, certificate=CERTIFICATE, service=Telling(TOKENS, 0.05)
            )
        session = Session(URL, connector=connect)
        with pytest.raises(RequestError, match="takes no QUIC datagrams") as caught:
            await collect(session.ask(b"{}"))
        assert caught.value.code == "malformed_request"
        await session.close()
        await listener.close()

    virtually(main)


def test_what_a_channel_asks_before_the_handshake_is_done_waits_for_it() -> None:
    """It may be what somebody else sent before, repeated (0-RTT)."""
    connection = ServerConnection(
        server_configuration(CERTIFICATE), original_destination_connection_id=bytes(8)
    )
    request = Request(bytes(16), b"{}")
    opening = with_length(bytes((MESSAGE_OPEN, 0)) + encode_request(request))
    connection._on_stream_event(StreamDataReceived(CHANNEL_MARK + opening, False, CHANNEL_STREAM))
    assert connection.next_event() is None
    connection._on_handshake_completed()
    assert connection.next_event() == TurnRequested(0, request)


def test_the_mark_is_no_version_of_a_request() -> None:
    assert not encode_request(Request(bytes(16), b"")).startswith(CHANNEL_MARK)
