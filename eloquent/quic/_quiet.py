"""Whether aioquic has anything to send: asking it to write costs much even if it has not.

Most packets that a server gets are acknowledgements, and nothing is due when they come. Touches
aioquic's internals (checked with 1.7.2): what `_write_application` looks at, in its order.
"""

from aioquic.quic.connection import QuicConnection
from aioquic.quic.stream import QuicStream
from aioquic.tls import Epoch


def is_quiet(quic: QuicConnection, now: float) -> bool:
    """Return whether `datagrams_to_send` would send nothing at `now` but DATAGRAM frames.

    In doubt False, and always before the handshake's end, at a connection's, and while the pacer
    holds something back: that `datagrams_to_send` then takes its time back is needed.
    """
    if not quic._handshake_confirmed or quic._close_pending or quic._pacing_at is not None:
        return False
    path, space = quic._network_paths[0], quic._spaces[Epoch.ONE_RTT]
    return not (
        (space.ack_at is not None and space.ack_at <= now)
        or len(quic._network_paths) > 1
        or not path.is_validated
        or path.remote_challenges
        or quic._handshake_done_pending
        or any(not connection_id.was_sent for connection_id in quic._host_cids)
        or quic._retire_connection_ids
        or quic._streams_blocked_pending
        or _is_limit_due(quic)
        or quic._ping_pending
        or quic._probe_pending
        or not quic._crypto_streams[Epoch.ONE_RTT].sender.buffer_is_empty
        or any(_is_stream_due(stream) for stream in quic._streams.values())
        or (quic._is_client and quic._remote_preferred_address is not None)
    )


def _is_limit_due(quic: QuicConnection) -> bool:
    """Return whether the peer is to be allowed more."""
    data = quic._local_max_data
    if data.used * 2 > data.value or data.value != data.sent:
        return True
    return any(
        limit.value != limit.sent and limit.sent - limit.used < limit.value - limit.sent
        for limit in (quic._local_max_streams_bidi, quic._local_max_streams_uni)
    )


def _is_stream_due(stream: QuicStream) -> bool:
    sender, receiver, allowed = stream.sender, stream.receiver, stream.max_stream_data_local
    return bool(
        (allowed and receiver.highest_offset * 2 > allowed)
        or stream.max_stream_data_local_sent != allowed
        or stream.is_finished
        or receiver.stop_pending
        or sender.reset_pending
        or not sender.buffer_is_empty
    )
