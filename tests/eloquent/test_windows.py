"""Slow readers: what they hold is bounded, each for itself and all of a connection together."""

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from session_world import World, in_world, read
from telling import Telling

from eloquent.core.events import TextDelta
from eloquent.core.log import TokenLog
from eloquent.core.turns import SLOW_READER_S
from eloquent.core.windows import ReaderWindow, ReaderWindows
from eloquent.core.wire import CONNECTION_WINDOW_BYTES, LEAST_WINDOW_BYTES, READER_WINDOW_BYTES
from eloquent.errors import RequestError

LONG = TokenLog()
LONG.append(TextDelta("x" * 1_000_000))


def fill(window: ReaderWindow) -> int:
    """Send a reader all that it may have; return how much it then holds."""
    window.read(window.sent, window.length)
    return window.sent


def test_a_reader_alone_is_sent_its_window_and_no_more() -> None:
    window = ReaderWindows().open(LONG, 0)
    assert fill(window) == fill(window) == READER_WINDOW_BYTES
    assert window.is_full
    window.on_taken(1000)
    assert fill(window) == READER_WINDOW_BYTES + 1000


def test_what_an_offset_leaves_out_counts_for_nothing() -> None:
    windows = ReaderWindows()
    window = windows.open(LONG, 900_000)
    assert windows.unread == 0
    fill(window)
    assert windows.unread == window.sent - 900_000
    assert not window.is_full


def test_all_readers_of_a_connection_together_are_bounded() -> None:
    windows = ReaderWindows()
    for _ in range(128):
        fill(windows.open(LONG, 0))
    assert windows.unread <= CONNECTION_WINDOW_BYTES + 128 * LEAST_WINDOW_BYTES


def test_readers_that_take_nothing_share_alike() -> None:
    windows = ReaderWindows()
    readers = [windows.open(LONG, 0) for _ in range(20)]
    while any(reader.sent < reader.length for reader in readers):
        for reader in readers:  # in rotation, as a connection does
            reader.read(reader.sent, reader.sent + 1000)
    held = [reader.sent for reader in readers]
    assert max(held) - min(held) <= 1000
    assert sum(held) > 0.9 * CONNECTION_WINDOW_BYTES


def test_a_reader_that_takes_all_is_not_held_up_by_those_that_take_nothing() -> None:
    windows = ReaderWindows()
    for _ in range(50):
        fill(windows.open(LONG, 0))
    reader = windows.open(LONG, 0)
    for _ in range(10):
        before = reader.sent
        fill(reader)
        assert reader.sent - before >= LEAST_WINDOW_BYTES
        reader.on_taken(reader.sent)


def test_what_a_reader_held_is_free_when_it_goes() -> None:
    windows = ReaderWindows()
    gone = [windows.open(LONG, 0) for _ in range(20)]
    for reader in gone:
        fill(reader)
    for reader in gone:
        reader.close()
    assert windows.unread == 0
    assert fill(windows.open(LONG, 0)) == READER_WINDOW_BYTES


def test_a_reader_is_slow_a_minute_after_it_last_took_something() -> None:
    window = ReaderWindows().open(LONG, 0)
    fill(window)
    window.look(1.0)
    window.look(2.0)
    assert window.slow_at == 1.0 + SLOW_READER_S
    window.on_taken(10)
    fill(window)
    window.look(50.0)
    assert window.slow_at == 50.0 + SLOW_READER_S


def test_a_window_that_others_have_closed_and_opened_again_is_no_slow_reader() -> None:
    windows = ReaderWindows()
    log = TokenLog()
    log.append(TextDelta("x" * 100_000))
    others = [windows.open(LONG, 0) for _ in range(20)]
    for other in others:
        fill(other)
    window = windows.open(log, 0)
    fill(window)
    window.look(1.0)
    assert window.slow_at is not None
    for other in others:
        other.close()
    window.look(2.0)
    assert window.slow_at is None


@given(seed=st.integers(0, 2**32))
def test_nothing_that_was_sent_is_ever_beyond_the_limit_and_the_sum_adds_up(seed: int) -> None:
    rng = random.Random(seed)
    windows = ReaderWindows(reader_bytes=300, connection_bytes=1000, least_bytes=50)
    readers: list[tuple[ReaderWindow, int]] = []
    for _ in range(200):
        match rng.choice(("open", "send", "send", "take", "close")):
            case "open" if len(readers) < 8:
                readers.append((windows.open(LONG, start := rng.randrange(1000)), start))
            case "send" if readers:
                window, _ = rng.choice(readers)
                size = rng.randrange(1, 400)
                assert len(window.read(window.sent, window.sent + size)) <= 300
            case "take" if readers:
                index = rng.randrange(len(readers))
                window, taken = readers[index]
                taken = rng.randint(taken, window.sent)
                window.on_taken(taken)
                readers[index] = window, taken
            case "close" if readers:
                readers.pop(rng.randrange(len(readers)))[0].close()
        assert all(window.sent <= window.limit for window, _ in readers)
        assert windows.unread == sum(window.sent - taken for window, taken in readers)
        assert windows.unread <= 1000 + 8 * 50


def test_turns_that_nobody_reads_do_not_hold_up_one_that_is_read() -> None:
    """The same over QUIC datagrams: the sum is bounded, and what is not read ends by name."""

    async def play(world: World) -> tuple[int, str, set[str]]:
        idle = [world.session.ask(b"{%d}" % number) for number in range(20)]
        await asyncio.sleep(20.0)
        assert world.listener is not None
        (peer,) = world.listener._peers
        unread = peer.connection._windows.unread
        text = await read(world.session.ask(b"{}"))
        await asyncio.sleep(SLOW_READER_S)
        codes = set()
        for turn in idle:
            with pytest.raises(RequestError) as caught:
                await read(turn)
            codes.add(caught.value.code)
        return unread, text, codes

    long = ["x" * 10_000] * 40
    unread, text, codes = in_world(play, lambda: Telling(long, 0.01))
    assert unread > 0.8 * CONNECTION_WINDOW_BYTES
    assert unread <= CONNECTION_WINDOW_BYTES + 20 * LEAST_WINDOW_BYTES
    assert text == "".join(long)
    assert codes == {"slow_reader"}
