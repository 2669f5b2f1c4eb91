"""How TCP connections end: orderly, half by half, by a reset, or because nobody answers.

The round trip takes 50 ms. On the way up packet 0 is the SYN, 1 the handshake's ACK, 2 and up what
the test sends; on the way down packet 0 is the SYN-ACK.
"""

import errno
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eloquent_netem.capture import CLIENT, SERVER
from eloquent_netem.link import Link
from eloquent_netem.loss import DropList
from eloquent_netem.packet import Packet
from eloquent_netem.sim import StuckError, simulate
from eloquent_netem.tcp import TcpError, TcpPair
from eloquent_netem.tcp.connection import answer_to_stray
from eloquent_netem.tcp.phases import PHASES, SYNCHRONISED, Arrival, Phase
from eloquent_netem.tcp.segment import FIN, MSS_BYTES, RST, Segment, from_packet, to_packet

RTT_S = 0.05
START_S = 1.0
TIME_WAIT_S = 60.0
NEVER = range(1_000_000)


class WatchedLink(Link):
    """Writes down what enters it."""

    def __init__(self, name: str, drops: Iterable[int]) -> None:
        super().__init__(delay_s=RTT_S / 2, seed=1, name=name, loss=DropList(drops))
        self.seen: list[tuple[float, Segment]] = []

    def send(self, now: float, packet: Packet) -> None:
        self.seen.append((now, from_packet(packet, seq=0, ack=0, now_ms=int(1000 * now))))
        super().send(now, packet)

    def with_flag(self, flag: int) -> list[float]:
        return [round(time, 4) for time, segment in self.seen if segment.flags & flag]


class Case:
    """A connected pair; calls run at their times, counted from the end of the handshake."""

    def __init__(self, *, up: Iterable[int] = (), down: Iterable[int] = ()) -> None:
        self.up, self.down = WatchedLink("up", up), WatchedLink("down", down)
        self.to_client, self.to_server = bytearray(), bytearray()
        self.pair = TcpPair(
            up=self.up,
            down=self.down,
            has_window=True,
            on_client_data=lambda data, _: self.to_client.extend(data),
            on_server_data=lambda data, _: self.to_server.extend(data),
        )
        self.client, self.server = self.pair.client, self.pair.server
        self._calls: list[tuple[float, Callable[[float], None]]] = []
        self.ended_s: dict[str, float] = {}
        self.now = 0.0

    def at(self, time_s: float, call: Callable[[float], None]) -> "Case":
        self._calls.append((START_S + RTT_S + time_s, call))
        return self

    def next_time(self) -> float | None:
        return min((time for time, _ in self._calls), default=None)

    def act(self, now: float) -> None:
        for item in [item for item in self._calls if item[0] <= now]:
            self._calls.remove(item)
            item[1](now)
        self.pair.flush(now)

    @property
    def phases(self) -> tuple[Phase, Phase]:
        return self.client.phase, self.server.phase

    def run(self, until: Callable[[], bool]) -> float:
        """Return the time, from the end of the handshake, at which `until` holds."""
        if not self.now:
            self.now = START_S
            self.pair.connect(START_S)
        self.now = simulate(
            (*self.pair.actors, self), until=until, start_s=self.now, limit_s=START_S + 5000
        )
        return round(self.now - START_S - RTT_S, 4)

    def run_out(self) -> float:
        """Run until nothing is left to happen."""
        with pytest.raises(StuckError, match="nothing is left"):
            self.run(lambda: False)
        return self.now


@pytest.mark.parametrize("phase", sorted(SYNCHRONISED, key=lambda phase: phase.value))
def test_the_table_leads_from_every_phase_to_the_end(phase: Phase) -> None:
    assert PHASES[phase, Arrival.ABORT] is Phase.CLOSED
    reached, todo = {phase}, [phase]
    while todo:
        here = todo.pop()
        todo += [
            after
            for (before, arrival), after in PHASES.items()
            if before is here and arrival is not Arrival.ABORT and after not in reached
        ]
        reached.update(todo)
    assert Phase.CLOSED in reached


