"""One named test for each way to lose a packet, then all of them at random, in virtual time."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from eloquent.core.beat import MORE_SLACK_S, SLACK_S
from eloquent.core.events import TextDelta
from eloquent.core.log import TokenLog
from eloquent.core.path import Path
from eloquent.core.schemes import SCHEMES, TAIL_RTTS, TAIL_SLACK_S
from eloquent.core.schemes import scheme as find_scheme
from eloquent.core.wire import Bundle
from tests.eloquent.core_pair import TURN, CorePair, Fate, clean, drop, outage

RTT_S = 0.1
GAP_S = 0.05
TAIL_S = TAIL_RTTS * RTT_S + 0.025 + TAIL_SLACK_S  # with the ACK delay that paths begin with

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def steady(count: int, gap_s: float = GAP_S) -> list[tuple[float, str]]:
    """Tokens at a steady rate from 1 s on."""
    return [(1 + index * gap_s, f"token {index} ") for index in range(count)]


def bulk(size: int) -> list[tuple[float, str]]:
    """Tokens of some `size` bytes of log in all, at one instant."""
    return [(1.0, f"{index:08d} ") for index in range(size // 11)]


def run(pair: CorePair) -> CorePair:
    pair.run()
    pair.check_delivery()
    return pair


def delays_s(pair: CorePair, tokens: Sequence[tuple[float, str]]) -> list[float]:
    """How much later than on a clean path each token was rendered."""
    return [
        rendered - generated - RTT_S / 2
        for rendered, (generated, _) in zip(pair.rendered_s, tokens, strict=False)
    ]


# No loss.


@pytest.mark.parametrize(("scheme", "packets"), [("eloquent", 20), ("retransmit", 20)])
def test_on_a_clean_path_there_are_as_many_packets_as_tokens(scheme: str, packets: int) -> None:
    tokens = steady(20)
    pair = run(CorePair(scheme, tokens))
    assert len(pair.bundles) == packets
    assert pair.sent_s == pytest.approx([time for time, _ in tokens])
    assert delays_s(pair, tokens) == pytest.approx([0.0] * 20)
    assert pair.receiver.stats.loss_recovered == 0


def test_duplicate_sends_each_packet_twice() -> None:
    pair = run(CorePair("duplicate", steady(20)))
    assert len(pair.bundles) == 40
    assert pair.starts[0::2] == pair.starts[1::2]


@every_scheme
def test_new_tokens_leave_at_once(scheme: str) -> None:
    tokens = steady(10)
    pair = run(CorePair(scheme, tokens))
    assert {time for time, _ in tokens} <= set(pair.sent_s)


def test_each_bundle_reaches_from_the_acknowledged_offset_to_the_end() -> None:
    pair = CorePair("eloquent", steady(10, gap_s=0.04))
    pair.run(until_s=1.35)
    # 0.1 s ago is between the third and the second token before: three are not acknowledged.
    size = len(b"\x01\x08token 0 ")
    assert [(bundle.offset, len(bundle.data)) for _, bundle in pair.bundles] == [
        (0, size),
        (0, 2 * size),
        *((first * size, 3 * size) for first in range(7)),
    ]


@pytest.mark.parametrize("lossy", [False, True])
def test_a_bulk_log_costs_little_more_than_itself(lossy: bool) -> None:
    pair = run(CorePair("eloquent", bulk(200_000), lossy=lossy))
    assert pair.bytes_sent <= 1.2 * pair.log.length
    assert pair.receiver.stats.repeated_bytes <= 0.2 * pair.log.length


@pytest.mark.parametrize("scheme", ["eloquent", "duplicate", "retransmit"])
def test_the_cost_of_a_bulk_log_is_linear_under_loss_too(scheme: str) -> None:
    tenth: Fate = lambda index, now: () if index % 10 == 3 else (0.0,)  # noqa: E731
    costs = []
    for size in (50_000, 100_000):
        pair = run(CorePair(scheme, bulk(size), down=tenth))
        costs.append(pair.bytes_sent / pair.log.length)
    assert costs[1] <= 1.1 * costs[0]
    assert costs[1] <= (3.0 if scheme == "duplicate" else 1.5)


def test_while_no_packet_can_leave_the_next_bundle_gathers_what_comes() -> None:
    tokens = steady(10, gap_s=0.01)
    rooms = [1200, *[0] * 40]
    pair = CorePair(
        "eloquent", tokens, room=lambda packet: rooms[packet] if packet < len(rooms) else 1200
    )
    run(pair)
    first, second = (bundle for _, bundle in pair.bundles[:2])
    # Several tokens, made while the connection could not send, share the first packet after it.
    assert len(second.data) >= 3 * len(first.data)
    assert len(pair.bundles) < len(tokens)


# One loss, or some.


@every_scheme
def test_the_first_bundle_is_lost(scheme: str) -> None:
    tokens = steady(20)
    pair = run(CorePair(scheme, tokens, down=drop(0)))
    late = delays_s(pair, tokens)[0]
    if scheme.startswith("eloquent"):
        assert late == pytest.approx(GAP_S)  # the next token's bundle brings it
    elif scheme == "duplicate":
        assert late == pytest.approx(0.0)
    else:
        assert late >= RTT_S


@every_scheme
def test_a_bundle_in_the_middle_is_lost(scheme: str) -> None:
    tokens = steady(20)
    pair = run(CorePair(scheme, tokens, down=drop(10)))
    worst = max(delays_s(pair, tokens))
    if scheme.startswith("eloquent"):
        assert worst == pytest.approx(GAP_S)
        assert pair.receiver.stats.loss_recovered == 1
    elif scheme == "retransmit":
        assert worst >= RTT_S


def test_the_tail_bundle_is_lost() -> None:
    tokens = steady(5)
    pair = run(CorePair("eloquent", tokens, down=drop(4)))
    # No token follows: the tail's timer repeats it.
    assert max(delays_s(pair, tokens)) == pytest.approx(TAIL_S)
    assert len(pair.bundles) == 6


def test_the_tail_bundle_is_lost_on_a_path_known_to_be_lossy() -> None:
    tokens = steady(5)
    path_loss = drop(8)
    pair = run(CorePair("eloquent", tokens, down=path_loss, lossy=True))
    assert max(delays_s(pair, tokens)) == pytest.approx(0)


@pytest.mark.parametrize("scheme", ["duplicate", "retransmit"])
def test_the_tail_is_lost_and_quic_s_probe_finds_out(scheme: str) -> None:
    pair = run(CorePair(scheme, steady(5), down=drop(4, 8, 9)))
    assert pair.rendered_s[-1] > 1.2 + 3 * RTT_S


@every_scheme
def test_the_bundle_with_the_end_and_its_repeats_are_lost(scheme: str) -> None:
    pair = run(CorePair(scheme, steady(2), down=drop(*range(1, 6))))
    assert pair.now < 30


@every_scheme
def test_every_second_bundle_is_lost(scheme: str) -> None:
    tokens = steady(40)
    half: Fate = lambda index, now: () if index >= 0 and index % 2 == 0 else (0.0,)  # noqa: E731
    pair = run(CorePair(scheme, tokens, down=half))
    if scheme == "eloquent":
        assert max(delays_s(pair, tokens)) <= GAP_S + 1e-9
        assert pair.path.loss > 0.2


@every_scheme
def test_all_acknowledgements_are_lost_for_a_while(scheme: str) -> None:
    tokens = steady(40)
    pair = run(CorePair(scheme, tokens, up=outage(1.3, 2.3)))
    # Losing acknowledgements delays no token.
    assert delays_s(pair, tokens) == pytest.approx([0.0] * 40)


@every_scheme
def test_nothing_passes_for_a_while(scheme: str) -> None:
    tokens = steady(40)
    pair = run(CorePair(scheme, tokens, down=outage(1.3, 2.3), up=outage(1.3, 2.3)))
    if scheme == "eloquent":
        # The first token's bundle after the outage brings all.
        up_to_date = 2.3 + GAP_S + RTT_S / 2 + 1e-9
        missed = [time for time, _ in tokens].index(pytest.approx(2.25))
        assert pair.rendered_s[missed] <= up_to_date


@every_scheme
def test_the_last_reports_are_lost(scheme: str) -> None:
    pair = run(CorePair(scheme, steady(5), up=outage(1.2, 3.0)))
    assert pair.reports[-1][0] >= 3.0


@every_scheme
def test_a_bundle_is_falsely_declared_lost(scheme: str) -> None:
    tokens = steady(20)
    pair = run(CorePair(scheme, tokens, misjudged=[7]))
    assert delays_s(pair, tokens) == pytest.approx([0.0] * 20)


@every_scheme
def test_every_bundle_is_falsely_declared_lost(scheme: str) -> None:
    # Only the reader's own reports end this.
    tokens = steady(10)
    pair = run(CorePair(scheme, tokens, misjudged=range(10_000)))
    assert delays_s(pair, tokens) == pytest.approx([0.0] * 10)


@every_scheme
def test_a_bundle_is_falsely_acknowledged(scheme: str) -> None:
    # The transport says that bundle 5 (of `duplicate`: and its copy) came; the application never
    # got it. The reader's reports bring its tokens back.
    unseen = [4, 5] if scheme == "duplicate" else [5]
    pair = run(CorePair(scheme, steady(30), unseen=unseen))
    assert pair.receiver.stats.loss_recovered == len(unseen)


def test_a_whole_round_trip_of_bundles_is_falsely_acknowledged() -> None:
    # No single later bundle reaches back far enough: all that was acknowledged is left out.
    tokens = steady(40)
    pair = run(CorePair("eloquent", tokens, unseen=range(10, 14)))
    assert max(delays_s(pair, tokens)) < 0.2 + 3 * RTT_S


@every_scheme
def test_the_tail_is_falsely_acknowledged(scheme: str) -> None:
    unseen = range(8, 10) if scheme == "duplicate" else [4]
    run(CorePair(scheme, steady(5), unseen=unseen))


@every_scheme
def test_bundles_are_reordered(scheme: str) -> None:
    tokens = steady(40, gap_s=0.01)
    late: Fate = lambda index, now: (0.07 if index % 5 == 2 else 0.0,)  # noqa: E731
    pair = run(CorePair(scheme, tokens, down=late))
    if scheme == "eloquent":
        assert max(delays_s(pair, tokens)) <= 0.01 + 1e-9


@every_scheme
def test_acknowledgements_and_reports_are_reordered(scheme: str) -> None:
    tokens = steady(40, gap_s=0.01)
    late: Fate = lambda index, now: (0.3 if index % 3 == 0 else 0.0,)  # noqa: E731
    pair = run(CorePair(scheme, tokens, up=late))
    assert delays_s(pair, tokens) == pytest.approx([0.0] * 40)


@every_scheme
def test_every_packet_is_duplicated(scheme: str) -> None:
    tokens = steady(20)
    twice: Fate = lambda index, now: (0.0, 0.02)  # noqa: E731
    pair = run(CorePair(scheme, tokens, down=twice, up=twice))
    assert delays_s(pair, tokens) == pytest.approx([0.0] * 20)


# Time redundancy.


def test_on_a_lossy_path_each_bundle_is_repeated_once() -> None:
    tokens = steady(20)
    pair = run(CorePair("eloquent", tokens, lossy=True))
    due = sorted([time for time, _ in tokens] * 2)
    assert pair.sent_s[:40] == pytest.approx(due)
    # Nothing follows the end: it goes out once more.
    assert len(pair.sent_s) == 41


def test_repeats_begin_with_the_first_loss_and_stop_when_it_is_long_past() -> None:
    tokens = steady(1000)
    pair = run(CorePair("eloquent", tokens, down=drop(20)))
    by_token = [
        sum(time <= sent < time + GAP_S - 1e-9 for sent in pair.sent_s) for time, _ in tokens
    ]
    assert by_token[:20] == [1] * 20
    assert by_token[26:40] == [2] * 14
    assert by_token[-20:] == [1] * 20


@pytest.mark.parametrize("rtt_s", [0.02, 0.1, 0.3, 1.0])
def test_through_an_outage_the_tail_keeps_a_bounded_steady_beat(rtt_s: float) -> None:
    pair = CorePair("eloquent", steady(3), rtt_s=rtt_s, down=outage(1.0, 61.0), up=clean)
    pair.run()
    pair.check_delivery()
    gaps = [later - earlier for earlier, later in pairwise(pair.sent_s[2:])]
    first = TAIL_RTTS * rtt_s + 0.025 + TAIL_SLACK_S
    assert gaps[0] == pytest.approx(first, abs=0.02)
    assert gaps[1:5] == pytest.approx([rtt_s + SLACK_S] * 4)
    slowest = rtt_s + SLACK_S + MORE_SLACK_S
    assert gaps[-5:-1] == pytest.approx([slowest] * 4)
    # One beat after the link is back the reader is up to date.
    assert pair.rendered_s[-1] <= 61.0 + slowest + rtt_s / 2 + 1e-9
    assert pair.rendered_s[0] == pair.rendered_s[-1]


# All of it at random.

fates = st.lists(
    st.sampled_from([(), (), (0.0,), (0.0,), (0.0,), (0.06,), (0.25,), (0.0, 0.0), (0.01, 0.2)]),
    max_size=60,
)
answers = st.lists(
    st.tuples(st.sampled_from([0.0, 0.0, 0.004, 0.03, 0.2, 1.5]), st.integers(0, 1)),
    min_size=1,
    max_size=15,
)


@dataclass(frozen=True)
class Weather:
    """What the path and the connection do to one answer."""

    down: list[Sequence[float]]
    up: list[Sequence[float]]
    rooms: list[int]
    misjudged: set[int]
    lossy: bool


weathers = st.builds(
    Weather,
    down=fates,
    up=fates,
    rooms=st.lists(st.sampled_from([0, 30, 100, 200, 700, 1200]), max_size=20),
    misjudged=st.sets(st.integers(0, 40), max_size=5),
    lossy=st.booleans(),
)


def follow(pattern: Sequence[Sequence[float]]) -> Fate:
    """Each packet's fate in turn, whatever its number; when the pattern ends, all pass."""
    pending = iter(pattern)
    return lambda index, now: next(pending, (0.0,))


