"""The lower rungs: turns over a channel, a reliable ordered sequence of messages, without I/O.

A WebSocket or one QUIC stream carries the messages; `docs/protocol.md`, "Lower rungs", has them
byte by byte. Bundles carry new bytes only, and are made when the transport takes a message
(`next_message`), so that none grows old in a queue. The endpoint calls `next_message` until it
gives None, after each call that may have something to say and when `next_time` has come.
"""

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass

from eloquent.core.liveness import KEEPALIVE_S
from eloquent.core.log import Log, LogWindow
from eloquent.core.padding import Padding
from eloquent.core.receiver import Receiver
from eloquent.core.turns import (
    SLOW_READER,
    SLOW_READER_S,
    TOO_LARGE,
    ReaderDone,
    TurnCancelled,
    TurnEvent,
    TurnFailed,
    TurnProgress,
    TurnRequested,
)
from eloquent.core.varint import decode_varint, encode_varint
from eloquent.core.wire import (
    MAX_REASON_CHARS,
    MAX_REPLY_BYTES,
    MAX_REQUEST_BODY_BYTES,
    READER_WINDOW_BYTES,
    Bundle,
    Ended,
    Rejected,
    Report,
    Request,
    UnsupportedVersionError,
    decode_frame,
    decode_reply,
    decode_request,
    encode_bundle,
    encode_reply,
    encode_report,
    encode_request,
)
from eloquent.errors import EloquentError, RequestError, WireError

MESSAGE_OPEN = 5
MESSAGE_REPLY = 6
MESSAGE_CANCEL = 7
MESSAGE_BEAT = 8
MESSAGE_PADDED = 9

BEAT_S = 0.5
"A client with open turns that has sent nothing for so long sends a beat; without, `KEEPALIVE_S`."

MAX_OPEN_TURNS = 128
"Turns of one channel that are not over; a client holds further ones back."

MAX_BUNDLE_DATA_BYTES = 1 << 14
"The transport is asked again after so many bytes, in which other turns have their chance."

MAX_TO_SERVER_BYTES = MAX_REQUEST_BODY_BYTES + 128
MAX_TO_CLIENT_BYTES = MAX_REPLY_BYTES + 16
"The longest messages, with room for longer varints than needed."

NOW = float("-inf")
"As a time: at once."


class Channel(ABC):
    """One end of a channel; `ServerChannel` and `ClientChannel` add what turns do there.

    `now` is in seconds, of any origin, and never goes back.
    """

    def __init__(self, now: float) -> None:
        self._events: deque[TurnEvent] = deque()
        self._sent_at = now
        self._beat_is_due = False

    @abstractmethod
    def receive(self, message: bytes, now: float) -> None:
        """Take a message.

        Raises:
            WireError: it breaks the protocol; the endpoint must end the channel.
        """

    def next_event(self) -> TurnEvent | None:
        """Return the next event, or None."""
        return self._events.popleft() if self._events else None

    def next_message(self, now: float) -> bytes | None:
        """Return the next message to send, made now, or None."""
        self._do_what_is_due(now)
        message = self._make_message(now)
        if message is not None:
            self._sent_at = now
        return message

    def next_time(self) -> float | None:
        """Return when `next_message` should be called next, in seconds, or None."""
        return NOW if self._beat_is_due else min(self._due_times(), default=None)

    @abstractmethod
    def _do_what_is_due(self, now: float) -> None:
        """See to what time has brought."""

    @abstractmethod
    def _make_message(self, now: float) -> bytes | None:
        """Return a message that is made only when it can be sent, or None."""

    def _make_beat(self) -> bytes:
        """Return a beat."""
        self._beat_is_due = False
        return bytes((MESSAGE_BEAT,))

    @abstractmethod
    def _due_times(self) -> list[float]:
        """Return when this end has something to do, in any order."""


@dataclass(slots=True)
class _Reader:
    """An accepted turn: its reader gets the log through a window."""

    window: LogWindow
    sent: int
    "The offset up to which the log has been sent."
    bundles: int = 0
    full_at: float | None = None
    "Since when there has been more than the window lets through."
    is_confirmed: bool = False


