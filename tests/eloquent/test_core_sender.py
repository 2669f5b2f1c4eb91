"""What each sender knows of its reader: acknowledgements, losses and reports, one at a time."""

from itertools import pairwise

import pytest

from eloquent.core.beat import BeatLimit
from eloquent.core.events import TextDelta
from eloquent.core.log import TokenLog
from eloquent.core.path import UNKNOWN_COPIES, Path
from eloquent.core.schemes import (
    BEATS_ONLY_S,
    CLEAN_PACKET_BYTES,
    PACKET_SIZES,
    SCHEMES,
    SPARSE_AFTER_S,
    SPARSE_GAP_S,
    SWEEP_AFTER_S,
    EloquentSender,
    scheme,
)
from eloquent.core.sender import CONFIRM_TRIES, MIN_ROOM_BYTES, NOW, Sender
from eloquent.core.wire import Bundle, Report, encode_bundle
from eloquent.errors import ConfigurationError, WireError

TURN = 2
ROOM = 1200
TOKEN_BYTES = 12
"Each token below: kind, length and ten letters."

every_scheme = pytest.mark.parametrize("name", SCHEMES)


def make(name: str = "eloquent", *, lossy: bool = False, srtt_s: float = 0.1) -> Sender:
    path = Path(srtt_s=srtt_s)
    for _ in range(UNKNOWN_COPIES):
        path.note_copy()
    if lossy:
        path.on_loss_elsewhere()
    return scheme(name)(TURN, TokenLog(), path)


def generate(sender: Sender, now: float = 0.0, tokens: int = 1) -> None:
    for _ in range(tokens):
        sender.log.append(TextDelta("0123456789"))
    sender.log_grew(now)


def send(sender: Sender, now: float = 0.0, room: int = ROOM) -> Bundle:
    bundle = sender.next_bundle(now, room)
    assert bundle is not None
    return bundle


def span(bundle: Bundle) -> tuple[int, int]:
    return bundle.offset // TOKEN_BYTES, (bundle.offset + len(bundle.data)) // TOKEN_BYTES


def report(tokens: int, newest: int) -> Report:
    return Report(TURN, tokens * TOKEN_BYTES, newest)


def test_a_scheme_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(ConfigurationError, match=r"no-such.*eloquent.*retransmit"):
        scheme("no-such")


@every_scheme
def test_with_an_empty_log_there_is_nothing_to_do(name: str) -> None:
    sender = make(name)
    assert sender.next_time() is None
    assert sender.next_bundle(0.0, ROOM) is None
    assert not sender.is_complete


@every_scheme
def test_bundle_numbers_count_from_zero(name: str) -> None:
    sender = make(name)
    numbers = []
    for _ in range(4):
        generate(sender)
        while sender.next_time() == NOW:
            numbers.append(send(sender).number)
    assert numbers == list(range(sender.bundles_sent))


@every_scheme
def test_a_sender_is_complete_when_its_reader_has_the_end(name: str) -> None:
    sender = make(name)
    generate(sender)
    sender.log.close("stop", model="m", prompt_tokens=1, completion_tokens=1)
    sender.log_grew(0.0)
    bundles = []
    while sender.next_time() == NOW:
        bundles.append(send(sender))
    for bundle in bundles:
        sender.on_acked(bundle.number)
    assert not sender.is_complete  # the transport has it all; whether the reader does is open
    sender.on_report(Report(TURN, sender.log.length, bundles[-1].number))
    assert sender.is_complete
    assert sender.next_time() is None


@every_scheme
def test_a_reader_that_never_reports_is_given_up_after_a_while(name: str) -> None:
    sender = make(name)
    generate(sender)
    sender.log.close("stop", model="m", prompt_tokens=1, completion_tokens=1)
    sender.log_grew(0.0)
    now, repeats = 0.0, []
    while (due := sender.next_time()) is not None:
        now = max(now, due)
        bundle = sender.next_bundle(now, 1200)
        assert bundle is not None
        repeats.append(now)
        sender.on_acked(bundle.number)
        assert now < 300
    assert sender.is_complete
    assert len(set(repeats)) == 1 + CONFIRM_TRIES + 1
    assert now > 10


