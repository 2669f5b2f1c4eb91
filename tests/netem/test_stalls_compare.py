"""The comparison as a whole: what is run, what is remembered, what fails it, how it ends early."""

import io
import json
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eloquent.core import schemes
from eloquent.core.retransmit import RetransmitSender
from eloquent.core.wire import Bundle
from eloquent.errors import ConfigurationError
from eloquent_netem.errors import NetemError
from eloquent_netem.lab import cases
from eloquent_netem.lab.answer import START_S, AnswerRun
from eloquent_netem.lab.measures import DeliveryError
from eloquent_netem.lab.places import synthetic
from eloquent_netem.lab.rows import ORACLE, Arrivals, Place
from eloquent_netem.lab.simulated import SimDriver, scenario_path
from eloquent_netem.lab.sources import ConstantRate, LiveModel, Recording, Source
from eloquent_netem.lab.stalls import (
    KEPT_SEEDS,
    Comparison,
    Plan,
    compare,
    default_schemes,
    dumps,
    find_driver,
)
from eloquent_netem.lab.table import tables, terminal
from eloquent_netem.sim import simulate

PLACE = synthetic(rtt_ms=40, loss=0.1)
SOURCE = ConstantRate(50, 40)
PLAN = Plan(
    pairs=((PLACE, SOURCE), (synthetic(rtt_ms=80, loss=0.05, burst_ms=50), SOURCE)),
    driver=SimDriver(),
    schemes=("eloquent", "retransmit", ORACLE),
    seeds=range(2),
    workers=2,
)


@dataclass(frozen=True)
class ToyDriver:
    """A driver whose answers are made up."""

    change: tuple[tuple[str, Any], ...] = ()
    "Of the arrivals of its scheme `broken`."
    name: str = "toy"
    schemes: tuple[str, ...] = ("sound", "broken")
    most_workers: int | None = 1

    def meta(self) -> dict[str, object]:
        return {"made": "up"}

    def check(self) -> None:
        if dict(self.change).get("is_absent"):
            raise NetemError("This machine has no toys.")

    def run(self, place: Place, scheme: str, seed: int, source: Source) -> Arrivals:
        sound = Arrivals(
            generated_s=(1.0, 1.1),
            rendered_s=(1.02, 1.12),
            requested_s=0.0,
            base_delay_s=0.02,
            origin_s=0.0,
            downlink_packets=2,
            downlink_bytes=100,
            uplink_bytes=50,
            lateness_p99_us=100.0 + seed,
        )
        return sound if scheme == "sound" else replace(sound, **dict(self.change))


def toys(**change: Any) -> Plan:
    driver = ToyDriver(tuple(change.items()))
    return replace(PLAN, driver=driver, schemes=("sound", "broken"), workers=1)


def remembered(cache: Path) -> list[str]:
    return [line for line in cache.read_text().splitlines() if line]


