"""The trained model as it is stored: tensors, and the description that lies beside them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from eloquent.errors import ConfigurationError
from eloquent.swiftqueue.features import EVENT_FEATURES, EVENT_NAMES, QUERY_FEATURES, QUERY_NAMES
from eloquent.swiftqueue.records import Queue
from eloquent.swiftqueue.shape import LEVELS, QUEUE_OUTPUTS, Shape

SHIPPED = Path(__file__).with_name("weights") / "swiftqueue.safetensors"


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
    tensors: Mapping[str, NDArray[np.float32]]

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
    wants = (
        ("event features", shape.event_features, EVENT_FEATURES),
        ("event features", description.get("event_names"), list(EVENT_NAMES)),
        ("query features", shape.query_features, QUERY_FEATURES),
        ("query features", description.get("query_names"), list(QUERY_NAMES)),
        ("levels", description.get("levels"), list(LEVELS)),
    )
    for name, theirs, ours in wants:
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
