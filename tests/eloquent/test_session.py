"""The session in virtual time: turns go on, or fail cleanly, whatever links and server do."""

import asyncio
import gc
from dataclasses import replace
from functools import partial

import pytest
from session_world import (
    URL,
    FakeMachine,
    World,
    first_events,
    in_world,
    now,
    read,
    tokens,
    until,
)
from telling import Telling

from eloquent.core.events import TextDelta, encode_event
from eloquent.core.wire import Request
from eloquent.errors import (
    ConnectionFailedError,
    EloquentError,
    RequestError,
    ServerRefusedError,
)
from eloquent.quic.connect import connect
from eloquent.serving import Reader
from eloquent.session.retries import REFUSED_FOR_S, RETRY_FOR_S, RETRY_MAX_S, STOPPED_FOR_S
from eloquent.session.session import Session
from eloquent.session.states import SILENT_FOR_S, LinkState
from eloquent_netem.vloop_network import Datagram

ALL = "".join(tokens(100))


def test_an_answer_comes_whole() -> None:
    async def play(world: World) -> str:
        return await read(world.session.ask(b"{}"))

    assert in_world(play) == ALL


@pytest.mark.parametrize("outage_s", [1.0, 5.0, 60.0])
def test_an_outage_loses_nothing_and_repeats_nothing(outage_s: float) -> None:
    async def play(world: World) -> tuple[str, float]:
        times: list[float] = []
        reading = asyncio.ensure_future(read(world.session.ask(b"{}"), times))
        await asyncio.sleep(2.0)
        await world.cut(outage_s)
        back_s = now()
        text = await reading
        return text, next(time for time in times if time > back_s) - back_s

    text, first_s = in_world(play)
    assert text == ALL
    assert first_s < 10.0


def test_a_link_that_comes_back_after_the_new_one_was_begun_is_used_again() -> None:
    async def play(world: World) -> tuple[bool, int]:
        reading = asyncio.ensure_future(read(world.session.ask(b"{}")))
        await asyncio.sleep(2.0)
        before = world.session.link
        await world.cut(3.0)
        await reading
        assert world.listener is not None
        return before is world.session.link, world.listener.connections

    is_same, _ = in_world(play)
    assert is_same


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_link_of_which_one_way_stays_dead_is_replaced(way: str) -> None:
    """A NAT that forgot one way: the old connection's packets are dropped, a new one's pass."""

    async def play(world: World) -> tuple[str, bool, float]:
        reading = asyncio.ensure_future(read(world.session.ask(b"{}")))
        await asyncio.sleep(2.0)
        before = world.session.link
        old_ports = set(world.up.ports)
        if way == "up":
            world.up.rewrite = lambda packet: packet.source[1] not in old_ports
        else:
            world.down.rewrite = lambda packet: packet.destination[1] not in old_ports
        cut_s = now()
        text = await reading
        up_s = world.time_of(LinkState.UP, after=cut_s)
        return text, before is not world.session.link, up_s - cut_s

    text, is_replaced, replaced_s = in_world(play)
    assert text == ALL
    assert is_replaced
    assert replaced_s < 2.0 + 3 * 0.1


@pytest.mark.parametrize("state", ["silent", "reconnecting"])
def test_a_cancel_while_no_link_lives_reaches_the_server_over_the_next(state: str) -> None:
    """The old connection's packets are dropped for ever; those of a new one pass."""

    async def play(world: World) -> tuple[int, int]:
        turn = world.session.ask(b"{}")
        await asyncio.sleep(2.0)
        old_ports = set(world.up.ports)
        await into(world, state)
        world.up.rewrite = lambda packet: packet.source[1] not in old_ports
        world.down.rewrite = lambda packet: packet.destination[1] not in old_ports
        turn.cancel()
        if world.listener is None:
            await world.start_server()
        world.up.is_cut = world.down.is_cut = False
        await asyncio.sleep(10.0)
        assert isinstance(world.service, Telling)
        [reader] = world.service.cancelled
        return len(world.service.logs), reader.request.offset

    asked, offset = in_world(play)
    assert asked == 1
    assert offset > 0


def test_a_cancel_is_said_again_where_the_link_that_it_was_said_on_dies_at_once() -> None:
    async def play(world: World) -> int:
        turn = world.session.ask(b"{}")
        await asyncio.sleep(2.0)
        await into(world, "reconnecting")
        turn.cancel()
        await until(lambda: world.session.state is LinkState.UP)
        world.up.is_cut = world.down.is_cut = True  # the request and the cancel are lost
        assert world.listener is not None
        await world.kill_server()
        await asyncio.sleep(0.3)
        world.up.is_cut = world.down.is_cut = False
        await world.start_server()
        await asyncio.sleep(10.0)
        assert isinstance(world.service, Telling)
        return len(world.service.cancelled)

    assert in_world(play) == 1


