"""One answer over two queues: what was sent is what the link saw, and what the figures mean."""

import math
from functools import partial

import numpy as np
import pytest
from swiftqueue_light import light

from eloquent.quic.ecn import Ecn
from eloquent.quic.marking import EachAlone, PlainMarking, SentPacket, all_l
from eloquent.swiftqueue.records import Queue
from eloquent_netem.dualpi2_watch import Passage
from eloquent_netem.lab.swiftqueue_flow import FlowRun, latencies, raced, run_crowd, run_flow
from eloquent_netem.lab.swiftqueue_markings import exploring
from eloquent_netem.lab.swiftqueue_recorder import MatchError, Noted, Recorder, matched, record
from eloquent_netem.packet import Packet, udp_packet

NEVER = math.nan


def took(
    sent: list[float], arrived: list[float], copies: list[int], dropped: tuple[int, ...] = ()
) -> list[float]:
    is_copy = np.array([index in copies for index in range(len(sent))])
    is_dropped = np.isnan(arrived) | np.isin(np.arange(len(sent)), dropped)
    found = latencies(np.array(sent), np.array(arrived), is_copy, is_dropped)
    return [round(one, 6) for one in found]


def test_a_copy_of_the_same_instant_counts_with_the_first_to_arrive() -> None:
    sent, arrived = [1.0, 1.0, 2.0], [1.3, 1.1, 2.2]
    assert took(sent, arrived, [1]) == [0.1, 0.2]
    assert took(sent, arrived, []) == [0.3, 0.1, 0.2]


def test_a_lost_packet_counts_until_the_next_later_one_arrives() -> None:
    assert took([1.0, 2.0, 3.0], [NEVER, 2.9, 3.1], []) == [1.9, 0.9, 0.1]
    # A packet sent later that overtakes brings it sooner; a copy that arrives saves it.
    assert took([1.0, 2.0, 3.0], [NEVER, 9.0, 3.1], []) == [2.1, 7.0, 0.1]
    assert took([1.0, 1.0, 2.0], [NEVER, 1.4, 2.1], [1]) == [0.4, 0.1]


def test_a_copy_that_arrives_late_makes_a_loss_no_worse() -> None:
    alone, late = [NEVER, 2.1, 2.9], [NEVER, 9.0, 2.1, 2.9]
    assert took([1.0, 2.0, 3.0], alone, []) == took([1.0, 1.0, 2.0, 3.0], late, [1])
    assert took([1.0, 1.0, 2.0], [9.0, NEVER, 2.1], [1]) == [1.1, 0.1]
    # Where none was lost, what comes later is not what counts.
    assert took([1.0, 1.0, 2.0], [9.0, 8.5, 2.1], [1]) == [7.5, 0.1]
    # Nor is a packet of its own group later than itself.
    assert took([1.0, 1.0, 2.0], [NEVER, 1.5, 2.1], [1]) == [0.5, 0.1]


def test_what_one_queue_drops_and_the_other_passes_late_counts_as_lost_in_a_race() -> None:
    assert took([1.0, 2.0, 3.0], [9.0, 2.1, 3.1], [], dropped=(0,)) == [1.1, 0.1, 0.1]
    assert took([1.0, 2.0, 3.0], [1.3, 2.1, 3.1], [], dropped=(0,)) == [0.3, 0.1, 0.1]
    assert took([1.0, 2.0], [1.1, 9.0], [], dropped=(1,)) == [0.1, 7.0]


def test_what_is_lost_at_the_end_and_has_no_later_packet_is_left_out() -> None:
    assert took([1.0, 2.0], [1.1, NEVER], []) == [0.1]
    assert took([], [], []) == []


def sent(number: int, sent_s: float, codepoint: Ecn = Ecn.ECT_1) -> SentPacket:
    return SentPacket(number, sent_s, 112, codepoint)


def test_the_policys_packets_are_the_links_last_ones_in_order() -> None:
    handshake, one, two = (udp_packet(bytes(size)) for size in (1200, 112, 112))
    noted = [Noted(sent(5, 1.0), False), Noted(sent(6, 1.5), False)]
    entered = [(0.5, handshake), (1.0, one), (1.5, two)]
    assert [packet for _, packet in matched(noted, entered)] == [one, two]


