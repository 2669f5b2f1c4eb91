"""Per-packet records: what training, prediction and evaluation see of a flow."""

from dataclasses import dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray


class Queue(IntEnum):
    """A queue of a dual-queue router (RFC 9332); the last axis of arrays with a value for each."""

    L = 0
    "Low latency: for ECT(1)."
    C = 1
    "Classic: for Not-ECT."


class Observation(NamedTuple):
    """What the sender learns of one of its packets."""

    number: int
    "QUIC's packet number."
    sent_s: float
    "When it left, by the sender's clock."
    size: int
    "Of the UDP payload, in bytes."
    queue: Queue
    delay_s: float
    "Its arrival by the receiver's clock less `sent_s`; NaN: lost."
    known_s: float
    "When the sender learnt of it, by the sender's clock."

    @property
    def is_lost(self) -> bool:
        """Whether the packet is taken for lost."""
        return self.delay_s != self.delay_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """A flow's packets in the order of sending, a row each; arrays of length n or shape (n, 2)."""

    sent_s: NDArray[np.float64]
    size: NDArray[np.int32]
    "Of the UDP payload, in bytes."
    queue: NDArray[np.int8]
    "A `Queue`: where the packet went."
    known_s: NDArray[np.float64]
    "When the sender learnt of its fate; inf: never."
    delay_s: NDArray[np.float32]
    """(n, 2), by queue: one-way delay, or NaN where it is lost or not known. The other queue's is
    known in emulation only: what the packet would have met there."""
    lost: NDArray[np.int8]
    "(n, 2), by queue: 0 or 1, -1 where it is not known."
    state_s: NDArray[np.float32]
    """(n, 2), by queue: the one-way delay that the router's true state at the packet's entry
    foretells if nothing else came; NaN where it is not known (live flows)."""

    def save(self, path: Path) -> None:
        """Write the columns to a compressed .npz file."""
        columns = {one.name: getattr(self, one.name) for one in fields(self)}
        np.savez_compressed(path, **columns)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds something else.
        """
        with np.load(path, allow_pickle=False) as columns:
            missing = {one.name for one in fields(cls)} - set(columns.files)
            if missing:
                raise ValueError(f"{path} is no flow: it lacks {', '.join(sorted(missing))}.")
            return cls(**{one.name: columns[one.name] for one in fields(cls)})
