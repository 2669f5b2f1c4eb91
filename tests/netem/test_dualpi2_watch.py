"""What a watched DualPI2 says of the other queue is what happens there, and it disturbs nothing."""

import hashlib
import random
from collections.abc import Iterator
from math import inf, isnan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eloquent_netem.dualpi2 import DualPi2
from eloquent_netem.dualpi2_watch import C, L, Passage, Watch, WatchedDualPi2
from eloquent_netem.link import Link
from eloquent_netem.packet import SUBJECT, Ecn, Packet
from eloquent_netem.rate import FixedRate, PausedRate, Rate, TraceRate
from eloquent_netem.scenario import Scenario, parse_scenario
from eloquent_netem.scenario_build import build_cross, build_link
from eloquent_netem.scenario_parts import DOWN, UP
from eloquent_netem.scenario_schema import ScenarioError
from eloquent_netem.sim import Actor

CLASSIC, L4S = Ecn.NOT_ECT, Ecn.ECT_1
BITS_PER_S = 12e6
MS = 0.001
"What a full packet takes at that rate."

OTHERS = 1
"The flow of what is not the subject's."


class Always(random.Random):
    """Draws the same each time."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def random(self) -> float:
        return self.value


class World:
    """A link with a watched queue whose draws mark and drop nothing, unless told to."""

    def __init__(
        self,
        *,
        scheduler: str = "wrr",
        is_race: bool = False,
        rate: Rate | None = None,
        limit_packets: int = 10_000,
        draw: float = 0.999,
        shadow_draw: float = 0.999,
    ) -> None:
        self.passages: list[Passage] = []
        self.out: list[tuple[float, Packet]] = []
        rate = FixedRate(BITS_PER_S) if rate is None else rate
        self.queue = WatchedDualPi2(
            rng=Always(draw),
            shadow_rng=Always(shadow_draw),
            watch=Watch(report=self.passages.append, is_race=is_race),
            ready_s=lambda: self.link.ready_s(),  # noqa: PLW0108  (it is made below)
            rate_at=rate.bits_per_s,
            scheduler=scheduler,  # type: ignore[arg-type]
            limit_packets=limit_packets,
        )
        self.link = Link(delay_s=0.0, seed=1, name="down", rate=rate, queue=self.queue)

    def send(
        self, now: float, ecn: Ecn, *, size: int = 1500, flow: int = OTHERS, count: int = 1
    ) -> Packet:
        """Send packets; return the last."""
        self.run(now)
        for _ in range(count):
            packet = Packet(b"", size, ecn, flow)
            self.link.send(now, packet)
        return packet

    def ask(self, now: float, ecn: Ecn = L4S, size: int = 0) -> Packet:
        """Send a packet of the subject."""
        return self.send(now, ecn, size=size, flow=SUBJECT)

    def run(self, until_s: float = inf) -> None:
        while (time := self.link.next_time()) is not None and time < until_s:
            self.out += [(time, packet) for packet in self.link.poll(time)]

    def end(self) -> list[Passage]:
        """Let all come out; one more packet, much later, ends the last waits."""
        self.run()
        now = max([time for time, _ in self.out], default=0.0) + 10
        self.send(now, CLASSIC)
        self.run()
        return self.passages


def waits_ms(passage: Passage) -> tuple[float, float]:
    return round(1000 * passage.wait_s[L], 6), round(1000 * passage.wait_s[C], 6)


def foretold_ms(passage: Passage) -> tuple[float, float]:
    return round(1000 * passage.foretold_s[L], 6), round(1000 * passage.foretold_s[C], 6)


# Cases by hand. A full packet takes 1 ms; the one that is being served when the subject's comes is
# the first of those that were sent at 0.


@pytest.mark.parametrize("scheduler", ["wrr", "time-shifted"])
@pytest.mark.parametrize("ecn", [L4S, CLASSIC])
def test_on_an_idle_link_neither_queue_waits(scheduler: str, ecn: Ecn) -> None:
    world = World(scheduler=scheduler)
    world.ask(1.0, ecn, 150)
    [passage] = world.end()
    assert passage.queue == (L if ecn is L4S else C)
    assert waits_ms(passage) == foretold_ms(passage) == (0, 0)


@pytest.mark.parametrize("ecn", [L4S, CLASSIC])
def test_both_wait_for_the_packet_that_is_being_served(ecn: Ecn) -> None:
    world = World()
    world.send(0.0, L4S)
    world.ask(0.4 * MS, ecn)
    [passage] = world.end()
    assert waits_ms(passage) == foretold_ms(passage) == (0.6, 0.6)


@pytest.mark.parametrize("ecn", [L4S, CLASSIC])
def test_a_lone_c_packet_waits_for_nine_of_l(ecn: Ecn) -> None:
    # -120,000 of credit, 15,000 for each L packet: after eight it is 0, which is still L's turn.
    world = World()
    world.send(0.0, L4S, count=51)
    world.ask(0.0, ecn)
    [passage] = world.end()
    assert waits_ms(passage) == foretold_ms(passage) == (51, 10)


@pytest.mark.parametrize("ecn", [L4S, CLASSIC])
def test_a_lone_c_packet_waits_no_longer_than_l_is(ecn: Ecn) -> None:
    world = World()
    world.send(0.0, L4S, count=4)
    world.ask(0.0, ecn)
    [passage] = world.end()
    assert waits_ms(passage) == foretold_ms(passage) == (4, 4)


@pytest.mark.parametrize("ecn", [L4S, CLASSIC])
def test_the_next_c_packet_waits_for_nine_of_l_for_each_in_front(ecn: Ecn) -> None:
    # The second C packet: -120,000 + 9 * 15,000 - 135,000 = -120,000: nine more, twice.
    world = World()
    world.send(0.0, L4S, count=51)
    world.send(0.0, CLASSIC)
    world.ask(0.0, ecn)
    [passage] = world.end()
    assert waits_ms(passage) == foretold_ms(passage) == (52, 20)


@pytest.mark.parametrize("ecn", [L4S, CLASSIC])
def test_a_lone_l_packet_goes_before_all_of_c(ecn: Ecn) -> None:
    world = World()
    world.send(0.0, CLASSIC, count=30)
    world.ask(0.0, ecn)
    [passage] = world.end()
    assert waits_ms(passage) == foretold_ms(passage) == (1, 30)


@pytest.mark.parametrize("ecn", [L4S, CLASSIC])
def test_behind_both_queues(ecn: Ecn) -> None:
    # L has 20, C has 2: nine of L, one of C, nine of L, one of C, then the rest.
    world = World()
    world.send(0.0, L4S, count=21)
    world.send(0.0, CLASSIC, count=2)
    world.ask(0.0, ecn)
    [passage] = world.end()
    assert waits_ms(passage) == foretold_ms(passage) == (23, 23)


@pytest.mark.parametrize("ecn", [L4S, CLASSIC])
def test_the_time_shifted_scheduler_lets_c_wait_50_ms_longer(ecn: Ecn) -> None:
    world = World(scheduler="time-shifted")
    world.send(0.0, L4S, count=20)
    world.ask(0.0, ecn)
    for number in range(1, 80):  # L has 20 packets from then on
        world.send(number * MS + 1e-6, L4S)
    [passage] = world.end()
    # What came to L more than 50 ms after it goes behind: 20 + 49.
    assert waits_ms(passage) == (20, 69)
    assert foretold_ms(passage) == (20, 20)


@pytest.mark.parametrize("ecn", [L4S, CLASSIC])
def test_the_time_shifted_scheduler_takes_old_packets_of_c_before_l(ecn: Ecn) -> None:
    world = World(scheduler="time-shifted")
    world.send(0.0, CLASSIC, count=91)
    world.ask(60.5 * MS, ecn)
    # At 61 ms 30 wait in C, and all came more than 50 ms before.
    [passage] = world.end()
    assert waits_ms(passage) == foretold_ms(passage) == (30.5, 30.5)


def test_c_waits_as_long_as_l_goes_on_filling_up_to_nine_packets() -> None:
    world = World()
    for number in range(40):
        world.send(number * MS, L4S, count=2)
        if number == 0:
            world.ask(0.0)
    [passage] = world.end()
    # Two came before it, one of which was being served; it goes after the ninth of L from then on.
    assert waits_ms(passage) == (2, 10)
    assert foretold_ms(passage) == (2, 2)


def test_a_shadow_behind_packets_is_served_when_the_packet_behind_it_is() -> None:
    world = World()
    world.send(0.0, CLASSIC, count=3)
    world.ask(0.0)
    world.send(0.0, CLASSIC)
    world.send(0.5 * MS, L4S, count=20)
    [passage] = world.end()
    order = [round(1000 * time) for time, packet in world.out if packet.ecn is CLASSIC]
    assert waits_ms(passage) == (1, order[3] - 1)


def test_what_comes_after_the_shadow_does_not_lend_it_credit() -> None:
    # L fills after C had the link; the credit when both were empty is the first one.
    for ecn in (L4S, CLASSIC):
        world = World()
        world.send(0.0, CLASSIC, count=2)
        world.send(5 * MS, L4S, count=30)
        world.ask(5 * MS, ecn)
        [passage] = world.end()
        assert waits_ms(passage) == (30, 10)


def test_a_shadow_that_is_left_alone_goes_when_the_link_is_free() -> None:
    world = World()
    world.send(0.0, L4S)
    world.send(0.0, CLASSIC)
    world.ask(0.5 * MS)  # L is served first, then C
    world.send(2.1 * MS, L4S, count=2)  # C's packet has been served
    [passage] = world.end()
    assert waits_ms(passage) == (0.5, 1.5)


def test_a_shadow_alone_meets_packets_that_come_before_the_link_is_free() -> None:
    world = World()
    world.send(0.0, L4S)
    world.send(0.0, CLASSIC)
    world.ask(0.5 * MS)
    world.send(1.7 * MS, L4S, count=2)  # while C's packet is being served
    [passage] = world.end()
    assert waits_ms(passage) == (0.5, 3.5)


def test_what_finds_the_queues_full_is_dropped_in_both() -> None:
    world = World(limit_packets=5)
    world.send(0.0, CLASSIC, count=6)
    world.ask(0.0)
    assert [passage.wait_s for passage in world.passages] == [[inf, inf]]
    assert world.queue.l_drops == 1


@pytest.mark.parametrize(
    ("updates", "draw", "left", "dropped"),
    [
        # p = 0.16176: C drops with p * p, L never.
        (3, 0.1617, 4, (False, True)),
        (3, 0.1618, 4, (False, False)),
        # p = 0.5544: overload, and both drop.
        (9, 0.5543, 4, (True, True)),
        (9, 0.5545, 4, (False, False)),
        # With less than two full packets left, nothing is.
        (9, 0.0, 0, (False, False)),
    ],
)
@pytest.mark.parametrize("ecn", [L4S, CLASSIC])
def test_a_shadow_is_dropped_as_a_packet_would_be(
    updates: int, draw: float, left: int, dropped: tuple[bool, bool], ecn: Ecn
) -> None:
    passages: list[Passage] = []
    queue = WatchedDualPi2(
        rng=Always(0.999),
        shadow_rng=Always(draw),
        watch=Watch(report=passages.append),
        ready_s=lambda: 0.0,
        rate_at=lambda now: BITS_PER_S,
    )
    queue.enqueue(0.0, Packet(b"", 1500, CLASSIC, OTHERS))  # it makes p grow
    now = 0.016 * updates + 0.0005
    queue.enqueue(now, subject := Packet(b"", 9000, ecn, entered_s=now))
    for size in (1000, *[1500] * left):
        queue.enqueue(now, Packet(b"", size, CLASSIC if ecn is L4S else L4S, OTHERS))
    other = C if ecn is L4S else L
    while queue.packets:
        queue.dequeue(now)
    assert [passage.packet is subject for passage in passages] == [True]
    is_dropped = [wait_s == inf for wait_s in passages[0].wait_s]
    assert is_dropped[other] == dropped[other]
    assert not is_dropped[1 - other]


# Traffic.


def scenario(
    cross: str,
    *,
    rate: str = 'kind = "fixed", mbit_s = 12',
    scheduler: str = "wrr",
    length_s: float = 15,
) -> Scenario:
    return parse_scenario(
        f"length_s = {length_s}\n[up]\ndelay_ms = 15\n[down]\ndelay_ms = 15\n"
        f'rate = {{ {rate} }}\nqueue = {{ kind = "dualpi2", scheduler = "{scheduler}" }}\n{cross}'
    )


def flows(*kinds: str) -> str:
    return "".join(f'[[cross]]\ndirection = "down"\nkind = {kind}\n' for kind in kinds)


TRAFFIC = {
    "bursts": flows('"bursts"\nmbit_s = 25\nburst_ms = 150', '"web"\ncount = 2'),
    "prague": flows('"prague"\ncount = 2', '"prague-web"\ncount = 2'),
    "both": flows('"prague"', '"cubic"', '"bursts"\nmbit_s = 20'),
    "cubic": flows('"cubic"\ncount = 2'),
}


class Ask:
    """Sends a packet of the subject every 20 to 30 ms, with codepoints from a list, but for one."""

    def __init__(
        self, link: Link, seed: int, ecn: list[Ecn], size: int, but_at_s: float | None
    ) -> None:
        self._but_at_s = but_at_s
        self._link = link
        self._rng = random.Random(seed)
        self._ecn = ecn
        self._size = size
        self._time = 0.5

    def next_time(self) -> float:
        return self._time

    def act(self, now: float) -> None:
        draw = self._rng.random()
        ecn = self._ecn[int(draw * len(self._ecn))]
        if now == self._but_at_s:
            ecn = CLASSIC if ecn is L4S else L4S
        packet = Packet(b"", self._size, ecn)
        self._link.send(now, packet)
        self._time += 0.02 + 0.01 * self._rng.random()


def departures(
    network: Scenario,
    seed: int,
    ecn: list[Ecn],
    *,
    watch: Watch | None,
    size: int = 150,
    but_at_s: float | None = None,
) -> Iterator[tuple[float, Packet, DualPi2]]:
    """Yield what comes out and when, beside the queue that it came through."""
    up, down = build_link(network, UP, seed, 0.0), build_link(network, DOWN, seed, 0.0, watch)
    cross = build_cross(network, (up, down), seed, 0.0)
    queue = down.queue
    assert isinstance(queue, DualPi2)
    ask = Ask(down, seed, ecn, size, but_at_s)
    actors: list[Actor] = [ask, *cross]
    now = 0.0
    while now < network.length_s:
        times = [time for actor in actors if (time := actor.next_time()) is not None]
        if (time := down.next_time()) is not None:
            times.append(time)
        now = max(now, min(times))
        for packet in down.poll(now):
            yield now, packet, queue
            for flow in cross:
                flow.on_delivered(now, packet)
        for actor in actors:
            time = actor.next_time()
            if time is not None and time <= now:
                actor.act(now)


RATES = {
    "fixed": 'kind = "fixed", mbit_s = 12',
    "steps": 'kind = "steps", steps = [[0, 20], [4, 5], [6, 20], [11, 3], [13, 15]]',
    "cellular": 'kind = "cellular", mean_mbit_s = 10',
}


def digest(network: Scenario, watch: Watch | None) -> str:
    """Return the hash of all that comes out, and of what the queue has counted."""
    sha = hashlib.sha256()
    counts: tuple[int, ...] = ()
    for now, packet, queue in departures(network, 3, [L4S, CLASSIC], watch=watch):
        sha.update(f"{now!r} {packet.flow} {packet.size} {packet.ecn}".encode())
        counts = queue.l_drops, queue.c_drops, queue.l_marks, queue.c_marks
    return f"{sha.hexdigest()} {counts}"


@pytest.mark.parametrize("scheduler", ["wrr", "time-shifted"])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("traffic", TRAFFIC)
def test_watching_changes_nothing(scheduler: str, rate: str, traffic: str) -> None:
    network = scenario(TRAFFIC[traffic], rate=RATES[rate], scheduler=scheduler, length_s=8)
    passages: list[Passage] = []
    assert digest(network, Watch(report=passages.append)) == digest(network, None)
    assert len(passages) > 200


@pytest.mark.parametrize("scheduler", ["wrr", "time-shifted"])
@pytest.mark.parametrize("traffic", ["bursts", "both"])
@pytest.mark.parametrize("ecn", [L4S, CLASSIC])
def test_a_shadow_meets_what_its_packet_would_have_met(
    scheduler: str, traffic: str, ecn: Ecn
) -> None:
    network = scenario(TRAFFIC[traffic], scheduler=scheduler, length_s=6)
    passages: dict[float, Passage] = {}
    watch = Watch(report=lambda one: passages.update({one.entered_s: one}))
    for _ in departures(network, 2, [ecn], watch=watch):
        pass
    other = C if ecn is L4S else L
    errors_s: list[float] = []
    for entered_s in sorted(passages)[5::20]:
        truth: dict[float, Passage] = {}
        watch = Watch(report=lambda one, of=truth: of.update({one.entered_s: one}))  # type: ignore[misc]
        for _ in departures(network, 2, [ecn], watch=watch, but_at_s=entered_s):
            if entered_s in truth:
                break
        pair = passages[entered_s].wait_s[other], truth[entered_s].wait_s[other]
        if inf not in pair:  # Drops are drawn.
            errors_s.append(abs(pair[0] - pair[1]))
    errors_s.sort()
    assert len(errors_s) > 7
    # The packet's own 0.1 ms, and in a few a full packet or, after other draws, some of them.
    assert errors_s[len(errors_s) * 6 // 10] < 0.00011
    assert errors_s[len(errors_s) * 7 // 10] < 0.0025


# Races.


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


# The rest of what is promised.


def test_the_state_knows_the_present_rate_not_when_a_stall_ends() -> None:
    # An opportunity each millisecond for 200 ms, then none for 800.
    world = World(rate=TraceRate([*range(1, 201), 1000]))
    world.send(0.1985, L4S, count=3)  # two of them wait for the stall's end
    world.ask(0.2005)
    [passage] = world.end()
    assert foretold_ms(passage)[L] == pytest.approx(2, abs=0.1)
    assert passage.wait_s[L] > 0.7


def test_a_shadow_waits_for_the_end_of_a_hold() -> None:
    world = World(rate=PausedRate(FixedRate(BITS_PER_S), [(0.0015, 0.5)]))
    world.send(0.0, L4S)
    world.send(0.0, CLASSIC)
    world.ask(0.5 * MS)
    [passage] = world.end()
    assert passage.wait_s[L] == pytest.approx(0.5 * MS)
    assert passage.wait_s[C] == pytest.approx(0.5, abs=0.001)


def test_only_dualpi2_can_be_watched() -> None:
    network = parse_scenario('[down]\nrate = { kind = "fixed", mbit_s = 5 }\n')
    with pytest.raises(ScenarioError, match="only dualpi2 has two queues"):
        build_link(network, DOWN, 1, 0.0, Watch(report=lambda _: None))
