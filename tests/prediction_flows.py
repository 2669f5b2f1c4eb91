"""Flows made by hand and by seed, for the tests of prediction."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from eloquent.swiftqueue.dataset import file_digest
from eloquent.swiftqueue.records import Flow

BASE_S = 0.02
REPORT_S = 0.03
"From arrival until the sender knows."


def flow_of(
    sent_s: ArrayLike,
    delay_s: ArrayLike,
    queue: ArrayLike = 0,
    *,
    size: ArrayLike = 200,
    known_s: ArrayLike | None = None,
    state_s: ArrayLike | None = None,
) -> Flow:
    """Return a flow; `delay_s` is (n, 2), or (n,) for both queues alike; NaN: lost.

    What is lost is known 0.2 s after its sending.
    """
    sent = np.asarray(sent_s, np.float64)
    count = len(sent)
    delays = np.asarray(delay_s, np.float32)
    if delays.ndim == 1:
        delays = np.stack((delays, delays), axis=1)
    queues = np.broadcast_to(np.asarray(queue, np.int8), count).copy()
    own = delays[np.arange(count), queues].astype(np.float64)
    if known_s is None:
        known_s = sent + np.where(np.isnan(own), 0.2, own + REPORT_S)
    return Flow(
        sent_s=sent,
        size=np.broadcast_to(np.asarray(size, np.int32), count).copy(),
        queue=queues,
        known_s=np.asarray(known_s, np.float64),
        delay_s=delays,
        lost=np.isnan(delays).astype(np.int8),
        state_s=delays if state_s is None else np.asarray(state_s, np.float32),
    )


def busy_flow(seed: int, count: int = 400) -> Flow:
    """Return a flow through two queues that fill by bursts and drain; some packets are lost."""
    rng = np.random.default_rng(seed)
    sent_s = np.cumsum(rng.exponential(0.015, count))
    waits = np.zeros((count, 2))
    burst_s = np.cumsum(rng.exponential(0.4, 200))
    sizes_s = rng.exponential(0.05, (200, 2))
    wait, newest = np.zeros(2), 0.0
    times = sorted(
        [(one, None) for one in sent_s] + list(zip(burst_s, sizes_s, strict=True)),
        key=lambda one: one[0],
    )
    row = 0
    for now, added in times:
        wait = np.maximum(wait - (now - newest), 0.0)
        newest = now
        if added is not None:
            wait = wait + added
        elif row < count:
            waits[row] = wait
            row += 1
    delay_s = BASE_S + waits + rng.exponential(0.0005, (count, 2))
    delay_s[rng.random((count, 2)) < 0.02] = np.nan
    return flow_of(sent_s, delay_s, rng.integers(0, 2, count), size=rng.integers(60, 1400, count))


def telling_flow(seed: int, count: int = 400) -> Flow:
    """Return a flow in which a packet's size tells its delay: 100 ms for each 1000 bytes."""
    rng = np.random.default_rng(seed)
    size = rng.integers(60, 1400, count)
    delay_s = BASE_S + 1e-4 * size + rng.exponential(0.0005, count)
    return flow_of(
        np.arange(count) * 0.02,
        delay_s,
        rng.integers(0, 2, count),
        size=size,
    )


def write_data(folder: Path, flows: dict[tuple[str, str], list[Flow]]) -> Path:
    """Write a folder of flows, by split and family, as collecting does; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for (split, family), its in flows.items():
        for index, flow in enumerate(its):
            path = folder / f"{family}-{index}.npz"
            flow.save(path)
            rows.append(
                {"file": path.name, "family": family, "split": split, "digest": file_digest(path)}
            )
    (folder / "manifest.json").write_text(json.dumps({"meta": {}, "flows": rows}))
    return folder
