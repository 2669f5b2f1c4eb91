"""One screen that shows a run while it goes on: rate, delay, loss and queues, both directions."""

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from eloquent_netem.errors import NetemError
from eloquent_netem.realtime import DirectionStats, DriverStats

REFRESH_S = 0.5
SPARKLINE_COLUMNS = 30
"One for each second shown."

_BARS = " ▁▂▃▄▅▆▇█"


class NotATerminalError(NetemError):
    """The live view was asked for where there is no screen."""


@dataclass(frozen=True, slots=True)
class Interval:
    """What happened in one direction between two readings, or since the start."""

    seconds: float
    sent_packets: int
    sent_bytes: int
    delivered_packets: int
    delivered_bytes: int
    all_packets: int
    "Cross traffic included, as in what follows."
    all_bytes: int
    lost: int
    drops: int
    marks: int

    @property
    def sent_kbit_s(self) -> float:
        """The rate of what the subject sent."""
        return self.sent_bytes * 8e-3 / self.seconds

    @property
    def delivered_kbit_s(self) -> float:
        """The rate of what the subject was delivered."""
        return self.delivered_bytes * 8e-3 / self.seconds

    @property
    def cross_kbit_s(self) -> float:
        """The rate of what cross traffic sent."""
        return (self.all_bytes - self.sent_bytes) * 8e-3 / self.seconds


def interval(before: DirectionStats | None, after: DirectionStats, seconds: float) -> Interval:
    """Return the difference of two readings that are `seconds` apart; None: of the start."""

    def since(figure: str) -> int:
        return _figure(after, figure) - (0 if before is None else _figure(before, figure))

    return Interval(
        seconds=max(seconds, 1e-3),
        sent_packets=since("subject.packets_sent"),
        sent_bytes=since("subject.bytes_sent"),
        delivered_packets=since("packets_delivered"),
        delivered_bytes=since("subject.bytes_delivered"),
        all_packets=since("packets_sent"),
        all_bytes=since("bytes_sent"),
        lost=since("packets_lost"),
        drops=since("queue_drops"),
        marks=since("queue.marks"),
    )


class RateHistory:
    """A rate in each of the last seconds, from two readings per second."""

    def __init__(self) -> None:
        self._means: deque[float] = deque(maxlen=SPARKLINE_COLUMNS)
        self._is_half = False

    def add(self, rate: float) -> None:
        """Add a reading."""
        if self._is_half:
            self._means[-1] = (self._means[-1] + rate) / 2
        else:
            self._means.append(rate)
        self._is_half = not self._is_half

    def __iter__(self) -> Iterator[float]:
        return iter(self._means)


def sparkline(values: Sequence[float], columns: int = SPARKLINE_COLUMNS) -> str:
    """Draw the last values as bars, the highest the largest; what is above zero shows."""
    shown = list(values)[-columns:]
    top = max(shown, default=0.0)
    steps = len(_BARS) - 1
    bars = [_BARS[max(1, round(steps * value / top))] if value > 0 else _BARS[0] for value in shown]
    return "".join(bars).rjust(columns)


class View:
    """What is on the screen; `update` takes readings in order, `render` draws the last."""

    def __init__(self, title: str, footer: str) -> None:
        self._title = title
        self._footer = footer
        self._last: DriverStats | None = None
        self._up = _Direction("up: client to server")
        self._down = _Direction("down: server to client")

    def update(self, stats: DriverStats) -> None:
        """Take a reading."""
        seconds = stats.clock_s - (0.0 if self._last is None else self._last.clock_s)
        self._up.update(stats.up, seconds)
        self._down.update(stats.down, seconds)
        self._last = stats

    def render(self) -> RenderableType:
        """Draw the screen."""
        if self._last is None:
            return Text("Waiting for the first figures.")
        sides = Table.grid(expand=True)
        sides.add_column(ratio=1)
        sides.add_column(ratio=1)
        sides.add_row(self._up.render(), self._down.render())
        lateness = self._last.lateness
        scheduler = "real-time" if self._last.is_real_time else "no real-time priority"
        return Group(
            Text(f"{self._title}   {self._last.clock_s:.1f} s", style="bold"),
            sides,
            Text(
                f"router lateness: p50 {1e6 * lateness.p50_s:.0f} us, "
                f"p99 {1e6 * lateness.p99_s:.0f} us, max {1e6 * lateness.max_s:.0f} us "
                f"({scheduler})"
            ),
            Text(self._footer, style="dim"),
        )


