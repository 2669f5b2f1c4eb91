"""Marks between two real QUIC ends: counted, reported, validated, and given up."""

import logging
import random

import pytest
from aioquic.buffer import Buffer  # type: ignore[attr-defined]
from aioquic.quic.connection import QuicNetworkPath, QuicReceiveContext
from aioquic.tls import Epoch
from hypothesis import given, settings
from hypothesis import strategies as st

from eloquent.core.events import TextDelta
from eloquent.core.log import TokenLog
from eloquent.core.schemes import EloquentSender
from eloquent.core.turns import TurnRequested
from eloquent.quic._aioquic import LateBoundConnection
from eloquent.quic._ecn import _counts_ahead
from eloquent.quic.connection import ConnectionEvent
from eloquent.quic.ecn import Ecn, EcnCounts, EcnState, codepoint_of
from eloquent.quic.marking import EachAlone, PlainMarking, SentPacket, all_c, all_l
from eloquent.quic.prague import Prague
from eloquent_netem import packet as netem
from eloquent_netem.lab.pair import QuicPair
from eloquent_netem.link import Link
from eloquent_netem.loss import DropList, IndependentLoss, NoLoss, Outages
from eloquent_netem.sim import simulate
from tests.eloquent.ecn_pair import Alarm, EcnPair, always, every, nothing


def bleached(now: float, ecn: netem.Ecn) -> netem.Ecn:
    return netem.Ecn.NOT_ECT


def remarked(now: float, ecn: netem.Ecn) -> netem.Ecn:
    return netem.Ecn.ECT_0 if ecn is netem.Ecn.ECT_1 else ecn


def after_2_s(now: float, ecn: netem.Ecn) -> netem.Ecn:
    return ecn if now < 2.0 else netem.Ecn.NOT_ECT


def test_marks_get_through_and_prove_the_path() -> None:
    pair = EcnPair(every(0.05), all_l())
    pair.run(3.0)
    assert pair.quic.ecn_state is EcnState.CAPABLE
    assert isinstance(pair.quic._loss._cc, Prague)
    assert set(pair.server.sent[-20:]) == {Ecn.ECT_1}


def test_nothing_is_marked_before_the_handshake_is_confirmed() -> None:
    pair = EcnPair(nothing(), all_l())
    pair.run(0.03)
    assert pair.server.sent
    assert set(pair.server.sent) == {Ecn.NOT_ECT}


def test_without_a_policy_nothing_is_marked_and_the_controller_is_the_configured_one() -> None:
    pair = EcnPair(every(0.05), None)
    pair.run(2.0)
    assert pair.quic.ecn_state is None
    assert set(pair.server.sent) == {Ecn.NOT_ECT}
    assert not isinstance(pair.quic._loss._cc, Prague)


def test_the_classic_policy_sends_not_ect_under_prague() -> None:
    pair = EcnPair(every(0.05), all_c())
    pair.run(2.0)
    assert set(pair.server.sent) == {Ecn.NOT_ECT}
    assert isinstance(pair.quic._loss._cc, Prague)
    assert pair.quic.ecn_state is EcnState.TESTING


@pytest.mark.parametrize("rewrite", [bleached, remarked])
def test_a_path_that_changes_marks_gets_none_after_the_first_ones(rewrite: object) -> None:
    pair = EcnPair(every(0.05), all_l(), rewrite=rewrite)  # type: ignore[arg-type]
    pair.run(3.0)
    assert pair.quic.ecn_state is EcnState.FAILED
    assert set(pair.server.sent[-20:]) == {Ecn.NOT_ECT}
    assert pair.server.sent.count(Ecn.ECT_1) <= 10
    assert not isinstance(pair.quic._loss._cc, Prague)


def test_a_path_that_begins_to_bleach_gets_none_from_then_on_and_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="eloquent.quic._ecn"):
        pair = EcnPair(every(0.05), all_l(), rewrite=after_2_s)
        pair.run(1.9)
        assert pair.quic.ecn_state is EcnState.CAPABLE
        pair.run(4.0)
    assert pair.quic.ecn_state is EcnState.FAILED
    assert [record.getMessage() for record in caplog.records] == [
        "ECN is off for this path: marks are cleared or changed on the way. "
        "Packets go unmarked from here on."
    ]


def test_a_peer_that_reports_no_marks_gets_none() -> None:
    pair = EcnPair(every(0.05), all_l(), client_class=LateBoundConnection)
    pair.run(3.0)
    assert pair.quic.ecn_state is EcnState.FAILED
    assert set(pair.server.sent[-20:]) == {Ecn.NOT_ECT}


def test_a_path_that_drops_marked_packets_loses_ten_of_them() -> None:
    class DropsMarked(Link):
        def send(self, now: float, packet: netem.Packet) -> None:
            if packet.ecn is netem.Ecn.NOT_ECT:
                super().send(now, packet)

    pair = EcnPair(every(0.05), all_l(), down=DropsMarked(delay_s=0.02, seed=0, name="down"))
    pair.run(6.0)
    assert pair.quic.ecn_state is EcnState.FAILED
    assert pair.server.sent.count(Ecn.ECT_1) == 10
    assert pair.source.acked > 50


