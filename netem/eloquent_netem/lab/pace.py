"""What the pacer does for the eye and what it costs: `eloquent lab pace`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import get_args

from eloquent.core.events import Event, TextDelta
from eloquent.core.pacer import PaceMode, Pacer
from eloquent_netem.lab.answer import send_answer
from eloquent_netem.lab.cells import Cell, cell_path
from eloquent_netem.lab.measures import quantile

TEXT = "four"
"Each token's text: four characters, which is about the mean of English ones."

CELLS = (
    Cell(rtt_s=0.1, tokens_per_s=30),
    Cell(rtt_s=0.1, tokens_per_s=30, loss=0.10),
    Cell(rtt_s=0.1, tokens_per_s=30, loss=0.10, burst_s=0.15),
    Cell(rtt_s=0.3, tokens_per_s=50, loss=0.10, burst_s=0.15),
)


@dataclass(frozen=True, slots=True)
class Evenness:
    """One answer as the eye sees it; times in seconds."""

    gap_p99_s: float
    "Between one showing of text and the next."
    largest_piece: int
    "Characters shown at once, at most."
    added_delay_mean_s: float
    added_delay_max_s: float


def evenness(arrivals_s: Sequence[float], mode: PaceMode) -> Evenness:
    """Show tokens that arrive at the given times (in order) at a pace, in virtual time."""
    pacer = Pacer(mode)
    shown: list[tuple[float, int]] = []

    def show(now: float) -> None:
        texts = [event.text for event in pacer.pop(now) if isinstance(event, TextDelta)]
        if texts:
            shown.append((now, sum(map(len, texts))))

    def show_until(end_s: float) -> None:
        while (due := pacer.next_time()) is not None and due < end_s:
            show(due)

    for now in arrivals_s:
        show_until(now)
        token: Event = TextDelta(TEXT)
        pacer.push(now, (token,))
    show_until(float("inf"))
    gaps = sorted(later - earlier for (earlier, _), (later, _) in pairwise(shown))
    return Evenness(
        gap_p99_s=quantile(gaps, 0.99),
        largest_piece=max(size for _, size in shown),
        added_delay_mean_s=pacer.stats.added_delay_mean_s,
        added_delay_max_s=pacer.stats.added_delay_max_s,
    )


def table(seeds: int, tokens: int) -> str:
    """Return the table in Markdown: means over the seeds, the longest delay of all of them."""
    rows = [
        "| round trip, rate, loss | pace | gap p99 | largest piece | added delay: mean | longest |",
        "|---|---|---|---|---|---|",
    ]
    for cell in CELLS:
        answers = [
            send_answer(cell_path(cell, seed), "eloquent", replace(cell, tokens=tokens).plan)
            for seed in range(seeds)
        ]
        for mode in get_args(PaceMode):
            seen = [evenness(answer.rendered_s, mode) for answer in answers]
            rows.append(
                f"| {_title(cell)} | {mode} | {_ms(fmean(one.gap_p99_s for one in seen))} "
                f"| {fmean(one.largest_piece for one in seen):.0f} characters "
                f"| {_ms(fmean(one.added_delay_mean_s for one in seen))} "
                f"| {_ms(max(one.added_delay_max_s for one in seen))} |"
            )
    return "\n".join(rows)


def _title(cell: Cell) -> str:
    bursts = "" if cell.burst_s is None else f" in bursts of {1000 * cell.burst_s:g} ms"
    loss = f"{100 * cell.loss:g} %{bursts}"
    return f"{1000 * cell.rtt_s:g} ms, {cell.tokens_per_s:g} tokens/s, {loss}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"
