"""The predictor in torch: its size, what an event may see, and what the head may say."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eloquent.swiftqueue.features import EVENT_FEATURES, QUERY_FEATURES, QUERY_NAMES
from eloquent.swiftqueue.inference import tensor_shapes
from eloquent.swiftqueue.model import (
    OUTSIDE,
    POINT,
    Predictor,
    quantiles,
    save_weights,
    to_seconds,
)
from eloquent.swiftqueue.records import Queue
from eloquent.swiftqueue.shape import RMS_EPSILON, TIME_UNIT_S, Shape

SHAPE = Shape(event_features=EVENT_FEATURES, query_features=QUERY_FEATURES)
SMALL = Shape(event_features=5, query_features=QUERY_FEATURES, width=8, heads=2, feed=12, window=4)


def model_of(shape: Shape, seed: int = 1) -> Predictor:
    """A model none of whose weights is zero or one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Predictor(shape)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def sequences(shape: Shape, length: int, count: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(7)
    events = torch.randn(count, length, shape.event_features, generator=made)
    sent_s = torch.rand(count, length, generator=made).mul(0.05).cumsum(1)
    return events, sent_s, torch.zeros(count, length, dtype=torch.long)


def by_the_docstring(model: Predictor, events: Tensor, sent_s: Tensor) -> Tensor:
    """One sequence, event by event, with rings of keys and values: the formulas as written."""
    shape, weights = model.shape, model.state_dict()
    heads, depth = shape.heads, shape.width // shape.heads
    rings: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(shape.layers)]

    def rms(x: Tensor) -> Tensor:
        return x / (x.square().mean() + RMS_EPSILON).sqrt()

    found = []
    for event, t in zip(events, sent_s, strict=True):
        x = weights["embed.weight"] @ event + weights["embed.bias"]
        for layer, ring in enumerate(rings):
            of = {
                name.removeprefix(f"layers.{layer}."): one
                for name, one in weights.items()
                if name.startswith(f"layers.{layer}.")
            }
            y = rms(x) * of["attention_norm.weight"]
            q, k, v = (of["qkv.weight"] @ y).reshape(3, heads, depth)
            ring.append((k, v, t))
            del ring[: -shape.window]
            heard = []
            for head in range(heads):
                scores = torch.stack(
                    [
                        q[head] @ key[head] / math.sqrt(depth)
                        + of["distance_bias"][head, len(ring) - 1 - place]
                        + of["time_slope"][head] * torch.log1p((t - sent).abs() / TIME_UNIT_S)
                        for place, (key, _, sent) in enumerate(ring)
                    ]
                ).softmax(0)
                heard.append(sum(scores[i] * ring[i][1][head] for i in range(len(ring))))
            x = x + of["out.weight"] @ torch.cat(heard)
            y = rms(x) * of["feed_norm.weight"]
            y = (of["up.weight"] @ y + of["up.bias"]).relu()
            x = x + of["down.weight"] @ y + of["down.bias"]
        found.append(rms(x) * weights["norm.weight"])
    return torch.stack(found)


def test_it_has_at_most_100_000_parameters() -> None:
    assert sum(one.numel() for one in Predictor(SHAPE).parameters()) <= 100_000


def test_its_tensors_are_those_that_inference_reads() -> None:
    found = {name: tuple(one.shape) for name, one in Predictor(SHAPE).state_dict().items()}
    assert found == tensor_shapes(SHAPE)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, 4, 5, 19])
def test_the_pass_over_a_sequence_is_the_docstring_s_event_by_event(length: int) -> None:
    model = model_of(SMALL)
    events, sent_s, segments = sequences(SMALL, length)
    whole = model(events, sent_s, segments)
    for number in range(len(events)):
        expected = by_the_docstring(model, events[number], sent_s[number])
        torch.testing.assert_close(whole[number], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_later_event_changes_nothing_earlier() -> None:
    model = model_of(SHAPE)
    events, sent_s, segments = sequences(SHAPE, 150)
    before = model(events, sent_s, segments)
    events[:, 100] += 3.0
    sent_s[:, 100:] += 1.0
    after = model(events, sent_s, segments)
    torch.testing.assert_close(after[:, :100], before[:, :100], atol=0, rtol=0)
    assert (after[:, 100:] - before[:, 100:]).abs().amax(-1).min() > 0


@torch.no_grad()
def test_an_event_is_out_of_sight_after_a_window_in_each_layer() -> None:
    model = model_of(SMALL)
    events, sent_s, segments = sequences(SMALL, 24)
    before = model(events, sent_s, segments)
    events[:, 5] += 3.0
    difference = (model(events, sent_s, segments) - before).abs().amax(-1)
    reach = SMALL.layers * (SMALL.window - 1)
    assert (difference[:, 5 : 5 + reach + 1] > 0).all()
    assert (difference[:, 5 + reach + 1 :] == 0).all()


@torch.no_grad()
def test_the_time_at_which_a_sequence_begins_does_not_matter() -> None:
    model = model_of(SHAPE)
    events, sent_s, segments = sequences(SHAPE, 70)
    torch.testing.assert_close(
        model(events, sent_s + 64.0, segments),
        model(events, sent_s, segments),
        atol=1e-3,
        rtol=1e-3,
    )
    slower = model(events, 4 * sent_s, segments)
    assert (slower - model(events, sent_s, segments)).abs().max() > 1e-2


@torch.no_grad()
def test_segments_do_not_see_each_other_and_padding_is_not_seen() -> None:
    model = model_of(SMALL)
    events, sent_s, segments = sequences(SMALL, 20)
    segments[:, :3] = OUTSIDE
    segments[:, 9:] = 1
    found = model(events, sent_s, segments)
    for part in (slice(3, 9), slice(9, 20)):
        alone = model(events[:, part], sent_s[:, part], segments[:, part])
        torch.testing.assert_close(found[:, part], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_quantiles_do_not_cross_and_are_sane_delays() -> None:
    outputs = 100 * torch.randn(500, 2, 5, generator=torch.Generator().manual_seed(3))
    found = to_seconds(quantiles(outputs))
    assert found.shape == (500, 2, 3)
    assert (found.diff(dim=-1) >= 0).all()
    assert 0 <= found.min() <= found.max() <= 10.001


@torch.no_grad()
def test_an_untrained_head_foretells_about_the_last_value_of_each_queue() -> None:
    model = Predictor(SHAPE).eval()
    queries = torch.zeros(2, QUERY_FEATURES)
    for row, queue in enumerate(Queue):
        queries[row, QUERY_NAMES.index(f"{queue.name.lower()}_delay")] = 3.0
    outputs = model.ask(torch.zeros(2, SHAPE.width), queries)
    for place in (0, POINT):
        torch.testing.assert_close(outputs[..., place], 3.0 * torch.eye(2), atol=0.3, rtol=0)


@torch.no_grad()
def test_weights_are_the_same_after_a_file(tmp_path: Path) -> None:
    model, other = model_of(SMALL, seed=1), model_of(SMALL, seed=2)
    path = tmp_path / "weights.safetensors"
    save_weights(model, path)
    other.load_state_dict(load_file(path))
    given = sequences(SMALL, 9)
    torch.testing.assert_close(other(*given), model(*given), atol=0, rtol=0)
