"""Handovers and recorded cellular links: stalls on paths with rates and queues of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from eloquent_netem.lab.cases import Figures, Job, Results, all_jobs
from eloquent_netem.lab.findings import Report
from eloquent_netem.lab.grid import SCHEMES, stall_figures, stall_report
from eloquent_netem.lab.simulated import scenario_path
from eloquent_netem.lab.sources import ConstantRate
from eloquent_netem.link import stage_rng
from eloquent_netem.scenario import Scenario, load_scenario, parse_scenario

TOKENS = 600
TOKENS_PER_S = 30.0

TRACE_LOSS = 0.02
TRACE_DELAY_MS = 25
TRACE_QUEUE_PACKETS = 1000
"As in the scenario `lte-drive`: cellular queues are deep."
TRACES = (
    "ATT-LTE-driving-2016",
    "Verizon-LTE-short",
    "TMobile-UMTS-driving",
    "nyc-taxi3",
    "nyc-timessquare-3204803",
)
"Recordings in mahimahi's format, NAME.down and mostly NAME.up; nothing of them is shipped."

NO_UPLINK_MBIT_S = 10
"The uplink's rate where only the downlink was recorded."

TRACE_LENGTHS_S = 100.0
"All recordings are longer; an answer begins anywhere within this."

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
        loss = f" + {100 * TRACE_LOSS:g} % loss" if self.folder is not None else ""
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
        scenario = _scenario(self.name, self.folder)
        length_s = scenario.length_s if self.folder is None else TRACE_LENGTHS_S
        latest_s = max(length_s - self.tokens / self.tokens_per_s, 0.0)
        begin_s = latest_s * stage_rng(seed, "both", "begin").random()
        path = scenario_path(scenario, seed, begin_s)
        return stall_figures(path, scheme, ConstantRate(self.tokens_per_s, self.tokens).plan(seed))


@lru_cache(maxsize=len(TRACES) + len(SCENARIOS))
def _scenario(name: str, folder: Path | None) -> Scenario:
    if folder is None:
        return load_scenario(name)
    directions = []
    for direction in ("up", "down"):
        file = f"{name}.{direction}"
        rate = (
            f'{{ kind = "trace", file = "{file}" }}'
            if (folder / file).exists()
            else f'{{ kind = "fixed", mbit_s = {NO_UPLINK_MBIT_S} }}'
        )
        directions.append(
            f"[{direction}]\n"
            f"delay_ms = {TRACE_DELAY_MS}\n"
            f"rate = {rate}\n"
            f'queue = {{ kind = "drop-tail", packets = {TRACE_QUEUE_PACKETS} }}\n'
            f'loss = {{ kind = "independent", probability = {TRACE_LOSS} }}\n'
        )
    return parse_scenario("\n".join(directions), name=name, file=name, folder=folder)


def trace_cases(folder: Path) -> list[ScenarioCase]:
    """Return the scenarios, and the recordings that are in `folder`."""
    recordings = [
        ScenarioCase(name, folder) for name in TRACES if (folder / f"{name}.down").exists()
    ]
    return [*map(ScenarioCase, SCENARIOS), *recordings]


def trace_jobs(seeds: Sequence[int], folder: Path) -> list[Job]:
    """Return the jobs."""
    return all_jobs(trace_cases(folder), SCHEMES, seeds)


def trace_report(results: Results, folder: Path) -> Report:
    """Judge the answers over scenarios and recordings."""
    cases = trace_cases(folder)
    report = stall_report("traces", cases, results)
    absent = sorted(set(TRACES) - {case.name for case in cases})
    skipped = f" Skipped, not in the folder: {', '.join(absent)}." if absent else ""
    report.notes = (
        f"{TOKENS} tokens at {TOKENS_PER_S:g} a second, from an instant that the seed chooses. "
        f"Recordings of cellular links replayed as mahimahi does, with {TRACE_DELAY_MS} ms each "
        f"way, a queue of {TRACE_QUEUE_PACKETS} packets and {100 * TRACE_LOSS:g} % independent "
        f"loss; where the uplink was not recorded it has {NO_UPLINK_MBIT_S} Mbit/s.{skipped}"
    )
    return report
