"""The client: a library, `eloquent ask` and the terminal chat.

The library is what this module exports; `docs/protocol.md` has the fields of a request.
"""

from eloquent.core.events import (
    ChosenLogprob,
    End,
    Event,
    Extra,
    Failure,
    Logprobs,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
)
from eloquent.core.pacer import Pacer
from eloquent.errors import ConfigurationError, EloquentError
from eloquent.link import Rung
from eloquent.session.states import LinkState
from eloquent.url import ServerUrl
from eloquent_client.client import Client
from eloquent_client.errors import (
    APIConnectionError,
    APIError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ClientClosedError,
    LocalServerError,
    NotFoundError,
    OverloadedError,
    RateLimitError,
    ServerFaultError,
    UpstreamError,
)
from eloquent_client.local import local_client, local_server
from eloquent_client.messages import (
    LinkSnapshot,
    Message,
    PromptTokensDetails,
    StreamStats,
    ToolCall,
    Usage,
)
from eloquent_client.pacing import paced
from eloquent_client.stream import MessageStream
from eloquent_client.sync import SyncClient, SyncMessageStream

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIResponseError",
    "APIStatusError",
    "APITimeoutError",
    "AuthenticationError",
    "BadRequestError",
    "ChosenLogprob",
    "Client",
    "ClientClosedError",
    "ConfigurationError",
    "EloquentError",
    "End",
    "Event",
    "Extra",
    "Failure",
    "LinkSnapshot",
    "LinkState",
    "LocalServerError",
    "Logprobs",
    "Message",
    "MessageStream",
    "NotFoundError",
    "OverloadedError",
    "Pacer",
    "PromptTokensDetails",
    "RateLimitError",
    "ReasoningDelta",
    "Rung",
    "ServerFaultError",
    "ServerUrl",
    "StreamStats",
    "SyncClient",
    "SyncMessageStream",
    "TextDelta",
    "TokenLogprob",
    "ToolCall",
    "ToolCallDelta",
    "UpstreamError",
    "Usage",
    "local_client",
    "local_server",
    "paced",
]
