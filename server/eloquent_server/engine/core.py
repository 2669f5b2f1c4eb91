"""The engine's steps, without thread or queue: what runs next, one forward, what comes of it.

Each step gives rows to waiting turns and runs one forward: a token for every decoding turn and, as
far as the step's time allows, chunks of prompts. Then full blocks are shared with the prefix cache,
tokens are chosen, and what is new is sent.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from eloquent_server.engine.attention import Segment
from eloquent_server.engine.budget import StepBudget
from eloquent_server.engine.prefix import PrefixCache
from eloquent_server.engine.radix import BLOCK_TOKENS
from eloquent_server.engine.runner import Runner
from eloquent_server.engine.schedule import FairShare, split_budget
from eloquent_server.engine.speculation import MOST_TURNS, StepCost
from eloquent_server.engine.turn import NOT_A_NUMBER, Turn, step_failed

LEAST_CUT = 0.75
"Of a chunk that is cut at a block's end, so much must remain."
HEADROOM_TOKENS = 64
"A turn gets a row only if it can grow by so much, or it would soon lose it again."

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A look at the engine; the counts run since its start."""

    running: int
    waiting: int
    steps: int
    preemptions: int
    kv_bytes: int
    "Keys and values of running turns and of the prefix cache."
    kv_capacity_bytes: int
    "What they may take."
    prompt_tokens: int
    "Of prompts whose prefill began."
    cached_tokens: int
    "Of these, taken from the prefix cache."
    restored_tokens: int
    "Tokens read from the second tier."
    computed_prompt_tokens: int
    "Tokens that prefill computed, again ones included."
    evicted_blocks: int
    guessed_tokens: int
    "Tokens that speculation put before the model."
    guessed_right_tokens: int
    "Of these, kept."


