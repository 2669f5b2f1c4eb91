"""What a token costs on the wire without loss, both ways and with all headers."""

from collections.abc import Sequence
from dataclasses import dataclass

from eloquent_netem.lab.answer import send_answer
from eloquent_netem.lab.cases import Figures, Job, Results
from eloquent_netem.lab.cells import Cell, cell_path
from eloquent_netem.lab.findings import Finding, Report, Sheet
from eloquent_netem.lab.sources import ConstantRate

OURS = "eloquent"

CELL = Cell(rtt_s=0.1, tokens_per_s=30, tokens=2000)
"So many tokens that the answer's end does not show."

TOKEN_CHARS = 4

BOUND_BYTES = {False: 150.0, True: 220.0}
"Per token, without and with padding; SSE chunks of chat APIs cost 350 and more."


@dataclass(frozen=True, slots=True)
class WireCase:
    """An answer of small tokens over a path that loses nothing."""

    is_padded: bool

    @property
    def title(self) -> str:
        """See `Case.title`."""
        return "padded" if self.is_padded else "unpadded"

    def run(self, scheme: str, seed: int) -> Figures:
        """See `Case.run`."""
        answer = send_answer(
            cell_path(CELL, seed),
            scheme,
            ConstantRate(CELL.tokens_per_s, CELL.tokens, TOKEN_CHARS).plan(seed),
            padding=self.is_padded,
        )
        return {
            "down_bytes_per_token": answer.downlink_bytes / CELL.tokens,
            "up_bytes_per_token": answer.uplink_bytes / CELL.tokens,
            "down_packets_per_token": answer.downlink_packets / CELL.tokens,
            "up_packets_per_token": answer.uplink_packets / CELL.tokens,
        }


def wire_jobs(seeds: Sequence[int]) -> list[Job]:
    """Return the jobs; nothing is random here, so that one seed is enough."""
    cases = [WireCase(is_padded) for is_padded in BOUND_BYTES]
    return [Job(case, OURS, seeds[0]) for case in cases] + [Job(cases[0], "tcp", seeds[0])]


def wire_report(results: Results) -> Report:
    """Judge the bytes per token."""
    report = Report("wire")
    rows = []
    for job, found in results.figures.items():
        case = job.case
        assert isinstance(case, WireCase)
        down, up = found["down_bytes_per_token"], found["up_bytes_per_token"]
        title = case.title if job.scheme == OURS else "bare tokens, without TLS or SSE"
        rows.append(
            (
                job.scheme,
                title,
                f"{down + up:.1f}",
                f"{down:.1f}",
                f"{up:.1f}",
                f"{found['down_packets_per_token']:.2f}",
                f"{found['up_packets_per_token']:.2f}",
            )
        )
        if job.scheme == OURS:
            report.findings.append(
                Finding(
                    part="wire",
                    what=f"bytes per token, {case.title}",
                    where=f"down {down:.0f}, up {up:.0f}",
                    figure=down + up,
                    bound=BOUND_BYTES[case.is_padded],
                )
            )
    header = ("scheme", "", "bytes/token", "down", "up", "packets/token down", "up")
    report.sheets.append(Sheet("Bytes per token", header, tuple(rows)))
    report.notes = (
        f"{CELL.tokens} tokens of {TOKEN_CHARS} bytes, {CELL.tokens_per_s:g} a second, 100 ms "
        "round trip, no loss; from the first token's generation on, both ways together, IPv4 and "
        "UDP (or TCP) headers and acknowledgements included."
    )
    return report
