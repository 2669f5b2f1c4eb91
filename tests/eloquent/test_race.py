"""The fallback ladder: QUIC and WebSocket race, in virtual time; UDP is blocked, or comes back."""

import asyncio
import dataclasses
import socket
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rungs import (
    CERTIFICATE,
    RTT_S,
    URL,
    Drops,
    Filter,
    collect,
    nothing,
    now,
    racing,
    serving,
    text_of,
    udp,
    udp_between,
    virtually,
)
from session_world import FakeMachine, until
from telling import Telling

from eloquent.core.events import End, Event
from eloquent.errors import ConnectionFailedError, ServerRefusedError
from eloquent.link import STAGGER_S, Rung
from eloquent.quic.connect import connect as connect_quic
from eloquent.quic.listen import listen as listen_quic
from eloquent.session.race import MAX_ADDRESSES, in_turn
from eloquent.session.retries import (
    CLIMB_EVERY_S,
    CLIMB_FIRST_S,
    CLIMB_GOOD_S,
    CLIMB_MAX_S,
    Climbs,
)
from eloquent.session.session import Session
from eloquent.session.states import LinkState
from eloquent.session.turn import ClientTurn
from eloquent.websocket.client import connect as connect_websocket
from eloquent.websocket.server import listen as listen_websocket
from eloquent_netem.packet import Packet
from eloquent_netem.tcp.segment import TcpPacket
from eloquent_netem.vloop import VirtualNetwork, run
from eloquent_netem.vloop_network import Datagram

TOKENS = [f"token {index} " for index in range(200)]
TEXT = "".join(TOKENS)
GAP_S = 0.05
BLOCKED_UDP_COST_S = 0.3
"What a path without UDP may cost at connect, over a client that knows TCP only."


def rung_of(session: Session) -> Rung | None:
    return session.link.rung if session.link is not None else None


def first_token_s(make: Callable[[], Session], drops: Drops) -> tuple[float, Rung | None]:
    """Return how long the first token takes, and by what it came."""

    async def main(network: VirtualNetwork) -> tuple[float, Rung | None]:
        async with serving(network, Telling(TOKENS, GAP_S)):
            session = make()
            turn = session.ask(b"{}")
            async for _ in turn:
                break
            took = now(), rung_of(session)
            await session.close()
            return took

    return virtually(main, drops)


def whole_turn(
    drops: Drops, *, tokens: list[str] = TOKENS, gap_s: float = GAP_S
) -> tuple[list[Event], list[tuple[float, Rung]]]:
    """Return a turn's events, and when which rungs came into use."""
    rungs: list[tuple[float, Rung]] = []

    async def main(network: VirtualNetwork) -> list[Event]:
        async with serving(network, Telling(tokens, gap_s)):
            session = racing()
            events = []
            async for event in session.ask(b"{}"):
                events.append(event)
                rung = rung_of(session)
                if rung is not None and (not rungs or rungs[-1][1] is not rung):
                    rungs.append((now(), rung))
            await session.close()
            return events

    return virtually(main, drops), rungs


# At connect.


def test_where_udp_passes_nothing_is_sent_by_tcp() -> None:
    seen: list[Packet] = []

    def watch(time: float, packet: Packet) -> bool:
        if isinstance(packet, TcpPacket):
            seen.append(packet)
        return False

    took, rung = first_token_s(racing, watch)
    assert rung is Rung.DATAGRAMS
    assert took == pytest.approx(2 * RTT_S, abs=2e-3)
    assert seen == []


def test_a_path_without_udp_costs_no_more_than_300_ms() -> None:
    alone, _ = first_token_s(lambda: Session(URL, connector=connect_websocket), udp)
    raced, rung = first_token_s(racing, udp)
    print(f"TCP only {alone * 1e3:.0f} ms, raced {raced * 1e3:.0f} ms")  # noqa: T201
    assert rung is Rung.WEBSOCKET
    assert 0 < raced - alone <= BLOCKED_UDP_COST_S


