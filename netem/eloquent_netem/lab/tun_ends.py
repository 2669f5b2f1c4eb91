"""The programs inside the two namespaces: what those of all schemes share.

`python -m eloquent_netem.lab.tun_ends KIND SIDE FOLDER` is one end of one answer. It reads
FOLDER/setup.json, says on standard output that it is ready, does what standard input tells it, and
leaves what it saw in FOLDER/SIDE.json. All times are in seconds of CLOCK_MONOTONIC, which all
namespaces share.
"""

import asyncio
import contextlib
import gc
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from selectors import SelectSelector
from typing import NoReturn

import msgspec

from eloquent.core.events import Event, TextDelta
from eloquent_netem.lab.sources import DEFAULT_PROMPT, GenerationError, LiveModel, Token
from eloquent_netem.namespaces import Side
from eloquent_netem.realtime import LatenessHistogram, reduce_timer_slack

PORT = 4433
MODEL = "SmolLM2-135M-Instruct"
REQUEST = {
    "model": MODEL,
    "messages": [{"role": "user", "content": DEFAULT_PROMPT}],
    "stream": True,
}
"What every client asks, an OpenAI chat body."

PRIORITY = 5
"Under SCHED_FIFO; the router's is higher, so that it is late for nobody."

LOOK_EVERY_S = 0.05
"How often an end looks how late it is woken."

SETUP = "setup.json"

Emit = Callable[[str, bool], None]
"Takes a piece of the answer, and whether it is the last; the last one may be empty."


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One answer, as both ends are told of it."""

    scheme: str
    padding: bool
    congestion: str
    "Of the kernel's TCP."
    plan: tuple[Token, ...]
    "Empty: a model answers live."
    live: LiveModel | None = None


@dataclass(frozen=True, slots=True)
class Hello:
    """What a server says when it is ready; of its certificate."""

    pin: str = ""
    pem: str = ""


@dataclass(frozen=True, slots=True)
class Go:
    """What a client is told."""

    start_s: float
    "When to begin."
    server: Hello


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What an end leaves behind."""

    times_s: tuple[float, ...]
    "When each piece of text was generated (server), or in the reader's hands (client)."
    texts: tuple[str, ...]
    late_p99_s: float
    "How late this program was woken by its timers, in one case of 100."


class End:
    """One end's side of the conversation with the lab, and its notes."""

    def __init__(self, folder: Path, side: Side) -> None:
        self.setup = msgspec.json.decode((folder / SETUP).read_bytes(), type=Setup)
        self._file = folder / f"{side}.json"
        self._times_s: list[float] = []
        self._texts: list[str] = []
        self._commands = asyncio.StreamReader()
        self._lateness = LatenessHistogram()
        self._looking: asyncio.Task[None] | None = None
        self._live: AsyncIterator[Event] | None = None
        "What the live model says."

    def note(self, text: str) -> None:
        """Take down that a piece of text was generated, or is in the reader's hands, now."""
        self._times_s.append(time.monotonic())
        self._texts.append(text)

    async def serve_until_stopped(self, hello: Hello) -> NoReturn:
        """Say that the server is ready, serve until it is to end, and end the process."""
        live = self.setup.live
        async with contextlib.AsyncExitStack() as stack:
            if live is not None:
                self._live = await stack.enter_async_context(live.loaded())
            await self._say_ready(hello)
            await self._commands.read()
            self.leave()

    async def until_start(self) -> Hello:
        """Say that the client is ready, and wait until it is to begin; return the server's word."""
        await self._say_ready(Hello())
        go = msgspec.json.decode(await self._commands.readline(), type=Go)
        await asyncio.sleep(go.start_s - time.monotonic())
        return go.server

    async def generate(self, emit: Emit) -> None:
        """Generate the answer from now on."""
        try:
            if self._live is None:
                await self._replay(emit)
            else:
                await self._generate(self._live, emit)
        except Exception as error:  # noqa: BLE001  (it ends the program, whatever else goes on)
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)  # noqa: T201
            os._exit(1)

    async def _replay(self, emit: Emit) -> None:
        plan = self.setup.plan
        start_s = time.monotonic()
        for index, token in enumerate(plan):
            await asyncio.sleep(start_s + token.time_s - time.monotonic())
            self.note(token.text)
            emit(token.text, index + 1 == len(plan))

    async def _generate(self, events: AsyncIterator[Event], emit: Emit) -> None:
        async for event in events:
            if isinstance(event, TextDelta) and event.text:
                self.note(event.text)
                emit(event.text, False)
        if not self._texts:
            raise GenerationError("The model gave no text: ask another prompt.")
        emit("", True)

    def leave(self) -> NoReturn:
        """Write down what was seen, and end the process: what closing would say counts no more."""
        report = Report(
            times_s=tuple(self._times_s),
            texts=tuple(self._texts),
            late_p99_s=self._lateness.summary().p99_s,
        )
        self._file.write_bytes(msgspec.json.encode(report))
        os._exit(0)

    async def _say_ready(self, hello: Hello) -> None:
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self._commands), sys.stdin
        )
        gc.freeze()  # What was loaded so far need not be searched again and again.
        reduce_timer_slack()
        _become_real_time()
        self._looking = asyncio.create_task(self._look())
        print(msgspec.json.encode(hello).decode(), flush=True)  # noqa: T201

    async def _look(self) -> None:
        """Wake again and again, and see how late that is."""
        while True:
            due_s = time.monotonic() + LOOK_EVERY_S
            await asyncio.sleep(LOOK_EVERY_S)
            self._lateness.record(max(0.0, time.monotonic() - due_s))


async def answer_of(end: End) -> AsyncIterator[tuple[str, bool]]:
    """Generate the answer at its own pace, however slowly it is taken; give its pieces."""
    pieces: asyncio.Queue[tuple[str, bool]] = asyncio.Queue()
    generating = asyncio.create_task(
        end.generate(lambda text, is_last: pieces.put_nowait((text, is_last)))
    )
    is_last = False
    while not is_last:
        text, is_last = await pieces.get()
        yield text, is_last
    await generating


def _become_real_time() -> None:
    """Put this process under SCHED_FIFO, below the router, where that is allowed."""
    policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, policy, os.sched_param(PRIORITY))


async def _run(kind: str, side: Side, folder: Path, make_end: type[End]) -> None:
    end = make_end(folder, side)
    if kind == "quic":
        from eloquent_netem.lab.tun_quic import ask, serve
    elif kind == "sse":
        from eloquent_netem.lab.tun_sse import ask, serve
    else:
        from eloquent_netem.lab.tun_websocket import ask, serve
    await (serve if side == "server" else ask)(end)
    sys.exit("The answer broke off.")  # Else the end would have left.


def _loop() -> asyncio.AbstractEventLoop:
    # select's timeouts are good to the microsecond; epoll's are rounded up to milliseconds.
    return asyncio.SelectorEventLoop(SelectSelector())


def main(make_end: type[End] = End) -> None:
    """Be one end of one answer; `make_end` may be an end that does more with its notes."""
    kind, name, folder = sys.argv[1:]
    side: Side = "server" if name == "server" else "client"
    with asyncio.Runner(loop_factory=_loop) as runner:
        runner.run(_run(kind, side, Path(folder), make_end))


if __name__ == "__main__":
    main()
