"""Who may ask, and how much: what the hub asks before a reader gets anything."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from eloquent.addresses import is_loopback
from eloquent.errors import RequestError
from eloquent.seldom import Seldom
from eloquent_server.keys import Key, KeyFile
from eloquent_server.limits import TURN_ENDS_IN_S, KeyLimits, Usage

NO_KEY = (
    "This server lets in who has a key, and the request has none: give the key that you were "
    "given, in the environment variable ELOQUENT_KEY, or over HTTP as `Authorization: Bearer KEY`."
)
WRONG_KEY = "This is no key of the server's: check it for missing characters, or ask for another."
EXPIRED_KEY = "The key has expired: ask whoever runs the server for another."
OVERLOADED = "The server has as many answers under way as it may: ask again in a moment."

EVERYBODY = (
    "Whoever reaches %s can chat here: let in only who has a key with --keys FILE (see "
    "`eloquent keys new --help`), or listen on 127.0.0.1."
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks."""

    name: str
    "The tenant: whose turns they are. Ids of turns are scoped by it."
    weight: float = 1.0
    "The tenant's part of the engine against others'; above 0."
    key: str = ""
    "The name of the key that was shown, whose limits count; empty: none was needed."


LOCAL = Principal("local")
"Everybody, where there are no keys."


class Admission(Protocol):
    """Knows the keys and the limits; its methods do not block."""

    def principal(self, key: str) -> Principal:
        """Return who asks with a key; "" is no key. Asked for each reader, of old turns too.

        Raises:
            RequestError: `unauthorized`.
        """

    def named(self, name: str) -> Principal:
        """Return whose a stored turn is; the key may be gone by now."""

    def admit(self, principal: Principal, body_bytes: int) -> None:
        """Allow a new turn; `ended` follows when it is over.

        Raises:
            RequestError: `rate_limited`, `too_many_turns` or `overloaded`; it is not counted then.
        """

    def ended(self, principal: Principal, answer_bytes: int) -> None:
        """Take note that a turn that was admitted is generated no more."""


class Gate:
    """The keys of a file and the limits that it sets; an `Admission`."""

    def __init__(
        self,
        keys: KeyFile | None = None,
        *,
        max_turns: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Without `keys` everybody is `LOCAL`; `max_turns` are generated at once, of all.

        The clocks give seconds; the wall clock's are since the epoch.
        """
        self._keys = keys
        self._max_turns = max_turns
        self._clock = clock
        self._wall_clock = wall_clock
        self._usages: dict[str, Usage] = {}
        "By the key's name."
        self._seldom = Seldom(logger)
        self.refusals: Counter[str] = Counter()
        """How many requests were refused: `no_key`, `wrong_key`, `expired_key`, `turns`, `requests`
        and `bytes` (the limits of a key), `all_turns`."""
        self.open_turns = 0
        "How many turns were admitted and are not over."

    def principal(self, key: str) -> Principal:
        """See `Admission.principal`."""
        if self._keys is None:
            return LOCAL
        self._keys.look(self._clock())
        known = self._keys.keys.find(key) if key else None
        if known is None:
            reason, message = ("wrong_key", WRONG_KEY) if key else ("no_key", NO_KEY)
        elif known.expires_s is not None and known.expires_s <= self._wall_clock():
            reason, message = "expired_key", EXPIRED_KEY
        else:
            return Principal(known.tenant, known.weight, known.name)
        raise self._refused(reason, known, RequestError("unauthorized", message))

    def named(self, name: str) -> Principal:
        """See `Admission.named`."""
        return Principal(name, 1.0 if self._keys is None else self._keys.keys.weight(name))

    def admit(self, principal: Principal, body_bytes: int) -> None:
        """See `Admission.admit`."""
        known = self._keys.keys.named(principal.key) if self._keys is not None else None
        usage = self._usage(principal.key, KeyLimits() if known is None else known.limits)
        now = self._clock()
        if self._max_turns is not None and self.open_turns >= self._max_turns:
            error = RequestError("overloaded", OVERLOADED, TURN_ENDS_IN_S)
            raise self._refused("all_turns", known, error)
        refusal = usage.refusal(now, body_bytes)
        if refusal is not None:
            raise self._refused(refusal[0], known, refusal[1])
        usage.begin(now, body_bytes)
        self.open_turns += 1

    def ended(self, principal: Principal, answer_bytes: int) -> None:
        """See `Admission.ended`."""
        self.open_turns -= 1
        self._usages[principal.key].end(self._clock(), answer_bytes)

    def reload(self) -> None:
        """Read the file of keys again, if there is one."""
        if self._keys is not None:
            self._keys.reload()

    def _usage(self, key: str, limits: KeyLimits) -> Usage:
        """Return what a key has taken; new limits begin anew, but for the turns that are open."""
        usage = self._usages.get(key)
        if usage is None or usage.limits != limits:
            open_turns = 0 if usage is None else usage.open_turns
            usage = self._usages[key] = Usage(limits, open_turns)
        return usage

    def _refused(self, reason: str, key: Key | None, error: RequestError) -> RequestError:
        self.refusals[reason] += 1
        whose = "" if key is None else f" of key {key.name}"
        self._seldom.warn(self._clock(), f"refused a request{whose}: {reason}")
        return error


def open_gate(
    keys: Path | None,
    *,
    host: str,
    max_turns: int | None = None,
) -> Gate:
    """Return the gate of a server that listens on `host`; warn if it lets everybody in.

    Raises:
        ConfigurationError: the file of keys cannot be used.
    """
    if keys is None and not is_loopback(host):
        logger.warning(EVERYBODY, host)
    file = None if keys is None else KeyFile(keys)
    return Gate(file, max_turns=max_turns)
