"""SwiftQueue for an endpoint: one forecaster for all its connections."""

from pathlib import Path
from typing import TYPE_CHECKING

from eloquent.errors import ConfigurationError
from eloquent.quic.marking import MarkingPolicy

if TYPE_CHECKING:
    from eloquent.swiftqueue.forecaster import Forecaster


class SwiftQueue:
    """Marks the packets of all connections of an endpoint (`eloquent.quic.marking.Marking`).

    `has_copies` and `has_probes` are there to be taken away, for comparison.
    """

    def __init__(
        self, forecaster: "Forecaster", *, has_copies: bool = True, has_probes: bool = True
    ) -> None:
        self._forecaster = forecaster
        self._has_copies = has_copies
        self._has_probes = has_probes

    def policy(self) -> MarkingPolicy:
        """See `Marking`."""
        from eloquent.swiftqueue.policy import SwiftQueueMarking

        return SwiftQueueMarking(
            self._forecaster.open, has_copies=self._has_copies, has_probes=self._has_probes
        )

    def settle(self, now: float) -> None:
        """See `Marking`."""
        self._forecaster.settle(now)


def make(
    weights: Path | None = None,
    *,
    has_copies: bool = True,
    has_probes: bool = True,
    has_tuning: bool = False,
) -> SwiftQueue:
    """Return an endpoint's SwiftQueue, with the weights that are shipped or those of a path.

    With `has_tuning` each connection corrects its forecasts (`eloquent.swiftqueue.tuning`).

    Raises:
        ConfigurationError: the weights or a package are missing or damaged.
    """
    try:
        from eloquent.swiftqueue.forecaster import Forecaster
        from eloquent.swiftqueue.inference import SHIPPED, Model, Predictor
        from eloquent.swiftqueue.tuning import TuningBudget
    except ImportError as error:
        raise ConfigurationError(
            f"SwiftQueue needs numpy and safetensors, and cannot load them: {error}. Install "
            "Eloquent again (`pip install eloquent-stream`), or choose another marking policy."
        ) from error
    predictor = Predictor(Model.load(SHIPPED if weights is None else weights))
    forecaster = Forecaster(predictor, TuningBudget() if has_tuning else None)
    return SwiftQueue(forecaster, has_copies=has_copies, has_probes=has_probes)
