"""One end of a TCP connection, without I/O: its beginning and end, and the two halves put together.

Not modelled: keep-alive, PAWS, simultaneous opening, urgent data and offloads. The sources named
in the modules are those of Linux 6.x.
"""

import errno

from eloquent_netem.capture import Address
from eloquent_netem.packet import SUBJECT, Ecn, Packet
from eloquent_netem.tcp.congestion import make_controller
from eloquent_netem.tcp.errors import TcpError
from eloquent_netem.tcp.phases import BEFORE_DATA, PHASES, SYNCHRONISED, Arrival, Phase
from eloquent_netem.tcp.receiver import BUFFER_BYTES, Receiver
from eloquent_netem.tcp.rtt import RTO_INITIAL_S, RTO_MAX_S, RttEstimator
from eloquent_netem.tcp.scoreboard import SentSegment
from eloquent_netem.tcp.segment import (
    ACK,
    CWR,
    ECE,
    FIN,
    MSS_BYTES,
    PSH,
    RST,
    SYN,
    Segment,
    TcpPacket,
    flow_addresses,
    from_packet,
    to_packet,
)
from eloquent_netem.tcp.sender import Sender

LINEAR_SYNS = 4
"A client's first SYNs are repeated every second; then it waits twice as long each time."

SYN_RETRIES = 6
"Besides the linear ones (`tcp_syn_retries`, `tcp_syn_linear_timeouts`)."

SYN_ACK_RETRIES = 5

WAIT_S = 60.0
"TIME_WAIT, and FIN_WAIT_2 if the application is gone (`TCP_TIMEWAIT_LEN`, `tcp_fin_timeout`)."

SEND_BUFFER_BYTES = 87040
SEND_BUFFER_MAX_BYTES = 4 << 20
"What a connection begins with, and what it grows to with its window (`tcp_sndbuf_expand`)."

RESET_ERRORS = {Phase.CLOSE_WAIT: errno.EPIPE, Phase.TIME_WAIT: None}
"What a reset means to the application, if not ECONNRESET: in the end all has come already."

FIRST = 0
"Both ends' initial sequence number."


