"""The request: an OpenAI chat body, checked."""

from typing import Annotated, Any, Literal

import msgspec

from eloquent.errors import RequestError

MAX_MESSAGES = 10_000


class ChatMessage(msgspec.Struct, frozen=True):
    """One message of the conversation; `content` is its text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What this server takes of OpenAI's `POST /v1/chat/completions` body.

    Fields that would change the answer and are not supported are refused by name; those that
    only matter to OpenAI's own service (`user`, `metadata`, `store`) are taken and ignored.
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
    n: Literal[1] = 1
    stream: bool = True
    stream_options: dict[str, Any] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate, or None for as many as fit."""
        return self.max_completion_tokens or self.max_tokens


_decoder = msgspec.json.Decoder(ChatRequest)


def parse_chat_body(body: bytes) -> ChatRequest:
    """Check a JSON chat body.

    Raises:
        RequestError: `invalid_request`; the message names the field and what is wrong with it.
    """
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(
            "invalid_request",
            f"The request is not a chat body that this server takes: {error}. See "
            "docs/protocol.md, 'The request', for the fields.",
        ) from error
