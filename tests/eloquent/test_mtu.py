"""Packet sizes: what makes them shrink, what does not, and how they grow back."""

import asyncio
import itertools
import random

import pytest
from session_world import World, in_world, now, read
from telling import Telling

from eloquent.core.mtu import PROBE_FIRST_S, SIZES_BYTES, PacketSize

SRTT_S = 0.1
IP_UDP_BYTES = 28
LONG = [f"{number:04d} " + "x" * 95 for number in range(600)]


def miss(size: PacketSize, count: int, *, bytes_: int, start_s: float, heard: bool = True) -> None:
    """Send packets of which nothing is heard."""
    for index in range(count):
        sent_s = start_s + 0.2 * index
        size.on_sent(bytes_, sent_s)
        if heard:
            size.on_heard(sent_s + 0.15)
        size.shrink_if_missed(sent_s + 0.15, SRTT_S)


def test_packets_begin_at_quics_least() -> None:
    assert PacketSize().next_bytes(0.0) == SIZES_BYTES[0] == 1200


def test_large_packets_lost_in_a_row_while_the_peer_is_heard_shrink_them() -> None:
    size = PacketSize()
    miss(size, 4, bytes_=1200, start_s=0.0)
    assert size.bytes == 1000


def test_large_packets_lost_while_nothing_is_heard_say_nothing() -> None:
    size = PacketSize()
    miss(size, 50, bytes_=1200, start_s=0.0, heard=False)
    assert size.bytes == 1200


def test_a_burst_of_loss_says_nothing() -> None:
    size = PacketSize()
    for index in range(50):
        size.on_sent(1200, 0.001 * index)
    size.on_heard(0.25)
    size.shrink_if_missed(0.25, SRTT_S)
    size.on_acked(1200)
    size.on_heard(5.0)
    size.shrink_if_missed(5.0, SRTT_S)
    assert size.bytes == 1200


def test_one_large_packet_through_is_enough_to_keep_the_size() -> None:
    size = PacketSize()
    for begin_s in range(10):
        miss(size, 2, bytes_=1200, start_s=float(begin_s))
        size.on_acked(1200)
    assert size.bytes == 1200


def test_small_packets_lost_say_nothing() -> None:
    size = PacketSize()
    miss(size, 50, bytes_=900, start_s=0.0)
    assert size.bytes == 1200


def test_the_smallest_size_is_the_last() -> None:
    size = PacketSize()
    for index in range(100):
        miss(size, 4, bytes_=size.bytes, start_s=float(index))
    assert size.bytes == SIZES_BYTES[-1]


def test_a_larger_size_is_tried_ever_more_rarely_and_kept_once_it_passes() -> None:
    size = PacketSize()
    miss(size, 3, bytes_=1200, start_s=0.0)
    tried = []
    for index in range(12000):
        time = 1.0 + 0.1 * index
        if size.next_bytes(time) > size.bytes:
            tried.append(time)
            size.on_sent(size.next_bytes(time), time)
    assert tried[0] == pytest.approx(PROBE_FIRST_S, abs=1.0)
    assert len(tried) <= 8
    assert size.bytes == 1000
    size.on_acked(1200)
    assert size.next_bytes(3000.0) == size.bytes == 1200


@pytest.mark.parametrize("limit", [1100, 900, 600, 400])
def test_an_answer_goes_on_when_the_path_drops_large_packets(limit: int) -> None:
    async def play(world: World) -> tuple[str, float]:
        times: list[float] = []
        reading = asyncio.ensure_future(read(world.session.ask(b"{}"), times))
        await asyncio.sleep(2.0)
        world.down.max_bytes = limit + IP_UDP_BYTES
        text = await reading
        gaps = [later - time for time, later in itertools.pairwise(times)]
        return text, max(gaps)

    text, gap_s = in_world(play, lambda: Telling(LONG, 0.01), limit_s=60.0)
    assert text == "".join(LONG)
    assert gap_s < 4.0


def test_the_size_comes_back_with_the_path() -> None:
    async def play(world: World) -> tuple[int, int]:
        reading = asyncio.ensure_future(read(world.session.ask(b"{}")))
        await asyncio.sleep(2.0)
        world.down.max_bytes = 900
        await asyncio.sleep(4.0)
        shrunk_s = now()
        world.down.max_bytes = None
        for _ in range(3):  # each leaves more to send than one packet holds
            await asyncio.sleep(5.0)
            await world.cut(0.8)
        await reading
        before = max(size for time, size in world.down.sizes if shrunk_s - 1 < time < shrunk_s)
        return before, max(size for time, size in world.down.sizes if time > shrunk_s + 10)

    before, after = in_world(play, lambda: Telling(LONG * 4, 0.01), limit_s=120.0)
    assert before <= 900
    assert after == 1228


def test_twenty_percent_of_loss_hardly_ever_shrinks_packets() -> None:
    seed = 5
    rng = random.Random(seed)
    size, shrunk_s = PacketSize(), 0.0
    for index in range(20000):
        time = 0.05 * index
        size.on_heard(time)
        sent = size.next_bytes(time)
        size.on_sent(sent, time)
        if rng.random() >= 0.2:
            size.on_acked(sent)
        size.shrink_if_missed(time + 0.01, SRTT_S)
        shrunk_s += 0.05 * (size.bytes < 1200)
    assert shrunk_s < 0.05 * 1000, f"seed {seed}"