@every_scheme
def test_fates_told_twice_or_of_unknown_bundles_do_nothing(name: str) -> None:
    sender = make(name)
    generate(sender)
    number = send(sender).number
    sender.on_acked(number)
    before = sender.next_time()
    for _ in range(2):
        sender.on_acked(number)
        sender.on_lost(number)
        sender.on_lost(99)
        sender.on_acked(99)
    assert sender.next_time() == before


def test_each_bundle_carries_what_is_not_acknowledged() -> None:
    sender = make()
    spans = []
    for number in range(4):
        generate(sender)
        spans.append(span(send(sender)))
        if number == 1:
            sender.on_acked(0)
    assert spans == [(0, 1), (0, 2), (1, 3), (1, 4)]


def test_an_acknowledgement_above_the_mark_does_not_close_the_gap_below() -> None:
    sender = make("retransmit")
    for _ in range(3):
        generate(sender)
        send(sender)
    sender.on_acked(2)
    sender.on_acked(1)
    sender.on_lost(0)
    assert span(send(sender)) == (0, 1)


def test_a_retransmission_is_what_was_lost_and_not_what_came() -> None:
    sender = make("retransmit")
    for _ in range(4):
        generate(sender)
        assert send(sender)
    sender.on_acked(3)
    sender.on_lost(1)
    assert sender.next_time() == NOW
    assert span(send(sender)) == (1, 2)
    assert sender.next_time() is None


def test_a_loss_that_a_bundle_in_flight_makes_good_causes_no_packet() -> None:
    sender = make()
    generate(sender)
    send(sender)
    generate(sender)
    assert span(send(sender)) == (0, 2)
    sender.on_lost(0)
    assert sender.next_time() != NOW
    sender.on_lost(1)
    assert sender.next_time() == NOW


# Reports.


@every_scheme
@pytest.mark.parametrize(("tokens", "newest"), [(2, 0), (1, 40), (0, 1 << 61), (1 << 50, -1)])
def test_a_report_of_what_was_never_sent_is_a_wire_error(
    name: str, tokens: int, newest: int
) -> None:
    sender = make(name)
    generate(sender)
    send(sender)
    with pytest.raises(WireError, match="never sent"):
        sender.on_report(report(tokens, newest))


def test_what_is_generated_and_not_sent_cannot_be_reported() -> None:
    sender = make()
    generate(sender)
    send(sender)
    generate(sender)
    with pytest.raises(WireError, match="never sent"):
        sender.on_report(report(2, 0))


@every_scheme
def test_an_impossible_report_changes_nothing(name: str) -> None:
    sender = make(name)
    generate(sender)
    send(sender)
    before = sender.next_time()
    with pytest.raises(WireError):
        sender.on_report(report(0, 99))
    assert sender.next_time() == before
    assert not sender.is_complete


@every_scheme
def test_a_report_counts_when_every_acknowledgement_is_lost(name: str) -> None:
    sender = make(name)
    generate(sender, tokens=2)
    while sender.next_time() == NOW:
        newest = send(sender).number
    sender.on_report(report(2, newest))
    assert sender.next_time() is None
    generate(sender)
    assert span(send(sender)) == (2, 3)


@every_scheme
def test_a_report_brings_back_what_was_acknowledged_and_never_came(name: str) -> None:
    sender = make(name)
    for _ in range(3):
        generate(sender)
        while sender.next_time() == NOW:
            newest = send(sender).number
    for number in range(newest + 1):
        sender.on_acked(number)
    assert sender.next_time() is None
    sender.on_report(report(1, newest))
    assert sender.next_time() == NOW
    assert span(send(sender)) == (1, 3)


@every_scheme
def test_a_report_from_before_the_acknowledged_bundle_says_nothing(name: str) -> None:
    sender = make(name)
    for _ in range(3):
        generate(sender)
        while sender.next_time() == NOW:
            newest = send(sender).number
    for number in range(newest + 1):
        sender.on_acked(number)
    sender.on_report(report(1, newest - 1))
    sender.on_report(report(0, -1))
    assert sender.next_time() is None


