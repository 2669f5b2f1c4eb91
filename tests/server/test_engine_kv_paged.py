"""The paged pool's bookkeeping, with a plain kernel in place of CUDA's."""

import random

import pytest
import torch
from plain_kernel import plain_kernel
from tiny_model import CONTEXT_TOKENS, Sink, reference_tokens, tiny_loaded

from eloquent_server.backends.base import Finish
from eloquent_server.engine.attention import KvShape, Segment
from eloquent_server.engine.engine import Engine
from eloquent_server.engine.paged import PagedCache
from eloquent_server.engine.turn import TurnRequest

CPU = torch.device("cpu")
TENSORS = ("query_starts", "key_starts", "key_counts", "pages")
SHAPE = KvShape(layers=2, heads=2, head_dim=8, dtype=torch.float32)


def new_cache(pages: int = 12, rows: int = 3) -> PagedCache:
    return PagedCache(
        SHAPE, pages=pages, device=CPU, rows=rows, page_tokens=32, kernel=plain_kernel
    )


def block(value: float, tokens: int = 16) -> torch.Tensor:
    return torch.full(SHAPE.block(tokens), value)


def owned(cache: PagedCache) -> list[int]:
    return [page for pages in cache._owned for page in pages]


def test_blocks_lie_across_pages() -> None:
    cache = new_cache()
    first = torch.randn(SHAPE.block(16))
    second = torch.randn(SHAPE.block(40))
    cache.write(1, 0, [first])
    cache.write(0, 0, [block(9.0, 50)])
    cache.write(1, 16, [second, block(3.0)])
    assert torch.equal(cache.read(1, 0, 16), first)
    assert torch.equal(cache.read(1, 16, 56), second)
    assert torch.equal(cache.read(1, 20, 50), torch.cat([second, block(3.0)], 3)[:, :, :, 4:34])
    assert torch.equal(cache.read(0, 0, 50), block(9.0, 50))
    assert [len(pages) for pages in cache._owned] == [2, 3, 0]


def test_too_few_pages_take_none() -> None:
    cache = new_cache(pages=3)
    cache.write(0, 0, [block(1.0, 40)])
    with pytest.raises(MemoryError, match=r"2 pages .* 1 are free"):
        cache.plan([Segment(0, 40, [0] * 25), Segment(1, 0, [0])])
    with pytest.raises(MemoryError):
        cache.write(1, 0, [block(1.0, 33)])
    assert len(cache._free) == 1
    assert torch.equal(cache.read(0, 0, 40), block(1.0, 40))
    cache.plan([Segment(0, 40, [0] * 24), Segment(1, 0, [0] * 32)])
    assert not cache._free


def test_a_freed_row_gives_its_pages_back_and_may_be_cleared() -> None:
    cache = new_cache(pages=2, rows=2)
    cache.write(0, 0, [block(float("nan"), 64)])
    cache.free(0, clear=True)
    assert len(cache._free) == 2
    cache.write(1, 0, [block(1.0, 1)])
    assert torch.isfinite(cache._pool).all()
    cache.free(0)
    cache.free(1)
    cache.free(1)
    assert sorted(cache._free) == [0, 1]


def test_capacity_holds_however_tokens_are_spread() -> None:
    cache = new_cache(pages=12, rows=3)
    assert cache.capacity_tokens == 12 * 32 - 3 * 31
    rng = random.Random(2)
    for _ in range(200):
        cuts = sorted(rng.randint(0, cache.capacity_tokens) for _ in range(2))
        lengths = [cuts[0], cuts[1] - cuts[0], cache.capacity_tokens - cuts[1]]
        for row, length in enumerate(lengths):
            if length:
                cache.plan([Segment(row, 0, [0] * length)])
        for row in range(3):
            cache.free(row)


