"""The live view shows the figures it is given, and `--live` and `--pcap` do what they say."""

import contextlib
import io
import os
import pty
import select
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from eloquent_netem.dualpi2 import DualPi2
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.packet import Ecn, Packet
from eloquent_netem.rate import FixedRate
from eloquent_netem.realtime import (
    DirectionStats,
    Driver,
    DriverStats,
    Lateness,
    QueueStats,
    SubjectStats,
)
from eloquent_netem.run import parse_address
from eloquent_netem.view import RateHistory, View, interval, sparkline

DEADLINE_S = 60
"Ends a hang; decides nothing."

NETEM = [sys.executable, "-m", "eloquent", "netem"]

NOTHING = DirectionStats(0, 0, 0, 0, 0, SubjectStats(), QueueStats())

UP = DirectionStats(
    packets_sent=300,
    bytes_sent=300_000,
    packets_lost=30,
    queue_drops=7,
    packets_delivered=80,
    subject=SubjectStats(100, 100_000, 80_000, delay_p50_s=0.0123, delay_max_s=0.0456),
    queue=QueueStats(packets=14, marks=5, l_packets=3, p=0.0625),
)


def driver_stats(clock_s: float, up: DirectionStats) -> DriverStats:
    return DriverStats(
        up=up,
        down=NOTHING,
        lateness=Lateness(80, 20e-6, 150e-6, 0.0007),
        is_real_time=True,
        packets_too_early=0,
        is_started=True,
        clock_s=clock_s,
    )


def drawn(view: View, width: int = 120) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(view.render())
    return console.export_text()


def test_the_screen_has_the_figures_of_the_last_interval_and_of_the_whole() -> None:
    view = View("a title", "output: /somewhere/file.log")
    view.update(driver_stats(10.0, NOTHING))
    view.update(driver_stats(10.5, UP))
    text = drawn(view)
    for figure in (
        "a title   10.5 s",
        "1600 kbit/s, 200 pkt/s",  # 100 kB and 100 packets in half a second
        "1280 kbit/s, 160 pkt/s",
        "3200 kbit/s sent",  # 200 kB of cross traffic
        "p50 12.3 ms, max 45.6 ms",
        "30 (10.0%), 30 in all",
        "L 3, C 11, p 0.0625",
        "7, 7 in all",
        "5, 5 in all",
        "p50 20 us, p99 150 us, max 700 us (real-time)",
        "output: /somewhere/file.log",
        "nothing came out",  # down
    ):
        assert figure in text


def test_both_directions_stand_side_by_side() -> None:
    view = View("", "")
    view.update(driver_stats(1.0, UP))
    assert any("up: " in line and "down: " in line for line in drawn(view).splitlines())


def test_a_terminal_of_80_columns_is_wide_enough() -> None:
    view = View("", "")
    busy = replace(
        UP, subject=SubjectStats(9999, 11_250_000, 11_250_000, 0.1234, 0.5678), packets_sent=9999
    )
    view.update(driver_stats(1.0, busy))
    text = drawn(view, 80)
    assert "…" not in text
    assert max(map(len, text.splitlines())) == 80


def test_what_was_seen_before_does_not_count_twice() -> None:
    view = View("", "")
    view.update(driver_stats(1.0, UP))
    view.update(driver_stats(2.0, UP))
    text = drawn(view)
    assert "loss      0, 30 in all" in text
    assert "0, 7 in all" in text
    assert "1600 kbit/s" not in text


def test_a_view_without_figures_says_so() -> None:
    assert "Waiting" in drawn(View("", ""))


def test_two_readings_at_one_instant_divide_by_no_zero() -> None:
    assert interval(None, NOTHING, 0.0).sent_kbit_s == 0


def test_sparklines() -> None:
    assert sparkline([0, 1, 4, 8], 4) == " ▁▄█"
    assert sparkline([], 3) == "   "
    assert sparkline([0, 0], 3) == "   "
    assert sparkline([5, 5, 5], 2) == "██"
    assert sparkline([1, 1000], 2) == "▁█", "what is above zero shows"


def test_a_history_has_one_value_per_second_and_forgets() -> None:
    history = RateHistory()
    for rate in (1.0, 3.0, 10.0):
        history.add(rate)
    assert list(history) == [2.0, 10.0]
    for _ in range(100):
        history.add(7.0)
    assert len(list(history)) == 30


class Clock:
    """Stands still unless moved."""

    now = 50.0

    def __call__(self) -> float:
        return self.now


