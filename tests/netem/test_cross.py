"""Cross traffic fills, shares and yields as the congestion controls do that it stands for."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import mean, median

import pytest

from eloquent_netem.cross import (
    CrossFlow,
    CubicEcnFlow,
    CubicFlow,
    PragueFlow,
    PragueWebFlows,
    Transfers,
    UnresponsiveBursts,
    WebFlows,
)
from eloquent_netem.cross_windowed import Send, WindowedFlow
from eloquent_netem.dualpi2 import DualPi2
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import IndependentLoss, Loss
from eloquent_netem.packet import Ecn, Packet
from eloquent_netem.queues import DropTail, Queue
from eloquent_netem.rate import FixedRate
from eloquent_netem.sim import simulate

RATE_BITS_PER_S = 20e6
DELAY_S = 0.005
RTT_S = 0.010
SETTLED_S = 5.0

Build = Callable[[int, Send, float, random.Random], CrossFlow]


class Bottleneck:
    """A link as an actor: hands out what it delivers and writes down how long it had queued."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.flows: dict[int, CrossFlow] = {}
        self.out: list[tuple[float, int, float, int]] = []
        "When, flow, sojourn in the queue in seconds, size."

    def next_time(self) -> float | None:
        return self.link.next_time()

    def act(self, now: float) -> None:
        for packet in self.link.poll(now):
            service_s = packet.size * 8 / RATE_BITS_PER_S
            waited_s = now - DELAY_S - service_s - packet.entered_s
            self.out.append((now, packet.flow, waited_s, packet.size))
            self.flows[packet.flow].on_delivered(now, packet)

    def waits(self, flow: int) -> list[float]:
        return [waited_s for now, of, waited_s, _ in self.out if of == flow and now > SETTLED_S]

    def bits_per_s(self, flow: int, until_s: float) -> float:
        sizes = [size for now, of, _, size in self.out if of == flow and now > SETTLED_S]
        return sum(sizes) * 8 / (until_s - SETTLED_S)


class Clock:
    """Ends a simulation at a time."""

    def __init__(self, end_s: float) -> None:
        self.end_s = end_s
        self.is_over = False

    def next_time(self) -> float:
        return self.end_s

    def act(self, now: float) -> None:
        self.is_over = True


def run(
    builds: Sequence[Build], queue: Queue, seconds: float, *, loss: Loss | None = None
) -> Bottleneck:
    rate = FixedRate(RATE_BITS_PER_S)
    link = Link(delay_s=DELAY_S, seed=1, name="down", rate=rate, queue=queue, loss=loss)
    path, clock = Bottleneck(link), Clock(seconds)
    for number, build in enumerate(builds, start=1):
        path.flows[number] = build(number, link.send, RTT_S, stage_rng(1, "down", f"flow{number}"))
    actors = [path, *path.flows.values(), clock]
    simulate(actors, until=lambda: clock.is_over, start_s=0.0, limit_s=seconds)
    return path


@pytest.mark.parametrize("scheduler", ["wrr", "time-shifted"])
def test_through_dualpi2_prague_hardly_waits_and_cubic_waits_for_the_target(scheduler: str) -> None:
    queue = DualPi2(
        rng=stage_rng(1, "down", "queue"),
        scheduler=scheduler,  # type: ignore[arg-type]
        bits_per_s=RATE_BITS_PER_S,
    )
    path = run([PragueFlow, CubicFlow], queue, 25.0)
    # Measured over 12 seeds: 0.2 ms, 15.1 to 15.4 ms, and a ratio of 0.55 to 0.84.
    assert median(path.waits(1)) < 0.002
    assert 0.013 < mean(path.waits(2)) < 0.017
    prague, cubic = path.bits_per_s(1, 25.0), path.bits_per_s(2, 25.0)
    assert prague + cubic > 0.98 * RATE_BITS_PER_S
    assert 1 / 3 < prague / cubic < 3
    assert queue.l_drops == 0


def test_prague_alone_keeps_the_link_full_at_the_step() -> None:
    queue = DualPi2(rng=stage_rng(1, "down", "queue"), bits_per_s=RATE_BITS_PER_S)
    path = run([PragueFlow], queue, 15.0)
    assert path.bits_per_s(1, 15.0) > 0.95 * RATE_BITS_PER_S
    assert median(path.waits(1)) < 0.0015
    assert queue.drops == 0


