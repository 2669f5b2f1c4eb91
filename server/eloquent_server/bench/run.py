"""The benchmark's jobs, one process after the other, and its report."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ENGINES: tuple[tuple[str, str], ...] = (
    ("eloquent", "fp32"),
    ("eloquent", "bf16"),
    ("eloquent", "int8"),
    ("eloquent-serving", "fp32"),
    ("transformers-cb", "fp32"),
    ("transformers-serve", "fp32"),
    ("llama.cpp", "q4"),
)
"Names and precisions. `eloquent-serving` is ours as the server runs it, beside a busy event loop."
PACKAGES = ("eloquent-stream", "torch", "transformers", "tokenizers", "xllamacpp")
JOB_S = 1800.0

_NO_HUB = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}


@dataclass(frozen=True, slots=True)
class Job:
    """What one process is to measure."""

    engine: str
    precision: str
    model: str
    "A directory in the Hugging Face layout."
    gguf: str | None
    threads: int
    batches: Sequence[int]
    tokens: int
    runs: int
    chat: bool


def run_job(job: Job) -> dict[str, Any]:
    """Run a job in a process of its own and return what it printed; `error` if it failed."""
    command = [sys.executable, "-m", "eloquent_server.bench.worker", json.dumps(asdict(job))]
    environment = {**os.environ, **_NO_HUB, "OMP_NUM_THREADS": str(job.threads)}
    try:
        done = subprocess.run(  # noqa: S603
            command, env=environment, capture_output=True, text=True, timeout=JOB_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it did not end within {JOB_S:g} s"}
    lines = done.stdout.strip().splitlines()
    try:
        result: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        errors = done.stderr.strip().splitlines() or ["no message"]
        result = {"error": f"it ended with code {done.returncode}: {errors[-1]}"}
    return result


def run_all(
    jobs: Sequence[Job],
    *,
    say: Callable[[str], None],
    run: Callable[[Job], dict[str, Any]] = run_job,
) -> dict[str, Any]:
    """Run all jobs and return the report; an engine that cannot run is named in it."""
    rows: list[dict[str, Any]] = []
    extra: dict[str, Any] = {}
    failed: dict[str, str] = {}
    load_before = _load()
    for job in jobs:
        name = f"{job.engine} {job.precision}"
        say(f"{name} ...")
        result = run(job)
        if "error" in result:
            failed[name] = result["error"]
            say(f"{name}: left out: {result['error']}")
            continue
        rows += result["rows"]
        extra[name] = result["extra"]
    meta = {
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": _versions(),
        "load_before_and_after": [load_before, _load()],
        "threads": jobs[0].threads if jobs else None,
        "tokens": jobs[0].tokens if jobs else None,
        "runs": jobs[0].runs if jobs else None,
        "model": Path(jobs[0].model).name if jobs else None,
        "chat": extra,
        "left_out": failed,
    }
    return {"meta": meta, "rows": rows}


def table(report: dict[str, Any]) -> str:
    """Return the report's rows as a Markdown table."""
    columns = {
        "engine": "engine",
        "precision": "precision",
        "batch": "batch",
        "decode_tok_s": "tokens/s",
        "ttft_cold_ms": "TTFT cold (ms)",
        "ttft_warm_ms": "warm",
        "max_gap_ms": "worst gap (ms)",
        "rss_mib": "RSS (MiB)",
    }
    lines: list[Iterable[str]] = [columns.values(), ["---"] * len(columns)]
    lines += [["" if row[c] is None else str(row[c]) for c in columns] for row in report["rows"]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