@pytest.mark.parametrize("state", ["silent", "offline"])
def test_a_turn_opened_while_the_link_is_not_in_order_is_asked_when_it_is(state: str) -> None:
    async def play(world: World) -> str:
        first = asyncio.ensure_future(read(world.session.ask(b"{}")))
        await asyncio.sleep(1.0)
        before = world.session.link
        await into(world, state)
        second = world.session.ask(b"{}")
        await asyncio.sleep(0.05)
        world.up.is_cut = world.down.is_cut = False
        world.machine.change("wlan")
        text = await read(second)
        assert before is world.session.link
        await first
        return text

    assert in_world(play, limit_s=600.0) == ALL


@pytest.mark.parametrize("tokens_before", [0, 30])
def test_a_server_that_restarts_with_the_same_turns_goes_on(tokens_before: int) -> None:
    async def play(world: World) -> str:
        turn = world.session.ask(b"{}")
        reading = asyncio.ensure_future(read(turn))
        await asyncio.sleep(0.2 + 0.05 * tokens_before)
        await world.kill_server()
        await asyncio.sleep(1.0)
        await world.start_server()
        return await reading

    assert in_world(play) == ALL


def test_a_restarted_server_says_so_and_the_client_is_back_in_two_round_trips() -> None:
    async def play(world: World) -> tuple[str, float, list[LinkState]]:
        times: list[float] = []
        reading = asyncio.ensure_future(read(world.session.ask(b"{}"), times))
        await asyncio.sleep(2.0)
        await world.kill_server()
        await world.start_server()
        restarted_s = now()
        text = await reading
        back_s = next(time for time in times if time > restarted_s + 0.1) - restarted_s
        return text, back_s, world.seen()

    text, back_s, states = in_world(play)
    assert text == ALL
    # At most PROBE_AFTER_S until something is sent that the server answers with a reset, then
    # the reset's round trip, the handshake's, and the request's.
    assert back_s < 0.5 + 3.5 * 0.1
    assert states == [LinkState.CONNECTING, LinkState.UP, LinkState.RECONNECTING, LinkState.UP]


def test_a_server_that_is_gone_for_good_fails_the_turn_by_name() -> None:
    async def play(world: World) -> float:
        turn = world.session.ask(b"{}")
        await first_events(turn, 5)
        await world.kill_server()
        gone_s = now()
        with pytest.raises(ServerRefusedError, match="Nothing listens"):
            await read(turn)
        return now() - gone_s

    assert REFUSED_FOR_S <= in_world(play) < REFUSED_FOR_S + 15.0


def test_a_server_that_stopped_in_order_is_waited_for_while_it_is_restarted() -> None:
    async def play(world: World) -> tuple[str, float]:
        turn = world.session.ask(b"{}")
        assert world.listener is not None
        reading = asyncio.ensure_future(read(turn))
        await asyncio.sleep(1.0)
        await world.listener.close()
        stopped_s = now()
        await asyncio.sleep(STOPPED_FOR_S / 2)
        await world.start_server()
        return await reading, now() - stopped_s

    text, back_s = in_world(play)
    assert text == ALL
    assert back_s < STOPPED_FOR_S / 2 + RETRY_MAX_S + 1.0


def test_and_no_longer_than_that() -> None:
    async def play(world: World) -> float:
        turn = world.session.ask(b"{}")
        await first_events(turn, 5)
        assert world.listener is not None
        await world.listener.close()
        stopped_s = now()
        with pytest.raises(ServerRefusedError, match="Nothing listens"):
            await read(turn)
        return now() - stopped_s

    assert STOPPED_FOR_S <= in_world(play) < STOPPED_FOR_S + 2 * RETRY_MAX_S


class FewRefusals:
    """A machine that refuses as seldom as Linux does: six times, then once a second."""

    def __init__(self, burst: float = 6.0) -> None:
        self._burst = self._left = burst
        self._at_s = 0.0

    def __call__(self, packet: Datagram) -> bool:
        if not packet.is_refusal:
            return True
        self._left = min(self._burst, self._left + now() - self._at_s)
        self._at_s = now()
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


def test_a_server_that_is_gone_behind_a_machine_that_seldom_refuses_fails_the_turn() -> None:
    async def play(world: World) -> tuple[float, list[LinkState]]:
        turn = world.session.ask(b"{}")
        await first_events(turn, 5)
        world.down.rewrite = FewRefusals()
        gone_s = now()
        await world.kill_server()
        with pytest.raises(ServerRefusedError, match="Nothing listens"):
            await read(turn)
        failed_s = now() - gone_s
        await asyncio.sleep(0.1)
        return failed_s, world.seen()

    gone_s, states = in_world(play)
    assert REFUSED_FOR_S <= gone_s < REFUSED_FOR_S + 10.0
    silent = [LinkState.SILENT] * (LinkState.SILENT in states)
    assert states[2:] == [*silent, LinkState.RECONNECTING, LinkState.IDLE]


