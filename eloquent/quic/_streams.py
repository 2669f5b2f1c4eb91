"""What is going on in a stream: aioquic keeps it to itself (checked with 1.7.2).

`tests/eloquent/test_aioquic_internals.py` fails, naming the attribute, when a release changes what
is used here.
"""

from aioquic.quic.connection import QuicConnection


def unsent_bytes(quic: QuicConnection, stream_id: int) -> int:
    """Return how many bytes were written to a stream of ours and not sent even once."""
    stream = quic._streams.get(stream_id)
    if stream is None:
        return 0
    return stream.sender._buffer_stop - stream.sender.highest_offset


def repeat_stop(quic: QuicConnection, stream_id: int) -> bool:
    """Send STOP_SENDING again; return False if the peer has ended the stream by now."""
    stream = quic._streams.get(stream_id)
    if stream is None or stream.receiver.is_finished:
        return False
    stream.receiver.stop_pending = True
    return True
