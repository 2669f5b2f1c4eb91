"""Loss by time, late acknowledgements, silences and lies, on aioquic's own packet spaces."""

from collections.abc import Iterable

import pytest
from aioquic.quic.connection import QuicConnectionError
from aioquic.quic.packet import QuicPacketType
from aioquic.quic.packet_builder import QuicDeliveryState, QuicSentPacket
from aioquic.quic.rangeset import RangeSet
from aioquic.quic.recovery import QuicPacketSpace
from aioquic.tls import Epoch

from eloquent.quic._recovery import (
    EXPIRE_RTTS,
    HELD_S,
    HOLDS_S,
    MAX_PROBE_GAP_S,
    OTHER_QUEUE_S,
    SLOW_RTT_S,
    TimedRecovery,
)
from eloquent.quic.ecn import Ecn, tag
from eloquent.quic.thin import THIN

RTT_S = 0.1
PACKET_BYTES = 120


class Path:
    """A recovery whose packets' fates the test decides."""

    def __init__(self) -> None:
        self.late: list[int] = []
        self.fates: dict[int, QuicDeliveryState] = {}
        self.probes = 0
        self.recovery = TimedRecovery(
            congestion_control_algorithm=THIN,
            initial_rtt=RTT_S,
            max_datagram_size=1200,
            peer_completed_address_validation=True,
            send_probe=self._probe,
            on_late_ack=lambda packet: self.late.append(packet.packet_number),
        )
        self.recovery.handshake_confirmed = True
        self.space = QuicPacketSpace(is_application_data=True)
        self.recovery.spaces = [self.space]
        self.send(0, 1.0)
        self.ack([0], 1.0 + RTT_S)

    def _probe(self) -> None:
        self.probes += 1

    def send(self, number: int, now: float, codepoint: Ecn = Ecn.NOT_ECT) -> None:
        packet = QuicSentPacket(
            epoch=Epoch.ONE_RTT,
            in_flight=True,
            is_ack_eliciting=True,
            is_crypto_packet=False,
            packet_number=number,
            packet_type=QuicPacketType.ONE_RTT,
            sent_time=now,
            sent_bytes=PACKET_BYTES,
        )
        tag(packet, codepoint)
        packet.delivery_handlers.append((self._on_fate, (number,)))
        self.recovery.on_packet_sent(packet=packet, space=self.space)

    def _on_fate(self, state: QuicDeliveryState, number: int) -> None:
        self.fates[number] = state

    def ack(self, numbers: Iterable[int], now: float, delay: float = 0.0) -> None:
        ranges = RangeSet([range(number, number + 1) for number in numbers])
        self.recovery.on_ack_received(
            ack_rangeset=ranges, ack_delay=delay, now=now, space=self.space
        )

    @property
    def lost(self) -> list[int]:
        return [n for n, state in self.fates.items() if state is QuicDeliveryState.LOST]

    @property
    def timer(self) -> float:
        time = self.recovery.get_loss_detection_time(amplification_limited=False)
        assert time is not None
        return time


def test_three_later_packets_do_not_make_a_loss() -> None:
    path = Path()
    for number in range(1, 9):
        path.send(number, 2.0 + 0.001 * number)
    path.ack(range(2, 9), 2.0 + RTT_S + 0.008)
    assert path.lost == []


def test_a_packet_is_lost_when_a_later_one_came_and_its_time_is_over() -> None:
    path = Path()
    path.send(1, 2.0)
    path.send(2, 2.01)
    path.ack([2], 2.01 + RTT_S)
    assert path.lost == []
    assert path.timer == pytest.approx(2.0 + 9 / 8 * RTT_S)
    path.recovery.on_loss_detection_timeout(now=2.0 + 9 / 8 * RTT_S + 1e-6)
    assert path.lost == [1]


def test_a_packet_of_one_queue_does_not_make_those_of_the_other_look_lost() -> None:
    path = Path()
    path.send(1, 2.0, Ecn.NOT_ECT)
    path.send(2, 2.01, Ecn.ECT_1)
    path.send(3, 2.02, Ecn.ECT_1)
    path.ack([2, 3], 2.02 + 1.2 * RTT_S)
    assert path.lost == []
    path.ack([1], 2.0 + 1.5 * RTT_S)
    assert path.late == []