def test_a_server_that_is_gone_without_a_word_is_not_silent_for_ever() -> None:
    async def play(world: World) -> tuple[float, float, float, list[LinkState]]:
        turn = world.session.ask(b"{}")
        await first_events(turn, 5)
        world.up.is_cut = world.down.is_cut = True
        gone_s = now()
        with pytest.raises(ConnectionFailedError, match="not reached for 300 s") as caught:
            await read(turn)
        failed_s = now() - gone_s
        assert not isinstance(caught.value, ServerRefusedError)
        await until(lambda: world.session.state is LinkState.IDLE)
        silent_s = world.time_of(LinkState.SILENT)
        lost_s = world.time_of(LinkState.RECONNECTING)
        return lost_s - silent_s, failed_s, now() - gone_s, world.seen()

    silent_s, failed_s, idle_s, states = in_world(play)
    assert silent_s <= SILENT_FOR_S + 0.5
    assert failed_s == pytest.approx(RETRY_FOR_S, abs=10.0)
    assert idle_s <= failed_s + 0.1
    assert states[2:] == [LinkState.SILENT, LinkState.RECONNECTING, LinkState.IDLE]


def test_time_without_a_network_does_not_count_as_time_of_trying() -> None:
    async def play(world: World) -> str:
        reading = asyncio.ensure_future(read(world.session.ask(b"{}")))
        await asyncio.sleep(1.0)
        world.up.is_cut = world.down.is_cut = True
        await asyncio.sleep(0.9 * RETRY_FOR_S)
        world.machine.change(None)
        await asyncio.sleep(RETRY_FOR_S)
        world.up.is_cut = world.down.is_cut = False
        world.machine.change("wlan")
        return await reading

    assert in_world(play) == ALL


def test_a_resume_that_left_early_fails_with_the_attempt_to_connect() -> None:
    async def play(world: World) -> float:
        turn = world.session.ask(b"{}")
        await first_events(turn, 5)
        request = turn.request
        await world.session.close()
        world.up.is_cut = True
        begun_s = now()
        session = Session(
            URL, connector=partial(connect, tickets=world.tickets), machine=FakeMachine()
        )
        with pytest.raises(ConnectionFailedError, match="No answer"):
            await read(session.open(request))
        await session.close()
        return now() - begun_s

    assert in_world(play) == pytest.approx(5.0)


def test_a_server_that_is_not_there_at_first_fails_the_turn_at_once() -> None:
    async def play(world: World) -> float:
        await world.kill_server()
        with pytest.raises(ServerRefusedError, match="Nothing listens"):
            await read(world.session.ask(b"{}"))
        return now()

    assert in_world(play) < 0.2


@pytest.mark.parametrize("steps", range(8))
def test_a_turn_opened_just_after_an_attempt_failed_is_asked(steps: int) -> None:
    async def play(world: World) -> str:
        await world.kill_server()
        with pytest.raises(ServerRefusedError):
            await world.session.connect()
        await world.start_server()
        for _ in range(steps):
            await asyncio.sleep(0)
        return await read(world.session.ask(b"{}"))

    assert in_world(play, limit_s=60.0) == ALL


def test_a_server_that_never_answers_fails_the_turn_after_the_time_to_connect() -> None:
    async def play(world: World) -> float:
        world.up.is_cut = True
        with pytest.raises(ConnectionFailedError, match="No answer"):
            await read(world.session.ask(b"{}"))
        return now()

    assert in_world(play) == pytest.approx(5.0)


@pytest.mark.parametrize("state", ["connecting", "up", "silent", "reconnecting", "offline"])
def test_closing_never_hangs(state: str) -> None:
    async def play(world: World) -> float:
        turn = world.session.ask(b"{}")
        await asyncio.sleep(0.02 if state == "connecting" else 1.0)
        await into(world, state)
        assert world.session.state.value == state
        begun_s = now()
        await world.session.close()
        with pytest.raises(EloquentError):
            await read(turn)
        assert world.session.state is LinkState.CLOSED
        return now() - begun_s

    assert in_world(play) < 0.01


def test_closing_at_the_moment_of_news_is_not_forgotten() -> None:
    """`asyncio.wait_for` forgets a cancellation that comes with what it waits for (Python 3.11)."""
    faults: list[object] = []

    async def play(world: World) -> None:
        handler = asyncio.get_running_loop().set_exception_handler
        handler(lambda _loop, context: faults.append(context.get("exception")))
        world.session.ask(b"{}")
        await asyncio.sleep(1.0)
        world.session.ask(b"{}")
        await world.session.close()

    in_world(play)
    gc.collect()  # a task that failed says so when it goes
    assert faults == []


