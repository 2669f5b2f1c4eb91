"""The engine as the server sees it: turns in, events out, whatever becomes of its process.

The process is started with the first `start`, and again whenever it has died or is stuck; turns
then go on from their prompt and the tokens that came before: readers see a pause and no error.
"""

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from eloquent.core.events import Failure
from eloquent.errors import ConfigurationError, RequestError
from eloquent_server import logs
from eloquent_server.backends.base import ANYBODY, Tenant
from eloquent_server.chat import ChatRequest
from eloquent_server.engine import ipc
from eloquent_server.engine.child import Child
from eloquent_server.engine.client_turn import AnswerSoFar, EngineTurn
from eloquent_server.engine.recovery import MAX_DEATHS, due
from eloquent_server.engine.settings import KvOptions
from eloquent_server.engine.turn import SHUTTING_DOWN, EngineEvent, Tokens
from eloquent_server.engine.watchdog import CHECKS, HANG_S, Watchdog
from eloquent_server.models import Progress

COMMAND = (sys.executable, "-P", "-m", "eloquent_server.engine.process")

RETRY_FIRST_S = 0.1
RETRY_GROWTH = 2.0
RETRY_MAX_S = 30.0
HEALTHY_S = 60.0
"An engine that has lived so long is started again at once; else the waits grow."
START_TRIES = 3
"As many processes in a row that end while they load fail the start, or the turns that wait."
STATS_S = 5.0
MAX_TURNS = 4096

