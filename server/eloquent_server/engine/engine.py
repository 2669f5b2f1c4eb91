"""The engine: a thread that owns the model and decodes several turns at once.

Each step: take what came in (submissions, cancels), one chunk of one waiting prompt, one token for
every running turn. So a cancel waits for one step at most, and a long prompt delays the others by
one chunk per step.
"""

import itertools
import logging
import queue
import threading
from collections import deque
from dataclasses import dataclass

import torch

from eloquent.errors import RequestError
from eloquent_server.engine.kv import SlotCache
from eloquent_server.engine.loader import LoadedModel, engine_threads
from eloquent_server.engine.runner import Runner
from eloquent_server.engine.sampling import Sampler
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
PREFILL_CHUNK_TOKENS = 256
BUSY_PREFILL_CHUNK_TOKENS = 64
"While others decode: their gap grows by the time of one chunk."

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Cancel:
    turn_id: int


class _Close:
    pass


class Engine:
    """Decodes turns of one model; `submit`, `cancel` and `close` may be called from any thread.

    Greedy answers do not depend on what else is running, in float32.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_running: int = MAX_RUNNING,
        prefill_chunk_tokens: int = PREFILL_CHUNK_TOKENS,
    ) -> None:
        self._loaded = loaded
        self._tokenizer = loaded.tokenizer.backend_tokenizer
        self._max_running = max_running
        self._chunk_tokens = prefill_chunk_tokens
        self._cache = SlotCache(
            max_tokens=loaded.context_tokens, device=loaded.model.device, rows=max_running
        )
        self._runner = Runner(loaded.model, self._cache)
        # Turn i of `_running` decodes in row i; the prompt being prefilled has the row after them.
        self._running: list[Turn] = []
        self._prefilling: Turn | None = None
        self._waiting: deque[Turn] = deque()
        self._inbox: queue.SimpleQueue[Turn | _Cancel | _Close] = queue.SimpleQueue()
        self._ids = itertools.count(1)
        self._closed = False
        self._lock = threading.Lock()  # Nothing enters the inbox after `_Close`.
        self._thread = threading.Thread(target=self._run, name="eloquent-engine", daemon=True)
        self._thread.start()

    def submit(self, request: TurnRequest, emit: Emit) -> int:
        """Queue a turn and return its id; its events go to `emit`, exactly one terminal one.

        Raises:
            RequestError: `prompt_too_long`, `invalid_request` (it is empty) or `unavailable`.
        """
        context, length = self._loaded.context_tokens, len(request.prompt)
        if length == 0:
            raise RequestError("invalid_request", "The prompt is empty; send some text.")
        if length > context - 1:
            raise RequestError(
                "prompt_too_long",
                f"The conversation has {length} tokens, but the model takes {context} of prompt "
                "and answer together. Shorten it or start a new one.",
            )
        room = context - length
        turn = Turn(
            id=next(self._ids),
            prompt=list(request.prompt),
            token_limit=room if request.max_tokens is None else min(request.max_tokens, room),
            sampler=Sampler(
                temperature=request.temperature, top_p=request.top_p, seed=request.seed
            ),
            text=TextStream(self._tokenizer),
            end_tokens=self._loaded.end_tokens,
            emit=emit,
        )
        with self._lock:
            if self._closed:
                raise RequestError("unavailable", SHUTTING_DOWN)
            self._inbox.put(turn)
        return turn.id

    def cancel(self, turn_id: int) -> None:
        """End a turn within one step; nothing happens if it has ended already."""
        with self._lock:
            if not self._closed:
                self._inbox.put(_Cancel(turn_id))

    def close(self) -> None:
        """Fail all turns, end the thread and wait for it (one step)."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._inbox.put(_Close())
        self._thread.join()

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
        self._fail_all("unavailable", SHUTTING_DOWN)

    def _take_inbox(self) -> bool:
        """Handle what came in, waiting for something if there is no work; False: close."""
        while True:
            try:
                item = self._inbox.get(block=not self._busy())
            except queue.Empty:
                return True
            if isinstance(item, Turn):
                self._waiting.append(item)
            elif isinstance(item, _Cancel):
                for turn in self._turns():
                    if turn.id == item.turn_id:
                        turn.cancel()
                self._drop_done()
            else:
                return False

    def _busy(self) -> bool:
        return bool(self._running or self._prefilling or self._waiting)

    def _turns(self) -> list[Turn]:
        prefilling = [self._prefilling] if self._prefilling else []
        return [*self._running, *prefilling, *self._waiting]

    def _step(self) -> None:
        if not self._prefilling and self._waiting and len(self._running) < self._max_running:
            self._prefilling = self._waiting.popleft()
        if self._prefilling:
            self._prefill(self._prefilling)
        if self._running:
            self._decode()
        self._drop_done()

    def _prefill(self, turn: Turn) -> None:
        """Take one chunk of the prompt; after the last one the turn has its first token."""
        row = len(self._running)
        busy = BUSY_PREFILL_CHUNK_TOKENS if self._running else self._chunk_tokens
        count = min(self._chunk_tokens, busy)
        chunk = turn.prompt[turn.prefilled : turn.prefilled + count]
        try:
            logits = self._runner.prefill(row, chunk, turn.prefilled)
        except Exception as error:  # noqa: BLE001 (whatever torch raises is this turn's)
            _log.exception("Prefill failed")
            self._fail(turn, row, step_failed(error))
        else:
            turn.prefilled += len(chunk)
            if turn.prefilled < len(turn.prompt):
                return
            self._running.append(turn)
            self._prefilling = None
            self._choose([turn], logits[None], row)
        self._drop_done()

    def _decode(self) -> None:
        """One token for every running turn; if that fails, one by one, to find the culprit."""
        try:
            together = self._decode_rows(0, self._running)
        except Exception:  # noqa: BLE001 (whatever torch or the model raises)
            _log.exception("A decode step failed; trying its turns one by one")
        else:
            self._choose(self._running, together, 0)
            return
        for row, turn in enumerate(self._running):
            try:
                logits = self._decode_rows(row, [turn])
            except Exception as error:  # noqa: BLE001 (the same, now known to be this turn's)
                _log.exception("The turn failed alone, too")
                self._fail(turn, row, step_failed(error))
            else:
                self._choose([turn], logits, row)

    def _decode_rows(self, first_row: int, turns: list[Turn]) -> torch.Tensor:
        tokens = [turn.last_token for turn in turns]
        return self._runner.decode(first_row, tokens, [turn.position for turn in turns])

    def _choose(self, turns: list[Turn], logits: torch.Tensor, first_row: int) -> None:
        """Choose a token for each turn from its row of logits, [turns, vocab]."""
        greatest, tokens = logits.max(dim=-1)
        sound = torch.isfinite(greatest).tolist()
        greedy = tokens.tolist()
        for i, turn in enumerate(turns):
            if not sound[i]:
                self._fail(turn, first_row + i, NOT_A_NUMBER)
                continue
            try:
                turn.accept(greedy[i] if turn.sampler.greedy else turn.sampler.choose(logits[i]))
            except Exception as error:  # noqa: BLE001 (sampler or tokenizer; this turn's)
                _log.exception("A token could not be chosen or decoded")
                self._fail(turn, first_row + i, step_failed(error))

    def _fail(self, turn: Turn, row: int, message: str) -> None:
        turn.fail("engine_error", message)
        self._cache.clear_row(row)

    def _fail_all(self, code: str, message: str) -> None:
        for turn in self._turns():
            turn.fail(code, message)
        self._running.clear()
        self._prefilling = None
        self._waiting.clear()
        self._cache.release()

    def _drop_done(self) -> None:
        """Forget turns that ended and close the gaps that they leave in the cache."""
        self._waiting = deque(turn for turn in self._waiting if not turn.done)
        if self._prefilling and self._prefilling.done:
            self._prefilling = None
        for row in reversed(range(len(self._running))):
            if self._running[row].done:
                self._remove_row(row)
        if not self._busy():
            self._cache.release()

    def _remove_row(self, row: int) -> None:
        last = len(self._running) - 1
        moved = self._running.pop()
        if row != last:
            self._running[row] = moved
            self._cache.move_row(last, row, moved.position)
        if self._prefilling:
            self._cache.move_row(last + 1, last, self._prefilling.prefilled)
