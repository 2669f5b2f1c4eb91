"""The client's end of a connection: requests go out, bundles come in and become events."""

import ssl
from typing import Any

from aioquic.quic import events as quic_events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.tls import SessionTicket

from eloquent.core.beat import ClientBeat
from eloquent.core.channel import MAX_TO_CLIENT_BYTES
from eloquent.core.channel_client import ClientChannel
from eloquent.core.liveness import KEEPALIVE_S
from eloquent.core.receiver import Receiver
from eloquent.core.turns import TurnFailed, TurnProgress
from eloquent.core.wire import (
    MAX_REPLY_BYTES,
    Bundle,
    Frame,
    Rejected,
    Request,
    decode_reply,
    encode_report,
    encode_request,
)
from eloquent.errors import ConnectionFailedError, EloquentError, RequestError, WireError
from eloquent.quic._aioquic import MAX_ACK_DELAY_S, Datagram
from eloquent.quic._streams import repeat_stop
from eloquent.quic.certificate import certificate_pin
from eloquent.quic.connection import (
    CLOSE_BAD_CERTIFICATE,
    STREAM_CANCELLED,
    Address,
    Connected,
    Connection,
    StreamEvent,
    base_configuration,
)
from eloquent.quic.ecn import Ecn
from eloquent.quic.stream import CHANNEL_STREAM, ChannelStream
from eloquent.quic.tickets import Tickets

CANCEL_AGAIN_S = (0.003, 0.03, 0.1, 0.3)
"A cancel is said again after each of these times, until the server has ended the stream."

MAX_REPORT_BYTES = 25
"A report's type and three of the longest varints."
MAX_ARRIVAL_BYTES = 16
"What of it each arrival has: two of them."


def client_configuration(server_name: str, *, pin: str | None) -> QuicConfiguration:
    """Return the QUIC settings of a client.

    `pin` is the hexadecimal SHA-256 of the one certificate to accept; with None the server's
    certificate must be valid for `server_name` and come from an authority that the system trusts.
    """
    configuration = base_configuration(is_client=True)
    configuration.server_name = server_name
    if pin is not None:
        configuration.verify_mode = ssl.CERT_NONE
        return configuration
    # aioquic would ask those that come with certifi; WebSocket asks the system's, and so do we.
    system = ssl.get_default_verify_paths()
    if system.cafile is not None or system.capath is not None:
        configuration.load_verify_locations(system.cafile, system.capath)
    return configuration


