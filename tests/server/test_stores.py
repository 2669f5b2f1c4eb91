"""Which store `serve` opens, and what it refuses."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from redis_server import RedisServer, command
from tools import needs_tool

from eloquent.errors import ConfigurationError
from eloquent_server.options import ServerOptions
from eloquent_server.store import TokenStore
from eloquent_server.store_redis_scripts import Keys
from eloquent_server.stores import open_turn_store

HASH = bytes(32)


async def test_without_store_it_is_a_file(tmp_path: Path) -> None:
    store = await open_turn_store(ServerOptions(state=tmp_path))
    assert isinstance(store, TokenStore)
    await store.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"durable": True}, "appendfsync always"),
        ({"turn_ttl": 0.0}, "above 0"),
    ],
)
async def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        await open_turn_store(ServerOptions(store="redis://127.0.0.1:1/0", **options))


async def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"eloquent-stream\[redis\]"):
        await open_turn_store(ServerOptions(store="redis://127.0.0.1:1/0"))


@needs_tool("redis-server")
async def test_answers_are_kept_in_redis_for_as_long_as_was_asked(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    try:
        store = await open_turn_store(ServerOptions(store=server.url, turn_ttl=2.0))
        await store.begin("local", bytes(16), HASH, b"body", HASH)
        left_s = int(command(server, "TTL", Keys("local", bytes(16)).turn))
        assert 7000 < left_s <= 7200
        await store.close()
    finally:
        server.stop()
