"""Guesses change when tokens come, not which; and they pause where they do not pay."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import Sink, reference_tokens, scripted, tiny_loaded, tiny_tokenizer

from eloquent.core.events import TextDelta
from eloquent_server.backends.base import Finish
from eloquent_server.engine.engine import Engine
from eloquent_server.engine.speculation import (
    MOST_TOKENS,
    PromptLookup,
    StepCost,
)
from eloquent_server.engine.turn import EngineEvent, Tokens, TurnRequest

BACKEND = tiny_tokenizer().backend_tokenizer


def ids(text: str) -> list[int]:
    tokens: list[int] = BACKEND.encode(text, add_special_tokens=False).ids
    return tokens


def test_a_guess_is_what_followed_the_last_time() -> None:
    lookup = PromptLookup()
    assert list(lookup.guess([1, 2, 3, 9, 8, 7, 1, 2, 3], 3)) == [9, 8, 7]
    assert list(lookup.guess([1, 2, 3, 9, 8, 7, 1, 2, 3, 5, 1, 2, 3], 3)) == [5, 1, 2]


def test_the_longer_match_counts() -> None:
    assert list(PromptLookup().guess([1, 2, 3, 9, 6, 2, 3, 8, 1, 2, 3], 1)) == [9]


def test_nothing_repeats_nothing_is_guessed() -> None:
    assert not PromptLookup().guess([1, 2, 3, 4, 5], 4)
    assert not PromptLookup().guess([], 4)
    assert not PromptLookup().guess([1, 1, 1, 1], 0)


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(-1, 12))
def test_a_guess_occurred_after_the_same_tokens(tokens: list[int], most: int) -> None:
    lookup = PromptLookup()
    for length in range(len(tokens) + 1):
        guess = list(lookup.guess(tokens[:length], most))
        assert len(guess) <= max(0, min(most, MOST_TOKENS))
        if guess:
            seen = tokens[:length]
            matched = [*seen[-2:], *guess]
            starts = range(length - 2)
            assert any(seen[i : i + len(matched)] == matched for i in starts)


def test_wrong_guesses_pause_and_the_pauses_grow() -> None:
    lookup, tokens, tries = PromptLookup(), [1, 2, 3] * 200, []
    for length in range(10, 600):
        if lookup.guess(tokens[:length], 4):
            tries.append(length)
            lookup.observe(length, 0, 1.0)
    assert len(tries) < 25
    gaps = [b - a for a, b in zip(tries[-4:], tries[-3:], strict=False)]
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 128


def test_right_guesses_do_not_pause_unless_they_cost_more() -> None:
    lookup, tokens = PromptLookup(), [1, 2, 3] * 50
    for length in range(10, 140):
        assert lookup.guess(tokens[:length], 4)
        lookup.observe(length, 2, 1.5)
    for length in range(140, 146):
        lookup.observe(length, 2, 4.0)
    assert not lookup.guess(tokens[:146], 4)


def test_the_cost_is_measured_for_each_number_of_turns() -> None:
    cost = StepCost()
    assert cost.ratio(1) == 1.0
    cost.observe(1, 0, 0.010)
    cost.observe(1, 4, 0.012)
    cost.observe(2, 0, 0.010)
    cost.observe(2, 8, 0.030)
    assert cost.ratio(1) == pytest.approx(1.2)
    assert cost.ratio(2) == pytest.approx(3.0)


class Steps(Sink):
    """Notes how many tokens each step brought, and how many pieces of text."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def __call__(self, event: EngineEvent) -> None:
        if isinstance(event, Tokens):
            self.steps.append(len(event.ids))
        super().__call__(event)


def test_verified_tokens_leave_as_one_bundle() -> None:
    said = "the cat sat. the cat sat. the cat sat. the cat sat."
    engine, sink = Engine(scripted([65, *ids(said), *[258] * 20]), speculate=True), Steps()
    engine.submit(TurnRequest(prompt=[65], seed=0, temperature=0), sink)
    assert sink.end() == Finish("stop", 1, len(said) + 1)
    stats = engine.stats()
    engine.close()
    assert sink.text == said
    assert sum(sink.steps) == len(said) + 1
    assert max(sink.steps) > 4
    texts = [event for event in sink.events if isinstance(event, TextDelta)]
    assert len(texts) <= len(sink.steps) < len(said) * 0.7
    assert stats.computed_prompt_tokens == 0  # What was verified is not computed again.
    assert 0 < stats.guessed_right_tokens <= stats.guessed_tokens


def test_a_guess_goes_no_further_than_the_limit() -> None:
    said = ids("abababababab")  # The script has no more: the model would fail beyond.
    for limit in range(1, len(said) + 1):
        engine, sink = Engine(scripted([65, *said]), speculate=True), Sink()
        engine.submit(TurnRequest(prompt=[65], seed=0, temperature=0, max_tokens=limit), sink)
        assert sink.end() == Finish("length", 1, limit)
        engine.close()
        assert sink.tokens == said[:limit]


REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7, "seed": 3},
    {"temperature": 1.0, "seed": 4, "top_p": 0.8, "frequency_penalty": 0.5},
    {"temperature": 0.3, "seed": 5, "top_k": 5, "stop": ("e",)},
    {"temperature": 1.0, "seed": 6, "json_schema": '{"type":"array","items":{"enum":["ab"]}}'},
]


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    st.integers(1, 3),
    st.sampled_from(REQUESTS),
    st.randoms(use_true_random=False),
)
def test_an_answer_is_the_same_with_and_without_guesses(
    pattern: list[int], turns: int, options: dict[str, Any], rng: random.Random
) -> None:
    answers = []
    prompts = [[(65 + token) for token in pattern] * 4 + [rng.randrange(256)] for _ in range(turns)]
    for speculate in (False, True):
        engine = Engine(tiny_loaded(), prefill_chunk_tokens=16, speculate=speculate)
        sinks = [Sink() for _ in prompts]
        for prompt, sink in zip(prompts, sinks, strict=True):
            fields = {"prompt": prompt, "seed": 0, "max_tokens": 40, **options}
            engine.submit(TurnRequest(**fields), sink)
        answers.append([(sink.end(), sink.tokens, sink.text) for sink in sinks])
        engine.close()
    plain, guessed = answers
    assert [answer[1:] for answer in plain] == [answer[1:] for answer in guessed]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_greedy_answers_are_those_of_transformers_alone(model_type: str) -> None:
    engine = Engine(tiny_loaded(model_type), speculate=True)
    guessed = 0
    for prompt in ([65, 66, 67] * 9, [70, 71] * 20, list(range(30)) * 2):
        sink = Sink()
        engine.submit(TurnRequest(prompt=prompt, seed=0, temperature=0, max_tokens=40), sink)
        sink.end()
        assert sink.tokens == reference_tokens(prompt, 40, model_type)
        guessed = engine.stats().guessed_tokens
    engine.close()
    assert guessed > 0
