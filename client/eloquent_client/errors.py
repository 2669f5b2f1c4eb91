"""What the client library raises; everything derives from `EloquentError`.

APIError
├── APIStatusError          the server answered, and said no (`code` says why)
│   ├── BadRequestError     the request must change
│   ├── NotFoundError       no such model
│   └── ServerFaultError    the server or its model failed
├── APIConnectionError      the link failed
│   └── APITimeoutError     it took too long
└── APIResponseError        what came is no valid answer
LocalServerError            a server started on this machine did not come up, or died
"""

from eloquent.errors import (
    ConnectionFailedError,
    EloquentError,
    IntegrityError,
    RequestError,
    WireError,
)


class APIError(EloquentError):
    """Base of what can go wrong with a turn."""


class APIStatusError(APIError):
    """The server declined the request, or failed in mid-answer.

    `code` is the machine-readable reason, one of those that `docs/protocol.md` lists.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class BadRequestError(APIStatusError):
    """The request cannot be answered as it is; asking again without a change is of no use."""


class NotFoundError(APIStatusError):
    """The server has no such model."""


class ServerFaultError(APIStatusError):
    """The server or its model failed; the same request may go well later."""


class APIConnectionError(APIError):
    """The connection could not be made, or ended before the answer did."""


class APITimeoutError(APIConnectionError):
    """Connecting, or the whole answer, took longer than allowed."""


class APIResponseError(APIError):
    """What arrived is no answer of this protocol, or not what the server generated."""


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
    "turn_exists": BadRequestError,
    "unsupported_version": BadRequestError,
    "unknown_model": NotFoundError,
    "engine_error": ServerFaultError,
    "internal_error": ServerFaultError,
    "unavailable": ServerFaultError,
}


def status_error(code: str, message: str) -> APIStatusError:
    """Return the error for a code that the server gave."""
    return _BY_CODE.get(code, APIStatusError)(code, message)


def api_error(error: EloquentError) -> EloquentError:
    """Return what the transport raised as the library's own error."""
    match error:
        case RequestError():
            return status_error(error.code, error.message)
        case ConnectionFailedError():
            return APIConnectionError(str(error))
        case WireError() | IntegrityError():
            return APIResponseError(str(error))
        case _:
            return error
