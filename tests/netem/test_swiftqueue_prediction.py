"""The measures of prediction, the accuracy bars, and the evaluation from flows to rows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike
from prediction_flows import busy_flow, flow_of, telling_flow, write_data

from eloquent.errors import ConfigurationError
from eloquent.swiftqueue import training
from eloquent.swiftqueue.dataset import Entry, Manifest, Replay, SplitError, prepared
from eloquent.swiftqueue.features import EVENT_FEATURES, QUERY_FEATURES
from eloquent.swiftqueue.inference import SHIPPED
from eloquent.swiftqueue.shape import Shape
from eloquent_netem.lab.swiftqueue_collect import collect, family_jobs
from eloquent_netem.lab.swiftqueue_knowledge import knowledge_of
from eloquent_netem.lab.swiftqueue_measures import (
    MEASURES,
    OURS,
    Forecasts,
    PredictionRow,
    accuracy_bars,
    changes,
    row_of,
    spike_threshold_s,
    tally,
)
from eloquent_netem.lab.swiftqueue_places import FAMILIES, TEST
from eloquent_netem.lab.swiftqueue_prediction import (
    MEDIAN,
    MODELS,
    check_families,
    evaluate,
)

NAN = float("nan")
PLAIN_MODELS = ("last-value", "ewma", "ar", "arma", "physics", "state", "state-lagged")


def _said(point_s: ArrayLike, upper_s: ArrayLike) -> Forecasts:
    """Return the same for both queues."""
    return Forecasts(*(np.stack((one, one), axis=1) for one in (point_s, upper_s)))


def test_each_measure_is_what_a_hand_makes_of_it() -> None:
    # Base 20 ms throughout. The first has nothing known before it, the fourth is lost.
    flow = flow_of([0, 1, 2, 3, 4], [0.02, 0.03, 0.08, NAN, 0.07])
    known = knowledge_of(flow)
    assert changes(known)[:, 0].tolist() == [False, False, True, False, False]
    said = _said([NAN, 0.04, 0.05, 0.9, 0.07], [NAN, 0.05, 0.07, 0.9, 0.09])
    found = tally(known, said)
    # Errors of 10, 30 and 0 ms; the second of the three is the change.
    assert found["mae_ms"] == pytest.approx((40, 3))
    assert found["mae_change_ms"] == pytest.approx((30, 1))
    # Above by 20, below by 10, above by 20.
    assert found["pinball_99"] == pytest.approx((0.01 * 20 + 0.99 * 10 + 0.01 * 20, 3))
    assert found["coverage_99"] == (2, 3)
    assert found["other_mae_ms"] == pytest.approx((40, 3))


def test_a_change_is_one_in_both_senses_and_against_its_own_queue() -> None:
    delay_s = [[0.02, 0.02], [0.22, 0.02], [0.25, 0.02], [0.27, 0.30], [0.32, 0.02]]
    flow = flow_of([0, 1, 2, 3, 4], delay_s, queue=0)
    # 200 ms; 30 of 200 is no fifth; 50 of 200; 50 of 250 is a fifth, and no more.
    assert changes(knowledge_of(flow))[:, 0].tolist() == [False, True, False, False, False]
    # Nothing was ever known of C.
    assert not changes(knowledge_of(flow))[:, 1].any()


def test_a_spike_is_one_over_the_base_and_over_the_last_second() -> None:
    flow = flow_of([0.0, 2.0, 2.2, 2.4, 2.6], [0.02, 0.05, 0.05, 0.05, 0.07])
    threshold_s = spike_threshold_s(knowledge_of(flow))[:, 0]
    # At 2 s the last second is empty, and the last value is the base: 20 ms over it. Later the
    # median waited for 30 ms: 60 over it.
    assert threshold_s[1:] == pytest.approx([0.04, 0.08, 0.08, 0.08])


def test_the_f1_of_spikes_counts_what_the_point_foretells() -> None:
    sent_s = 0.1 * np.arange(16)
    delay_s = np.full(16, 0.02)
    delay_s[[12, 14]] = 0.09
    point_s = np.full(16, 0.02)
    point_s[[12, 13]] = 0.05
    known = knowledge_of(flow_of(sent_s, delay_s, known_s=sent_s + 0.15))
    # One foretold, one missed, one false alarm.
    assert tally(known, _said(point_s, point_s))["spike_f1"] == (2, 4)


def test_a_model_that_says_nothing_is_not_judged() -> None:
    known = knowledge_of(flow_of([0, 1], [0.02, 0.03]))
    with pytest.raises(ValueError, match="say something"):
        tally(known, _said([NAN, NAN], [NAN, 1]))


def test_a_row_is_of_sums_with_intervals_over_flows() -> None:
    def one(error_ms: float, packets: float) -> dict[str, tuple[float, float]]:
        none = dict.fromkeys(MEASURES, (0.0, 0.0))
        return {**none, "mae_ms": (error_ms * packets, packets), "spikes": (0.0, 2.0)}

    row = row_of("a", "test", [one(10, 1), one(20, 3)])
    assert row.mae_ms == 17.5
    assert row.intervals["mae_ms"] == (10, 20)
    assert row.mae_change_ms is None
    assert "mae_change_ms" not in row.intervals
    assert (row.packets, row.changes, row.spikes, row.flows) == (4, 0, 4, 2)
    assert row_of("a", "test", [one(10, 1)] * 9).intervals["mae_ms"] == (10, 10)


def _row(model: str, change_ms: float, overall_ms: float = 9) -> PredictionRow:
    return replace(row_of(model, "test", []), mae_change_ms=change_ms, mae_ms=overall_ms)


def test_the_bars_are_those_of_the_issue() -> None:
    rows = [_row("last-value", 100), _row("ewma", 90), _row("lstm", 35), _row("state", 1)]
    *good, floor = accuracy_bars([*rows, _row(OURS, 28)])
    assert [one.is_met for one in good] == [True, True, True, True]
    # What knows the true state is told beside them, and is held to nothing.
    assert (floor.figure, floor.bound) == (99, None)
    assert good[3].where == "test, lstm"
    assert good[3].figure == pytest.approx(20)
    # Better than the best by less than a fifth; and 33 of 90 is not 65 % less.
    worse = accuracy_bars([*rows, _row(OURS, 33)])
    assert [one.is_met for one in worse[:4]] == [True, True, False, False]
    # It foretells a change at any time.
    cheap = accuracy_bars([*rows, _row(OURS, 0.5, 20)])
    assert [one.is_met for one in cheap[:4]] == [False, True, True, True]
    with pytest.raises(ValueError, match="ewma"):
        accuracy_bars([_row(OURS, 1), _row("last-value", 2)])
    with pytest.raises(ValueError, match="lack"):
        accuracy_bars([*rows, _row(OURS, 28)], split="test-traces")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(
        tmp_path / "data",
        {
            ("train", "a"): [busy_flow(seed) for seed in range(3)],
            ("validation", "b"): [busy_flow(10)],
            ("test", "c"): [busy_flow(20), busy_flow(21)],
            ("test", "recorded"): [busy_flow(30)],
        },
    )


def test_rows_have_each_model_on_each_split(data: Path) -> None:
    told: list[str] = []
    rows = evaluate(data, models=PLAIN_MODELS, progress=told.append)
    splits = ["test", "test-traces", "test/c", "test/recorded"]
    assert [(row.model, row.split) for row in rows] == [
        (model, split) for model in PLAIN_MODELS for split in splits
    ]
    of_last = {row.split: row for row in rows if row.model == "last-value"}
    assert of_last["test"].flows == 3
    assert of_last["test"].packets == of_last["test/c"].packets + of_last["test/recorded"].packets
    by_model = {row.model: row for row in rows if row.split == "test"}
    assert {row.packets for row in rows if row.split == "test"} == {of_last["test"].packets}
    # Who knows the true state knows best; physics beats what knows none.
    errors = {name: row.mae_change_ms for name, row in by_model.items()}
    assert errors["state"] == min(errors.values())
    assert errors["physics"] < errors["last-value"]
    assert "fitting ewma" in told


def test_baselines_are_fitted_once(data: Path) -> None:
    models = ("ewma", "physics", "gradient-boosting")
    told: list[str] = []
    first = evaluate(data, models=models, progress=told.append)
    assert sum("fitting" in one for one in told) == 3
    again: list[str] = []
    assert evaluate(data, models=models, progress=again.append) == first
    assert not any("fitting" in one for one in again)
    other_seed: list[str] = []
    evaluate(data, models=models[:1], seed=2, progress=other_seed.append)
    assert any("fitting" in one for one in other_seed)


def test_what_cannot_be_judged_is_one_sentence(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no model 'oracle'"):
        evaluate(data, models=["oracle"])
    with pytest.raises(ConfigurationError, match="cannot be read"):
        evaluate(data, models=[OURS], weights=tmp_path / "none.safetensors")
    empty = write_data(tmp_path / "empty", {("train", "a"): [busy_flow(1)]})
    with pytest.raises(ConfigurationError, match="no flows of the split"):
        evaluate(empty, models=["last-value"])


@pytest.mark.parametrize("seen", ["train", "validation"])
def test_weights_are_not_judged_by_families_that_they_saw(
    data: Path, tmp_path: Path, seen: str
) -> None:
    weights = tmp_path / "some.safetensors"
    judged = Manifest.load(data).of("test")
    described = weights.with_suffix(".json")
    described.write_text('{"families": {"train": ["a"], "validation": ["b"]}}')
    check_families(weights, judged)
    described.write_text(f'{{"families": {{"train": ["a"], "{seen}": ["b", "c"]}}}}')
    with pytest.raises(SplitError, match="families c as"):
        check_families(weights, judged)
    described.write_text("{}")
    with pytest.raises(ConfigurationError, match="does not say"):
        check_families(weights, judged)


def test_what_is_collected_is_judged_by_families_that_nothing_learnt_from(tmp_path: Path) -> None:
    splits = {"idle": "train", "mixed": "validation", "flash": "test"}
    jobs = family_jobs(splits, tmp_path, flows=1, seed=1, length_s=2.0)
    assert collect(jobs, tmp_path, workers=1, command="collect").is_complete
    manifest = Manifest.load(tmp_path)
    assert {entry.family: entry.split for entry in manifest.entries} == splits
    rows = evaluate(tmp_path, models=("last-value", "physics"))
    assert {row.split for row in rows} == {"test", "test-families", "test/flash"}
    assert rows[0].packets > 0


def test_the_shipped_weights_saw_no_test_family() -> None:
    test = [
        Entry(Path("none"), name, TEST, "", {})
        for name, one in FAMILIES.items()
        if one.split == TEST
    ]
    assert test
    check_families(SHIPPED, test)


SMALL = Shape(
    event_features=EVENT_FEATURES,
    query_features=QUERY_FEATURES,
    width=16,
    layers=1,
    heads=2,
    feed=32,
    hidden=32,
    middle=16,
    window=16,
)


def _shuffled(entry: Entry, cache: Path, variant: int = 0) -> Replay:
    """Return a replay in which each packet is said to have met what another one met."""
    one = prepared(entry, cache, variant)
    order = np.random.default_rng(1).permutation(len(one.delay_s))
    return replace(one, delay_s=one.delay_s[order], lost=one.lost[order])


@pytest.mark.parametrize("labels", ["true", "shuffled"])
def test_the_bars_tell_a_good_model_from_one_that_learnt_shuffled_labels(
    labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packet's size tells its delay: there is something to learn, and nothing to repeat."""
    data = write_data(
        tmp_path / "data",
        {
            ("train", "a"): [telling_flow(seed, 600) for seed in range(6)],
            ("validation", "b"): [telling_flow(seed, 600) for seed in (10, 11)],
            ("test", "c"): [telling_flow(seed, 600) for seed in (20, 21)],
        },
    )
    if labels == "shuffled":
        monkeypatch.setattr(training, "prepared", _shuffled)
    weights = tmp_path / "small.safetensors"
    options = training.Options(
        data=data,
        out=weights,
        cache=tmp_path / "cache",
        steps=250,
        batch=4,
        rate=5e-3,
        variants=0,
        threads=1,
        shape=SMALL,
    )
    (tmp_path / "cache").mkdir()
    training.train(options)
    rows = evaluate(data, weights=weights, models=(OURS, MEDIAN, "last-value", "ewma"))
    bars = accuracy_bars(rows)
    told: dict[str, Any] = {row.model: row.mae_change_ms for row in rows if row.split == "test"}
    assert all(one.is_met for one in bars) == (labels == "true"), told
    if labels == "shuffled":
        assert not any(one.is_met for one in bars if "changes" in one.what), told


def test_all_models_have_a_name_of_their_own() -> None:
    assert len(set(MODELS)) == len(MODELS) == 13
