"""Loss recovery: one state machine, its table first, as `tcp_fastretrans_alert` in Linux.

A fast recovery shrinks the window by proportional rate reduction (RFC 6937), a timeout starts over
at one packet and looks with F-RTO (RFC 5682) for signs that it struck in vain. A reduction that
proves spurious, by timestamps (Eifel, RFC 4015) or DSACKs (RFC 3708), is undone.
Source: net/ipv4/tcp_input.c.
"""

from enum import Enum, auto

from eloquent_netem.tcp.congestion import Controller
from eloquent_netem.tcp.news import AckNews, Repeat
from eloquent_netem.tcp.scoreboard import REORDERING_PERSISTS, Rack, Scoreboard, SentSegment


class State(Enum):
    """Linux's `tcp_ca_state`."""

    OPEN = auto()
    DISORDER = auto()
    "There are SACKs or retransmissions, but no loss so far."
    CWR = auto()
    "The window shrinks because of ECN or a loss that a tail probe has repaired."
    RECOVERY = auto()
    LOSS = auto()


class Cause(Enum):
    """Why the state changes."""

    HOLE = auto()
    WHOLE = auto()
    "Nothing is SACKed or retransmitted any more."
    CONGESTION = auto()
    LOSS = auto()
    TIMEOUT = auto()
    REPAIRED = auto()
    "All that had been sent when the state began is acknowledged, or the reduction was spurious."


TRANSITIONS: dict[tuple[State, Cause], State] = {
    (State.OPEN, Cause.HOLE): State.DISORDER,
    (State.OPEN, Cause.CONGESTION): State.CWR,
    (State.OPEN, Cause.LOSS): State.RECOVERY,
    (State.DISORDER, Cause.WHOLE): State.OPEN,
    (State.DISORDER, Cause.CONGESTION): State.CWR,
    (State.DISORDER, Cause.LOSS): State.RECOVERY,
    (State.CWR, Cause.CONGESTION): State.CWR,
    (State.CWR, Cause.LOSS): State.RECOVERY,
    (State.CWR, Cause.HOLE): State.DISORDER,
    (State.CWR, Cause.WHOLE): State.OPEN,
    (State.CWR, Cause.REPAIRED): State.OPEN,
    (State.RECOVERY, Cause.CONGESTION): State.CWR,
    (State.RECOVERY, Cause.HOLE): State.DISORDER,
    (State.RECOVERY, Cause.WHOLE): State.OPEN,
    (State.RECOVERY, Cause.REPAIRED): State.OPEN,
    (State.LOSS, Cause.REPAIRED): State.OPEN,
    (State.LOSS, Cause.LOSS): State.RECOVERY,
    **{(state, Cause.TIMEOUT): State.LOSS for state in State},
}


