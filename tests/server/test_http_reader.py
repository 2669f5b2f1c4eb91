"""A reader over HTTP and a log: what it takes, and what it says of itself."""

import pytest

from eloquent.core.events import Event, TextDelta, encode_event
from eloquent.core.log import TokenLog
from eloquent.core.varint import encode_varint
from eloquent.core.wire import Report, Request
from eloquent.errors import RequestError
from eloquent_server.http.reader import READ_BYTES, HttpReader


def reader_of(log: TokenLog, offset: int = 0) -> HttpReader:
    reader = HttpReader(Request(bytes(16), b"", bytes(16), offset))
    reader.accept(log)
    return reader


def log_with(*texts: str) -> TokenLog:
    log = TokenLog()
    for text in texts:
        log.append(TextDelta(text))
    return log


def close(log: TokenLog) -> None:
    log.close("stop", model="m", prompt_tokens=1, completion_tokens=1)


def take_all(reader: HttpReader) -> list[Event]:
    events: list[Event] = []
    while pieces := reader.take():
        events += [piece.event for piece in pieces]
    return events


def test_events_of_all_sizes_come_whole_and_in_order() -> None:
    texts = ["a", "b" * READ_BYTES, "c" * 100_000, *("d" * 2000)]
    log = log_with(*texts)
    reader = reader_of(log)
    assert take_all(reader) == [TextDelta(text) for text in texts]
    assert not reader.is_done
    close(log)
    assert take_all(reader) == [log.end]
    assert reader.is_done


def test_it_can_begin_behind_any_piece() -> None:
    log = log_with(*(f"word{number}" for number in range(1000)))
    close(log)
    reader, pieces = reader_of(log), []
    while some := reader.take():
        pieces += some
    for number in (0, 1, 500, 999):
        rest = take_all(reader_of(log, pieces[number].offset))
        assert rest == [piece.event for piece in pieces[number + 1 :]]


def test_it_takes_only_what_was_released() -> None:
    log = TokenLog(is_held=True)
    log.append(TextDelta("a"))
    reader = reader_of(log)
    assert reader.take() == []
    log.release(log.written)
    assert take_all(reader) == [TextDelta("a")]


def test_where_no_event_starts_it_says_so_at_the_end_at_the_latest() -> None:
    log = log_with(*("word " * 100).split())
    assert take_all(reader_of(log, 1)) == []  # What stands there may be a very long event.
    close(log)
    with pytest.raises(RequestError, match="No event") as caught:
        take_all(reader_of(log, 1))
    assert caught.value.code == "bad_offset"


def test_an_event_that_would_be_longer_than_any_is_not_waited_for() -> None:
    log = log_with(*["é" * 50_000] * 12)
    with pytest.raises(RequestError, match="No event") as caught:
        reader_of(log, 100).take()
    assert caught.value.code == "bad_offset"


def test_events_of_tomorrow_are_passed_over() -> None:
    """A newer server may have stored some, before this one took its place."""
    log = TokenLog()
    unknown = bytes((99,)) + encode_varint(READ_BYTES) + bytes(READ_BYTES)
    log.extend(encode_event(TextDelta("a")) + 3 * unknown + encode_event(TextDelta("b")))
    log.release(log.written)
    assert take_all(reader_of(log)) == [TextDelta("a"), TextDelta("b")]


def test_what_its_connection_has_not_taken_is_unread() -> None:
    log = log_with("a", "b")
    reader = HttpReader(Request(bytes(16), b"", bytes(16)))
    assert reader.report is None
    reader.accept(log)
    first, second = reader.take()
    assert reader.report == Report(0, log.length, -1, unread=log.length)
    reader.wrote(first.offset)
    assert reader.report == Report(0, log.length, -1, unread=log.length - first.offset)
    reader.wrote(second.offset)
    assert reader.report == Report(0, log.length, -1, unread=0)
    reader.leave()
    assert reader.report is None


def test_a_refusal_comes_after_what_was_there_before_it() -> None:
    reader = reader_of(log_with("a"))
    reader.reject("replaced", "elsewhere", 2.0)
    assert [piece.event for piece in reader.take()] == [TextDelta("a")]
    with pytest.raises(RequestError, match="elsewhere") as caught:
        reader.take()
    assert (caught.value.code, caught.value.retry_after_s) == ("replaced", 2.0)


async def test_waiting_ends_with_news_or_in_time() -> None:
    reader = HttpReader(Request(bytes(16), b"", bytes(16)))
    assert not await reader.wait(0.01)
    reader.log_grew()
    assert await reader.wait(10)
    assert not await reader.wait(0.01)
