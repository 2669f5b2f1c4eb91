"""What waits in a stream's buffer: aioquic keeps it to itself (checked with 1.7.2).

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
