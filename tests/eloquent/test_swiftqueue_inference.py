"""The predictor in numpy computes what the one in torch does, for every connection by itself."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eloquent.errors import ConfigurationError
from eloquent.swiftqueue import model as in_torch
from eloquent.swiftqueue.features import EVENT_FEATURES, EVENT_NAMES, QUERY_FEATURES, QUERY_NAMES
from eloquent.swiftqueue.inference import BATCH, FIRST_SLOTS, Predictor
from eloquent.swiftqueue.shape import DELAY_UNIT_S, LEVELS, Shape
from eloquent.swiftqueue.stored import Model, tensor_shapes

FULL = Shape(event_features=EVENT_FEATURES, query_features=QUERY_FEATURES)
SMALL = Shape(
    event_features=3,
    query_features=QUERY_FEATURES,
    width=8,
    heads=2,
    feed=6,
    hidden=7,
    middle=5,
    window=4,
)
QUERIES = 3
TOLERANCE = 1e-4
Stream = list[tuple[NDArray[np.float32], float]]


def random_model(shape: Shape, rng: np.random.Generator) -> Model:
    """Weights of such sizes that attention is neither even nor on one event alone."""
    tensors = {}
    for name, size in tensor_shapes(shape).items():
        spread = 1.2 / np.sqrt(size[-1]) if name.endswith("weight") and len(size) > 1 else 0.5
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        tensors[name] = rng.normal(centre, spread, size).astype(np.float32)
    return Model(shape, tensors)


def torch_model(model: Model) -> in_torch.Predictor:
    """The same weights in torch, in double precision: what both should come to."""
    found = in_torch.Predictor(model.shape)
    found.load_state_dict({name: torch.tensor(each) for name, each in model.tensors.items()})
    return found.double()


@torch.no_grad()
def expected(
    reference: in_torch.Predictor, stream: Stream, queries: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Quantiles and points as scaled delays, and drops, from a pass over a whole stream."""
    events = torch.tensor(np.array([[event for event, _ in stream]])).double()
    sent_s = torch.tensor([[sent_s for _, sent_s in stream]], dtype=torch.float64)
    h = reference(events, sent_s, torch.zeros(sent_s.shape, dtype=torch.int64))[0, -1]
    found = reference.ask(h.expand(len(queries), -1), torch.tensor(queries).double())
    delay_s = in_torch.to_seconds(in_torch.quantiles(found))
    point_s = in_torch.to_seconds(found[..., in_torch.POINT])
    drop = torch.sigmoid(found[..., in_torch.DROP])
    return scaled(delay_s.numpy()), scaled(point_s.numpy()), drop.numpy()


