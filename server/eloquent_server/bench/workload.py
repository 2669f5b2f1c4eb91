"""What every engine is asked, and what is measured of it; knows none of them."""

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

WAIT_S = 600.0
"An engine that takes longer for one part has failed."
HISTORY_TOKENS = 1024
"Of the prompt for the time to first token, and of a newcomer's."
SYSTEM_TOKENS = 400
USERS, ROUNDS, REPLY_TOKENS, QUESTION_TOKENS = 8, 4, 32, 24
"Of the chat: everybody has the same system prompt and replies of the same length."
WARMUP_TOKENS = 8
PROMPT_TOKENS = 48
FIRST_GAPS = 2
"Of a stream; they belong to its start."

_WORDS = [
    "river",
    "stone",
    "window",
    "paper",
    "garden",
    "yellow",
    "quiet",
    "market",
    "engine",
    "planet",
    "summer",
    "bridge",
    "copper",
    "letter",
    "forest",
    "singer",
    "number",
    "shadow",
    "winter",
    "basket",
    "coffee",
    "doctor",
    "island",
    "silver",
    "travel",
    "mirror",
    "school",
    "button",
    "castle",
    "dinner",
    "flower",
    "guitar",
    "hammer",
    "jacket",
    "kitchen",
    "ladder",
    "magnet",
    "needle",
    "orange",
    "pencil",
]


class Stream:
    """The tokens of one request as they come; filled from any thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.times: list[float] = []
        "One for each token; seconds."
        self.done = threading.Event()
        self.error: str | None = None
        self.text = ""
        self._clock = clock
        self.asked = clock()

    def token(self, count: int = 1, text: str = "") -> None:
        """Note that tokens came."""
        self.times += [self._clock()] * count
        self.text += text

    def end(self, error: str | None = None) -> None:
        """Note the end."""
        self.error = error
        self.done.set()

    def wait(self) -> "Stream":
        """Wait for the end.

        Raises:
            RuntimeError: the engine failed, took too long, or brought nothing.
        """
        if not self.done.wait(WAIT_S):
            raise RuntimeError(f"no end within {WAIT_S:g} s")
        if self.error is not None or not self.times:
            raise RuntimeError(self.error or "no tokens came")
        return self

    @property
    def first_s(self) -> float:
        """The time to the first token, in seconds."""
        return self.times[0] - self.asked


class Driver(Protocol):
    """One engine, loaded."""

    def submit(self, prompt: str, count: int) -> Stream:
        """Begin to answer with `count` greedy tokens, as far as the engine lets one say so."""

    def rss_mib(self) -> float:
        """Its resident memory, in MiB."""

    def close(self) -> None:
        """End it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report; None: not measured."""

    engine: str
    precision: str
    batch: int
    decode_tok_s: float | None
    "All turns together, while all of them decode."
    ttft_cold_ms: float | None
    "For a prompt of `HISTORY_TOKENS`, alone, that the engine has not seen; median."
    ttft_warm_ms: float | None
    "The same prompt again with a few words more; median."
    max_gap_ms: float | None
    "The longest that a decoding turn waits for a token while a prompt as long comes in."
    rss_mib: float | None
    "Resident memory after this batch, with whatever the engine caches."


def measure(
    driver: Driver, engine: str, precision: str, batches: Sequence[int], *, tokens: int, runs: int
) -> list[Row]:
    """Run the workload; `tokens` a turn, medians of `runs`."""
    rng = random.Random(1)  # noqa: S311 (it makes prompts)
    driver.submit(prompt(rng, PROMPT_TOKENS), WARMUP_TOKENS).wait()
    cold, warm = first_token(driver, rng, runs)
    rows = []
    for batch in batches:
        rate = statistics.median(decode(driver, rng, batch, tokens) for _ in range(runs))
        gap = newcomer_gap(driver, rng, batch, tokens)
        rows.append(
            Row(
                engine,
                precision,
                batch,
                round(rate, 1),
                round(cold * 1e3, 1),
                round(warm * 1e3, 1),
                round(gap * 1e3, 1),
                round(driver.rss_mib(), 1),
            )
        )
    return rows


def prompt(rng: random.Random, tokens: int) -> str:
    """Return words that no cache has seen, about a token each."""
    return " ".join(rng.choice(_WORDS) for _ in range(tokens))


def first_token(driver: Driver, rng: random.Random, runs: int) -> tuple[float, float]:
    """Return the time to the first token of a long prompt, cold and warm; seconds, medians."""
    cold, warm = [], []
    for _ in range(runs):
        history = prompt(rng, HISTORY_TOKENS)
        cold.append(driver.submit(history, WARMUP_TOKENS).wait().first_s)
        warm.append(driver.submit(f"{history} {prompt(rng, 4)}", WARMUP_TOKENS).wait().first_s)
    return statistics.median(cold), statistics.median(warm)


def decode(driver: Driver, rng: random.Random, batch: int, tokens: int) -> float:
    """Return tokens per second from when all turns decode to when the first has ended."""
    streams = [driver.submit(prompt(rng, PROMPT_TOKENS), tokens) for _ in range(batch)]
    return rate([stream.wait().times for stream in streams])


def rate(times: Sequence[Sequence[float]]) -> float:
    """Return all turns' tokens per second while all of them run."""
    start, end = max(each[0] for each in times), min(each[-1] for each in times)
    if end <= start:
        raise RuntimeError("the turns did not run at the same time; ask for more --tokens")
    return sum(sum(start < time <= end for time in each) for each in times) / (end - start)


def newcomer_gap(driver: Driver, rng: random.Random, batch: int, tokens: int) -> float:
    """Return the longest gap of decoding turns while a long prompt comes in; seconds."""
    streams = [driver.submit(prompt(rng, PROMPT_TOKENS), 2 * tokens) for _ in range(batch)]
    while not all(len(each.times) > FIRST_GAPS or each.done.is_set() for each in streams):
        time.sleep(0.002)
    newcomer = driver.submit(prompt(rng, HISTORY_TOKENS), WARMUP_TOKENS).wait()
    gaps = []
    for each in streams:
        times = each.wait().times
        gaps += [
            b - a
            for a, b in zip(times[FIRST_GAPS:], times[FIRST_GAPS + 1 :], strict=False)
            if b >= newcomer.asked and a <= newcomer.times[0]
        ]
    return max(gaps, default=0.0)


def chat(driver: Driver) -> dict[str, Any]:
    """Let users talk in rounds after one system prompt; return wall time and later first tokens."""
    rng = random.Random(2)  # noqa: S311
    system = prompt(rng, SYSTEM_TOKENS)
    said = [f"{system} {prompt(rng, QUESTION_TOKENS)}" for _ in range(USERS)]
    first: list[float] = []
    later: list[float] = []
    started = time.perf_counter()
    for number in range(ROUNDS):
        streams = [driver.submit(text, REPLY_TOKENS) for text in said]
        for user, stream in enumerate(streams):
            (later if number else first).append(stream.wait().first_s)
            said[user] += f"{stream.text} {prompt(rng, QUESTION_TOKENS)}"
    return {
        "users": USERS,
        "rounds": ROUNDS,
        "wall_s": round(time.perf_counter() - started, 2),
        "first_ttft_ms": round(statistics.median(first) * 1e3, 1),
        "later_ttft_ms": round(statistics.median(later) * 1e3, 1),
    }


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as the report has them."""
    return [asdict(row) for row in rows]
