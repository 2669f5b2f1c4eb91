"""One answer over one emulated path: when was each token generated and seen, at what cost?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eloquent.core.events import TextDelta, encode_event
from eloquent.core.log import TokenLog
from eloquent.core.schemes import EloquentSender
from eloquent.core.schemes import scheme as find_scheme
from eloquent.core.turns import TurnCancelled, TurnFailed, TurnProgress, TurnRequested
from eloquent.quic.connection import Connected, ConnectionEnded, ConnectionEvent
from eloquent.quic.marking import Marking
from eloquent_netem.lab.measures import DeliveryError, check_delivery
from eloquent_netem.lab.pair import QuicPair
from eloquent_netem.lab.sources import Token
from eloquent_netem.link import Link
from eloquent_netem.sim import Actor, simulate
from eloquent_netem.tcp import send_tokens

START_S = 1.0
"Virtual time starts here: aioquic takes 0 for 'never'."

LIMIT_S = 600.0

EVENT_HEADER_BYTES = 2
"What a token's event takes of the log beside its text, up to 127 bytes of text."

QUIC_STREAM = "quic-stream"
"The middle rung: the answer on one QUIC stream, as chat over HTTP/3 would have it."

TCP_SCHEMES = {"tcp": "cubic", "tcp-reno": "reno"}
"Schemes that run over the TCP model, and their congestion control."

PADDED_SCHEMES = ("eloquent", "eloquent-queued")
"Ours are padded, as by default; those they are compared with are not, which is in their favour."


@dataclass(frozen=True, slots=True, kw_only=True)
class LabPath:
    """Two links, and what one must know of them to measure an answer; used for one answer."""

    up: Link
    down: Link
    base_delay_s: float
    "What a packet takes down a link without queues."
    passes_from: Callable[[float], float]
    "The first time, this one or later, at which the downlink would have carried a packet."
    on_start: Callable[[float], None] = lambda now: None
    "Is told when the first token is generated, before it is sent."
    others: tuple[Actor, ...] = ()
    "Whoever else uses the links; they act before the answer's ends."


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Times in seconds, in the tokens' order; counts from the first token's generation on."""

    generated_s: list[float]
    rendered_s: list[float]
    downlink_packets: int
    downlink_bytes: int
    "IP and UDP or TCP headers included."
    uplink_packets: int
    uplink_bytes: int
    data_packets: int
    "Of the downlink's packets those that carry tokens (with TCP: all)."


