"""Lower precisions stay within their regret, and `auto` takes what its trial says."""

import copy
import itertools
import random
from pathlib import Path

import pytest
import torch
from tiny_model import Sink, eager_model, reference_tokens, tiny_model, tiny_tokenizer
from torch import nn

from eloquent.errors import ConfigurationError
from eloquent_server.engine import loader
from eloquent_server.engine.engine import Engine
from eloquent_server.engine.linear import PrepackedLinear
from eloquent_server.engine.loader import LoadedModel, load, prepare
from eloquent_server.engine.precision import (
    REGRET_BOUND,
    Int8Linear,
    Precision,
    Trial,
    apply_precision,
    choose_precision,
    fastest,
    int8_works,
    regrets,
    weights_dtype,
)
from eloquent_server.engine.turn import TurnRequest

LOW: list[Precision] = ["bf16", "int8"]


def in_precision(model_type: str, precision: Precision) -> LoadedModel:
    model = copy.deepcopy(tiny_model(model_type)).to(weights_dtype(precision))
    assert apply_precision(model, precision)
    return prepare(model, tiny_tokenizer(), "tiny", precision=precision)


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(4)
    return [[rng.randrange(256) for _ in range(rng.randint(2, 60))] for _ in range(count)]


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_greedy_answers_are_within_the_regret_bound(model_type: str, precision: Precision) -> None:
    engine = Engine(in_precision(model_type, precision), prefill_chunk_tokens=16)
    sinks = []
    for prompt in prompts(6):
        sinks.append((prompt, Sink()))
        request = TurnRequest(prompt=prompt, seed=0, temperature=0, max_tokens=24)
        engine.submit(request, sinks[-1][1])
    worst = 0.0
    for prompt, sink in sinks:
        sink.end()
        worst = max(worst, *regrets(eager_model(model_type), prompt, sink.tokens))
    engine.close()
    assert 0 < worst <= REGRET_BOUND[precision]


def test_regret_of_the_exact_answer_is_zero_and_of_another_is_not() -> None:
    prompt = prompts(1)[0]
    tokens = reference_tokens(prompt, 12)
    assert max(regrets(eager_model("llama"), prompt, tokens)) < 1e-5
    wrong = [*tokens[:5], (tokens[5] + 1) % 256, *tokens[6:]]
    assert regrets(eager_model("llama"), prompt, wrong)[5] > 0.01


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_products(rows: int, bias: bool) -> None:
    assert int8_works()
    torch.manual_seed(3)
    linear = nn.Linear(96, 48, bias=bias)
    inputs = torch.randn(1, rows, 96)
    expected = linear(inputs)
    got = Int8Linear(linear)(inputs.bfloat16()).float()
    assert got.shape == expected.shape
    assert (got - expected).norm() / expected.norm() < 0.02


def test_a_row_of_zeros_is_no_division_by_zero() -> None:
    linear = nn.Linear(64, 32)
    linear.weight.data[3] = 0
    linear.bias.data.zero_()
    output = Int8Linear(linear)(torch.ones(1, 64).bfloat16())
    assert torch.isfinite(output).all()
    assert output[0, 3] == 0


def test_one_users_tokens_do_not_scale_anothers() -> None:
    linear = Int8Linear(nn.Linear(64, 32))
    mine = torch.randn(1, 64).bfloat16()
    alone = linear(mine)
    beside = linear(torch.cat([mine, 1000 * torch.ones(1, 64).bfloat16()]))
    assert torch.equal(alone[0], beside[0])


@pytest.mark.parametrize(
    ("step_ms", "chosen"),
    [
        ({"fp32": 10.0}, "fp32"),
        ({"fp32": 10.0, "bf16": 9.0, "int8": 8.5}, "fp32"),
        ({"fp32": 10.0, "bf16": 5.0, "int8": 6.0}, "bf16"),
        ({"fp32": 10.0, "bf16": 5.0, "int8": 3.0}, "int8"),
    ],
)
def test_auto_gives_exactness_up_only_for_speed(
    step_ms: dict[Precision, float], chosen: Precision
) -> None:
    assert fastest(step_ms) == chosen


def test_the_trial_measures_all_and_says_its_choice() -> None:
    ticks = itertools.count()
    trial = choose_precision(tiny_model().config, clock=lambda: float(next(ticks)))
    assert set(trial.step_ms) == {"fp32", "bf16", "int8"}
    assert trial.chosen == "fp32"  # By that clock all take the same time.
    assert str(trial).startswith("Precision fp32 (a step's weights: fp32 ")
    assert "--precision fp32" in str(Trial("int8", trial.step_ms))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    copy.deepcopy(tiny_model()).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_a_model_is_loaded_in_the_precision_that_was_asked(directory: Path) -> None:
    loaded = {
        name: load(directory, "tiny", device="cpu", precision=name)
        for name in loader.PRECISIONS
        if name != "auto"
    }
    assert [each.precision for each in loaded.values()] == ["fp32", "fp32", "bf16", "int8"]
    heads = [type(each.model.lm_head) for each in loaded.values()]
    assert heads == [PrepackedLinear, PrepackedLinear, PrepackedLinear, Int8Linear]
    assert loaded["bf16"].kv.dtype == loaded["int8"].kv.dtype == torch.bfloat16
    assert len({each.fingerprint for each in loaded.values()}) == 3


def test_auto_says_what_it_took(directory: Path) -> None:
    said: list[str] = []
    loaded = load(directory, "tiny", device="cpu", precision="auto", say=said.append)
    assert len(said) == 1
    assert said[0].startswith(f"Precision {loaded.precision} ")


def test_an_unknown_precision_is_refused(directory: Path) -> None:
    with pytest.raises(ConfigurationError, match="no precision 'fp4'"):
        load(directory, "tiny", precision="fp4")
