"""Our attention inside an unmodified model of transformers, and the interface of a KV layout.

transformers calls the attention function that a model's configuration names, with the rotated
queries, keys and values of one layer, and hands on keyword arguments that it does not know
(`AttentionInterface`). So one forward takes a step's tokens of all turns packed in a single row,
[1, tokens], and a `Plan` among those arguments knows which token is whose.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

IMPLEMENTATION = "eloquent"
"The name under which `install` registers the attention with transformers."

_LACKING = {
    "sliding_window": "sliding-window attention",
    "softcap": "soft-capped attention",
    "s_aux": "attention sinks",
    "position_bias": "a position bias in its attention",
}
"Keyword arguments by which transformers' models ask their attention for more than we have."


class UnsupportedAttentionError(TypeError):
    """The model asks for a kind of attention that the engine does not have."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """What a token's keys and values look like."""

    layers: int
    heads: int
    "Key-value heads, fewer than query heads under grouped-query attention."
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.layers * self.heads * self.head_dim * self.dtype.itemsize

    def block(self, tokens: int) -> tuple[int, int, int, int, int]:
        """The shape of a block of tokens: [layers, keys and values, heads, tokens, head_dim]."""
        return (self.layers, 2, self.heads, tokens, self.head_dim)


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one turn for one forward."""

    row: int
    start: int
    "The position of the first token; what lies before is in the row."
    tokens: Sequence[int]
    keep: int = 1
    "Of how many of the last tokens the logits are wanted."

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + len(self.tokens)


class Plan(Protocol):
    """One forward's bookkeeping, made once and used by every layer."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Write the layer's new keys and values and attend to all of each turn's.

        `query` is [1, query heads, tokens, head_dim], `keys` and `values` [1, heads, tokens,
        head_dim], the tokens in the order of `order` of the layout; returns [1, tokens, query
        heads, head_dim].
        """


class KvLayout(Protocol):
    """Where the keys and values of running turns lie; a row belongs to one turn at a time."""

    @property
    def shape(self) -> KvShape:
        """What a token looks like."""

    @property
    def rows(self) -> int:
        """How many turns may run."""

    @property
    def capacity_tokens(self) -> int:
        """How many tokens the rows hold for certain, however they are spread."""

    @property
    def fixed_bytes(self) -> int:
        """What the rows take at least, used or not."""

    def order(self, segments: Sequence[Segment]) -> list[int]:
        """Return the order, as indices, in which the segments should be packed."""

    def plan(self, segments: Sequence[Segment]) -> Plan:
        """Prepare a forward of segments in the order of `order`; at most one per row.

        Raises:
            MemoryError: there is no room for the new tokens.
        """

    def read(self, row: int, start: int, end: int) -> torch.Tensor:
        """Return a copy of the tokens `start` to `end` of a row, `KvShape.block(end - start)`."""

    def write(self, row: int, start: int, blocks: Sequence[torch.Tensor]) -> None:
        """Copy blocks, one after another, into a row from `start` on.

        Raises:
            MemoryError: there is no room for them.
        """

    def free(self, row: int, *, clear: bool = False) -> None:
        """Forget a row's content; `clear` it if it may hold NaN."""


def install(model: Any) -> None:
    """Let `model` use our attention where a forward brings a plan, and torch's elsewhere.

    Raises:
        UnsupportedAttentionError: its attention cannot be replaced.
    """
    AttentionInterface.register(IMPLEMENTATION, _attention)
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:
        raise UnsupportedAttentionError("its attention does not go through AttentionInterface")


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    eloquent_plan: Plan | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    if eloquent_plan is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
        return output, None
    for name, feature in _LACKING.items():
        if others.get(name) is not None:
            raise UnsupportedAttentionError(f"it uses {feature}")
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise UnsupportedAttentionError("its attention is not causal")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return eloquent_plan.attend(module.layer_idx, query, key, value, scale), None
