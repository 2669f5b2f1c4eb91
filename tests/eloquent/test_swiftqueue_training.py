"""Training: what it may look at, that it learns, that seeds reproduce, and what it writes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eloquent.errors import ConfigurationError
from eloquent.swiftqueue.batches import LENGTH, Pieces
from eloquent.swiftqueue.dataset import (
    DatasetError,
    DigestError,
    Manifest,
    SplitError,
    prepared,
    replay,
)
from eloquent.swiftqueue.inference import Model
from eloquent.swiftqueue.model import DROP, OUTSIDE, POINT, losses
from eloquent.swiftqueue.shape import DELAY_UNIT_S, LEVELS, Shape
from eloquent.swiftqueue.training import Options, Progress, prepare, train
from tests.eloquent.swiftqueue_flows import made_data, made_flow

SMALL = Shape(
    event_features=Options(data=Path(), out=Path(), cache=Path()).shape.event_features,
    query_features=Options(data=Path(), out=Path(), cache=Path()).shape.query_features,
    width=16,
    heads=2,
    feed=16,
    hidden=24,
    middle=16,
    window=16,
)


def options(folder: Path, **changes: Any) -> Options:
    plain = Options(
        data=folder,
        out=folder / "out" / "weights.safetensors",
        cache=folder / "cache",
        steps=12,
        batch=4,
        variants=0,
        evaluate_every=4,
        shape=SMALL,
        time_limit_s=600.0,
    )
    return replace(plain, **changes)


def rewrite(folder: Path, row: int, **changes: str) -> None:
    """Change what the manifest says of a flow."""
    path = folder / "manifest.json"
    told = json.loads(path.read_text())
    told["flows"][row] |= changes
    path.write_text(json.dumps(told))


def test_the_loss_falls_and_beats_the_last_value_on_changes(tmp_path: Path) -> None:
    data = made_data(tmp_path, {"train": 4, "validation": 1})
    report = train(options(data, steps=160, evaluate_every=10, rate=1e-2))
    assert report.stopped == "steps"
    assert report.curves[-1]["train_loss"] < 0.8 * report.curves[0]["train_loss"]
    assert report.validation["loss"] == min(row["loss"] for row in report.curves)
    figures = report.validation
    assert figures["mae_change_ms"] < 0.9 * figures["last_value_mae_change_ms"]
    assert figures["below_50"] < figures["below_90"] < figures["below_99"]


def test_the_same_seed_makes_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    data = made_data(tmp_path, {"train": 2, "validation": 1})
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / f"{name}.safetensors"
        train(options(data, out=out, seed=seed, threads=1))
        found.append(out.read_bytes())
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_what_is_written_is_what_inference_reads(tmp_path: Path) -> None:
    data = made_data(tmp_path, {"train": 1, "validation": 1})
    told: list[Progress] = []
    out, curves = tmp_path / "deep" / "w.safetensors", tmp_path / "curves"
    about = {"command": "eloquent swiftqueue train", "commit": "0" * 40}
    report = train(options(data, out=out, curves=curves, about=about), told.append)
    model = Model.load(out)
    assert model.shape == SMALL
    described = json.loads(out.with_suffix(".json").read_text())
    assert described["manifest_digest"] == Manifest.load(data).digest
    assert described["command"] == about["command"]
    assert described["report"]["parameters"] == report.parameters
    assert described["options"]["change_weight"] == 8.0
    assert str(tmp_path) not in json.dumps(described)
    assert json.loads((curves / "curves.json").read_text()) == report.curves
    assert {one.stage for one in told} == {"prepare", "train"}
    assert told[-1].done == told[-1].of == report.steps


def test_flows_of_the_test_are_not_looked_at(tmp_path: Path) -> None:
    data = made_data(tmp_path, {"train": 1, "validation": 1, "test": 2})
    for path in data.glob("test*.npz"):
        path.unlink()
    report = train(options(data))
    assert report.flows == {"train": 1, "validation": 1}
    with pytest.raises(SplitError, match="kept for the test"):
        next(prepare(Manifest.load(data).of("test"), tmp_path, 0, 1))


def test_a_family_in_two_splits_is_refused(tmp_path: Path) -> None:
    data = made_data(tmp_path, {"train": 1, "validation": 1, "test": 1})
    rewrite(data, 2, family="family-train")
    with pytest.raises(SplitError, match=r"both in train and in test"):
        train(options(data))


def test_a_flow_in_two_splits_is_refused_whatever_its_family_is_called(tmp_path: Path) -> None:
    data = made_data(tmp_path, {"train": 1, "validation": 1, "test": 1})
    digest = Manifest.load(data).of("test")[0].digest
    rewrite(data, 0, digest=digest, file="test0.npz")
    with pytest.raises(SplitError, match="both in train and in test"):
        train(options(data))


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    data = made_data(tmp_path, {"train": 1, "validation": 1})
    rewrite(data, 0, split="training")
    with pytest.raises(SplitError, match="'training'"):
        train(options(data))


def test_a_flow_that_is_not_the_manifest_s_is_refused(tmp_path: Path) -> None:
    data = made_data(tmp_path, {"train": 1, "validation": 1})
    made_flow(99).save(data / "train0.npz")
    with pytest.raises(DigestError, match="digest differs"):
        train(options(data))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"flows": [{}]}', '{"flows": 3}'])
def test_a_folder_without_a_manifest_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DatasetError, match="no manifest"):
        train(options(tmp_path))


def test_without_validation_there_is_nothing_to_choose_by(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nothing to choose by"):
        train(options(made_data(tmp_path, {"train": 1})))


def test_a_model_over_the_limit_is_refused(tmp_path: Path) -> None:
    data = made_data(tmp_path, {"train": 1, "validation": 1})
    with pytest.raises(ConfigurationError, match="parameters"):
        train(options(data, shape=replace(SMALL, width=128, feed=512)))


def test_time_ends_a_run_and_the_weights_are_written_all_the_same(tmp_path: Path) -> None:
    data = made_data(tmp_path, {"train": 1, "validation": 1})
    report = train(options(data, time_limit_s=1e-6, steps=10_000))
    assert (report.steps, report.stopped) == (1, "time")
    Model.load(tmp_path / "out" / "weights.safetensors")


def test_a_run_that_gets_no_better_ends(tmp_path: Path) -> None:
    data = made_data(tmp_path, {"train": 1, "validation": 1})
    report = train(options(data, rate=0.0, steps=10_000, evaluate_every=2, patience=3))
    assert (report.best_step, report.steps, report.stopped) == (2, 8, "patience")


def test_a_prepared_flow_is_cached_and_varied_ones_are_others(tmp_path: Path) -> None:
    data = made_data(tmp_path, {"train": 1}, packets=200)
    (entry,) = Manifest.load(data).entries
    plain, varied = (prepared(entry, tmp_path / "cache", variant) for variant in (0, 1))
    assert not np.array_equal(plain.delay_s, varied.delay_s, equal_nan=True)
    entry.path.unlink()  # from here on only the cache can answer
    for variant, first in enumerate((plain, varied)):
        again = prepared(entry, tmp_path / "cache", variant)
        np.testing.assert_array_equal(again.queries, first.queries)
        np.testing.assert_array_equal(again.events, first.events)


def test_processes_prepare_the_same_in_the_same_order(tmp_path: Path) -> None:
    entries = Manifest.load(made_data(tmp_path, {"train": 3}, packets=100)).entries
    alone = list(prepare(entries, tmp_path / "a", 1, 1))
    together = list(prepare(entries, tmp_path / "b", 1, 2))
    assert len(alone) == len(together) == 6
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.queries, other.queries)


def test_pieces_ask_each_query_once_about_its_own_newest_event() -> None:
    replays = [replay(made_flow(seed, packets)) for seed, packets in ((1, 1300), (2, 90))]
    pieces = Pieces(replays, before=32)
    rng = np.random.default_rng(5)
    for chosen, random in ((pieces.every(), None), (pieces.shuffled(rng), rng)):
        batch = pieces.batch(chosen, random)
        assert len(batch.rows) == sum(int((one.newest >= 0).sum()) for one in replays)
        flat = batch.events.reshape(-1, batch.events.shape[-1])[batch.rows]
        expected = {one.events[one.newest[one.newest >= 0]].tobytes() for one in replays}
        order = [(which, start) for which, start in chosen]
        found = {
            which: np.concatenate(
                [
                    flat[batch.rows // (LENGTH + 32) == number]
                    for number in sorted(range(len(order)), key=lambda one: order[one][1])
                    if order[number][0] == which
                ]
            ).tobytes()
            for which in (0, 1)
        }
        assert set(found.values()) == expected
        assert (batch.segments.reshape(-1)[batch.rows] != OUTSIDE).all()
        empty = (batch.events == 0).all(-1)
        assert empty.any()
        np.testing.assert_array_equal(batch.segments == OUTSIDE, empty)


def test_the_losses_are_least_at_the_truth_and_unknown_labels_do_not_count() -> None:
    delay_s = torch.tensor([[0.05, math.nan], [0.2, 0.0]])
    lost = torch.tensor([[0, -1], [0, 1]], dtype=torch.int8)
    changed = torch.tensor([[False, False], [True, False]])
    outputs = torch.zeros(2, 2, 5)
    outputs[..., 1:POINT] = -20.0
    outputs[..., 0] = outputs[..., POINT] = torch.log1p(delay_s.nan_to_num(9.0) / DELAY_UNIT_S)
    outputs[..., DROP] = torch.tensor([[-20.0, 20.0], [-20.0, 20.0]])
    assert float(losses(outputs, delay_s, lost, changed, 8.0).total) < 1e-4
    worse = outputs.clone()
    worse[0, 1] += 5.0  # where nothing is known
    assert float(losses(worse, delay_s, lost, changed, 8.0).total) < 1e-4
    worse = outputs.clone()
    worse[..., DROP] *= -1
    assert float(losses(worse, delay_s, lost, changed, 8.0).drop) > 10


def test_a_change_weighs_more_in_the_point_alone() -> None:
    delay_s = torch.tensor([[0.05, 0.05]])
    lost = torch.zeros(1, 2)
    outputs = torch.zeros(1, 2, 5)
    outputs[0, 0, POINT] = 9.0
    for weight, share in ((1.0, 1 / 2), (8.0, 8 / 9)):
        changed = torch.tensor([[True, False]])
        found = losses(outputs, delay_s, lost, changed, weight)
        swapped = losses(outputs, delay_s, lost, ~changed, weight)
        both = found.point + swapped.point
        assert float(found.point / both) == pytest.approx(
            _between(share, outputs, delay_s, lost), rel=1e-4
        )
        assert float(found.quantiles) == float(swapped.quantiles)


def _between(
    share: float, outputs: torch.Tensor, delay_s: torch.Tensor, lost: torch.Tensor
) -> float:
    """Return the first queue's part of both errors' sum, where it weighs `share` in one."""
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    alone = []
    for queue in (0, 1):
        only = delay_s.clone()
        only[0, 1 - queue] = math.nan
        alone.append(float(losses(outputs, only, lost, nothing, 1.0).point))
    first = share * alone[0] + (1 - share) * alone[1]
    return first / (alone[0] + alone[1])


def test_the_pinball_loss_is_least_at_each_level_s_quantile() -> None:
    made = torch.Generator().manual_seed(11)
    delay_s = 0.05 * torch.rand(20_000, 1, generator=made).expand(-1, 2)
    lost, changed = torch.zeros(20_000, 2), torch.zeros(20_000, 2, dtype=torch.bool)

    def loss_at(upper: float) -> float:
        outputs = torch.zeros(20_000, 2, 5)
        scaled = [math.log1p(one / DELAY_UNIT_S) for one in (0.025, upper, 0.0495)]
        outputs[..., 0] = scaled[0]
        for place in (1, 2):
            step = scaled[place] - scaled[place - 1]
            outputs[..., place] = math.log(math.expm1(step))
        return float(losses(outputs, delay_s, lost, changed, 1.0).quantiles)

    right = 0.05 * LEVELS[1]
    assert loss_at(right) < loss_at(0.9 * right)
    assert loss_at(right) < loss_at(1.08 * right)
