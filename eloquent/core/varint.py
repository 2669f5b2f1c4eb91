"""Variable-length integers (RFC 9000 section 16): 1, 2, 4 or 8 bytes, up to 2**62 - 1."""

VARINT_MAX = (1 << 62) - 1

_LENGTHS = ((1 << 6, 1, 0x00), (1 << 14, 2, 0x40), (1 << 30, 4, 0x80), (1 << 62, 8, 0xC0))


def encode_varint(value: int) -> bytes:
    """Return `value` in the fewest bytes.

    Raises:
        ValueError: `value` is negative or above `VARINT_MAX`.
    """
    if value >= 0:
        for limit, length, prefix in _LENGTHS:
            if value < limit:
                encoded = bytearray(value.to_bytes(length, "big"))
                encoded[0] |= prefix
                return bytes(encoded)
    raise ValueError(f"{value} does not fit a varint (0 to 2**62 - 1)")


def varint_size(value: int) -> int:
    """Return how many bytes `encode_varint(value)` takes."""
    return len(encode_varint(value))


def decode_varint(data: bytes | bytearray, position: int) -> tuple[int, int] | None:
    """Return the value at `position` and the position after it, or None if bytes are missing."""
    if position >= len(data):
        return None
    length = 1 << (data[position] >> 6)
    end = position + length
    if end > len(data):
        return None
    value = int.from_bytes(data[position:end], "big") & ((1 << (8 * length - 2)) - 1)
    return value, end
