"""The driver delivers by its clock, knows how late it was, and refuses what was too late."""

import math
import os

import pytest

from eloquent_netem.link import Link
from eloquent_netem.loss import NoLoss, Outages
from eloquent_netem.packet import Packet
from eloquent_netem.rate import FixedRate
from eloquent_netem.realtime import (
    Driver,
    LatenessError,
    LatenessHistogram,
    NotStartedError,
    OverloadError,
    refuse_unfaithful,
)
from eloquent_netem.sim import CrossTraffic


class Clock:
    """Stands still unless moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Setup:
    """A driver over two links, and what came out of them."""

    def __init__(self, up: Link | None = None, cross: tuple[CrossTraffic, ...] = ()) -> None:
        self.clock = Clock()
        self.out: list[tuple[str, bytes]] = []
        self.up = up or Link(delay_s=0.05, seed=1, name="up")
        self.driver = Driver(
            self.up,
            Link(delay_s=0.02, seed=1, name="down"),
            deliver_up=lambda packet: self.out.append(("up", packet.data)),
            deliver_down=lambda packet: self.out.append(("down", packet.data)),
            cross=cross,
            clock=self.clock,
        )

    def at(self, scenario_s: float) -> list[tuple[str, bytes]]:
        """Move the clock; return what comes out then."""
        self.clock.now = 1000.0 + scenario_s
        self.out.clear()
        self.driver.deliver_due()
        return list(self.out)


def packet(data: bytes, flow: int = 0) -> Packet:
    return Packet(data, 100, flow=flow)


def test_packets_come_out_after_each_link_s_delay() -> None:
    setup = Setup()
    setup.driver.start()
    setup.driver.send_up(packet(b"a"))
    setup.driver.send_down(packet(b"b"))
    assert setup.at(0.019) == []
    assert setup.at(0.0201) == [("down", b"b")]
    assert setup.at(0.049) == []
    assert setup.at(0.0501) == [("up", b"a")]


def test_the_links_see_the_scenario_s_time_from_start_on() -> None:
    lossy = Link(delay_s=0.0, seed=1, name="up", loss=Outages([(1.0, 2.0)], NoLoss()))
    setup = Setup(lossy)
    setup.clock.now = 1000.0
    setup.driver.start()
    for time_s in (0.9, 1.1, 1.9, 2.1):
        setup.clock.now = 1000.0 + time_s
        setup.driver.send_up(packet(b"%d" % (time_s * 10)))
    assert setup.at(3.0) == [("up", b"9"), ("up", b"21")]


def test_before_the_start_packets_are_dropped_and_counted() -> None:
    setup = Setup()
    setup.driver.send_up(packet(b"a"))
    assert setup.at(9.0) == []
    stats = setup.driver.stats()
    assert (stats.packets_too_early, stats.up.packets_sent) == (1, 0)
    with pytest.raises(NotStartedError, match=r"1 packets .* call start\(\)"):
        refuse_unfaithful(stats, lateness_bound_s=1.0, lost_by_us=0)


def test_a_second_start_changes_nothing() -> None:
    setup = Setup()
    setup.driver.start()
    setup.clock.now += 1.0
    setup.driver.start()
    setup.driver.send_up(packet(b"a"))
    assert setup.up.next_time() == pytest.approx(1.05)


def test_lateness_counts_from_when_the_packet_was_due() -> None:
    setup = Setup()
    setup.driver.start()
    setup.driver.send_up(packet(b"a"))
    setup.at(0.053)
    lateness = setup.driver.stats().lateness
    assert lateness.packets == 1
    assert lateness.max_s == pytest.approx(0.003)
    with pytest.raises(LatenessError, match=r"3\.00 ms late or later, and 1\.00 ms is the bound"):
        refuse_unfaithful(setup.driver.stats(), lateness_bound_s=0.001, lost_by_us=0)
    refuse_unfaithful(setup.driver.stats(), lateness_bound_s=0.004, lost_by_us=0)


def test_losses_outside_the_links_are_refused() -> None:
    with pytest.raises(OverloadError, match="lost 3 packets"):
        refuse_unfaithful(Setup().driver.stats(), lateness_bound_s=1.0, lost_by_us=3)


def test_percentiles_are_those_of_what_was_recorded() -> None:
    histogram = LatenessHistogram()
    for microseconds in range(1, 101):
        histogram.record((microseconds - 0.5) * 1e-6)
    lateness = histogram.summary()
    assert lateness.p50_s == pytest.approx(50e-6)
    assert lateness.p99_s == pytest.approx(99e-6)
    assert lateness.max_s == pytest.approx(99.5e-6)


def test_what_is_beyond_the_histogram_counts_as_the_largest() -> None:
    histogram = LatenessHistogram()
    for seconds in (0.5, 0.1, 3.0):
        histogram.record(seconds)
    lateness = histogram.summary()
    assert (lateness.p50_s, lateness.p99_s, lateness.max_s) == (3.0, 3.0, 3.0)


def test_nothing_was_never_late() -> None:
    lateness = LatenessHistogram().summary()
    assert (lateness.packets, lateness.p50_s, lateness.p99_s, lateness.max_s) == (0, 0, 0, 0)


class EveryTenMs:
    """Cross traffic: a packet into the link every 10 ms."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._next_s = 0.0
        self.entered: list[float] = []
        self.seen: list[tuple[float, int]] = []

    def next_time(self) -> float | None:
        return self._next_s

    def act(self, now: float) -> None:
        self.entered.append(now)
        self._link.send(now, packet(b"x", flow=5))
        self._next_s += 0.01

    def on_delivered(self, now: float, packet: Packet) -> None:
        self.seen.append((now, packet.flow))


