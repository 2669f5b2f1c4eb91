"""Greedy, temperature, top-p and seed."""

from collections import Counter

import pytest
import torch

from eloquent_server.engine.sampling import Sampler

LOGITS = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()


def draws(count: int, *, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0) -> list[int]:
    sampler = Sampler(temperature=temperature, top_p=top_p, seed=seed)
    return [sampler.choose(LOGITS) for _ in range(count)]


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-4])
def test_temperature_near_0_is_greedy(temperature: float) -> None:
    assert set(draws(50, temperature=temperature)) == {0}


def test_frequencies_follow_the_probabilities() -> None:
    counts = Counter(draws(4000))
    for token, expected in enumerate([0.5, 0.2, 0.15, 0.1, 0.05]):
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
    logits = torch.zeros(2000)
    sampler = Sampler(temperature=1.0, top_p=0.9, seed=0)
    assert max(sampler.choose(logits) for _ in range(500)) > 1000


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_the_same_seed_gives_the_same_tokens(top_p: float) -> None:
    assert draws(30, seed=5, top_p=top_p) == draws(30, seed=5, top_p=top_p)
    assert draws(30, seed=5, top_p=top_p) != draws(30, seed=6, top_p=top_p)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 1, -(2**70)])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert draws(10, seed=seed) == draws(10, seed=seed)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    draws(10)
    assert torch.equal(before, torch.random.get_rng_state())
