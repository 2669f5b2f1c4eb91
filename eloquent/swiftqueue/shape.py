"""What both halves of the model (torch to train, numpy to serve) agree on."""

import math
from dataclasses import asdict, dataclass

LEVELS = (0.5, 0.9, 0.99)
"The quantiles of the queueing delay that are foretold."
DELAY_UNIT_S = 0.005
"Delays are seen and foretold as log(1 + delay / unit): linear below it, ratios above."
MAX_DELAY_S = 10.0
"Longer delays and times count as this long."
MAX_SCALED = math.log1p(MAX_DELAY_S / DELAY_UNIT_S)
TIME_UNIT_S = 0.01
"The unit under the logarithm of the time between two events in attention."
RMS_EPSILON = 1e-6
QUEUE_OUTPUTS = len(LEVELS) + 2
"What the head gives for a queue: the quantiles, the point and the logit of a drop."


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The model's sizes; the docstring of `eloquent.swiftqueue.model` says what they mean."""

    event_features: int
    query_features: int
    width: int = 64
    layers: int = 2
    heads: int = 4
    feed: int = 128
    "Width inside a layer's feed-forward part."
    hidden: int = 128
    "Width of the head's first hidden layer."
    middle: int = 64
    "Width of the head's second hidden layer."
    window: int = 64
    "Events that an event attends to in each layer, itself included."

    def as_dict(self) -> dict[str, int]:
        """Return the sizes by name, as the JSON beside the weights has them."""
        return asdict(self)
