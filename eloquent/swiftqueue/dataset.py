"""Flows as the model sees them: replayed in time order, with what was to be foretold.

A data set is a folder with `manifest.json`: {"meta": ..., "flows": [{"file", "family", "split",
"digest", ...}]}. Scenario families, never packets, are what is split into train, validation and
test; a family in two of them would let the model see what it is judged by.
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from eloquent.errors import ConfigurationError
from eloquent.swiftqueue import features, shape
from eloquent.swiftqueue.features import EVENT_FEATURES, QUERY_FEATURES, History
from eloquent.swiftqueue.records import Flow, Observation, Queue

SPLITS = ("train", "validation", "test")
CHANGE_S = 0.02
CHANGE_SHARE = 0.2
"A change: the queueing delay differs from the last known by more than this and this share."
SCALES = (0.5, 2.0)
"A varied flow takes this much of its time: networks that are like it, but none that was seen."
MAX_DROPPED = 0.1
"Of a varied flow, up to this share of what was learnt is forgotten."


class DatasetError(ConfigurationError):
    """A data set cannot be used."""


class SplitError(DatasetError):
    """Something stands in two splits, or in a split that it may not be used from."""


class DigestError(DatasetError):
    """A flow's file is not the one that the manifest speaks of."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A flow that a manifest names."""

    path: Path
    family: str
    split: str
    digest: str
    "SHA-256 of the file, in hexadecimal."
    about: dict[str, Any]
    "All that the manifest says of it: scenario, scheduler, seed, policy ..."

    def load(self) -> Flow:
        """Read the flow.

        Raises:
            DatasetError: the file cannot be read.
            DigestError: it is not the one that the manifest speaks of.
        """
        try:
            if file_digest(self.path) != self.digest:
                raise DigestError(
                    f"{self.path} is not the file that the manifest speaks of: its digest differs."
                    " Collect the data again."
                )
            return Flow.load(self.path)
        except (OSError, ValueError) as error:
            raise DatasetError(
                f"A flow cannot be read: {error}. Collect the data again."
            ) from error


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder of flows holds."""

    entries: tuple[Entry, ...]
    digest: str
    "SHA-256 of the manifest's file, in hexadecimal."
    meta: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a folder's `manifest.json`.

        Raises:
            DatasetError: there is none, or it is not what `eloquent swiftqueue collect` writes.
            SplitError: a family or a flow is in two splits.
        """
        path = folder / "manifest.json"
        try:
            content = path.read_bytes()
            told = json.loads(content)
            entries = tuple(
                Entry(folder / row["file"], row["family"], row["split"], row["digest"], row)
                for row in told["flows"]
            )
            meta = dict(told.get("meta", {}))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{path} is no manifest of flows ({error!r}): make one with"
                " `eloquent swiftqueue collect`."
            ) from error
        _check_splits(entries)
        return cls(entries, hashlib.sha256(content).hexdigest(), meta)

    def of(self, split: str) -> tuple[Entry, ...]:
        """Return the flows of a split."""
        return tuple(entry for entry in self.entries if entry.split == split)


