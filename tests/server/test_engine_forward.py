"""Our forward of plain decoders computes what transformers' does; other models run their own."""

import copy
import functools
from typing import Any

import pytest
import torch
from tiny_model import CONTEXT_TOKENS, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from eloquent_server.engine.attention import KvShape, Segment, install
from eloquent_server.engine.forward import DecoderForward, forward_of, is_plain_decoder
from eloquent_server.engine.kv import SlabCache
from eloquent_server.engine.linear import Part, PrepackedLinear, prepack, replace_linears
from eloquent_server.engine.precision import Int8Linear
from eloquent_server.engine.runner import Runner

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": CONTEXT_TOKENS // 4,
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "llama with scaled positions": ("llama", {"rope_parameters": YARN}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3 without groups": ("qwen3", {"num_key_value_heads": 4, "attention_bias": True}),
}
TEXTS = [[(11 * i + 2) % 256 for i in range(70)], [(5 * i + 9) % 256 for i in range(17)]]


@functools.cache
def decoder(name: str) -> Any:
    """Return a model whose norms and biases are not a fresh one's ones and zeros; copy it."""
    model_type, settings = DECODERS[name]
    config = AutoConfig.for_model(**{**tiny_model(model_type).config.to_dict(), **settings})
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa"
        )
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def by_transformers(model: Any) -> torch.Tensor:
    """Return the logits of the texts' last two tokens, [texts, 2, vocab]."""
    return torch.stack(
        [model(torch.tensor([text]), use_cache=False).logits[0, -2:] for text in TEXTS]
    )


def by_the_engine(model: Any) -> torch.Tensor:
    """Return the same: one text comes in chunks, the other while it goes on; then both decode."""
    install(model)
    config = model.config
    shape = KvShape(config.num_hidden_layers, config.num_key_value_heads, 16, model.dtype)
    layout = SlabCache(shape, max_tokens=CONTEXT_TOKENS, device=torch.device("cpu"), rows=2)
    runner = Runner(model, layout)
    long, short = TEXTS
    runner.run([Segment(0, 0, long[:30])])
    runner.run([Segment(0, 30, long[30:-2]), Segment(1, 0, short[:-2])])
    steps = []
    for back in (2, 1):
        at = [(row, len(text) - back, text) for row, text in enumerate(TEXTS)]
        logits = runner.run([Segment(row, i, text[i : i + 1]) for row, i, text in at])
        steps.append(torch.cat(logits))
    return torch.stack(steps, dim=1)


def differ(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("layout", ["as loaded", "prepacked", "joined", "joined and prepacked"])
def test_same_logits_as_transformers(name: str, layout: str) -> None:
    model = copy.deepcopy(decoder(name))
    expected = by_transformers(model)
    if layout != "as loaded":
        make = PrepackedLinear if "prepacked" in layout else lambda linear: linear
        replaced = replace_linears(model, make, join="joined" in layout)
        assert replaced == 2 * 7 + 1
    assert isinstance(forward_of(model), DecoderForward)
    assert differ(by_the_engine(model), expected) < 2e-6
    # transformers' forward still runs on it: the loader compares with it.
    assert differ(by_transformers(model), expected) < 2e-6


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_in_bfloat16_it_is_as_near_as_transformers_is(name: str) -> None:
    exact = by_transformers(decoder(name))
    model = copy.deepcopy(decoder(name)).bfloat16()
    theirs = differ(by_transformers(model).float(), exact)
    ours = differ(by_the_engine(model).float(), exact)
    assert 0 < ours < 1.5 * theirs


def test_joined_weights_replace_the_separate_ones() -> None:
    model = copy.deepcopy(decoder("llama"))
    before = sum(parameter.numel() for parameter in model.parameters())
    replace_linears(model, lambda linear: linear, join=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == before
    attention, mlp = (model.model.layers[0].self_attn, model.model.layers[0].mlp)
    parts = [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]
    assert all(isinstance(part, Part) for part in parts)
    assert len({id(part.whole) for part in parts}) == 2


def test_int8_rounds_joined_weights_as_it_rounds_separate_ones() -> None:
    separate, joined = (copy.deepcopy(decoder("qwen2")) for _ in range(2))
    replace_linears(separate, Int8Linear)
    replace_linears(joined, Int8Linear, join=True)
    inputs = torch.randn(3, 64).bfloat16()
    one, other = (model.model.layers[1].self_attn for model in (separate, joined))
    for name in ("q_proj", "k_proj", "v_proj"):
        assert torch.equal(getattr(one, name)(inputs), getattr(other, name)(inputs))


def test_linears_of_which_some_have_a_bias_stay_apart() -> None:
    model = copy.deepcopy(decoder("qwen2"))
    attention = model.model.layers[0].self_attn
    attention.k_proj.bias = None
    expected = by_transformers(model)
    assert prepack(model, join=True) == 2 * 7 + 1
    assert isinstance(attention.k_proj, PrepackedLinear)
    assert differ(by_the_engine(model), expected) < 2e-6


def other_activation() -> Any:
    model = copy.deepcopy(decoder("llama"))
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()
    model.config.hidden_act = "gelu"
    return model


def other_family() -> Any:
    config = {**tiny_model("llama").config.to_dict(), "model_type": "olmo2"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()


def changed_forward() -> Any:
    model = copy.deepcopy(decoder("llama"))
    norm = model.model.layers[1].input_layernorm
    own = norm.forward
    norm.forward = lambda hidden: own(hidden) * 0.5
    return model


@pytest.mark.parametrize("make", [other_activation, other_family, changed_forward])
def test_a_model_that_differs_runs_its_own_forward(make: Any) -> None:
    model = make()
    assert not is_plain_decoder(model)
    expected = by_transformers(model)
    assert differ(by_the_engine(model), expected) < 2e-6
