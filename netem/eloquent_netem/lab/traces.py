"""Handovers and recorded cellular links: stalls on paths with rates and queues of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from eloquent_netem.lab.cases import Figures, Job, Results, all_jobs
from eloquent_netem.lab.findings import Report
from eloquent_netem.lab.grid import (
    NOTES as GRID_NOTES,
)
from eloquent_netem.lab.grid import (
    SCHEMES,
    grid_cases,
    grid_jobs,
    stall_figures,
    stall_report,
)
from eloquent_netem.lab.places import (
    NO_UPLINK_MBIT_S,
    RECORDING_LOSS,
    RECORDING_QUEUE_PACKETS,
    RECORDING_RTT_MS,
    RECORDINGS,
    named_recording,
)
from eloquent_netem.lab.rows import Place
from eloquent_netem.lab.simulated import scenario_path
from eloquent_netem.lab.sources import ConstantRate
from eloquent_netem.scenario import load_scenario

TOKENS = 600
TOKENS_PER_S = 30.0

SCENARIOS = ("handover",)


@dataclass(frozen=True, slots=True)
class ScenarioCase:
    """Answers over a scenario; the seed chooses where in it they begin."""

    name: str
    "Of a scenario, or of a recording in `folder`."
    folder: Path | None = None
    tokens: int = TOKENS
    tokens_per_s: float = TOKENS_PER_S

    @property
    def title(self) -> str:
        """See `Case.title`."""
        loss = f" + {100 * RECORDING_LOSS:g} % loss" if self.folder is not None else ""
        return f"{self.name}{loss}, {self.tokens_per_s:g} tok/s"

    @property
    def is_lossy(self) -> bool:
        """See `StallCase.is_lossy`: handovers hold packets and lose none."""
        return self.folder is not None

    @property
    def p99_slack_s(self) -> float:
        """See `StallCase.p99_slack_s`."""
        return 1 / self.tokens_per_s

    def run(self, scheme: str, seed: int) -> Figures:
        """See `Case.run`."""
        place = _place(self.name, self.folder)
        begin_s = place.begin_s(seed, self.tokens / self.tokens_per_s)
        path = scenario_path(place.scenario, seed, begin_s)
        return stall_figures(path, scheme, ConstantRate(self.tokens_per_s, self.tokens).plan(seed))


@lru_cache
def _place(name: str, folder: Path | None) -> Place:
    if folder is None:
        return Place(name=name, scenario=load_scenario(name))
    return named_recording(folder, name)


def trace_cases(folder: Path) -> list[ScenarioCase]:
    """Return the scenarios, and the recordings that are in `folder`."""
    recordings = [
        ScenarioCase(name, folder) for name in RECORDINGS if (folder / f"{name}.down").exists()
    ]
    return [*map(ScenarioCase, SCENARIOS), *recordings]


def whole_grid_jobs(seeds: Sequence[int], folder: Path) -> list[Job]:
    """Return the jobs of the grid, the scenarios and the recordings."""
    return grid_jobs(seeds) + all_jobs(trace_cases(folder), SCHEMES, seeds)


def whole_grid_report(results: Results, folder: Path) -> Report:
    """Judge the answers over the grid, the scenarios and the recordings: sums are over all."""
    cases = trace_cases(folder)
    report = stall_report("grid", [*grid_cases(), *cases], results)
    absent = sorted(set(RECORDINGS) - {case.name for case in cases})
    skipped = f" Skipped, not in the folder: {', '.join(absent)}." if absent else ""
    report.notes = (
        f"{GRID_NOTES} Over `handover` and recordings: {TOKENS} tokens at {TOKENS_PER_S:g} a "
        "second, from an instant that the seed chooses. Recordings of cellular links replayed as "
        "mahimahi does, with "
        f"{RECORDING_RTT_MS / 2:g} ms each way, a queue of {RECORDING_QUEUE_PACKETS} packets and "
        f"{100 * RECORDING_LOSS:g} % independent loss; where the uplink was not recorded it has "
        f"{NO_UPLINK_MBIT_S:g} Mbit/s.{skipped}"
    )
    return report
