"""The pacer, in virtual time: order, the bound, whole characters, evenness."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eloquent.core.events import End, Event, Failure, TextDelta
from eloquent.core.graphemes import clusters
from eloquent.core.pacer import (
    FRAME_S,
    MAX_ADDED_DELAY_S,
    MAX_SPLIT_CHARS,
    PaceMode,
    Pacer,
)

END = End("stop", "m", 1, 2, 3, bytes(16))
FAILURE = Failure("engine_error", "It broke.")
MODES: tuple[PaceMode, ...] = ("off", "smooth", "reading")

Arrival = tuple[float, list[Event]]


def replay(pacer: Pacer, arrivals: Sequence[Arrival]) -> list[tuple[float, Event]]:
    """Push each at its time, pop whenever the pacer says so; return what came out and when."""
    shown: list[tuple[float, Event]] = []
    waiting = list(arrivals)
    now, pops = 0.0, 0
    while True:
        due = pacer.next_time()
        arrival = waiting[0][0] if waiting else None
        times = [time for time in (due, arrival) if time is not None]
        if not times:
            return shown
        now = max(now, min(times))
        while waiting and waiting[0][0] <= now:
            pacer.push(*waiting.pop(0))
        if (due := pacer.next_time()) is not None and due <= now:
            shown += [(now, event) for event in pacer.pop(now)]
            pops += 1
            assert pops < 100_000, "the pacer is never done"


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def char_times(timed: Sequence[tuple[float, Event]]) -> list[float]:
    """Return a time for each code point."""
    return [time for time, event in timed if isinstance(event, TextDelta) for _ in event.text]


def as_timed(arrivals: Sequence[Arrival]) -> list[tuple[float, Event]]:
    return [(time, event) for time, events in arrivals for event in events]


TEXTS = st.text(
    st.sampled_from("ab \n\r\u0301\u0308\u200d\ufe0f👩🚀🏽🇩🇪한ᄒ\u1161\u11ab" + "\u0e33"),
    min_size=1,
)
EVENTS = st.one_of(TEXTS.map(TextDelta), st.just(FAILURE), st.just(END))
ARRIVALS = st.lists(
    st.tuples(st.floats(0, 2.0), st.lists(EVENTS, max_size=4)), min_size=1, max_size=30
).map(
    lambda steps: [
        (sum(gap for gap, _ in steps[: index + 1]), events)
        for index, (_, events) in enumerate(steps)
    ]
)


@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None)
@given(arrivals=ARRIVALS)
def test_everything_comes_once_and_in_order(mode: PaceMode, arrivals: list[Arrival]) -> None:
    shown = [event for _, event in replay(Pacer(mode), arrivals)]
    came = [event for _, event in as_timed(arrivals)]
    assert text_of(shown) == text_of(came)
    positions = [
        [text_of(events[:index]) for index, event in enumerate(events) if event in (END, FAILURE)]
        for events in (shown, came)
    ]
    assert positions[0] == positions[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bound_s", [0.0, 0.05, MAX_ADDED_DELAY_S])
@settings(deadline=None)
@given(arrivals=ARRIVALS)
def test_the_bound_on_added_delay_holds(
    mode: PaceMode, bound_s: float, arrivals: list[Arrival]
) -> None:
    pacer = Pacer(mode, max_delay_s=bound_s)
    shown = char_times(replay(pacer, arrivals))
    came = char_times(as_timed(arrivals))
    delays = [out - into for out, into in zip(shown, came, strict=True)]
    # `arrived + bound` is rounded, and so may differ from the bound by that.
    assert all(-1e-9 <= delay <= bound_s + 1e-9 for delay in delays)
    assert pacer.stats.added_delay_max_s <= bound_s + 1e-9
    assert pacer.stats.added_delay_mean_s <= pacer.stats.added_delay_max_s + 1e-9


@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None)
@given(arrivals=ARRIVALS)
def test_what_ends_an_answer_lets_everything_go(mode: PaceMode, arrivals: list[Arrival]) -> None:
    shown = replay(Pacer(mode), arrivals)
    last = [time for time, event in as_timed(arrivals) if event in (END, FAILURE)]
    if last:
        assert [time for time, event in shown if event in (END, FAILURE)] == last


@pytest.mark.parametrize(
    "character",
    [
        "e\u0301",
        "🇩🇪",
        "👩\u200d🚀",
        "👍🏽",
        "❤\ufe0f",
        "\u1112\u1161\u11ab",
        "\r\n",
        "🏴\U000e0067\U000e007f",
    ],
)
@pytest.mark.parametrize("mode", ["smooth", "reading"])
def test_a_character_of_several_code_points_stays_whole(mode: PaceMode, character: str) -> None:
    arrivals: list[Arrival] = [(0.0, [TextDelta(character * 10)]), (0.2, [TextDelta("x")])]
    shown = [event for _, event in replay(Pacer(mode), arrivals)]
    assert len(shown) > 3, "it came out at once, so nothing was cut"
    for event in shown[:-1]:
        assert isinstance(event, TextDelta)
        assert event.text.removesuffix("x") == character * (len(event.text) // len(character))


def test_a_mark_that_comes_with_the_next_event_joins_what_waits() -> None:
    pacer = Pacer("reading", chars_per_s=10.0)
    pacer.push(0.0, [TextDelta("ae")])
    assert pacer.pop(0.0) == [TextDelta("a")]
    pacer.push(0.05, [TextDelta("\u0301b")])
    assert pacer.pop(0.1) == [TextDelta("e\u0301")]


@settings(deadline=None)
@given(TEXTS)
def test_clusters_lose_nothing(text: str) -> None:
    assert "".join(clusters(text)) == text
    assert all(cluster for cluster in clusters(text))


def test_two_flags_are_two_characters() -> None:
    assert list(clusters("🇩🇪🇫🇷")) == ["🇩🇪", "🇫🇷"]


def steady(gap_s: float, text: str, count: int) -> list[Arrival]:
    return [(index * gap_s, [TextDelta(text)]) for index in range(count)]


def gaps(shown: Sequence[tuple[float, Event]]) -> list[float]:
    return [later - earlier for (earlier, _), (later, _) in pairwise(shown)]


def test_smooth_spreads_what_comes_in_bursts() -> None:
    pacer = Pacer("smooth")
    shown = replay(pacer, steady(0.3, "four" * 9, 20))
    assert max(gaps(shown[20:])) < 0.15, "the bursts are 0.3 s apart"
    assert max(len(event.text) for _, event in shown if isinstance(event, TextDelta)) <= 12
    assert pacer.stats.added_delay_mean_s < MAX_ADDED_DELAY_S / 2


def test_smooth_hardly_holds_what_comes_evenly() -> None:
    pacer = Pacer("smooth")
    replay(pacer, steady(1 / 30, "four", 300))
    assert pacer.stats.characters == 1200
    assert pacer.stats.added_delay_mean_s < 2 / 30


def test_smooth_forgets_old_gaps() -> None:
    pacer = Pacer("smooth")
    early = steady(0.4, "four" * 10, 5)
    late = [(time + 2.0, events) for time, events in steady(1 / 30, "four", 600)]
    shown = replay(pacer, [*early, *late])
    came = char_times(as_timed(late))[-400:]
    delays = [out - into for out, into in zip(char_times(shown)[-400:], came, strict=True)]
    assert max(delays) < 0.1


def test_reading_keeps_its_pace_while_the_bound_allows() -> None:
    shown = replay(Pacer("reading", chars_per_s=40.0), [(0.0, [TextDelta("x" * 20)])])
    assert char_times(shown) == pytest.approx([index / 40 for index in range(20)], abs=FRAME_S)


def test_the_first_character_need_not_wait() -> None:
    for mode in MODES:
        pacer = Pacer(mode)
        pacer.push(5.0, [TextDelta("Hello")])
        due = pacer.next_time()
        assert due is not None
        assert due <= 5.0
        assert text_of(pacer.pop(5.0)).startswith("H")


def test_no_more_often_than_a_screen_shows() -> None:
    shown = replay(Pacer("smooth"), steady(0.2, "x" * 100, 10))
    often = [gap for gap in gaps(shown) if gap < 0.99 * FRAME_S]
    assert len(often) <= 10, "more than the bound can ask for, once for each arrival"


def test_a_resumed_answer_passes_whole() -> None:
    pacer = Pacer("reading")
    text = "x" * (MAX_SPLIT_CHARS + 1)
    pacer.push(0.0, [TextDelta(text), TextDelta("yz")])
    assert pacer.pop(0.0) == [TextDelta(text), TextDelta("y")]


def test_flush_lets_everything_go() -> None:
    pacer = Pacer("reading")
    pacer.push(0.0, [TextDelta("Hello")])
    pacer.flush()
    assert pacer.pop(0.0) == [TextDelta("Hello")]
    assert pacer.next_time() is None
