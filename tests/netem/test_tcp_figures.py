"""The TCP model against theory and against the kernel's figures, in virtual time.

The kernel's figures: CUBIC of Linux 6.18 through a TUN router, 200 B tokens, 50 ms round trip,
loss clocked in slots of 1 ms, both ways.
"""

import math
import random
from statistics import fmean

import pytest

from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import IndependentLoss, Loss, NoLoss
from eloquent_netem.queues import DropTail
from eloquent_netem.rate import FixedRate, Rate
from eloquent_netem.sim import simulate
from eloquent_netem.tcp import TcpPair, even_tokens, send_tokens
from eloquent_netem.tcp.segment import MSS_BYTES

RTT_S = 0.05
START_S = 1.0
SLOT_S = 0.001
KERNEL = {(0.01, 0.02): (27.4, 0.12), (0.05, 0.02): (41.8, 4.6), (0.05, 0.1): (43.4, 7.0)}
"Loss and interval: mean token delay in ms, share over 100 ms in percent."


class SlotLoss(NoLoss):
    """Each slot of 1 ms is bad with a probability of its own, whoever sends."""

    def __init__(self, probability: float, rng: random.Random) -> None:
        self._probability = probability
        self._rng = rng
        self._slots = 0
        self._is_bad = False

    def drops(self, now: float) -> bool:
        # Half a nanosecond: 0.29 / 0.001 is a little less than 290.
        slot = int((now + 5e-10) / SLOT_S) + 1
        while self._slots < slot:
            self._slots += 1
            self._is_bad = self._rng.random() < self._probability
        return self._is_bad


def slot_link(name: str, loss: float, seed: int) -> Link:
    rng = stage_rng(seed, name, "loss")
    return Link(delay_s=RTT_S / 2, seed=seed, name=name, loss=SlotLoss(loss, rng))


def delays_s(loss: float, interval_s: float, seed: int, tokens: int) -> list[float]:
    times = send_tokens(
        up=slot_link("up", loss, seed),
        down=slot_link("down", loss, seed),
        plan=even_tokens(tokens, interval_s=interval_s, token_bytes=200),
    )
    return [seen - made for made, seen in zip(times.generated_s, times.rendered_s, strict=True)]


class Greedy:
    """Keeps the server's buffer full until the time is over."""

    def __init__(self, pair: TcpPair, end_s: float) -> None:
        self._pair = pair
        self._end_s = end_s
        self._at = START_S
        self.is_over = False

    def next_time(self) -> float | None:
        return self._at

    def act(self, now: float) -> None:
        if self._pair.server.unacknowledged < 1_000_000:
            self._pair.server.write(bytes(1_000_000), now)
            self._pair.flush(now)
        self._at = now + 0.1
        self.is_over = now >= self._end_s


def goodput(
    congestion: str,
    seconds: float,
    *,
    loss: Loss | None = None,
    rate: Rate | None = None,
    packets: int | None = None,
) -> tuple[float, TcpPair]:
    """Return what one greedy flow gets down, in bit/s."""
    received: list[int] = []
    pair = TcpPair(
        up=Link(delay_s=RTT_S / 2, seed=1, name="up"),
        down=Link(
            delay_s=RTT_S / 2,
            seed=1,
            name="down",
            loss=loss,
            rate=rate,
            queue=DropTail(limit_packets=packets),
        ),
        congestion=congestion,
        on_client_data=lambda data, now: received.append(len(data)),
    )
    greedy = Greedy(pair, START_S + seconds)
    pair.connect(START_S)
    simulate(
        (greedy, *pair.actors),
        until=lambda: greedy.is_over,
        start_s=START_S,
        limit_s=START_S + 2 * seconds,
    )
    return 8 * sum(received) / seconds, pair


@pytest.mark.parametrize(("loss", "interval_s"), KERNEL)
def test_token_delays_are_the_kernel_s(loss: float, interval_s: float) -> None:
    mean_ms, share = KERNEL[loss, interval_s]
    delays = [x for seed in range(10) for x in delays_s(loss, interval_s, seed, 3000)]
    assert 1000 * fmean(delays) == pytest.approx(mean_ms, rel=0.15)
    assert 100 * fmean(delay > 0.1 for delay in delays) == pytest.approx(share, abs=2)
    assert min(delays) == pytest.approx(RTT_S / 2)


def test_reno_is_as_fast_as_mathis_says() -> None:
    loss = 0.01
    bits_per_s, _ = goodput("reno", 120, loss=IndependentLoss(loss, stage_rng(3, "down", "loss")))
    mathis = 8 * MSS_BYTES / RTT_S * math.sqrt(1.5 / loss)
    assert bits_per_s == pytest.approx(mathis, rel=0.15)


def test_cubic_where_reno_is_friendly_is_as_fast_as_reno() -> None:
    # RFC 9438 section 4.3: at this rate and round trip CUBIC follows its estimate of Reno.
    loss = 0.01
    bits_per_s, _ = goodput("cubic", 120, loss=IndependentLoss(loss, stage_rng(3, "down", "loss")))
    mathis = 8 * MSS_BYTES / RTT_S * math.sqrt(1.5 / loss)
    assert bits_per_s == pytest.approx(mathis, rel=0.2)


@pytest.mark.parametrize("congestion", ["cubic", "reno"])
def test_a_bottleneck_is_filled_without_timeouts(congestion: str) -> None:
    bits_per_s, pair = goodput(congestion, 12, rate=FixedRate(20e6), packets=100)
    payload_share = MSS_BYTES / 1500
    assert bits_per_s > 0.93 * 20e6 * payload_share
    sender = pair.server.sender
    assert sender.timeouts == 0
    assert sender.recovery.recoveries >= 1
    assert pair.client.duplicates == 0


def test_a_seed_gives_the_same_times() -> None:
    assert delays_s(0.05, 0.02, 7, 500) == delays_s(0.05, 0.02, 7, 500)
    assert delays_s(0.05, 0.02, 7, 500) != delays_s(0.05, 0.02, 8, 500)
