"""Stateless resets: who gets one, who believes one (RFC 9000 section 10.3)."""

import asyncio
import datetime

from session_world import SERVER, World, in_world, now, read, tokens
from virtual_hosts import Inbox, opened

from eloquent.quic.certificate import make_certificate
from eloquent.quic.reset import (
    MAX_RESET_BYTES,
    MIN_RESET_BYTES,
    RESETS_PER_S,
    TOKEN_BYTES,
    ResetKey,
    ResetLimit,
)
from eloquent.session.states import LinkState

CERTIFICATE = make_certificate("server", datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
PORT = 4433
ALL = "".join(tokens(100))


def test_a_token_is_the_same_after_a_restart_and_another_for_another_id_or_server() -> None:
    key = ResetKey.of(CERTIFICATE.private_key)
    again = ResetKey.of(CERTIFICATE.private_key)
    other = ResetKey.of(
        make_certificate("server", datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)).private_key
    )
    assert key.token(b"12345678") == again.token(b"12345678")
    assert key.token(b"12345678") != key.token(b"12345679")
    assert key.token(b"12345678") != other.token(b"12345678")
    assert len(key.token(b"")) == TOKEN_BYTES


def test_a_reset_is_smaller_than_its_packet_and_looks_like_one() -> None:
    key = ResetKey(b"key")
    for size in range(1500):
        reset = key.reset(b"12345678", size)
        if size <= MIN_RESET_BYTES:
            assert reset is None
        else:
            assert reset is not None
            assert MIN_RESET_BYTES <= len(reset) <= min(size - 1, MAX_RESET_BYTES)
            assert reset[0] & 0xC0 == 0x40
            assert reset.endswith(key.token(b"12345678"))


def test_two_resets_of_one_connection_differ_but_for_the_token() -> None:
    key = ResetKey(b"key")
    first, second = key.reset(b"12345678", 100), key.reset(b"12345678", 100)
    assert first is not None
    assert second is not None
    assert first[:-TOKEN_BYTES] != second[:-TOKEN_BYTES]


def test_resets_are_limited_in_rate() -> None:
    limit = ResetLimit()
    assert sum(limit.allows(10.0) for _ in range(5000)) == RESETS_PER_S
    assert sum(limit.allows(10.1) for _ in range(5000)) <= RESETS_PER_S / 10


def test_the_listener_answers_stray_packets_with_smaller_ones_and_the_rest_with_nothing() -> None:
    async def play(world: World) -> list[int]:
        transport, inbox = await opened(Inbox, remote_addr=(SERVER, PORT))
        for packet in (
            b"\x40" + b"12345678" + bytes(91),  # a packet of a connection that is not known
            b"\x40" + b"12345678" + bytes(12),  # too small for a smaller answer
            b"\x00" + b"12345678" + bytes(91),  # no QUIC
            b"\xc0\x00\x00\x00\x01\x08" + b"12345678" + bytes(91),  # a long header
        ):
            transport.sendto(packet)
            await asyncio.sleep(0.01)
        await asyncio.sleep(1.0)
        transport.close()
        return [len(data) for _, data, _ in inbox.items]

    assert in_world(play) == [MAX_RESET_BYTES]


def test_a_reset_with_another_token_ends_nothing() -> None:
    async def play(world: World) -> tuple[str, list[LinkState]]:
        reading = asyncio.ensure_future(read(world.session.ask(b"{}")))
        await asyncio.sleep(1.0)
        (port,) = world.up.ports
        assert world.listener is not None
        world.listener.send(b"\x40" + bytes(41), ("192.0.2.1", port))
        return await reading, world.seen()

    text, states = in_world(play)
    assert text == ALL
    assert states == [LinkState.CONNECTING, LinkState.UP]


def test_a_client_in_mid_answer_learns_of_a_restart_with_its_next_packet() -> None:
    async def play(world: World) -> float:
        reading = asyncio.ensure_future(read(world.session.ask(b"{}")))
        await asyncio.sleep(2.0)
        await world.kill_server()
        await world.start_server()
        restarted_s = now()
        assert world.session.link is not None
        world.session.link.probe()
        world.session.link.pump()
        await reading
        return world.time_of(LinkState.RECONNECTING) - restarted_s

    assert in_world(play) < 0.1 + 0.01