def test_cubic_alone_fills_a_drop_tail_link() -> None:
    queue = DropTail(limit_packets=30)
    path = run([CubicFlow], queue, 20.0)
    assert path.bits_per_s(1, 20.0) > 0.9 * RATE_BITS_PER_S
    assert queue.drops > 20
    flow = path.flows[1]
    assert isinstance(flow, CubicFlow)
    # What is lost is found: at most the last few drops are not yet known.
    assert 0 <= queue.drops - flow.packets_lost <= 5


def test_two_cubics_share_a_drop_tail_link() -> None:
    path = run([CubicFlow, CubicFlow], DropTail(limit_packets=50), 25.0)
    shares = [path.bits_per_s(flow, 25.0) for flow in (1, 2)]
    assert sum(shares) > 0.95 * RATE_BITS_PER_S
    assert 0.5 < shares[0] / shares[1] < 2


def test_cubic_with_ecn_is_marked_and_loses_nothing() -> None:
    queue = DualPi2(rng=stage_rng(1, "down", "queue"), bits_per_s=RATE_BITS_PER_S)
    path = run([CubicEcnFlow], queue, 15.0)
    assert queue.drops == 0
    assert queue.c_marks > 20
    assert path.bits_per_s(1, 15.0) > 0.9 * RATE_BITS_PER_S
    assert 0.013 < mean(path.waits(1)) < 0.017


def test_a_run_is_the_same_every_time() -> None:
    def trace() -> list[tuple[float, int, float, int]]:
        queue = DualPi2(rng=stage_rng(1, "down", "queue"))
        kinds: list[Build] = [PragueFlow, CubicFlow, UnresponsiveBursts, WebFlows]
        return run(kinds, queue, 4.0).out

    first = trace()
    assert set(Counter(of for _, of, _, _ in first)) == {1, 2, 3, 4}
    assert first == trace()


class Bench:
    """A flow without a link: the test says what is delivered, when, and how it is marked."""

    def __init__(self, kind: type[WindowedFlow], **options: float) -> None:
        self.sent: list[Packet] = []
        self.times: list[float] = []
        self.flow = kind(
            3,
            self._send,
            0.1,
            random.Random(1),
            **options,  # type: ignore[arg-type]
        )
        self.flow.act(0.0)

    def _send(self, now: float, packet: Packet) -> None:
        self.sent.append(packet)
        self.times.append(now)

    def deliver(self, now: float, *indices: int, ce: bool = False) -> None:
        """Deliver packets and let their acknowledgements arrive, 50 ms later."""
        for index in indices:
            packet = self.sent[index]
            packet.ecn = Ecn.CE if ce else packet.ecn
            self.flow.on_delivered(now, packet)
        self.flow.act(now + 0.05)


@pytest.mark.parametrize(
    ("kind", "ecn"),
    [(CubicFlow, Ecn.NOT_ECT), (CubicEcnFlow, Ecn.ECT_0), (PragueFlow, Ecn.ECT_1)],
)
def test_the_first_window_and_its_codepoint(kind: type[WindowedFlow], ecn: Ecn) -> None:
    bench = Bench(kind)
    while (time := bench.flow.next_time()) is not None and time < 0.1:
        bench.flow.act(time)
    assert len(bench.sent) == 10
    assert {(packet.ecn, packet.flow, packet.size) for packet in bench.sent} == {(ecn, 3, 1500)}
    # CUBIC sends at once; Prague in slow start at twice a window each round trip.
    last = 0.0 if ecn is not Ecn.ECT_1 else 0.045
    assert bench.times[-1] == pytest.approx(last)


def test_an_acknowledgement_takes_what_the_link_leaves_of_the_round_trip() -> None:
    for forward_s, back_s in ((None, 0.05), (0.03, 0.07), (0.2, 0.0)):
        options = {} if forward_s is None else {"forward_s": forward_s}
        bench = Bench(CubicFlow, **options)
        bench.flow.on_delivered(0.04, bench.sent[0])
        assert bench.flow.next_time() == pytest.approx(0.04 + back_s)
        bench.flow.act(0.04 + back_s)
        assert bench.flow.rtt_s == pytest.approx(0.04 + back_s)
        assert len(bench.sent) == 12  # slow start: two for one


