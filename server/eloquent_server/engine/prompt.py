"""Messages to token ids: the model's chat template, with user text that stays text.

The template's markers (`<|im_end|>`) become control tokens; the same characters written by a user
must not, or a user could speak as the system.
"""

import re
from collections.abc import Sequence
from typing import Any

import jinja2

from eloquent.errors import RequestError
from eloquent_server.chat import ChatMessage

# Noncharacters (Unicode, section 23.7) around an index hold the place of a marker in a message.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_PLACE = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


class PromptEncoder:
    """Encodes conversations for one tokenizer; `encode` may run in any thread.

    Markers in messages are taken out before the template runs, and put back as plain text when
    the result is encoded, so the template sees ordinary text and ordinary messages are encoded
    exactly as transformers would.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Take a fast tokenizer of transformers that has a chat template."""
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder.values()
        markers = sorted((token.content for token in added if token.special), key=len, reverse=True)
        # A placeholder that a user wrote must not be mistaken for ours.
        self._markers = re.compile("|".join(map(re.escape, [*markers, _OPEN])))

    def encode(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the prompt's token ids, up to and including the start of the answer.

        Raises:
            RequestError: `invalid_request`, the model's template does not take these messages.
        """
        taken: list[str] = []

        def take(match: re.Match[str]) -> str:
            taken.append(match.group())
            return f"{_OPEN}{len(taken) - 1}{_CLOSE}"

        conversation = [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": self._markers.sub(take, message.content),
            }
            for message in messages
        ]
        try:
            prompt = self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise RequestError(
                "invalid_request",
                f"The model's chat template does not take these messages ({error}). Most models "
                "want an optional system message first, then user and assistant in turns.",
            ) from error
        # Every other piece is the index of a marker: text, index, text, index, ..., text.
        tokens: list[int] = []
        for i, piece in enumerate(_PLACE.split(prompt)):
            if i % 2:
                tokens += self._encode_plain(taken[int(piece)])
            else:
                tokens += self._backend.encode(piece, add_special_tokens=False).ids
        return tokens

    def _encode_plain(self, text: str) -> list[int]:
        """Encode without added tokens: the steps that `Tokenizer.encode` runs between them.

        `split_special_tokens` would do it, too, but sets a flag on the tokenizer that other
        threads are using.
        """
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        pieces = [text]
        if self._backend.pre_tokenizer is not None:
            pieces = [piece for piece, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for piece in pieces for token in self._backend.model.tokenize(piece)]
