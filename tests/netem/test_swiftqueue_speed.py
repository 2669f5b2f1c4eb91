"""The figures of SwiftQueue's speed are of real work, and say where a bound is missed."""

from dataclasses import replace

import pytest

from eloquent.swiftqueue.features import MAX_PENDING
from eloquent_netem.lab.swiftqueue_speed import (
    HEADER,
    Row,
    Speed,
    findings,
    measure,
    memory_bytes,
    random_model,
    sheet,
)

ROW = Row(
    connections=32,
    event_us=6.0,
    forecast_us=4.0,
    prediction_us=10.0,
    prediction_p99_us=20.0,
    whole_us=70.0,
    other_threads=0.0,
)


def test_all_times_are_measured() -> None:
    speed = measure(random_model(), connections=(1, 3), predictions=3)
    rows = speed.rows
    assert [row.connections for row in rows] == [1, 3]
    for row in rows:
        assert 0 < row.event_us < row.prediction_us <= row.prediction_p99_us
        assert 0 < row.forecast_us < row.prediction_us
        assert row.whole_us > 0
    assert speed.held_bytes > random_model().slot_bytes


def test_a_connection_holds_less_than_a_megabyte() -> None:
    """Its slot, and at least what three full memories of packet numbers take."""
    model = random_model()
    held = memory_bytes(model)
    assert model.slot_bytes + 3 * 8 * MAX_PENDING < held < 1e6


@pytest.mark.parametrize(("prediction_us", "is_met"), [(15.0, True), (15.1, False)])
def test_a_slow_prediction_misses_its_bound(prediction_us: float, is_met: bool) -> None:
    rows = replace(ROW, prediction_us=prediction_us), replace(ROW, connections=3)
    speed = Speed(rows=rows, held_bytes=10**6)
    assert [found.is_met for found in findings(speed)] == [is_met, True]


def test_much_memory_misses_its_bound() -> None:
    assert not findings(Speed(rows=(), held_bytes=10**6 + 1))[0].is_met


def test_the_table_has_a_line_for_each_number_of_connections() -> None:
    shown = sheet(Speed(rows=(ROW,), held_bytes=1))
    assert shown.header == HEADER
    assert shown.rows == (("32", "6.0", "4.0", "10.0", "20.0", "70.0", "0.00"),)
