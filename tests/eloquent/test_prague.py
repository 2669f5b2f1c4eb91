"""Prague: each rule by itself, and the whole through DualPI2 beside CUBIC."""

import random
from collections.abc import Callable

import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.congestion.base import create_congestion_control
from aioquic.quic.congestion.reno import RenoCongestionControl
from aioquic.quic.packet import QuicPacketType
from aioquic.quic.packet_builder import QuicSentPacket
from aioquic.tls import Epoch

from eloquent.quic.ecn import Ecn
from eloquent.quic.marking import PlainMarking, marking
from eloquent.quic.prague import Prague, PraguePacer
from eloquent.quic.thin import ThinControl
from eloquent_netem.cross import CubicFlow
from eloquent_netem.dualpi2 import DualPi2
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import IndependentLoss
from eloquent_netem.packet import Packet
from eloquent_netem.rate import FixedRate
from tests.eloquent.ecn_pair import Datagrams, EcnPair, always, every

FULL_BYTES = 1200
RTT_S = 0.05


class Flow:
    """A controller and the packets that go through it, one round trip after another."""

    def __init__(self) -> None:
        self.inner = RenoCongestionControl(max_datagram_size=FULL_BYTES)
        self.control = Prague(self.inner, max_datagram_size=FULL_BYTES)
        self.now = 1.0
        self._number = 0

    def send(self, size: int = FULL_BYTES) -> QuicSentPacket:
        packet = QuicSentPacket(
            epoch=Epoch.ONE_RTT,
            in_flight=True,
            is_ack_eliciting=True,
            is_crypto_packet=False,
            packet_number=self._number,
            packet_type=QuicPacketType.ONE_RTT,
            sent_time=self.now,
            sent_bytes=size,
        )
        self._number += 1
        self.control.on_packet_sent(packet=packet)
        return packet

    def window_full(self) -> list[QuicSentPacket]:
        return [self.send() for _ in range(self.control.congestion_window // FULL_BYTES)]

    def ack(self, packets: list[QuicSentPacket], congested: int = 0, rtt: float = RTT_S) -> None:
        for packet in packets:
            self.control.on_packet_acked(now=self.now, packet=packet)
        self.control.on_feedback(now=self.now, rtt=rtt, marked=len(packets), congested=congested)

    def round(self, congested: int = 0, rtt: float = RTT_S) -> None:
        """Send a window, and take its acknowledgement, one frame, a round trip later."""
        packets = self.window_full()
        self.now += rtt
        self.ack(packets, congested, rtt)


@pytest.fixture
def flow() -> Flow:
    return Flow()


def settled(flow: Flow) -> Flow:
    """Return the flow out of slow start, its window at 6000 bytes."""
    flow.round(congested=1)
    assert 6000 <= flow.control.congestion_window <= 6000 + FULL_BYTES
    return flow


def test_the_window_doubles_in_slow_start(flow: Flow) -> None:
    before = flow.control.congestion_window
    flow.round()
    assert flow.control.congestion_window == 2 * before


def test_the_first_mark_halves_the_window_and_ends_slow_start(flow: Flow) -> None:
    for _ in range(5):
        flow.round()
    before = flow.control.congestion_window
    packets = flow.window_full()
    flow.now += RTT_S
    flow.ack(packets[:1], congested=1)
    assert flow.control.congestion_window == pytest.approx(before / 2, abs=FULL_BYTES)
    assert flow.control.ssthresh is not None
    flow.round()
    assert flow.control.congestion_window < before * 0.6  # no doubling any more


def test_marks_of_one_round_reduce_once(flow: Flow) -> None:
    packets = flow.window_full()
    flow.now += RTT_S
    flow.ack(packets[:4], congested=1)
    window = flow.control.congestion_window
    flow.now += RTT_S / 10
    flow.ack(packets[4:8], congested=4)
    assert flow.control.congestion_window == window
    late = flow.window_full()
    flow.now += RTT_S
    flow.ack(late[:1], congested=1)
    assert flow.control.congestion_window < window


def test_the_reduction_is_half_the_smoothed_share(flow: Flow) -> None:
    flow = settled(flow)
    for _ in range(200):
        flow.round()
    share = flow.control.marked_share
    assert share < 0.001  # a quiet path: a has decayed
    before = flow.control.congestion_window
    packets = flow.window_full()
    flow.now += RTT_S
    flow.ack(packets, congested=len(packets))
    share = flow.control.marked_share
    assert share == pytest.approx(1 / 16, rel=0.02)
    assert flow.control.congestion_window == pytest.approx(before * (1 - share / 2), abs=2)


def test_the_share_is_smoothed_once_a_round(flow: Flow) -> None:
    flow = settled(flow)
    share = flow.control.marked_share
    packets = flow.window_full()
    flow.now += RTT_S
    flow.ack(packets[:1])  # ends the round that the last acknowledgement began
    flow.ack(packets[1:2], congested=1)
    flow.ack(packets[2:3], congested=1)
    assert flow.control.marked_share == pytest.approx(share * 15 / 16)


@pytest.mark.parametrize(("rtt", "growth"), [(0.05, 1.0), (0.025, 1.0), (0.0125, 0.25)])
def test_the_window_opens_by_a_packet_a_round_and_slower_on_short_paths(
    flow: Flow, rtt: float, growth: float
) -> None:
    flow = settled(flow)
    before = flow.control.congestion_window
    sent = before // FULL_BYTES * FULL_BYTES
    flow.round(rtt=rtt)
    opened = flow.control.congestion_window - before
    assert opened == pytest.approx(growth * FULL_BYTES * sent / before, abs=2)


def test_a_window_that_is_not_used_does_not_open(flow: Flow) -> None:
    flow = settled(flow)
    flow.now += 1.0
    for _ in range(3):  # what filled the window is two rounds ago
        packet = flow.send(100)
        flow.now += RTT_S
        flow.ack([packet])
    before = flow.control.congestion_window
    for _ in range(100):
        packet = flow.send(100)
        flow.now += RTT_S
        flow.ack([packet])
    assert flow.control.congestion_window == before


def test_the_window_has_a_floor_of_two_of_the_flows_own_packets(flow: Flow) -> None:
    for _ in range(60):
        packet = flow.send(400)
        flow.now += RTT_S
        flow.ack([packet], congested=1)
    assert 800 <= flow.control.congestion_window <= 810


def test_no_reduction_goes_below_the_least_window(flow: Flow) -> None:
    for _ in range(60):
        packet = flow.send(50)
        flow.now += RTT_S
        flow.ack([packet], congested=1)
    assert flow.control.congestion_window == 500


def test_a_loss_is_answered_by_the_inner_controller_and_a_mark_of_that_round_no_more(
    flow: Flow,
) -> None:
    packets = flow.window_full()
    flow.now += RTT_S
    before = flow.control.congestion_window
    flow.control.on_packets_lost(now=flow.now, packets=packets[:1])
    window = flow.control.congestion_window
    assert window == before / 2
    flow.ack(packets[1:], congested=3)
    assert flow.control.congestion_window == window


def test_what_the_inner_controller_counts_stays_right(flow: Flow) -> None:
    packets = flow.window_full()
    assert flow.control.bytes_in_flight == len(packets) * FULL_BYTES
    flow.now += RTT_S
    flow.ack(packets[:3])
    flow.control.on_packets_expired(packets=packets[3:5])
    assert flow.control.bytes_in_flight == (len(packets) - 5) * FULL_BYTES
    assert flow.inner.bytes_in_flight == flow.control.bytes_in_flight


def test_a_configuration_can_name_it() -> None:
    configuration = QuicConfiguration(congestion_control_algorithm="prague")
    control = create_congestion_control(
        configuration.congestion_control_algorithm, max_datagram_size=FULL_BYTES
    )
    assert isinstance(control, Prague)
    assert isinstance(control.inner, ThinControl)
    assert control.congestion_window == 10 * FULL_BYTES


def paced(size: int = FULL_BYTES) -> PraguePacer:
    """Return a pacer that sends 120,000 bytes a second: a full packet every 10 ms."""
    flow = settled(Flow())
    pacer = PraguePacer(flow.control, max_datagram_size=FULL_BYTES, packet_size=lambda: size)
    pacer.update_rate(6000, 0.05)
    return pacer


def sent_at(pacer: PraguePacer, now: float, limit: int = 50) -> int:
    """Send what may be sent at a time; return how many packets that was."""
    for count in range(limit):
        if pacer.next_send_time(now) is not None:
            return count
        pacer.update_after_send(now)
    return limit


def test_full_packets_leave_one_at_a_time() -> None:
    pacer = paced()
    assert sent_at(pacer, 1.0) == 1
    assert pacer.next_send_time(1.0) == pytest.approx(1.005, abs=0.0001)
    assert sent_at(pacer, 1.0051) == 1
    assert sent_at(pacer, 1.0149) == 0
    assert sent_at(pacer, 1.0152) == 1


def test_a_few_small_packets_wait_for_no_timer() -> None:
    pacer = paced(150)
    assert sent_at(pacer, 1.0) == 4
    assert sent_at(pacer, 9.0) == 4  # silence saves up no more


def test_in_slow_start_twice_the_window_leaves_in_a_round() -> None:
    pacer = PraguePacer(
        Flow().control, max_datagram_size=FULL_BYTES, packet_size=lambda: FULL_BYTES
    )
    pacer.update_rate(6000, 0.05)
    assert sent_at(pacer, 1.0) == 1
    assert pacer.next_send_time(1.0) == pytest.approx(1.0025, abs=0.0001)


def test_a_packet_that_is_not_sent_saves_nothing_up() -> None:
    pacer = paced()
    assert sent_at(pacer, 1.0) == 1
    assert pacer.next_send_time(1.02) is None  # but the window has no room
    assert sent_at(pacer, 9.0) == 1


@pytest.mark.parametrize(("late_s", "packets"), [(0.0, 1), (0.001, 5), (0.002, 9), (1.0, 9)])
def test_a_late_timer_is_made_good_for_up_to_2_ms(late_s: float, packets: int) -> None:
    pacer = paced()
    pacer.update_rate(6000, 0.00125)  # a full packet every 0.25 ms
    assert sent_at(pacer, 1.0) == 1
    due = pacer.next_send_time(1.0)
    assert due is not None
    assert sent_at(pacer, due + late_s + 1e-6) == pytest.approx(packets, abs=1)


def test_policies_have_names() -> None:
    assert marking("off") is None
    for name, codepoint in (("l4s", Ecn.ECT_1), ("classic", Ecn.NOT_ECT)):
        marks = marking(name)
        assert marks is not None
        assert marks.policy().next_codepoint(0.0, 100, is_copy=False) is codepoint
    with pytest.raises(Exception, match="no marking policy 'l4'"):
        marking("l4")


@pytest.mark.parametrize("loss", [0.02, 0.2])
def test_random_loss_is_answered_as_without_prague(loss: float) -> None:
    def windows(policy: str) -> list[int]:
        """Return the window at the end of each second."""
        up, down = (
            Link(
                delay_s=0.05, seed=1, name=name, loss=IndependentLoss(loss, stage_rng(1, name, ""))
            )
            for name in ("up", "down")
        )
        marks = marking(policy)
        pair = EcnPair(every(0.01), None if marks is None else marks.policy(), up=up, down=down)
        seen = []
        for second in range(2, 12):
            pair.run(second)
            seen.append(pair.quic._loss.congestion_window)
        assert pair.source.lost > 0
        return seen

    assert windows("l4s") == windows("off")


@pytest.mark.parametrize("loss", [0.01, 0.2])
def test_random_loss_leaves_a_flow_that_fills_its_window_what_it_leaves_without_prague(
    loss: float,
) -> None:
    """DualPI2 marks nothing here: the link is never full."""

    def acked(policy: str) -> int:
        marks = marking(policy)
        pair = EcnPair(
            always(),
            None if marks is None else marks.policy(),
            up=Link(delay_s=RTT_S / 2, seed=1, name="up"),
            down=Link(
                delay_s=RTT_S / 2,
                seed=1,
                name="down",
                loss=IndependentLoss(loss, stage_rng(1, "down", "")),
                rate=FixedRate(20e6),
                queue=DualPi2(rng=random.Random(1), bits_per_s=20e6),
            ),
        )
        for second in range(3, 12):
            pair.run(second)
            assert pair.quic._recovery.congestion_window >= pair.quic._recovery.floor_window
        return pair.source.acked

    assert acked("l4s") > 0.8 * acked("off")


class Shared(Link):
    """A link that also tells a flow of cross traffic what came out."""

    flow: CubicFlow | None = None

    def poll(self, now: float) -> list[Packet]:
        packets = super().poll(now)
        if self.flow is not None:
            for packet in packets:
                self.flow.on_delivered(now, packet)
        return packets


def through_dualpi2(
    *,
    beside_cubic: bool,
    rate: float = 20e6,
    rtt_s: float = 0.02,
    until_s: float = 8.0,
    source: Callable[[], Datagrams] = always,
    policy: str = "l4s",
) -> tuple[float, float, list[float]]:
    """Return our rate (in full packets) and CUBIC's in Mbit/s, and our waiting times, after 3 s."""
    seed = 1  # nothing but DualPI2's draws depends on it
    down = Shared(
        delay_s=rtt_s / 2,
        seed=seed,
        name="down",
        rate=FixedRate(rate),
        queue=DualPi2(rng=random.Random(seed), bits_per_s=rate),
    )
    if beside_cubic:
        rng = random.Random(seed)
        down.flow = CubicFlow(1, down.send, rtt_s, rng, forward_s=rtt_s / 2, start_s=0.1)
    marks = marking(policy)
    pair = EcnPair(
        source(),
        None if marks is None else marks.policy(),
        down=down,
        up=Link(delay_s=rtt_s / 2, seed=seed, name="up"),
        others=() if down.flow is None else (down.flow,),
    )
    pair.run(3.0)
    packets = len(pair.client.delays_s)
    cubic_bytes = down.flow.delivered_bytes if down.flow is not None else 0
    pair.run(until_s)
    delays_s = sorted(delay - rtt_s / 2 for delay in pair.client.delays_s[packets:])
    megabits_per_s = 8e-6 / (until_s - 3.0)
    ours = len(delays_s) * (FULL_BYTES + 28) * megabits_per_s
    cubic = (down.flow.delivered_bytes - cubic_bytes) * megabits_per_s if down.flow else 0.0
    return ours, cubic, delays_s


def test_alone_it_uses_most_of_the_link_and_keeps_the_queue_short() -> None:
    ours, _, delays_s = through_dualpi2(beside_cubic=False, until_s=6.0)
    assert ours > 0.65 * 20  # a client that delays acknowledgements by half a round trip costs some
    assert delays_s[len(delays_s) // 2] < 0.002


@pytest.mark.parametrize("rtt_s", [0.02, 0.04])
def test_beside_cubic_it_gets_its_share_and_keeps_the_queue_short(rtt_s: float) -> None:
    ours, cubic, delays_s = through_dualpi2(beside_cubic=True, rtt_s=rtt_s, until_s=10.0)
    assert ours + cubic > 0.9 * 20
    assert 0.5 < ours / cubic < 2
    assert delays_s[len(delays_s) // 2] < 0.002


def test_tokens_beside_cubic_do_not_wait_behind_it() -> None:
    """The figures of docs/design.md."""
    delays_s = {
        policy: through_dualpi2(
            beside_cubic=True,
            rate=5e6,
            rtt_s=0.04,
            until_s=15.0,
            source=lambda: every(0.02),
            policy=policy,
        )[2]
        for policy in ("l4s", "off")
    }
    assert len(delays_s["l4s"]) == pytest.approx(600, abs=2)
    middle, last = 300, 594
    assert delays_s["l4s"][middle] < 0.002
    assert delays_s["l4s"][last] < 0.004
    assert delays_s["off"][middle] > 0.01


class Alternating(PlainMarking):
    """Sends packets into the two queues by turns."""

    def __init__(self) -> None:
        self._sent = 0

    def next_codepoint(self, now: float, size: int, *, is_copy: bool) -> Ecn:
        self._sent += 1
        return Ecn.ECT_1 if self._sent % 2 else Ecn.NOT_ECT


@pytest.mark.parametrize("source", [lambda: every(0.01), always])
def test_packets_that_take_turns_in_two_queues_are_not_taken_for_lost(
    source: Callable[[], Datagrams],
) -> None:
    """CUBIC's queue is 15 ms long, and the round trip 20 ms."""
    down = Shared(
        delay_s=0.01,
        seed=1,
        name="down",
        rate=FixedRate(20e6),
        queue=DualPi2(rng=random.Random(1), bits_per_s=20e6),
    )
    down.flow = CubicFlow(1, down.send, 0.02, random.Random(1), forward_s=0.01, start_s=0.1)
    pair = EcnPair(
        source(),
        Alternating(),
        down=down,
        up=Link(delay_s=0.01, seed=1, name="up"),
        others=(down.flow,),
    )
    late: list[int] = []
    recovery = pair.quic._recovery
    recovery._on_late_ack = lambda packet: late.append(packet.packet_number)
    pair.run(8.0)
    assert late == []
    assert pair.source.acked > 600
    delays_s = sorted(delay - 0.01 for delay in pair.client.delays_s)
    assert delays_s[len(delays_s) // 4] < 0.002
    assert delays_s[len(delays_s) * 3 // 4] > 0.008
