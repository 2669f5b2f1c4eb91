"""The lower rungs' messages: two ends joined in memory, in virtual time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eloquent.core.channel import (
    BEAT_S,
    MAX_BUNDLE_DATA_BYTES,
    MAX_OPEN_TURNS,
    MAX_TO_SERVER_BYTES,
    MESSAGE_BEAT,
    MESSAGE_CANCEL,
    MESSAGE_OPEN,
    MESSAGE_REPLY,
    Channel,
    MessageSplitter,
    with_length,
)
from eloquent.core.channel_client import ClientChannel
from eloquent.core.channel_server import ServerChannel
from eloquent.core.events import End, TextDelta
from eloquent.core.liveness import KEEPALIVE_S
from eloquent.core.log import TokenLog
from eloquent.core.padding import SIZES
from eloquent.core.receiver import Receiver
from eloquent.core.turns import (
    SLOW_READER_S,
    ReaderDone,
    TurnCancelled,
    TurnEvent,
    TurnFailed,
    TurnProgress,
    TurnRequested,
)
from eloquent.core.wire import (
    CONNECTION_WINDOW_BYTES,
    MAX_REQUEST_BODY_BYTES,
    READER_WINDOW_BYTES,
    Bundle,
    Report,
    Request,
    decode_frame,
    encode_bundle,
    encode_report,
    encode_request,
)
from eloquent.errors import IntegrityError, RequestError, WireError

REQUEST = Request(bytes(16), b"{}")


class Pair:
    """A client and a server whose messages arrive at once, and a clock."""

    def __init__(self, *, padding: bool = False) -> None:
        self.now = 0.0
        self.client = ClientChannel(self.now)
        self.server = ServerChannel(self.now, padding=padding)
        self.sent: list[tuple[str, bytes]] = []
        self.events: list[TurnEvent] = []

    def run(self, seconds: float = 0.0) -> None:
        """Exchange messages until nobody has any, and on until so much time has passed."""
        end = self.now + seconds
        while True:
            self.exchange()
            due = [t for t in (self.client.next_time(), self.server.next_time()) if t is not None]
            if not due or min(due) > end:
                break
            self.now = max(self.now, min(due))
        self.now = end

    def exchange(self) -> None:
        for _ in range(10_000):
            moved = self.move("up", self.client, self.server)
            if not self.move("down", self.server, self.client) and not moved:
                return
        raise AssertionError("they never stop")

    def move(self, way: str, sender: Channel, taker: Channel) -> bool:
        message = sender.next_message(self.now)
        if message is None:
            return False
        self.sent.append((way, message))
        taker.receive(message, self.now)
        for end in (sender, taker):
            while (event := end.next_event()) is not None:
                self.events.append(event)
        return True

    def ask(self, request: Request = REQUEST, receiver: Receiver | None = None) -> int:
        turn = self.client.request(request, receiver)
        self.run()
        return turn

    def accept(self, turn: int, log: TokenLog, offset: int = 0) -> None:
        self.server.accept(turn, log, offset)
        self.server.log_grew(turn, self.now)

    def of(self, kind: type[TurnEvent]) -> list[TurnEvent]:
        return [event for event in self.events if isinstance(event, kind)]

    def text(self, turn: int = 0) -> str:
        return "".join(
            item.text
            for event in self.events
            if isinstance(event, TurnProgress) and event.turn == turn
            for item in event.events
            if isinstance(item, TextDelta)
        )


def told(*texts: str, is_closed: bool = True) -> TokenLog:
    log = TokenLog()
    for text in texts:
        log.append(TextDelta(text))
    if is_closed:
        close(log)
    return log


def close(log: TokenLog) -> None:
    log.close("stop", model="m", prompt_tokens=1, completion_tokens=1)


# A turn.


def test_a_whole_turn() -> None:
    pair = Pair()
    turn = pair.ask()
    assert pair.of(TurnRequested) == [TurnRequested(turn, REQUEST)]
    log = told("Hello", is_closed=False)
    pair.accept(turn, log)
    pair.run()
    assert pair.text() == "Hello"
    log.append(TextDelta(" you"))
    close(log)
    pair.server.log_grew(turn, pair.now)
    pair.run(1.0)
    assert pair.text() == "Hello you"
    assert isinstance(pair.of(TurnProgress)[-1].events[-1], End)  # type: ignore[union-attr]
    assert pair.of(ReaderDone) == [ReaderDone(turn)]
    assert not pair.client.has_turn(turn)


def test_what_a_reader_reported_last_can_be_asked_while_it_is_there() -> None:
    pair = Pair()
    turn = pair.ask()
    log = told("Hello", is_closed=False)
    pair.accept(turn, log)
    assert pair.server.report(turn) is None
    pair.run(1.0)
    for text in (" you", " there"):
        report = pair.server.report(turn)
        assert report is not None
        assert (report.contiguous, report.unread) == (log.length, 0)
        log.append(TextDelta(text))
        pair.server.log_grew(turn, pair.now)
        pair.run(1.0)
    close(log)
    pair.server.log_grew(turn, pair.now)
    pair.run(1.0)
    assert pair.server.report(turn) is None


def test_no_byte_of_a_log_is_sent_twice_however_it_grows() -> None:
    pair = Pair()
    turn = pair.ask()
    log = TokenLog()
    pair.accept(turn, log)
    for index in range(50):
        log.append(TextDelta(f"{index} "))
        pair.server.log_grew(turn, pair.now)
        pair.run(0.03)
    close(log)
    pair.server.log_grew(turn, pair.now)
    pair.run(1.0)
    frames = [decode_frame(m) for way, m in pair.sent if way == "down" and m[0] < MESSAGE_OPEN]
    bundles = [frame for frame in frames if isinstance(frame, Bundle)]
    assert sum(len(bundle.data) for bundle in bundles) == log.length
    assert [bundle.number for bundle in bundles] == list(range(len(bundles)))
    assert pair.text() == "".join(f"{index} " for index in range(50))


def test_what_grew_while_the_transport_was_busy_leaves_in_one_bundle() -> None:
    pair = Pair()
    turn = pair.ask()
    log = TokenLog()
    pair.accept(turn, log)
    for _ in range(20):
        log.append(TextDelta("word "))
        pair.server.log_grew(turn, pair.now)
    message = pair.server.next_message(pair.now)
    assert message is not None
    bundle = decode_frame(message)
    assert isinstance(bundle, Bundle)
    assert len(bundle.data) == log.length
    assert pair.server.next_message(pair.now) is None


def test_a_turn_goes_on_at_an_offset() -> None:
    log = told("one ", "two ", is_closed=False)
    receiver = Receiver()
    receiver.on_bundle(Bundle(0, 0, 0, log.read(0, log.length)), 0.0)
    offset = receiver.contiguous
    log.append(TextDelta("three"))
    close(log)
    pair = Pair()
    turn = pair.ask(Request(bytes(16), b"", offset=offset), receiver)
    pair.accept(turn, log, offset)
    pair.run(1.0)
    assert pair.text() == "three"
    assert pair.of(ReaderDone) == [ReaderDone(turn)]


def test_a_rejected_turn_fails_with_its_code() -> None:
    pair = Pair()
    turn = pair.ask()
    pair.server.reject(turn, "unknown_model", "no such model")
    pair.run()
    (failed,) = pair.of(TurnFailed)
    assert isinstance(failed, TurnFailed)
    assert isinstance(failed.error, RequestError)
    assert failed.error.code == "unknown_model"
    assert not pair.client.has_turn(turn)
    assert all(message[0] != MESSAGE_CANCEL for _, message in pair.sent)


def test_a_cancel_stops_the_bundles() -> None:
    pair = Pair()
    turn = pair.ask()
    log = told("Hello", is_closed=False)
    pair.accept(turn, log)
    pair.run()
    pair.client.cancel(turn)
    pair.run()
    assert pair.of(TurnCancelled) == [TurnCancelled(turn)]
    log.append(TextDelta("more"))
    pair.server.log_grew(turn, pair.now)
    assert pair.server.next_message(pair.now) is None


def test_a_cancel_before_the_request_left_says_nothing() -> None:
    pair = Pair()
    turn = pair.client.request(REQUEST)
    pair.client.cancel(turn)
    pair.run()
    assert pair.sent == []


def test_turns_share_the_channel_in_rotation() -> None:
    pair = Pair()
    logs = [told("x" * (3 * MAX_BUNDLE_DATA_BYTES)) for _ in range(2)]
    turns = [pair.ask(Request(bytes(15) + bytes((index,)), b"{}")) for index in range(2)]
    for turn, log in zip(turns, logs, strict=True):
        pair.accept(turn, log)
    order = []
    for _ in range(6):
        message = pair.server.next_message(pair.now)
        assert message is not None
        order.append(message[1])
    assert order == [0, 1, 0, 1, 0, 1]


def test_an_answer_that_is_not_what_was_generated_fails_its_turn_alone() -> None:
    pair = Pair()
    turn = pair.ask()
    log = told("Hello")
    data = bytearray(log.read(0, log.length))
    data[3] ^= 1
    pair.client.receive(encode_bundle(Bundle(turn, 0, 0, bytes(data))), pair.now)
    pair.run()
    failed = pair.client.next_event() or pair.of(TurnFailed)[0]
    assert isinstance(failed, TurnFailed)
    assert isinstance(failed.error, IntegrityError)
    assert pair.of(TurnCancelled) == [TurnCancelled(turn)]


def test_padding_hides_the_lengths_of_tokens() -> None:
    sizes = []
    for length in (1, 20, 60):
        pair = Pair(padding=True)
        turn = pair.ask()
        log = told("x" * length, is_closed=False)
        pair.accept(turn, log)
        pair.run()
        assert pair.text() == "x" * length
        sizes.append(len(pair.sent[-1][1]))
    assert sizes == [SIZES[0]] * 3


def test_a_padded_answer_is_the_same_answer() -> None:
    pair = Pair(padding=True)
    texts = ["x" * size for size in (1, 100, 1000, 10_000, 100_000)]
    turn = pair.ask()
    pair.accept(turn, told(*texts))
    pair.run(1.0)
    assert pair.text() == "".join(texts)
    assert pair.of(ReaderDone) == [ReaderDone(turn)]


# Readers that do not read, and peers that say nothing.


def test_a_reader_that_takes_nothing_bounds_what_is_sent_and_is_told_in_the_end() -> None:
    pair = Pair()
    receiver = Receiver()
    receiver.on_taken(0)
    turn = pair.ask(REQUEST, receiver)
    log = told("x" * 100_000, "y" * 100_000, "z" * 100_000)
    pair.accept(turn, log)
    pair.run(SLOW_READER_S - 1)
    sent = sum(len(message) for way, message in pair.sent if way == "down")
    assert READER_WINDOW_BYTES < sent < READER_WINDOW_BYTES + 1000
    assert pair.of(TurnFailed) == []
    pair.run(2.0)
    (failed,) = pair.of(TurnFailed)
    assert isinstance(failed, TurnFailed)
    assert isinstance(failed.error, RequestError)
    assert failed.error.code == "slow_reader"
    assert pair.of(ReaderDone) == [ReaderDone(turn)]


def test_readers_that_take_nothing_are_bounded_together_and_hold_up_nobody() -> None:
    pair = Pair()
    idle = []
    for _ in range(20):
        receiver = Receiver()
        receiver.on_taken(0)
        idle.append(pair.ask(REQUEST, receiver))
        pair.accept(idle[-1], told("x" * 300_000))
    pair.run(1.0)
    sent = sum(len(message) for way, message in pair.sent if way == "down")
    assert 0.9 * CONNECTION_WINDOW_BYTES < sent < 1.2 * CONNECTION_WINDOW_BYTES
    receiver = Receiver()
    receiver.on_taken(0)
    eager = pair.ask(REQUEST, receiver)
    pair.accept(eager, told(*("y" * 1000 for _ in range(100))))
    for _ in range(100):
        pair.run(0.1)
        receiver.on_taken(receiver.contiguous)
    assert pair.text(eager) == "y" * 100_000
    pair.run(SLOW_READER_S)
    failed = {
        event.turn: event.error
        for event in pair.of(TurnFailed)
        if isinstance(event, TurnFailed) and isinstance(event.error, RequestError)
    }
    assert failed.keys() == set(idle)
    assert {error.code for error in failed.values()} == {"slow_reader"}


def test_a_reader_that_takes_what_comes_gets_more_than_the_window() -> None:
    pair = Pair()
    receiver = Receiver()
    receiver.on_taken(0)
    turn = pair.ask(REQUEST, receiver)
    log = told(*("x" * 100_000 for _ in range(10)))
    pair.accept(turn, log)
    for _ in range(100):
        pair.run(0.1)
        receiver.on_taken(receiver.contiguous)
    assert receiver.is_complete
    assert pair.of(ReaderDone) == [ReaderDone(turn)]


def test_while_a_turn_is_open_both_sides_hear_each_other() -> None:
    pair = Pair()
    turn = pair.ask()
    pair.accept(turn, TokenLog())
    pair.sent.clear()
    pair.run(10.0)
    for way in ("up", "down"):
        beats = [message for direction, message in pair.sent if direction == way]
        assert beats == [bytes((MESSAGE_BEAT,))] * int(10.0 / BEAT_S)


def test_without_turns_beats_are_few() -> None:
    pair = Pair()
    pair.run(4 * KEEPALIVE_S)
    assert len(pair.sent) == 8


def test_a_probe_is_answered_at_once() -> None:
    pair = Pair()
    pair.client.probe()
    pair.run()
    assert pair.sent == [("up", b"\x08"), ("down", b"\x08")]


# Limits, and what breaks the protocol.


def test_a_client_holds_back_turns_beyond_the_limit() -> None:
    pair = Pair()
    turns = [pair.client.request(REQUEST) for _ in range(MAX_OPEN_TURNS + 5)]
    pair.run()
    assert len(pair.of(TurnRequested)) == MAX_OPEN_TURNS
    for turn in turns[:3]:
        pair.server.reject(turn, "unknown_model", "")
    pair.client.cancel(turns[3])
    pair.run()
    assert len(pair.of(TurnRequested)) == MAX_OPEN_TURNS + 4


def opened(turn: int) -> bytes:
    return bytes((MESSAGE_OPEN, turn)) + encode_request(REQUEST)


def test_replies_that_nobody_takes_are_bounded() -> None:
    server = ServerChannel(0.0)
    with pytest.raises(WireError, match="turns are open"):  # noqa: PT012
        for turn in range(64):
            server.receive(opened(turn), 0.0)
            server.reject(turn, "unknown_model", "")
        for turn in range(64, 1000):
            number = (0x4000 | turn).to_bytes(2, "big")
            server.receive(bytes((MESSAGE_OPEN,)) + number + encode_request(REQUEST), 0.0)
            server.reject(turn, "unknown_model", "")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "malformed_request"),
        (b"\x09", "unsupported_version"),
        (encode_request(REQUEST)[:-1], "malformed_request"),
        (
            encode_request(Request(bytes(16), bytes(MAX_REQUEST_BODY_BYTES + 1))),
            "request_too_large",
        ),
    ],
)
def test_a_request_that_cannot_be_taken_is_rejected(data: bytes, code: str) -> None:
    server = ServerChannel(0.0)
    server.receive(bytes((MESSAGE_OPEN, 0)) + data, 0.0)
    reply = server.next_message(0.0)
    assert reply is not None
    assert reply[0] == MESSAGE_REPLY
    assert code.encode() in reply
    assert server.next_event() is None


def test_a_request_of_any_size_is_declined_and_the_channel_goes_on() -> None:
    client, server = ClientChannel(0.0), ServerChannel(0.0)
    turn = client.request(Request(bytes(16), bytes(5 * MAX_REQUEST_BODY_BYTES), key="k" * 256))
    message = client.next_message(0.0)
    assert message is not None
    assert len(message) <= MAX_TO_SERVER_BYTES
    server.receive(message, 0.0)
    reply = server.next_message(0.0)
    assert reply is not None
    client.receive(reply, 0.0)
    failed = client.next_event()
    assert isinstance(failed, TurnFailed)
    assert isinstance(failed.error, RequestError)
    assert (failed.turn, failed.error.code) == (turn, "request_too_large")


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x05",
        b"\x05\x40",
        b"\x07\x01",
        b"\x07\x00\x00",
        b"\x08\x00",
        b"\x09",
        b"\x00",
        opened(0),
        encode_bundle(Bundle(0, 0, 0, b"x")),
        encode_report(Report(1, 0, -1)),
        encode_report(Report(0, 1, -1)),
        encode_report(Report(0, 0, 0)),
        bytes((MESSAGE_REPLY, 0)),
        bytes((MESSAGE_OPEN, 1)) + bytes(MAX_REQUEST_BODY_BYTES + 1000),
    ],
    ids=lambda message: message[:8].hex() or "empty",
)
def test_a_server_refuses_what_breaks_the_protocol(message: bytes) -> None:
    server = ServerChannel(0.0)
    server.receive(opened(0), 0.0)
    server.accept(0, TokenLog())
    with pytest.raises(WireError):
        server.receive(message, 0.0)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x09",
        b"\x09\x05\x08",
        b"\x09\x00",
        b"\x09\x01\x09\x00",
        b"\x06",
        b"\x08\x00",
        b"\x05\x00",
        b"\x07\x00",
        encode_report(Report(0, 0, -1)),
    ],
)
def test_a_client_refuses_what_breaks_the_protocol(message: bytes) -> None:
    client = ClientChannel(0.0)
    with pytest.raises(WireError):
        client.receive(message, 0.0)


MESSAGES = st.one_of(
    st.binary(max_size=60),
    st.builds(
        lambda kind, turn, rest: bytes((kind, turn)) + rest,
        st.integers(1, 9),
        st.integers(0, 63),
        st.one_of(st.binary(max_size=20), st.just(encode_request(REQUEST))),
    ),
)


@given(st.lists(MESSAGES, max_size=30))
def test_arbitrary_bytes_give_documented_errors_only(messages: list[bytes]) -> None:
    for end in (ServerChannel(0.0), ClientChannel(0.0)):
        if isinstance(end, ClientChannel):
            end.request(REQUEST)
        try:
            for message in messages:
                end.receive(message, 0.0)
                while (event := end.next_event()) is not None:
                    if isinstance(event, TurnRequested):
                        assert isinstance(end, ServerChannel)
                        end.accept(event.turn, told("x"))
                        end.log_grew(event.turn, 0.0)
        except WireError:
            pass
        for _ in range(200):
            if end.next_message(0.0) is None:
                break
        else:
            pytest.fail("it never stops talking")


@given(st.lists(st.text(max_size=30), max_size=20), st.lists(st.integers(0, 19), max_size=5))
def test_whatever_the_order_of_growth_and_exchange_all_comes_once(
    texts: list[str], pauses: list[int]
) -> None:
    pair = Pair()
    turn = pair.ask()
    log = TokenLog()
    pair.accept(turn, log)
    for index, text in enumerate(texts):
        if text:
            log.append(TextDelta(text))
        pair.server.log_grew(turn, pair.now)
        if index in pauses:
            pair.run(0.1)
    close(log)
    pair.server.log_grew(turn, pair.now)
    pair.run(1.0)
    assert pair.text() == "".join(texts)
    assert not pair.client.has_turn(turn)


# Messages in a stream's bytes.


@given(st.lists(st.binary(max_size=100), max_size=10), st.integers(1, 50))
def test_messages_are_found_however_the_stream_is_cut(messages: list[bytes], size: int) -> None:
    stream = b"".join(with_length(message) for message in messages)
    splitter = MessageSplitter(100)
    found = []
    for start in range(0, len(stream), size):
        found += splitter.feed(stream[start : start + size])
    assert found == messages


def test_a_message_that_is_too_long_is_refused_before_it_has_come() -> None:
    splitter = MessageSplitter(100)
    with pytest.raises(WireError):
        splitter.feed(with_length(bytes(101))[:2])
