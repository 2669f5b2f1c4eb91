"""The sending half: what to send when, and what an ACK means for it.

Unsent writes wait in one buffer and leave in full segments, as in Linux even with TCP_NODELAY:
only what the window lets out at once leaves in small ones. Sources: `tcp_write_xmit`,
`tcp_schedule_loss_probe` and `tcp_xmit_retransmit_queue` in net/ipv4/tcp_output.c, `tcp_ack` in
net/ipv4/tcp_input.c, net/ipv4/tcp_timer.c.
"""

from collections.abc import Callable
from enum import Enum, auto

from eloquent_netem.tcp.congestion import Controller
from eloquent_netem.tcp.news import AckNews, Repeat
from eloquent_netem.tcp.recovery import Recovery, State
from eloquent_netem.tcp.rtt import RTO_INITIAL_S, RTO_MAX_S, RTO_MIN_S, RttEstimator
from eloquent_netem.tcp.scoreboard import (
    REORDERING_PACKETS,
    Rack,
    Scoreboard,
    SentSegment,
)
from eloquent_netem.tcp.segment import ECE, MSS_BYTES, Segment

TIMER_MARGIN_S = 0.002
"Linux adds two ticks to the timers of RACK and of the tail loss probe."

TIMER_MIN_S = 1e-6

GIVE_UP_S = 924.6
"""How long timeouts strike in a row before the connection is given up: what 15 (`tcp_retries2`)
take from the least timeout on, doubled up to the greatest (`tcp_model_timeout`)."""

WINDOW_PROBES_MAX = 15
"Unanswered probes of a closed window (`tcp_retries2`)."


class Timer(Enum):
    """What the one retransmission timer is set for."""

    TIMEOUT = auto()
    PROBE = auto()
    "A tail loss probe (RFC 8985 section 7)."
    REORDER = auto()
    "RACK: a segment that is late becomes a lost one."
    WINDOW = auto()
    "The receiver's window is closed: a probe asks whether it still is (RFC 9293 section 3.8.6.1)."