class Recovery:
    """The state, the proportional reduction and the means to undo it."""

    def __init__(self, board: Scoreboard, rack: Rack, controller: Controller) -> None:
        self._board = board
        self._rack = rack
        self._controller = controller
        self.state = State.OPEN
        self.high = board.nxt
        "What had been sent when the state began."
        self.probe_end: int | None = None
        "A tail loss probe is under way; what had been sent then."
        self.is_probe_repeat = False
        self.owes_cwr = False
        "ECN: the next new segment tells the receiver that the window was reduced."
        self.timeouts = 0
        "In a row, without an advance."
        self.recoveries = self.undone = 0
        "Fast recoveries begun, and reductions taken back."
        self._repeated_at_ms: int | None = None
        self._undo_from: int | None = None
        self._undo_repeats = 0
        "Retransmissions not yet shown to be in vain; -1: there was none so far."
        self._prior_cwnd = 0
        self._prior_ssthresh = 0
        self._delivered = self._sent = 0
        self._frto = False

    @property
    def is_reducing(self) -> bool:
        """Whether the window shrinks by proportional rate reduction."""
        return self.state in (State.CWR, State.RECOVERY)

    def on_ack(self, news: AckNews, now: float) -> Repeat:
        """Act on a dubious ACK or one in a state other than open; say what to send."""
        if news.has_echo:
            self._prior_ssthresh = 0
        if self.state is State.OPEN:
            self._repeated_at_ms = None
        elif self._board.una >= self.high:
            if self.state is State.CWR and self._board.una != self.high:
                self._end_reduction()
                self._go(Cause.REPAIRED)
            elif self.state is State.RECOVERY:
                self._undo_if_spurious(news)
                self._go(Cause.REPAIRED)
        if self.state is State.RECOVERY:
            return self._in_recovery(news, now)
        if self.state is State.LOSS:
            repeat, is_over = self._in_loss(news)
            self._find_losses(news, now)
            if not is_over and not news.lost_repeat:
                return repeat
        elif self.state in (State.OPEN, State.DISORDER):
            self._undo_by_duplicates()
        self._find_losses(news, now)
        if not self._board.lost:
            self._try_to_open(news)
            return Repeat.NOTHING
        self._enter_recovery(has_echo=news.has_echo)
        return Repeat.LOST

    def on_reorder_timer(self, now: float) -> tuple[bool, float]:
        """Mark what is now too late; return whether anything was, and how long others have."""
        before = self._board.in_flight
        wait_s = self._rack.mark(now, in_recovery=self._is_late_state)
        if before == self._board.in_flight:
            return False, wait_s
        if self.state is not State.RECOVERY:
            self._enter_recovery(has_echo=False)
            self.reduce(1, 0, advances=False)
        return True, wait_s

    def on_timeout(self, now: float) -> None:
        """Enter the loss state: everything old enough is lost, the window is one packet."""
        board, window = self._board, self._controller.window
        is_new = self.state in (State.OPEN, State.DISORDER, State.CWR)
        for index, segment in enumerate(list(board.segments)):
            if index == 0 or self._rack.remaining_s(segment, 0.0, now) <= 0:
                board.mark_lost(segment)
        if (
            self.state in (State.OPEN, State.DISORDER)
            or self.high <= board.una
            or (self.state is State.LOSS and not self.timeouts)
        ):
            self._prior_ssthresh = self._current_ssthresh()
            self._prior_cwnd = window.cwnd
            window.ssthresh = self._controller.reduced()
            self._start_undo()
        window.cwnd = board.in_flight + 1
        window.count = 0
        self._go(Cause.TIMEOUT)
        self._controller.on_timeout(now, board.nxt)
        self.high = board.nxt
        self.probe_end = None
        self.owes_cwr = True
        self._frto = is_new or self.timeouts > 0
        self.timeouts += 1

    def repeated(self, now: float, *, is_probe: bool) -> None:
        """Note a retransmission; a tail probe's is not held against the network."""
        if is_probe:
            return
        if self._repeated_at_ms is None:
            self._repeated_at_ms = int(1000 * now)
        self._undo_repeats = max(0, self._undo_repeats) + 1

    def sent(self, packets: int) -> None:
        """Note what was sent during a reduction."""
        self._sent += packets

    def reduce(self, delivered: int, lost: int, *, advances: bool) -> None:
        """Set the window from what was delivered (RFC 6937, `tcp_cwnd_reduction`)."""
        window, in_flight = self._controller.window, self._board.in_flight
        if delivered <= 0 or not self._prior_cwnd:
            return
        self._delivered += delivered
        room = window.ssthresh - in_flight
        if room < 0:
            dividend = window.ssthresh * self._delivered + self._prior_cwnd - 1
            allowed = dividend // self._prior_cwnd - self._sent
        else:
            allowed = max(self._delivered - self._sent, delivered)
            allowed = min(room, allowed + (advances and not lost))
        window.cwnd = in_flight + max(allowed, 0 if self._sent else 1)

    def on_probe_ack(self, news: AckNews, ack: int) -> None:
        """Learn from an ACK how a tail loss probe fared (`tcp_process_tlp_ack`)."""
        if self.probe_end is None or ack < self.probe_end:
            return
        if not self.is_probe_repeat or news.has_duplicate_probe:
            self.probe_end = None
        elif ack > self.probe_end:
            # The probe has repaired a loss that nothing else would have told of.
            self._start_reduction()
            self._go(Cause.CONGESTION)
            self._end_reduction()
            self._keep_open()
        elif news.is_duplicate_ack and not news.has_sacked:
            self.probe_end = None

    def on_duplicate(self, first: int, end: int, una_before: int) -> None:
        """Note a DSACK: one retransmission less that may have been needed."""
        if (
            self._undo_from is not None
            and self._undo_repeats > 0
            and self._undo_from < end <= una_before
            and first < end
        ):
            self._undo_repeats -= 1

    def is_original(self, segment: SentSegment) -> bool:
        """Whether its arrival shows that a timeout struck in vain."""
        return not segment.was_repeated and segment.end <= self.high

    @property
    def may_note_reordering(self) -> bool:
        """Whether SACKs for old originals count as reordering."""
        return self.state is not State.LOSS or self._undo_from is not None

    @property
    def _is_late_state(self) -> bool:
        return self.state in (State.RECOVERY, State.LOSS)

    def _go(self, cause: Cause) -> None:
        self.state = TRANSITIONS[self.state, cause]

    def _in_recovery(self, news: AckNews, now: float) -> Repeat:
        if news.advances and self._is_delayed(news) and self._undo_from is not None:
            # Luck: the hole was filled by a late original, not by its retransmission.
            self._rack.note_reordering(news.una_before, self._board.fack)
            if self._board.repeated:
                return Repeat.NOTHING
            self._undo(unmarks=True)
            self._keep_open()
        if self._undo_by_duplicates():
            self._try_to_open(news)
        self._find_losses(news, now)
        if self.state is not State.RECOVERY:
            if not self._board.lost:
                return Repeat.NOTHING
            self._enter_recovery(has_echo=news.has_echo)
        return Repeat.LOST

    def _in_loss(self, news: AckNews) -> tuple[Repeat, bool]:
        """Return what to send and whether the state is over."""
        board = self._board
        is_repaired = board.una >= self.high
        if news.advances and self._may_undo(news):
            self._undo_timeout()
            return Repeat.NOTHING, True
        if self._frto:
            if news.has_sacked_original:
                self._undo_timeout()
                return Repeat.NOTHING, True
            if board.nxt > self.high:
                if news.has_sacked or news.is_duplicate_ack:
                    self._frto = False
            elif news.advances and not is_repaired:
                self.high = board.nxt
                return Repeat.NEW, False
        if is_repaired:
            self._undo_if_spurious(news)
            self._go(Cause.REPAIRED)
            return Repeat.NOTHING, True
        return Repeat.LOST, False

    def end_frto(self) -> None:
        """Give up looking: there was no new data to send."""
        self._frto = False

    def _find_losses(self, news: AckNews, now: float) -> None:
        before = self._board.repeated
        wait_s = self._rack.mark_on_ack(now, in_recovery=self._is_late_state)
        if wait_s:
            news.wait_s = wait_s
            news.sets_timer = False
        if before > self._board.repeated:
            news.lost_repeat = True

    def _enter_recovery(self, *, has_echo: bool) -> None:
        if not self._board.any_repeated:
            self._repeated_at_ms = None
        self._prior_ssthresh = 0
        self._start_undo()
        if not self.is_reducing:
            if not has_echo:
                self._prior_ssthresh = self._current_ssthresh()
            self._start_reduction()
        self._go(Cause.LOSS)
        self.recoveries += 1

    def _start_reduction(self) -> None:
        window = self._controller.window
        self.high = self._board.nxt
        self.probe_end = None
        window.count = 0
        self._prior_cwnd = window.cwnd
        self._delivered = self._sent = 0
        window.ssthresh = self._controller.reduced()
        self.owes_cwr = True

    def _end_reduction(self) -> None:
        if self.state is State.CWR or self._undo_from is not None:
            self._controller.window.cwnd = self._controller.window.ssthresh

    def _try_to_open(self, news: AckNews) -> None:
        if not self._board.any_repeated:
            self._repeated_at_ms = None
        if news.has_echo and self.state in (State.OPEN, State.DISORDER):
            self._prior_ssthresh = 0
            self._undo_from = None
            self._start_reduction()
            self._go(Cause.CONGESTION)
        if self.state is not State.CWR:
            self._keep_open()

    def _keep_open(self) -> None:
        has_hole = self._board.sacked + self._board.lost > 0 or self._board.any_repeated
        wanted = State.DISORDER if has_hole else State.OPEN
        if self.state is not wanted:
            self._go(Cause.HOLE if has_hole else Cause.WHOLE)
            self.high = self._board.nxt

    def _start_undo(self) -> None:
        self._undo_from = self._board.una
        probes = self.probe_end is not None and self.is_probe_repeat
        self._undo_repeats = (self._board.repeated + probes) or -1

    def _is_delayed(self, news: AckNews) -> bool:
        return self._repeated_at_ms is not None and 0 < news.echo_ms < self._repeated_at_ms

    def _may_undo(self, news: AckNews) -> bool:
        return self._undo_from is not None and (self._undo_repeats == 0 or self._is_delayed(news))

    def _undo_if_spurious(self, news: AckNews) -> None:
        if self._may_undo(news):
            self._undo(unmarks=False)
        elif self._rack.persists:
            self._rack.persists -= 1
        if self.state is State.RECOVERY:
            self._end_reduction()

    def _undo_by_duplicates(self) -> bool:
        if self._undo_from is None or self._undo_repeats:
            return False
        self._rack.persists = min(REORDERING_PERSISTS, self._rack.persists + 1)
        self._undo(unmarks=False)
        return True

    def _undo_timeout(self) -> None:
        self._undo(unmarks=True)
        self.timeouts = 0
        self._go(Cause.REPAIRED)

    def _undo(self, *, unmarks: bool) -> None:
        window = self._controller.window
        if unmarks:
            self._board.unmark_all()
        if self._prior_ssthresh:
            window.cwnd = max(window.cwnd, self._prior_cwnd)
            if self._prior_ssthresh > window.ssthresh:
                window.ssthresh = self._prior_ssthresh
                self.owes_cwr = False
        self._undo_from = None
        self._rack.reexamine()
        self.undone += 1

    def _current_ssthresh(self) -> int:
        window = self._controller.window
        return window.ssthresh if self.is_reducing else window.kept_ssthresh
