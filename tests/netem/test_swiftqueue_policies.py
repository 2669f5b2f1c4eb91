"""Marking policies beside each other: their runs, their tables, the bars, and the page."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from swiftqueue_light import light_place, random_weights

from eloquent.errors import ConfigurationError
from eloquent_netem.lab.cases import Cache, Job, Results, run_jobs
from eloquent_netem.lab.rows import Place
from eloquent_netem.lab.statistics import Interval
from eloquent_netem.lab.swiftqueue_markings import check_policies
from eloquent_netem.lab.swiftqueue_page import (
    cross_loss,
    findings,
    gain,
    share_of_oracle,
    sheets,
)
from eloquent_netem.lab.swiftqueue_policies import (
    CURVE_SHARES,
    PolicyCase,
    PolicyPlan,
    PolicyRow,
    PolicyStudy,
    check_schedulers,
    study_of,
    with_scheduler,
)
from eloquent_netem.scenario import load_scenario


def short_place() -> Place:
    place = light_place()
    return replace(place, scenario=replace(place.scenario, length_s=3.0))


def results_of(jobs: list[Job]) -> Results:
    """Run the jobs in this process, as the worker would."""
    return Results({job: job.case.run(job.scheme, job.seed) for job in jobs})


def test_every_policy_has_a_row_on_the_same_network(tmp_path: Path) -> None:
    weights = random_weights(tmp_path)
    plan = PolicyPlan(places=[short_place()], schedulers=["wrr"], seeds=[0], weights=weights)
    jobs = plan.jobs()
    study = study_of(jobs, results_of(jobs))
    assert [row.policy for row in study.rows] == [
        "all-l",
        "all-c",
        "random",
        "last-rtt",
        "swiftqueue",
        "oracle",
        "swiftqueue-no-copies",
        "swiftqueue-no-probes",
    ]
    by_policy = {row.policy: row for row in study.rows}
    assert all(row.scenario == "light" and row.scheduler == "wrr" for row in study.rows)
    for row in study.rows:
        assert 10 < row.latency_p50_ms <= row.latency_p99_ms <= row.latency_p999_ms
        assert row.cross_goodput_mbit == pytest.approx(
            row.cross_goodput_l_mbit + row.cross_goodput_c_mbit
        )
    assert by_policy["oracle"].latency_p99_ms < 0.8 * by_policy["all-l"].latency_p99_ms
    # A few leave unmarked until the first acknowledgement says that the path carries marks.
    assert by_policy["all-l"].c_share < 0.05
    assert by_policy["all-c"].c_share == 1
    assert 0 < by_policy["random"].c_share < 0.3
    assert by_policy["all-l"].c_share < by_policy["oracle"].c_share < 1
    assert set(study.curves_ms) == {("light", "wrr", row.policy) for row in study.rows}
    assert len(study.curves_ms["light", "wrr", "all-l"]) == len(CURVE_SHARES)
    timeline = study.timelines["light", "wrr"]
    assert len(timeline.l_ms) == len(timeline.c_ms) == len(timeline.queue) > 100


def test_the_rows_have_the_keys_that_the_file_promises() -> None:
    names = {one.name for one in fields(PolicyRow)}
    assert names >= {
        "scenario",
        "scheduler",
        "policy",
        "seed",
        "latency_p50_ms",
        "latency_p99_ms",
        "latency_p999_ms",
        "token_delay_p99_ms",
        "c_share",
        "cross_goodput_mbit",
    }


def test_both_schedulers_and_all_seeds_are_run_and_many_flows_once_each(tmp_path: Path) -> None:
    plan = PolicyPlan(
        places=[light_place()],
        policies=["all-l", "swiftqueue"],
        seeds=[0, 1],
        weights=random_weights(tmp_path),
        crowded=light_place(),
    )
    jobs = plan.jobs()
    cases = [job.case for job in jobs if isinstance(job.case, PolicyCase)]
    assert [case.flows for case in cases] == [1] * 8 + [20] * 8
    assert {case.title for case in cases} == {"light, wrr", "light, time-shifted"}
    assert len(set(jobs)) == 16


def test_weights_are_part_of_what_a_run_of_the_model_is_and_of_no_other(tmp_path: Path) -> None:
    """Other weights are other runs, and nothing else is run anew for them."""
    weights = random_weights(tmp_path)

    def cases() -> dict[str, str]:
        plan = PolicyPlan(places=[light_place()], schedulers=["wrr"], seeds=[0], weights=weights)
        return {f"{job.scheme} {job.case.is_race}": repr(job.case) for job in plan.jobs()}  # type: ignore[attr-defined]

    before = cases()
    weights.write_bytes(weights.read_bytes() + b" ")
    after = cases()
    changed = {name for name, case in after.items() if case != before[name]}
    assert changed == {
        "swiftqueue False",
        "swiftqueue-no-copies False",
        "swiftqueue-no-probes False",
    }


def test_without_the_model_no_weights_are_needed(tmp_path: Path) -> None:
    missing = tmp_path / "none.safetensors"
    options: dict[str, Any] = {"places": [light_place()], "weights": missing, "seeds": [0]}
    assert len(PolicyPlan(policies=["all-l", "oracle"], **options).jobs()) == 4
    with pytest.raises(ConfigurationError, match=r"none\.safetensors cannot be read"):
        PolicyPlan(policies=["swiftqueue"], **options).jobs()


def test_what_there_is_none_of_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no marking policy 'all-d'"):
        check_policies(["all-l", "all-d"])
    with pytest.raises(ConfigurationError, match="no scheduler 'fifo'"):
        check_schedulers(["fifo"])
    clean = Place(name="clean", scenario=load_scenario("clean"))
    with pytest.raises(ConfigurationError, match="clean has no DualPI2"):
        with_scheduler(clean, "wrr")


def test_a_crowd_is_measured_as_one(tmp_path: Path) -> None:
    jobs = [
        Job(PolicyCase(place=short_place(), flows=3), "all-l", 0),
        Job(
            PolicyCase(place=short_place(), flows=3, weights=random_weights(tmp_path)),
            "swiftqueue",
            0,
        ),
    ]
    study = study_of(jobs, results_of(jobs))
    assert not study.rows
    assert [row.policy for row in study.crowd] == ["all-l", "swiftqueue"]
    assert study.crowd[0].cross_goodput_mbit > 1


def test_runs_in_other_processes_give_the_same() -> None:
    job = Job(PolicyCase(place=short_place()), "all-l", 0)
    results = run_jobs([job], workers=1, cache=Cache(None))
    assert results.figures == results_of([job]).figures


ROW = PolicyRow(
    scenario="a",
    scheduler="wrr",
    policy="all-l",
    seed=0,
    latency_p50_ms=10.0,
    latency_p99_ms=100.0,
    latency_p999_ms=200.0,
    latency_every_packet_p99_ms=100.0,
    token_delay_p99_ms=90.0,
    c_share=0.0,
    copies_share=0.0,
    lost_share=0.0,
    packets_per_token=1.0,
    wire_bytes_per_token=140.0,
    cross_goodput_mbit=10.0,
    cross_goodput_l_mbit=6.0,
    cross_goodput_c_mbit=4.0,
)


def rows(
    scenario: str, *, ours: float, oracle: float, low: float = 100.0, cross: float = 10.0
) -> list[PolicyRow]:
    """P99 in ms on three seeds, alike but for a tenth of a millisecond."""
    return [
        replace(
            ROW,
            scenario=scenario,
            policy=policy,
            seed=seed,
            latency_p99_ms=p99 + seed / 10,
            cross_goodput_mbit=cross if policy == "swiftqueue" else 10.0,
        )
        for seed in range(3)
        for policy, p99 in (("all-l", low), ("swiftqueue", ours), ("oracle", oracle))
    ]


def figure(interval: Interval | None) -> float:
    assert interval is not None
    assert interval.low <= interval.figure <= interval.high
    return interval.figure


def test_the_gain_and_its_share_of_the_oracles() -> None:
    here = rows("a", ours=50, oracle=20)
    assert figure(gain(here, "swiftqueue")) == pytest.approx(50, abs=0.2)
    assert figure(gain(here, "oracle")) == pytest.approx(80, abs=0.2)
    assert figure(share_of_oracle(here, "swiftqueue")) == pytest.approx(62.5, abs=0.2)
    loss = cross_loss(rows("a", ours=50, oracle=20, cross=9.0), "swiftqueue")
    assert figure(loss) == pytest.approx(10)


def test_in_a_sum_each_network_has_the_same_weight() -> None:
    here = rows("a", ours=50, oracle=0) + rows("b", ours=1000, oracle=0, low=1000)
    assert figure(share_of_oracle(here, "swiftqueue")) == pytest.approx(25, abs=0.2)


def test_where_the_oracle_gains_little_there_is_no_share() -> None:
    assert share_of_oracle(rows("a", ours=99, oracle=97), "swiftqueue") is None
    assert share_of_oracle(rows("a", ours=99, oracle=97)[:2], "swiftqueue") is None


def test_each_bar_is_met_or_missed_by_its_own_figure() -> None:
    study = PolicyStudy(
        rows=(
            *rows("good", ours=30, oracle=20),
            *rows("weak", ours=70, oracle=20),
            *rows("worse", ours=110, oracle=95, cross=9.0),
        ),
        crowd=tuple(
            replace(row, cross_goodput_mbit=8.0) if row.policy == "swiftqueue" else row
            for row in rows("good", ours=100, oracle=100)
        ),
    )
    found = findings(study, {"good", "weak"})
    missed = {(one.what, one.where) for one in found if not one.is_met}
    assert missed == {
        ("P99 below that of all-l where the oracle's is by 60 %", "weak, wrr"),
        ("P99 above that of all-l", "worse, wrr"),
        ("goodput that cross traffic loses", "worse, wrr"),
        ("20 flows: goodput that cross traffic loses", "good, wrr"),
    }
    by_what = {one.what: one for one in found}
    share = by_what["share of the oracle's gain, congested networks (aim 80)"]
    assert share.figure == pytest.approx(62.5, abs=0.2)  # (70 + 30) / (80 + 80)
    assert all(one.half is not None and one.half >= 0 for one in found)


def test_the_tables_say_gain_share_and_change() -> None:
    study = PolicyStudy(
        rows=tuple(rows("a", ours=50, oracle=20, cross=9.0)),
        crowd=tuple(rows("b", ours=50, oracle=20)[:2]),
    )
    first, second = sheets(study)
    assert first.title == "a, wrr: 3 seeds"
    assert second.title == "20 flows at once: b, wrr: 1 seed"
    lines = {line[0]: dict(zip(first.header, line, strict=True)) for line in first.rows}
    assert lines["all-l"]["gain %"] == ""
    assert lines["swiftqueue"]["gain %"].startswith("50.0")
    assert lines["swiftqueue"]["of oracle's %"].startswith("62.")
    assert lines["swiftqueue"]["change %"].startswith("-10.0")
    assert lines["oracle"]["of oracle's %"] == ""
