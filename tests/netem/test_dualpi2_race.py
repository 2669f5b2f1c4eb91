"""Races: a packet of the subject waits in both queues and leaves by the first that passes it."""

import random
from itertools import chain, repeat
from math import inf, isfinite, isnan

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


# What one queue drops stays in the other. Overload: both drop, what the draws say, while two full
# packets are left behind.


def overloaded(*draws: float, shadow_draw: float = 0.999) -> World:
    """Return a race whose real packets have these draws, and then pass."""
    world = World(is_race=True, shadow_draw=shadow_draw)
    world.queue._p, world.queue._next_update_s = 0.9, inf
    world.queue._random = chain(draws, repeat(0.999)).__next__
    return world


def left_s(world: World, packet: Packet) -> float | None:
    """Return when a packet came out."""
    return next((time for time, one in world.out if one is packet), None)


def test_what_c_drops_first_takes_its_turn_in_l() -> None:
    world = overloaded(shadow_draw=0.0)
    world.send(0.0, L4S, count=51)
    asked = world.ask(0.0, size=150)
    [passage] = world.end()
    assert passage.wait_s == [pytest.approx(51 * MS), inf]
    assert left_s(world, asked) == pytest.approx(51.1 * MS)
    assert world.queue.drops == 0


def test_what_l_drops_first_takes_its_turn_in_c() -> None:
    world = overloaded(0.0, 0.0)
    world.send(0.0, CLASSIC, count=3)
    asked = world.ask(0.2 * MS, L4S, 150)
    world.send(0.2 * MS, L4S, count=9)
    [passage] = world.end()
    # At 1 ms L drops it. Then nine of L, one of C, and since L is empty, the other one.
    assert passage.wait_s == [inf, pytest.approx(11.8 * MS)]
    assert left_s(world, asked) == pytest.approx(12.1 * MS)
    assert world.queue.drops == 0


def test_what_c_drops_as_its_own_takes_its_turn_in_l() -> None:
    world = overloaded(0.0, 0.0)
    world.send(0.0, L4S, count=4)
    asked = world.ask(0.2 * MS, CLASSIC, 150)
    world.queue._credit = 1  # C is first.
    world.send(0.2 * MS, L4S, count=5)
    [passage] = world.end()
    assert passage.wait_s == [pytest.approx(3.8 * MS), inf]
    assert left_s(world, asked) == pytest.approx(4.1 * MS)
    assert asked.ecn is CLASSIC
    assert world.queue.drops == 0


def test_what_both_drop_is_lost_and_told_once() -> None:
    c_first = overloaded(*[0.999] * 50, 0.0, 0.0, shadow_draw=0.0)
    c_first.send(0.0, L4S, count=51)
    asked = c_first.ask(0.0, size=150)
    c_first.send(0.0, L4S, count=4)
    l_first = overloaded(0.0, 0.0, shadow_draw=0.0)
    l_first.send(0.0, CLASSIC, count=3)
    asked_too = l_first.ask(0.2 * MS, size=150)
    l_first.send(0.2 * MS, L4S, count=30)
    for world, packet, drops in ((c_first, asked, (1, 0)), (l_first, asked_too, (0, 1))):
        assert [one.wait_s for one in world.end()] == [[inf, inf]]
        assert left_s(world, packet) is None
        assert (world.queue.l_drops, world.queue.c_drops) == drops


def test_who_waits_behind_what_has_moved_keeps_its_turn() -> None:
    world = overloaded(0.0, 0.0)
    world.send(0.0, CLASSIC, count=3)
    world.ask(0.2 * MS, size=150)
    world.send(0.2 * MS, L4S, count=40)
    last = world.send(0.2 * MS, CLASSIC)
    world.ask(0.2 * MS, size=150)
    first, second = world.end()
    # Twice nine of L and one of C, nine of L, and it: 1,500 of credit are left, for the last of C.
    # That leaves -133,500, so nine of L before the second.
    assert first.wait_s == [inf, pytest.approx(29.8 * MS)]
    assert left_s(world, last) == pytest.approx(31.1 * MS)
    assert second.wait_s[C] == pytest.approx(39.9 * MS)


