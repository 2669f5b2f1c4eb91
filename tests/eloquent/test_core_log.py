"""The token log only grows, and its end says what came before."""

import pytest

from eloquent.core.events import (
    MAX_EVENT_BYTES,
    End,
    EventDecoder,
    Failure,
    TextDelta,
    encode_event,
    log_digest,
)
from eloquent.core.log import PIECE_BYTES, TokenLog


def close(log: TokenLog, reason: str = "stop") -> End:
    return log.close(reason, model="m", prompt_tokens=4, completion_tokens=2)


def test_the_log_is_its_events_one_after_the_other() -> None:
    log = TokenLog()
    events = [TextDelta("Grüße"), TextDelta("!"), Failure("engine_died", "It died.")]
    for event in events:
        log.append(event)
    before = b"".join(map(encode_event, events))
    assert log.length == len(before)
    assert log.read(0, log.length) == before
    assert log.end is None

    end = close(log, "error")
    digest = log_digest()
    digest.update(before)
    assert end == End("error", "m", 4, 2, len(before), digest.digest())
    assert log.end == end
    assert log.read(0, log.length) == before + encode_event(end)
    assert log.length == len(before) + len(encode_event(end))


def test_reading_goes_to_the_end_at_most() -> None:
    log = TokenLog()
    log.append(TextDelta("abc"))
    assert log.read(2, 4) == b"ab"
    assert log.read(4, 100) == b"c"
    assert log.read(100, 200) == b""
    assert log.read(0, 0) == b""


def test_what_was_read_does_not_change() -> None:
    log = TokenLog()
    log.append(TextDelta("a"))
    before = log.read(0, log.length)
    log.append(TextDelta("b"))
    assert before == encode_event(TextDelta("a"))
    assert log.read(0, len(before)) == before


def test_nothing_follows_the_end() -> None:
    log = TokenLog()
    end = close(log)
    length = log.length
    with pytest.raises(ValueError, match="closed"):
        log.append(TextDelta("late"))
    with pytest.raises(ValueError, match="closed"):
        close(log, "length")
    assert (log.end, log.length) == (end, length)


@pytest.mark.parametrize("text", ["x" * (MAX_EVENT_BYTES + 1), "lone surrogate \ud800"])
def test_an_event_that_no_reader_could_take_is_refused_and_leaves_the_log_as_it_was(
    text: str,
) -> None:
    log = TokenLog()
    log.append(TextDelta("a"))
    with pytest.raises(ValueError):  # noqa: PT011  (two kinds; either names the trouble)
        log.append(TextDelta(text))
    assert log.read(0, log.length) == encode_event(TextDelta("a"))


def test_a_log_grows_by_what_another_log_of_the_turn_has() -> None:
    source = TokenLog()
    for text in ("one ", "two ", "three"):
        source.append(TextDelta(text))
    half = source.length
    end = close(source)
    data = source.read(0, source.length)
    log, events = TokenLog.restored(data[:7])
    assert events == [TextDelta("one ")]
    first = log.length
    assert log.extend(data[first:half]) == [TextDelta("two "), TextDelta("three")]
    assert log.length == first
    assert log.extend(data[half:]) == [end]
    log.release(log.written)
    assert log.read(0, log.length) == data
    assert (log.end, log.is_closed) == (end, True)


def test_what_was_written_after_another_log_s_events_has_the_right_digest() -> None:
    log, _ = TokenLog.restored(encode_event(TextDelta("one ")))
    log.append(TextDelta("two"))
    log.extend(encode_event(TextDelta(" three")))
    close(log)
    data = log.written_from(0)
    assert TokenLog.restored(data)[0].is_closed  # it checks the digest


def test_a_long_log_is_restored_with_its_events_or_without() -> None:
    source = TokenLog()
    for number in range(3 * PIECE_BYTES // 10):  # events lie across the pieces' ends
        source.append(TextDelta(f"word {number}"))
    end = close(source)
    data = source.read(0, source.length)
    log, events = TokenLog.restored(data)
    bare, none = TokenLog.restored(data, keeps_events=False)
    assert events == EventDecoder().feed(data)
    assert none == []
    assert log.read(0, log.length) == bare.read(0, bare.length) == data
    assert log.end == bare.end == end


@pytest.mark.parametrize("is_closed", [False, True])
def test_what_was_not_released_can_be_taken_back(is_closed: bool) -> None:
    log = TokenLog(is_held=True)
    log.append(TextDelta("kept"))
    kept = log.written
    log.release(kept)
    log.append(TextDelta("taken back"))
    if is_closed:
        close(log)
    log.rewind(kept)
    assert (log.written, log.length, log.is_closed) == (kept, kept, False)
    close(log)
    assert TokenLog.restored(log.written_from(0))[0].is_closed


def test_an_end_that_was_released_stays() -> None:
    log = TokenLog(is_held=True)
    end = close(log)
    log.release(log.written)
    log.rewind(0)
    assert log.end == end
