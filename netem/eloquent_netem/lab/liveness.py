"""Liveness: how soon a dead link is noticed, and how often a live one is taken for dead."""

import asyncio
import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from eloquent.core.log import TokenLog
from eloquent.quic.certificate import make_certificate
from eloquent.serving import Reader
from eloquent_netem.lab.cases import Figures, Job, Results
from eloquent_netem.lab.findings import Finding, Report, Sheet, mean_half
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import IndependentLoss, Outages
from eloquent_netem.vloop import VirtualNetwork, run

OURS = "eloquent"
SIDES = ("client", "server")

PORT = 4433
RTTS_S = (0.05, 0.1, 0.3)
LOSS = 0.2
LOSSES = (0.0, LOSS)
ALARM_SEEDS = 4
"At most so many of the seeds are spent on runs of `ALARM_S`."
ALARM_S = 3600.0
"A run for false alarms: so long an open turn of which the model says nothing."
DEATH_S = 30.0
"The link dies so long after the turn was asked; the seed adds up to `PHASE_S`."
PHASE_S = 2.0
WAITED_S = 20.0
DETECTION_LOOK_S = 0.02
ALARM_LOOK_S = 0.2
"The server's application asks about each reader's link this often."

ALARMS_PER_HOUR = 1.0
DETECTED_S = 2.0

FOREVER_S = 1e9

_CERTIFICATE = make_certificate("server", datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))


class Silent:
    """A `TurnService` whose model says nothing; it notes when a reader's link is taken for dead."""

    def __init__(self) -> None:
        self.silent_at: list[float] = []
        "In the loop's time, in seconds."
        self._is_silent: dict[Reader, bool] = {}

    def on_request(self, reader: Reader) -> None:
        """See `TurnService`."""
        self._is_silent[reader] = False
        reader.accept(TokenLog())

    def on_cancel(self, reader: Reader) -> None:
        """See `TurnService`."""

    def on_gone(self, reader: Reader) -> None:
        """See `TurnService`."""
        self._is_silent.pop(reader, None)

    async def look(self, every_s: float) -> None:
        """Look at all readers, for ever."""
        while True:
            for reader, was_silent in self._is_silent.items():
                self._is_silent[reader] = reader.is_silent
                if self._is_silent[reader] and not was_silent:
                    self.silent_at.append(asyncio.get_running_loop().time())
            await asyncio.sleep(every_s)


@dataclass(frozen=True, slots=True)
class LivenessCase:
    """An open, silent turn on a lossy path that lives for an hour, or dies after a while."""

    rtt_s: float
    loss: float
    dies: bool

    @property
    def title(self) -> str:
        """See `Case.title`."""
        return f"{1000 * self.rtt_s:g} ms, {100 * self.loss:g} % loss"

    def run(self, scheme: str, seed: int) -> Figures:
        """See `Case.run`."""
        death_s = DEATH_S + PHASE_S * stage_rng(seed, "both", "death").random()
        dead = [(death_s, FOREVER_S)] if self.dies else []
        links = [
            Link(
                delay_s=self.rtt_s / 2,
                seed=seed,
                name=name,
                loss=Outages(dead, IndependentLoss(self.loss, stage_rng(seed, name, "loss"))),
            )
            for name in ("up", "down")
        ]
        network = VirtualNetwork.between(*links)
        length_s = death_s + WAITED_S if self.dies else ALARM_S
        silent_at = run(
            _watch(network, length_s, DETECTION_LOOK_S if self.dies else ALARM_LOOK_S),
            network,
            limit_s=2 * length_s,
        )
        figures = {
            "up_packets_per_s": links[0].packets_sent / length_s,
            "down_packets_per_s": links[1].packets_sent / length_s,
        }
        for side, times in zip(SIDES, silent_at, strict=True):
            figures[f"{side}_alarms"] = sum(time < death_s or not self.dies for time in times)
            if self.dies:
                after = [time - death_s for time in times if time >= death_s]
                figures[f"{side}_detected_s"] = after[0] if after else WAITED_S
        return figures