def test_a_later_packet_of_the_same_queue_does() -> None:
    path = Path()
    path.send(1, 2.0, Ecn.NOT_ECT)
    path.send(2, 2.01, Ecn.ECT_1)
    path.send(3, 2.02, Ecn.NOT_ECT)
    path.ack([3], 2.02 + RTT_S)
    # The second one has longer: nothing says yet that its queue has got so far.
    assert path.lost == [1]
    assert path.timer == pytest.approx(2.01 + 9 / 8 * RTT_S + OTHER_QUEUE_S)
    path.ack([3], 2.01 + 1.3 * RTT_S)
    assert path.lost == [1]


def test_the_last_packet_of_a_queue_that_is_used_no_more_is_lost_in_the_end() -> None:
    path = Path()
    path.send(1, 2.0, Ecn.ECT_1)
    path.send(2, 2.01, Ecn.NOT_ECT)
    path.ack([2], 2.01 + RTT_S)
    lost_at = 2.0 + 9 / 8 * RTT_S + OTHER_QUEUE_S
    assert path.timer == pytest.approx(lost_at)
    path.recovery.on_loss_detection_timeout(now=lost_at + 1e-6)
    assert path.lost == [1]


def test_the_timer_is_that_of_the_first_to_be_lost_of_either_queue() -> None:
    path = Path()
    path.send(1, 2.0, Ecn.ECT_1)
    path.send(2, 2.005, Ecn.NOT_ECT)
    path.send(3, 2.05, Ecn.NOT_ECT)
    path.ack([3], 2.05 + 0.6 * RTT_S)
    assert path.lost == []
    assert path.timer == pytest.approx(2.005 + path.recovery._loss_delay())


def test_without_a_later_acknowledgement_nothing_is_lost() -> None:
    path = Path()
    path.send(1, 2.0)
    assert path.timer > 2.0 + 9 / 8 * RTT_S
    assert path.lost == []


def test_a_late_acknowledgement_is_told_and_taken_back() -> None:
    path = Path()
    window = path.recovery.congestion_window
    path.send(1, 2.0)
    path.send(2, 2.05)
    path.ack([2], 2.05 + RTT_S)
    assert path.lost == [1]
    assert path.recovery.congestion_window < window
    path.ack([1, 2], 2.0 + 1.6 * RTT_S)
    assert path.late == [1]
    assert path.recovery.congestion_window == window


def test_a_late_acknowledgement_makes_the_detection_more_patient() -> None:
    path = Path()
    path.send(1, 2.0)
    path.send(2, 2.05)
    path.ack([2], 2.05 + RTT_S)
    path.ack([1, 2], 2.0 + 1.8 * RTT_S)
    assert path.recovery.reordering_slack_s == pytest.approx(0.8 * RTT_S)
    path.send(3, 3.0)
    path.send(4, 3.05)
    path.ack([4], 3.05 + RTT_S)
    assert path.lost == [1]
    path.ack([3, 4], 3.0 + 1.7 * RTT_S)
    assert path.lost == [1]


def test_patience_is_bounded_and_wears_off() -> None:
    path = Path()
    path.send(1, 2.0)
    path.send(2, 2.05)
    path.ack([2], 2.05 + RTT_S)
    path.ack([1, 2], 4.0)
    assert path.recovery.reordering_slack_s <= RTT_S + 1e-9
    for number in range(3, 400):
        path.send(number, 5.0 + number)
        path.ack([number], 5.0 + number + RTT_S)
    assert path.recovery.reordering_slack_s < 0.01 * RTT_S


@pytest.mark.parametrize("numbers", [[7], [1, 7]])
def test_an_acknowledgement_of_what_was_never_sent_is_an_error(numbers: list[int]) -> None:
    path = Path()
    path.send(1, 2.0)
    with pytest.raises(QuicConnectionError, match="never sent"):
        path.ack(numbers, 2.1)


def test_an_acknowledgement_of_a_number_left_out_is_an_error() -> None:
    path = Path()
    path.send(1, 2.0)
    path.recovery.skip(2)
    path.send(3, 2.0)
    path.ack([1, 3], 2.1)
    path.send(4, 2.2)
    with pytest.raises(QuicConnectionError, match="never sent"):
        path.ack([2, 4], 2.3)


def test_in_a_silence_nothing_in_flight_blocks_the_window() -> None:
    path = Path()
    for number in range(1, 50):
        path.send(number, 2.0)
    path.recovery.expire(2.0 + RTT_S)
    assert path.recovery.bytes_in_flight == 49 * PACKET_BYTES
    path.recovery.expire(10.0)
    assert path.recovery.bytes_in_flight == 0
    path.ack(range(1, 50), 10.1)
    assert path.recovery.bytes_in_flight == 0
    assert path.fates[30] is QuicDeliveryState.ACKED


