"""The soak's measures by hand, and its clients against a real server for some seconds."""

import asyncio
import multiprocessing
import random
from pathlib import Path

import pytest

from eloquent.url import ServerUrl
from eloquent_server.bench import soak_clients
from eloquent_server.bench.soak import Outcome
from eloquent_server.bench.soak_clients import FATES, Crowd, plan_turn
from eloquent_server.bench.soak_server import COUNT, HOST, STOP, Look, Serving, run

SEED = 20261122
DEADLINE_S = 60.0
"Ends a hang; decides nothing."


def look(mebibytes: float, *, files: int = 10, **metrics: float) -> Look:
    return Look(
        resident_bytes=round(mebibytes * 2**20),
        open_files=files,
        threads=2,
        objects=0,
        cpu_s=0.0,
        metrics={"eloquent:readers": 0.0, "eloquent:asyncio_tasks": 2.0} | metrics,
    )


def outcome(sizes: list[float], left: Look, **ends: int) -> Outcome:
    return Outcome(look(50.0), [look(size) for size in sizes], left, ends, [])


def test_growth_is_over_the_last_four_fifths() -> None:
    found = outcome([10.0, 50.0, *[100.0] * 4, *[102.0] * 4], look(50.0))
    assert len(found.measured) == 8
    assert found.growth == pytest.approx(0.02)
    assert not found.is_good
    assert outcome([10.0, 50.0, *[100.0] * 8], look(50.0)).is_good


def test_one_look_that_is_out_of_line_is_no_growth() -> None:
    sizes = [100.0] * 60
    sizes[-3] = 150.0
    assert outcome(sizes, look(50.0)).growth == 0.0


def test_what_is_left_of_clients_that_are_gone_is_named() -> None:
    metrics = {"eloquent:readers": 3.0, "eloquent:resumes_total": 99.0}
    found = outcome([100.0] * 10, look(50.0, files=11, **metrics))
    assert found.leaks == ["eloquent:readers 0 -> 3", "open files 10 -> 11"]
    assert not found.is_good


def test_an_answer_that_was_wrong_is_no_good() -> None:
    assert outcome([100.0] * 10, look(50.0), whole=5).is_good
    assert not outcome([100.0] * 10, look(50.0), whole=5, wrong=1).is_good


def test_plans_are_the_seeds_and_have_all_fates() -> None:
    first, again = (
        [plan_turn(random.Random(SEED + each), 1.0) for each in range(200)] for _ in range(2)
    )
    assert first == again
    assert {plan.fate for plan in first} == set(FATES)
    assert all(0 < plan.at < len(plan.words) for plan in first)


async def test_clients_that_come_and_go_get_what_they_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak_clients, "LASTS_S", (0.1, 0.4))
    monkeypatch.setattr(soak_clients, "AWAY_S", (0.0, 0.2))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    serving = Serving(str(tmp_path), tokens_per_s=100.0, grace_s=1.0, ttl_s=60.0)
    process = context.Process(target=run, args=(serving, theirs), daemon=True)
    process.start()
    try:
        port, pin = ours.recv()
        crowd = Crowd(ServerUrl(HOST, port, pin), 10, 100.0, SEED)
        running = asyncio.ensure_future(crowd.run(DEADLINE_S, ramp_s=0.5))
        while not all(crowd.ends[fate] for fate in ("whole", "lost", "left", "cancelled")):
            assert not running.done(), f"no more than {crowd.ends} in {DEADLINE_S} s"
            await asyncio.sleep(0.1)
        running.cancel()
        await asyncio.wait((running,))
        ours.send(COUNT)
        seen: Look = ours.recv()
        ours.send(STOP)
        process.join()
    finally:
        process.kill()
    assert crowd.faults == []
    assert crowd.ends["wrong"] == 0
    assert seen.metrics["eloquent:resumes_total"] > 0
    assert seen.resident_bytes > 1 << 20
    assert seen.objects is not None
    assert seen.objects > 1000