def test_a_path_without_udp_costs_nothing_the_second_time() -> None:
    async def main(network: VirtualNetwork) -> None:
        async with serving(network, Telling(["one"], 0.0)):
            session = racing()
            await collect(session.ask(b"{}"))
            assert session.link is not None
            session.on_link_ended(session.link, ConnectionFailedError("lost"))
            before = now()
            await collect(session.ask(b"{}"))
            assert now() - before == pytest.approx(4 * RTT_S, abs=5e-3)
            await session.close()

    virtually(main, udp)


def test_where_udp_is_refused_tcp_starts_at_once() -> None:
    async def main(network: VirtualNetwork) -> None:
        async with serving(network, Telling(TOKENS, GAP_S), has_quic=False):
            session = racing()
            async for _ in session.ask(b"{}"):
                break
            assert now() == pytest.approx(5 * RTT_S, abs=2e-3)
            assert rung_of(session) is Rung.WEBSOCKET
            await session.close()

    virtually(main)


def test_a_server_without_websocket_is_reached_by_quic() -> None:
    async def main(network: VirtualNetwork) -> None:
        async with serving(network, Telling(TOKENS, GAP_S), has_websocket=False):
            session = racing()
            assert text_of(await collect(session.ask(b"{}"))) == TEXT
            assert rung_of(session) is Rung.DATAGRAMS
            await session.close()

    virtually(main)


def test_udp_that_is_slow_and_not_blocked_wins_where_it_is_ready_first() -> None:
    """The client's first packet is lost: QUIC sends it again while TCP is on its way."""
    lost: list[Packet] = []

    def first_is_lost(time: float, packet: Packet) -> bool:
        if not lost and udp(time, packet):
            lost.append(packet)
            return True
        return False

    took, rung = first_token_s(racing, first_is_lost)
    assert rung is Rung.DATAGRAMS
    assert took < STAGGER_S + 4 * RTT_S


# In mid-turn.


def test_udp_blocked_in_mid_turn() -> None:
    events, rungs = whole_turn(udp_between(3.0, 1e9))
    assert text_of(events) == TEXT
    assert isinstance(events[-1], End)
    assert [rung for _, rung in rungs] == [Rung.DATAGRAMS, Rung.WEBSOCKET]
    # Noticed within 2 s, then the race.
    assert 3.0 < rungs[1][0] < 3.0 + 2.0 + STAGGER_S + 5 * RTT_S


@pytest.mark.parametrize("start_s", [0.0, 0.06, 0.11, 2.0])
def test_udp_that_comes_back_is_climbed_back_to_and_nothing_is_lost_or_repeated(
    start_s: float,
) -> None:
    events, rungs = whole_turn(udp_between(start_s, 8.0), tokens=TOKENS * 3)
    assert text_of(events) == TEXT * 3
    assert rungs[-1][1] is Rung.DATAGRAMS
    assert rungs[-2][1] is Rung.WEBSOCKET
    assert rungs[-1][0] - rungs[-2][0] == pytest.approx(CLIMB_FIRST_S + RTT_S, abs=0.2)


def test_a_change_of_network_brings_the_climb_at_once() -> None:
    async def main(network: VirtualNetwork) -> None:
        async with serving(network, Telling(TOKENS, GAP_S)):
            machine = FakeMachine()
            session = racing(machine=machine)
            reading = asyncio.ensure_future(collect(session.ask(b"{}")))
            await asyncio.sleep(3.0)
            assert rung_of(session) is Rung.WEBSOCKET
            machine.change("wlan")  # addresses came and went, and the way is the same
            await asyncio.sleep(0.2)
            assert rung_of(session) is Rung.DATAGRAMS
            assert text_of(await reading) == TEXT
            await session.close()

    virtually(main, udp_between(0.0, 2.0))


def test_another_network_with_udp_is_used_at_once() -> None:
    async def main(network: VirtualNetwork) -> None:
        async with serving(network, Telling(TOKENS, GAP_S)):
            machine = FakeMachine()
            session = racing(machine=machine)
            reading = asyncio.ensure_future(collect(session.ask(b"{}")))
            await asyncio.sleep(3.0)
            machine.change("cellular")
            await asyncio.sleep(2.0)
            assert rung_of(session) is Rung.DATAGRAMS
            assert text_of(await reading) == TEXT
            await session.close()

    virtually(main, udp_between(0.0, 2.0))