@every_scheme
@settings(deadline=None, max_examples=150)
@given(answers, weathers)
def test_the_exact_log_is_delivered_whatever_the_path_does(
    scheme: str, answer: list[tuple[float, int]], weather: Weather
) -> None:
    tokens, time = [], 1.0
    for index, (gap_s, is_long) in enumerate(answer):
        time += gap_s
        tokens.append((time, f"{index} " * (1 + 600 * is_long)))
    rooms = weather.rooms
    pair = CorePair(
        scheme,
        tokens,
        down=follow(weather.down),
        up=follow(weather.up),
        misjudged=weather.misjudged,
        room=lambda packet: rooms[packet] if packet < len(rooms) else 1200,
        lossy=weather.lossy,
    )
    pair.run()
    note(f"{len(pair.bundles)} bundles, {len(pair.reports)} reports, {pair.now:.3f} s")
    pair.check_delivery()


@every_scheme
@settings(deadline=None, max_examples=75)
@given(down=fates, up=fates, unseen=st.sets(st.integers(0, 20), max_size=8))
def test_the_exact_log_is_delivered_though_acknowledgements_lie(
    scheme: str, down: list[Sequence[float]], up: list[Sequence[float]], unseen: set[int]
) -> None:
    # Tokens long enough past the lies that a report follows them.
    tokens = steady(60)
    pair = CorePair(scheme, tokens, down=follow(down), up=follow(up), unseen=unseen)
    pair.run()
    note(f"{len(pair.bundles)} bundles, {len(pair.reports)} reports, {pair.now:.3f} s")
    pair.check_delivery()


def test_what_was_lost_goes_out_before_a_sweep_that_would_never_come_to_it() -> None:
    log = TokenLog()
    path = Path(srtt_s=0.1)
    path.both_lost = 1.0  # losses come in bursts
    sender = find_scheme("eloquent")(TURN, log, path)
    made: list[Bundle] = []
    for index in range(200):
        log.append(TextDelta(f"token {index:4} "))
        sender.log_grew(0.01 * index)
        bundle = sender.next_bundle(0.01 * index, 300)
        made += [bundle] if bundle is not None else []
    now = 2.0
    sender.on_lost(made[-1].number)
    sender.on_lost(made[-2].number)
    bundles = 0
    while (due := sender.next_time()) is not None and due <= now:
        bundles += sender.next_bundle(now, 300) is not None
        assert bundles < 50
    assert bundles > 0
