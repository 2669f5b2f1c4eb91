"""`eloquent lab stalls` and its networks: what options make of them, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from eloquent.errors import ConfigurationError
from eloquent_netem.lab.places import NetworkOptions, make_places, standard_places
from eloquent_netem.lab.rows import ORACLE
from eloquent_netem.lab.stalls_commands import check_writable, stalls, user_cache
from eloquent_netem.scenario import load_scenario
from eloquent_netem.scenario_parts import BurstLossSpec, IndependentLossSpec, TraceRateSpec


def trace(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_text("1\n2\n3\n")
    return path


def places(**options: Any) -> list[str]:
    return [place.name for place in make_places(NetworkOptions(**options))]


def test_the_standard_networks_have_names_of_their_own() -> None:
    assert [(place.name, source.name) for place, source in standard_places()] == [
        ("100 ms, 5 % loss", "30 tok/s"),
        ("100 ms, 10 % loss", "30 tok/s"),
        ("100 ms, 10 % loss in bursts of 150 ms", "30 tok/s"),
        ("300 ms, 10 % loss", "50 tok/s"),
    ]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"rtt_ms": 40.0}, "40 ms, 5 % loss"),
        ({"loss": 0.2}, "100 ms, 20 % loss"),
        ({"loss": 0.0}, "100 ms, 0 % loss"),
        ({"burst_ms": 150.0}, "100 ms, 5 % loss in bursts of 150 ms"),
        ({"rtt_ms": 40.0, "loss": 0.1, "burst_ms": 20.0}, "40 ms, 10 % loss in bursts of 20 ms"),
        ({"scenarios": ("train",)}, "train"),
        ({"scenarios": ("clean",), "loss": 0.05}, "clean, 5 % loss"),
        ({"scenarios": ("clean",), "rtt_ms": 80.0}, "clean, 80 ms"),
        (
            {"scenarios": ("clean",), "loss": 0.1, "burst_ms": 150.0, "rtt_ms": 80.0},
            "clean, 10 % loss in bursts of 150 ms, 80 ms",
        ),
    ],
)
def test_options_make_a_network_and_its_name(options: dict[str, Any], name: str) -> None:
    (place,) = make_places(NetworkOptions(**options))
    assert place.name == name
    rtt_ms, loss = options.get("rtt_ms"), options.get("loss")
    if rtt_ms is not None:
        assert place.rtt_s == pytest.approx(rtt_ms / 1000)
        assert place.scenario.up.delay_ms == place.scenario.down.delay_ms
    if loss is not None:
        assert place.loss == loss
        assert place.scenario.up.loss == place.scenario.down.loss
    if "burst_ms" in options:
        assert place.burst_ms == options["burst_ms"]


def test_a_scenario_keeps_what_the_options_do_not_say() -> None:
    (place,) = make_places(NetworkOptions(scenarios=("train",), rtt_ms=200, loss=0.1))
    train = load_scenario("train")
    assert place.scenario.outages == train.outages
    assert place.scenario.down.rate == train.down.rate
    assert place.scenario.down.jitter_ms == train.down.jitter_ms
    assert place.scenario.down.loss == IndependentLossSpec(probability=0.1)
    assert place.scenario.down.delay_ms == 100


def test_several_scenarios_each_once_and_files_by_their_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[down]\ndelay_ms = 5\n")
    assert places(scenarios=("train", str(file), "train")) == ["train", "mine"]


def test_a_recording_is_a_network(tmp_path: Path) -> None:
    down, up = trace(tmp_path, "city.down"), trace(tmp_path, "city.up")
    (place,) = make_places(NetworkOptions(down_trace=down, up_trace=up))
    assert place.name == "city"
    assert place.rtt_s == pytest.approx(0.05)
    assert isinstance(place.scenario.up.rate, TraceRateSpec)
    (lossy,) = make_places(NetworkOptions(down_trace=down, loss=0.02, burst_ms=50.0, rtt_ms=80.0))
    assert lossy.name == "city, 2 % loss in bursts of 50 ms, 80 ms"
    assert lossy.scenario.up.loss == BurstLossSpec(loss=0.02, burst_ms=50)
    assert lossy.rtt_s == pytest.approx(0.08)
    assert lossy.begins_s is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": 1.0}, "--loss is a probability"),
        ({"loss": float("nan")}, "--loss is a probability"),
        ({"loss": 5.0}, "5 % is 0.05"),
        ({"rtt_ms": float("inf")}, "--rtt-ms is 0 to"),
        ({"rtt_ms": -1.0}, "--rtt-ms is 0 to"),
        ({"burst_ms": 0.5}, "--burst-ms 0.5: a burst lasts"),
        ({"burst_ms": 1.0, "loss": 0.9}, "make the bursts longer"),
        ({"burst_ms": 150.0, "scenario": ("train",)}, "say how many with --loss"),
        ({"scenario": ("trian",)}, "did you mean 'train'"),
        ({"scenario": ("./absent.toml",)}, "absent.toml: cannot be read"),
        ({"scenario": ("train",), "down_trace": Path("x")}, "are two networks"),
        ({"up_trace": Path("x")}, "--up-trace goes with --down-trace"),
        ({"down_trace": Path("/nowhere/x.down")}, "The trace /nowhere/x.down cannot be read"),
        ({"down_trace": Path(__file__)}, "line 1: .* is no millisecond"),
        ({"schemes": ("nosuch",)}, "no scheme 'nosuch' with --driver sim"),
        ({"schemes": ("tcp-sse",)}, "no scheme 'tcp-sse' with --driver sim"),
        ({"driver": "ns3"}, "no driver 'ns3'"),
        ({"congestion": "bbr"}, "add --driver tun"),
        ({"seeds": 0}, "--seeds and --workers"),
        ({"workers": 0}, "--seeds and --workers"),
        ({"tokens": 0}, "--tokens"),
        ({"rate": float("nan")}, "--rate"),
        ({"rate": 10.0, "source": "recorded"}, "--rate is the constant source's"),
        ({"source": "live"}, "--driver tun, or record it first"),
        ({"source": "/nowhere/answer.json"}, "no source '/nowhere/answer.json': choose constant"),
        ({"source": "/"}, "The recording / cannot be read: Is a directory"),
        ({"source": __file__}, "is no recording"),
        ({"prompt": "Hello"}, "add --source live"),
        ({"json": Path("/nowhere/at/all.json")}, "Cannot write /nowhere/at/all.json"),
        ({"report": Path(__file__)}, "Cannot write"),
        ({"report": Path("/proc")}, "Cannot write /proc/report.html"),
    ],
)
def test_impossible_options_are_refused_before_the_work(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        stalls(**{"cache": tmp_path / "cache.jsonl", **options})
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_tables_and_writes_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / name for name in ("json", "cache")}
    stalls(
        loss=0.1,
        burst_ms=150,
        schemes=("retransmit", ORACLE),
        seeds=2,
        tokens=20,
        rate=25,
        workers=1,
        **files,
    )
    printed = capsys.readouterr()
    assert "100 ms, 10 % loss in bursts of 150 ms: 20 tokens, 25 tok/s, 2 seeds, sim" in printed.out
    assert re.search(r"retransmit +\d+\.\d\d ± ", printed.out)
    assert "4 of 4 runs" in printed.err
    rows = json.loads(files["json"].read_text())["rows"]
    assert {(row["scheme"], row["seed"]) for row in rows} == {
        (scheme, seed) for scheme in ("retransmit", ORACLE) for seed in range(2)
    }
    assert {row["tokens"] for row in rows} == {20}


def test_a_scenario_that_is_unfair_to_some_is_told_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "unfair.toml"
    file.write_text('[down.loss]\nkind = "packet-bursts"\nloss = 0.1\nburst_packets = 4\n')
    output = tmp_path / "rows.json"
    stalls(
        scenario=(str(file),),
        schemes=("retransmit",),
        seeds=2,
        tokens=5,
        workers=1,
        cache=tmp_path / "cache",
        json=output,
    )
    assert capfd.readouterr().err.count("packet-bursts step per packet") == 1
    assert "step per packet" in json.loads(output.read_text())["meta"]["warnings"][0]


def test_a_failed_run_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # No packet ever comes through, so that no run ends.
    file = tmp_path / "dead.toml"
    spans = 'kind = "spans"\nspans_s = [[0, 80000]]\neffect = "drop"'
    file.write_text(f"length_s = 80000\n[[outages]]\n{spans}\n")
    with pytest.raises(SystemExit) as ended:
        stalls(
            scenario=(str(file),),
            schemes=("tcp",),
            seeds=1,
            tokens=5,
            workers=1,
            cache=tmp_path / "cache",
        )
    assert ended.value.code == 1
    assert "FAILED: dead, 30 tok/s, sim, tcp, seed 0: " in capsys.readouterr().err


def test_the_users_cache_starts_anew_when_it_has_grown_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = user_cache()
    assert path == tmp_path / "eloquent" / "stalls.jsonl"
    path.write_text("x")
    assert user_cache().exists()
    monkeypatch.setattr("eloquent_netem.lab.stalls_commands.CACHE_MOST_BYTES", 0)
    assert not user_cache().exists()


def test_to_find_out_whether_a_file_can_be_written_changes_nothing(tmp_path: Path) -> None:
    old, link = tmp_path / "old", tmp_path / "link"
    old.write_text("kept")
    link.symlink_to(tmp_path / "not-yet")
    for path in (old, link, tmp_path / "new"):
        check_writable(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "old"]
    assert old.read_text() == "kept"


def test_results_that_cannot_be_written_are_not_lost(tmp_path: Path) -> None:
    full = Path("/dev/full")  # Each write to it fails as on a full disk.
    if not full.exists():
        pytest.skip("This system has no /dev/full.")
    cache = tmp_path / "cache"
    with pytest.raises(ConfigurationError, match=r"No space left on device.*are remembered"):
        stalls(loss=0.1, schemes=("tcp",), seeds=1, tokens=5, workers=1, cache=cache, json=full)
    assert cache.read_text().count('"key"') == 1
