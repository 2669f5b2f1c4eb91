"""Blocks of keys and values as bytes: exact, or in 8 bits; a digest finds any damage."""

import struct
from hashlib import blake2b
from typing import Literal

import torch

from eloquent_server.engine.attention import KvShape

Encoding = Literal["raw", "int8"]

_MAGIC = b"EKV2"
_DIGEST_BYTES = 16
_HEADER = struct.Struct(f"<4s4sQ{_DIGEST_BYTES}s")
"Magic, encoding, tokens, digest of key, encoding, tokens and body."


class DamagedBlockError(ValueError):
    """These bytes are not the block that they should be."""


def encode(block: torch.Tensor, key: bytes, encoding: Encoding) -> bytes:
    """Return a block, [layers, 2, heads, tokens, head_dim], as bytes.

    "int8" keeps a scale for each token's head: a quarter of float32's size, an error of at most
    half a step of 1/127 of the head's greatest value.
    """
    tokens = block.shape[3]
    if encoding == "raw":
        body = _bytes(block.contiguous())
    else:
        floats = block.float()
        scales = floats.abs().amax(dim=-1, keepdim=True) / 127
        steps = floats / torch.where(scales > 0, scales, torch.ones_like(scales))
        body = _bytes(scales) + _bytes(steps.round().to(torch.int8))
    digest = _digest(key, encoding, tokens, body)
    return _HEADER.pack(_MAGIC, encoding.encode(), tokens, digest) + body


def decode(data: bytes | bytearray, key: bytes, shape: KvShape, encoding: Encoding) -> torch.Tensor:
    """Return the block that was encoded under `key`.

    Raises:
        DamagedBlockError: the bytes are not whole, or another block's.
    """
    if len(data) < _HEADER.size:
        raise DamagedBlockError("The block is cut short, so it is not used.")
    magic, name, tokens, digest = _HEADER.unpack_from(data)
    body = memoryview(data)[_HEADER.size :]
    expected = (_MAGIC, encoding.encode().ljust(4, b"\0"), _digest(key, encoding, tokens, body))
    if (magic, name, digest) != expected:
        raise DamagedBlockError("The block's digest does not fit its bytes, so it is not used.")
    size = shape.block(tokens)
    if encoding == "raw":
        if len(body) != tokens * shape.token_bytes:
            raise DamagedBlockError("The block is of another shape, so it is not used.")
        # A tensor needs memory that may be written to; a copy of a block takes a while.
        own = data if isinstance(data, bytearray) else bytearray(data)
        return torch.frombuffer(own, dtype=shape.dtype, offset=_HEADER.size).view(size)
    heads = 2 * shape.layers * shape.heads * tokens
    if len(body) != heads * (4 + shape.head_dim):
        raise DamagedBlockError("The block is of another shape, so it is not used.")
    scales = torch.frombuffer(bytearray(body[: 4 * heads]), dtype=torch.float32)
    steps = torch.frombuffer(bytearray(body[4 * heads :]), dtype=torch.int8)
    floats = steps.view(size).float() * scales.view(*size[:-1], 1)
    return floats.to(shape.dtype)


def encoded_bytes(shape: KvShape, tokens: int, encoding: Encoding) -> int:
    """Return how long an encoded block is."""
    if encoding == "raw":
        return _HEADER.size + tokens * shape.token_bytes
    return _HEADER.size + 2 * shape.layers * shape.heads * tokens * (4 + shape.head_dim)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().view(torch.uint8).numpy().tobytes()


def _digest(key: bytes, encoding: str, tokens: int, body: bytes | memoryview) -> bytes:
    digest = blake2b(key, digest_size=_DIGEST_BYTES)
    digest.update(f"{encoding} {tokens}".encode())
    digest.update(body)
    return digest.digest()