class ServerChannel(Channel):
    """One client.

    A turn's life here is that on a `ServerConnection`: the application gets `TurnRequested` and
    answers with `accept` or `reject`; an accepted turn is read until the reader has everything
    (`ReaderDone`), cancels, is too slow, or is gone.
    """

    def __init__(self, now: float, *, padding: bool = True) -> None:
        """`padding` hides the lengths of tokens in those of messages."""
        super().__init__(now)
        self._padding = Padding() if padding else None
        self._highest_turn = -1
        self._asked: set[int] = set()
        "Turns that were neither accepted nor rejected yet."
        self._readers: dict[int, _Reader] = {}
        self._order: deque[int] = deque()
        self._replies: dict[int, bytes] = {}
        "By turn, those that were not sent yet."

    def accept(self, turn: int, log: Log, offset: int = 0) -> None:
        """Send `log` from `offset` on, as it is and as it grows, unless the reader cancelled.

        `log_grew` must follow.
        """
        if turn in self._asked:
            self._asked.remove(turn)
            window = LogWindow(log, offset + READER_WINDOW_BYTES)
            self._readers[turn] = _Reader(window, offset)
            self._order.append(turn)

    def reject(self, turn: int, code: str, message: str) -> None:
        """Decline a turn, or give up one that was accepted, unless its reader cancelled.

        `docs/protocol.md` lists the codes.
        """
        reader = self._readers.get(turn)
        if turn in self._asked or (reader is not None and not reader.is_confirmed):
            self._drop(turn)
            self._reply(turn, Rejected(code, message[:MAX_REASON_CHARS]))

    def log_grew(self, turn: int, now: float) -> None:
        """Tell the channel that the turn's log has more, or is closed."""
        reader = self._readers.get(turn)
        if reader is not None:
            if reader.window.is_full and reader.full_at is None:
                reader.full_at = now
            self._confirm(turn, reader)

    def receive(self, message: bytes, now: float) -> None:
        """See `Channel.receive`."""
        kind = _kind(message, MAX_TO_SERVER_BYTES)
        if kind == MESSAGE_OPEN:
            self._on_open(*_number_and_rest(message))
        elif kind == MESSAGE_CANCEL:
            self._on_cancel(_turn_alone(message))
        elif kind == MESSAGE_BEAT:
            _check_beat(message)
            self._beat_is_due = True
        else:
            frame = decode_frame(message)
            if not isinstance(frame, Report):
                raise WireError("A client sent a bundle; only servers send bundles.")
            self._on_report(frame, now)

    def _do_what_is_due(self, now: float) -> None:
        slow = [
            turn
            for turn, reader in self._readers.items()
            if reader.full_at is not None and reader.full_at + SLOW_READER_S <= now
        ]
        for turn in slow:
            self.reject(turn, "slow_reader", SLOW_READER)
            self._events.append(ReaderDone(turn))

    def _make_message(self, now: float) -> bytes | None:
        """Return a reply, a beat or a bundle; the turns take their chances in rotation."""
        for turn in self._replies:
            return bytes((MESSAGE_REPLY,)) + encode_varint(turn) + self._replies.pop(turn)
        if self._beat_is_due:
            return self._make_beat()
        for _ in range(len(self._order)):
            turn = self._order[0]
            self._order.rotate(-1)
            reader = self._readers[turn]
            if reader.sent < reader.window.length:
                data = reader.window.read(reader.sent, reader.sent + MAX_BUNDLE_DATA_BYTES)
                bundle = Bundle(turn, reader.bundles, reader.sent, data)
                reader.bundles += 1
                reader.sent += len(data)
                self._confirm(turn, reader)
                return self._padded(encode_bundle(bundle), now)
        return None

    def _padded(self, message: bytes, now: float) -> bytes:
        if self._padding is None:
            return message
        wrapped = bytes((MESSAGE_PADDED,)) + encode_varint(len(message)) + message
        # A message's bytes are new ones only, however long the round trip is.
        size = self._padding.padded_size(len(wrapped), now, rtt_s=0.0)
        return wrapped.ljust(size, b"\0")

    def _due_times(self) -> list[float]:
        readers = self._readers.values()
        if self._replies or any(reader.sent < reader.window.length for reader in readers):
            return [NOW]
        return [r.full_at + SLOW_READER_S for r in readers if r.full_at is not None]

    def _on_open(self, turn: int, data: bytes) -> None:
        if turn <= self._highest_turn:
            raise WireError(f"Turn {turn} was opened after turn {self._highest_turn}.")
        if len(self._asked | self._readers.keys() | self._replies.keys()) >= MAX_OPEN_TURNS:
            raise WireError(f"More than {MAX_OPEN_TURNS} turns are open: the client is broken.")
        self._highest_turn = turn
        self._asked.add(turn)
        try:
            request = decode_request(data)
        except UnsupportedVersionError as error:
            self.reject(turn, "unsupported_version", str(error))
        except WireError as error:
            self.reject(turn, "malformed_request", str(error))
        else:
            if len(request.body) > MAX_REQUEST_BODY_BYTES:
                self.reject(turn, "request_too_large", TOO_LARGE)
            else:
                self._events.append(TurnRequested(turn, request))

    def _on_cancel(self, turn: int) -> None:
        self._check_opened(turn)
        self._replies.pop(turn, None)
        if turn in self._asked or turn in self._readers:
            self._drop(turn)
            self._events.append(TurnCancelled(turn))

    def _on_report(self, report: Report, now: float) -> None:
        self._check_opened(report.turn)
        reader = self._readers.get(report.turn)
        if reader is None:
            return
        if report.contiguous > reader.sent or report.newest >= reader.bundles:
            raise WireError("A report acknowledges what was never sent: the client is broken.")
        limit = report.contiguous - report.unread + READER_WINDOW_BYTES
        if limit > reader.window.limit:
            reader.window.limit = limit
            reader.full_at = now if reader.window.is_full else None
            self._confirm(report.turn, reader)
        if reader.is_confirmed and report.contiguous == reader.sent:
            self._drop(report.turn)
            self._events.append(ReaderDone(report.turn))

    def _check_opened(self, turn: int) -> None:
        if turn > self._highest_turn:
            raise WireError(f"A message names turn {turn}, which was never opened.")

    def _confirm(self, turn: int, reader: _Reader) -> None:
        end = reader.window.end
        if end is not None and reader.sent >= reader.window.length and not reader.is_confirmed:
            reader.is_confirmed = True
            self._reply(turn, Ended(end.length, end.digest))

    def _reply(self, turn: int, reply: Rejected | Ended) -> None:
        self._replies[turn] = encode_reply(reply)

    def _drop(self, turn: int) -> None:
        self._asked.discard(turn)
        if self._readers.pop(turn, None) is not None:
            self._order.remove(turn)


