"""Fails, naming what changed, when an aioquic release changes what `_aioquic` relies on."""

import inspect
import re

import pytest
from aioquic.buffer import Buffer  # type: ignore[attr-defined]
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import (
    NON_ACK_ELICITING_FRAME_TYPES,
    NON_IN_FLIGHT_FRAME_TYPES,
    QuicFrameType,
    pull_quic_transport_parameters,
)
from aioquic.quic.packet_builder import QuicPacketBuilder, QuicSentPacket
from aioquic.quic.recovery import QuicPacketRecovery, QuicPacketSpace

from eloquent.quic import _quiet
from eloquent.quic._aioquic import MAX_ACK_DELAY_S, LateBoundConnection
from eloquent.quic._streams import repeat_stop, unsent_bytes
from eloquent.quic.client import client_configuration

USED_ATTRIBUTES = (
    "_ack_delay",
    "_crypto_buffers",
    "_datagrams_pending",
    "_handshake_confirmed",
    "_local_ack_delay_exponent",
    "_loss",
    "_max_datagram_size",
    "_network_paths",
    "_pacing_at",
    "_packet_number",
    "_quic_logger",
    "_remote_max_datagram_frame_size",
)
USED_RECOVERY_ATTRIBUTES = (
    "_cc",
    "_pacer",
    "_pto_count",
    "_rtt_first_sample_time",
    "_rtt_initial",
    "_rtt_initialized",
    "_rtt_latest",
    "_rtt_min",
    "_rtt_smoothed",
    "_rtt_variance",
    "_time_of_last_sent_ack_eliciting_packet",
)
USED_SPACE_ATTRIBUTES = (
    "ack_at",
    "is_application_data",
    "largest_acked_packet",
    "largest_received_packet",
    "loss_time",
    "sent_packets",
)
USED_BUILDER_PARTS = (
    "remaining_buffer_space",
    "remaining_flight_space",
    "packet_number",
    "start_frame",
)


def quic_source(method: str) -> str:
    return inspect.getsource(getattr(QuicConnection, method))


class NoDatagrams:
    def has_datagram(self, now: float) -> bool:
        return False

    def next_datagram(self, now: float, room: int) -> None:
        return None

    def on_delivery(self, token: object, *, acked: bool) -> None:
        raise AssertionError("nothing was sent")


def stock_connection() -> QuicConnection:
    return QuicConnection(configuration=client_configuration("localhost", pin=None))


@pytest.mark.parametrize("name", USED_ATTRIBUTES)
def test_a_connection_has_the_attribute(name: str) -> None:
    assert hasattr(stock_connection(), name), f"aioquic's QuicConnection lost {name}"


@pytest.mark.parametrize("name", USED_RECOVERY_ATTRIBUTES)
def test_loss_recovery_has_the_attribute(name: str) -> None:
    assert hasattr(stock_connection()._loss, name), f"aioquic's QuicPacketRecovery lost {name}"


@pytest.mark.parametrize("name", USED_BUILDER_PARTS)
def test_the_packet_builder_has_the_part(name: str) -> None:
    assert hasattr(QuicPacketBuilder, name), f"aioquic's QuicPacketBuilder lost {name}"


def test_what_tls_wrote_is_taken_from_its_buffers_before_the_handshake_is_confirmed() -> None:
    source = quic_source("_handle_crypto_frame")
    taken, confirmed = "self._push_crypto_data()", "self._confirm_handshake()"
    assert source.index(taken) < source.index(confirmed)


def test_datagrams_are_written_the_way_that_we_override() -> None:
    source = quic_source("_write_application")
    for used in (
        "while self._datagrams_pending:",
        "self._write_datagram_frame(",
        "data=self._datagrams_pending[0]",
        "self._datagrams_pending.popleft()",
        "except QuicPacketBuilderStop:",
        "self._loss._pacer.next_send_time(now=now)",
        "self._loss._pacer.update_after_send(now=now)",
    ):
        assert used in source, f"aioquic's _write_application has no {used!r} any more"


