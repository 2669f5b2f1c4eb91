"""What the window-based flows of cross traffic share: a sender, and what it takes for lost."""

import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from eloquent_netem.packet import Ecn, Packet

Send = Callable[[float, Packet], None]
"Puts a packet into the link at a time, in seconds; `Link.send` is one."

PACKET_BYTES = 1500
INITIAL_WINDOW_PACKETS = 10.0
"RFC 6928."
LOST_AFTER_DELIVERIES = 3
"RFC 5681: so many later packets delivered mean that a packet is lost."
MIN_TIMEOUT_S = 0.2
"As in Linux; RFC 6298 says 1 s."
MAX_TIMEOUT_S = 60.0


@dataclass(slots=True)
class _Sent:
    """A packet under way."""

    at_s: float
    later_deliveries: int = 0
    has_arrived: bool = False
    "It came out of the link; its acknowledgement is on the way back."


class WindowedFlow(ABC):
    """What the window-based flows share: sending, acknowledgements, and finding what is lost.

    A packet is lost when `LOST_AFTER_DELIVERIES` packets sent later have been acknowledged, or
    when nothing has been for a timeout (RFC 6298). The kinds of flow say how the window, in
    packets, answers: `_on_ack`, `_on_mark`, `_on_loss`, `_on_timeout`. Reductions come once a
    round trip at most, for packets that were sent after the last one.

    `forward_s` is the link's own delay; what is left of `base_rtt_s` is the way back.
    """

    ecn = Ecn.NOT_ECT
    pacing_gain: float | None = None
    "Packets leave evenly at this multiple of window / round-trip time; None: at once."
    min_window = 1.0

    def __init__(
        self,
        flow: int,
        send: Send,
        base_rtt_s: float,
        rng: random.Random,
        *,
        forward_s: float | None = None,
        start_s: float = 0.0,
        packet_bytes: int = PACKET_BYTES,
    ) -> None:
        if base_rtt_s <= 0:
            raise ValueError(f"a base round-trip time is above 0 s, not {base_rtt_s}")
        self._flow = flow
        self._send = send
        self._rng = rng
        self._packet_bytes = packet_bytes
        self._back_s = base_rtt_s / 2 if forward_s is None else max(base_rtt_s - forward_s, 0.0)
        self._to_send = inf  # packets; a bulk flow has no end
        self._send_from_s = start_s
        self._window = INITIAL_WINDOW_PACKETS
        self._threshold = inf
        self._in_flight: dict[int, _Sent] = {}  # by sequence number, rising
        # When it is back, of which packet, and whether that was marked; in order of time.
        self._acks: deque[tuple[float, int, bool]] = deque()
        self._sequence = 0
        self._recovery_from = 0
        self._srtt_s = base_rtt_s
        self._rttvar_s = base_rtt_s / 2
        self._has_rtt = False
        self._backoff = 1
        self._timeout_at_s = inf
        self._delivered_bytes = 0
        self._lost = 0

    @property
    def flow(self) -> int:
        """See `cross.CrossFlow.flow`."""
        return self._flow

    @property
    def delivered_bytes(self) -> int:
        """See `cross.CrossFlow.delivered_bytes`."""
        return self._delivered_bytes

    @property
    def packets_lost(self) -> int:
        """How many packets the flow has taken for lost."""
        return self._lost

    @property
    def window(self) -> float:
        """How many packets may be under way."""
        return self._window

    @property
    def rtt_s(self) -> float:
        """The smoothed round-trip time in seconds."""
        return self._srtt_s

    def next_time(self) -> float | None:
        """See `cross.CrossFlow.next_time`."""
        time = self._acks[0][0] if self._acks else inf
        time = min(time, self._timeout_at_s)
        if self._may_send():
            time = min(time, self._send_from_s)
        return None if time == inf else time

    def act(self, now: float) -> None:
        """See `cross.CrossFlow.act`."""
        while self._acks and self._acks[0][0] <= now:
            _, sequence, is_marked = self._acks.popleft()
            if sequence in self._in_flight:
                self._acknowledge(now, sequence, is_marked)
        if self._timeout_at_s <= now:
            self._time_out(now)
        while self._may_send() and self._send_from_s <= now:
            self._send_one(now)

    def on_delivered(self, now: float, packet: Packet) -> None:
        """See `cross.CrossFlow.on_delivered`."""
        if packet.flow != self._flow:
            return
        sequence = int.from_bytes(packet.data, "big")
        sent = self._in_flight.get(sequence)
        if sent is not None and not sent.has_arrived:  # neither a copy nor given up
            sent.has_arrived = True
            self._delivered_bytes += packet.size
            self._acks.append((now + self._back_s, sequence, packet.ecn is Ecn.CE))

    def _may_send(self) -> bool:
        return self._to_send > 0 and len(self._in_flight) < max(int(self._window), 1)

    def _send_one(self, now: float) -> None:
        sequence = self._sequence
        self._sequence += 1
        self._to_send -= 1
        if not self._in_flight:
            self._timeout_at_s = now + self._timeout_s()
        self._in_flight[sequence] = _Sent(now)
        if self.pacing_gain is not None:
            gain = 2.0 if self._is_in_slow_start() else self.pacing_gain
            gap_s = self._srtt_s / (self._window * gain)
            # Late by up to a gap, as routers are, it keeps its rate.
            self._send_from_s = max(self._send_from_s + gap_s, now)
        data = sequence.to_bytes(8, "big")
        self._send(now, Packet(data, self._packet_bytes, self.ecn, self._flow))

    def _is_in_slow_start(self) -> bool:
        return self._window < self._threshold

    def _timeout_s(self) -> float:
        usual_s = max(self._srtt_s + 4 * self._rttvar_s, MIN_TIMEOUT_S)
        return min(usual_s * self._backoff, MAX_TIMEOUT_S)

    def _acknowledge(self, now: float, sequence: int, is_marked: bool) -> None:
        self._measure(now - self._in_flight.pop(sequence).at_s)
        self._backoff = 1
        self._timeout_at_s = now + self._timeout_s() if self._in_flight else inf
        if is_marked and sequence >= self._recovery_from:
            self._recovery_from = self._sequence
            self._on_mark(now)
        self._on_ack(now, sequence, is_marked)
        self._find_losses(now, sequence)

    def _measure(self, rtt_s: float) -> None:
        """Smooth the round-trip time (RFC 6298)."""
        if self._has_rtt:
            self._rttvar_s += (abs(self._srtt_s - rtt_s) - self._rttvar_s) / 4
            self._srtt_s += (rtt_s - self._srtt_s) / 8
        else:
            self._srtt_s, self._rttvar_s, self._has_rtt = rtt_s, rtt_s / 2, True

    def _find_losses(self, now: float, delivered: int) -> None:
        lost = []
        for sequence, sent in self._in_flight.items():
            if sequence > delivered:
                break
            sent.later_deliveries += 1
            if sent.later_deliveries >= LOST_AFTER_DELIVERIES:
                lost.append(sequence)
        for sequence in lost:
            self._lose(sequence)
            if sequence >= self._recovery_from:
                self._recovery_from = self._sequence
                self._on_loss(now)

    def _lose(self, sequence: int) -> None:
        del self._in_flight[sequence]
        self._lost += 1
        self._to_send += 1

    def _time_out(self, now: float) -> None:
        for sequence in list(self._in_flight):
            self._lose(sequence)
        self._recovery_from = self._sequence
        self._timeout_at_s = inf
        self._backoff *= 2
        self._on_timeout(now)

    @abstractmethod
    def _on_ack(self, now: float, sequence: int, is_marked: bool) -> None:
        """Open the window for a packet that arrived."""

    @abstractmethod
    def _on_mark(self, now: float) -> None:
        """Answer a mark, once a round trip."""

    @abstractmethod
    def _on_loss(self, now: float) -> None:
        """Answer a loss, once a round trip."""

    def _on_timeout(self, now: float) -> None:
        self._threshold = max(self._window / 2, 2.0)
        self._window = self.min_window
