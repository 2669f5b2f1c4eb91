"""Who goes first, who gives way, and how much of a prompt a step takes."""

import itertools
import random
from dataclasses import dataclass

import pytest

from eloquent_server.engine.budget import (
    ALONE_TARGET_S,
    FIRST_TOKENS,
    MIN_TOKENS,
    STEP_TARGET_S,
    StepBudget,
    memory_bytes,
)
from eloquent_server.engine.schedule import (
    AMPLE_BUFFER_S,
    BUFFERED_QUANTUM_TOKENS,
    PATIENCE_S,
    QUANTUM_TOKENS,
    FairShare,
    split_budget,
)


@dataclass
class FakeJob:
    id: int
    tenant: str = "t"
    weight: float = 1.0
    arrived: float = 0.0
    dry_at: float = 0.0
    ran: int = 0
    pending: int = 1


def served(share: FairShare, jobs: list[FakeJob], steps: int) -> dict[str, int]:
    """Serve one token at a time to whoever is first."""
    counts = dict.fromkeys((job.tenant for job in jobs), 0)
    for _ in range(steps):
        first = share.order(jobs)[0]
        share.charge(first, prompt=1)
        counts[first.tenant] += 1
    return counts


def enter(share: FairShare, *jobs: FakeJob) -> list[FakeJob]:
    for job in jobs:
        share.enter(job.tenant)
    return list(jobs)


def test_tenants_share_by_weight_however_many_turns_they_have() -> None:
    share = FairShare()
    many = [FakeJob(i, "many") for i in range(10)]
    jobs = enter(share, *many, FakeJob(10, "heavy", weight=3.0))
    assert served(share, jobs, 400) == {"many": 100, "heavy": 300}


def test_who_was_away_has_saved_nothing_up() -> None:
    share = FairShare()
    early = enter(share, FakeJob(1, "early"))
    served(share, early, 1000)
    jobs = early + enter(share, FakeJob(2, "late"))
    assert served(share, jobs, 100) == {"early": 50, "late": 50}


def test_who_leaves_and_comes_back_has_lost_no_debt() -> None:
    share = FairShare()
    rogue, other = enter(share, FakeJob(1, "rogue"), FakeJob(2, "other"))
    share.charge(rogue, prompt=1000)
    share.leave("rogue")
    share.tidy()
    enter(share, rogue)
    assert served(share, [rogue, other], 1000) == {"rogue": 0, "other": 1000}


def test_tenants_that_are_gone_are_forgotten() -> None:
    share = FairShare()
    for i in range(100):
        (job,) = enter(share, FakeJob(i, f"tenant {i}"))
        share.charge(job, prompt=10)
        share.leave(job.tenant)
        share.tidy()
    assert len(share._accounts) <= 1


def test_within_a_tenant_whose_reader_waits_longest_goes_first() -> None:
    share = FairShare()
    jobs = enter(
        share, FakeJob(1, dry_at=9.0), FakeJob(2, dry_at=4.0), FakeJob(3, dry_at=4.0, arrived=-1.0)
    )
    assert [job.id for job in share.order(jobs)] == [3, 2, 1]


def test_memory_is_taken_from_whose_reader_has_most_of_the_tenant_that_had_most() -> None:
    share = FairShare()
    jobs = enter(
        share,
        FakeJob(1, dry_at=3.0),
        FakeJob(2, dry_at=8.0),
        FakeJob(3, dry_at=3.0, arrived=1.0),
        FakeJob(4, "other", dry_at=99.0),
    )
    share.charge(jobs[0], prompt=1)
    assert share.last(jobs).id == 2
    assert share.last([jobs[0], jobs[2], jobs[3]]).id == 3


@pytest.mark.parametrize(
    ("ran", "buffered", "waited", "yields"),
    [
        (BUFFERED_QUANTUM_TOKENS, AMPLE_BUFFER_S, 0.0, True),
        (BUFFERED_QUANTUM_TOKENS - 1, AMPLE_BUFFER_S, 0.0, False),
        (BUFFERED_QUANTUM_TOKENS, AMPLE_BUFFER_S - 0.1, 0.0, False),
        (QUANTUM_TOKENS, 0.0, PATIENCE_S, True),
        (QUANTUM_TOKENS - 1, 0.0, PATIENCE_S, False),
        (QUANTUM_TOKENS, 0.0, PATIENCE_S - 0.1, False),
    ],
)
def test_who_gives_up_a_row(ran: int, buffered: float, waited: float, yields: bool) -> None:
    now = 100.0
    running = FakeJob(1, ran=ran, dry_at=now + buffered)
    waiting = FakeJob(2, dry_at=now - waited)
    share = FairShare()
    enter(share, running, waiting)
    assert (share.to_yield([running], waiting, now) is running) == yields
    running.pending = 50  # Its prompt is going in.
    assert share.to_yield([running], waiting, now) is None


