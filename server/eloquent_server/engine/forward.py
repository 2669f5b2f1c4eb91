"""The model's forward: its tokens in, its logits out.

Llama, Qwen2, Qwen3 and Mistral have the same decoder. For them there is a forward of our own over
the modules that transformers loaded, in a third of the operators: at small batches a step is
otherwise as long in Python as in reading weights. Every other model runs the forward that
transformers gives it. The loader compares both on every model that it loads.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import rms_norm, silu

from eloquent_server.engine.attention import Plan
from eloquent_server.engine.linear import GATE_UP, QKV, Product, side_by_side

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Plan], torch.Tensor]
"""Takes token ids [tokens], their positions [tokens], indices of those whose logits are wanted
[kept], and the step's plan; returns logits [kept, vocab]."""

_DECODERS = {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"}


def forward_of(model: Any) -> Forward:
    """Return the forward for a causal language model of transformers."""
    return DecoderForward(model) if is_plain_decoder(model) else functools.partial(_given, model)


def is_plain_decoder(model: Any) -> bool:
    """Return whether `DecoderForward` computes what the model's own forward does."""
    kind = type(model)
    return (
        kind.__module__.startswith("transformers.models.")
        and kind.__name__ in _DECODERS
        and model.config.hidden_act == "silu"
        # A forward set on one object, as accelerate's hooks do, has a purpose of its own.
        and not any("forward" in vars(module) for module in model.modules())
    )


class DecoderForward:
    """A `Forward` over the modules of a plain decoder.

    They may be replaced (prepacked, joined, quantised) before, but not afterwards.
    """

    def __init__(self, model: Any) -> None:
        self._embed = model.model.embed_tokens
        self._rotary = model.model.rotary_emb
        self._layers = [_Layer(layer) for layer in model.model.layers]
        self._norm = _norm(model.model.norm)
        self._head = model.lm_head

    def __call__(
        self, tokens: torch.Tensor, positions: torch.Tensor, kept: torch.Tensor, plan: Plan
    ) -> torch.Tensor:
        """Run the model; see `Forward`."""
        hidden = self._embed(tokens)  # A copy, so layers may add to it in place.
        cosine, sine = self._rotary(hidden[None], positions[None])
        # For `_rotate`: one entry for all heads, and the sign of the turned half.
        cosine, sine = cosine[0, :, None], sine[0, :, None].clone()
        sine[..., : sine.shape[-1] // 2].neg_()
        for layer in self._layers:
            layer.add_to(hidden, cosine, sine, plan)
        logits: torch.Tensor = self._head(self._norm(hidden[kept]))
        return logits


def _norm(norm: Any) -> Product:
    """RMSNorm in one call."""
    return functools.partial(
        rms_norm,
        normalized_shape=norm.weight.shape,
        weight=norm.weight,
        eps=norm.variance_epsilon,
    )


def _head_norm(attention: Any) -> Product | None:
    """Qwen3's norms of queries and of keys as one, of both side by side; None: there are none."""
    if not hasattr(attention, "q_norm"):
        return None
    config, norms = attention.config, (attention.q_norm, attention.k_norm)
    counts = config.num_attention_heads, config.num_key_value_heads
    weight = torch.cat(
        [norm.weight.expand(count, -1) for norm, count in zip(norms, counts, strict=True)]
    )
    shape, epsilon = norms[0].weight.shape, norms[0].variance_epsilon
    return lambda heads: rms_norm(heads, shape, eps=epsilon).mul_(weight)


class _Layer:
    """One layer of the decoder."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._index: int = attention.layer_idx
        self._scaling: float = attention.scaling
        self._head_dim: int = attention.head_dim
        self._heads = int(attention.config.num_attention_heads)
        self._rotated = self._heads + int(attention.config.num_key_value_heads)
        self._attention_norm = _norm(layer.input_layernorm)
        self._qkv = side_by_side(attention, QKV)
        self._head_norm = _head_norm(attention)
        self._output = attention.o_proj
        self._mlp_norm = _norm(layer.post_attention_layernorm)
        self._gate_up = side_by_side(mlp, GATE_UP)
        self._down = mlp.down_proj

    def add_to(
        self, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, plan: Plan
    ) -> None:
        """Add what the layer computes to `hidden` [tokens, features].

        `cosine` and `sine` are [tokens, 1, head_dim], the latter's first half negated.
        """
        tokens = hidden.shape[0]
        heads = self._qkv(self._attention_norm(hidden)).view(tokens, -1, self._head_dim)
        turned = heads[:, : self._rotated]
        if self._head_norm is not None:
            turned = self._head_norm(turned)
        turned = _rotate(turned, cosine, sine).transpose(0, 1)[None]
        attended = plan.attend(
            self._index,
            turned[:, : self._heads],
            turned[:, self._heads :],
            heads[:, self._rotated :].transpose(0, 1)[None],
            self._scaling,
        )
        hidden += self._output(attended.reshape(tokens, -1))
        gate, up = self._gate_up(self._mlp_norm(hidden)).chunk(2, dim=-1)
        hidden += self._down(silu(gate, inplace=True).mul_(up))


def _rotate(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn each pair of features (i, i + half) by its angle; see RoFormer, arXiv 2104.09864."""
    swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
    return (heads * cosine).addcmul_(swapped, sine)


def _given(
    model: Any, tokens: torch.Tensor, positions: torch.Tensor, kept: torch.Tensor, plan: Plan
) -> torch.Tensor:
    """Run the forward that transformers gives the model; see `Forward`."""
    output = model(
        input_ids=tokens[None],
        position_ids=positions[None],
        use_cache=False,
        logits_to_keep=kept,
        eloquent_plan=plan,
    )
    logits: torch.Tensor = output.logits[0]
    return logits
