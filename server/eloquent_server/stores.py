"""Which token store a server has: a file of its own, or a Redis that several share."""

import importlib.util

from eloquent.errors import ConfigurationError
from eloquent_server.options import ServerOptions
from eloquent_server.state import HOUR_S, open_store
from eloquent_server.store_types import TurnStore


async def open_turn_store(options: ServerOptions) -> TurnStore:
    """Open the store that the options ask for.

    Raises:
        ConfigurationError: options contradict each other, or a package is missing.
        StoreError: the store cannot be used; the text says why, and what to do.
    """
    if options.store is None:
        return open_store(options)
    if options.durable:
        raise ConfigurationError(
            "--durable is for the turns in --state. With --store it is Redis that waits for the "
            "disk: set `appendonly yes` and `appendfsync always` there."
        )
    if options.turn_ttl <= 0:
        raise ConfigurationError("--turn-ttl is above 0.")
    if importlib.util.find_spec("redis") is None:
        raise ConfigurationError(
            "--store needs the package redis, which is not installed: pip install "
            "'eloquent-stream[redis]'."
        )
    from eloquent_server.store_redis import RedisTokenStore

    return await RedisTokenStore.open(options.store, ttl_s=options.turn_ttl * HOUR_S)