def test_an_orderly_end_takes_a_fin_and_an_ack_each_way() -> None:
    case = Case()
    case.at(0, lambda now: case.client.write(b"question", now))
    case.at(0, case.client.close)
    assert case.run(lambda: case.server.is_read_over) == RTT_S / 2
    assert bytes(case.to_server) == b"question"
    assert case.phases == (Phase.FIN_WAIT_1, Phase.CLOSE_WAIT)
    case.at(1, case.server.close)
    case.run(lambda: case.server.phase is Phase.CLOSED)
    assert case.client.phase is Phase.TIME_WAIT
    assert case.run(lambda: case.client.phase is Phase.CLOSED) == 1 + RTT_S / 2 + TIME_WAIT_S
    assert (case.client.error, case.server.error) == (None, None)
    assert case.up.with_flag(FIN) == [START_S + RTT_S]
    assert case.down.with_flag(FIN) == [START_S + RTT_S + 1]
    assert not case.up.with_flag(RST) + case.down.with_flag(RST)


def test_a_half_that_has_ended_leaves_the_other_open() -> None:
    case = Case()
    case.at(0, case.client.shutdown)
    for index in range(100):
        case.at(1 + index, lambda now: case.server.write(b"answer", now))
    case.at(101, case.server.shutdown)
    case.run(lambda: case.client.is_read_over)
    assert bytes(case.to_client) == 100 * b"answer"
    with pytest.raises(TcpError, match="sends no more"):
        case.client.write(b"more", case.now)


def test_both_may_end_at_once() -> None:
    case = Case()
    case.at(1, case.client.close)
    case.at(1, case.server.close)
    case.run(lambda: case.phases == (Phase.CLOSING, Phase.CLOSING))
    case.run(lambda: case.phases == (Phase.TIME_WAIT, Phase.TIME_WAIT))
    case.run(lambda: case.phases == (Phase.CLOSED, Phase.CLOSED))


@pytest.mark.parametrize(
    ("up", "down"),
    [([2], []), ([2, 3], []), ([], [1]), ([], [2]), ([3], []), ([1, 2], [])],
    ids=["FIN", "FIN twice", "its ACK", "the other FIN", "the last ACK", "two before the server"],
)
def test_a_lost_segment_of_the_end_is_sent_again(up: list[int], down: list[int]) -> None:
    case = Case(up=up, down=down)
    case.at(0, case.client.close)
    case.at(2, case.server.close)
    case.run(lambda: case.phases == (Phase.CLOSED, Phase.CLOSED))
    assert (case.client.error, case.server.error) == (None, None)


def test_the_end_comes_behind_lost_data() -> None:
    case = Case(up=[2, 3])
    data = bytes(range(256)) * 20
    case.at(0, lambda now: case.client.write(data, now))
    case.at(0, case.client.close)
    case.run(lambda: case.server.is_read_over)
    assert bytes(case.to_server) == data
    assert case.client.sender.retransmissions >= 2


def test_repeated_syns_are_not_held_against_a_half_open_connection() -> None:
    # Each is answered; only timeouts count (Linux's `num_timeout`, not `num_retrans`).
    case = Case(down=range(8))
    case.run(lambda: case.phases == (Phase.ESTABLISHED, Phase.ESTABLISHED))
    assert case.now < START_S + 20


@settings(max_examples=60, deadline=None)
@given(
    up=st.sets(st.integers(0, 40), max_size=8),
    down=st.sets(st.integers(0, 40), max_size=8),
    question=st.binary(max_size=20_000),
    answer=st.binary(max_size=20_000),
)
def test_whatever_is_lost_both_streams_come_whole(
    up: set[int], down: set[int], question: bytes, answer: bytes
) -> None:
    case = Case(up=up, down=down)
    case.client.write(question, 0.0)
    case.at(0, lambda now: None)
    case.run(lambda: case.client.phase is Phase.ESTABLISHED)
    case.client.shutdown(case.now)
    case.pair.flush(case.now)
    case.run(lambda: case.server.is_read_over)
    case.server.write(answer, case.now)
    case.server.shutdown(case.now)
    case.pair.flush(case.now)
    case.run(lambda: case.client.is_read_over)
    case.run(lambda: case.phases == (Phase.CLOSED, Phase.CLOSED))
    assert (bytes(case.to_server), bytes(case.to_client)) == (question, answer)


def test_a_reset_ends_the_peer_at_once() -> None:
    case = Case()
    case.at(0, case.client.abort)
    assert case.run(lambda: case.server.phase is Phase.CLOSED) == RTT_S / 2
    assert (case.client.error, case.server.error) == (None, errno.ECONNRESET)
    case.run_out()


