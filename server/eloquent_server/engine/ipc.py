"""What server and engine process say to each other, and how it is framed. Needs no torch.

A frame is `length (4 bytes, big-endian) | msgpack`. The server's first message is `Load`; the
engine answers with any number of `Progress`, then `Ready` or `LoadFailed`. From then on every
`Submit` gets `Rejected`, or `Accepted` and events, of which the last is a `Finish` or `Failure`.
"""

import asyncio
import socket
from collections.abc import Sequence
from typing import Any, get_args

import msgspec

from eloquent.core.events import Failure
from eloquent_server.backends.base import Finish
from eloquent_server.engine.settings import KvOptions
from eloquent_server.engine.turn import EngineEvent
from eloquent_server.logs import LogFormat, LogLevel

MAX_FRAME_BYTES = 64 << 20
_LENGTH_BYTES = 4


class Load(msgspec.Struct, frozen=True, tag="load", array_like=True):
    """Load a model; the first message, once."""

    model: str
    "As `eloquent serve --model` takes it."
    device: str
    precision: str
    max_running: int | None
    "None: the engine's own default."
    kv: KvOptions
    log_level: LogLevel
    log_format: LogFormat


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit", array_like=True):
    """Answer a request, or go on with its answer."""

    turn: int
    "A number that the server never uses twice."
    request: bytes
    "A `ChatRequest` in JSON, which takes integers of any size."
    seed: int
    "For sampling where the request names none."
    tenant: str
    weight: float
    prompt: Sequence[int] | None
    "The prompt's token ids, if it was encoded before; encoding it again could give others."
    cached_tokens: int | None
    generated: Sequence[int]
    emitted_chars: int
    emitted_logprobs: int
    "As in `TurnRequest`."


class Cancel(msgspec.Struct, frozen=True, tag="cancel", array_like=True):
    """End a turn within one step."""

    turn: int


class Hint(msgspec.Struct, frozen=True, tag="hint", array_like=True):
    """How long a turn's reader can go on reading what it has."""

    turn: int
    buffered_s: float


class GetStats(msgspec.Struct, frozen=True, tag="stats", array_like=True):
    """Ask for the engine's counts."""

    number: int


class Close(msgspec.Struct, frozen=True, tag="close", array_like=True):
    """Fail what runs, and end."""


class Progress(msgspec.Struct, frozen=True, tag="progress", array_like=True):
    """How far loading is."""

    text: str
    fraction: float | None


class Ready(msgspec.Struct, frozen=True, tag="ready", array_like=True):
    """The model is loaded."""

    name: str
    context_tokens: int
    fingerprint: bytes
    "Tells models apart that would go on differently with the same tokens."


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed", array_like=True):
    """The model cannot be loaded: a `ConfigurationError`'s text. The process ends."""

    message: str


class Accepted(msgspec.Struct, frozen=True, tag="accepted", array_like=True):
    """A turn is in the engine's queue, with this prompt."""

    turn: int
    prompt: Sequence[int]


class Rejected(msgspec.Struct, frozen=True, tag="rejected", array_like=True):
    """A turn cannot be answered: a `RequestError`."""

    turn: int
    code: str
    message: str


class Occurrence(msgspec.Struct, frozen=True, array_like=True):
    """One event of one turn; `kind` is an index into `_KINDS`."""

    turn: int
    kind: int
    event: msgspec.Raw


class Step(msgspec.Struct, frozen=True, tag="step", array_like=True):
    """All that one step of the engine brought forth, in order."""

    occurrences: list[Occurrence]


class Stats(msgspec.Struct, frozen=True, tag="stats_are", array_like=True):
    """The fields of `EngineStats`."""

    number: int
    counts: dict[str, int]


ToEngine = Load | Submit | Cancel | Hint | GetStats | Close
FromEngine = Progress | Ready | LoadFailed | Accepted | Rejected | Step | Stats
Message = ToEngine | FromEngine

_KINDS: tuple[type, ...] = get_args(EngineEvent)
_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
_events: tuple[msgspec.msgpack.Decoder[Any], ...] = tuple(map(msgspec.msgpack.Decoder, _KINDS))


def is_terminal(event: EngineEvent) -> bool:
    """Return whether nothing follows this event of a turn."""
    return isinstance(event, Finish | Failure)


def step_of(events: Sequence[tuple[int, EngineEvent]]) -> Step:
    """Return the message for what a step brought: pairs of turn and event."""
    return Step(
        [
            Occurrence(turn, _KINDS.index(type(event)), msgspec.Raw(_encoder.encode(event)))
            for turn, event in events
        ]
    )


def event_of(occurrence: Occurrence) -> EngineEvent:
    """Return the event that an `Occurrence` carries."""
    event: EngineEvent = _events[occurrence.kind].decode(occurrence.event)
    return event


def encode_frame(message: Message) -> bytes:
    """Return a message with its length before it.

    Raises:
        ValueError: it is larger than the other side takes.
    """
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes: at most {MAX_FRAME_BYTES} are allowed")
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


def receive(channel: socket.socket) -> ToEngine | None:
    """Wait for a message of the server's; None: the server is gone."""
    head = _receive_exactly(channel, _LENGTH_BYTES)
    body = head and _receive_exactly(channel, int.from_bytes(head, "big"))
    return _to_engine.decode(body) if body else None


async def read(reader: asyncio.StreamReader) -> FromEngine | None:
    """Wait for a message of the engine's; None: its process is gone."""
    try:
        head = await reader.readexactly(_LENGTH_BYTES)
        body = await reader.readexactly(int.from_bytes(head, "big"))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return _from_engine.decode(body)


def _receive_exactly(channel: socket.socket, count: int) -> bytes | None:
    parts: list[bytes] = []
    while count:
        try:
            part = channel.recv(min(count, 1 << 20))
        except ConnectionError:
            return None
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
