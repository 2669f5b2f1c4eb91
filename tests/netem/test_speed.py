"""The speed report measures real work, and says where a figure misses its bound."""

import json
from pathlib import Path

import pytest

from eloquent.errors import ConfigurationError
from eloquent_netem.lab import commands, speed
from eloquent_netem.lab.speed import (
    Speed,
    SpeedError,
    dualpi2_packets_per_s,
    measure,
    to_json,
    virtual_time,
)


def figure(measured: float, bound: float | None = 50.0) -> Speed:
    return Speed("Virtual time", "virtual s per s", measured, bound, (measured, measured + 9))


def test_all_figures_are_measured_three_times() -> None:
    speeds = measure(virtual_s=2, packets=2000)
    assert [each.bound for each in speeds] == [50, None, 200_000]
    for each in speeds:
        assert len(each.runs) == 3
        assert each.measured == sorted(each.runs)[1] > 0


@pytest.mark.parametrize(("measured", "is_met"), [(50.0, True), (49.9, False)])
def test_a_bound_is_met_or_missed(measured: float, is_met: bool) -> None:
    assert figure(measured).is_met is is_met
    assert ("MISSED" in str(figure(measured))) is not is_met


def test_a_figure_without_a_bound_misses_none() -> None:
    assert figure(0.1, None).is_met
    assert str(figure(80.0, None)) == "Virtual time: 80 virtual s per s (80 to 89)"


def test_a_connection_that_loses_datagrams_is_no_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    lossy = speed.load_scenario("lossy-10")
    monkeypatch.setattr(speed, "load_scenario", lambda _: lossy)
    with pytest.raises(SpeedError, match="of 200 datagrams arrived"):
        virtual_time(4)


def test_a_queue_that_drops_is_no_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "BACKLOG_PACKETS", 4000)
    with pytest.raises(SpeedError, match="lower backlog"):
        dualpi2_packets_per_s(20_000)


@pytest.mark.parametrize("measured", [80.0, 30.0])
def test_the_command_prints_writes_and_fails_where_a_bound_is_missed(
    measured: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(speed, "measure", lambda: [figure(measured), figure(1, None)])
    path = tmp_path / "speed.json"
    if measured < 50:
        with pytest.raises(SystemExit) as end:
            commands.speed(json=path)
        assert end.value.code == 1
    else:
        commands.speed(json=path)
    assert capsys.readouterr().out.count("Virtual time") == 2
    content = json.loads(path.read_text())
    assert [row["is_met"] for row in content["rows"]] == [measured >= 50, True]
    assert content == json.loads(json.dumps(to_json([figure(measured), figure(1, None)])))


def test_a_file_that_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Cannot write"):
        commands.speed(json=tmp_path / "no" / "such.json")