def test_a_climb_that_fails_is_tried_again_a_minute_later() -> None:
    events, rungs = whole_turn(udp_between(0.0, 30.0), tokens=TOKENS * 10)
    assert text_of(events) == TEXT * 10
    assert [rung for _, rung in rungs] == [Rung.WEBSOCKET, Rung.DATAGRAMS]
    # The first attempt ends at its own timeout of 5 s.
    assert rungs[1][0] == pytest.approx(CLIMB_FIRST_S + 5 + CLIMB_EVERY_S, abs=1)


def test_udp_that_dies_after_each_climb_is_climbed_to_ever_later() -> None:
    """A firewall that lets UDP pass for five seconds after it has not seen any for a while."""
    opened_s = last_s = -10.0

    def drops(time: float, packet: Packet) -> bool:
        nonlocal opened_s, last_s
        if not isinstance(packet, Datagram):
            return False
        if packet.destination[1] == URL.port:  # the server goes on sending for a while
            opened_s, last_s = time if time - last_s > 5.0 else opened_s, time
        return time >= opened_s + 5.0

    events, rungs = whole_turn(drops, tokens=TOKENS * 3, gap_s=0.4)
    assert text_of(events) == TEXT * 3
    falls = [time for time, rung in rungs if rung is Rung.WEBSOCKET]
    climbs = [time for time, rung in rungs[1:] if rung is Rung.DATAGRAMS]
    waits = [climb - fall for fall, climb in zip(falls, climbs, strict=False)]
    assert [round(wait_s, -1) for wait_s in waits] == [10, 20, 40, 80]


@pytest.mark.parametrize(("source", "waits"), [("wlan", False), ("cellular", True)])
def test_a_late_climb_heeds_another_network_and_not_just_any_change(
    source: str, waits: bool
) -> None:
    async def main(network: VirtualNetwork) -> Rung | None:
        async with serving(network, Telling(TOKENS * 10, GAP_S)):
            machine = FakeMachine()
            session = racing(machine=machine)
            reading = asyncio.ensure_future(collect(session.ask(b"{}")))
            await asyncio.sleep(35.0)  # fallen at 5 and 20 s; the next climb is due at 40
            assert rung_of(session) is Rung.WEBSOCKET
            machine.change(source)
            await asyncio.sleep(2.0)
            rung = rung_of(session)
            reading.cancel()
            await session.close()
            return rung

    def drops(time: float, packet: Packet) -> bool:
        return udp(time, packet) and (3.0 <= time < 6.0 or 18.0 <= time < 30.0)

    assert (virtually(main, drops) is Rung.DATAGRAMS) is waits


def test_climbs_come_soon_again_after_a_long_good_time() -> None:
    climbs = Climbs()
    assert climbs.on_fall(0.0) == CLIMB_FIRST_S  # QUIC was never there
    climbs.on_quic(10.0)
    assert climbs.on_fall(20.0) == CLIMB_FIRST_S
    for count in range(1, 20):
        climbs.on_quic(1000.0 * count)
        wait_s = climbs.on_fall(1000.0 * count + 5.0)
        assert wait_s == min(CLIMB_FIRST_S * 2**count, CLIMB_MAX_S)
    climbs.on_quic(1e6)
    climbs.on_quic(1e6 + 299.0)  # another connection
    assert climbs.on_fall(1e6 + CLIMB_GOOD_S) == CLIMB_FIRST_S


def test_udp_and_tcp_blocked_by_turns() -> None:
    def drops(time: float, packet: Packet) -> bool:
        is_udp_off = int(time) % 8 < 4
        return is_udp_off if udp(time, packet) else not is_udp_off

    events, rungs = whole_turn(drops, tokens=TOKENS * 3)
    assert text_of(events) == TEXT * 3
    assert {rung for _, rung in rungs} == {Rung.DATAGRAMS, Rung.WEBSOCKET}


