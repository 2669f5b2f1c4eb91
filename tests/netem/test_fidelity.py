"""The fidelity report: its rules on figures made by hand, its form, and that its runs run."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tools import needs_tool

from eloquent_netem import fidelity
from eloquent_netem.fidelity import unrefused, write_json
from eloquent_netem.fidelity_rows import (
    Pair,
    Row,
    lateness_rows,
    markdown,
    mathis_bits_per_s,
    reno_row,
    tcp_rows,
    udp_rows,
    wilson_interval,
)
from eloquent_netem.fidelity_runs import (
    FidelityError,
    Runs,
    StoppedError,
    clocked_loss,
    simulated_tcp,
    simulated_udp,
)
from eloquent_netem.namespaces import NamespaceError, NamespaceId, processes_inside
from eloquent_netem.realtime import (
    Driver,
    DriverStats,
    Lateness,
    LatenessError,
    OverloadError,
)
from eloquent_netem.scenario import load_scenario

DEADLINE_S = 60.0
"Ends a hang; decides nothing."

ENDLESS_REPORT = """
import sys
from pathlib import Path
from eloquent_netem import fidelity
from eloquent_netem.errors import NetemError
fidelity.UDP_SCENARIOS = ()
if __name__ == "__main__":
    lengths = fidelity.Lengths(tokens=100_000, flood_s=0.1)
    try:
        sys.exit(fidelity.fidelity(seeds=2, json_path=Path(sys.argv[1]), lengths=lengths))
    except NetemError as error:
        sys.exit(f"netem: {error}")
