"""Changes of network in mid-answer: migration, rebinding, no network at all, and sleep."""

import asyncio
import itertools

import pytest
from session_world import (
    OTHER_IP,
    Nat,
    World,
    in_world,
    now,
    read,
    stop_process,
    tokens,
    until,
)
from telling import Telling

from eloquent.errors import ConnectionFailedError
from eloquent.session.states import LinkState
from eloquent_netem.vloop_network import Datagram

ALL = "".join(tokens(100))
RTT_S = 0.1


@pytest.mark.parametrize("ip", [None, OTHER_IP])
def test_the_server_follows_an_address_that_changes_without_the_clients_knowing(
    ip: str | None,
) -> None:
    async def play(world: World) -> tuple[str, float, list[LinkState]]:
        times: list[float] = []
        reading = asyncio.ensure_future(read(world.session.ask(b"{}"), times))
        await asyncio.sleep(2.0)
        changed_s = now()
        Nat(world, ip=ip, keeps_old=True)
        text = await reading
        gaps = [later - time for time, later in itertools.pairwise(times)]
        return text, max(gaps), [state for time, state in world.states if time > changed_s]

    text, gap_s, states = in_world(play)
    assert text == ALL
    assert states == []
    # The client says something at the latest when it has heard nothing for PROBE_AFTER_S.
    assert gap_s < 0.5 + 2 * RTT_S


@pytest.mark.parametrize("ip", [None, OTHER_IP])
def test_the_client_migrates_at_once_when_its_address_changes(ip: str | None) -> None:
    async def play(world: World) -> tuple[str, float, bool, list[LinkState]]:
        times: list[float] = []
        reading = asyncio.ensure_future(read(world.session.ask(b"{}"), times))
        await asyncio.sleep(2.0)
        before = world.session.link
        Nat(world, ip=ip, keeps_old=False)
        changed_s = now()
        world.machine.change("lte")
        text = await reading
        # What was on its way to the old address is lost; the first from the new one:
        first_s = next(time for time in times if time > changed_s) - changed_s
        states = [state for time, state in world.states if time > changed_s]
        return text, first_s, before is world.session.link, states

    text, first_s, is_same, states = in_world(play)
    assert text == ALL
    assert is_same
    assert states == []
    assert first_s < 1.5 * RTT_S


def test_a_migration_that_fails_ends_in_a_new_connection() -> None:
    """The new network drops what is no new connection, as a firewall with state may do."""

    async def play(world: World) -> tuple[str, bool, float]:
        reading = asyncio.ensure_future(read(world.session.ask(b"{}")))
        await asyncio.sleep(2.0)
        before = world.session.link
        known = set(world.up.ports)
        first_bytes: dict[int, int] = {}

        def starts_with_a_handshake(packet: Datagram) -> bool:
            port = packet.source[1]
            if packet.is_refusal:
                return False
            first = first_bytes.setdefault(port, packet.data[0])
            return port not in known and bool(first & 0x80)

        world.up.rewrite = starts_with_a_handshake
        changed_s = now()
        world.machine.change("hotel")
        text = await reading
        silent_s = world.time_of(LinkState.SILENT, after=changed_s)
        up_s = world.time_of(LinkState.UP, after=silent_s)
        return text, before is world.session.link, up_s - changed_s

    text, is_same, back_s = in_world(play)
    assert text == ALL
    assert not is_same
    assert back_s < 1.0


def test_without_a_network_nothing_is_tried_and_with_one_it_goes_on_at_once() -> None:
    async def play(world: World) -> tuple[str, int, float, list[LinkState]]:
        times: list[float] = []
        reading = asyncio.ensure_future(read(world.session.ask(b"{}"), times))
        await asyncio.sleep(2.0)
        world.up.is_cut = world.down.is_cut = True
        gone_s = now()
        world.machine.change(None)
        await asyncio.sleep(600.0)
        connects = sum(packet[0] > gone_s + 1 and packet[1] >= 1200 for packet in world.up.sizes)
        world.up.is_cut = world.down.is_cut = False
        world.machine.change("wlan")
        back_s = now()
        text = await reading
        await asyncio.sleep(RTT_S)  # with a ticket all may come before the handshake's end
        first_s = next(time for time in times if time > back_s) - back_s
        return text, connects, first_s, [state for time, state in world.states if time >= gone_s]

    text, connects, first_s, states = in_world(play)
    assert text == ALL
    assert connects == 0
    assert states == [LinkState.OFFLINE, LinkState.RECONNECTING, LinkState.UP]
    assert first_s < 1.5 * RTT_S


