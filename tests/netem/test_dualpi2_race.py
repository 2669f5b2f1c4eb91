"""Races: a packet of the subject waits in both queues of DualPI2 and leaves by the first."""

from math import inf, isnan

import pytest
from hypothesis import given
from hypothesis import strategies as st
from watched_link import BITS_PER_S, CLASSIC, L4S, MS, OTHERS, World

from eloquent_netem.dualpi2_watch import C, L
from eloquent_netem.packet import SUBJECT, Ecn, Packet


def test_in_a_race_a_packet_leaves_from_whichever_queue_is_first() -> None:
    for ecn in (L4S, CLASSIC):
        for waiting, queue, wait_s in ((L4S, C, 10 * MS), (CLASSIC, L, MS)):
            world = World(is_race=True)
            world.send(0.0, waiting, count=51)
            world.ask(0.0, ecn)
            [passage] = world.end()
            assert passage.wait_s[queue] == pytest.approx(wait_s)
            assert isnan(passage.wait_s[1 - queue])


@pytest.mark.parametrize("ecn", [L4S, CLASSIC])
def test_a_tie_is_its_own_queue_s(ecn: Ecn) -> None:
    world = World(is_race=True)
    world.ask(0.0, ecn, 150)
    world.send(1.0, L4S)
    world.ask(1.0, ecn, 150)
    for passage in world.end():
        assert isnan(passage.wait_s[1 - passage.queue])


def test_who_wins_in_c_pays_for_it_there() -> None:
    world = World(is_race=True)
    world.send(0.0, L4S, count=61)
    for _ in range(3):
        world.ask(0.0, size=150)
    passages = world.end()
    # 15,000 of credit after nine of L, the first takes 13,500 of it, and the next goes at once; it
    # leaves -12,000, so the third waits for one more of L.
    waits = [round(1000 * one.wait_s[C], 3) for one in passages]
    assert waits == [10, 10.1, 11.2]


def test_who_wins_in_c_leaves_the_credit_to_who_comes_next() -> None:
    world = World(is_race=True)
    world.send(0.0, L4S, count=61)
    world.ask(0.0, size=150)
    world.ask(10.05 * MS, size=150)
    # 1,500 of credit are left.
    assert world.end()[1].wait_s[C] == pytest.approx(0.05 * MS)


def test_who_wins_leaves_a_gap_where_it_has_waited() -> None:
    world = World(is_race=True)
    world.send(0.0, L4S, count=16)
    world.ask(0.0, L4S, 150)
    world.send(0.0, CLASSIC, count=5)
    world.ask(0.0, CLASSIC, 150)
    world.send(0.0, L4S, count=20)
    first, second = world.end()
    # Nine of L, the first wins in C (0.1 ms), one of C, and the six of L in front of the second.
    assert first.wait_s[C] == pytest.approx(10 * MS)
    assert second.wait_s[L] == pytest.approx(17.1 * MS)


def test_who_loses_in_c_has_changed_nothing_there() -> None:
    def classic_at(*, is_race: bool) -> float:
        world = World(is_race=is_race)
        for number in range(8):
            world.send(10 * number * MS, L4S, count=4)
            world.ask(10 * number * MS)
        world.send(100 * MS, L4S, count=40)
        packet = world.send(100 * MS, CLASSIC)
        world.end()
        return next(time for time, one in world.out if one is packet)

    assert classic_at(is_race=True) == classic_at(is_race=False) == pytest.approx(0.111)


@pytest.mark.parametrize(
    ("draw", "shadow_draw", "in_front", "dropped_in"),
    [
        (0.0, 0.999, CLASSIC, L),
        (0.999, 0.0, CLASSIC, None),
        (0.0, 0.999, L4S, None),
        (0.999, 0.0, L4S, C),
    ],
)
def test_a_packet_is_dropped_by_the_queue_that_is_first_alone(
    draw: float, shadow_draw: float, in_front: Ecn, dropped_in: int | None
) -> None:
    world = World(is_race=True, draw=draw, shadow_draw=shadow_draw)
    queue = world.queue
    queue._p, queue._next_update_s = 0.9, inf
    world.send(0.0, CLASSIC)
    world.send(0.1 * MS, in_front, count=2)
    asked = world.ask(0.2 * MS, L4S, 150)
    if in_front is L4S:
        queue._credit = 1  # A lone packet of C goes first.
    world.send(0.3 * MS, CLASSIC, count=4)
    [passage] = world.end()
    first = L if in_front is CLASSIC else C
    assert passage.wait_s[first] == (inf if dropped_in == first else pytest.approx(0.8 * MS))
    assert isnan(passage.wait_s[1 - first])
    assert (asked in [packet for _, packet in world.out]) == (dropped_in is None)


STEPS = st.lists(
    st.tuples(
        st.floats(0, 0.01),
        st.sampled_from([L4S, CLASSIC]),
        st.integers(40, 1500),
        st.integers(1, 12),
        st.sampled_from([SUBJECT, OTHERS, OTHERS]),
    ),
    min_size=1,
    max_size=60,
)


@given(STEPS, st.booleans(), st.sampled_from(["wrr", "time-shifted"]), st.floats(0, 1))
def test_no_packet_is_lost_or_doubled_and_each_passage_is_told_once(
    steps: list[tuple[float, Ecn, int, int, int]], is_race: bool, scheduler: str, draw: float
) -> None:
    world = World(
        scheduler=scheduler, is_race=is_race, draw=draw, shadow_draw=1 - draw, limit_packets=60
    )
    now, sent = 0.0, 1
    subjects: list[Packet] = []
    for gap_s, ecn, size, count, flow in steps:
        now += gap_s
        for _ in range(count):
            packet = world.send(now, ecn, size=size, flow=flow)
            sent += 1
            if flow == SUBJECT:
                subjects.append(packet)
    passages = world.end()
    out = [id(packet) for _, packet in world.out]
    assert len(set(out)) == len(out)
    assert len(out) + world.queue.drops == sent
    assert sorted(id(one.packet) for one in passages) == sorted(map(id, subjects))
    times = {id(packet): time for time, packet in world.out}
    for one in passages:
        known = [wait_s for wait_s in one.wait_s if not isnan(wait_s)]
        assert len(known) == 2 or is_race
        took_s = times.get(id(one.packet), inf) - one.entered_s - one.packet.size * 8 / BITS_PER_S
        arrived = min(known) if is_race else one.wait_s[one.queue]
        assert took_s == pytest.approx(arrived, abs=1e-9)
        assert min(one.wait_s) >= 0 or isnan(sum(one.wait_s))
