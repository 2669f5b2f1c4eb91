"""`eloquent bench store`: every token is stored and measured, and nothing is left behind."""

from pathlib import Path

import pytest
from redis_server import RedisServer, command
from tools import needs_tool

from eloquent.errors import ConfigurationError
from eloquent_server.bench.store import Load, Speed, describe, measure

LOAD = Load(turns=3, tokens_per_s=20.0, seconds=0.5)


def check(speed: Speed) -> None:
    assert 30 <= speed.tokens <= 33
    assert 0 < speed.flushes <= 2 * speed.tokens
    assert 0 < speed.flush_ms[0] <= speed.flush_ms[1]
    assert 0 < speed.stored_ms[0] <= speed.stored_ms[1]
    assert f"{speed.tokens} tokens" in describe(LOAD, speed)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("durable", [False, True])
async def test_the_store_in_a_file(tmp_path: Path, durable: bool) -> None:
    check(await measure(LOAD, url=None, directory=tmp_path, durable=durable))
    assert names(tmp_path) == []


@needs_tool("redis-server")
async def test_the_store_in_redis(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    try:
        check(await measure(LOAD, url=server.url, directory=None, durable=False))
        assert command(server, "KEYS", "eloquent:[tlmor]*") == b""
    finally:
        server.stop()


async def test_a_load_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="above 0"):
        await measure(Load(0, 1.0, 1.0), url=None, directory=None, durable=False)


@pytest.mark.parametrize(("p99_ms", "word"), [(0.99, "within"), (1.01, "above")])
def test_it_says_whether_a_flush_is_fast_enough(p99_ms: float, word: str) -> None:
    speed = Speed(1, 1, (0.1, p99_ms), (0.1, 0.2), 0.001)
    assert f"{word} 1 ms" in describe(LOAD, speed)
