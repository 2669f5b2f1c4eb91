"""What an HTTP request says: key, body, and which turn it means."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request as HttpRequest

from eloquent.core.wire import (
    MAX_REQUEST_BODY_BYTES,
    REQUEST_BYTES_PER_S,
    REQUEST_S,
    SECRET_BYTES,
    TURN_ID_BYTES,
    request_due_s,
)
from eloquent.errors import RequestError
from eloquent_server.opening import UNKNOWN_TURN

TURN_HEADER = "X-Eloquent-Turn"
SECRET_HEADER = "X-Eloquent-Secret"  # noqa: S105 - a name
RESUME_HEADER = "X-Eloquent-Resume"

TOO_SLOW = (
    f"The request's body came too slowly: it may take {REQUEST_S:.0f} s, and more at "
    f"{REQUEST_BYTES_PER_S} bytes/s."
)

_BEARER = "bearer "


class ChatRequested(msgspec.Struct, frozen=True):
    """What the front itself must know of a chat body; the backend checks the rest."""

    model: str | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether the stream is to end with the usage."""
        return bool((self.stream_options or {}).get("include_usage"))


@dataclass(frozen=True, slots=True)
class TurnNames:
    """Which turn a request means."""

    turn_id: bytes
    secret: bytes
    is_kept: bool
    "Whether it goes on when the connection of its reader is gone."


def key_of(headers: Headers) -> str:
    """Return the bearer key; empty if there is none."""
    value = headers.get("authorization", "")
    return value[len(_BEARER) :].strip() if value[: len(_BEARER)].lower() == _BEARER else ""


async def read_body(request: HttpRequest) -> bytes:
    """Return a request's body; no more of it is read than may be.

    Raises:
        RequestError: `request_too_large`, `request_timeout`.
        ClientDisconnect: the connection is gone.
    """
    announced = request.headers.get("content-length", "")
    body = bytearray()
    try:
        began_s = asyncio.get_running_loop().time()
        async with asyncio.timeout_at(request_due_s(began_s, 0)) as limit:
            if announced.isdecimal() and int(announced) > MAX_REQUEST_BODY_BYTES:
                raise _too_large()
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_REQUEST_BODY_BYTES:
                    raise _too_large()
                limit.reschedule(request_due_s(began_s, len(body)))
    except TimeoutError:
        raise RequestError("request_timeout", TOO_SLOW) from None
    return bytes(body)


def parse_chat(body: bytes) -> ChatRequested:
    """Read what concerns the front from a chat body.

    Raises:
        RequestError: `invalid_request`.
    """
    try:
        return msgspec.json.decode(body, type=ChatRequested)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError("invalid_request", f"The body is no chat request: {error}.") from error


def names_in(headers: Headers, entropy: Callable[[int], bytes]) -> TurnNames:
    """Return the turn that a chat request brings, or a new one made of `entropy`.

    A client that brings the names means to come back with them, so that turn is kept, as one is
    whose request says so.

    Raises:
        RequestError: `invalid_request`: one name without the other, or one of another form.
    """
    if TURN_HEADER not in headers and SECRET_HEADER not in headers:
        is_kept = headers.get(RESUME_HEADER, "").lower() == "true"
        return TurnNames(entropy(TURN_ID_BYTES), entropy(SECRET_BYTES), is_kept)
    turn_id = _hex(headers.get(TURN_HEADER, ""), TURN_ID_BYTES, TURN_HEADER)
    secret = _hex(headers.get(SECRET_HEADER, ""), SECRET_BYTES, SECRET_HEADER)
    return TurnNames(turn_id, secret, is_kept=True)


def old_turn_in(request: HttpRequest) -> tuple[bytes, bytes]:
    """Return the id in a request's path, and the secret that it brings.

    Raises:
        RequestError: `unknown_turn`: one has another form, so that no turn has it.
    """
    try:
        turn_id = _hex(request.path_params["turn"], TURN_ID_BYTES, TURN_HEADER)
        return turn_id, _hex(request.headers.get(SECRET_HEADER, ""), SECRET_BYTES, SECRET_HEADER)
    except RequestError:
        raise RequestError("unknown_turn", UNKNOWN_TURN) from None


def offset_in(request: HttpRequest) -> int:
    """Return where a reader wants to go on: after its `Last-Event-ID`, or at `?offset=`, or at 0.

    Raises:
        RequestError: `invalid_request`: it is no offset.
    """
    last = request.headers.get("last-event-id", "")
    text = last.rpartition(":")[2] if last else request.query_params.get("offset", "0")
    if not (text.isascii() and text.isdecimal() and len(text) <= 15):
        raise RequestError(
            "invalid_request",
            f"{text[:40]!r} is no offset: send the last event's id as Last-Event-ID, or the number "
            "behind its colon as ?offset=.",
        )
    return int(text)


def _too_large() -> RequestError:
    most = MAX_REQUEST_BODY_BYTES
    return RequestError("request_too_large", f"A request may have {most} bytes; this has more.")


def _hex(text: str, count: int, name: str) -> bytes:
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    if len(data) != count or len(text) != 2 * count:
        raise RequestError(
            "invalid_request",
            f"{name} has {2 * count} hexadecimal digits; leave out {TURN_HEADER} and "
            f"{SECRET_HEADER} and the server makes both.",
        )
    return data
