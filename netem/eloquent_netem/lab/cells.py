"""Cells of the transport's grid: one synthetic network and one token rate each."""

import random
from dataclasses import dataclass

from eloquent_netem.lab.answer import LabPath
from eloquent_netem.lab.sources import ConstantRate, Token
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import GilbertElliott, IndependentLoss, Loss, NoLoss, Outages


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
    outages_s: tuple[tuple[float, float], ...] = ()
    "Spans without any link, counted from the first token's generation; both ways."

    @property
    def plan(self) -> tuple[Token, ...]:
        """The answer's tokens, the same for every seed."""
        return ConstantRate(self.tokens_per_s, self.tokens).plan(0)


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


def oracle_times(path: LabPath, generated_s: list[float]) -> list[float]:
    """Return when the tokens would arrive if each left at the first instant that lets it pass."""
    return [path.passes_from(time) + path.base_delay_s for time in generated_s]
