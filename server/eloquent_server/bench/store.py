"""How fast a token store is: how long a flush takes, and a token until it may be sent."""

import asyncio
import hashlib
import math
import secrets
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from eloquent.core.events import TextDelta, encode_event
from eloquent.errors import ConfigurationError
from eloquent_server.store import TokenStore
from eloquent_server.store_types import StoreError, TurnRecord, TurnStore

BODY = b'{"messages": [{"role": "user", "content": "%s"}]}' % (b"words " * 100)
CONTINUATION = bytes(12)
"About what the local engine stores with a token."
BOUND_MS = 1.0
"A flush at p99 is to stay below."


@dataclass(frozen=True, slots=True)
class Load:
    """What is measured."""

    turns: int
    tokens_per_s: float
    "Of each turn."
    seconds: float


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured; times in milliseconds."""

    tokens: int
    flushes: int
    flush_ms: tuple[float, float]
    "p50 and p99 of a commit or round trip."
    stored_ms: tuple[float, float]
    "p50 and p99 from `append` to `on_stored`."
    cpu_s: float
    "Of this process."


async def measure(load: Load, *, url: str | None, directory: Path | None, durable: bool) -> Speed:
    """Have turns stored at their pace, in Redis at `url` or in a file in `directory`.

    Raises:
        ConfigurationError: there is nothing to measure.
        StoreError: the store cannot be used.
    """
    if min(load.turns, load.tokens_per_s, load.seconds) <= 0:
        raise ConfigurationError("Turns, tokens a second and seconds are above 0.")
    if url is not None:
        from eloquent_server.store_redis import RedisTokenStore

        redis = await RedisTokenStore.open(url, tombstone_ttl_s=1.0)
        return await _measured(redis, load)
    with tempfile.TemporaryDirectory(prefix="eloquent-bench-") as own:
        path = (directory or Path(own)) / f"bench-{secrets.token_hex(4)}.sqlite"
        try:
            return await _measured(TokenStore.open(path, durable=durable), load)
        finally:
            path.unlink(missing_ok=True)


async def _measured(store: TurnStore, load: Load) -> Speed:
    flushes_s: list[float] = []
    store.meters.on_flush = (  # type: ignore[method-assign]
        lambda writes, seconds, *, is_stored: flushes_s.append(seconds)
    )
    tokens_s: list[float] = []
    began_cpu_s = time.process_time()
    try:
        turns = [
            asyncio.ensure_future(_turn(store, load, number, tokens_s))
            for number in range(load.turns)
        ]
        await asyncio.gather(*turns)
    finally:
        await store.close()
    return Speed(
        tokens=len(tokens_s),
        flushes=len(flushes_s),
        flush_ms=_quantiles_ms(flushes_s),
        stored_ms=_quantiles_ms(tokens_s),
        cpu_s=time.process_time() - began_cpu_s,
    )


async def _turn(store: TurnStore, load: Load, number: int, tokens_s: list[float]) -> None:
    """Store one turn's tokens, begun at another moment than the others'; then delete it."""
    loop = asyncio.get_running_loop()
    gap_s = 1 / load.tokens_per_s
    next_s = loop.time() + gap_s * number / load.turns
    until_s = next_s + load.seconds
    turn_id, digest = secrets.token_bytes(16), hashlib.sha256(BODY).digest()
    record = await store.begin("bench", turn_id, digest, BODY, digest)
    data, offset = encode_event(TextDelta(" token")), 0
    while next_s < until_s:
        await asyncio.sleep(max(0.0, next_s - loop.time()))
        stored = partial(_note, tokens_s, loop.time())
        store.append(record, offset, data, continuation=CONTINUATION, on_stored=stored)
        offset += len(data)
        next_s += gap_s
    await _end(store, record, offset)
    await store.delete("bench", turn_id)


def _note(tokens_s: list[float], began_s: float, error: StoreError | None) -> None:
    if error is not None:
        raise error
    tokens_s.append(asyncio.get_running_loop().time() - began_s)


async def _end(store: TurnStore, record: TurnRecord, offset: int) -> None:
    ended: asyncio.Future[StoreError | None] = asyncio.get_running_loop().create_future()
    store.close_turn(record, offset, on_stored=ended.set_result)
    error = await ended
    if error is not None:
        raise error


def _quantiles_ms(values_s: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values_s)
    if not ordered:
        return math.nan, math.nan
    last = len(ordered) - 1
    return 1e3 * ordered[round(0.5 * last)], 1e3 * ordered[round(0.99 * last)]


def describe(load: Load, speed: Speed) -> str:
    """Return the figures in words."""
    verdict = "within" if speed.flush_ms[1] < BOUND_MS else "above"
    return (
        f"{load.turns} turns at {load.tokens_per_s:g} tokens/s, {load.seconds:g} s: "
        f"{speed.tokens} tokens in {speed.flushes} flushes\n"
        f"a flush: p50 {speed.flush_ms[0]:.2f} ms, p99 {speed.flush_ms[1]:.2f} ms "
        f"({verdict} {BOUND_MS:g} ms)\n"
        f"a token until it is stored: p50 {speed.stored_ms[0]:.2f} ms, "
        f"p99 {speed.stored_ms[1]:.2f} ms\n"
        f"CPU: {1e6 * speed.cpu_s / max(1, speed.tokens):.0f} µs a token"
    )