def file_digest(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_splits(entries: Iterable[Entry]) -> None:
    seen: dict[str, str] = {}
    for entry in entries:
        if entry.split not in SPLITS:
            raise SplitError(
                f"{entry.path} is in the split '{entry.split}': there are {', '.join(SPLITS)}."
            )
        for what in (f"The family '{entry.family}'", f"The flow {entry.digest}"):
            if seen.setdefault(what, entry.split) != entry.split:
                raise SplitError(
                    f"{what} is both in {seen[what]} and in {entry.split}: a model would be judged"
                    " by what it has seen. Give each family one split."
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A flow of n packets, m of whose fates were learnt, as the model sees it."""

    events: NDArray[np.float32]
    "(m, EVENT_FEATURES), in the order in which they became known."
    event_sent_s: NDArray[np.float64]
    "(m,): when the packets were sent that the events are of."
    queries: NDArray[np.float32]
    "(n, QUERY_FEATURES): asked for each packet at its sending."
    newest: NDArray[np.int32]
    "(n,): the newest event known then; -1: none."
    queue: NDArray[np.int8]
    "(n,): where the packet went."
    base_s: NDArray[np.float64]
    "(n,): the base known then; NaN: none."
    delay_s: NDArray[np.float32]
    "(n, 2), by queue: the queueing delay, over that base; NaN: not known."
    lost: NDArray[np.int8]
    "(n, 2), by queue: 0 or 1; -1: not known."
    last_s: NDArray[np.float32]
    "(n, 2), by queue: the queueing delay last known then; NaN: none."

    @property
    def changed(self) -> NDArray[np.bool_]:
        """(n, 2), by queue: whether the delay differs much from the one last known then."""
        return is_change(self.delay_s, self.last_s)


def is_change(delay_s: NDArray[np.float32], last_s: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return where a queueing delay differs much from the one last known; not where one is NaN."""
    found: NDArray[np.bool_] = np.abs(delay_s - last_s) > np.maximum(
        CHANGE_S, CHANGE_SHARE * last_s
    )
    return found


def replay(flow: Flow, served: NDArray[np.bool_] | None = None) -> Replay:
    """Let a `History` live through a flow; ask it at each packet's sending.

    For packets with `served`, the query is as serving makes it: when the newest fate was learnt,
    for the time of the sending, not knowing of packets sent in between.
    """
    count = len(flow.sent_s)
    order = np.argsort(flow.known_s, kind="stable")
    order = order[: int(np.isfinite(flow.known_s).sum())]
    events = np.zeros((len(order), EVENT_FEATURES), np.float32)
    queries = np.zeros((count, QUERY_FEATURES), np.float32)
    newest = np.full(count, -1, np.int32)
    base_s = np.full(count, np.nan)
    last_s = np.full((count, 2), np.nan)
    sent, sizes = flow.sent_s.tolist(), flow.size.tolist()
    queues = [Queue(one) for one in flow.queue.tolist()]
    observations = _observations(flow, order)
    is_served = [False] * count if served is None else served.tolist()

    history = History()
    packet = heard = 0
    while packet < count:
        settled_s = sent[packet]
        while heard < len(order) and observations[heard].known_s <= sent[packet]:
            settled_s = observations[heard].known_s
            events[heard] = history.on_observation(observations[heard])
            heard += 1
        # All packets that leave before anything more is heard.
        next_s = observations[heard].known_s if heard < len(order) else np.inf
        end = bisect_left(sent, next_s, lo=packet)
        for row in range(packet, end):
            if is_served[row]:
                queries[row] = history.query(settled_s, sizes[row], sent[row] - settled_s)
        newest[packet:end] = heard - 1
        base_s[packet:end] = history.base_s
        last_s[packet:end] = [history.last_s(queue) for queue in Queue]
        for row in range(packet, end):
            if not is_served[row]:
                queries[row] = history.query(sent[row], sizes[row])
            history.on_sent(row, sent[row], sizes[row], queues[row])
        packet = end
    for row in range(heard, len(order)):
        events[row] = history.on_observation(observations[row])
    return Replay(
        events=events,
        event_sent_s=flow.sent_s[order],
        queries=queries,
        newest=newest,
        queue=flow.queue,
        base_s=base_s,
        delay_s=_over(flow.delay_s, base_s),
        lost=flow.lost,
        last_s=_over(last_s, base_s),
    )


def _observations(flow: Flow, order: NDArray[np.int64]) -> list[Observation]:
    """Return what was learnt, in the order in which it was."""
    queues = flow.queue[order]
    columns = (
        order.tolist(),
        flow.sent_s[order].tolist(),
        flow.size[order].tolist(),
        [Queue(one) for one in queues.tolist()],
        flow.delay_s[order, queues].tolist(),
        flow.known_s[order].tolist(),
    )
    return [Observation(*row) for row in zip(*columns, strict=True)]


def _over(delay_s: NDArray[Any], base_s: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.maximum(delay_s - base_s[:, None], 0.0).astype(np.float32)


def varied(flow: Flow, rng: np.random.Generator) -> Flow:
    """Return a flow like another: faster or slower, with less learnt of it."""
    scale = float(np.exp(rng.uniform(*np.log(SCALES))))
    forgotten = rng.random(len(flow.sent_s)) < rng.uniform(0.0, MAX_DROPPED)
    start_s = float(flow.sent_s[0]) if len(flow.sent_s) else 0.0
    return replace(
        flow,
        sent_s=start_s + (flow.sent_s - start_s) * scale,
        known_s=np.where(forgotten, np.inf, start_s + (flow.known_s - start_s) * scale),
        delay_s=(flow.delay_s * scale).astype(np.float32),
        state_s=(flow.state_s * scale).astype(np.float32),
    )


def prepared(entry: Entry, cache: Path, variant: int = 0) -> Replay:
    """Return an entry's replay, from the cache if it is there.

    Variant 0 is the flow itself; others are `varied`, by a seed that is the entry's and theirs.
    Half of the queries, drawn at random, are made as serving makes them.

    Raises:
        DatasetError: the flow cannot be read, or is not the one that the manifest speaks of.
    """
    key = hashlib.sha256(f"{_code_digest()} {entry.digest} {variant}".encode())
    path = cache / f"{key.hexdigest()[:32]}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as columns:
            return Replay(**{one.name: columns[one.name] for one in fields(Replay)})
    flow = entry.load()
    rng = np.random.default_rng([int(entry.digest[:16], 16), variant])
    if variant:
        flow = varied(flow, rng)
    made = replay(flow, rng.random(len(flow.sent_s)) < 0.5)
    cache.mkdir(parents=True, exist_ok=True)
    half_done = path.with_suffix(".part.npz")
    np.savez(half_done, **{one.name: getattr(made, one.name) for one in fields(made)})
    half_done.replace(path)
    return made


def _code_digest() -> str:
    """Return a digest of the code that makes replays: what is cached is only as good as that."""
    digest = hashlib.sha256()
    for name in (__file__, features.__file__, shape.__file__):
        digest.update(Path(name).read_bytes())
    return digest.hexdigest()
