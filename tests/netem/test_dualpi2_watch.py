"""What a watched DualPI2 says of the other queue is what happens there, and it disturbs nothing."""

import hashlib
import random
from collections.abc import Iterator
from math import inf

import pytest
from watched_link import BITS_PER_S, CLASSIC, L4S, MS, OTHERS, Always, World, foretold_ms, waits_ms

from eloquent_netem.dualpi2 import DualPi2
from eloquent_netem.dualpi2_watch import C, L, Passage, Watch, WatchedDualPi2
from eloquent_netem.link import Link
from eloquent_netem.packet import Ecn, Packet
from eloquent_netem.rate import FixedRate, PausedRate, TraceRate
from eloquent_netem.scenario import Scenario, parse_scenario
from eloquent_netem.scenario_build import build_cross, build_link
from eloquent_netem.scenario_parts import DOWN, UP
from eloquent_netem.scenario_schema import ScenarioError
from eloquent_netem.sim import Actor

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


# The credit that a shadow goes by: its own packet, of full size here, is not there.


def test_what_its_own_packet_pays_is_not_a_shadow_s() -> None:
    world = World()
    world.send(0.0, L4S)
    world.ask(0.0, L4S, 1500)
    world.send(0.0, L4S, count=40)
    [passage] = world.end()
    # The packet in service, its own, and nine others.
    assert waits_ms(passage) == (1, 11)


def test_what_its_own_packet_pays_beside_others_is_not_a_shadow_s() -> None:
    world = World()
    world.send(0.0, L4S)
    world.send(0.0, CLASSIC)
    world.ask(0.0, L4S, 1500)
    world.send(0.0, L4S, count=40)
    [passage] = world.end()
    # Its own and eight others, C's packet; from then on ten others, since it had nine but for one.
    assert waits_ms(passage) == (1, 21)


def test_its_own_packet_does_not_make_others_pay() -> None:
    world = World()
    world.send(0.0, L4S, count=10)
    world.ask(0.0, CLASSIC)
    world.send(0.1 * MS, L4S, count=20)
    world.send(9.5 * MS, CLASSIC)
    [passage] = world.end()
    # Its own packet has waited for nine, so it is C's turn: not so if C's other came first.
    assert waits_ms(passage) == (10, 10)


def test_its_own_packet_s_age_does_not_hold_a_shadow_back() -> None:
    world = World(scheduler="time-shifted")
    world.send(0.0, CLASSIC, count=131)
    world.ask(55 * MS, L4S, 1500)
    world.send(110 * MS, L4S)
    [passage] = world.end()
    # Before what came to L 55 ms later, though not before what came at the same time.
    assert waits_ms(passage) == (76, 76)


def test_a_shadow_s_credit_outlasts_the_others() -> None:
    world = World()
    world.send(0.0, L4S)
    world.send(0.0, CLASSIC, size=500)
    world.ask(0.0)
    world.send(0.0, L4S, count=11)
    world.send(12 * MS, L4S, count=20)
    [passage] = world.end()
    # Nine of L, C's 500 bytes: -30,000. Two of L, and the last is being served when others come:
    # 0, so one more.
    assert waits_ms(passage) == (1, 13.333333)


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
