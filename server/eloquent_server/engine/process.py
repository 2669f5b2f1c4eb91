"""The engine's process: `python -m eloquent_server.engine.process FD PARENT`.

`FD` is its end of a socket pair, `PARENT` the server's process id. Threads: the main one loads the
model and waits for the end; one reads what the server says and never waits for anything else; one
encodes prompts; one writes; and the engine's own, which owns the model. If the server is gone,
the process ends within `END_S`.
"""

import contextlib
import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from eloquent.errors import ConfigurationError, RequestError
from eloquent_server import logs, models
from eloquent_server.backends.base import Finish
from eloquent_server.chat import ChatRequest, parse_chat_body
from eloquent_server.engine import ipc
from eloquent_server.engine.memo import ReplyMemo
from eloquent_server.engine.options import sampling_fields
from eloquent_server.engine.turn import EngineEvent, Tokens, TurnRequest

if TYPE_CHECKING:
    from eloquent_server.engine.engine import Engine
    from eloquent_server.engine.loader import LoadedModel
    from eloquent_server.engine.prompt import PromptEncoder

END_S = 1.5
"An engine whose server is gone, and that has not ended after this time, is ended the hard way."

MAX_UNSENT = 1024
"Messages. If the server takes none of so many, steps wait."

OOM_SCORE = 500
"The kernel, if memory runs out, ends this process rather than the server (proc(5))."

BROKEN = 70
"Exit code: the device does not work for this process any more."

_PR_SET_PDEATHSIG = 1

_log = logging.getLogger(__name__)

Loader = Callable[[ipc.Load, models.Progress], "LoadedModel"]
"Loads the model; raises `ConfigurationError` where that is not possible."


def load_model(options: ipc.Load, progress: models.Progress) -> "LoadedModel":
    """Fetch the model if needed, and load it.

    Raises:
        ConfigurationError: packages are missing, there is no such model or device, the model
            cannot be fetched, or the engine does not support it.
    """
    source = models.resolve(options.model, progress=progress)
    progress(f"Loading {source.name}", None)
    from eloquent_server.engine.loader import load

    return load(
        source.path,
        source.name,
        device=options.device,
        precision=options.precision,
        say=lambda text: progress(text, None),
    )


