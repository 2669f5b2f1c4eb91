"""What `eloquent lab paper` runs: the parts of the results' page, and the code they depend on."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eloquent_netem.lab.cases import LAB, code_of
from eloquent_netem.lab.places import RECORDINGS, named_recording, synthetic
from eloquent_netem.lab.rows import ORACLE, Place
from eloquent_netem.lab.sources import ConstantRate, Source
from eloquent_netem.lab.stalls import Comparison, find_driver

LOSSES = (0.01, 0.05, 0.10)
BURSTS_MS = (None, 150.0)
RTTS_MS = (50.0, 100.0, 300.0)
SOURCE: Source = ConstantRate(30.0)
"30 tokens a second, 400 of them."

SIM_SCHEMES = ("eloquent", "duplicate", "retransmit", "quic-stream", "tcp", ORACLE)
TUN_SCHEMES = (
    "eloquent",
    "duplicate",
    "retransmit",
    "quic-stream",
    "tcp-sse",
    "tcp-websocket",
    ORACLE,
)

TITLES = {
    "sim": "In virtual time",
    "traces": "Recorded cellular links",
    "tun": "Against the kernel's TCP",
    "recorded": "Recorded cellular links, against the kernel's TCP",
}
"All parts, in the page's order."

DRIVERS = {"sim": "sim", "traces": "sim", "tun": "tun", "recorded": "tun"}
"What makes them."

LEAST = {
    "duplicate": 0.60,
    "retransmit": 0.90,
    "quic-stream": 0.90,
    "tcp": 0.90,
    "tcp-sse": 0.90,
    "tcp-websocket": 0.90,
}
"By which share our summed excess is to be below theirs, at least."

PAPERS = {"retransmit": 0.710, "duplicate": 0.316}
"By which share Eloquent's paper (arXiv 2401.12961) has the stall ratio below theirs."


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of the page, made by one comparison."""

    name: str
    "One of `TITLES`."
    schemes: tuple[str, ...]
    places: tuple[Place, ...]
    source: Source = SOURCE
    pictured: tuple[str, ...] = ()
    "Places with a panel in the figure of delays; the last one is the staircase's."

    @property
    def title(self) -> str:
        """What the part is, for its heading."""
        return TITLES[self.name]

    @property
    def driver(self) -> str:
        """What makes it."""
        return DRIVERS[self.name]


def code_of_part(name: str) -> str:
    """Return a hash of the code that a part's figures depend on, whether it can be made or not.

    That is the code of its runs, of what is compared, and of the statistics.
    """
    case = Comparison(grid()[0], SOURCE, find_driver(DRIVERS[name]))
    return code_of(case, (__name__, f"{LAB}statistics"))


def grid() -> tuple[Place, ...]:
    """Return the 18 networks of the comparison: losses by round trips, independent and bursts."""
    return tuple(
        synthetic(rtt_ms=rtt_ms, loss=loss, burst_ms=burst_ms)
        for burst_ms in BURSTS_MS
        for rtt_ms in RTTS_MS
        for loss in LOSSES
    )


def recordings(folder: Path) -> tuple[Place, ...]:
    """Return those of `RECORDINGS` that are in `folder`, as far as it may be read."""
    there = set()
    with contextlib.suppress(PermissionError):
        there = {path.stem for path in folder.glob("*.down")}
    return tuple(named_recording(folder, name) for name in RECORDINGS if name in there)


def make_parts(traces: Path, *, has_tun: bool = True) -> Sequence[Part]:
    """Return the parts that can be made, in the page's order."""
    places = grid()
    pictured = tuple(
        synthetic(rtt_ms=100, loss=loss, burst_ms=burst_ms).name
        for loss, burst_ms in ((0.10, 150), (0.10, None), (0.05, None))
    )
    made = [
        Part(name="sim", schemes=SIM_SCHEMES, places=places, pictured=pictured),
        Part(name="traces", schemes=SIM_SCHEMES, places=recordings(traces)),
        Part(name="tun", schemes=TUN_SCHEMES, places=places, pictured=pictured),
        Part(name="recorded", schemes=TUN_SCHEMES, places=recordings(traces)),
    ]
    return [part for part in made if part.places and (has_tun or part.driver != "tun")]
