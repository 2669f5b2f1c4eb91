"""The engine: a thread that owns the model, and the queue in front of it."""

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable

import torch

from eloquent.errors import ConfigurationError, RequestError
from eloquent_server.engine.attention import KvLayout
from eloquent_server.engine.budget import STEP_TARGET_S, StepBudget, memory_bytes
from eloquent_server.engine.core import Core, EngineStats
from eloquent_server.engine.grammar import TokenTable
from eloquent_server.engine.layouts import layout_for
from eloquent_server.engine.loader import LoadedModel, engine_threads
from eloquent_server.engine.prefix import PrefixCache, Tier
from eloquent_server.engine.radix import BLOCK_TOKENS
from eloquent_server.engine.runner import Runner
from eloquent_server.engine.sampling import Sampler
from eloquent_server.engine.text import AnswerText
from eloquent_server.engine.turn import SHUTTING_DOWN, Emit, Turn, TurnRequest, step_failed

MAX_RUNNING = 8
MEMORY_SHARE = 0.25
"Of the machine's memory, for keys and values, if nothing else is said."
CUDA_MEMORY_SHARE = 0.8
"Of what the model left free on its device."
CUDA_ROWS_SHARE = 0.5
"Of that, for running turns; the rest is the prefix cache's."
SLACK_TOKENS = 2 * BLOCK_TOKENS
"A turn reserves whole blocks, one token ahead."

_log = logging.getLogger(__name__)


