"""Keys and values on CUDA: a pool of pages, a table of pages per row, torch's varlen attention.

One kernel call a layer serves decoding rows and prompts' chunks alike. Written from torch's
sources; its bookkeeping is tested on CPU with a kernel of the same interface, its speed is not
measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from eloquent_server.engine.attention import KvShape, Segment

PAGE_TOKENS = 256
"What FlashAttention 2's paged kernel asks pages to be a multiple of (`mha_varlen_fwd`)."


@dataclass(frozen=True, slots=True)
class PageTable:
    """Which keys a kernel call reads, on the device; row i is the i-th segment."""

    query_starts: torch.Tensor
    "[segments + 1], int32: where each segment's queries begin; the last is their number."
    key_starts: torch.Tensor
    "[segments + 1], int32: the same for its keys, had they been packed."
    key_counts: torch.Tensor
    "[segments], int32."
    pages: torch.Tensor
    "[segments, most pages], int32; beyond a segment's own stands page 0, which is not read."
    longest_query: int
    longest_keys: int


class Kernel(Protocol):
    """Attention of packed queries to pages; the last query of a segment sees its last key."""

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        table: PageTable,
        scaling: float,
    ) -> torch.Tensor:
        """Return [tokens, query heads, head_dim], as `query` is.

        `keys` and `values` are [pages, page tokens, heads, head_dim].
        """


def flash_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: PageTable,
    scaling: float,
) -> torch.Tensor:
    """Run torch's varlen attention (`torch.nn.attention.varlen`, torch 2.13); a `Kernel`.

    `num_splits=1`: documented there to make a row's result independent of the other rows.
    """
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query.contiguous(),
        keys,
        values,
        table.query_starts,
        table.key_starts,
        table.longest_query,
        table.longest_keys,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=True,
        seqused_k=table.key_counts,
        block_table=table.pages,
        num_splits=1,
    )
    assert isinstance(output, torch.Tensor)
    return output


class PagedCache:
    """Implements `KvLayout` with a pool that rows take pages from as they grow.

    Rows hold no memory that they do not need, wherever it lies; what a page holds beyond its row's
    length is finite.
    """

    def __init__(
        self,
        shape: KvShape,
        *,
        pages: int,
        device: torch.device,
        rows: int = 1,
        page_tokens: int = PAGE_TOKENS,
        kernel: Kernel = flash_attention,
    ) -> None:
        """Take the memory of `pages` at once."""
        self._shape = shape
        self._page_tokens = page_tokens
        self._kernel = kernel
        self._pool = torch.zeros(
            (shape.layers, 2, pages, page_tokens, shape.heads, shape.head_dim),
            dtype=shape.dtype,
            device=device,
        )
        self._free = list(range(pages - 1, -1, -1))
        self._owned: list[list[int]] = [[] for _ in range(rows)]

    @property
    def shape(self) -> KvShape:
        """What a token looks like."""
        return self._shape

    @property
    def rows(self) -> int:
        """How many turns may run."""
        return len(self._owned)

    @property
    def capacity_tokens(self) -> int:
        """How many tokens fit for certain, however they are spread over the rows."""
        pages = len(self._free) + sum(map(len, self._owned))
        return pages * self._page_tokens - self.rows * (self._page_tokens - 1)

    @property
    def fixed_bytes(self) -> int:
        """The whole pool."""
        return self._pool.nbytes

    def order(self, segments: Sequence[Segment]) -> list[int]:
        """Any order will do."""
        return list(range(len(segments)))

    def plan(self, segments: Sequence[Segment]) -> "PagedPlan":
        """Prepare a forward; see `KvLayout.plan`.

        Raises:
            MemoryError: there are too few pages; none was taken.
        """
        self._reserve({segment.row: segment.end for segment in segments})
        slots = [slot for s in segments for slot in self._slots(s.row, s.start, s.end)]
        return PagedPlan(self._pool, self._index(slots), self._table(segments), self._kernel)

    def read(self, row: int, start: int, end: int) -> torch.Tensor:
        """Return a copy of tokens; see `KvLayout.read`."""
        slots = self._index(self._slots(row, start, end))
        return self._tokens().index_select(2, slots).transpose(2, 3).contiguous()

    def write(self, row: int, start: int, blocks: Sequence[torch.Tensor]) -> None:
        """Copy blocks into a row; see `KvLayout.write`.

        Raises:
            MemoryError: there are too few pages; none was taken.
        """
        end = start + sum(block.shape[3] for block in blocks)
        self._reserve({row: end})
        slots = self._index(self._slots(row, start, end))
        new = torch.cat([block.to(self._pool.device) for block in blocks], dim=3).transpose(2, 3)
        self._tokens().index_copy_(2, slots, new)

    def free(self, row: int, *, clear: bool = False) -> None:
        """Give a row's pages back; see `KvLayout.free`."""
        pages = self._owned[row]
        if clear and pages:
            self._pool[:, :, pages] = 0
        self._free += reversed(pages)
        self._owned[row] = []

    def _tokens(self) -> torch.Tensor:
        """The pool as [layers, 2, slots, heads, head_dim]."""
        return self._pool.flatten(2, 3)

    def _reserve(self, ends: dict[int, int]) -> None:
        lacking = {
            row: -(-end // self._page_tokens) - len(self._owned[row]) for row, end in ends.items()
        }
        needed = sum(max(0, count) for count in lacking.values())
        if needed > len(self._free):
            raise MemoryError(
                f"{needed} pages of keys and values are needed, and {len(self._free)} are free"
            )
        for row, count in lacking.items():
            for _ in range(count):
                self._owned[row].append(self._free.pop())

    def _slots(self, row: int, start: int, end: int) -> list[int]:
        size, pages = self._page_tokens, self._owned[row]
        return [pages[at // size] * size + at % size for at in range(start, end)]

    def _table(self, segments: Sequence[Segment]) -> PageTable:
        queries = [len(segment.tokens) for segment in segments]
        keys = [segment.end for segment in segments]
        used = [self._owned[s.row][: -(-s.end // self._page_tokens)] for s in segments]
        most = max(map(len, used))
        return PageTable(
            query_starts=self._counts([0, *queries]).cumsum(0, dtype=torch.int32),
            key_starts=self._counts([0, *keys]).cumsum(0, dtype=torch.int32),
            key_counts=self._counts(keys),
            pages=self._counts([pages + [0] * (most - len(pages)) for pages in used]),
            longest_query=max(queries),
            longest_keys=max(keys),
        )

    def _counts(self, values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._pool.device)

    def _index(self, slots: list[int]) -> torch.Tensor:
        return torch.tensor(slots, dtype=torch.long, device=self._pool.device)


class PagedPlan:
    """One forward over a pool; implements `Plan`."""

    def __init__(
        self, pool: torch.Tensor, slots: torch.Tensor, table: PageTable, kernel: Kernel
    ) -> None:
        self._pool = pool
        self._slots = slots
        self._table = table
        self._kernel = kernel

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Write and attend; see `Plan.attend`."""
        pool = self._pool[layer]
        for plane, new in ((pool[0], keys[0]), (pool[1], values[0])):
            plane.flatten(0, 1).index_copy_(0, self._slots, new.transpose(0, 1))
        packed = query[0].transpose(0, 1)
        return self._kernel(packed, pool[0], pool[1], self._table, scaling)[None]
