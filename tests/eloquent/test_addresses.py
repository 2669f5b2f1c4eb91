"""How many connections an address may have, and what counts as one."""

import asyncio

import pytest
import rungs
from half_open import HalfOpen, sent_by
from session_world import URL, World, in_world, read, tokens
from telling import Telling

from eloquent.addresses import Sites, first_of_largest, site_of
from eloquent.errors import ConnectionFailedError
from eloquent.handshakes import HANDSHAKE_S
from eloquent.quic import listen as quic_listen
from eloquent.quic.connect import connect as connect_quic
from eloquent.session.session import Session
from eloquent.websocket import server as websocket
from eloquent.websocket.client import connect as connect_websocket
from eloquent_netem.vloop import VirtualNetwork

MOST = 5
ALL = "".join(tokens(100))


@pytest.mark.parametrize(
    ("host", "site"),
    [
        ("198.51.100.7", "198.51.100.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::", "2001:db8:1:3::/64"),
        ("::ffff:198.51.100.7", "198.51.100.7"),
        ("fe80::1%eth0", "fe80::/64"),
        ("server", "server"),
        ("", ""),
    ],
)
def test_ipv6_counts_by_network(host: str, site: str) -> None:
    assert site_of(host) == site


def test_sites_forget_what_is_over() -> None:
    sites: Sites[int] = Sites(2)
    sites.begin(1, "2001:db8::1")
    sites.begin(2, "2001:db8::2")
    assert not sites.has_room("2001:db8::3")
    assert sites.has_room("2001:db8:0:1::3")
    sites.done(1)
    sites.done(1)
    assert sites.has_room("2001:db8::3")
    sites.done(2)
    assert (len(sites), sites._counts) == (0, {})


def test_an_address_has_so_many_quic_connections_and_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(quic_listen, "MAX_PER_ADDRESS", MOST)

    async def play(world: World) -> tuple[int, int, str, int]:
        assert world.listener is not None
        sent_by(world.listener)
        for number in range(4 * MOST):
            HalfOpen(world.listener, number * 250)  # the ports differ, and the address does not
        half_open, refused = world.listener.connections, world.listener.counts.refused
        text = await read(world.session.ask(b"{}"))
        await world.session.close()
        await asyncio.sleep(HANDSHAKE_S)
        return half_open, refused, text, len(world.listener._sites)

    half_open, refused, text, left = in_world(play)
    assert (half_open, refused) == (MOST, 3 * MOST)
    assert text == ALL
    assert left == 0
    assert len(caplog.messages) == 1


def test_the_first_of_the_largest_site_is_found() -> None:
    among = [("a", "x"), ("b", "y"), ("c", "y"), ("d", "z"), ("e", "z")]
    assert first_of_largest(among) == "b"
    assert first_of_largest([]) is None


def test_a_full_server_ends_the_oldest_idle_connection_for_a_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quic_listen, "MAX_CONNECTIONS", 2)

    async def play(world: World) -> list[str]:
        assert world.listener is not None
        sessions = [Session(URL, connector=connect_quic) for _ in range(3)]
        texts = []
        for session in sessions:
            texts.append(await read(session.ask(b"{}")))
            await asyncio.sleep(1.0)
            assert session.link is not None
        assert sessions[0].link is None
        assert sessions[1].link is not None
        assert world.listener.counts.given_up == 1
        texts.append(await read(sessions[0].ask(b"{}")))
        for session in sessions:
            await session.close()
        return texts

    assert in_world(play) == [ALL] * 4


def test_a_full_server_ends_no_connection_on_which_a_turn_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quic_listen, "MAX_CONNECTIONS", 2)

    async def play(world: World) -> list[str]:
        assert world.listener is not None
        sessions = [Session(URL, connector=connect_quic) for _ in range(2)]
        reading = [asyncio.ensure_future(read(session.ask(b"{}"))) for session in sessions]
        await asyncio.sleep(1.0)
        with pytest.raises(ConnectionFailedError):
            await read(world.session.ask(b"{}"))
        assert world.listener.counts.refused > 0
        texts = await asyncio.gather(*reading)
        texts.append(await read(world.session.ask(b"{}")))
        for session in sessions:
            await session.close()
        return texts

    assert in_world(play) == [ALL] * 3


def test_an_address_has_so_many_websockets_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "MAX_PER_ADDRESS", MOST)

    async def main(network: VirtualNetwork) -> tuple[int, int, str, int]:
        with network.on("server"):
            listener = await websocket.listen(
                "server",
                rungs.PORT,
                certificate=rungs.CERTIFICATE,
                service=Telling(tokens(100), 0.05),
            )
        opened = [await asyncio.open_connection("server", rungs.PORT) for _ in range(2 * MOST)]
        await asyncio.sleep(1.0)
        refused = sum(reader.exception() is not None or reader.at_eof() for reader, _ in opened)
        for _, writer in opened:
            writer.close()
        await asyncio.sleep(1.0)
        session = Session(rungs.URL, connector=connect_websocket)
        text = rungs.text_of(await rungs.collect(session.ask(b"{}")))
        await session.close()
        await asyncio.sleep(1.0)
        left = len(listener._sites)
        await listener.close()
        return refused, listener.counts.refused, text, left

    refused, counted, text, left = rungs.virtually(main)
    assert (refused, counted) == (MOST, MOST)
    assert text == ALL
    assert left == 0


def test_who_begins_many_handshakes_makes_room_with_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quic_listen, "RETRY_FROM", 0)
    monkeypatch.setattr(quic_listen, "MAX_HANDSHAKES", 4)

    async def play(world: World) -> set[str]:
        assert world.listener is not None
        sent = sent_by(world.listener)
        for number in (1, 2, *range(0, 5000, 250)):
            sent.clear()
            client = HalfOpen(world.listener, number)
            client.answer(sent[0][0])
        return {site for _, site in world.listener._handshakes._pending.values()}

    assert in_world(play) == {"198.51.100.0", "198.51.100.1", "198.51.100.2"}
