"""Cross traffic: flows that exist only inside the emulated network, to load its bottleneck.

A flow is an actor (`next_time`, `act`) that puts packets into one direction of the path and is
told what came out (`on_delivered`). Its receiver and its way back are not emulated: an
acknowledgement of each packet returns, without loss, when the rest of the base round-trip time
is over. So the same flows work in the simulator and in the routers, without sockets.

They are load, not the system under test. A flow that has something to send always fills its
window; a packet that is lost is made good for by another, not sent again in its place.
"""

import random
from abc import abstractmethod
from math import ceil, inf
from typing import Protocol

from eloquent_netem.cross_windowed import (
    INITIAL_WINDOW_PACKETS,
    PACKET_BYTES,
    Send,
    WindowedFlow,
)
from eloquent_netem.packet import Ecn, Packet


class CrossFlow(Protocol):
    """A flow of cross traffic; times are in seconds and never go back."""

    @property
    def flow(self) -> int:
        """The number that its packets carry in `Packet.flow`."""

    @property
    def delivered_bytes(self) -> int:
        """How much has come out of the link, headers included, copies not."""

    def next_time(self) -> float | None:
        """Return when it wants to act next, or None: not before something is delivered."""

    def act(self, now: float) -> None:
        """Do what is due at `now`: take acknowledgements, send."""

    def on_delivered(self, now: float, packet: Packet) -> None:
        """See a packet of any flow that came out of a link at `now`; it heeds its own."""


class PragueFlow(WindowedFlow):
    """A bulk flow with a scalable response, in ECT(1) (RFC 9331), after TCP Prague.

    Once a round, with the share F of the acknowledged packets that were marked,
    a += (F - a) / 16. A mark takes window * a / 2, a loss half the window. In between, the window
    grows by one packet in a round trip, but slower on short paths, as if the round trip took
    25 ms, so that they do not starve longer ones. The first mark ends slow start; up to it, a is 1.
    """

    ecn = Ecn.ECT_1
    pacing_gain = 1.0
    min_window = 2.0
    ALPHA_GAIN = 1 / 16
    VIRTUAL_RTT_S = 0.025

    _alpha = 1.0
    _has_seen_marks = False
    _round_ends = 0
    _round_acks = 0
    _round_marks = 0

    def _on_ack(self, now: float, sequence: int, is_marked: bool) -> None:
        if self._has_seen_marks:
            self._count(sequence, is_marked)
        if is_marked:
            return
        if self._is_in_slow_start():
            self._window += 1
        else:
            slowness = self._srtt_s / max(self._srtt_s, self.VIRTUAL_RTT_S)
            self._window += slowness**2 / self._window

    def _count(self, sequence: int, is_marked: bool) -> None:
        """Count an acknowledgement, and adapt alpha at the end of a round."""
        self._round_acks += 1
        self._round_marks += is_marked
        if sequence >= self._round_ends:
            share = self._round_marks / self._round_acks
            self._alpha += (share - self._alpha) * self.ALPHA_GAIN
            self._round_ends = self._sequence
            self._round_acks = self._round_marks = 0

    def _on_mark(self, now: float) -> None:
        if not self._has_seen_marks:
            self._has_seen_marks = True
            self._round_ends = self._sequence
        self._reduce(self._alpha / 2)

    def _on_loss(self, now: float) -> None:
        self._reduce(1 / 2)

    def _reduce(self, share: float) -> None:
        self._window = max(self._window * (1 - share), self.min_window)
        self._threshold = self._window


class CubicFlow(WindowedFlow):
    """A bulk flow under CUBIC (RFC 9438), without HyStart, in Not-ECT."""

    C = 0.4
    "RFC 9438 section 5.1, in packets / s^3."
    BETA = 0.7
    "What is left of the window (section 4.6)."
    RENO_GAIN = 3 * (1 - BETA) / (1 + BETA)
    "Packets per round trip that give Reno's throughput with this BETA (section 4.3)."

    _w_max = 0.0
    _window_before = 0.0
    _reno_window = 0.0
    _k_s = 0.0
    _epoch_s: float | None = None

    def _on_ack(self, now: float, sequence: int, is_marked: bool) -> None:
        if self._is_in_slow_start():
            self._window += 1
        elif sequence >= self._recovery_from:
            self._avoid_congestion(now)

    def _avoid_congestion(self, now: float) -> None:
        """Open the window along the cubic (sections 4.2 to 4.5)."""
        if self._epoch_s is None:
            self._epoch_s = now
            self._reno_window = self._window
            self._w_max = max(self._w_max, self._window)
            self._k_s = ((self._w_max - self._window) / self.C) ** (1 / 3)
        since_s = now - self._epoch_s
        gain = 1.0 if self._reno_window >= self._window_before else self.RENO_GAIN
        self._reno_window += gain / self._window
        if self._cubic(since_s) < self._reno_window:
            self._window = max(self._window, self._reno_window)
        else:
            target = self._cubic(since_s + self._srtt_s)
            target = min(max(target, self._window), 1.5 * self._window)
            self._window += (target - self._window) / self._window

    def _cubic(self, since_s: float) -> float:
        return self.C * (since_s - self._k_s) ** 3 + self._w_max

    def _on_mark(self, now: float) -> None:
        self._on_loss(now)

    def _on_loss(self, now: float) -> None:
        self._remember()
        self._window = self._threshold = max(self._window * self.BETA, 2.0)

    def _on_timeout(self, now: float) -> None:
        self._remember()
        self._threshold = max(self._window * self.BETA, 2.0)
        self._window = self.min_window

    def _remember(self) -> None:
        """Note where the window was, lower if it had not come back up (section 4.7)."""
        is_short = self._window < self._w_max
        self._w_max = self._window * (1 + self.BETA) / 2 if is_short else self._window
        self._window_before = self._window
        self._epoch_s = None


