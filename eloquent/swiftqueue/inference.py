"""The predictor in numpy: the model of `eloquent.swiftqueue.model`, an event at a time.

Its docstring has the formulas. Here each connection has a *slot* with a ring of the last W keys
and values of each layer, so an event costs one row of each product, whatever came before. What
does not depend on events is prepared once: norms and scales are folded into the weights that
follow them, and the bias by distance is a table with a row for each state of a ring.

Products are small on purpose. OpenBLAS wakes threads for a product above 262,144 multiplications
(9,216 for a vector), which costs more than such a product: so steps take at most `BATCH` rows,
keys are made apart from queries, and the head multiplies slot by slot.
"""

import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors.numpy
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError

from eloquent.errors import ConfigurationError
from eloquent.swiftqueue.features import EVENT_FEATURES, QUERY_FEATURES
from eloquent.swiftqueue.records import Queue
from eloquent.swiftqueue.shape import (
    DELAY_UNIT_S,
    LEVELS,
    MAX_SCALED,
    QUEUE_OUTPUTS,
    RMS_EPSILON,
    TIME_UNIT_S,
    Shape,
)

SHIPPED = Path(__file__).with_name("weights") / "swiftqueue.safetensors"
BATCH = 16
"Rows that one step takes at most."
FIRST_SLOTS = 8
"Slots that a pool begins with; it doubles."

