"""A long run with hundreds of turns in flight: does the server's memory grow, does anything stay?

The server is a process of its own, with a store on disk; the clients are this process's, over real
sockets on loopback. At the end all clients go, and nothing may be left of them.
"""

import asyncio
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median

from eloquent.errors import ConfigurationError
from eloquent.quic.connection import IDLE_TIMEOUT_S
from eloquent.url import ServerUrl
from eloquent_server.bench.soak_clients import LASTS_S, Crowd
from eloquent_server.bench.soak_server import COUNT, HOST, LOOK, STOP, Look, Serving, run
from eloquent_server.tidying import TIDY_EVERY_S

LOOK_EVERY_S = 10.0
RAMP_S = 60.0
"Clients begin over this time."
WARM_UP_S = max(IDLE_TIMEOUT_S, LASTS_S[1]) + RAMP_S
"""After a connection's idle timeout as many are forgotten as are left behind; only then is the
number of them steady."""
MEASURED_SHARE = 0.8
"The last part of the run, in which memory may not grow: 8 of 10 minutes."
MAX_GROWTH = 0.01
EDGE_LOOKS = 6
"Medians of so many looks, at both ends of that part, are compared."
SLACK_S = 30.0
"Beyond what it must take for all to be gone."


@dataclass(frozen=True, slots=True)
class Soak:
    """What is run."""

    turns: int
    minutes: float
    tokens_per_s: float
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it."""

    idle: Look
    "Before the first client."
    looks: list[Look]
    "After the warming up, one every `LOOK_EVERY_S`."
    left: Look
    "When all clients were gone and all times had run out."
    ends: dict[str, int]
    "How turns went."
    faults: list[str]

    @property
    def measured(self) -> list[Look]:
        """The looks in which memory may not grow."""
        return self.looks[-max(2, round(MEASURED_SHARE * len(self.looks))) :]

    @property
    def growth(self) -> float:
        """By what part memory grew in that time."""
        sizes = [look.resident_bytes for look in self.measured]
        edge = min(EDGE_LOOKS, len(sizes) // 2)
        return median(sizes[-edge:]) / median(sizes[:edge]) - 1

    @property
    def leaks(self) -> list[str]:
        """What is left of clients that are gone."""
        found = [
            f"{name} {was:g} -> {now:g}"
            for name, now in self.left.metrics.items()
            if name.startswith(KEPT) and now > (was := self.idle.metrics.get(name, 0.0))
        ]
        if self.left.open_files > self.idle.open_files:
            found.append(f"open files {self.idle.open_files} -> {self.left.open_files}")
        if self.left.threads > self.idle.threads:
            found.append(f"threads {self.idle.threads} -> {self.left.threads}")
        return found

    @property
    def is_good(self) -> bool:
        """Whether it is as it should be."""
        return self.growth < MAX_GROWTH and not self.leaks and not self.ends.get("wrong")


OPEN_TURNS = 'eloquent:turns{state="open"}'
KEPT = (
    "eloquent:turns{",
    "eloquent:readers",
    "eloquent:connections{",
    "eloquent:asyncio_tasks",
    "eloquent:store_bytes",
    "eloquent:store_turns",
    "vllm:num_requests_",
)
"Metrics that are to be as before when all clients are gone."


def soak(wanted: Soak, state: str, *, say: Callable[[str], None]) -> Outcome:
    """Run it, with the store in the directory `state`; `say` is told how it goes.

    Raises:
        ConfigurationError: there is nothing to run, or the server ended.
    """
    if wanted.turns < 1 or wanted.minutes <= 0 or wanted.tokens_per_s <= 0:
        raise ConfigurationError("Turns, minutes and tokens per second must be above 0.")
    serving = Serving(state, wanted.tokens_per_s, grace_s=60.0, ttl_s=60.0)
    with _server(serving) as server:
        try:
            return asyncio.run(_soak(wanted, serving, server, say))
        except EOFError as error:
            raise ConfigurationError(
                "The server ended in mid-run: see what it said above, and try fewer turns."
            ) from error


@contextmanager
def _server(serving: Serving) -> Iterator[Connection]:
    """Run the server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run, args=(serving, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
        ours.send(STOP)
        process.join()
    finally:
        process.kill()
        process.join()
        ours.close()


async def _soak(
    wanted: Soak, serving: Serving, server: Connection, say: Callable[[str], None]
) -> Outcome:
    port, pin = await asyncio.to_thread(server.recv)
    began_s = time.monotonic()

    async def look(note: str = "", message: str = LOOK) -> Look:
        server.send(message)
        found: Look = await asyncio.to_thread(server.recv)
        say(f"{time.monotonic() - began_s:5.0f} s  {_line(found)}{note}")
        return found

    idle = await look("  before the first client", COUNT)
    crowd = Crowd(ServerUrl(HOST, port, pin), wanted.turns, wanted.tokens_per_s, wanted.seed)
    running = asyncio.ensure_future(crowd.run(WARM_UP_S + 60 * wanted.minutes, ramp_s=RAMP_S))
    looks = []
    while not (await asyncio.wait((running,), timeout=LOOK_EVERY_S))[0]:
        is_warm = time.monotonic() - began_s >= WARM_UP_S
        now = await look("" if is_warm else "  warming up")
        if is_warm:
            looks.append(now)
    await running
    await look("  the clients are gone")
    gone_s = time.monotonic()
    ends_s = max(IDLE_TIMEOUT_S + serving.grace_s, LASTS_S[1])  # of the last turn
    last_s = ends_s + 2 * (serving.ttl_s + TIDY_EVERY_S) + SLACK_S
    while time.monotonic() - gone_s < last_s:
        await asyncio.sleep(LOOK_EVERY_S)
        await look()
    left = await look("  all times have run out", COUNT)
    return Outcome(idle, looks, left, dict(crowd.ends), crowd.faults)


def _line(look: Look) -> str:
    of = look.metrics
    connections = sum(value for name, value in of.items() if "connections{" in name)
    return (
        f"{look.resident_bytes / 2**20:7.1f} MiB  "
        f"{of[OPEN_TURNS]:4.0f} turns  "
        f"{connections:4.0f} connections  {look.open_files:3d} files  "
        f"{of['eloquent:asyncio_tasks']:5.0f} tasks  {look.cpu_s:6.1f} s CPU"
    )


def describe(wanted: Soak, outcome: Outcome) -> str:
    """Return the figures as text."""
    first, last = outcome.measured[0], outcome.measured[-1]
    minutes = LOOK_EVERY_S * len(outcome.measured) / 60
    ends = ", ".join(f"{count} {fate}" for fate, count in sorted(outcome.ends.items()))
    lines = [
        f"{wanted.turns} turns in flight, {wanted.tokens_per_s:g} tokens/s each, seed "
        f"{wanted.seed}: {ends}.",
        f"Resident memory over the last {minutes:.1f} minutes: {first.resident_bytes / 2**20:.1f} "
        f"to {last.resident_bytes / 2**20:.1f} MiB, {100 * outcome.growth:+.2f} % (bound "
        f"{100 * MAX_GROWTH:g} %).",
        f"Left behind: {'; '.join(outcome.leaks) or 'nothing'}; {outcome.idle.objects} objects of "
        f"Python's before the first client, {outcome.left.objects} after the last.",
        *(f"Wrong: {fault}" for fault in outcome.faults),
    ]
    return "\n".join(lines)