OUTAGES = st.lists(
    st.tuples(st.sampled_from(["udp", "tcp", "both"]), st.floats(0.0, 30.0), st.floats(0.01, 8.0)),
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(OUTAGES)
def test_whatever_is_blocked_and_when_all_comes_once(
    outages: list[tuple[str, float, float]],
) -> None:
    def drops(time: float, packet: Packet) -> bool:
        kind = "udp" if udp(time, packet) else "tcp"
        return any(
            what in (kind, "both") and start <= time < start + length
            for what, start, length in outages
        )

    async def main(network: VirtualNetwork) -> None:
        async with serving(network, Telling(TOKENS, 0.1)):
            session = racing(connect_timeout_s=30.0)
            events = await collect(session.ask(b"{}"))
            assert text_of(events) == TEXT
            assert isinstance(events[-1], End)
            await session.close()

    virtually(main, drops)


@pytest.mark.parametrize("mtu", [1227, 1200, 1000, 576, 296])
def test_packets_of_1200_bytes_do_not_pass(mtu: int) -> None:
    """QUIC's handshake needs them; TCP's segments were cut to fit (MSS)."""

    def drops(time: float, packet: Packet) -> bool:
        return udp(time, packet) and packet.size > mtu

    events, rungs = whole_turn(drops)
    assert text_of(events) == TEXT
    assert [rung for _, rung in rungs] == [Rung.WEBSOCKET]


def test_a_cancel_after_the_rung_changed() -> None:
    async def main(network: VirtualNetwork) -> None:
        telling = Telling(TOKENS * 10, GAP_S)
        async with serving(network, telling):
            session = racing()
            turn = session.ask(b"{}")

            async def read(turn: ClientTurn) -> list[Event]:
                return [event async for event in turn]

            reading = asyncio.ensure_future(read(turn))
            await asyncio.sleep(6.0)
            turn.cancel()
            events = await reading
            assert text_of(events) != TEXT * 10
            assert (TEXT * 10).startswith(text_of(events))
            await asyncio.sleep(1.0)
            assert telling.cancelled != []
            await session.close()

    virtually(main, udp_between(3.0, 1e9))


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.26, 0.3, 0.5, 12.0, 15.1])
def test_closing_at_any_time_ends_all_attempts(after_s: float) -> None:
    async def main(network: VirtualNetwork) -> None:
        async with serving(network, Telling(TOKENS, GAP_S)):
            session = racing()
            session.ask(b"{}")
            await asyncio.sleep(after_s)
            before = now()
            await session.close()
            assert now() - before <= 0.6
            others = asyncio.all_tasks() - {asyncio.current_task()}
            names = [repr(task) for task in others]
            assert not any("race" in name or "_climb" in name for name in names)

    virtually(main, udp)


# Nobody there.


def failure(drops: Drops, **server: bool) -> ConnectionFailedError:
    async def main(network: VirtualNetwork) -> ConnectionFailedError:
        async with serving(network, Telling(TOKENS, GAP_S), **server):
            session = racing()
            with pytest.raises(ConnectionFailedError) as caught:
                await session.connect()
            await session.close()
            return caught.value

    return virtually(main, drops)


def test_nobody_listens_either_way() -> None:
    error = failure(nothing, has_quic=False, has_websocket=False)
    assert isinstance(error, ServerRefusedError)
    assert str(error) == (
        "Nothing listens on server, UDP port 4433; and nothing listens on server, TCP port 4433: "
        "start the server (`eloquent serve`) or check the URL."
    )


def test_udp_is_blocked_and_the_server_has_no_websocket() -> None:
    error = failure(udp, has_websocket=False)
    assert not isinstance(error, ServerRefusedError)
    assert "No answer from server, UDP port 4433" in str(error)
    assert "nothing listens on server, TCP port 4433" in str(error)


def test_an_unknown_name_is_said_once() -> None:
    async def main(network: VirtualNetwork) -> None:
        session = racing(dataclasses.replace(URL, host="nowhere"))
        with pytest.raises(ConnectionFailedError, match="Cannot reach nowhere") as caught:
            await session.connect()
        assert str(caught.value).count("Cannot reach") == 1
        await session.close()

    virtually(main)


