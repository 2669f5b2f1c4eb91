"""Do virtual time and the TUN router tell the same story? Rows of both drivers, held together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean

from eloquent_netem.lab.findings import Sheet
from eloquent_netem.lab.rows import ORACLE, Row
from eloquent_netem.lab.statistics import (
    MEASURES,
    Interval,
    Samples,
    mean_interval,
    over_seeds,
    samples_of,
)

OURS = "eloquent"
DELAY_SHARE = 0.10
DELAY_SLACK_MS = 1.0
"Our mean delays may differ by this share of the one in virtual time, and this much."

COUNTERPARTS = {"tcp-sse": "tcp"}
"The kernel's TCP, and the model of it, take the same place in a ranking."

DRIVERS = ("sim", "tun")


@dataclass(frozen=True, slots=True)
class Ranking:
    """How two schemes stand on one network, by one measure: excess stall ratios and intervals."""

    scenario: str
    measure: str
    schemes: tuple[str, str]
    sim: tuple[Interval, Interval]
    tun: tuple[Interval, Interval]

    @property
    def is_clear(self) -> bool:
        """Whether both drivers' intervals are apart."""
        return all(one.is_apart(other) for one, other in (self.sim, self.tun))

    @property
    def is_reversed(self) -> bool:
        """Whether both are clear, and each says the other of the two is better."""
        orders = [one.figure < other.figure for one, other in (self.sim, self.tun)]
        return self.is_clear and orders[0] != orders[1]


@dataclass(frozen=True, slots=True)
class Delay:
    """Our mean token delay on one network, over the seeds that both drivers ran; milliseconds."""

    scenario: str
    sim: Interval
    tun: Interval
    programs_ms: float
    "What the programs took over TUN, which is in neither."

    @property
    def allowed_ms(self) -> float:
        """By how much the two may differ."""
        return DELAY_SHARE * self.sim.figure + DELAY_SLACK_MS

    @property
    def is_alike(self) -> bool:
        """Whether they differ by no more."""
        return abs(self.tun.figure - self.sim.figure) <= self.allowed_ms


@dataclass(frozen=True, slots=True)
class Agreement:
    """What was compared; empty where the drivers have nothing in common."""

    rankings: tuple[Ranking, ...]
    delays: tuple[Delay, ...]

    @property
    def holds(self) -> bool:
        """Whether no ranking is reversed and all delays are alike."""
        is_ranked_alike = not any(ranking.is_reversed for ranking in self.rankings)
        return is_ranked_alike and all(delay.is_alike for delay in self.delays)


def agreement(rows: Sequence[Row]) -> Agreement:
    """Compare the rows of the two drivers, network by network, on the seeds that both ran."""
    paired = _paired(rows)
    return Agreement(tuple(_rankings(paired)), tuple(_delays(paired)))


def agreement_sheets(rows: Sequence[Row]) -> list[Sheet]:
    """Return the comparison as two tables, or nothing if there is nothing to compare."""
    found = agreement(rows)
    if not found.rankings and not found.delays:
        return []
    return [_ranking_sheet(found.rankings), _delay_sheet(found.delays)]


def _paired(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows by driver, of those networks, schemes and seeds that both ran."""
    named = [
        replace(row, scheme=COUNTERPARTS.get(row.scheme, row.scheme))
        for row in rows
        if row.scheme != ORACLE
    ]
    keys = [
        {_key(row) for row in named if row.driver == driver and row.excess_strict is not None}
        for driver in DRIVERS
    ]
    both = set.intersection(*keys)
    return {
        driver: [row for row in named if row.driver == driver and _key(row) in both]
        for driver in DRIVERS
    }


def _key(row: Row) -> tuple[str, str, str, int]:
    return row.scenario, row.source, row.scheme, row.seed


def _rankings(paired: dict[str, list[Row]]) -> list[Ranking]:
    found = []
    rows = paired["sim"]
    for measure, (_, field) in MEASURES.items():
        sim, tun = (samples_of(paired[driver], field) for driver in DRIVERS)
        for scenario in dict.fromkeys(row.scenario for row in rows):
            schemes = dict.fromkeys(row.scheme for row in rows if row.scenario == scenario)
            for pair in combinations(schemes, 2):
                one, other = _intervals(sim, scenario, pair), _intervals(tun, scenario, pair)
                found.append(Ranking(scenario, measure, pair, one, other))
    return found


def _intervals(samples: Samples, scenario: str, pair: tuple[str, str]) -> tuple[Interval, Interval]:
    one, other = (over_seeds(samples, scenario, scheme) for scheme in pair)
    assert one is not None
    assert other is not None
    return one, other


def _delays(paired: dict[str, list[Row]]) -> list[Delay]:
    found = []
    ours = {driver: [row for row in paired[driver] if row.scheme == OURS] for driver in DRIVERS}
    for scenario in dict.fromkeys(row.scenario for row in ours["sim"]):
        sim, tun = ([row for row in ours[driver] if row.scenario == scenario] for driver in DRIVERS)
        found.append(
            Delay(
                scenario,
                mean_interval([row.delay_mean_ms for row in sim]),
                mean_interval([row.delay_mean_ms for row in tun]),
                fmean(row.programs_ms for row in tun),
            )
        )
    return found


def _ranking_sheet(rankings: Sequence[Ranking]) -> Sheet:
    header = ("network", "measure", "pairs of schemes", "clear with both", "reversed")
    lines = []
    for scenario, measure in dict.fromkeys((each.scenario, each.measure) for each in rankings):
        here = [each for each in rankings if (each.scenario, each.measure) == (scenario, measure)]
        reverse = [" and ".join(each.schemes) for each in here if each.is_reversed]
        clear = sum(each.is_clear for each in here)
        lines.append((scenario, measure, f"{len(here)}", f"{clear}", ", ".join(reverse) or "none"))
    return Sheet("Rankings in virtual time and over TUN", header, tuple(lines))


def _delay_sheet(delays: Sequence[Delay]) -> Sheet:
    header = ("network", "virtual time ms", "TUN ms", "may differ by ms", "verdict", "programs ms")
    lines = [
        (
            each.scenario,
            f"{each.sim.figure:.2f} ± {each.sim.half:.2f}",
            f"{each.tun.figure:.2f} ± {each.tun.half:.2f}",
            f"{each.allowed_ms:.2f}",
            "alike" if each.is_alike else "differs",
            f"{each.programs_ms:.2f}",
        )
        for each in delays
    ]
    return Sheet(f"Mean token delay of {OURS}", header, tuple(lines))
