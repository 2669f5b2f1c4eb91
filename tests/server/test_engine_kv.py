"""The cache's slabs grow, move and clear without losing what is in them."""

import pytest
import torch

from eloquent_server.engine import kv
from eloquent_server.engine.kv import SlotCache

CPU = torch.device("cpu")


def write(cache: SlotCache, row: int, start: int, values: list[float]) -> torch.Tensor:
    end = start + len(values)
    cache.aim(row, torch.arange(start, end)[None], end)
    new = torch.tensor(values).reshape(1, 1, -1, 1)
    keys, stored = cache.update(new, -new, 0)
    assert torch.equal(keys.nan_to_num(), -stored.nan_to_num())
    return keys


def row(keys: torch.Tensor) -> list[float]:
    return [float(value) for value in keys.flatten()]


@pytest.mark.parametrize("lazy", [True, False])
def test_a_row_grows_and_keeps_its_tokens(lazy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "_LAZY_TOKENS", 256)
    cache = SlotCache(max_tokens=1000, device=CPU)
    cache._lazy = lazy
    write(cache, 0, 0, [1.0, 2.0])
    assert cache.capacity == (1, 256)
    write(cache, 0, 2, [3.0] * 300)
    assert cache.capacity == (1, 512)
    write(cache, 2, 0, [9.0])
    assert cache.capacity == (3, 512)
    write(cache, 0, 302, [4.0] * 600)
    assert cache.capacity == (3, 1000)
    assert row(write(cache, 0, 902, [5.0])) == [1, 2] + [3] * 300 + [4] * 600 + [5]
    assert row(write(cache, 2, 1, [8.0])) == [9, 8]


def test_a_batch_writes_each_row_at_its_own_position() -> None:
    cache = SlotCache(max_tokens=64, device=CPU)
    write(cache, 0, 0, [1.0, 2.0, 3.0])
    write(cache, 1, 0, [4.0])
    cache.aim(0, torch.tensor([[3], [1]]), 4)
    new = torch.tensor([7.0, 8.0]).reshape(2, 1, 1, 1)
    keys, _ = cache.update(new, -new, 0)
    assert keys[:, 0, :, 0].tolist() == [[1, 2, 3, 7], [4, 8, 0, 0]]


def test_move_clear_and_release() -> None:
    cache = SlotCache(max_tokens=64, device=CPU)
    write(cache, 0, 0, [float("nan")] * 3)
    write(cache, 1, 0, [1.0, 2.0])
    cache.clear_row(0)
    cache.move_row(1, 0, 2)
    assert row(write(cache, 0, 3, [5.0])) == [1, 2, 0, 5]
    cache.clear_row(7)
    cache.release()
    assert cache.capacity == (0, 0)
    assert row(write(cache, 0, 0, [6.0])) == [6]


def test_rows_are_there_from_the_start() -> None:
    cache = SlotCache(max_tokens=64, device=CPU, rows=8)
    write(cache, 0, 0, [1.0])
    assert cache.capacity == (8, 64)