@pytest.mark.parametrize(
    "entered",
    [[(1.0, 112), (1.6, 112)], [(1.0, 112), (1.5, 113)], [(1.5, 112), (1.0, 112)]],
    ids=["time", "size", "order"],
)
def test_packets_that_are_not_the_same_are_refused(entered: list[tuple[float, int]]) -> None:
    noted = [Noted(sent(5, 1.0), False), Noted(sent(6, 1.5), False)]
    with pytest.raises(MatchError, match="cannot be trusted"):
        matched(noted, [(now, udp_packet(bytes(size))) for now, size in entered])


def passage(queue: int, waits: tuple[float, float], foretold: tuple[float, float]) -> Passage:
    return Passage(Packet(b"", 140), 0.0, queue, foretold, list(waits))


def test_a_record_has_both_queues_delays_losses_and_when_they_were_known() -> None:
    recorder = Recorder(EachAlone(all_l), offset_s=5.0)
    recorder.arrival_known_s = {1: 1.2, 2: 2.4}
    recorder.loss_known_s = {2: 2.3, 3: 3.5}
    noted = [
        Noted(sent(1, 1.0), False),
        Noted(sent(2, 2.0, Ecn.NOT_ECT), False),
        Noted(sent(3, 3.0), False),
        Noted(sent(4, 4.0), False),
    ]
    arrived_s = np.array([1.05, 2.06, NEVER, NEVER])
    flow = record(
        recorder,
        noted,
        arrived_s,
        [
            passage(0, (0.02, 0.01), (0.015, 0.012)),
            passage(1, (math.inf, 0.03), (0.1, 0.03)),
            passage(0, (math.inf, 0.04), (0.0, 0.0)),
            None,  # lost before the queue
        ],
    )
    assert flow.queue.tolist() == [Queue.L, Queue.C, Queue.L, Queue.L]
    assert flow.known_s.tolist() == [1.2, 2.4, 3.5, math.inf]
    assert flow.delay_s == pytest.approx(
        np.array([[5.05, 5.04], [NEVER, 5.06], [NEVER, 5.07], [NEVER, NEVER]]), nan_ok=True
    )
    assert flow.lost.tolist() == [[0, 0], [1, 0], [1, 0], [1, -1]]
    assert flow.state_s[:2] == pytest.approx(np.array([[5.045, 5.042], [5.13, 5.06]]))
    assert np.isnan(flow.state_s[3]).all()


def test_a_race_is_left_by_the_queue_that_passes_and_not_by_the_one_that_drops() -> None:
    waits = [(0.02, NEVER), (NEVER, 0.01), (math.inf, 0.03), (0.02, math.inf), (math.inf, math.inf)]
    passages = [passage(Queue.L, one, (0.0, 0.0)) for one in waits]
    is_lost = np.array([False, False, False, False, True, True])
    left_by, is_dropped = raced(np.zeros(6, np.int8), is_lost, [*passages, None])
    assert left_by.tolist() == [Queue.L, Queue.C, Queue.C, Queue.L, Queue.L, Queue.L]
    assert is_dropped.tolist() == [False, False, True, True, True, True]


@pytest.fixture(scope="module")
def in_l() -> FlowRun:
    return run_flow(light(), exploring("all-l", 1), seed=1)


def test_an_answer_is_recorded_bundle_by_bundle(in_l: FlowRun) -> None:
    flow = in_l.flow
    assert len(in_l.generated_s) == len(in_l.rendered_s) == 300
    assert len(flow.sent_s) >= 300
    assert (np.diff(flow.sent_s) >= 0).all()
    assert (flow.queue == Queue.L).all()
    assert (in_l.left_by == flow.queue).all()
    own_s = flow.delay_s[:, Queue.L]
    assert own_s == pytest.approx(in_l.arrived_s - flow.sent_s, nan_ok=True, abs=1e-6)
    assert np.nanmin(own_s) > 0.01
    # Almost all is reported, about a round trip after its sending.
    assert in_l.reported_share > 0.99
    lag_s = flow.known_s - in_l.arrived_s
    assert 0.01 < np.nanmedian(lag_s) < 0.025
    assert in_l.cross_mbit["bursts L"] > 1
    assert set(in_l.cross_mbit) == {"bursts L"}  # that on the uplink is not counted


def test_a_packet_that_waits_in_l_would_have_passed_in_the_empty_queue(in_l: FlowRun) -> None:
    low_s, classic_s = in_l.flow.delay_s.T
    assert np.nanquantile(low_s, 0.9) > 0.04
    # RFC 9332's scheduler lets a packet of C wait for nine of L, of 1.2 ms each.
    assert np.nanmax(classic_s) < 0.01 + 11 * 0.0012 + 0.001
    assert (np.isnan(classic_s) == (in_l.flow.lost[:, Queue.C] == 1)).all()
    assert np.isfinite(classic_s).mean() > 0.9


