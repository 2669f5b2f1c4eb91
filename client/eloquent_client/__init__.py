"""The client: a library, `eloquent ask` and the terminal chat.

The library is what this module exports; `docs/protocol.md` has the fields of a request.
"""

from eloquent.core.events import (
    ChosenLogprob,
    End,
    Event,
    Failure,
    Logprobs,
    TextDelta,
    TokenLogprob,
)
from eloquent.core.pacer import Pacer
from eloquent.errors import ConfigurationError, EloquentError
from eloquent.url import ServerUrl
from eloquent_client.client import Client
from eloquent_client.errors import (
    APIConnectionError,
    APIError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    BadRequestError,
    LocalServerError,
    NotFoundError,
    ServerFaultError,
)
from eloquent_client.local import local_client, local_server
from eloquent_client.messages import Message, PromptTokensDetails, StreamStats, Usage
from eloquent_client.pacing import paced
from eloquent_client.stream import MessageStream

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIResponseError",
    "APIStatusError",
    "APITimeoutError",
    "BadRequestError",
    "ChosenLogprob",
    "Client",
    "ConfigurationError",
    "EloquentError",
    "End",
    "Event",
    "Failure",
    "LocalServerError",
    "Logprobs",
    "Message",
    "MessageStream",
    "NotFoundError",
    "Pacer",
    "PromptTokensDetails",
    "ServerFaultError",
    "ServerUrl",
    "StreamStats",
    "TextDelta",
    "TokenLogprob",
    "Usage",
    "local_client",
    "local_server",
    "paced",
]
