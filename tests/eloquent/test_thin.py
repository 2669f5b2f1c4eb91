"""The congestion controller for small packets: when it grows, yields, and holds its floor."""

import pytest
from aioquic.quic.packet import QuicPacketType
from aioquic.quic.packet_builder import QuicSentPacket
from aioquic.tls import Epoch

from eloquent.quic.thin import (
    FLOOR_BYTES_PER_S,
    FLOOR_SLACK,
    MIN_WINDOW_BYTES,
    PATH_RTT_MAX_S,
    POLICED_BYTES_PER_S,
    RANDOM_LOSS_FACTOR,
    VARIATION_SHARE,
    YIELD_S,
    RttHistory,
    ThinControl,
)

RTT_S = 0.1
FULL_BYTES = 1200
PACKET_BYTES = 120


def sent(number: int, at_s: float, size: int = PACKET_BYTES) -> QuicSentPacket:
    return QuicSentPacket(
        epoch=Epoch.ONE_RTT,
        in_flight=True,
        is_ack_eliciting=True,
        is_crypto_packet=False,
        packet_number=number,
        packet_type=QuicPacketType.ONE_RTT,
        sent_time=at_s,
        sent_bytes=size,
    )


class Flow:
    """A controller whose packets are acknowledged or lost a round trip after they left."""

    def __init__(self, queue_s: float = 0.0) -> None:
        self.control = ThinControl(max_datagram_size=FULL_BYTES)
        self.now = 1.0
        self.number = 0
        self.control.rtts.add(self.now, RTT_S)
        self.see_queue(queue_s)

    def see_queue(self, queue_s: float) -> None:
        for _ in range(4):
            self.now += 0.1
            self.control.rtts.add(self.now, RTT_S + queue_s)

    def round(self, packets: int, *, lost: int = 0, blocked: bool = False) -> None:
        """Send for a round trip, then hear what became of it."""
        self.now += 0.001
        if blocked:
            self.control.on_blocked(self.now)
        flight = []
        for _ in range(packets):
            flight.append(sent(self.number, self.now))
            self.control.on_packet_sent(packet=flight[-1])
            self.number += 1
        self.now += RTT_S
        for packet in flight[lost:]:
            self.control.on_packet_acked(now=self.now, packet=packet)
        if lost:
            self.control.on_packets_lost(now=self.now, packets=flight[:lost])


def test_it_starts_with_ten_full_packets() -> None:
    assert Flow().control.congestion_window == 10 * FULL_BYTES


def test_a_window_that_does_not_bind_does_not_grow() -> None:
    flow = Flow()
    for _ in range(20):
        flow.round(10)
    assert flow.control.congestion_window == 10 * FULL_BYTES


def test_up_to_the_first_loss_a_window_that_binds_grows_by_what_is_acknowledged() -> None:
    flow = Flow()
    flow.round(50, blocked=True)
    assert flow.control.congestion_window == 10 * FULL_BYTES + 50 * PACKET_BYTES


