"""The TCP model, loss by loss: what is repeated, when, and that every byte arrives once, in order.

The client sends, so that on the way up packet 0 is the SYN, 1 the handshake's ACK, 2 and up data;
on the way down packet 0 is the SYN-ACK, 1 and up ACKs. The round trip takes 50 ms. Times count
from the moment at which the client's handshake is over and the first write is due.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import DropList, IndependentLoss, Loss
from eloquent_netem.packet import Ecn, Packet
from eloquent_netem.sim import simulate
from eloquent_netem.tcp.connection import Phase
from eloquent_netem.tcp.pair import TcpPair
from eloquent_netem.tcp.segment import ACK, CWR, ECE, MSS_BYTES, SYN, Segment, from_packet
from eloquent_netem.tcp.window import NO_THRESHOLD

RTT_S = 0.05
START_S = 1.0
ZERO_S = START_S + RTT_S
TRAIN = b"0123456789"


class WatchedLink(Link):
    """Writes down what enters it; `fate` may mark, or hold back (seconds), packet number n."""

    def __init__(
        self,
        name: str,
        loss: Loss,
        held_s: dict[int, float] | None = None,
        marked: Sequence[int] = (),
    ) -> None:
        super().__init__(delay_s=RTT_S / 2, seed=1, name=name, loss=loss, reorders=True)
        self.seen: list[tuple[float, Segment, Ecn]] = []
        self._held_s = held_s or {}
        self._marked = frozenset(marked)

    def send(self, now: float, packet: Packet) -> None:
        index = len(self.seen)
        segment = from_packet(packet, seq=0, ack=0, now_ms=int(1000 * now))
        self.seen.append((now - ZERO_S, segment, packet.ecn))
        if index in self._marked and packet.ecn is not Ecn.NOT_ECT:
            packet.ecn = Ecn.CE
        self._delay_s = RTT_S / 2 + self._held_s.get(index, 0.0)
        super().send(now, packet)

    def data(self) -> list[tuple[float, int, int]]:
        """Time, first byte and length of every segment with data."""
        return [
            (round(time, 4), segment.seq - 1, len(segment.payload))
            for time, segment, _ in self.seen
            if segment.payload
        ]


@dataclass
class Writer:
    """Writes at given times, counted from `ZERO_S`."""

    pair: TcpPair
    writes: list[tuple[float, bytes]]
    arrived: list[tuple[float, bytes]] = field(default_factory=list)

    def next_time(self) -> float | None:
        return ZERO_S + self.writes[0][0] if self.writes else None

    def act(self, now: float) -> None:
        self.pair.client.write(self.writes.pop(0)[1], now)
        self.pair.flush(now)


@dataclass
class Outcome:
    pair: TcpPair
    up: WatchedLink
    down: WatchedLink
    arrived: list[tuple[float, bytes]]

    @property
    def stream(self) -> bytes:
        return b"".join(data for _, data in self.arrived)

    def at(self, byte: int) -> float:
        """When the application read that byte, in seconds."""
        total = 0
        for time, data in self.arrived:
            total += len(data)
            if total > byte:
                return round(time, 4)
        raise AssertionError(f"byte {byte} never came")

    @property
    def counts(self) -> tuple[int, int, int]:
        """Retransmissions, tail probes and timeouts."""
        sender = self.pair.client.sender
        return sender.retransmissions, sender.probes, sender.timeouts


def run(
    writes: Sequence[tuple[float, bytes]],
    *,
    up: Sequence[int] = (),
    down: Sequence[int] = (),
    held_s: dict[int, float] | None = None,
    marked: Sequence[int] = (),
    ecn: bool = False,
    congestion: str = "cubic",
) -> Outcome:
    up_link = WatchedLink("up", DropList(up), held_s, marked)
    down_link = WatchedLink("down", DropList(down))
    arrived: list[tuple[float, bytes]] = []
    pair = TcpPair(
        up=up_link,
        down=down_link,
        ecn=ecn,
        congestion=congestion,
        on_server_data=lambda data, now: arrived.append((now - ZERO_S, data)),
    )
    pair.connect(START_S)
    writer = Writer(pair, list(writes))
    expected = b"".join(data for _, data in writes)

    def is_done() -> bool:
        return not writer.writes and not pair.client.unacknowledged

    simulate((writer, *pair.actors), until=is_done, start_s=START_S, limit_s=1000.0)
    outcome = Outcome(pair, up_link, down_link, arrived)
    assert outcome.stream == expected
    return outcome


def train(count: int, at_s: float = 0.0) -> list[tuple[float, bytes]]:
    """One write of `count` full segments, each of one letter."""
    return [(at_s, b"".join(bytes((65 + n % 26,)) * MSS_BYTES for n in range(count)))]


def tokens(count: int, every_s: float) -> list[tuple[float, bytes]]:
    return [(index * every_s, bytes((65 + index % 26,)) * 200) for index in range(count)]


def cwnd(outcome: Outcome) -> int:
    return outcome.pair.client.sender.controller.window.cwnd


def is_reduced(outcome: Outcome) -> bool:
    return outcome.pair.client.sender.controller.window.ssthresh < NO_THRESHOLD


def test_nothing_lost_nothing_repeated() -> None:
    outcome = run(train(10))
    assert outcome.counts == (0, 0, 0)
    assert outcome.at(10 * MSS_BYTES - 1) == 0.025
    assert [packet[2] for packet in outcome.up.data()] == [MSS_BYTES] * 10
    assert cwnd(outcome) == 20
    assert not is_reduced(outcome)


@pytest.mark.parametrize("lost", range(7))
def test_nth_segment_lost_is_repeated_after_one_round_trip(lost: int) -> None:
    outcome = run(train(10), up=[2 + lost])
    assert outcome.counts == (1, 0, 0)
    assert outcome.at(lost * MSS_BYTES) == 0.075
    assert is_reduced(outcome)


@pytest.mark.parametrize("lost", [7, 8])
def test_a_loss_with_few_segments_behind_it_waits_for_the_reordering_window(lost: int) -> None:
    outcome = run(train(10), up=[2 + lost])
    assert outcome.counts == (1, 0, 0)
    # At 50 ms a SACK, then an eighth of the round trip (less than a quarter), and two ticks.
    assert outcome.at(lost * MSS_BYTES) == pytest.approx(0.075 + RTT_S / 8 + 0.002, abs=1e-3)


def test_several_segments_lost_are_repeated_in_one_round_trip() -> None:
    outcome = run(train(10), up=[3, 5, 6])
    assert outcome.counts == (3, 0, 0)
    assert outcome.at(10 * MSS_BYTES - 1) <= 0.08


def test_a_lost_token_is_repeated_when_the_next_is_acknowledged() -> None:
    outcome = run(tokens(6, 0.02), up=[2])
    assert outcome.counts == (1, 0, 0)
    assert outcome.at(0) == 0.02 + RTT_S + RTT_S / 2
    assert outcome.at(200) == outcome.at(0)


def test_tail_lost_a_probe_finds_out() -> None:
    outcome = run(train(5) + train(1, at_s=0.4), up=[6])
    assert outcome.counts == (1, 1, 0)
    # The probe waits for the timeout of a lone segment, counted from the last ACK: 50 + 250 ms.
    assert outcome.at(5 * MSS_BYTES - 1) == pytest.approx(0.05 + 0.25 + 0.025, abs=2e-3)
    # Only an ACK beyond the probe shows that it had repaired a loss.
    assert is_reduced(outcome)


def test_a_whole_train_lost_one_probe_then_recovery() -> None:
    outcome = run(train(5), up=range(2, 7))
    retransmissions, probes, timeouts = outcome.counts
    assert (retransmissions, probes, timeouts) == (5, 1, 0)
    assert outcome.up.data()[5][:2] == (pytest.approx(2 * RTT_S + 0.002), 4 * MSS_BYTES)


def test_unsent_data_is_the_probe() -> None:
    # Ten fill the window; all are lost; the eleventh goes out as the probe.
    outcome = run(train(11), up=range(2, 12))
    probe = outcome.up.data()[10]
    assert probe == (pytest.approx(2 * RTT_S + 0.002), 10 * MSS_BYTES, MSS_BYTES)
    assert outcome.counts == (10, 1, 0)


def test_lone_segment_lost_and_its_probe_lost_a_timeout_follows() -> None:
    outcome = run(tokens(1, 1), up=[2, 3])
    assert outcome.counts == (2, 1, 1)
    times = [time for time, *_ in outcome.up.data()]
    assert times == pytest.approx([0.0, 0.25, 0.5], abs=2e-3)
    # After a timeout slow start begins at one packet.
    assert cwnd(outcome) == 2


def test_timeouts_back_off_twofold() -> None:
    outcome = run(tokens(1, 1), up=range(2, 8))
    times = [time for time, *_ in outcome.up.data()][1:]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert gaps == pytest.approx([0.25, 0.5, 1.0, 2.0, 4.0], abs=2e-3)


def test_a_timeout_joins_small_segments() -> None:
    outcome = run([(0.001 * index, TRAIN * 20) for index in range(4)], up=range(2, 8))
    assert (200, 800) in [(200, size) for _, _, size in outcome.up.data()]


def test_segment_and_its_repeat_lost_rack_finds_both() -> None:
    # The repeat goes out at 70 ms, as packet 6; what was sent after it tells of its loss.
    outcome = run(tokens(12, 0.02), up=[2, 6])
    repeats = [packet for packet in outcome.up.data() if packet[1] == 0]
    assert [packet[0] for packet in repeats][:2] == [0.0, 0.07]
    assert len(repeats) == 3
    assert outcome.pair.client.sender.timeouts == 0
    assert repeats[2][0] < 0.07 + 2 * RTT_S + 0.02


def test_ack_lost_nothing_is_repeated() -> None:
    outcome = run(tokens(10, 0.02), down=[1, 4])
    assert outcome.counts == (0, 0, 0)


def test_last_ack_lost_the_probe_is_answered_and_the_window_kept() -> None:
    outcome = run(train(2) + train(1, at_s=0.4), down=[1, 2])
    assert outcome.counts == (1, 1, 0)
    assert outcome.pair.server.duplicates == 1
    assert not is_reduced(outcome)


def test_slight_reordering_repeats_nothing() -> None:
    outcome = run(train(3), held_s={2: 0.004})
    assert outcome.counts == (0, 0, 0)
    assert outcome.pair.client.sender.rack.is_reordering_seen


def test_three_sacks_are_a_loss_while_no_reordering_is_known_and_undone() -> None:
    outcome = run(train(10), held_s={4: 0.005})
    assert outcome.counts == (1, 0, 0)
    assert outcome.pair.client.sender.recovery.undone == 1
    assert cwnd(outcome) >= 10


def test_once_reordering_is_known_racks_window_bears_it() -> None:
    outcome = run(train(3) + train(10, at_s=0.5), held_s={2: 0.004, 7: 0.005})
    assert outcome.counts == (0, 0, 0)
    assert not is_reduced(outcome)


def test_reordering_beyond_racks_window_repeats_once() -> None:
    outcome = run(tokens(20, 0.02), held_s={4: 0.09})
    assert outcome.counts == (1, 0, 0)
    assert outcome.pair.server.duplicates == 1


def test_a_spurious_timeout_is_undone() -> None:
    # Everything stands still for half a second: the timeout is not due to loss.
    outcome = run(train(4), held_s=dict.fromkeys(range(2, 6), 0.5) | {6: 0.42, 7: 0.2})
    assert outcome.counts[1:] == (1, 1)
    assert outcome.pair.client.sender.recovery.undone >= 1
    assert cwnd(outcome) >= 10


def test_a_timeout_that_a_late_original_disproves_is_undone() -> None:
    # The first is lost, the rest late: no timestamp helps, but what was never repeated arrives.
    outcome = run(train(4), up=[2], held_s=dict.fromkeys(range(3, 7), 0.5) | {7: 0.3})
    assert outcome.pair.client.sender.timeouts == 1
    assert outcome.pair.client.sender.recovery.undone == 1


def test_recovery_sends_no_more_than_arrives() -> None:
    # The third SACK begins recovery and lets one go, though the new window is seven. Then one
    # goes for each that arrives, and one more, for the network has lost nothing since.
    outcome = run(train(10), up=range(2, 9))
    times = [time for time, *_ in outcome.up.data()[10:]]
    assert times == [0.05, 0.1, 0.1, 0.15, 0.15, 0.15, 0.15]


def test_after_a_timeout_the_receiver_hears_that_the_window_was_reduced() -> None:
    outcome = run(tokens(1, 1) + tokens(1, 1), ecn=True)
    assert not any(segment.flags & CWR for _, segment, _ in outcome.up.seen[1:])
    outcome = run([*tokens(1, 1), (1.0, TRAIN)], ecn=True, up=[2, 3])
    assert outcome.pair.client.sender.timeouts == 1
    assert outcome.up.seen[-1][1].flags & CWR


def test_unsent_writes_leave_together() -> None:
    # After the timeout two packets may be out; the other tokens wait and leave in full segments.
    outcome = run(tokens(1, 1) + [(0.6 + n / 1000, TRAIN * 20) for n in range(15)], up=[2, 3])
    sizes = [size for time, _, size in outcome.up.data() if time > 0.59]
    assert sizes == [200, 200, MSS_BYTES, 13 * 200 - MSS_BYTES]


@pytest.mark.parametrize(
    ("up", "down", "delay_s"),
    [([0], [], 1.0), ([0, 1], [], 2.0), ([], [0], 1.0), ([1], [], 0.0)],
    ids=["syn", "two syns", "syn-ack", "handshake's ack"],
)
def test_handshake_loss(up: list[int], down: list[int], delay_s: float) -> None:
    outcome = run(tokens(1, 1), up=up, down=down)
    assert outcome.at(0) == pytest.approx(delay_s + RTT_S / 2, abs=2e-3)
    assert outcome.pair.server.phase is Phase.ESTABLISHED
    assert outcome.stream == tokens(1, 1)[0][1]


def test_a_mark_halves_once_and_repeats_nothing() -> None:
    outcome = run(train(10) + train(20, 0.2), ecn=True, marked=range(14, 18))
    assert outcome.counts == (0, 0, 0)
    assert outcome.pair.client.sender.controller.window.ssthresh == int(22 * 717 / 1024)
    flags = [segment.flags for _, segment, _ in outcome.up.seen if segment.payload]
    assert sum(bool(flag & CWR) for flag in flags) <= 1
    assert any(segment.flags & ECE for _, segment, _ in outcome.down.seen[1:])


def test_ecn_is_not_claimed_for_acks_and_repeats() -> None:
    outcome = run(train(10), ecn=True, up=[4])
    marks = [ecn for _, segment, ecn in outcome.up.seen if segment.payload]
    assert marks[:10] == [Ecn.ECT_0] * 10
    assert marks[10] is Ecn.NOT_ECT
    assert {ecn for *_, ecn in outcome.down.seen} == {Ecn.NOT_ECT}
    first = outcome.up.seen[0][1]
    assert first.flags == SYN | ECE | CWR
    assert outcome.down.seen[0][1].flags == SYN | ACK | ECE


def test_without_ecn_nothing_is_marked() -> None:
    outcome = run(train(10), marked=range(20))
    assert {ecn for *_, ecn in outcome.up.seen} == {Ecn.NOT_ECT}


def test_an_application_limited_window_does_not_grow() -> None:
    outcome = run(tokens(400, 0.02))
    assert cwnd(outcome) == 10


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    loss=st.sampled_from([0.0, 0.05, 0.3]),
    jitter_s=st.sampled_from([0.0, 0.01, 0.08]),
    duplicates=st.sampled_from([0.0, 0.3]),
    sizes=st.lists(st.integers(1, 6000), min_size=1, max_size=12),
    congestion=st.sampled_from(["cubic", "reno"]),
    ecn=st.booleans(),
)
def test_both_streams_arrive_whole_in_order_and_once(
    *,
    seed: int,
    loss: float,
    jitter_s: float,
    duplicates: float,
    sizes: list[int],
    congestion: str,
    ecn: bool,
) -> None:
    def link(name: str) -> Link:
        return Link(
            delay_s=RTT_S / 2,
            seed=seed,
            name=name,
            loss=IndependentLoss(loss, stage_rng(seed, name, "loss")),
            jitter_s=jitter_s,
            reorders=jitter_s > 0,
            duplicates=duplicates,
        )

    streams: dict[str, bytearray] = {"up": bytearray(), "down": bytearray()}

    def reads(name: str) -> Callable[[bytes, float], None]:
        return lambda data, now: streams[name].extend(data)

    pair = TcpPair(
        up=link("up"),
        down=link("down"),
        congestion=congestion,
        ecn=ecn,
        on_client_data=reads("down"),
        on_server_data=reads("up"),
    )
    sent = b"".join(bytes((65 + n,)) * size for n, size in enumerate(sizes))
    pair.client.write(sent, START_S)
    pair.server.write(sent[::-1], START_S)
    pair.connect(START_S)

    def is_done() -> bool:
        boards = [end.sender.board for end in (pair.client, pair.server)]
        for board in boards:
            segments = board.segments
            assert board.sacked == sum(segment.is_sacked for segment in segments)
            assert board.lost == sum(segment.is_lost for segment in segments)
            assert board.repeated == sum(segment.is_repeated for segment in segments)
            assert board.in_flight >= 0
            assert not any(segment.is_sacked and segment.is_lost for segment in segments)
        return not pair.client.unacknowledged and not pair.server.unacknowledged

    simulate(pair.actors, until=is_done, start_s=START_S, limit_s=20_000.0)
    assert bytes(streams["up"]) == sent
    assert bytes(streams["down"]) == sent[::-1]
