"""Training of the predictor, from a folder of flows to the weights that are shipped."""

import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eloquent.errors import ConfigurationError
from eloquent.swiftqueue.batches import Batch, Piece, Pieces
from eloquent.swiftqueue.dataset import Entry, Manifest, Replay, SplitError, prepared
from eloquent.swiftqueue.features import (
    EVENT_FEATURES,
    EVENT_NAMES,
    QUERY_FEATURES,
    QUERY_NAMES,
)
from eloquent.swiftqueue.model import (
    POINT,
    Losses,
    Predictor,
    losses,
    quantiles,
    save_weights,
    to_seconds,
)
from eloquent.swiftqueue.shape import LEVELS, Shape

MAX_PARAMETERS = 100_000
WARM_UP = 0.04
"Share of the steps in which the learning rate rises."
TRAINING_SHARE = 0.95
"Of the time left, what steps get; the rest is for looks at the validation families."
LEAST_RATE = 0.01
"Of the learning rate, at the end."
MAX_GRADIENT = 1.0
VALIDATION_PIECES = 256
"So many are looked at, evenly over all."


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a training run is made of; with the same ones, a CPU makes the same weights."""

    data: Path
    "The folder of flows, with its manifest.json."
    out: Path
    "Where the weights go (.safetensors); the .json that describes them goes beside it."
    cache: Path
    "Where replays of flows are kept; some 250 bytes a packet."
    curves: Path | None = None
    "A folder for curves.json, and curves.png where matplotlib is there."
    seed: int = 1
    steps: int = 4000
    time_limit_s: float = 1500.0
    "For all, preparation included. Where it binds, there are fewer steps; how many may differ."
    batch: int = 16
    "Pieces in a step."
    rate: float = 2e-3
    "The highest learning rate."
    decay: float = 0.01
    "Weight decay."
    change_weight: float = 8.0
    "What a change counts in the loss of `point`."
    variants: int = 2
    "Varied copies of each training flow, beside itself."
    evaluate_every: int = 250
    "Steps between two looks at the validation families."
    patience: int = 8
    "Looks without a better loss after which training stops."
    threads: int | None = None
    "For torch and for preparation; None: torch's own choice, and one."
    shape: Shape = field(
        default_factory=lambda: Shape(event_features=EVENT_FEATURES, query_features=QUERY_FEATURES)
    )
    about: dict[str, str] = field(default_factory=dict)
    "Written beside the weights: the command, the commit."


class Progress(NamedTuple):
    """How far a run is."""

    stage: str
    "`prepare` or `train`."
    done: int
    "Flows, or steps."
    of: int
    elapsed_s: float
    figures: dict[str, float]
    "The newest: loss, and those of `Report.validation`."


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came of a run."""

    parameters: int
    steps: int
    best_step: int
    steps_per_s: float
    elapsed_s: float
    stopped: str
    "What ended it: `steps`, `time` or `patience`."
    flows: dict[str, int]
    "How many, by split."
    validation: dict[str, float]
    """Of the weights written, both queues together. `mae_ms`, `mae_change_ms`: the error of
    `point`, overall and where the delay changed; `last_value_*`: what the delay last known
    gives. `pinball_50_ms` ...: of the quantiles. `below_50` ...: the share of delays below them.
    `drop_nats`: cross entropy of drops."""
    curves: list[dict[str, float]]


def train(options: Options, progress: Callable[[Progress], None] | None = None) -> Report:
    """Train a predictor on a data set's training families and write its best weights.

    Best is the least loss on the validation families. Test families are not looked at.

    Raises:
        ConfigurationError: the model is too large, or the weights cannot be written.
        DatasetError: the data cannot be used.
    """
    started = time.monotonic()
    tell = progress or (lambda _: None)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    manifest = Manifest.load(options.data)
    entries = {split: manifest.of(split) for split in ("train", "validation")}
    before = 2 ** math.ceil(math.log2(options.shape.layers * options.shape.window))
    pieces: dict[str, Pieces] = {}
    for split, chosen in entries.items():
        variants = options.variants if split == "train" else 0
        replays = prepare(chosen, options.cache, variants, options.threads or 1)
        total = len(chosen) * (variants + 1)
        made = []
        for replay in replays:
            made.append(replay)
            tell(Progress("prepare", len(made), total, time.monotonic() - started, {}))
        pieces[split] = Pieces(made, before)
    run = _Run(options, pieces["train"], pieces["validation"], started)
    report = run.go(tell, {split: len(chosen) for split, chosen in entries.items()})
    _write(options, manifest, run.model, report)
    return report


