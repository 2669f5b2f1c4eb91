"""Cells: one network and one token source each, and one answer over one of them, measured."""

import random
from dataclasses import dataclass

from eloquent_netem.lab.answer import LabPath, send_answer
from eloquent_netem.lab.measures import StallMeasures, measure_stalls
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import GilbertElliott, IndependentLoss, Loss, NoLoss, Outages

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
    "IPv4 and UDP (or TCP) headers included, from the first token's generation on."


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


def cell_path(cell: Cell, seed: int) -> LabPath:
    """Return a new path for one answer in this cell: the same network for every scheme."""
    losses = {name: CellLoss(cell, seed, name) for name in ("up", "down")}
    links = {
        name: Link(
            delay_s=cell.rtt_s / 2,
            seed=seed,
            name=name,
            loss=loss,
            jitter_s=cell.jitter_s,
            reorders=cell.jitter_s > 0,
            duplicates=cell.duplicates,
        )
        for name, loss in losses.items()
    }

    def start_outages(now: float) -> None:
        for loss in losses.values():
            loss.start_outages(now)

    return LabPath(
        up=links["up"],
        down=links["down"],
        base_delay_s=cell.rtt_s / 2,
        passes_from=losses["down"].passes_from,
        on_start=start_outages,
    )


def run_cell(cell: Cell, scheme: str, seed: int) -> Run:
    """Send one answer in virtual time and measure it.

    Raises:
        DeliveryError: the text did not arrive whole, in order and once.
        TcpError: the same, over the TCP model.
        StuckError: it did not arrive at all.
    """
    path = cell_path(cell, seed)
    answer = send_answer(
        path,
        "retransmit" if scheme == ORACLE else scheme,
        tokens=cell.tokens,
        tokens_per_s=cell.tokens_per_s,
    )
    rendered_s = answer.rendered_s
    if scheme == ORACLE:
        rendered_s = oracle_times(path, answer.generated_s)
    measures = measure_stalls(answer.generated_s, rendered_s, path.base_delay_s)
    return Run(cell, scheme, seed, measures, answer.downlink_packets, answer.downlink_bytes)


def oracle_times(path: LabPath, generated_s: list[float]) -> list[float]:
    """Return when the tokens would arrive if each left at the first instant that lets it pass."""
    return [path.passes_from(time) + path.base_delay_s for time in generated_s]
