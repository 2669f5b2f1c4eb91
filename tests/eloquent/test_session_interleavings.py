"""A whole session over both real ends: whatever networks and servers do, the answer comes once.

Hypothesis makes up what happens and when: links cut on one way or both, NATs that forget, new
networks, no network, no route though packets pass, servers killed and started again, a process
that is stopped for a while, other readers that come and go, a cancel. `make soak` runs thousands of
cases.
"""

import asyncio
import os

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from session_world import OTHER_IP, Nat, World, in_world, read, stop_process, tokens
from telling import Telling

from eloquent.core.wire import Request
from eloquent.errors import ConnectionFailedError
from eloquent.session.turn import ClientTurn

CASES = int(os.environ.get("ELOQUENT_CASES", "25"))
ALL = "".join(tokens(100))
GAP_S = 0.05
NO_LINK = "no link"
UNREACHABLE = {"cut up", "cut down", "cut both", "new network", "no network", "kill", "stop"}
"After one of these a server may be out of reach for a while."
REQUEST = Request(bytes(range(16)), b"{}", bytes(16))
WATCHING = Request(bytes(range(16)), b"", bytes(16), is_owner=False)

HAPPENINGS = st.sampled_from(
    [
        *("cut up", "cut down", "cut both", "heal", "heal", "heal"),
        *("rebind", "new network", "no network", "no route", "network again"),
        *("kill", "start", "start", "stop", "watch"),
    ]
)
STEPS = st.lists(
    st.tuples(st.sampled_from([0.02, 0.15, 0.7, 2.5]), HAPPENINGS), min_size=1, max_size=10
)


class Trouble:
    """Lets things happen to a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.watchers: list[asyncio.Task[str]] = []

    async def happen(self, what: str) -> None:
        world = self.world
        if what.startswith("cut"):
            world.up.is_cut = world.up.is_cut or what != "cut down"
            world.down.is_cut = world.down.is_cut or what != "cut up"
        elif what == "heal":
            world.up.is_cut = world.down.is_cut = False
        elif what == "rebind":
            Nat(world, ip=None, keeps_old=True)
        elif what == "new network":
            Nat(world, ip=OTHER_IP, keeps_old=False)
            world.machine.change("lte")
        elif what == "no network":
            world.up.is_cut = world.down.is_cut = True
            world.machine.change(None)
        elif what == "no route":
            world.machine.change(None)
        elif what == "stop":
            stop_process(4.0)
        elif what == "network again":
            world.up.is_cut = world.down.is_cut = False
            world.machine.change("wlan")
        elif what == "kill" and world.listener is not None:
            await world.kill_server()
        elif what == "start" and world.listener is None:
            await world.start_server()
        elif what == "watch":
            turn = world.session.open(WATCHING)
            self.watchers.append(asyncio.ensure_future(read_or_why_not(turn)))

    async def end(self) -> None:
        for what in ("network again", "heal", "start"):
            await self.happen(what)


@settings(
    max_examples=CASES,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    steps=STEPS,
    is_cancelled=st.booleans(),
    loss=st.sampled_from([0.0, 0.05, 0.2]),
    seed=st.integers(0, 1000),
)
def test_the_answer_comes_whole_and_once_whatever_happens(
    steps: list[tuple[float, str]], is_cancelled: bool, loss: float, seed: int
) -> None:
    async def play(world: World) -> tuple[list[str], str, bool]:
        trouble = Trouble(world)
        turn = world.session.open(REQUEST)
        reading = asyncio.ensure_future(read_or_nothing(turn))
        await asyncio.sleep(0.5)
        for wait_s, what in steps:
            await asyncio.sleep(wait_s)
            if world.listener is None and what not in ("start", "heal"):
                await world.start_server()  # longer than a moment, and it counts as gone for good
                if what == "kill":
                    continue  # at once would be as long again
            await trouble.happen(what)
        assert isinstance(world.service, Telling)
        is_told = all(log.end is not None for log in world.service.logs.values())
        if is_cancelled:
            turn.cancel()
        await trouble.end()
        watched = [await text for text in trouble.watchers]
        text = await reading
        await asyncio.sleep(15.0)
        assert len(world.service.logs) <= 1
        return watched, text, is_told or bool(world.service.cancelled)

    watched, text, is_over = in_world(
        play, lambda: Telling(tokens(100), GAP_S), loss=loss, seed=seed, limit_s=600.0
    )
    if text == NO_LINK:
        assert UNREACHABLE & {what for _, what in steps}
    elif is_cancelled and text != ALL:
        assert ALL.startswith(text)
        assert is_over  # the server has heard of the cancel, unless there was nothing to cancel
    else:
        assert text == ALL
    assert set(watched) <= {ALL, NO_LINK}


async def read_or_why_not(turn: ClientTurn) -> str:
    """Return a turn's text, or that it could not be asked: nobody waits long for a first link."""
    try:
        return await read(turn)
    except ConnectionFailedError:
        return NO_LINK


async def read_or_nothing(turn: ClientTurn) -> str:
    """Return a turn's text up to its end or its cancel, or that it could not be asked."""
    try:
        texts = [event.text async for event in turn if hasattr(event, "text")]
    except ConnectionFailedError:
        assert turn.receiver.contiguous == 0  # it could not be asked
        return NO_LINK
    return "".join(texts)