def test_a_copy_counts_once() -> None:
    bench = Bench(CubicFlow)
    bench.deliver(0.05, 0, 0)
    bench.deliver(0.06, 0)
    assert (bench.flow.delivered_bytes, bench.flow.window) == (1500, 11)


def test_a_packet_is_lost_after_three_later_ones() -> None:
    bench = Bench(CubicFlow)
    bench.deliver(0.05, 1, 2)
    assert (bench.flow.packets_lost, bench.flow.window) == (0, 12)
    bench.deliver(0.06, 3)
    assert (bench.flow.packets_lost, bench.flow.window) == (1, 13 * 0.7)


def test_cubic_yields_once_for_the_losses_of_one_round_trip() -> None:
    bench = Bench(CubicFlow)
    bench.deliver(0.05, 2, 3, 4)
    assert (bench.flow.packets_lost, bench.flow.window) == (2, 13 * 0.7)
    bench.deliver(0.06, 6, 7, 8)
    assert (bench.flow.packets_lost, bench.flow.window) == (3, 13 * 0.7)


def test_what_was_in_flight_is_lost_after_a_timeout_which_doubles() -> None:
    bench = Bench(CubicFlow)
    # Never measured: 0.1 + 4 * 0.05 s.
    for lost, due_s in ((10, 0.3), (11, 0.9), (12, 2.1)):
        time = bench.flow.next_time()
        assert time == pytest.approx(due_s)
        bench.flow.act(time or 0.0)
        assert (bench.flow.packets_lost, bench.flow.window) == (lost, 1)
        assert len(bench.sent) == lost + 1
    bench.deliver(2.2, 12)
    assert bench.flow.window == 2
    assert bench.flow.packets_lost == 12


def test_cubic_follows_the_cubic_back_to_where_it_was() -> None:
    bench = Bench(CubicFlow)
    flow = bench.flow
    now, next_index = 0.0, 0
    times: list[float] = []
    windows: list[float] = []
    is_cut = False
    while now < 9.0:
        now += 0.1
        end = len(bench.sent)
        # One packet is lost, when the window has reached 100.
        is_to_cut = not is_cut and flow.window >= 100
        bench.deliver(now - 0.05, *range(next_index + is_to_cut, end))
        is_cut = is_cut or is_to_cut
        next_index = end
        times.append(now)
        windows.append(flow.window)
    assert flow.packets_lost == 1
    cut = next(index for index, (one, two) in enumerate(pairwise(windows)) if two < one) + 1
    w_max = windows[cut] / 0.7
    k_s = (w_max * 0.3 / 0.4) ** (1 / 3)
    assert 4 < k_s < 6
    # RFC 9438 section 4.2: W(t) = 0.4 (t - K)^3 + W_max, from the first round after the cut on.
    for since_s in (k_s / 2, k_s, k_s + 1.5):
        at = cut + 1 + round(since_s / 0.1)
        assert windows[at] == pytest.approx(w_max + 0.4 * (since_s - k_s) ** 3, rel=0.01)


def test_prague_ends_slow_start_at_the_first_mark_and_halves() -> None:
    bench = Bench(PragueFlow)
    while len(bench.sent) < 10:
        bench.flow.act(bench.flow.next_time() or 0.0)
    bench.deliver(0.06, 0, 1, 2, 3)
    assert bench.flow.window == 14
    bench.deliver(0.07, 4, ce=True)
    assert bench.flow.window == 7
    bench.deliver(0.08, 5, ce=True)  # sent before the answer to the first
    assert bench.flow.window == 7
    bench.deliver(0.09, 6)
    assert 7 < bench.flow.window <= 7 + 1 / 7


@pytest.mark.parametrize(("rtt_s", "growth"), [(0.01, 0.16), (0.05, 1.0)])
def test_prague_grows_slower_on_paths_shorter_than_25_ms(rtt_s: float, growth: float) -> None:
    bench = Bench(PragueFlow, forward_s=0.1)  # acknowledgements return at once
    flow = bench.flow
    bench.sent[0].ecn = Ecn.CE
    for number in (0, 1):
        flow.on_delivered(bench.times[number] + rtt_s, bench.sent[number])
        flow.act(bench.times[number] + rtt_s)
    # The mark halves ten; then a packet is worth (RTT / 25 ms)^2 / 5, at most 1 / 5.
    assert flow.window == pytest.approx(5 + growth / 5)