def test_the_receivers_clock_is_in_the_record_and_nowhere_else(in_l: FlowRun) -> None:
    ahead = run_flow(light(), exploring("all-l", 1), seed=1, offset_s=3.0)
    assert ahead.flow.sent_s == pytest.approx(in_l.flow.sent_s)
    assert ahead.flow.known_s == pytest.approx(in_l.flow.known_s)
    assert ahead.flow.delay_s - 3 == pytest.approx(in_l.flow.delay_s, nan_ok=True, abs=1e-6)
    assert ahead.flow.state_s - 3 == pytest.approx(in_l.flow.state_s, nan_ok=True, abs=1e-6)
    assert ahead.latency_s == pytest.approx(in_l.latency_s)


class Listening(PlainMarking):
    """All into L; takes note of how long packets are said to have taken."""

    def __init__(self) -> None:
        self.delays_s: list[float] = []

    @property
    def wants_times(self) -> bool:
        return True

    def next_codepoint(self, now: float, size: int, *, is_copy: bool) -> Ecn:
        return Ecn.ECT_1

    def on_arrival(self, now: float, packet: SentPacket, arrived_s: float) -> None:
        self.delays_s.append(arrived_s - packet.sent_s)


def test_a_policy_hears_of_arrivals_by_the_receivers_clock() -> None:
    heard = []
    for offset_s in (0.0, 3.0):
        policy = Listening()
        marking = EachAlone(partial(lambda one: one, policy))
        run_flow(light(), marking, seed=1, length_s=1.0, offset_s=offset_s)
        heard.append(policy.delays_s)
    assert len(heard[0]) >= 50
    # Where the peer's clock begins is its own affair.
    assert heard[1] == pytest.approx([one + 3 for one in heard[0]])


def test_in_a_race_each_packet_takes_the_faster_queue(in_l: FlowRun) -> None:
    race = run_flow(light(), exploring("all-l", 1), seed=1, is_race=True)
    assert (race.flow.queue == Queue.L).all()
    assert 0.05 < race.c_share < 0.95
    p99 = [np.quantile(run.latency_s, 0.99) for run in (race, in_l)]
    assert p99[0] < 0.5 * p99[1]
    # What C drops comes by L all the same.
    assert race.is_dropped.any()
    assert not np.isnan(race.arrived_s[race.is_dropped]).any()
    assert (race.left_by[race.is_dropped] == Queue.L).all()
    assert (in_l.is_dropped == np.isnan(in_l.arrived_s)).all()


class AlwaysTwice(PlainMarking):
    """A copy of everything, into the other queue."""

    @property
    def wants_times(self) -> bool:
        return True

    def wants_copy(self, now: float) -> bool:
        return True

    def next_codepoint(self, now: float, size: int, *, is_copy: bool) -> Ecn:
        return Ecn.NOT_ECT if is_copy else Ecn.ECT_1


def test_copies_in_both_queues_count_once_by_the_first_that_arrives(in_l: FlowRun) -> None:
    run = run_flow(light(), EachAlone(AlwaysTwice), seed=1)
    assert run.is_copy.mean() > 0.45  # and some where losses ask for them
    assert run.c_share == pytest.approx(run.is_copy.mean())
    assert len(run.latency_s) == pytest.approx((~run.is_copy).sum(), abs=1)
    assert len(run.latency_every_packet_s) == pytest.approx(len(run.is_copy), abs=1)
    p99 = np.quantile(run.latency_s, 0.99)
    assert p99 < 0.5 * np.quantile(in_l.latency_s, 0.99)
    assert p99 < 0.5 * np.quantile(run.latency_every_packet_s, 0.99)


def test_a_crowd_shares_one_marking_and_one_bottleneck() -> None:
    settled: list[float] = []

    class Settled(EachAlone):
        def settle(self, now: float) -> None:
            settled.append(now)

    runs = run_crowd(light(), Settled(all_l), flows=3, seed=1, length_s=2.0)
    assert [len(run.rendered_s) for run in runs] == [100] * 3
    assert len({run.flow.sent_s[0] for run in runs}) == 3
    assert all(np.isfinite(run.latency_s).all() for run in runs)
    assert all(run.cross_mbit == runs[0].cross_mbit for run in runs)
    assert len(settled) > 100
