"""The way to a Redis: its scripts and commands, and what goes wrong with them as errors of ours."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from eloquent_server.store_redis_scripts import SCRIPTS, Script
from eloquent_server.store_types import StoreAwayError, StoreError, StoreFullError

PASSWORD_VARIABLE = "ELOQUENT_REDIS_PASSWORD"  # noqa: S105 (its name, not itself)
SCHEMES = ("redis", "rediss", "unix")
OLDEST = (7, 0)
"The oldest release that this was tested with."
TIMEOUT_S = 2.0
"A Redis that does not answer for so long is away; longer than a blocking read waits."
CONNECTIONS = 16
"At most; a claim waits for a free one."

_AWAY = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,  # a replica, in the middle of a failover
    exceptions.TryAgainError,
    OSError,
)
_REFUSED = (
    exceptions.AuthenticationError,
    exceptions.AuthorizationError,
    exceptions.NoPermissionError,
)


class RedisLink:
    """One Redis over a few connections, made when they are needed and again when they are lost."""

    def __init__(self, url: str, password: str | None = None) -> None:
        """Connects nowhere yet. `password` None: the URL's, or the environment's.

        Raises:
            StoreError: this is no URL of a Redis.
        """
        try:
            parts = urlsplit(url)
        except ValueError as error:
            # Not shown: there may be a password in it.
            raise StoreError(f"What --store has is no URL of a Redis: {error}.") from error
        if parts.scheme not in SCHEMES:
            raise StoreError(
                f"A token store of the kind {parts.scheme!r} is not known. Give --store "
                "redis://HOST:PORT/DB, rediss://... with TLS, or unix:///PATH?db=DB."
            )
        # Without what stands before an @, which may be secret.
        self.name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        "The URL as it may be shown."
        database = parts.path.strip("/")
        if parts.scheme != "unix" and database and not database.isdecimal():
            raise StoreError(f"{self.name} is no URL of a Redis: its database is a number.")
        secret = password or os.environ.get(PASSWORD_VARIABLE)
        options = {"password": secret} if secret and not parts.password else {}
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=TIMEOUT_S,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                # Whoever asks knows best whether to ask again, and until when.
                retry=Retry(NoBackoff(), 0),
                protocol=2,
                **options,
            )
        except ValueError as error:
            raise StoreError(f"{self.name} is no URL of a Redis: {error}.") from error
        self._redis: Any = Redis(connection_pool=pool)  # its commands have no types
        self._pool = pool

    async def open(self) -> None:
        """Look whether a Redis is there that can be used.

        Raises:
            StoreError: there is none, it does not let us in, or it is too old.
        """
        with self._errors():
            info = await self._redis.execute_command("INFO", "server")
        version = str(info["redis_version"])
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            raise StoreError(
                f"{self.name} is Redis {version}, and the token store needs "
                f"{'.'.join(map(str, OLDEST))} or newer. Update it, or use --state DIRECTORY."
            )
        await self._load_scripts()

    async def run(self, script: Script, keys: Sequence[bytes], arguments: Sequence[Any]) -> Any:
        """Run a script; return its result.

        Raises:
            StoreAwayError: there was no answer; whether it ran is not known.
            StoreError: Redis says no.
        """
        call = ("EVALSHA", script.digest, len(keys), *keys, *arguments)
        with self._errors():
            try:
                return await self._redis.execute_command(*call)
            except exceptions.NoScriptError:
                # Redis was started anew, or flushed.
                pass
        await self._load_scripts()
        with self._errors():
            return await self._redis.execute_command(*call)

    async def command(self, *words: Any) -> Any:
        """Run a command; return its result.

        Raises:
            As `run`.
        """
        with self._errors():
            return await self._redis.execute_command(*words)

    async def commands(self, *commands: Sequence[Any], is_transaction: bool = False) -> list[Any]:
        """Run commands in one round trip, with nothing between them if `is_transaction`.

        Raises:
            As `run`.
        """
        with self._errors():
            async with self._redis.pipeline(transaction=is_transaction) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                return list(await pipeline.execute())

    async def close(self) -> None:
        """Close the connections."""
        with self._errors():
            await self._redis.aclose()
            await self._pool.aclose()

    async def _load_scripts(self) -> None:
        await self.commands(*(("SCRIPT LOAD", script.text) for script in SCRIPTS))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except _REFUSED as error:
            raise StoreError(
                f"{self.name} does not let this server in ({error}). Give the user's name in the "
                f"URL, the password in {PASSWORD_VARIABLE}, and the user the rights it needs."
            ) from error
        except exceptions.OutOfMemoryError as error:
            raise StoreFullError(
                f"{self.name} has reached its `maxmemory`, so nothing is stored. Old turns make "
                "room as they expire: wait, or give it more."
            ) from error
        except _AWAY as error:
            raise StoreAwayError(
                f"{self.name} cannot be reached ({error or type(error).__name__}). Start it, or "
                "see to the network."
            ) from error
        except exceptions.RedisError as error:
            raise StoreError(
                f"{self.name} refused a command ({error}). Redis's own log has more; where its "
                "disk is full, nothing is stored until there is room."
            ) from error