@every_scheme
@pytest.mark.parametrize("newest_of_old", [0, 1])
def test_a_report_overtaken_by_a_later_one_says_nothing(name: str, newest_of_old: int) -> None:
    sender = make(name)
    for _ in range(2):
        generate(sender)
        while sender.next_time() == NOW:
            newest = send(sender).number
    sender.on_report(report(2, newest))
    for number in range(newest + 1):
        sender.on_lost(number)
    assert sender.next_time() is None
    sender.on_report(report(1, min(newest_of_old, newest)))
    sender.on_report(report(0, newest))
    assert sender.next_time() is None
    assert sender.next_bundle(0.0, ROOM) is None


# Room.


@every_scheme
def test_a_bundle_fits_its_packet_to_the_byte(name: str) -> None:
    sender = make(name)
    generate(sender, tokens=500)
    for _ in range(3):
        size = len(encode_bundle(send(sender)))
        assert size == (1150 if name == "eloquent-queued" else ROOM)


def test_a_small_bundle_goes_into_a_small_packet() -> None:
    sender = make()
    generate(sender)
    assert sender.next_bundle(0.0, 4 + TOKEN_BYTES - 1) is None
    assert span(send(sender, room=4 + TOKEN_BYTES)) == (0, 1)


@every_scheme
def test_a_large_bundle_waits_for_a_packet_worth_its_header(name: str) -> None:
    sender = make(name)
    generate(sender, tokens=50)
    assert sender.next_time() == NOW
    assert sender.next_bundle(0.0, MIN_ROOM_BYTES - 1) is None
    assert sender.next_time() == NOW


def test_where_not_all_fits_the_oldest_byte_not_yet_sent_comes_first() -> None:
    sender = make()
    generate(sender, tokens=80)
    assert span(send(sender, room=4 + 40 * TOKEN_BYTES)) == (0, 40)
    assert send(sender, room=300).offset == 40 * TOKEN_BYTES
    sender.on_lost(0)
    assert send(sender, room=300).offset == 0


def test_a_copy_that_meets_a_smaller_packet_is_split() -> None:
    sender = make("duplicate")
    generate(sender, tokens=80)
    first = send(sender)
    copies = []
    while len(copies) < 3 and sender.next_time() == NOW:
        copies.append(send(sender, room=800))
    assert b"".join(bundle.data for bundle in copies) == first.data
    assert sender.next_time() is None


def test_the_contents_are_chosen_when_the_packet_is_written() -> None:
    early, late = make("eloquent-queued"), make("eloquent")
    for sender in (early, late):
        generate(sender)
        generate(sender)
    assert span(send(late)) == (0, 2)
    assert [span(send(early)), span(send(early))] == [(0, 1), (0, 2)]


# Time.


def test_on_a_lossy_path_a_bundle_is_repeated_once_at_once() -> None:
    sender = make(lossy=True)
    generate(sender)
    send(sender, now=1.0)
    assert sender.next_time() == 1.0
    assert span(send(sender, now=1.0)) == (0, 1)
    later = sender.next_time()
    assert later is not None
    assert later > 1.1


def test_on_a_clean_path_nothing_is_repeated_before_a_round_trip() -> None:
    sender = make()
    generate(sender)
    send(sender, now=1.0)
    due = sender.next_time()
    assert due is not None
    assert due > 1.1


def test_the_first_bundles_of_an_unknown_path_are_repeated() -> None:
    sender = EloquentSender(TURN, TokenLog(), Path())
    for token in range(UNKNOWN_COPIES + 10):
        now = 1.0 + 0.03 * token
        generate(sender, now)
        first = send(sender, now).number
        if (due := sender.next_time()) is not None and due <= now:
            send(sender, now)
        sender.on_acked(first)
    assert sender.bundles_sent == 2 * UNKNOWN_COPIES + 10


def test_while_a_queue_stands_nothing_is_repeated_and_little_is_redundant() -> None:
    sender = make(lossy=True)
    sender._path.has_queue = True
    for token in range(60):
        generate(sender, 1.0 + 0.01 * token)
        bundle = send(sender, 1.0 + 0.01 * token)
    due = sender.next_time()
    assert due is not None
    assert due > 1.6
    assert len(bundle.data) <= 6 * TOKEN_BYTES


