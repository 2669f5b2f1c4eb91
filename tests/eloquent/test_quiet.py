"""Nothing is left unsent because aioquic was not asked: what `is_quiet` says is held to it."""

import asyncio
from collections.abc import Iterator

import pytest
from session_world import OTHER_IP, Nat, World, in_world, read, tokens
from telling import Telling

from eloquent.quic import connection
from eloquent.quic._quiet import is_quiet
from eloquent.quic._roaming import RoamingConnection

ALL = "".join(tokens(100))


class Checked:
    """`is_quiet`, which lets nothing be left out, and notes what would have been."""

    def __init__(self) -> None:
        self.quiet = 0
        self.wrong: list[bytes] = []

    def __call__(self, quic: RoamingConnection, now: float) -> bool:
        if is_quiet(quic, now) and not quic._source.has_datagram(now):
            self.quiet += 1
            self.wrong += [data for data, _ in quic.datagrams_to_send(now)]
        return False


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Checked]:
    check = Checked()
    monkeypatch.setattr(connection, "is_quiet", check)
    yield check
    assert check.quiet > 100
    assert check.wrong == []


@pytest.mark.parametrize(("loss", "seed"), [(0.0, 1), (0.1, 1), (0.3, 2)])
def test_an_answer_over_a_path_that_loses_packets(checked: Checked, loss: float, seed: int) -> None:
    async def play(world: World) -> str:
        return await read(world.session.ask(b"{}"))

    assert in_world(play, loss=loss, seed=seed) == ALL


def test_many_turns_some_of_them_cancelled_and_an_idle_time(checked: Checked) -> None:
    """More turns than the peer allows at first, and a keepalive."""

    async def play(world: World) -> list[str]:
        texts = []
        for number in range(150):
            turn = world.session.ask(b"{%d}" % number)
            if number % 3:
                await asyncio.sleep(0.2)
                turn.cancel()
            else:
                texts.append(await read(turn))
        await asyncio.sleep(60.0)
        return texts

    texts = in_world(play, lambda: Telling(tokens(10), 0.05))
    assert texts == ["".join(tokens(10))] * 50


def test_a_request_and_an_answer_of_many_packets(checked: Checked) -> None:
    async def play(world: World) -> str:
        return await read(world.session.ask(b"x" * 1_000_000))

    big = ["x" * 20_000] * 20
    assert in_world(play, lambda: Telling(big, 0.05), loss=0.02) == "".join(big)


def test_networks_that_change_and_vanish(checked: Checked) -> None:
    async def play(world: World) -> str:
        reading = asyncio.ensure_future(read(world.session.ask(b"{}")))
        await asyncio.sleep(1.0)
        Nat(world, ip=None, keeps_old=True)
        await asyncio.sleep(1.0)
        Nat(world, ip=OTHER_IP, keeps_old=False)
        world.machine.change("lte")
        await asyncio.sleep(1.0)
        await world.cut(0.7)
        await asyncio.sleep(0.5)
        await world.cut(10.0)
        return await reading

    assert in_world(play) == ALL
