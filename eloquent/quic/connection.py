"""What both ends of a connection share: QUIC driven without I/O, and the events it gives.

Like aioquic's own connection this one has no socket and no clock: `now` (seconds, any origin,
never going back) is an argument, and the endpoint calls `send` after each call that may have
something to say, then sets a timer for `next_time`.
"""

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import Any

from aioquic.quic import events as quic_events
from aioquic.quic.configuration import QuicConfiguration

from eloquent.core.channel_client import ClientChannel
from eloquent.core.channel_server import ServerChannel
from eloquent.core.path import Path
from eloquent.core.turns import TurnEvent
from eloquent.core.wire import ALPN, Frame, decode_frame
from eloquent.errors import WireError
from eloquent.quic._aioquic import MAX_DATAGRAM_FRAME_BYTES, Datagram
from eloquent.quic._quiet import is_quiet
from eloquent.quic._roaming import RoamingConnection
from eloquent.quic.ecn import Ecn
from eloquent.quic.stream import ChannelStream
from eloquent.quic.thin import THIN

StreamEvent = (
    quic_events.StreamDataReceived | quic_events.StreamReset | quic_events.StopSendingReceived
)

Address = Any
"A socket address, as the socket's family has it."

IDLE_TIMEOUT_S = 180.0
"A connection of which nothing was heard for so long is over; minutes without a link do not end it."

TIMER_SLACK_S = 1e-6
"""QUIC's timers are served this much late. aioquic sets its loss timer to `sent + delay` and then
asks whether `sent <= now - delay`, which rounding can deny at that very instant, for ever."""

CLOSE_NORMAL = 0
CLOSE_PROTOCOL_ERROR = 1
CLOSE_BAD_CERTIFICATE = 2
"Error codes of CONNECTION_CLOSE (the application's own, RFC 9000 section 20.2)."

STREAM_CANCELLED = 1
STREAM_REFUSED = 2
"Error codes of STOP_SENDING."


@dataclass(frozen=True, slots=True)
class Connected:
    """The handshake is done and the peer is who it should be (client)."""


@dataclass(frozen=True, slots=True)
class ConnectionEnded:
    """The connection is over; no event follows."""

    reason: str
    "Why, for a person."
    by_peer_error: bool
    "False for an ordinary close or an idle timeout."
    is_peers_end: bool = False
    "Whether the peer ended it in order, as a server does when it stops."


@dataclass(frozen=True, slots=True)
class ConnectionIdChanged:
    """A connection id of ours came into use or went out of it (for the endpoint's routing)."""

    connection_id: bytes
    is_issued: bool


ConnectionEvent = Connected | ConnectionIdChanged | ConnectionEnded | TurnEvent


def base_configuration(*, is_client: bool) -> QuicConfiguration:
    """Return the QUIC settings that both ends use."""
    return QuicConfiguration(
        alpn_protocols=[ALPN],
        congestion_control_algorithm=THIN,
        idle_timeout=IDLE_TIMEOUT_S,
        is_client=is_client,
        max_datagram_frame_size=MAX_DATAGRAM_FRAME_BYTES,
    )