def test_what_has_moved_has_the_credit_of_its_wait() -> None:
    world = overloaded(*[0.999] * 5, 0.0, 0.0)
    world.send(0.0, L4S, count=6)
    world.ask(0.0, size=150)
    world.send(0.0, L4S, count=20)
    [passage] = world.end()
    # L drops it at 6 ms, when it has waited for five of nine.
    assert passage.wait_s == [inf, pytest.approx(10 * MS)]


def test_what_c_drops_leaves_there_the_credit_of_its_wait() -> None:
    world = overloaded()
    world.queue._shadow_random = chain((0.0, 0.0), repeat(0.999)).__next__
    world.send(0.0, L4S, count=61)
    world.ask(0.0, size=150)
    world.ask(10.05 * MS, size=150)
    second, first = world.end()
    # At 10 ms, after nine of L, C drops the first. The second waits for what is being served, and
    # delays the first by 0.1 ms.
    assert first.wait_s == [pytest.approx(61.1 * MS), inf]
    assert second.wait_s[C] == pytest.approx(0.95 * MS)


def test_what_has_moved_into_an_empty_queue_is_not_forgotten() -> None:
    world = overloaded(0.0, 0.0)
    world.send(0.0, CLASSIC)
    asked = world.ask(0.2 * MS, size=150)
    world.send(0.2 * MS, L4S, count=3)
    world.run()
    assert left_s(world, asked) == pytest.approx(4.1 * MS)
    assert [one.packet for one in world.passages] == [asked]


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


@given(
    STEPS,
    st.booleans(),
    st.sampled_from(["wrr", "time-shifted"]),
    st.none() | st.floats(0, 1),
    st.integers(0, 99),
)
def test_no_packet_is_lost_or_doubled_and_each_passage_is_told_once(
    steps: list[tuple[float, Ecn, int, int, int]],
    is_race: bool,
    scheduler: str,
    fixed_p: float | None,
    seed: int,
) -> None:
    world = World(scheduler=scheduler, is_race=is_race, limit_packets=60)
    world.queue._random = world.queue._shadow_random = random.Random(seed).random
    if fixed_p is not None:
        world.queue._p, world.queue._next_update_s = fixed_p, inf
    now = 0.0
    sent: list[tuple[Packet, int]] = []
    for gap_s, ecn, size, count, flow in steps:
        now += gap_s
        for _ in range(count):
            packet = world.send(now, ecn, size=size, flow=flow)
            sent.append((packet, L if ecn is L4S else C))
    passages = world.end()
    out = [id(packet) for _, packet in world.out]
    assert len(set(out)) == len(out)
    assert len(out) + world.queue.drops == len(sent) + 1
    assert world.queue.packets == world.queue._backlog_bytes == 0
    subjects = [id(packet) for packet, _ in sent if packet.flow == SUBJECT]
    assert sorted(id(one.packet) for one in passages) == sorted(subjects)
    times = {id(packet): time for time, packet in world.out}
    left_by = {id(packet): queue for packet, queue in sent}
    for one in passages:
        known = [wait_s for wait_s in one.wait_s if not isnan(wait_s)]
        assert len(known) == 2 or is_race
        took_s = times.get(id(one.packet), inf) - one.entered_s - one.packet.size * 8 / BITS_PER_S
        arrived = min(known) if is_race else one.wait_s[one.queue]
        assert took_s == pytest.approx(arrived, abs=1e-9)
        assert min(known) >= 0
        if is_race and isfinite(arrived):
            left_by[id(one.packet)] = one.wait_s.index(arrived)
    order = {id(packet): number for number, (packet, _) in enumerate(sent)}
    for queue in (L, C):
        left = [order[one] for one in out if left_by.get(one) == queue]
        assert left == sorted(left)
