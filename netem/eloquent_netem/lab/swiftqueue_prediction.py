"""Part (a) of SwiftQueue's evaluation: how well delays are foretold, by ours and by baselines.

At each packet's sending, from what its sender knows then, a model says the packet's one-way delay
in the queue it goes into (and in the other, which emulation knows too). The families that are
judged are in no model's training; `check_families` sees to it for the weights.
"""

import hashlib
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from eloquent.errors import ConfigurationError
from eloquent.swiftqueue import dataset, features
from eloquent.swiftqueue.dataset import Entry, Manifest, SplitError
from eloquent.swiftqueue.inference import SHIPPED, Model, Predictor
from eloquent.swiftqueue.shape import LEVELS
from eloquent_netem.lab.swiftqueue_baselines import PLAIN, Baseline
from eloquent_netem.lab.swiftqueue_baselines_learned import Boosting
from eloquent_netem.lab.swiftqueue_knowledge import Knowledge, knowledge_of
from eloquent_netem.lab.swiftqueue_measures import (
    FLOOR,
    OURS,
    UPPER_LEVEL,
    Forecasts,
    PredictionRow,
    Tally,
    row_of,
    tally,
)
from eloquent_netem.lab.swiftqueue_places import FAMILIES

MEDIAN = f"{OURS}-median"
"The same weights, with the median in the place of the point, which weighs changes."

LSTM = "lstm"

FORESTS: dict[str, Callable[[int], Boosting]] = {
    Boosting.name: Boosting,
    f"{FLOOR}-learned": partial(Boosting, state="entry"),
    f"{FLOOR}-lagged-learned": partial(Boosting, state="lagged"),
}
"They take a seed."

MODELS = (OURS, MEDIAN, LSTM, *PLAIN, *FORESTS)

FOLDER = "baselines"
"Beside the flows: what was fitted on them."

CHUNK = 32
"So many flows are judged together."

Say = Callable[[str], None]


def evaluate(
    data: Path,
    *,
    weights: Path = SHIPPED,
    models: Sequence[str] = MODELS,
    split: str = "test",
    seed: int = 1,
    lstm_steps: int | None = None,
    progress: Say = lambda _: None,
) -> list[PredictionRow]:
    """Judge models on a split of the flows that `eloquent swiftqueue collect` wrote.

    Baselines are fitted on the training families once, and kept beside these. `lstm_steps`
    is the LSTM's budget, for a quick look; None is what its fair comparison takes.

    Returns:
        Rows by model, in the order of `models`: of the whole split (`test`), of its scenario
        families and of its traces (`test-families`, `test-traces`), of each family (`test/bulk`).

    Raises:
        ConfigurationError: a model is not known or its package is missing, or the weights or the
            data are.
        SplitError: the weights were trained on a family that is judged.
    """
    check_models(models)
    manifest = Manifest.load(data)
    judged = manifest.of(split)
    if not judged:
        raise ConfigurationError(
            f"{data} has no flows of the split '{split}': collect some, with "
            "`eloquent swiftqueue collect`."
        )
    ours = None
    if {OURS, MEDIAN} & set(models):
        ours = Model.load(weights)
        check_families(weights, judged)
    baselines = [name for name in models if name not in (OURS, MEDIAN)]
    fitted = _fitted(manifest, baselines, seed, lstm_steps, progress)
    tallies: dict[str, list[Tally]] = {name: [] for name in models}
    for start in range(0, len(judged), CHUNK):
        progress(f"judging flow {start + 1} of {len(judged)}")
        flows = [knowledge_of(entry.load()) for entry in judged[start : start + CHUNK]]
        for name, forecasts in _forecasts(flows, fitted, ours):
            if name in tallies:
                tallies[name] += map(tally, flows, forecasts)
    groups = [
        (entry.family, "families" if entry.family in FAMILIES else "traces") for entry in judged
    ]
    return rows_of(tallies, groups, split)


