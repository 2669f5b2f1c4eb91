"""The demo: its clocks count what the measures count; both kinds of feed tell a whole answer."""

import math
import random
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from eloquent.errors import ConfigurationError
from eloquent_netem.lab.commands import lab
from eloquent_netem.lab.demo import Feed, News, make_place, replayed, take
from eloquent_netem.lab.demo_live import _Live, over_tun
from eloquent_netem.lab.demo_panes import Pane, screen
from eloquent_netem.lab.measures import measure_stalls
from eloquent_netem.lab.sources import Recording
from tests.netem.test_tun import needs_ip, network

TOKENS = 12
SOURCE = Recording(None, TOKENS)
TEXT = "".join(token.text for token in SOURCE.plan(0))
DEADLINE_S = 60.0
"Ends a hang; decides nothing."


def played(feed: Feed, meanwhile: Callable[[list[Pane]], None] = lambda panes: None) -> list[Pane]:
    """Play a feed to its end, and do something meanwhile."""
    panes = [Pane(scheme) for scheme in feed.schemes]
    waiting: list[News] = []
    feed.begin()
    deadline_s = time.monotonic() + DEADLINE_S
    is_over = False
    while not is_over:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
        is_done = feed.is_over()
        take(feed, panes, waiting, time.monotonic())
        meanwhile(panes)
        is_over = is_done and not waiting
    for index, pane in enumerate(panes):
        pane.note = feed.failure(index)
    return panes


