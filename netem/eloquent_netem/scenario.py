"""Scenario files: a path's two directions, its clock's length, its seed and its cross traffic.

`eloquent_netem.scenario_parts` has the format of its parts, `eloquent_netem.scenario_build` makes
links of them; docs/netem.md describes it all.
"""

import tomllib
import warnings
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from eloquent_netem.loss import PacketClockedLossWarning
from eloquent_netem.scenario_parts import (
    CROSS,
    DEFAULT_QUEUE,
    DOWN,
    MAX_LENGTH_S,
    PLAIN,
    UP,
    CrossSpec,
    DirectionSpec,
    OutageSpec,
    PacketBurstLossSpec,
    SpansSpec,
    UnlimitedRateSpec,
    outage_list,
)
from eloquent_netem.scenario_schema import (
    ListOf,
    OneOf,
    Place,
    ScenarioError,
    TableOf,
    key,
    number,
    read_table,
    text,
    whole,
)

if TYPE_CHECKING:
    from eloquent_netem.cross import CrossFlow
    from eloquent_netem.link import Link

LIBRARY = Path(__file__).parent / "scenarios"
SUFFIX = ".toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A path, seen as a function of time and of a seed."""

    name: str
    "The file's name without its ending."
    place: Place
    folder: Path
    "What the files that it names are relative to."
    description: str = field(default="", metadata=key(text))
    seed: int = field(default=1, metadata=key(whole(least=0)))
    "Used when a run gives none."
    length_s: float = field(default=60.0, metadata=key(number(least=0.1, most=MAX_LENGTH_S)))
    up: DirectionSpec = field(default=PLAIN, metadata=key(TableOf(DirectionSpec)))
    "From the client to the server."
    down: DirectionSpec = field(default=PLAIN, metadata=key(TableOf(DirectionSpec)))
    "From the server to the client."
    outages: tuple[OutageSpec, ...] = field(default=(), metadata=key(outage_list))
    "Of both directions, at the same instants."
    cross: tuple[CrossSpec, ...] = field(default=(), metadata=key(ListOf(OneOf(CROSS))))

    def direction(self, name: str) -> DirectionSpec:
        """Return the direction `up` or `down`."""
        return self.up if name == UP else self.down

    def links(self, seed: int | None = None, origin_s: float = 0.0) -> "tuple[Link, Link]":
        """Return new links for the directions up and down, on a clock that starts at `origin_s`.

        Raises:
            ScenarioError: a part refuses its figures, or a file that is named cannot be read.
        """
        from eloquent_netem.scenario_build import build_link

        seed = self.seed if seed is None else seed
        return build_link(self, UP, seed, origin_s), build_link(self, DOWN, seed, origin_s)

    def cross_flows(
        self, up: "Link", down: "Link", seed: int | None = None, origin_s: float = 0.0
    ) -> "tuple[CrossFlow, ...]":
        """Return new flows of cross traffic that send into these links, on the same clock.

        Whatever drives the links lets them act and hands each packet that comes out and is not
        the subject's to `on_delivered` of all of them.
        """
        from eloquent_netem.scenario_build import build_cross

        return build_cross(self, (up, down), self.seed if seed is None else seed, origin_s)

    def warnings(self) -> tuple[str, ...]:
        """Return what one should know before one believes a figure from this scenario."""
        found = []
        for name in (UP, DOWN):
            place = self.place.at(name).at("loss")
            if isinstance(self.direction(name).loss, PacketBurstLossSpec):
                found.append(
                    f"{place.file}: {place.key}: packet-bursts step per packet, so a sender that "
                    f"slows down stays in a burst, and protocols cannot be compared; use bursts."
                )
        return tuple(found)

    def check(self, place: Place) -> None:
        """Refuse what each key allows but all together do not."""
        self._check_outages(self.outages, place.at("outages"))
        for name in (UP, DOWN):
            path = self.direction(name)
            self._check_outages(path.outages, place.at(name).at("outages"))
            holds = any(outage.effect == "hold" for outage in self.outages + path.outages)
            flows_freely = isinstance(path.rate, UnlimitedRateSpec) and not holds
            if flows_freely and path.queue != DEFAULT_QUEUE:
                raise (
                    place.at(name)
                    .at("queue")
                    .error(f"never fills while the rate is unlimited; give {name}.rate")
                )
        for index, flow in enumerate(self.cross):
            self._check_flow(flow, place.at("cross").at(index))

    def _check_outages(self, outages: tuple[OutageSpec, ...], place: Place) -> None:
        for index, outage in enumerate(outages):
            if isinstance(outage, SpansSpec) and outage.spans_s[-1][1] > self.length_s:
                raise (
                    place.at(index)
                    .at("spans_s")
                    .error(
                        f"ends at {outage.spans_s[-1][1]:g} s, after the scenario's length_s "
                        f"({self.length_s:g} s)"
                    )
                )

    def _check_flow(self, flow: CrossSpec, place: Place) -> None:
        path = self.direction(flow.direction)
        if isinstance(path.rate, UnlimitedRateSpec):
            raise place.error(
                f"would fill an unlimited rate; give {flow.direction}.rate, or leave it out"
            )
        if flow.start_s >= self.length_s:
            raise place.at("start_s").error(
                f"must be below the scenario's length_s ({self.length_s:g} s)"
            )
        if self.rtt_ms(flow) <= 0:
            raise place.at("rtt_ms").error("is missing, and the path's delays are 0")
        if self.rtt_ms(flow) < path.delay_ms:
            raise place.at("rtt_ms").error(
                f"must be at least {flow.direction}.delay_ms ({path.delay_ms:g} ms)"
            )

    def rtt_ms(self, flow: CrossSpec) -> float:
        """Return a flow's round-trip time without queues."""
        return self.up.delay_ms + self.down.delay_ms if flow.rtt_ms is None else flow.rtt_ms


