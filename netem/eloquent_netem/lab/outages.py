"""Outages: the link is gone in mid-answer; how soon after its return is the reader up to date?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from eloquent_netem.lab.answer import EVENT_HEADER_BYTES, send_answer
from eloquent_netem.lab.cases import Figures, Job, Results, all_jobs
from eloquent_netem.lab.cells import Cell, cell_path
from eloquent_netem.lab.findings import Finding, Report, Sheet
from eloquent_netem.lab.sources import TOKEN_TEXT_CHARS
from eloquent_netem.link import stage_rng

OURS = "eloquent"
SCHEMES = (OURS, "tcp")

OUTAGES_S = (1.0, 5.0, 60.0)
RTTS_S = (0.05, 0.1, 0.3)
RATES = (10.0, 30.0, 100.0)

BEGINS_S = 2.0
"After the first token; the seed adds up to `PHASE_S`."
PHASE_S = 0.5
AFTER_S = 3.0
"The answer goes on for so long after the link's return."

BOUND_RTTS = 1.5
BOUND_S = 0.05
LONG_OUTAGE_S = 60.0
LONG_SLACK_S = 0.3
"From `LONG_OUTAGE_S` on, so that the beat may slow down."

PACKET_BYTES = 1150
"What a full packet carries of a log."
INITIAL_WINDOW_PACKETS = 10


@dataclass(frozen=True, slots=True)
class OutageCase:
    """An answer with one outage of both directions."""

    outage_s: float
    rtt_s: float
    tokens_per_s: float

    @property
    def title(self) -> str:
        """See `Case.title`."""
        return f"{self.outage_s:g} s outage, {1000 * self.rtt_s:g} ms, {self.tokens_per_s:g} tok/s"

    @property
    def backlog_packets(self) -> int:
        """How many full packets the tokens fill that are generated in the outage."""
        token_bytes = TOKEN_TEXT_CHARS + EVENT_HEADER_BYTES
        return math.ceil(self.outage_s * self.tokens_per_s * token_bytes / PACKET_BYTES)

    @property
    def bound_s(self) -> float:
        """How soon the reader must have all: the bound, and a slow start for a long backlog.

        A backlog of P packets takes n rounds from a window of 10 packets that doubles, the least
        n with 10 (2^n - 1) >= P; the first is in the 1.5 round trips.
        """
        rounds = math.ceil(math.log2(self.backlog_packets / INITIAL_WINDOW_PACKETS + 1))
        slack_s = LONG_SLACK_S if self.outage_s >= LONG_OUTAGE_S else 0.0
        return BOUND_RTTS * self.rtt_s + BOUND_S + slack_s + max(rounds - 1, 0) * self.rtt_s

    def run(self, scheme: str, seed: int) -> Figures:
        """See `Case.run`."""
        start_s = BEGINS_S + PHASE_S * stage_rng(seed, "both", "phase").random()
        stop_s = start_s + self.outage_s
        cell = Cell(
            rtt_s=self.rtt_s,
            tokens_per_s=self.tokens_per_s,
            outages_s=((start_s, stop_s),),
            tokens=math.ceil((stop_s + AFTER_S) * self.tokens_per_s),
        )
        path = cell_path(cell, seed)
        answer = send_answer(path, scheme, cell.plan)
        return_s = answer.generated_s[0] + stop_s
        due = sum(time <= return_s for time in answer.generated_s)
        return {
            "recovery_s": max(0.0, answer.rendered_s[due - 1] - return_s),
            # The links lose nothing outside the outage.
            "server_packets_per_s": path.down.packets_lost / self.outage_s,
            "client_packets_per_s": path.up.packets_lost / self.outage_s,
        }


def outage_cases() -> list[OutageCase]:
    """Return every outage, round trip and rate."""
    return [
        OutageCase(outage_s, rtt_s, rate)
        for outage_s in OUTAGES_S
        for rtt_s in RTTS_S
        for rate in RATES
    ]


def outage_jobs(seeds: Sequence[int]) -> list[Job]:
    """Return the jobs, the longest first."""
    return all_jobs(reversed(outage_cases()), SCHEMES, seeds)


def outage_report(results: Results) -> Report:
    """Judge the outages; a bound holds for every seed."""
    report = Report("outages")
    rows = []
    for case in outage_cases():
        for scheme in SCHEMES:
            runs = list(results.seeds(case, scheme).values())
            if not runs:
                continue
            recoveries_ms = [1000 * run["recovery_s"] for run in runs]
            server, client = (
                fmean(run[f"{side}_packets_per_s"] for run in runs) for side in ("server", "client")
            )
            rows.append(
                (
                    case.title,
                    scheme,
                    f"{fmean(recoveries_ms):.0f}",
                    f"{max(recoveries_ms):.0f}",
                    f"{1000 * case.bound_s:.0f}",
                    f"{server:.2f}",
                    f"{client:.2f}",
                )
            )
            if scheme == OURS:
                report.findings += _findings(case, max(recoveries_ms), server, client)
    report.findings.append(
        Finding(
            part="outages",
            what="runs with tokens missing, changed or twice, or without an end",
            figure=sum(job.scheme == OURS for job in results.failures),
            bound=0,
        )
    )
    header = (
        "outage",
        "scheme",
        "up to date, mean ms",
        "worst seed ms",
        "bound ms",
        "server packets/s",
        "client packets/s",
    )
    report.sheets.append(Sheet("Recovery", header, tuple(rows)))
    report.notes = (
        "Both directions are gone for a while in mid-answer, at a phase that the seed chooses. *Up "
        "to date*: from the link's return until the reader has all that was generated by then. "
        f"Bound: {BOUND_RTTS:g} RTT + {1000 * BOUND_S:g} ms; from {LONG_OUTAGE_S:g} s on "
        f"{1000 * LONG_SLACK_S:g} ms more; for a backlog of P packets of {PACKET_BYTES} bytes "
        f"(n - 1) RTT more, n being the least with {INITIAL_WINDOW_PACKETS} (2^n - 1) >= P. "
        "Packets are those sent during the outage."
    )
    return report


def _findings(case: OutageCase, worst_ms: float, server: float, client: float) -> list[Finding]:
    findings = [
        Finding(
            part="outages",
            what=f"up to date after {case.outage_s:g} s, over the bound",
            where=f"{case.title}: {worst_ms:.0f} ms",
            figure=worst_ms / (1000 * case.bound_s),
            bound=1,
        )
    ]
    findings += [
        Finding(
            part="outages",
            what=f"packets sent by the {side} in {case.outage_s:g} s without a link",
            where=case.title,
            figure=figure,
            unit="/s",
        )
        for side, figure in (("server", server), ("client", client))
    ]
    return findings