class ClientConnection(Connection):
    """One server; turns are opened with `request` and seen through events."""

    def __init__(
        self,
        configuration: QuicConfiguration,
        *,
        pin: str | None = None,
        tickets: Tickets | None = None,
        **options: Any,
    ) -> None:
        """`tickets` are those of the server, and get its new ones."""
        if tickets is not None:
            configuration.session_ticket = tickets.take()
            options["session_ticket_handler"] = self._on_ticket
        super().__init__(configuration, **options)
        self._pin = pin
        self._tickets = tickets
        self._ticket = configuration.session_ticket
        self._is_trusted = False
        "Whether the server is the right one."
        self._receivers: dict[int, Receiver] = {}
        self._replies: dict[int, bytearray] = {}
        self._cancels: dict[int, list[float] | None] = {}
        "When to say again which cancels; None: it was not sent yet."
        self._keepalive_at: float | None = None
        self._channel: ChannelStream[ClientChannel] | None = None
        self._begun_at = 0.0
        "Where the clock of the arrival times begins."
        self._heard_at = float("-inf")
        self._answered: dict[int, Receiver] = {}
        "Turns of which something came over this connection, so that the server knows them."
        self._beat = ClientBeat()
        self._has_content = False
        "Whether the packet just received had something of a turn."

    def connect(self, address: Address, now: float) -> None:
        """Begin the handshake; `Connected` or `ConnectionEnded` follows."""
        self._begun_at = now
        self._quic.connect(address, now=now)

    def give_up(self) -> None:
        """Take note that the connection is not used any more; a ticket nobody took is kept."""
        ticket, self._ticket = self._ticket, None
        if ticket is not None and self._tickets is not None and self._heard_at == float("-inf"):
            self._tickets.put(ticket)

    def receive(self, data: bytes, address: Address, now: float, ecn: Ecn = Ecn.NOT_ECT) -> None:
        """See `Connection.receive`."""
        self._keepalive_at = now + KEEPALIVE_S
        self._heard_at = now
        self._has_content = False
        super().receive(data, address, now, ecn)
        self._beat.on_heard(now, has_content=self._has_content)

    def handle_timer(self, now: float) -> None:
        """See `Connection.handle_timer`."""
        if self._keepalive_at is not None and now >= self._keepalive_at:
            self._keepalive_at = now + KEEPALIVE_S
            self._quic.send_ping(0)
        beat_time = self._beat_time()
        if beat_time is not None and beat_time <= now:
            self._beat.on_beat(now)
            self.probe()
        self._cancel_again(now)
        super().handle_timer(now)

    def send(self, now: float) -> list[tuple[bytes, Address, Ecn]]:
        """See `Connection.send`."""
        for turn, times in self._cancels.items():
            if times is None:
                self._cancels[turn] = [now + wait_s for wait_s in CANCEL_AGAIN_S]
        return super().send(now)

    def request(self, request: Request, receiver: Receiver | None = None) -> int:
        """Open a turn, or go on with one; return its number on this connection.

        `receiver` has what is before the request's offset; None: there is nothing yet.
        """
        if self._channel is not None:
            return self._channel.channel.request(request, receiver)
        stream_id = self._quic.get_next_available_stream_id()
        turn = stream_id // 4
        receiver = receiver or Receiver()
        receiver.attach(turn, clock_s=self._begun_at)
        self._receivers[turn] = receiver
        self._replies[turn] = bytearray()
        self._quic.send_stream_data(stream_id, encode_request(request), end_stream=True)
        return turn

    def cancel(self, turn: int) -> None:
        """Give a turn up: the server stops generating, and no event of it follows."""
        if self._channel is not None:
            self._channel.channel.cancel(turn)
        if self._receivers.pop(turn, None) is None:
            return
        if self._replies.pop(turn, None) is not None:
            self._quic.stop_stream(turn * 4, STREAM_CANCELLED)
            self._cancels[turn] = None

    def detach(self, turn: int) -> None:
        """Leave a turn that goes on over another connection; nothing is said to the server."""
        if self._channel is not None:
            self._channel.channel.detach(turn)
        self._receivers.pop(turn, None)
        self._replies.pop(turn, None)

    @property
    def uses_stream(self) -> bool:
        """Whether the turns run over a stream, since the server takes no datagrams."""
        return self._channel is not None

    def has_turn(self, turn: int) -> bool:
        """Return whether anything of the turn is still to come or to be said."""
        if self._channel is not None:
            return self._channel.channel.has_turn(turn)
        return turn in self._receivers

    @property
    def can_request_early(self) -> bool:
        """Whether resumes may be sent already while the handshake goes on (0-RTT)."""
        return self._quic.can_send_early and self._quic.can_send_datagrams

    def probe(self) -> None:
        """Send something soon that the server answers, whatever the congestion window says.

        With a turn open it is a report, which tells the server at once where to go on.
        """
        self._report_again(1)
        self._quic.send_probe()

    def migrate(self, now: float) -> None:
        """Go on from a new local address, which the server learns from the next packet."""
        self._report_again(len(self._answered))
        self._quic.migrate(now)

    def has_datagram(self, now: float) -> bool:
        """See `DatagramSource`."""
        return self._quic.can_send_datagrams and any(
            (time := receiver.next_time()) is not None and time <= now
            for receiver in self._receivers.values()
        )

    def next_datagram(self, now: float, room: int) -> Datagram | None:
        """See `DatagramSource`."""
        if room < MAX_REPORT_BYTES:
            return None
        for turn, receiver in self._receivers.items():
            report = receiver.next_report(now, (room - MAX_REPORT_BYTES) // MAX_ARRIVAL_BYTES)
            if report is not None:
                return Datagram(encode_report(report), (turn, report))
        return None

    def on_delivery(self, token: Any, *, acked: bool) -> None:
        """See `DatagramSource`; once the server has the final report, the turn is forgotten."""
        turn, report = token
        receiver = self._receivers.get(turn)
        if receiver is None:
            return
        if not acked:
            receiver.tell_again(report.arrivals)
        if not receiver.is_complete or report.contiguous < receiver.contiguous:
            return
        if not acked:
            receiver.report_again()
        elif turn not in self._replies:
            del self._receivers[turn]

    def _due_times(self) -> list[float]:
        times = [receiver.next_time() for receiver in self._receivers.values()]
        times.append(self._channel.channel.next_time() if self._channel is not None else None)
        times += [again[0] for again in self._cancels.values() if again]
        return [t for t in (*times, self._keepalive_at, self._beat_time()) if t is not None]

    def _cancel_again(self, now: float) -> None:
        for turn, times in list(self._cancels.items()):
            if times is None or times[0] > now:
                continue
            del times[0]
            if not repeat_stop(self._quic, turn * 4) or not times:
                del self._cancels[turn]

    def _report_again(self, count: int) -> None:
        """Make the reports of so many turns due, of those that the server knows."""
        self._answered = {t: r for t, r in self._answered.items() if t in self._receivers}
        for receiver in list(self._answered.values())[:count]:
            receiver.report_again()

    def _beat_time(self) -> float | None:
        """Return when to ask whether the link is alive, as an answer has fallen silent."""
        if not self._is_trusted or not self._receivers:
            return None
        return self._beat.next_time(self._quic.srtt_s, MAX_ACK_DELAY_S)

    def _on_handshake_completed(self) -> None:
        if not self._is_pinned_one():
            self.close("the server's certificate is not the pinned one", CLOSE_BAD_CERTIFICATE)
            return
        is_unused = self._quic.get_next_available_stream_id() == CHANNEL_STREAM
        if is_unused and not self._quic.can_send_datagrams:
            self._channel = ChannelStream(
                self._quic, ClientChannel(self._heard_at), MAX_TO_CLIENT_BYTES, is_client=True
            )
        self._is_trusted = True
        self._quic.resend_refused(self._heard_at)
        self._events.append(Connected())

    def _is_pinned_one(self) -> bool:
        if self._pin is None or self._quic.is_resumed:
            return True  # TLS has looked, now or when it gave the ticket
        certificate = self._quic.peer_certificate
        return certificate is not None and certificate_pin(certificate) == self._pin.lower()

    def _on_ticket(self, ticket: SessionTicket) -> None:
        if self._is_trusted and self._tickets is not None:
            self._tickets.put(ticket)

    def _on_frame(self, frame: Frame, now: float) -> None:
        if not isinstance(frame, Bundle):
            raise WireError("A server sent a report; only clients send reports.")
        receiver = self._receivers.get(frame.turn)
        if receiver is None:
            return
        self._has_content = True
        self._answered[frame.turn] = receiver
        try:
            events = receiver.on_bundle(frame, now)
        except EloquentError as error:
            self._fail(frame.turn, error)
            return
        if events:
            self._events.append(TurnProgress(frame.turn, tuple(events)))

    @property
    def _channel_stream(self) -> ChannelStream[ClientChannel] | None:
        return self._channel

    def _on_stream_event(self, event: StreamEvent) -> None:
        if self._channel is not None:
            if not isinstance(event, quic_events.StreamDataReceived) or event.end_stream:
                raise WireError("The server ended the channel's stream.")
            self._channel.receive(event.data, self._heard_at)
            return
        turn = event.stream_id // 4
        collected = self._replies.get(turn)
        if collected is None:
            return
        if isinstance(event, quic_events.StreamReset):
            self._fail(
                turn,
                ConnectionFailedError(
                    "The server gave the answer up without saying why. Ask again."
                ),
            )
        elif isinstance(event, quic_events.StreamDataReceived):
            collected += event.data
            if len(collected) > MAX_REPLY_BYTES:
                raise WireError("A reply is longer than the protocol allows.")
            if event.end_stream:
                del self._replies[turn]
                self._on_reply(turn, bytes(collected))

    def _on_reply(self, turn: int, data: bytes) -> None:
        try:
            reply = decode_reply(data)
            if isinstance(reply, Rejected):
                self._fail(turn, RequestError(reply.code, reply.message, reply.retry_after_s))
            elif (receiver := self._receivers.get(turn)) is not None:
                receiver.on_ended(reply)
        except EloquentError as error:
            self._fail(turn, error)

    def _fail(self, turn: int, error: EloquentError) -> None:
        self.cancel(turn)
        self._events.append(TurnFailed(turn, error))