class ClientChannel(Channel):
    """One server; turns are opened with `request` and seen through events."""

    def __init__(self, now: float) -> None:
        super().__init__(now)
        self._next_turn = 0
        self._unsent: dict[int, Request] = {}
        self._open: set[int] = set()
        "Turns that count as open at the server."
        self._receivers: dict[int, Receiver] = {}
        self._cancelled: deque[int] = deque()
        "Turns whose cancels were not sent yet."
        self._replied: set[int] = set()
        "Turns whose receivers have the server's confirmation, and maybe not the whole log."
        self._beat_at: float | None = None
        "When the last beat was sent, until it is answered."
        self._rtt_s: float | None = None

    @property
    def rtt_s(self) -> float | None:
        """How long the answer to a beat last took, in seconds; None: none has come."""
        return self._rtt_s

    def request(self, request: Request, receiver: Receiver | None = None) -> int:
        """Open a turn, or go on with one; return its number on this channel.

        `receiver` has what is before the request's offset; None: there is nothing yet.
        """
        turn = self._next_turn
        self._next_turn += 1
        receiver = receiver or Receiver()
        receiver.attach(turn)
        self._receivers[turn] = receiver
        self._unsent[turn] = request
        return turn

    def cancel(self, turn: int) -> None:
        """Give a turn up: the server stops generating, and no event of it follows."""
        if self._receivers.pop(turn, None) is not None:
            self._replied.discard(turn)
            if self._unsent.pop(turn, None) is None and turn in self._open:
                self._open.remove(turn)
                self._cancelled.append(turn)

    def detach(self, turn: int) -> None:
        """Leave a turn that goes on over another connection; nothing is said to the server."""
        self._unsent.pop(turn, None)
        self._receivers.pop(turn, None)
        self._replied.discard(turn)

    def has_turn(self, turn: int) -> bool:
        """Return whether anything of the turn is still to come or to be said."""
        return turn in self._receivers

    def probe(self) -> None:
        """Send something soon that the server answers."""
        self._beat_is_due = True

    def receive(self, message: bytes, now: float) -> None:
        """See `Channel.receive`."""
        kind = _kind(message, MAX_TO_CLIENT_BYTES)
        if kind == MESSAGE_PADDED:
            message = _unpadded(message)
            kind = _kind(message, MAX_TO_CLIENT_BYTES)
        if kind == MESSAGE_REPLY:
            self._on_reply(*_number_and_rest(message))
        elif kind == MESSAGE_BEAT:
            _check_beat(message)
            if self._beat_at is not None:
                self._rtt_s, self._beat_at = now - self._beat_at, None
        else:
            frame = decode_frame(message)
            if not isinstance(frame, Bundle):
                raise WireError("A server sent a report; only clients send reports.")
            self._on_bundle(frame, now)

    def _do_what_is_due(self, now: float) -> None:
        if self._sent_at + self._beat_s <= now:
            self._beat_is_due = True

    def _make_message(self, now: float) -> bytes | None:
        if self._cancelled:
            return bytes((MESSAGE_CANCEL,)) + encode_varint(self._cancelled.popleft())
        if self._may_open:
            turn, request = next(iter(self._unsent.items()))
            del self._unsent[turn]
            self._open.add(turn)
            return bytes((MESSAGE_OPEN,)) + encode_varint(turn) + encode_request(request)
        for turn, receiver in self._receivers.items():
            report = receiver.next_report(now)
            if report is not None:
                self._forget_if_complete(turn, receiver)
                return encode_report(report)
        if self._beat_is_due:
            self._beat_at = now
            return self._make_beat()
        return None

    def _due_times(self) -> list[float]:
        if self._cancelled or self._may_open:
            return [NOW]
        times = [receiver.next_time() for receiver in self._receivers.values()]
        return [time for time in (*times, self._sent_at + self._beat_s) if time is not None]

    @property
    def _may_open(self) -> bool:
        return bool(self._unsent) and len(self._open) < MAX_OPEN_TURNS

    @property
    def _beat_s(self) -> float:
        return BEAT_S if self._receivers else KEEPALIVE_S

    def _on_bundle(self, bundle: Bundle, now: float) -> None:
        receiver = self._receivers.get(bundle.turn)
        if receiver is None:
            return
        try:
            events = receiver.on_bundle(bundle, now)
        except EloquentError as error:
            self._fail(bundle.turn, error)
            return
        if events:
            self._events.append(TurnProgress(bundle.turn, tuple(events)))

    def _on_reply(self, turn: int, data: bytes) -> None:
        receiver = self._receivers.get(turn)
        try:
            reply = decode_reply(data)
            if isinstance(reply, Rejected):
                self._open.discard(turn)
                if receiver is not None:
                    self._fail(turn, RequestError(reply.code, reply.message))
            elif receiver is not None:
                receiver.on_ended(reply)
                self._replied.add(turn)
                self._forget_if_complete(turn, receiver)
        except EloquentError as error:
            self._fail(turn, error)

    def _forget_if_complete(self, turn: int, receiver: Receiver) -> None:
        """Forget a turn that is confirmed and whose last report is on its way."""
        if turn in self._replied and receiver.is_complete and receiver.next_time() is None:
            self._replied.remove(turn)
            self._open.discard(turn)
            del self._receivers[turn]

    def _fail(self, turn: int, error: EloquentError) -> None:
        if turn in self._receivers:
            self.cancel(turn)
            self._events.append(TurnFailed(turn, error))