class Connection(ABC):
    """One QUIC connection; `ServerConnection` and `ClientConnection` add what turns do there.

    It is also the `DatagramSource` of its QUIC connection.
    """

    def __init__(self, configuration: QuicConfiguration, **options: Any) -> None:
        self._quic = RoamingConnection(configuration=configuration, source=self, **options)
        self._path = Path(srtt_s=configuration.initial_rtt)
        self._events: deque[ConnectionEvent] = deque()
        self._is_ended = False
        self._sent_at = float("-inf")
        self._answered_at = float("-inf")

    @property
    def answered_at(self) -> float:
        """Up to when what was sent has reached the peer, as far as its answers tell, in seconds."""
        return self._answered_at

    @property
    def quic(self) -> RoamingConnection:
        """The QUIC connection underneath, for endpoints (connection ids) and measurements."""
        return self._quic

    @property
    def is_ended(self) -> bool:
        """Whether `ConnectionEnded` was given."""
        return self._is_ended

    @property
    def path(self) -> Path:
        """Round-trip time and loss as measured here."""
        self._path.srtt_s = self._quic.srtt_s
        return self._path

    def receive(self, data: bytes, address: Address, now: float, ecn: Ecn = Ecn.NOT_ECT) -> None:
        """Take a UDP datagram, which came with this ECN field."""
        newest = self._quic.newest_acked
        self._quic.receive_datagram(data, address, now, ecn)
        if self._quic.newest_acked > newest:
            self._answered_at = max(self._answered_at, now - self._quic.srtt_s)
        self._process_quic_events(now)

    def handle_timer(self, now: float) -> None:
        """Do what is due; call it when `next_time` has come."""
        timer = self._quic.get_timer()
        if timer is not None and now >= timer:
            self._quic.handle_timer(now=now)
        self._process_quic_events(now)

    def send(self, now: float) -> list[tuple[bytes, Address, Ecn]]:
        """Return the UDP datagrams to send now, each with its ECN field."""
        self._quic.update_path(self._path, now)
        self._sent_at = now
        stream = self._channel_stream
        if stream is None and is_quiet(self._quic, now) and not self.has_datagram(now):
            return []
        if stream is not None and not self._is_ended:
            stream.fill(now)
        datagrams = self._quic.marked_datagrams_to_send(now)
        if self.has_datagram(now):
            self._path.blocked_at = now
        return datagrams

    def next_time(self) -> float | None:
        """Return when `handle_timer` and `send` should be called next, in seconds, or None."""
        quic_timer = self._quic.get_timer()
        if quic_timer is not None:
            quic_timer += TIMER_SLACK_S
        times = [time for time in (quic_timer, self._own_time()) if time is not None]
        return min(times, default=None)

    def next_event(self) -> ConnectionEvent | None:
        """Return the next event, or None."""
        stream = self._channel_stream
        while stream is not None and (event := stream.channel.next_event()) is not None:
            self._on_channel_event(event)
        return self._events.popleft() if self._events else None

    def close(self, reason: str = "", code: int = CLOSE_NORMAL) -> None:
        """End the connection; the endpoint must call `send` afterwards."""
        self._quic.close(error_code=code, reason_phrase=reason)

    # What the two ends do differently.

    @property
    @abstractmethod
    def _channel_stream(self) -> ChannelStream[ClientChannel] | ChannelStream[ServerChannel] | None:
        """What carries the turns on the middle rung."""

    def _on_channel_event(self, event: TurnEvent) -> None:
        self._events.append(event)

    @abstractmethod
    def has_datagram(self, now: float) -> bool:
        """See `DatagramSource`."""

    @abstractmethod
    def next_datagram(self, now: float, room: int) -> Datagram | None:
        """See `DatagramSource`."""

    @abstractmethod
    def on_delivery(self, token: Any, *, acked: bool) -> None:
        """See `DatagramSource`."""

    @abstractmethod
    def _due_times(self) -> list[float]:
        """Return when this end has something of its own to do, in any order."""

    @abstractmethod
    def _on_frame(self, frame: Frame, now: float) -> None:
        """Take a datagram's frame; `WireError` ends the connection."""

    @abstractmethod
    def _on_stream_event(self, event: StreamEvent) -> None:
        """Take what happened on a stream; `WireError` ends the connection."""

    def _on_handshake_completed(self) -> None:  # noqa: B027  (only a client asks who answered)
        """Take note that the handshake is done."""

    def _own_time(self) -> float | None:
        # What was due at the last `send` and did not leave then waits for the window or the
        # pacer, which wake us through QUIC's own timer or an acknowledgement.
        return min((time for time in self._due_times() if time > self._sent_at), default=None)

    def _process_quic_events(self, now: float) -> None:
        while (event := self._quic.next_event()) is not None:
            try:
                self._on_quic_event(event, now)
            except WireError as error:
                self.close(str(error), CLOSE_PROTOCOL_ERROR)

    def _on_quic_event(self, event: quic_events.QuicEvent, now: float) -> None:
        if isinstance(event, quic_events.DatagramFrameReceived):
            self._on_frame(decode_frame(event.data), now)
        elif isinstance(event, StreamEvent):
            self._on_stream_event(event)
        elif isinstance(event, quic_events.HandshakeCompleted):
            self._on_handshake_completed()
        elif isinstance(event, quic_events.ConnectionIdIssued):
            self._events.append(ConnectionIdChanged(event.connection_id, is_issued=True))
        elif isinstance(event, quic_events.ConnectionIdRetired):
            self._events.append(ConnectionIdChanged(event.connection_id, is_issued=False))
        elif isinstance(event, quic_events.ConnectionTerminated) and not self._is_ended:
            self._is_ended = True
            self._events.append(_ended(event))


def _ended(event: quic_events.ConnectionTerminated) -> ConnectionEnded:
    no_common_protocol = 0x100 + 120  # TLS alert 120 (RFC 7301) as a QUIC error code (RFC 9001)
    if event.error_code == no_common_protocol:
        reason = (
            f"the peer does not speak the protocol '{ALPN}': the address is of another QUIC service"
        )
    else:
        reason = event.reason_phrase or f"closed with code 0x{event.error_code:x}"
    is_idle = event.reason_phrase == "Idle timeout"
    is_orderly = event.error_code == CLOSE_NORMAL
    return ConnectionEnded(
        reason,
        by_peer_error=not is_orderly and not is_idle,
        is_peers_end=is_orderly and event.frame_type is None,  # an application's close
    )