"""


def pair(tun_s: float, model_s: float, arrived: int = 95, model_arrived: int = 95) -> Pair:
    return Pair([tun_s] * arrived, [model_s] * model_arrived)


def verdicts(rows: list[Row]) -> list[str]:
    return [row.verdict for row in rows]


def driver_stats(p99_s: float, *, is_real_time: bool) -> DriverStats:
    way = Driver(*load_scenario("clean").links(), deliver_up=print, deliver_down=print).stats().up
    return DriverStats(way, way, Lateness(100, 1e-5, p99_s, 1.0), is_real_time, 0, True)


def test_wilson_s_interval_is_the_textbook_s() -> None:
    # Agresti and Coull, 1998: none of 10 gives an upper end of z^2 / (10 + z^2).
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(5, 100) == pytest.approx((0.02154, 0.11175), abs=1e-4)


@pytest.mark.parametrize(
    ("tun_s", "verdict"),
    [(0.0559, "agrees"), (0.0561, "differs"), (0.0441, "agrees"), (0.0439, "differs")],
)
def test_udp_s_mean_may_be_off_by_a_tenth_and_a_millisecond(tun_s: float, verdict: str) -> None:
    assert verdicts(udp_rows("x", [pair(tun_s, 0.05)], 100, 0)) == [verdict, "agrees"]


@pytest.mark.parametrize(
    ("model_arrived", "verdict"), [(89, "agrees"), (88, "differs"), (97, "agrees"), (98, "differs")]
)
def test_udp_s_loss_must_lie_in_the_interval(model_arrived: int, verdict: str) -> None:
    rows = udp_rows("x", [pair(0.05, 0.05, 95, model_arrived)], 100, 0)
    assert verdicts(rows) == ["agrees", verdict]
    assert rows[1].measured == pytest.approx(5)
    assert rows[1].reference == pytest.approx(100 - model_arrived)


@pytest.mark.parametrize(("tun_s", "verdict"), [(0.0459, "agrees"), (0.0461, "differs")])
def test_tcp_s_mean_may_be_off_by_15_percent(tun_s: float, verdict: str) -> None:
    assert verdicts(tcp_rows(0.01, [[tun_s]], [[0.04]], 0)) == [verdict, "agrees"]


@pytest.mark.parametrize(("late", "verdict"), [(6, "agrees"), (7, "differs")])
def test_tcp_s_late_share_may_be_off_by_two_points(late: int, verdict: str) -> None:
    tun = [0.0249] * (100 - late) + [0.101] * late
    model = [0.0249] * 96 + [0.101] * 4
    rows = tcp_rows(0.05, [tun], [model], 0)
    assert verdicts(rows) == ["agrees", verdict]
    assert (rows[1].measured, rows[1].reference) == (pytest.approx(late), pytest.approx(4))


def test_a_row_tells_the_spread_over_the_seeds() -> None:
    rows = tcp_rows(0.01, [[0.03], [0.05]], [[0.04]], 1)
    assert rows[0].measured == pytest.approx(40)
    assert rows[0].spread == pytest.approx((30, 50))
    assert (rows[0].runs, rows[0].refused) == (2, 1)


def test_tcp_s_mean_says_how_sure_it_is() -> None:
    # Standard errors of 3 and 4 ms make one of 5 ms: 1.96 of these about a difference of 1 of 49.
    rows = tcp_rows(0.01, [[0.047], [0.053]], [[0.045], [0.053]], 0)
    assert rows[0].rule == "within 15%; 95% interval: -18% to +22%"


def test_mathis() -> None:
    assert mathis_bits_per_s(0.015, 0.1) == pytest.approx(8 * 1448 * 10 * 10)


@pytest.mark.parametrize(
    ("bits_per_s", "verdict"), [(3.26e6, "agrees"), (3.27e6, "differs"), (2.41e6, "differs")]
)
def test_reno_may_be_off_by_15_percent(bits_per_s: float, verdict: str) -> None:
    assert reno_row([bits_per_s], 0).verdict == verdict


def test_lateness_names_the_policy() -> None:
    rows = lateness_rows(driver_stats(1e-4, is_real_time=True))
    assert verdicts(rows) == ["agrees", "agrees"]
    assert "no SCHED_FIFO" not in rows[1].name
    assert rows[1].measured == pytest.approx(100)
    rows = lateness_rows(driver_stats(1e-4, is_real_time=False))
    assert "no SCHED_FIFO" in rows[1].name


def test_what_was_refused_has_no_figures() -> None:
    rows = [*udp_rows("x", [], 100, 2), *tcp_rows(0.01, [], [[0.04]], 2), reno_row([], 2)]
    rows += lateness_rows(None)
    assert verdicts(rows) == ["refused"] * 6
    assert {row.measured for row in rows} == {None}
    assert "2 of 2 runs refused" in markdown(rows)


def test_runs_that_are_unfaithful_are_counted_and_others_fail() -> None:
    def late() -> float:
        raise LatenessError("late")

    def overloaded() -> float:
        raise OverloadError("overloaded")

    def broken() -> float:
        raise FidelityError("broken")

    runs = Runs()
    assert unrefused([late, lambda: 0.0, overloaded, lambda: 2.0], runs) == ([0.0, 2.0], 2)
    assert not runs.stopped.is_set()
    with pytest.raises(FidelityError, match="broken"):
        unrefused([lambda: 1.0, broken], runs)
    assert runs.stopped.is_set()


def test_a_run_that_is_to_stop_does_not_begin() -> None:
    runs = Runs()
    runs.stopped.set()
    with pytest.raises(StoppedError):
        runs.flood_stats(1)


def test_the_simulator_loses_what_the_scenario_says() -> None:
    assert simulated_udp(load_scenario("clean"), 50, 1) == pytest.approx([0.025] * 50)
    delays = simulated_udp(load_scenario("lossy-5"), 4000, 1)
    assert 0.04 < 1 - len(delays) / 4000 < 0.06
    assert simulated_udp(load_scenario("lossy-5"), 4000, 1) == delays


def test_clocked_loss_is_what_it_says() -> None:
    delays = simulated_udp(clocked_loss(0.05), 4000, 1)
    assert 0.04 < 1 - len(delays) / 4000 < 0.06
    assert delays == pytest.approx([0.025] * len(delays))


def test_the_json_has_meta_and_rows(tmp_path: Path) -> None:
    path = tmp_path / "fidelity.json"
    write_json(path, {"seeds": 1}, [reno_row([3e6], 0), reno_row([], 1)])
    content = json.loads(path.read_text())
    assert content["meta"] == {"seeds": 1}
    first, second = content["rows"]
    assert set(first) == set(Row.__dataclass_fields__)
    assert (first["measured"], first["verdict"], first["spread"]) == (3.0, "agrees", [3.0, 3.0])
    assert (second["measured"], second["verdict"], second["refused"]) == (None, "refused", 1)


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FidelityError, match="cannot be written"):
        write_json(tmp_path / "no" / "such.json", {}, [])


def test_the_report_prints_its_table_and_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fidelity, "compare", lambda *_: iter([reno_row([9e6], 0)]))
    path = tmp_path / "fidelity.json"
    assert fidelity.fidelity(seeds=3, json_path=path) == 0
    assert "9.00" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert (content["meta"]["seeds"], content["meta"]["is_complete"]) == (3, True)
    assert content["rows"][0]["verdict"] == "differs"


def test_no_seeds_are_refused() -> None:
    with pytest.raises(FidelityError, match="--seeds"):
        fidelity.fidelity(seeds=0, json_path=None)


@needs_tool("ip")
def test_datagrams_and_tokens_come_through_the_router() -> None:
    try:
        runs = Runs(lateness_bound_s=math.inf)
        # One draw per packet: whatever the clock did, the same number is lost.
        udp = runs.udp_pair(load_scenario("lossy-5"), 60, 1)
        tcp = runs.tcp_delays(clocked_loss(0.01), 20, 1)
    except NamespaceError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))
    assert len(udp.tun_s) == len(udp.model_s) < 60
    assert len(tcp) == len(simulated_tcp(clocked_loss(0.01), 20, 1)) == 20


@needs_tool("ip")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_and_leaves_the_rows_that_are_done(
    number: signal.Signals, tmp_path: Path
) -> None:
    path, script = tmp_path / "fidelity.json", tmp_path / "report.py"
    script.write_text(ENDLESS_REPORT, encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, str(script), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as report:
        try:
            children = await_ends(report)
            if number == signal.SIGINT:
                os.killpg(report.pid, number)  # As a terminal does.
            else:
                report.send_signal(number)
            out, errors = report.communicate(timeout=DEADLINE_S)
        finally:
            report.kill()
    assert report.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert "not the whole report" in errors
    assert "lateness p99" in out
    content = json.loads(path.read_text())
    assert not content["meta"]["is_complete"]
    assert "lateness p99" in content["rows"][-1]["name"]
    # The routers are among them, and with their files the namespaces end.
    deadline = time.monotonic() + DEADLINE_S
    while any(Path(f"/proc/{pid}/exe").exists() for pid in children):
        assert time.monotonic() < deadline  # multiprocessing's helper ends a little later
        time.sleep(0.01)
    ours = Path("/proc/self/ns/net").stat()
    assert processes_inside(set(children.values()) - {(ours.st_dev, ours.st_ino)}) == []


def await_ends(report: "subprocess.Popen[str]") -> dict[int, NamespaceId]:
    """Wait until the programs of two networks run; return all children and their namespaces."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        children = children_of(report.pid)
        if len(set(children.values())) >= 7:
            return children
        if report.poll() is not None:
            assert report.stderr is not None
            said = report.stderr.read()
            if os.environ.get("CI") == "true" or "Traceback" in said:
                pytest.fail(said)
            pytest.skip(said)
        time.sleep(0.01)
    pytest.fail("The programs in the namespaces never ran.")


def children_of(parent: int) -> dict[int, NamespaceId]:
    """Return the children of a process, all threads', and their network namespaces."""
    found = {}
    for task in Path(f"/proc/{parent}/task").iterdir():
        with contextlib.suppress(OSError):  # Threads and processes end while we look.
            for pid in (task / "children").read_text().split():
                status = Path(f"/proc/{pid}/ns/net").stat()
                found[int(pid)] = (status.st_dev, status.st_ino)
    return found