def test_held_acknowledgements_do_not_stop_a_flow() -> None:
    path = Path()
    path.recovery._rtt_variance = 1.0  # the probe timeout is seconds away
    path.send(1, 2.0)
    path.send(2, 2.1)
    path.recovery.expire(2.0 + EXPIRE_RTTS * RTT_S + path.recovery.max_ack_delay + 0.001)
    assert path.recovery.bytes_in_flight == PACKET_BYTES
    assert not path.lost


def test_a_packet_that_came_much_later_than_a_round_trip_was_held() -> None:
    path = Path()
    path.send(1, 2.0)
    path.ack([1], 2.0 + RTT_S + HELD_S)
    assert not path.recovery.holds(2.3)
    path.send(2, 3.0)
    path.ack([2], 3.0 + RTT_S + HELD_S + 0.01)
    assert path.recovery.holds(3.3)
    assert not path.recovery.holds(3.3 + HOLDS_S)


def test_a_packet_given_up_in_a_hold_tells_of_it_too() -> None:
    path = Path()
    path.send(1, 2.0)
    path.recovery.on_heard_again(4.0)
    path.ack([1], 4.1)
    assert path.recovery.holds(4.1)


def test_an_acknowledgement_lost_in_an_outage_is_no_hold() -> None:
    path = Path()
    path.send(1, 2.0)
    path.ack([1], 7.0, delay=4.9)  # It came at once, and that is said again.
    assert not path.recovery.holds(7.0)


def test_a_handshake_of_seconds_was_held() -> None:
    path = Path()
    path.recovery.rtts.forget()
    path.recovery._rtt_smoothed = SLOW_RTT_S + 0.01
    assert path.recovery.holds(2.0)
    path.recovery._rtt_smoothed = SLOW_RTT_S - 0.01
    assert not path.recovery.holds(2.0)


def test_probes_do_not_double_for_ever() -> None:
    path = Path()
    path.send(1, 2.0)
    now, gaps = 2.0, []
    for number in range(2, 30):
        gaps.append(path.timer - now)
        now = path.timer
        path.recovery.on_loss_detection_timeout(now=now)
        path.send(number, now)
    assert path.probes == 28
    assert max(gaps) == pytest.approx(MAX_PROBE_GAP_S)


def test_the_first_packet_after_a_silence_gives_up_what_is_older_than_half_a_round_trip() -> None:
    path = Path()
    for number in range(1, 21):
        path.send(number, 2.0 + 0.1 * number - 0.01)
    assert path.recovery.is_silent(4.0)
    assert not path.recovery.is_heard
    path.recovery.on_heard_again(4.0)
    assert path.lost == list(range(1, 20))  # the last one may be answered yet
    assert not path.recovery.is_silent(4.0)
    assert path.recovery.congestion_window >= 12_000


def test_it_is_heard_again_once_until_something_is_acknowledged() -> None:
    path = Path()
    path.send(1, 2.0)
    path.recovery.on_heard_again(4.0)
    assert path.recovery.is_heard
    path.send(2, 4.0)
    path.ack([2], 4.0 + RTT_S)
    assert not path.recovery.is_heard


def test_what_was_given_up_in_a_silence_may_still_be_acknowledged() -> None:
    path = Path()
    path.send(1, 2.0)
    path.recovery.on_heard_again(4.0)
    path.send(2, 4.0)
    path.ack([1, 2], 4.0 + RTT_S)
    assert path.late == [1]


def test_another_path_has_other_times() -> None:
    path = Path()
    path.send(1, 2.0)
    path.recovery.on_path_changed(2.05)
    assert path.lost == [1]
    assert path.recovery.rtts.min_s is None
    assert path.recovery.bytes_in_flight == 0


def test_ack_delay_is_taken_out_of_the_round_trip() -> None:
    path = Path()
    path.recovery.max_ack_delay = 0.06
    for number in range(1, 10):
        path.send(number, 2.0 + number)
        path.ack([number], 2.0 + number + RTT_S + 0.05, delay=0.05)
    assert path.recovery.rtts.min_s == pytest.approx(RTT_S)
    assert not path.recovery.rtts.has_queue


def test_an_acknowledgement_said_again_later_is_no_sample() -> None:
    path = Path()
    path.send(1, 2.0)
    path.ack([1], 3.0, delay=0.9)
    assert path.recovery.rtts.recent_s == pytest.approx(RTT_S)