@pytest.mark.parametrize("state", ["connecting", "up", "silent", "reconnecting", "offline"])
def test_cancelling_never_hangs_and_the_session_goes_on(state: str) -> None:
    async def play(world: World) -> str:
        turn = world.session.ask(b"{}")
        await asyncio.sleep(0.02 if state == "connecting" else 1.0)
        await into(world, state)
        turn.cancel()
        async for _ in turn:  # what had come, and then the end
            pass
        world.up.is_cut = world.down.is_cut = False
        if world.listener is None:
            await world.start_server()
        world.machine.change("wlan")
        await asyncio.sleep(10.0)
        return await read(world.session.ask(b"{}"))

    assert in_world(play) == ALL


@pytest.mark.parametrize("state", ["connecting", "up", "silent", "reconnecting", "offline"])
def test_giving_the_server_up_is_seen_at_once_and_final(state: str) -> None:
    async def play(world: World) -> list[LinkState]:
        turn = world.session.ask(b"{}")
        await asyncio.sleep(0.02 if state == "connecting" else 1.0)
        await into(world, state)
        world.session.fail(ConnectionFailedError("It is gone."))
        given_up_s = now()
        assert world.session.state is LinkState.IDLE
        for last in (turn, None):
            with pytest.raises(ConnectionFailedError, match="It is gone"):
                await read(last or world.session.ask(b"{}"))
        world.up.is_cut = world.down.is_cut = False
        world.machine.change("wlan")
        await asyncio.sleep(10.0)
        return [state for time, state in world.states if time > given_up_s]

    assert in_world(play) == []


async def into(world: World, state: str) -> None:
    """Bring a session that is up, with a turn, into another state."""
    if state == "silent":
        world.up.is_cut = world.down.is_cut = True
        await asyncio.sleep(4.0)
    elif state == "reconnecting":
        await world.kill_server()
        await world.start_server()
        await until(lambda: world.session.state is LinkState.RECONNECTING)
    elif state == "offline":
        world.up.is_cut = world.down.is_cut = True
        world.machine.change(None)
        await asyncio.sleep(1.0)


def test_a_turn_that_fails_does_not_end_the_others() -> None:
    async def play(world: World) -> tuple[str, str]:
        good = asyncio.ensure_future(read(world.session.ask(b"{}")))
        bad = world.session.open(Request(bytes(16), b"", bytes(16), 10**6))
        with pytest.raises(RequestError) as caught:
            await read(bad)
        return await good, caught.value.code

    text, code = in_world(play, lambda: Choosy(tokens(100), 0.05))
    assert text == ALL
    assert code == "bad_offset"


SHORT = ["Hello", ", ", "wor", "ld", " 👋" * 30, "."]


@pytest.mark.parametrize("part", range(4))
def test_an_offset_at_which_no_event_starts_is_said_to_be_one(part: int) -> None:
    """Whatever the bytes there look like."""
    events = [encode_event(TextDelta(text)) for text in SHORT]
    starts = [sum(map(len, events[:count])) for count in range(len(events) + 1)]

    async def play(world: World) -> None:
        request = Request(bytes(16), b"{}", bytes(16))
        assert await read(world.session.open(request)) == "".join(SHORT)
        for offset in range(1 + part, starts[-1] + 1, 4):
            turn = world.session.open(replace(request, body=b"", offset=offset))
            if offset in starts:
                assert await read(turn) == "".join(SHORT[starts.index(offset) :])
            else:
                with pytest.raises(RequestError) as caught:
                    await read(turn)
                assert caught.value.code == "bad_offset"

    in_world(play, lambda: Telling(SHORT, 0.01))


class Choosy(Telling):
    """Declines an offset that no log has."""

    def on_request(self, reader: Reader) -> None:
        if reader.request.offset:
            reader.reject("bad_offset", "There is no such byte.")
        else:
            super().on_request(reader)


@pytest.mark.parametrize(("outage_s", "bound_s"), [(1.0, 0.05), (5.0, 0.05), (60.0, 0.35)])
@pytest.mark.parametrize("rtt_s", [0.05, 0.1, 0.3])
def test_after_an_outage_the_next_token_comes_soon(
    outage_s: float, bound_s: float, rtt_s: float
) -> None:
    """1.5 round trips + 50 ms after the link's return, 300 ms more after a long outage."""

    async def play(world: World) -> float:
        times: list[float] = []
        reading = asyncio.ensure_future(read(world.session.ask(b"{}"), times))
        await asyncio.sleep(2.0)
        await world.cut(outage_s)
        back_s = now()
        await reading
        return next(time for time in times if time > back_s) - back_s

    first_s = in_world(play, lambda: Telling(tokens(100), 0.05), rtt_s=rtt_s)
    assert first_s <= 1.5 * rtt_s + bound_s
