"""Small flows through two made-up queues, for tests of what learns from them."""

import json
from pathlib import Path

import numpy as np

from eloquent.swiftqueue.dataset import file_digest
from eloquent.swiftqueue.records import Flow

BASE_S = 0.02


def made_flow(seed: int, packets: int = 1500, start_s: float = 1000.0) -> Flow:
    """Return a flow of 60 packets a second whose queues fill and drain, C's more often than L's."""
    rng = np.random.default_rng(seed)
    times = np.arange(0, packets / 60, 0.02)
    waits = np.zeros((len(times), 2))
    aims = [0.0, 0.0]
    for step in range(1, len(times)):
        for queue, levels in enumerate(((0, 0, 0, 0.08), (0, 0.05, 0.15, 0.3))):
            if rng.random() < 0.03:
                aims[queue] = float(rng.choice(levels))
            waits[step, queue] = 0.9 * waits[step - 1, queue] + 0.1 * aims[queue]
    sent_s = np.sort(rng.uniform(0, times[-1], packets))
    delay_s = np.stack([np.interp(sent_s, times, waits[:, queue]) for queue in (0, 1)], axis=1)
    delay_s += BASE_S + rng.exponential(0.001, delay_s.shape)
    lost = (rng.random(delay_s.shape) < 0.02).astype(np.int8)
    queue = (rng.random(packets) < 0.3).astype(np.int8)
    rows = np.arange(packets)
    reported_s = np.ceil((sent_s + delay_s[rows, queue]) / 0.01) * 0.01 + BASE_S
    known_s = np.where(lost[rows, queue] == 1, sent_s + 0.4, reported_s)
    known_s[rng.random(packets) < 0.01] = np.inf
    return Flow(
        sent_s=start_s + sent_s,
        size=rng.integers(100, 1200, packets).astype(np.int32),
        queue=queue,
        known_s=start_s + known_s,
        delay_s=np.where(lost == 1, np.nan, delay_s).astype(np.float32),
        lost=lost,
        state_s=delay_s.astype(np.float32),
    )


def made_data(folder: Path, splits: dict[str, int], packets: int = 1500) -> Path:
    """Write so many flows of each split, one family each, and their manifest."""
    rows = []
    for split, flows in splits.items():
        for number in range(flows):
            path = folder / f"{split}{number}.npz"
            made_flow(len(rows), packets).save(path)
            rows.append(
                {
                    "file": path.name,
                    "family": f"family-{split}",
                    "split": split,
                    "digest": file_digest(path),
                }
            )
    (folder / "manifest.json").write_text(json.dumps({"meta": {}, "flows": rows}))
    return folder
