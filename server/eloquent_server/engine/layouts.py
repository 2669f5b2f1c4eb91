"""Which layout of keys and values a device gets."""

import torch

from eloquent_server.engine.attention import KvLayout, KvShape
from eloquent_server.engine.kv import SlabCache
from eloquent_server.engine.paged import PAGE_TOKENS, PagedCache


def layout_for(
    shape: KvShape,
    device: torch.device,
    *,
    rows: int,
    row_tokens: int,
    most_bytes: int | None = None,
) -> KvLayout:
    """Return rows of `row_tokens` on CPU; on CUDA a pool of pages that takes `most_bytes`."""
    if device.type != "cuda":
        return SlabCache(shape, max_tokens=row_tokens, device=device, rows=rows)
    pages = rows * -(-row_tokens // PAGE_TOKENS)
    if most_bytes is not None:
        pages = min(pages, most_bytes // (PAGE_TOKENS * shape.token_bytes))
    return PagedCache(shape, pages=pages, device=device, rows=rows)
