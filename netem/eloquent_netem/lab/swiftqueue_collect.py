"""Records for the predictor: flows of every scenario family, in files with a manifest.

Families, not packets, are what is split into training, validation and test
(`eloquent_netem.lab.swiftqueue_places`); recordings of real links are always test.
"""

import json
import math
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eloquent.errors import ConfigurationError
from eloquent.swiftqueue.dataset import file_digest
from eloquent_netem.lab.cases import Cache, Figures, Job, Progress, Results, run_jobs
from eloquent_netem.lab.paper import commit_of
from eloquent_netem.lab.rows import Place
from eloquent_netem.lab.swiftqueue_flow import run_flow
from eloquent_netem.lab.swiftqueue_markings import EXPLORING, exploring
from eloquent_netem.lab.swiftqueue_places import (
    BESIDE,
    FAMILIES,
    TEST,
    family_place,
    recorded_place,
)
from eloquent_netem.lab.swiftqueue_policies import SCHEDULERS, scheduler_of, with_scheduler
from eloquent_netem.link import stage_rng

MANIFEST = "manifest.json"
DOWN_SUFFIX = ".down"
OWN = "own"
"The folder, within that of the data, for flows of networks that the user names."
MEMORY = "collected.jsonl"
"What was collected before: run again, the command goes on where it ended."

LENGTH_S = 60.0
LEAST_TOKENS_PER_S = 20.0
MOST_TOKENS_PER_S = 200.0
MOST_OFFSET_S = 10.0
"The receiver's clock is ahead of the sender's by up to this, or behind it."


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectCase:
    """One flow to be collected: a case whose schemes are those of `EXPLORING`."""

    place: Place
    family: str
    split: str
    folder: Path
    length_s: float = LENGTH_S

    @property
    def title(self) -> str:
        """See `Case.title`."""
        return f"collecting {self.place.name}"

    def run(self, scheme: str, seed: int) -> Figures:
        """See `Case.run`: write the flow's file; return what the manifest says of it."""
        rng = stage_rng(seed, "collect", self.place.name)
        tokens_per_s = round(math.exp(rng.uniform(*map(math.log, TOKEN_RATES))), 1)
        run = run_flow(
            self.place.scenario,
            exploring(scheme, seed),
            seed=seed,
            tokens_per_s=tokens_per_s,
            length_s=self.length_s,
            offset_s=rng.uniform(-MOST_OFFSET_S, MOST_OFFSET_S),
        )
        path = self.path(scheme, seed)
        run.flow.save(path)
        return {
            "file": path.name,
            "family": self.family,
            "split": self.split,
            "digest": file_digest(path),
            "scenario": self.place.name,
            "scheduler": self.scheduler,
            "policy": scheme,
            "seed": seed,
            "tokens_per_s": tokens_per_s,
            "length_s": self.length_s,
            "base_delay_s": run.base_delay_s,
            "packets": len(run.arrived_s),
            "c_share": run.c_share,
            "reported_share": run.reported_share,
        }

    @property
    def scheduler(self) -> str:
        """The downlink's scheduler."""
        return scheduler_of(self.place)

    def path(self, scheme: str, seed: int) -> Path:
        """Return where the flow's file is."""
        family = re.sub(r"[^\w.-]+", "-", self.family)
        return self.folder / f"{family}-{seed}-{self.scheduler}-{scheme}.npz"


TOKEN_RATES = (LEAST_TOKENS_PER_S, MOST_TOKENS_PER_S)


class Files(Cache):
    """Remembers what was collected, as long as its file is there and unchanged."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / MEMORY)
        self._folder = folder

    def get(self, job: Job) -> Figures | None:
        """See `Cache.get`."""
        known = super().get(job)
        if known is None:
            return None
        try:
            is_there = file_digest(self._folder / known["file"]) == known["digest"]
        except OSError:
            return None
        return known if is_there else None


def family_jobs(
    families: Iterable[str], folder: Path, *, flows: int, seed: int, length_s: float = LENGTH_S
) -> list[Job]:
    """Return the jobs of `flows` flows of each family, schedulers and policies by turns."""
    jobs = []
    for name in families:
        turn = list(FAMILIES).index(name)
        for number in range(seed, seed + flows):
            place = family_place(name, number)
            jobs.append(
                _job(
                    place,
                    folder,
                    turn,
                    family=name,
                    split=FAMILIES[name].split,
                    seed=number,
                    length_s=length_s,
                )
            )
            turn += 1
    return jobs


def held_out_jobs(
    networks: Mapping[str, Sequence[Place]],
    folder: Path,
    *,
    flows: int,
    seed: int,
    length_s: float = LENGTH_S,
) -> list[Job]:
    """Return the like for networks that are for testing alone; by name, a few places each."""
    jobs = []
    for first, (name, places) in enumerate(networks.items()):
        for turn in range(flows):
            place = places[turn // len(SCHEDULERS) % len(places)]
            jobs.append(
                _job(
                    place,
                    folder,
                    first + turn,
                    family=name,
                    split=TEST,
                    seed=seed + turn,
                    length_s=length_s,
                )
            )
    return jobs


def _job(
    place: Place, folder: Path, turn: int, *, family: str, split: str, seed: int, length_s: float
) -> Job:
    """Return a flow's job; 2 schedulers and 9 policies come by turns, so that all pairs do."""
    case = CollectCase(
        place=with_scheduler(place, SCHEDULERS[turn % len(SCHEDULERS)]),
        family=family,
        split=split,
        folder=folder,
        length_s=length_s,
    )
    return Job(case, tuple(EXPLORING)[turn % len(EXPLORING)], seed)


