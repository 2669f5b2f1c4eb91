"""What only our engine is asked: a long newcomer, a restart, tenants, and what memory allows."""

import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from eloquent_server.bench.drivers import EloquentDriver
from eloquent_server.bench.workload import (
    FIRST_GAPS,
    HISTORY_TOKENS,
    PROMPT_TOKENS,
    WARMUP_TOKENS,
    prompt,
)
from eloquent_server.engine.budget import STEP_TARGET_S
from eloquent_server.engine.radix import BLOCK_TOKENS
from eloquent_server.engine.settings import KvOptions

NEWCOMER_TOKENS = 4096
OTHERS = 8
OTHERS_TOKENS = 320
"Of each answer beside the newcomer: enough that all of them still decode when it has its first."
RUNS = 5

BANDWIDTH_BYTES = 1 << 30
"Read to learn how fast memory is; far beyond the caches."
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
DISK_BYTES = 1 << 31


def long_newcomer(driver: EloquentDriver) -> dict[str, Any]:
    """Let a prompt of `NEWCOMER_TOKENS` arrive among `OTHERS` decoding turns; medians of `RUNS`."""
    rng = random.Random(3)  # noqa: S311 (it makes prompts)
    alone, beside, gaps = [], [], []
    for _ in range(RUNS):
        text = prompt(rng, NEWCOMER_TOKENS)
        alone.append(driver.submit(text, WARMUP_TOKENS).wait().first_s)
        others = [driver.submit(prompt(rng, PROMPT_TOKENS), OTHERS_TOKENS) for _ in range(OTHERS)]
        while not all(len(each.times) > FIRST_GAPS for each in others):
            time.sleep(0.002)
        newcomer = driver.submit(prompt(rng, NEWCOMER_TOKENS), WARMUP_TOKENS).wait()
        beside.append(newcomer.first_s)
        gaps.append(
            max(_gaps(each.wait().times, newcomer.asked, newcomer.times[0]) for each in others)
        )
    return {
        "prompt_tokens": NEWCOMER_TOKENS,
        "others": OTHERS,
        "runs": RUNS,
        "ttft_alone_ms": _ms(alone),
        "ttft_ms": _ms(beside),
        "ttft_ratio": round(statistics.median(beside) / statistics.median(alone), 2),
        "worst_gap_ms": _ms(gaps),
        "worst_gap_over_target": round(statistics.median(gaps) / STEP_TARGET_S, 2),
    }


def _gaps(times: Sequence[float], since: float, until: float) -> float:
    pairs = zip(times[FIRST_GAPS:], times[FIRST_GAPS + 1 :], strict=False)
    return max((b - a for a, b in pairs if b >= since and a <= until), default=0.0)


def restart(model: Path, *, precision: str, threads: int) -> dict[str, Any]:
    """Time the first token of a long prompt that another process's disk tier has, and of a new one.

    The second engine shares nothing with the first but the directory.
    """
    rng = random.Random(4)  # noqa: S311
    known = [prompt(rng, HISTORY_TOKENS) for _ in range(RUNS)]
    figures: dict[str, Any] = {"prompt_tokens": HISTORY_TOKENS, "runs": RUNS}
    for encoding in ("raw", "int8"):
        with tempfile.TemporaryDirectory(prefix="eloquent-bench-kv-") as directory:
            kv = KvOptions(directory=directory, disk_bytes=DISK_BYTES, encoding=encoding)
            first = EloquentDriver(model, precision=precision, threads=threads, rows=2, kv=kv)
            for text in known:
                first.submit(text, WARMUP_TOKENS).wait()
            first.close()
            second = EloquentDriver(model, precision=precision, threads=threads, rows=2, kv=kv)
            second.submit(prompt(rng, PROMPT_TOKENS), WARMUP_TOKENS).wait()
            again = [f"{text} {prompt(rng, 4)}" for text in known]
            new = [prompt(rng, HISTORY_TOKENS) for _ in known]
            warm = [second.submit(text, WARMUP_TOKENS).wait().first_s for text in again]
            cold = [second.submit(text, WARMUP_TOKENS).wait().first_s for text in new]
            second.close()
        figures[encoding] = {
            "ttft_cold_ms": _ms(cold),
            "ttft_warm_ms": _ms(warm),
            "ratio": round(statistics.median(cold) / statistics.median(warm), 1),
        }
    return figures