class MessageSplitter:
    """Finds the messages in a stream's bytes, where each has its length before it (a varint)."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` is the longest message that is taken."""
        self._max_bytes = max_bytes
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes; return the messages that they complete.

        Raises:
            WireError: a message is longer than the protocol allows.
        """
        self._bytes += data
        messages: list[bytes] = []
        position = 0
        while (decoded := decode_varint(self._bytes, position)) is not None:
            length, start = decoded
            if length > self._max_bytes:
                raise WireError("A message is longer than the protocol allows.")
            if start + length > len(self._bytes):
                break
            position = start + length
            messages.append(bytes(self._bytes[start:position]))
        del self._bytes[:position]
        return messages


def with_length(message: bytes) -> bytes:
    """Return the message as a stream carries it."""
    return encode_varint(len(message)) + message


def _kind(message: bytes, max_bytes: int) -> int:
    if not message or len(message) > max_bytes:
        raise WireError("A message is empty or longer than the protocol allows.")
    return message[0]


def _number_and_rest(message: bytes) -> tuple[int, bytes]:
    """Return the number that follows a message's type, and what is behind it."""
    decoded = decode_varint(message, 1)
    if decoded is None:
        raise WireError("A message ends within its first number: the peer breaks the protocol.")
    number, position = decoded
    return number, message[position:]


def _unpadded(message: bytes) -> bytes:
    length, rest = _number_and_rest(message)
    if length > len(rest):
        raise WireError("A padded message ends before what it pads: the server is broken.")
    return rest[:length]


def _turn_alone(message: bytes) -> int:
    turn, rest = _number_and_rest(message)
    if rest:
        raise WireError("A cancel has bytes after its end: the peer breaks the protocol.")
    return turn


def _check_beat(message: bytes) -> None:
    if len(message) != 1:
        raise WireError("A beat has bytes after its end: the peer breaks the protocol.")
