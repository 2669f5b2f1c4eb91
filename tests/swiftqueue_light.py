"""A light bottleneck with DualPI2 for tests: bursts fill L, and C is empty but for the subject."""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

from eloquent.swiftqueue.features import EVENT_FEATURES, EVENT_NAMES, QUERY_FEATURES, QUERY_NAMES
from eloquent.swiftqueue.inference import tensor_shapes
from eloquent.swiftqueue.shape import LEVELS, Shape
from eloquent_netem.lab.rows import Place
from eloquent_netem.scenario import Scenario, parse_scenario

LIGHT = """
length_s = 6
[up]
delay_ms = 10
rate = { kind = "fixed", mbit_s = 10 }
[down]
delay_ms = 10
rate = { kind = "fixed", mbit_s = 10 }
queue = { kind = "dualpi2" }
[[cross]]
kind = "bursts"
direction = "down"
mbit_s = 20
burst_ms = 60
pause_ms = 300
[[cross]]
kind = "web"
direction = "up"
"""


def light() -> Scenario:
    """Return the scenario: 6 s, 10 Mbit/s, 20 ms round trip."""
    return parse_scenario(LIGHT, name="light")


def light_place() -> Place:
    """Return it as a place of a comparison."""
    return Place(name="light", scenario=light(), begins_s=0.0)


def random_weights(folder: Path) -> Path:
    """Write the weights of a small model that has learnt nothing; return their path."""
    shape = Shape(
        event_features=EVENT_FEATURES,
        query_features=QUERY_FEATURES,
        width=8,
        layers=1,
        heads=2,
        feed=8,
        hidden=8,
        middle=8,
        window=8,
    )
    rng = np.random.default_rng(1)
    tensors = {
        name: rng.normal(0, 0.1, size).astype(np.float32)
        for name, size in tensor_shapes(shape).items()
    }
    path = folder / "random.safetensors"
    safetensors.numpy.save_file(tensors, path)
    described = {
        "shape": shape.as_dict(),
        "event_names": EVENT_NAMES,
        "query_names": QUERY_NAMES,
        "levels": LEVELS,
    }
    path.with_suffix(".json").write_text(json.dumps(described))
    return path