def main(load: Loader = load_model) -> None:
    """Run the process that `sys.argv` describes; `load` is another one in tests."""
    descriptor, parent = map(int, sys.argv[1:3])
    _end_with(parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # They are for the server, which tells us.
    with contextlib.suppress(OSError):  # Not on Linux, or not allowed: then as anybody.
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    with socket.socket(fileno=descriptor) as channel:
        first = ipc.receive(channel)
        if isinstance(first, ipc.Load):
            logs.configure(first.log_level, first.log_format)
            EngineProcess(channel).run(first, load)


class EngineProcess:
    """The process's end of the channel, and the engine behind it."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._outbox: queue.Queue[ipc.FromEngine | None] = queue.Queue(MAX_UNSENT)
        self._submitted: queue.SimpleQueue[ipc.Submit | None] = queue.SimpleQueue()
        self._step: list[tuple[int, EngineEvent]] = []
        "What the running step has brought so far; the engine's thread alone touches it."
        self._lock = threading.Lock()
        self._turns: dict[int, int | None] = {}
        "The engine's id of each of the server's turns that has not ended; None: not there yet."
        self._cancelled: set[int] = set()
        "Of those that are not there yet."
        self._memo = ReplyMemo()
        self._engine: Engine | None = None
        self._end = threading.Event()

    def run(self, options: ipc.Load, load: Loader) -> None:
        """Load, then serve until the server says or is no more."""
        reading = threading.Thread(target=self._read, name="ipc-read", daemon=True)
        writing = threading.Thread(target=self._write, name="ipc-write", daemon=True)
        reading.start()
        writing.start()
        try:
            self._load(options, load)
        except ConfigurationError as error:
            self._put(ipc.LoadFailed(str(error)))
        else:
            self._end.wait()
        if self._engine is not None:
            self._submitted.put(None)
            self._engine.close()
        self._outbox.put(None)
        writing.join()

    def _load(self, options: ipc.Load, load: Loader) -> None:
        loaded = load(options, lambda text, done: self._put(ipc.Progress(text, done)))
        from eloquent_server.engine.engine import MAX_RUNNING, Engine
        from eloquent_server.engine.prompt import PromptEncoder
        from eloquent_server.engine.tiers import open_tier

        self._engine = engine = Engine(
            loaded,
            max_running=options.max_running or MAX_RUNNING,
            kv_bytes=options.kv.memory_bytes,
            tenant_bytes=options.kv.tenant_bytes,
            tier=open_tier(loaded.kv, options.kv),
            speculate=True,
            after_step=self._send_step,
            on_broken=self._break_off,
        )
        prompts = PromptEncoder(loaded.tokenizer)
        threading.Thread(
            target=self._submit_all, args=(engine, loaded, prompts), name="prompts", daemon=True
        ).start()
        self._put(ipc.Ready(loaded.name, loaded.context_tokens, loaded.fingerprint))

    def _put(self, message: ipc.FromEngine) -> None:
        self._outbox.put(message)

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._channel.sendall(ipc.encode_frame(message))
            except OSError:
                return  # The server is gone; the reader knows it, too.

    def _read(self) -> None:
        try:
            while (message := ipc.receive(self._channel)) is not None:
                if isinstance(message, ipc.Close):
                    self._finish()
                else:
                    self._take(message)
        finally:
            _Deadline().start()
            self._finish()

    def _finish(self) -> None:
        if self._engine is None:
            os._exit(0)  # Loading cannot be interrupted, and nothing is lost.
        self._end.set()

    def _take(self, message: ipc.ToEngine) -> None:
        """Do what the server says, without waiting."""
        engine = self._engine
        assert engine is not None, "the server spoke before `Ready`"
        if isinstance(message, ipc.Submit):
            with self._lock:
                self._turns[message.turn] = None
            self._submitted.put(message)
        elif isinstance(message, ipc.GetStats):
            counts = msgspec.to_builtins(engine.stats())
            with contextlib.suppress(queue.Full):  # Who does not read gets no stats.
                self._outbox.put_nowait(ipc.Stats(message.number, counts))
        elif isinstance(message, ipc.Cancel | ipc.Hint):
            with self._lock:
                turn_id = self._turns.get(message.turn)
                if isinstance(message, ipc.Hint):
                    if turn_id is not None:
                        engine.hint(turn_id, message.buffered_s)
                elif turn_id is not None:
                    engine.cancel(turn_id)
                elif message.turn in self._turns:
                    self._cancelled.add(message.turn)

    def _submit_all(
        self, engine: "Engine", loaded: "LoadedModel", prompts: "PromptEncoder"
    ) -> None:
        """Encode prompts, one after another, and hand them to the engine."""
        while (message := self._submitted.get()) is not None:
            try:
                self._submit(message, engine, loaded, prompts)
            except RequestError as error:
                self._reject(message.turn, error.code, error.message)
            except Exception:  # noqa: BLE001 (the tokenizer's; it ends this turn and no other)
                _log.exception("A prompt could not be encoded")
                self._reject(
                    message.turn,
                    "engine_error",
                    "The conversation could not be encoded for the model; the server's log has the "
                    "reason. Ask in other words.",
                )

    def _submit(
        self, message: ipc.Submit, engine: "Engine", loaded: "LoadedModel", prompts: "PromptEncoder"
    ) -> None:
        turn = message.turn
        with self._lock:
            is_cancelled = turn in self._cancelled
            if is_cancelled:
                self._forget(turn)
        if is_cancelled:
            self._put(ipc.step_of([(turn, Finish("cancelled", 0, 0))]))
            return
        request = parse_chat_body(message.request)
        prompt = message.prompt
        if prompt is None:
            prompt = prompts.encode(
                request.messages, recall=lambda text: self._memo.recall(message.tenant, text)
            )
        self._put(ipc.Accepted(turn, prompt))

        reply = list(message.generated)

        def emit(event: EngineEvent) -> None:
            if isinstance(event, Tokens):
                reply.extend(event.ids)
            elif isinstance(event, Finish):
                self._memo.learn(message.tenant, reply, loaded.tokenizer)
            if ipc.is_terminal(event):
                with self._lock:
                    self._forget(turn)
            self._step.append((turn, event))

        turn_id = engine.submit(_turn_request(message, request, prompt, loaded), emit)
        with self._lock:
            if turn in self._turns:
                self._turns[turn] = turn_id
                if turn in self._cancelled:
                    self._cancelled.discard(turn)
                    engine.cancel(turn_id)

    def _reject(self, turn: int, code: str, message: str) -> None:
        with self._lock:
            self._forget(turn)
        self._put(ipc.Rejected(turn, code, message))

    def _forget(self, turn: int) -> None:
        self._turns.pop(turn, None)
        self._cancelled.discard(turn)

    def _break_off(self) -> None:
        """End: the server starts another process, and the turns go on in that."""
        os._exit(BROKEN)

    def _send_step(self) -> None:
        if self._step:
            self._put(ipc.step_of(self._step))
            self._step.clear()


def _turn_request(
    message: ipc.Submit, request: ChatRequest, prompt: Sequence[int], loaded: "LoadedModel"
) -> TurnRequest:
    """Return what the engine is to generate; what the request leaves open is as the model says."""
    return TurnRequest(
        prompt=prompt,
        max_tokens=request.token_limit,
        generated=message.generated,
        emitted_chars=message.emitted_chars,
        emitted_logprobs=message.emitted_logprobs,
        cached_tokens=message.cached_tokens,
        tenant=message.tenant,
        weight=message.weight,
        **sampling_fields(
            request, temperature=loaded.temperature, top_p=loaded.top_p, seed=message.seed
        ),
    )


class _Deadline(threading.Thread):
    """Ends the process if it has not ended itself in time."""

    def __init__(self) -> None:
        super().__init__(name="deadline", daemon=True)

    def run(self) -> None:
        threading.Event().wait(END_S)
        os._exit(1)


def _end_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends, where it can (Linux, prctl(2))."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()  # It ended before that.


if __name__ == "__main__":
    main()
