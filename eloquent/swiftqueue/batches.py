"""Replays cut into pieces of equal length, for training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eloquent.swiftqueue.dataset import Replay, is_change
from eloquent.swiftqueue.features import EVENT_FEATURES
from eloquent.swiftqueue.model import OUTSIDE

LENGTH = 512
"Events of a piece about which queries are asked."
FORGETFUL = 0.25
"Share of the pieces in which what came before some event is forgotten, as in a new connection."
MAX_QUERIES = 2 * LENGTH
"Of a piece; of more, some are drawn."


class Piece(NamedTuple):
    """Part of a replay."""

    replay: int
    start: int
    "Its first event about which queries are asked; below 0: before the replay begins."


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B pieces of T events each, with N queries in all."""

    events: NDArray[np.float32]
    "(B, T, EVENT_FEATURES)."
    sent_s: NDArray[np.float32]
    "(B, T), from each piece's beginning."
    segments: NDArray[np.int64]
    "(B, T): see `Predictor.forward`."
    rows: NDArray[np.int64]
    "(N,): the newest event of each query, in B * T."
    queries: NDArray[np.float32]
    "(N, QUERY_FEATURES)."
    queue: NDArray[np.int64]
    "(N,): where the packet went."
    delay_s: NDArray[np.float32]
    "(N, 2), and so on: see `Replay`."
    lost: NDArray[np.int8]
    last_s: NDArray[np.float32]
    changed: NDArray[np.bool_]


class Pieces:
    """The pieces of some replays."""

    def __init__(self, replays: Sequence[Replay], before: int) -> None:
        """Let each piece begin with `before` more events, about which nothing is asked."""
        self._replays = replays
        self._before = before

    def every(self) -> list[Piece]:
        """Return all pieces, each event once, those without a query left out."""
        return self._pieces([0] * len(self._replays))

    def shuffled(self, rng: np.random.Generator) -> list[Piece]:
        """Return all pieces, cut at other places each time, in any order."""
        pieces = self._pieces(rng.integers(-LENGTH, 0, len(self._replays), endpoint=True).tolist())
        return [pieces[one] for one in rng.permutation(len(pieces))]

    def _pieces(self, starts: list[int]) -> list[Piece]:
        return [
            Piece(number, start)
            for number, replay in enumerate(self._replays)
            for start in range(starts[number], len(replay.events), LENGTH)
            if np.diff(np.searchsorted(replay.newest, (max(start, 0), start + LENGTH)))[0]
        ]

    def batch(self, pieces: Sequence[Piece], rng: np.random.Generator | None = None) -> Batch:
        """Return pieces side by side; with `rng`, some of them forgetful."""
        length = self._before + LENGTH
        events = np.zeros((len(pieces), length, EVENT_FEATURES), np.float32)
        sent_s = np.zeros((len(pieces), length), np.float32)
        segments = np.full((len(pieces), length), OUTSIDE, np.int64)
        asked: list[tuple[NDArray[np.integer[Any]], Replay, NDArray[np.int64]]] = []
        for number, (which, start) in enumerate(pieces):
            replay = self._replays[which]
            origin = start - self._before
            low, high = max(0, origin), min(len(replay.events), start + LENGTH)
            places = slice(low - origin, high - origin)
            events[number, places] = replay.events[low:high]
            sent_s[number, places] = replay.event_sent_s[low:high] - replay.event_sent_s[low]
            segments[number, places] = 0
            if rng is not None and rng.random() < FORGETFUL:
                segments[number, rng.integers(places.start, places.stop) : places.stop] = 1
            ends = np.searchsorted(replay.newest, (max(start, 0), start + LENGTH))
            packets = np.arange(*ends, dtype=np.int64)
            if len(packets) > MAX_QUERIES:
                chosen = np.linspace(0, len(packets) - 1, MAX_QUERIES).astype(np.int64)
                packets = packets[chosen]
            asked.append((number * length - origin + replay.newest[packets], replay, packets))
        delay_s = np.concatenate([replay.delay_s[packets] for _, replay, packets in asked])
        last_s = np.concatenate([replay.last_s[packets] for _, replay, packets in asked])
        return Batch(
            events=events,
            sent_s=sent_s,
            segments=segments,
            rows=np.concatenate([rows for rows, _, _ in asked]),
            queries=np.concatenate([replay.queries[packets] for _, replay, packets in asked]),
            queue=np.concatenate([replay.queue[packets] for _, replay, packets in asked]).astype(
                np.int64
            ),
            delay_s=delay_s,
            lost=np.concatenate([replay.lost[packets] for _, replay, packets in asked]),
            last_s=last_s,
            changed=is_change(delay_s, last_s),
        )