class CubicEcnFlow(CubicFlow):
    """CUBIC in ECT(0): a mark counts as a loss (RFC 3168)."""

    ecn = Ecn.ECT_0


class Transfers(WindowedFlow):
    """Transfers one after another, each on a new connection, with pauses between.

    Sizes are Pareto-distributed between 30 kB and 20 MB with shape 1.2, heavy-tailed as Crovella
    and Bestavros (1997) found those of web files; their mean is 131 kB. Pauses are exponential
    with a mean of 1 s, the first one too. With `every_s`, transfers begin at multiples of this
    after `start_s` instead: those of several such flows at the same instants.
    """

    SHAPE = 1.2
    LEAST_BYTES = 30_000
    MOST_BYTES = 20_000_000
    MEAN_PAUSE_S = 1.0

    _transfers = 0
    _is_pausing = False

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
        every_s: float | None = None,
    ) -> None:
        super().__init__(
            flow,
            send,
            base_rtt_s,
            rng,
            forward_s=forward_s,
            start_s=start_s,
            packet_bytes=packet_bytes,
        )
        self._start_s = start_s
        self._every_s = every_s

    @property
    def transfers(self) -> int:
        """How many transfers have begun."""
        return self._transfers

    def next_time(self) -> float | None:
        """See `CrossFlow.next_time`."""
        return self._send_from_s if not self._transfers or self._is_pausing else super().next_time()

    def act(self, now: float) -> None:
        """See `CrossFlow.act`."""
        if not self._transfers and not self._is_pausing:
            self._pause(max(now, self._send_from_s))
        if self._is_pausing and self._send_from_s <= now:
            self._begin()
        super().act(now)
        if not self._is_pausing and not self._to_send and not self._in_flight:
            self._pause(now)

    def _pause(self, now: float) -> None:
        self._to_send = 0
        self._is_pausing = True
        if self._every_s is None:
            self._send_from_s = now + self._rng.expovariate(1 / self.MEAN_PAUSE_S)
        else:
            passed = (now - self._start_s) // self._every_s
            self._send_from_s = self._start_s + (passed + 1) * self._every_s

    def _begin(self) -> None:
        """Draw a size, and forget what the last connection has learnt."""
        self._is_pausing = False
        self._transfers += 1
        size = self.LEAST_BYTES * self._rng.paretovariate(self.SHAPE)
        self._to_send = ceil(min(size, self.MOST_BYTES) / self._packet_bytes)
        self._window, self._threshold = INITIAL_WINDOW_PACKETS, inf
        self._has_rtt = False
        self._backoff = 1
        self._forget()

    @abstractmethod
    def _forget(self) -> None:
        """Forget what the congestion control has learnt, beside the window."""


class WebFlows(Transfers, CubicFlow):
    """Transfers under CUBIC, in Not-ECT."""

    def _forget(self) -> None:
        self._w_max = self._window_before = 0.0
        self._epoch_s = None


class PragueWebFlows(Transfers, PragueFlow):
    """Transfers under a scalable response, in ECT(1)."""

    def _forget(self) -> None:
        self._alpha = 1.0
        self._has_seen_marks = False


class UnresponsiveBursts:
    """ECT(1) packets at a constant rate in bursts, whatever is marked or lost.

    Bursts and the pauses between them have exponential lengths with the given means; it begins
    with a pause. `base_rtt_s` is taken for the sake of a common interface, and not used.
    """

    def __init__(
        self,
        flow: int,
        send: Send,
        base_rtt_s: float,
        rng: random.Random,
        *,
        bits_per_s: float = 10e6,
        mean_burst_s: float = 0.1,
        mean_pause_s: float = 1.0,
        start_s: float = 0.0,
        packet_bytes: int = PACKET_BYTES,
    ) -> None:
        if min(bits_per_s, mean_burst_s, mean_pause_s) <= 0:
            raise ValueError(
                "bursts need a rate, a mean length and a mean pause above 0, not "
                f"{bits_per_s} bit/s, {mean_burst_s} s and {mean_pause_s} s"
            )
        self._flow = flow
        self._send = send
        self._rng = rng
        self._gap_s = packet_bytes * 8 / bits_per_s
        self._mean_burst_s = mean_burst_s
        self._mean_pause_s = mean_pause_s
        self._packet_bytes = packet_bytes
        self._delivered_bytes = 0
        self._next_s = start_s
        self._until_s = start_s
        "When the burst ends that the next packet belongs to."
        self._pause()

    @property
    def flow(self) -> int:
        """See `CrossFlow.flow`."""
        return self._flow

    @property
    def delivered_bytes(self) -> int:
        """See `CrossFlow.delivered_bytes`; here, copies count."""
        return self._delivered_bytes

    def next_time(self) -> float | None:
        """See `CrossFlow.next_time`."""
        return self._next_s

    def act(self, now: float) -> None:
        """See `CrossFlow.act`."""
        while self._next_s <= now:
            self._send(now, Packet(b"", self._packet_bytes, Ecn.ECT_1, self._flow))
            self._next_s += self._gap_s
            if self._next_s >= self._until_s:
                self._pause()

    def on_delivered(self, now: float, packet: Packet) -> None:
        """See `CrossFlow.on_delivered`."""
        if packet.flow == self._flow:
            self._delivered_bytes += packet.size

    def _pause(self) -> None:
        self._next_s = self._until_s + self._rng.expovariate(1 / self._mean_pause_s)
        self._until_s = self._next_s + self._rng.expovariate(1 / self._mean_burst_s)