def test_an_outage_at_the_start_does_not_fail_the_path() -> None:
    down = Link(delay_s=0.02, seed=0, name="down", loss=Outages([(0.9, 3.0)], NoLoss()))
    pair = EcnPair(every(0.05), all_l(), down=down)
    pair.run(2.9)
    assert pair.quic.ecn_state is not EcnState.FAILED


def test_each_space_counts_its_own_packets_and_reports_them() -> None:
    reported = netem.Ecn.ECT_1

    def all_marked(now: float, ecn: netem.Ecn) -> netem.Ecn:
        return reported

    pair = EcnPair(every(0.05, count=7), None, rewrite=all_marked)
    pair.run(2.0)
    client = pair.client.quic
    counted = {
        epoch.name: client._arrived[space]  # type: ignore[attr-defined]
        for epoch, space in client._spaces.items()
        if space in client._arrived  # type: ignore[attr-defined]
    }
    assert set(counted) == {"INITIAL", "HANDSHAKE", "ONE_RTT"}
    assert counted["INITIAL"].ce == counted["INITIAL"].ect0 == 0
    assert counted["ONE_RTT"].ect1 >= 7


def test_a_duplicate_is_not_counted() -> None:
    down = Link(delay_s=0.02, seed=0, name="down", duplicates=1.0)
    pair = EcnPair(every(0.05), all_l(), down=down)
    pair.run(3.0)
    assert pair.quic.ecn_state is EcnState.CAPABLE


def test_reordering_does_not_fail_the_path() -> None:
    down = Link(delay_s=0.02, seed=0, name="down", jitter_s=0.08, reorders=True)
    up = Link(delay_s=0.02, seed=0, name="up", jitter_s=0.08, reorders=True)
    pair = EcnPair(every(0.01), all_l(), down=down, up=up)
    pair.run(6.0)
    assert pair.quic.ecn_state is EcnState.CAPABLE


def test_ce_is_acknowledged_at_once() -> None:
    arrivals: list[float] = []

    def congested(now: float, ecn: netem.Ecn) -> netem.Ecn:
        if ecn is netem.Ecn.NOT_ECT:
            return ecn
        arrivals.append(now)
        return netem.Ecn.CE

    pair = EcnPair(every(0.05, start_s=1.0, count=1), all_l(), rewrite=congested)
    pair.client.quic._ack_delay = 0.2
    pair.run(0.9)
    sent = pair.up.packets_sent
    pair.run(1.1)
    assert arrivals
    assert pair.up.packets_sent == sent + 1
    control = pair.quic._loss._cc
    assert isinstance(control, Prague)
    assert control.congestion_window < 12_000  # the mark of the lone packet was answered


def test_a_new_path_is_validated_anew() -> None:
    pair = EcnPair(every(0.05), all_l(), rewrite=bleached)
    pair.run(2.0)
    assert pair.quic.ecn_state is EcnState.FAILED
    pair.client.rewrite = lambda now, ecn: ecn
    pair.server.peer = ("192.0.2.1", 99)  # the client's address changes: NAT rebinding
    pair.run(6.0)
    assert pair.quic.get_peer_address() == ("192.0.2.1", 99)
    # A client that goes on sending moves the server to its new path.
    assert pair.quic.ecn_state is EcnState.CAPABLE
    assert isinstance(pair.quic._loss._cc, Prague)


@pytest.mark.parametrize("at_s", [2.001, 2.03], ids=["packets under way", "none under way"])
def test_a_path_that_is_left_while_it_carries_marks_is_no_burden_for_the_next(at_s: float) -> None:
    pair = EcnPair(every(0.05), all_l())
    pair.run(at_s)
    assert pair.quic.ecn_state is EcnState.CAPABLE
    pair.server.peer = ("192.0.2.1", 99)
    pair.client.quic.send_ping(0)
    pair.run(6.0)
    assert pair.quic.get_peer_address() == ("192.0.2.1", 99)
    assert pair.quic.ecn_state is EcnState.CAPABLE


def test_a_path_that_is_only_probed_gets_no_marks() -> None:
    pair = EcnPair(every(0.05), all_l())
    pair.run(2.0)
    other = QuicNetworkPath(("192.0.2.1", 98))
    other.bytes_received = 10_000
    pair.quic._network_paths.append(other)
    sent = {address: ecn for _, address, ecn in pair.quic.marked_datagrams_to_send(pair.now)}
    assert sent == {("192.0.2.1", 98): Ecn.NOT_ECT}
    pair.run(3.0)
    assert pair.quic.ecn_state is EcnState.CAPABLE


def test_marks_that_appear_in_the_handshake_are_not_judged() -> None:
    def early(now: float, ecn: netem.Ecn) -> netem.Ecn:
        return netem.Ecn.ECT_1 if now < 0.07 else ecn

    pair = EcnPair(every(0.05), all_l(), rewrite=early)
    pair.run(3.0)
    assert pair.quic.ecn_state is EcnState.CAPABLE


