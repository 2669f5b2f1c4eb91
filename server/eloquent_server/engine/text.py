"""Token ids to text, piece by piece."""

from typing import Any

from tokenizers.decoders import DecodeStream

REPLACEMENT = "\ufffd"


class TextStream:
    """Turns one answer's tokens into pieces of text that never split a character.

    The pieces joined are the decoding of all tokens without special ones; bytes of a character
    that never became complete are dropped at the end.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Take a tokenizer of the `tokenizers` library."""
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._emitted = 0

    def push(self, token: int) -> str:
        """Take the next token and return the text that it completes, perhaps none."""
        self._tokens.append(token)
        piece = self._stream.step(self._tokenizer, token) or ""
        self._emitted += len(piece)
        return piece

    def flush(self) -> str:
        """Return what is still held back; the stream has no flush of its own."""
        whole: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return whole[self._emitted :].rstrip(REPLACEMENT)
