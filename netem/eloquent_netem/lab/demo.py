"""`eloquent lab demo`: one answer, streamed live over TCP and over Eloquent, side by side."""

import contextlib
import math
import queue
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from eloquent.errors import ConfigurationError
from eloquent_netem.errors import NetemError
from eloquent_netem.lab.demo_panes import Pane
from eloquent_netem.lab.measures import DeliveryError
from eloquent_netem.lab.places import NetworkOptions, make_places
from eloquent_netem.lab.rows import Place
from eloquent_netem.lab.simulated import SimDriver
from eloquent_netem.lab.sources import Recording
from eloquent_netem.scenario_parts import SpansSpec
from eloquent_netem.sim import StuckError

OURS, TCP_MODEL = "eloquent", "tcp"
TITLES = {
    "tcp-sse": "TCP: server-sent events, as chats have it",
    TCP_MODEL: "TCP (a model of Linux's)",
    OURS: "Eloquent",
}


@dataclass(frozen=True, slots=True)
class News:
    """Something that happened in a pane; `text` None: a token was generated."""

    pane: int
    time_s: float
    "On the clock of `time.monotonic`."
    text: str | None


class Feed(ABC):
    """Where a demo's news come from; a context manager's gift."""

    def __init__(self, how: str, schemes: Sequence[str]) -> None:
        self.how = how
        "How they are made, for the screen."
        self.schemes = schemes
        self.news: queue.SimpleQueue[News] = queue.SimpleQueue()

    @abstractmethod
    def begin(self) -> None:
        """Begin to send."""

    @abstractmethod
    def is_over(self) -> bool:
        """Return whether nothing more will come."""

    def failure(self, pane: int) -> str:
        """Return what ended a pane's answer before its time, or nothing."""
        return ""


def make_place(
    *, rtt_ms: float, loss: float, burst_ms: float | None, outage: tuple[float, ...]
) -> Place:
    """Return the network; `outage` is when it is away, [from, to] in seconds of its clock.

    Raises:
        ConfigurationError: a figure is impossible, or an outage has no end.
    """
    (place,) = make_places(NetworkOptions(loss=loss, burst_ms=burst_ms, rtt_ms=rtt_ms))
    if not outage:
        return place
    if len(outage) != 2 or not 0 <= outage[0] < outage[1] < math.inf:
        raise ConfigurationError(
            "--outage takes two numbers, when the network goes and when it is back, in seconds "
            "after the beginning: --outage 3 5."
        )
    spans = SpansSpec(spans_s=((outage[0], outage[1]),), effect="drop")
    name = f"{place.name}, none from {outage[0]:g} to {outage[1]:g} s"
    return replace(place, name=name, scenario=replace(place.scenario, outages=(spans,)))


@contextlib.contextmanager
def replayed(place: Place, source: Recording, seed: int) -> Iterator[Feed]:
    """Give a feed that was made in virtual time and is shown at its real speed.

    Raises:
        ConfigurationError: no answer ever arrives over this network.
    """
    try:
        feed = _Replay(place, source, seed)
    except (DeliveryError, NetemError, StuckError) as error:
        raise ConfigurationError(
            f"An answer does not arrive over this network ({error}): lower --loss, or let --outage "
            "be shorter."
        ) from error
    yield feed


class _Replay(Feed):
    def __init__(self, place: Place, source: Recording, seed: int) -> None:
        super().__init__("made in virtual time, shown at real speed", (TCP_MODEL, OURS))
        self._texts = [token.text for token in source.plan(seed)]
        runs = [SimDriver().run(place, scheme, seed, source) for scheme in self.schemes]
        self._due = [
            [time_s + run.base_delay_s - run.requested_s for time_s in run.generated_s]
            for run in runs
        ]
        self._came = [[time_s - run.requested_s for time_s in run.rendered_s] for run in runs]
        self._end_s = max(came[-1] for came in self._came)
        self._begun_s = 0.0

    def begin(self) -> None:
        self._begun_s = time.monotonic()
        for pane, (due, came) in enumerate(zip(self._due, self._came, strict=True)):
            news = [News(pane, self._begun_s + at_s, None) for at_s in due]
            news += [
                News(pane, self._begun_s + at_s, text)
                for at_s, text in zip(came, self._texts, strict=True)
            ]
            # Stable: what comes without delay is due first.
            for item in sorted(news, key=lambda item: item.time_s):
                self.news.put(item)

    def is_over(self) -> bool:
        return time.monotonic() >= self._begun_s + self._end_s


def take(feed: Feed, panes: Sequence[Pane], waiting: list[News], now: float) -> None:
    """Bring what has happened by `now` to the panes; `waiting` keeps what is still to come."""
    with contextlib.suppress(queue.Empty):
        while True:
            waiting.append(feed.news.get_nowait())
    waiting.sort(key=lambda item: (item.time_s, item.text is not None))
    ready = sum(item.time_s <= now for item in waiting)
    for item in waiting[:ready]:
        pane = panes[item.pane]
        if item.text is None:
            pane.on_due(item.time_s)
        else:
            pane.on_token(item.time_s, item.text)
    del waiting[:ready]
