"""The server's end of a connection: turns come in, their logs go out in bundles."""

from collections import deque
from dataclasses import dataclass
from typing import Any

from aioquic.quic import events as quic_events
from aioquic.quic.configuration import QuicConfiguration

from eloquent.core.channel import MAX_TO_SERVER_BYTES
from eloquent.core.channel_server import ServerChannel
from eloquent.core.liveness import DEAD_AFTER_S, PROBE_AFTER_S, dead_after_s, probe_again_s
from eloquent.core.log import Log
from eloquent.core.padding import Padding
from eloquent.core.schemes import COPY_WITHIN_S, EloquentSender, SenderFactory
from eloquent.core.sender import Sender
from eloquent.core.turns import (
    SLOW_READER,
    TOO_LARGE,
    ReaderDone,
    TurnCancelled,
    TurnEvent,
    TurnRequested,
)
from eloquent.core.windows import ReaderWindow, ReaderWindows
from eloquent.core.wire import (
    ARRIVAL_UNIT_S,
    MAX_REASON_CHARS,
    MAX_REQUEST_BODY_BYTES,
    MAX_REQUEST_HEAD_BYTES,
    REQUEST_BYTES_PER_S,
    REQUEST_S,
    Bundle,
    Ended,
    Frame,
    Rejected,
    Report,
    Request,
    UnsupportedVersionError,
    decode_request,
    encode_bundle,
    encode_reply,
    request_due_s,
)
from eloquent.errors import WireError
from eloquent.quic._aioquic import Datagram
from eloquent.quic.certificate import ServerCertificate
from eloquent.quic.connection import (
    CLOSE_PROTOCOL_ERROR,
    STREAM_REFUSED,
    Address,
    Connection,
    StreamEvent,
    base_configuration,
)
from eloquent.quic.ecn import Ecn
from eloquent.quic.stream import CHANNEL_MARK, CHANNEL_STREAM, ChannelStream

MAX_STREAM_BYTES = MAX_REQUEST_BODY_BYTES + MAX_REQUEST_HEAD_BYTES
"A request's body and what stands before it, with room for longer varints than needed."

NO_CHANNEL = (
    "The client takes no QUIC datagrams, and its first stream is no channel: see docs/protocol.md, "
    "'Lower rungs'."
)

MAX_UNFINISHED_BYTES = 8 << 20
"Of a connection's requests together, while they are not whole: nobody knows yet who asks."

TOO_MUCH = (
    f"The requests that this connection has begun and not finished take more than "
    f"{MAX_UNFINISHED_BYTES} bytes: send the rest of the others, then ask again."
)
TOO_MUCH_FOR_S = 1.0

TOO_LATE = (
    f"The request came too slowly: it may take {REQUEST_S:.0f} s, and more at "
    f"{REQUEST_BYTES_PER_S} bytes/s. Ask again."
)


def server_configuration(certificate: ServerCertificate) -> QuicConfiguration:
    """Return the QUIC settings of a server that shows `certificate`."""
    configuration = base_configuration(is_client=False)
    show_certificate(configuration, certificate)
    return configuration


def show_certificate(configuration: QuicConfiguration, certificate: ServerCertificate) -> None:
    """Have the connections that are made from now on show `certificate`."""
    configuration.certificate = certificate.certificate
    configuration.certificate_chain = list(certificate.chain)
    configuration.private_key = certificate.private_key


@dataclass(slots=True)
class _Reader:
    """An accepted turn: its reader gets the log through a window."""

    sender: Sender
    window: ReaderWindow
    is_confirmed: bool = False
    report: Report | None = None
    "The newest one."


