"""Who knows when that a link is dead, and when it is only the model that is quiet."""

import asyncio

import pytest
from session_world import (
    World,
    in_world,
    now,
    read,
    tokens,
    until,
)
from telling import Telling

from eloquent.session.states import LinkState

ALL = "".join(tokens(100))


def test_an_outage_is_seen_within_two_seconds_and_its_end_too() -> None:
    async def play(world: World) -> tuple[float, float, list[LinkState]]:
        turn = world.session.ask(b"{}")
        reading = asyncio.ensure_future(read(turn))
        await asyncio.sleep(2.0)
        cut_s = now()
        await world.cut(5.0)
        back_s = now()
        await reading
        await asyncio.sleep(1.0)
        silent_s = world.time_of(LinkState.SILENT)
        return silent_s - cut_s, world.time_of(LinkState.UP, after=silent_s) - back_s, world.seen()

    noticed_s, back_s, states = in_world(play)
    assert noticed_s <= 2.0
    assert back_s <= 1.0
    assert states == [LinkState.CONNECTING, LinkState.UP, LinkState.SILENT, LinkState.UP]


def test_a_short_gap_is_no_outage() -> None:
    async def play(world: World) -> list[LinkState]:
        reading = asyncio.ensure_future(read(world.session.ask(b"{}")))
        await asyncio.sleep(2.0)
        await world.cut(1.0)
        await reading
        return world.seen()

    assert in_world(play) == [LinkState.CONNECTING, LinkState.UP]


def test_a_model_that_thinks_for_minutes_is_no_dead_link() -> None:
    async def play(world: World) -> list[LinkState]:
        world.session.ask(b"{}")
        await asyncio.sleep(600.0)
        return world.seen()

    states = in_world(play, lambda: Telling(["one", "two"], 1e6), rtt_s=0.3)
    assert states == [LinkState.CONNECTING, LinkState.UP]


def test_an_idle_connection_is_kept_alive_every_20_seconds_at_most() -> None:
    async def play(world: World) -> tuple[int, list[LinkState]]:
        await world.session.connect()
        await asyncio.sleep(10.0)
        world.up.sizes.clear()
        await asyncio.sleep(3600.0)
        return len(world.up.sizes), world.seen()

    packets, states = in_world(play)
    assert states == [LinkState.CONNECTING, LinkState.UP]
    assert 3600 / 60 <= packets <= 3600 / 20 * 2  # and an ACK for what the server answers


def test_an_idle_connection_that_dies_is_noticed_by_its_keepalive_and_left() -> None:
    """Nothing is tried until the next turn asks for a connection."""

    async def play(world: World) -> tuple[float, int, float, str]:
        await world.session.connect()
        await asyncio.sleep(1.0)
        world.up.is_cut = world.down.is_cut = True
        cut_s = now()
        await until(lambda: world.session.state is LinkState.IDLE)
        left_s = now()
        await asyncio.sleep(60.0)
        tried = sum(time > left_s for time, _ in world.up.sizes)
        world.up.is_cut = world.down.is_cut = False
        asked_s, times = now(), list[float]()
        text = await read(world.session.ask(b"{}"), times)
        return left_s - cut_s, tried, times[0] - asked_s, text

    left_s, tried, first_s, text = in_world(play)
    assert left_s <= 20.0 + 2.0
    assert tried == 0
    assert first_s == pytest.approx(2 * 0.1, abs=0.01)
    assert text == ALL


def test_a_minute_without_a_link_is_no_harm_to_an_idle_session() -> None:
    async def play(world: World) -> tuple[str, list[LinkState]]:
        await world.session.connect()
        await world.cut(90.0)
        return await read(world.session.ask(b"{}")), world.seen()

    text, states = in_world(play)
    assert text == ALL
    up, idle = [LinkState.CONNECTING, LinkState.UP], LinkState.IDLE
    assert states == [*up, idle, *up]


def test_a_keepalive_that_is_lost_does_not_end_an_idle_connection() -> None:
    async def play(world: World) -> tuple[bool, str, list[LinkState]]:
        await world.session.connect()
        before = world.session.link
        await asyncio.sleep(19.9)
        await world.cut(1.0)
        assert world.up.sizes[-1][0] > 20.0
        await asyncio.sleep(60.0)
        return before is world.session.link, await read(world.session.ask(b"{}")), world.seen()

    is_same, text, states = in_world(play)
    assert is_same
    assert text == ALL
    assert states == [LinkState.CONNECTING, LinkState.UP]