def test_the_driver_counts_the_subject_s_bytes_and_delays_and_looks_into_the_queue() -> None:
    clock = Clock()
    queue = DualPi2(rng=stage_rng(1, "up", "queue"))
    up = Link(delay_s=0.05, seed=1, name="up", rate=FixedRate(100 * 8 / 0.01), queue=queue)
    down = Link(delay_s=0.02, seed=1, name="down")
    driver = Driver(up, down, deliver_up=lambda _: None, deliver_down=lambda _: None, clock=clock)
    driver.start()
    clock.now += 0.5
    for ecn in (Ecn.ECT_1, Ecn.ECT_1, Ecn.NOT_ECT):
        driver.send_up(Packet(b"", 100, ecn))
    up.send(0.5, Packet(b"", 100, Ecn.NOT_ECT, flow=4))
    stats = driver.stats().up
    assert stats.subject == SubjectStats(3, 300, 0, None, None)
    assert (stats.packets_sent, stats.queue.packets, stats.queue.l_packets) == (4, 3, 1)
    clock.now += 1.0  # Late: what the links wanted is what counts.
    driver.deliver_due()
    stats = driver.stats().up
    assert stats.subject.bytes_delivered == 300
    assert stats.subject.delay_p50_s == pytest.approx(0.07)
    assert stats.subject.delay_max_s == pytest.approx(0.08)
    assert driver.stats().clock_s == 1.5
    assert driver.stats().up.subject.delay_p50_s is None, "nothing came out since"


@pytest.mark.parametrize(
    "arguments", [("proxy", "clean", "--to", "127.0.0.1:9"), ("run", "clean", "--", "true")]
)
def test_live_without_a_terminal_says_so(arguments: tuple[str, ...]) -> None:
    ran = subprocess.run(
        [*NETEM, *arguments[:2], "--live", *arguments[2:]],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert ran.returncode == 1
    assert "not a terminal" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""


def test_a_capture_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    ran = subprocess.run(
        [*NETEM, "proxy", "clean", "--to", "127.0.0.1:9", "--pcap", str(tmp_path / "no" / "file")],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert ran.returncode == 1
    assert "cannot be written" in ran.stderr
    assert "Traceback" not in ran.stderr


def payloads(pcap: bytes) -> list[bytes]:
    """Return what the UDP datagrams of a pcap file carry."""
    found, at = [], 24
    while at < len(pcap):
        kept = int.from_bytes(pcap[at + 8 : at + 12], "little")
        found.append(pcap[at + 16 + 28 : at + 16 + kept])
        at += 16 + kept
    return found


def test_the_proxy_writes_what_it_forwards(tmp_path: Path) -> None:
    file = tmp_path / "out.pcap"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target:
        target.bind(("127.0.0.1", 0))
        target.settimeout(DEADLINE_S)
        to = f"127.0.0.1:{target.getsockname()[1]}"
        with subprocess.Popen(
            [*NETEM, "proxy", "clean", "--to", to, "--pcap", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                address = parse_address(process.stdout.readline().split()[1])
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                    client.settimeout(DEADLINE_S)
                    for index in range(3):
                        client.sendto(b"up %d" % index, address)
                        _, peer = target.recvfrom(100)
                    target.sendto(b"down", peer)
                    client.recv(100)
                # It may still refuse the run for its lateness; the file is complete all the same.
                process.send_signal(signal.SIGTERM)
                process.communicate(timeout=DEADLINE_S)
            finally:
                process.kill()
    assert payloads(file.read_bytes()) == [b"up 0", b"up 1", b"up 2", b"down"]


def test_on_a_terminal_the_proxy_is_shown_and_gives_the_terminal_back() -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*NETEM, "proxy", "clean", "--to", "127.0.0.1:9", "--live"],
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
    ) as process:
        os.close(theirs)
        shown = b""
        is_told = False
        try:
            with contextlib.suppress(OSError):  # So Linux says that the other end is closed.
                while select.select([ours], [], [], DEADLINE_S)[0] and (
                    data := os.read(ours, 4096)
                ):
                    shown += data
                    if not is_told and b"router lateness" in shown and b"up: " in shown:
                        process.send_signal(signal.SIGTERM)
                        is_told = True  # While Python ends, a second one would strike unhandled.
            process.wait(DEADLINE_S)
        finally:
            process.kill()
    os.close(ours)
    assert b"LISTENING" in shown
    for escape in (b"\x1b[?1049h", b"\x1b[?1049l"):  # To the other screen, and back.
        assert escape in shown
    assert process.returncode == 0
