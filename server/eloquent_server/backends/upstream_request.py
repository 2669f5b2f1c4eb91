"""A client's chat body on its way to an engine behind the server: passed on whole, but for little.

No I/O. Fields are kept as the client wrote them: only those named here are read, set or dropped.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Literal

import msgspec

from eloquent.core.events import Delta, Logprobs, TextDelta
from eloquent.errors import RequestError

HEAD_BYTES = 4096
"So much of each of a prompt's first messages decides where it goes."

Continues = Literal["no", "vllm", "llama"]
"How an engine is asked to go on with an answer, if it can be."

INTERRUPTED = "The server was restarted in mid-answer and cannot go on with it: {}. Ask again."

_GRAMMARS = {"grammar", "structured_outputs", "regex", "ebnf", "json_schema", "structural_tag"}
"Fields by which vLLM, SGLang and llama.cpp take a grammar; and all that begin with `guided_`."

_Fields = dict[str, msgspec.Raw]


class _Format(msgspec.Struct):
    type: str = "text"


class _Read(msgspec.Struct):
    """The fields that are read here."""

    messages: list[_Fields]
    model: str | None = None
    n: int | None = None
    stream_options: _Fields | None = None
    response_format: _Format | None = None
    max_completion_tokens: int | None = None
    max_tokens: int | None = None


_fields_decoder = msgspec.json.Decoder(_Fields)
_read_decoder = msgspec.json.Decoder(_Read)


class ChatBody:
    """An OpenAI chat body."""

    def __init__(self, body: bytes) -> None:
        """Read the body.

        Raises:
            RequestError: `invalid_request`: it is no JSON object with messages, or asks for
                several answers.
        """
        try:
            self._fields = _fields_decoder.decode(body)
            self._read = _read_decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise RequestError(
                "invalid_request", f"The request is no chat body in JSON: {error}."
            ) from error
        self.has_no_room = False
        "Whether what there is of the answer has used its limit up."
        if not self._read.messages:
            raise RequestError(
                "invalid_request",
                "The request's `messages` are empty, so there is nothing to answer. Send some.",
            )
        if self._read.n not in (None, 1):
            raise RequestError(
                "invalid_request",
                f"`n` is {self._read.n}, and a turn has one answer. Leave `n` out, and ask as many "
                "times as you want answers.",
            )

    @property
    def model(self) -> str:
        """What the client asks for; empty: it leaves that to the server."""
        return self._read.model or ""

    def head(self, model: str, salt: str) -> bytes:
        """Return a digest that all turns of a conversation share, and few others do.

        It covers the messages up to the first of a user, the beginning of each: what an engine
        still has of a conversation begins with these.
        """
        digest = blake2b(f"{model}\0{salt}\0".encode(), digest_size=16)
        for message in self._read.messages:
            content = bytes(message.get("content", b""))[:HEAD_BYTES]
            digest.update(len(content).to_bytes(2, "big") + content)
            if _is_from(message, "user"):
                break
        return digest.digest()

    def encode(self, model: str, salt: str) -> bytes:
        """Return the body for an engine: a stream, with its usage; an empty text is left out.

        A `cache_salt` of the client's own would let it find out what others asked: it is dropped.
        """
        fields = dict(self._fields)
        fields.pop("cache_salt", None)
        fields["stream"] = _raw(True)
        fields["stream_options"] = _raw(
            {**(self._read.stream_options or {}), "include_usage": True}
        )
        if model:
            fields["model"] = _raw(model)
        if salt:
            fields["cache_salt"] = _raw(salt)
        return msgspec.json.encode(fields)

    def go_on(self, events: Sequence[Delta], continues: Continues) -> int:
        """Ask for the rest of an answer instead; return how many tokens are held to be there.

        A piece of text counts as a token, unless logprobs say that there were more. May be called
        again, when there is more.

        Raises:
            RequestError: `interrupted`: an engine could not give the rest of this one.
        """
        if continues == "no":
            raise _interrupted("--upstream-continues does not say how its engine would")
        if not all(isinstance(event, TextDelta | Logprobs) for event in events):
            raise _interrupted("it has more than text")
        if self._has_grammar:
            raise _interrupted("the grammar that it was to keep would begin anew")
        texts = [event.text for event in events if isinstance(event, TextDelta)]
        tokens = sum(len(event.tokens) for event in events if isinstance(event, Logprobs))
        tokens = max(tokens, len(texts))
        self._fields["messages"] = _raw(self._messages_with("".join(texts)))
        self._fields.pop("echo", None)  # vLLM's: it would say once more what is there.
        if continues == "vllm":
            self._fields["continue_final_message"] = _raw(True)
            self._fields["add_generation_prompt"] = _raw(False)
        for name in ("max_completion_tokens", "max_tokens"):
            if limit := getattr(self._read, name):
                self._fields[name] = _raw(max(limit - tokens, 0))
                self.has_no_room |= limit <= tokens
        return tokens

    @property
    def _has_grammar(self) -> bool:
        has_format = self._read.response_format not in (None, _Format())
        names = self._fields.keys()
        return has_format or bool(names & _GRAMMARS) or any(n.startswith("guided_") for n in names)

    def _messages_with(self, text: str) -> list[_Fields]:
        """Return the messages with the answer as far as it is, after what the client began."""
        *before, last = self._read.messages
        if not _is_from(last, "assistant"):
            before.append(last)
        else:
            try:
                text = msgspec.json.decode(last.get("content", b"null"), type=str) + text
            except msgspec.ValidationError as error:
                raise _interrupted("what the request itself began it with is no text") from error
        return [*before, {"role": _raw("assistant"), "content": _raw(text)}]


def _is_from(message: _Fields, role: str) -> bool:
    return bytes(message.get("role", b"")) == f'"{role}"'.encode()


def _interrupted(why: str) -> RequestError:
    return RequestError("interrupted", INTERRUPTED.format(why))


def _raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