class Engine:
    """Decodes turns of one model; its methods may be called from any thread.

    Greedy answers do not depend on what else is running, nor on what is cached, in float32.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_running: int = MAX_RUNNING,
        prefill_chunk_tokens: int | None = None,
        step_target_s: float = STEP_TARGET_S,
        kv_bytes: int | None = None,
        tenant_bytes: int | None = None,
        prefix_cache: bool = True,
        speculate: bool = False,
        threads: int | None = None,
        tier: Tier | None = None,
        layout: KvLayout | None = None,
        after_step: Callable[[], None] | None = None,
        on_broken: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the thread.

        `prefill_chunk_tokens` bounds what a step takes of prompts, which is else a matter of
        `step_target_s`; `kv_bytes` bounds running turns and prefix cache together (a quarter of
        the memory if None), `tenant_bytes` one tenant's part of the prefix cache. `speculate`
        lets a step bring a turn several tokens, the same ones. `after_step` is called in the
        engine's thread when a step's events are out. `on_broken` is called where the device is of
        no further use to this process, instead of failing all turns. `threads` are torch's; None:
        `engine_threads`.

        Raises:
            ConfigurationError: `kv_bytes` holds no turn.
        """
        self._loaded = loaded
        self._tokenizer = loaded.tokenizer.backend_tokenizer
        self._table = TokenTable(
            loaded.tokenizer, vocab_tokens=loaded.vocab_tokens, end_tokens=loaded.end_tokens
        )
        self._clock = clock
        self._threads = threads
        self._after_step = after_step
        self._on_broken = on_broken
        budget = _default_bytes(loaded) if kv_bytes is None else kv_bytes
        self._context = min(loaded.context_tokens, budget // loaded.kv.token_bytes - SLACK_TOKENS)
        if self._context < BLOCK_TOKENS:
            raise ConfigurationError(
                f"{budget} bytes for keys and values hold no turn of {loaded.name}, which takes "
                f"{loaded.kv.token_bytes} a token. Give it more."
            )
        if layout is None:
            layout = layout_for(
                loaded.kv,
                torch.device(loaded.model.device),
                rows=max_running,
                row_tokens=self._context + SLACK_TOKENS,
                most_bytes=int(budget * CUDA_ROWS_SHARE),
            )
        self._context = min(self._context, layout.capacity_tokens - SLACK_TOKENS)
        self._cache = PrefixCache(
            layout,
            budget_bytes=budget,
            tenant_bytes=tenant_bytes,
            fingerprint=loaded.fingerprint,
            tier=tier,
            enabled=prefix_cache,
        )
        # What is to be done in the engine's thread; None: close.
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._core = Core(
            Runner(loaded.model, layout),
            self._cache,
            StepBudget(target_s=step_target_s),
            rows=max_running,
            clock=clock,
            chunk_tokens=prefill_chunk_tokens,
            speculate=speculate,
            deliver=self._inbox.put,
        )
        self._ids = itertools.count(1)
        self._closed = False
        self._lock = threading.Lock()  # No turn enters the inbox after the end.
        self._thread = threading.Thread(target=self._run, name="eloquent-engine", daemon=True)
        self._thread.start()

    def submit(self, request: TurnRequest, emit: Emit) -> int:
        """Queue a turn and return its id; its events go to `emit`, exactly one terminal one.

        Raises:
            RequestError: `prompt_too_long`, `invalid_request` (it is empty, or not of this model)
                or `unavailable`.
        """
        self._check(request)
        length = len(request.prompt)
        room = self._context - length
        arrived = self._clock()
        turn = Turn(
            id=next(self._ids),
            tokens=list(request.prompt),
            prompt_tokens=length,
            token_limit=room if request.max_tokens is None else min(request.max_tokens, room),
            sampler=Sampler(request, prompt_tokens=length, table=self._table),
            text=AnswerText(self._tokenizer, request.stop),
            end_tokens=self._loaded.end_tokens,
            emit=emit,
            arrived=arrived,
            dry_at=arrived,
            tenant=request.tenant,
            weight=request.weight,
        )
        turn.replay(request)
        with self._lock:
            if self._closed:
                raise RequestError("unavailable", SHUTTING_DOWN)
            self._inbox.put(lambda: self._core.add(turn))
        return turn.id

    def cancel(self, turn_id: int) -> None:
        """End a turn within one step; nothing happens if it has ended already."""
        self._put(lambda: self._core.cancel(turn_id))

    def hint(self, turn_id: int, buffered_s: float) -> None:
        """Say that a turn's reader has text for `buffered_s` more: who runs dry soon goes first."""
        dry_at = self._clock() + buffered_s
        self._put(lambda: self._core.hint(turn_id, dry_at))

    def stats(self) -> EngineStats:
        """Return counts; they may be a step old."""
        return self._core.stats()

    def close(self) -> None:
        """Fail all turns, end the thread and wait for it (one step)."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._inbox.put(None)
        self._thread.join()

    def _put(self, call: Callable[[], None]) -> None:
        with self._lock:
            if not self._closed:
                self._inbox.put(call)

    def _check(self, request: TurnRequest) -> None:
        length, context = len(request.prompt), self._context
        if length == 0:
            raise RequestError("invalid_request", "The prompt is empty; send some text.")
        if length > context - 1:
            raise RequestError(
                "prompt_too_long",
                f"The conversation has {length} tokens, but the model takes {context} of prompt "
                "and answer together. Shorten it or start a new one.",
            )
        vocab = self._loaded.vocab_tokens
        for token in (*request.prompt, *request.generated):
            if not 0 <= token < vocab:
                raise RequestError(
                    "invalid_request",
                    f"The prompt holds the token {token}, but the model's tokens are 0 to "
                    f"{vocab - 1}. It was encoded for another model; encode it with this one's "
                    "tokenizer.",
                )
        for token, _ in request.logit_bias:
            if not 0 <= token < vocab:
                raise RequestError(
                    "invalid_request",
                    f"`logit_bias` names the token {token}, but the model's are 0 to {vocab - 1}.",
                )
        if not request.weight > 0:
            raise RequestError("invalid_request", "A turn's weight must be above zero.")

    @torch.inference_mode()
    def _run(self) -> None:
        # torch keeps the number per thread, and the event loop needs a core of its own.
        torch.set_num_threads(self._threads or engine_threads())
        while self._take_inbox():
            if self._core.ready:
                self._guarded(self._core.step)
            self._flush()
        self._core.fail_all("unavailable", SHUTTING_DOWN)
        self._cache.close()
        self._flush()

    def _take_inbox(self) -> bool:
        """Do what came in, waiting for something if there is no work; False: close."""
        wait = not self._core.ready
        while True:
            try:
                call = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if call is None:
                return False
            self._guarded(call)
            wait = False

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 (a defect here; the turns know, and we go on)
            if isinstance(error, torch.AcceleratorError) and self._on_broken is not None:
                _log.critical("The device is lost to this process: %s", error)
                self._on_broken()
            _log.exception("A step of the engine failed")
            self._core.fail_all("engine_error", step_failed(error))

    def _flush(self) -> None:
        if self._after_step:
            self._after_step()


def _default_bytes(loaded: LoadedModel) -> int:
    device = torch.device(loaded.model.device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * CUDA_MEMORY_SHARE)
    return int(memory_bytes() * MEMORY_SHARE)