def test_after_a_loss_it_grows_by_a_full_packet_in_a_round_trip() -> None:
    flow = Flow()
    flow.round(50, lost=1)
    before = flow.control.congestion_window
    flow.round(before // PACKET_BYTES, blocked=True)
    assert flow.control.congestion_window - before == pytest.approx(FULL_BYTES, rel=0.1)


def test_while_a_queue_stands_it_hardly_grows() -> None:
    flow = Flow(queue_s=0.018)
    before = flow.control.congestion_window
    flow.round(before // PACKET_BYTES, blocked=True)
    assert 0 <= flow.control.congestion_window - before <= PACKET_BYTES


def test_random_losses_leave_the_floor() -> None:
    flow = Flow()
    floor = round(FLOOR_SLACK * FLOOR_BYTES_PER_S * (RTT_S + flow.control.ack_delay_s))
    flow.round(20, lost=2)
    first = flow.control.congestion_window
    assert first == max(round(RANDOM_LOSS_FACTOR * 10 * FULL_BYTES), floor)
    for _ in range(100):
        flow.round(20, lost=2)
    assert flow.control.congestion_window == floor


def test_what_looks_like_a_policer_leaves_less() -> None:
    flow = Flow()
    for _ in range(100):
        flow.round(20, lost=14)
    policed = FLOOR_SLACK * POLICED_BYTES_PER_S * (RTT_S + flow.control.ack_delay_s)
    assert flow.control.congestion_window == pytest.approx(policed, rel=0.1)


def test_losses_with_a_queue_leave_two_own_packets() -> None:
    flow = Flow(queue_s=0.05)
    for _ in range(20):
        flow.round(20, lost=1)
        flow.see_queue(0.05)
    assert flow.control.congestion_window == MIN_WINDOW_BYTES


def test_losses_of_one_round_trip_count_once() -> None:
    flow = Flow()
    flight = [sent(number, flow.now) for number in range(10)]
    for packet in flight:
        flow.control.on_packet_sent(packet=packet)
    flow.control.on_packets_lost(now=flow.now + RTT_S, packets=flight[:3])
    window = flow.control.congestion_window
    flow.control.on_packets_lost(now=flow.now + RTT_S + 0.01, packets=flight[3:])
    assert flow.control.congestion_window == window
    assert flow.control.bytes_in_flight == 0


def test_a_spurious_loss_is_taken_back_when_all_of_them_have_come() -> None:
    flow = Flow()
    flight = [sent(number, flow.now) for number in range(2)]
    for packet in flight:
        flow.control.on_packet_sent(packet=packet)
    flow.control.on_packets_lost(now=flow.now + RTT_S, packets=flight)
    shrunk = flow.control.congestion_window
    flow.control.on_spurious_loss(flight[0])
    assert flow.control.congestion_window == shrunk
    flow.control.on_spurious_loss(flight[1])
    assert flow.control.congestion_window == 10 * FULL_BYTES


def test_a_long_queue_for_a_moment_does_not_make_it_yield() -> None:
    flow = Flow()
    for _ in range(10):
        flow.see_queue(0.08)
        flow.round(8)
        flow.see_queue(0.0)
        flow.round(8)
    assert flow.control.congestion_window == 10 * FULL_BYTES


def test_on_a_path_that_varies_only_more_than_that_is_a_queue() -> None:
    rtts = RttHistory()
    rtts.add(1.0, 0.1)
    rtts.add(1.1, 0.4)
    for step in range(4):
        rtts.add(2.0 + 0.1 * step, 0.1 + VARIATION_SHARE * 0.3 - 0.001)
    assert not rtts.has_queue
    for step in range(4):
        rtts.add(3.0 + 0.1 * step, 0.1 + VARIATION_SHARE * 0.3 + 0.001)
    assert rtts.has_queue


def test_no_path_is_as_long_as_a_queue_of_seconds() -> None:
    rtts = RttHistory()
    for step in range(4):
        rtts.add(1.0 + step, 2.0)
    assert rtts.queue_s == pytest.approx(2.0 - PATH_RTT_MAX_S)
    assert rtts.has_queue


def test_a_queue_of_seconds_does_not_raise_the_floor() -> None:
    flow = Flow()
    flow.control.rtts.forget()
    flow.control.rtts.add(1.0, 5.0)
    longest_s = PATH_RTT_MAX_S + flow.control.ack_delay_s
    assert flow.control.floor_window <= FLOOR_SLACK * FLOOR_BYTES_PER_S * longest_s + 1


def test_a_long_queue_makes_it_yield_before_anything_is_lost() -> None:
    flow = Flow(queue_s=0.08)
    windows = []
    for _ in range(30):
        flow.round(8)
        flow.see_queue(0.08)
        windows.append(flow.control.congestion_window)
    assert windows == sorted(windows, reverse=True)
    assert windows[-1] <= 3 * PACKET_BYTES  # a packet in 0.1 s, at 0.18 s of round trip


def test_after_a_silence_it_begins_with_ten_full_packets() -> None:
    flow = Flow()
    for _ in range(100):
        flow.round(20, lost=2)
    flow.control.restart(flow.now)
    assert flow.control.congestion_window == 10 * FULL_BYTES


def test_a_silence_after_congestion_is_no_reason_to_begin_again() -> None:
    flow = Flow(queue_s=0.05)
    flow.round(20, lost=1)
    window = flow.control.congestion_window
    flow.control.restart(flow.now)
    assert flow.control.congestion_window == window
    flow.control.restart(flow.now + YIELD_S)
    assert flow.control.congestion_window == 10 * FULL_BYTES


def test_losses_that_mostly_come_with_a_queue_count_as_congestion() -> None:
    flow = Flow(queue_s=0.05)
    for _ in range(4):
        flow.round(20, lost=1)
    flow.see_queue(0.0)
    assert not flow.control.rtts.has_queue
    assert flow.control.is_congested


def test_jitter_is_no_queue() -> None:
    rtts = RttHistory()
    for number in range(300):
        rtts.add(1 + 0.033 * number, 0.1 + 0.002 * ((number * 7) % 10))
        assert not rtts.has_queue


def test_who_comes_to_a_full_queue_sees_it_by_its_ups_and_downs() -> None:
    rtts = RttHistory()
    for number in range(300):
        rtts.add(1 + 0.033 * number, 0.2 - (0.015 if number % 100 == 50 else 0.001 * (number % 4)))
    assert rtts.has_queue


def test_a_change_of_route_is_forgotten_after_a_while() -> None:
    rtts = RttHistory()
    rtts.add(1.0, 0.05)
    for number in range(400):
        rtts.add(1.1 + 0.1 * number, 0.15)
    assert rtts.min_s == 0.15
    assert not rtts.has_queue
