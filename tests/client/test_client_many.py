"""Many turns at once on one connection, of which some are given up."""

import asyncio
from random import Random

import pytest
from rungs import RTT_S, URL, serving, udp, virtually
from telling import Telling

from eloquent.serving import Reader
from eloquent_client import Client, Rung
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import IndependentLoss
from eloquent_netem.packet import Packet
from eloquent_netem.vloop import VirtualNetwork, run

TURNS = 50
WORDS = [f"word{number} " for number in range(60)]
TEXT = "".join(WORDS)
GAP_S = 0.05


class Counting(Telling):
    """Knows who asked, over how many connections."""

    def __init__(self) -> None:
        super().__init__(WORDS, GAP_S)
        self.asked: list[Reader] = []

    def on_request(self, reader: Reader) -> None:
        """See `TurnService`."""
        self.asked.append(reader)
        super().on_request(reader)


async def ask_many(client: Client, rng: Random) -> tuple[set[str], set[str]]:
    """Ask all turns at once; give some up at random times; return the ids of both kinds."""
    whole: set[str] = set()
    given_up: set[str] = set()

    async def ask(number: int) -> None:
        how_long_s = rng.uniform(0.0, len(WORDS) * GAP_S) if rng.random() < 0.4 else None
        async with client.stream([{"role": "user", "content": str(number)}]) as stream:
            if how_long_s is None:
                message = await stream.get_final_message()
                assert message.text == TEXT
                assert stream.stats.missing == stream.stats.duplicates == 0
                whole.add(stream.turn_id)
            else:
                await asyncio.sleep(how_long_s)
                assert TEXT.startswith(stream.text)
                given_up.add(stream.turn_id)

    await asyncio.gather(*[ask(number) for number in range(TURNS)])
    return whole, given_up


def check(service: Counting, whole: set[str], given_up: set[str]) -> None:
    assert len(whole) + len(given_up) == TURNS
    assert len(given_up) > 5
    assert len(service.asked) == TURNS, "each was asked once"
    assert {reader.request.turn_id.hex() for reader in service.cancelled} == given_up
    assert not service.readers, "all are gone"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_fifty_turns_of_which_some_are_cancelled(seed: int) -> None:
    service = Counting()
    print("seed", seed)  # noqa: T201

    async def main(network: VirtualNetwork) -> tuple[set[str], set[str], int]:
        async with serving(network, service), Client(URL) as client:
            found = await ask_many(client, Random(seed))
            await asyncio.sleep(4 * RTT_S)
            return *found, client.link.resumes

    whole, given_up, resumes = virtually(main)
    check(service, whole, given_up)
    assert resumes == 0


def test_fifty_turns_over_websocket() -> None:
    service = Counting()

    async def main(network: VirtualNetwork) -> tuple[set[str], set[str]]:
        async with serving(network, service), Client(URL) as client:
            found = await ask_many(client, Random(1))
            assert client.link.rung is Rung.WEBSOCKET
            await asyncio.sleep(4 * RTT_S)
            return found

    check(service, *virtually(main, udp))


def test_fifty_turns_over_a_lossy_link() -> None:
    service = Counting()

    def lossy(name: str) -> Link:
        return Link(
            delay_s=RTT_S / 2,
            seed=1,
            name=name,
            loss=IndependentLoss(0.1, stage_rng(1, name, "loss")),
        )

    network = VirtualNetwork.between(lossy("up"), lossy("down"))

    async def main() -> tuple[set[str], set[str], int]:
        async with serving(network, service), Client(URL) as client:
            found = await ask_many(client, Random(1))
            await asyncio.sleep(10.0)
            return *found, client.link.loss_recovered

    whole, given_up, lost = run(main(), network)
    check(service, whole, given_up)
    assert lost > 0


def test_all_turns_go_on_after_an_outage() -> None:
    service = Counting()

    def outage(now: float, packet: Packet) -> bool:
        return 1.0 < now < 20.0

    async def main(network: VirtualNetwork) -> tuple[set[str], set[str]]:
        async with serving(network, service), Client(URL) as client:
            found = await ask_many(client, Random(1))
            await asyncio.sleep(10.0)
            return found

    whole, given_up = virtually(main, outage)
    assert len(whole) + len(given_up) == TURNS
    assert len(service.logs) == TURNS, "none was generated twice"
    assert {reader.request.turn_id.hex() for reader in service.cancelled} == given_up
