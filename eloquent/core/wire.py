"""The wire format: datagram frames and stream messages (`docs/protocol.md`, byte by byte)."""

from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from eloquent.core.varint import VARINT_MAX, decode_varint, encode_varint, varint_size
from eloquent.errors import WireError

ALPN = "eloquent"
PROTOCOL_VERSION = 3
"The newest; a request is of the oldest that can say what it has to, so that old servers take it."
KEYLESS_VERSION = 2
"Has no key, and is the same otherwise."

TURN_ID_BYTES = 16
SECRET_BYTES = 16
MAX_REQUEST_BODY_BYTES = 1 << 20
MAX_KEY_BYTES = 256
MAX_REQUEST_HEAD_BYTES = 512
"What stands around a body has fewer."
REQUEST_S = 30.0
REQUEST_BYTES_PER_S = 4000
"""A request may take so long, and longer for as long as it comes at this pace: anybody may begin
one, and links on which a long one takes minutes are what this is for."""
MAX_REPLY_BYTES = 1 << 16
MAX_REASON_CHARS = 4000
"A longer message of `Rejected` is cut by the sender: it may repeat what the client sent."

FRAME_BUNDLE = 1
FRAME_REPORT = 2
FRAME_TIMED_BUNDLE = 3
FRAME_TIMED_REPORT = 4

ARRIVAL_UNIT_S = 1e-4
"Resolution of the arrival times in a report."

READER_WINDOW_BYTES = 1 << 18
"A server sends no further than this beyond what the application has taken,"
CONNECTION_WINDOW_BYTES = 1 << 20
"and no more than this in all beyond what the readers of a connection have taken;"
LEAST_WINDOW_BYTES = 1 << 13
"but each of them may have so much."

MAX_ARRIVALS = 256
"A report names at most so many bundles' arrivals."

FLAG_OWNER = 1

REPLY_REJECTED = 1
REPLY_ENDED = 2


@dataclass(frozen=True, slots=True)
class Bundle:
    """A run of one turn's log, as one datagram carries it."""

    turn: int
    "The turn's number on this connection: its QUIC stream id divided by 4."
    number: int
    "Counts the bundles of this turn and connection, from 0; never used twice; below 2**62 - 1."
    offset: int
    "Where in the log `data` starts, in bytes."
    data: bytes
    "The log's bytes from there on."
    is_timed: bool = False
    "Whether the sender wants to know when it arrived."


@dataclass(frozen=True, slots=True)
class Arrival:
    """When a bundle came; the clock is the reader's, its origin unknown to the sender."""

    number: int
    "The bundle's."
    time: int
    "In units of `ARRIVAL_UNIT_S`."


@dataclass(frozen=True, slots=True)
class Report:
    """What a reader has of one turn."""

    turn: int
    "As in `Bundle`."
    contiguous: int
    "The reader has all bytes of the log below this offset."
    newest: int
    "The highest bundle number received; -1 if none."
    unread: int = 0
    "How many of the bytes below `contiguous` the application has not taken yet."
    arrivals: tuple[Arrival, ...] = ()
    "Those of timed bundles since the report before it, in the order of their numbers."


@dataclass(frozen=True, slots=True)
class Request:
    """What the client writes on a turn's stream before it half-closes it.

    With a body it asks for a turn; the same id and body again, or no body, is the same turn.
    """

    turn_id: bytes
    "16 random bytes that the client made: the turn's name."
    body: bytes
    "An OpenAI chat body, in JSON; empty: the turn is there, and nothing is to be generated."
    secret: bytes = bytes(SECRET_BYTES)
    "16 random bytes that the client made: who knows them may read the turn."
    offset: int = 0
    "The reader has the log's bytes below it."
    is_owner: bool = True
    "Whether this reader's cancel stops the generation; other readers only leave."
    key: str = field(default="", repr=False)
    "Says who asks, where the server wants to know; at most `MAX_KEY_BYTES` in UTF-8."


@dataclass(frozen=True, slots=True)
class Rejected:
    """The server's word on the stream that there will be no answer."""

    code: str
    message: str
    retry_after_s: float = 0.0
    "Asking again before is of no use; 0: nothing is said of it."


@dataclass(frozen=True, slots=True)
class Ended:
    """The server's word on the stream that the log is complete."""

    length: int
    "Bytes in the log before its last event; equals `End.length`."
    digest: bytes
    "Equals `End.digest`."


Frame = Bundle | Report
Reply = Rejected | Ended


class UnsupportedVersionError(WireError):
    """The peer speaks a version of the protocol that this one does not."""