def test_a_network_that_comes_back_with_another_address_is_used_at_once() -> None:
    async def play(world: World) -> tuple[str, bool, float, list[LinkState]]:
        times: list[float] = []
        reading = asyncio.ensure_future(read(world.session.ask(b"{}"), times))
        await asyncio.sleep(2.0)
        before = world.session.link
        gone_s = now()
        world.up.is_cut = world.down.is_cut = True
        world.machine.change(None)
        await asyncio.sleep(30.0)
        world.up.is_cut = world.down.is_cut = False
        Nat(world, ip=OTHER_IP, keeps_old=False)
        world.machine.change("lte")
        back_s = now()
        text = await reading
        first_s = next(time for time in times if time > back_s) - back_s
        states = [state for time, state in world.states if time >= gone_s]
        return text, before is world.session.link, first_s, states

    text, is_same, first_s, states = in_world(play)
    assert text == ALL
    assert is_same
    assert states == [LinkState.OFFLINE, LinkState.UP]
    assert first_s < 1.0


def test_without_a_route_an_answer_proves_that_there_is_a_way() -> None:
    async def play(world: World) -> tuple[str, list[LinkState]]:
        reading = asyncio.ensure_future(read(world.session.ask(b"{}")))
        await asyncio.sleep(2.0)
        world.machine.change(None)
        return await reading, world.seen()

    text, states = in_world(play)
    assert text == ALL
    assert states == [LinkState.CONNECTING, LinkState.UP]


def test_without_a_route_packets_that_still_come_do_not_make_the_state_flap() -> None:
    """The kernel sends nothing any more, and the server's packets go on coming."""

    async def play(world: World) -> tuple[str, list[LinkState]]:
        reading = asyncio.ensure_future(read(world.session.ask(b"{}")))
        await asyncio.sleep(2.0)
        world.up.is_cut = True
        gone_s = now()
        world.machine.change(None)
        await asyncio.sleep(170.0)
        world.up.is_cut = False
        world.machine.change("wlan")
        text = await reading
        return text, [state for time, state in world.states if time >= gone_s]

    text, states = in_world(play, lambda: Telling(tokens(100), 2.0))
    assert text == ALL
    assert states == [LinkState.OFFLINE, LinkState.UP]


def test_a_route_that_comes_and_goes_while_all_packets_pass_is_no_matter() -> None:
    async def play(world: World) -> tuple[str, list[LinkState]]:
        reading = asyncio.ensure_future(read(world.session.ask(b"{}")))
        for source in ("wlan", None) * 20:
            await asyncio.sleep(0.2)
            world.machine.change(source)
        return await reading, world.seen()

    text, states = in_world(play)
    assert text == ALL
    assert states == [LinkState.CONNECTING, LinkState.UP]


def test_a_change_of_network_before_a_link_is_no_reason_to_doubt_it() -> None:
    async def play(world: World) -> tuple[str, list[LinkState]]:
        reading = asyncio.ensure_future(read(world.session.ask(b"{}")))
        await asyncio.sleep(2.0)
        await world.kill_server()
        await until(lambda: world.session.state is not LinkState.UP)
        world.machine.change("lte")
        await asyncio.sleep(1.0)
        await world.start_server()
        text = await reading
        return text, world.seen()

    text, states = in_world(play)
    assert text == ALL
    assert states.count(LinkState.UP) == 2


def test_a_process_that_was_stopped_asks_before_it_takes_the_link_for_dead() -> None:
    """SIGSTOP, or a virtual machine that was paused: the clock went on, and packets waited."""

    async def play(world: World) -> tuple[str, bool, list[LinkState]]:
        reading = asyncio.ensure_future(read(world.session.ask(b"{}")))
        await asyncio.sleep(2.0)
        before = world.session.link
        stop_process(30.0)
        return await reading, before is world.session.link, world.seen()

    text, is_same, states = in_world(play, lambda: Telling(tokens(100), 0.7))
    assert text == ALL
    assert is_same
    assert states == [LinkState.CONNECTING, LinkState.UP]


