"""`eloquent swiftqueue` and `eloquent lab swiftqueue`: options, files, exit codes."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from swiftqueue_light import LIGHT, random_weights

from eloquent.errors import ConfigurationError
from eloquent_netem.lab import swiftqueue_study
from eloquent_netem.lab.swiftqueue_commands import collect, lab_swiftqueue, train
from eloquent_netem.lab.swiftqueue_report import write_report
from eloquent_netem.lab.swiftqueue_speed import CONNECTIONS, measure
from eloquent_netem.lab.swiftqueue_study import Found, dumps


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def scenario(tmp_path: Path) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(LIGHT.replace("length_s = 6", "length_s = 3"))
    return str(path)


def test_the_policies_of_a_scenario_go_to_the_terminal_a_file_and_a_page(
    scenario: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab_swiftqueue(
        scenario=(scenario,),
        part=("policies",),
        seeds=2,
        schedulers=("wrr",),
        policies=("all-l", "swiftqueue", "oracle"),
        weights=random_weights(tmp_path),
        json=tmp_path / "out.json",
        markdown=tmp_path / "out.md",
        report=tmp_path / "report",
        workers=2,
    )
    out = capsys.readouterr().out
    assert "mine, wrr: 2 seeds" in out
    assert "P99 above that of all-l" in out
    content = json.loads((tmp_path / "out.json").read_text())
    assert list(content) == [
        "meta",
        "prediction",
        "policies",
        "many_flows",
        "speed",
        "findings",
    ]
    assert content["prediction"] == content["many_flows"] == []
    assert [(row["policy"], row["seed"]) for row in content["policies"]] == [
        ("all-l", 0),
        ("swiftqueue", 0),
        ("oracle", 0),
        ("all-l", 1),
        ("swiftqueue", 1),
        ("oracle", 1),
    ]
    assert content["meta"]["is_complete"]
    assert {"python", "aioquic", "numpy", "eloquent-stream"} <= set(content["meta"]["versions"])
    told = (tmp_path / "out.md").read_text()
    assert f"commit {content['meta']['commit']}" in told
    assert "### P99, wrr" in told
    figures = [row["latency_p99_ms"] for row in content["policies"] if row["policy"] == "oracle"]
    assert f" | {sum(figures) / 2:.1f} | " in told
    page = (tmp_path / "report" / "report.html").read_text()
    assert "SwiftQueue" in page
    pictures = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert pictures == {"p99.png", "latency.png", "timeline-1.png"}


def test_the_cost_of_predictions_is_a_part_with_bars(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swiftqueue_study, "measure", partial(measure, predictions=10))
    lab_swiftqueue(part=("speed",), json=tmp_path / "out.json", markdown=tmp_path / "out.md")
    assert "held for a connection" in capsys.readouterr().out
    content = json.loads((tmp_path / "out.json").read_text())
    assert [row["connections"] for row in content["speed"]["rows"]] == list(CONNECTIONS)
    assert {one["unit"] for one in content["findings"]} == {"us", "B"}
    assert "## Cost" in (tmp_path / "out.md").read_text()


def test_parts_of_other_times_are_shown_beside(
    scenario: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swiftqueue_study, "measure", partial(measure, predictions=10))
    first, page = tmp_path / "first.json", tmp_path / "page.md"
    lab_swiftqueue(
        scenario=(scenario,),
        part=("policies",),
        seeds=1,
        schedulers=("wrr",),
        policies=("all-l", "oracle"),
        json=first,
        workers=1,
    )
    lab_swiftqueue(part=("speed",), also=(first,), json=tmp_path / "both.json", markdown=page)
    lab_swiftqueue(
        scenario=(scenario,),
        part=("policies",),
        seeds=2,
        schedulers=("wrr",),
        policies=("all-l",),
        also=(first,),
        json=tmp_path / "more.json",
        workers=1,
    )
    rows = json.loads((tmp_path / "more.json").read_text())["policies"]
    assert [(row["policy"], row["seed"]) for row in rows] == [
        ("all-l", 0),
        ("all-l", 1),
        ("oracle", 0),
    ]
    both, told = json.loads((tmp_path / "both.json").read_text()), page.read_text()
    before = json.loads(first.read_text())
    assert both["policies"] == before["policies"]
    assert [one["part"] for one in both["findings"][-len(before["findings"]) :]] == [
        one["part"] for one in before["findings"]
    ]
    assert "### P99, wrr" in told
    assert "## Cost" in told
    assert told.count("- policies: `eloquent") == 1
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ConfigurationError, match="has no figures"):
        lab_swiftqueue(part=("speed",), also=(tmp_path / "other.json",))


def test_a_page_without_runs_has_no_figures(tmp_path: Path) -> None:
    path = write_report(Found(), tmp_path)
    assert path.read_text().startswith("<!doctype html>")
    assert not list(tmp_path.glob("*.png"))
    assert json.loads(dumps(Found()))["policies"] == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"part": ("all",)}, "no part 'all': choose prediction or policies or speed"),
        ({"policies": ("all",)}, "no marking policy 'all'"),
        ({"schedulers": ("fifo",)}, "no scheduler 'fifo'"),
        ({"seeds": 0}, "must be at least 1"),
        ({"scenario": ("nowhere",)}, "no scenario 'nowhere'"),
        ({"scenario": ("clean",), "part": ("policies",)}, "clean has no DualPI2"),
        ({"up_trace": Path("x.up")}, "--up-trace goes with --down-trace"),
        ({"down_trace": Path("none.down")}, "none.down"),
        ({"json": Path("/none/x.json")}, "Cannot write"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_work(
    options: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swiftqueue_study, "run_jobs", None)  # whoever runs one fails
    monkeypatch.setattr(swiftqueue_study, "collect", None)
    with pytest.raises(ConfigurationError, match=says):
        lab_swiftqueue(**options)


def test_collecting_says_where_and_refuses_nonsense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collect(families=("idle",), flows=1, out=tmp_path / "data", length_s=1.0, workers=1)
    assert f"1 flows: {tmp_path / 'data'}" in capsys.readouterr().err
    assert len(list((tmp_path / "data").glob("idle-1-*.npz"))) == 1
    with pytest.raises(ConfigurationError, match="at least 1"):
        collect(flows=0)
    with pytest.raises(ConfigurationError, match="no scenario family"):
        collect(families=("x",))


def test_training_needs_data_that_was_collected(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="eloquent swiftqueue collect"):
        train(data=tmp_path, out=tmp_path / "w.safetensors", minutes=1)
    with pytest.raises(ConfigurationError, match="--minutes"):
        train(data=tmp_path, minutes=0)