class TcpConnection:
    """One end; the clock is an argument, packets come out of `packets_to_send`.

    A client calls `connect`; a server listens from the start. Data may be written before the
    handshake is over; it waits. `congestion` is "cubic" or "reno"; with `ecn` the two ends
    negotiate classic ECN (RFC 3168). TCP_NODELAY is on. With `has_window` the receivers' windows
    hold, as both ends must agree; else both applications read in time. `addresses` are this end's
    and the peer's; without them, those of a `flow` that is alone on its links.
    """

    def __init__(
        self,
        *,
        is_client: bool,
        congestion: str = "cubic",
        ecn: bool = False,
        flow: int = SUBJECT,
        addresses: tuple[Address, Address] | None = None,
        has_window: bool = False,
    ) -> None:
        self._is_client = is_client
        self._flow = flow
        client, server = flow_addresses(flow)
        self._addresses = addresses or ((client, server) if is_client else (server, client))
        self._wants_ecn = ecn
        self._has_ecn = False
        self._has_window = has_window
        self.phase = Phase.CLOSED if is_client else Phase.LISTEN
        self.error: int | None = None
        "What ended the connection before its time (`errno`), if anything did."
        self.rtt = RttEstimator()
        self.sender = Sender(
            start=FIRST + 1,
            controller=make_controller(congestion),
            rtt=self.rtt,
            transmit=self._transmit,
            probe_window=self._probe_window,
        )
        self._receiver: Receiver | None = None
        self._early = bytearray()
        self._out: list[TcpPacket] = []
        self._echo_ms = 0
        self._syns = self._syn_timeouts = 0
        self._syn_sent_s = 0.0
        self._syn_at_s: float | None = None
        self._syn_rto_s = RTO_INITIAL_S
        self._has_reader = True
        self._expires_s: float | None = None

    @property
    def duplicates(self) -> int:
        """How many segments came that had been received before."""
        return self._receiver.duplicates if self._receiver else 0

    @property
    def unacknowledged(self) -> int:
        """How many written bytes the peer has not acknowledged."""
        board = self.sender.board
        return board.nxt - board.una + self.sender.unsent + len(self._early)

    @property
    def send_buffer(self) -> int:
        """How many written bytes the kernel takes before they are acknowledged."""
        grown = 2 * self.sender.controller.window.cwnd * MSS_BYTES
        return min(max(SEND_BUFFER_BYTES, grown), SEND_BUFFER_MAX_BYTES)

    @property
    def readable(self) -> int:
        """How many bytes wait to be read."""
        return self._receiver.readable if self._receiver else 0

    @property
    def is_read_over(self) -> bool:
        """Whether the peer's stream has come to its end; what is `readable` is the rest of it."""
        return self._receiver is not None and self._receiver.is_ended

    def connect(self, now: float) -> None:
        """Begin the handshake.

        Raises:
            TcpError: this end is a server, or has begun before.
        """
        if (self.phase, Arrival.OPEN) not in PHASES:
            raise TcpError(
                f"This end is in phase {self.phase.name} and cannot connect: only a client can, "
                "and only once; make a new one."
            )
        self.phase = PHASES[self.phase, Arrival.OPEN]
        self._send_syn(now)

    def write(self, data: bytes, now: float) -> None:
        """Send `data` in order behind what was written before.

        Raises:
            TcpError: this half of the connection has ended.
        """
        if self.phase in BEFORE_DATA and self.error is None:
            self._early += data
        elif self.phase in (Phase.ESTABLISHED, Phase.CLOSE_WAIT):
            self.sender.write(data, now)
        else:
            raise TcpError(
                f"This end is in phase {self.phase.name} and sends no more: write before it ends."
            )

    def read(self, limit: int | None = None) -> bytes:
        """Return what has arrived in order, `limit` bytes at most; an ACK may become due."""
        return self._receiver.read(limit) if self._receiver else b""

    def shutdown(self, now: float) -> None:
        """End this half behind what was written; the peer may go on."""
        if (self.phase, Arrival.CLOSE) not in PHASES:
            return
        self.phase = PHASES[self.phase, Arrival.CLOSE]
        if self.phase is Phase.CLOSED:
            self._stop()
        else:
            self.sender.end(now)

    def close(self, now: float) -> None:
        """Let the application go: nobody reads any more, and what was written is still sent.

        What has come unread, or comes later, is answered with a reset (`tcp_close`).
        """
        self._has_reader = False
        if self.readable:
            self.abort(now)
            return
        self.shutdown(now)
        if self.phase is Phase.FIN_WAIT_2:
            self._expires_s = now + WAIT_S

    def abort(self, now: float) -> None:
        """End the connection at once and tell the peer so with a reset."""
        if self.phase in SYNCHRONISED - {Phase.TIME_WAIT} or self.phase is Phase.SYN_RECEIVED:
            self._send(RST | ACK, seq=self.sender.board.nxt, now=now)
        self._end(None)

    def receive(self, packet: Packet, now: float) -> None:
        """Take a packet that has come out of the link.

        Raises:
            SegmentError: it is not a TCP segment.
        """
        board, receiver = self.sender.board, self._receiver
        segment = from_packet(
            packet,
            seq=receiver.next if receiver else FIRST,
            ack=board.una,
            now_ms=int(1000 * now),
        )
        if segment.flags & RST:
            self._take_reset(segment, now)
            return
        arrival = _arrival(segment)
        if (self.phase, arrival) not in PHASES:
            return
        before, self.phase = self.phase, PHASES[self.phase, arrival]
        if arrival is not Arrival.ACK:
            self._shake(segment, before, now)
            return
        assert receiver is not None
        if segment.seq <= receiver.last_ack_sent:
            self._echo_ms = max(self._echo_ms, segment.tsval_ms)
        if before is Phase.SYN_RECEIVED:
            self._establish(segment, now)
        if self._has_window and segment.ack >= board.una:
            self.sender.window_end = max(self.sender.window_end, segment.ack + segment.window)
        self.sender.on_ack(segment, now)
        if self.sender.is_end_acked:
            self._pass(Arrival.FIN_ACKED, now)
        if segment.payload or segment.flags & FIN:
            self._take_data(segment, packet.ecn, now)
        elif self._has_window and segment.seq == receiver.next - 1:
            self._send(ACK, seq=board.nxt, now=now)  # the peer asks for the window

    def packets_to_send(self, now: float) -> list[TcpPacket]:
        """Return what is to be put on the link, in order; due ACKs are made here."""
        if self._receiver and self._receiver.is_ack_due and self.phase in SYNCHRONISED:
            self._send(ACK, seq=self.sender.board.nxt, now=now)
        out, self._out = self._out, []
        return out

    def next_time(self) -> float | None:
        """Return when `handle_timer` is due, in seconds, or None."""
        times = (
            self._syn_at_s,
            self._expires_s,
            self.sender.next_time(),
            self._receiver.next_time() if self._receiver else None,
        )
        return min((time for time in times if time is not None), default=None)

    def handle_timer(self, now: float) -> None:
        """Do what is due by `now`."""
        if self._expires_s is not None and self._expires_s <= now:
            self._pass(Arrival.EXPIRED, now)
            return
        if self._syn_at_s is not None and self._syn_at_s <= now:
            retries = SYN_RETRIES + LINEAR_SYNS if self._is_client else SYN_ACK_RETRIES
            if self._syn_timeouts >= retries:
                self._end(errno.ETIMEDOUT)
                return
            self._syn_timeouts += 1
            if self._syns > LINEAR_SYNS or not self._is_client:
                self._syn_rto_s = min(2 * self._syn_rto_s, RTO_MAX_S)
            self._send_syn(now)
        self.sender.handle_timer(now)
        if self._receiver:
            self._receiver.handle_timer(now)
        if self.sender.has_given_up:
            self._end(errno.ETIMEDOUT)

    def _pass(self, arrival: Arrival, now: float) -> None:
        """Go on to the next phase if `arrival` means anything in this one."""
        if (self.phase, arrival) not in PHASES:
            return
        self.phase = PHASES[self.phase, arrival]
        if self.phase is Phase.TIME_WAIT or (
            self.phase is Phase.FIN_WAIT_2 and not self._has_reader
        ):
            self._expires_s = now + WAIT_S
        elif self.phase is Phase.CLOSED:
            self._stop()

    def _end(self, error: int | None) -> None:
        self.phase = PHASES[self.phase, Arrival.ABORT]
        self.error = error
        self._stop()

    def _stop(self) -> None:
        self._syn_at_s = self._expires_s = None
        self._early.clear()
        self.sender.stop()
        if self._receiver:
            self._receiver.stop()

    def _take_reset(self, segment: Segment, now: float) -> None:
        """End if the reset is genuine (RFC 5961 section 3); ask again if it may be."""
        if self.phase is Phase.SYN_SENT:
            if segment.flags & ACK and segment.ack == FIRST + 1:
                self._end(errno.ECONNREFUSED)
        elif self._receiver is not None and self.phase is not Phase.CLOSED:
            if segment.seq == self._receiver.next:
                self._end(RESET_ERRORS.get(self.phase, errno.ECONNRESET))
            elif segment.seq > self._receiver.next:
                self._send(ACK, seq=self.sender.board.nxt, now=now)

    def _take_data(self, segment: Segment, ecn: Ecn, now: float) -> None:
        receiver = self._receiver
        assert receiver is not None
        if not self._has_reader and segment.seq + len(segment.payload) > receiver.next:
            self.abort(now)
            return
        receiver.receive(segment, ecn, now)
        if receiver.is_ended:
            self._pass(Arrival.FIN, now)

    def _shake(self, segment: Segment, before: Phase, now: float) -> None:
        """Answer a SYN or a SYN-ACK."""
        self._echo_ms = max(self._echo_ms, segment.tsval_ms)
        if before in SYNCHRONISED:
            self._send(ACK, seq=self.sender.board.nxt, now=now)
            return
        if self._receiver is None:
            answer = ECE if self._is_client else ECE | CWR
            self._has_ecn = self._wants_ecn and segment.flags & (ECE | CWR) == answer
            self._receiver = Receiver(
                segment.end, self.rtt, has_ecn=self._has_ecn, has_window=self._has_window
            )
            if self._has_window:
                self.sender.window_end = FIRST + 1 + segment.window
        if self.phase is Phase.ESTABLISHED:
            self._send(ACK, seq=FIRST + 1, now=now)
            self._establish(segment, now)
        else:
            self._send_syn(now)

    def _establish(self, segment: Segment, now: float) -> None:
        self._syn_at_s = None
        rtt_s = now - self._syn_sent_s
        if self._syns > 1:
            rtt_s = max(now - segment.tsecr_ms / 1000, 0.001)
        board = self.sender.board
        self.rtt.sample(rtt_s, una=board.una, nxt=board.nxt)
        if self._syns > 2:
            self.sender.controller.window.cwnd = 1
        early, self._early = bytes(self._early), bytearray()
        if early:
            self.sender.write(early, now)

    def _send_syn(self, now: float) -> None:
        self._syns += 1
        self._syn_sent_s = now
        self._syn_at_s = now + self._syn_rto_s
        flags = SYN if self._is_client else SYN | ACK
        if self._is_client and self._wants_ecn:
            flags |= ECE | CWR
        elif self._has_ecn:
            flags |= ECE
        self._send(flags, seq=FIRST, now=now)

    def _transmit(self, segment: SentSegment, is_repeat: bool, now: float) -> None:
        flags = ACK
        if not self.sender.unsent or is_repeat:
            flags |= PSH
        if segment.has_fin:
            flags |= FIN
        is_capable = self._has_ecn and not is_repeat
        if is_capable and self.sender.recovery.owes_cwr:
            self.sender.recovery.owes_cwr = False
            flags |= CWR
        assert self._receiver is not None
        self._receiver.data_sent(now)
        ecn = Ecn.ECT_0 if is_capable else Ecn.NOT_ECT
        self._send(flags, seq=segment.start, now=now, payload=segment.data, ecn=ecn)

    def _probe_window(self, now: float) -> None:
        self._send(ACK, seq=self.sender.board.una - 1, now=now)

    def _send(
        self, flags: int, *, seq: int, now: float, payload: bytes = b"", ecn: Ecn = Ecn.NOT_ECT
    ) -> None:
        receiver = self._receiver
        is_plain = receiver is not None and not flags & (SYN | RST)
        if receiver is not None and is_plain and receiver.echoes:
            flags |= ECE
        segment = Segment(
            seq=seq,
            ack=receiver.next if receiver else 0,
            flags=flags,
            tsval_ms=int(1000 * now),
            tsecr_ms=self._echo_ms,
            sack=receiver.sack_blocks() if receiver and is_plain else (),
            payload=payload,
            window=receiver.window() if receiver else BUFFER_BYTES,
        )
        source, destination = self._addresses
        self._out.append(
            to_packet(segment, source=source, destination=destination, ecn=ecn, flow=self._flow)
        )
        if receiver is not None:
            receiver.ack_sent()


def _arrival(segment: Segment) -> Arrival:
    if segment.flags & SYN:
        return Arrival.SYN_ACK if segment.flags & ACK else Arrival.SYN
    return Arrival.ACK


def answer_to_stray(packet: TcpPacket) -> TcpPacket | None:
    """Return the reset for a segment that belongs to no connection (RFC 9293 section 3.5.2).

    A reset is not answered: then it is None.
    """
    segment = from_packet(packet, seq=0, ack=0, now_ms=0)
    if segment.flags & RST:
        return None
    if segment.flags & ACK:
        reset = Segment(segment.ack, 0, RST, 0, 0, window=0)
    else:
        reset = Segment(0, segment.end, RST | ACK, 0, 0, window=0)
    return to_packet(reset, source=packet.destination, destination=packet.source, flow=packet.flow)