@pytest.mark.parametrize("rtt_s", [0.05, 0.3])
@pytest.mark.parametrize("gap_s", [0.05, 1e6])  # tokens come; the model is quiet
@pytest.mark.parametrize("dead", ["both ways", "uplink", "downlink"])
def test_both_sides_say_within_two_seconds_that_the_link_is_dead(
    dead: str, gap_s: float, rtt_s: float
) -> None:
    async def play(world: World) -> tuple[float, float, list[bool]]:
        turn = world.session.ask(b"{}")
        await asyncio.sleep(3.0)
        assert isinstance(world.service, Telling)
        (reader,) = world.service.readers
        before = reader.is_silent
        world.up.is_cut = dead != "downlink"
        world.down.is_cut = dead != "uplink"
        cut_s = now()
        await until(lambda: reader.is_silent)
        server_s = now() - cut_s
        await asyncio.sleep(3.0)
        client_s = world.time_of(LinkState.SILENT) - cut_s
        world.up.is_cut = world.down.is_cut = False
        await asyncio.sleep(2.0)
        after = any(reader.is_silent for reader in world.service.readers)
        assert world.session.state is LinkState.UP
        turn.cancel()
        return server_s, client_s, [before, after]

    server_s, client_s, alarms = in_world(play, lambda: Telling(tokens(1000), gap_s), rtt_s=rtt_s)
    assert server_s <= 2.0
    assert client_s <= 2.0
    assert alarms == [False, False]


def test_what_still_comes_over_a_dead_uplink_is_read() -> None:
    async def play(world: World) -> tuple[str, list[LinkState]]:
        times: list[float] = []
        reading = asyncio.ensure_future(read(world.session.ask(b"{}"), times))
        await asyncio.sleep(1.0)
        world.up.is_cut = True
        await asyncio.sleep(3.5)
        assert times[-1] > now() - 0.5
        assert world.session.state is LinkState.SILENT
        world.up.is_cut = False
        return await reading, world.seen()

    text, states = in_world(play)
    assert text == ALL
    assert states == [LinkState.CONNECTING, LinkState.UP, LinkState.SILENT, LinkState.UP]


def test_a_path_with_a_long_queue_is_no_dead_link() -> None:
    """Though an answer takes longer than a dead link is otherwise given."""

    async def play(world: World) -> tuple[list[LinkState], list[bool]]:
        world.session.ask(b"{}")
        await asyncio.sleep(10.0)
        assert isinstance(world.service, Telling)
        silent = []
        for _ in range(600):
            silent += [reader.is_silent for reader in world.service.readers]
            await asyncio.sleep(0.1)
        return world.seen(), silent

    states, silent = in_world(play, lambda: Telling(["one", "two"], 1e6), rtt_s=1.5)
    assert states == [LinkState.CONNECTING, LinkState.UP]
    assert not any(silent)


@pytest.mark.parametrize("rtt_s", [0.1, 0.3])
def test_twenty_percent_of_loss_is_no_dead_link(rtt_s: float) -> None:
    """At most one false alarm an hour on each side."""
    seed, hours = 7, 1

    async def play(world: World) -> tuple[int, int]:
        turn = world.session.ask(b"{}")
        server_alarms, was_silent = 0, False
        assert isinstance(world.service, Telling)
        while now() < hours * 3600:
            await asyncio.sleep(0.1)
            is_silent = any(reader.is_silent for reader in world.service.readers)
            server_alarms += is_silent and not was_silent
            was_silent = is_silent
        turn.cancel()
        return world.seen().count(LinkState.SILENT), server_alarms

    alarms = in_world(play, lambda: Telling(["one", "two"], 1e6), rtt_s=rtt_s, loss=0.2, seed=seed)
    print(f"seed {seed}: {alarms} alarms in {hours} h")  # noqa: T201
    assert max(alarms) <= hours


def test_a_session_that_is_closed_while_the_link_is_silent_leaves_no_task() -> None:
    async def play(world: World) -> set[str]:
        before = asyncio.all_tasks()
        reading = asyncio.ensure_future(read(world.session.ask(b"{}")))
        await asyncio.sleep(1.0)
        world.up.is_cut = world.down.is_cut = True
        await until(lambda: world.session.state is LinkState.SILENT)
        await asyncio.sleep(0.5)
        await world.session.close()
        await asyncio.wait((reading,))
        assert reading.exception() is not None, "the session was closed"
        await asyncio.sleep(0)
        left = asyncio.all_tasks() - before
        return {repr(task) for task in left if "Telling" not in repr(task)}  # the server's

    assert in_world(play) == set()
