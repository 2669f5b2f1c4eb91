"""Messages to token ids: the model's chat template, with user text that stays text.

The template's markers (`<|im_end|>`) become control tokens; the same characters written by a user
must not, or a user could speak as the system.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jinja2

from eloquent.errors import RequestError
from eloquent_server.chat import ChatMessage

# Noncharacters (Unicode, section 23.7) around an index hold the place of a marker in a message.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_PLACE = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")

Recall = Callable[[str], Sequence[int] | None]
"Returns the tokens that a reply's text was made of, or None."


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

    def encode(self, messages: Sequence[ChatMessage], *, recall: Recall | None = None) -> list[int]:
        """Return the prompt's token ids, up to and including the start of the answer.

        `recall` gives the tokens that a reply was made of, if they are known; they stand in its
        place where the template leaves replies as they are.

        Raises:
            RequestError: `invalid_request`, the model's template does not take these messages.
        """
        taken: list[str | Sequence[int]] = []

        def take(match: re.Match[str]) -> str:
            taken.append(match.group())
            return _place(len(taken) - 1)

        texts = [self._markers.sub(take, message.text) for message in messages]
        prompt = self._render(messages, texts)
        if recall is not None:
            prompt = self._splice(messages, texts, prompt, taken, recall)
        # Every other piece is an index into `taken`: text, index, text, index, ..., text.
        tokens: list[int] = []
        for i, piece in enumerate(_PLACE.split(prompt)):
            if i % 2 == 0:
                tokens += self._backend.encode(piece, add_special_tokens=False).ids
                continue
            item = taken[int(piece)]
            tokens += self._encode_plain(item) if isinstance(item, str) else item
        return tokens

    def _render(self, messages: Sequence[ChatMessage], texts: Sequence[str]) -> str:
        conversation = [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": text,
            }
            for message, text in zip(messages, texts, strict=True)
        ]
        try:
            prompt: str = self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise RequestError(
                "invalid_request",
                f"The model's chat template does not take these messages ({error}). Most models "
                "want an optional system message first, then user and assistant in turns.",
            ) from error
        return prompt

    def _splice(
        self,
        messages: Sequence[ChatMessage],
        texts: Sequence[str],
        prompt: str,
        taken: list[str | Sequence[int]],
        recall: Recall,
    ) -> str:
        """Return the prompt with places for the replies whose tokens are known."""
        spliced = list(texts)
        replies: dict[str, str] = {}
        for i, message in enumerate(messages):
            tokens = recall(message.text) if message.role == "assistant" else None
            if tokens is not None:
                place = spliced[i] = _place(len(taken))
                replies[place] = texts[i]
                taken.append(tokens)
        if not replies:
            return prompt
        other = self._render(messages, spliced)
        whole = other
        for place, text in replies.items():
            whole = whole.replace(place, text)
        # A template may trim replies or cut parts out of them, which it cannot do to a place.
        return other if whole == prompt else prompt

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


def _place(index: int) -> str:
    return f"{_OPEN}{index}{_CLOSE}"
