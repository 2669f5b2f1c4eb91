"""What turns share, with whom, within what bounds; the answers stay those of a cold engine."""

import dataclasses
import random
import threading
from typing import Any

import pytest
import torch
from tiny_model import (
    CONTEXT_TOKENS,
    ScriptedModel,
    Sink,
    reference_tokens,
    scripted,
    tiny_loaded,
)

from eloquent.errors import ConfigurationError
from eloquent_server.backends.base import Finish
from eloquent_server.engine.engine import Engine
from eloquent_server.engine.radix import BLOCK_TOKENS
from eloquent_server.engine.tiers import TierStore
from eloquent_server.engine.turn import TurnRequest

TOKEN_BYTES = tiny_loaded().kv.token_bytes


def request(prompt: list[int], count: int = 4, tenant: str = "local", **more: Any) -> TurnRequest:
    return TurnRequest(
        prompt=prompt, seed=0, max_tokens=count, temperature=0, tenant=tenant, **more
    )


def answer(engine: Engine, asked: TurnRequest) -> tuple[list[int], Finish]:
    sink = Sink()
    engine.submit(asked, sink)
    end = sink.end()
    assert isinstance(end, Finish), end
    return sink.tokens, end


def some_prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


@pytest.fixture
def engine() -> Any:
    engine = Engine(tiny_loaded())
    yield engine
    engine.close()


def test_full_blocks_of_the_same_prompt_are_not_computed_again(engine: Engine) -> None:
    prompt = some_prompt(100)
    cold, cold_end = answer(engine, request(prompt))
    warm, warm_end = answer(engine, request(prompt))
    assert cold == warm == reference_tokens(prompt, 4)
    assert (cold_end.cached_tokens, warm_end.cached_tokens) == (0, 96)
    assert engine.stats().computed_prompt_tokens == 100 + 4
    assert engine.stats().cached_tokens == 96


def test_at_least_one_token_is_computed(engine: Engine) -> None:
    prompt = some_prompt(96)
    assert [answer(engine, request(prompt))[1].cached_tokens for _ in range(2)] == [0, 80]