def test_the_wrong_certificate_is_refused_either_way() -> None:
    async def main(network: VirtualNetwork) -> None:
        async with serving(network, Telling(TOKENS, GAP_S)):
            session = racing(dataclasses.replace(URL, pin="0" * 64))
            with pytest.raises(ServerRefusedError, match=r"not the pinned one.*TCP port"):
                await session.connect()
            assert session.state is not LinkState.UP
            await session.close()

    virtually(main)


# Over real sockets.


async def test_a_port_that_swallows_udp_is_passed_by_over_tcp() -> None:
    telling = Telling(TOKENS, 0.001)
    listener = await listen_websocket("127.0.0.1", 0, certificate=CERTIFICATE, service=telling)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as swallowing:
        swallowing.bind(("127.0.0.1", listener.port))
        url = dataclasses.replace(URL, host="127.0.0.1", port=listener.port)
        session = racing(url)
        try:
            async with asyncio.timeout(30):
                before = now()
                await session.connect()
                print(f"connected after {(now() - before) * 1e3:.0f} ms")  # noqa: T201
                assert text_of(await collect(session.ask(b"{}"))) == TEXT
            assert rung_of(session) is Rung.WEBSOCKET
        finally:
            await session.close()
            await listener.close()


# Addresses.


def test_the_families_take_turns() -> None:
    six, four = socket.AF_INET6, socket.AF_INET
    found = [(six, "::1"), (six, "::2"), (six, "::2"), (four, "1.1.1.1"), (four, "2.2.2.2")]
    assert in_turn(found) == ["::1", "1.1.1.1", "::2", "2.2.2.2"]
    assert in_turn([(four, f"1.1.1.{index}") for index in range(9)]) == [
        f"1.1.1.{index}" for index in range(MAX_ADDRESSES)
    ]


async def test_a_name_with_addresses_of_which_one_answers() -> None:
    """On most machines localhost has an IPv6 address first, where this server does not listen."""
    listener = await listen_quic(
        "127.0.0.1", 0, certificate=CERTIFICATE, service=Telling(TOKENS, 0.001)
    )
    session = racing(dataclasses.replace(URL, host="localhost", port=listener.port))
    try:
        async with asyncio.timeout(30):
            assert text_of(await collect(session.ask(b"{}"))) == TEXT
        assert rung_of(session) is Rung.DATAGRAMS
    finally:
        await session.close()
        await listener.close()


@pytest.mark.parametrize("gap_s", [0.05, 0.5, 1e6])
@pytest.mark.parametrize("dead", ["up", "down"])
def test_on_websocket_one_dead_way_is_noticed_when_tcp_has_stalled(dead: str, gap_s: float) -> None:
    """TCP lets no more through than fits its window; on QUIC both ends ask and know within 2 s."""
    died_s = 5.0

    def dies(time: float, packet: Packet) -> bool:
        return time >= died_s

    made = VirtualNetwork.between(
        *(Filter(way, dies if way == dead else nothing) for way in ("up", "down"))
    )
    states: dict[LinkState, float] = {}

    async def main() -> float:
        telling = Telling(TOKENS * 10, gap_s)
        async with serving(made, telling, has_quic=False):
            session = Session(
                URL,
                connector=connect_websocket,
                on_state=lambda state: states.update({state: now()}),
            )
            session.ask(b"{}")
            await asyncio.sleep(died_s)
            await until(lambda: any(reader.is_silent for reader in telling.readers))
            server_s = now()
            await asyncio.sleep(5.0)
            await session.close()
            return server_s

    server_s = run(main(), made)
    assert server_s - died_s <= 3.6
    assert states[LinkState.SILENT] - died_s <= 3.6


def test_without_a_climber_a_session_stays_where_it_is() -> None:
    async def main(network: VirtualNetwork) -> None:
        async with serving(network, Telling(TOKENS * 2, GAP_S)):
            session = Session(URL, connector=connect_websocket)
            assert text_of(await collect(session.ask(b"{}"))) == TEXT * 2
            assert rung_of(session) is Rung.WEBSOCKET
            await session.close()
            session = Session(URL, connector=connect_quic)
            await session.connect()
            assert rung_of(session) is Rung.DATAGRAMS
            await session.close()

    virtually(main)