def test_cross_traffic_shares_the_link_and_never_leaves_the_router() -> None:
    link = Link(delay_s=0.05, seed=1, name="up", rate=FixedRate(100 * 8 / 0.004))
    cross = EveryTenMs(link)
    setup = Setup(link, (cross,))
    setup.driver.start()
    assert setup.at(0.0) == []  # The cross packet takes the link for 4 ms.
    setup.driver.send_up(packet(b"a"))
    assert setup.at(0.0575) == []
    assert setup.at(0.0585) == [("up", b"a")]
    assert cross.seen == [(pytest.approx(0.054), 5)]
    assert cross.entered == pytest.approx([0.0, 0.01, 0.02, 0.03, 0.04, 0.05])
    assert setup.driver.stats().up.packets_delivered == 1
    assert setup.driver.stats().lateness.packets == 1


def test_cross_traffic_that_is_late_does_not_take_a_link_back_in_time() -> None:
    link = Link(delay_s=0.05, seed=1, name="up")
    cross = EveryTenMs(link)
    setup = Setup(link, (cross,))
    setup.driver.start()
    setup.clock.now += 0.015
    setup.driver.send_up(packet(b"a"))
    setup.at(0.016)
    assert cross.entered == [pytest.approx(0.015)] * 2


def test_the_loop_ends_when_told_and_calls_who_watches() -> None:
    setup = Setup()
    reading, writing = os.pipe()
    calls = []

    def on_readable() -> None:
        calls.append(os.read(reading, 100))
        setup.driver.stop()

    setup.driver.watch(reading, on_readable)
    os.write(writing, b"x")
    setup.driver.run()
    assert calls == [b"x"]
    assert not setup.driver.stats().is_real_time
    setup.driver.unwatch(reading)
    os.close(reading)
    os.close(writing)


def test_no_bound_refuses_nothing() -> None:
    setup = Setup()
    setup.driver.start()
    setup.driver.send_up(packet(b"a"))
    setup.at(50.0)
    refuse_unfaithful(setup.driver.stats(), lateness_bound_s=math.inf, lost_by_us=0)