def test_a_tenant_that_had_more_waits_for_its_share() -> None:
    share = FairShare()
    running = FakeJob(1, "a", ran=QUANTUM_TOKENS, dry_at=10.0)
    waiting = FakeJob(2, "b", dry_at=0.0)
    enter(share, running, waiting)
    share.charge(waiting, prompt=100)
    assert share.to_yield([running], waiting, 10.0) is None
    share.charge(running, prompt=100)
    assert share.to_yield([running], waiting, 10.0) is running
    # A reader with enough to read loses nothing.
    share.charge(waiting, prompt=100)
    running.dry_at += AMPLE_BUFFER_S
    assert share.to_yield([running], waiting, 10.0) is running


def test_one_row_is_shared_by_weight() -> None:
    share = FairShare()
    jobs = enter(share, FakeJob(1, "heavy", weight=3.0), FakeJob(2, "light"))
    counts = {1: 0, 2: 0}
    running, waiting = jobs
    now = 0.0
    for _ in range(20_000):
        now += 0.02
        counts[running.id] += 1
        running.ran += 1
        running.dry_at = now
        share.charge(running, decoded=1)
        if share.to_yield([running], waiting, now):
            running, waiting = waiting, running
            running.ran = 0
    assert counts[1] / counts[2] == pytest.approx(3, rel=0.1)


def to_sixteen(job: FakeJob, tokens: int) -> int:
    return tokens if tokens == job.pending else tokens // 16 * 16


def test_the_first_prompt_gets_the_budget_and_short_ones_slip_in() -> None:
    jobs = [FakeJob(1, pending=1000), FakeJob(2, pending=20), FakeJob(3, pending=900)]
    assert split_budget(jobs, 200, to_sixteen) == [176, 20, 0]
    assert split_budget(jobs, 2000, to_sixteen) == [1000, 20, 900]
    assert split_budget([], 100, to_sixteen) == []


def test_short_prompts_take_half_of_the_budget_at_most() -> None:
    jobs = [FakeJob(0, pending=1000), *(FakeJob(i, pending=30) for i in range(1, 9))]
    shares = split_budget(jobs, 128, to_sixteen)
    assert shares == [64, 30, 30, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_given_that_is_not_there(seed: int) -> None:
    rng = random.Random(seed)
    jobs = [FakeJob(i, pending=rng.randint(2, 500)) for i in range(rng.randint(1, 8))]
    budget = rng.randint(16, 600)
    shares = split_budget(jobs, budget, to_sixteen)
    assert 0 < sum(shares) <= budget
    assert all(0 <= given <= job.pending for given, job in zip(shares, jobs, strict=True))


def run(budget: StepBudget, decoding: int, steps: int, token_s: float) -> float:
    """Run steps on a machine with these costs and return the last one's time."""
    duration = 0.0
    for _ in range(steps):
        tokens = budget.tokens(decoding)
        duration = (0.03 + 0.001 * decoding if decoding else 0.01) + tokens * token_s
        budget.observe(decoding, tokens, duration)
    return duration


@pytest.mark.parametrize("token_s", [0.0002, 0.001, 0.004])
def test_a_step_comes_to_take_its_target(token_s: float) -> None:
    budget = StepBudget()
    for _ in range(5):
        budget.observe(8, 0, 0.038)
    assert budget.tokens(8) == FIRST_TOKENS
    assert run(budget, 8, 30, token_s) == pytest.approx(STEP_TARGET_S, rel=0.1)
    if token_s > 0.0002:
        assert run(budget, 0, 30, token_s) == pytest.approx(ALONE_TARGET_S, rel=0.1)


def test_a_slow_machine_still_gets_on() -> None:
    budget = StepBudget()
    run(budget, 8, 30, 0.1)
    assert budget.tokens(8) == MIN_TOKENS


def test_chunks_grow_slowly_and_shrink_at_once() -> None:
    budget = StepBudget()
    sizes = []
    for _ in range(6):
        sizes.append(budget.tokens(0))
        budget.observe(0, sizes[-1], sizes[-1] * 0.0002)
    assert all(b <= 2 * a for a, b in itertools.pairwise(sizes))
    budget.observe(0, sizes[-1], 10.0)
    assert budget.tokens(0) < sizes[-1]


def test_the_memory_of_this_machine() -> None:
    assert memory_bytes() > 1 << 28