Floats = NDArray[np.float32]
Indices = NDArray[np.intp]


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a model by name, with their shapes."""
    width, feed, heads = shape.width, shape.feed, shape.heads
    outputs = len(Queue) * QUEUE_OUTPUTS
    found: dict[str, tuple[int, ...]] = {
        "embed.weight": (width, shape.event_features),
        "embed.bias": (width,),
        "norm.weight": (width,),
        "head.hidden.weight": (shape.hidden, width + shape.query_features),
        "head.hidden.bias": (shape.hidden,),
        "head.middle.weight": (shape.middle, shape.hidden),
        "head.middle.bias": (shape.middle,),
        "head.out.weight": (outputs, shape.middle),
        "head.out.bias": (outputs,),
        "head.skip.weight": (outputs, shape.query_features),
    }
    for layer in range(shape.layers):
        of_layer: dict[str, tuple[int, ...]] = {
            "attention_norm.weight": (width,),
            "qkv.weight": (3 * width, width),
            "distance_bias": (heads, shape.window),
            "time_slope": (heads,),
            "out.weight": (width, width),
            "feed_norm.weight": (width,),
            "up.weight": (feed, width),
            "up.bias": (feed,),
            "down.weight": (width, feed),
            "down.bias": (width,),
        }
        found |= {f"layers.{layer}.{name}": size for name, size in of_layer.items()}
    return found


@dataclass(frozen=True, slots=True)
class Model:
    """A trained model: its sizes and its tensors, by the names of `eloquent.swiftqueue.model`.

    Raises:
        ConfigurationError: a tensor is missing, of another shape, or not finite.
    """

    shape: Shape
    tensors: Mapping[str, Floats]

    def __post_init__(self) -> None:
        for name, size in tensor_shapes(self.shape).items():
            tensor = self.tensors.get(name)
            if tensor is None or tensor.shape != size or tensor.dtype != np.float32:
                found = "is missing" if tensor is None else f"is {tensor.dtype} {tensor.shape}"
                raise ConfigurationError(
                    f"The model does not fit its description: {name} {found} where float32 {size} "
                    "belongs. Train it anew, or use the weights that are shipped."
                )
            if not np.isfinite(tensor).all():
                raise ConfigurationError(
                    f"The model's {name} has values that are no numbers, so it foretells nothing: "
                    "its training went wrong. Use the weights that are shipped."
                )

    @classmethod
    def load(cls, path: Path = SHIPPED) -> Self:
        """Read the tensors of a .safetensors file, and their description in the .json beside it.

        Raises:
            ConfigurationError: a file is missing or damaged, or was made for other features.
        """
        described = path.with_suffix(".json")
        try:
            tensors = safetensors.numpy.load(path.read_bytes())
            description = json.loads(described.read_bytes())
        except (OSError, SafetensorError, ValueError) as error:
            raise ConfigurationError(
                f"SwiftQueue's model {path} (with {described.name} beside it) cannot be read: "
                f"{error}. Install Eloquent again, or give a model that "
                "`eloquent swiftqueue train` wrote."
            ) from error
        return cls(_described_shape(described, description), tensors)

    @property
    def slot_bytes(self) -> int:
        """What a `Predictor` keeps for a connection, in bytes."""
        shape = self.shape
        rings = shape.layers * shape.window * 2 * shape.width * np.float32().nbytes
        times = shape.window * np.float64().nbytes
        return rings + times + shape.width * np.float32().nbytes + np.intp().nbytes


def _described_shape(path: Path, description: Any) -> Shape:
    """Return the sizes that a description has, if it was made for what this code computes.

    Raises:
        ConfigurationError: it was not.
    """
    names = {one.name for one in fields(Shape)}
    sizes = description.get("shape") if isinstance(description, dict) else None
    if not isinstance(sizes, dict) or set(sizes) != names or not _are_sizes(sizes):
        raise ConfigurationError(
            f"{path} does not describe a model: its `shape` should have the sizes "
            f"{', '.join(sorted(names))}. Train the model anew, or use the shipped one."
        )
    shape = Shape(**sizes)
    wants = {
        "event features": (shape.event_features, EVENT_FEATURES),
        "query features": (shape.query_features, QUERY_FEATURES),
        "levels": (description.get("levels"), list(LEVELS)),
    }
    for name, (theirs, ours) in wants.items():
        if theirs != ours:
            raise ConfigurationError(
                f"The model {path} was made for {name} {theirs}, and this version has {ours}: it "
                "would misread what it is given. Train it anew, or use the shipped one."
            )
    return shape


def _are_sizes(sizes: dict[str, Any]) -> bool:
    if not all(type(size) is int and size > 0 for size in sizes.values()):
        return False
    return bool(sizes["width"] % sizes["heads"] == 0)


class Head:
    """What answers queries, given what a slot's events came to (`h` in the formulas)."""

    def __init__(self, model: Model) -> None:
        tensors, width = model.tensors, model.shape.width
        hidden = tensors["head.hidden.weight"]
        self._hidden_summary = np.ascontiguousarray(hidden[:, :width].T)
        self._hidden_bias = tensors["head.hidden.bias"]
        self._hidden_query = np.ascontiguousarray(hidden[:, width:].T)
        self._middle = np.ascontiguousarray(tensors["head.middle.weight"].T)
        self._middle_bias = tensors["head.middle.bias"]
        self._out = np.ascontiguousarray(tensors["head.out.weight"].T)
        self._out_bias = tensors["head.out.bias"]
        self._skip = np.ascontiguousarray(tensors["head.skip.weight"].T)

    def __call__(self, summaries: Floats, queries: Floats) -> Floats:
        """Return what is foretold.

        Args:
            summaries: (k, D), a slot each.
            queries: (k, G, Q), G of them to each slot.

        Returns:
            (k, G, 2, 5): for each queue the quantiles and the point in seconds, and the
            probability of a drop.
        """
        known = np.matmul(summaries[:, np.newaxis], self._hidden_summary)
        known += self._hidden_bias
        inner = np.matmul(queries, self._hidden_query)
        inner += known
        np.maximum(inner, 0, out=inner)
        middle = np.matmul(inner, self._middle)
        middle += self._middle_bias
        np.maximum(middle, 0, out=middle)
        found: Floats = np.matmul(middle, self._out)
        found += np.matmul(queries, self._skip)
        found += self._out_bias
        return _readable(found.reshape(*queries.shape[:2], len(Queue), QUEUE_OUTPUTS))


def _readable(found: Floats) -> Floats:
    """Return seconds and probabilities for what the head gives; in place."""
    steps = found[..., 1 : len(LEVELS)]
    np.logaddexp(steps, 0, out=steps)
    for level in range(1, len(LEVELS)):
        found[..., level] += found[..., level - 1]
    delays = found[..., :-1]
    np.clip(delays, 0, MAX_SCALED, out=delays)
    np.expm1(delays, out=delays)
    delays *= DELAY_UNIT_S
    # The logistic function by way of tanh, which cannot overflow.
    drop = found[..., -1]
    drop *= 0.5
    np.tanh(drop, out=drop)
    drop *= 0.5
    drop += 0.5
    return found