def rows_of(
    tallies: Mapping[str, Sequence[Tally]], flows: Sequence[tuple[str, str]], split: str
) -> list[PredictionRow]:
    """Sum up each model's tallies over the split, its groups and its families.

    `flows` says of each flow its family and its group.
    """
    splits: dict[str, list[int]] = {split: list(range(len(flows)))}
    for name in (
        *sorted({f"{split}-{group}" for _, group in flows}),
        *sorted({f"{split}/{family}" for family, _ in flows}),
    ):
        splits[name] = [
            place
            for place, (family, group) in enumerate(flows)
            if name in (f"{split}-{group}", f"{split}/{family}")
        ]
    return [
        row_of(model, name, [found[place] for place in places])
        for model, found in tallies.items()
        for name, places in splits.items()
    ]


def check_models(models: Iterable[str]) -> None:
    """Find out before the work whether all models can be run.

    Raises:
        ConfigurationError: they cannot.
    """
    for name in models:
        if name not in MODELS:
            raise ConfigurationError(
                f"There is no model '{name}' to judge: choose of {', '.join(MODELS)}."
            )
    needed: dict[str, Iterable[str]] = {"scipy": PLAIN, "sklearn": FORESTS, "torch": (LSTM,)}
    for package, users in needed.items():
        if set(models) & set(users) and find_spec(package) is None:
            raise ConfigurationError(
                f"The baselines need {package}, which is not installed: run "
                "pip install 'eloquent-stream[lab,engine]'."
            )


def check_families(weights: Path, judged: Sequence[Entry]) -> None:
    """Refuse to judge weights by what they were trained on, or chosen by.

    Raises:
        SplitError: the description beside the weights names a family that is judged; those of
            the validation split may be judged where that is what is asked for.
        ConfigurationError: it does not say.
    """
    path = weights.with_suffix(".json")
    try:
        seen = dict(json.loads(path.read_bytes())["families"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path} does not say which families the weights were trained on ({error!r}), so they "
            "cannot be judged. Train them anew, with `eloquent swiftqueue train`."
        ) from error
    for split, families in seen.items():
        both = {entry.family for entry in judged if entry.split != split} & set(families)
        if both:
            raise SplitError(
                f"The weights saw the families {', '.join(sorted(both))} as {split}: figures on "
                "them would flatter. Judge other families, or train without these."
            )


def fit_baseline(
    name: str,
    train: Sequence[Knowledge],
    validation: Sequence[Knowledge],
    *,
    seed: int,
    progress: Say = lambda _: None,
    lstm_steps: int | None = None,
) -> Baseline:
    """Fit one of the baselines, by its name.

    Raises:
        ValueError: there is nothing to fit it on.
    """
    if not any(known.is_scored.any() for known in train):
        raise ValueError("The training flows have no packet to learn from.")
    if name == LSTM:
        from eloquent_netem.lab.swiftqueue_lstm import STEPS, AggregatedLstm

        model: Baseline = AggregatedLstm(seed, steps=lstm_steps or STEPS, progress=progress)
    else:
        model = FORESTS[name](seed) if name in FORESTS else PLAIN[name]()
    model.fit(train, validation)
    return model


