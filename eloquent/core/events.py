"""Events: what an answer is made of, and their encoding in the token log.

One encoded event is `kind (1 byte) | length (varint) | body`; see `docs/protocol.md`, "Events".
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from eloquent.core.varint import decode_varint, encode_varint
from eloquent.errors import IntegrityError, WireError

KIND_TEXT = 1
KIND_FAILURE = 2
KIND_END = 3
KIND_LOGPROBS = 4
KIND_REASONING = 5
KIND_TOOL_CALL = 6
KIND_EXTRA = 7

MAX_EVENT_BYTES = 1 << 20
DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next piece of the answer."""

    text: str
    "Whole code points; the pieces joined are the answer's text."


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """The next piece of what the model thinks before it answers; no part of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """The next piece of a call of a tool that the request offered."""

    index: int
    "Which call of the answer's, from 0."
    id: str
    "Its name; only with its first piece, else empty."
    name: str
    "The function's; only with the call's first piece, else empty."
    arguments: str
    "The pieces joined are a JSON object."


@dataclass(frozen=True, slots=True)
class Extra:
    """What else an engine said of its choice, in its own words."""

    data: bytes
    """A JSON object, to be merged into the `choices[0]` of a `chat.completion.chunk`, such as
    `{"delta": {"refusal": "..."}}`."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token that the model chose or might have chosen, and how likely it held it to be."""

    token: bytes
    "Its text in UTF-8; a token may be part of a character. Empty for a token without text."
    logprob: float
    "Natural logarithm of its probability before penalties, temperature and cuts; at most 0."


@dataclass(frozen=True, slots=True)
class ChosenLogprob(TokenLogprob):
    """A token of the answer."""

    top: tuple[TokenLogprob, ...] = ()
    "The likeliest tokens in its place, likeliest first; as many as the request asked for."


@dataclass(frozen=True, slots=True)
class Logprobs:
    """How likely tokens were whose text is out; only if the request asked for it."""

    tokens: tuple[ChosenLogprob, ...]
    "In the order of the answer; each token once, over all events of this kind."


@dataclass(frozen=True, slots=True)
class Failure:
    """Generation stopped because of an error; an `End` with `finish_reason="error"` follows."""

    code: str
    "Machine-readable reason."
    message: str
    "What happened, for a person."


@dataclass(frozen=True, slots=True)
class End:
    """The last event of every log."""

    finish_reason: str
    '`"stop"`, `"length"`, `"cancelled"`, `"error"`, or what an engine behind the server says.'
    model: str
    "The model that answered."
    prompt_tokens: int
    "Tokens of the prompt, after the chat template."
    completion_tokens: int
    "Tokens generated."
    length: int
    "Bytes in the log before this event."
    digest: bytes
    "BLAKE2b (16 bytes) of those bytes; `log_digest` makes it."
    cached_tokens: int = 0
    "Tokens of the prompt that were not computed, since they were known from before."
    usage: bytes = b""
    "A JSON object: the counts in the words of the engine behind the server; empty: it has none."


Delta = TextDelta | ReasoningDelta | ToolCallDelta | Extra | Logprobs | Failure
"What a backend adds to an answer."
Event = Delta | End


class _FailureBody(msgspec.Struct, array_like=True, frozen=True):
    code: str
    message: str


class _Token(msgspec.Struct, array_like=True, frozen=True):
    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]


class _ToolCallBody(msgspec.Struct, array_like=True, frozen=True):
    index: Annotated[int, msgspec.Meta(ge=0)]
    id: str
    name: str
    arguments: str


class _EndBody(msgspec.Struct, array_like=True, frozen=True):
    finish_reason: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    length: int
    digest: bytes
    cached_tokens: int = 0
    usage: bytes = b""
    "These two are left out, from the end on, where they are 0 and empty."


_END_FIELDS = 6
"Those that are always there."


def log_digest() -> "hashlib.blake2b":
    """Return a fresh running digest of a log's bytes, as `End.digest` carries it."""
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


def encode_event(event: Event) -> bytes:
    """Return the event as it stands in the log.

    Raises:
        ValueError: it is larger than a reader takes, or its text is not whole code points.
    """
    kind, body = _encode_body(event)
    if len(body) > MAX_EVENT_BYTES:
        raise ValueError(f"an event of {len(body)} bytes: at most {MAX_EVENT_BYTES} are allowed")
    return bytes((kind,)) + encode_varint(len(body)) + body


