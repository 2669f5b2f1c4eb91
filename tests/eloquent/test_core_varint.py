"""Varints are those of RFC 9000."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eloquent.core.varint import VARINT_MAX, decode_varint, encode_varint, varint_size

RFC_9000_APPENDIX_A1 = [
    ("c2197c5eff14e88c", 151_288_809_941_952_652),
    ("9d7f3e7d", 494_878_333),
    ("7bbd", 15_293),
    ("25", 37),
]

LARGEST_AND_SMALLEST_OF_EACH_SIZE = [
    (0, 1),
    (63, 1),
    (64, 2),
    (16_383, 2),
    (16_384, 4),
    ((1 << 30) - 1, 4),
    (1 << 30, 8),
    ((1 << 62) - 1, 8),
]

values = st.integers(0, VARINT_MAX) | st.integers(0, 1 << 16)


@pytest.mark.parametrize(("encoded", "value"), RFC_9000_APPENDIX_A1)
def test_the_vectors_of_rfc_9000(encoded: str, value: int) -> None:
    assert encode_varint(value).hex() == encoded
    assert decode_varint(bytes.fromhex(encoded), 0) == (value, len(encoded) // 2)


def test_the_long_form_of_a_small_number_is_read() -> None:
    assert decode_varint(bytes.fromhex("4025"), 0) == (37, 2)


@pytest.mark.parametrize(("value", "size"), LARGEST_AND_SMALLEST_OF_EACH_SIZE)
def test_a_number_takes_the_fewest_bytes(value: int, size: int) -> None:
    assert len(encode_varint(value)) == varint_size(value) == size


@pytest.mark.parametrize("value", [-1, VARINT_MAX + 1])
def test_what_does_not_fit_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        encode_varint(value)


@given(values, st.binary(max_size=9), st.binary(max_size=9))
def test_round_trip_anywhere_in_a_message(value: int, before: bytes, after: bytes) -> None:
    encoded = encode_varint(value)
    for data in (before + encoded + after, bytearray(before + encoded + after)):
        assert decode_varint(data, len(before)) == (value, len(before) + len(encoded))


@given(values, st.data())
def test_a_truncated_number_is_not_read(value: int, data: st.DataObject) -> None:
    encoded = encode_varint(value)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    assert decode_varint(encoded[:cut], 0) is None


def test_a_position_beyond_the_data_is_not_read() -> None:
    assert decode_varint(b"\x01", 1) is None
    assert decode_varint(b"\x01", 100) is None
