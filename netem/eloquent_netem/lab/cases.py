"""Experiments as lists of jobs: run on several processes, remembered, ended early without loss."""

import ast
import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

import eloquent.errors
from eloquent.errors import ConfigurationError, EloquentError
from eloquent_netem.errors import NetemError
from eloquent_netem.loss import PacketClockedLossWarning
from eloquent_netem.sim import StuckError

LAB = "eloquent_netem.lab."
FOLDER = Path(__file__).parent

FOREIGN = ("tcp", "oracle")
"Schemes whose names begin so run none of our transport's code."

ENDING = "Ending: the runs that are under way are awaited; Ctrl-C again leaves them."

Figures = dict[str, Any]
"What a run found, by name, as JSON has it: mostly numbers; the names end in their units."

OnProgress = Callable[[int, int], None]
"Takes how many runs are done, and how many there are."


class Case(Protocol):
    """One network and one load: a frozen dataclass, whose `repr` is its identity.

    The cache takes a run's code to be that of the case, of the objects in its fields, and of what
    their modules import of the lab.
    """

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

    Raises:
        ConfigurationError: the file is something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known = {} if path is None or not path.exists() else _remembered(path)
        self._codes: dict[tuple[frozenset[str], bool], str] = {}

    def get(self, job: Job) -> Figures | None:
        """Return what this job found when it ran on the same code, or None."""
        return self._known.get(self._key(job)) if self._path is not None else None

    def put(self, job: Job, figures: Figures) -> None:
        """Remember what a job found."""
        if self._path is not None:
            line = json.dumps({"key": self._key(job), "figures": figures})
            # One write, so that others may write to the same file; half a line of theirs ends here.
            with self._path.open("ab", buffering=0) as file:
                file.write(f"\n{line}\n".encode())

    def _key(self, job: Job) -> str:
        kind = (modules_of(job.case), job.scheme.startswith(FOREIGN))
        if kind not in self._codes:
            self._codes[kind] = _code_hash(*kind)
        text = f"{self._codes[kind]}/{job.case!r}/{job.scheme}/{job.seed}"
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _remembered(path: Path) -> dict[str, Figures]:
    """Return the figures that a cache has, by the runs' keys."""
    lines = path.read_bytes().splitlines()
    known: dict[str, Figures] = {}
    for line in lines:
        # Else it is empty, or whoever wrote it was killed in the middle.
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            known[row["key"]] = row["figures"]
    if any(lines) and not known:
        raise ConfigurationError(
            f"{path} remembers no runs, and is perhaps something else: name another file as the "
            "cache, or remove it."
        )
    return known


def code_of(case: Case, more: Iterable[str] = ()) -> str:
    """Return a hash of the code that a case's runs depend on, and of `more` modules of the lab."""
    return _code_hash(modules_of(case) | set(more), False)


def modules_of(case: Case) -> frozenset[str]:
    """Return the lab's modules that a case and the objects in its fields come from."""
    values = [getattr(case, one.name) for one in fields(case)]  # type: ignore[arg-type]
    names = {type(value).__module__ for value in (case, *values)}
    return frozenset(name for name in names if name.startswith(LAB))


def _code_hash(modules: frozenset[str], is_foreign: bool) -> str:
    """Hash the code that a run depends on: netem, the transport, and of the lab what it runs."""
    files = [path for path in FOLDER.parent.rglob("*.py") if path.parent != FOLDER]
    if not is_foreign:
        files += Path(eloquent.__path__[0]).rglob("*.py")
    files += [FOLDER / f"{module.removeprefix(LAB)}.py" for module in modules_reached(modules)]
    digest = hashlib.blake2b(digest_size=12)
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def modules_reached(modules: Iterable[str]) -> set[str]:
    """Return these modules of the lab, and all of it that they import, directly or not."""
    reached: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += _imports_of_lab(module)
    return reached


@lru_cache
def _imports_of_lab(module: str) -> frozenset[str]:
    """Return the lab's modules that one of them imports, anywhere in its code."""
    path = FOLDER / f"{module.removeprefix(LAB)}.py"
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return frozenset(name for name in names if name.startswith(LAB))


def run_jobs(
    jobs: Sequence[Job],
    *,
    workers: int,
    cache: Cache,
    progress: OnProgress = lambda done, total: None,
) -> Results:
    """Run all jobs that the cache does not know; Ctrl-C ends it and keeps what is done.

    Runs that are under way are awaited, and kept too; another Ctrl-C leaves them.
    """
    results = Results()
    open_jobs = []
    for job in jobs:
        known = cache.get(job)
        if known is None:
            open_jobs.append(job)
        else:
            results.figures[job] = known
    done = len(results.figures)
    progress(done, len(jobs))
    if not open_jobs:
        return results
    with ProcessPoolExecutor(workers, initializer=_start_worker) as pool:
        futures: dict[Future[Figures | str], Job] = {}
        try:
            futures.update((pool.submit(_attempt, job), job) for job in open_jobs)
            for future in as_completed(futures):
                _keep(futures[future], future.result(), results, cache)
                done += 1
                progress(done, len(jobs))
        except KeyboardInterrupt:
            results.is_complete = False
            print(ENDING, file=sys.stderr, flush=True)  # noqa: T201
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        for future, job in futures.items():
            is_kept = job in results.figures or job in results.failures
            if not is_kept and not future.cancelled():
                _keep(job, future.result(), results, cache)
    return results


def _keep(job: Job, found: Figures | str, results: Results, cache: Cache) -> None:
    if isinstance(found, str):
        results.failures[job] = found
    else:
        results.figures[job] = found
        cache.put(job, found)


def _start_worker() -> None:
    """Let the parent alone answer Ctrl-C; what endpoints log of broken networks is expected."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore", PacketClockedLossWarning)  # Told once, by the parent.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is killed: nobody is there to take what it finds."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _attempt(job: Job) -> Figures | str:
    try:
        return job.case.run(job.scheme, job.seed)
    except (EloquentError, NetemError, StuckError) as error:
        return f"{job.case.title}, {job.scheme}, seed {job.seed}: {error}"


def all_jobs(cases: Iterable[Case], schemes: Sequence[str], seeds: Iterable[int]) -> list[Job]:
    """Return a job for each case, scheme and seed."""
    return [Job(case, scheme, seed) for case in cases for seed in seeds for scheme in schemes]


class Progress:
    """Shows how far the runs are, while its block lasts.

    On a terminal it is a bar with the time that is left, else a line every tenth part.
    """

    def __init__(self, stream: TextIO, part: str) -> None:
        self._stream = stream
        self._part = part
        self._tenth = -1
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("runs"),
            TimeRemainingColumn(),
            console=Console(file=stream),
            disable=not stream.isatty(),
        )
        self._task = self._bar.add_task(part, total=None)

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` runs are done."""
        self._bar.update(self._task, completed=done, total=total)
        tenth = 10 * done // total if total else 10
        if self._bar.disable and tenth > self._tenth:
            self._tenth = tenth
            print(f"{self._part}: {done} of {total} runs", file=self._stream, flush=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()