def scaled(delay_s: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.log1p(delay_s.astype(np.float64) / DELAY_UNIT_S)


class World:
    """A predictor, and what each of its slots was given."""

    def __init__(self, shape: Shape, seed: int, slots: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape = shape
        self.model = random_model(shape, self.rng)
        self.reference = torch_model(self.model)
        self.predictor = Predictor(self.model)
        self.streams: dict[int, Stream] = {self.predictor.open(): [] for _ in range(slots)}

    def push(self, slots: Sequence[int]) -> None:
        rows = []
        for slot in slots:
            stream = self.streams[slot]
            last_s = stream[-1][1] if stream else self.rng.uniform(0, 1e6)
            # From one burst to half a minute of silence; now and then an older packet.
            sent_s = last_s + self.rng.choice([0, 1e-4, 0.01, 0.3, 30, -0.02]) * self.rng.random()
            event = self.rng.normal(size=self.shape.event_features).astype(np.float32)
            stream.append((event, sent_s))
            rows.append(stream[-1])
        self.predictor.push(slots, [event for event, _ in rows], [sent_s for _, sent_s in rows])

    def reopen(self, slot: int) -> None:
        self.predictor.close(slot)
        del self.streams[slot]
        self.streams[self.predictor.open()] = []

    def check(self, slots: Sequence[int]) -> None:
        size = (len(slots), QUERIES, self.shape.query_features)
        queries = self.rng.normal(size=size).astype(np.float32)
        delay_s, point_s, drop = self.predictor.forecast(slots, queries)
        assert {found.dtype for found in (delay_s, point_s, drop)} == {np.dtype(np.float32)}
        for row, slot in enumerate(slots):
            wants = expected(self.reference, self.streams[slot], queries[row])
            for found, want in zip(
                (scaled(delay_s[row]), scaled(point_s[row]), drop[row]), wants, strict=True
            ):
                assert found.shape == want.shape
                assert np.abs(found - want).max() < TOLERANCE


def test_tensors_have_the_names_and_shapes_of_torch() -> None:
    for shape in (FULL, SMALL):
        state = in_torch.Predictor(shape).state_dict()
        assert tensor_shapes(shape) == {name: tuple(each.shape) for name, each in state.items()}


SLOTS = 5
STEPS = st.lists(
    st.one_of(
        st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=12),
        st.integers(0, SLOTS - 1),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), steps=STEPS)
def test_any_batches_and_reopened_slots_equal_whole_passes(
    seed: int, steps: list[list[int] | int]
) -> None:
    """A list is pushed, a number is a slot that is closed and opened again."""
    world = World(SMALL, seed, SLOTS)
    for step in steps:
        slots = sorted(world.streams)
        if isinstance(step, int):
            world.reopen(slots[step])
        else:
            world.push([slots[index] for index in step])
            world.check(sorted({slots[index] for index in step}))


def test_a_long_stream_at_full_size_equals_a_whole_pass() -> None:
    world = World(FULL, 1, 1)
    for count in range(1, 3 * FULL.window + 2):
        world.push([0])
        if count % 21 == 0 or count in (1, FULL.window, FULL.window + 1):
            world.check([0])


def test_more_slots_than_a_batch_at_full_size_equal_whole_passes() -> None:
    world = World(FULL, 2, 2 * BATCH + 3)
    slots = list(world.streams)
    for _ in range(FULL.window + 5):
        chosen = world.rng.random(len(slots)) < 0.8
        world.push([slot for slot, is_in in zip(slots, chosen, strict=True) if is_in])
    world.check(slots)
    world.push(slots[::-1])
    world.check(slots[::-2])


def test_many_events_of_one_slot_at_once_equal_single_ones() -> None:
    world = World(SMALL, 3, 2)
    world.push([0] * 11 + [1] + [0])
    world.check([0, 1])


def test_what_is_not_finite_stays_in_its_slot_and_passes() -> None:
    """The others' forecasts are the same to the bit as if it had been an ordinary event."""
    worlds = [World(SMALL, 4, 3), World(SMALL, 4, 3)]
    for world in worlds:
        world.push([0, 1, 2] * 3)
    event = np.ones(SMALL.event_features, np.float32)
    bad = np.array([np.nan, np.inf, 1], np.float32)
    worlds[0].predictor.push([0, 1, 2], [event, bad, event], [9.0, 9.0, 9.0])
    worlds[0].predictor.push([0, 1, 2], [event] * 3, [9.0, np.nan, 9.0])
    worlds[1].predictor.push([0, 1, 2], [event] * 3, [9.0, 9.0, 9.0])
    worlds[1].predictor.push([0, 1, 2], [event] * 3, [9.0, 9.0, 9.0])
    queries = np.ones((3, QUERIES, SMALL.query_features), np.float32)
    theirs, ours = (world.predictor.forecast([0, 1, 2], queries) for world in worlds)
    for found, want in zip(theirs, ours, strict=True):
        assert np.isnan(found[1]).all()
        assert (found[[0, 2]] == want[[0, 2]]).all()
    world = worlds[0]
    world.streams[1].clear()
    for _ in range(SMALL.layers * SMALL.window):
        world.push([1])
    world.check([1])


def test_a_slot_that_was_not_finite_is_clean_when_opened_again() -> None:
    world = World(SMALL, 5, 1)
    bad = np.full((3, SMALL.event_features), np.nan)
    world.predictor.push([0, 0, 0], bad, [np.inf, np.nan, -np.inf])
    world.reopen(0)
    world.push([0])
    world.check([0])


def test_a_query_that_is_not_finite_spoils_its_own_answer_only() -> None:
    world = World(SMALL, 6, 2)
    world.push([0, 1])
    queries = np.ones((2, QUERIES, SMALL.query_features), np.float32)
    wants = world.predictor.forecast([0, 1], queries)
    queries[0, 1] = np.nan
    for found, want in zip(world.predictor.forecast([0, 1], queries), wants, strict=True):
        assert np.isnan(found[0, 1]).all()
        assert (found[0, [0, 2]] == want[0, [0, 2]]).all()
        assert (found[1] == want[1]).all()


def test_huge_events_neither_warn_nor_reach_other_slots() -> None:
    world = World(SMALL, 7, 2)
    huge = np.full((1, SMALL.event_features), 1e38, np.float32)
    for sign in (1, -1):
        world.predictor.push([0], sign * huge, [1e300 * sign])
    world.push([1])
    world.check([1])


def test_a_pool_grows_and_gives_the_lowest_free_slot() -> None:
    world = World(SMALL, 8, 2 * FIRST_SLOTS + 1)
    assert sorted(world.streams) == list(range(2 * FIRST_SLOTS + 1))
    world.push(list(world.streams))
    world.predictor.close(9)
    world.predictor.close(4)
    assert [world.predictor.open() for _ in range(2)] == [4, 9]
    world.check([0, 3, 16])


def test_a_slot_that_is_not_open_takes_nothing() -> None:
    predictor = World(SMALL, 9, 1).predictor
    predictor.close(0)
    with pytest.raises(KeyError):
        predictor.close(0)
    with pytest.raises(KeyError):
        predictor.push([0], np.zeros((1, SMALL.event_features)), [0.0])
    with pytest.raises(KeyError):
        predictor.forecast([0], np.zeros((1, 1, SMALL.query_features)))


def held_bytes(predictor: Predictor) -> int:
    held = [each if isinstance(each, list) else [each] for each in vars(predictor).values()]
    return sum(each.nbytes for some in held for each in some if isinstance(each, np.ndarray))


def test_a_connection_takes_less_than_a_megabyte() -> None:
    model = random_model(FULL, np.random.default_rng(1))
    predictor = Predictor(model)
    before = held_bytes(predictor)
    for _ in range(FIRST_SLOTS + 1):
        predictor.open()
    assert held_bytes(predictor) - before == FIRST_SLOTS * model.slot_bytes
    assert model.slot_bytes == 66_312


def write(folder: Path, model: Model, **description: object) -> Path:
    path = folder / "some.safetensors"
    safetensors.numpy.save_file(dict(model.tensors), path)
    described = {
        "shape": model.shape.as_dict(),
        "event_names": EVENT_NAMES,
        "query_names": QUERY_NAMES,
        "levels": LEVELS,
    }
    path.with_suffix(".json").write_text(json.dumps(described | description))
    return path


def test_the_shipped_model_is_read() -> None:
    assert Model.load().shape == FULL


def test_a_model_that_torch_wrote_is_read(tmp_path: Path) -> None:
    model = random_model(FULL, np.random.default_rng(2))
    path = write(tmp_path, model, command="eloquent swiftqueue train")
    reference = in_torch.Predictor(FULL)
    in_torch.save_weights(reference, path)
    read = Model.load(path)
    assert read.shape == FULL
    for name, tensor in reference.state_dict().items():
        assert (read.tensors[name] == tensor.numpy()).all()


@pytest.mark.parametrize(
    ("description", "says"),
    [
        ({"shape": None}, "does not describe a model"),
        ({"shape": FULL.as_dict() | {"depth": 3}}, "does not describe a model"),
        ({"shape": FULL.as_dict() | {"width": "64"}}, "does not describe a model"),
        ({"shape": FULL.as_dict() | {"heads": 0}}, "does not describe a model"),
        ({"shape": FULL.as_dict() | {"heads": 5}}, "does not describe a model"),
        ({"shape": FULL.as_dict() | {"event_features": 3}}, "made for event features 3"),
        ({"shape": FULL.as_dict() | {"query_features": 3}}, "made for query features 3"),
        ({"shape": FULL.as_dict() | {"layers": 3}}, r"layers\.2\.\S+ is missing"),
        ({"shape": FULL.as_dict() | {"window": 8}}, r"distance_bias is float32 \(4, 64\)"),
        ({"event_names": EVENT_NAMES[::-1]}, "made for event features .'c_skipped'"),
        ({"query_names": None}, "made for query features None"),
        ({"levels": [0.5, 0.9]}, r"made for levels \[0\.5, 0\.9\]"),
    ],
)
def test_a_model_made_for_something_else_is_refused(
    tmp_path: Path, description: dict[str, object], says: str
) -> None:
    path = write(tmp_path, random_model(FULL, np.random.default_rng(3)), **description)
    with pytest.raises(ConfigurationError, match=says):
        Model.load(path)


@pytest.mark.parametrize("ending", [".safetensors", ".json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff" * 99])
def test_files_that_are_missing_or_damaged_are_named(
    tmp_path: Path, ending: str, content: bytes | None
) -> None:
    path = write(tmp_path, random_model(FULL, np.random.default_rng(4)))
    damaged = path.with_suffix(ending)
    if content is None:
        damaged.unlink()
    else:
        damaged.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"some\.safetensors .* cannot be read"):
        Model.load(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    model = random_model(SMALL, np.random.default_rng(5))
    spoilt = model.tensors["layers.1.up.bias"].copy()
    spoilt[2] = value
    with pytest.raises(ConfigurationError, match=r"layers\.1\.up\.bias has values that are no"):
        replace(model, tensors={**model.tensors, "layers.1.up.bias": spoilt})


def test_weights_in_double_precision_are_refused() -> None:
    model = random_model(SMALL, np.random.default_rng(6))
    doubles: dict[str, Any] = {
        name: each.astype(np.float64) if name == "norm.weight" else each
        for name, each in model.tensors.items()
    }
    with pytest.raises(ConfigurationError, match=r"norm\.weight is float64"):
        replace(model, tensors=doubles)
