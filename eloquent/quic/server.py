"""The server's end of a connection: turns come in, their logs go out in bundles."""

from collections import deque
from typing import Any

from aioquic.quic import events as quic_events
from aioquic.quic.configuration import QuicConfiguration

from eloquent.core.log import TokenLog
from eloquent.core.padding import Padding
from eloquent.core.schemes import EloquentSender, SenderFactory
from eloquent.core.sender import Sender
from eloquent.core.wire import (
    MAX_REASON_CHARS,
    MAX_REQUEST_BODY_BYTES,
    Ended,
    Frame,
    Rejected,
    Report,
    UnsupportedVersionError,
    decode_request,
    encode_bundle,
    encode_reply,
)
from eloquent.errors import WireError
from eloquent.quic.certificate import ServerCertificate
from eloquent.quic.connection import (
    STREAM_FAILED,
    STREAM_REFUSED,
    Connection,
    TurnCancelled,
    TurnRequested,
    base_configuration,
)

MAX_STREAM_BYTES = MAX_REQUEST_BODY_BYTES + 64
"A request's body and what stands before it, with room for longer varints than needed."

TOO_LARGE = f"The request is larger than {MAX_REQUEST_BODY_BYTES} bytes: shorten it."


def server_configuration(certificate: ServerCertificate) -> QuicConfiguration:
    """Return the QUIC settings of a server that shows `certificate`."""
    configuration = base_configuration(is_client=False)
    configuration.certificate = certificate.certificate
    configuration.private_key = certificate.private_key
    return configuration


class ServerConnection(Connection):
    """One client.

    A turn's life here: its stream opens and collects the request; at its end the application
    gets `TurnRequested` and answers with `accept` or `reject`; an accepted turn has a sender
    until the reader has everything, cancels, or is gone.
    """

    def __init__(
        self,
        configuration: QuicConfiguration,
        *,
        make_sender: SenderFactory = EloquentSender,
        padding: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(configuration, padding=Padding() if padding else None, **options)
        self._make_sender = make_sender
        self._requests: dict[int, bytearray] = {}
        self._given_up: set[int] = set()
        "Cancelled by the reader, or refused before the request was whole: nothing more is said."
        self._senders: dict[int, Sender] = {}
        self._confirmed: set[int] = set()
        self._order: deque[int] = deque()
        self._highest_turn = -1

    def accept(self, turn: int, log: TokenLog) -> None:
        """Send `log`, as it is and as it grows, to the reader of `turn`, unless it cancelled."""
        if turn in self._given_up:
            return
        if not self._quic.can_send_datagrams:
            self.reject(
                turn,
                "datagrams_required",
                "The client does not take QUIC datagrams, which this server needs.",
            )
            return
        self._senders[turn] = self._make_sender(turn, log, self._path)
        self._order.append(turn)

    def reject(self, turn: int, code: str, message: str) -> None:
        """Decline a turn, unless its reader cancelled; `docs/protocol.md` lists the codes."""
        if turn in self._given_up:
            return
        reply = encode_reply(Rejected(code, message[:MAX_REASON_CHARS]))
        self._quic.send_stream_data(turn * 4, reply, end_stream=True)

    def reset(self, turn: int) -> None:
        """Give up an accepted turn whose log cannot be finished."""
        if turn in self._senders and turn not in self._confirmed:
            self._drop(turn)
            self._quic.reset_stream(turn * 4, STREAM_FAILED)

    def log_grew(self, turn: int, now: float) -> None:
        """Tell the connection that the turn's log has more, or is closed."""
        sender = self._senders.get(turn)
        if sender is None:
            return
        sender.log_grew(now)
        end = sender.log.end
        if end is not None and turn not in self._confirmed:
            self._confirmed.add(turn)
            reply = encode_reply(Ended(end.length, end.digest))
            self._quic.send_stream_data(turn * 4, reply, end_stream=True)

    def sender(self, turn: int) -> Sender | None:
        """Return the turn's sender while it has one."""
        return self._senders.get(turn)

    def has_datagram(self, now: float) -> bool:
        """See `DatagramSource`."""
        return self._quic.can_send_datagrams and any(
            (time := sender.next_time()) is not None and time <= now
            for sender in self._senders.values()
        )

    def next_datagram(self, now: float, room: int) -> tuple[bytes, Any] | None:
        """See `DatagramSource`; the turns take their chances in rotation."""
        for _ in range(len(self._order)):
            turn = self._order[0]
            self._order.rotate(-1)
            bundle = self._senders[turn].next_bundle(now, room)
            if bundle is not None:
                return encode_bundle(bundle), (turn, bundle.number)
        return None

    def on_delivery(self, token: Any, *, acked: bool) -> None:
        """See `DatagramSource`."""
        turn, number = token
        sender = self._senders.get(turn)
        if sender is None:
            return
        if acked:
            sender.on_acked(number)
            self._drop_if_complete(turn)
        else:
            sender.on_lost(number)

    def _due_times(self) -> list[float]:
        times = (sender.next_time() for sender in self._senders.values())
        return [time for time in times if time is not None]

    def _on_frame(self, frame: Frame, now: float) -> None:
        if not isinstance(frame, Report):
            raise WireError("A client sent a bundle; only servers send bundles.")
        if frame.turn > self._highest_turn:
            raise WireError(f"A report names turn {frame.turn}, which was never opened.")
        sender = self._senders.get(frame.turn)
        if sender is not None:
            sender.on_report(frame)
            self._drop_if_complete(frame.turn)

    def _on_stream_event(
        self,
        event: quic_events.StreamDataReceived
        | quic_events.StreamReset
        | quic_events.StopSendingReceived,
    ) -> None:
        turn, kind = divmod(event.stream_id, 4)
        if kind != 0:
            raise WireError("A client opened a one-way stream; turns use two-way streams.")
        self._highest_turn = max(self._highest_turn, turn)
        if isinstance(event, quic_events.StreamDataReceived):
            self._on_request_data(turn, event)
            return
        is_cut_short = self._requests.pop(turn, None) is not None
        is_cancelled = isinstance(event, quic_events.StopSendingReceived)
        if is_cut_short or is_cancelled:
            self._given_up.add(turn)
        if is_cancelled:
            self._drop(turn)
            self._events.append(TurnCancelled(turn))

    def _on_request_data(self, turn: int, event: quic_events.StreamDataReceived) -> None:
        if turn in self._given_up:
            return
        collected = self._requests.setdefault(turn, bytearray())
        collected += event.data
        if len(collected) > MAX_STREAM_BYTES:
            del self._requests[turn]
            self._quic.stop_stream(event.stream_id, STREAM_REFUSED)
            self.reject(turn, "request_too_large", TOO_LARGE)
            self._given_up.add(turn)
        elif event.end_stream:
            del self._requests[turn]
            try:
                request = decode_request(bytes(collected))
            except UnsupportedVersionError as error:
                self.reject(turn, "unsupported_version", str(error))
            except WireError as error:
                self.reject(turn, "malformed_request", str(error))
            else:
                if len(request.body) > MAX_REQUEST_BODY_BYTES:
                    self.reject(turn, "request_too_large", TOO_LARGE)
                else:
                    self._events.append(TurnRequested(turn, request))

    def _drop_if_complete(self, turn: int) -> None:
        if self._senders[turn].is_complete:
            self._drop(turn)

    def _drop(self, turn: int) -> None:
        if self._senders.pop(turn, None) is not None:
            self._order.remove(turn)
            self._confirmed.discard(turn)