def prepare(
    entries: Sequence[Entry], cache: Path, variants: int, processes: int
) -> Iterator[Replay]:
    """Yield what a model may learn from, or be chosen by.

    Raises:
        SplitError: a flow is for the test.
        DatasetError: there is none, or one cannot be used.
    """
    for entry in entries:
        if entry.split == "test":
            raise SplitError(
                f"{entry.path} is of the family '{entry.family}', which is kept for the test: no"
                " model may see it before. Train on the families of the other splits."
            )
    tasks = [(entry, cache, variant) for entry in entries for variant in range(variants + 1)]
    if processes == 1 or len(tasks) == 1:
        yield from (prepared(*task) for task in tasks)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        for task, _ in zip(tasks, pool.map(_fill_cache, tasks, chunksize=4), strict=True):
            yield prepared(*task)


def _fill_cache(task: tuple[Entry, Path, int]) -> None:
    prepared(*task)


class _Run:
    """A model under training."""

    def __init__(self, options: Options, train: Pieces, validation: Pieces, started: float) -> None:
        self._options, self._train, self._validation = options, train, validation
        self._started = started
        every = validation.every()
        self._shown = every[:: math.ceil(len(every) / VALIDATION_PIECES)] if every else []
        if not self._shown or not train.every():
            raise ConfigurationError(
                "There is nothing to train on, or nothing to choose by: the data set needs flows"
                " both in the split train and in validation. Collect more."
            )
        self._rng = np.random.default_rng(options.seed)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            self.model = Predictor(options.shape).to(self._device)
        self._parameters = sum(one.numel() for one in self.model.parameters())
        if self._parameters > MAX_PARAMETERS:
            raise ConfigurationError(
                f"The model would have {self._parameters} parameters, and {MAX_PARAMETERS} is the"
                " limit: choose a smaller shape."
            )
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), options.rate, (0.9, 0.98), weight_decay=options.decay
        )

    def go(self, tell: Callable[[Progress], None], flows: dict[str, int]) -> Report:
        """Train; leave the best weights in `model`."""
        options = self._options
        curves: list[dict[str, float]] = []
        best: dict[str, float] = {"loss": math.inf}
        best_step, best_weights = 0, self.model.state_dict()
        stopped, trained_s, recent = "steps", 0.0, []
        batches = self._batches()
        step, steps = 0, options.steps
        while step < steps:
            began = time.monotonic()
            recent.append(self._step(next(batches), step / steps))
            step += 1
            trained_s += time.monotonic() - began
            is_late = time.monotonic() - self._started > options.time_limit_s
            if step % options.evaluate_every and step < steps and not is_late:
                continue
            figures = self._evaluate()
            curves.append({"step": step, "train_loss": float(np.mean(recent)), **figures})
            recent.clear()
            elapsed_s = time.monotonic() - self._started
            steps = min(options.steps, step + self._steps_left(step / trained_s, elapsed_s))
            tell(Progress("train", step, steps, elapsed_s, curves[-1]))
            if figures["loss"] < best["loss"]:
                best, best_step = figures, step
                best_weights = {k: v.clone() for k, v in self.model.state_dict().items()}
            if step - best_step >= options.patience * options.evaluate_every:
                stopped = "patience"
                break
        if step < options.steps and stopped != "patience":
            stopped = "time"
        self.model.load_state_dict(best_weights)
        return Report(
            parameters=self._parameters,
            steps=step,
            best_step=best_step,
            steps_per_s=step / trained_s,
            elapsed_s=time.monotonic() - self._started,
            stopped=stopped,
            flows=flows,
            validation=best,
            curves=curves,
        )

    def _batches(self) -> Iterator[Batch]:
        size = self._options.batch
        waiting: list[Piece] = []
        while True:
            while len(waiting) < size:
                waiting += self._train.shuffled(self._rng)
            yield self._train.batch(waiting[:size], self._rng)
            del waiting[:size]

    def _step(self, batch: Batch, done: float) -> float:
        """Take one step, `done` of all having been taken; return its loss."""
        self.model.train()
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.rate * _rate(done)
        _, found = self._losses(batch)
        self._optimizer.zero_grad()
        found.total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT)
        self._optimizer.step()
        return float(found.total.detach())

    def _steps_left(self, steps_per_s: float, elapsed_s: float) -> int:
        """Return how many more steps there is time for."""
        left_s = self._options.time_limit_s - elapsed_s
        return max(0, int(TRAINING_SHARE * left_s * steps_per_s))

    def _losses(self, batch: Batch) -> tuple[Tensor, Losses]:
        h = self.model(
            self._tensor(batch.events), self._tensor(batch.sent_s), self._tensor(batch.segments)
        )
        outputs = self.model.ask(
            h.flatten(0, 1)[self._tensor(batch.rows)], self._tensor(batch.queries)
        )
        found = losses(
            outputs,
            self._tensor(batch.delay_s),
            self._tensor(batch.lost),
            self._tensor(batch.changed),
            self._options.change_weight,
        )
        return outputs, found

    def _tensor(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Return the figures on the validation families."""
        self.model.eval()
        found, outputs, batches = [], [], []
        for start in range(0, len(self._shown), self._options.batch):
            batch = self._validation.batch(self._shown[start : start + self._options.batch])
            raw, its_losses = self._losses(batch)
            found.append((len(raw), float(its_losses.total), float(its_losses.drop)))
            outputs.append(raw.cpu())
            batches.append(batch)
        sizes, totals, drops = np.array(found).T
        return {
            "loss": float(np.average(totals, weights=sizes)),
            "drop_nats": float(np.average(drops, weights=sizes)),
            **_figures(torch.cat(outputs), batches),
        }


def _rate(done: float) -> float:
    """Return the share of the learning rate: up to one, then down along a cosine."""
    down = LEAST_RATE + (1 - LEAST_RATE) * (1 + math.cos(math.pi * done)) / 2
    return min(1.0, (done + 1e-3) / WARM_UP) * down


def _figures(outputs: Tensor, batches: Sequence[Batch]) -> dict[str, float]:
    """Return errors in milliseconds, for both queues together; see `Report.validation`."""
    true_s = np.concatenate([batch.delay_s for batch in batches])
    last_s = np.concatenate([batch.last_s for batch in batches])
    changed = np.concatenate([batch.changed for batch in batches])
    known = np.isfinite(true_s) & np.isfinite(last_s)
    point_s = to_seconds(outputs[..., POINT]).numpy()
    found = {
        "mae_ms": _mean_ms(np.abs(point_s - true_s)[known]),
        "mae_change_ms": _mean_ms(np.abs(point_s - true_s)[changed]),
        "last_value_mae_ms": _mean_ms(np.abs(last_s - true_s)[known]),
        "last_value_mae_change_ms": _mean_ms(np.abs(last_s - true_s)[changed]),
    }
    foretold_s = to_seconds(quantiles(outputs)).numpy()
    for place, level in enumerate(LEVELS):
        error = (true_s - foretold_s[..., place])[np.isfinite(true_s)]
        name = f"{100 * level:.0f}"
        found[f"pinball_{name}_ms"] = _mean_ms(np.maximum(level * error, (level - 1) * error))
        found[f"below_{name}"] = float(np.mean(error <= 0)) if error.size else 0.0
    return found


def _mean_ms(values: np.ndarray[Any, np.dtype[Any]]) -> float:
    return 1000.0 * float(values.mean()) if values.size else 0.0


def _write(options: Options, manifest: Manifest, model: Predictor, report: Report) -> None:
    described = {
        "shape": options.shape.as_dict(),
        "levels": list(LEVELS),
        "event_names": list(EVENT_NAMES),
        "query_names": list(QUERY_NAMES),
        "manifest_digest": manifest.digest,
        "families": {
            split: sorted({entry.family for entry in manifest.of(split)})
            for split in ("train", "validation")
        },
        **options.about,
        "options": {
            name: value
            for name, value in asdict(options).items()
            if isinstance(value, int | float) and name != "threads"
        },
        "report": {name: value for name, value in asdict(report).items() if name != "curves"},
    }
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        save_weights(model, options.out)
        text = json.dumps(described, indent=2)
        options.out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        if options.curves is not None:
            _write_curves(options.curves, report.curves)
    except OSError as error:
        raise ConfigurationError(
            f"The weights cannot be written: {error}. Choose another place for them."
        ) from error


def _write_curves(folder: Path, curves: list[dict[str, float]]) -> None:
    """Write the curves as numbers and, where matplotlib is there, as a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "curves.json").write_text(json.dumps(curves, indent=2) + "\n", encoding="utf-8")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = {
        "loss": ("train_loss", "loss"),
        "error of the point, ms": ("mae_ms", "mae_change_ms"),
    }
    for axes, (title, names) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name in names:
            axes.plot([row["step"] for row in curves], [row[name] for row in curves], label=name)
        axes.set(title=title, xlabel="step", yscale="log")
        axes.legend()
    figure.savefig(folder / "curves.png", dpi=120)
