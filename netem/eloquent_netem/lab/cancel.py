"""Cancel: how soon does the server know that the reader wants no more?"""

from collections.abc import Sequence
from dataclasses import dataclass

from eloquent_netem.lab.answer import START_S, AnswerRun
from eloquent_netem.lab.cases import Figures, Job, Results, all_jobs
from eloquent_netem.lab.cells import Cell, cell_path
from eloquent_netem.lab.findings import Finding, Report, Sheet
from eloquent_netem.lab.measures import quantile
from eloquent_netem.lab.shared import Alarms
from eloquent_netem.lab.sources import ConstantRate
from eloquent_netem.link import stage_rng
from eloquent_netem.sim import simulate

OURS = "eloquent"

RTTS_S = (0.05, 0.1, 0.3)
LOSSES = (0.0, 0.2)
TOKENS_PER_S = 30.0
TOKENS = 1000
"More than are generated before the cancel comes."

LEAST_TRIALS = 200
"Under loss, whatever the number of seeds."

AFTER_S = 2.0
"From the connection's first packet to the cancel; the seed adds up to `PHASE_S`."
PHASE_S = 2.0
LIMIT_S = 120.0

BOUND_RTTS = {0.0: 0.5, 0.2: 3.0}
BOUND_SLACK_S = {0.0: 0.005, 0.2: 0.0}


@dataclass(frozen=True, slots=True)
class CancelCase:
    """An answer that is given up in the middle."""

    rtt_s: float
    loss: float

    @property
    def title(self) -> str:
        """See `Case.title`."""
        return f"{1000 * self.rtt_s:g} ms, {100 * self.loss:g} % loss"

    @property
    def bound_s(self) -> float:
        """How soon the server must know; under loss at the 95th percentile."""
        return BOUND_RTTS[self.loss] * self.rtt_s + BOUND_SLACK_S[self.loss]

    def run(self, scheme: str, seed: int) -> Figures:
        """See `Case.run`."""
        cell = Cell(rtt_s=self.rtt_s, tokens_per_s=TOKENS_PER_S, loss=self.loss)
        plan = ConstantRate(TOKENS_PER_S, TOKENS).plan(seed)
        answer = AnswerRun(cell_path(cell, seed), scheme, plan)
        cancel_s = START_S + AFTER_S + PHASE_S * stage_rng(seed, "up", "cancel").random()
        answer.pair.connect(START_S)
        # A handshake that loses much takes longer: then the reader gives up at the first token.
        begun_s = simulate(
            (answer, *answer.pair.actors),
            until=lambda: bool(answer.rendered_s),
            start_s=START_S,
            limit_s=LIMIT_S,
        )
        cancel_s = max(cancel_s, begun_s)
        alarms = Alarms([(cancel_s, lambda: answer.cancel(cancel_s))])
        simulate(
            (answer, *answer.pair.actors, alarms),
            until=lambda: answer.cancelled_s is not None,
            start_s=begun_s,
            limit_s=LIMIT_S,
        )
        assert answer.cancelled_s is not None
        return {"cancel_s": answer.cancelled_s - cancel_s}


def cancel_jobs(seeds: Sequence[int]) -> list[Job]:
    """Return the jobs: under loss at least `LEAST_TRIALS` of each."""
    many = range(max(len(seeds), LEAST_TRIALS))
    return [
        job
        for loss in LOSSES
        for rtt_s in RTTS_S
        for job in all_jobs([CancelCase(rtt_s, loss)], [OURS], many if loss else seeds)
    ]


def cancel_report(results: Results) -> Report:
    """Judge the cancels."""
    report = Report("cancel")
    rows = []
    for loss in LOSSES:
        for rtt_s in RTTS_S:
            case = CancelCase(rtt_s, loss)
            times = sorted(run["cancel_s"] for run in results.seeds(case, OURS).values())
            if not times:
                continue
            share = 0.95 if loss else 1.0
            figure = 1000 * quantile(times, share)
            report.findings.append(
                Finding(
                    part="cancel",
                    what=f"the server knows, {100 * loss:g} % loss, over the bound",
                    where=f"{case.title}: {figure:.0f} ms",
                    figure=figure / (1000 * case.bound_s),
                    bound=1,
                )
            )
            quantiles = (f"{1000 * quantile(times, share):.0f}" for share in (0.5, 0.95, 1.0))
            rows.append((case.title, str(len(times)), *quantiles, f"{1000 * case.bound_s:.0f}"))
    report.findings.append(
        Finding(part="cancel", what="runs that failed", figure=len(results.failures), bound=0)
    )
    header = ("path", "trials", "p50 ms", "p95 ms", "max ms", "bound ms")
    report.sheets.append(Sheet("From the reader's cancel to the server", header, tuple(rows)))
    report.notes = (
        "The reader cancels in mid-answer, at a phase that the seed chooses. Without loss the "
        "bound is for the slowest trial, under loss for the 95th percentile."
    )
    return report
