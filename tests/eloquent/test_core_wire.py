"""The wire format, byte by byte: a change here is a change of the protocol."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eloquent.core import wire
from eloquent.core.varint import VARINT_MAX, encode_varint
from eloquent.core.wire import (
    Arrival,
    Bundle,
    Ended,
    Frame,
    Rejected,
    Reply,
    Report,
    Request,
    UnsupportedVersionError,
    bundle_header_size,
    decode_frame,
    decode_reply,
    decode_request,
    encode_bundle,
    encode_reply,
    encode_report,
    encode_request,
)
from eloquent.errors import WireError

TURN_ID = bytes(range(16))
SECRET = bytes(range(32, 48))
DIGEST = bytes(range(16, 32))

FRAMES: list[tuple[Frame, str]] = [
    # type 01 | turn | number | offset | data
    (Bundle(0, 0, 0, b"a"), "01 00 00 00 61"),
    (Bundle(5, 64, 16_384, b"Hi!"), "01 05 4040 80004000 486921"),
    (
        Bundle(16_383, 1 << 30, 15_293, b"\x00"),
        "01 7fff c000000040000000 7bbd 00",
    ),
    # type 03: the same, and its arrival is to be reported
    (Bundle(5, 64, 16_384, b"Hi!", is_timed=True), "03 05 4040 80004000 486921"),
    # type 02 | turn | contiguous | newest + 1 | unread
    (Report(0, 0, -1), "02 00 00 00 00"),
    (Report(7, 1000, 62, 1000), "02 07 43e8 3f 43e8"),
    (Report(1 << 30, (1 << 62) - 1, 63), "02 c000000040000000 ffffffffffffffff 4040 00"),
    # type 04: the same, then for each arrival what its number and its time (zigzag) are ahead
    (Report(0, 9, 2, 0, (Arrival(2, 1000),)), "04 00 09 03 00 02 47d0"),
    (
        Report(0, 9, 5, 0, (Arrival(2, 1000), Arrival(3, 999), Arrival(5, 1331))),
        "04 00 09 06 00 02 47d0 01 01 02 4298",
    ),
]

REQUESTS: list[tuple[Request, str]] = [
    # version 02 | turn id (16 bytes) | secret (16) | flags | offset | length | body
    (Request(TURN_ID, b"{}", SECRET), f"02 {TURN_ID.hex()} {SECRET.hex()} 01 00 02 7b7d"),
    (
        Request(TURN_ID, b"", SECRET, 64, is_owner=False),
        f"02 {TURN_ID.hex()} {SECRET.hex()} 00 4040 00",
    ),
    (
        Request(TURN_ID, b"x" * 64, SECRET),
        f"02 {TURN_ID.hex()} {SECRET.hex()} 01 00 4040" + "78" * 64,
    ),
    # version 03: before the body's length, that of the key, and the key
    (
        Request(TURN_ID, b"{}", SECRET, 64, key="kß"),
        f"03 {TURN_ID.hex()} {SECRET.hex()} 01 4040 03 6bc39f 02 7b7d",
    ),
]

REPLIES: list[tuple[Reply, str]] = [
    # type 01 | length | MessagePack array of 2: code, message
    (Rejected("busy", "Full."), "01 0c 92 a4 62757379 a5 46756c6c2e"),
    # a third where it is known when to ask again: seconds
    (
        Rejected("busy", "Full.", 1.5),
        "01 15 93 a4 62757379 a5 46756c6c2e cb3ff8000000000000",
    ),
    # type 02 | length | MessagePack array of 2: length, digest
    (Ended(1000, DIGEST), "02 16 92 cd03e8 c410 101112131415161718191a1b1c1d1e1f"),
]

numbers = st.integers(0, 300) | st.integers(0, (1 << 62) - (1 << 20))
bundles = st.builds(
    Bundle, numbers, numbers, numbers, st.binary(min_size=1, max_size=50), st.booleans()
)
names = st.binary(min_size=16, max_size=16)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
requests = st.builds(Request, names, st.binary(max_size=100), names, numbers, st.booleans(), texts)
seconds = st.floats(0, 1e6)
replies = st.builds(Rejected, texts, texts, seconds) | st.builds(
    Ended, st.integers(0, 1 << 62), st.binary(max_size=20)
)


@st.composite
def valid_reports(draw: st.DrawFn) -> Report:
    contiguous = draw(numbers)
    newest = draw(st.just(-1) | numbers)
    held = draw(st.sets(st.integers(0, min(newest, 300)), max_size=9)) if newest >= 0 else set()
    times = st.integers(-(1 << 30), 1 << 40)
    arrivals = tuple(Arrival(number, draw(times)) for number in sorted(held))
    return Report(draw(numbers), contiguous, newest, draw(st.integers(0, contiguous)), arrivals)


reports = valid_reports()
frame_payloads = bundles.map(encode_bundle) | reports.map(encode_report)


@st.composite
def damaged(draw: st.DrawFn, messages: st.SearchStrategy[bytes]) -> bytes:
    """A valid message with some bytes replaced, put in, taken out or cut off."""
    data = bytearray(draw(messages))
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, len(data)))
        new = draw(st.binary(max_size=9))
        data[position : position + draw(st.integers(0, 9))] = new
    return bytes(data)


def encode_frame(frame: Frame) -> bytes:
    return encode_bundle(frame) if isinstance(frame, Bundle) else encode_report(frame)


def test_the_constants_that_are_on_the_wire() -> None:
    assert wire.ALPN == "eloquent"
    assert (wire.KEYLESS_VERSION, wire.PROTOCOL_VERSION) == (2, 3)
    assert (wire.FRAME_BUNDLE, wire.FRAME_REPORT) == (1, 2)
    assert (wire.FRAME_TIMED_BUNDLE, wire.FRAME_TIMED_REPORT) == (3, 4)
    assert (wire.REPLY_REJECTED, wire.REPLY_ENDED) == (1, 2)
    assert (wire.TURN_ID_BYTES, wire.SECRET_BYTES) == (16, 16)
    assert wire.FLAG_OWNER == 1


@pytest.mark.parametrize(("frame", "encoded"), FRAMES)
def test_the_exact_bytes_of_a_frame(frame: Frame, encoded: str) -> None:
    assert encode_frame(frame) == bytes.fromhex(encoded)
    assert decode_frame(bytes.fromhex(encoded)) == frame


@pytest.mark.parametrize(("request_", "encoded"), REQUESTS)
def test_the_exact_bytes_of_a_request(request_: Request, encoded: str) -> None:
    assert encode_request(request_) == bytes.fromhex(encoded)
    assert decode_request(bytes.fromhex(encoded)) == request_


@pytest.mark.parametrize(("reply", "encoded"), REPLIES)
def test_the_exact_bytes_of_a_reply(reply: Reply, encoded: str) -> None:
    assert encode_reply(reply) == bytes.fromhex(encoded)
    assert decode_reply(bytes.fromhex(encoded)) == reply


@given(bundles | reports)
def test_frames_round_trip(frame: Frame) -> None:
    assert decode_frame(encode_frame(frame)) == frame


@given(requests)
def test_requests_round_trip(request_: Request) -> None:
    assert decode_request(encode_request(request_)) == request_


@given(replies)
def test_replies_round_trip(reply: Reply) -> None:
    assert decode_reply(encode_reply(reply)) == reply


@given(bundles)
def test_the_header_size_is_what_stands_before_the_data(bundle: Bundle) -> None:
    size = bundle_header_size(bundle.turn, bundle.number, bundle.offset)
    assert encode_bundle(bundle)[size:] == bundle.data


@pytest.mark.parametrize(
    "encoded",
    [
        "",
        "01",
        "01 00",
        "01 00 00",
        "01 00 00 40",
        "01 00 00 00",  # no data
        "01 00 00 ffffffffffffffff 61",  # beyond the largest offset
        "01 00 ffffffffffffffff 00 61",  # no report could name this number
        "02 00 00 00",
        "02 00 00 00 00 00",  # bytes after the end
        "02 00 01 00 02",  # more unread than received
        "00",
        "03 00 00 00",
        "04 00 09 03 00",  # announces arrivals and has none
        "04 00 09 03 00 03 00",  # a bundle above the newest
        "04 00 09 03 00 01 00 00 00",  # the same bundle twice
        "04 00 09 03 00 01",  # cut short
        "05 00 00 00 00",
        "4040 00 00 00",
    ],
)
def test_what_is_no_frame_is_refused(encoded: str) -> None:
    with pytest.raises(WireError):
        decode_frame(bytes.fromhex(encoded))


@given(st.sampled_from([encoded for _, encoded in REQUESTS]), st.data())
def test_a_request_cut_short_is_refused(encoded: str, data: st.DataObject) -> None:
    whole = bytes.fromhex(encoded)
    with pytest.raises(WireError):
        decode_request(whole[: data.draw(st.integers(0, len(whole) - 1))])


def test_something_after_a_request_is_refused() -> None:
    with pytest.raises(WireError, match="follows"):
        decode_request(encode_request(Request(TURN_ID, b"{}")) + b"x")


@pytest.mark.parametrize("version", [0, 1, 1 << 40])
def test_another_version_is_told_apart(version: int) -> None:
    with pytest.raises(UnsupportedVersionError, match=f"version {version}"):
        decode_request(encode_request(Request(TURN_ID, b"{}"), version))


def test_unknown_flags_of_a_request_are_refused() -> None:
    encoded = bytearray(encode_request(Request(TURN_ID, b"{}", SECRET)))
    encoded[33] |= 2
    with pytest.raises(WireError, match="flags"):
        decode_request(bytes(encoded))


@pytest.mark.parametrize("size", [0, 15, 17])
def test_a_turn_id_or_secret_of_another_size_is_not_encoded(size: int) -> None:
    with pytest.raises(ValueError, match="turn id"):
        encode_request(Request(bytes(size), b"{}", SECRET))
    with pytest.raises(ValueError, match="secret"):
        encode_request(Request(TURN_ID, b"{}", bytes(size)))


@pytest.mark.parametrize(
    "encoded",
    [
        "",
        "01",
        "01 05 92",
        "01 01 92 a0 a0",  # longer than announced
        "03 03 92 a0 a0",  # unknown type
        "01 03 92 a0 01",  # a number for a text
        "01 04 92 a0 a1 ff",  # broken UTF-8
        "01 02 91 a0",  # a field is missing
        "02 03 92 a0 a0",
        "01 00",
    ],
)
def test_what_is_no_reply_is_refused(encoded: str) -> None:
    with pytest.raises(WireError):
        decode_reply(bytes.fromhex(encoded))


def test_a_reply_nested_too_deeply_is_refused() -> None:
    body = b"\x93\xa0\xa0" + b"\x91" * 50_000 + b"\x90"
    with pytest.raises(WireError):
        decode_reply(b"\x01" + encode_varint(len(body)) + body)


def test_fields_that_a_later_version_adds_to_a_reply_are_passed_over() -> None:
    assert decode_reply(bytes.fromhex("01 05 94 a0 a0 00 07")) == Rejected("", "")


def test_a_version_2_request_is_read_by_a_server_that_knows_keys() -> None:
    request = Request(TURN_ID, b"{}", SECRET)
    assert decode_request(encode_request(request, version=3)) == request
    assert decode_request(encode_request(request, version=2)) == request


def test_a_key_of_256_bytes_is_the_longest() -> None:
    longest = Request(TURN_ID, b"", SECRET, key="k" * 256)
    encoded = encode_request(longest)
    assert decode_request(encoded) == longest
    assert len(encoded) <= wire.MAX_REQUEST_HEAD_BYTES
    with pytest.raises(ValueError, match="at most 256 bytes"):
        encode_request(Request(TURN_ID, b"", SECRET, key="k" * 257))
    head = bytes.fromhex(f"03 {TURN_ID.hex()} {SECRET.hex()} 01 00")
    for key in ("4101" + "6b" * 257 + "00", "03 6b6b", "02 ffff 00"):
        with pytest.raises(WireError, match="key"):
            decode_request(head + bytes.fromhex(key))


def test_a_key_is_not_in_what_a_request_looks_like_in_logs() -> None:
    assert "elq_secret" not in repr(Request(TURN_ID, b"", SECRET, key="elq_secret"))


@given(
    st.binary(max_size=60) | st.binary(max_size=60).map(b"\x01".__add__) | damaged(frame_payloads)
)
def test_any_bytes_give_a_frame_or_a_wire_error(payload: bytes) -> None:
    try:
        frame = decode_frame(payload)
    except WireError:
        return
    # What was accepted can be said again, and a report about it can be made.
    assert decode_frame(encode_frame(frame)) == frame
    if isinstance(frame, Bundle):
        encode_report(Report(frame.turn, frame.offset + len(frame.data), frame.number))
        assert frame.offset + len(frame.data) <= VARINT_MAX


@given(st.binary(max_size=60) | damaged(requests.map(encode_request)))
def test_any_bytes_give_a_request_or_a_wire_error(data: bytes) -> None:
    try:
        request_ = decode_request(data)
    except WireError:
        return
    assert decode_request(encode_request(request_)) == request_


@given(st.binary(max_size=60) | damaged(replies.map(encode_reply)))
def test_any_bytes_give_a_reply_or_a_wire_error(data: bytes) -> None:
    try:
        reply = decode_reply(data)
    except WireError:
        return
    assert decode_reply(encode_reply(reply)) == reply
