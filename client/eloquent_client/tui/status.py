"""The status line: the link to the server, and how the answer comes over it."""

from dataclasses import dataclass

from rich.text import Text
from textual.widgets import Static

from eloquent.session.states import LinkState
from eloquent_client.messages import StreamStats

QUIET_AFTER_S = 1.0
"A running answer from which nothing came for this long is shown as quiet."

WIDE = 110
"Columns from which on the line is written out; the width alone decides, so that it stays calm."

SEPARATOR = "  "


STYLES = {
    LinkState.IDLE: "dim",
    LinkState.CONNECTING: "yellow",
    LinkState.UP: "green",
    LinkState.SILENT: "bold red",
    LinkState.OFFLINE: "bold red",
    LinkState.RECONNECTING: "bold yellow",
    LinkState.CLOSED: "dim",
}


@dataclass(frozen=True, slots=True)
class Status:
    """What the line says."""

    link: LinkState
    is_answering: bool = False
    had_link: bool = False
    "Whether a connection was there or was tried: without one it is lost, not just missing."
    rtt_ms: float | None = None
    "Smoothed round-trip time in milliseconds; None: not connected."
    stats: StreamStats | None = None
    "Of the running or the last answer; None before the first."
    tokens: int = 0
    "Of that answer, up to now."
    quiet_s: float = 0.0
    "Seconds since something came last, while an answer runs."

    @property
    def words(self) -> str:
        """What the link, or over a good one the answer, is doing."""
        if self.link is LinkState.UP:
            return self._activity
        if self.link is LinkState.IDLE:
            return "link lost" if self.had_link else "not connected"
        if self.is_answering and self.link is not LinkState.CONNECTING:
            return f"{self.link.value} at token {self.tokens}"
        return str(self.link.value)

    @property
    def _activity(self) -> str:
        if not self.is_answering:
            return "connected"
        text = "receiving" if self.tokens else "waiting for the model"
        return f"{text}, quiet {self.quiet_s:.0f} s" if self.quiet_s >= QUIET_AFTER_S else text

    @property
    def style(self) -> str:
        """How the words are shown."""
        if self.link is LinkState.UP and self.is_answering:
            return "bold green" if self.tokens else "yellow"
        if self.link is LinkState.IDLE and self.had_link:
            return "bold red"
        return STYLES[self.link]

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second from the first one on, or None while that says nothing."""
        if self.stats is None or self.stats.ttft_ms is None or self.tokens < 2:
            return None
        seconds = (self.stats.duration_ms - self.stats.ttft_ms) / 1e3
        return (self.tokens - 1) / seconds if seconds > 0 else None


def status_line(status: Status, width: int) -> Text:
    """Return the line in words, or in fewer words if there are less than `WIDE` columns."""
    is_short = width < WIDE
    parts = [Text(f"● {status.words}", style=status.style)]
    if status.rtt_ms is not None:
        parts.append(Text(f"RTT {_milliseconds(status.rtt_ms)}"))
    if status.stats is not None and status.stats.datagrams > 0:
        parts.append(_losses(status.stats, is_short=is_short))
        parts.append(Text(f"{status.tokens} {'tok' if is_short else 'tokens'}"))
        if status.stats.ttft_ms is not None:
            first = _milliseconds(status.stats.ttft_ms)
            parts.append(Text(f"first {first}" if is_short else f"first after {first}"))
        if status.tokens_per_s is not None:
            parts.append(Text(f"{status.tokens_per_s:.0f}{'' if is_short else ' tokens'}/s"))
    line = Text(SEPARATOR).join(parts)
    line.truncate(width, overflow="ellipsis")
    return line


def _losses(stats: StreamStats, *, is_short: bool) -> Text:
    lost, sent = stats.loss_recovered, stats.datagrams + stats.loss_recovered
    if lost == 0:
        return Text("no loss" if is_short else "no packet lost")
    if is_short:
        return Text(f"lost {lost}/{sent}, recovered", style="yellow")
    return Text(f"{lost} of {sent} packets lost, all recovered", style="yellow")


def _milliseconds(time_ms: float) -> str:
    if time_ms < 10:
        return f"{time_ms:.1f} ms"
    return f"{time_ms:.0f} ms" if time_ms < 10_000 else f"{time_ms / 1e3:.1f} s"


class StatusBar(Static):
    """One line at the bottom of the chat."""

    DEFAULT_CSS = """
    StatusBar { height: 1; padding: 0 1; background: $surface; color: $text-muted; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._line = Text()

    def show(self, status: Status) -> None:
        """Show `status`; what has not changed is not drawn again."""
        line = status_line(status, self.content_size.width)
        if line != self._line:
            self._line = line
            self.update(line)
