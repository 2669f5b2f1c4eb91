"""The engine: a thread that owns the model and decodes several turns at once.

Each step: take what came in (submissions, cancels, hints), give rows to waiting turns, and run one
forward: a token for every decoding turn and, as far as the step's time allows, chunks of prompts.
Then share full blocks with the prefix cache, choose tokens, and send what is new.
"""

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from eloquent.errors import ConfigurationError, RequestError
from eloquent_server.engine.attention import KvLayout, Segment
from eloquent_server.engine.budget import STEP_TARGET_S, StepBudget, memory_bytes
from eloquent_server.engine.kv import SlabCache
from eloquent_server.engine.loader import LoadedModel, engine_threads
from eloquent_server.engine.prefix import PrefixCache, Tier
from eloquent_server.engine.radix import BLOCK_TOKENS
from eloquent_server.engine.runner import Runner
from eloquent_server.engine.sampling import Sampler
from eloquent_server.engine.schedule import FairShare, least_urgent, split_budget, to_yield
from eloquent_server.engine.text import TextStream
from eloquent_server.engine.turn import (
    NOT_A_NUMBER,
    SHUTTING_DOWN,
    Emit,
    Turn,
    TurnRequest,
    step_failed,
)

MAX_RUNNING = 8
MEMORY_SHARE = 0.25
"Of the machine's memory, for keys and values, if nothing else is said."
HEADROOM_TOKENS = 64
"A turn gets a row only if it can grow by so much, or it would soon lose it again."

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Cancel:
    turn_id: int


@dataclass(frozen=True, slots=True)
class _Hint:
    turn_id: int
    dry_at: float


@dataclass(frozen=True, slots=True)
class _Restored:
    turn: Turn
    start: int
    blocks: list[torch.Tensor]


