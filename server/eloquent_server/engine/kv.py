"""The key-value cache: one slab per layer, one row per turn.

transformers' forward takes it as `past_key_values` unmodified: `update` is all that a decoder
with full attention asks of a cache once it is given a 4-D mask (transformers 5.23,
`masking_utils._preprocess_mask_arguments`: "If the mask is already 4D, simply return as-is").
"""

import math
import mmap
from typing import Any

import torch

_LAZY_TOKENS = 4096
"Length of a fresh slab in memory that the system maps when it is first touched."
_EAGER_TOKENS = 256
"Length of a fresh slab elsewhere. Either way it doubles when it is full."


class SlotCache:
    """Keys and values of the turns in rows 0, 1, 2, ..., grown as needed.

    Rows in use must be contiguous, so that a batch is a view; `move_row` closes gaps. Whatever
    stands in a row beyond a turn's length is finite, since a masked NaN would still spoil sums.
    """

    def __init__(self, *, max_tokens: int, device: torch.device, rows: int = 1) -> None:
        """Make room for `rows` turns of `max_tokens` at most; memory is taken as they grow."""
        self._max_tokens = max_tokens
        self._lazy = device.type == "cpu" and hasattr(mmap, "MAP_PRIVATE")
        self._first_rows = rows if self._lazy else 1
        self._rows = 0
        self._tokens = 0
        self._filled = 0
        # Per layer [rows, heads, tokens, head_dim], made when the layer first writes.
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._first = 0
        self._positions = torch.zeros(0, dtype=torch.long)
        self._longest = 0

    @property
    def capacity(self) -> tuple[int, int]:
        """The rows and the tokens per row that the slabs hold."""
        return self._rows, self._tokens

    def aim(self, first_row: int, positions: torch.Tensor, longest: int) -> None:
        """Say where the next forward writes.

        `positions` is [rows, new tokens], for the rows from `first_row` on; more than one new token
        only with a single row, at consecutive positions. `longest` is the greatest position + 1.
        """
        self._reserve(first_row + positions.shape[0], longest)
        self._first, self._positions, self._longest = first_row, positions, longest
        self._filled = max(self._filled, longest)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [rows, heads, new tokens, head_dim] and return views [rows, heads, longest, ...].

        transformers calls it in every attention layer.
        """
        if layer_idx == len(self._keys):
            slabs = self._new_slab(keys), self._new_slab(values)
            self._keys.append(slabs[0])
            self._values.append(slabs[1])
        return self._write(self._keys[layer_idx], keys), self._write(
            self._values[layer_idx], values
        )

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row over another row."""
        if length == 0:
            return
        for slab in (*self._keys, *self._values):
            slab[target, :, :length] = slab[source, :, :length]

    def clear_row(self, row: int) -> None:
        """Zero a row, which may hold NaN."""
        if row < self._rows:
            for slab in (*self._keys, *self._values):
                slab[row, :, : self._filled] = 0

    def release(self) -> None:
        """Give the memory back; only when no turn is left."""
        self._rows = self._tokens = self._filled = 0
        self._keys.clear()
        self._values.clear()

    def _write(self, slab: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        rows, _, count, _ = new.shape
        view = slab[self._first : self._first + rows, :, : self._longest]
        if rows == 1:
            view[:, :, self._longest - count :] = new
        else:
            index = torch.arange(rows, device=new.device)
            view[index, :, self._positions[:, 0]] = new[:, :, 0]
        return view

    def _new_slab(self, like: torch.Tensor) -> torch.Tensor:
        return self._zeros(like, self._rows, self._tokens)

    def _reserve(self, rows: int, tokens: int) -> None:
        if rows <= self._rows and tokens <= self._tokens:
            return
        first_tokens = _LAZY_TOKENS if self._lazy else _EAGER_TOKENS
        new_tokens, new_rows = self._tokens, self._rows
        if tokens > new_tokens:
            new_tokens = max(tokens, min(max(2 * new_tokens, first_tokens), self._max_tokens))
        if rows > new_rows:
            new_rows = max(rows, 2 * new_rows, self._first_rows)
        # Both lists are complete before either is taken, so that running out of memory on the way
        # leaves the cache as it was.
        grown = [
            [self._grow(slab, new_rows, new_tokens) for slab in slabs]
            for slabs in (self._keys, self._values)
        ]
        self._keys, self._values = grown
        self._rows, self._tokens = new_rows, new_tokens

    def _grow(self, slab: torch.Tensor, rows: int, tokens: int) -> torch.Tensor:
        grown = self._zeros(slab, rows, tokens)
        grown[: slab.shape[0], :, : self._filled] = slab[:, :, : self._filled]
        return grown

    def _zeros(self, like: torch.Tensor, rows: int, tokens: int) -> torch.Tensor:
        shape = (rows, like.shape[1], tokens, like.shape[3])
        if not self._lazy:
            return like.new_zeros(shape)
        # `torch.zeros` writes every page, which takes longer than a decode step; fresh pages from
        # the system are zero, and cost nothing until a turn grows into them.
        count = math.prod(shape)
        pages = mmap.mmap(
            -1, count * like.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            pages.madvise(mmap.MADV_NOHUGEPAGE)  # One token would take two megabytes.
        return torch.frombuffer(pages, dtype=like.dtype, count=count).view(shape)
