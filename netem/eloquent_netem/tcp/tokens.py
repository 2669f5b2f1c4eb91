"""A token stream over the TCP model: when was each token generated and seen?"""

from collections.abc import Callable
from dataclasses import dataclass

from eloquent_netem.link import Link
from eloquent_netem.sim import simulate
from eloquent_netem.tcp.errors import TcpError
from eloquent_netem.tcp.pair import TcpPair

START_S = 1.0
LIMIT_S = 3600.0
REQUEST = b"GET / HTTP/1.1\r\n\r\n"


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """When each token was generated and its last byte read, in seconds; in order."""

    generated_s: list[float]
    rendered_s: list[float]
    downlink_packets: int
    downlink_bytes: int
    "IP and TCP headers included, from the first token's generation on."


class _Source:
    """A client that asks, and a server that writes a token every so often."""

    def __init__(
        self,
        *,
        up: Link,
        down: Link,
        tokens: int,
        token_bytes: int,
        interval_s: float,
        congestion: str,
        on_start: Callable[[float], None],
    ) -> None:
        self._down = down
        self._tokens = tokens
        self._token_bytes = token_bytes
        self._interval_s = interval_s
        self._token_at: float | None = None
        self._sent = bytearray()
        self._received = 0
        self._on_start = on_start
        self.before = (0, 0)
        self.generated_s: list[float] = []
        self.rendered_s: list[float] = []
        self.pair = TcpPair(
            up=up,
            down=down,
            congestion=congestion,
            on_client_data=self._on_client_data,
            on_server_data=self._on_request,
        )

    def next_time(self) -> float | None:
        return self._token_at

    def act(self, now: float) -> None:
        if not self.generated_s:
            self.before = (self._down.packets_sent, self._down.bytes_sent)
            self._on_start(now)
        self.generated_s.append(now)
        count = len(self.generated_s)
        more = count < self._tokens
        self._token_at = self.generated_s[0] + count * self._interval_s if more else None
        token = f"{count:0{self._token_bytes}d}"[-self._token_bytes :].encode()
        self._sent += token
        self.pair.server.write(token, now)
        self.pair.flush(now)

    def _on_request(self, data: bytes, now: float) -> None:
        if not self.generated_s and self._token_at is None:
            self._token_at = now

    def _on_client_data(self, data: bytes, now: float) -> None:
        if not self._sent.startswith(data, self._received):
            raise TcpError(
                f"What arrived behind byte {self._received} is not what was sent: the TCP model is "
                "broken, and the run proves nothing."
            )
        self._received += len(data)
        complete = self._received // self._token_bytes
        self.rendered_s += [now] * (complete - len(self.rendered_s))


def send_tokens(
    *,
    up: Link,
    down: Link,
    tokens: int,
    interval_s: float,
    token_bytes: int,
    congestion: str = "cubic",
    on_start: Callable[[float], None] = lambda now: None,
) -> TokenTimes:
    """Connect, ask, and send `tokens` down, one every `interval_s`, in virtual time.

    `on_start` is called when the first one is generated, before it is sent.

    Raises:
        TcpError: something else arrived than was sent.
        StuckError: they did not arrive within an hour.
    """
    source = _Source(
        up=up,
        down=down,
        tokens=tokens,
        token_bytes=token_bytes,
        interval_s=interval_s,
        congestion=congestion,
        on_start=on_start,
    )
    source.pair.client.write(REQUEST, START_S)
    source.pair.connect(START_S)
    simulate(
        (source, *source.pair.actors),
        until=lambda: len(source.rendered_s) == tokens,
        start_s=START_S,
        limit_s=START_S + LIMIT_S,
    )
    packets, sent_bytes = source.before
    return TokenTimes(
        source.generated_s,
        source.rendered_s,
        down.packets_sent - packets,
        down.bytes_sent - sent_bytes,
    )