class _Direction:
    """One direction's half of the screen."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._stats: DirectionStats | None = None
        self._interval: Interval | None = None
        self._sent = RateHistory()
        self._delivered = RateHistory()

    def update(self, stats: DirectionStats, seconds: float) -> None:
        self._interval = interval(self._stats, stats, seconds)
        self._stats = stats
        self._sent.add(self._interval.sent_kbit_s)
        self._delivered.add(self._interval.delivered_kbit_s)

    def render(self) -> RenderableType:
        now, stats = self._interval, self._stats
        assert now is not None
        assert stats is not None
        rows = [
            _row("sent", _rate(now.sent_kbit_s, now.sent_packets / now.seconds)),
            Text(sparkline(list(self._sent)), style="cyan"),
            _row("delivered", _rate(now.delivered_kbit_s, now.delivered_packets / now.seconds)),
            Text(sparkline(list(self._delivered)), style="green"),
            _row("cross", f"{now.cross_kbit_s:.0f} kbit/s sent"),
            _row("delay", _delay(stats)),
            _row("loss", f"{_share(now.lost, now.all_packets)}, {stats.packets_lost} in all"),
            _row("queue", _queue(stats)),
            _row("dropped", f"{now.drops}, {stats.queue_drops} in all"),
            _row("marked", f"{now.marks}, {stats.queue.marks} in all"),
        ]
        return Panel(Group(*rows), title=self._name, title_align="left")


class Screen:
    """The view on a terminal; made by `live_view`."""

    def __init__(self, view: View, live: Live) -> None:
        self._view = view
        self._live = live

    def show(self, stats: DriverStats) -> None:
        """Show the next reading."""
        self._view.update(stats)
        self._live.update(self._view.render(), refresh=True)


@contextmanager
def live_view(title: str, footer: str) -> Iterator[Screen]:
    """Take the whole terminal; give it back at the end.

    Raises:
        NotATerminalError: the standard output is none.
    """
    refuse_without_terminal()
    view = View(title, footer)
    with Live(
        view.render(), console=Console(), screen=True, auto_refresh=False, redirect_stderr=False
    ) as live:
        yield Screen(view, live)


def refuse_without_terminal() -> None:
    """Do nothing if the standard output is a terminal.

    Raises:
        NotATerminalError: it is none.
    """
    if not sys.stdout.isatty():
        raise NotATerminalError(
            "--live draws on the screen, and the output is not a terminal: run it in a terminal, "
            "or leave --live out and read the figures at the end."
        )


def _figure(stats: DirectionStats, path: str) -> int:
    value: object = stats
    for name in path.split("."):
        value = getattr(value, name)
    assert isinstance(value, int)
    return value


def _row(label: str, value: str) -> Text:
    return Text(f"{label:<9} {value}", no_wrap=True, overflow="ellipsis")


def _rate(kbit_s: float, packets_s: float) -> str:
    return f"{kbit_s:.0f} kbit/s, {packets_s:.0f} pkt/s"


def _delay(stats: DirectionStats) -> str:
    p50_s, max_s = stats.subject.delay_p50_s, stats.subject.delay_max_s
    if p50_s is None or max_s is None:
        return "nothing came out"
    return f"p50 {1e3 * p50_s:.1f} ms, max {1e3 * max_s:.1f} ms"


def _share(part: int, whole: int) -> str:
    return f"{part} ({100 * part / whole:.1f}%)" if whole else f"{part}"


def _queue(stats: DirectionStats) -> str:
    queue = stats.queue
    if queue.l_packets is None or queue.p is None:
        return f"{queue.packets} packets"
    return f"L {queue.l_packets}, C {queue.packets - queue.l_packets}, p {queue.p:.4f}"
