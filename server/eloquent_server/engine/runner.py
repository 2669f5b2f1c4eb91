"""The model's forward over rows of the cache: one prompt's chunk, or one token of each turn."""

from collections.abc import Sequence
from typing import Any

import torch

from eloquent_server.engine.kv import SlotCache


class Runner:
    """Runs an unmodified causal language model of transformers on a `SlotCache`.

    A call that failed may be repeated: it writes the same positions again.
    """

    def __init__(self, model: Any, cache: SlotCache) -> None:
        self.cache = cache
        self._model = model
        self._device: torch.device = model.device

    def prefill(self, row: int, tokens: Sequence[int], start: int) -> torch.Tensor:
        """Take a chunk of one prompt at position `start` and return the logits after it, [vocab].

        Raises:
            RuntimeError: torch failed, for lack of memory for example.
        """
        end = start + len(tokens)
        positions = torch.arange(start, end, device=self._device)
        return self._forward(row, [list(tokens)], positions[None], end)[0]

    def decode(
        self, first_row: int, tokens: Sequence[int], positions: Sequence[int]
    ) -> torch.Tensor:
        """Take one token for each row from `first_row` on and return the logits, [rows, vocab].

        Raises:
            RuntimeError: torch failed, for lack of memory for example.
        """
        at = torch.tensor(positions, device=self._device)[:, None]
        return self._forward(first_row, [[token] for token in tokens], at, max(positions) + 1)

    @torch.inference_mode()
    def _forward(
        self, first_row: int, tokens: list[list[int]], positions: torch.Tensor, longest: int
    ) -> torch.Tensor:
        self.cache.aim(first_row, positions, longest)
        # [rows, 1, new tokens, longest]: a query sees the keys up to its own position.
        mask = torch.arange(longest, device=self._device) <= positions[:, None, :, None]
        output = self._model(
            input_ids=torch.tensor(tokens, device=self._device),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits
