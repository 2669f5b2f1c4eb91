"""How figures look: a colour, marker and dash for each scheme, and themes for light and dark.

The hues are those of Okabe and Ito, as far as these go, which people with any kind of colour vision
tell apart; in the dark theme they are lighter. Markers and dashes differ too, so that no figure
hangs on colour.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from eloquent.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150

LEGEND_INCHES = 1.45
"Roughly what an entry of a legend takes."

Dash = Literal["-", "--", "-.", ":"]


@dataclass(frozen=True, slots=True)
class Theme:
    """The colours of a figure but those of the schemes."""

    background: str
    ink: str
    muted: str
    grid: str


LIGHT = Theme("#ffffff", "#1c1e21", "#5d636b", "#e3e6ea")
DARK = Theme("#16181c", "#e8eaed", "#a0a7b0", "#30353c")


@dataclass(frozen=True, slots=True)
class Style:
    """One scheme's, in every figure."""

    label: str
    light: str
    dark: str
    marker: str
    dash: Dash = "-"

    def colour(self, theme: Theme) -> str:
        """Return the colour in this theme."""
        return self.dark if theme is DARK else self.light


STYLES = {
    "eloquent": Style("Eloquent", "#0063a6", "#5ab4ff", "o"),
    "eloquent-queued": Style("Eloquent, queued", "#4aa8dd", "#9ad7ff", "s", "--"),
    "duplicate": Style("duplicate", "#00855f", "#2fd3a4", "^"),
    "retransmit": Style("retransmit", "#c98500", "#f2b632", "v"),
    "quic-stream": Style("QUIC stream", "#b05a8c", "#e79cc6", "D", "-."),
    "tcp": Style("TCP (model)", "#c44700", "#ff8652", "X", "--"),
    "tcp-reno": Style("TCP Reno (model)", "#6f5ab8", "#b5a6f2", "h", "-."),
    "tcp-sse": Style("TCP, SSE", "#c44700", "#ff8652", "P"),
    "tcp-websocket": Style("TCP, WebSocket", "#6b4a2f", "#cfa887", "p", "--"),
    "oracle": Style("oracle (bound)", "#767676", "#9a9a9a", "_", ":"),
}
"In the order of every legend and table."

UNKNOWN = Style("", "#767676", "#9a9a9a", "*", ":")


def check_can_draw() -> None:
    """Find out before the work whether figures can be drawn.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigurationError(
            "Figures need matplotlib, which is not installed: pip install 'eloquent-stream[lab]'."
        )


def style_of(scheme: str) -> Style:
    """Return the scheme's style; one that is not known here is grey, under its own name."""
    known = STYLES.get(scheme)
    return known if known is not None else replace(UNKNOWN, label=scheme)


def colour_of(scheme: str, theme: Theme) -> str:
    """Return the scheme's colour in this theme."""
    return style_of(scheme).colour(theme)


def draw_legend(
    figure: "Figure",
    styles: Iterable[Style],
    theme: Theme,
    *,
    has_markers: bool = True,
    has_lines: bool = True,
) -> None:
    """Draw a legend above a figure, in as many columns as it has room for."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=style.colour(theme),
            marker=style.marker if has_markers else "",
            linestyle=style.dash if has_lines else "none",
            markeredgewidth=1.6 if style.marker == "_" else 0,
            label=style.label,
        )
        for style in styles
    ]
    columns = max(2, int(figure.get_figwidth() / LEGEND_INCHES))
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=min(len(handles), columns),
        columnspacing=1.4,
        handletextpad=0.5,
    )


def in_order(schemes: Iterable[str]) -> list[str]:
    """Return the schemes without repetition, as legends and tables have them."""
    names = list(STYLES)
    return sorted(set(schemes), key=lambda name: (names.index(name) if name in names else 99, name))


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """Let figures made within have this theme."""
    import matplotlib as mpl

    mpl.use("Agg")
    settings: Any = _settings(theme)  # Its keys are strings to all but matplotlib's own types.
    with mpl.rc_context(settings):
        yield


def _settings(theme: Theme) -> dict[str, Any]:
    return {
        "figure.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 9,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.8,
        "lines.markersize": 5.5,
        "font.family": "DejaVu Sans",
        "svg.hashsalt": "eloquent",
    }