@pytest.fixture
def broken_schemes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add schemes that lose, double or change one byte of the tokens that they send."""

    class Spoiling(RetransmitSender):
        @staticmethod
        def spoil(data: bytes) -> bytes:
            raise NotImplementedError

        def next_bundle(self, now: float, room: int) -> Bundle | None:
            bundle = super().next_bundle(now, room)
            if bundle is None or bundle.number != 20:
                return bundle
            return replace(bundle, data=self.spoil(bundle.data))

    def scheme(spoil: Any) -> type[Spoiling]:
        return type("Spoiled", (Spoiling,), {"spoil": staticmethod(spoil)})

    monkeypatch.setitem(schemes.SCHEMES, "dropping", scheme(lambda data: data[:5] + data[6:]))
    monkeypatch.setitem(schemes.SCHEMES, "doubling", scheme(lambda data: data[:5] + data[4:]))
    monkeypatch.setitem(
        schemes.SCHEMES, "changing", scheme(lambda data: data[:5] + b"?" + data[6:])
    )


def test_every_place_scheme_and_seed_has_a_row_and_the_same_seeds_the_same_rows() -> None:
    found = compare(PLAN)
    assert [(row.scenario, row.seed, row.scheme) for row in found.rows] == [
        (place.name, seed, scheme)
        for place, _ in PLAN.pairs
        for seed in PLAN.seeds
        for scheme in PLAN.schemes
    ]
    assert found.is_complete
    assert not found.failures
    again = compare(replace(PLAN, workers=1))
    assert again.rows == found.rows
    assert again.arrivals == found.arrivals
    other = compare(replace(PLAN, seeds=range(2, 4)))
    assert {row.stall_ratio for row in other.rows} != {row.stall_ratio for row in found.rows}


def test_the_file_has_meta_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["lab", "stalls", "--prompt", "Why is it's sky blue?", "--json", "a b.json"]
    monkeypatch.setattr("sys.argv", ["eloquent", *words])
    found = compare(replace(PLAN, seeds=range(1)))
    content = json.loads(dumps(found))
    assert content.keys() == {"meta", "rows"}
    assert len(content["rows"]) == 6
    meta = content["meta"]
    assert meta["seeds"] == [0]
    assert meta["schemes"] == list(PLAN.schemes)
    assert meta["driver"]["name"] == "sim"
    assert meta["fidelity"] is None
    assert shlex.split(meta["command"]) == ["eloquent", *words]
    assert {"versions", "platform", "begun_at", "took_s"} <= meta.keys()


def test_the_tables_have_every_network_and_scheme_and_the_sum_of_both() -> None:
    pairs = ((synthetic(rtt_ms=300, loss=0.2), SOURCE), PLAN.pairs[1])
    found = compare(replace(PLAN, pairs=pairs))
    sheets = tables(found.rows)
    assert [sheet.title.partition(":")[0] for sheet in sheets[:2]] == [
        place.name for place, _ in pairs
    ]
    for sheet in sheets[:2]:
        assert [line[0] for line in sheet.rows] == list(PLAN.schemes)
        assert all(len(line) == len(sheet.header) for line in sheet.rows)
    assert [line[:2] for line in sheets[2].rows] == [
        ("retransmit", "strict"),
        ("retransmit", "200 ms"),
    ]
    for width in (80, 100, 160):
        for sheet in sheets:
            console = Console(width=width, file=io.StringIO())
            console.print(terminal(sheet, width))
            assert isinstance(console.file, io.StringIO)
            printed = console.file.getvalue()
            assert "…" not in printed
            assert sheet.header[0] in printed
            assert all(line[1] in printed for line in sheet.rows)
            assert (sheet.header[-1] in printed) or width < 160


def test_one_seed_has_no_interval() -> None:
    one, two = (
        compare(replace(PLAN, pairs=PLAN.pairs[:1], seeds=range(count))) for count in (1, 2)
    )
    assert "±" in str(tables(two.rows))
    assert "±" not in str(tables(one.rows))
    assert " to " not in str(tables(one.rows))


def test_arrivals_are_kept_of_the_first_seeds_and_are_those_of_the_rows() -> None:
    seeds = range(KEPT_SEEDS + 1)
    found = compare(replace(PLAN, pairs=PLAN.pairs[:1], seeds=seeds, schemes=("eloquent",)))
    assert {seed for _, _, seed in found.arrivals} == set(seeds[:-1])
    kept = found.arrivals[PLACE.name, "eloquent", 1]
    assert kept == SimDriver().run(PLACE, "eloquent", 1, SOURCE)


def test_a_finished_part_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(PLAN, cache=tmp_path / "cache.jsonl")
    first = compare(replace(plan, seeds=range(1)))
    assert len(remembered(tmp_path / "cache.jsonl")) == 6
    # Killed in the middle of a line: the rest is known.
    with (tmp_path / "cache.jsonl").open("a") as file:
        file.write('{"key": "half')
    tried = []
    real = cases.ProcessPoolExecutor.submit

    def submit(self: Any, function: Any, job: cases.Job) -> Any:
        tried.append(job.seed)
        return real(self, function, job)

    monkeypatch.setattr(cases.ProcessPoolExecutor, "submit", submit)
    both = compare(plan)
    assert tried == [1] * 6
    assert [row for row in both.rows if row.seed == 0] == list(first.rows)
    again = compare(plan)
    assert tried == [1] * 6
    assert again.rows == both.rows
    assert again.arrivals == both.arrivals


@pytest.mark.parametrize(
    "change",
    [
        {"pairs": ((synthetic(rtt_ms=40, loss=0.11), SOURCE),)},
        {"pairs": ((PLACE, ConstantRate(50, 41)),)},
        {"pairs": ((PLACE, Recording(tokens=40)),)},
        {"driver": ToyDriver(schemes=("retransmit",))},
        {"schemes": ("duplicate",)},
        {"seeds": range(1, 2)},
    ],
)
def test_what_is_another_run_is_not_taken_from_the_cache(
    change: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "cache.jsonl"
    plan = replace(
        PLAN, pairs=PLAN.pairs[:1], schemes=("retransmit",), seeds=range(1), workers=1, cache=file
    )
    compare(plan)
    compare(replace(plan, **change))
    assert len(remembered(file)) == 2


def test_a_case_depends_on_the_code_that_it_runs_and_on_no_other() -> None:
    reached = cases.modules_reached(cases.modules_of(Comparison(PLACE, SOURCE, SimDriver())))
    names = {name.rpartition(".")[2] for name in reached}
    assert {"rows", "measures", "oracle", "simulated", "answer", "sources", "pair"} <= names
    assert not names & {"table", "report", "grid", "tun_driver", "stalls_commands"}


def test_ctrl_c_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cases.Progress.__call__

    def interrupt(self: cases.Progress, done: int, total: int) -> None:
        real(self, done, total)
        if done == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(cases.Progress, "__call__", interrupt)
    plan = replace(PLAN, cache=tmp_path / "cache.jsonl")
    found = compare(plan)
    assert not found.is_complete
    assert len(found.rows) >= 5
    assert len(remembered(tmp_path / "cache.jsonl")) == len(found.rows)
    assert json.loads(dumps(found))["meta"]["is_complete"] is False
    monkeypatch.undo()
    whole = compare(plan)
    assert whole.is_complete
    assert set(found.rows) <= set(whole.rows)


@dataclass(frozen=True)
class MeetingDriver(ToyDriver):
    """A driver whose run of `broken` has begun before that of `sound` ends, and ends when told."""

    folder: Path = Path()

    def run(self, place: Place, scheme: str, seed: int, source: Source) -> Arrivals:
        begun, told = self.folder / "begun", self.folder / "told"
        if scheme == "broken":
            begun.touch()
        deadline_s = time.monotonic() + 60  # Ends a hang; decides nothing.
        while not (told if scheme == "broken" else begun).exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        return super().run(place, scheme, seed, source)


def test_what_is_under_way_at_ctrl_c_is_awaited_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(self: cases.Progress, done: int, total: int) -> None:
        if done == 1:
            (tmp_path / "told").touch()
            raise KeyboardInterrupt

    monkeypatch.setattr(cases.Progress, "__call__", interrupt)
    driver = MeetingDriver(most_workers=2, folder=tmp_path)
    cache = tmp_path / "cache.jsonl"
    plan = replace(PLAN, pairs=PLAN.pairs[:1], seeds=range(1), cache=cache)
    found = compare(replace(plan, driver=driver, schemes=driver.schemes))
    assert not found.is_complete
    assert [row.scheme for row in found.rows] == ["sound", "broken"]
    assert len(remembered(cache)) == 2
    assert "Ctrl-C again leaves them" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        b"# Notes\nof mine\n",
        b"\xff\xfe",
        b'{"a": 1}\n',
        b"[]\n1\n",
        b'{"key": ["a"], "figures": {}}\n',
    ],
)
def test_a_file_that_is_no_cache_is_left_alone(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(ConfigurationError, match="remembers no runs"):
        compare(replace(PLAN, cache=file))
    assert file.read_bytes() == content


@pytest.mark.usefixtures("broken_schemes")
@pytest.mark.parametrize("scheme", ["dropping", "doubling", "changing"])
def test_a_scheme_that_drops_doubles_or_changes_a_byte_fails_the_run(scheme: str) -> None:
    clean = synthetic(rtt_ms=40, loss=0)
    plan = replace(PLAN, pairs=((clean, SOURCE),), schemes=(scheme, "retransmit"), seeds=range(1))
    found = compare(replace(plan, workers=1))
    assert [row.scheme for row in found.rows] == ["retransmit"]
    assert len(found.failures) == 1
    assert f"40 ms, 0 % loss, 50 tok/s, sim, {scheme}, seed 0: " in found.failures[0]


@pytest.mark.parametrize("fault", [lambda texts: texts[1:], lambda texts: texts[:1] + texts])
def test_a_client_that_gives_out_a_token_twice_or_never_fails_the_run(
    fault: Callable[[list[str]], list[str]],
) -> None:
    path = scenario_path(PLACE.scenario, 0, 0.0)
    run = AnswerRun(path, "eloquent", SOURCE.plan(0))
    run.pair.connect(START_S)
    actors = (run, *run.pair.actors)
    simulate(actors, until=lambda: run.is_done, start_s=START_S, limit_s=START_S + 60)
    assert len(run.answer().rendered_s) == SOURCE.tokens
    run.texts = fault(run.texts)
    with pytest.raises(DeliveryError, match="what arrived is not what was sent"):
        run.answer()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"missing": 1}, "1 bytes of the answer are missing"),
        ({"duplicates": 1}, "1 came twice"),
        ({"rendered_s": (1.02,)}, "2 tokens were generated and 1 rendered"),
    ],
)
def test_a_driver_that_tells_of_a_lost_or_doubled_byte_fails_the_run(
    change: dict[str, Any], said: str
) -> None:
    found = compare(toys(**change))
    assert {row.scheme for row in found.rows} == {"sound"}
    assert len(found.failures) == 4
    assert all(said in failure for failure in found.failures)
    assert json.loads(dumps(found))["meta"]["failures"] == list(found.failures)
    assert found.meta["fidelity"] == {"worst_lateness_p99_us": 101.0}


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (replace(PLAN, schemes=("nosuch",)), "no scheme 'nosuch' with --driver sim: choose from"),
        (replace(PLAN, pairs=PLAN.pairs[:1] * 2), "Two networks are called '40 ms, 10 % loss'"),
        (replace(PLAN, pairs=((PLACE, LiveModel()),)), "--driver tun, or record it first"),
        (toys(is_absent=True), "This machine has no toys"),
    ],
)
def test_what_cannot_run_is_refused_before_the_work(plan: Plan, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        compare(plan)


def test_drivers_have_names_and_the_live_model_has_no_oracle() -> None:
    with pytest.raises(ConfigurationError, match="choose sim or tun"):
        find_driver("ns3")
    sim = find_driver("sim")
    assert default_schemes(sim, SOURCE)[-1] == ORACLE
    assert ORACLE not in default_schemes(sim, LiveModel())
    assert "quic-stream" in default_schemes(sim, SOURCE)
