"""The slab keeps each row's tokens apart, and packed attention equals plain attention."""

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from eloquent_server.engine import kv
from eloquent_server.engine.attention import KvShape, Segment
from eloquent_server.engine.kv import SlabCache, group_rows

CPU = torch.device("cpu")
SHAPE = KvShape(layers=2, heads=2, head_dim=8, dtype=torch.float32)
QUERY_HEADS = 6


def new_cache(rows: int = 4) -> SlabCache:
    return SlabCache(SHAPE, max_tokens=2000, device=CPU, rows=rows)


def block(value: float, tokens: int = 16) -> torch.Tensor:
    return torch.full(SHAPE.block(tokens), value)


def test_bytes_of_a_token() -> None:
    assert SHAPE.token_bytes == 2 * 2 * 2 * 8 * 4
    assert block(1.0, 1).numel() * 4 == SHAPE.token_bytes


def test_blocks_are_written_and_read_at_their_place() -> None:
    cache = new_cache()
    cache.write(1, 0, [block(1.0), block(2.0)])
    cache.write(1, 32, [block(3.0)])
    cache.write(2, 0, [block(9.0)])
    whole = cache.read(1, 0, 48)
    assert whole.shape == SHAPE.block(48)
    assert [float(whole[1, 1, 1, i, 3]) for i in (0, 15, 16, 31, 32, 47)] == [1, 1, 2, 2, 3, 3]
    assert torch.equal(cache.read(2, 0, 16), block(9.0))
    assert not cache.read(0, 0, 100).any()


def test_what_is_read_is_a_copy() -> None:
    cache = new_cache()
    cache.write(0, 0, [block(1.0)])
    copy = cache.read(0, 0, 16)
    cache.write(0, 0, [block(2.0)])
    assert torch.equal(copy, block(1.0))


def test_a_row_that_may_hold_nan_is_cleared() -> None:
    cache = new_cache()
    cache.write(0, 0, [block(float("nan"))] * 100)
    cache.write(1, 0, [block(1.0)])
    cache.free(0, clear=True)
    assert not cache.read(0, 0, 1600).any()
    assert torch.equal(cache.read(1, 0, 16), block(1.0))


def test_a_long_row_gives_its_memory_back_and_its_neighbours_keep_theirs() -> None:
    cache = new_cache()
    for row in range(4):
        cache.write(row, 0, [block(row + 1.0)] * 120)
    cache.free(2)
    for row in (0, 1, 3):
        assert torch.equal(cache.read(row, 0, 1920), block(row + 1.0, 1920))
    assert torch.isfinite(cache.read(2, 0, 1920)).all()
    assert not cache.read(2, kv._KEPT_TOKENS + 512, 1920).any()
    cache.write(2, 0, [block(7.0)] * 120)
    assert torch.equal(cache.read(2, 0, 1920), block(7.0, 1920))


def expected(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int
) -> torch.Tensor:
    """Plain attention of one turn: [query heads, new, dim] on [heads, all, dim]."""
    repeat = QUERY_HEADS // SHAPE.heads
    hidden = torch.arange(keys.shape[1])[None] > torch.arange(start, keys.shape[1])[:, None]
    return scaled_dot_product_attention(
        query,
        keys.repeat_interleave(repeat, 0),
        values.repeat_interleave(repeat, 0),
        attn_mask=torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf),
        scale=0.3,
    )


@pytest.mark.parametrize("seed", range(6))
def test_packed_attention_equals_attention_of_each_turn(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    cache = new_cache(rows=8)
    lengths = {row: rng.choice([0, 1, 17, 300]) for row in rng.sample(range(8), 5)}
    history = {row: torch.randn(SHAPE.block(length)) for row, length in lengths.items()}
    for row, past in history.items():
        cache.write(row, 0, [past])
    segments = [Segment(row, n, [0] * rng.choice([1, 1, 1, 5, 40])) for row, n in lengths.items()]
    order = cache.order(segments)
    packed = [segments[i] for i in order]
    count = sum(len(segment.tokens) for segment in packed)
    plan = cache.plan(packed)
    for layer in range(SHAPE.layers):
        query = torch.randn(1, count, QUERY_HEADS, SHAPE.head_dim).transpose(1, 2)
        keys = torch.randn(1, count, SHAPE.heads, SHAPE.head_dim).transpose(1, 2)
        values = torch.randn(1, count, SHAPE.heads, SHAPE.head_dim).transpose(1, 2)
        output = plan.attend(layer, query, keys, values, 0.3)
        assert output.shape == (1, count, QUERY_HEADS, SHAPE.head_dim)
        first = 0
        for segment in packed:
            part = slice(first, first + len(segment.tokens))
            first = part.stop
            past = history[segment.row][layer]
            want = expected(
                query[0, :, part],
                torch.cat([past[0], keys[0, :, part]], dim=1),
                torch.cat([past[1], values[0, :, part]], dim=1),
                segment.start,
            )
            torch.testing.assert_close(output[0, part].transpose(0, 1), want)
            stored = cache.read(segment.row, segment.start, segment.end)[layer]
            assert torch.equal(stored[0], keys[0, :, part])
            assert torch.equal(stored[1], values[0, :, part])


def singles(*rows: tuple[int, int]) -> list[Segment]:
    return [Segment(row, length - 1, [0]) for row, length in rows]


def test_rows_side_by_side_are_one_group_unless_one_is_far_longer() -> None:
    assert group_rows([]) == []
    assert group_rows(singles((0, 10), (1, 20), (2, 5))) == [(0, 3)]
    assert group_rows(singles((0, 10), (2, 20), (3, 5))) == [(0, 1), (1, 3)]
    assert group_rows(singles((0, 10), (1, 4000), (2, 3900), (3, 10))) == [(0, 1), (1, 3), (3, 4)]
