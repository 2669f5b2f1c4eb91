"""The middle rung: a channel over one QUIC stream, for peers that take no datagrams."""

from typing import Generic, TypeVar

from aioquic.quic.connection import QuicConnection

from eloquent.core.channel import Channel, MessageSplitter, with_length
from eloquent.quic._streams import unsent_bytes

CHANNEL_MARK = b"\0"
"The stream's first byte, where a request has its version."

CHANNEL_STREAM = 0
"The client's first stream."

UNSENT_BYTES = 1 << 14
"What may wait in QUIC's buffer: what is there cannot be chosen any more."

ChannelT = TypeVar("ChannelT", bound=Channel)


class ChannelStream(Generic[ChannelT]):
    """Moves a channel's messages, each with its length before it."""

    def __init__(
        self, quic: QuicConnection, channel: ChannelT, max_bytes: int, *, is_client: bool
    ) -> None:
        """`max_bytes` is the longest message that may come."""
        self._quic = quic
        self._splitter = MessageSplitter(max_bytes)
        self.channel = channel
        if is_client:
            quic.send_stream_data(CHANNEL_STREAM, CHANNEL_MARK)

    @property
    def unfinished_bytes(self) -> int:
        """How much has come of a message that is not whole."""
        return self._splitter.unfinished_bytes

    def receive(self, data: bytes, now: float) -> None:
        """Take bytes of the stream.

        Raises:
            WireError: they break the protocol.
        """
        for message in self._splitter.feed(data):
            self.channel.receive(message, now)

    def fill(self, now: float) -> None:
        """Hand over messages, as long as few bytes wait."""
        while unsent_bytes(self._quic, CHANNEL_STREAM) < UNSENT_BYTES:
            message = self.channel.next_message(now)
            if message is None:
                return
            self._quic.send_stream_data(CHANNEL_STREAM, with_length(message))
