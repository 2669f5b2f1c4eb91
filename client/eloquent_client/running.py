"""What a client keeps of its turns: those that run, and what they have received."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eloquent_client.stream import MessageStream


class Running:
    """The streams of a client that run, and what those that ran before have received."""

    def __init__(self) -> None:
        self._streams: dict[MessageStream, None] = {}
        self._loss_before = 0
        self._bytes_before = 0

    @property
    def loss_recovered(self) -> int:
        """Datagrams of all turns that were lost, and whose content came with another."""
        return self._loss_before + sum(each.stats.loss_recovered for each in self._streams)

    @property
    def bytes_received(self) -> int:
        """Bytes of all answers' logs that arrived, those that came twice included."""
        return self._bytes_before + sum(each.bytes_received for each in self._streams)

    def begin(self, stream: "MessageStream") -> None:
        """Take note that a stream runs."""
        self._streams[stream] = None

    def end(self, stream: "MessageStream") -> None:
        """Take note that a stream is over."""
        self._streams.pop(stream, None)
        self._loss_before += stream.stats.loss_recovered
        self._bytes_before += stream.bytes_received

    def leave_detached(self) -> None:
        """Hear no more of those that go on without a reader."""
        for stream in list(self._streams):
            if stream.is_detached:
                stream.leave()
