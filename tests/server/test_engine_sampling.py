"""Greedy, temperature, top-k, top-p, min-p, penalties, bias, seed and logprobs."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eloquent_server.engine.options import SamplingOptions
from eloquent_server.engine.sampling import Sampler, draw, token_logprob, uniform

PROBABILITIES = [0.5, 0.2, 0.15, 0.1, 0.05]
LOGITS = torch.tensor(PROBABILITIES).log()
PROMPT = [1, 1]


def sampler(**options: Any) -> Sampler:
    return Sampler(SamplingOptions(**{"seed": 0, **options}), prompt_tokens=len(PROMPT))


def draws(count: int, logits: torch.Tensor = LOGITS, **options: Any) -> list[int]:
    """Draw the tokens of an answer whose logits are always the same."""
    chooser, tokens = sampler(**options), list(PROMPT)
    for _ in range(count):
        tokens.append(chooser.choose(logits, tokens))
    return tokens[len(PROMPT) :]


def chosen(said: list[int], logits: list[float], **options: Any) -> int:
    """Return the greedy token after an answer of `said`."""
    chooser = sampler(temperature=0, **options)
    return chooser.choose(torch.tensor(logits), [*PROMPT, *said])


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-4])
def test_temperature_near_0_is_greedy(temperature: float) -> None:
    assert set(draws(50, temperature=temperature)) == {0}


def test_frequencies_follow_the_probabilities() -> None:
    counts = Counter(draws(4000))
    for token, expected in enumerate(PROBABILITIES):
        assert counts[token] / 4000 == pytest.approx(expected, abs=0.04)


def test_a_high_temperature_flattens() -> None:
    assert Counter(draws(2000, temperature=2.0))[4] > 1.3 * Counter(draws(2000))[4]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, {0}), (0.49, {0}), (0.6, {0, 1}), (0.84, {0, 1, 2}), (0.9, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: set[int]) -> None:
    assert set(draws(1000, top_p=top_p)) == kept


def test_top_p_beyond_the_first_look() -> None:
    assert max(draws(500, torch.zeros(2000), top_p=0.9)) > 1000


@pytest.mark.parametrize(("top_k", "kept"), [(1, {0}), (3, {0, 1, 2}), (99, {0, 1, 2, 3, 4})])
def test_top_k_keeps_so_many(top_k: int, kept: set[int]) -> None:
    assert set(draws(1000, top_k=top_k)) == kept


@pytest.mark.parametrize(
    ("min_p", "kept"), [(0.05, {0, 1, 2, 3, 4}), (0.15, {0, 1, 2, 3}), (0.35, {0, 1}), (1, {0})]
)
def test_min_p_is_a_fraction_of_the_greatest(min_p: float, kept: set[int]) -> None:
    assert set(draws(1000, min_p=min_p)) == kept


def test_the_cuts_apply_one_after_the_other() -> None:
    # min-p leaves 0 to 3, of 0.95 together; of the best two, 0.5 / 0.7 reaches 0.71.
    assert set(draws(1000, min_p=0.15, top_k=2, top_p=0.71)) == {0}
    assert set(draws(1000, min_p=0.15, top_k=2, top_p=0.72)) == {0, 1}
    # Of the two that min-p leaves, the first has 0.71.
    assert set(draws(1000, min_p=0.35, top_p=0.6)) == {0}


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 4}, {"min_p": 0.01}])
def test_the_same_seed_gives_the_same_tokens(options: dict[str, Any]) -> None:
    assert draws(30, seed=5, **options) == draws(30, seed=5, **options)
    assert draws(30, seed=5, **options) != draws(30, seed=6, **options)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 1, -(2**70)])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert draws(10, seed=seed) == draws(10, seed=seed)


def test_an_answer_that_is_continued_is_the_same_answer() -> None:
    options = {"seed": 9, "temperature": 1.3, "frequency_penalty": 0.4, "top_p": 0.95}
    whole = draws(60, **options)
    for cut in (0, 1, 31, 59):
        fresh, tokens = sampler(**options), [*PROMPT, *whole[:cut]]
        while len(tokens) < len(PROMPT) + 60:
            tokens.append(fresh.choose(LOGITS, tokens))
        assert tokens[len(PROMPT) :] == whole


@given(st.integers(), st.integers(0, 10**6))
def test_a_uniform_number_is_below_1(seed: int, index: int) -> None:
    assert 0 <= uniform(seed, index) < 1


def test_uniform_numbers_are_spread() -> None:
    counts = Counter(int(10 * uniform(seed, index)) for seed in range(50) for index in range(100))
    assert all(counts[tenth] == pytest.approx(500, abs=90) for tenth in range(10))


def test_a_token_of_no_weight_is_never_drawn() -> None:
    logits = torch.full((64,), -torch.inf)
    logits[[3, 40]] = 0.0
    assert set(draws(300, logits, temperature=2.0)) == {3, 40}
    assert draw(torch.tensor([0.0, 0.0, 1.0, 0.0]), 0.0) == 2
    assert draw(torch.tensor([0.0, 3.0, 1.0, 0.0]), 1 - 2.0**-48) == 2


def test_the_presence_penalty_counts_once_and_only_the_answer() -> None:
    assert chosen([0, 0, 0], [1.0, 0.5, 0.0], presence_penalty=0.4) == 0
    assert chosen([0], [1.0, 0.5, 0.0], presence_penalty=0.6) == 1
    # 1 is in the prompt, which does not count.
    assert chosen([], [0.0, 0.5, 0.4], presence_penalty=2) == 1
    assert chosen([1], [0.0, 0.5, 0.4], presence_penalty=-2) == 1


def test_the_frequency_penalty_counts_each_time() -> None:
    assert chosen([0, 0], [1.0, 0.5, 0.0], frequency_penalty=0.2) == 0
    assert chosen([0, 0, 0], [1.0, 0.5, 0.0], frequency_penalty=0.2) == 1


def test_the_repetition_penalty_counts_the_prompt_too() -> None:
    # 1 is in the prompt: 3.0 / 2 falls below 2.0; a negative logit is multiplied.
    assert chosen([], [2.0, 3.0, -9.0], repetition_penalty=2) == 0
    assert chosen([0, 2], [-1.0, -1.0, -1.5, -1.9], repetition_penalty=2) == 3
    assert chosen([0, 2], [2.0, 3.0, -9.0], repetition_penalty=1) == 1


def test_a_bias_is_added() -> None:
    assert chosen([], [1.0, 0.5, 0.0], logit_bias=((2, 1.1),)) == 2
    assert set(draws(500, logit_bias=((0, -100.0), (1, -100.0)))) == {2, 3, 4}


def test_the_logits_are_left_alone() -> None:
    logits = LOGITS.clone()
    draws(5, logits, presence_penalty=1, repetition_penalty=2, logit_bias=((0, 9.0),), min_p=0.1)
    assert torch.equal(logits, LOGITS)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    draws(10)
    assert torch.equal(before, torch.random.get_rng_state())


def test_logprobs_are_the_models_own() -> None:
    report = token_logprob(LOGITS + 7, 2, top=2, text=lambda token: b"abcde"[token : token + 1])
    assert report.token == b"c"
    assert report.logprob == pytest.approx(-1.897, abs=1e-3)
    assert [(each.token, round(each.logprob, 3)) for each in report.top] == [
        (b"a", -0.693),
        (b"b", -1.609),
    ]
    assert token_logprob(LOGITS, 0, top=0, text=lambda _: b"").top == ()