def tenants(driver: EloquentDriver) -> dict[str, Any]:
    """Time prompts that another tenant has cached, that none has, and that the tenant itself has.

    The first two should not differ: what others have cached does not show.
    """
    rng = random.Random(5)  # noqa: S311
    times: dict[str, list[float]] = {"own": [], "of_another": [], "of_nobody": []}
    computed: dict[str, set[int]] = {name: set() for name in times}
    for _ in range(RUNS):
        text = prompt(rng, HISTORY_TOKENS)
        driver.submit(text, WARMUP_TOKENS, tenant="first").wait()
        # As long as the known one, token for token, but for its first word.
        cases = {"own": ("first", text), "of_another": ("second", text)}
        cases["of_nobody"] = ("second", " ".join(["sun", *text.split()[1:]]))
        for name, (tenant, asked) in cases.items():
            before = driver.counts()["computed_prompt_tokens"]
            times[name].append(driver.submit(asked, WARMUP_TOKENS, tenant=tenant).wait().first_s)
            computed[name].add(driver.counts()["computed_prompt_tokens"] - before)
    return {
        name: {
            "ttft_ms": [round(1e3 * value, 1) for value in sorted(times[name])],
            "computed_tokens": sorted(computed[name]),
        }
        for name in times
    }


def memory_bound(
    model: Path, *, precision: str, threads: int, decode_tok_s: float
) -> dict[str, Any]:
    """Compare a step at batch 1 with reading the weights once at the speed that memory has."""
    torch.set_num_threads(threads)
    data = torch.ones(BANDWIDTH_BYTES // 4)
    best_s = float("inf")
    for _ in range(RUNS):
        started = time.perf_counter()
        data.sum()
        best_s = min(best_s, time.perf_counter() - started)
    weights = WEIGHT_BYTES[precision] * _parameters(model)
    floor_s = weights * best_s / BANDWIDTH_BYTES
    return {
        "weights_mb": round(weights / 1e6),
        "read_gb_s": round(BANDWIDTH_BYTES / best_s / 1e9, 1),
        "floor_ms": round(1e3 * floor_s, 1),
        "step_ms": round(1e3 / decode_tok_s, 1),
        "ratio": round(1 / decode_tok_s / floor_s, 2),
    }


def _parameters(model: Path) -> int:
    """Return how many parameters the files hold (a tied embedding is in them once)."""
    count = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            count += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    return count


def attainable_tokens(turns: Sequence[tuple[Sequence[int], Sequence[int]]]) -> int:
    """Return what a cache of whole blocks that forgets nothing would spare of prompts.

    `turns` are ids of prompts and answers, one turn after the other. The last token of a prompt is
    always computed, and that of an answer has no keys.
    """
    known: set[tuple[int, ...]] = set()
    spared = 0
    for ids, answer in turns:
        whole = [tuple(ids[:end]) for end in range(BLOCK_TOKENS, len(ids), BLOCK_TOKENS)]
        found = 0
        for prefix in whole:
            if prefix not in known:
                break
            found = len(prefix)
        spared += found
        said = [*ids, *answer[:-1]]
        known |= {tuple(said[:end]) for end in range(BLOCK_TOKENS, len(said) + 1, BLOCK_TOKENS)}
    return spared


def _ms(values: Sequence[float]) -> float:
    return round(1e3 * statistics.median(values), 1)


def more(
    driver: EloquentDriver, model: Path, *, precision: str, threads: int, alone: float | None
) -> dict[str, Any]:
    """Run all of it; `alone` is how many tokens per second were decoded at batch 1."""
    figures = {"long_newcomer": long_newcomer(driver), "tenants": tenants(driver)}
    if alone is not None:
        figures["memory_bound"] = memory_bound(
            model, precision=precision, threads=threads, decode_tok_s=alone
        )
    figures["restart"] = restart(model, precision=precision, threads=threads)
    return figures
