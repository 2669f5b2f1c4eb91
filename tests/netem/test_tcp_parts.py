"""The TCP model's parts, each alone: the wire format, the timeout, ACKs, the window's growth."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eloquent_netem.capture import CLIENT, SERVER
from eloquent_netem.packet import Ecn, Packet
from eloquent_netem.tcp.congestion import Reno, make_controller
from eloquent_netem.tcp.connection import TcpConnection
from eloquent_netem.tcp.cubic import BETA, SCALE, Cubic
from eloquent_netem.tcp.errors import SegmentError, TcpError
from eloquent_netem.tcp.receiver import BUFFER_BYTES, Receiver
from eloquent_netem.tcp.recovery import TRANSITIONS, Cause, State
from eloquent_netem.tcp.rtt import RttEstimator
from eloquent_netem.tcp.segment import (
    ACK,
    CWR,
    ECE,
    MSS_BYTES,
    PSH,
    SYN,
    Segment,
    from_packet,
    to_packet,
)
from eloquent_netem.tcp.sender import Sender

NUMBERS = st.integers(0, 1 << 40)


@given(
    seq=NUMBERS,
    ack=NUMBERS,
    time_ms=NUMBERS,
    blocks=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 1 << 20)), max_size=3),
    payload=st.binary(max_size=MSS_BYTES),
    flags=st.sampled_from([ACK, ACK | PSH, ACK | ECE | CWR]),
)
def test_a_segment_comes_out_of_the_wire_as_it_went_in(
    *,
    seq: int,
    ack: int,
    time_ms: int,
    blocks: list[tuple[int, int]],
    payload: bytes,
    flags: int,
) -> None:
    sack = tuple((ack + first, ack + first + size) for first, size in blocks)
    segment = Segment(seq, ack, flags, time_ms, time_ms, sack, payload)
    packet = to_packet(segment, source=CLIENT, destination=SERVER, ecn=Ecn.ECT_0, flow=3)
    assert packet.size == len(packet.data) == 52 + len(payload) + (4 + 8 * len(sack)) * bool(sack)
    assert (packet.ecn, packet.flow) == (Ecn.ECT_0, 3)
    # The reader knows the numbers to within half of what 32 bits hold.
    near = (1 << 31) - 1
    back = from_packet(packet, seq=seq + near, ack=ack, now_ms=time_ms + near)
    assert back == segment


def test_headers_are_those_of_ipv4_and_tcp() -> None:
    syn = to_packet(Segment(0, 0, SYN, 1, 0), source=CLIENT, destination=SERVER)
    assert syn.size == 60
    assert syn.data[0] == 0x45
    assert syn.data[9] == 6
    assert syn.data[2:4] == (60).to_bytes(2, "big")
    full = to_packet(
        Segment(1, 1, ACK, 1, 1, (), bytes(MSS_BYTES)), source=SERVER, destination=CLIENT
    )
    assert full.size == 1500
    assert full.data[20:22] == SERVER[1].to_bytes(2, "big")


@pytest.mark.parametrize("data", [b"", bytes(60), b"\x45" + bytes(8) + b"\x11" + bytes(40)])
def test_what_is_not_tcp_is_refused(data: bytes) -> None:
    with pytest.raises(SegmentError, match="not TCP"):
        from_packet(Packet(data, len(data)), seq=0, ack=0, now_ms=0)


def test_a_damaged_option_is_refused() -> None:
    packet = to_packet(Segment(1, 1, ACK, 1, 1), source=CLIENT, destination=SERVER)
    packet.data = packet.data[:43] + b"\xff" + packet.data[44:]
    with pytest.raises(SegmentError, match="cut off"):
        from_packet(packet, seq=0, ack=0, now_ms=0)


def test_the_timeout_is_never_less_than_the_round_trip_and_200_ms() -> None:
    rtt = RttEstimator()
    assert rtt.rto_s == 1.0
    for index in range(200):
        rtt.sample(0.05, una=index, nxt=index + 1)
    assert rtt.srtt_s == pytest.approx(0.05)
    assert rtt.rto_s == pytest.approx(0.25)


def test_a_first_sample_gives_a_timeout_of_three_round_trips() -> None:
    rtt = RttEstimator()
    rtt.sample(0.3, una=1, nxt=1)
    assert rtt.rto_s == pytest.approx(0.9)


def test_a_rising_round_trip_raises_the_timeout_and_a_sample_ends_backoff() -> None:
    rtt = RttEstimator()
    rtt.sample(0.05, una=1, nxt=2)
    rtt.sample(0.45, una=2, nxt=3)
    # srtt 50 + 400/8; mean deviation times four: 100 + 400 - 25.
    assert rtt.rto_s == pytest.approx(0.1 + 0.475)
    rtt.back_off()
    rtt.back_off()
    assert rtt.rto_s == pytest.approx(4 * 0.575)
    rtt.sample(0.1, una=3, nxt=4)
    assert rtt.rto_s < 0.6
    for _ in range(20):
        rtt.back_off()
    assert rtt.rto_s == 120.0


def receiver_of(*received: tuple[float, int, int], has_ecn: bool = False) -> Receiver:
    """A receiver past its quick ACKs that got (time, first byte, size), all read at once."""
    receiver = Receiver(0, RttEstimator(), has_ecn=has_ecn)
    for time, start, size in received:
        receiver.receive(Segment(start, 0, ACK | PSH, 0, 0, (), bytes(size)), Ecn.NOT_ECT, time)
        if receiver.is_ack_due:
            receiver.ack_sent()
    return receiver


def seasoned(every_s: float) -> Receiver:
    return receiver_of(*((every_s * index, 100 * index, 100) for index in range(16)))


def test_the_first_sixteen_segments_are_acknowledged_at_once() -> None:
    receiver = Receiver(0, RttEstimator(), has_ecn=False)
    due = []
    for index in range(18):
        segment = Segment(100 * index, 0, ACK | PSH, 0, 0, (), bytes(100))
        receiver.receive(segment, Ecn.NOT_ECT, 0.01 * index)
        due.append(receiver.is_ack_due)
        if due[-1]:
            receiver.ack_sent()
    assert due == [True] * 16 + [False] * 2


def test_a_lone_segment_s_ack_waits_40_ms() -> None:
    receiver = seasoned(0.01)
    receiver.receive(Segment(1600, 0, ACK | PSH, 0, 0, (), b"x"), Ecn.NOT_ECT, 0.16)
    assert not receiver.is_ack_due
    assert receiver.next_time() == pytest.approx(0.16 + 0.04)
    receiver.handle_timer(0.2 + 1e-9)
    assert receiver.is_ack_due


def test_a_reader_who_empties_the_buffer_lets_the_ack_go() -> None:
    receiver = seasoned(0.01)
    receiver.read()
    receiver.ack_sent()
    receiver.receive(Segment(1600, 0, ACK | PSH, 0, 0, (), b"x"), Ecn.NOT_ECT, 0.16)
    assert receiver.read() == b"x"
    assert receiver.is_ack_due


def test_on_an_interactive_connection_it_does_not() -> None:
    receiver = seasoned(0.01)
    receiver.read()
    receiver.data_sent(0.155)
    receiver.ack_sent()
    receiver.receive(Segment(1600, 0, ACK | PSH, 0, 0, (), b"x"), Ecn.NOT_ECT, 0.16)
    assert receiver.read() == b"x"
    assert not receiver.is_ack_due


def test_gaps_are_reported_latest_first_and_four_are_kept() -> None:
    receiver = receiver_of(*((0.0, start, 10) for start in (100, 300, 200, 400, 500)))
    assert receiver.next == 0
    assert receiver.sack_blocks() == ((500, 510), (400, 410), (200, 210))
    receiver.receive(Segment(210, 0, ACK, 0, 0, (), bytes(90)), Ecn.NOT_ECT, 0.0)
    # 200-210 and 300-... meet; 100 and 300 were the oldest and one of them is forgotten.
    assert receiver.sack_blocks()[0] == (200, 310)


def test_a_filled_gap_and_a_duplicate_are_acknowledged_at_once() -> None:
    receiver = receiver_of((0.0, 0, 10), (0.0, 20, 10))
    receiver.receive(Segment(10, 0, ACK, 0, 0, (), bytes(10)), Ecn.NOT_ECT, 0.1)
    assert receiver.is_ack_due
    assert (receiver.next, receiver.sack_blocks()) == (30, ())
    receiver.ack_sent()
    receiver.receive(Segment(5, 0, ACK, 0, 0, (), bytes(10)), Ecn.NOT_ECT, 0.1)
    assert receiver.is_ack_due
    assert receiver.sack_blocks() == ((5, 15),)
    assert receiver.duplicates == 1


def test_a_mark_is_echoed_until_the_sender_has_slowed_down() -> None:
    receiver = receiver_of((0.0, 0, 10), has_ecn=True)
    receiver.receive(Segment(10, 0, ACK, 0, 0, (), bytes(10)), Ecn.CE, 0.1)
    assert receiver.echoes
    receiver.receive(Segment(20, 0, ACK, 0, 0, (), bytes(10)), Ecn.ECT_0, 0.1)
    assert receiver.echoes
    receiver.receive(Segment(30, 0, ACK | CWR, 0, 0, (), bytes(10)), Ecn.ECT_0, 0.1)
    assert not receiver.echoes


def grow(controller: Cubic | Reno, seconds: float, rtt_s: float) -> list[int]:
    """Acknowledge a full window each round trip; return the windows."""
    windows = []
    controller.window.is_limited = True
    now = 10.0
    while now < 10.0 + seconds:
        cwnd = controller.window.cwnd
        for index in range(cwnd):
            controller.on_ack(now + rtt_s * index / cwnd, 1)
        windows.append(cwnd)
        now += rtt_s
    return windows


def test_reno_grows_by_one_packet_a_round_and_halves() -> None:
    reno = Reno()
    reno.window.cwnd = reno.window.ssthresh = 20
    assert grow(reno, 1.0, 0.1)[:5] == [20, 21, 22, 23, 24]
    assert reno.reduced() == reno.window.cwnd // 2
    reno.window.cwnd = 1
    assert reno.reduced() == 2


def test_cubic_is_back_at_the_old_window_when_rfc_9438_says() -> None:
    cubic = Cubic()
    cubic.window.cwnd = 1000
    cubic.window.ssthresh = cubic.window.cwnd = cubic.reduced()
    assert cubic.window.cwnd == int(1000 * BETA)
    windows = grow(cubic, 20.0, 0.2)
    back_s = (300 / SCALE) ** (1 / 3)
    # The plateau lies around it: ten packets off at 3 s before and after, far off later.
    at = {s: windows[int(s / 0.2)] for s in (2.0, back_s, back_s + 3, back_s + 6)}
    assert at[2.0] == pytest.approx(1000 - SCALE * (back_s - 2) ** 3, abs=15)
    assert at[back_s] == pytest.approx(1000, abs=5)
    assert at[back_s + 6] == pytest.approx(1000 + SCALE * 6**3, abs=15)


def test_hystart_ends_slow_start_when_round_trips_rise() -> None:
    cubic = Cubic()
    cubic.window.cwnd = 40
    for index in range(20):
        cubic.on_rtt(index * 0.01, 0.05, una=index, nxt=100)
    assert cubic.window.in_slow_start
    for index in range(20):
        cubic.on_rtt(1 + index * 0.01, 0.06, una=101 + index, nxt=300)
    assert cubic.window.ssthresh == 40


def test_an_unknown_congestion_control_is_refused() -> None:
    with pytest.raises(TcpError, match="cubic, reno"):
        make_controller("bbr")


def test_only_a_client_connects_and_only_once() -> None:
    client = TcpConnection(is_client=True)
    client.connect(1.0)
    with pytest.raises(TcpError, match="SYN_SENT"):
        client.connect(1.0)
    with pytest.raises(TcpError, match="LISTEN"):
        TcpConnection(is_client=False).connect(1.0)


def test_every_state_can_be_left_for_open_and_a_timeout_strikes_in_each() -> None:
    for state in State:
        assert TRANSITIONS[state, Cause.TIMEOUT] is State.LOSS
        if state is not State.OPEN:
            assert State.OPEN in {to for (of, _), to in TRANSITIONS.items() if of is state}


def test_a_window_opens_for_a_full_segment_or_not_at_all() -> None:
    receiver = Receiver(0, RttEstimator(), has_ecn=False, has_window=True)
    receiver.ack_sent()
    assert receiver.window() == BUFFER_BYTES
    receiver.receive(Segment(0, 0, ACK, 0, 0, (), bytes(BUFFER_BYTES)), Ecn.NOT_ECT, 1.0)
    receiver.ack_sent()
    assert receiver.window() == 0
    receiver.read(MSS_BYTES - 1)
    assert (receiver.window(), receiver.is_ack_due) == (0, False)
    receiver.read(1)
    assert receiver.is_ack_due
    assert receiver.window() == MSS_BYTES


def test_a_tail_probe_does_not_pass_a_closed_window() -> None:
    sent: list[tuple[int, int, bool]] = []
    sender = Sender(
        start=1,
        controller=make_controller("cubic"),
        rtt=RttEstimator(),
        transmit=lambda segment, is_repeat, _: sent.append((segment.start, segment.end, is_repeat)),
        probe_window=lambda _: None,
    )
    sender.window_end = 1 + 1.5 * MSS_BYTES
    sender.write(bytes(4 * MSS_BYTES), 0.0)
    half = MSS_BYTES // 2
    assert sent == [(1, 1 + MSS_BYTES, False), (1 + MSS_BYTES, 1 + MSS_BYTES + half, False)]
    due_s = sender.next_time()
    assert due_s is not None
    sender.handle_timer(due_s)
    assert (sender.probes, sent[-1]) == (1, (1 + MSS_BYTES, 1 + MSS_BYTES + half, True))
