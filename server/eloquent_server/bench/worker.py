"""One engine's part of the benchmark, in a process of its own: `python -m ... JSON`.

It prints one line of JSON: `{"rows": [...], "extra": {...}}` or `{"error": "..."}`.
"""

import asyncio
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from eloquent_server.bench import ours, workload
from eloquent_server.bench.drivers import EloquentDriver, make_driver

BUSY_S, FREE_S = 0.007, 0.003
"The server beside the engine, in the serving set-up: busy for 0.7 of a core."


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job; see `eloquent_server.bench.run.Job`."""
    model, gguf = Path(job["model"]), Path(job["gguf"]) if job["gguf"] else None
    batches, tokens, runs = job["batches"], job["tokens"], job["runs"]
    engine, precision = job["engine"], job["precision"]
    if engine == "eloquent-serving":
        return {"rows": asyncio.run(serving(str(model), precision, batches, tokens)), "extra": {}}
    rows_most = max(*batches, workload.USERS) + 1
    threads = job["threads"]
    driver = make_driver(engine, precision, model, gguf, threads=threads, rows=rows_most)
    extra: dict[str, Any] = {}
    try:
        rows = workload.measure(driver, engine, precision, batches, tokens=tokens, runs=runs)
        if job["chat"]:
            extra["chat"] = chat(driver)
        if job["chat"] and precision == "fp32" and isinstance(driver, EloquentDriver):
            extra |= ours.more(
                driver, model, precision=precision, threads=threads, alone=rows[0].decode_tok_s
            )
    finally:
        driver.close()
    if job["chat"] and engine == "eloquent" and precision == "fp32":
        without = EloquentDriver(
            model, precision=precision, threads=threads, rows=rows_most, prefix_cache=False
        )
        extra["chat_without_reuse"] = chat(without)
        without.close()
    return {"rows": workload.as_json(rows), "extra": extra}


def chat(driver: Any) -> dict[str, Any]:
    """Run the chat; with our engine, also count what the prefix cache gave."""
    if not isinstance(driver, EloquentDriver):
        return workload.chat(driver)
    before, first = driver.counts(), len(driver.answered)
    figures = workload.chat(driver)
    after = driver.counts()
    for name in ("prompt_tokens", "cached_tokens"):
        figures[name] = after[name] - before[name]
    figures["attainable_tokens"] = ours.attainable_tokens(driver.answered[first:])
    return figures


async def serving(
    model: str, precision: str, batches: list[int], tokens: int
) -> list[dict[str, Any]]:
    """Measure decoding as `eloquent serve` runs it: a process with a core less, a busy server."""
    from eloquent_server.chat import ChatMessage, ChatRequest
    from eloquent_server.engine.client import EngineClient, EngineOptions
    from eloquent_server.engine.turn import Tokens

    options = EngineOptions(model, "cpu", precision, max_running=max(batches) + 1)
    client = await EngineClient.start(options)

    async def answer(number: int) -> list[float]:
        said = f"Count from {number} upwards, one number a line, and do not stop."
        request = ChatRequest(
            messages=(ChatMessage("user", said),), max_tokens=tokens, temperature=0, logit_bias=None
        )
        times: list[float] = []
        async for event in client.submit(request, seed=0):
            if isinstance(event, Tokens):
                times += [time.perf_counter()] * len(event.ids)
        return times

    async def be_busy() -> None:
        while True:
            end = time.perf_counter() + BUSY_S
            while time.perf_counter() < end:
                pass
            await asyncio.sleep(FREE_S)

    rows = []
    try:
        await answer(0)
        busy = asyncio.create_task(be_busy())
        for batch in batches:
            times = await asyncio.gather(*(answer(10 * number) for number in range(batch)))
            gaps = [b - a for each in times for a, b in pairwise(each[workload.FIRST_GAPS :])]
            rows.append(
                workload.Row(
                    "eloquent-serving",
                    precision,
                    batch,
                    round(workload.rate(times), 1),
                    None,
                    None,
                    round(max(gaps, default=0.0) * 1e3, 1),
                    None,
                )
            )
        busy.cancel()
    finally:
        await client.close()
    return workload.as_json(rows)


def main() -> None:
    """Run the job of the command line."""
    try:
        result = run(json.loads(sys.argv[1]))
    except (RuntimeError, OSError, ImportError) as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(result))  # noqa: T201


if __name__ == "__main__":
    main()