def test_the_overridden_methods_have_the_signatures_that_we_know() -> None:
    known = {
        "_write_datagram_frame": ["self", "builder", "data", "frame_type"],
        "_write_application": ["self", "builder", "network_path", "now"],
        "datagrams_to_send": ["self", "now"],
        "_payload_received": ["self", "context", "plain", "crypto_frame_required"],
        "_write_ack_frame": ["self", "builder", "space", "now"],
        "_flush_builder": ["self", "builder", "network_path", "peer_cid", "now"],
        "_handle_ack_frame": ["self", "context", "frame_type", "buf"],
    }
    for method, parameters in known.items():
        found = list(inspect.signature(getattr(QuicConnection, method)).parameters)
        assert found == parameters, f"aioquic changed {method}: {found}"


def test_an_ack_is_written_the_way_that_we_write_one_with_counts() -> None:
    source = quic_source("_write_ack_frame")
    for used in (
        "ack_delay = now - space.largest_received_time",
        "int(ack_delay * 1000000) >> self._local_ack_delay_exponent",
        "capacity=ACK_FRAME_CAPACITY",
        "handler=self._on_ack_delivery",
        "handler_args=(space, space.largest_received_packet)",
        "space.ack_at = None",
        "if ranges > 1 and builder.packet_number % 8 == 0:",
    ):
        assert used in source, f"aioquic's _write_ack_frame has no {used!r} any more"


def test_counts_of_an_ack_are_read_past_and_dropped() -> None:
    source = quic_source("_handle_ack_frame")
    assert source.count("buf.pull_uint_var()") == 3, "aioquic reads ACK_ECN in another way"
    assert "pull_ack_frame(buf)" in source


def test_sent_packets_are_kept_in_order_with_what_ecn_reads_of_them() -> None:
    space = QuicPacketSpace()
    assert space.sent_packets == {}
    assert space.largest_acked_packet == 0
    packet = inspect.signature(QuicSentPacket).parameters
    assert {"packet_number", "sent_bytes", "delivery_handlers"} <= set(packet)


def test_delivery_handlers_are_told_acknowledgement_and_loss() -> None:
    parameters = inspect.signature(QuicPacketBuilder.start_frame).parameters
    assert {"capacity", "handler", "handler_args"} <= set(parameters)


def test_padding_is_in_flight_and_asks_for_no_acknowledgement() -> None:
    assert QuicFrameType.PADDING in NON_ACK_ELICITING_FRAME_TYPES
    assert QuicFrameType.PADDING not in NON_IN_FLIGHT_FRAME_TYPES


def test_a_received_datagram_is_logged_last_and_its_event_follows_at_once() -> None:
    found = list(inspect.signature(QuicConnection._handle_datagram_frame).parameters)
    assert found == ["self", "context", "frame_type", "buf"]
    source = quic_source("_handle_datagram_frame")
    assert source.count("quic_logger_frames.append(") == 1, source
    assert source.endswith("self._events.append(events.DatagramFrameReceived(data=data))\n"), source


def test_the_pacer_is_fed_the_way_that_ours_expects() -> None:
    connection = LateBoundConnection(
        configuration=client_configuration("localhost", pin=None), source=NoDatagrams()
    )
    pacer = connection._loss._pacer
    assert pacer.next_send_time(1.0) is None
    pacer.update_rate(congestion_window=12_000, smoothed_rtt=0.1)
    assert pacer.next_send_time(1.0) is None


def test_what_roaming_uses_is_there() -> None:
    connection = stock_connection()
    for name in (
        *("_network_paths", "_host_cids", "_peer_cid", "_is_client", "_max_datagram_size"),
        *("_state", "_close_event", "_close_end", "_send_probe", "_replenish_connection_ids"),
    ):
        assert hasattr(connection, name), f"aioquic's QuicConnection lost {name}"
    for name in ("_rtt_min", "_pto_count", "_cc"):
        assert hasattr(connection._loss, name), f"aioquic's QuicPacketRecovery lost {name}"
    assert hasattr(connection._host_cids[0], "stateless_reset_token")
    assert hasattr(connection._host_cids[0], "was_sent")
    assert "self._write_ping_frame(builder, comment=" in quic_source("_write_application")
    assert "if self._probe_pending" in quic_source("_write_application")