def check_families(names: Sequence[str]) -> Sequence[str]:
    """Return the names, or those of all families if there are none.

    Raises:
        ConfigurationError: one is of no family.
    """
    for name in names:
        if name not in FAMILIES:
            raise ConfigurationError(
                f"There is no scenario family {name!r}: choose from {', '.join(FAMILIES)}."
            )
    return names or tuple(FAMILIES)


def recorded_networks(paths: Sequence[Path]) -> dict[str, list[Place]]:
    """Return the recordings of files in mahimahi's format, or of folders with NAME.down, by name.

    Each is there with every kind of cross traffic.

    Raises:
        ConfigurationError: one cannot be read, or there is none.
    """
    found = {}
    for path in paths:
        files = sorted(path.glob(f"*{DOWN_SUFFIX}")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise ConfigurationError(
                f"{path} is no recording, nor a folder with NAME{DOWN_SUFFIX} in it."
            )
        for file in files:
            name = file.name.removesuffix(DOWN_SUFFIX)
            found[name] = [recorded_place(file.parent, name, beside) for beside in BESIDE]
    return found


def collect(jobs: Sequence[Job], folder: Path, *, workers: int | None, command: str) -> Results:
    """Collect what is not there yet, and put it into the manifest; Ctrl-C keeps what is done."""
    begun_at = datetime.now(UTC)
    with Progress(sys.stderr, "collect") as progress:
        results = run_jobs(
            jobs,
            workers=workers or os.cpu_count() or 1,
            cache=Files(folder),
            progress=progress,
        )
    commit = commit_of(Path(__file__).parent)
    new = [results.figures[job] | {"commit": commit} for job in jobs if job in results.figures]
    names = {row["file"] for row in new}
    path = folder / MANIFEST
    old = json.loads(path.read_text(encoding="utf-8"))["flows"] if path.exists() else []
    meta = {
        "command": command,
        "commit": commit,
        "begun_at": begun_at.isoformat(timespec="seconds"),
        "took_s": round((datetime.now(UTC) - begun_at).total_seconds(), 1),
        "versions": versions(),
        "is_complete": results.is_complete,
        "failures": list(results.failures.values()),
    }
    write_manifest(folder, meta, [*(row for row in old if row["file"] not in names), *new])
    return results


def judged_data(
    data: Path,
    places: Sequence[Place],
    *,
    flows: int,
    workers: int | None,
    command: str,
    length_s: float = LENGTH_S,
) -> Path:
    """Collect flows of single places for testing; return a folder with them and what is learnt of.

    Its manifest names the training and validation flows of `data`, and beside them only these: who
    reads it finds out whether one is of a family that is learnt of.
    """
    folder = data / OWN
    folder.mkdir(exist_ok=True)
    networks = {_family_of(place.name): [place] for place in places}
    jobs = held_out_jobs(networks, folder, flows=flows, seed=0, length_s=length_s)
    results = collect(jobs, folder, workers=workers, command=command)
    told = json.loads((data / MANIFEST).read_text(encoding="utf-8"))
    learnt = [
        row | {"file": str((data / row["file"]).absolute())}
        for row in told["flows"]
        if row["split"] != TEST
    ]
    write_manifest(folder, told["meta"], [*learnt, *results.figures.values()])
    return folder


def _family_of(name: str) -> str:
    """Return the family that drew a network, so that one that was learnt of is found out."""
    family, _, seed = name.rpartition("-")
    return family if family in FAMILIES and seed.isdecimal() else name


def write_manifest(folder: Path, meta: dict[str, Any], flows: Sequence[Figures]) -> None:
    """Write what `eloquent.swiftqueue.dataset.Manifest` reads."""
    path = folder / MANIFEST
    path.write_text(json.dumps({"meta": meta, "flows": list(flows)}, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Return the versions of what makes the figures."""
    names = ("eloquent-stream", "aioquic", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
