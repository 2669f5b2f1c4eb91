"""One end of a TCP connection, without I/O: the handshake, and the two halves put together.

The handshake is modelled, its losses and timers included. Not modelled: closing (a connection
ends with its owner), the receiver's window (the application reads in time), giving up, PAWS and
offloads. The sources named in the modules are those of Linux 6.x.
"""

from enum import Enum, auto

from eloquent_netem.packet import SUBJECT, Ecn, Packet
from eloquent_netem.tcp.congestion import make_controller
from eloquent_netem.tcp.errors import TcpError
from eloquent_netem.tcp.receiver import Receiver
from eloquent_netem.tcp.rtt import RTO_INITIAL_S, RTO_MAX_S, RttEstimator
from eloquent_netem.tcp.scoreboard import SentSegment
from eloquent_netem.tcp.segment import ACK, CWR, ECE, PSH, SYN, Segment, from_packet, to_packet
from eloquent_netem.tcp.sender import Sender


class Phase(Enum):
    """How far the handshake is (RFC 9293 section 3.3.2)."""

    CLOSED = auto()
    LISTEN = auto()
    SYN_SENT = auto()
    SYN_RECEIVED = auto()
    ESTABLISHED = auto()


class Arrival(Enum):
    """What comes in, as far as the handshake cares."""

    OPEN = auto()
    "The application calls `connect`."
    SYN = auto()
    SYN_ACK = auto()
    ACK = auto()


PHASES: dict[tuple[Phase, Arrival], Phase] = {
    (Phase.CLOSED, Arrival.OPEN): Phase.SYN_SENT,
    (Phase.LISTEN, Arrival.SYN): Phase.SYN_RECEIVED,
    (Phase.SYN_RECEIVED, Arrival.SYN): Phase.SYN_RECEIVED,
    (Phase.SYN_RECEIVED, Arrival.ACK): Phase.ESTABLISHED,
    (Phase.SYN_SENT, Arrival.SYN_ACK): Phase.ESTABLISHED,
    (Phase.ESTABLISHED, Arrival.SYN_ACK): Phase.ESTABLISHED,
    (Phase.ESTABLISHED, Arrival.SYN): Phase.ESTABLISHED,
    (Phase.ESTABLISHED, Arrival.ACK): Phase.ESTABLISHED,
}
"What is not in the table is dropped in silence."

LINEAR_SYNS = 4
"A client's first SYNs are repeated every second; then it waits twice as long each time."

FIRST = 0
"Both ends' initial sequence number."


class TcpConnection:
    """One end; the clock is an argument, packets come out of `packets_to_send`.

    A client calls `connect`; a server listens from the start. Data may be written before the
    handshake is over; it waits. `congestion` is "cubic" or "reno"; with `ecn` the two ends
    negotiate classic ECN (RFC 3168). TCP_NODELAY is on.
    """

    def __init__(
        self, *, is_client: bool, congestion: str = "cubic", ecn: bool = False, flow: int = SUBJECT
    ) -> None:
        self._is_client = is_client
        self._flow = flow
        self._wants_ecn = ecn
        self._has_ecn = False
        self.phase = Phase.CLOSED if is_client else Phase.LISTEN
        self.rtt = RttEstimator()
        self.sender = Sender(
            start=FIRST + 1,
            controller=make_controller(congestion),
            rtt=self.rtt,
            transmit=self._transmit,
        )
        self._receiver: Receiver | None = None
        self._early = bytearray()
        self._out: list[Packet] = []
        self._echo_ms = 0
        self._syns = 0
        self._syn_sent_s = 0.0
        self._syn_at_s: float | None = None
        self._syn_rto_s = RTO_INITIAL_S

    @property
    def duplicates(self) -> int:
        """How many segments came that had been received before."""
        return self._receiver.duplicates if self._receiver else 0

    @property
    def unacknowledged(self) -> int:
        """How many written bytes the peer has not acknowledged."""
        board = self.sender.board
        return board.nxt - board.una + self.sender.unsent + len(self._early)

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
        """Send `data` in order behind what was written before."""
        if self.phase is Phase.ESTABLISHED:
            self.sender.write(data, now)
        else:
            self._early += data

    def read(self) -> bytes:
        """Return what has arrived in order; an ACK may become due with it."""
        return self._receiver.read() if self._receiver else b""

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
        self.sender.on_ack(segment, now)
        if segment.payload:
            receiver.receive(segment, packet.ecn, now)

    def packets_to_send(self, now: float) -> list[Packet]:
        """Return what is to be put on the link, in order; due ACKs are made here."""
        if self._receiver and self._receiver.is_ack_due and self.phase is Phase.ESTABLISHED:
            self._send(ACK, seq=self.sender.board.nxt, now=now)
        out, self._out = self._out, []
        return out

    def next_time(self) -> float | None:
        """Return when `handle_timer` is due, in seconds, or None."""
        times = (
            self._syn_at_s,
            self.sender.next_time(),
            self._receiver.next_time() if self._receiver else None,
        )
        return min((time for time in times if time is not None), default=None)

    def handle_timer(self, now: float) -> None:
        """Do what is due by `now`."""
        if self._syn_at_s is not None and self._syn_at_s <= now:
            if self._syns > LINEAR_SYNS or not self._is_client:
                self._syn_rto_s = min(2 * self._syn_rto_s, RTO_MAX_S)
            self._send_syn(now)
        self.sender.handle_timer(now)
        if self._receiver:
            self._receiver.handle_timer(now)

    def _shake(self, segment: Segment, before: Phase, now: float) -> None:
        """Answer a SYN or a SYN-ACK."""
        self._echo_ms = max(self._echo_ms, segment.tsval_ms)
        if before is Phase.ESTABLISHED:
            self._send(ACK, seq=self.sender.board.nxt, now=now)
            return
        if self._receiver is None:
            answer = ECE if self._is_client else ECE | CWR
            self._has_ecn = self._wants_ecn and segment.flags & (ECE | CWR) == answer
            self._receiver = Receiver(segment.end, self.rtt, has_ecn=self._has_ecn)
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
        is_capable = self._has_ecn and not is_repeat
        if is_capable and self.sender.recovery.owes_cwr:
            self.sender.recovery.owes_cwr = False
            flags |= CWR
        assert self._receiver is not None
        self._receiver.data_sent(now)
        ecn = Ecn.ECT_0 if is_capable else Ecn.NOT_ECT
        self._send(flags, seq=segment.start, now=now, payload=segment.data, ecn=ecn)

    def _send(
        self, flags: int, *, seq: int, now: float, payload: bytes = b"", ecn: Ecn = Ecn.NOT_ECT
    ) -> None:
        receiver = self._receiver
        is_plain = receiver is not None and not flags & SYN
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
        )
        self._out.append(to_packet(segment, from_client=self._is_client, ecn=ecn, flow=self._flow))
        if receiver is not None:
            receiver.ack_sent()


def _arrival(segment: Segment) -> Arrival:
    if segment.flags & SYN:
        return Arrival.SYN_ACK if segment.flags & ACK else Arrival.SYN
    return Arrival.ACK