class Core:
    """The turns of one model and their steps; everything happens in the caller's thread."""

    def __init__(
        self,
        runner: Runner,
        cache: PrefixCache,
        budget: StepBudget,
        *,
        rows: int,
        clock: Callable[[], float],
        chunk_tokens: int | None = None,
        speculate: bool = False,
        deliver: Callable[[Callable[[], None]], None] = lambda call: call(),
    ) -> None:
        """Start without turns.

        `deliver` takes calls from other threads (the second tier's) and must have them made in this
        one between steps.
        """
        self._runner = runner
        self._cache = cache
        self._budget = budget
        self._clock = clock
        self._chunk_tokens = chunk_tokens
        self._speculate = speculate
        self._step_cost = StepCost()
        self._deliver = deliver
        self._share = FairShare()
        self._running: list[Turn] = []
        self._waiting: list[Turn] = []
        self._free_rows = list(range(rows))
        self._ready = True
        self._steps = self._preemptions = self._computed = 0
        self._guessed = self._guessed_right = 0

    @property
    def ready(self) -> bool:
        """Whether a step would do anything: there are turns, and not all wait for the tier."""
        return self._ready and bool(self._running or self._waiting)

    def add(self, turn: Turn) -> None:
        """Take a new turn in."""
        self._share.enter(turn.tenant)
        self._waiting.append(turn)
        self._ready = True
        turn.settle()
        self._drop_done()

    def cancel(self, turn_id: int) -> None:
        """End a turn, if it is still there."""
        for turn in self._turns():
            if turn.id == turn_id:
                turn.cancel()
        self._ready = True
        self._drop_done()

    def hint(self, turn_id: int, dry_at: float) -> None:
        """Say when a turn's reader will have read all that is out.

        A turn that waits can only be brought forward, so that nobody starves whose reader rests.
        """
        for turn in self._turns():
            if turn.id == turn_id:
                turn.dry_at = dry_at if turn.row is not None else min(turn.dry_at, dry_at)

    def fail_all(self, code: str, message: str) -> None:
        """End all turns because of an error."""
        for turn in self._turns():
            turn.fail(code, message)
        self._drop_done()

    def stats(self) -> EngineStats:
        """Return counts; they may be a step old."""
        cached = self._cache.stats
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            steps=self._steps,
            preemptions=self._preemptions,
            kv_bytes=self._cache.used_bytes,
            kv_capacity_bytes=self._cache.budget_bytes,
            prompt_tokens=cached.prompt_tokens,
            cached_tokens=cached.cached_tokens,
            restored_tokens=cached.restored_tokens,
            computed_prompt_tokens=self._computed,
            evicted_blocks=cached.evicted_blocks,
            guessed_tokens=self._guessed,
            guessed_right_tokens=self._guessed_right,
        )

    def step(self) -> None:
        """Run one step."""
        now = self._clock()
        self._steps += 1
        self._keep_to_budget(now)
        self._admit(now)
        work = self._plan(now)
        self._ready = bool(work) or not any(turn.restoring for turn in self._running)
        decoding = sum(1 for _, segment in work if _is_decoding(segment))
        guessed = sum(segment.keep - 1 for _, segment in work)
        prompt_tokens = sum(len(segment.tokens) for _, segment in work) - decoding - guessed
        started = self._clock()
        results = self._compute(work)
        duration_s = self._clock() - started
        if not guessed:
            self._budget.observe(decoding, prompt_tokens, duration_s)
        if not prompt_tokens:
            self._step_cost.observe(decoding, guessed, duration_s)
        self._computed += prompt_tokens
        self._take_in(results, now)
        self._drop_done()

    def _keep_to_budget(self, now: float) -> None:
        """Let the prefix cache give way to growing turns, then turns to each other."""
        self._count_rows()
        while not self._cache.make_row_room(0) and len(self._running) > 1:
            self._preempt(self._share.last(self._running), now)

    def _admit(self, now: float) -> None:
        """Give rows to waiting turns, in order, while there are rows and memory."""
        for turn in self._share.order(self._waiting):
            while not (self._free_rows and self._has_room(turn)):
                loser = self._share.to_yield(self._running, turn, now)
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
            return self._cache.make_row_room(needed)
        return self._cache.make_row_room(needed + HEADROOM_TOKENS)

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
        if self._speculate and not prompts and len(work) <= MOST_TURNS:
            work = [(turn, _guessing(turn)) for turn, _ in work]
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
            self._deliver(lambda: self._restored(turn, start, blocks))

        turn.restoring = self._cache.restore(turn, done)
        return turn.restoring

    def _restored(self, turn: Turn, start: int, blocks: list[torch.Tensor]) -> None:
        self._ready = True
        turn.restoring = False
        turn.tier_failed = not blocks
        if not turn.done:
            self._cache.restored(turn, start, blocks, self._clock())

    def _turns(self) -> list[Turn]:
        return [*self._running, *self._waiting]

    def _compute(
        self, work: Sequence[tuple[Turn, Segment]]
    ) -> list[tuple[Turn, Segment, torch.Tensor]]:
        """Run one forward; if it fails, one for each turn, to find the culprit."""
        if not work:
            return []
        try:
            logits = self._runner.run([segment for _, segment in work])
        except torch.AcceleratorError:
            raise  # Whatever is tried after it fails, too.
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
        greatest, best = torch.cat([logits for _, _, logits in results]).max(dim=-1)
        sound, greedy = torch.isfinite(greatest).tolist(), best.tolist()
        first = last = 0
        for turn, segment, logits in results:
            first, last = last, last + segment.keep
            if not all(sound[first:last]):
                # Keys and values after a NaN are NaN, too: none may reach the prefix cache.
                turn.poisoned = True
                turn.fail("engine_error", NOT_A_NUMBER)
                continue
            turn.cached = segment.end - segment.keep + 1
            turn.reached = max(turn.reached, turn.cached)
            self._cache.publish(turn, now)
            if turn.pending:
                self._share.charge(turn, prompt=len(segment.tokens))
                continue
            self._share.charge(turn, prompt=len(segment.tokens) - segment.keep)
            self._cache.disclaim(turn)
            turn.dry_at = max(turn.dry_at, now)
            try:
                self._choose(turn, segment, logits, greedy[first:last], len(results))
            except Exception as error:  # noqa: BLE001 (sampler or tokenizer; this turn's)
                _log.exception("A token could not be chosen or decoded")
                turn.fail("engine_error", step_failed(error))
            turn.flush()

    def _choose(
        self,
        turn: Turn,
        segment: Segment,
        logits: torch.Tensor,
        greedy: Sequence[int],
        decoding: int,
    ) -> None:
        """Choose the next token and, as long as a guess was right, the ones after it."""
        guess = segment.tokens[len(segment.tokens) - segment.keep + 1 :]
        kept = 0
        while not turn.done:
            sampler = turn.sampler
            token = turn.known
            if token is None and sampler.greedy:
                token = greedy[kept]
            elif token is None:
                token = sampler.choose(logits[kept], turn.tokens)
            turn.accept(token, sampler.logprob(logits[kept], token))
            self._share.charge(turn, decoded=1)
            if turn.done or kept == len(guess) or token != guess[kept]:
                break
            kept += 1
            turn.cached += 1
        if guess:
            turn.lookup.observe(len(turn.tokens), kept, self._step_cost.ratio(decoding))
            self._guessed += len(guess)
            self._guessed_right += kept

    def _preempt(self, turn: Turn, now: float) -> None:
        """Take a turn's row; it waits, and takes its blocks back when it goes on."""
        self._preemptions += 1
        self._running.remove(turn)
        self._count_rows()
        self._leave_row(turn, now)
        self._waiting.append(turn)

    def _leave_row(self, turn: Turn, now: float) -> None:
        assert turn.row is not None
        self._cache.leave(turn, now)
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


def _is_decoding(segment: Segment) -> bool:
    return len(segment.tokens) == segment.keep


def _guessing(turn: Turn) -> Segment:
    """Return the segment of a decoding turn's last token and a guess at what follows."""
    # A guess must fit what the turn has reserved, and one token comes without guessing.
    room = min(_reserved(turn) - len(turn.tokens), turn.token_limit - turn.generated - 1)
    guess = turn.lookup.guess(turn.tokens, room)
    return Segment(turn.row or 0, turn.cached, (turn.tokens[-1], *guess), keep=1 + len(guess))


def _segment(turn: Turn, count: int) -> Segment:
    return Segment(turn.row or 0, turn.cached, turn.tokens[turn.cached : turn.cached + count])


def _to_block_end(turn: Turn, count: int) -> int:
    """Shorten a chunk to end with a block, unless it ends the prompt or would lose too much."""
    cut = count - (turn.cached + count) % BLOCK_TOKENS
    return count if count == turn.pending or cut < count * LEAST_CUT else cut


def _reserved(turn: Turn) -> int:
    """Tokens that the turn needs in its row up to the next one, in whole blocks."""
    return (len(turn.tokens) // BLOCK_TOKENS + 1) * BLOCK_TOKENS
