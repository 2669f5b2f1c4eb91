"""Greedy answers equal those of transformers alone, whatever else the engine does."""

import copy
import random

import pytest
from tiny_model import (
    CONTEXT_TOKENS,
    Sink,
    reference_text,
    reference_tokens,
    tiny_loaded,
    tiny_model,
    tiny_tokenizer,
)

from eloquent_server.backends.base import Finish
from eloquent_server.engine.engine import Engine
from eloquent_server.engine.linear import PrepackedLinear, prepack, prepacking_works
from eloquent_server.engine.loader import prepare
from eloquent_server.engine.turn import TurnRequest

MODELS = ["llama", "qwen2", "qwen3", "mistral"]


def prompts(count: int, seed: int = 1, longest: int = 100) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def greedy(prompt: list[int], count: int) -> TurnRequest:
    return TurnRequest(prompt=prompt, seed=0, max_tokens=count, temperature=0)


def check(sink: Sink, prompt: list[int], count: int, model_type: str = "llama") -> None:
    end = sink.end()
    assert isinstance(end, Finish)
    tokens = reference_tokens(prompt, count, model_type)
    assert end.completion_tokens == len(tokens)
    assert end.prompt_tokens == len(prompt)
    assert sink.text == reference_text(prompt, count, model_type)


def test_reference_is_varied() -> None:
    assert len({token for p in prompts(4) for token in reference_tokens(p, 20)}) > 20


@pytest.mark.parametrize("model_type", MODELS)
def test_alone(model_type: str) -> None:
    engine = Engine(tiny_loaded(model_type))
    for prompt in prompts(3):
        sink = Sink()
        engine.submit(greedy(prompt, 24), sink)
        check(sink, prompt, 24, model_type)
    engine.close()


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("max_running", [2, 8])
def test_batched_with_chunked_prefill_and_reused_rows(model_type: str, max_running: int) -> None:
    engine = Engine(tiny_loaded(model_type), max_running=max_running, prefill_chunk_tokens=16)
    jobs = [(prompt, 5 + 7 * i % 40, Sink()) for i, prompt in enumerate(prompts(12))]
    for prompt, count, sink in jobs:
        engine.submit(greedy(prompt, count), sink)
    for prompt, count, sink in jobs:
        check(sink, prompt, count, model_type)
    engine.close()


def test_joined_midway() -> None:
    engine = Engine(tiny_loaded(), prefill_chunk_tokens=8)
    first, second = prompts(2, seed=2)
    sinks = Sink(), Sink()
    engine.submit(greedy(first, 60), sinks[0])
    sinks[0].wait_for(5)
    engine.submit(greedy(second, 60), sinks[1])
    check(sinks[0], first, 60)
    check(sinks[1], second, 60)
    engine.close()


def test_a_row_that_moves_while_a_long_prompt_is_prefilled() -> None:
    engine = Engine(tiny_loaded(), prefill_chunk_tokens=4)
    short, other, long = [*prompts(2, seed=3, longest=10), list(range(150))]
    sinks = Sink(), Sink(), Sink()
    # The first ends while the third's chunks are going in, so the second moves, and the third.
    engine.submit(greedy(short, 6), sinks[0])
    engine.submit(greedy(other, 80), sinks[1])
    engine.submit(greedy(long, 20), sinks[2])
    check(sinks[0], short, 6)
    check(sinks[1], other, 80)
    check(sinks[2], long, 20)
    engine.close()


def test_up_to_the_end_of_the_context() -> None:
    engine = Engine(tiny_loaded())
    prompt = [65] * 150
    sink = Sink()
    engine.submit(TurnRequest(prompt=prompt, seed=0, temperature=0), sink)
    check(sink, prompt, CONTEXT_TOKENS - len(prompt))
    assert sink.end() == Finish("length", len(prompt), CONTEXT_TOKENS - len(prompt))
    engine.close()


def test_prepacked_weights() -> None:
    assert prepacking_works()
    model = copy.deepcopy(tiny_model())
    assert prepack(model) == 2 * 7 + 1
    assert isinstance(model.lm_head, PrepackedLinear)
    engine = Engine(prepare(model, tiny_tokenizer(), "tiny"), prefill_chunk_tokens=16)
    jobs = [(prompt, Sink()) for prompt in prompts(6)]
    for prompt, sink in jobs:
        engine.submit(greedy(prompt, 24), sink)
    for prompt, sink in jobs:
        check(sink, prompt, 24)
    engine.close()


@pytest.mark.parametrize("seed", range(4))
def test_random_comings_and_goings(seed: int) -> None:
    rng = random.Random(seed)
    engine = Engine(tiny_loaded(), max_running=rng.choice([1, 3, 8]), prefill_chunk_tokens=16)
    jobs = []
    for prompt in prompts(25, seed=seed, longest=60):
        sink, count = Sink(), rng.randint(1, 40)
        turn = engine.submit(greedy(prompt, count), sink)
        jobs.append((prompt, count, sink))
        if rng.random() < 0.4:
            sink.wait_for(rng.randint(0, 10))
            engine.cancel(turn)
        elif rng.random() < 0.1:
            sink.end()
    for prompt, count, sink in jobs:
        end = sink.end()
        assert isinstance(end, Finish)
        if end.reason == "cancelled":
            whole = reference_text(prompt, end.completion_tokens)
            assert sink.text == whole
        else:
            check(sink, prompt, count)
    engine.close()
    for _, _, sink in jobs:
        assert len(sink.ends) == 1
        assert sink.events[-1] is sink.ends[0]
