"""A link with a watched DualPI2, for cases that are worked out by hand."""

import random
from math import inf

from eloquent_netem.dualpi2_watch import C, L, Passage, Watch, WatchedDualPi2
from eloquent_netem.link import Link
from eloquent_netem.packet import SUBJECT, Ecn, Packet
from eloquent_netem.rate import FixedRate, Rate

CLASSIC, L4S = Ecn.NOT_ECT, Ecn.ECT_1
BITS_PER_S = 12e6
MS = 0.001
"What a full packet takes at that rate."

OTHERS = 1
"The flow of what is not the subject's."


class Always(random.Random):
    """Draws the same each time."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def random(self) -> float:
        return self.value


class World:
    """A link with a watched queue whose draws mark and drop nothing, unless told to."""

    def __init__(
        self,
        *,
        scheduler: str = "wrr",
        is_race: bool = False,
        rate: Rate | None = None,
        limit_packets: int = 10_000,
        draw: float = 0.999,
        shadow_draw: float = 0.999,
    ) -> None:
        self.passages: list[Passage] = []
        self.out: list[tuple[float, Packet]] = []
        rate = FixedRate(BITS_PER_S) if rate is None else rate
        self.queue = WatchedDualPi2(
            rng=Always(draw),
            shadow_rng=Always(shadow_draw),
            watch=Watch(report=self.passages.append, is_race=is_race),
            ready_s=lambda: self.link.ready_s(),  # noqa: PLW0108  (it is made below)
            rate_at=rate.bits_per_s,
            scheduler=scheduler,  # type: ignore[arg-type]
            limit_packets=limit_packets,
        )
        self.link = Link(delay_s=0.0, seed=1, name="down", rate=rate, queue=self.queue)

    def send(
        self, now: float, ecn: Ecn, *, size: int = 1500, flow: int = OTHERS, count: int = 1
    ) -> Packet:
        """Send packets; return the last."""
        self.run(now)
        for _ in range(count):
            packet = Packet(b"", size, ecn, flow)
            self.link.send(now, packet)
        return packet

    def ask(self, now: float, ecn: Ecn = L4S, size: int = 0) -> Packet:
        """Send a packet of the subject."""
        return self.send(now, ecn, size=size, flow=SUBJECT)

    def run(self, until_s: float = inf) -> None:
        while (time := self.link.next_time()) is not None and time < until_s:
            self.out += [(time, packet) for packet in self.link.poll(time)]

    def end(self) -> list[Passage]:
        """Let all come out; one more packet, much later, ends the last waits."""
        self.run()
        now = max([time for time, _ in self.out], default=0.0) + 10
        self.send(now, CLASSIC)
        self.run()
        return self.passages


def waits_ms(passage: Passage) -> tuple[float, float]:
    return round(1000 * passage.wait_s[L], 6), round(1000 * passage.wait_s[C], 6)


def foretold_ms(passage: Passage) -> tuple[float, float]:
    return round(1000 * passage.foretold_s[L], 6), round(1000 * passage.foretold_s[C], 6)
