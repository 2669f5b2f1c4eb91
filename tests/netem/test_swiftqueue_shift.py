"""Online fine-tuning is judged packet by packet, by forecasts that know nothing of what comes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eloquent.swiftqueue.dataset import Manifest
from eloquent.swiftqueue.inference import Model
from eloquent.swiftqueue.shape import LEVELS
from eloquent_netem.lab.swiftqueue_places import RATE_MBIT_S, RTT_MS
from eloquent_netem.lab.swiftqueue_shift import (
    ALL,
    SHIFTED,
    Replayed,
    ShiftRow,
    evaluate,
    main,
    replayed,
)
from eloquent_netem.scenario_parts import CellularRateSpec, FixedRateSpec
from tests.eloquent.swiftqueue_flows import made_data, made_flow
from tests.swiftqueue_light import random_weights

PACKETS = 1500


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """A model that has learnt nothing, whose quantiles are therefore far off."""
    return Model.load(random_weights(tmp_path))


def rows_of(model: Model, folder: Path) -> dict[tuple[str, bool], ShiftRow]:
    rows = evaluate(model, Manifest.load(folder).of("test"))
    return {(row.network, row.is_tuned): row for row in rows}


def test_quantiles_that_are_off_are_better_tuned_and_each_packet_counts_once(
    model: Model, tmp_path: Path
) -> None:
    rows = rows_of(model, made_data(tmp_path, {"test": 2, "validation": 1}, PACKETS))
    assert set(rows) == {(name, tuned) for name in ("family-test", ALL) for tuned in (False, True)}
    frozen, tuned = rows[ALL, False], rows[ALL, True]
    assert tuned.pinball_90_ms < 0.8 * frozen.pinball_90_ms
    assert tuned.pinball_99_ms < 0.8 * frozen.pinball_99_ms
    assert abs(tuned.below_90 - 0.9) < abs(frozen.below_90 - 0.9)
    assert frozen.resets == 0
    assert 0.9 * 2 * PACKETS < frozen.packets == tuned.packets < 2 * PACKETS
    assert 0 < frozen.changes == tuned.changes
    assert frozen.flows == 2
    assert frozen.cpu_us > 0


def test_the_figures_are_those_of_the_packets(model: Model, tmp_path: Path) -> None:
    data = made_data(tmp_path, {"test": 1}, 300)
    row = rows_of(model, data)[ALL, False]
    one = replayed(model, Manifest.load(data).entries[0].load(), is_tuned=False)
    losses = [0.0, 0.0, 0.0]
    judged = 0
    for true_s, quantiles_s in zip(one.true_s.tolist(), one.quantiles_s.tolist(), strict=True):
        if math.isnan(true_s + quantiles_s[0]):
            continue
        judged += 1
        for place, level in enumerate(LEVELS):
            error_ms = 1000 * (true_s - quantiles_s[place])
            losses[place] += level * error_ms if error_ms > 0 else (level - 1) * error_ms
    assert row.packets == judged
    wants = [loss / judged for loss in losses]
    found = [row.pinball_50_ms, row.pinball_90_ms, row.pinball_99_ms]
    assert found == pytest.approx(wants, rel=1e-6)
    assert row.mae_ms == pytest.approx(2 * wants[0], rel=1e-6)


@pytest.mark.parametrize("is_tuned", [False, True])
def test_what_is_not_known_yet_changes_no_forecast(model: Model, is_tuned: bool) -> None:
    flow = made_flow(3, PACKETS)
    until_s = float(flow.sent_s[1000])
    is_later = flow.known_s > until_s
    delay_s = np.where(is_later[:, None], flow.delay_s + np.float32(0.2), flow.delay_s)
    changed = replace(flow, delay_s=delay_s)
    before, after = (replayed(model, one, is_tuned=is_tuned) for one in (flow, changed))
    same = flow.sent_s <= until_s
    assert (before.quantiles_s[same] == after.quantiles_s[same])[100:].all()
    assert told(before)[~same] != pytest.approx(told(after)[~same], nan_ok=True)


def told(one: Replayed) -> np.ndarray:
    return one.quantiles_s[:, 1]


def test_the_networks_are_unlike_those_that_are_trained_on() -> None:
    for place in SHIFTED.values():
        rate = place.scenario.down.rate
        rtt_ms = place.scenario.down.delay_ms + place.scenario.up.delay_ms
        mbit_s = rate.mbit_s if isinstance(rate, FixedRateSpec) else None
        is_far = not RTT_MS[0] <= rtt_ms <= RTT_MS[1]
        is_odd = mbit_s is not None and not RATE_MBIT_S[0] <= mbit_s <= RATE_MBIT_S[1]
        is_stalling = isinstance(rate, CellularRateSpec) and rate.stall_ms > 500
        assert is_far + is_odd + is_stalling >= 1, place.name


def test_the_command_prints_the_table_and_writes_the_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_weights(tmp_path)
    data = made_data(tmp_path, {"test": 1}, 300)
    main(data, weights=weights, json=tmp_path / "rows.json")
    assert "family-test" in capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["network"], row["is_tuned"]) for row in rows] == [
        *((ALL, False), (ALL, True)),
        *(("family-test", False), ("family-test", True)),
    ]
