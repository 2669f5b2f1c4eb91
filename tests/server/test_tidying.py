"""What a server does now and then: old turns go, and free memory goes back to the system."""

import asyncio
import ctypes
import hashlib
import random
from pathlib import Path

import pytest
from http_front import until_true

from eloquent_server import tidying
from eloquent_server.store import TokenStore, TurnState

SEED = 20261122


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc, whose heap it is about"
)
def test_memory_that_is_free_between_what_is_used_goes_back() -> None:
    rng = random.Random(SEED)
    kept = [bytes(rng.randrange(600, 6000)) for _ in range(30_000)]
    rng.shuffle(kept)
    del kept[15_000:]
    before = resident_bytes()
    tidying.give_back_memory()
    assert resident_bytes() < before - (5 << 20)
    assert len(kept) == 15_000


async def test_an_idle_server_s_store_loses_what_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tidying, "TIDY_EVERY_S", 0.01)
    store = TokenStore.open(None, ttl_s=0.0)
    none = hashlib.sha256().digest()
    record = store.create("local", bytes(16), none, b"", none)
    store.close_turn(record, 0, b"said")
    tidied = asyncio.ensure_future(tidying.tidy(store))
    await until_true(lambda: record.state is TurnState.TOMBSTONE)
    assert not tidied.done()
    tidied.cancel()
    await store.close()
