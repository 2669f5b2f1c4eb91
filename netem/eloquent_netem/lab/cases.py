"""Experiments as lists of jobs: run on several processes, remembered, ended early without loss."""

import hashlib
import json
import logging
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TextIO

import eloquent.errors
import eloquent_netem.tcp
from eloquent_netem.lab.answer import TCP_SCHEMES
from eloquent_netem.lab.measures import DeliveryError
from eloquent_netem.sim import StuckError
from eloquent_netem.tcp import TcpError

SHARED_MODULES = ("answer", "grid", "measures", "pair", "shared", "stalls")
"What the runs of several parts are made of, in this folder."

Figures = dict[str, float]
"What a run found, by name; the names end in their units."


class Case(Protocol):
    """One network and one load: a frozen dataclass, whose `repr` is its identity."""

    @property
    def title(self) -> str:
        """What it is, for a person."""

    def run(self, scheme: str, seed: int) -> Figures:
        """Measure one scheme on it, in virtual time; the same seed gives the same figures."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run."""

    case: Case
    scheme: str
    seed: int


@dataclass(slots=True)
class Results:
    """What the runs found."""

    figures: dict[Job, Figures] = field(default_factory=dict)
    failures: dict[Job, str] = field(default_factory=dict)
    "Runs that lost, doubled or changed a token, or did not end, and how."
    is_complete: bool = True
    "False: the user ended it before all jobs were done."

    def seeds(self, case: Case, scheme: str) -> dict[int, Figures]:
        """Return the figures of one scheme on one case, by seed."""
        return {
            job.seed: found
            for job, found in self.figures.items()
            if job.case == case and job.scheme == scheme
        }


class Cache:
    """Figures of earlier runs, in a file with a JSON object a line.

    A run is known by its case, scheme and seed, and by a hash of the code that it depends on.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, Figures] = {}
        self._codes: dict[tuple[str, bool], str] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self._known[row["key"]] = row["figures"]

    def get(self, job: Job) -> Figures | None:
        """Return what this job found when it ran on the same code, or None."""
        return self._known.get(self._key(job)) if self._path is not None else None

    def put(self, job: Job, figures: Figures) -> None:
        """Remember what a job found."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": self._key(job), "figures": figures}) + "\n")

    def _key(self, job: Job) -> str:
        kind = (type(job.case).__module__, job.scheme in TCP_SCHEMES)
        if kind not in self._codes:
            self._codes[kind] = _code_hash(kind[0], is_tcp=kind[1])
        text = f"{self._codes[kind]}/{job.case!r}/{job.scheme}/{job.seed}"
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _code_hash(module: str, *, is_tcp: bool) -> str:
    """Hash the code that a run depends on: the transport, netem, and of the lab what it runs."""
    netem = Path(eloquent_netem.tcp.__path__[0]).parent
    files = [path for path in netem.rglob("*.py") if path.parent.name != "lab"]
    names = (*SHARED_MODULES, module.rpartition(".")[2])
    files += [netem / "lab" / f"{name}.py" for name in names]
    if not is_tcp:
        files += Path(eloquent.__path__[0]).rglob("*.py")
    digest = hashlib.blake2b(digest_size=12)
    for path in sorted(set(files)):
        if path.exists():  # A test's case is not of the lab.
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def run_jobs(
    jobs: Sequence[Job],
    *,
    workers: int,
    cache: Cache,
    progress: Callable[[str], None] = lambda text: None,
) -> Results:
    """Run all jobs that the cache does not know; Ctrl-C ends it and keeps what is done."""
    results = Results()
    open_jobs = []
    for job in jobs:
        known = cache.get(job)
        if known is None:
            open_jobs.append(job)
        else:
            results.figures[job] = known
    if results.figures:
        progress(f"{len(results.figures)} of {len(jobs)} runs are known from the cache.")
    if not open_jobs:
        return results
    with ProcessPoolExecutor(workers, initializer=_start_worker) as pool:
        futures: Mapping[Future[Figures | str], Job] = {
            pool.submit(_attempt, job): job for job in open_jobs
        }
        try:
            for count, future in enumerate(as_completed(futures), start=1):
                job, found = futures[future], future.result()
                if isinstance(found, str):
                    results.failures[job] = found
                else:
                    results.figures[job] = found
                    cache.put(job, found)
                progress(f"{count} of {len(open_jobs)} runs")
        except KeyboardInterrupt:
            results.is_complete = False
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return results


def _start_worker() -> None:
    """Let the parent alone answer Ctrl-C; what endpoints log of broken networks is expected."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)


def _attempt(job: Job) -> Figures | str:
    try:
        return job.case.run(job.scheme, job.seed)
    except (DeliveryError, StuckError, TcpError) as error:
        return f"{job.case.title}, {job.scheme}, seed {job.seed}: {error}"


def all_jobs(cases: Iterable[Case], schemes: Sequence[str], seeds: Iterable[int]) -> list[Job]:
    """Return a job for each case, scheme and seed."""
    return [Job(case, scheme, seed) for case in cases for seed in seeds for scheme in schemes]


class Progress:
    """Shows how far the runs are: in one line on a terminal, else a line every tenth part."""

    def __init__(self, stream: TextIO, part: str) -> None:
        self._stream = stream
        self._part = part
        self._shown = ""

    def __call__(self, text: str) -> None:
        """Show `text`, which may be "COUNT of ALL runs"."""
        count, _, rest = text.partition(" of ")
        if self._stream.isatty():
            print(f"\r\x1b[K{self._part}: {text}", end="", file=self._stream, flush=True)
            return
        if count.isdecimal() and rest.endswith(" runs"):
            tenth = f"{10 * int(count) // int(rest.removesuffix(' runs'))}"
            if tenth == self._shown:
                return
            self._shown = tenth
        print(f"{self._part}: {text}", file=self._stream, flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self._stream.isatty():
            print(file=self._stream)
