"""The parts of `eloquent lab transport`: small runs of each, their bounds, and how the runs end."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from eloquent_netem.lab.cancel import CancelCase, cancel_jobs, cancel_report
from eloquent_netem.lab.cases import Cache, Figures, Job, Results, run_jobs
from eloquent_netem.lab.findings import Finding, Report
from eloquent_netem.lab.liveness import LivenessCase, liveness_jobs, liveness_report
from eloquent_netem.lab.measures import DeliveryError
from eloquent_netem.lab.outages import OutageCase, outage_cases, outage_jobs, outage_report
from eloquent_netem.lab.places import RECORDINGS
from eloquent_netem.lab.simulated import scenario_path
from eloquent_netem.lab.traces import ScenarioCase, trace_cases, whole_grid_report
from eloquent_netem.lab.transport import Options, Part, make_parts, transport
from eloquent_netem.lab.wire import CELL, WireCase, wire_report
from eloquent_netem.scenario import parse_scenario


@pytest.mark.parametrize(
    ("case", "bound_ms"),
    [
        (OutageCase(1, 0.1, 30), 150 + 50),
        (OutageCase(5, 0.3, 100), 450 + 50),  # 6 kB: 6 packets
        (OutageCase(60, 0.05, 10), 75 + 50 + 300),  # 7.2 kB: 7 packets
        (OutageCase(60, 0.1, 30), 150 + 50 + 300 + 100),  # 19 packets: 10, then 9
        (OutageCase(60, 0.1, 100), 150 + 50 + 300 + 200),  # 63 packets: 10, 20, 33
    ],
)
def test_a_long_backlog_has_a_slow_start(case: OutageCase, bound_ms: float) -> None:
    assert 1000 * case.bound_s == pytest.approx(bound_ms)


def test_recovery_counts_from_the_links_return() -> None:
    found = OutageCase(1.0, 0.1, 30).run("eloquent", 1)
    assert 0.05 <= found["recovery_s"] < 1
    assert found["server_packets_per_s"] > 5
    assert found["client_packets_per_s"] > 0


def test_a_slow_seed_or_a_failed_run_misses_the_bound() -> None:
    results = Results()
    for job in outage_jobs(range(2)):
        recovery_s = 0.0
        if job == Job(OutageCase(5.0, 0.1, 30.0), "eloquent", 1):
            recovery_s = 0.21
        results.figures[job] = {
            "recovery_s": recovery_s,
            "server_packets_per_s": 2.0,
            "client_packets_per_s": 0.5,
        }
    missed = [finding for finding in outage_report(results).findings if not finding.is_met]
    assert [finding.where for finding in missed] == ["5 s outage, 100 ms, 30 tok/s: 210 ms"]
    failed = Job(outage_cases()[0], "eloquent", 0)
    results.failures[failed] = "lost"
    assert sum(not finding.is_met for finding in outage_report(results).findings) == 2


def test_bytes_per_token_count_both_ways_and_all_headers() -> None:
    tcp = WireCase(is_padded=False).run("tcp", 0)
    # A segment of 6 bytes and a bare ACK, each with 20 bytes of IP and 32 of TCP headers.
    assert tcp["down_bytes_per_token"] == pytest.approx(58, rel=0.01)
    assert tcp["up_bytes_per_token"] == pytest.approx(52, rel=0.01)
    results = Results()
    for is_padded, down in ((False, 100.0), (True, 171.0)):
        results.figures[Job(WireCase(is_padded), "eloquent", 0)] = {
            "down_bytes_per_token": down,
            "up_bytes_per_token": 50.0,
            "down_packets_per_token": 1.0,
            "up_packets_per_token": 0.5,
        }
    assert [finding.is_met for finding in wire_report(results).findings] == [True, False]
    assert CELL.loss == 0


def test_without_loss_a_cancel_takes_half_a_round_trip() -> None:
    assert CancelCase(0.1, 0.0).run("eloquent", 3)["cancel_s"] == pytest.approx(0.05, abs=1e-6)


def test_under_loss_the_95th_percentile_of_many_cancels_counts() -> None:
    jobs = cancel_jobs(range(5))
    assert sum(job.case == CancelCase(0.1, 0.2) for job in jobs) == 200
    results = Results()
    for job in jobs:
        assert isinstance(job.case, CancelCase)
        late = {CancelCase(0.1, 0.2): 11, CancelCase(0.05, 0.2): 10}.get(job.case, 0)
        results.figures[job] = {"cancel_s": 0.31 if job.seed < late else 0.02}
    missed = [finding.where for finding in cancel_report(results).findings if not finding.is_met]
    assert missed == ["100 ms, 20 % loss: 310 ms"]


@pytest.mark.parametrize("loss", [0.0, 0.2])
def test_both_sides_notice_a_dead_link(loss: float) -> None:
    found = LivenessCase(0.1, loss, dies=True).run("eloquent", 0)
    assert 0.5 < found["client_detected_s"] < 2.5
    assert 0.5 < found["server_detected_s"] < 2.5


def test_false_alarms_are_counted_by_the_hour_and_the_slowest_detection_counts() -> None:
    results = Results()
    for job in liveness_jobs(range(2)):
        assert isinstance(job.case, LivenessCase)
        is_bad = job.case.rtt_s == 0.3 and job.seed == 1
        results.figures[job] = {
            "client_alarms": 3.0 if is_bad else 0.0,
            "server_alarms": 0.0,
            "client_detected_s": 1.9,
            "server_detected_s": 2.1 if is_bad and job.case.loss else 1.9,
            "up_packets_per_s": 3.0,
            "down_packets_per_s": 3.0,
        }
    missed = [one for one in liveness_report(results).findings if not one.is_met]
    assert [(one.where, one.figure) for one in missed] == [
        ("300 ms, 20 % loss", 1.5),
        ("300 ms, 20 % loss", 2.1),
    ]


def test_the_oracle_waits_out_a_handover_and_for_the_rate() -> None:
    scenario = parse_scenario(
        """
        [[outages]]
        kind = "spans"
        spans_s = [[2.0, 2.5]]
        effect = "hold"
        [down]
        delay_ms = 25
        rate = { kind = "fixed", mbit_s = 10 }
        """
    )
    path = scenario_path(scenario, 0, begin_s=1.5)  # 1.5 s of the scenario at 1 s of the run
    assert path.passes_from(1.4) == pytest.approx(1.4)
    assert path.passes_from(1.6) == pytest.approx(2.0)
    assert path.base_delay_s == 0.025


def test_recordings_are_replayed_from_a_folder_and_the_absent_are_named(tmp_path: Path) -> None:
    name = RECORDINGS[0]
    every_ms = "\n".join(str(ms) for ms in range(1, 2000) if not 900 < ms < 1300)
    (tmp_path / f"{name}.down").write_text(every_ms)
    assert [case.name for case in trace_cases(tmp_path)] == ["handover", name]
    case = replace(trace_cases(tmp_path)[1], tokens=90)
    found = case.run("eloquent", 0)
    assert found["oracle_delay_p99_s"] == pytest.approx(0.4, abs=0.05)
    assert found["stall_ratio"] >= found["oracle_stall_ratio"]
    assert found == case.run("eloquent", 0)
    assert case.run("tcp", 0)["stall_ratio"] >= found["oracle_stall_ratio"]
    notes = whole_grid_report(Results(), tmp_path).notes
    assert RECORDINGS[1] in notes
    assert name not in notes


def test_packets_that_wait_for_a_handover_come_after_it() -> None:
    found = replace(ScenarioCase("handover"), tokens=300).run("eloquent", 0)
    assert found["delay_max_s"] > 0.2
    assert found["stall_ratio"] >= found["oracle_stall_ratio"] > 0


@dataclass(frozen=True)
class Toy:
    fails: bool = False
    takes_s: float = 0.0

    @property
    def title(self) -> str:
        return "toy"

    def run(self, scheme: str, seed: int) -> Figures:
        if self.fails and seed == 1:
            raise DeliveryError("lost a token")
        time.sleep(self.takes_s)
        return {"figure": float(seed)}


def toy_part(toy: Toy, bound: float) -> Part:
    def report(results: Results) -> Report:
        worst = max(found["figure"] for found in results.figures.values())
        failed = Finding(part="toy", what="failed", figure=len(results.failures), bound=0)
        return Report("toy", [Finding(part="toy", what="worst", figure=worst, bound=bound), failed])

    return Part("toy", lambda seeds: [Job(toy, "eloquent", seed) for seed in seeds], report)


@pytest.mark.parametrize(
    ("toy", "bound", "code"), [(Toy(), 2, 0), (Toy(), 1, 1), (Toy(fails=True), 2, 1)]
)
def test_the_exit_code_says_whether_all_bounds_are_met(
    toy: Toy, bound: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / name for name in ("json", "markdown")}
    options = Options(seeds=range(3), workers=1, **files)
    assert transport([toy_part(toy, bound)], options) == code
    written = json.loads(files["json"].read_text())
    assert [finding["figure"] for finding in written["findings"]] == [2, int(toy.fails)]
    assert len(written["rows"]) == 3 - toy.fails
    assert written["meta"]["is_complete"]
    assert f"| toy | worst | 2 | <= {bound} |" in files["markdown"].read_text()
    printed = capsys.readouterr()
    assert "worst" in printed.out
    assert "3 of 3 runs" in printed.err
    assert ("lost a token" in printed.err) is toy.fails


def test_ctrl_c_keeps_what_is_done_and_begins_nothing_more() -> None:
    def interrupt(done: int, total: int) -> None:
        if (done, total) == (3, 1000):
            raise KeyboardInterrupt

    jobs = [Job(Toy(takes_s=0.02), "eloquent", seed) for seed in range(1000)]
    results = run_jobs(jobs, workers=1, cache=Cache(None), progress=interrupt)
    assert not results.is_complete
    assert 3 <= len(results.figures) < 1000
    assert not results.failures


def test_all_parts_have_their_names(tmp_path: Path) -> None:
    names = ["grid", "wire", "outages", "fairness", "cancel", "liveness"]
    assert list(make_parts(tmp_path)) == names
