"""Whether SwiftQueue's online fine-tuning pays, on networks unlike any that it was trained on.

Run `python -m eloquent_netem.lab.swiftqueue_shift FOLDER`: it collects flows over `SHIFTED` into
the folder (once), and replays each as a server would live it: forecasts are made as feedback comes,
for the time of the next packets, and corrected or not by what became of the packets before.
"""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eloquent.swiftqueue.dataset import Entry, Manifest, is_change
from eloquent.swiftqueue.forecaster import Forecaster, Outlook
from eloquent.swiftqueue.inference import SHIPPED, Model, Predictor
from eloquent.swiftqueue.records import Flow, Observation, Queue
from eloquent.swiftqueue.shape import LEVELS
from eloquent.swiftqueue.tuning import TuningBudget
from eloquent_netem.lab.findings import Sheet
from eloquent_netem.lab.rows import Place
from eloquent_netem.lab.swiftqueue_collect import MANIFEST, collect, held_out_jobs
from eloquent_netem.lab.swiftqueue_places import bursts, cubic, place_of, prague, prague_web, web
from eloquent_netem.rate import MS_PER_S
from eloquent_netem.scenario_parts import CellularRateSpec

SHIFTED: Mapping[str, Place] = {
    place.name: place
    for place in (
        place_of("slow bulk", 1.5, 250, prague_web(2), cubic()),
        place_of("slow bursts", 2, 150, bursts(5, 400, 2500)),
        place_of("far bursts", 8, 400, bursts(20, 400, 2000), prague()),
        place_of(
            "long stalls",
            CellularRateSpec(mean_mbit_s=2, stall_share=0.06, stall_ms=1500),
            150,
            prague_web(1),
            web(2),
        ),
        place_of("close and fast", 100, 4, bursts(220, 40, 400)),
    )
}
"Round trips, rates or stalls of each lie outside of what the scenario families draw from."

