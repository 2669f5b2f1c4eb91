"""Any schedule gives the greedy answers of turns alone, and leaves nothing behind.

The steps run without a thread here, on a clock of their own, so that a seed is a run.
"""

import functools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from plain_kernel import plain_kernel
from tiny_model import CONTEXT_TOKENS, Sink, reference_tokens, tiny_loaded

from eloquent_server.backends.base import Finish
from eloquent_server.engine.attention import KvLayout, Segment
from eloquent_server.engine.blockcodec import decode, encode
from eloquent_server.engine.budget import StepBudget
from eloquent_server.engine.core import Core
from eloquent_server.engine.kv import SlabCache
from eloquent_server.engine.paged import PagedCache
from eloquent_server.engine.prefix import PrefixCache
from eloquent_server.engine.runner import Runner
from eloquent_server.engine.sampling import Sampler
from eloquent_server.engine.text import AnswerText
from eloquent_server.engine.turn import Turn, TurnRequest

MODELS = ["llama", "qwen2", "qwen3", "mistral"]
LONGEST_ANSWER = 40


def prompts() -> list[list[int]]:
    """Prompts that share beginnings of several lengths, on and off block boundaries."""
    rng = random.Random(5)
    stem = [rng.randrange(256) for _ in range(120)]
    found = [stem[:length] for length in (1, 16, 17, 47, 48, 49, 96, 120)]
    found += [stem[:32] + [7] * 20, stem[:64] + [9] * 30, [3] * 33, [5, 6] * 40]
    return found


PROMPTS = prompts()


@functools.cache
def alone(model_type: str, index: int) -> list[int]:
    return reference_tokens(PROMPTS[index], LONGEST_ANSWER, model_type)


class SlowTier:
    """A second tier in memory that delivers when it is told to."""

    durable = True

    def __init__(self, model_type: str) -> None:
        self.blocks: dict[bytes, bytes] = {}
        self.due: list[Callable[[], None]] = []
        self.delivered = 0
        self._shape = tiny_loaded(model_type).kv

    def holds(self, key: bytes) -> bool:
        return key in self.blocks

    def store(self, key: bytes, block: torch.Tensor) -> None:
        self.blocks[key] = encode(block, key, "raw")

    def fetch(self, keys: Sequence[bytes], done: Callable[[list[torch.Tensor]], None]) -> None:
        def deliver() -> None:
            got = []
            for key in keys:
                if key not in self.blocks:
                    break
                got.append(decode(self.blocks[key], key, self._shape, "raw"))
            self.delivered += len(got)
            done(got)

        self.due.append(deliver)

    def deliver(self) -> None:
        due, self.due = self.due, []
        for call in due:
            call()

    def close(self) -> None:
        self.deliver()


class CountingRunner(Runner):
    """Counts what steps are made of."""

    def __init__(self, model: Any, layout: KvLayout, counts: Counter[str]) -> None:
        super().__init__(model, layout)
        self._counts = counts

    def run(self, segments: Sequence[Segment]) -> list[torch.Tensor]:
        sizes = [len(segment.tokens) for segment in segments]
        self._counts["batched"] += sum(size == 1 for size in sizes) > 1
        self._counts["mixed"] += 1 in sizes and max(sizes) > 1
        self._counts["later chunks"] += any(s.start and len(s.tokens) > s.keep for s in segments)
        return super().run(segments)