class AnswerRun:
    """A client that asks, a server that generates as planned, and what the client sees.

    An actor for `simulate`, beside those of its `pair`. `marking` marks the server's packets.
    """

    def __init__(
        self,
        path: LabPath,
        scheme: str,
        plan: Sequence[Token],
        *,
        padding: bool | None = None,
        marking: Marking | None = None,
    ) -> None:
        self._path = path
        self._plan = plan
        self._log = TokenLog()
        self._token_at: float | None = None
        self._before = (0, 0, 0, 0)
        self.turn = -1
        self.generated_s: list[float] = []
        self.rendered_s: list[float] = []
        self.texts: list[str] = []
        self.is_done = False
        self.cancelled_s: float | None = None
        "When the server learnt that the reader wants no more."
        self.pair = QuicPair(
            up=path.up,
            down=path.down,
            make_sender=EloquentSender if scheme == QUIC_STREAM else find_scheme(scheme),
            has_datagrams=scheme != QUIC_STREAM,
            on_client_event=self._on_client_event,
            on_server_event=self._on_server_event,
            padding=scheme in PADDED_SCHEMES if padding is None else padding,
            marking=marking,
        )

    def next_time(self) -> float | None:
        """See `Actor.next_time`."""
        return self._token_at

    def act(self, now: float) -> None:
        """See `Actor.act`: generate a token."""
        index = len(self.generated_s)
        self.generated_s.append(now)
        self._log.append(TextDelta(self._plan[index].text))
        if index + 1 < len(self._plan):
            self._token_at = self.generated_s[0] + self._plan[index + 1].time_s
        else:
            self._token_at = None
            self._log.close("stop", model="lab", prompt_tokens=0, completion_tokens=index + 1)
        self.pair.log_grew(self.turn, now)

    def answer(self) -> Answer:
        """Return what was measured, once `is_done`.

        Raises:
            DeliveryError: the text did not arrive whole, in order and once.
        """
        check_delivery([token.text for token in self._plan], self.texts)
        counts = (
            after - before for after, before in zip(self._counts(), self._before, strict=True)
        )
        down_packets, down_bytes, up_packets, up_bytes = counts
        return Answer(
            generated_s=self.generated_s,
            rendered_s=self.rendered_s,
            downlink_packets=down_packets,
            downlink_bytes=down_bytes,
            uplink_packets=up_packets,
            uplink_bytes=up_bytes,
            data_packets=self.pair.bundles_sent,
        )

    def _counts(self) -> tuple[int, int, int, int]:
        down, up = self._path.down, self._path.up
        return down.packets_sent, down.bytes_sent, up.packets_sent, up.bytes_sent

    def cancel(self, now: float) -> None:
        """Let the reader give the answer up."""
        self.pair.client.cancel(self.turn)
        self.pair.flush(now)

    def _on_client_event(self, event: ConnectionEvent, now: float) -> None:
        if isinstance(event, Connected):
            self.turn = self.pair.request(b"{}", now)
        elif isinstance(event, TurnProgress):
            texts = [item.text for item in event.events if isinstance(item, TextDelta)]
            self.texts += texts
            self.rendered_s += [now] * len(texts)
            self.is_done = len(texts) < len(event.events)
        elif isinstance(event, ConnectionEnded | TurnFailed):
            raise DeliveryError(f"The client's connection reports {event}.")

    def _on_server_event(self, event: ConnectionEvent, now: float) -> None:
        if isinstance(event, TurnRequested):
            self.pair.accept(event.turn, self._log)
            self._path.on_start(now)
            self._before = self._counts()
            self._token_at = now
        elif isinstance(event, TurnCancelled):
            self.cancelled_s = now
            self._token_at = None
        elif isinstance(event, ConnectionEnded):
            raise DeliveryError(f"The server's connection reports {event}.")


def send_answer(
    path: LabPath, scheme: str, plan: Sequence[Token], *, padding: bool | None = None
) -> Answer:
    """Send one answer in virtual time, over QUIC or the TCP model.

    With TCP a token is as long as its event in the log, without framing or TLS: in TCP's favour.
    `padding` None is that of `PADDED_SCHEMES`.

    Raises:
        DeliveryError: the text did not arrive whole, in order and once.
        TcpError: the same, with TCP.
        StuckError: it did not arrive at all.
    """
    if scheme in TCP_SCHEMES:
        return _send_over_tcp(path, scheme, plan)
    run = AnswerRun(path, scheme, plan, padding=padding)
    run.pair.connect(START_S)
    simulate(
        (*path.others, run, *run.pair.actors),
        until=lambda: run.is_done,
        start_s=START_S,
        limit_s=START_S + LIMIT_S,
    )
    return run.answer()


def _send_over_tcp(path: LabPath, scheme: str, plan: Sequence[Token]) -> Answer:
    before = (0, 0)

    def on_start(now: float) -> None:
        nonlocal before
        before = (path.up.packets_sent, path.up.bytes_sent)
        path.on_start(now)

    times = send_tokens(
        up=path.up,
        down=path.down,
        plan=[(token.time_s, encode_event(TextDelta(token.text))) for token in plan],
        congestion=TCP_SCHEMES[scheme],
        on_start=on_start,
        others=path.others,
    )
    return Answer(
        generated_s=times.generated_s,
        rendered_s=times.rendered_s,
        downlink_packets=times.downlink_packets,
        downlink_bytes=times.downlink_bytes,
        uplink_packets=path.up.packets_sent - before[0],
        uplink_bytes=path.up.bytes_sent - before[1],
        data_packets=times.downlink_packets,
    )