def test_a_process_that_was_stopped_while_its_link_died_is_back_at_once() -> None:
    async def play(world: World) -> tuple[str, float]:
        reading = asyncio.ensure_future(read(world.session.ask(b"{}")))
        await asyncio.sleep(2.0)
        old = set(world.up.ports)
        world.up.rewrite = lambda packet: packet.source[1] not in old
        world.down.rewrite = lambda packet: packet.destination[1] not in old
        await asyncio.sleep(RTT_S)
        stop_process(30.0)
        woke_s = now()
        text = await reading
        silent_s = world.time_of(LinkState.SILENT, after=woke_s)
        return text, world.time_of(LinkState.UP, after=silent_s) - woke_s

    text, back_s = in_world(play, lambda: Telling(tokens(100), 0.7))
    assert text == ALL
    assert back_s < 1.0


def test_after_a_sleep_the_link_is_asked_at_once_and_replaced_if_it_is_silent() -> None:
    async def play(world: World) -> tuple[str, bool, float]:
        reading = asyncio.ensure_future(read(world.session.ask(b"{}")))
        await asyncio.sleep(2.0)
        before = world.session.link
        old = set(world.up.ports)
        world.up.rewrite = lambda packet: packet.source[1] not in old
        world.down.rewrite = lambda packet: packet.destination[1] not in old
        await asyncio.sleep(RTT_S)
        world.machine.sleep_s += 3600.0
        woke_s = now()
        world.machine.change("wlan")
        text = await reading
        silent_s = world.time_of(LinkState.SILENT, after=woke_s)
        up_s = world.time_of(LinkState.UP, after=silent_s)
        return text, before is world.session.link, up_s - woke_s

    text, is_same, back_s = in_world(play)
    assert text == ALL
    assert not is_same
    assert back_s < 1.0


def test_a_change_that_changes_nothing_costs_nothing() -> None:
    async def play(world: World) -> list[LinkState]:
        reading = asyncio.ensure_future(read(world.session.ask(b"{}")))
        for _ in range(20):
            await asyncio.sleep(0.1)
            world.machine.change("wlan")
        await reading
        await until(lambda: True)
        return world.seen()

    assert in_world(play) == [LinkState.CONNECTING, LinkState.UP]


def test_what_is_asked_anew_without_a_network_fails_soon_when_no_other_turn_waits() -> None:
    async def play(world: World) -> float:
        turn = world.session.ask(b"{}")
        await asyncio.sleep(2.0)
        world.up.is_cut = world.down.is_cut = True
        world.machine.change(None)
        await asyncio.sleep(300.0)  # the connection is over by now
        turn.cancel()
        await asyncio.sleep(2.0)
        assert world.session.state is LinkState.IDLE
        asked_s = now()
        with pytest.raises(ConnectionFailedError):
            await read(world.session.ask(b"{}"))
        return now() - asked_s

    assert in_world(play) <= 5.0 + 1e-6


def test_a_migration_shows_no_id_of_the_old_path_and_makes_room_for_a_backlog() -> None:
    """RFC 9000 sections 9.5 and 8.1."""

    async def play(world: World) -> tuple[set[bytes], set[bytes], int]:
        reading = asyncio.ensure_future(read(world.session.ask(b"{}")))
        await asyncio.sleep(2.0)
        old = set(world.up.ports)
        Nat(world, ip=OTHER_IP, keeps_old=False)
        world.machine.change("lte")
        await reading
        short = [
            (source[1] in old, data)
            for source, data in world.up.packets
            if data and not data[0] & 0x80
        ]
        before, after = (
            {data[1:9] for was, data in short if was is is_old} for is_old in (True, False)
        )
        first = next(data for is_old, data in short if not is_old)
        return before, after, len(first)

    before, after, first_bytes = in_world(play)
    assert before
    assert after
    assert not before & after
    assert first_bytes >= 1200
