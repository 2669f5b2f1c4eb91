"""Long requests over narrow links take as long as they take; those that do not come are ended."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from rungs import CERTIFICATE, DELAY_S, PORT, URL, collect, now, text_of
from session_world import tokens
from telling import Telling
from websockets.asyncio.client import connect as connect_plainly
from websockets.frames import Frame, Opcode

from eloquent.core.channel import with_length
from eloquent.core.wire import REQUEST_S
from eloquent.link import Rung
from eloquent.quic.connect import QuicLink
from eloquent.quic.connect import connect as connect_quic
from eloquent.quic.listen import listen as listen_quic
from eloquent.quic.stream import CHANNEL_STREAM
from eloquent.session.session import Session
from eloquent.websocket.client import connect as connect_websocket
from eloquent.websocket.driver import SUBPROTOCOL
from eloquent.websocket.server import SILENT_S
from eloquent.websocket.server import listen as listen_websocket
from eloquent_netem.link import Link
from eloquent_netem.rate import FixedRate
from eloquent_netem.vloop import VirtualNetwork, run

WORDS = tokens(100)
LONG = bytes(900_000)
"Takes two minutes at 60 kbit/s."
PART = bytes(1000)
LIMIT_S = 300.0
"Of virtual time: who is given up asks again, for ever."

RUNGS = [pytest.param(rung, id=rung.name.lower()) for rung in Rung]


def narrow(bits_per_s: float = 200_000) -> VirtualNetwork:
    up = Link(delay_s=DELAY_S, seed=1, name="up", rate=FixedRate(bits_per_s))
    return VirtualNetwork.between(up, Link(delay_s=DELAY_S, seed=1, name="down"))


@asynccontextmanager
async def on_rung(network: VirtualNetwork, rung: Rung) -> AsyncIterator[Session]:
    telling = Telling(WORDS, 0.05)
    with network.on("server"):
        if rung is Rung.WEBSOCKET:
            over_tcp = await listen_websocket(
                "server", PORT, certificate=CERTIFICATE, service=telling
            )
            close = over_tcp.close
        else:
            over_udp = await listen_quic("server", PORT, certificate=CERTIFICATE, service=telling)
            close = over_udp.close
            if rung is Rung.STREAM:
                over_udp._configuration.max_datagram_frame_size = None
    session = Session(URL, connector=connect_websocket if rung is Rung.WEBSOCKET else connect_quic)
    try:
        yield session
    finally:
        await session.close()
        await close()


@pytest.mark.parametrize("rung", RUNGS)
def test_a_request_that_takes_long_is_answered(rung: Rung) -> None:
    network = narrow(60_000)

    async def main() -> str:
        async with on_rung(network, rung) as session:
            text = text_of(await collect(session.ask(LONG)))
            assert now() > REQUEST_S
            assert session.link is not None
            assert session.link.rung is rung
            return text

    assert run(main(), network, limit_s=LIMIT_S) == "".join(WORDS)


def test_a_channel_s_message_that_comes_too_slowly_ends_the_connection() -> None:
    network = narrow()

    async def main() -> float:
        async with on_rung(network, Rung.STREAM) as session:
            await collect(session.ask(b"{}"))
            link, began_s = session.link, now()
            assert isinstance(link, QuicLink)
            sent = with_length(PART)[: -len(PART)]
            while session.link is link:
                link._connection.quic.send_stream_data(CHANNEL_STREAM, sent)
                link.pump()
                sent = b"x"
                await asyncio.sleep(1.0)
            return now() - began_s

    assert REQUEST_S <= run(main(), network, limit_s=LIMIT_S) < REQUEST_S + 2.0


@pytest.mark.parametrize("is_last", [True, False])
def test_a_websocket_s_message_that_comes_too_slowly_ends_the_connection(*, is_last: bool) -> None:
    """It is one frame, or the first frames of many."""
    network = narrow()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE

    async def main() -> float:
        async with on_rung(network, Rung.WEBSOCKET):
            websocket = await connect_plainly(
                f"wss://server:{PORT}/", ssl=tls, subprotocols=[SUBPROTOCOL], proxy=None
            )
            began_s = now()
            frame = Frame(Opcode.BINARY, PART, fin=is_last).serialize(mask=True)
            sent = frame[: -len(PART)] if is_last else frame
            while not websocket.transport.is_closing():
                websocket.transport.write(sent)
                sent = b"x"
                if not is_last:
                    sent = Frame(Opcode.CONT, b"x", fin=False).serialize(mask=True)
                await asyncio.sleep(1.0)
            return now() - began_s

    assert REQUEST_S <= run(main(), network, limit_s=LIMIT_S) < REQUEST_S + SILENT_S + 2.0
