"""Whatever happens to packets, connections and the server, the answer comes out whole, or says why.

Hypothesis makes up what happens: tokens, commits of the store, packets that arrive, are lost, come
twice or late, acknowledgements that lie about loss, reports, reconnects, servers that are killed
and go on from what is stored, cancels. After each step the reader has a prefix of the answer, of
which the store has every byte; when peace returns, it has all of it.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from eloquent.core.events import End, Event, TextDelta
from eloquent.core.log import TokenLog
from eloquent.core.path import Path
from eloquent.core.receiver import Receiver
from eloquent.core.retransmit import RetransmitSender
from eloquent.core.schemes import EloquentSender, SenderFactory
from eloquent.core.sender import Sender
from eloquent.core.windows import ReaderWindows
from eloquent.core.wire import (
    Bundle,
    Report,
    decode_frame,
    encode_bundle,
    encode_report,
)

TOKENS = 12
WINDOW_BYTES = 60
"Small, so that it closes now and then."

CASES = 2000
PEACE_STEPS = 3000
"Far more than an answer needs; a sender that wedges uses them up."

ROOMS = st.sampled_from([30, 60, 200, 1200])
STEPS = st.one_of(
    st.tuples(st.just("token"), st.integers(1, 3)),
    st.tuples(st.just("store"), st.just(0)),
    st.tuples(st.just("send"), ROOMS),
    st.tuples(st.just("arrive"), st.integers(0, 30)),
    st.tuples(st.just("come again"), st.integers(0, 30)),
    st.tuples(st.just("acknowledge"), st.integers(0, 30)),
    st.tuples(st.just("swallow"), st.integers(0, 30)),
    st.tuples(st.just("call lost"), st.integers(0, 30)),
    st.tuples(st.just("report"), st.integers(0, 30)),
    st.tuples(st.just("read"), st.integers(0, 40)),
    st.tuples(st.just("wait"), st.sampled_from([1, 5, 40, 300, 5000])),
    st.tuples(st.just("reconnect"), st.just(0)),
    st.tuples(st.just("restart"), st.just(0)),
)


def token(index: int) -> str:
    return f"token {index}, " if index % 3 else "ß" * (index + 1)


@dataclass
class World:
    """A server with its store, one connection at a time, and a reader."""

    make_sender: SenderFactory
    now: float = 1.0
    log: TokenLog = field(default_factory=lambda: TokenLog(is_held=True))
    stored: bytes = b""
    generated: int = 0
    receiver: Receiver = field(default_factory=Receiver)
    events: list[Event] = field(default_factory=list)
    taken: int = 0
    path: Path = field(default_factory=lambda: Path(srtt_s=0.1))

    def __post_init__(self) -> None:
        self.connect()

    def connect(self) -> None:
        """A new connection: what was on its way over the old one is never seen again."""
        offset = self.receiver.contiguous
        windows = ReaderWindows(reader_bytes=WINDOW_BYTES, least_bytes=WINDOW_BYTES)
        self.window = windows.open(self.log, offset)
        self.path = Path(srtt_s=0.1)
        self.sender: Sender = self.make_sender(0, self.window, self.path)
        self.sender.start_at(offset)
        self.receiver.attach(0)
        self.bundles: list[Bundle] = []
        self.arrived: list[Bundle] = []
        self.reports: list[Report] = []

    def step(self, kind: str, value: int) -> None:
        getattr(self, kind.replace(" ", "_"))(value)
        if self.sender.is_complete and not self.receiver.is_complete:
            assert self.log.end is not None
        said = "".join(event.text for event in self.events if isinstance(event, TextDelta))
        assert "".join(map(token, range(TOKENS))).startswith(said)
        assert self.receiver.contiguous <= len(self.stored)

    def token(self, count: int) -> None:
        for _ in range(min(count, TOKENS - self.generated)):
            self.log.append(TextDelta(token(self.generated)))
            self.generated += 1
        if self.generated == TOKENS and not self.log.is_closed:
            self.log.close("stop", model="m", prompt_tokens=1, completion_tokens=TOKENS)

    def store(self, value: int) -> None:
        self.stored += self.log.written_from(len(self.stored))
        self.log.release(len(self.stored))
        self.sender.log_grew(self.now)

    def send(self, room: int) -> None:
        bundle = self.sender.next_bundle(self.now, room)
        if bundle is not None:
            assert len(encode_bundle(bundle)) <= room
            assert decode_frame(encode_bundle(bundle)) == bundle
            self.bundles.append(bundle)

    def arrive(self, value: int) -> None:
        if self.bundles:
            bundle = self.bundles.pop(value % len(self.bundles))
            self.arrived.append(bundle)
            self._take(bundle)

    def come_again(self, value: int) -> None:
        if self.arrived:
            self._take(self.arrived[value % len(self.arrived)])

    def _take(self, bundle: Bundle) -> None:
        self.events += self.receiver.on_bundle(bundle, self.now)

    def acknowledge(self, value: int) -> None:
        if self.arrived:
            self.sender.on_acked(self.arrived[value % len(self.arrived)].number)

    def swallow(self, value: int) -> None:
        """QUIC acknowledges what the application never gets, as browsers may."""
        if self.bundles:
            self.sender.on_acked(self.bundles.pop(value % len(self.bundles)).number)

    def call_lost(self, value: int) -> None:
        """QUIC takes a packet for lost, rightly or not; if it is, it may still arrive."""
        sent = self.bundles + self.arrived
        if sent:
            self.sender.on_lost(sent[value % len(sent)].number)

    def report(self, value: int) -> None:
        """The reader reports if it is due; one of the reports on their way arrives, or is lost."""
        report = self.receiver.next_report(self.now)
        if report is not None:
            assert decode_frame(encode_report(report)) == report
            self.reports.append(report)
        if self.reports:
            report = self.reports.pop(value % len(self.reports))
            if value % 4:
                self._on_report(report)

    def _on_report(self, report: Report) -> None:
        self.sender.on_report(report)
        self.window.on_taken(report.contiguous - report.unread)
        self.sender.log_grew(self.now)

    def read(self, value: int) -> None:
        """The application takes some of what has come."""
        self.taken = max(self.taken, min(self.receiver.contiguous, self.taken + value))
        self.receiver.on_taken(self.taken)

    def wait(self, ms: int) -> None:
        self.now += ms / 1000

    def reconnect(self, value: int) -> None:
        self.connect()

    def restart(self, value: int) -> None:
        """The server is killed; another goes on from what is stored."""
        self.log, events = TokenLog.restored(self.stored)
        self.generated = sum(isinstance(event, TextDelta) for event in events)
        self.connect()

    def make_peace(self) -> None:
        """Everything is generated and stored; every packet arrives."""
        self.token(TOKENS)
        self.store(0)
        for _ in range(PEACE_STEPS):
            if self.receiver.is_complete and self.sender.is_complete:
                return
            self.send(1200)
            while self.bundles:
                self.arrive(0)
                self.acknowledge(len(self.arrived) - 1)
            self.read(1 << 20)
            self.reports.clear()
            report = self.receiver.next_report(self.now)
            if report is not None:
                self._on_report(report)
            self.now += 0.02
        raise AssertionError("the answer is not whole, though every packet arrives")


@pytest.mark.parametrize("make_sender", [EloquentSender, RetransmitSender])
@settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(steps=st.lists(STEPS, max_size=120))
def test_the_answer_comes_out_whole_whatever_happens(
    make_sender: SenderFactory, steps: list[tuple[str, int]]
) -> None:
    world = World(make_sender)
    for kind, value in steps:
        world.step(kind, value)
    note(f"before peace: {world.receiver.contiguous} of {len(world.stored)} stored bytes")
    world.make_peace()
    *deltas, end = world.events
    assert [delta.text for delta in deltas if isinstance(delta, TextDelta)] == [
        token(index) for index in range(TOKENS)
    ]
    assert isinstance(end, End)
    assert end == world.log.end