def test_the_answer_is_shared_too(engine: Engine) -> None:
    prompt = some_prompt(40)
    reply, _ = answer(engine, request(prompt, 60))
    following = [*prompt, *reply, *some_prompt(20, seed=2)]
    tokens, end = answer(engine, request(following))
    assert tokens == reference_tokens(following, 4)
    # The last token of a reply is chosen, but never computed.
    assert end.cached_tokens == (len(prompt) + len(reply) - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def test_another_tenant_gets_nothing(engine: Engine) -> None:
    prompt = some_prompt(100)
    answer(engine, request(prompt, tenant="alice"))
    before = engine.stats().computed_prompt_tokens
    _, end = answer(engine, request(prompt, tenant="bob"))
    assert end.cached_tokens == 0
    assert engine.stats().computed_prompt_tokens - before == before
    _, end = answer(engine, request(prompt, tenant="alice"))
    assert end.cached_tokens == 96


def prefilled(prompts: list[tuple[str, list[int]]], tier: TierStore | None) -> int:
    """Return how many tokens the last one's prefill computes, after the others' answers."""
    engine = Engine(tiny_loaded(), tier=tier, kv_bytes=400 * TOKEN_BYTES)
    for tenant, prompt in prompts:
        before = engine.stats().computed_prompt_tokens
        _, end = answer(engine, request(prompt, tenant=tenant))
    engine.close()
    assert end.cached_tokens + engine.stats().computed_prompt_tokens - before == len(prompts[-1][1])
    return engine.stats().computed_prompt_tokens - before


@pytest.mark.parametrize("has_tier", [False, True], ids=["tree", "tier"])
def test_what_is_prefilled_is_the_same_whether_or_not_another_tenant_cached_it(
    has_tier: bool,
) -> None:
    prompt, other = some_prompt(150), some_prompt(150, seed=1)

    def count(*before: tuple[str, list[int]]) -> int:
        tier = TierStore(tiny_loaded().kv, ram_bytes=1 << 26) if has_tier else None
        return prefilled([*before, ("alice", prompt)], tier)

    never = count(("alice", other))
    cached = count(("bob", prompt), ("alice", other))
    gone = count(("bob", prompt), ("bob", other), ("bob", some_prompt(150, 2)), ("alice", other))
    assert never == cached == gone == 150
    assert count(("alice", prompt), ("alice", other)) < 150, "her own she does have"


def test_without_the_cache_nothing_is_shared() -> None:
    engine = Engine(tiny_loaded(), prefix_cache=False)
    prompt = some_prompt(100)
    assert [answer(engine, request(prompt))[1].cached_tokens for _ in range(2)] == [0, 0]
    engine.close()
    assert engine.stats().kv_bytes == 0


class HeldModel(ScriptedModel):
    """Waits in its first forward until `go` is set."""

    def __init__(self) -> None:
        super().__init__([65] * CONTEXT_TOKENS)
        self.entered, self.go = threading.Event(), threading.Event()

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        self.entered.set()
        assert self.go.wait(60)
        return super().__call__(*args, **inputs)


def hold(engine: Engine, model: HeldModel) -> Sink:
    """Let the engine stand in a step, so that what is submitted now comes in at once."""
    sink = Sink()
    engine.submit(request([1], 1), sink)
    assert model.entered.wait(60)
    return sink


def held_loaded() -> tuple[Any, HeldModel]:
    model = HeldModel()
    return dataclasses.replace(scripted([]), model=model), model


def test_turns_that_come_together_wait_for_the_first_ones_prefix() -> None:
    loaded, model = held_loaded()
    engine = Engine(loaded, prefill_chunk_tokens=32)
    first = hold(engine, model)
    common = some_prompt(96)
    sinks = [Sink() for _ in range(12)]
    for i, sink in enumerate(sinks):
        engine.submit(request([*common, i, i, i]), sink)
    model.go.set()
    first.end()
    cached = sorted(end.cached_tokens for sink in sinks if isinstance(end := sink.end(), Finish))
    assert cached == [0] + [96] * 11
    engine.close()


def test_who_waits_for_a_cancelled_turns_prefix_computes_it() -> None:
    loaded, model = held_loaded()
    engine = Engine(loaded, prefill_chunk_tokens=32)
    first = hold(engine, model)
    prompt = some_prompt(150)
    sinks = Sink(), Sink()
    turn = engine.submit(request(prompt), sinks[0])
    engine.submit(request(prompt), sinks[1])
    engine.cancel(turn)
    model.go.set()
    first.end()
    assert sinks[0].end() == Finish("cancelled", 150, 0)
    assert sinks[1].end() == Finish("length", 150, 4)
    engine.close()


def test_the_budget_holds_tree_and_turns_together() -> None:
    tokens = 256
    engine = Engine(tiny_loaded(), kv_bytes=tokens * TOKEN_BYTES, max_running=3)
    peak = 0

    def watch(_: object) -> None:
        nonlocal peak
        peak = max(peak, engine.stats().kv_bytes)

    ends = []
    for i in range(8):
        sink = Sink()

        def emit(event: Any, sink: Sink = sink) -> None:
            watch(event)
            sink(event)

        engine.submit(request(some_prompt(100, seed=i), 20), emit)
        ends.append((i, sink))
    for i, sink in ends:
        assert sink.end() == Finish("length", 100, 20)
        assert sink.tokens == reference_tokens(some_prompt(100, seed=i), 20)
    assert 0 < peak <= tokens * TOKEN_BYTES
    assert engine.stats().evicted_blocks > 0
    engine.close()


def test_a_tenants_quota_keeps_another_tenants_blocks_safe() -> None:
    quota = 8 * BLOCK_TOKENS * TOKEN_BYTES
    engine = Engine(tiny_loaded(), tenant_bytes=quota)
    prompt = some_prompt(100)
    answer(engine, request(prompt, tenant="alice"))
    for seed in range(1, 6):
        answer(engine, request(some_prompt(150, seed), tenant="bob"))
    assert answer(engine, request(prompt, tenant="alice"))[1].cached_tokens == 96
    assert engine._cache.tree.count("bob") <= 8
    # The first blocks of the latest prompt, not its last ones.
    latest = some_prompt(150, seed=5)
    assert answer(engine, request(latest, tenant="bob"))[1].cached_tokens == 8 * BLOCK_TOKENS
    engine.close()


def test_prompts_that_never_come_back_do_not_drive_out_those_that_do() -> None:
    engine = Engine(tiny_loaded(), kv_bytes=400 * TOKEN_BYTES)
    common = some_prompt(64)
    for i in range(2):
        answer(engine, request([*common, i]))
    for seed in range(1, 7):
        answer(engine, request(some_prompt(150, seed)))
    assert answer(engine, request([*common, 7]))[1].cached_tokens == 64
    engine.close()


def test_a_budget_that_holds_no_turn_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="hold no turn"):
        Engine(tiny_loaded(), kv_bytes=20 * TOKEN_BYTES)


def test_blocks_after_a_nan_are_not_shared() -> None:
    loaded = tiny_loaded()
    engine = Engine(loaded)
    prompt = some_prompt(64)
    run = engine._core._runner.run

    def spoil(segments: Any) -> list[torch.Tensor]:
        return [logits * float("nan") for logits in run(segments)]

    engine._core._runner.run = spoil  # type: ignore[method-assign]
    sink = Sink()
    engine.submit(request(prompt), sink)
    assert not isinstance(sink.end(), Finish)
    engine._core._runner.run = run  # type: ignore[method-assign]
    tokens, end = answer(engine, request(prompt))
    assert end.cached_tokens == 0
    assert tokens == reference_tokens(prompt, 4)
    engine.close()


def test_a_continued_turn_goes_on_where_it_was(engine: Engine) -> None:
    prompt = some_prompt(30)
    whole = reference_tokens(prompt, 40)
    for cut in (1, 17, 39):
        sink = Sink()
        engine.submit(request(prompt, 40, generated=whole[:cut]), sink)
        end = sink.end()
        assert isinstance(end, Finish)
        assert sink.tokens == whole[cut:]
        assert (end.prompt_tokens, end.completion_tokens) == (30, 40)


def test_a_continued_turn_that_was_complete_just_ends(engine: Engine) -> None:
    prompt = some_prompt(30)
    tokens, end = answer(engine, request(prompt, 3, generated=[1, 2, 3]))
    assert (tokens, end.reason, end.completion_tokens) == ([], "length", 3)
    stop = next(iter(tiny_loaded().end_tokens))
    tokens, end = answer(engine, request(prompt, 30, generated=[1, stop]))
    assert (tokens, end.reason, end.completion_tokens) == ([], "stop", 2)
