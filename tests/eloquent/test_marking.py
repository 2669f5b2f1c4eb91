"""What a marking policy is told of each packet: when it left, came, was lost; in virtual time."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eloquent.core.receiver import TIMED_REPORT_S
from eloquent.core.wire import ARRIVAL_UNIT_S, Arrival, Bundle, Frame, Report, encode_report
from eloquent.quic._aioquic import Datagram
from eloquent.quic._ecn import AWAITED_ARRIVALS
from eloquent.quic.connection import CLOSE_PROTOCOL_ERROR
from eloquent.quic.ecn import Ecn, EcnState
from eloquent.quic.marking import all_l
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import IndependentLoss, NoLoss, Outages
from eloquent_netem.packet import Ecn as NetemEcn
from tests.eloquent.marking_world import (
    START_S,
    MarkingWorld,
    Noting,
    Queues,
    all_in_l,
    by_turns,
)

RTT_S = 0.04
ROUNDING_S = ARRIVAL_UNIT_S / 2 + 1e-9


def talked(policy: Noting, **options: object) -> MarkingWorld:
    """A whole answer of 100 tokens in 3 s."""
    world = MarkingWorld(policy, **options)  # type: ignore[arg-type]
    world.talk(100)
    world.close()
    assert world.texts[0] == "".join(f"{index} " for index in range(100))
    assert world.broken == []
    return world


def check_arrivals(world: MarkingWorld, *, offset_s: float = -START_S) -> None:
    """Each arrival is told once, for the packet whose it is, with its time."""
    assert isinstance(world.policy, Noting)
    told = world.policy.arrivals
    assert all(count == 1 for count in Counter(packet for _, packet, _ in told).values())
    for now, packet, arrived_s in told:
        truly_s = world.arrived_s(packet)
        assert truly_s is not None
        assert arrived_s == pytest.approx(truly_s + offset_s, abs=ROUNDING_S)
        assert now > truly_s


def timed_packets(world: MarkingWorld) -> int:
    return sum(left.bundle.is_timed for left in world.left)


def test_arrivals_are_told_of_the_right_packets_with_their_times_a_round_trip_later() -> None:
    policy = Noting()
    world = talked(policy)
    check_arrivals(world)
    assert len(policy.arrivals) == timed_packets(world) == len(world.left) > 100
    for now, packet, _ in policy.arrivals:
        assert now - packet.sent_s <= RTT_S + TIMED_REPORT_S + 1e-6
    assert [packet.number for _, packet, _ in policy.arrivals] == sorted(
        packet.number for _, packet, _ in policy.arrivals
    )


def test_the_acknowledgement_travels_with_the_report() -> None:
    policy = Noting()
    talked(policy)
    acked_s = {packet: now for now, packet in policy.acked}
    assert all(acked_s[packet] == now for now, packet, _ in policy.arrivals)


@pytest.mark.parametrize(
    ("tokens_per_s", "wants_times", "bytes_up"),
    [(30, False, 36), (30, True, 80), (100, False, 13), (100, True, 80)],
)
def test_what_times_cost(tokens_per_s: int, wants_times: bool, bytes_up: int) -> None:
    up = Link(delay_s=0.05, seed=0, name="up")
    world = MarkingWorld(Noting(wants_times=wants_times), down=Queues(l_s=0.05), up=up)
    gap_s = 1 / tokens_per_s
    world.talk(100, gap_s)
    before = up.bytes_sent
    world.talk(300, gap_s)
    cost = (up.bytes_sent - before) / 300
    assert cost == pytest.approx(bytes_up, abs=1.5)


def test_reports_of_times_bring_no_packets_of_their_own_down() -> None:
    policy = Noting()
    world = MarkingWorld(policy)
    world.talk(30)
    packets, bundles = len(policy.sent), len(world.left)
    world.talk(50, gap_s=0.037)  # what a report brings up is acknowledged half a gap later
    assert len(world.left) - bundles == 50
    assert len(policy.sent) - packets == 50


@pytest.mark.parametrize("ahead_s", [0.0, 1e6, -1e6])
def test_the_readers_clock_may_be_off_by_anything(ahead_s: float) -> None:
    policy = Noting()
    world = MarkingWorld(policy, turns=0)
    world.pair.client._begun_at = world.now - ahead_s
    offset_s = ahead_s - world.now
    world.pair.request(b"{}", world.now)
    world.until(lambda: world.logs != {})
    world.talk(20)
    check_arrivals(world, offset_s=offset_s)
    assert len(policy.arrivals) >= 19


def test_all_turns_of_a_connection_are_timed_by_one_clock() -> None:
    policy = Noting()
    world = MarkingWorld(policy, turns=5)
    world.talk(20)
    world.close()
    check_arrivals(world)
    assert len(policy.arrivals) == timed_packets(world) > 100


def test_packets_that_overtake_each_other_in_two_queues_keep_their_own_times() -> None:
    policy = Noting(by_turns)
    world = talked(policy, down=Queues(l_s=0.02, c_s=0.07))
    check_arrivals(world)
    delays_s = {
        codepoint: {
            round(arrived_s + START_S - packet.sent_s, 3)
            for _, packet, arrived_s in policy.arrivals
            if packet.codepoint is codepoint
        }
        for codepoint in (Ecn.ECT_1, Ecn.NOT_ECT)
    }
    assert delays_s == {Ecn.ECT_1: {0.02}, Ecn.NOT_ECT: {0.07}}
    assert policy.lost == []
    numbers = [packet.number for _, packet, _ in policy.arrivals]
    assert numbers != sorted(numbers)


def test_of_packets_close_together_the_reports_keep_their_distance() -> None:
    policy = Noting()
    world = MarkingWorld(policy)
    world.talk(1)
    world.wait(1.0)
    before = world.up.packets_sent
    world.talk(500, gap_s=0.001)
    world.close()
    check_arrivals(world)
    assert len(policy.arrivals) == timed_packets(world) > 500
    assert world.up.packets_sent - before < 0.5 / TIMED_REPORT_S + 20


def test_what_lost_reports_said_is_told_again() -> None:
    up = Link(delay_s=0.02, seed=0, name="up", loss=Outages([(6.0, 6.2)], NoLoss()))
    policy = Noting()
    world = talked(policy, up=up)
    assert up.packets_lost > 3
    check_arrivals(world)
    assert len(policy.arrivals) == timed_packets(world)
    late = [now - packet.sent_s for now, packet, _ in policy.arrivals]
    assert max(late) > 0.1


def test_reports_that_are_only_late_tell_nothing_twice() -> None:
    """The reader takes them for lost, and repeats them."""
    up = Link(delay_s=0.02, seed=4, name="up", jitter_s=0.15, reorders=True)
    policy = Noting()
    world = MarkingWorld(policy, up=up)
    reported = Counter[int]()
    take = world.pair.server._on_frame

    def count(frame: Frame, now: float) -> None:
        assert isinstance(frame, Report)
        reported.update(arrival.number for arrival in frame.arrivals)
        take(frame, now)

    world.pair.server._on_frame = count  # type: ignore[method-assign]
    world.talk(100)
    world.close()
    assert max(reported.values()) > 1
    check_arrivals(world)
    assert len(policy.arrivals) == timed_packets(world)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    loss=st.floats(0.0, 0.2),
    jitter_s=st.floats(0.0, 0.1),
    c_s=st.floats(0.001, 0.3),
    codepoints=st.lists(st.sampled_from([Ecn.ECT_1, Ecn.NOT_ECT]), min_size=1, max_size=8),
    copies=st.lists(st.booleans(), min_size=1, max_size=8),
)
def test_whatever_the_path_does_each_arrival_is_told_once_and_truly(
    *,
    seed: int,
    loss: float,
    jitter_s: float,
    c_s: float,
    codepoints: list[Ecn],
    copies: list[bool],
) -> None:
    policy = Noting(
        lambda count, is_copy: codepoints[count % len(codepoints)],
        wants_copy=lambda count: copies[count % len(copies)],
    )
    lossy = {name: IndependentLoss(loss, stage_rng(seed, name, "")) for name in ("up", "down")}
    down = Queues(c_s=c_s, loss=lossy["down"], jitter_s=jitter_s)
    up = Link(
        delay_s=0.02, seed=seed, name="up", loss=lossy["up"], jitter_s=jitter_s, reorders=True
    )
    world = MarkingWorld(policy, down=down, up=up)
    world.talk(60)
    world.close()
    assert world.texts[0] == "".join(f"{index} " for index in range(60))
    check_arrivals(world)
    told = [packet for _, packet in policy.acked]
    assert len(told) == len(set(told))
    assert all(world.arrived_s(packet) is not None for packet in told)
    lost = [packet for _, packet in policy.lost]
    assert len(lost) == len(set(lost))


def test_a_lost_packet_is_told_lost_and_has_no_arrival() -> None:
    policy = Noting()
    down = Queues(loss=IndependentLoss(0.1, stage_rng(1, "down", "loss")))
    world = talked(policy, down=down)
    lost = [packet for _, packet in policy.lost]
    assert len(lost) > 5
    assert all(world.arrived_s(packet) is None for packet in lost)
    assert not {packet for _, packet, _ in policy.arrivals} & set(lost)
    assert all(RTT_S < now - packet.sent_s < 0.5 for now, packet in policy.lost)
    check_arrivals(world)


def test_a_packet_given_up_that_comes_after_all_is_told_so() -> None:
    """The 60th takes the other queue, which is half a second long."""
    policy = Noting(lambda count, is_copy: Ecn.NOT_ECT if count == 60 else Ecn.ECT_1)
    world = talked(policy, down=Queues(c_s=0.5))
    (late,) = (packet for packet in policy.sent if packet.codepoint is Ecn.NOT_ECT)
    ((lost_s, lost),) = policy.lost
    assert lost == late
    ((acked_s, _),) = ((now, packet) for now, packet in policy.acked if packet == late)
    ((told_s, _, _),) = (told for told in policy.arrivals if told[1] == late)
    assert lost_s < late.sent_s + 0.5 < acked_s <= told_s
    check_arrivals(world)


def test_every_packet_is_told_with_the_mark_that_it_left_with() -> None:
    policy = Noting(by_turns)
    world = talked(policy)
    assert isinstance(world.down, Queues)
    marks = [Ecn(packet.ecn) for _, packet in world.down.entered[-len(policy.sent) :]]
    assert [packet.codepoint for packet in policy.sent] == marks
    assert set(marks) == {Ecn.ECT_1, Ecn.NOT_ECT}
    told = [packet for _, packet in (*policy.acked, *policy.lost)]
    assert len(told) == len(set(told))
    assert set(told) <= set(policy.sent)
    assert len(told) >= len(policy.sent) - 5  # the last acknowledgements are nobody's to answer


def test_where_marks_are_cleared_packets_go_unmarked_and_untimed() -> None:
    policy = Noting(all_in_l)
    world = talked(policy, down=Queues(rewrite=lambda ecn: NetemEcn.NOT_ECT))
    assert world.pair.server.quic.ecn_state is EcnState.FAILED
    assert {packet.codepoint for packet in policy.sent[20:]} == {Ecn.NOT_ECT}
    assert not any(left.bundle.is_timed for left in world.left[20:])
    assert len(policy.sent) > 100


def test_an_old_client_that_tells_no_times_gets_its_answer_and_the_policy_no_arrivals() -> None:
    policy = Noting()
    world = MarkingWorld(policy)
    take = world.pair.client._on_frame

    def untimed(frame: Frame, now: float) -> None:
        assert isinstance(frame, Bundle)
        take(replace(frame, is_timed=False), now)

    world.pair.client._on_frame = untimed  # type: ignore[method-assign]
    world.talk(50)
    world.close()
    assert policy.arrivals == []
    assert len(policy.acked) > 50


def test_on_a_stream_nothing_is_timed_and_the_policy_still_marks() -> None:
    policy = Noting()
    world = talked(policy, has_datagrams=False)
    assert policy.arrivals == []
    assert not any(packet.is_timed for packet in policy.sent)
    assert world.pair.server.quic.ecn_state is EcnState.CAPABLE
    assert len(policy.acked) > 50


def test_an_unknown_turn_or_an_untimed_bundle_tells_nothing() -> None:
    policy = Noting()
    world = MarkingWorld(policy)
    world.talk(20)
    told = len(policy.arrivals)
    quic = world.pair.server.quic
    quic.on_arrival((0, 999), 1.0, world.now)
    quic.on_arrival((7, 0), 1.0, world.now)
    assert len(policy.arrivals) == told


def test_what_is_never_reported_is_forgotten() -> None:
    policy = Noting()
    world = MarkingWorld(policy)
    world.pair.client._on_frame = lambda frame, now: None  # type: ignore[method-assign]
    world.talk(AWAITED_ARRIVALS + 100, gap_s=0.01)
    assert len(world.pair.server.quic._timed) == AWAITED_ARRIVALS


def rude(world: MarkingWorld, *reports: Report) -> None:
    """Let the client send reports of its own making."""
    client, waiting = world.pair.client, list(reports)

    def next_datagram(now: float, room: int) -> Datagram | None:
        return Datagram(encode_report(waiting[0]), (0, waiting.pop(0))) if waiting else None

    client.has_datagram = lambda now: bool(waiting)  # type: ignore[method-assign]
    client.next_datagram = next_datagram  # type: ignore[method-assign]
    for _ in reports:
        world.pair.flush(world.now)
        world.wait(0.05)


def silenced(policy: Noting) -> MarkingWorld:
    """A world whose client has ten timed bundles and has said nothing of them."""
    world = MarkingWorld(policy)
    client = world.pair.client
    client.has_datagram = lambda now: False  # type: ignore[method-assign]
    client.next_datagram = lambda now, room: None  # type: ignore[method-assign]
    world.talk(10)
    assert policy.arrivals == []
    return world


def test_a_reader_that_reports_an_arrival_twice_is_heard_once() -> None:
    policy = Noting()
    world = silenced(policy)
    report = Report(0, 0, 5, 0, (Arrival(3, 100), Arrival(5, 200)))
    rude(world, report, report, replace(report, arrivals=(Arrival(3, 999),)))
    assert [arrived_s for _, _, arrived_s in policy.arrivals] == pytest.approx([0.01, 0.02])
    assert world.broken == []


@pytest.mark.parametrize(
    "times",
    [(500, 400, 300), (-(1 << 61), 0, (1 << 61) - 1), ((1 << 61) - 1, 0, 0)],
    ids=["back", "a jump", "far ahead"],
)
def test_times_that_make_no_sense_are_told_as_they_are(times: tuple[int, ...]) -> None:
    policy = Noting()
    world = silenced(policy)
    arrivals = tuple(Arrival(number, time) for number, time in zip((3, 5, 6), times, strict=True))
    if max(times) - min(times) < 1 << 60:
        rude(world, Report(0, 0, 6, 0, arrivals))
    else:  # as far as a report can jump: in one of their own each
        rude(world, *(Report(0, 0, 6, 0, (arrival,)) for arrival in arrivals))
    told = [arrived_s for _, _, arrived_s in policy.arrivals]
    assert told == pytest.approx([time * ARRIVAL_UNIT_S for time in times])
    world.say(0, "and on it goes")
    world.wait(0.5)
    assert world.texts[0].endswith("and on it goes")


def test_an_arrival_of_a_bundle_that_was_never_sent_ends_the_connection() -> None:
    policy = Noting()
    world = silenced(policy)
    rude(world, Report(0, 0, 500, 0, (Arrival(500, 1),)))
    world.until(lambda: world.broken != [])
    assert policy.arrivals == []
    assert "never sent" in world.broken[0].reason
    close = world.pair.server.quic._close_event
    assert close is not None
    assert close.error_code == CLOSE_PROTOCOL_ERROR


def test_the_endpoints_marking_settles_after_packets_came_and_what_they_let_leave_left() -> None:
    policy = Noting()
    world = talked(policy)
    assert world.marking is not None
    settled_s = world.marking.settled_s
    assert {now for now, _, _ in policy.arrivals} <= set(settled_s)
    assert len(settled_s) <= world.up.packets_sent


def test_a_policy_that_wants_nothing_changes_nothing_on_the_wire() -> None:
    worlds = [MarkingWorld(all_l()), MarkingWorld(None)]
    for world in worlds:
        world.talk(50)
        world.wait(2.0)
        world.talk(1)
        world.close()
        assert timed_packets(world) == 0
    marked, unmarked = ([(one.at_s, one.bundle) for one in world.left] for world in worlds)
    assert marked == unmarked
