"""Who may ask: bearer keys, of which the server's file has hashes only.

    [[key]]
    name = "alice"              # what logs call it
    hash = "sha256:9f86…"       # of the key, which `eloquent keys new` prints once
    tenant = "team"             # whose turns and prefixes: keys of one tenant share them (the name)
    weight = 1.0                # the tenant's part of the engine against others'
    turns = 8                   # answers at once
    requests_per_minute = 60.0
    burst = 20.0                # requests at once after a rest (a minute's)
    bytes_per_minute = 1e6      # of requests and answers
    expires = 2027-01-31        # a date or a time, in UTC unless it says where

A key is 256 random bits, so its plain hash is enough: what makes hashing of passwords slow is that
people choose few, and of 2**256 nobody tries a part. For the same reason a table look-up by the
hash is safe: how long it takes tells at most something of the hash, and whoever knew all of that
would still have to invert SHA-256.
"""

import datetime
import hashlib
import logging
import os
import secrets
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from eloquent.errors import ConfigurationError
from eloquent_server.limits import KeyLimits

PREFIX = "elq_"
"So that people, and programs that look for leaked secrets, know one when they see it."
KEY_BYTES = 32
HASH_PREFIX = "sha256:"

LOOK_EVERY_S = 1.0
"How often to look whether the file has changed."

logger = logging.getLogger(__name__)

_Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._@-]{1,64}\Z")]
_Positive = Annotated[float, msgspec.Meta(gt=0, le=1e12)]


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A `[[key]]` of the file."""

    name: _Name
    hash: Annotated[str, msgspec.Meta(pattern=rf"^{HASH_PREFIX}[0-9a-f]{{64}}\Z")]
    tenant: _Name | None = None
    weight: _Positive = 1.0
    turns: Annotated[int, msgspec.Meta(ge=1)] | None = None
    requests_per_minute: _Positive | None = None
    burst: Annotated[float, msgspec.Meta(ge=1)] | None = None
    bytes_per_minute: _Positive | None = None
    expires: Any = None

    def __post_init__(self) -> None:
        if self.burst is not None and self.requests_per_minute is None:
            raise ValueError("`burst` needs `requests_per_minute`")
        _time_s(self.expires)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: Annotated[tuple[_Entry, ...], msgspec.Meta(min_length=1)]
    "An empty file is refused, above all while the server runs: it may be half written."


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key, as the file describes it."""

    name: str
    digest: bytes
    "SHA-256 of it."
    tenant: str
    weight: float
    limits: KeyLimits
    expires_s: float | None
    "Seconds since the epoch; from then on it is not good."


class Keys:
    """The keys of one file."""

    def __init__(self, keys: tuple[Key, ...] = ()) -> None:
        """Check that they go together.

        Raises:
            ValueError: two have the same name or hash, or a tenant has two weights.
        """
        self._by_digest = {key.digest: key for key in keys}
        self._by_name = {key.name: key for key in keys}
        self._weights: dict[str, float] = {}
        if len(self._by_name) < len(keys) or len(self._by_digest) < len(keys):
            raise ValueError("two keys have the same name or the same hash: each needs its own")
        for key in keys:
            if self._weights.setdefault(key.tenant, key.weight) != key.weight:
                raise ValueError(
                    f"the keys of tenant {key.tenant!r} have different weights: it has one part of "
                    "the engine, so they need the same"
                )

    def __iter__(self) -> Iterator[Key]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def find(self, key: str) -> Key | None:
        """Return what is known of a key that somebody showed."""
        return self._by_digest.get(_digest(key))

    def named(self, name: str) -> Key | None:
        """Return the key of this name."""
        return self._by_name.get(name)

    def weight(self, tenant: str) -> float:
        """Return a tenant's weight; 1 if it has no key any more."""
        return self._weights.get(tenant, 1.0)


class KeyFile:
    """A file of keys that may change while the server runs."""

    def __init__(self, path: Path) -> None:
        """Read it.

        Raises:
            ConfigurationError: it cannot be read, or is no file of keys.
        """
        self._path = path
        self._seen = _look(path)
        self._looked_at = float("-inf")
        self._said = ""
        "What was wrong with it the last time."
        self.keys = read_keys(path)

    def reload(self) -> None:
        """Read the file again; one that is broken changes nothing but the log."""
        self._seen = _look(self._path)
        try:
            self.keys = read_keys(self._path)
        except ConfigurationError as error:
            if isinstance(error.__cause__, OSError):
                self._seen = None  # It may be read later, though nobody writes to it.
            if str(error) != self._said:
                logger.error("the keys stay as they were: %s", error)
            self._said = str(error)
        else:
            self._said = ""
            logger.info("%d keys in %s", len(self.keys), self._path)

    def look(self, now: float) -> None:
        """Read the file again if it has changed; `now` is in seconds, by any clock."""
        if now >= self._looked_at + LOOK_EVERY_S:
            self._looked_at = now
            if _look(self._path) != self._seen:
                self.reload()


def new_key() -> str:
    """Return a new key.

    It has no checksum: one that was mistyped is no key of the file, which is what it would say.
    """
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def entry_for(key: str, name: str, tenant: str | None = None) -> str:
    """Return the lines that let `key` in, for the file.

    Raises:
        ConfigurationError: a name is none that the file may have.
    """
    fields = {"name": name, "hash": HASH_PREFIX + _digest(key).hex()}
    if tenant is not None:
        fields["tenant"] = tenant
    try:
        msgspec.convert(fields, _Entry)
    except msgspec.ValidationError as error:
        raise ConfigurationError(
            f"There can be no such key: {error}. A name has up to 64 letters, digits and any of "
            "`.`, `_`, `@` and `-`."
        ) from error
    return "\n".join(["[[key]]", *(f'{field} = "{value}"' for field, value in fields.items())])


def read_keys(path: Path) -> Keys:
    """Read a file of keys.

    Raises:
        ConfigurationError: it cannot be read, or is no file of keys.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            entries = msgspec.convert(tomllib.load(file), _File).key
        keys = Keys(tuple(_key_of(entry) for entry in entries))
    except (OSError, ValueError, msgspec.ValidationError) as error:
        raise ConfigurationError(
            f"The keys in {path} cannot be used: {error}. `eloquent keys new NAME` prints how an "
            "entry looks; see docs/operations.md, 'Who may ask'."
        ) from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        logger.warning(
            "others than its owner may write to %s, and so give themselves keys: chmod go-w", path
        )
    return keys


def _key_of(entry: _Entry) -> Key:
    return Key(
        name=entry.name,
        digest=bytes.fromhex(entry.hash.removeprefix(HASH_PREFIX)),
        tenant=entry.tenant or entry.name,
        weight=entry.weight,
        limits=KeyLimits(
            turns=entry.turns,
            requests_per_minute=entry.requests_per_minute,
            burst=entry.burst,
            bytes_per_minute=entry.bytes_per_minute,
        ),
        expires_s=_time_s(entry.expires),
    )


def _time_s(value: Any) -> float | None:
    """Return a date or time in TOML's or RFC 3339's form as seconds since the epoch.

    Raises:
        ValueError: it is neither.
    """
    if value is None:
        return None
    text = value.isoformat() if isinstance(value, datetime.date) else value
    try:
        time = datetime.datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise ValueError(
            f"`expires` is {value!r}, which is no date or time like 2027-01-31"
        ) from None
    return (time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).timestamp()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()


def _look(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when somebody writes to a file; None: it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
