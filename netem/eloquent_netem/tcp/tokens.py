"""A token stream over the TCP model: when was each token generated and seen?"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from eloquent_netem.link import Link
from eloquent_netem.sim import Actor, simulate
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


Plan = Sequence[tuple[float, bytes]]
"When each token is written, counted from the first, never going back; and its bytes, at least one."


def even_tokens(tokens: int, *, interval_s: float, token_bytes: int) -> Plan:
    """Return a plan of numbered tokens of the same size, one every `interval_s`."""
    return [
        (index * interval_s, f"{index:0{token_bytes}d}"[-token_bytes:].encode())
        for index in range(tokens)
    ]


class _Source:
    """A client that asks, and a server that writes tokens as planned."""

    def __init__(
        self,
        *,
        up: Link,
        down: Link,
        plan: Plan,
        congestion: str,
        on_start: Callable[[float], None],
    ) -> None:
        self._down = down
        self._plan = plan
        self._ends = list(accumulate(len(token) for _, token in plan))
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
        _, token = self._plan[len(self.generated_s)]
        self.generated_s.append(now)
        count = len(self.generated_s)
        more = count < len(self._plan)
        self._token_at = self.generated_s[0] + self._plan[count][0] if more else None
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
        complete = bisect_right(self._ends, self._received)
        self.rendered_s += [now] * (complete - len(self.rendered_s))


def send_tokens(
    *,
    up: Link,
    down: Link,
    plan: Plan,
    congestion: str = "cubic",
    on_start: Callable[[float], None] = lambda now: None,
    others: Sequence[Actor] = (),
) -> TokenTimes:
    """Connect, ask, and send tokens down as planned, in virtual time.

    `on_start` is called when the first one is generated, before it is sent. `others` use the links
    too, and act before the two ends.

    Raises:
        TcpError: something else arrived than was sent.
        StuckError: they did not arrive within an hour.
    """
    source = _Source(
        up=up,
        down=down,
        plan=plan,
        congestion=congestion,
        on_start=on_start,
    )
    source.pair.client.write(REQUEST, START_S)
    source.pair.connect(START_S)
    simulate(
        (*others, source, *source.pair.actors),
        until=lambda: len(source.rendered_s) == len(plan),
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
