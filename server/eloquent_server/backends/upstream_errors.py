"""What engines behind the server answer instead of an answer, in the server's own error codes."""

import math
from dataclasses import dataclass
from typing import Any

import msgspec

from eloquent.errors import RequestError

MAX_MESSAGE_CHARS = 1000
"Of an engine's words, passed on."
MAX_WORD_CHARS = 80
"Of its code and type, for the log."
MAX_RETRY_AFTER_S = 3600.0

NOT_SAID = "it gave no reason"
ENGINE_SAID = "The engine behind this server declined the request: {}"
ENGINE_FAILED = (
    "The engine behind this server failed: {}. The request may be fine: try again in a while."
)
ENGINE_REFUSED_US = (
    "The engine behind this server refuses to work for it (HTTP {}). The request is not the cause: "
    "tell whoever runs the server; its log has more."
)
ENGINE_TIMED_OUT = (
    "The engine behind this server took too long: {}. Try again, with a shorter prompt or later."
)

_TOO_LONG = ("context_length", "exceed_context", "context length", "context size")


class UpstreamError(RequestError):
    """An engine did not answer, or not to the end; its code and message are fit for the client."""

    def __init__(
        self,
        code: str,
        message: str,
        retry_after_s: float = 0.0,
        *,
        detail: str = "",
        may_go_elsewhere: bool = True,
    ) -> None:
        """`detail` is for the operator's log; `may_go_elsewhere`: another engine may do better."""
        super().__init__(code, message, retry_after_s)
        self.detail = detail
        self.may_go_elsewhere = may_go_elsewhere


class Said(msgspec.Struct):
    """What an engine says where no status tells whether it is an error."""

    error: msgspec.Raw = msgspec.Raw(b"null")
    object: msgspec.Raw = msgspec.Raw(b"null")

    @property
    def is_error(self) -> bool:
        """Whether it is one; before its release 0.10 vLLM's had no `error` around them."""
        return bytes(self.error) != b"null" or bytes(self.object) == b'"error"'


@dataclass(frozen=True, slots=True)
class EngineError:
    """An engine's own words, in whichever of the usual forms it put them."""

    status: int
    "HTTP's."
    message: str = ""
    word: str = ""
    "Its code and type."
    retry_after_s: float = 0.0

    @staticmethod
    def is_in(body: bytes) -> bool:
        """Say whether a body that came with a good status is an error all the same."""
        try:
            return msgspec.json.decode(body, type=Said).is_error
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return False

    @classmethod
    def read(cls, status: int, body: bytes, retry_after: str = "") -> "EngineError":
        """Read a body, and the header `Retry-After`; bodies of unknown form say nothing.

        A status within the body counts where HTTP's is 200: an error came in the stream.
        """
        try:
            said = msgspec.json.decode(body)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            said = None
        if isinstance(said, list) and said:
            said = said[0]
        if isinstance(said, dict) and "error" in said:
            said = said["error"]
        if isinstance(said, str):
            said = {"message": said}
        if not isinstance(said, dict):
            said = {}
        message = said.get("message") or said.get("detail") or ""
        code = said.get("code")
        if status == 200:
            status = code if isinstance(code, int) and 400 <= code < 600 else 500
        word = f"{code} {said.get('type')}"
        return cls(status, _text(message), word, _seconds(retry_after))

    def as_upstream_error(self) -> UpstreamError:
        """Return what the client is told, and whether another engine may do better."""
        said = self.message or NOT_SAID
        everything = f"{self.word} {self.message}".lower()
        # Its words may quote the conversation, which is in no log.
        detail = f"HTTP {self.status}, {self.word[:MAX_WORD_CHARS]}"
        is_about_model = "model_not_found" in everything or (
            self.status == 404 and "model" in everything
        )
        is_theirs = self.status in (400, 422) or is_about_model
        if is_theirs:
            code = "invalid_request"
            if any(words in everything for words in _TOO_LONG):
                code = "prompt_too_long"
            elif is_about_model:
                code = "unknown_model"
            return UpstreamError(
                code,
                ENGINE_SAID.format(said),
                detail=detail,
                may_go_elsewhere=code == "unknown_model",
            )
        if self.status == 413:
            return UpstreamError(
                "request_too_large",
                ENGINE_SAID.format(said),
                detail=detail,
                may_go_elsewhere=False,
            )
        if self.status == 429:
            message = ENGINE_SAID.format(said)
            return UpstreamError("rate_limited", message, self.retry_after_s, detail=detail)
        if self.status in (408, 504):
            message = ENGINE_TIMED_OUT.format(said)
            return UpstreamError("upstream_timeout", message, detail=detail)
        if self.status < 500:
            # Nor is their text passed on, or logged: some repeat a part of the key.
            message, detail = ENGINE_REFUSED_US.format(self.status), f"HTTP {self.status}"
            return UpstreamError("upstream_error", message, detail=detail)
        message = ENGINE_FAILED.format(said)
        return UpstreamError("upstream_error", message, self.retry_after_s, detail=detail)


def _text(message: Any) -> str:
    text = message if isinstance(message, str) else msgspec.json.encode(message).decode()
    text = text.strip().removesuffix(".")
    return text if len(text) <= MAX_MESSAGE_CHARS else text[:MAX_MESSAGE_CHARS] + " …"


def _seconds(retry_after: str) -> float:
    """Read the header's usual form; a date in it says nothing here."""
    try:
        seconds = float(retry_after or 0)
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S) if math.isfinite(seconds) else 0.0