def test_a_stream_tells_what_was_written_and_not_sent() -> None:
    connection = stock_connection()
    assert unsent_bytes(connection, 0) == 0
    connection.send_stream_data(0, bytes(1000))
    assert unsent_bytes(connection, 0) == 1000
    connection._streams[0].sender.get_frame(300)
    assert unsent_bytes(connection, 0) == 700


def test_a_stop_can_be_said_again() -> None:
    connection = stock_connection()
    assert not repeat_stop(connection, 0)
    connection.send_stream_data(0, b"a request", end_stream=True)
    connection.stop_stream(0, 1)
    receiver = connection._streams[0].receiver
    receiver.get_stop_frame()
    assert not receiver.stop_pending
    assert repeat_stop(connection, 0)
    assert receiver.stop_pending
    receiver.is_finished = True
    assert not repeat_stop(connection, 0)


def test_packets_can_be_taken_for_lost() -> None:
    connection = stock_connection()
    parameters = inspect.signature(connection._loss._on_packets_lost).parameters
    assert {"congestion_event", "now", "packets", "space"} <= set(parameters)
    assert "max_datagram_size=self._max_datagram_size" in quic_source("datagrams_to_send")


def test_what_early_data_needs_is_there() -> None:
    connection = stock_connection()
    assert hasattr(connection, "_cryptos")
    for used in ("session_resumed=self.tls.session_resumed", "early_data_accepted=self.tls."):
        assert used in quic_source("_handle_crypto_frame"), f"aioquic lost {used!r}"
    fields = QuicSentPacket.__dataclass_fields__
    assert {"packet_type", "sent_bytes", "delivery_handlers", "is_ack_eliciting"} <= set(fields)


@pytest.mark.parametrize("name", USED_SPACE_ATTRIBUTES)
def test_a_packet_space_has_the_attribute(name: str) -> None:
    assert hasattr(QuicPacketSpace(), name), f"aioquic's QuicPacketSpace lost {name}"


def test_loss_recovery_calls_the_methods_that_we_override() -> None:
    known = {
        "on_packet_sent": ["self", "packet", "space"],
        "on_ack_received": ["self", "ack_rangeset", "ack_delay", "now", "space"],
        "get_loss_detection_time": ["self", "amplification_limited"],
        "_detect_loss": ["self", "now", "space"],
        "_get_loss_space": ["self"],
        "_on_packets_lost": [
            "self",
            "congestion_event",
            "now",
            "packets",
            "persistent_congestion",
            "space",
        ],
    }
    for method, parameters in known.items():
        found = list(inspect.signature(getattr(QuicPacketRecovery, method)).parameters)
        assert found == parameters, f"aioquic changed {method}: {found}"
    source = inspect.getsource(QuicPacketRecovery.on_ack_received)
    assert "self._detect_loss(now=now, space=space)" in source


def test_the_peer_is_told_how_long_we_delay_acknowledgements() -> None:
    connection = LateBoundConnection(
        configuration=client_configuration("localhost", pin=None), source=NoDatagrams()
    )
    connection._version = 1
    parameters = pull_quic_transport_parameters(
        Buffer(data=connection._serialize_transport_parameters())
    )
    assert parameters.max_ack_delay == 1000 * MAX_ACK_DELAY_S
    assert "max_ack_delay=25" in quic_source("_serialize_transport_parameters")


def test_all_that_is_written_is_what_is_quiet_looks_at() -> None:
    """The frames of a packet in `_write_application`'s order, and what announces each."""
    written = re.findall(r"self\._write_(\w+)(?:_frame)?\(", quic_source("_write_application"))
    assert written == [
        "ack_frame",
        "path_challenge_frame",
        "handshake_done_frame",
        "path_response_frame",
        "new_connection_id_frame",
        "retire_connection_id_frame",
        "streams_blocked_frame",
        "streams_blocked_frame",
        "connection_limits",
        "stream_limits",
        "ping_frame",
        "ping_frame",
        "crypto_frame",
        "datagram_frame",
        "stop_sending_frame",
        "reset_stream_frame",
        "stream_frame",
    ]
    looked_at = set(re.findall(r"quic\.(_\w+)", inspect.getsource(_quiet)))
    missing = [name for name in looked_at if not hasattr(stock_connection(), name)]
    assert not missing, f"aioquic no longer has {missing}"
