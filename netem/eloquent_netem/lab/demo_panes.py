"""What the demo shows: two panes with the same answer, and how long each reader has waited."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.layout import Layout
from rich.panel import Panel
from rich.text import Text

BAR_COLUMNS = 24
"Of the bar of waiting, in a pane that is wide enough."
FIGURES_COLUMNS = 24
"What stands on the bar's line beside it takes less."
FRAME_LINES = 7
"Of a screen: header, footer, a pane's border, and what stands below its text."
LONG_WAIT_S = 0.2
"A reader hardly notices a shorter one."


@dataclass(slots=True)
class Pane:
    """One reader: what is due, what came, and how long it has waited; seconds on one clock."""

    title: str
    due_s: list[float] = field(default_factory=list)
    "When each token generated so far would be there, had nothing been lost."
    came_s: list[float] = field(default_factory=list)
    text: str = ""
    note: str = ""
    "What went wrong, if anything did."
    _waited_s: float = 0.0
    _longest_s: float = 0.0

    def on_due(self, due_s: float) -> None:
        """Take note of another token that was generated."""
        self.due_s.append(due_s)

    def on_token(self, now: float, text: str) -> None:
        """Take the next token."""
        wait_s = self.wait_s(now)
        self._waited_s += wait_s
        self._longest_s = max(self._longest_s, wait_s)
        self.came_s.append(now)
        self.text += text

    def wait_s(self, now: float) -> float:
        """Return how long the reader has been waiting for the next token at `now`."""
        count = len(self.came_s)
        if count >= len(self.due_s):
            return 0.0
        # The gap before it has accounted for what lies before the last rendering.
        return max(0.0, now - max([self.due_s[count], *self.came_s[-1:]]))

    def waited_s(self, now: float) -> float:
        """Return how long the reader has waited in all: the strict stall time."""
        return self._waited_s + self.wait_s(now)

    def longest_s(self, now: float) -> float:
        """Return the longest single wait."""
        return max(self._longest_s, self.wait_s(now))

    def share(self, now: float, *, is_over: bool = False) -> float:
        """Return the stall ratio so far; `is_over`: of the whole answer."""
        if not self.due_s:
            return 0.0
        end_s = self.came_s[-1] if is_over and self.came_s else now
        length_s = end_s - self.due_s[0]
        return min(self.waited_s(end_s) / length_s, 1.0) if length_s > 0 else 0.0

    def behind(self, now: float) -> int:
        """Return how many tokens are due and not there."""
        return max(0, sum(due <= now for due in self.due_s) - len(self.came_s))


def screen(
    panes: Sequence[Pane],
    now: float,
    *,
    header: str,
    footer: str,
    lines: int,
    columns: int,
    is_over: bool = False,
) -> RenderableType:
    """Return the whole screen for a terminal of this size."""
    layout = Layout()
    layout.split_column(
        Layout(Text(header, style="bold", justify="center"), size=1),
        Layout(name="panes"),
        Layout(Text(footer, style="dim", justify="center"), size=1),
    )
    width, height = max(columns // len(panes) - 4, 8), max(lines - FRAME_LINES, 1)
    layout["panes"].split_row(
        *(Layout(_pane(pane, now, width, height, is_over=is_over)) for pane in panes)
    )
    return layout


def _pane(pane: Pane, now: float, width: int, height: int, *, is_over: bool) -> RenderableType:
    wrapped = [
        line
        for paragraph in pane.text.split("\n")
        for line in textwrap.wrap(paragraph, width) or [""]
    ]
    wait_s = pane.wait_s(now)
    is_waiting = wait_s > LONG_WAIT_S and not is_over
    shown = Text("\n".join(wrapped[-height:]), no_wrap=True)
    if not is_over:
        shown.append("▌", style="bold red" if is_waiting else "bold green")
    missing = height - min(len(wrapped), height)
    shown.append("\n" * missing)
    return Panel(
        Group(shown, Text(""), *_figures(pane, now, width, is_waiting=is_waiting, is_over=is_over)),
        title=pane.title,
        border_style="red" if is_waiting else "green",
    )


def _figures(pane: Pane, now: float, width: int, *, is_waiting: bool, is_over: bool) -> list[Text]:
    if pane.note:
        return [Text(pane.note, style="red"), Text("")]
    share = pane.share(now, is_over=is_over)
    bar = min(BAR_COLUMNS, max(width - FIGURES_COLUMNS, 4))
    filled = round(share * bar) or (1 if share > 0 else 0)
    waited = Text.assemble(
        "waited ",
        (f"{pane.waited_s(now):5.1f} s", "bold"),
        " ",
        ("█" * filled, "red"),
        ("░" * (bar - filled), "dim"),
        f" {100 * share:3.0f} %",
        no_wrap=True,
    )
    if is_waiting:
        state = Text(
            f"waiting for {pane.wait_s(now):.1f} s, {pane.behind(now)} tokens behind", "bold red"
        )
    else:
        state = Text(
            f"{len(pane.came_s)} tokens, longest wait {pane.longest_s(now):.1f} s", "green"
        )
    state.no_wrap = True
    return [waited, state]
