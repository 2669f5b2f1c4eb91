"""One answer over one emulated path with one scheme: when was each token generated and seen?"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from eloquent.core.events import TextDelta
from eloquent.core.log import TokenLog
from eloquent.core.schemes import scheme as find_scheme
from eloquent.quic.connection import (
    Connected,
    ConnectionEvent,
    ConnectionIdChanged,
    TurnProgress,
    TurnRequested,
)
from eloquent_netem.lab.measures import DeliveryError, StallMeasures, measure_stalls
from eloquent_netem.lab.pair import QuicPair
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import GilbertElliott, IndependentLoss, Loss, NoLoss, Outages
from eloquent_netem.sim import simulate

START_S = 1.0
"Virtual time starts here: aioquic takes 0 for 'never'."

LIMIT_S = 600.0
TOKEN_TEXT_CHARS = 10
"With an event's two bytes of header a token takes 12 bytes of the log."

ORACLE = "oracle"
"Not a scheme: the link's own bound (`Loss.passes_from`)."


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One network and one token source."""

    rtt_s: float
    tokens_per_s: float
    loss: float = 0.0
    "Mean share of packets lost, each way."
    burst_s: float | None = None
    "Mean length of the bursts in which they are lost; None: each is lost independently."
    tokens: int = 400
    jitter_s: float = 0.0
    "Uniform extra delay, which reorders packets."
    duplicates: float = 0.0
    outages_s: tuple[tuple[float, float], ...] = ()
    "Spans without any link, counted from the first token's generation; both ways."


@dataclass(frozen=True, slots=True)
class Run:
    """One cell, scheme and seed."""

    cell: Cell
    scheme: str
    seed: int
    measures: StallMeasures
    downlink_packets: int
    downlink_bytes: int
    "IPv4 and UDP headers included, from the first token's generation on."


class CellLoss:
    """A cell's loss on one link; outages begin to count when the first token is generated."""

    def __init__(self, cell: Cell, seed: int, name: str) -> None:
        self._cell = cell
        self._loss = _steady_loss(cell, stage_rng(seed, name, "loss"))

    def start_outages(self, origin_s: float) -> None:
        """Let the cell's outages count from `origin_s` on."""
        spans = [(origin_s + start, origin_s + stop) for start, stop in self._cell.outages_s]
        self._loss = Outages(spans, self._loss)

    def drops(self, now: float) -> bool:
        """See `Loss.drops`."""
        return self._loss.drops(now)

    def passes_from(self, now: float) -> float:
        """See `Loss.passes_from`."""
        return self._loss.passes_from(now)


def _steady_loss(cell: Cell, rng: random.Random) -> Loss:
    if not cell.loss:
        return NoLoss()
    if cell.burst_s is None:
        return IndependentLoss(cell.loss, rng)
    return GilbertElliott(loss=cell.loss, burst_s=cell.burst_s, rng=rng)


class _Experiment:
    """A client that asks, a server that generates at a fixed rate, and what the client sees."""

    def __init__(self, cell: Cell, scheme: str, seed: int) -> None:
        self._cell = cell
        self._losses = {name: CellLoss(cell, seed, name) for name in ("up", "down")}
        links = {
            name: Link(
                delay_s=cell.rtt_s / 2,
                seed=seed,
                name=name,
                loss=self._losses[name],
                jitter_s=cell.jitter_s,
                reorders=cell.jitter_s > 0,
                duplicates=cell.duplicates,
            )
            for name in ("up", "down")
        }
        self._down = links["down"]
        self._log = TokenLog()
        self._turn = -1
        self._token_at: float | None = None
        self._before = (0, 0)
        self.generated_s: list[float] = []
        self.rendered_s: list[float] = []
        self.texts: list[str] = []
        self.is_done = False
        self.pair = QuicPair(
            up=links["up"],
            down=links["down"],
            make_sender=find_scheme(scheme),
            on_client_event=self._on_client_event,
            on_server_event=self._on_server_event,
        )

    @property
    def downlink(self) -> tuple[int, int]:
        """Packets and bytes sent down since the first token's generation."""
        packets, sent_bytes = self._before
        return self._down.packets_sent - packets, self._down.bytes_sent - sent_bytes

    def passes_from(self, now: float) -> float:
        return self._losses["down"].passes_from(now)

    def next_time(self) -> float | None:
        return self._token_at

    def act(self, now: float) -> None:
        index = len(self.generated_s)
        self.generated_s.append(now)
        self._log.append(TextDelta(token_text(index)))
        if index + 1 < self._cell.tokens:
            self._token_at = self.generated_s[0] + (index + 1) / self._cell.tokens_per_s
        else:
            self._token_at = None
            self._log.close("stop", model="lab", prompt_tokens=0, completion_tokens=index + 1)
        self.pair.server.log_grew(self._turn, now)
        self.pair.flush(now)

    def _on_client_event(self, event: ConnectionEvent, now: float) -> None:
        if isinstance(event, Connected):
            self.pair.request(b"{}", now)
        elif isinstance(event, TurnProgress):
            texts = [item.text for item in event.events if isinstance(item, TextDelta)]
            self.texts += texts
            self.rendered_s += [now] * len(texts)
            self.is_done = len(texts) < len(event.events)
        elif not isinstance(event, ConnectionIdChanged):
            raise DeliveryError(f"The client's connection reports {event}.")

    def _on_server_event(self, event: ConnectionEvent, now: float) -> None:
        if isinstance(event, ConnectionIdChanged):
            return
        if not isinstance(event, TurnRequested):
            raise DeliveryError(f"The server's connection reports {event}.")
        self._turn = event.turn
        self.pair.accept(event.turn, self._log)
        for loss in self._losses.values():
            loss.start_outages(now)
        self._before = (self._down.packets_sent, self._down.bytes_sent)
        self._token_at = now


def token_text(index: int) -> str:
    """Return token `index` of the synthetic answer: distinct, of `TOKEN_TEXT_CHARS`."""
    return f"{index:0{TOKEN_TEXT_CHARS - 1}d} "


def run_cell(cell: Cell, scheme: str, seed: int) -> Run:
    """Send one answer in virtual time and measure it.

    Raises:
        DeliveryError: the text did not arrive whole, in order and once.
        StuckError: it did not arrive at all.
    """
    experiment = _Experiment(cell, "retransmit" if scheme == ORACLE else scheme, seed)
    experiment.pair.connect(START_S)
    simulate(
        (experiment, *experiment.pair.actors),
        until=lambda: experiment.is_done,
        start_s=START_S,
        limit_s=START_S + LIMIT_S,
    )
    if experiment.texts != [token_text(index) for index in range(cell.tokens)]:
        raise DeliveryError(
            f"Scheme {scheme}, seed {seed}: the text that arrived is not the text that was sent."
        )
    base_s = cell.rtt_s / 2
    rendered_s: Sequence[float] = experiment.rendered_s
    if scheme == ORACLE:
        rendered_s = [experiment.passes_from(time) + base_s for time in experiment.generated_s]
    packets, sent_bytes = experiment.downlink
    measures = measure_stalls(experiment.generated_s, rendered_s, base_s)
    return Run(cell, scheme, seed, measures, packets, sent_bytes)
