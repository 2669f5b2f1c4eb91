"""Both real QUIC ends in virtual time: late binding, delivery, cancel, errors, rude peers."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from eloquent.core.events import End, TextDelta
from eloquent.core.log import TokenLog
from eloquent.core.path import UNKNOWN_COPIES
from eloquent.core.schemes import scheme
from eloquent.core.turns import TurnCancelled, TurnFailed, TurnProgress, TurnRequested
from eloquent.core.wire import (
    MAX_REQUEST_BODY_BYTES,
    Report,
    Request,
    encode_report,
    encode_request,
)
from eloquent.errors import IntegrityError, RequestError
from eloquent.quic._aioquic import Datagram
from eloquent.quic.client import CANCEL_AGAIN_S
from eloquent.quic.connection import (
    CLOSE_PROTOCOL_ERROR,
    STREAM_CANCELLED,
    Connected,
    ConnectionEnded,
    ConnectionEvent,
)
from eloquent.quic.server import MAX_STREAM_BYTES
from eloquent_netem.lab.pair import QuicPair
from eloquent_netem.link import Link
from eloquent_netem.loss import DropList, Loss, NoLoss, Outages
from eloquent_netem.sim import simulate

START_S = 1.0
BODY = b'{"messages":[]}'
TURN_ID = bytes(range(16))


class CutOff:
    """Loses everything until a time that the test sets."""

    def __init__(self) -> None:
        self.until_s = float("-inf")

    def drops(self, now: float) -> bool:
        return now < self.until_s

    def passes_from(self, now: float) -> float:
        return max(now, self.until_s)


class World:
    """A connected pair with everything that happened on it."""

    def __init__(
        self, *, scheme_name: str = "eloquent", up: Loss | None = None, down: Loss | None = None
    ) -> None:
        self.client_events: list[ConnectionEvent] = []
        self.server_events: list[ConnectionEvent] = []
        self.now = START_S
        self.links = [
            Link(delay_s=0.05, seed=0, name=name, loss=NoLoss() if loss is None else loss)
            for name, loss in (("up", up), ("down", down))
        ]
        self.pair = QuicPair(
            up=self.links[0],
            down=self.links[1],
            make_sender=scheme(scheme_name),
            on_client_event=lambda event, now: self.client_events.append(event),
            on_server_event=lambda event, now: self.server_events.append(event),
        )
        self.pair.connect(self.now)
        self.until(lambda: self.client(Connected) != [])

    def client(self, kind: type) -> list[Any]:
        return [event for event in self.client_events if isinstance(event, kind)]

    def server(self, kind: type) -> list[Any]:
        return [event for event in self.server_events if isinstance(event, kind)]

    def until(self, reached: Callable[[], bool], limit_s: float = 120.0) -> None:
        self.now = simulate(
            self.pair.actors, until=reached, start_s=self.now, limit_s=self.now + limit_s
        )

    def wait(self, seconds: float) -> None:
        end = self.now + seconds
        clock = _Alarm(end)
        self.now = simulate(
            (*self.pair.actors, clock), until=lambda: clock.rang, start_s=self.now, limit_s=end + 1
        )

    def ask(self, raw: bytes | None = None, *, is_whole: bool = True) -> int:
        """Open a turn, with any bytes in place of a request; return its number."""
        if raw is None:
            return self.pair.request(BODY, self.now)
        quic = self.pair.client.quic
        stream_id = quic.get_next_available_stream_id()
        turn = self.pair.client.request(Request(TURN_ID, b""))
        stream = quic._streams[stream_id]
        stream.sender.__init__(stream_id, True)  # replace what `request` wrote
        quic.send_stream_data(stream_id, raw, end_stream=is_whole)
        self.pair.flush(self.now)
        return turn

    def accepted_turn(self) -> tuple[int, TokenLog]:
        turn = self.ask()
        known = len(self.server(TurnRequested))
        self.until(lambda: len(self.server(TurnRequested)) > known)
        log = TokenLog()
        self.pair.accept(turn, log)
        return turn, log

    def append(self, turn: int, log: TokenLog, text: str) -> None:
        log.append(TextDelta(text))
        self.pair.server.log_grew(turn, self.now)
        self.pair.flush(self.now)

    def close_log(self, turn: int, log: TokenLog) -> None:
        log.close("stop", model="m", prompt_tokens=1, completion_tokens=2)
        self.pair.server.log_grew(turn, self.now)
        self.pair.flush(self.now)

    def text(self, turn: int) -> str:
        return "".join(
            item.text
            for event in self.client(TurnProgress)
            if event.turn == turn
            for item in event.events
            if isinstance(item, TextDelta)
        )

    def has_ended(self, turn: int) -> bool:
        return any(
            isinstance(item, End)
            for event in self.client(TurnProgress)
            if event.turn == turn
            for item in event.events
        )


class _Alarm:
    def __init__(self, at: float) -> None:
        self._at: float | None = at
        self.rang = False

    def next_time(self) -> float | None:
        return self._at

    def act(self, now: float) -> None:
        self.rang, self._at = True, None


def test_connections_keep_no_buffers_of_the_handshake() -> None:
    world = World()
    turn, log = world.accepted_turn()
    world.append(turn, log, "hello")
    world.until(lambda: world.text(turn) == "hello")
    for end in (world.pair.client, world.pair.server):
        kept = end.quic._crypto_buffers.values()
        assert sum(buffer.capacity for buffer in kept) <= 3


def test_a_request_reaches_the_server_whole() -> None:
    world = World()
    turn = world.ask()
    world.until(lambda: world.server(TurnRequested) != [])
    assert world.server(TurnRequested) == [TurnRequested(turn, Request(bytes(16), BODY))]


def test_tokens_arrive_one_delay_after_they_are_made_and_the_end_follows() -> None:
    world = World()
    turn, log = world.accepted_turn()
    made_at = world.now
    world.append(turn, log, "Hello")
    world.until(lambda: world.text(turn) == "Hello")
    assert world.now == pytest.approx(made_at + 0.05)
    world.close_log(turn, log)
    world.until(lambda: world.has_ended(turn))


def test_a_readers_newest_report_can_be_asked_whatever_comes_late() -> None:
    world = World()
    turn, log = world.accepted_turn()
    assert world.pair.server.report(turn) is None
    world.append(turn, log, "Hello")
    world.wait(1.0)
    report = world.pair.server.report(turn)
    assert report is not None
    assert (report.contiguous, report.unread) == (log.length, 0)
    for late in (Report(turn, 0, -1), Report(turn, log.length, 0, unread=5)):
        world.pair.server._on_frame(late, world.now)
        assert world.pair.server.report(turn) == report
    world.pair.server.reject(turn, "code", "why")
    assert world.pair.server.report(turn) is None


def test_two_turns_share_a_connection() -> None:
    world = World()
    first, first_log = world.accepted_turn()
    second, second_log = world.accepted_turn()
    for index in range(20):
        world.append(first, first_log, f"a{index} ")
        world.append(second, second_log, f"b{index} ")
    world.close_log(first, first_log)
    world.close_log(second, second_log)
    world.until(lambda: world.has_ended(first) and world.has_ended(second))
    assert world.text(first) == "".join(f"a{index} " for index in range(20))
    assert world.text(second) == "".join(f"b{index} " for index in range(20))


def test_the_contents_of_a_bundle_are_chosen_when_its_packet_is_written() -> None:
    world = World()
    turn, log = world.accepted_turn()
    quic = world.pair.server.quic
    window = quic._loss._cc.congestion_window
    quic._loss._cc.congestion_window = 0  # nothing can leave
    for index in range(30):
        world.append(turn, log, f"token {index:3d} ")
    sent = world.links[1].packets_sent
    quic._loss._cc.congestion_window = window
    world.pair.flush(world.now)
    assert world.links[1].packets_sent == sent + 1  # one packet has them all, none queued before
    world.until(lambda: world.text(turn).endswith("token  29 "))
    assert world.text(turn) == "".join(f"token {index:3d} " for index in range(30))


@pytest.mark.parametrize("scheme_name", ["eloquent", "eloquent-queued", "duplicate", "retransmit"])
def test_a_log_of_many_packets_never_makes_one_too_large(scheme_name: str) -> None:
    world = World(scheme_name=scheme_name)
    turn, log = world.accepted_turn()
    world.append(turn, log, "x" * 50_000)
    world.close_log(turn, log)
    world.until(lambda: world.has_ended(turn))
    assert world.text(turn) == "x" * 50_000


@pytest.mark.parametrize("lost", range(12))
@pytest.mark.parametrize("scheme_name", ["eloquent", "eloquent-queued", "duplicate", "retransmit"])
def test_one_downlink_packet_is_lost(scheme_name: str, lost: int) -> None:
    world = World(scheme_name=scheme_name, down=DropList([lost]))
    turn, log = world.accepted_turn()
    for index in range(5):
        world.append(turn, log, f"{index} ")
        world.wait(0.03)
    world.close_log(turn, log)
    world.until(lambda: world.has_ended(turn))
    assert world.text(turn) == "0 1 2 3 4 "


@pytest.mark.parametrize("lost", range(12))
def test_one_uplink_packet_is_lost(lost: int) -> None:
    world = World(up=DropList([lost]))
    turn, log = world.accepted_turn()
    for index in range(5):
        world.append(turn, log, f"{index} ")
        world.wait(0.03)
    world.close_log(turn, log)
    world.until(lambda: world.has_ended(turn))
    assert world.text(turn) == "0 1 2 3 4 "


def test_the_last_bundle_is_repeated_until_it_is_acknowledged() -> None:
    world = World(down=Outages([(2.0, 5.0)], NoLoss()))
    turn, log = world.accepted_turn()
    world.append(turn, log, "early")
    world.wait(2.2 - world.now)
    world.append(turn, log, " late")
    world.close_log(turn, log)
    world.until(lambda: world.has_ended(turn))
    assert world.text(turn) == "early late"
    assert world.now < 6.0  # the beat is capped: well under a second after the link's return


def test_the_server_forgets_a_turn_that_the_reader_has() -> None:
    world = World()
    turn, log = world.accepted_turn()
    world.append(turn, log, "all")
    world.close_log(turn, log)
    world.until(lambda: world.has_ended(turn))
    world.wait(1.0)
    assert world.pair.server.sender(turn) is None
    assert not world.pair.client.has_turn(turn)


def test_cancel_reaches_the_server_and_stops_the_bundles() -> None:
    world = World()
    turn, log = world.accepted_turn()
    world.append(turn, log, "some")
    world.until(lambda: world.text(turn) == "some")
    cancelled_at = world.now
    world.pair.client.cancel(turn)
    world.pair.flush(world.now)
    world.until(lambda: world.server(TurnCancelled) == [TurnCancelled(turn)])
    assert world.now <= cancelled_at + 0.05 + 0.005  # half a round trip, and 5 ms
    assert world.pair.server.sender(turn) is None
    world.append(turn, log, " more")
    world.wait(1.0)
    assert world.text(turn) == "some"


@pytest.mark.parametrize(("lost", "after_s"), [(1, 0.003), (2, 0.03), (3, 0.1)])
def test_a_cancel_whose_packets_are_lost_is_said_again(lost: int, after_s: float) -> None:
    loss = CutOff()
    world = World(up=loss)
    turn, log = world.accepted_turn()
    world.append(turn, log, "some")
    world.until(lambda: world.text(turn) == "some")
    world.wait(1.0)
    cancelled_at = world.now
    loss.until_s = cancelled_at + (0.0, *CANCEL_AGAIN_S)[lost] - 1e-4
    world.pair.client.cancel(turn)
    world.pair.flush(world.now)
    world.until(lambda: world.server(TurnCancelled) != [])
    assert world.now == pytest.approx(cancelled_at + after_s + 0.05, abs=0.002)


def test_a_cancelled_turn_may_still_be_closed_by_the_application() -> None:
    world = World()
    turn, log = world.accepted_turn()
    world.pair.client.cancel(turn)
    world.pair.flush(world.now)
    world.until(lambda: world.server(TurnCancelled) != [])
    world.close_log(turn, log)
    world.wait(0.5)
    assert not world.pair.server.is_ended


def test_a_rejected_turn_fails_with_its_reason() -> None:
    world = World()
    turn = world.ask()
    world.until(lambda: world.server(TurnRequested) != [])
    world.pair.server.reject(turn, "unknown_model", "No such model.")
    world.pair.flush(world.now)
    world.until(lambda: world.client(TurnFailed) != [])
    error = world.client(TurnFailed)[0].error
    assert isinstance(error, RequestError)
    assert (error.code, error.message) == ("unknown_model", "No such model.")


def test_a_turn_that_the_server_gives_up_in_mid_answer_fails_with_its_reason() -> None:
    world = World()
    turn, log = world.accepted_turn()
    world.append(turn, log, "half")
    world.pair.server.reject(turn, "not_stored", "The disk is full.")
    world.pair.flush(world.now)
    world.until(lambda: world.client(TurnFailed) != [])
    error = world.client(TurnFailed)[0].error
    assert isinstance(error, RequestError)
    assert error.code == "not_stored"
    assert world.pair.server.sender(turn) is None


@pytest.mark.parametrize("raw", [encode_request(Request(TURN_ID, BODY)), b"no request"])
def test_a_cancel_that_overtakes_its_request_stops_it(raw: bytes) -> None:
    world = World()
    good, log = world.accepted_turn()
    client = world.pair.client
    stream_id = client.quic.get_next_available_stream_id()
    client.quic.send_stream_data(stream_id, b"")
    client.quic.stop_stream(stream_id, STREAM_CANCELLED)
    world.pair.flush(world.now)
    world.wait(0.2)
    client.quic.send_stream_data(stream_id, raw, end_stream=True)
    world.pair.flush(world.now)
    world.append(good, log, "unharmed")
    world.until(lambda: world.text(good) == "unharmed")
    world.wait(1.0)
    assert len(world.server(TurnRequested)) == 1


def test_a_cancel_that_overtakes_its_resume_stops_the_turn_that_runs() -> None:
    world = World()
    client = world.pair.client
    stream_id = client.quic.get_next_available_stream_id()
    client.quic.send_stream_data(stream_id, b"")
    client.quic.stop_stream(stream_id, STREAM_CANCELLED)
    world.pair.flush(world.now)
    world.wait(0.2)
    resume = Request(TURN_ID, b"", offset=6)
    client.quic.send_stream_data(stream_id, encode_request(resume), end_stream=True)
    world.pair.flush(world.now)
    world.until(lambda: world.server(TurnCancelled) != [])
    assert [event.request for event in world.server(TurnRequested)] == [resume]


def test_an_application_that_answers_a_cancelled_turn_is_not_heard() -> None:
    world = World()
    turns = [world.ask(), world.ask()]
    world.until(lambda: len(world.server(TurnRequested)) == 2)
    for turn in turns:
        world.pair.client.cancel(turn)
    world.pair.flush(world.now)
    world.until(lambda: len(world.server(TurnCancelled)) == 2)
    world.pair.server.reject(turns[0], "invalid_request", "Too late.")
    world.pair.accept(turns[1], TokenLog())
    assert world.pair.server.sender(turns[1]) is None


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "malformed_request"),
        (b"\x02short", "malformed_request"),
        (encode_request(Request(TURN_ID, BODY))[:-1], "malformed_request"),
        (encode_request(Request(TURN_ID, BODY)) + b"x", "malformed_request"),
        (encode_request(Request(TURN_ID, BODY)) * 2, "malformed_request"),
        (encode_request(Request(TURN_ID, BODY), version=7), "unsupported_version"),
        (bytes(MAX_STREAM_BYTES + 1), "request_too_large"),
        (
            encode_request(Request(TURN_ID, bytes(MAX_REQUEST_BODY_BYTES + 1))),
            "request_too_large",
        ),
    ],
    ids=[
        *("empty", "short", "cut", "trailing", "second request", "version 7"),
        *("too large", "one byte too large"),
    ],
)
def test_a_bad_request_is_declined_by_name_and_hurts_no_other_turn(raw: bytes, code: str) -> None:
    world = World()
    good, log = world.accepted_turn()
    world.ask(raw)
    world.until(lambda: world.client(TurnFailed) != [])
    error = world.client(TurnFailed)[0].error
    assert isinstance(error, RequestError)
    assert error.code == code
    world.append(good, log, "unharmed")
    world.until(lambda: world.text(good) == "unharmed")


def test_requests_that_are_begun_and_not_finished_have_little_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("eloquent.quic.server.MAX_UNFINISHED_BYTES", 10_000)
    world = World()
    good, log = world.accepted_turn()
    raw = encode_request(Request(TURN_ID, bytes(5_000)))
    for _ in range(3):
        world.ask(raw[:4_000], is_whole=False)
    world.until(lambda: world.client(TurnFailed) != [])
    (failed,) = world.client(TurnFailed)
    assert isinstance(failed.error, RequestError)
    assert (failed.error.code, failed.error.retry_after_s) == ("overloaded", 1.0)
    assert sum(map(len, world.pair.server._requests.values())) <= 10_000
    world.append(good, log, "unharmed")
    world.until(lambda: world.text(good) == "unharmed")
    others = [turn for turn in (good + 1, good + 2, good + 3) if turn != failed.turn]
    for turn in others:
        world.pair.client.quic.send_stream_data(4 * turn, raw[4_000:], end_stream=True)
    world.pair.flush(world.now)
    world.until(lambda: len(world.server(TurnRequested)) == 1 + len(others))


def rude_datagram(payload: bytes) -> World:
    """Let the client send a datagram of its own making; return the world after the close."""
    world = World()
    world.accepted_turn()
    client = world.pair.client
    is_sent = False

    def next_datagram(now: float, room: int) -> Datagram | None:
        nonlocal is_sent
        if is_sent:
            return None
        is_sent = True
        return Datagram(payload, (0, Report(0, 0, -1)))

    client.has_datagram = lambda now: not is_sent  # type: ignore[method-assign]
    client.next_datagram = next_datagram  # type: ignore[method-assign]
    world.pair.flush(world.now)
    world.until(lambda: world.client(ConnectionEnded) != [])
    return world


@pytest.mark.parametrize(
    "payload",
    [
        b"\x00",
        b"\x3f",
        b"\x01\x00\x00\x00x",
        encode_report(Report(0, 1, -1)),
        encode_report(Report(0, 0, 0)),
        encode_report(Report(40, 0, -1)),
    ],
    ids=["type 0", "type 63", "bundle", "unsent byte", "unsent bundle", "turn never opened"],
)
def test_a_broken_frame_ends_the_connection_and_says_why(payload: bytes) -> None:
    world = rude_datagram(payload)
    ended = world.client(ConnectionEnded)[0]
    assert ended.by_peer_error
    assert ended.reason
    close = world.pair.server.quic._close_event
    assert close is not None
    assert close.error_code == CLOSE_PROTOCOL_ERROR


def test_a_log_that_is_not_what_the_server_confirms_fails_the_turn() -> None:
    world = World()
    turn, log = world.accepted_turn()
    log.append(TextDelta("true"))
    log._bytes[2:6] = b"fals"
    world.close_log(turn, log)
    world.until(lambda: world.client(TurnFailed) != [])
    assert isinstance(world.client(TurnFailed)[0].error, IntegrityError)
    assert not world.has_ended(turn)


def test_a_client_that_vanishes_is_forgotten_after_the_idle_timeout() -> None:
    world = World(up=Outages([(1.5, 1e9)], NoLoss()))
    turn, log = world.accepted_turn()
    world.wait(2.0 - world.now)
    world.append(turn, log, "anyone?")
    world.until(lambda: world.server(ConnectionEnded) != [], limit_s=200.0)
    assert world.server(ConnectionEnded)[0].reason == "Idle timeout"
    assert not world.server(ConnectionEnded)[0].by_peer_error


def test_a_quiet_connection_is_kept_alive() -> None:
    world = World()
    world.wait(200.0)
    turn, log = world.accepted_turn()
    world.append(turn, log, "still here")
    world.until(lambda: world.text(turn) == "still here")
    assert not world.pair.client.is_ended


def test_no_loss_means_no_repeats_once_the_path_is_known() -> None:
    world = World()
    turn, log = world.accepted_turn()
    world.wait(1.0)
    for index in range(50):
        world.append(turn, log, json.dumps(index))
        world.wait(0.03)
    sender = world.pair.server.sender(turn)
    assert sender is not None
    assert sender.bundles_sent == 50 + UNKNOWN_COPIES


def test_the_two_copies_of_a_bundle_leave_in_two_packets() -> None:
    world = World(scheme_name="duplicate")
    turn, log = world.accepted_turn()
    world.wait(1.0)
    sent = world.links[1].packets_sent
    world.append(turn, log, "twice")
    assert world.links[1].packets_sent == sent + 2


def test_a_long_reason_is_cut_to_what_a_reply_may_hold() -> None:
    world = World()
    turn = world.ask()
    world.until(lambda: world.server(TurnRequested) != [])
    world.pair.server.reject(turn, "unknown_model", "🙂" * 300_000)
    world.pair.flush(world.now)
    world.until(lambda: world.client(TurnFailed) != [])
    assert world.client(TurnFailed)[0].error.code == "unknown_model"
    assert world.client(TurnFailed)[0].error.message.startswith("🙂🙂")
    assert world.client(ConnectionEnded) == []
