"""The errors that Eloquent raises.

Every message says what happened, what it means and what to do. Nothing that another library
raises comes through Eloquent's interfaces: it is turned into one of these.
"""


class EloquentError(Exception):
    """Base of all errors that Eloquent raises on purpose; its text is fit for the user."""


class WireError(EloquentError):
    """Received bytes do not follow `docs/protocol.md`; the decoders raise nothing else."""


class IntegrityError(EloquentError):
    """A finished answer differs in length or digest from what the server generated."""


class ConnectionFailedError(EloquentError):
    """The connection could not be made, or ended while it was still needed."""


class ServerStoppingError(ConnectionFailedError):
    """The server ended the connection in order, as it does when it stops: it may be back soon."""


class ServerRefusedError(ConnectionFailedError):
    """The address answers, and what answers is no server, or not the right one."""


class ConfigurationError(EloquentError):
    """Something local is missing or wrong: an option, a file, an optional package."""


class RequestError(EloquentError):
    """The server declined a request.

    `code` is the machine-readable reason, one of those that `docs/protocol.md` lists.
    """

    def __init__(self, code: str, message: str, retry_after_s: float = 0.0) -> None:
        """`retry_after_s`: asking again before is of no use; 0: nothing is known of it."""
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