async def _watch(
    network: VirtualNetwork, length_s: float, look_s: float
) -> tuple[list[float], list[float]]:
    """Keep a silent turn open; return when client and server took the link for dead, in seconds."""
    from eloquent.quic.listen import listen
    from eloquent.session.routes import FixedMachine
    from eloquent.session.session import Session
    from eloquent.session.states import LinkState
    from eloquent.url import ServerUrl

    loop = asyncio.get_running_loop()
    silent_at: list[float] = []

    def on_state(state: LinkState) -> None:
        if state is LinkState.SILENT:
            silent_at.append(loop.time())

    service = Silent()
    with network.on("server"):
        listener = await listen("server", PORT, certificate=_CERTIFICATE, service=service)
        looking = asyncio.ensure_future(service.look(look_s))
    url = ServerUrl("server", PORT, _CERTIFICATE.pin)
    session = Session(url, on_state=on_state, machine=FixedMachine())
    await session.connect()
    turn = session.ask(b"{}")
    await asyncio.sleep(length_s)
    turn.cancel()
    looking.cancel()
    await session.close()
    await listener.close()
    return silent_at, service.silent_at


def liveness_jobs(seeds: Sequence[int]) -> list[Job]:
    """Return the jobs, the longest first."""
    return [
        Job(LivenessCase(rtt_s, LOSS, dies=False), OURS, seed)
        for rtt_s in RTTS_S
        for seed in seeds[:ALARM_SEEDS]
    ] + [
        Job(LivenessCase(rtt_s, loss, dies=True), OURS, seed)
        for rtt_s in RTTS_S
        for loss in LOSSES
        for seed in seeds
    ]


def liveness_report(results: Results) -> Report:
    """Judge false alarms and detection, on both sides."""
    report = Report("liveness")
    rows = []
    for rtt_s in RTTS_S:
        case = LivenessCase(rtt_s, LOSS, dies=False)
        runs = list(results.seeds(case, OURS).values())
        if runs:
            alarms = [_alarms(case, side, runs) for side in SIDES]
            report.findings += alarms
            rates = (
                mean_half([run[f"{way}_packets_per_s"] for run in runs])[0]
                for way in ("up", "down")
            )
            cells = [f"{found.figure:.2f} ± {found.half:.2f}" for found in alarms]
            rows.append((case.title, f"{len(runs)}", *cells, *(f"{rate:.2f}" for rate in rates)))
        for loss in LOSSES:
            dying = LivenessCase(rtt_s, loss, dies=True)
            trials = list(results.seeds(dying, OURS).values())
            if trials:
                report.findings += [_detection(dying, side, trials) for side in SIDES]
    report.findings.append(
        Finding(part="liveness", what="runs that failed", figure=len(results.failures), bound=0)
    )
    header = ("path", "hours", "client's false alarms/h", "server's", "packets/s up", "down")
    report.sheets.append(Sheet("A silent turn", header, tuple(rows)))
    report.notes = (
        "A turn is open and the model says nothing, on asyncio's endpoints in virtual time. A "
        "false alarm is the client's state *silent*, or a silent reader at the server, on a link "
        "that lives. The link dies both ways at a phase that the seed chooses; the slowest trial "
        "counts."
    )
    return report


def _alarms(case: LivenessCase, side: str, runs: Sequence[Figures]) -> Finding:
    mean, half = mean_half([run[f"{side}_alarms"] * 3600 / ALARM_S for run in runs])
    return Finding(
        part="liveness",
        what=f"the {side}'s false alarms",
        where=case.title,
        figure=mean,
        half=half,
        bound=ALARMS_PER_HOUR,
        unit="/h",
    )


def _detection(case: LivenessCase, side: str, runs: Sequence[Figures]) -> Finding:
    return Finding(
        part="liveness",
        what=f"the {side} knows that the link is dead within",
        where=case.title,
        figure=max(run[f"{side}_detected_s"] for run in runs),
        bound=DETECTED_S,
        unit="s",
    )