def test_prague_takes_less_the_fewer_are_marked() -> None:
    bench = Bench(PragueFlow)
    flow = bench.flow
    now, seen = 0.0, 0
    cuts = []
    for number in range(51):
        now += 0.1
        while (time := flow.next_time()) is not None and time <= now:
            flow.act(time)
        end = len(bench.sent)
        before = flow.window
        is_marked = number % 10 == 0
        bench.deliver(now, seen, ce=is_marked)
        if is_marked:
            cuts.append(1 - flow.window / before)
        bench.deliver(now, *range(seen + 1, end))
        seen = end
    # The first mark finds a = 1. Between marks a falls by a sixteenth each round, and one marked
    # packet of a round brings it up by less than a sixteenth.
    assert cuts[0] == 0.5
    for earlier, later in pairwise(cuts):
        assert (15 / 16) ** 10 - 0.01 < later / earlier < (15 / 16) ** 8
    assert cuts[-1] < 0.05


def test_prague_keeps_two_packets_whatever_is_marked() -> None:
    bench = Bench(PragueFlow)
    now, seen = 0.0, 0
    for _ in range(40):
        now += 0.1
        while (time := bench.flow.next_time()) is not None and time <= now:
            bench.flow.act(time)
        end = len(bench.sent)
        bench.deliver(now, *range(seen, end), ce=True)
        seen = end
    assert bench.flow.window == 2


def test_prague_halves_for_a_loss() -> None:
    bench = Bench(PragueFlow)
    while len(bench.sent) < 10:
        bench.flow.act(bench.flow.next_time() or 0.0)
    bench.deliver(0.06, 1, 2, 3)
    assert bench.flow.window == 13 / 2


def test_flows_begin_when_they_are_told_to() -> None:
    for kind in (PragueFlow, CubicFlow):
        bench = Bench(kind, start_s=3.0)
        assert (bench.sent, bench.flow.next_time()) == ([], 3.0)
        bench.flow.act(3.0)
        assert bench.sent


def test_a_flow_that_is_called_late_sends_no_burst_to_catch_up() -> None:
    bench = Bench(PragueFlow)
    assert len(bench.sent) == 1
    bench.flow.act(0.04)
    assert len(bench.sent) <= 3


def test_bursts_heed_nothing_and_have_their_rate_and_lengths() -> None:
    sent: list[tuple[float, Packet]] = []
    bursts = UnresponsiveBursts(
        4,
        lambda now, packet: sent.append((now, packet)),
        RTT_S,
        random.Random(2),
        bits_per_s=12e6,
        mean_burst_s=0.2,
        mean_pause_s=0.5,
        start_s=1.0,
    )
    now = 0.0
    while now < 400:
        now = bursts.next_time() or 0.0
        bursts.act(now)
        if len(sent) % 7 == 0:
            sent[-1][1].ecn = Ecn.CE
            bursts.on_delivered(now, sent[-1][1])
    times = [time for time, _ in sent]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    within = [gap for gap in gaps if gap < 0.00101]
    pauses = [gap for gap in gaps if gap >= 0.00101]
    assert times[0] > 1.0
    assert {round(gap, 6) for gap in within} == {0.001}  # 1500 bytes at 12 Mbit/s
    assert {packet.ecn for _, packet in sent if packet.ecn is not Ecn.CE} == {Ecn.ECT_1}
    assert mean(pauses) == pytest.approx(0.5, rel=0.15)
    assert len(within) / len(pauses) == pytest.approx(200, rel=0.15)
    assert bursts.delivered_bytes > 0


@pytest.mark.parametrize("loss", [0.0, 0.05])
def test_web_transfers_arrive_whole_one_after_another(loss: float) -> None:
    dropper = IndependentLoss(loss, stage_rng(1, "down", "loss"))
    path = run([WebFlows], DropTail(limit_packets=1000), 120.0, loss=dropper)
    web = path.flows[1]
    assert isinstance(web, WebFlows)
    times = [now for now, *_ in path.out]
    assert 40 < web.transfers < 130
    idle = sum(b - a for a, b in pairwise(times) if b - a > 0.3)
    assert idle > 40  # pauses of a second on average
    if loss:
        assert web.packets_lost > 100
    else:
        assert web.packets_lost == 0
        assert 0.3e6 < sum(size for *_, size in path.out) * 8 / 120 < 10e6