def shown(panes: list[Pane], now: float, *, columns: int = 80, lines: int = 20) -> str:
    console = Console(width=columns, height=lines, record=True, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(
            screen(panes, now, header="a network", footer="made", lines=lines, columns=columns)
        )
    return captured.get()


@pytest.mark.parametrize("seed", range(20))
def test_a_pane_counts_what_the_measures_count(seed: int) -> None:
    rng = random.Random(seed)
    generated_s = [0.0]
    rendered_s = [0.0]
    for _ in range(50):
        generated_s.append(generated_s[-1] + rng.choice((0.0, 0.03, 0.1)))
        rendered_s.append(max(generated_s[-1] + rng.choice((0.0, 0.0, 0.3)), rendered_s[-1]))
    pane = Pane("any")
    news = [(at_s, 0) for at_s in generated_s] + [(at_s, 1) for at_s in rendered_s]
    for at_s, is_rendering in sorted(news):
        if is_rendering:
            pane.on_token(at_s, "x")
        else:
            pane.on_due(at_s)
    ratio = measure_stalls(generated_s, rendered_s, 0.0).stall_ratio
    later = rendered_s[-1] + 100
    assert pane.share(later, is_over=True) == pytest.approx(ratio)
    assert pane.waited_s(later) == pytest.approx(ratio * rendered_s[-1])
    assert pane.behind(later) == 0
    assert pane.text == "x" * 51


def test_a_wait_that_goes_on_counts_already() -> None:
    pane = Pane("any")
    for due_s in (10.0, 10.5, 11.0):
        pane.on_due(due_s)
    pane.on_token(10.0, "a")
    assert pane.waited_s(10.4) == 0
    assert pane.waited_s(12.0) == pytest.approx(1.5)
    assert pane.wait_s(12.0) == pane.longest_s(12.0) == pytest.approx(1.5)
    assert pane.behind(12.0) == 2
    assert pane.share(12.0) == pytest.approx(0.75)
    pane.on_token(12.0, "b")
    pane.on_token(12.0, "c")
    assert pane.waited_s(20.0) == pytest.approx(1.5)
    assert pane.behind(20.0) == 0


def test_nothing_is_waited_for_before_the_first_token_is_due() -> None:
    pane = Pane("any")
    assert pane.waited_s(100.0) == pane.share(100.0) == 0
    pane.on_due(5.0)
    assert pane.waited_s(4.0) == 0


class Told(Feed):
    """A feed of a few known things."""

    def begin(self) -> None:
        for item in (News(0, 1.5, "b"), News(0, 1.0, None), News(0, 1.0, "a"), News(0, 1.2, None)):
            self.news.put(item)

    def is_over(self) -> bool:
        return True


def test_nothing_is_shown_before_its_time_and_what_is_due_comes_first() -> None:
    feed, pane, waiting = Told("told", ("any",)), Pane("any"), list[News]()
    feed.begin()
    take(feed, [pane], waiting, 0.9)
    assert (pane.due_s, pane.text, len(waiting)) == ([], "", 4)
    take(feed, [pane], waiting, 1.4)
    assert (pane.due_s, pane.text) == ([1.0, 1.2], "a")
    assert pane.waited_s(1.4) == pytest.approx(0.2)
    take(feed, [pane], waiting, 1.5)
    assert (pane.text, waiting) == ("ab", [])
    assert pane.waited_s(9.0) == pytest.approx(0.3)


def test_the_screen_shows_both_answers_and_both_clocks() -> None:
    panes = [Pane("left one"), Pane("right one")]
    for pane in panes:
        for due_s in (0.0, 1.0):
            pane.on_due(due_s)
    panes[0].on_token(0.0, "said on the left")
    panes[1].on_token(0.0, "said on the right")
    panes[1].on_token(1.0, "and more")
    text = shown(panes, 3.0)
    for words in ("left one", "right one", "said on the left", "and more", "a network", "made"):
        assert words in text
    assert "waiting for 2.0 s, 1 tokens behind" in text
    assert "longest wait 0.0 s" in text


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("share", [0.004, 0.3, 1.0])
def test_the_bar_leaves_room_for_its_figure(columns: int, share: float) -> None:
    pane = Pane("any")
    pane.on_due(0.0)
    pane.on_token(1000 * share, "a")
    pane.on_due(1000.0)
    text = shown([pane, pane], 1000.0, columns=columns)
    assert text.count(f" {100 * share:3.0f} %") == 2
    assert text.count("█") >= 2
    assert ("░" in text) is (share < 1)


@pytest.mark.parametrize(("columns", "lines"), [(20, 5), (40, 10), (200, 60)])
def test_the_end_of_a_long_answer_is_seen_at_any_size(columns: int, lines: int) -> None:
    pane = Pane("any")
    for index in range(2000):
        pane.on_due(float(index))
        pane.on_token(float(index), f"w{index}\n" if index % 7 == 0 else f"w{index} ")
    text = shown([pane, pane], 2000.0, columns=columns, lines=lines)
    assert all(len(line) <= columns for line in text.splitlines())
    if lines >= 10:
        assert "w1999" in text


def test_a_replay_tells_the_whole_answer_at_its_speed() -> None:
    place = make_place(rtt_ms=20, loss=0.05, burst_ms=None, outage=())
    with replayed(place, SOURCE, 1) as feed:
        begun_s = time.monotonic()
        panes = played(feed)
        took_s = time.monotonic() - begun_s
    assert feed.schemes == ("tcp", "eloquent")
    assert "virtual time" in feed.how
    assert [pane.text for pane in panes] == [TEXT, TEXT]
    assert [len(pane.due_s) for pane in panes] == [TOKENS, TOKENS]
    assert took_s >= SOURCE.plan(1)[-1].time_s


def test_an_outage_stops_both() -> None:
    place = make_place(rtt_ms=20, loss=0.0, burst_ms=None, outage=(0.2, 0.7))
    assert "none from 0.2 to 0.7 s" in place.name
    with replayed(place, SOURCE, 1) as feed:
        for pane in played(feed):
            assert pane.longest_s(pane.came_s[-1]) > 0.2


def test_a_network_that_never_comes_back_is_refused() -> None:
    place = make_place(rtt_ms=20, loss=0.0, burst_ms=None, outage=(0.1, 1e6))
    with (
        pytest.raises(ConfigurationError, match="does not arrive over this network"),
        replayed(place, SOURCE, 1),
    ):
        pass


@pytest.mark.parametrize(
    "outage", [(1.0,), (2.0, 1.0), (-1.0, 1.0), (1.0, 2.0, 3.0), (0.0, math.inf)]
)
def test_an_outage_has_a_beginning_and_an_end(outage: tuple[float, ...]) -> None:
    with pytest.raises(ConfigurationError, match="--outage takes two numbers"):
        make_place(rtt_ms=20, loss=0.0, burst_ms=None, outage=outage)


@pytest.fixture(scope="module")
def namespaces() -> None:
    """Skip where there can be no namespaces, by saying why; with `CI=true` that fails."""
    with network():
        pass


@needs_ip
@pytest.mark.usefixtures("namespaces")
def test_the_live_feed_tells_the_whole_answer_over_real_sockets() -> None:
    place = make_place(rtt_ms=20, loss=0.0, burst_ms=None, outage=())
    with over_tun(place, SOURCE, 1) as feed:
        panes = played(feed)
    assert feed.schemes == ("tcp-sse", "eloquent")
    assert "live" in feed.how
    assert [pane.text for pane in panes] == [TEXT, TEXT]
    assert [len(pane.due_s) for pane in panes] == [TOKENS, TOKENS]


@needs_ip
@pytest.mark.usefixtures("namespaces")
def test_a_program_that_dies_ends_its_pane_and_is_told() -> None:
    place = make_place(rtt_ms=20, loss=0.0, burst_ms=None, outage=())
    source = Recording(None, 60)
    with over_tun(place, source, 1) as feed:
        assert isinstance(feed, _Live)
        server = feed.pairs[1].programs["server"]
        left, right = played(feed, lambda panes: server.kill() if panes[1].came_s else None)
        assert (len(left.came_s), left.note) == (60, "")
        assert 0 < len(right.came_s) < 60
        assert "The server's program in its namespace failed (exit code -9)" in right.note
    assert "exit code -9" in shown([left, right], time.monotonic())


def test_without_a_terminal_the_command_ends_with_the_figures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lab(
        ["demo", "--virtual", "--tokens", "3", "--rtt-ms", "20", "--loss", "0"],
        result_action="return_value",
    )
    out = " ".join(capsys.readouterr().out.split())
    assert "Eloquent: 3 tokens, waited 0.0 s (0 % of the time)" in out
    assert "TCP (a model of Linux's): 3 tokens, waited 0.0 s" in out