class Sender:
    """Sends a byte stream; `transmit(segment, is_repeat, now)` puts a segment on the wire.

    `probe_window(now)` sends what makes the receiver tell its window.
    """

    def __init__(
        self,
        *,
        start: int,
        controller: Controller,
        rtt: RttEstimator,
        transmit: Callable[[SentSegment, bool, float], None],
        probe_window: Callable[[float], None],
        mss: int = MSS_BYTES,
    ) -> None:
        self.board = Scoreboard(start)
        self.rack = Rack(self.board, rtt, mss)
        self.recovery = Recovery(self.board, self.rack, controller)
        self.controller = controller
        self.retransmissions = self.timeouts = self.probes = 0
        "How many so far; probes with new data count as probes, not as retransmissions."
        self.window_end: float = float("inf")
        "The sequence number before which the receiver can take data."
        self.has_given_up = False
        "The receiver has not answered for as long as is waited."
        self._rtt = rtt
        self._transmit = transmit
        self._probe_window = probe_window
        self._mss = mss
        self._unsent = bytearray()
        self._sent_at_s = float("-inf")
        self._timer: tuple[Timer, float] | None = None
        self._sack_times: list[float] = []
        self._is_ending = self._has_sent_fin = False
        self._silent_from_s = 0.0
        self._window_probes = 0
        self._window_wait_s = RTO_INITIAL_S

    @property
    def is_end_acked(self) -> bool:
        """Whether the receiver has everything, the end of the stream included."""
        return self._has_sent_fin and not self.board.packets_out

    @property
    def unsent(self) -> int:
        """How many bytes wait to be sent for the first time."""
        return len(self._unsent)

    @property
    def timer(self) -> Timer | None:
        """What `next_time` is for."""
        return self._timer[0] if self._timer else None

    def next_time(self) -> float | None:
        """Return when `handle_timer` is due, in seconds, or None."""
        return self._timer[1] if self._timer else None

    def write(self, data: bytes, now: float) -> None:
        """Send `data` as soon as the window allows."""
        if not self.board.packets_out and not self._unsent:
            self.controller.window.restart(now, idle_s=now - self._sent_at_s, rto_s=self._rtt.rto_s)
        self._unsent += data
        self.push(now)

    def end(self, now: float) -> None:
        """End the stream behind what was written."""
        self._is_ending = True
        self.push(now)

    def stop(self) -> None:
        """Send no more."""
        self._timer = None
        self._unsent.clear()

    def push(self, now: float) -> None:
        """Send for the first time what the windows allow."""
        sent = 0
        while self._has_new and self._room > 0 and self._is_window_open:
            self._send_new(now)
            sent += 1
        self._after_push(now, sent)
        if sent:
            self._schedule_probe(now)
        elif self._timer is None and self._has_new and not self.board.packets_out:
            self._window_wait_s = self._rtt.rto_s
            self._set(Timer.WINDOW, self._window_wait_s, now)

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        if self._timer is None or self._timer[1] > now:
            return
        kind = self._timer[0]
        if kind is Timer.WINDOW:
            self._on_window_timer(now)
        elif not self.board.packets_out:
            self._timer = None
            if self._has_new:
                self.push(now)
        elif kind is Timer.REORDER:
            self._on_reorder_timer(now)
        elif kind is Timer.PROBE:
            self._send_probe(now)
        else:
            self._on_timeout(now)

    def on_ack(self, segment: Segment, now: float) -> None:
        """Take the acknowledgement that a segment carries."""
        board = self.board
        if segment.ack > board.nxt:
            return
        self._window_probes = 0
        if self.timer is Timer.WINDOW and self._is_window_open:
            self._timer = None
        una, losses, delivered = board.una, board.losses, board.delivered
        news = AckNews(
            una,
            has_data=bool(segment.payload),
            has_echo=bool(segment.flags & ECE),
            advances=segment.ack > una,
            echo_ms=segment.tsecr_ms,
        )
        had_packets, is_old, fack = board.packets_out > 0, segment.ack < una, board.fack
        if news.advances:
            self.recovery.timeouts = 0
        arrived = self._take_sacks(segment, news, now)
        if not is_old:
            self._take_ack(segment, news, fack, arrived, now)
            if had_packets:
                self.rack.adapt(max(arrived)[1] if arrived else None)
                self.recovery.on_probe_ack(news, segment.ack)
        repeat = Repeat.NOTHING
        is_worth_a_look = had_packets if not is_old else bool(segment.sack)
        if (is_worth_a_look and (news.is_dubious or self.recovery.state is not State.OPEN)) or (
            news.has_duplicate
        ):
            repeat = self.recovery.on_ack(news, now)
        if news.wait_s:
            self._set(Timer.REORDER, news.wait_s + TIMER_MARGIN_S, now)
        if news.sets_timer and not self._schedule_probe(now, is_advance=True):
            self._set_timeout(now)
        if not is_old:
            self._adjust_window(news, board.delivered - delivered, board.losses - losses, now)
        self._repeat(repeat, now)
        self.push(now)

    @property
    def _has_new(self) -> bool:
        """Whether something is still to be sent for the first time: data, or the stream's end."""
        return bool(self._unsent) or (self._is_ending and not self._has_sent_fin)

    @property
    def _is_window_open(self) -> bool:
        return self.board.nxt < self.window_end

    @property
    def _room(self) -> int:
        return self.controller.window.cwnd - self.board.in_flight

    def _take_sacks(self, segment: Segment, news: AckNews, now: float) -> list[tuple[float, int]]:
        """Mark what is SACKed; return when each had been sent and what was delivered then."""
        board, blocks = self.board, segment.sack
        if not blocks:
            return []
        first, end = blocks[0]
        if first < segment.ack or (
            len(blocks) > 1 and blocks[1][0] <= first and end <= blocks[1][1]
        ):
            self._take_duplicate(first, end, news)
            blocks = blocks[1:]
        low = fack = board.fack
        sent = []
        for block in blocks:
            for held in board.within(max(block[0], board.una), block[1]):
                if held.is_sacked:
                    continue
                self.rack.arrived(held, now)
                news.has_sacked = True
                sent.append((held.sent_s, held.delivered))
                if not held.was_repeated:
                    low = min(low, held.start)
                    news.has_sacked_original |= self.recovery.is_original(held)
                    self._sack_times.append(held.sent_s)
                board.sack(held)
        if low < fack and self.recovery.may_note_reordering:
            self.rack.note_reordering(low, board.fack)
        return sent

    def _take_duplicate(self, first: int, end: int, news: AckNews) -> None:
        if self.recovery.probe_end == end:
            news.has_duplicate_probe = True
        if not self.retransmissions:
            return  # the network doubled it
        news.has_duplicate = True
        if self.rack.is_reordering_seen and not news.has_duplicate_probe:
            self.rack.is_duplicate_seen = True
        self.recovery.on_duplicate(first, end, news.una_before)

    def _take_ack(
        self,
        segment: Segment,
        news: AckNews,
        fack: int,
        arrived: list[tuple[float, int]],
        now: float,
    ) -> None:
        """Take off what is acknowledged, and measure the round trip."""
        board = self.board
        ack_times = []
        low = fack
        gone = board.acknowledge(segment.ack)
        for held in gone:
            news.has_acked_repeat |= held.was_repeated
            if held.is_sacked:
                continue
            self.rack.arrived(held, now)
            arrived.append((held.sent_s, held.delivered))
            if not held.was_repeated:
                ack_times.append(held.sent_s)
                low = min(low, held.start)
                news.has_sacked_original |= self.recovery.is_original(held)
        news.has_acked = bool(gone)
        if low < fack:
            self.rack.note_reordering(low, fack)
        news.sets_timer = news.has_acked
        sack_times, self._sack_times = self._sack_times, []
        if not gone and sack_times and board.segments:
            # Else the timeout could be put off for as long as SACKs come in.
            news.sets_timer = sack_times[0] > board.segments[0].sent_s
        self._measure(segment, news, ack_times, sack_times, now)

    def _measure(
        self,
        segment: Segment,
        news: AckNews,
        ack_times: list[float],
        sack_times: list[float],
        now: float,
    ) -> None:
        board = self.board
        rtt_s = None
        if ack_times and not news.has_acked_repeat:
            rtt_s, latest = now - ack_times[0], now - ack_times[-1]
        elif sack_times:
            rtt_s, latest = now - sack_times[0], now - sack_times[-1]
        elif news.has_acked and segment.tsecr_ms:
            rtt_s = latest = max(now - segment.tsecr_ms / 1000, 0.001)
        if rtt_s is None:
            return
        self._rtt.sample(rtt_s, una=board.una, nxt=board.nxt)
        self._rtt.min_s = min(self._rtt.min_s, latest)
        self.controller.on_rtt(now, latest, una=board.una, nxt=board.nxt)

    def _adjust_window(self, news: AckNews, delivered: int, lost: int, now: float) -> None:
        if self.recovery.is_reducing:
            self.recovery.reduce(delivered, lost, advances=news.advances)
        elif news.has_acked or (news.has_sacked and self.rack.reordering > REORDERING_PACKETS):
            self.controller.on_ack(now, delivered)

    def _send_new(self, now: float) -> None:
        room = self.window_end - self.board.nxt
        data = bytes(self._unsent[: int(min(self._mss, room))])
        del self._unsent[: len(data)]
        has_fin = self._is_ending and not self._unsent and len(data) < room
        self._has_sent_fin |= has_fin
        was_idle = not self.board.packets_out
        self._note_resume(now)
        segment = self.board.add(data, now, has_fin=has_fin)
        self._transmit(segment, False, now)
        if was_idle or self.timer is Timer.PROBE:
            self._set_timeout(now)

    def _note_resume(self, now: float) -> None:
        if not self.board.in_flight:
            self.controller.on_resume(now, now - self._sent_at_s)
        self._sent_at_s = now

    def _after_push(self, now: float, sent: int) -> None:
        board = self.board
        if self.recovery.is_reducing:
            self.recovery.sent(sent)
        if sent or (self._unsent and self._room <= 0):
            self.controller.window.validate(
                now,
                in_flight=board.in_flight,
                packets_out=board.packets_out,
                una=board.una,
                nxt=board.nxt,
                rto_s=self._rtt.rto_s,
                is_open=self.recovery.state is State.OPEN,
            )

    def _repeat(self, repeat: Repeat, now: float) -> None:
        if repeat is Repeat.NEW:
            self.push(now)
            if self.board.nxt > self.recovery.high:
                return
            self.recovery.end_frto()
        if repeat is not Repeat.NOTHING:
            self._repeat_lost(now)

    def _repeat_lost(self, now: float) -> None:
        board = self.board
        has_repeated_head = False
        while self._room > 0 and (segment := board.next_to_repeat()) is not None:
            self._resend(segment, now)
            if self.recovery.is_reducing:
                self.recovery.sent(1)
            has_repeated_head |= segment is board.segments[0]
        if has_repeated_head and self.timer is not Timer.REORDER:
            self._set(Timer.TIMEOUT, self._rtt.rto_s, now)

    def _resend(self, segment: SentSegment, now: float, *, is_probe: bool = False) -> None:
        self.board.collapse(segment, self._mss)
        self._note_resume(now)
        self.board.resent(segment, now)
        if not is_probe and not segment.is_repeated:
            # It may be so already: a spurious reduction was undone, and then a timeout struck.
            segment.is_repeated = True
            self.board.repeated += 1
        self.recovery.repeated(now, is_probe=is_probe)
        self.retransmissions += 1
        self._transmit(segment, True, now)

    def _set(self, timer: Timer, delay_s: float, now: float) -> None:
        self._timer = (timer, now + max(delay_s, TIMER_MIN_S))

    def _set_timeout(self, now: float) -> None:
        """Set the timeout; after another timer from when the first segment was last sent."""
        if not self.board.packets_out:
            self._timer = None
            return
        delay_s = self._rtt.rto_s
        if self.timer in (Timer.PROBE, Timer.REORDER):
            delay_s += self.board.segments[0].sent_s - now
        self._set(Timer.TIMEOUT, delay_s, now)

    def _schedule_probe(self, now: float, *, is_advance: bool = False) -> bool:
        """Set the timer for a tail loss probe, if one would help now."""
        board = self.board
        if not board.packets_out or self.recovery.state not in (State.OPEN, State.CWR):
            return False
        delay_s = RTO_INITIAL_S
        if self._rtt.srtt_s is not None:
            # A receiver may hold back the ACK of a lone segment.
            delay_s = 2 * self._rtt.srtt_s
            delay_s += RTO_MIN_S if board.packets_out == 1 else TIMER_MARGIN_S
        left_s = self._rtt.rto_s
        if not is_advance:
            left_s += board.segments[0].sent_s - now
        self._set(Timer.PROBE, min(delay_s, left_s) if left_s > 0 else delay_s, now)
        return True

    def _send_probe(self, now: float) -> None:
        recovery = self.recovery
        if recovery.probe_end is None:
            recovery.is_probe_repeat = False
            if self._has_new and self._is_window_open:
                self._send_new(now)
                self._after_push(now, 1)
            else:
                self._resend(self.board.segments[-1], now, is_probe=True)
                recovery.is_probe_repeat = True
            recovery.probe_end = self.board.nxt
            self.probes += 1
            self._timer = None
        self._set_timeout(now)

    def _on_reorder_timer(self, now: float) -> None:
        is_lost, wait_s = self.recovery.on_reorder_timer(now)
        if is_lost:
            self._repeat_lost(now)
        if wait_s:
            self._set(Timer.REORDER, wait_s + TIMER_MARGIN_S, now)
        elif self.timer is not Timer.TIMEOUT:
            self._set_timeout(now)

    def _on_window_timer(self, now: float) -> None:
        self._timer = None
        if self._window_probes >= WINDOW_PROBES_MAX:
            self.has_given_up = True
            return
        self._window_probes += 1
        self._probe_window(now)
        self._window_wait_s = min(2 * self._window_wait_s, RTO_MAX_S)
        self._set(Timer.WINDOW, self._window_wait_s, now)

    def _on_timeout(self, now: float) -> None:
        self._timer = None
        if not self.recovery.timeouts:
            self._silent_from_s = now
        elif now - self._silent_from_s >= GIVE_UP_S:
            self.has_given_up = True
            return
        self.timeouts += 1
        self.recovery.on_timeout(now)
        self._resend(self.board.segments[0], now)
        self._rtt.back_off()
        self._set(Timer.TIMEOUT, self._rtt.rto_s, now)