class _RejectedBody(msgspec.Struct, array_like=True, frozen=True):
    code: str
    message: str
    retry_after_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    "Left out where it is 0."


class _EndedBody(msgspec.Struct, array_like=True, frozen=True):
    length: int
    digest: bytes


def request_due_s(began_s: float, so_far: int) -> float:
    """Return when a request has to be whole of which so many bytes have come; times in seconds."""
    return began_s + REQUEST_S + so_far / REQUEST_BYTES_PER_S


def encode_bundle(bundle: Bundle) -> bytes:
    """Return the bundle as a datagram's payload."""
    return (
        bytes((FRAME_TIMED_BUNDLE if bundle.is_timed else FRAME_BUNDLE,))
        + encode_varint(bundle.turn)
        + encode_varint(bundle.number)
        + encode_varint(bundle.offset)
        + bundle.data
    )


def bundle_header_size(turn: int, number: int, offset: int) -> int:
    """Return how many bytes stand before a bundle's data."""
    return 1 + varint_size(turn) + varint_size(number) + varint_size(offset)


def encode_report(report: Report) -> bytes:
    """Return the report as a datagram's payload."""
    encoded = (
        bytes((FRAME_TIMED_REPORT if report.arrivals else FRAME_REPORT,))
        + encode_varint(report.turn)
        + encode_varint(report.contiguous)
        + encode_varint(report.newest + 1)
        + encode_varint(report.unread)
    )
    before = Arrival(0, 0)
    for arrival in report.arrivals:
        encoded += encode_varint(arrival.number - before.number)
        encoded += encode_varint(_zigzag(arrival.time - before.time))
        before = arrival
    return encoded


def decode_frame(payload: bytes) -> Frame:
    """Read a datagram's payload.

    Raises:
        WireError: it is no frame of this protocol.
    """
    kind, position = _varint(payload, 0, "a frame's type")
    if kind in (FRAME_BUNDLE, FRAME_TIMED_BUNDLE):
        return _decode_bundle(payload, position, is_timed=kind == FRAME_TIMED_BUNDLE)
    if kind in (FRAME_REPORT, FRAME_TIMED_REPORT):
        return _decode_report(payload, position, is_timed=kind == FRAME_TIMED_REPORT)
    raise WireError(
        f"A datagram holds a frame of unknown type {kind}: the peer speaks another protocol or "
        "another version of this one."
    )


def _decode_bundle(payload: bytes, position: int, *, is_timed: bool) -> Bundle:
    turn, position = _varint(payload, position, "a bundle's turn")
    number, position = _varint(payload, position, "a bundle's number")
    offset, position = _varint(payload, position, "a bundle's offset")
    data = payload[position:]
    if not data:
        raise WireError("A bundle carries no data: the peer breaks the protocol.")
    if offset + len(data) > VARINT_MAX or number == VARINT_MAX:
        raise WireError(
            "A bundle's number or end is beyond what a report can name: the peer breaks the "
            "protocol."
        )
    return Bundle(turn, number, offset, data, is_timed)


def _decode_report(payload: bytes, position: int, *, is_timed: bool) -> Report:
    turn, position = _varint(payload, position, "a report's turn")
    contiguous, position = _varint(payload, position, "a report's offset")
    newest, position = _varint(payload, position, "a report's bundle number")
    unread, position = _varint(payload, position, "a report's unread bytes")
    if unread > contiguous:
        raise WireError("A report has more bytes unread than received: the peer is broken.")
    arrivals: list[Arrival] = []
    before = Arrival(0, 0)
    while is_timed and position < len(payload):
        ahead, position = _varint(payload, position, "an arrival's bundle number")
        later, position = _varint(payload, position, "an arrival's time")
        if len(arrivals) == MAX_ARRIVALS or (arrivals and not ahead):
            raise WireError("A report's arrivals are too many or repeat a bundle.")
        before = Arrival(before.number + ahead, before.time + _unzigzag(later))
        arrivals.append(before)
    if position != len(payload):
        raise WireError("A report has bytes after its end: the peer breaks the protocol.")
    if is_timed and not arrivals:
        raise WireError("A report with arrivals names none: the peer breaks the protocol.")
    if arrivals and before.number >= newest:
        raise WireError("A report times a bundle newer than the newest it has.")
    return Report(turn, contiguous, newest - 1, unread, tuple(arrivals))


