"""A kernel for the paged layout that runs anywhere: plain attention, row by row."""

import itertools

import torch
from torch.nn.functional import scaled_dot_product_attention

from eloquent_server.engine.paged import PageTable


def plain_kernel(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: PageTable,
    scaling: float,
) -> torch.Tensor:
    """What `varlen_attn` documents, row by row; it touches nothing but what the table names."""
    output = torch.full_like(query, float("nan"))
    size = keys.shape[1]
    starts = table.query_starts.tolist()
    assert starts[-1] == len(query)
    assert table.longest_query == max(b - a for a, b in itertools.pairwise(starts))
    assert table.longest_keys == int(table.key_counts.max())
    assert table.key_starts.diff().tolist() == table.key_counts.tolist()
    repeat = query.shape[1] // keys.shape[2]
    for i, count in enumerate(table.key_counts.tolist()):
        pages = table.pages[i, : -(-count // size)].long()
        part = slice(starts[i], starts[i + 1])
        stored = [pool[pages].flatten(0, 1)[:count].transpose(0, 1) for pool in (keys, values)]
        new = part.stop - part.start
        hidden = torch.arange(count)[None] > torch.arange(count - new, count)[:, None]
        output[part] = scaled_dot_product_attention(
            query[part].transpose(0, 1),
            stored[0].repeat_interleave(repeat, 0),
            stored[1].repeat_interleave(repeat, 0),
            attn_mask=torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf),
            scale=scaling,
        ).transpose(0, 1)
    return output