@dataclass
class World:
    """Steps on a clock that each step moves on by 10 ms."""

    model_type: str
    rows: int
    budget_tokens: int
    chunk: int
    tier: SlowTier | None = None
    speculate: bool = True
    paged: bool = False
    now: float = 0.0
    turns: list[tuple[int, int, Turn, Sink]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    restarts: int = 0

    def __post_init__(self) -> None:
        loaded = tiny_loaded(self.model_type)
        self.layout: KvLayout = SlabCache(
            loaded.kv, max_tokens=CONTEXT_TOKENS, device=torch.device("cpu"), rows=self.rows
        )
        if self.paged:
            self.layout = PagedCache(
                loaded.kv,
                pages=self.rows + 24,
                device=torch.device("cpu"),
                rows=self.rows,
                page_tokens=16,
                kernel=plain_kernel,
            )
        self.budget_bytes = self.budget_tokens * loaded.kv.token_bytes + self.layout.fixed_bytes
        self.cache = PrefixCache(
            self.layout, budget_bytes=self.budget_bytes, fingerprint=b"f", tier=self.tier
        )
        self.runner = CountingRunner(loaded.model, self.layout, self.counts)
        self.core = Core(
            self.runner,
            self.cache,
            StepBudget(),
            rows=self.rows,
            clock=lambda: self.now,
            chunk_tokens=self.chunk,
            speculate=self.speculate,
        )

    def submit(
        self, index: int, count: int, tenant: str, given: int = 0, weight: float = 1.0
    ) -> None:
        """Ask for `count` tokens of which `given` are out already."""
        given = min(given, count)
        generated = alone(self.model_type, index)[:given]
        turn = self._turn(
            len(self.turns) + 1, index, generated, count, tenant=tenant, weight=weight
        )
        turn.emit = sink = Sink()
        self.turns.append((index, given, turn, sink))
        self.core.add(turn)

    def count_stats(self) -> None:
        """Add this engine's counts to those of the ones before it."""
        stats = self.core.stats()
        self.counts["cached tokens"] += stats.cached_tokens
        self.counts["preemptions"] += stats.preemptions
        self.counts["evictions"] += stats.evicted_blocks
        self.counts["restored tokens"] += stats.restored_tokens
        self.counts["right guesses"] += stats.guessed_right_tokens
        self.counts["restarts"] = self.restarts

    def restart(self) -> None:
        """The engine dies: what it had in memory is gone, and turns go on from their tokens."""
        self.restarts += 1
        if self.tier:
            self.tier.due.clear()
        self.__post_init__()
        for i, (index, out, old, sink) in enumerate(self.turns):
            if sink.ends:
                continue
            generated = alone(self.model_type, index)[:out] + sink.tokens
            turn = self._turn(
                old.id,
                index,
                generated,
                old.token_limit,
                tenant=old.tenant,
                weight=old.weight,
            )
            turn.emit = sink
            self.turns[i] = (index, out, turn, sink)
            self.core.add(turn)

    def _turn(
        self,
        id_: int,
        index: int,
        generated: list[int],
        count: int,
        *,
        tenant: str,
        weight: float,
    ) -> Turn:
        loaded, prompt = tiny_loaded(self.model_type), PROMPTS[index]
        request = TurnRequest(prompt=prompt, seed=0, temperature=0, generated=generated)
        turn = Turn(
            id=id_,
            tokens=list(prompt),
            prompt_tokens=len(prompt),
            token_limit=count,
            sampler=Sampler(request, prompt_tokens=len(prompt)),
            text=AnswerText(loaded.tokenizer.backend_tokenizer),
            end_tokens=loaded.end_tokens,
            emit=lambda event: None,
            arrived=self.now,
            dry_at=self.now,
            tenant=tenant,
            weight=weight,
        )
        turn.replay(request)
        return turn

    def step(self) -> None:
        self.now += 0.01
        if self.core.ready:
            self.core.step()
        assert self.cache.used_bytes <= self.budget_bytes
        rows = [turn.row for _, _, turn, _ in self.turns if turn.row is not None]
        assert sorted(rows + self.core._free_rows) == list(range(self.rows))

    def finish(self) -> None:
        """Step until all have ended; fairness bounds how long that can take."""
        for _ in range(20_000):
            if not (self.core._running or self.core._waiting):
                break
            if self.tier and not self.core.ready:
                self.tier.deliver()
            self.step()
        stats = self.core.stats()
        assert (stats.running, stats.waiting) == (0, 0), "somebody starved"
        assert not self.cache._claims
        assert not self.cache._coming
        assert not self.core._share._accounts
        assert self.cache._row_tokens == 0
        for index, given_count, turn, sink in self.turns:
            (end,) = sink.ends
            assert isinstance(end, Finish), end
            whole = alone(self.model_type, index)
            if end.reason != "cancelled":
                assert turn.tokens[turn.prompt_tokens :] == whole[: turn.token_limit]
            assert sink.tokens == whole[given_count : given_count + len(sink.tokens)]


def play(world: World, rng: random.Random, moves: int) -> None:
    for _ in range(moves):
        move = rng.random()
        if move < 0.3:
            count = rng.choice([1, 2, 15, 40])
            given_count = rng.choice([0, 0, 0, 1, 20])
            index = rng.randrange(len(PROMPTS))
            world.submit(index, count, rng.choice(["a", "a", "b"]), given_count)
        elif move < 0.35 and world.turns:
            world.core.cancel(rng.choice(world.turns)[2].id)
        elif move < 0.42 and world.turns:
            buffered = rng.choice([0.0, 1.0, 20.0])
            world.core.hint(rng.choice(world.turns)[2].id, world.now + buffered)
        elif move < 0.46:
            world.now += 2.0
        elif move < 0.48:
            world.count_stats()
            world.restart()
        elif move < 0.6 and world.tier:
            world.tier.deliver()
        else:
            for _ in range(rng.randint(1, 12)):
                world.step()
    world.finish()
    world.count_stats()


def any_world(model_type: str, rng: random.Random) -> World:
    return World(
        model_type,
        rows=rng.choice([1, 2, 4]),
        budget_tokens=rng.choice([210, 300, 600, 5000]),
        chunk=rng.choice([1, 7, 16, 40, 200]),
        tier=SlowTier(model_type) if rng.random() < 0.5 else None,
        speculate=rng.random() < 0.5,
        paged=rng.random() < 0.3,
    )


@pytest.mark.parametrize("model_type", MODELS)
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(seed=st.integers(0, 1 << 32))
def test_any_schedule(model_type: str, seed: int) -> None:
    note(f"{seed=}")
    rng = random.Random(seed)
    play(any_world(model_type, rng), rng, moves=40)


def test_schedules_cover_what_they_should() -> None:
    """The same generator of schedules, on fixed seeds, meets all that is to change no answer."""
    total: Counter[str] = Counter()
    for seed in range(10):
        rng = random.Random(seed)
        world = any_world("llama", rng)
        play(world, rng, moves=40)
        total += world.counts
    assert set(total) == {
        *("batched", "mixed", "later chunks", "cached tokens", "restored tokens"),
        *("preemptions", "evictions", "right guesses", "restarts"),
    }, "a Counter's sum keeps what is above 0"


def test_a_reader_with_text_to_read_gives_way_and_comes_back() -> None:
    world = World("llama", rows=1, budget_tokens=5000, chunk=200)
    world.submit(7, 40, "a")
    for _ in range(20):
        world.step()
    world.core.hint(1, world.now + 10.0)
    world.submit(2, 3, "a")
    for _ in range(4):
        world.step()
    assert world.turns[1][3].ends
    assert not world.turns[0][3].ends
    world.finish()
    assert world.core.stats().preemptions == 1
    # What it had computed came back from the prefix cache, and counts for nothing.
    assert world.turns[0][2].cached_prompt == 0
    assert world.core.stats().computed_prompt_tokens < len(PROMPTS[7]) + len(PROMPTS[2]) + 40


def ended(world: World, tenant: str) -> int:
    return sum(bool(sink.ends) for _, _, turn, sink in world.turns if turn.tenant == tenant)


def test_a_tenant_with_many_turns_does_not_starve_one_with_few() -> None:
    world = World("llama", rows=2, budget_tokens=5000, chunk=64)
    for i in range(20):
        world.submit(i % 3, 40, "heavy")
    for _ in range(10):
        world.step()
    world.submit(4, 10, "light")
    while not ended(world, "light"):
        world.step()
    assert ended(world, "heavy") <= 2, "those that had a row before"
    world.finish()


@pytest.mark.parametrize(("weight", "most"), [(3.0, 9), (1.0, 6)])
def test_tenants_are_served_by_their_weights(weight: float, most: int) -> None:
    world = World("llama", rows=1, budget_tokens=5000, chunk=64)
    for _ in range(12):
        world.submit(0, 15, "paying", weight=weight)
        world.submit(0, 15, "other")
    while ended(world, "paying") + ended(world, "other") < 12:
        world.step()
    assert abs(ended(world, "paying") - most) <= 1
    world.finish()


def test_a_thousand_turns_come_and_go_and_leave_nothing() -> None:
    rng = random.Random(11)
    world = World("llama", rows=4, budget_tokens=400, chunk=64)
    for i in range(1000):
        world.submit(rng.randrange(len(PROMPTS)), rng.choice([1, 2, 5]), f"t{i % 7}")
        if rng.random() < 0.8:
            world.core.cancel(rng.choice(world.turns[-8:])[2].id)
        if rng.random() < 0.3:
            world.step()
    world.finish()
    tree = len(world.cache.tree) * 16 * tiny_loaded().kv.token_bytes
    assert world.cache.used_bytes == tree <= world.budget_bytes


@pytest.mark.parametrize(("hinted", "every"), [(False, 2), (True, 6), (True, 10)])
def test_nobody_starves_while_others_keep_coming(hinted: bool, every: int) -> None:
    world = World("llama", rows=2, budget_tokens=400, chunk=64)
    world.submit(7, 40, "a")
    steps = 0
    while not world.turns[0][3].ends:
        if steps % every == 0:
            world.submit(steps // every % len(PROMPTS), 15, "a")
        if hinted:
            world.core.hint(1, world.now + 5.0)  # Always the one with most to read.
        world.step()
        world.now += 0.1
        steps += 1
        assert steps < 500
    world.finish()