@pytest.mark.parametrize(
    ("window", "copies", "redundant"),
    [(None, 1, True), (400_000, 1, True), (5_200, 1, False), (2_600, 0, False)],
)
def test_when_the_window_binds_redundancy_goes_before_copies(
    window: int | None, copies: int, redundant: bool
) -> None:
    sender = make(lossy=True, srtt_s=0.2)
    sender._path.window_bytes = window
    for token in range(40):
        now = 1.0 + 0.01 * token
        sender._path.blocked_at = now
        generate(sender, now)
        bundle = send(sender, now)
        sent = sender.bundles_sent
        if (due := sender.next_time()) is not None and due <= now:
            send(sender, now)
        made = sender.bundles_sent - sent
    assert made == copies
    assert (len(bundle.data) > 10 * TOKEN_BYTES) is redundant
    assert sender._path.is_limited is (not redundant)


def test_when_not_even_a_packet_per_token_fits_tokens_share_one() -> None:
    sender = make(srtt_s=0.2)
    sender._path.window_bytes = 450  # 2 kB/s: a packet of 112 B in 56 ms
    sent = []
    for tick in range(200):
        now = 1.0 + 0.01 * tick
        generate(sender, now)
        due = sender.next_time()
        if due is not None and due <= now:
            sent.append(now)
            assert send(sender, now).data
    gaps = [later - earlier for earlier, later in pairwise(sent[5:])]
    assert min(gaps) >= 0.05
    assert max(gaps) <= 0.1 + 0.01  # half a round trip, and the tick


def test_losses_in_bursts_spread_the_copies() -> None:
    sender = make(lossy=True)
    for _ in range(20):
        sender._path.on_pair(True, True)
    due = []
    for token in range(20):
        now = 1.0 + 0.1 * token
        generate(sender, now)
        sender.on_acked(send(sender, now).number)
        generate(sender, now)
        send(sender, now)
        at = sender.next_time()
        assert at is not None
        due.append(at - now)
    # Now and then one goes at once, to learn when the bursts are over.
    assert sum(wait > 0.01 for wait in due) > 12
    assert any(wait == 0 for wait in due)


def test_losses_of_pairs_are_told_to_the_path() -> None:
    sender = make(lossy=True)
    for _ in range(10):
        generate(sender)
        first = send(sender).number
        due = sender.next_time()
        assert due is not None
        second = send(sender, max(due, 0.0)).number
        sender.on_lost(second)
        sender.on_lost(first)
    assert sender._path.is_bursty


def test_independent_losses_are_no_bursts() -> None:
    sender = make(lossy=True)
    for token in range(10):
        generate(sender, 1.0 + 0.1 * token)
        first, second = send(sender, 1.0 + 0.1 * token), send(sender, 1.0 + 0.1 * token)
        sender.on_lost(first.number)
        sender.on_acked(second.number)
    assert sender._path.both_lost == 0


def test_a_late_acknowledgement_counts() -> None:
    sender = make()
    generate(sender)
    number = send(sender).number
    sender.on_lost(number)
    assert sender.next_time() == NOW
    loss = sender._path.loss
    sender.on_acked(number)
    assert sender._path.loss < loss
    assert sender.next_time() is None


def test_what_is_acknowledged_is_not_repeated() -> None:
    sender = make(lossy=True)
    generate(sender)
    sender.on_acked(send(sender, now=1.0).number)
    assert sender.next_time() is None
    assert sender.next_bundle(9.0, ROOM) is None


def test_a_path_without_a_round_trip_time_yet_repeats_the_tail_all_the_same() -> None:
    sender = make()
    generate(sender)
    send(sender)
    assert sender.next_time() == pytest.approx(0.16)  # 1.25 round trips, ACK delay, slack


# Outages.


def through_an_outage(sender: Sender, *, lasting_s: float) -> list[tuple[float, Bundle]]:
    """Generate a token every 30 ms and return what leaves, from 1 s on; nothing is heard."""
    sender._path.waiting_since = 1.0
    sent = []
    for tick in range(round(lasting_s / 0.01)):
        now = 1.0 + 0.01 * tick
        if tick % 3 == 0:
            generate(sender, now)
        due = sender.next_time()
        while due is not None and due <= now:
            sent.append((now, send(sender, now)))
            due = sender.next_time()
    return sent


