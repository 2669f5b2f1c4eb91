"""One direction of a network path, without I/O: packets go in, and come out later or never."""

import random
from heapq import heappop, heappush

from eloquent_netem.jitter import JitterInOrder
from eloquent_netem.loss import Loss, NoLoss
from eloquent_netem.packet import Packet
from eloquent_netem.queues import DropTail, Queue
from eloquent_netem.rate import Rate, UnlimitedRate


def stage_rng(seed: int, link: str, stage: str) -> random.Random:
    """Return the random stream of one stage of one link.

    Each stage has its own, so that adding a stage shifts no other's decisions.
    """
    return random.Random(f"{seed}/{link}/{stage}")  # noqa: S311  (emulation, not cryptography)


class Link:
    """Loss, then the bottleneck (a queue served at a rate), then delay, jitter and duplication.

    Loss is decided when a packet enters, so that it is a function of time, alike for everything
    that is sent. `jitter_s` adds an extra delay, uniform from 0 to this: a function of the time at
    which a packet leaves the bottleneck (`JitterInOrder`), so that none arrives before one sent
    earlier; or, with `reorders`, drawn for each packet, so that they may overtake each other.
    `duplicates` is the probability that a packet arrives a second time: right behind the first, or,
    with `reorders`, with a jitter of its own. Loss, rate and jitter in order see time from
    `origin_s` on: the scenario's clock.
    """

    def __init__(
        self,
        *,
        delay_s: float,
        seed: int,
        name: str,
        loss: Loss | None = None,
        rate: Rate | None = None,
        queue: Queue | None = None,
        jitter_s: float = 0.0,
        reorders: bool = False,
        duplicates: float = 0.0,
        origin_s: float = 0.0,
    ) -> None:
        self._origin_s = origin_s
        self._delay_s = delay_s
        self._loss = NoLoss() if loss is None else loss
        self._rate = UnlimitedRate() if rate is None else rate
        self._queue = DropTail() if queue is None else queue
        self._own_jitter_s, shared_jitter_s = (jitter_s, 0.0) if reorders else (0.0, jitter_s)
        self._reorders = reorders
        self._duplicates = duplicates
        self._jitter_rng = stage_rng(seed, name, "jitter")
        self._jitter = JitterInOrder(shared_jitter_s, stage_rng(seed, name, "jitter-in-order"))
        self._duplicate_rng = stage_rng(seed, name, "duplicate")
        self._duplicate_jitter_rng = stage_rng(seed, name, "duplicate-jitter")
        self._last_arrival = float("-inf")
        self._sent = 0
        self._sent_bytes = 0
        self._lost = 0
        self._served_until = float("-inf")
        self._service_at: float | None = None
        self._in_transit: list[tuple[float, int, Packet]] = []
        self._sequence = 0

    @property
    def packets_sent(self) -> int:
        """How many packets entered the link, the dropped ones included."""
        return self._sent

    @property
    def bytes_sent(self) -> int:
        """How many bytes entered the link, headers and dropped packets included."""
        return self._sent_bytes

    @property
    def packets_lost(self) -> int:
        """How many packets the loss took; what the queue dropped is in `queue.drops`."""
        return self._lost

    @property
    def queue(self) -> Queue:
        """The bottleneck's queue."""
        return self._queue

    def ready_s(self) -> float:
        """Return when the bottleneck could take the next packet, in seconds, waiting or not.

        It is in the past if the bottleneck is idle, and minus infinity before the first packet.
        """
        return self._ready_from(self._served_until)

    def send(self, now: float, packet: Packet) -> None:
        """Put a packet in at `now` (seconds, never going back)."""
        self._serve(now)
        self._sent += 1
        self._sent_bytes += packet.size
        packet.entered_s = now
        # Drawn here for every packet, lost ones too, so that no stage shifts another's decisions.
        packet.fate = (
            self._jitter_rng.uniform(0, self._own_jitter_s),
            self._duplicate_rng.random() < self._duplicates,
            self._duplicate_jitter_rng.uniform(0, self._own_jitter_s),
        )
        if self._loss.drops(now - self._origin_s):
            self._lost += 1
        elif self._queue.enqueue(now, packet):
            if self._service_at is None:
                self._service_at = self._ready_from(max(now, self._served_until))
            self._serve(now)

    def next_time(self) -> float | None:
        """Return when something happens next in the link, in seconds, or None if it is empty.

        At that time a packet comes out, or one goes on from the queue and `next_time` is later.
        """
        times = [time for time in (self._service_at, self._first_arrival()) if time is not None]
        return min(times, default=None)

    def poll(self, now: float) -> list[Packet]:
        """Return the packets that have come out by `now`, in order of arrival."""
        self._serve(now)
        packets = []
        while self._in_transit and self._in_transit[0][0] <= now:
            packets.append(heappop(self._in_transit)[2])
        return packets

    def _first_arrival(self) -> float | None:
        return self._in_transit[0][0] if self._in_transit else None

    def _serve(self, now: float) -> None:
        """Serve the queue up to `now`."""
        while self._service_at is not None and self._service_at <= now:
            start = self._service_at
            packet = self._queue.dequeue(start)
            if packet is not None:
                left, _ = self._rate.serve(start - self._origin_s, packet.size)
                self._served_until = left + self._origin_s
                self._depart(self._served_until, packet)
            self._service_at = (
                self._ready_from(max(start, self._served_until)) if self._queue.packets else None
            )

    def _ready_from(self, now: float) -> float:
        return self._rate.ready_from(now - self._origin_s) + self._origin_s

    def _depart(self, now: float, packet: Packet) -> None:
        jitter_s, is_doubled, second_jitter_s = packet.fate
        arrival = now + self._delay_s + self._jitter.at(now - self._origin_s)
        self._schedule(arrival + jitter_s, packet)
        if is_doubled:
            self._schedule(arrival + second_jitter_s, packet)

    def _schedule(self, arrival: float, packet: Packet) -> None:
        if not self._reorders:  # In order already, but for the rounding of floats.
            arrival = self._last_arrival = max(arrival, self._last_arrival)
        self._sequence += 1
        heappush(self._in_transit, (arrival, self._sequence, packet))