class Heavy(random.Random):
    """Draws transfers larger than any is to be."""

    def paretovariate(self, alpha: float) -> float:
        return 1e9


WEBS: list[type[Transfers]] = [WebFlows, PragueWebFlows]


def web_transfers(
    kind: type[Transfers], count: int, rng: random.Random, *, lose_each: int = 0
) -> list[int]:
    """Return the sizes in bytes that arrived of each of some transfers, 20 ms away."""
    sent: list[Packet] = []
    web = kind(5, lambda now, packet: sent.append(packet), 0.02, rng)
    begins_at: list[int] = []
    now, serial = 0.0, 0
    while len(begins_at) <= count:
        begun, before = web.transfers, web.delivered_bytes
        now = web.next_time() or now
        web.act(now)
        if web.transfers > begun:
            begins_at.append(before)
            assert web.window == 10
            assert len(sent) == (10 if kind is WebFlows else 1)  # Prague is paced.
        for packet in sent:
            serial += 1
            assert packet.ecn is kind.ecn
            if not lose_each or serial % lose_each:
                web.on_delivered(now + 0.01, packet)
        sent.clear()
    return [later - earlier for earlier, later in pairwise(begins_at)]


@pytest.mark.parametrize("kind", WEBS)
def test_web_transfers_have_heavy_tailed_sizes_within_their_bounds(kind: type[Transfers]) -> None:
    sizes = web_transfers(kind, 300, random.Random(3))
    assert min(sizes) >= 30_000
    assert 40_000 < median(sizes) < 70_000  # 30 kB * 2^(1 / 1.2) = 53 kB
    assert max(sizes) > 1_000_000
    assert web_transfers(kind, 1, Heavy(1)) == [20_001_000]  # 20 MB in whole packets


@pytest.mark.parametrize("kind", WEBS)
def test_web_transfers_make_good_for_what_is_lost(kind: type[Transfers]) -> None:
    lossless = web_transfers(kind, 40, random.Random(3))
    assert web_transfers(kind, 40, random.Random(3), lose_each=20) == lossless


def test_prague_transfers_go_through_l_and_forget_each_other() -> None:
    queue = DualPi2(rng=stage_rng(1, "down", "queue"), bits_per_s=RATE_BITS_PER_S)
    path = run([PragueWebFlows] * 4, queue, 60.0)
    flow = path.flows[1]
    assert isinstance(flow, PragueWebFlows)
    assert flow.transfers > 20
    assert queue.l_marks > 100
    assert (queue.c_marks, queue.drops) == (0, 0)
    flow._alpha, flow._has_seen_marks = 0.1, True
    flow._begin()
    assert (flow._alpha, flow._has_seen_marks, flow.window) == (1.0, False, 10)


@pytest.mark.parametrize("kind", WEBS)
def test_transfers_may_begin_together_at_multiples_of_a_time(kind: type[Transfers]) -> None:
    def build(flow: int, send: Send, rtt_s: float, rng: random.Random) -> CrossFlow:
        return kind(flow, send, rtt_s, rng, start_s=1.0, every_s=2.5)

    path = run([build] * 3, DropTail(limit_packets=1000), 60.0)
    begins_s = [
        round(now - waited_s - DELAY_S - size * 8 / RATE_BITS_PER_S, 6)
        for flow in path.flows
        for (before, *_), (now, _, waited_s, size) in pairwise(
            [(0.0, 0, 0.0, 0), *(one for one in path.out if one[1] == flow)]
        )
        if now - before > 0.3
    ]
    assert len(begins_s) > 40
    assert {(begin_s - 1.0) % 2.5 for begin_s in begins_s} == {0.0}


@pytest.mark.parametrize(
    "build",
    [
        lambda send: CubicFlow(1, send, 0.0, random.Random(1)),
        lambda send: UnresponsiveBursts(1, send, 0.1, random.Random(1), bits_per_s=0),
    ],
)
def test_flows_refuse_what_makes_no_sense(build: Callable[[Send], CrossFlow]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        build(lambda now, packet: None)