class ServerConnection(Connection):
    """One client.

    A turn's life here: its stream opens and collects the request; at its end the application
    gets `TurnRequested` and answers with `accept` or `reject`; an accepted turn has a sender
    until the reader has everything (`ReaderDone`), cancels, is too slow, or is gone.

    A request that asks for a new turn waits for the end of the handshake: before it, anybody may
    be repeating what somebody sent (0-RTT, RFC 9001 section 9.2).
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
        self._has_padding = padding
        self._requests: dict[int, bytearray] = {}
        self._early: list[TurnEvent] | None = []
        "New turns' requests, and cancels, that wait for the handshake's end; None: it has ended."
        self._complete: set[int] = set()
        "Turns whose request has come whole."
        self._overtaken: set[int] = set()
        "Turns whose cancel has come, and whose request has not."
        self._given_up: set[int] = set()
        "Cancelled by the reader, or refused before the request was whole: nothing more is said."
        self._readers: dict[int, _Reader] = {}
        self._windows = ReaderWindows()
        self._order: deque[int] = deque()
        self._last_bundle: Bundle | None = None
        self._bundle_at = float("-inf")
        "When it left."
        self._highest_turn = -1
        self._asked_at: dict[int, float] = {}
        "When the first part of a request came that is not whole yet."
        self._channel: ChannelStream[ServerChannel] | None = None
        self._heard_at = float("-inf")
        self._probed_at = float("-inf")
        self._reading_at = float("-inf")
        "Since when there are readers, so that what is sent is to be answered."

    def receive(self, data: bytes, address: Address, now: float, ecn: Ecn = Ecn.NOT_ECT) -> None:
        """See `Connection.receive`."""
        self._heard_at = now
        super().receive(data, address, now, ecn)
        self._probe_if_due(now)

    def send(self, now: float) -> list[tuple[bytes, Address, Ecn]]:
        """See `Connection.send`."""
        datagrams = super().send(now)
        for reader in self._readers.values():
            reader.window.look(now)
        return datagrams

    @property
    def is_handshaking(self) -> bool:
        """Whether nothing proves yet that the client takes part in the handshake."""
        return self._early is not None and not self._is_ended

    @property
    def has_channel(self) -> bool:
        """Whether turns run over a stream, because the client takes no datagrams."""
        return self._channel is not None

    def is_silent(self, now: float) -> bool:
        """Return whether turns are open and the link to the client is dead, one way or both."""
        if self._channel is not None:
            return now >= self._heard_at + DEAD_AFTER_S
        return bool(self._readers) and now >= self._dead_at

    def accept(self, turn: int, log: Log, offset: int = 0) -> None:
        """Send `log` from `offset` on, as it is and as it grows, unless the reader cancelled."""
        if self._channel is not None:
            self._channel.channel.accept(turn, log, offset)
            return
        if turn in self._given_up:
            return
        if not self._quic.can_send_datagrams:
            self.reject(turn, "malformed_request", NO_CHANNEL)
            return
        if not self._readers:
            self._reading_at = self._heard_at
        window = self._windows.open(log, offset)
        sender = self._make_sender(turn, window, self._path)
        sender.start_at(offset)
        self._readers[turn] = _Reader(sender, window)
        self._order.append(turn)

    def reject(self, turn: int, code: str, message: str, retry_after_s: float = 0.0) -> None:
        """Decline a turn, or give up one that was accepted, unless its reader cancelled.

        `docs/protocol.md` lists the codes.
        """
        if self._channel is not None:
            self._channel.channel.reject(turn, code, message, retry_after_s)
            return
        reader = self._readers.get(turn)
        if turn in self._given_up or (reader is not None and reader.is_confirmed):
            return
        self._given_up.add(turn)
        self._path.counts.refusals[code] += 1
        self._drop(turn)
        reply = encode_reply(Rejected(code, message[:MAX_REASON_CHARS], retry_after_s))
        self._quic.send_stream_data(turn * 4, reply, end_stream=True)

    def log_grew(self, turn: int, now: float) -> None:
        """Tell the connection that the turn's log has more, or is closed."""
        if self._channel is not None:
            self._channel.channel.log_grew(turn, now)
            return
        reader = self._readers.get(turn)
        if reader is None:
            return
        reader.sender.log_grew(now)
        self._confirm(turn, reader)

    def handle_timer(self, now: float) -> None:
        """See `Connection.handle_timer`."""
        for turn, reader in list(self._readers.items()):
            slow_at = reader.window.slow_at
            if slow_at is not None and slow_at <= now:
                self.reject(turn, "slow_reader", SLOW_READER)
                self._events.append(ReaderDone(turn))
        for turn in [t for t in self._asked_at if self._request_due_s(t) <= now]:
            self._forget_request(turn)
            if self._channel is not None:
                self.close(TOO_LATE, CLOSE_PROTOCOL_ERROR)
                continue
            self._quic.stop_stream(turn * 4, STREAM_REFUSED)
            self.reject(turn, "request_timeout", TOO_LATE)
        self._probe_if_due(now)
        super().handle_timer(now)

    def sender(self, turn: int) -> Sender | None:
        """Return the turn's sender while it has one."""
        reader = self._readers.get(turn)
        return reader.sender if reader is not None else None

    def report(self, turn: int) -> Report | None:
        """Return the newest that the turn's reader reported; None: nothing, or it is gone."""
        if self._channel is not None:
            return self._channel.channel.report(turn)
        reader = self._readers.get(turn)
        return reader.report if reader is not None else None

    def has_datagram(self, now: float) -> bool:
        """See `DatagramSource`."""
        return self._quic.can_send_datagrams and any(
            (time := reader.sender.next_time()) is not None and time <= now
            for reader in self._readers.values()
        )

    def next_datagram(self, now: float, room: int) -> Datagram | None:
        """See `DatagramSource`; of the turns that are due the one that has waited longest sends."""
        for turn in self._order:
            sender = self._readers[turn].sender
            bundle = sender.next_bundle(now, room)
            if bundle is not None:
                self._order.remove(turn)
                if sender.is_copy_due:
                    self._order.appendleft(turn)
                else:
                    self._order.append(turn)
                is_copy = self._path.wants_copy is not None and self._is_copy(bundle, now)
                return Datagram(encode_bundle(bundle), (turn, bundle.number), is_copy)
        return None

    def _is_copy(self, bundle: Bundle, now: float) -> bool:
        """Return whether a bundle repeats the one that left before it, at once."""
        last, last_at = self._last_bundle, self._bundle_at
        self._last_bundle, self._bundle_at = bundle, now
        if last is None or last.turn != bundle.turn or now - last_at > COPY_WITHIN_S:
            return False
        last_stop, stop = last.offset + len(last.data), bundle.offset + len(bundle.data)
        return bundle.offset < last_stop and last.offset < stop <= last_stop

    def on_delivery(self, token: Any, *, acked: bool) -> None:
        """See `DatagramSource`."""
        turn, number = token
        reader = self._readers.get(turn)
        if reader is None:
            return
        if acked:
            reader.sender.on_acked(number)
            self._drop_if_complete(turn, reader)
        else:
            reader.sender.on_lost(number)

    def _due_times(self) -> list[float]:
        readers = self._readers.values()
        times = [reader.sender.next_time() for reader in readers]
        times += [reader.window.slow_at for reader in readers]
        times += [self._request_due_s(turn) for turn in self._asked_at]
        times.append(self._probe_time())
        times.append(self._channel.channel.next_time() if self._channel is not None else None)
        return [time for time in times if time is not None]

    def _probe_if_due(self, now: float) -> None:
        time = self._probe_time()
        if time is not None and time <= now:
            self._probed_at = now
            self._quic.send_probe()

    def _probe_time(self) -> float | None:
        """Return when to ask the client for a sign of life; None: it is dead, or not needed."""
        asked_at = max(self._answered_at, self._reading_at)
        again_s = probe_again_s(self._probed_at - asked_at)
        time = max(asked_at + PROBE_AFTER_S, self._probed_at + again_s)
        is_of_use = time < self._dead_at or self._heard_at > self._probed_at
        return time if self._readers and is_of_use else None

    @property
    def _dead_at(self) -> float:
        """When the link is dead unless something is answered."""
        return max(self._answered_at, self._reading_at) + dead_after_s(self._quic.srtt_s)

    def _on_frame(self, frame: Frame, now: float) -> None:
        if not isinstance(frame, Report):
            raise WireError("A client sent a bundle; only servers send bundles.")
        if frame.turn > self._highest_turn:
            raise WireError(f"A report names turn {frame.turn}, which was never opened.")
        reader = self._readers.get(frame.turn)
        if reader is not None:
            reader.sender.on_report(frame)
            # They may come in another order; both what is there and what was taken only grow.
            reader.report = max(
                reader.report or frame,
                frame,
                key=lambda report: (report.contiguous, -report.unread),
            )
            self._move_window(frame, reader, now)
            self._drop_if_complete(frame.turn, reader)
        for arrival in frame.arrivals:
            token = (frame.turn, arrival.number)
            self._quic.on_arrival(token, arrival.time * ARRIVAL_UNIT_S, now)

    def _on_handshake_completed(self) -> None:
        early, self._early = self._early or [], None
        self._events.extend(
            event
            for event in early
            if isinstance(event, TurnCancelled) or event.turn not in self._given_up
        )

    @property
    def _channel_stream(self) -> ChannelStream[ServerChannel] | None:
        return self._channel

    def _on_channel_event(self, event: TurnEvent) -> None:
        # A channel that begins in 0-RTT waits as a whole: its carrier is in order anyway.
        (self._events if self._early is None else self._early).append(event)

    def _on_stream_event(self, event: StreamEvent) -> None:
        turn, kind = divmod(event.stream_id, 4)
        if kind != 0:
            raise WireError("A client opened a one-way stream; turns use two-way streams.")
        if self._channel is not None or self._is_channel(event):
            self._on_channel_data(event)
            return
        self._highest_turn = max(self._highest_turn, turn)
        if isinstance(event, quic_events.StreamDataReceived):
            self._on_request_data(turn, event)
            return
        is_cut_short = self._forget_request(turn)
        is_cancelled = isinstance(event, quic_events.StopSendingReceived)
        if is_cut_short or is_cancelled:
            self._given_up.add(turn)
        if is_cancelled and turn not in self._complete:
            self._overtaken.add(turn)
        elif is_cancelled:
            self._drop(turn)
            (self._events if self._early is None else self._early).append(TurnCancelled(turn))

    def _on_request_data(self, turn: int, event: quic_events.StreamDataReceived) -> None:
        if turn in self._given_up and turn not in self._overtaken:
            return
        collected = self._requests.setdefault(turn, bytearray())
        self._asked_at.setdefault(turn, self._heard_at)
        collected += event.data
        if len(collected) > MAX_STREAM_BYTES:
            self._forget_request(turn)
            self._quic.stop_stream(event.stream_id, STREAM_REFUSED)
            self.reject(turn, "request_too_large", TOO_LARGE)
        elif not event.end_stream:
            if sum(map(len, self._requests.values())) > MAX_UNFINISHED_BYTES:
                self._forget_request(turn)
                self._quic.stop_stream(event.stream_id, STREAM_REFUSED)
                self.reject(turn, "overloaded", TOO_MUCH, TOO_MUCH_FOR_S)
        else:
            self._forget_request(turn)
            self._complete.add(turn)
            try:
                request = decode_request(bytes(collected))
            except UnsupportedVersionError as error:
                self.reject(turn, "unsupported_version", str(error))
            except WireError as error:
                self.reject(turn, "malformed_request", str(error))
            else:
                if len(request.body) > MAX_REQUEST_BODY_BYTES:
                    self.reject(turn, "request_too_large", TOO_LARGE)
                elif turn in self._overtaken:
                    self._on_overtaken(turn, request)
                elif request.body and self._early is not None:
                    self._early.append(TurnRequested(turn, request))
                else:
                    self._events.append(TurnRequested(turn, request))

    def _on_overtaken(self, turn: int, request: Request) -> None:
        """Take a request whose cancel came first: it counts if the turn may be running already."""
        self._overtaken.discard(turn)
        if not request.body:
            events = self._events if self._early is None else self._early
            events.append(TurnRequested(turn, request))
            events.append(TurnCancelled(turn))

    def _is_channel(self, event: StreamEvent) -> bool:
        """Return whether these are the first bytes of a channel."""
        return (
            event.stream_id == CHANNEL_STREAM
            and self._highest_turn < 0
            and isinstance(event, quic_events.StreamDataReceived)
            and event.data.startswith(CHANNEL_MARK)
        )

    def _on_channel_data(self, event: StreamEvent) -> None:
        is_data = isinstance(event, quic_events.StreamDataReceived) and not event.end_stream
        if not is_data or event.stream_id != CHANNEL_STREAM:
            raise WireError("The channel's stream ended, or there was another one beside it.")
        assert isinstance(event, quic_events.StreamDataReceived)
        data = event.data
        if self._channel is None:
            channel = ServerChannel(self._heard_at, padding=self._has_padding)
            channel.counts = self._path.counts
            self._channel = ChannelStream(self._quic, channel, MAX_TO_SERVER_BYTES, is_client=False)
            data = data.removeprefix(CHANNEL_MARK)
        self._channel.receive(data, self._heard_at)
        if self._channel.unfinished_bytes:
            self._asked_at.setdefault(CHANNEL_STREAM, self._heard_at)
        else:
            self._asked_at.pop(CHANNEL_STREAM, None)

    def _request_due_s(self, turn: int) -> float:
        """Return when a request, or a channel's message, has to be whole."""
        if self._channel is not None:
            so_far = self._channel.unfinished_bytes
        else:
            so_far = len(self._requests[turn])
        return request_due_s(self._asked_at[turn], so_far)

    def _forget_request(self, turn: int) -> bool:
        """Collect no more of a request; return whether a part of it had come."""
        self._asked_at.pop(turn, None)
        return self._requests.pop(turn, None) is not None

    def _move_window(self, report: Report, reader: _Reader, now: float) -> None:
        reader.window.on_taken(report.contiguous - report.unread)
        reader.sender.log_grew(now)
        self._confirm(report.turn, reader)

    def _confirm(self, turn: int, reader: _Reader) -> None:
        end = reader.window.end
        if end is not None and not reader.is_confirmed:
            reader.is_confirmed = True
            reply = encode_reply(Ended(end.length, end.digest))
            self._quic.send_stream_data(turn * 4, reply, end_stream=True)

    def _drop_if_complete(self, turn: int, reader: _Reader) -> None:
        if reader.sender.is_complete:
            self._drop(turn)
            self._events.append(ReaderDone(turn))

    def _drop(self, turn: int) -> None:
        reader = self._readers.pop(turn, None)
        if reader is not None:
            reader.window.close()
            self._order.remove(turn)
