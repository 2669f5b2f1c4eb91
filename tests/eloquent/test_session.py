"""The session in virtual time: turns go on, or fail cleanly, whatever links and server do."""

import asyncio

import pytest
from session_world import World, in_world, now, read, tokens

from eloquent.session.states import LinkState

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
    assert first_s < 1.0


def test_an_outage_is_seen_within_two_seconds_and_its_end_too() -> None:
    async def play(world: World) -> tuple[float, float, list[LinkState]]:
        turn = world.session.ask(b"{}")
        reading = asyncio.ensure_future(read(turn))
        await asyncio.sleep(2.0)
        cut_s = now()
        await world.cut(5.0)
        back_s = now()
        await reading
        silent_s = world.time_of(LinkState.SILENT)
        return silent_s - cut_s, world.time_of(LinkState.UP, after=silent_s) - back_s, world.seen()

    noticed_s, back_s, states = in_world(play)
    assert noticed_s <= 2.0
    assert back_s <= 1.0
    assert states == [LinkState.CONNECTING, LinkState.UP, LinkState.SILENT, LinkState.UP]
