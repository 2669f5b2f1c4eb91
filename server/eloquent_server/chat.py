"""The request: an OpenAI chat body, checked."""

from typing import Annotated, Any, Literal

import msgspec

from eloquent.errors import RequestError

MAX_MESSAGES = 10_000
MAX_STOPS = 16
MAX_STOP_CHARS = 128
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20


class TextPart(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """A part of a message; there are no others here than text."""

    text: str


class ChatMessage(msgspec.Struct, frozen=True):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[TextPart, ...]

    @property
    def text(self) -> str:
        """Its parts as lines, as vLLM reads them to models whose template takes text alone."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class JsonSchema(msgspec.Struct, frozen=True, kw_only=True):
    """A named JSON schema, as OpenAI has it."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    "Taken and ignored: the schema is always kept."


class TextFormat(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """The answer is text."""


class JsonObjectFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_object"):
    """The answer is a JSON object."""


class JsonSchemaFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_schema"):
    """The answer is a JSON text that a schema allows."""

    json_schema: JsonSchema


_Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_STOP_CHARS)]
_Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What this server takes of OpenAI's `POST /v1/chat/completions` body.

    Fields that would change the answer and are not supported are refused by name; those that
    only matter to OpenAI's own service (`user`, `metadata`, `store`, ...) are taken and ignored.
    """

    messages: Annotated[
        tuple[ChatMessage, ...], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)
    ]
    model: str | None = None
    "None: the server's default model."
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    "The older name of `max_completion_tokens`, which wins."
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    "0 is greedy decoding; None: what the model's authors advise, else 1."
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    "None: as for `temperature`."
    seed: int | None = None
    "The same seed and request give the same answer on the same machine."
    top_k: Annotated[int, msgspec.Meta(ge=-1)] = 0
    "0 and -1: off."
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(ge=0.01, le=100)] = 1.0
    stop: _Stop | Annotated[tuple[_Stop, ...], msgspec.Meta(max_length=MAX_STOPS)] | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, msgspec.Meta(ge=-100, le=100)]],
            msgspec.Meta(max_length=MAX_BIASES),
        ]
        | None
    ) = None
    "Token ids, as text, and what is added to their logits."
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    n: Literal[1] = 1
    stream: bool = True
    stream_options: dict[str, Any] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    cache_salt: Any = None
    "Taken and ignored: whose prefixes are shared is the server's to say (`tenants`)."

    def __post_init__(self) -> None:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs`: true")
        for token in self.logit_bias or ():
            if not (token.isascii() and token.isdigit() and len(token) < 10):
                raise ValueError(f"`logit_bias` has the key {token!r}, which is no token id")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings before the first of which the answer ends."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    @property
    def bias(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` with the ids as numbers."""
        return tuple((int(token), value) for token, value in (self.logit_bias or {}).items())

    @property
    def schema(self) -> str | None:
        """The JSON schema that the answer must keep, as JSON; None: it is free."""
        if isinstance(self.response_format, JsonObjectFormat):
            return '{"type":"object"}'
        if isinstance(self.response_format, JsonSchemaFormat):
            return msgspec.json.encode(self.response_format.json_schema.schema).decode()
        return None

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate, or None for as many as fit."""
        return self.max_completion_tokens or self.max_tokens


_decoder = msgspec.json.Decoder(ChatRequest)
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def parse_chat_body(body: bytes) -> ChatRequest:
    """Check a JSON chat body; a field that is null counts as left out.

    Raises:
        RequestError: `invalid_request`; the message names the field and what is wrong with it.
    """
    try:
        try:
            return _decoder.decode(body)
        except msgspec.ValidationError:
            given = _fields_decoder.decode(body).items()
            fields = {name: value for name, value in given if bytes(value) != b"null"}
            return _decoder.decode(msgspec.json.encode(fields))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(
            "invalid_request",
            f"The request is not a chat body that this server takes: {error}. See "
            "docs/protocol.md, 'The request', for the fields.",
        ) from error
