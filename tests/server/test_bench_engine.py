"""The benchmark's measures on made-up tokens, its report, and our driver on a tiny model."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tiny_model import CONTEXT_TOKENS, tiny_model, tiny_tokenizer

from eloquent_server.bench import workload
from eloquent_server.bench.drivers import make_driver
from eloquent_server.bench.ours import attainable_tokens
from eloquent_server.bench.run import ENGINES, Job, run_all, run_job, table
from eloquent_server.bench.workload import Row, Stream

KEYS = [
    "engine",
    "precision",
    "batch",
    "decode_tok_s",
    "ttft_cold_ms",
    "ttft_warm_ms",
    "max_gap_ms",
    "rss_mib",
]


class TableDriver:
    """An engine whose tokens come at set times after they were asked for, all at once."""

    def __init__(self, first_s: dict[bool, float], gap_s: float, word_s: float = 0.0) -> None:
        self._first_s = first_s
        self._word_s = word_s
        self._gap_s = gap_s
        self._seen = ""
        self.closed = False

    def submit(self, prompt: str, count: int) -> Stream:
        start = self._first_s[bool(self._seen) and prompt.startswith(self._seen)]
        start += self._word_s * len(prompt.split())
        self._seen = prompt
        stream = Stream(clock=lambda: 0.0)
        stream.times = [start + number * self._gap_s for number in range(count)]
        stream.end()
        return stream

    def rss_mib(self) -> float:
        return 100.0

    def close(self) -> None:
        self.closed = True


def test_the_rate_counts_while_all_decode() -> None:
    early, late = [0.0, 1.0, 2.0, 3.0], [2.0, 2.5, 3.0, 3.5, 4.0]
    # From 2 (excluded) to 3: one token of the first, two of the second.
    assert workload.rate([early, late]) == 3.0
    with pytest.raises(RuntimeError, match="same time"):
        workload.rate([[0.0, 1.0], [2.0, 3.0]])


def test_first_tokens_cold_and_warm() -> None:
    driver = TableDriver({False: 2.0, True: 0.1}, 0.01)
    assert workload.first_token(driver, random.Random(0), 3) == (2.0, 0.1)


def test_rows_have_what_the_report_promises() -> None:
    driver = TableDriver({False: 0.5, True: 0.1}, 0.02, word_s=1e-4)
    rows = workload.measure(driver, "eloquent", "fp32", (1, 4), tokens=8, runs=1)
    report = workload.as_json(rows)
    assert [list(row) for row in report] == [KEYS, KEYS]
    assert [row["decode_tok_s"] for row in report] == [50.0, 200.0]
    assert report[0]["max_gap_ms"] == 20.0


def test_a_stream_that_fails_is_an_error() -> None:
    stream = Stream()
    stream.end("no memory")
    with pytest.raises(RuntimeError, match="no memory"):
        stream.wait()
    empty = Stream()
    empty.end()
    with pytest.raises(RuntimeError, match="no tokens"):
        empty.wait()


def job(engine: str, precision: str, model: Path, **changes: Any) -> Job:
    fields = {"gguf": None, "threads": 1, "batches": (1,), "tokens": 8, "runs": 1, "chat": False}
    return Job(engine, precision, str(model), **{**fields, **changes})  # type: ignore[arg-type]


def test_an_engine_that_cannot_run_is_named_and_the_rest_go_on() -> None:
    row = workload.as_json([Row("eloquent", "fp32", 1, 10.0, 1.0, 1.0, None, 1.0)])

    def run(asked: Job) -> dict[str, Any]:
        if asked.engine == "llama.cpp":
            return {"error": "xllamacpp is not installed"}
        return {"rows": row, "extra": {"chat": {"wall_s": 1.0}}}

    said: list[str] = []
    jobs = [job("llama.cpp", "q4", Path("m")), job("eloquent", "fp32", Path("m"))]
    report = run_all(jobs, say=said.append, run=run)
    assert list(report) == ["meta", "rows"]
    assert report["rows"] == row
    assert report["meta"]["left_out"] == {"llama.cpp q4": "xllamacpp is not installed"}
    assert report["meta"]["chat"] == {"eloquent fp32": {"chat": {"wall_s": 1.0}}}
    assert any("left out" in line for line in said)
    assert json.loads(json.dumps(report)) == report
    assert "| eloquent | fp32 | 1 | 10.0 | 1.0 | 1.0 |  | 1.0 |" in table(report)


def test_names_are_those_of_the_report() -> None:
    assert {name for name, _ in ENGINES} == {
        "eloquent",
        "eloquent-serving",
        "transformers-cb",
        "transformers-serve",
        "llama.cpp",
    }
    assert {precision for _, precision in ENGINES} == {"fp32", "bf16", "int8", "q4"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    copy.deepcopy(tiny_model()).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_our_driver_brings_as_many_tokens_as_were_asked(directory: Path) -> None:
    driver = make_driver("eloquent", "fp32", directory, None, threads=1, rows=3)
    streams = [driver.submit("river stone", 12), driver.submit("window", 5)]
    assert [len(stream.wait().times) for stream in streams] == [12, 5]
    assert driver.rss_mib() > 50
    driver.close()


def test_a_job_that_fails_says_why(directory: Path) -> None:
    # The long prompt does not fit the tiny model.
    assert CONTEXT_TOKENS < workload.HISTORY_TOKENS
    assert "error" in run_job(job("eloquent", "fp32", directory))
    assert "GGUF" in run_job(job("llama.cpp", "q4", directory))["error"]


def test_attainable_is_what_a_cache_that_forgets_nothing_would_spare() -> None:
    system, question, answer = range(40), range(100, 110), range(200, 207)
    first = ([*system, *question], list(answer))  # 50 and 7: keys for 56, so 3 whole blocks
    other = ([*system, *range(300, 310)], list(answer))  # 2 blocks of the system prompt
    again = ([*first[0], *answer, *question], [1])  # the 3 whole blocks, of 67
    whole = (first[0][:48], [1])  # all 3 blocks are known, but the last token is computed
    assert attainable_tokens([first]) == 0
    assert attainable_tokens([first, other]) == 32
    assert attainable_tokens([first, other, again]) == 32 + 48
    assert attainable_tokens([first, whole]) == 32