def gaps_from(sent: list[tuple[float, Bundle]], since_s: float) -> list[float]:
    times = [now for now, _ in sent if now > since_s]
    return [later - earlier for earlier, later in pairwise(times)]


def test_late_in_an_outage_a_beat_goes_on_and_new_tokens_wait_for_it() -> None:
    sent = through_an_outage(make(), lasting_s=20.0)
    since_s = 1.0 + BEATS_ONLY_S + 0.5
    assert all(0.15 - 1e-9 <= gap <= 0.4 for gap in gaps_from(sent, since_s))
    assert all(bundle.offset == 0 for now, bundle in sent if now > since_s)


def test_in_a_silence_tokens_go_on_in_small_bundles_without_copies() -> None:
    sent = through_an_outage(make(lossy=True), lasting_s=5.0)
    early = [now for now, _ in sent if now < 1.0 + SPARSE_AFTER_S]
    assert len(early) > len(set(early))
    since_s = 1.5 + SPARSE_AFTER_S
    assert min(gaps_from(sent, since_s)) >= SPARSE_GAP_S
    assert max(gaps_from(sent, since_s)) < 0.05
    assert all(len(bundle.data) < CLEAN_PACKET_BYTES for now, bundle in sent if now > since_s)


def test_on_a_path_that_held_packets_before_silence_makes_nothing_larger() -> None:
    sender = make(lossy=True)
    sender._path.holds = True
    sent = through_an_outage(sender, lasting_s=1.6)
    silent = [bundle for now, bundle in sent if now > 1.0 + 0.325 + SWEEP_AFTER_S + 0.03]
    assert max(len(bundle.data) for bundle in silent) < PACKET_SIZES[0]
    assert len({bundle.offset + len(bundle.data) for bundle in silent}) == len(silent)


def test_when_a_silence_ends_the_next_token_does_not_wait() -> None:
    sender = make()
    last_s, _ = through_an_outage(sender, lasting_s=3.0)[-1]
    generate(sender, last_s)
    due = sender.next_time()
    assert due is not None
    assert due > last_s
    sender._path.waiting_since = None
    assert sender.next_time() == NOW


def test_a_backlog_that_began_in_full_packets_ends_in_them() -> None:
    sender = make(lossy=True)
    for token in range(300):
        generate(sender, 1.0 + 0.03 * token)
        send(sender, 1.0 + 0.03 * token)
    for number in range(sender.bundles_sent):
        sender.on_lost(number)
    sent = []
    while sender.next_time() == NOW:
        sent.append(send(sender, 11.0))
    lost = [bundle for bundle in sent if bundle.offset + len(bundle.data) < 300 * TOKEN_BYTES]
    assert all(len(bundle.data) > ROOM - 20 for bundle in lost[:-1])
    assert len(sent) <= 300 * TOKEN_BYTES // ROOM + 3


def test_the_beats_of_all_connections_together_are_bounded() -> None:
    limit = BeatLimit(beats_per_s=10)
    senders = [make() for _ in range(20)]
    for sender in senders:
        sender._path.beats = limit
        sender._path.waiting_since = -10.0
        generate(sender)
        send(sender)
    before = sum(sender.bundles_sent for sender in senders)
    for tick in range(1000):
        now = 1.0 + 0.01 * tick
        for sender in senders:
            due = sender.next_time()
            if due is not None and due <= now:
                sender.next_bundle(now, ROOM)
    beats = sum(sender.bundles_sent for sender in senders) - before
    assert 80 <= beats <= 10 * 10 + 10


def test_an_acknowledgement_ends_the_beat() -> None:
    sender = make()
    sender._path.waiting_since = -10.0
    generate(sender)
    number = send(sender, 1.0).number
    generate(sender, 1.01)
    due = sender.next_time()
    assert due is not None
    assert due > 1.1
    sender._path.waiting_since = None
    sender.on_acked(number)
    assert sender.next_time() == NOW