class _Layer:
    """A layer's weights, norms folded in: products take a row from the left."""

    def __init__(self, model: Model, prefix: str) -> None:
        shape = model.shape
        tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in model.tensors.items()
            if name.startswith(prefix)
        }
        # `_normal` leaves out the root of the width; a query's product wants 1 / sqrt(d).
        root = np.float32(np.sqrt(shape.width))
        mixed = tensors["qkv.weight"] * (tensors["attention_norm.weight"] * root)
        scale = np.float32(np.sqrt(shape.width // shape.heads))
        self.query = np.ascontiguousarray(mixed[: shape.width].T / scale)
        self.key_value = np.ascontiguousarray(mixed[shape.width :].T)
        self.out = np.ascontiguousarray(tensors["out.weight"].T)
        norm = tensors["feed_norm.weight"] * root
        self.up = np.ascontiguousarray((tensors["up.weight"] * norm).T)
        self.up_bias = tensors["up.bias"]
        self.down = np.ascontiguousarray(tensors["down.weight"].T)
        self.down_bias = tensors["down.bias"]


class _Work:
    """The intermediate values of a step of k rows, so that a step allocates nothing."""

    def __init__(self, shape: Shape, k: int) -> None:
        heads, depth = shape.heads, shape.width // shape.heads
        self.x = np.empty((k, shape.width), np.float32)
        self.normal = np.empty_like(self.x)
        self.change = np.empty_like(self.x)
        self.square = np.empty((k, 1), np.float32)
        self.query = np.empty((k, shape.width), np.float32)
        self.query_columns = self.query.reshape(k, heads, depth, 1)
        self.key_value = np.empty((k, 2 * shape.width), np.float32)
        self.gaps = np.empty((k, 1, shape.window), np.float32)
        self.bias = np.empty((shape.layers, k, heads, shape.window), np.float32)
        self.table = np.empty_like(self.bias)
        self.scores = np.empty((k, heads, shape.window), np.float32)
        self.score_columns = self.scores[..., np.newaxis]
        self.score_rows = self.scores[..., np.newaxis, :]
        self.total = np.empty((k, heads, 1), np.float32)
        self.mixed = np.empty((k, shape.width), np.float32)
        self.mixed_heads = self.mixed.reshape(k, heads, depth)
        self.mixed_rows = self.mixed.reshape(k, heads, 1, depth)
        self.feed = np.empty((k, shape.feed), np.float32)


class Predictor:
    """Foretells for many connections, each of which has a slot.

    What one slot is given never changes what another foretells, whatever the numbers: one that is
    not finite makes its own slot foretell NaN until `layers` windows of events have come after.
    """

    def __init__(self, model: Model) -> None:
        shape = model.shape
        self.model = model
        self.head = Head(model)
        "May be replaced by one that learnt more; for all slots."
        tensors = model.tensors
        self._embed = np.ascontiguousarray(tensors["embed.weight"].T)
        self._embed_bias = tensors["embed.bias"]
        self._layers = [_Layer(model, f"layers.{layer}.") for layer in range(shape.layers)]
        self._norm = tensors["norm.weight"] * np.float32(np.sqrt(shape.width))
        self._epsilon = np.float32(shape.width * RMS_EPSILON)
        names = range(shape.layers)
        slopes = np.stack([tensors[f"layers.{layer}.time_slope"] for layer in names])
        self._slopes = slopes[:, np.newaxis, :, np.newaxis]
        self._tables = np.stack(
            [_distance_table(tensors[f"layers.{layer}.distance_bias"]) for layer in names]
        )
        states = np.arange(2 * shape.window)
        self._position = states % shape.window
        self._next_state = np.where(states + 1 < 2 * shape.window, states + 1, shape.window)
        self._works: dict[int, _Work] = {}
        self._capacity = 0
        self._free: list[int] = []
        self._open: set[int] = set()
        self._rings = np.zeros((shape.layers, 0, 2 * shape.width), np.float32)
        self._times = np.zeros((0, shape.window))
        self._states = np.zeros(0, np.intp)
        self._summaries = np.zeros((0, shape.width), np.float32)
        self._grow(FIRST_SLOTS)

    def open(self) -> int:
        """Return a slot in which nothing has happened yet."""
        if not self._free:
            self._grow(2 * self._capacity)
        # The lowest, so that slots in use lie side by side and are read without being gathered.
        slot = heapq.heappop(self._free)
        self._open.add(slot)
        self.clear(slot)
        return slot

    def close(self, slot: int) -> None:
        """Give a slot back.

        Raises:
            KeyError: it is not open.
        """
        self._open.remove(slot)
        heapq.heappush(self._free, slot)

    def clear(self, slot: int) -> None:
        """Forget a slot's events."""
        window = self.model.shape.window
        self._rings[:, slot * window : (slot + 1) * window] = 0
        self._times[slot] = 0
        self._states[slot] = 0
        self._summaries[slot] = 0

    def push(self, slots: Sequence[int], events: ArrayLike, sent_s: ArrayLike) -> None:
        """Take events in: the rows of one slot in order, all slots side by side.

        Args:
            slots: k of them, in any order; the same one may come more than once.
            events: (k, E), from `History.on_observation`.
            sent_s: (k,), when each one's packet was sent, in seconds.

        Raises:
            KeyError: a slot is not open.
        """
        self._check(slots)
        rows = np.asarray(events, np.float32)
        times = np.asarray(sent_s, np.float64) / TIME_UNIT_S
        with np.errstate(all="ignore"):
            if len(slots) == 1:
                self._step(np.asarray(slots, np.intp), rows, times)
                return
            places = np.asarray(slots, np.intp)
            for chosen in _rounds(slots):
                self._step(places[chosen], rows[chosen], times[chosen])

    def forecast(self, slots: Sequence[int], queries: ArrayLike) -> tuple[Floats, Floats, Floats]:
        """Answer queries about slots, given the events so far.

        Args:
            slots: k of them.
            queries: (k, G, Q), from `History.query`, G to each slot.

        Returns:
            By `Queue`, L first: quantiles of the queueing delay (k, G, 2, 3) and its `point`
            (k, G, 2), in seconds; the probability that the packet is dropped (k, G, 2).

        Raises:
            KeyError: a slot is not open.
        """
        self._check(slots)
        with np.errstate(all="ignore"):
            found = self.head(self.summaries(slots), np.asarray(queries, np.float32))
        return found[..., : len(LEVELS)], found[..., len(LEVELS)], found[..., -1]

    def summaries(self, slots: Sequence[int]) -> Floats:
        """Return what the events of slots came to, (k, D): the head's first input."""
        return self._summaries[np.asarray(slots, np.intp)]

    def _check(self, slots: Sequence[int]) -> None:
        if not self._open.issuperset(slots):
            raise KeyError(f"Slots {set(slots) - self._open} are not open.")

    def _grow(self, capacity: int) -> None:
        more = capacity - self._capacity
        window = self.model.shape.window
        self._rings = _longer(self._rings, more * window, axis=1)
        self._times = _longer(self._times, more)
        self._states = _longer(self._states, more)
        self._summaries = _longer(self._summaries, more)
        self._free.extend(range(self._capacity, capacity))  # they sort after all that are free
        self._capacity = capacity
        shape = self.model.shape
        heads, depth = shape.heads, shape.width // shape.heads
        split = self._rings.reshape(shape.layers, capacity, window, 2, heads, depth)
        self._keys = split[:, :, :, 0].swapaxes(2, 3)
        self._values = split[:, :, :, 1].swapaxes(2, 3)

    def _step(self, slots: Indices, events: Floats, times: NDArray[np.float64]) -> None:
        """Take in one event of each of some slots, `BATCH` at most; `times` in `TIME_UNIT_S`."""
        work = self._works.get(len(slots))
        if work is None:
            work = self._works[len(slots)] = _Work(self.model.shape, len(slots))
        states = self._states[slots]
        position = self._position[states]
        self._states[slots] = self._next_state[states]
        self._times[slots, position] = times
        rows = slots * self.model.shape.window + position
        self._bias(work, slots, states, times)
        runs = _runs(slots)
        x = work.x
        np.matmul(events, self._embed, out=x)
        x += self._embed_bias
        for index, layer in enumerate(self._layers):
            normal = self._normal(work)
            np.matmul(normal, layer.query, out=work.query)
            np.matmul(normal, layer.key_value, out=work.key_value)
            self._rings[index, rows] = work.key_value
            self._attend(work, index, runs)
            np.matmul(work.mixed, layer.out, out=work.change)
            x += work.change
            np.matmul(self._normal(work), layer.up, out=work.feed)
            work.feed += layer.up_bias
            np.maximum(work.feed, 0, out=work.feed)
            np.matmul(work.feed, layer.down, out=work.change)
            work.change += layer.down_bias
            x += work.change
        self._summaries[slots] = self._normal(work) * self._norm

    def _bias(
        self, work: _Work, slots: Indices, states: Indices, times: NDArray[np.float64]
    ) -> None:
        """Set what distance and time add to the scores, of all layers."""
        gaps = work.gaps
        np.subtract(self._times[slots], times[:, np.newaxis], out=gaps[:, 0], casting="same_kind")
        np.abs(gaps, out=gaps)
        np.log1p(gaps, out=gaps)
        np.multiply(self._slopes, gaps, out=work.bias)
        np.take(self._tables, states, axis=1, out=work.table, mode="clip")
        work.bias += work.table

    def _attend(self, work: _Work, layer: int, runs: list[tuple[slice, slice]]) -> None:
        """Set `mixed` to what the rows' queries find in their slots' rings."""
        keys, values, scores = self._keys[layer], self._values[layer], work.scores
        for rows, slots in runs:
            np.matmul(keys[slots], work.query_columns[rows], out=work.score_columns[rows])
        scores += work.bias[layer]
        np.maximum.reduce(scores, axis=-1, keepdims=True, out=work.total)
        scores -= work.total
        np.exp(scores, out=scores)
        np.add.reduce(scores, axis=-1, keepdims=True, out=work.total)
        for rows, slots in runs:
            np.matmul(work.score_rows[rows], values[slots], out=work.mixed_rows[rows])
        work.mixed_heads /= work.total

    def _normal(self, work: _Work) -> Floats:
        """Return x / |x|, nearly: the root of the width is in the weights that follow."""
        np.vecdot(work.x, work.x, out=work.square[:, 0])
        work.square += self._epsilon
        np.sqrt(work.square, out=work.square)
        np.divide(work.x, work.square, out=work.normal)
        return work.normal


def _distance_table(bias: Floats) -> Floats:
    """Return what distance adds to the scores in each state of a ring, (2 W, H, W).

    States 0 to W - 1: so many events came before, and what lies beyond is empty. States W to
    2 W - 1: the ring is full, and the newest is at the state less W.
    """
    window = bias.shape[1]
    newest = np.arange(2 * window)[:, np.newaxis] % window
    places = np.arange(window)
    table = np.moveaxis(bias[:, (newest - places) % window], 0, 1).copy()
    empty = places > np.arange(window)[:, np.newaxis]
    table[:window][np.broadcast_to(empty[:, np.newaxis], table[:window].shape)] = -np.inf
    return table


def _rounds(slots: Sequence[int]) -> Iterator[list[int]]:
    """Give rows in such an order that a slot's follow each other, each slot once at a time."""
    rounds: list[list[int]] = []
    turns: dict[int, int] = {}
    for row, slot in enumerate(slots):
        turn = turns[slot] = turns.get(slot, -1) + 1
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(row)
    for chosen in rounds:
        for start in range(0, len(chosen), BATCH):
            yield chosen[start : start + BATCH]


def _runs(slots: Indices) -> list[tuple[slice, slice]]:
    """Return where rows are slots side by side: the rows, and their slots."""
    edges = [0, *(np.flatnonzero(np.diff(slots) != 1) + 1).tolist(), len(slots)]
    return [
        (slice(start, end), slice(slots[start], slots[start] + end - start))
        for start, end in pairwise(edges)
    ]


def _longer(array: NDArray[Any], more: int, axis: int = 0) -> NDArray[Any]:
    """Return an array with so many zeros after it."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, more)
    return np.pad(array, widths)
