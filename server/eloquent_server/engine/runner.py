"""A step's forward: the tokens of all its turns packed in one row, and whose logits are whose."""

from collections.abc import Sequence
from typing import Any

import torch

from eloquent_server.engine.attention import KvLayout, Segment
from eloquent_server.engine.forward import forward_of


class Runner:
    """Runs a causal language model of transformers, with our attention, on a layout.

    A call that failed may be repeated: it writes the same positions again.
    """

    def __init__(self, model: Any, layout: KvLayout) -> None:
        self._forward = forward_of(model)
        self._layout = layout
        self._device: torch.device = model.device

    @torch.inference_mode()
    def run(self, segments: Sequence[Segment]) -> list[torch.Tensor]:
        """Take the segments' tokens and return, for each, the logits [keep, vocab].

        Raises:
            RuntimeError, MemoryError: torch or the layout failed, for lack of memory for example.
        """
        order = self._layout.order(segments)
        packed = [segments[i] for i in order]
        plan = self._layout.plan(packed)
        kept: list[int] = []
        last = 0
        for segment in packed:
            last += len(segment.tokens)
            kept += range(last - segment.keep, last)
        output = self._forward(
            self._tensor([t for segment in packed for t in segment.tokens]),
            self._tensor([p for s in packed for p in range(s.start, s.end)]),
            self._tensor(kept),
            plan,
        )
        if output.is_cuda:
            # Or a step would seem to take no time, and its failure would be another step's.
            torch.cuda.synchronize(output.device)
        logits: list[torch.Tensor] = [output[:0]] * len(segments)
        rows = torch.split(output, [segment.keep for segment in packed])
        for i, part in zip(order, rows, strict=True):
            logits[i] = part
        return logits

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device=self._device)
