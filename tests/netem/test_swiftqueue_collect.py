"""Collecting records: what the manifest says, what is kept, and what is never trained on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from swiftqueue_light import light_place

from eloquent.errors import ConfigurationError
from eloquent.swiftqueue.dataset import Manifest, SplitError, file_digest, replay
from eloquent_netem.lab.cases import Job, Results
from eloquent_netem.lab.rows import Place
from eloquent_netem.lab.swiftqueue_collect import (
    MEMORY,
    OWN,
    CollectCase,
    Files,
    check_families,
    collect,
    family_jobs,
    held_out_jobs,
    judged_data,
    recorded_networks,
    write_manifest,
)
from eloquent_netem.lab.swiftqueue_markings import EXPLORING
from eloquent_netem.lab.swiftqueue_places import FAMILIES


def place(name: str = "light") -> Place:
    return replace(light_place(), name=name)


def jobs_in(folder: Path, flows: int = 2, name: str = "light") -> list[Job]:
    return held_out_jobs({name: [place(name)]}, folder, flows=flows, seed=3, length_s=2.0)


def collected(folder: Path, flows: int = 2, name: str = "light") -> Results:
    return collect(jobs_in(folder, flows, name), folder, workers=1, command="collect")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    collected(folder)
    return folder


def test_each_flow_has_a_file_and_a_line_in_the_manifest(data: Path) -> None:
    manifest = Manifest.load(data)
    assert [(entry.family, entry.split) for entry in manifest.entries] == [("light", "test")] * 2
    assert [entry.about["policy"] for entry in manifest.entries] == list(EXPLORING)[:2]
    assert [entry.about["scheduler"] for entry in manifest.entries] == ["wrr", "time-shifted"]
    assert [entry.about["seed"] for entry in manifest.entries] == [3, 4]
    assert manifest.meta["is_complete"]
    assert manifest.meta["command"] == "collect"
    for entry in manifest.entries:
        flow = entry.load()  # checks the digest
        assert len(flow.sent_s) == entry.about["packets"]
        assert entry.about["reported_share"] > 0.9
        assert 20 <= entry.about["tokens_per_s"] <= 200
        assert np.isfinite(replay(flow).events).all()


def test_the_clocks_of_both_ends_differ(data: Path) -> None:
    least_s = [float(np.nanmin(entry.load().delay_s)) for entry in Manifest.load(data).entries]
    assert len({round(one) for one in least_s}) == 2
    assert all(abs(one) < 11 for one in least_s)


def test_what_was_collected_is_not_collected_again(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in data.glob("*.npz")}
    monkeypatch.setattr(CollectCase, "run", None)  # whoever runs one fails
    assert collected(data).failures == {}
    assert {path.name: path.stat().st_mtime_ns for path in data.glob("*.npz")} == before


def test_a_file_that_is_missing_or_changed_is_collected_again(tmp_path: Path) -> None:
    results = collected(tmp_path)
    first, second = (results.figures[job] for job in jobs_in(tmp_path))
    (tmp_path / first["file"]).unlink()
    with (tmp_path / second["file"]).open("ab") as file:
        file.write(b"more")
    assert [Files(tmp_path).get(job) for job in jobs_in(tmp_path)] == [None, None]
    collected(tmp_path)
    assert file_digest(tmp_path / first["file"]) == first["digest"]
    assert file_digest(tmp_path / second["file"]) == second["digest"]
    Manifest.load(tmp_path).entries[0].load()


def test_what_comes_later_is_added(tmp_path: Path) -> None:
    collected(tmp_path, flows=1)
    collected(tmp_path, flows=1, name="more")
    collected(tmp_path, flows=2)
    assert [entry.path.name for entry in Manifest.load(tmp_path).entries] == [
        "more-3-wrr-all-l.npz",
        "light-3-wrr-all-l.npz",
        "light-4-time-shifted-all-c.npz",
    ]
    assert (tmp_path / MEMORY).exists()


def test_families_keep_their_split_and_meet_all_policies_and_schedulers(tmp_path: Path) -> None:
    jobs = family_jobs(FAMILIES, tmp_path, flows=18, seed=1)
    for name, family in FAMILIES.items():
        cases = [job.case for job in jobs if isinstance(job.case, CollectCase)]
        mine = [case for case in cases if case.family == name]
        assert {case.split for case in mine} == {family.split}
        pairs = {
            (job.case.scheduler, job.scheme)
            for job in jobs
            if isinstance(job.case, CollectCase) and job.case.family == name
        }
        assert len(pairs) == 18
    assert len({(job.case.path(job.scheme, job.seed)) for job in jobs}) == len(jobs)  # type: ignore[attr-defined]


def test_recordings_are_for_testing_whatever_else_is_collected(tmp_path: Path) -> None:
    (tmp_path / "a.down").write_text("1\n2\n")
    (tmp_path / "b.down").write_text("1\n")
    (tmp_path / "b.up").write_text("1\n")
    networks = recorded_networks([tmp_path, tmp_path / "a.down"])
    assert list(networks) == ["a", "b"]
    jobs = held_out_jobs(networks, tmp_path, flows=6, seed=1)
    cases = [job.case for job in jobs if isinstance(job.case, CollectCase)]
    assert {case.split for case in cases} == {"test"}
    assert [case.family for case in cases] == ["a"] * 6 + ["b"] * 6
    assert len({(case.place.name, case.scheduler) for case in cases}) == 12


def test_what_is_no_family_or_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no scenario family 'burst': choose from bursts"):
        check_families(["burst"])
    with pytest.raises(ConfigurationError, match="is no recording"):
        recorded_networks([tmp_path])
    with pytest.raises(ConfigurationError, match="is no recording"):
        recorded_networks([tmp_path / "none.down"])


def test_any_name_of_a_network_makes_a_file(tmp_path: Path) -> None:
    (job,) = held_out_jobs({"C1, 20 Mbit/s": [place()]}, tmp_path, flows=1, seed=0)
    assert isinstance(job.case, CollectCase)
    assert job.case.path("all-l", 0) == tmp_path / "C1-20-Mbit-s-0-wrr-all-l.npz"


def test_networks_of_ones_own_are_judged_beside_what_was_learnt(data: Path, tmp_path: Path) -> None:
    """The data's own test flows are left out, and nothing of it changes."""
    rows = json.loads((data / "manifest.json").read_text())["flows"]
    learnt = [rows[0] | {"split": "train", "family": "bursts"}, rows[1]]
    for row in learnt:
        (tmp_path / row["file"]).write_bytes((data / row["file"]).read_bytes())
    write_manifest(tmp_path, {}, learnt)
    before = (tmp_path / "manifest.json").read_bytes()
    short = replace(place("own"), scenario=replace(light_place().scenario, length_s=2.0))
    folder = judged_data(tmp_path, [short], flows=1, workers=1, command="x", length_s=2.0)
    assert folder == tmp_path / OWN
    found = Manifest.load(folder).entries
    assert [(entry.family, entry.split) for entry in found] == [
        ("bursts", "train"),
        ("own", "test"),
    ]
    for entry in found:
        entry.load()
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_a_network_of_a_family_that_is_learnt_of_is_found_out(data: Path, tmp_path: Path) -> None:
    row = json.loads((data / "manifest.json").read_text())["flows"][0]
    write_manifest(tmp_path, {}, [row | {"split": "train", "family": "bursts"}])
    drawn = replace(place("bursts-7"), scenario=light_place().scenario)
    folder = judged_data(tmp_path, [drawn], flows=1, workers=1, command="x", length_s=1.0)
    with pytest.raises(SplitError, match="'bursts' is both in train and in test"):
        Manifest.load(folder)
