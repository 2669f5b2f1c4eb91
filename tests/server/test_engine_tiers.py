"""The second tier: exact, bounded, and never wrong, whatever happens to its files."""

import errno
import logging
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import Sink, eager_model, reference_tokens, tiny_loaded

from eloquent.errors import ConfigurationError
from eloquent_server.backends.base import Finish
from eloquent_server.engine.attention import KvShape
from eloquent_server.engine.blockcodec import DamagedBlockError, decode, encode, encoded_bytes
from eloquent_server.engine.engine import Engine
from eloquent_server.engine.precision import TIER_REGRET_BOUND, regrets
from eloquent_server.engine.settings import KvOptions
from eloquent_server.engine.tiers import RETRY_S, DiskStore, TierStore, open_tier
from eloquent_server.engine.turn import TurnRequest

SHAPE = KvShape(layers=2, heads=2, head_dim=16, dtype=torch.float32)
KEY = b"0123456789abcdef"
RAW_BYTES = encoded_bytes(SHAPE, 16, "raw")


def block(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(SHAPE.block(16), generator=torch.Generator().manual_seed(seed)).to(dtype)


def options(directory: Path, disk_bytes: int = 10 * RAW_BYTES, **more: Any) -> KvOptions:
    return KvOptions(directory=str(directory), disk_bytes=disk_bytes, **more)


def key(i: int) -> bytes:
    return i.to_bytes(16, "big")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_raw_is_exact(dtype: torch.dtype) -> None:
    shape = KvShape(2, 2, 16, dtype)
    data = encode(block(dtype=dtype), KEY, "raw")
    assert len(data) == encoded_bytes(shape, 16, "raw")
    assert torch.equal(decode(data, KEY, shape, "raw"), block(dtype=dtype))


def test_int8_is_a_quarter_and_close() -> None:
    data = encode(block(), KEY, "int8")
    assert len(data) == encoded_bytes(SHAPE, 16, "int8") < RAW_BYTES / 3
    again = decode(data, KEY, SHAPE, "int8")
    bound = block().abs().amax(dim=-1, keepdim=True) / 127 / 2
    assert ((again - block()).abs() <= bound * 1.001).all()
    zeros = torch.zeros(SHAPE.block(16))
    assert torch.equal(decode(encode(zeros, KEY, "int8"), KEY, SHAPE, "int8"), zeros)


@pytest.mark.parametrize("encoding", ["raw", "int8"])
def test_damage_anywhere_is_found(encoding: Any) -> None:
    data = encode(block(), KEY, encoding)
    rng = random.Random(1)
    places = [*range(40), *(rng.randrange(len(data)) for _ in range(60)), len(data) - 1]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.randrange(8)
        with pytest.raises(DamagedBlockError):
            decode(bytes(damaged), KEY, SHAPE, encoding)
    for length in (0, 3, 31, 32, len(data) - 1):
        with pytest.raises(DamagedBlockError):
            decode(data[:length], KEY, SHAPE, encoding)
    with pytest.raises(DamagedBlockError):
        decode(data + b"x", KEY, SHAPE, encoding)


def test_a_block_under_another_key_encoding_or_shape_is_damage() -> None:
    data = encode(block(), KEY, "raw")
    with pytest.raises(DamagedBlockError, match="digest"):
        decode(data, key(1), SHAPE, "raw")
    with pytest.raises(DamagedBlockError):
        decode(data, KEY, SHAPE, "int8")
    with pytest.raises(DamagedBlockError, match="shape"):
        decode(data, KEY, KvShape(3, 2, 16, torch.float32), "raw")


def test_the_disk_forgets_what_was_used_longest_ago_and_survives(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "kv", 350)
    for i in range(3):
        store.write(key(i), bytes(100))
        os.utime(store._path(key(i)), (i, i))
    assert store.read(key(0)) == bytes(100)
    store.write(key(3), bytes(100))
    assert [key(i) in store for i in range(4)] == [True, False, True, True]
    again = DiskStore(tmp_path / "kv", 350)
    assert [key(i) in again for i in range(4)] == [True, False, True, True]
    assert again.used_bytes == store.used_bytes == 300
    smaller = DiskStore(tmp_path / "kv", 150)
    assert len(list((tmp_path / "kv").iterdir())) == 1
    assert smaller.used_bytes == 100
    assert key(2) not in smaller


def test_the_disk_is_private_and_half_written_files_are_removed(tmp_path: Path) -> None:
    directory = tmp_path / "kv"
    store = DiskStore(directory, 1000)
    store.write(key(1), b"secret")
    assert directory.stat().st_mode & 0o077 == 0
    assert store._path(key(1)).stat().st_mode & 0o077 == 0
    (directory / f"{key(2).hex()}.77.tmp").write_bytes(b"half")
    (directory / "notes.txt").write_text("not ours")
    again = DiskStore(directory, 1000)
    assert sorted(p.name for p in directory.iterdir()) == [f"{key(1).hex()}.kv", "notes.txt"]
    assert again.used_bytes == 6


@pytest.fixture
def tiers() -> Iterator[list[TierStore]]:
    made: list[TierStore] = []
    yield made
    for tier in made:
        tier.close()


def fetch(tier: TierStore, keys: list[bytes]) -> list[torch.Tensor]:
    got: list[list[torch.Tensor]] = []
    there = threading.Event()

    def done(blocks: list[torch.Tensor]) -> None:
        got.append(blocks)
        there.set()

    tier.fetch(keys, done)
    assert there.wait(60)
    return got[0]


def test_ram_holds_the_latest(tiers: list[TierStore]) -> None:
    tier = TierStore(SHAPE, ram_bytes=2 * RAW_BYTES)
    tiers.append(tier)
    for i in range(3):
        tier.store(key(i), block(i))
    assert tier.settle()
    assert [tier.holds(key(i)) for i in range(3)] == [False, True, True]
    first, second = fetch(tier, [key(1), key(2)])
    assert torch.equal(first, block(1))
    assert torch.equal(second, block(2))
    assert len(fetch(tier, [key(2), key(0), key(1)])) == 1
    assert fetch(tier, [key(0)]) == []


def test_disk_behind_ram_and_after_a_restart(tmp_path: Path, tiers: list[TierStore]) -> None:
    tier = open_tier(SHAPE, options(tmp_path, ram_bytes=RAW_BYTES))
    assert tier
    for i in range(4):
        tier.store(key(i), block(i))
    tier.close()
    again = open_tier(SHAPE, options(tmp_path))
    assert again
    tiers.append(again)
    got = fetch(again, [key(i) for i in range(5)])
    assert len(got) == 4
    assert all(torch.equal(got[i], block(i)) for i in range(4))


def test_an_inexact_tier_and_an_exact_one_share_nothing(tmp_path: Path) -> None:
    rough = open_tier(SHAPE, options(tmp_path, encoding="int8"))
    assert rough
    rough.store(key(1), block(1))
    rough.close()
    exact = open_tier(SHAPE, options(tmp_path))
    assert exact
    assert not exact.holds(key(1))
    exact.close()


def test_no_tier_where_none_is_asked_for(tmp_path: Path) -> None:
    assert open_tier(SHAPE, KvOptions()) is None
    assert open_tier(SHAPE, options(tmp_path, disk_bytes=0)) is None


def test_a_directory_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigurationError, match="taken"):
        open_tier(SHAPE, options(tmp_path / "taken"))