FIRST_SEED = 101
US_PER_S = 1e6
ALL = "all"
HEADER = (
    "network",
    "tuned",
    "pinball 0.5 ms",
    "0.9",
    "0.99",
    "median's error ms",
    "on changes",
    "below 0.9 %",
    "below 0.99 %",
    "us a packet",
    "resets",
    "packets",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftRow:
    """The forecasts of one network's flows; each packet counts of whose queue one was made."""

    network: str
    "Or `all`."
    is_tuned: bool
    pinball_50_ms: float
    pinball_90_ms: float
    pinball_99_ms: float
    "Mean pinball loss of the quantiles."
    mae_ms: float
    "Mean absolute error of the median,"
    mae_change_ms: float | None
    "and that over changes (`eloquent.swiftqueue.dataset.is_change`)."
    below_90: float
    below_99: float
    "The share of delays that were not above the quantile."
    cpu_us: float
    "A packet's share of all that forecasting took."
    resets: int
    packets: int
    changes: int
    flows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What was foretold of a flow's n packets in the queues they went into; NaN: nothing."""

    quantiles_s: NDArray[np.float32]
    "(n, 3)."
    true_s: NDArray[np.float32]
    "(n,): the queueing delay."
    last_s: NDArray[np.float32]
    "(n,): the one last known then."
    cpu_s: float
    resets: int


def replayed(model: Model, flow: Flow, *, is_tuned: bool) -> Replayed:
    """Let a forecaster live through a flow."""
    forecaster = Forecaster(Predictor(model), TuningBudget() if is_tuned else None)
    outlook = forecaster.open()
    count = len(flow.sent_s)
    quantiles_s = np.full((count, len(LEVELS)), np.nan, np.float32)
    base_s, last_s = np.full(count, np.nan), np.full(count, np.nan)
    news = _news(flow)
    sent, sizes, queues = flow.sent_s.tolist(), flow.size.tolist(), flow.queue.tolist()
    heard = 0
    begun_s = time.thread_time()
    for row in range(count):
        while heard < len(news) and news[heard][0] <= sent[row]:
            known_s, seen = news[heard]
            for one in seen:
                outlook.on_observation(one)
            forecaster.settle(known_s)
            heard += 1
        queue = Queue(queues[row])
        forecast = outlook.forecast(sent[row])
        if forecast is not None:
            quantiles_s[row] = forecast.delay_s[queue]
        base_s[row], last_s[row] = outlook.history.base_s, outlook.history.last_s(queue)
        outlook.on_sent(row, sent[row], sizes[row], queue)
    cpu_s = time.thread_time() - begun_s
    delay_s = flow.delay_s[np.arange(count), flow.queue]
    return Replayed(
        quantiles_s=quantiles_s,
        true_s=np.maximum(delay_s - base_s, 0.0).astype(np.float32),
        last_s=np.maximum(last_s - base_s, 0.0).astype(np.float32),
        cpu_s=cpu_s,
        resets=_resets(outlook),
    )


def _resets(outlook: Outlook) -> int:
    return 0 if outlook.tuning is None else outlook.tuning.resets


def _news(flow: Flow) -> list[tuple[float, list[Observation]]]:
    """Return what the sender learnt, and when: what came at once, together."""
    order = np.argsort(flow.known_s, kind="stable")
    order = order[np.isfinite(flow.known_s[order])]
    queues = flow.queue[order]
    columns = (
        order.tolist(),
        flow.sent_s[order].tolist(),
        flow.size[order].tolist(),
        [Queue(queue) for queue in queues.tolist()],
        flow.delay_s[order, queues].tolist(),
        flow.known_s[order].tolist(),
    )
    seen = [Observation(*row) for row in zip(*columns, strict=True)]
    return [(known_s, list(group)) for known_s, group in groupby(seen, lambda one: one.known_s)]


def evaluate(model: Model, entries: Sequence[Entry]) -> list[ShiftRow]:
    """Judge a model on flows, frozen and tuned: two rows for each family, and two for all.

    Raises:
        DatasetError: a flow cannot be read.
    """
    found: dict[tuple[str, bool], list[Replayed]] = {}
    for entry in entries:
        flow = entry.load()
        for is_tuned in (False, True):
            one = replayed(model, flow, is_tuned=is_tuned)
            for network in (entry.family, ALL):
                found.setdefault((network, is_tuned), []).append(one)
    return [_row(network, is_tuned, ones) for (network, is_tuned), ones in sorted(found.items())]


def _row(network: str, is_tuned: bool, ones: Sequence[Replayed]) -> ShiftRow:
    quantiles_s = np.concatenate([one.quantiles_s for one in ones]).astype(np.float64)
    true_s = np.concatenate([one.true_s for one in ones])
    changed = is_change(true_s, np.concatenate([one.last_s for one in ones]))
    judged = np.isfinite(true_s) & np.isfinite(quantiles_s[:, -1])
    error_ms = MS_PER_S * (true_s[judged, None] - quantiles_s[judged])
    levels = np.array(LEVELS)
    pinball_ms = np.maximum(levels * error_ms, (levels - 1) * error_ms).mean(axis=0)
    below = np.mean(error_ms <= 0, axis=0)
    of_median_ms, changed = np.abs(error_ms[:, 0]), changed[judged]
    return ShiftRow(
        network=network,
        is_tuned=is_tuned,
        pinball_50_ms=float(pinball_ms[0]),
        pinball_90_ms=float(pinball_ms[1]),
        pinball_99_ms=float(pinball_ms[2]),
        mae_ms=float(of_median_ms.mean()),
        mae_change_ms=float(of_median_ms[changed].mean()) if changed.any() else None,
        below_90=float(below[1]),
        below_99=float(below[2]),
        cpu_us=US_PER_S * sum(one.cpu_s for one in ones) / len(true_s),
        resets=sum(one.resets for one in ones),
        packets=int(judged.sum()),
        changes=int(changed.sum()),
        flows=len(ones),
    )


def sheet(rows: Iterable[ShiftRow]) -> Sheet:
    """Return the table."""
    lines = []
    for row in rows:
        change = "—" if row.mae_change_ms is None else f"{row.mae_change_ms:.2f}"
        losses = row.pinball_50_ms, row.pinball_90_ms, row.pinball_99_ms, row.mae_ms
        lines.append(
            (
                row.network,
                "yes" if row.is_tuned else "no",
                *(f"{loss:.3f}" for loss in losses),
                change,
                f"{100 * row.below_90:.1f}",
                f"{100 * row.below_99:.2f}",
                f"{row.cpu_us:.0f}",
                str(row.resets),
                str(row.packets),
            )
        )
    return Sheet("Forecasts, frozen and tuned online", HEADER, tuple(lines))


def shifted_data(folder: Path, *, flows: int, workers: int | None = None) -> None:
    """Collect so many flows over each of `SHIFTED`."""
    networks = {name: [place] for name, place in SHIFTED.items()}
    folder.mkdir(parents=True, exist_ok=True)
    jobs = held_out_jobs(networks, folder, flows=flows, seed=FIRST_SEED)
    collect(jobs, folder, workers=workers, command=" ".join(sys.argv))


def main(
    folder: Path,
    *,
    weights: Path = SHIPPED,
    flows: int = 4,
    split: str = "test",
    json: Path | None = None,
    workers: int | None = None,
) -> None:
    """Print how good forecasts are with online fine-tuning and without.

    Parameters
    ----------
    folder
        Flows to judge; if it has none, they are collected there over networks out of range.
    weights
        The model; by default the one that is shipped.
    flows
        To be collected over each network.
    split
        Of the folder's flows those for this.
    json
        A file for the rows.
    workers
        Processes to collect with; by default one for each processor.
    """
    from json import dumps

    from rich.console import Console

    from eloquent_netem.lab.swiftqueue_study import terminal

    if not (folder / MANIFEST).exists():
        shifted_data(folder, flows=flows, workers=workers)
    rows = evaluate(Model.load(weights), Manifest.load(folder).of(split))
    if json is not None:
        json.write_text(dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    Console(width=160).print(terminal(sheet(rows)))


if __name__ == "__main__":
    from cyclopts import run

    run(main)
