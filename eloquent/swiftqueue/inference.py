"""The predictor in numpy: the model of `eloquent.swiftqueue.model`, an event at a time.

Its docstring has the formulas. Here each connection has a *slot* with a ring of the last W keys
and values of each layer, so an event costs one row of each product, whatever came before. What
does not depend on events is prepared once: norms and scales are folded into the weights that
follow them, and the bias by distance is a table with a row for each state of a ring.

Products are small on purpose: OpenBLAS wakes its threads for those from `TWO_THREADS` on, which
costs more than it brings here and takes the cores from others.
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
from eloquent.swiftqueue.stored import SHIPPED, Model, tensor_shapes

__all__ = ["SHIPPED", "Head", "Model", "Predictor", "tensor_shapes"]

BATCH = 32
"Rows that one step takes at most."
TWO_THREADS = 1 << 19
"Multiplications from which on OpenBLAS shares a product among threads (interface/gemm.c)."
FIRST_SLOTS = 8
"Slots that a pool begins with; it doubles."

_ZERO = np.array(0, np.float32)
_HALF = np.array(0.5, np.float32)
_MAX_SCALED = np.array(MAX_SCALED, np.float32)
_DELAY_UNIT_S = np.array(DELAY_UNIT_S, np.float32)

Floats = NDArray[np.float32]
Indices = NDArray[np.intp]


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
        # Outputs by kind, then by queue, so that what is worked on alike lies together.
        order = np.arange(len(Queue) * QUEUE_OUTPUTS).reshape(len(Queue), -1).T.ravel()
        self._out = np.ascontiguousarray(tensors["head.out.weight"][order].T)
        self._out_bias = tensors["head.out.bias"][order]
        self._skip = np.ascontiguousarray(tensors["head.skip.weight"][order].T)

    def __call__(self, summaries: Floats, queries: Floats) -> Floats:
        """Return what is foretold.

        Args:
            summaries: (k, D), a slot each.
            queries: (k, G, Q), G of them to each slot.

        Returns:
            (5, 2, k, G), by queue in the second place: the quantiles and the point in seconds,
            and the probability of a drop.
        """
        k, asked = queries.shape[:2]
        flat = queries.reshape(k * asked, -1)
        known = _product(summaries, self._hidden_summary)
        known += self._hidden_bias
        inner = _product(flat, self._hidden_query)
        by_slot = inner.reshape(k, asked, -1)
        by_slot += known[:, np.newaxis]
        np.maximum(inner, _ZERO, out=inner)
        middle = _product(inner, self._middle)
        middle += self._middle_bias
        np.maximum(middle, _ZERO, out=middle)
        found = _product(middle, self._out)
        found += _product(flat, self._skip)
        found += self._out_bias
        kinds = np.ascontiguousarray(found.T)
        return _readable(kinds.reshape(QUEUE_OUTPUTS, len(Queue), k, asked))


def _product(rows: Floats, weights: Floats) -> Floats:
    """Return rows @ weights, by parts that are small enough for one thread."""
    most = (TWO_THREADS - 1) // weights.size
    if len(rows) <= most:
        whole: Floats = rows.dot(weights)
        return whole
    found = np.empty((len(rows), weights.shape[1]), np.float32)
    for start in range(0, len(rows), most):
        rows[start : start + most].dot(weights, out=found[start : start + most])
    return found


def _readable(found: Floats) -> Floats:
    """Return seconds and probabilities for what the head gives; in place."""
    # softplus; where exp overflows it is cut below, as what it should be would be.
    steps = found[1 : len(LEVELS)]
    np.exp(steps, out=steps)
    np.log1p(steps, out=steps)
    for level in range(1, len(LEVELS)):
        found[level] += found[level - 1]
    delays = found[:-1]
    np.maximum(delays, _ZERO, out=delays)
    np.minimum(delays, _MAX_SCALED, out=delays)
    np.expm1(delays, out=delays)
    delays *= _DELAY_UNIT_S
    # The logistic function by way of tanh, which cannot overflow.
    drop = found[-1]
    drop *= _HALF
    np.tanh(drop, out=drop)
    drop *= _HALF
    drop += _HALF
    return found


class _Layer:
    """A layer's weights, norms folded in: rows are multiplied by them from the left."""

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
        mixed[: shape.width] /= np.float32(np.sqrt(shape.width // shape.heads))
        self.qkv = np.ascontiguousarray(mixed.T)
        self.out = np.ascontiguousarray(tensors["out.weight"].T)
        norm = tensors["feed_norm.weight"] * root
        self.up = np.ascontiguousarray((tensors["up.weight"] * norm).T)
        self.up_bias = tensors["up.bias"]
        self.down = np.ascontiguousarray(tensors["down.weight"].T)
        self.down_bias = tensors["down.bias"]


class _Work:
    """The intermediate values of a step of k rows, so that a step allocates nothing."""

    def __init__(self, shape: Shape, k: int) -> None:
        heads, depth, window = shape.heads, shape.width // shape.heads, shape.window
        self.x = np.empty((k, shape.width), np.float32)
        self.normal = np.empty_like(self.x)
        self.change = np.empty_like(self.x)
        self.square = np.empty((k, 1), np.float32)
        self.square_list = self.square[:, 0]
        self.qkv = np.empty((k, 3 * shape.width), np.float32)
        split = self.qkv.reshape(k, 3, heads, depth)
        self.query = split[:, 0, :, np.newaxis]
        self.key, self.value = split[:, 1], split[:, 2]
        self.gaps = np.empty((k, 1, 1, window), np.float32)
        self.bias = np.empty((k, shape.layers, heads, window), np.float32)
        self.slant = np.empty_like(self.bias)
        self.layer_bias = [self.bias[:, layer] for layer in range(shape.layers)]
        self.scores = np.empty((k, heads, window), np.float32)
        self.score_rows = self.scores[:, :, np.newaxis]
        self.score_list = self.scores.reshape(-1, window)
        self.total = np.empty((k, heads, 1), np.float32)
        self.total_list = self.total.reshape(-1, 1)
        self.heard = np.empty((k, shape.width), np.float32)
        self.heard_heads = self.heard.reshape(k, heads, depth)
        self.heard_rows = self.heard_heads[:, :, np.newaxis]
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
        prefixes = [f"layers.{layer}." for layer in range(shape.layers)]
        self._layers = [_Layer(model, prefix) for prefix in prefixes]
        self._norm = tensors["norm.weight"] * np.float32(np.sqrt(shape.width))
        self._epsilon = np.array(shape.width * RMS_EPSILON, np.float32)
        slopes = [tensors[prefix + "time_slope"] for prefix in prefixes]
        self._slopes = np.stack(slopes)[:, :, np.newaxis]
        tables = [_distance_table(tensors[prefix + "distance_bias"]) for prefix in prefixes]
        self._tables = np.stack(tables, axis=1)
        self._ones = np.ones((shape.window, 1), np.float32)
        states = np.arange(2 * shape.window)
        self._place = states % shape.window
        self._next_state = np.append(states[1:], shape.window)
        self._works: dict[int, _Work] = {}
        self._open: set[int] = set()
        self._free: list[int] = []
        heads, depth, window = shape.heads, shape.width // shape.heads, shape.window
        # Keys lie so that a product with a row adds up columns, which is the fastest.
        self._keys = [np.empty((0, heads, depth, window), np.float32) for _ in prefixes]
        self._values = [np.empty((0, heads, window, depth), np.float32) for _ in prefixes]
        self._times = np.empty((0, window))
        self._states = np.empty(0, np.intp)
        self._summaries = np.empty((0, shape.width), np.float32)
        self._grow(FIRST_SLOTS)

    def open(self) -> int:
        """Return a slot in which nothing has happened yet."""
        if not self._free:
            self._grow(len(self._states))
        # The lowest, so that slots in use lie side by side and are read where they are.
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
        for ring in (*self._keys, *self._values):
            ring[slot] = 0
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
                self._step(slots, rows, times)
                return
            for chosen in _rounds(slots):
                self._step([slots[row] for row in chosen], rows[chosen], times[chosen])

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
        found = found.transpose(2, 3, 1, 0)
        return found[..., : len(LEVELS)], found[..., len(LEVELS)], found[..., -1]

    def summaries(self, slots: Sequence[int]) -> Floats:
        """Return what the events of slots came to, (k, D): the head's first input."""
        return self._summaries.take(slots, 0)

    def _check(self, slots: Sequence[int]) -> None:
        if not self._open.issuperset(slots):
            raise KeyError(f"Slots {set(slots) - self._open} are not open.")

    def _grow(self, more: int) -> None:
        before = len(self._states)
        self._keys = [_longer(keys, more) for keys in self._keys]
        self._values = [_longer(values, more) for values in self._values]
        self._times = _longer(self._times, more)
        self._states = _longer(self._states, more)
        self._summaries = _longer(self._summaries, more)
        self._free.extend(range(before, before + more))  # a heap still: all lower ones are in use

    def _step(self, slots: Sequence[int], events: Floats, times: NDArray[np.float64]) -> None:
        """Take in one event of each of some slots, `BATCH` at most; `times` in `TIME_UNIT_S`."""
        work = self._works.get(len(slots))
        if work is None:
            work = self._works[len(slots)] = _Work(self.model.shape, len(slots))
        index = np.array(slots, np.intp)
        state = self._states.take(index)
        place = self._place.take(state)
        self._states[index] = self._next_state.take(state)
        self._times[index, place] = times
        self._bias(work, index, state, times)
        first, last = slots[0], slots[-1]
        # Slots side by side are read where they are, others are copied together; a single one
        # has the fast way in.
        read = slice(first, last + 1) if list(slots) == list(range(first, last + 1)) else index
        slot, place = (first, place[0]) if len(slots) == 1 else (index, place)
        x = events.dot(self._embed, out=work.x)
        x += self._embed_bias
        for number, layer in enumerate(self._layers):
            self._normal(work).dot(layer.qkv, out=work.qkv)
            keys, values = self._keys[number], self._values[number]
            keys[slot, :, :, place] = work.key
            values[slot, :, place] = work.value
            _attend(work, keys[read], values[read], work.layer_bias[number], self._ones)
            x += work.heard.dot(layer.out, out=work.change)
            feed = self._normal(work).dot(layer.up, out=work.feed)
            feed += layer.up_bias
            np.maximum(feed, _ZERO, out=feed)
            x += feed.dot(layer.down, out=work.change)
            x += layer.down_bias
        self._summaries[index] = self._normal(work) * self._norm

    def _bias(
        self, work: _Work, index: Indices, state: Indices, times: NDArray[np.float64]
    ) -> None:
        """Set what distance and time add to the scores of each layer."""
        between = self._times.take(index, 0)
        between -= times[:, np.newaxis]
        gaps = work.gaps
        gaps[:, 0, 0] = between
        np.abs(gaps, out=gaps)
        np.log1p(gaps, out=gaps)
        self._tables.take(state, 0, out=work.bias, mode="clip")
        work.bias += np.multiply(self._slopes, gaps, out=work.slant)

    def _normal(self, work: _Work) -> Floats:
        """Return x / |x|, nearly: the root of the width is in the weights that follow."""
        square = work.square
        np.vecdot(work.x, work.x, out=work.square_list)
        square += self._epsilon
        np.sqrt(square, out=square)
        return np.divide(work.x, square, out=work.normal)


def _attend(work: _Work, keys: Floats, values: Floats, bias: Floats, ones: Floats) -> None:
    """Set `heard` to what the queries find: keys (k, H, d, W), values (k, H, W, d)."""
    scores = work.scores
    np.matmul(work.query, keys, out=work.score_rows)
    scores += bias
    np.maximum.reduce(scores, axis=-1, out=work.total, keepdims=True)
    scores -= work.total
    np.exp(scores, out=scores)
    work.score_list.dot(ones, out=work.total_list)
    np.matmul(work.score_rows, values, out=work.heard_rows)
    work.heard_heads /= work.total


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
    table[:window].swapaxes(1, 2)[empty] = -np.inf
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


def _longer(array: NDArray[Any], more: int) -> NDArray[Any]:
    """Return an array with so many zeros after it."""
    return np.concatenate((array, np.zeros((more, *array.shape[1:]), array.dtype)))
