"""Many turns on one connection share its congestion window alike."""

import pytest

from eloquent.core.events import TextDelta
from eloquent.core.log import TokenLog
from eloquent.core.schemes import EloquentSender
from eloquent.core.turns import TurnProgress, TurnRequested
from eloquent.quic.connection import ConnectionEvent
from eloquent_netem.lab.pair import QuicPair
from eloquent_netem.link import Link
from eloquent_netem.queues import DropTail
from eloquent_netem.rate import FixedRate
from eloquent_netem.sim import simulate

TURNS = 50
GAP_S = 1 / 30
RTT_S = 0.1


class Tellers:
    """Adds a token to each log every `GAP_S` seconds, one log after the other."""

    def __init__(self, pair: QuicPair, logs: list[TokenLog], until_s: float) -> None:
        self._pair = pair
        self._logs = logs
        self._until_s = until_s
        self._time = 1.0
        self._told = 0

    @property
    def is_done(self) -> bool:
        return self._time > self._until_s

    def next_time(self) -> float | None:
        return self._time

    def act(self, now: float) -> None:
        turn = self._told % TURNS
        self._logs[turn].append(TextDelta(" token"))
        self._pair.log_grew(turn, now)
        self._told += 1
        self._time = 1.0 + self._told * GAP_S / TURNS


@pytest.mark.parametrize("bits_per_s", [300e3, 1e6])
def test_fifty_turns_that_want_more_than_the_link_has_get_the_same(bits_per_s: float) -> None:
    """At 300 kbit/s a packet for each token would need ten times as much."""
    queue = DropTail(limit_bytes=int(bits_per_s / 8 * RTT_S))
    down = Link(delay_s=RTT_S / 2, seed=1, name="down", rate=FixedRate(bits_per_s), queue=queue)
    logs = [TokenLog() for _ in range(TURNS)]
    came = [0] * TURNS

    def on_client_event(event: ConnectionEvent, now: float) -> None:
        if isinstance(event, TurnProgress):
            came[event.turn] += len(event.events)

    def on_server_event(event: ConnectionEvent, now: float) -> None:
        if isinstance(event, TurnRequested):
            pair.server.accept(event.turn, logs[event.turn])

    pair = QuicPair(
        up=Link(delay_s=RTT_S / 2, seed=1, name="up"),
        down=down,
        make_sender=EloquentSender,
        on_client_event=on_client_event,
        on_server_event=on_server_event,
    )
    pair.connect(0.0)
    for _ in range(TURNS):
        pair.request(b"{}", 0.0)
    tellers = Tellers(pair, logs, until_s=5.0)
    simulate((*pair.actors, tellers), until=lambda: tellers.is_done, start_s=0.0, limit_s=6.0)
    told = 4.0 / GAP_S
    assert sum(came) ** 2 / (TURNS * sum(count**2 for count in came)) > 0.99  # Jain's index
    assert min(came) > 0.8 * told
    assert sum(came) > 0.9 * TURNS * told
    assert pair.bundles_sent < TURNS * told / 1.5  # Tokens share bundles.
