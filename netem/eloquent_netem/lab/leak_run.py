"""What somebody on the path sees of an answer: the sizes and times of the server's packets."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from eloquent.core.events import TextDelta
from eloquent.core.log import TokenLog
from eloquent.core.schemes import EloquentSender
from eloquent.core.turns import TurnProgress, TurnRequested
from eloquent.quic.connection import Connected, ConnectionEvent
from eloquent_netem.lab.answer import LIMIT_S, START_S
from eloquent_netem.lab.pair import QuicPair
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import IndependentLoss
from eloquent_netem.packet import Packet
from eloquent_netem.sim import simulate

STEP_SPREAD = 0.15
"Standard deviation of the logarithm of a decode step's time: what engines show on one machine."


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """The path that is listened to, and the speed of generation on it."""

    rtt_s: float
    loss: float
    tokens_per_s: float
    padding: bool


@dataclass(frozen=True, slots=True)
class Sighting:
    """The server's packets from the request's arrival to the reader's last word."""

    times_s: tuple[float, ...]
    "Counted from the request's arrival at the server."
    sizes: tuple[int, ...]
    "Bytes, IP and UDP headers included."


class _TappedLink(Link):
    """A link whose sender is listened to: nothing is lost or late yet."""

    seen: list[tuple[float, int]]

    def send(self, now: float, packet: Packet) -> None:
        self.seen.append((now, packet.size))
        super().send(now, packet)


class _Overheard:
    """A server that says the given tokens, each a step after the one before."""

    def __init__(self, tokens: Sequence[str], listening: Listening, seed: int) -> None:
        self._tokens = tokens
        self._step_s = 1 / listening.tokens_per_s
        self._rng = random.Random(f"{seed}/steps")  # noqa: S311  (emulation, not cryptography)
        self._log = TokenLog()
        self._turn = -1
        self._said = 0
        self._token_at: float | None = None
        self._started_s = 0.0
        self.is_done = False
        up, down = (
            kind(
                delay_s=listening.rtt_s / 2,
                seed=seed,
                name=name,
                loss=IndependentLoss(listening.loss, stage_rng(seed, name, "loss")),
            )
            for kind, name in ((Link, "up"), (_TappedLink, "down"))
        )
        assert isinstance(down, _TappedLink)
        self._down = down
        down.seen = []
        self.pair = QuicPair(
            up=up,
            down=down,
            make_sender=EloquentSender,
            on_client_event=self._on_client_event,
            on_server_event=self._on_server_event,
            padding=listening.padding,
        )

    def sighting(self) -> Sighting:
        seen = [(time - self._started_s, size) for time, size in self._down.seen]
        times, sizes = zip(*seen, strict=True)
        return Sighting(times, sizes)

    def next_time(self) -> float | None:
        return self._token_at

    def act(self, now: float) -> None:
        self._log.append(TextDelta(self._tokens[self._said]))
        self._said += 1
        if self._said < len(self._tokens):
            self._token_at = now + self._step_s * math.exp(self._rng.gauss(0, STEP_SPREAD))
        else:
            self._token_at = None
            self._log.close("stop", model="lab", prompt_tokens=0, completion_tokens=self._said)
        self.pair.server.log_grew(self._turn, now)
        self.pair.flush(now)

    def _on_client_event(self, event: ConnectionEvent, now: float) -> None:
        if isinstance(event, Connected):
            self.pair.request(b"{}", now)
        elif isinstance(event, TurnProgress):
            self.is_done = not all(isinstance(item, TextDelta) for item in event.events)

    def _on_server_event(self, event: ConnectionEvent, now: float) -> None:
        if isinstance(event, TurnRequested):
            self._turn = event.turn
            self.pair.accept(event.turn, self._log)
            self._token_at = self._started_s = now
            self._down.seen.clear()


def overhear(tokens: Sequence[str], listening: Listening, seed: int) -> Sighting:
    """Send an answer in virtual time and return what its packets look like.

    Raises:
        StuckError: the answer did not arrive.
    """
    overheard = _Overheard(tokens, listening, seed)
    overheard.pair.connect(START_S)
    simulate(
        (overheard, *overheard.pair.actors),
        until=lambda: overheard.is_done,
        start_s=START_S,
        limit_s=START_S + LIMIT_S,
    )
    return overheard.sighting()
