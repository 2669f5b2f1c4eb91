"""Answers that a JSON schema allows, through llguidance.

It computes a mask of tokens in microseconds without compiling a schema to tables first, bounds
what a schema may cost, and needs neither torch nor a compiler (MIT, stable-ABI wheels).
"""

import threading
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from eloquent.errors import RequestError

WHITESPACE = r"[ \n\t]{0,16}"
"Between JSON tokens. Bounded, or a small model writes line breaks up to its limit."


class GrammarError(Exception):
    """An answer left its grammar, or the grammar became too complex."""


class Grammar:
    """How far one answer is in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end can follow."""
        return bool(self._matcher.is_stopped())

    def mask(self, logits: torch.Tensor) -> None:
        """Set the logits, [vocab] on CPU, of all tokens to -inf that may not come next.

        Raises:
            GrammarError: the grammar became too complex.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = torch.from_numpy(np.unpackbits(packed, bitorder="little")).bool()
        known = min(allowed.shape[0], logits.shape[0])
        logits[:known].masked_fill_(~allowed[:known], -torch.inf)
        logits[known:] = -torch.inf

    def accept(self, token: int) -> None:
        """Take the next token of the answer.

        Raises:
            GrammarError: the grammar does not allow it, or became too complex.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(str(self._matcher.get_error()).splitlines()[0])


class TokenTable:
    """What a tokenizer's tokens are in bytes; made when it is first needed, which takes a second.

    Its methods may be called from any thread.
    """

    def __init__(self, tokenizer: Any, *, vocab_tokens: int, end_tokens: frozenset[int]) -> None:
        """Take a fast tokenizer of transformers and what the model says of its tokens."""
        self._tokenizer = tokenizer
        self._vocab_tokens = vocab_tokens
        self._end_tokens = sorted(end_tokens)
        self._lock = threading.Lock()
        self._made: LLTokenizer | None = None

    def text(self, token: int) -> bytes:
        """Return a token's text in UTF-8, perhaps part of a character; b"" for a control token."""
        table = self.prepare()
        if table.is_special_token(token):
            return b""
        return bytes(table.decode_bytes([token]))

    def grammar(self, json_schema: str) -> Grammar:
        """Return the grammar of the JSON texts that a schema (JSON itself) allows.

        Raises:
            RequestError: `invalid_request`, the schema is wrong, or more than is supported.
        """
        if not self._end_tokens:
            raise RequestError(
                "invalid_request",
                "This model has no token that ends an answer, so `response_format` cannot be "
                "kept. Leave it out, or use another model.",
            )
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                json_schema, defaults={"whitespace_pattern": WHITESPACE}
            )
            matcher = LLMatcher(self.prepare(), grammar, log_level=0)
            reason = str(matcher.get_error()) if matcher.is_error() else ""
        except ValueError as error:  # It is no JSON.
            reason = str(error)
        if reason:
            raise RequestError(
                "invalid_request",
                f"The JSON schema in `response_format` cannot be used: {reason.splitlines()[0]}. "
                "Correct or simplify it; docs/protocol.md has what is supported.",
            )
        return Grammar(matcher)

    def prepare(self) -> LLTokenizer:
        """Make the table, if that has not happened yet."""
        with self._lock:
            if self._made is None:
                self._made = from_tokenizer(
                    self._tokenizer,
                    n_vocab=max(self._vocab_tokens, len(self._tokenizer)),
                    eos_token=self._end_tokens or None,
                )
            return self._made
