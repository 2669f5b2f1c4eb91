"""The client's end of a channel: requests go out, bundles come in and become events."""

from collections import deque
from dataclasses import replace

from eloquent.core.channel import (
    BEAT_S,
    MAX_OPEN_TURNS,
    MAX_TO_CLIENT_BYTES,
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
from eloquent.core.liveness import KEEPALIVE_S
from eloquent.core.receiver import Receiver
from eloquent.core.turns import TurnFailed, TurnProgress
from eloquent.core.varint import encode_varint
from eloquent.core.wire import (
    MAX_REQUEST_BODY_BYTES,
    Bundle,
    Rejected,
    Request,
    decode_frame,
    decode_reply,
    encode_report,
    encode_request,
)
from eloquent.errors import EloquentError, RequestError, WireError


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
        # One that is too large is cut, and still too large: so the server declines it, where a
        # message beyond its limit would end the channel for all turns, each time it is asked.
        body = request.body[: MAX_REQUEST_BODY_BYTES + 1]
        self._unsent[turn] = replace(request, body=body)
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
        kind = kind_of(message, MAX_TO_CLIENT_BYTES)
        if kind == MESSAGE_PADDED:
            message = _unpadded(message)
            kind = kind_of(message, MAX_TO_CLIENT_BYTES)
        if kind == MESSAGE_REPLY:
            self._on_reply(*number_and_rest(message))
        elif kind == MESSAGE_BEAT:
            check_beat(message)
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
                    self._fail(turn, RequestError(reply.code, reply.message, reply.retry_after_s))
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


def _unpadded(message: bytes) -> bytes:
    length, rest = number_and_rest(message)
    if length > len(rest):
        raise WireError("A padded message ends before what it pads: the server is broken.")
    return rest[:length]