def _fitted(
    manifest: Manifest, names: Sequence[str], seed: int, lstm_steps: int | None, progress: Say
) -> dict[str, Baseline]:
    """Return baselines, from beside the flows that they learn from where they are there.

    Raises:
        ConfigurationError: there is nothing to learn from.
    """
    if names and not (manifest.of("train") and manifest.of("validation")):
        raise ConfigurationError(
            "The baselines have nothing to learn from: the data need flows of the splits train and "
            "validation. Collect some, with `eloquent swiftqueue collect`."
        )
    fitted: dict[str, Baseline] = {}
    flows: dict[str, list[Knowledge]] = {}
    used = [entry for split in ("train", "validation") for entry in manifest.of(split)]
    for name in names:
        key = hashlib.sha256(f"{name} {seed} {lstm_steps} {_code_digest()}".encode())
        for entry in used:
            key.update(f" {entry.split} {entry.digest}".encode())
        path = used[0].path.parent / FOLDER / f"{name}-{key.hexdigest()[:32]}.pickle"
        if path.exists():
            # Of our own making, in the user's own folder.
            fitted[name] = pickle.loads(path.read_bytes())  # noqa: S301
            continue
        if not flows:
            for split in ("train", "validation"):
                progress(f"reading the flows of the split {split}")
                flows[split] = [knowledge_of(entry.load()) for entry in manifest.of(split)]
        progress(f"fitting {name}")
        fitted[name] = fit_baseline(
            name,
            flows["train"],
            flows["validation"],
            seed=seed,
            progress=progress,
            lstm_steps=lstm_steps,
        )
        path.parent.mkdir(exist_ok=True)
        half_done = path.with_suffix(".part")
        half_done.write_bytes(pickle.dumps(fitted[name]))
        half_done.replace(path)
    return fitted


def _code_digest() -> str:
    """Return a digest of the code that fits baselines: what is kept is only as good as that."""
    digest = hashlib.sha256()
    names = ("knowledge", "measures", "arma", "baselines", "baselines_learned", "lstm")
    files = [Path(__file__).with_name(f"swiftqueue_{name}.py") for name in names]
    for file in (*files, Path(features.__file__), Path(dataset.__file__)):
        digest.update(file.read_bytes())
    if find_spec("sklearn"):
        digest.update(version("scikit-learn").encode())  # Forests are read by what wrote them.
    return digest.hexdigest()


def _forecasts(
    flows: Sequence[Knowledge], fitted: Mapping[str, Baseline], ours: Model | None
) -> Iterator[tuple[str, Iterable[Forecasts]]]:
    """Yield what each model says of the flows, by its name."""
    if ours is not None:
        yield from zip((OURS, MEDIAN), ours_forecasts(ours, flows), strict=True)
    for name, model in fitted.items():
        yield name, map(model.predict, flows)


def ours_forecasts(
    model: Model, flows: Sequence[Knowledge]
) -> tuple[list[Forecasts], list[Forecasts]]:
    """Run our model over flows side by side, as serving would: an event at a time.

    Returns:
        For each flow what it says, with its point and with its median.
    """
    predictor = Predictor(model)
    slots = [predictor.open() for _ in flows]
    found = [np.full((len(one.now_s), 2, len(LEVELS) + 1), np.nan) for one in flows]
    replays = [one.replayed for one in flows]
    # The packets that leave when `step` events are known are rows begins[step]:begins[step + 1].
    begins = [
        np.searchsorted(one.newest, np.arange(-1, len(one.events) + 1)).tolist() for one in replays
    ]
    for step in range(1, max(len(one.events) for one in replays) + 1):
        active = [flow for flow, one in enumerate(replays) if len(one.events) >= step]
        predictor.push(
            [slots[flow] for flow in active],
            np.stack([replays[flow].events[step - 1] for flow in active]),
            np.array([replays[flow].event_sent_s[step - 1] for flow in active]),
        )
        for flow in active:
            rows = slice(begins[flow][step], begins[flow][step + 1])
            if rows.start == rows.stop:
                continue
            delay_s, point_s, _ = predictor.forecast(
                [slots[flow]], replays[flow].queries[np.newaxis, rows]
            )
            found[flow][rows, :, :-1], found[flow][rows, :, -1] = delay_s[0], point_s[0]
    upper = LEVELS.index(UPPER_LEVEL)
    both: tuple[list[Forecasts], list[Forecasts]] = ([], [])
    for one, says in zip(replays, found, strict=True):
        delay_s = one.base_s[:, np.newaxis, np.newaxis] + says
        both[0].append(Forecasts(delay_s[..., -1], delay_s[..., upper]))
        both[1].append(Forecasts(delay_s[..., LEVELS.index(0.5)], delay_s[..., upper]))
    return both
