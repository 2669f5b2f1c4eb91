"""Token ids to text, piece by piece."""

from collections import deque
from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from eloquent.core.events import ChosenLogprob
from eloquent_server.engine.stop import StopMatcher

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


class AnswerText:
    """What of an answer may go out: its text up to a stop string, and logprobs beside it.

    A token's logprob goes out when all of its text has; that of a token in a stop string never.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        """Take a tokenizer of the `tokenizers` library and the stop strings."""
        self._stream = TextStream(tokenizer)
        self._matcher = StopMatcher(stops)
        self._seen = self._out = 0  # Characters: decoded, and gone out.
        self._silent: list[ChosenLogprob] = []  # Of tokens whose character is not whole yet.
        self._held: deque[tuple[int, ChosenLogprob]] = deque()  # With the end of their text.

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._matcher.stopped

    def push(self, token: int, logprob: ChosenLogprob | None = None) -> str:
        """Take the next token and return the text that may go out, perhaps none."""
        piece = self._stream.push(token)
        if logprob is not None:
            self._silent.append(logprob)
        return self._let_out(piece, self._matcher.push(piece))

    def flush(self) -> str:
        """Return what was held back, at the answer's end; whoever ended it."""
        piece = self._stream.flush()
        text = self._let_out(piece, self._matcher.push(piece) + self._matcher.flush())
        if not self.stopped:
            self._held.extend((self._out, logprob) for logprob in self._silent)
            self._silent.clear()
        return text

    def take_logprobs(self) -> tuple[ChosenLogprob, ...]:
        """Return the logprobs of tokens whose text went out since the last call."""
        taken = []
        while self._held and self._held[0][0] <= self._out:
            taken.append(self._held.popleft()[1])
        return tuple(taken)

    def _let_out(self, piece: str, text: str) -> str:
        self._seen += len(piece)
        self._out += len(text)
        if piece:
            self._held.extend((self._seen, logprob) for logprob in self._silent)
            self._silent.clear()
        return text
