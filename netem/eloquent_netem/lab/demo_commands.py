"""The subcommand `eloquent lab demo`."""

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from eloquent.errors import ConfigurationError
from eloquent_netem.errors import NetemError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from eloquent_netem.lab.demo import Feed
    from eloquent_netem.lab.rows import Place
    from eloquent_netem.lab.sources import Recording

FRAMES_PER_S = 20
LINGER_S = 1.5
"The last picture stays for so long."


def demo(
    *,
    loss: float = 0.10,
    burst_ms: float | None = None,
    rtt_ms: float = 100.0,
    outage: Annotated[
        tuple[float, ...], Parameter(consume_multiple=True, negative=(), show_default=False)
    ] = (),
    seed: int = 0,
    tokens: int | None = None,
    virtual: bool = False,
) -> None:
    """Stream one answer through one bad network twice, side by side: over TCP, and by Eloquent.

    Below each pane: how long its reader has waited for tokens that were due. Where namespaces can
    be made (Linux; root or user namespaces) all is live: kernel TCP, TLS and HTTP on the left.
    Elsewhere the left one is a model of TCP, both are run in virtual time and shown at real speed.

    Parameters
    ----------
    loss
        Mean share of packets lost each way, 0 to below 1.
    burst_ms
        Lose them in bursts of this mean length, at the same instants for both.
    rtt_ms
        Round trip without queues.
    outage
        When there is no network at all: from and to, in seconds after the beginning.
    seed
        Another seed loses other packets.
    tokens
        So many of the recorded answer's tokens; by default all.
    virtual
        Do not try namespaces.
    """
    from rich.console import Console

    from eloquent_netem.lab.demo import make_place
    from eloquent_netem.lab.sources import Recording
    from eloquent_netem.run import sigterm_as_exit

    if tokens is not None and tokens < 1:
        raise ConfigurationError("--tokens must be at least 1.")
    place = make_place(rtt_ms=rtt_ms, loss=loss, burst_ms=burst_ms, outage=outage)
    console = Console()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(sigterm_as_exit())
            feed = _feed(stack, place, Recording(None, tokens), seed, is_virtual=virtual)
            _show(feed, console, place.name)
    except NetemError as error:  # At its end the router tells that it was late.
        raise ConfigurationError(str(error)) from error


def _feed(
    stack: contextlib.ExitStack, place: "Place", source: "Recording", seed: int, *, is_virtual: bool
) -> "Feed":
    from eloquent_netem.lab.demo import replayed

    if not is_virtual:
        try:
            from eloquent_netem.lab.demo_live import over_tun

            return stack.enter_context(over_tun(place, source, seed))
        except (NetemError, ImportError) as error:
            print(f"Not live: {error}", file=sys.stderr)  # noqa: T201
    return stack.enter_context(replayed(place, source, seed))


def _show(feed: "Feed", console: "Console", network: str) -> None:
    from rich.live import Live

    from eloquent_netem.lab.demo import TITLES, News, take
    from eloquent_netem.lab.demo_panes import Pane, screen

    panes = [Pane(TITLES[scheme]) for scheme in feed.schemes]
    waiting: list[News] = []
    is_over = False

    def picture() -> "RenderableType":
        return screen(
            panes,
            time.monotonic(),
            header=network,
            footer=f"{feed.how}; Ctrl-C ends it",
            lines=console.height,
            columns=console.width,
            is_over=is_over,
        )

    live = Live(console=console, screen=True, auto_refresh=False)
    with (
        contextlib.suppress(KeyboardInterrupt),
        live if console.is_terminal else contextlib.nullcontext(),
    ):
        feed.begin()
        while not is_over:
            time.sleep(1 / FRAMES_PER_S)
            # The state is read first: what came before the end is in the queue by then.
            is_done = feed.is_over()
            take(feed, panes, waiting, time.monotonic())
            for index, pane in enumerate(panes):
                pane.note = feed.failure(index)
            is_over = is_done and not waiting
            if console.is_terminal:
                live.update(picture(), refresh=True)
        if console.is_terminal:
            time.sleep(LINGER_S)
    now = time.monotonic()
    for pane in panes:
        console.print(
            f"{pane.title}: {len(pane.came_s)} tokens, waited {pane.waited_s(now):.1f} s "
            f"({100 * pane.share(now, is_over=is_over):.0f} % of the time), longest wait "
            f"{pane.longest_s(now):.1f} s"
        )
        if pane.note:
            console.print(pane.note, style="red", markup=False)
    console.print(f"[dim]{network}; {feed.how}[/dim]")
