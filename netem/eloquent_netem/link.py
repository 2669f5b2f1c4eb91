"""One direction of a network path, without I/O: packets go in, and come out later or never."""

import random
from heapq import heappop, heappush

from eloquent_netem.loss import Loss, NoLoss


def stage_rng(seed: int, link: str, stage: str) -> random.Random:
    """Return the random stream of one stage of one link.

    Each stage has its own, so that adding a stage shifts no other's decisions.
    """
    return random.Random(f"{seed}/{link}/{stage}")  # noqa: S311  (emulation, not cryptography)


class Link:
    """Loss, then delay with optional jitter, reordering and duplication.

    `jitter_s` adds a uniform extra delay; with `reorders` packets may overtake each other,
    otherwise a packet never arrives before one sent earlier. `duplicates` is the probability
    that a packet arrives a second time, with a delay of its own.
    """

    def __init__(
        self,
        *,
        delay_s: float,
        seed: int,
        name: str,
        loss: Loss | None = None,
        jitter_s: float = 0.0,
        reorders: bool = False,
        duplicates: float = 0.0,
    ) -> None:
        self._delay_s = delay_s
        self._loss = NoLoss() if loss is None else loss
        self._jitter_s = jitter_s
        self._reorders = reorders
        self._duplicates = duplicates
        self._jitter_rng = stage_rng(seed, name, "jitter")
        self._duplicate_rng = stage_rng(seed, name, "duplicate")
        self._duplicate_jitter_rng = stage_rng(seed, name, "duplicate-jitter")
        self._last_arrival = float("-inf")
        self._sent = 0
        self._sent_bytes = 0
        self._in_transit: list[tuple[float, int, bytes]] = []
        self._sequence = 0

    @property
    def packets_sent(self) -> int:
        """How many packets entered the link, the dropped ones included."""
        return self._sent

    @property
    def bytes_sent(self) -> int:
        """How many bytes entered the link, the dropped packets' included."""
        return self._sent_bytes

    def send(self, now: float, packet: bytes) -> None:
        """Put a packet in at `now` (seconds, never going back)."""
        self._sent += 1
        self._sent_bytes += len(packet)
        # Every stage decides on every packet, dropped ones too: see `stage_rng`.
        is_dropped = self._loss.drops(now)
        jitter_s = self._jitter_rng.uniform(0, self._jitter_s)
        is_doubled = self._duplicate_rng.random() < self._duplicates
        second_jitter_s = self._duplicate_jitter_rng.uniform(0, self._jitter_s)
        if is_dropped:
            return
        self._schedule(now + self._delay_s + jitter_s, packet)
        if is_doubled:
            self._schedule(now + self._delay_s + second_jitter_s, packet)

    def next_time(self) -> float | None:
        """Return when the next packet comes out, in seconds, or None if the link is empty."""
        return self._in_transit[0][0] if self._in_transit else None

    def poll(self, now: float) -> list[bytes]:
        """Return the packets that have come out by `now`, in order of arrival."""
        packets = []
        while self._in_transit and self._in_transit[0][0] <= now:
            packets.append(heappop(self._in_transit)[2])
        return packets

    def _schedule(self, arrival: float, packet: bytes) -> None:
        if not self._reorders:
            arrival = self._last_arrival = max(arrival, self._last_arrival)
        self._sequence += 1
        heappush(self._in_transit, (arrival, self._sequence, packet))
