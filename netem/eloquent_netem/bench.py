"""How fast the lab's hot parts run: figures for the benchmarks, no test."""

import random
import time

from eloquent_netem.dualpi2 import DualPi2
from eloquent_netem.errors import NetemError
from eloquent_netem.packet import Ecn, Packet

PACKETS = 200_000
BACKLOG_PACKETS = 50
GAP_S = 0.00012


def dualpi2_packets_per_s() -> float:
    """Return how many packets per CPU-second pass DualPI2, enqueued and dequeued.

    A packet comes and one goes every 120 us (100 Mbit/s of 1500 bytes), half of them ECT(1).
    What waits is about 50 packets of C, 12 ms: just below the controller's target, so that a
    decision is drawn for every packet, but hardly one is dropped to make the work less.

    Raises:
        NetemError: more than 0.1% were dropped.
    """
    queue = DualPi2(rng=random.Random(1))  # noqa: S311  (emulation, not cryptography)
    packets = [
        Packet(b"", 1500, Ecn.ECT_1 if index % 2 else Ecn.NOT_ECT) for index in range(PACKETS)
    ]
    passed = 0
    start = time.process_time()
    for index, packet in enumerate(packets):
        packet.entered_s = now = index * GAP_S
        queue.enqueue(now, packet)
        if index >= BACKLOG_PACKETS:
            passed += queue.dequeue(now) is not None
    rate = passed / (time.process_time() - start)
    if queue.drops > PACKETS / 1000:
        raise NetemError(
            f"DualPI2 dropped {queue.drops} of {PACKETS} packets, which is less work than passing "
            "them: the figure would flatter it. Give the benchmark a lower backlog."
        )
    return rate


if __name__ == "__main__":
    print(f"DualPI2: {dualpi2_packets_per_s():,.0f} packets/s")  # noqa: T201
