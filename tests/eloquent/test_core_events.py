"""Events come out of the log's bytes as they went in, or a documented error does."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eloquent.core.events import (
    MAX_EVENT_BYTES,
    ChosenLogprob,
    Delta,
    End,
    Event,
    EventDecoder,
    Extra,
    Failure,
    Logprobs,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    encode_event,
    log_digest,
)
from eloquent.core.varint import encode_varint
from eloquent.errors import IntegrityError, WireError

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
scores = st.floats(max_value=0, allow_nan=False)
tops = st.lists(st.builds(TokenLogprob, st.binary(max_size=8), scores), max_size=3).map(tuple)
chosen = st.builds(ChosenLogprob, st.binary(max_size=8), scores, tops)
logprobs = st.builds(Logprobs, st.lists(chosen, max_size=3).map(tuple))
calls = st.builds(ToolCallDelta, st.integers(0, 300), texts, texts, texts)
extras = st.dictionaries(texts, texts).map(lambda fields: Extra(json.dumps(fields).encode()))
deltas = (
    st.builds(TextDelta, texts)
    | st.builds(ReasoningDelta, texts)
    | st.builds(Failure, texts, texts)
    | logprobs
    | calls
    | extras
)


def raw(kind: int, body: bytes) -> bytes:
    return bytes((kind,)) + encode_varint(len(body)) + body


def end_after(before: bytes, **changes: object) -> End:
    digest = log_digest()
    digest.update(before)
    fields = {
        "finish_reason": "stop",
        "model": "m",
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "length": len(before),
        "digest": digest.digest(),
    }
    return End(**{**fields, **changes})  # type: ignore[arg-type]


def closed_log(events: list[Delta]) -> tuple[bytes, list[Event]]:
    before = b"".join(map(encode_event, events))
    end = end_after(before)
    return before + encode_event(end), [*events, end]


logs = st.lists(deltas, max_size=6).map(closed_log)


@pytest.mark.parametrize(
    ("event", "encoded"),
    [
        # kind 01 | length | UTF-8
        (TextDelta("Grüß"), "01 06 4772c3bcc39f"),
        (TextDelta(""), "01 00"),
        (TextDelta("x" * 64), "01 4040" + "78" * 64),
        # kind 02 | length | MessagePack array of 2: code, message
        (Failure("oom", "No memory."), "02 10 92 a3 6f6f6d aa 4e6f206d656d6f72792e"),
        # kind 03 | length | array of 6: reason, model, prompt and completion tokens, length, digest
        (
            End("stop", "m", 3, 200, 1000, bytes(range(16))),
            "03 20 96 a4 73746f70 a1 6d 03 ccc8 cd03e8 c410 000102030405060708090a0b0c0d0e0f",
        ),
        # a seventh where tokens were cached
        (
            End("stop", "m", 3, 200, 1000, bytes(range(16)), 2),
            "03 21 97 a4 73746f70 a1 6d 03 ccc8 cd03e8 c410 000102030405060708090a0b0c0d0e0f 02",
        ),
        # kind 04 | length | array of tokens: bytes, logprob, alternatives of bytes and logprob
        (
            Logprobs((ChosenLogprob(b"\xc3", -0.5, (TokenLogprob(b"a", -1.0),)),)),
            "04 1c 91 93 c401c3 cbbfe0000000000000 91 92 c40161 cbbff0000000000000",
        ),
        # and an eighth where the engine behind the server counts in its own words
        (
            End("stop", "m", 3, 200, 1000, bytes(range(16)), 0, b"{}"),
            "03 25 98 a4 73746f70 a1 6d 03 ccc8 cd03e8 c410 000102030405060708090a0b0c0d0e0f 00"
            " c402 7b7d",
        ),
        # kind 05 | length | UTF-8
        (ReasoningDelta("Hm"), "05 02 486d"),
        # kind 06 | length | array of 4: index, id, name, arguments
        (ToolCallDelta(1, "c", "f", "{}"), "06 09 94 01 a1 63 a1 66 a2 7b7d"),
        # kind 07 | length | JSON object
        (Extra(b'{"a":1}'), "07 07 7b2261223a317d"),
    ],
)
def test_the_exact_bytes_of_an_event(event: Event, encoded: str) -> None:
    assert encode_event(event) == bytes.fromhex(encoded)


def test_the_digest_is_blake2b_of_16_bytes() -> None:
    # RFC 7693's function with an output of 16 bytes, over nothing.
    assert log_digest().hexdigest() == "cae66941d9efbd404e4d88758ea67670"


@given(logs, st.data())
def test_a_log_may_be_split_at_any_bytes(
    log: tuple[bytes, list[Event]], data: st.DataObject
) -> None:
    encoded, events = log
    cuts = data.draw(st.lists(st.integers(0, len(encoded)), max_size=8).map(sorted))
    decoder = EventDecoder()
    out: list[Event] = []
    for start, stop in zip([0, *cuts], [*cuts, len(encoded)], strict=True):
        out += decoder.feed(encoded[start:stop])
    assert out == events
    assert decoder.end == events[-1]


def test_an_event_comes_with_its_last_byte_and_no_earlier() -> None:
    encoded, events = closed_log([TextDelta("Grüß"), Failure("a", "b")])
    decoder = EventDecoder()
    ends = [len(encode_event(TextDelta("Grüß"))), len(encode_event(Failure("a", "b")))]
    due = {ends[0]: [events[0]], sum(ends): [events[1]], len(encoded): [events[2]]}
    for position in range(len(encoded)):
        assert decoder.feed(encoded[position : position + 1]) == due.get(position + 1, [])
        assert (decoder.end is None) == (position + 1 < len(encoded))


def test_unknown_kinds_are_passed_over_and_counted_in_the_end() -> None:
    before = raw(9, b"new") + encode_event(TextDelta("a")) + raw(0, b"") + raw(255, b"\xff" * 70)
    end = end_after(before)
    decoder = EventDecoder()
    assert decoder.feed(before + encode_event(end)) == [TextDelta("a"), end]


@pytest.mark.parametrize(
    "changes", [{"length": 2}, {"length": 4}, {"digest": bytes(16)}, {"digest": b""}]
)
def test_an_end_that_does_not_agree_is_an_integrity_error(changes: dict[str, object]) -> None:
    before = encode_event(TextDelta("a"))
    assert len(before) == 3
    decoder = EventDecoder()
    with pytest.raises(IntegrityError):
        decoder.feed(before + encode_event(end_after(before, **changes)))
    assert decoder.end is None


def test_a_changed_byte_is_an_integrity_error() -> None:
    encoded, _ = closed_log([TextDelta("a"), TextDelta("b")])
    with pytest.raises(IntegrityError):
        EventDecoder().feed(encoded.replace(b"a", b"x", 1))


@pytest.mark.parametrize("extra", [b"\x01", b"\x01\x01a", b"\xff"])
@pytest.mark.parametrize("together", [True, False])
def test_bytes_after_the_end_are_a_wire_error(extra: bytes, together: bool) -> None:
    encoded, events = closed_log([TextDelta("a")])
    decoder = EventDecoder()
    if together:
        with pytest.raises(WireError, match="follow"):
            decoder.feed(encoded + extra)
    else:
        assert decoder.feed(encoded) == events
        assert decoder.feed(b"") == []
        with pytest.raises(WireError, match="follow"):
            decoder.feed(extra)


@pytest.mark.parametrize(
    "encoded",
    [
        raw(1, b"\xc3"),  # a code point cut in two
        raw(1, b"\xff"),
        raw(1, "\ud800".encode("utf-8", "surrogatepass")),
        raw(2, b""),
        raw(2, bytes.fromhex("91 a0")),
        raw(2, bytes.fromhex("92 a0 a1ff")),
        raw(2, bytes.fromhex("92 a0 01")),
        raw(3, bytes.fromhex("96 a0 a0 00 00 00")),
        raw(3, bytes.fromhex("96 a0 a0 00 00 a0 c400")),
        raw(4, bytes.fromhex("91 92 c400 00")),
        raw(5, b"\xff"),
        raw(6, bytes.fromhex("93 00 a0 a0")),
        raw(6, bytes.fromhex("94 ff a0 a0 a0")),  # index -1
        raw(7, b"[]"),
        raw(7, b"{"),
        raw(4, bytes.fromhex("91 93 c400 cbbfe0000000000000 91 91 c400")),
    ],
)
def test_a_body_that_cannot_be_read_is_a_wire_error(encoded: bytes) -> None:
    with pytest.raises(WireError):
        EventDecoder().feed(encoded)


@pytest.mark.parametrize("kind", [2, 3, 4])
def test_a_body_nested_too_deeply_is_a_wire_error(kind: int) -> None:
    known = {2: "92 a0 a0", 3: "96 a0 a0 00 00 00 c400", 4: "90"}
    fields = bytearray.fromhex(known[kind])
    fields[0] += 1
    with pytest.raises(WireError):
        EventDecoder().feed(raw(kind, bytes(fields) + b"\x91" * 100_000 + b"\x90"))


def test_the_largest_event_is_taken() -> None:
    event = TextDelta("x" * MAX_EVENT_BYTES)
    assert EventDecoder().feed(encode_event(event)) == [event]


def test_an_event_that_announces_too_much_is_refused_at_once() -> None:
    with pytest.raises(WireError, match=str(MAX_EVENT_BYTES + 1)):
        EventDecoder().feed(b"\x01" + encode_varint(MAX_EVENT_BYTES + 1))


def test_an_event_that_is_too_large_is_not_encoded() -> None:
    with pytest.raises(ValueError, match="at most"):
        encode_event(TextDelta("x" * (MAX_EVENT_BYTES + 1)))


@given(st.lists(st.binary(max_size=30), max_size=4))
def test_any_bytes_give_events_or_a_documented_error(pieces: list[bytes]) -> None:
    decoder = EventDecoder()
    try:
        for piece in pieces:
            decoder.feed(piece)
    except (WireError, IntegrityError):
        pass


@given(logs, st.data())
def test_a_damaged_log_gives_events_or_a_documented_error(
    log: tuple[bytes, list[Event]], data: st.DataObject
) -> None:
    encoded, events = log
    damaged = bytearray(encoded)
    position = data.draw(st.integers(0, len(encoded)))
    damaged[position : position + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=5))
    decoder = EventDecoder()
    try:
        out = decoder.feed(bytes(damaged))
    except (WireError, IntegrityError):
        return
    # Only the end's own fields, which nothing guards but the stream's confirmation, may differ.
    if decoder.end is not None:
        assert out[:-1] == events[:-1]
