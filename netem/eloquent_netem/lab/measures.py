"""The measures: what a reader of a token stream notices, computed from times alone.

Every tool that reports a figure takes it from here; `docs/design.md`, "Measures", defines them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from eloquent.errors import EloquentError

GAP_ALLOWED_S = 0.2
"What `stall_ratio_200ms` lets pass: a gap between renderings that a reader hardly notices."

ROUNDING = 1e-9
"Differences up to this come from floating-point arithmetic."


class DeliveryError(EloquentError):
    """Tokens were lost or came twice: the run proves nothing but that."""


@dataclass(frozen=True, slots=True)
class StallMeasures:
    """The figures of one answer; ratios are shares of one, times in seconds."""

    stall_ratio: float
    "Strict: time in which a token is due and not rendered, over due-of-first to last rendering."
    stall_ratio_200ms: float
    "The part of that time that lies beyond 200 ms after the rendering before it."
    delay_p50_s: float
    delay_p99_s: float
    delay_max_s: float
    "Token delay: rendered minus generated minus the path's base delay."


def measure_stalls(
    generated_s: Sequence[float], rendered_s: Sequence[float], base_delay_s: float
) -> StallMeasures:
    """Measure one answer from when each token was generated and rendered.

    Token `i` is due `base_delay_s` after its generation. Renderings are in order, as a reader
    sees them; the pacer is off.

    Raises:
        DeliveryError: the two differ in length, or renderings go back in time.
    """
    if len(generated_s) != len(rendered_s) or not generated_s:
        raise DeliveryError(
            f"{len(generated_s)} tokens were generated and {len(rendered_s)} rendered: the "
            "transport lost or doubled tokens, so its times mean nothing."
        )
    if any(later < earlier for earlier, later in pairwise(rendered_s)):
        raise DeliveryError("Tokens were rendered out of order: the transport is broken.")
    due_s = [time + base_delay_s for time in generated_s]
    waited_s = waited_beyond_s = 0.0
    previous_s = float("-inf")
    for due, rendered in zip(due_s, rendered_s, strict=True):
        # The renderings cut time into gaps. Within one, the reader waits from the moment the
        # gap's token is due; the gap before it has accounted for what lies earlier.
        waited_s += max(0.0, rendered - max(due, previous_s))
        allowed_until = max(due, previous_s + GAP_ALLOWED_S)
        waited_beyond_s += max(0.0, rendered - allowed_until)
        previous_s = rendered
    total_s = rendered_s[-1] - due_s[0]
    delays_s = sorted(
        max(0.0, rendered - due) for due, rendered in zip(due_s, rendered_s, strict=True)
    )
    return StallMeasures(
        stall_ratio=waited_s / total_s if total_s > ROUNDING else 0.0,
        stall_ratio_200ms=waited_beyond_s / total_s if total_s > ROUNDING else 0.0,
        delay_p50_s=quantile(delays_s, 0.5),
        delay_p99_s=quantile(delays_s, 0.99),
        delay_max_s=delays_s[-1],
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of the sorted values do not exceed."""
    count = math.ceil(share * len(ordered) - ROUNDING)  # 0.07 * 100 is a little more than 7
    return ordered[max(0, count - 1)]