class InTurn(PlainMarking):
    """Marks every other packet, and keeps what became of them."""

    def __init__(self) -> None:
        self.count = 0
        self.acked: list[SentPacket] = []
        self.lost: list[SentPacket] = []

    def next_codepoint(self, now: float, size: int, *, is_copy: bool) -> Ecn:
        self.count += 1
        return Ecn(self.count % 2)

    def on_acked(self, now: float, packet: SentPacket) -> None:
        self.acked.append(packet)

    def on_lost(self, now: float, packet: SentPacket) -> None:
        self.lost.append(packet)


def test_each_packet_of_a_burst_carries_its_own_codepoint_and_the_policy_learns_its_fate() -> None:
    policy = InTurn()
    down = Link(delay_s=0.02, seed=0, name="down", loss=DropList([18]))
    pair = EcnPair(always(), policy, down=down)
    pair.run(0.7)
    assert pair.quic.ecn_state is EcnState.CAPABLE
    packets = list(pair.quic._spaces[Epoch.ONE_RTT].sent_packets.values())
    codepoints = [codepoint_of(packet) for packet in packets]
    assert len(codepoints) > 4
    assert pair.server.sent[-len(codepoints) :] == codepoints
    assert {packet.codepoint for packet in policy.acked} == {Ecn.NOT_ECT, Ecn.ECT_1}
    assert len(policy.lost) == 1
    assert policy.lost[0].sent_s < policy.acked[-1].sent_s


def test_0_rtt_packets_count_with_those_of_the_application() -> None:
    pair = EcnPair(every(0.05), None)
    pair.run(0.5)
    quic = pair.quic
    quic._arriving = Ecn.CE
    context = QuicReceiveContext(
        epoch=Epoch.ZERO_RTT,
        host_cid=quic.host_cid,
        network_path=quic._network_paths[0],
        quic_logger_frames=None,
        time=pair.now,
        version=1,
    )
    quic._payload_received(context, b"\x01")  # a PING
    assert quic._arrived == {quic._spaces[Epoch.ONE_RTT]: EcnCounts(ce=1)}


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    loss=st.floats(0.0, 0.3),
    congestion=st.floats(0.0, 1.0),
    jitter_s=st.floats(0.0, 0.05),
)
def test_an_honest_path_keeps_its_marks(
    seed: int, loss: float, congestion: float, jitter_s: float
) -> None:
    rng = random.Random(seed)

    def congested(now: float, ecn: netem.Ecn) -> netem.Ecn:
        is_hit = ecn is netem.Ecn.ECT_1 and rng.random() < congestion
        return netem.Ecn.CE if is_hit else ecn

    up, down = (
        Link(
            delay_s=0.02,
            seed=seed,
            name=name,
            loss=IndependentLoss(loss, random.Random(f"{seed}/{name}")),
            jitter_s=jitter_s,
            reorders=True,
            duplicates=0.1,
        )
        for name in ("up", "down")
    )
    pair = EcnPair(every(0.02), all_l(), up=up, down=down, rewrite=congested)
    pair.run(4.0)
    assert pair.quic.ecn_state is not EcnState.FAILED
    assert pair.server.terminated is None


@given(st.binary(max_size=40))
def test_what_is_read_ahead_of_an_ack_moves_nothing(data: bytes) -> None:
    buffer = Buffer(data=b"\x03" + data)
    buffer.pull_uint8()
    counts = _counts_ahead(buffer)
    assert buffer.tell() == 1
    assert counts is None or counts.total >= 0


def test_the_labs_pair_carries_marks_both_ways() -> None:
    links = [Link(delay_s=0.02, seed=0, name=name) for name in ("up", "down")]
    requests: list[TurnRequested] = []

    def on_server_event(event: ConnectionEvent, now: float) -> None:
        if isinstance(event, TurnRequested):
            requests.append(event)

    pair = QuicPair(
        up=links[0],
        down=links[1],
        make_sender=EloquentSender,
        on_client_event=lambda event, now: None,
        on_server_event=on_server_event,
        marking=EachAlone(all_l),
    )
    pair.connect(0.0)
    turn = pair.request(b"{}", 0.0)
    simulate(pair.actors, until=lambda: requests != [], start_s=0.0, limit_s=5.0)
    log = TokenLog()
    pair.accept(turn, log)
    now = 1.0
    for index in range(30):
        log.append(TextDelta(f"{index} "))
        pair.server.log_grew(turn, now)
        pair.flush(now)
        alarm = Alarm(now + 0.05)
        now = simulate(
            (*pair.actors, alarm),
            until=lambda alarm=alarm: alarm.rang,  # type: ignore[misc]
            start_s=now,
            limit_s=now + 1,
        )
    assert pair.server.quic.ecn_state is EcnState.CAPABLE


def test_counts_have_the_order_of_the_frame() -> None:
    counts = EcnCounts()
    for codepoint in (Ecn.ECT_0, Ecn.ECT_1, Ecn.ECT_1, Ecn.CE, Ecn.CE, Ecn.CE, Ecn.NOT_ECT):
        counts.add(codepoint)
    assert (counts.ect0, counts.ect1, counts.ce) == (1, 2, 3)
