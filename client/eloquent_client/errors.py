"""What the client library raises; everything derives from `EloquentError`.

APIError
├── APIStatusError              the server answered, and said no (`code` says why)
│   ├── BadRequestError         the request must change
│   ├── AuthenticationError     no key, or not one of the server's
│   ├── NotFoundError           no such model, or no such turn any more
│   ├── RateLimitError          too much was asked with this key; later it will go
│   └── ServerFaultError        the server failed; the same request may go well later
│       ├── OverloadedError     it takes no more for now, or is shutting down
│       └── UpstreamError       the engine behind it failed, or said no
├── APIConnectionError          the link failed
│   └── APITimeoutError         it took too long
├── APIResponseError            what came is no valid answer
└── ClientClosedError           the client was closed before
LocalServerError                a server started on this machine did not come up, or died
"""

from collections.abc import Iterator
from contextlib import contextmanager

from eloquent.errors import (
    ConnectionFailedError,
    EloquentError,
    IntegrityError,
    RequestError,
    WireError,
)
from eloquent.session.states import LinkState


class APIError(EloquentError):
    """Base of what can go wrong with a turn."""


class APIStatusError(APIError):
    """The server declined the request, or failed in mid-answer.

    `code` is the machine-readable reason, one of those that `docs/protocol.md` lists.
    `retry_after_s`: asking again before is of no use, in seconds; 0: the server did not say.
    """

    def __init__(self, code: str, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


class BadRequestError(APIStatusError):
    """The request cannot be answered as it is; asking again without a change is of no use."""


class AuthenticationError(APIStatusError):
    """The server wants a key, and got none or a wrong one."""


class NotFoundError(APIStatusError):
    """The server has no such model, or no such turn (any more)."""


class RateLimitError(APIStatusError):
    """More was asked with this key than it may ask; `retry_after_s` says when to ask again."""


class ServerFaultError(APIStatusError):
    """The server or its model failed; the same request may go well later."""


class OverloadedError(ServerFaultError):
    """The server takes no more turns for now, or is shutting down."""


class UpstreamError(ServerFaultError):
    """The engine behind the server failed, was too slow, or did not take the request."""


class APIConnectionError(APIError):
    """The connection could not be made, or ended before the answer did."""


class APITimeoutError(APIConnectionError):
    """Connecting, the whole answer, or the next event of it took longer than allowed.

    `link_state` is what was known of the link then: if it is `LinkState.UP`, the model was slow.
    """

    def __init__(self, message: str, link_state: LinkState = LinkState.IDLE) -> None:
        super().__init__(message)
        self.link_state = link_state


class APIResponseError(APIError):
    """What arrived is no answer of this protocol, or not what the server generated."""


class ClientClosedError(APIError):
    """The client was closed before it was asked for this."""

    def __init__(self) -> None:
        super().__init__("The client is closed: make another one.")


class LocalServerError(EloquentError):
    """The server started on this machine ended before it was ready, or while it was needed.

    `said` are its last lines, which the error's text has after `message`; it may be empty.
    """

    def __init__(self, message: str, said: str = "") -> None:
        super().__init__(f"{message} It said:\n{said}" if said else message)
        self.message = message
        self.said = said


_BY_CODE: dict[str, type[APIStatusError]] = {
    "bad_offset": BadRequestError,
    "invalid_request": BadRequestError,
    "malformed_request": BadRequestError,
    "prompt_too_long": BadRequestError,
    "request_too_large": BadRequestError,
    "turn_conflict": BadRequestError,
    "unsupported_version": BadRequestError,
    "unauthorized": AuthenticationError,
    "unknown_model": NotFoundError,
    "unknown_turn": NotFoundError,
    "rate_limited": RateLimitError,
    "too_many_turns": RateLimitError,
    "engine_error": ServerFaultError,
    "internal_error": ServerFaultError,
    "interrupted": ServerFaultError,
    "not_stored": ServerFaultError,
    "overloaded": OverloadedError,
    "unavailable": OverloadedError,
    "upstream_error": UpstreamError,
    "upstream_timeout": UpstreamError,
}


def status_error(code: str, message: str, retry_after_s: float = 0.0) -> APIStatusError:
    """Return the error for a code that the server gave."""
    return _BY_CODE.get(code, APIStatusError)(code, message, retry_after_s)


def api_error(error: EloquentError) -> EloquentError:
    """Return what the transport raised as the library's own error."""
    match error:
        case RequestError():
            return status_error(error.code, error.message, error.retry_after_s)
        case ConnectionFailedError():
            return APIConnectionError(str(error))
        case WireError() | IntegrityError():
            return APIResponseError(str(error))
        case _:
            return error


@contextmanager
def translated() -> Iterator[None]:
    """Let what the transport raises come out as the library's own errors."""
    try:
        yield
    except EloquentError as error:
        own = api_error(error)
        if own is error:
            raise
        raise own from error