class _Close:
    pass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A look at the engine; the counts run since its start."""

    running: int
    waiting: int
    steps: int
    preemptions: int
    kv_bytes: int
    "Keys and values of running turns and of the prefix cache."
    prompt_tokens: int
    "Of prompts whose prefill began."
    cached_tokens: int
    "Of these, taken from the prefix cache."
    restored_tokens: int
    "Tokens read from the second tier."
    computed_prompt_tokens: int
    "Tokens that prefill computed, again ones included."
    evicted_blocks: int


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
        tier: Tier | None = None,
        layout: KvLayout | None = None,
        after_step: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the thread.

        `prefill_chunk_tokens` bounds what a step takes of prompts, which is else a matter of
        `step_target_s`; `kv_bytes` bounds running turns and prefix cache together (a quarter of
        the memory if None), `tenant_bytes` one tenant's part of the prefix cache. `after_step` is
        called in the engine's thread when a step's events are out.

        Raises:
            ConfigurationError: `kv_bytes` holds no turn.
        """
        self._loaded = loaded
        self._tokenizer = loaded.tokenizer.backend_tokenizer
        self._chunk_tokens = prefill_chunk_tokens
        self._clock = clock
        self._after_step = after_step
        budget = int(memory_bytes() * MEMORY_SHARE) if kv_bytes is None else kv_bytes
        self._context = min(
            loaded.context_tokens, budget // loaded.kv.token_bytes - BLOCK_TOKENS - 1
        )
        if self._context < BLOCK_TOKENS:
            raise ConfigurationError(
                f"{budget} bytes for keys and values hold no turn of {loaded.name}, which takes "
                f"{loaded.kv.token_bytes} a token. Give it more."
            )
        self._layout: KvLayout = layout or SlabCache(
            loaded.kv,
            max_tokens=self._context,
            device=torch.device(loaded.model.device),
            rows=max_running,
        )
        self._cache = PrefixCache(
            self._layout,
            budget_bytes=budget,
            tenant_bytes=tenant_bytes,
            fingerprint=loaded.fingerprint,
            tier=tier,
            enabled=prefix_cache,
        )
        self._runner = Runner(loaded.model, self._layout)
        self._budget = StepBudget(target_s=step_target_s)
        self._share = FairShare()
        self._running: list[Turn] = []
        self._waiting: list[Turn] = []
        self._free_rows = list(range(max_running))
        self._blocked = False  # All turns wait for the second tier.
        self._steps = self._preemptions = self._computed = 0
        self._inbox: queue.SimpleQueue[Turn | _Cancel | _Hint | _Restored | _Close] = (
            queue.SimpleQueue()
        )
        self._ids = itertools.count(1)
        self._closed = False
        self._lock = threading.Lock()  # Nothing but deliveries enters the inbox after `_Close`.
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
            sampler=Sampler(
                temperature=request.temperature, top_p=request.top_p, seed=request.seed
            ),
            text=TextStream(self._tokenizer),
            end_tokens=self._loaded.end_tokens,
            emit=emit,
            arrived=arrived,
            dry_at=arrived,
            tenant=request.tenant,
            weight=request.weight,
        )
        turn.replay(request.generated)
        with self._lock:
            if self._closed:
                raise RequestError("unavailable", SHUTTING_DOWN)
            self._inbox.put(turn)
        return turn.id

    def cancel(self, turn_id: int) -> None:
        """End a turn within one step; nothing happens if it has ended already."""
        self._put(_Cancel(turn_id))

    def hint(self, turn_id: int, buffered_s: float) -> None:
        """Say that a turn's reader has text for `buffered_s` more: who runs dry soon goes first."""
        self._put(_Hint(turn_id, self._clock() + buffered_s))

    def stats(self) -> EngineStats:
        """Return counts; they may be a step old."""
        cached = self._cache.stats
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            steps=self._steps,
            preemptions=self._preemptions,
            kv_bytes=self._cache.used_bytes,
            prompt_tokens=cached.prompt_tokens,
            cached_tokens=cached.cached_tokens,
            restored_tokens=cached.restored_tokens,
            computed_prompt_tokens=self._computed,
            evicted_blocks=cached.evicted_blocks,
        )

    def close(self) -> None:
        """Fail all turns, end the thread and wait for it (one step)."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._inbox.put(_Close())
        self._thread.join()

    def _put(self, item: _Cancel | _Hint) -> None:
        with self._lock:
            if not self._closed:
                self._inbox.put(item)

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
        if not request.weight > 0:
            raise RequestError("invalid_request", "A turn's weight must be above zero.")

    # What follows runs in the engine's thread.

    @torch.inference_mode()
    def _run(self) -> None:
        # torch keeps the number per thread, and the event loop needs a core of its own.
        torch.set_num_threads(engine_threads())
        while self._take_inbox():
            try:
                self._step()
            except Exception as error:  # noqa: BLE001 (a defect here; the turns know, and we go on)
                _log.exception("A step of the engine failed")
                self._fail_all("engine_error", step_failed(error))
            if self._after_step:
                self._after_step()
        self._fail_all("unavailable", SHUTTING_DOWN)
        self._cache.close()
        if self._after_step:
            self._after_step()

    def _take_inbox(self) -> bool:
        """Handle what came in, waiting for something if there is no work; False: close."""
        while True:
            idle = self._blocked or not (self._running or self._waiting)
            try:
                item = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            self._blocked = False
            if isinstance(item, _Close):
                return False
            if isinstance(item, Turn):
                self._share.enter(item.tenant)
                self._waiting.append(item)
                item.settle()
            elif isinstance(item, _Restored):
                self._restored(item)
            else:
                for turn in (*self._running, *self._waiting):
                    if turn.id != item.turn_id:
                        continue
                    if isinstance(item, _Cancel):
                        turn.cancel()
                    else:
                        turn.dry_at = item.dry_at
            self._drop_done()

    def _step(self) -> None:
        now = self._clock()
        self._steps += 1
        self._keep_to_budget(now)
        self._admit(now)
        work = self._plan(now)
        self._blocked = not work
        decoding = sum(1 for _, segment in work if len(segment.tokens) == 1)
        prompt_tokens = sum(len(segment.tokens) for _, segment in work) - decoding
        started = self._clock()
        results = self._compute(work)
        self._budget.observe(decoding, prompt_tokens, self._clock() - started)
        self._computed += prompt_tokens
        self._take_in(results, now)
        self._drop_done()

    def _keep_to_budget(self, now: float) -> None:
        """Let the prefix cache give way to growing turns, then turns to each other."""
        self._count_rows()
        while not self._cache.make_room(0) and len(self._running) > 1:
            self._preempt(least_urgent(self._running), now)

    def _admit(self, now: float) -> None:
        """Give rows to waiting turns, in order, while there are rows and memory."""
        for turn in self._share.order(self._waiting):
            while not (self._free_rows and self._has_room(turn)):
                loser = to_yield(self._running, turn, now)
                if not loser:
                    return
                self._preempt(loser, now)
            turn.row = min(self._free_rows)
            self._free_rows.remove(turn.row)
            turn.ran = 0
            if not turn.started:
                turn.started = True
                self._cache.stats.prompt_tokens += turn.prompt_tokens
            self._waiting.remove(turn)
            self._running.append(turn)
            self._count_rows()

    def _has_room(self, turn: Turn) -> bool:
        needed = _reserved(turn)
        if not self._running:
            return self._cache.make_room(needed)
        return self._cache.make_room(needed + HEADROOM_TOKENS)

    def _plan(self, now: float) -> list[tuple[Turn, Segment]]:
        """Choose the step's tokens: one of each decoding turn, then prompts within the budget."""
        work: list[tuple[Turn, Segment]] = []
        prompts: list[Turn] = []
        for turn in self._share.order(self._running):
            if turn.restoring:
                continue
            if turn.pending > 1:
                self._cache.take(turn, now)
            if turn.pending == 1:
                work.append((turn, _segment(turn, 1)))
            elif self._restore(turn) or self._cache.must_wait(turn):
                continue
            else:
                self._cache.claim(turn)
                prompts.append(turn)
        budget = self._budget.tokens(len(work))
        if self._chunk_tokens is not None:
            budget = min(budget, self._chunk_tokens)
        shares = split_budget(prompts, budget, _to_block_end)
        work += [(t, _segment(t, n)) for t, n in zip(prompts, shares, strict=True) if n]
        return work

    def _restore(self, turn: Turn) -> bool:
        if turn.tier_failed:
            return False

        def done(start: int, blocks: list[torch.Tensor]) -> None:
            self._inbox.put(_Restored(turn, start, blocks))

        turn.restoring = self._cache.restore(turn, done)
        return turn.restoring

    def _restored(self, item: _Restored) -> None:
        turn = item.turn
        turn.restoring = False
        turn.tier_failed = not item.blocks
        if not turn.done:
            self._cache.restored(turn, item.start, item.blocks)

    def _compute(
        self, work: Sequence[tuple[Turn, Segment]]
    ) -> list[tuple[Turn, Segment, torch.Tensor]]:
        """Run one forward; if it fails, one for each turn, to find the culprit."""
        if not work:
            return []
        try:
            logits = self._runner.run([segment for _, segment in work])
        except Exception as error:  # noqa: BLE001 (whatever torch or the model raises)
            if len(work) == 1:
                _log.exception("A turn failed alone")
                work[0][0].fail("engine_error", step_failed(error))
                return []
            _log.warning("A step failed (%s); trying its turns one by one", error)
        else:
            return [(*item, rows) for item, rows in zip(work, logits, strict=True)]
        return [result for item in work for result in self._compute([item])]

    def _take_in(self, results: Sequence[tuple[Turn, Segment, torch.Tensor]], now: float) -> None:
        """Share what was computed, choose tokens from the logits, and send what is new."""
        if not results:
            return
        greatest, greedy = torch.stack([logits[-1] for _, _, logits in results]).max(dim=-1)
        sound, tokens = torch.isfinite(greatest).tolist(), greedy.tolist()
        for i, (turn, segment, logits) in enumerate(results):
            if not sound[i]:
                # Keys and values after a NaN are NaN, too: none may reach the prefix cache.
                turn.poisoned = True
                turn.fail("engine_error", NOT_A_NUMBER)
                continue
            turn.cached = segment.end
            turn.reached = max(turn.reached, turn.cached)
            self._cache.publish(turn, now)
            if turn.pending:
                self._share.charge(turn, prompt=len(segment.tokens))
                continue
            self._share.charge(turn, prompt=len(segment.tokens) - 1, decoded=1)
            self._cache.disclaim(turn)
            turn.dry_at = max(turn.dry_at, now)
            try:
                turn.accept(tokens[i] if turn.sampler.greedy else turn.sampler.choose(logits[-1]))
            except Exception as error:  # noqa: BLE001 (sampler or tokenizer; this turn's)
                _log.exception("A token could not be chosen or decoded")
                turn.fail("engine_error", step_failed(error))
            turn.flush()

    def _preempt(self, turn: Turn, now: float) -> None:
        """Take a turn's row; it waits, and takes its blocks back when it goes on."""
        self._preemptions += 1
        self._running.remove(turn)
        self._count_rows()
        self._leave_row(turn, now)
        self._waiting.append(turn)

    def _leave_row(self, turn: Turn, now: float) -> None:
        assert turn.row is not None
        self._cache.disclaim(turn)
        if not turn.poisoned:
            self._cache.publish(turn, now, again=True)
            self._cache.persist(turn)
        self._layout.free(turn.row, clear=turn.poisoned)
        self._free_rows.append(turn.row)
        turn.row = None
        turn.cached = turn.published = 0

    def _count_rows(self) -> None:
        self._cache.set_row_tokens(sum(_reserved(turn) for turn in self._running))

    def _drop_done(self) -> None:
        """Forget turns that ended and free their rows."""
        for turns in (self._waiting, self._running):
            for turn in [turn for turn in turns if turn.done]:
                turns.remove(turn)
                self._share.leave(turn.tenant)
                if turn.row is not None:
                    self._count_rows()
                    self._leave_row(turn, self._clock())
        self._share.tidy()

    def _fail_all(self, code: str, message: str) -> None:
        for turn in (*self._running, *self._waiting):
            turn.fail(code, message)
        self._drop_done()


def _segment(turn: Turn, count: int) -> Segment:
    return Segment(turn.row or 0, turn.cached, turn.tokens[turn.cached : turn.cached + count])


def _to_block_end(turn: Turn, count: int) -> int:
    """Shorten a chunk so that it ends with a block, unless it ends with the prompt."""
    if count == turn.pending:
        return count
    cut = count - (turn.cached + count) % BLOCK_TOKENS
    return cut if cut > 0 else count


def _reserved(turn: Turn) -> int:
    """Tokens that the turn needs in its row up to the next one, in whole blocks."""
    return (len(turn.tokens) // BLOCK_TOKENS + 1) * BLOCK_TOKENS