def library_names() -> tuple[str, ...]:
    """Return the names of the scenarios that netem brings along."""
    return tuple(sorted(path.stem for path in LIBRARY.glob(f"*{SUFFIX}")))


def load_scenario(name_or_path: str | Path) -> Scenario:
    """Return a scenario of the library by its name, or one from a file by its path.

    A text that has a slash or ends in .toml is a path.

    Raises:
        ScenarioError: there is none, or its file is wrong; it names file, key and reason.
    """
    path = Path(name_or_path)
    if isinstance(name_or_path, str) and path.name == name_or_path and path.suffix != SUFFIX:
        if name_or_path not in library_names():
            raise ScenarioError(_unknown_scenario(name_or_path))
        path = LIBRARY / f"{name_or_path}{SUFFIX}"
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{path}: is not UTF-8 text, so it is no scenario file.") from error
    file = path.name if path.parent == LIBRARY else str(path)
    return parse_scenario(content, name=path.stem, file=file, folder=path.parent)


def parse_scenario(
    content: str, *, name: str = "scenario", file: str = "scenario.toml", folder: Path = Path()
) -> Scenario:
    """Return the scenario that a TOML text describes; `file` is what errors call it.

    Raises:
        ScenarioError: the text is wrong; it names file, key and reason.
    """
    place = Place(file)
    try:
        table = tomllib.loads(content)
    except (ValueError, RecursionError) as error:
        raise place.error(f"is not TOML: {str(error).rstrip('.')}") from error
    scenario: Scenario = read_table(Scenario, table, place, name=name, place=place, folder=folder)
    with warnings.catch_warnings():
        # Each part checks its own figures when it is made; `links` warns when it is called for.
        warnings.simplefilter("ignore", PacketClockedLossWarning)
        scenario.links()
    return scenario


def _unknown_scenario(name: str) -> str:
    close = get_close_matches(name, library_names(), n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return (
        f"There is no scenario {name!r}; {meant}`eloquent netem list` names them all, and the path "
        f"of a scenario file ends in {SUFFIX}."
    )
