"""Keys and values on CPU: one slab, one contiguous row per turn, read by torch's attention.

A slab is [layers, keys and values, rows, heads, tokens, head_dim]. Rows never move. Decoding rows
that lie side by side are attended to in one call, their query heads grouped by key-value head, so
that keys are read once and never repeated; a prompt's chunk is a call of its own.
"""

import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from eloquent_server.engine.attention import KvShape, Segment

GROUP_WASTE_TOKENS = 256
"A group of rows is read to its longest; a call of its own costs as much as reading so many tokens."

_KEPT_TOKENS = 512
"So much of a row that became free stays in memory for the next turn."
_ALIGNED_TOKENS = 1024
"Rows are a multiple of this, so that each starts on a page whatever its head_dim."
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0
"Python's mmap module does not name it."


class SlabCache:
    """Implements `KvLayout` with one slab whose memory the system maps when it is touched.

    Whatever stands in a row beyond a turn's length is finite, since a masked NaN would still spoil
    sums.
    """

    def __init__(
        self, shape: KvShape, *, max_tokens: int, device: torch.device, rows: int = 1
    ) -> None:
        """Make room for `rows` turns of `max_tokens`; memory is taken as they grow."""
        self._shape = shape
        self._rows = rows
        tokens = -(-max_tokens // _ALIGNED_TOKENS) * _ALIGNED_TOKENS
        self._capacity = tokens
        self._filled = [0] * rows
        self._pages: mmap.mmap | None = None
        self._slab = self._allocate(
            (shape.layers, 2, rows, shape.heads, tokens, shape.head_dim), device
        )

    @property
    def shape(self) -> KvShape:
        """What a token looks like."""
        return self._shape

    @property
    def rows(self) -> int:
        """How many turns may run."""
        return self._rows

    @property
    def capacity_tokens(self) -> int:
        """How many tokens fit; a row is as long as a turn can be."""
        return self._rows * self._capacity

    @property
    def fixed_bytes(self) -> int:
        """Nothing: memory is taken when a row grows into it."""
        return 0

    def order(self, segments: Sequence[Segment]) -> list[int]:
        """Single tokens by row first, so that a group of rows is a slice; then the rest."""
        return sorted(
            range(len(segments)), key=lambda i: (len(segments[i].tokens) > 1, segments[i].row)
        )

    def plan(self, segments: Sequence[Segment]) -> "SlabPlan":
        """Prepare a forward; see `KvLayout.plan`."""
        for segment in segments:
            self._filled[segment.row] = max(self._filled[segment.row], segment.end)
        return SlabPlan(self._slab, segments)

    def read(self, row: int, start: int, end: int) -> torch.Tensor:
        """Return a copy of tokens; see `KvLayout.read`."""
        return self._slab[:, :, row, :, start:end].clone()

    def write(self, row: int, start: int, blocks: Sequence[torch.Tensor]) -> None:
        """Copy blocks into a row; see `KvLayout.write`."""
        for block in blocks:
            end = start + block.shape[3]
            self._slab[:, :, row, :, start:end] = block
            start = end
        self._filled[row] = max(self._filled[row], start)

    def free(self, row: int, *, clear: bool = False) -> None:
        """Forget a row's content and give most of its memory back; see `KvLayout.free`."""
        filled = self._filled[row]
        if clear:
            self._slab[:, :, row, :, :filled] = 0
        if filled > _KEPT_TOKENS and self._pages is not None:
            self._give_back(row, filled)
            filled = _KEPT_TOKENS
        self._filled[row] = filled

    def _give_back(self, row: int, filled: int) -> None:
        if self._pages is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        layers, _, rows, heads, tokens, dim = self._slab.shape
        token_bytes = dim * self._slab.element_size()
        page = mmap.PAGESIZE
        start = -(-_KEPT_TOKENS * token_bytes // page) * page
        length = -(-filled * token_bytes // page) * page - start
        for plane in range(layers * 2):
            for head in range(heads):
                first = ((plane * rows + row) * heads + head) * tokens * token_bytes
                if length > 0:
                    self._pages.madvise(mmap.MADV_DONTNEED, first + start, length)

    def _allocate(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        if device.type != "cpu" or not hasattr(mmap, "MAP_PRIVATE"):
            return torch.zeros(shape, dtype=self._shape.dtype, device=device)
        # `torch.zeros` would write every page; fresh pages from the system are zero, and cost
        # nothing until a turn grows into them.
        count = math.prod(shape)
        self._pages = mmap.mmap(
            -1,
            count * self._shape.dtype.itemsize,
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE,
        )
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self._pages.madvise(mmap.MADV_NOHUGEPAGE)  # One token would take two megabytes.
        return torch.frombuffer(self._pages, dtype=self._shape.dtype, count=count).view(shape)


@dataclass(frozen=True, slots=True)
class _Group:
    """Decoding rows side by side: packed tokens `first` to `last`, rows from `row` on."""

    first: int
    last: int
    row: int
    longest: int
    mask: torch.Tensor
    "[rows, 1, 1, longest], 0 or -inf; empty if all rows are equally long."


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Several tokens of one row: packed tokens `first` to `last`, positions `start` to `end`."""

    first: int
    last: int
    row: int
    start: int
    end: int
    mask: torch.Tensor
    "[tokens, end], 0 or -inf; empty if the chunk starts its row: then it is simply causal."


class SlabPlan:
    """One forward over a slab; implements `Plan`."""

    def __init__(self, slab: torch.Tensor, segments: Sequence[Segment]) -> None:
        self._slab = slab
        singles = [segment for segment in segments if len(segment.tokens) == 1]
        self._count = len(singles)
        self._single_rows = torch.tensor([s.row for s in singles], device=slab.device)
        self._single_positions = torch.tensor([s.start for s in singles], device=slab.device)
        self._groups = [self._group(singles, a, b) for a, b in group_rows(singles)]
        self._chunks: list[_Chunk] = []
        first = self._count
        for segment in segments[self._count :]:
            self._chunks.append(self._chunk(segment, first))
            first += len(segment.tokens)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Write and attend; see `Plan.attend`."""
        slab = self._slab[layer]
        for plane, new in ((slab[0], keys[0]), (slab[1], values[0])):
            if self._count:
                at = self._single_rows, slice(None), self._single_positions
                plane[at] = new[:, : self._count].transpose(0, 1)
            for chunk in self._chunks:
                plane[chunk.row, :, chunk.start : chunk.end] = new[:, chunk.first : chunk.last]
        _, heads, tokens, dim = query.shape
        output = query.new_empty(1, tokens, heads, dim)
        grouped = query[0].view(keys.shape[1], -1, tokens, dim)  # [kv heads, group, tokens, dim]
        for group in self._groups:
            rows = slice(group.row, group.row + group.last - group.first)
            attended = scaled_dot_product_attention(
                grouped[:, :, group.first : group.last].permute(2, 0, 1, 3),
                slab[0, rows, :, : group.longest],
                slab[1, rows, :, : group.longest],
                attn_mask=group.mask if group.mask.numel() else None,
                scale=scaling,
            )
            output[0, group.first : group.last] = attended.flatten(1, 2)
        for chunk in self._chunks:
            # Every query head of a group reads the same keys: a stride of zero, no copy.
            stored = slab[:, chunk.row, :, None, : chunk.end].expand(
                -1, -1, grouped.shape[1], -1, -1
            )
            attended = scaled_dot_product_attention(
                grouped[:, :, chunk.first : chunk.last],
                stored[0],
                stored[1],
                attn_mask=chunk.mask if chunk.start else None,
                is_causal=not chunk.start,
                scale=scaling,
            )
            output[0, chunk.first : chunk.last] = attended.flatten(0, 1).transpose(0, 1)
        return output

    def _group(self, singles: Sequence[Segment], first: int, last: int) -> _Group:
        ends = [segment.end for segment in singles[first:last]]
        longest = max(ends)
        mask = torch.zeros(0, device=self._slab.device)
        if min(ends) < longest:
            limits = torch.tensor(ends, device=self._slab.device)[:, None, None, None]
            hidden = torch.arange(longest, device=self._slab.device) >= limits
            mask = self._additive(hidden)
        return _Group(first, last, singles[first].row, longest, mask)

    def _chunk(self, segment: Segment, first: int) -> _Chunk:
        mask = torch.zeros(0, device=self._slab.device)
        if segment.start:
            keys = torch.arange(segment.end, device=self._slab.device)
            mask = self._additive(keys[None, :] > keys[segment.start :, None])
        last = first + len(segment.tokens)
        return _Chunk(first, last, segment.row, segment.start, segment.end, mask)

    def _additive(self, hidden: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(hidden.shape, dtype=self._slab.dtype, device=self._slab.device)
        return zeros.masked_fill_(hidden, -math.inf)


def group_rows(singles: Sequence[Segment]) -> list[tuple[int, int]]:
    """Cut segments of single tokens, sorted by row, into groups that are worth one call each.

    Returns index ranges. The rows of a group lie side by side, and reading them all to the longest
    reads at most `GROUP_WASTE_TOKENS` in vain.
    """
    groups: list[tuple[int, int]] = []
    first = longest = total = 0
    for i, segment in enumerate(singles):
        count, most = i - first + 1, max(longest, segment.end)
        beside = i == first or segment.row == singles[i - 1].row + 1
        if beside and count * most - (total + segment.end) <= GROUP_WASTE_TOKENS:
            longest, total = most, total + segment.end
        else:
            groups.append((first, i))
            first, longest, total = i, segment.end, segment.end
    if singles:
        groups.append((first, len(singles)))
    return groups