def encode_request(request: Request, version: int | None = None) -> bytes:
    """Return the request as the stream carries it; by itself of the oldest version that can.

    Raises:
        ValueError: a name has the wrong length, or the key is too long.
    """
    if len(request.turn_id) != TURN_ID_BYTES or len(request.secret) != SECRET_BYTES:
        raise ValueError(
            f"a turn id has {TURN_ID_BYTES} bytes and a secret {SECRET_BYTES}, not "
            f"{len(request.turn_id)} and {len(request.secret)}"
        )
    key = request.key.encode()
    if len(key) > MAX_KEY_BYTES:
        raise ValueError(f"a key has at most {MAX_KEY_BYTES} bytes, not {len(key)}")
    if version is None:
        version = PROTOCOL_VERSION if key else KEYLESS_VERSION
    return (
        encode_varint(version)
        + request.turn_id
        + request.secret
        + bytes((FLAG_OWNER if request.is_owner else 0,))
        + encode_varint(request.offset)
        + (encode_varint(len(key)) + key if version != KEYLESS_VERSION else b"")
        + encode_varint(len(request.body))
        + request.body
    )


def decode_request(data: bytes) -> Request:
    """Read all that a client wrote on a turn's stream.

    Raises:
        UnsupportedVersionError: the request is of another protocol version.
        WireError: it is no request, is cut short, or something follows it.
    """
    version, position = _varint(data, 0, "a request's version")
    if version not in (KEYLESS_VERSION, PROTOCOL_VERSION):
        raise UnsupportedVersionError(
            f"The request is of protocol version {version}, and this server speaks versions "
            f"{KEYLESS_VERSION} to {PROTOCOL_VERSION}: use a client and a server of the same "
            "release."
        )
    names_end = position + TURN_ID_BYTES + SECRET_BYTES
    turn_id, secret = (
        data[position : position + TURN_ID_BYTES],
        data[names_end - SECRET_BYTES : names_end],
    )
    flags, position = _varint(data, names_end, "a request's flags")
    if flags & ~FLAG_OWNER:
        raise WireError(f"A request has unknown flags ({flags:#x}): the client is newer or broken.")
    offset, position = _varint(data, position, "a request's offset")
    key = ""
    if version != KEYLESS_VERSION:
        key, position = _key(data, position)
    length, position = _varint(data, position, "a request's length")
    if length > len(data) - position:
        raise WireError("A request ends before its announced length: send it whole.")
    if length < len(data) - position:
        raise WireError(
            "Something follows the request on its stream: each request needs a stream of its own."
        )
    return Request(turn_id, data[position:], secret, offset, bool(flags & FLAG_OWNER), key)


def encode_reply(reply: Reply) -> bytes:
    """Return the reply as the stream carries it."""
    if isinstance(reply, Rejected):
        kind = REPLY_REJECTED
        fields = [reply.code, reply.message, reply.retry_after_s]
        body = msgspec.msgpack.encode(fields if reply.retry_after_s else fields[:-1])
    else:
        kind, body = REPLY_ENDED, msgspec.msgpack.encode(_EndedBody(reply.length, reply.digest))
    return bytes((kind,)) + encode_varint(len(body)) + body


def decode_reply(data: bytes) -> Reply:
    """Read all that a server wrote on a turn's stream.

    Raises:
        WireError: it is no reply, is cut short, or something follows it.
    """
    kind, position = _varint(data, 0, "a reply's type")
    length, position = _varint(data, position, "a reply's length")
    body = data[position:]
    if len(body) != length:
        raise WireError(f"A reply announces {length} bytes and has {len(body)}.")
    try:
        if kind == REPLY_REJECTED:
            rejected = msgspec.msgpack.decode(body, type=_RejectedBody)
            return Rejected(rejected.code, rejected.message, rejected.retry_after_s)
        if kind == REPLY_ENDED:
            ended = msgspec.msgpack.decode(body, type=_EndedBody)
            return Ended(ended.length, ended.digest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"A reply of type {kind} cannot be read: {error}.") from error
    raise WireError(f"A reply is of unknown type {kind}: the server speaks another version.")


def _key(data: bytes, position: int) -> tuple[str, int]:
    length, position = _varint(data, position, "a key's length")
    end = position + length
    if length > MAX_KEY_BYTES or end > len(data):
        raise WireError(f"A request's key has over {MAX_KEY_BYTES} bytes, or is cut short.")
    try:
        return data[position:end].decode(), end
    except UnicodeDecodeError as error:
        raise WireError(f"A request's key is no text ({error}).") from error


def _varint(data: bytes, position: int, what: str) -> tuple[int, int]:
    decoded = decode_varint(data, position)
    if decoded is None:
        raise WireError(f"The bytes end within {what}: the peer breaks the protocol.")
    return decoded


def _zigzag(number: int) -> int:
    return 2 * number if number >= 0 else -2 * number - 1


def _unzigzag(number: int) -> int:
    return -(number + 1) // 2 if number & 1 else number // 2