DIED = (
    f"The engine's process ended {MAX_DEATHS} times while it computed this answer, so the answer "
    "ends here. Ask in other words; the server's log has more."
)
NOT_BACK = "The engine's process has ended and does not come back: {}"
OTHER_MODEL = (
    "The engine was restarted and the model's files have changed, so the answer cannot go on. "
    "Ask again."
)
OTHER_RELEASE = (
    "The engine's process said what cannot be read ({}): it is of another release of Eloquent than "
    "the server. Restart the server."
)
TOO_MANY = f"{MAX_TURNS} answers are being generated or wait. Ask again in a while."

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the process is started with."""

    model: str
    "As `eloquent serve --model` takes it."
    device: str = "auto"
    precision: str = "default"
    max_running: int | None = None
    "Turns in one step; None: the engine's default."
    kv: KvOptions = field(default_factory=KvOptions)
    hang_s: float = HANG_S
    "See `watchdog`."


class EngineClient:
    """The engine's process, kept alive. To be used on one event loop, in the main thread.

    Where the thread that started a process ends, Linux ends the process.
    """

    def __init__(
        self,
        options: EngineOptions,
        *,
        progress: Progress | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        """Use `start`."""
        self._options = options
        self._progress = progress
        self._command = command
        self._turns: dict[int, EngineTurn] = {}
        self._next = 1
        self._asked: dict[int, asyncio.Future[Mapping[str, int]]] = {}
        self._process: Child | None = None
        self._watchdog = Watchdog()
        self._is_ready = False
        self._closing = asyncio.Event()
        self._starts = 0
        self._info: ipc.Ready | None = None
        self._load_error: str | None = None
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._work = asyncio.ensure_future(self._keep_alive())

    @classmethod
    async def start(
        cls,
        options: EngineOptions,
        *,
        progress: Progress | None = None,
        command: Sequence[str] = COMMAND,
    ) -> "EngineClient":
        """Start the process and wait until the model is loaded, with no deadline.

        `progress` is told how far that is; `command` runs the process.

        Raises:
            ConfigurationError: the model cannot be loaded, or the process cannot be started.
        """
        client = cls(options, progress=progress, command=command)
        try:
            await client.ready()
        except BaseException:
            await client.close()
            raise
        return client

    async def ready(self) -> None:
        """Wait until the model is loaded for the first time; see `start`."""
        await asyncio.wait((self._started, self._work), return_when=asyncio.FIRST_COMPLETED)
        if not self._started.done():
            self._work.result()  # A defect here.
        self._started.result()

    @property
    def info(self) -> ipc.Ready:
        """The model."""
        assert self._info is not None, "it was never ready"
        return self._info

    @property
    def pid(self) -> int | None:
        """The process that is running or starting; None: there is none at the moment."""
        return self._process.pid if self._process is not None else None

    @property
    def restarts(self) -> int:
        """How often the process had to be started again."""
        return max(0, self._starts - 1)

    def submit(
        self,
        request: ChatRequest,
        *,
        seed: int,
        tenant: Tenant = ANYBODY.tenant,
        so_far: AnswerSoFar | None = None,
    ) -> EngineTurn:
        """Ask for an answer, or for what is missing of one that is `so_far`.

        `seed` counts if the request has none.

        Raises:
            RequestError: `unavailable`: the engine is closed; `overloaded`: it has too much to do.
        """
        if self._closing.is_set():
            raise RequestError("unavailable", SHUTTING_DOWN)
        if len(self._turns) >= MAX_TURNS:
            raise RequestError("overloaded", TOO_MANY)
        number, self._next = self._next, self._next + 1
        turn = EngineTurn(
            number,
            msgspec.json.encode(request),
            seed,
            tenant,
            so_far or AnswerSoFar(),
            on_cancel=self._cancel,
            on_hint=self._hint,
        )
        self._turns[number] = turn
        self._submit_due()
        return turn

    async def stats(self, timeout_s: float = STATS_S) -> Mapping[str, int]:
        """Return the engine's counts, by the names of `EngineStats`; none while it is down.

        None, too, if it is so busy that it does not answer in `timeout_s`.
        """
        if not self._is_ready:
            return {}
        number, self._next = self._next, self._next + 1
        asked: asyncio.Future[Mapping[str, int]] = asyncio.get_running_loop().create_future()
        self._asked[number] = asked
        self._send(ipc.GetStats(number))
        try:
            return await asyncio.wait_for(asked, timeout_s)  # The process's end answers, too.
        except TimeoutError:
            return {}
        finally:
            self._asked.pop(number, None)

    async def close(self) -> None:
        """Fail the turns that run, and end the process; takes a step of the engine's."""
        self._closing.set()
        if self._process is not None:
            self._process.close()
        await asyncio.wait((self._work,))

    def _cancel(self, turn: EngineTurn) -> None:
        if self._forget(turn):
            self._send(ipc.Cancel(turn.number))

    def _hint(self, turn: EngineTurn, buffered_s: float) -> None:
        if turn.number in self._turns:
            self._send(ipc.Hint(turn.number, buffered_s))

    async def _keep_alive(self) -> None:
        try:
            await self._run_until_closed()
        finally:
            self._closing.set()
            self._fail_all("unavailable", SHUTTING_DOWN)
            self._fail_start(ConfigurationError(SHUTTING_DOWN))

    async def _run_until_closed(self) -> None:
        retry_s = RETRY_FIRST_S
        failed = 0
        while not self._closing.is_set():
            began_s = time.monotonic()
            self._load_error = None
            try:
                how = await self._run_once()
            except OSError as error:
                how, self._load_error = "could not be started", str(error)
            was_ready, self._is_ready = self._is_ready, False
            for number in self._asked:
                self._answer(number, {})
            if self._closing.is_set():
                return
            if time.monotonic() - began_s > HEALTHY_S:
                retry_s = RETRY_FIRST_S
            self._after_death()
            failed = 0 if was_ready else failed + 1
            if self._load_error is not None or failed >= START_TRIES:
                why = self._load_error or (
                    f"The engine's process {how} while it loaded the model, {failed} times. If "
                    "that was the system's doing, memory is short: take a smaller model."
                )
                self._fail_all("unavailable", NOT_BACK.format(why))
                self._fail_start(ConfigurationError(why))
                if self._info is None:
                    return
            _log.error(
                "The engine's process %s; it is started again in %.1f s, and %d turns go on then",
                how,
                retry_s,
                len(self._turns),
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), retry_s)
            retry_s = min(retry_s * RETRY_GROWTH, RETRY_MAX_S)

    async def _run_once(self) -> str:
        """Start the process, take what it says until it ends, and return how it did."""
        self._starts += 1
        process = self._process = await Child.start(self._command)
        watching = asyncio.ensure_future(self._watch(process))
        try:
            options = self._options
            process.send(
                ipc.Load(
                    options.model,
                    options.device,
                    options.precision,
                    options.max_running,
                    options.kv,
                    *logs.configured(),
                )
            )
            if self._closing.is_set():
                process.close()
            while (message := await process.read()) is not None:
                self._take(message)
        except msgspec.MsgspecError as error:
            self._load_error = OTHER_RELEASE.format(error)
        finally:
            watching.cancel()
            self._process = None
            code = await process.stop()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended ({code})"

    async def _watch(self, process: Child) -> None:
        """End the process if it is stuck."""
        every_s = self._options.hang_s / CHECKS
        self._watchdog = Watchdog()
        while True:
            await asyncio.sleep(every_s)
            steps = (await self.stats(min(STATS_S, every_s))).get("steps")
            has_work = any(turn.standing.in_engine for turn in self._turns.values())
            if self._watchdog.is_stuck(has_work=self._is_ready and has_work, steps=steps):
                _log.error(
                    "The engine has work and has begun no step for %g s: its process is ended",
                    self._options.hang_s,
                )
                process.kill()
                return

    def _take(self, message: ipc.FromEngine) -> None:
        if isinstance(message, ipc.Step | ipc.Accepted | ipc.Rejected):
            self._watchdog.on_message()
        match message:
            case ipc.Step(occurrences):
                for occurrence in occurrences:
                    self._take_event(occurrence)
            case ipc.Accepted(number, prompt):
                if turn := self._turns.get(number):
                    turn.so_far.prompt = prompt
            case ipc.Rejected(number, code, text):
                if turn := self._turns.get(number):
                    self._end(turn, RequestError(code, text))
            case ipc.Stats(number, counts):
                self._answer(number, counts)
            case ipc.Progress(text, fraction):
                if self._progress is not None and self._info is None:
                    self._progress(text, fraction)
            case ipc.Ready():
                self._on_ready(message)
            case ipc.LoadFailed(text):
                self._load_error = text

    def _take_event(self, occurrence: ipc.Occurrence) -> None:
        turn = self._turns.get(occurrence.turn)
        if turn is None:
            return
        event = ipc.event_of(occurrence)
        if ipc.is_terminal(event):
            self._end(turn, event)
            return
        turn.put(event)
        if isinstance(event, Tokens) and turn.standing.advance(len(event.ids)):
            self._submit_due()

    def _on_ready(self, ready: ipc.Ready) -> None:
        if self._info is not None and self._info.fingerprint != ready.fingerprint:
            self._fail_all("engine_error", OTHER_MODEL)
        if self._info is not None:
            _log.warning("The engine is back; %d turns go on", len(self._turns))
        self._info = ready
        self._is_ready = True
        if not self._started.done():
            self._started.set_result(None)
        self._submit_due()

    def _submit_due(self) -> None:
        """Send the engine the turns that are to be in it and are not."""
        if not self._is_ready:
            return
        chosen = set(due(turn.standing for turn in self._turns.values()))
        for turn in list(self._turns.values()):
            if turn.standing in chosen:
                try:
                    self._send(turn.message())
                except ValueError as error:
                    self._end(turn, RequestError("invalid_request", f"Too long: {error}."))

    def _after_death(self) -> None:
        for turn in list(self._turns.values()):
            turn.standing.on_death()
            if turn.standing.is_guilty:
                _log.error(
                    "A turn was in the engine at %d of its ends; it goes no further", MAX_DEATHS
                )
                self._end(turn, Failure("engine_error", DIED))

    def _end(self, turn: EngineTurn, event: EngineEvent | RequestError) -> None:
        if self._forget(turn):
            turn.put(event)

    def _forget(self, turn: EngineTurn) -> bool:
        if self._turns.pop(turn.number, None) is None:
            return False
        if turn.standing.is_suspect:
            self._submit_due()
        return True

    def _fail_all(self, code: str, message: str) -> None:
        for turn in list(self._turns.values()):
            self._end(turn, Failure(code, message))

    def _fail_start(self, error: ConfigurationError) -> None:
        if not self._started.done():
            self._started.set_exception(error)
            self._started.exception()  # Nobody may be waiting any more.

    def _answer(self, number: int, counts: Mapping[str, int]) -> None:
        asked = self._asked.get(number)
        if asked is not None and not asked.done():
            asked.set_result(counts)

    def _send(self, message: ipc.ToEngine) -> None:
        if self._is_ready and self._process is not None:
            self._process.send(message)