@pytest.mark.parametrize("seed", range(5))
def test_no_page_has_two_owners_whatever_comes(seed: int) -> None:
    rng = random.Random(seed)
    cache = new_cache()
    content = {row: torch.zeros(SHAPE.block(0)) for row in range(3)}
    for _ in range(150):
        row = rng.randrange(3)
        if rng.random() < 0.2:
            cache.free(row)
            content[row] = torch.zeros(SHAPE.block(0))
        else:
            new = torch.randn(SHAPE.block(rng.randint(1, 40)))
            try:
                cache.write(row, content[row].shape[3], [new])
            except MemoryError:
                pass
            else:
                content[row] = torch.cat([content[row], new], 3)
        assert sorted(owned(cache) + cache._free) == list(range(12))
        for other, expected in content.items():
            assert torch.equal(cache.read(other, 0, expected.shape[3]), expected)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_an_engine_on_pages_gives_the_same_answers(model_type: str) -> None:
    loaded = tiny_loaded(model_type)
    layout = PagedCache(
        loaded.kv,
        pages=4 * -(-CONTEXT_TOKENS // 32),
        device=CPU,
        rows=4,
        page_tokens=32,
        kernel=plain_kernel,
    )
    engine = Engine(loaded, layout=layout, max_running=4, prefill_chunk_tokens=24)
    rng = random.Random(4)
    stem = [rng.randrange(256) for _ in range(70)]
    jobs = []
    for i in range(10):
        prompt = stem[: rng.randint(1, 70)] + [i] * rng.randint(1, 50)
        sink = Sink()
        engine.submit(TurnRequest(prompt=prompt, seed=0, max_tokens=20, temperature=0), sink)
        jobs.append((prompt, sink))
    for prompt, sink in jobs:
        assert isinstance(sink.end(), Finish)
        assert sink.tokens == reference_tokens(prompt, 20, model_type)
    engine.close()
    assert engine.stats().cached_tokens > 0
    assert not owned(layout)


def test_the_pool_counts_whole_beside_the_prefix_cache() -> None:
    """On a GPU its memory is gone from the start, so the tree must not count on it."""
    loaded = tiny_loaded()
    layout = PagedCache(
        loaded.kv, pages=20, device=CPU, rows=2, page_tokens=32, kernel=plain_kernel
    )
    budget = layout.fixed_bytes + 160 * loaded.kv.token_bytes
    engine = Engine(loaded, layout=layout, max_running=2, kv_bytes=budget)
    for i in range(8):
        sink = Sink()
        engine.submit(TurnRequest(prompt=[i] * 90, seed=0, max_tokens=2, temperature=0), sink)
        assert isinstance(sink.end(), Finish)
        assert len(engine._cache.tree) <= 10
    engine.close()
    assert layout.fixed_bytes == 20 * 32 * loaded.kv.token_bytes
    assert layout.fixed_bytes < engine.stats().kv_bytes <= budget
    assert engine.stats().evicted_blocks > 0


def test_torchs_kernel_takes_what_it_is_given() -> None:
    """On the device `meta`, where nothing is computed, and all checks of arguments are made."""
    meta = torch.device("meta")
    shape = KvShape(layers=2, heads=2, head_dim=64, dtype=torch.bfloat16)
    cache = PagedCache(shape, pages=6, device=meta, rows=2)
    with torch.inference_mode():
        cache.write(1, 0, [torch.zeros(shape.block(16), dtype=shape.dtype)] * 20)
        for segments in (
            [Segment(0, 0, [1] * 5), Segment(1, 320, [1])],
            [Segment(0, 5, [1]), Segment(1, 321, [1])],
        ):
            tokens = sum(len(segment.tokens) for segment in segments)
            plan = cache.plan(segments)
            table = plan._table
            assert {plan._slots.device, *(getattr(table, name).device for name in TENSORS)} == {
                meta
            }
            assert {getattr(table, name).dtype for name in TENSORS} == {torch.int32}
            query = torch.empty(1, 4, tokens, 64, dtype=shape.dtype, device=meta)
            new = torch.empty(1, 2, tokens, 64, dtype=shape.dtype, device=meta)
            attended = plan.attend(1, query, new, new, 0.125)
            assert attended.shape == (1, tokens, 4, 64)
            assert (attended.device, attended.dtype) == (meta, torch.bfloat16)
        assert cache.read(1, 0, 16).device == meta


def test_too_small_a_pool_makes_turns_take_turns() -> None:
    loaded = tiny_loaded()
    layout = PagedCache(
        loaded.kv, pages=11, device=CPU, rows=4, page_tokens=32, kernel=plain_kernel
    )
    engine = Engine(loaded, layout=layout, max_running=4)
    prompts = [[i] * 90 for i in range(6)]
    sinks = [Sink() for _ in prompts]
    for prompt, sink in zip(prompts, sinks, strict=True):
        engine.submit(TurnRequest(prompt=prompt, seed=0, max_tokens=70, temperature=0), sink)
    for prompt, sink in zip(prompts, sinks, strict=True):
        assert isinstance(sink.end(), Finish)
        assert sink.tokens == reference_tokens(prompt, 70)
    engine.close()
    assert not owned(layout)