def test_a_reset_behind_a_gap_is_confirmed_first() -> None:
    # RFC 5961: it might be forged, so the peer is asked; here it has forgotten and cannot answer.
    case = Case(up=[2])
    case.at(0, lambda now: case.client.write(b"lost", now))
    case.at(0, case.client.abort)
    case.run(lambda: len(case.down.seen) == 2)
    assert case.server.phase is Phase.ESTABLISHED
    assert case.down.seen[-1][1].ack == 1


def test_what_comes_for_an_application_that_is_gone_is_reset() -> None:
    case = Case()
    case.at(0, case.client.close)
    case.at(1, lambda now: case.server.write(b"too late", now))
    assert case.run(lambda: case.server.phase is Phase.CLOSED) == 1 + RTT_S
    assert case.server.error == errno.EPIPE


def test_a_reset_after_the_end_is_no_error() -> None:
    # The server has forgotten the connection when a late copy of a segment comes.
    case = Case()
    case.at(1, case.client.shutdown)
    case.at(2, case.server.close)
    case.run(lambda: case.server.phase is Phase.CLOSED)
    assert case.client.phase is Phase.TIME_WAIT
    late = to_packet(case.up.seen[1][1], source=CLIENT, destination=SERVER)
    late_answer = answer_to_stray(late)
    assert late_answer is not None
    case.client.receive(late_answer, case.now)
    assert case.client.phase is Phase.TIME_WAIT
    reset = Segment(case.down.seen[-1][1].end, 0, RST, 0, 0)
    case.client.receive(to_packet(reset, source=SERVER, destination=CLIENT), case.now)
    assert (case.client.phase, case.client.error) == (Phase.CLOSED, None)


def test_who_waits_for_the_other_half_alone_does_not_wait_for_ever() -> None:
    case = Case()
    case.at(0, case.client.close)
    assert case.run(lambda: case.client.phase is Phase.CLOSED) == RTT_S + TIME_WAIT_S
    assert case.server.phase is Phase.CLOSE_WAIT


def test_the_wait_begins_when_the_application_goes() -> None:
    case = Case()
    case.at(0, case.client.shutdown)
    case.at(100, case.client.close)
    assert case.run(lambda: case.client.phase is Phase.CLOSED) == 100 + TIME_WAIT_S


def test_a_syn_that_nobody_answers_is_given_up_after_131_s() -> None:
    # Linux with tcp_syn_retries = 6 and tcp_syn_linear_timeouts = 4.
    case = Case(up=NEVER)
    case.run(lambda: case.client.phase is Phase.CLOSED)
    assert case.now - START_S == 131
    assert case.client.error == errno.ETIMEDOUT
    sent = [time - START_S for time in case.up.with_flag(0x02)]
    assert sent == [0, 1, 2, 3, 4, 5, 7, 11, 19, 35, 67]


def test_a_syn_ack_that_nobody_answers_is_given_up() -> None:
    case = Case(up=range(1, 100))
    case.run(lambda: case.server.phase is Phase.SYN_RECEIVED)
    case.run(lambda: case.server.phase is Phase.CLOSED)
    assert case.now - START_S == pytest.approx(63 + RTT_S / 2)


def test_data_that_nobody_acknowledges_is_given_up_after_a_quarter_of_an_hour() -> None:
    case = Case(up=range(2, 1_000_000))
    case.at(0, lambda now: case.client.write(b"hello?", now))
    given_up_s = case.run(lambda: case.client.phase is Phase.CLOSED)
    assert case.client.error == errno.ETIMEDOUT
    # Linux: 924.6 s from the first timeout on, and then at the next one, which come every 120 s.
    assert 924.6 < given_up_s < 924.6 + 121
    assert 15 <= case.client.sender.timeouts <= 17


def test_an_end_that_nobody_acknowledges_is_given_up() -> None:
    case = Case(up=range(2, 1_000_000))
    case.at(0, case.client.close)
    assert 924 < case.run(lambda: case.client.phase is Phase.CLOSED) < 1050


def test_an_outage_that_ends_in_time_breaks_nothing() -> None:
    case = Case(up=range(2, 14))
    case.at(0, lambda now: case.client.write(bytes(MSS_BYTES), now))
    assert 100 < case.run(lambda: len(case.to_server) == MSS_BYTES) < 900
