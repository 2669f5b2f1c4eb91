"""CUBIC as Linux runs it (RFC 9438, net/ipv4/tcp_cubic.c), with the classic HyStart it has on."""

from dataclasses import dataclass

from eloquent_netem.tcp.window import Window

BETA = 717 / 1024
"What is left of the window after a loss."

SCALE = 410 / 1024
"C of RFC 9438, in packets per cubic second."

FRIENDLY_PACKETS = (1024 + 717) / (3 * (1024 - 717))
"Windows' worth of ACKs per packet by which Reno's estimate grows, as (1 + b) / (3 (1 - b))."

UPDATE_S = 1 / 32
"With the window unchanged the curve is looked at this often."

HYSTART_LOW_WINDOW = 16
HYSTART_SAMPLES = 8
HYSTART_ACK_SPACING_S = 0.002
HYSTART_DELAY_MIN_S = 0.004
HYSTART_DELAY_MAX_S = 0.016
HYSTART_ACK_DELAY_S = 0.001


@dataclass(slots=True)
class _Round:
    """What HyStart sees in one round of slow start."""

    start_s: float = 0.0
    last_ack_s: float = 0.0
    end: int = 0
    rtt_s: float = float("inf")
    samples: int = 0


class Cubic:
    """A cubic curve through the window at which loss last struck; never slower than Reno."""

    def __init__(self) -> None:
        self.window = Window()
        self._min_rtt_s: float | None = None
        self._round = _Round()
        self._is_slow_start_over = False
        self._epoch_s: float | None = None
        self._last_max = 0
        self._forget()

    def reduced(self) -> int:
        """See `Controller.reduced`."""
        cwnd = self.window.cwnd
        self._epoch_s = None
        # Fast convergence: a flow that shrinks gives up more than it must.
        self._last_max = int(cwnd * (1 + BETA) / 2) if cwnd < self._last_max else cwnd
        return max(int(cwnd * BETA), 2)

    def on_ack(self, now: float, acked: int) -> None:
        """See `Controller.on_ack`."""
        window = self.window
        if not window.may_grow:
            return
        if window.in_slow_start:
            acked = window.slow_start(acked)
        if acked:
            self._update(now, window.cwnd, acked)
            window.grow(self._packets_per_step, acked)

    def on_rtt(self, now: float, rtt_s: float, *, una: int, nxt: int) -> None:
        """See `Controller.on_rtt`."""
        if self._epoch_s is not None and now - self._epoch_s < 1:
            return  # right after recovery samples are not trusted
        if self._min_rtt_s is None or rtt_s < self._min_rtt_s:
            self._min_rtt_s = rtt_s
        if not self._is_slow_start_over and self.window.in_slow_start:
            self._watch_slow_start(now, rtt_s, self._min_rtt_s, una, nxt)

    def on_timeout(self, now: float, nxt: int) -> None:
        """See `Controller.on_timeout`."""
        self._forget()
        self._min_rtt_s = None
        self._is_slow_start_over = False
        self._round = _Round(now, now, nxt)

    def on_resume(self, now: float, idle_s: float) -> None:
        """See `Controller.on_resume`."""
        if self._epoch_s is not None and idle_s > 0:
            self._epoch_s = min(self._epoch_s + idle_s, now)

    def _forget(self) -> None:
        self._epoch_s = None
        self._last_max = 0
        self._last_cwnd = 0
        self._last_s = float("-inf")
        self._origin = 0
        self._inflection_s = 0.0
        self._acked = 0
        self._reno_cwnd = 0
        self._packets_per_step = 0

    def _update(self, now: float, cwnd: int, acked: int) -> None:
        """Set how many ACKs raise the window by one (`bictcp_update`)."""
        self._acked += acked
        if self._last_cwnd == cwnd and now - self._last_s <= UPDATE_S:
            return
        self._last_cwnd = cwnd
        self._last_s = now
        if self._epoch_s is None:
            self._epoch_s = now
            self._acked = acked
            self._reno_cwnd = cwnd
            missing = max(0, self._last_max - cwnd)
            self._inflection_s = (missing / SCALE) ** (1 / 3)
            self._origin = max(self._last_max, cwnd)
        ahead_s = now - self._epoch_s + (self._min_rtt_s or 0.0) - self._inflection_s
        target = self._origin + int(SCALE * ahead_s**3)
        self._packets_per_step = cwnd // (target - cwnd) if target > cwnd else 100 * cwnd
        if self._last_max == 0:
            self._packets_per_step = min(self._packets_per_step, 20)
        self._keep_up_with_reno(cwnd)
        self._packets_per_step = max(self._packets_per_step, 2)

    def _keep_up_with_reno(self, cwnd: int) -> None:
        step = max(1, int(cwnd * FRIENDLY_PACKETS))
        steps = max(0, (self._acked - 1) // step)
        self._acked -= steps * step
        self._reno_cwnd += steps
        if self._reno_cwnd > cwnd:
            self._packets_per_step = min(self._packets_per_step, cwnd // (self._reno_cwnd - cwnd))

    def _watch_slow_start(
        self, now: float, rtt_s: float, min_rtt_s: float, una: int, nxt: int
    ) -> None:
        """End slow start when ACK trains grow long or round trips rise (`hystart_update`)."""
        if una > self._round.end:
            self._round = _Round(now, now, nxt)
        if self.window.cwnd < HYSTART_LOW_WINDOW:
            return
        this = self._round
        if now - this.last_ack_s <= HYSTART_ACK_SPACING_S:
            this.last_ack_s = now
            if now - this.start_s > (min_rtt_s + HYSTART_ACK_DELAY_S) / 2:
                self._end_slow_start()
        this.rtt_s = min(this.rtt_s, rtt_s)
        if this.samples < HYSTART_SAMPLES:
            this.samples += 1
        elif this.rtt_s > min_rtt_s + min(
            max(min_rtt_s / 8, HYSTART_DELAY_MIN_S), HYSTART_DELAY_MAX_S
        ):
            self._end_slow_start()

    def _end_slow_start(self) -> None:
        self._is_slow_start_over = True
        self.window.ssthresh = self.window.cwnd
