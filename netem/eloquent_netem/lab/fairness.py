"""Fairness: token flows beside a bulk flow, and fifty of them on a thin link."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from eloquent_netem.cross import CubicFlow
from eloquent_netem.lab.answer import (
    EVENT_HEADER_BYTES,
    START_S,
    AnswerRun,
    LabPath,
)
from eloquent_netem.lab.cases import Figures, Job, Results, all_jobs
from eloquent_netem.lab.findings import Finding, Report, Sheet, mean_half
from eloquent_netem.lab.measures import DeliveryError, quantile
from eloquent_netem.lab.shared import Alarms, Flow, Port, SharedLink, TcpTokens, WatchedQueue
from eloquent_netem.lab.sources import TOKEN_TEXT_CHARS, ConstantRate
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.rate import FixedRate
from eloquent_netem.sim import Actor, simulate

OURS = "eloquent"
TCP = "tcp"
ALONE = "eloquent, no bulk flow"
"Our token flows without the bulk flow."

RTT_S = 0.1
TOKENS_PER_S = 30.0

RATES_MBIT_S = (1.0, 5.0, 20.0)
TOKEN_FLOWS = 2
WARM_UP_S = 10.0
MEASURED_S = 60.0

CROWD_FLOWS = 50
CROWD_MBIT_S = 1.0
CROWD_STAGGER_S = 0.2
CROWD_WARM_UP_S = 20.0
CROWD_MEASURED_S = 40.0
SAMPLE_S = 0.01

BULK_SHARE = 0.95
RATE_RISE = 1.05
JAIN = 0.9
UTILISATION = 0.85
QUEUE_SHARE = 0.95
"So full at most, 95 % of the time; above it hardly a full packet finds room."

BULK_FLOW = 1000


class Bottleneck:
    """A link of one rate with a buffer of one bandwidth-delay product, and flows through it."""

    def __init__(self, bits_per_s: float, seed: int) -> None:
        self.bytes_per_s = bits_per_s / 8
        self.seed = seed
        self.queue = WatchedQueue(round(self.bytes_per_s * RTT_S))
        self.link = Link(
            delay_s=RTT_S / 2,
            seed=seed,
            name="down",
            rate=FixedRate(bits_per_s),
            queue=self.queue,
        )
        self.shared = SharedLink(self.link)
        self.actors: list[Actor] = [self.shared]
        self.ports: list[Port] = []
        self.answers: list[AnswerRun] = []
        self.bulk: CubicFlow | None = None

    def add_answer(self, scheme: str, start_s: float, length_s: float) -> None:
        """Add a token flow of ours."""
        up, down = self._path()
        path = LabPath(up=up, down=down, base_delay_s=RTT_S / 2, passes_from=lambda now: now)
        source = ConstantRate(TOKENS_PER_S, round(length_s * TOKENS_PER_S))
        answer = AnswerRun(path, scheme, source.plan(self.seed))
        self.answers.append(answer)
        self.actors.append(Flow((answer, *answer.pair.actors), down, start_s, answer.pair.connect))

    def add_tcp(self, start_s: float) -> None:
        """Add a token flow over TCP."""
        up, down = self._path()
        tokens = TcpTokens(
            up=up,
            down=down,
            flow=len(self.ports),
            tokens_per_s=TOKENS_PER_S,
            token_bytes=TOKEN_TEXT_CHARS + EVENT_HEADER_BYTES,
        )
        self.actors.append(Flow((tokens, *tokens.pair.actors), down, start_s, tokens.begin))

    def add_bulk(self, start_s: float) -> None:
        """Add a bulk flow under CUBIC."""
        rng = stage_rng(self.seed, "down", "bulk")
        self.bulk = CubicFlow(
            BULK_FLOW, self.link.send, RTT_S, rng, forward_s=RTT_S / 2, start_s=start_s
        )
        self.shared.listen(self.bulk.on_delivered)
        self.actors.append(self.bulk)

    def run(self, calls: Sequence[tuple[float, Callable[[], None]]]) -> None:
        """Run until the last of `calls`, which are made at their times in seconds."""
        alarms = Alarms(calls)
        simulate(
            (*self.actors, alarms),
            until=lambda: alarms.next_time() is None,
            start_s=START_S,
            limit_s=max(time for time, _ in calls) + 1,
        )

    def _path(self) -> tuple[Link, Port]:
        """Return an uplink of its own, without queue, and a port of the bottleneck."""
        flow = len(self.ports)
        port = self.shared.port(flow)
        self.ports.append(port)
        return Link(delay_s=RTT_S / 2, seed=self.seed, name=f"up-{flow}"), port


@dataclass(frozen=True, slots=True)
class BulkCase:
    """Two token flows and a bulk flow through one bottleneck."""

    mbit_s: float

    @property
    def title(self) -> str:
        """See `Case.title`."""
        return f"{self.mbit_s:g} Mbit/s"

    def run(self, scheme: str, seed: int) -> Figures:
        """See `Case.run`: the scheme is that of the token flows, or `ALONE`."""
        bottleneck = Bottleneck(self.mbit_s * 1e6, seed)
        phase = stage_rng(seed, "down", "starts")
        length_s = WARM_UP_S + MEASURED_S
        for _ in range(TOKEN_FLOWS):
            start_s = START_S + phase.random()
            if scheme == TCP:
                bottleneck.add_tcp(start_s)
            else:
                bottleneck.add_answer(OURS, start_s, length_s)
        if scheme != ALONE:
            bottleneck.add_bulk(START_S + 1 + phase.random())
        counts: list[tuple[int, int, int, int]] = []

        def count() -> None:
            counts.append(
                (
                    bottleneck.bulk.delivered_bytes if bottleneck.bulk else 0,
                    sum(port.bytes_sent for port in bottleneck.ports),
                    sum(port.packets_sent for port in bottleneck.ports),
                    bottleneck.queue.drops,
                )
            )

        begin_s = START_S + WARM_UP_S
        bottleneck.run([(begin_s, count), (begin_s + MEASURED_S, count)])
        bulk, sent_bytes, packets, drops = (
            after - before for before, after in zip(*counts, strict=True)
        )
        return {
            "bulk_mbit_per_s": 8e-6 * bulk / MEASURED_S,
            "flow_bytes_per_s": sent_bytes / MEASURED_S / TOKEN_FLOWS,
            "flow_packets_per_s": packets / MEASURED_S / TOKEN_FLOWS,
            "queue_drops_per_s": drops / MEASURED_S,
        }


@dataclass(frozen=True, slots=True)
class CrowdCase:
    """Fifty token flows on a thin link."""

    @property
    def title(self) -> str:
        """See `Case.title`."""
        return f"{CROWD_FLOWS} flows on {CROWD_MBIT_S:g} Mbit/s"

    def run(self, scheme: str, seed: int) -> Figures:
        """See `Case.run`."""
        bottleneck = Bottleneck(CROWD_MBIT_S * 1e6, seed)
        phase = stage_rng(seed, "down", "starts")
        length_s = CROWD_WARM_UP_S + CROWD_MEASURED_S
        for index in range(CROWD_FLOWS):
            start_s = START_S + (index + phase.random()) * CROWD_STAGGER_S
            bottleneck.add_answer(scheme, start_s, length_s)
        begin_s = START_S + CROWD_WARM_UP_S
        end_s = begin_s + CROWD_MEASURED_S
        counts: list[list[tuple[int, int, int]]] = []
        shares: list[float] = []
        samples = round(CROWD_MEASURED_S / SAMPLE_S)

        def count() -> None:
            counts.append(
                [
                    (
                        bottleneck.shared.delivered_bytes[flow],
                        answer.pair.bundles_sent,
                        len(answer.generated_s),
                    )
                    for flow, answer in enumerate(bottleneck.answers)
                ]
            )

        drops_before = 0

        def begin() -> None:
            nonlocal drops_before
            drops_before = bottleneck.queue.drops
            count()

        bottleneck.run(
            [
                (begin_s, begin),
                *(
                    (begin_s + index * SAMPLE_S, lambda: shares.append(bottleneck.queue.share))
                    for index in range(samples)
                ),
                (end_s, count),
            ]
        )
        before, after = counts
        delivered, bundles, tokens = (
            [new[index] - old[index] for old, new in zip(before, after, strict=True)]
            for index in range(3)
        )
        delays_s = sorted(
            delay for answer in bottleneck.answers for delay in _delays(answer, begin_s)
        )
        if not delays_s:
            raise DeliveryError("No token arrived in the measured time.")
        shares.sort()
        return {
            "jain": jain(delivered),
            "utilisation": sum(delivered) / CROWD_MEASURED_S / bottleneck.bytes_per_s,
            "queue_share_mean": fmean(shares),
            "queue_share_p95": quantile(shares, 0.95),
            "queue_share_max": shares[-1],
            "drops_per_s": (bottleneck.queue.drops - drops_before) / CROWD_MEASURED_S,
            "tokens_per_bundle": sum(tokens) / max(sum(bundles), 1),
            "delay_p50_s": quantile(delays_s, 0.5),
            "delay_p99_s": quantile(delays_s, 0.99),
            "flows_without_tokens": sum(
                not answer.rendered_s or answer.rendered_s[-1] < begin_s
                for answer in bottleneck.answers
            ),
        }


def _delays(answer: AnswerRun, begin_s: float) -> list[float]:
    """Return the delays of the tokens generated and rendered from `begin_s` on."""
    return [
        rendered - generated - RTT_S / 2
        for generated, rendered in zip(answer.generated_s, answer.rendered_s, strict=False)
        if generated >= begin_s
    ]


def jain(shares: Sequence[float]) -> float:
    """Return Jain's index: 1 if all are equal, 1 / n if one has everything.

    Jain, Chiu, Hawe, "A Quantitative Measure of Fairness and Discrimination" (1984).
    """
    squares = len(shares) * sum(share**2 for share in shares)
    return sum(shares) ** 2 / squares if squares else 0.0


def fairness_jobs(seeds: Sequence[int]) -> list[Job]:
    """Return the jobs, the longest first."""
    bulk = [BulkCase(mbit_s) for mbit_s in reversed(RATES_MBIT_S)]
    return all_jobs([CrowdCase()], [OURS], seeds) + all_jobs(bulk, [OURS, TCP, ALONE], seeds)


def fairness_report(results: Results) -> Report:
    """Judge the flows beside a bulk flow, and the crowd."""
    report = Report("fairness")
    rows = []
    for mbit_s in RATES_MBIT_S:
        case = BulkCase(mbit_s)
        by_scheme = {scheme: results.seeds(case, scheme) for scheme in (OURS, TCP, ALONE)}
        report.findings += _beside_bulk(case, by_scheme)
        rows += [
            (case.title, scheme, *_means(list(runs.values())))
            for scheme, runs in by_scheme.items()
            if runs
        ]
    crowd = results.seeds(CrowdCase(), OURS)
    if crowd:
        report.findings += _of_crowd(list(crowd.values()))
    report.findings.append(
        Finding(part="fairness", what="runs that failed", figure=len(results.failures), bound=0)
    )
    header = (
        "bottleneck",
        "token flows",
        "bulk Mbit/s",
        "bytes/s of a token flow",
        "packets/s",
        "queue drops/s",
    )
    report.sheets.append(Sheet("Two token flows beside a bulk flow", header, tuple(rows)))
    report.notes = (
        f"{1000 * RTT_S:g} ms round trip, {TOKENS_PER_S:g} tok/s in each flow, a drop-tail buffer "
        "of one bandwidth-delay product; loss comes from the full queue alone. Beside a CUBIC bulk "
        f"flow {TOKEN_FLOWS} token flows run for {MEASURED_S:g} s after {WARM_UP_S:g} s, ours or "
        "over TCP, and ours without it. That our packets get larger beside it is the longer round "
        "trip's doing: more tokens are not yet acknowledged. In the crowd "
        f"{CROWD_FLOWS} of our flows begin {1000 * CROWD_STAGGER_S:g} ms apart; "
        f"{CROWD_MEASURED_S:g} s count after {CROWD_WARM_UP_S:g} s."
    )
    return report


BULK_FIGURES = ("bulk_mbit_per_s", "flow_bytes_per_s", "flow_packets_per_s", "queue_drops_per_s")


def _means(runs: Sequence[Figures]) -> list[str]:
    return [f"{fmean(run[name] for run in runs):.4g}" for name in BULK_FIGURES]


def _beside_bulk(case: BulkCase, by_scheme: dict[str, dict[int, Figures]]) -> list[Finding]:
    findings = []
    ours, tcp, alone = by_scheme[OURS], by_scheme[TCP], by_scheme[ALONE]
    pairs = [
        (
            "bulk flow beside ours, over beside TCP's",
            tcp,
            "bulk_mbit_per_s",
            BULK_SHARE,
            True,
        ),
        (
            "our packet rate, with over without a bulk flow",
            alone,
            "flow_packets_per_s",
            RATE_RISE,
            False,
        ),
        ("our byte rate, with over without a bulk flow", alone, "flow_bytes_per_s", None, False),
    ]
    for what, others, name, bound, is_least in pairs:
        ratios = [ours[seed][name] / others[seed][name] for seed in ours.keys() & others.keys()]
        if ratios:
            mean, half = mean_half(ratios)
            findings.append(
                Finding(
                    part="fairness",
                    what=what,
                    where=case.title,
                    figure=mean,
                    half=half,
                    bound=bound,
                    is_least=is_least,
                )
            )
    return findings


def _of_crowd(runs: Sequence[Figures]) -> list[Finding]:
    figures: list[tuple[str, str, float | None, bool, float, str]] = [
        ("Jain's index of bytes", "jain", JAIN, True, 1, ""),
        ("use of the link", "utilisation", 100 * UTILISATION, True, 100, "%"),
        ("queue, 95 % of the time up to", "queue_share_p95", 100 * QUEUE_SHARE, False, 100, "%"),
        ("queue, mean", "queue_share_mean", None, False, 100, "%"),
        ("queue, peak", "queue_share_max", None, False, 100, "%"),
        ("queue drops", "drops_per_s", None, False, 1, "/s"),
        ("tokens per bundle", "tokens_per_bundle", 1.0, True, 1, ""),
        ("token delay p50", "delay_p50_s", None, False, 1000, "ms"),
        ("token delay p99", "delay_p99_s", None, False, 1000, "ms"),
        ("flows without a token", "flows_without_tokens", 0, False, 1, ""),
    ]
    findings = []
    for what, name, bound, is_least, factor, unit in figures:
        mean, half = mean_half([factor * run[name] for run in runs])
        findings.append(
            Finding(
                part="fairness",
                what=f"{CrowdCase().title}: {what}",
                figure=mean,
                half=half,
                bound=bound,
                is_least=is_least,
                unit=unit,
            )
        )
    return findings
