"""The server's end of a channel: turns come in, their logs go out in bundles."""

from collections import deque
from dataclasses import dataclass

from eloquent.core.channel import (
    MAX_BUNDLE_DATA_BYTES,
    MAX_OPEN_TURNS,
    MAX_TO_SERVER_BYTES,
    MESSAGE_BEAT,
    MESSAGE_CANCEL,
    MESSAGE_OPEN,
    MESSAGE_PADDED,
    MESSAGE_REPLY,
    NOW,
    Channel,
    check_beat,
    kind_of,
    number_and_rest,
)
from eloquent.core.counts import LinkCounts
from eloquent.core.log import Log
from eloquent.core.padding import Padding
from eloquent.core.turns import (
    SLOW_READER,
    TOO_LARGE,
    ReaderDone,
    TurnCancelled,
    TurnRequested,
)
from eloquent.core.varint import encode_varint
from eloquent.core.windows import ReaderWindow, ReaderWindows
from eloquent.core.wire import (
    MAX_REASON_CHARS,
    MAX_REQUEST_BODY_BYTES,
    Bundle,
    Ended,
    Rejected,
    Report,
    UnsupportedVersionError,
    decode_frame,
    decode_request,
    encode_bundle,
    encode_reply,
)
from eloquent.errors import WireError


@dataclass(slots=True)
class _Reader:
    """An accepted turn: its reader gets the log through a window."""

    window: ReaderWindow
    bundles: int = 0
    is_confirmed: bool = False
    report: Report | None = None
    "The last one."


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
        self._windows = ReaderWindows()
        self._order: deque[int] = deque()
        self._replies: dict[int, bytes] = {}
        "By turn, those that were not sent yet."
        self.counts = LinkCounts()
        "Those of the endpoint."

    def accept(self, turn: int, log: Log, offset: int = 0) -> None:
        """Send `log` from `offset` on, as it is and as it grows, unless the reader cancelled.

        `log_grew` must follow.
        """
        if turn in self._asked:
            self._asked.remove(turn)
            self._readers[turn] = _Reader(self._windows.open(log, offset))
            self._order.append(turn)

    def reject(self, turn: int, code: str, message: str, retry_after_s: float = 0.0) -> None:
        """Decline a turn, or give up one that was accepted, unless its reader cancelled.

        `docs/protocol.md` lists the codes.
        """
        reader = self._readers.get(turn)
        if turn in self._asked or (reader is not None and not reader.is_confirmed):
            self._drop(turn)
            self.counts.refusals[code] += 1
            self._reply(turn, Rejected(code, message[:MAX_REASON_CHARS], retry_after_s))

    def log_grew(self, turn: int, now: float) -> None:
        """Tell the channel that the turn's log has more, or is closed."""
        reader = self._readers.get(turn)
        if reader is not None:
            self._confirm(turn, reader)

    def report(self, turn: int) -> Report | None:
        """Return what the turn's reader reported last; None: nothing, or it is gone."""
        reader = self._readers.get(turn)
        return reader.report if reader is not None else None

    def receive(self, message: bytes, now: float) -> None:
        """See `Channel.receive`."""
        kind = kind_of(message, MAX_TO_SERVER_BYTES)
        if kind == MESSAGE_OPEN:
            self._on_open(*number_and_rest(message))
        elif kind == MESSAGE_CANCEL:
            self._on_cancel(_turn_alone(message))
        elif kind == MESSAGE_BEAT:
            check_beat(message)
            self._beat_is_due = True
        else:
            frame = decode_frame(message)
            if not isinstance(frame, Report):
                raise WireError("A client sent a bundle; only servers send bundles.")
            self._on_report(frame, now)

    def _do_what_is_due(self, now: float) -> None:
        for turn, reader in list(self._readers.items()):
            reader.window.look(now)
            slow_at = reader.window.slow_at
            if slow_at is not None and slow_at <= now:
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
            start = reader.window.sent
            if start < reader.window.length:
                data = reader.window.read(start, start + MAX_BUNDLE_DATA_BYTES)
                bundle = Bundle(turn, reader.bundles, start, data)
                reader.bundles += 1
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
        windows = [reader.window for reader in self._readers.values()]
        if self._replies or any(window.sent < window.length for window in windows):
            return [NOW]
        return [window.slow_at for window in windows if window.slow_at is not None]

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
        if report.contiguous > reader.window.sent or report.newest >= reader.bundles:
            raise WireError("A report acknowledges what was never sent: the client is broken.")
        reader.report = report
        reader.window.on_taken(report.contiguous - report.unread)
        self._confirm(report.turn, reader)
        if reader.is_confirmed and report.contiguous == reader.window.sent:
            self._drop(report.turn)
            self._events.append(ReaderDone(report.turn))

    def _check_opened(self, turn: int) -> None:
        if turn > self._highest_turn:
            raise WireError(f"A message names turn {turn}, which was never opened.")

    def _confirm(self, turn: int, reader: _Reader) -> None:
        end = reader.window.end
        is_sent = reader.window.sent >= reader.window.length
        if end is not None and is_sent and not reader.is_confirmed:
            reader.is_confirmed = True
            self._reply(turn, Ended(end.length, end.digest))

    def _reply(self, turn: int, reply: Rejected | Ended) -> None:
        self._replies[turn] = encode_reply(reply)

    def _drop(self, turn: int) -> None:
        self._asked.discard(turn)
        reader = self._readers.pop(turn, None)
        if reader is not None:
            reader.window.close()
            self._order.remove(turn)


def _turn_alone(message: bytes) -> int:
    turn, rest = number_and_rest(message)
    if rest:
        raise WireError("A cancel has bytes after its end: the peer breaks the protocol.")
    return turn