def test_a_damaged_file_is_a_miss_and_goes_away(
    tmp_path: Path, tiers: list[TierStore], caplog: pytest.LogCaptureFixture
) -> None:
    disk = DiskStore(tmp_path, 10 * RAW_BYTES)
    tier = TierStore(SHAPE, ram_bytes=0, disk=disk)
    tiers.append(tier)
    for i in range(3):
        tier.store(key(i), block(i))
    assert tier.settle()
    disk._path(key(1)).write_bytes(b"\0" * RAW_BYTES)
    disk._path(key(2)).unlink()
    assert len(fetch(tier, [key(0), key(1), key(2)])) == 1
    assert fetch(tier, [key(2)]) == []
    assert [tier.holds(key(i)) for i in range(3)] == [True, False, False]
    assert tier.stats.damaged == 2
    assert "computed again" in caplog.text


class FullDisk(DiskStore):
    full = True

    def write(self, key: bytes, data: bytes) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(key, data)


def test_a_full_disk_is_left_alone_for_a_while(
    tmp_path: Path, tiers: list[TierStore], caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    disk = FullDisk(tmp_path, 10 * RAW_BYTES)
    tier = TierStore(SHAPE, ram_bytes=RAW_BYTES, disk=disk, clock=lambda: now)
    tiers.append(tier)
    with caplog.at_level(logging.WARNING):
        for i in range(3):
            tier.store(key(i), block(i))
        assert tier.settle()
    assert [tier.holds(key(i)) for i in range(3)] == [False, False, True]
    assert caplog.text.count("No space left") == 1
    disk.full = False
    now = RETRY_S
    tier.store(key(5), block(5))
    assert tier.settle()
    assert key(5) in disk


def test_a_full_disk_changes_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = tiny_loaded()
    tier = TierStore(loaded.kv, ram_bytes=0, disk=FullDisk(tmp_path, 1 << 26))
    engine = Engine(loaded, tier=tier, kv_bytes=230 * loaded.kv.token_bytes)
    for seed in (0, 1, 0):
        assert answer(engine, prompt(150, seed))[0] == reference_tokens(prompt(150, seed), 8)
    engine.close()
    assert (tier.stats.stored, tier.stats.read) == (0, 0)
    assert tier.stats.dropped > 0
    assert "No space left" in caplog.text


def test_too_many_blocks_at_once_are_dropped(tiers: list[TierStore]) -> None:
    gate = threading.Event()
    tier = TierStore(SHAPE, ram_bytes=100 * RAW_BYTES, queue_bytes=3 * RAW_BYTES)
    tiers.append(tier)
    tier.fetch([], lambda _: gate.wait(60) and None)
    for i in range(10):
        tier.store(key(i), block(i))
    gate.set()
    assert tier.settle()
    assert [tier.holds(key(i)) for i in range(10)] == [True] * 3 + [False] * 7
    assert tier.stats.dropped == 7


def test_after_closing_nothing_is_kept_and_everything_is_a_miss() -> None:
    tier = TierStore(SHAPE, ram_bytes=10 * RAW_BYTES)
    tier.close()
    tier.store(key(1), block(1))
    assert not tier.holds(key(1))
    assert fetch(tier, [key(1)]) == []


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


def answer(engine: Engine, tokens: list[int], count: int = 8) -> tuple[list[int], int]:
    sink = Sink()
    engine.submit(TurnRequest(prompt=tokens, seed=0, max_tokens=count, temperature=0), sink)
    end = sink.end()
    assert isinstance(end, Finish), end
    return sink.tokens, end.cached_tokens


def disk_engine(directory: Path) -> Engine:
    loaded = tiny_loaded()
    tier = open_tier(loaded.kv, options(directory, disk_bytes=1 << 26))
    return Engine(loaded, tier=tier)


def test_a_prompt_is_warm_after_a_restart(tmp_path: Path) -> None:
    engine = disk_engine(tmp_path)
    cold = answer(engine, prompt(150))
    engine.close()
    engine = disk_engine(tmp_path)
    warm = answer(engine, prompt(150))
    assert engine.stats().restored_tokens == 144
    assert engine.stats().computed_prompt_tokens == 6
    engine.close()
    assert cold == (reference_tokens(prompt(150), 8), 0)
    assert warm == (cold[0], 144)


def test_what_an_int8_tier_gives_back_is_within_its_regret_bound(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    kept = options(tmp_path, disk_bytes=1 << 26, encoding="int8")
    asked = [prompt(100 + seed, seed) for seed in range(6)]
    engine = Engine(loaded, tier=open_tier(loaded.kv, kept))
    exact = [answer(engine, tokens, 24)[0] for tokens in asked]
    assert exact == [reference_tokens(tokens, 24) for tokens in asked]
    engine.close()
    engine = Engine(loaded, tier=open_tier(loaded.kv, kept))
    found = [answer(engine, tokens, 24) for tokens in asked]
    assert engine.stats().restored_tokens == 6 * 96
    engine.close()
    assert [cached for _, cached in found] == [96] * 6
    worst = max(
        max(regrets(eager_model("llama"), tokens, got))
        for tokens, (got, _) in zip(asked, found, strict=True)
    )
    assert 0 < worst <= TIER_REGRET_BOUND


def test_a_damaged_file_changes_no_answer(tmp_path: Path) -> None:
    engine = disk_engine(tmp_path)
    expected, _ = answer(engine, prompt(150))
    engine.close()
    files = sorted((tmp_path / "raw").iterdir())
    assert len(files) >= 9
    for file in files[::2]:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    engine = disk_engine(tmp_path)
    got, cached = answer(engine, prompt(150))
    engine.close()
    assert got == expected
    assert cached < 144


def test_what_the_tree_has_no_room_for_comes_back_from_ram() -> None:
    loaded = tiny_loaded()
    tier = TierStore(loaded.kv, ram_bytes=1 << 26)
    engine = Engine(loaded, tier=tier, kv_bytes=230 * loaded.kv.token_bytes)
    expected = answer(engine, prompt(150))[0]
    for seed in range(1, 4):
        answer(engine, prompt(150, seed))
    assert tier.settle()
    got, cached = answer(engine, prompt(150))
    assert (got, cached) == (expected, 144)
    assert engine.stats().restored_tokens > 0
    engine.close()


def test_another_tenant_finds_nothing_on_disk(tmp_path: Path) -> None:
    engine = disk_engine(tmp_path)
    answer(engine, prompt(150))
    engine.close()
    engine = disk_engine(tmp_path)
    sink = Sink()
    engine.submit(TurnRequest(prompt=prompt(150), seed=0, max_tokens=1, tenant="mallory"), sink)
    end = sink.end()
    assert isinstance(end, Finish)
    assert end.cached_tokens == 0
    engine.close()


def test_cancel_while_blocks_are_on_their_way(tmp_path: Path) -> None:
    engine = disk_engine(tmp_path)
    answer(engine, prompt(150))
    engine.close()
    gate = threading.Event()
    loaded = tiny_loaded()
    tier = open_tier(loaded.kv, options(tmp_path, disk_bytes=1 << 26))
    assert tier
    tier.fetch([], lambda _: gate.wait(60) and None)
    engine = Engine(loaded, tier=tier, max_running=1)
    sinks = Sink(), Sink()
    request = TurnRequest(prompt=prompt(150), seed=0, max_tokens=2, temperature=0)
    turn = engine.submit(request, sinks[0])
    engine.submit(TurnRequest(prompt=[1, 2, 3], seed=0, max_tokens=2, temperature=0), sinks[1])
    engine.cancel(turn)
    assert isinstance(sinks[1].end(), Finish)
    assert sinks[0].end() == Finish("cancelled", 150, 0)
    gate.set()
    assert answer(engine, prompt(150), 2)[0] == reference_tokens(prompt(150), 2)
    engine.close()
