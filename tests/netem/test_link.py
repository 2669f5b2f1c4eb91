"""A link loses, delays, reorders and duplicates what it is told to, and the same on every run."""

import os
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import DropList, IndependentLoss
from eloquent_netem.packet import Packet

TRACE = """
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import IndependentLoss
from eloquent_netem.packet import Packet
loss = IndependentLoss(0.3, stage_rng(7, "down", "loss"))
link = Link(delay_s=0.05, seed=7, name="down", loss=loss, jitter_s=0.02, reorders=True,
            duplicates=0.2)
for index in range(50):
    link.send(index * 0.01, Packet(bytes((index,)), 1))
trace = []
while (time := link.next_time()) is not None:
    trace.append((time, [packet.data[0] for packet in link.poll(time)]))
print(trace)
"""


def lossy(seed: int, probability: float = 0.3, name: str = "down") -> IndependentLoss:
    return IndependentLoss(probability, stage_rng(seed, name, "loss"))


def arrivals(link: Link, count: int = 200, gap_s: float = 0.01) -> list[tuple[int, float]]:
    """Send packets 0, 1, ... at a steady rate; return what arrives when, in order of arrival."""
    for index in range(count):
        link.send(index * gap_s, Packet(index.to_bytes(2, "big"), 2))
    out = []
    while (time := link.next_time()) is not None:
        out += [(int.from_bytes(packet.data, "big"), time) for packet in link.poll(time)]
    return out


def first_arrivals(link: Link) -> dict[int, float]:
    first: dict[int, float] = {}
    for index, time in arrivals(link):
        first.setdefault(index, time)
    return first


def trace_of_a_process(hash_seed: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", TRACE],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_a_seed_gives_the_same_trace_in_every_process() -> None:
    traces = {trace_of_a_process(hash_seed) for hash_seed in ("0", "1", "4242")}
    assert len(traces) == 1
    assert len(traces.pop()) > 1000


def test_another_seed_link_or_stage_gives_another_stream() -> None:
    streams = {
        stage_rng(seed, link, stage).random()
        for seed in (0, 1)
        for link in ("up", "down")
        for stage in ("loss", "jitter")
    }
    assert len(streams) == 8


def test_a_seed_s_stream_is_known() -> None:
    # Figures that were published with a seed stay reproducible.
    assert stage_rng(7, "down", "loss").random() == random.Random("7/down/loss").random()
    assert stage_rng(7, "down", "loss").random() == pytest.approx(0.5769794818188465)


def test_a_plain_link_only_delays() -> None:
    link = Link(delay_s=0.05, seed=1, name="down")
    assert link.next_time() is None
    link.send(1.0, Packet(b"a", 1))
    link.send(1.01, Packet(b"bc", 2))
    assert link.next_time() == pytest.approx(1.05)
    assert [packet.data for packet in link.poll(1.049)] == []
    assert [packet.data for packet in link.poll(1.055)] == [b"a"]
    assert [packet.data for packet in link.poll(1.055)] == []
    assert [packet.data for packet in link.poll(9.0)] == [b"bc"]
    assert link.next_time() is None
    assert (link.packets_sent, link.bytes_sent) == (2, 3)


def test_dropped_packets_entered_the_link() -> None:
    link = Link(delay_s=0.05, seed=1, name="down", loss=DropList([0, 2]))
    for packet in (b"a", b"bb", b"cccc", b"d"):
        link.send(0.0, Packet(packet, len(packet)))
    assert [packet.data for packet in link.poll(0.05)] == [b"bb", b"d"]
    assert (link.packets_sent, link.bytes_sent) == (4, 8)


@pytest.mark.parametrize("options", [{"jitter_s": 0.05}, {"jitter_s": 0.05, "reorders": True}])
@pytest.mark.parametrize("duplicates", [0.0, 0.3])
def test_jitter_and_duplicates_do_not_change_which_packets_are_lost(
    options: dict[str, float], duplicates: float
) -> None:
    plain = Link(delay_s=0.05, seed=3, name="down", loss=lossy(3))
    varied = Link(
        delay_s=0.05, seed=3, name="down", loss=lossy(3), duplicates=duplicates, **options
    )  # type: ignore[arg-type]
    assert set(first_arrivals(plain)) == set(first_arrivals(varied))


def test_duplicates_do_not_change_when_the_packets_themselves_arrive() -> None:
    without, with_duplicates = (
        Link(
            delay_s=0.05, seed=3, name="down", jitter_s=0.004, reorders=True, duplicates=probability
        )
        for probability in (0.0, 0.3)
    )
    plain = dict(arrivals(without))
    times = arrivals(with_duplicates)
    assert len(times) > len(plain)
    assert all((index, time) in times for index, time in plain.items())


def test_loss_does_not_change_when_other_packets_arrive() -> None:
    options = {"delay_s": 0.05, "seed": 3, "name": "down", "jitter_s": 0.004, "duplicates": 0.3}
    clean = arrivals(Link(**options, reorders=True))  # type: ignore[arg-type]
    thinned = arrivals(Link(**options, reorders=True, loss=lossy(3)))  # type: ignore[arg-type]
    kept = {index for index, _ in thinned}
    assert len(kept) < 180
    assert thinned == [(index, time) for index, time in clean if index in kept]


@given(st.integers(0, 1000), st.sampled_from([0.0, 0.5]))
def test_nothing_is_reordered_unless_asked(seed: int, duplicates: float) -> None:
    link = Link(
        delay_s=0.05, seed=seed, name="down", jitter_s=0.2, loss=lossy(seed), duplicates=duplicates
    )
    order = [index for index, _ in arrivals(link, count=60)]
    first = list(dict.fromkeys(order))
    assert first == sorted(first)
    assert order == sorted(order)


def test_packets_overtake_each_other_when_asked() -> None:
    link = Link(delay_s=0.05, seed=1, name="down", jitter_s=0.05, reorders=True)
    times = arrivals(link)
    order = [index for index, _ in times]
    assert order != sorted(order)
    assert sorted(order) == list(range(200))
    assert all(0.05 <= time - index * 0.01 < 0.1 + 1e-9 for index, time in times)


def test_packets_that_arrive_together_keep_their_order() -> None:
    link = Link(delay_s=0.05, seed=1, name="down", reorders=True)
    for index in range(20):
        link.send(0.0, Packet(bytes((index,)), 1))
    assert [packet.data for packet in link.poll(0.05)] == [bytes((index,)) for index in range(20)]


def test_duplicates_come_as_often_as_asked_and_twice_at_most() -> None:
    link = Link(delay_s=0.05, seed=1, name="down", duplicates=0.25)
    order = [index for index, _ in arrivals(link, count=2000)]
    copies = [order.count(index) for index in range(2000)]
    assert set(copies) == {1, 2}
    assert copies.count(2) / 2000 == pytest.approx(0.25, abs=0.04)
    assert link.packets_sent == 2000


def test_a_lost_packet_has_no_duplicate() -> None:
    link = Link(delay_s=0.05, seed=1, name="down", loss=DropList([1]), duplicates=1.0)
    assert [index for index, _ in arrivals(link, count=3)] == [0, 0, 2, 2]