class EventDecoder:
    """Turns the log's bytes, in order and in pieces of any size, back into events.

    It checks the length and the digest that the last event carries; the digest only if it has
    seen the log from its first byte on. Kinds that this version does not know are passed over, so
    that a newer server can add some.
    """

    def __init__(self, offset: int = 0) -> None:
        """Begin at `offset`, which must be where an event starts."""
        self._buffer = bytearray()
        self._offset = self._length = offset
        self._digest = log_digest()
        self._end: End | None = None
        self._passed_over = 0

    @property
    def passed_over(self) -> int:
        """Bytes of events of kinds that this version does not know."""
        return self._passed_over

    @property
    def end(self) -> End | None:
        """The log's last event, once it has come and agrees with all before it."""
        return self._end

    @property
    def pending(self) -> int:
        """How many bytes have come of an event that is not whole yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[Event]:
        """Take the next bytes of the log and return the events that they complete.

        Raises:
            WireError: the bytes cannot be a log; the decoder is of no further use.
            IntegrityError: the log ends, and its length or digest is not what the server said.
        """
        self._buffer += data
        events: list[Event] = []
        position = 0
        while (span := self._next_body(position)) is not None:
            if self._end is not None:
                break
            body_start, body_end = span
            event = _decode_body(self._buffer[position], bytes(self._buffer[body_start:body_end]))
            if event is None and 0 < self._offset == self._length:
                # No digest tells here whether an event starts at the offset.
                raise WireError(
                    "The bytes at the offset that was asked are no event of a known kind: no event "
                    "starts there, or the server is newer. Resume at 0."
                )
            if isinstance(event, End):
                self._check(event)
                self._end = event
            self._digest.update(self._buffer[position:body_end])
            self._length += body_end - position
            if event is not None:
                events.append(event)
            else:
                self._passed_over += body_end - position
            position = body_end
        del self._buffer[:position]
        if self._end is not None and self._buffer:
            raise WireError(
                "Bytes follow the last event of the answer's log: the server breaks the protocol."
            )
        return events

    def _next_body(self, position: int) -> tuple[int, int] | None:
        """Return where the next event's body starts and ends, or None if it is not all here."""
        decoded = decode_varint(self._buffer, position + 1)
        if decoded is None:
            return None
        length, body_start = decoded
        if length > MAX_EVENT_BYTES:
            raise WireError(
                f"An event announces {length} bytes, more than the {MAX_EVENT_BYTES} allowed: the "
                "answer's log is damaged or the peer is not an Eloquent server. Ask again."
            )
        body_end = body_start + length
        return (body_start, body_end) if body_end <= len(self._buffer) else None

    def _check(self, end: End) -> None:
        is_changed = self._offset == 0 and end.digest != self._digest.digest()
        if end.length != self._length or is_changed:
            raise IntegrityError(
                f"The answer's {self._length} bytes are not the {end.length} that the server "
                "generated: text is missing or changed. Ask again; if it happens again, report it."
            )


def _encode_body(event: Event) -> tuple[int, bytes]:  # noqa: PLR0911 (one for each kind)
    match event:
        case TextDelta():
            return KIND_TEXT, event.text.encode()
        case ReasoningDelta():
            return KIND_REASONING, event.text.encode()
        case ToolCallDelta():
            call = _ToolCallBody(event.index, event.id, event.name, event.arguments)
            return KIND_TOOL_CALL, msgspec.msgpack.encode(call)
        case Extra():
            return KIND_EXTRA, event.data
        case Logprobs():
            return KIND_LOGPROBS, _encode_logprobs(event)
        case Failure():
            failure = _FailureBody(event.code, event.message)
            return KIND_FAILURE, msgspec.msgpack.encode(failure)
        case End():
            return KIND_END, _encode_end(event)


def _encode_end(end: End) -> bytes:
    fields = [getattr(end, name) for name in _EndBody.__struct_fields__]
    while len(fields) > _END_FIELDS and not fields[-1]:
        fields.pop()
    return msgspec.msgpack.encode(fields)


def _encode_logprobs(event: Logprobs) -> bytes:
    return msgspec.msgpack.encode(
        [
            _Token(each.token, each.logprob, tuple((t.token, t.logprob) for t in each.top))
            for each in event.tokens
        ]
    )


def _decode_logprobs(body: bytes) -> Logprobs:
    return Logprobs(
        tuple(
            ChosenLogprob(each.token, each.logprob, tuple(TokenLogprob(*t) for t in each.top))
            for each in msgspec.msgpack.decode(body, type=tuple[_Token, ...])
        )
    )


def _decode_failure(body: bytes) -> Failure:
    failure = msgspec.msgpack.decode(body, type=_FailureBody)
    return Failure(failure.code, failure.message)


def _decode_tool_call(body: bytes) -> ToolCallDelta:
    call = msgspec.msgpack.decode(body, type=_ToolCallBody)
    return ToolCallDelta(call.index, call.id, call.name, call.arguments)


def _decode_extra(body: bytes) -> Extra:
    msgspec.json.decode(body, type=dict[str, Any])  # What comes after it relies on that.
    return Extra(body)


def _decode_end(body: bytes) -> End:
    end: Any = msgspec.msgpack.decode(body, type=_EndBody)
    return End(*(getattr(end, name) for name in _EndBody.__struct_fields__))


_DECODERS: dict[int, Callable[[bytes], Event]] = {
    KIND_TEXT: lambda body: TextDelta(body.decode()),
    KIND_REASONING: lambda body: ReasoningDelta(body.decode()),
    KIND_TOOL_CALL: _decode_tool_call,
    KIND_EXTRA: _decode_extra,
    KIND_LOGPROBS: _decode_logprobs,
    KIND_FAILURE: _decode_failure,
    KIND_END: _decode_end,
}


def _decode_body(kind: int, body: bytes) -> Event | None:
    decode = _DECODERS.get(kind)
    try:
        return None if decode is None else decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(
            f"An event of kind {kind} cannot be read ({error}): the answer's log is damaged or "
            "the peer speaks another protocol. Ask again."
        ) from error
