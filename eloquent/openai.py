"""An answer's events in the words of OpenAI's chat API: what programs written for that understand.

Pure functions; https://platform.openai.com/docs/api-reference/chat describes the objects. Where the
API has no word for something, what engines of its kind have in common is used: reasoning is
`reasoning_content`. An answer that was cancelled or failed has no `finish_reason` here, since a
program would take any for the answer's end: there is an `error` object in its place.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

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
from eloquent.errors import RequestError

JsonObject = dict[str, Any]

DONE = b"data: [DONE]\n\n"
"The last of a stream's bytes, where the answer is whole."

LEAST_LOGPROB = -9999.0
"Stands for minus infinity, which JSON cannot say; OpenAI's and vLLM's number."

CANCELLED = (
    "The answer was cancelled, so it is not whole. What came of it before stands; ask again for "
    "all of it."
)
FAILED = (
    "The answer ended early because of an error, so it is not whole. What came of it before "
    "stands; ask again for all of it."
)
_NOT_GOOD = {"cancelled": ("cancelled", CANCELLED), "error": ("engine_error", FAILED)}
"Our finish reasons for which the API has no name, as errors."

_STATUS = {
    "invalid_request": 400,
    "malformed_request": 400,
    "prompt_too_long": 400,
    "bad_offset": 400,
    "unsupported_version": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "unknown_model": 404,
    "unknown_turn": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "slow_reader": 408,
    "cancelled": 409,
    "replaced": 409,
    "turn_conflict": 409,
    "request_too_large": 413,
    "misdirected": 421,
    "rate_limited": 429,
    "too_many_turns": 429,
    "upstream_error": 502,
    "overloaded": 503,
    "unavailable": 503,
    "upstream_timeout": 504,
}
_SAID_ONCE = ("id", "name", "type")
"Texts of a delta that do not come in pieces; some engines repeat them."

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def http_status(code: str) -> int:
    """Return the HTTP status for one of our error codes; 500 for what is not the client's doing."""
    return _STATUS.get(code, 500)


def error_body(code: str, message: str) -> JsonObject:
    """Return an error as the API's body, or a stream's last event, has it."""
    status = http_status(code)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def server_sent(data: JsonObject, event_id: str = "") -> bytes:
    """Return a chunk or an error as a server-sent event; an empty id leaves the last one valid."""
    head = f"id: {event_id}\n" if event_id else ""
    return head.encode() + b"data: " + msgspec.json.encode(data) + b"\n\n"


def comment(text: str) -> bytes:
    """Return a line, without line ends in it, that keeps a stream alive and that readers pass over.

    See the WHATWG's "Server-sent events", section 9.2.6.
    """
    return f": {text}\n\n".encode()


class Chunks:
    """Makes one answer's `chat.completion.chunk` objects; all have the same id and time."""

    def __init__(self, *, turn_id: str, model: str, created: int, include_usage: bool) -> None:
        """`turn_id` is hexadecimal; `created` is in seconds since 1970.

        `include_usage` is what the request's `stream_options` say.
        """
        self._head: JsonObject = {
            "id": _completion_id(turn_id),
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
        }
        self._include_usage = include_usage
        self._has_failed = self._is_whole = False

    @property
    def is_whole(self) -> bool:
        """Whether the answer's good end has come: then, and only then, `[DONE]` may follow."""
        return self._is_whole

    def start(self) -> JsonObject:
        """Return the chunk that says who speaks; it comes first."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}})

    def of(self, event: Event) -> list[JsonObject]:
        """Return what the event is in chunks: the end is two where usage was asked for.

        A `Failure`, and an end that is not a good one, is one `error` object in all.
        """
        if isinstance(event, Failure):
            return self._error(event.code, event.message)
        if isinstance(event, End):
            return self._end(event)
        if isinstance(event, Extra):
            return [self._chunk(msgspec.json.decode(event.data, type=JsonObject))]
        if isinstance(event, Logprobs):
            return [self._chunk({"logprobs": _logprobs(event.tokens)})]
        return [self._chunk({"delta": _delta(event)})]

    def _chunk(self, said: Mapping[str, Any]) -> JsonObject:
        """Return a chunk whose choice says so much beyond what each has."""
        choice = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": None, **said}
        chunk = {**self._head, "choices": [choice]}
        return {**chunk, "usage": None} if self._include_usage else chunk

    def _error(self, code: str, message: str) -> list[JsonObject]:
        is_first, self._has_failed = not self._has_failed, True
        return [error_body(code, message)] if is_first else []

    def _end(self, end: End) -> list[JsonObject]:
        if end.finish_reason in _NOT_GOOD:
            return self._error(*_NOT_GOOD[end.finish_reason])
        self._is_whole = True
        chunks = [self._chunk({"finish_reason": end.finish_reason})]
        if self._include_usage:
            chunks.append({**self._head, "choices": [], "usage": _usage(end)})
        return chunks


def check_event(event: Event) -> None:
    """Do nothing if an answer with this event may still be whole.

    Raises:
        RequestError: it failed (the failure's own code) or was `cancelled`.
    """
    if isinstance(event, Failure):
        raise RequestError(event.code, event.message)
    if isinstance(event, End) and event.finish_reason in _NOT_GOOD:
        raise RequestError(*_NOT_GOOD[event.finish_reason])


def completion(events: Sequence[Event], *, turn_id: str, model: str, created: int) -> JsonObject:
    """Return a whole answer as a `chat.completion`; the arguments are those of `Chunks`.

    Raises:
        RequestError: the answer is not whole; see `check_event`.
        ValueError: the events have no `End`.
    """
    for event in events:
        check_event(event)
    end = events[-1] if events else None
    if not isinstance(end, End):
        raise ValueError("the answer's events do not end with its End")
    message, logprobs, said = _Message(), list[ChosenLogprob](), JsonObject()
    for event in events[:-1]:
        if isinstance(event, Logprobs):
            logprobs += event.tokens
        elif isinstance(event, Extra):
            extra = msgspec.json.decode(event.data, type=JsonObject)
            delta = extra.pop("delta", None)
            message.add(delta if isinstance(delta, dict) else {})
            _join(said, extra, do_texts_grow=False)
        elif isinstance(event, TextDelta | ReasoningDelta | ToolCallDelta):
            message.add(_delta(event))
    choice: JsonObject = {"logprobs": _logprobs(logprobs) if logprobs else None, **said}
    choice |= {"index": 0, "message": message.whole(), "finish_reason": end.finish_reason}
    return {
        "id": _completion_id(turn_id),
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [choice],
        "usage": _usage(end),
    }


def _completion_id(turn_id: str) -> str:
    return f"chatcmpl-{turn_id}"


def _delta(event: TextDelta | ReasoningDelta | ToolCallDelta) -> JsonObject:
    if isinstance(event, TextDelta):
        return {"content": event.text}
    if isinstance(event, ReasoningDelta):
        return {"reasoning_content": event.text}
    function = {"name": event.name} if event.name else {}
    call: JsonObject = {
        "index": event.index,
        "function": {**function, "arguments": event.arguments},
    }
    if event.id or event.name:
        call |= {"id": event.id, "type": "function"}
    return {"tool_calls": [call]}


class _Message:
    """A message, gathered from its deltas."""

    def __init__(self) -> None:
        self._texts: dict[str, list[str]] = {"content": [], "reasoning_content": []}
        self._parts: list[Any] = []
        "Content that is no text, as Mistral's models think in."
        self._calls: dict[int, list[JsonObject]] = {}
        self._odd_calls: list[Any] = []
        "What is there under that name and is of no form that is known."
        self._rest: JsonObject = {}

    def add(self, delta: JsonObject) -> None:
        """Take the next delta."""
        rest: JsonObject = {}
        for name, value in delta.items():
            if name in self._texts and isinstance(value, str):
                self._texts[name].append(value)
            elif name == "content" and isinstance(value, list):
                self._parts += value
            elif name == "tool_calls":
                for call in value if isinstance(value, list) else [value]:
                    if _is_piece(call):
                        self._calls.setdefault(call["index"], []).append(call)
                    else:
                        self._odd_calls.append(call)
            else:
                rest[name] = value
        _join(self._rest, rest)

    def whole(self) -> JsonObject:
        """Return the message."""
        text, reasoning = map("".join, self._texts.values())
        calls = [_call(pieces) for _, pieces in sorted(self._calls.items())]
        calls += self._odd_calls
        content: Any = None if calls and not text else text
        if self._parts:
            content = [*self._parts, *([{"type": "text", "text": text}] if text else [])]
        message: JsonObject = {"role": "assistant", "content": content, **self._rest}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return message


def _is_piece(call: Any) -> bool:
    """Say whether it is a piece of a call, as far as that matters here."""
    is_one = isinstance(call, dict) and isinstance(call.get("index"), int)
    return is_one and isinstance(call.get("function"), dict | None)


def _call(pieces: Sequence[JsonObject]) -> JsonObject:
    call: JsonObject = {"function": {"name": ""}} if pieces[0].get("function") else {}
    arguments: list[str] = []
    for piece in pieces:
        function = piece.get("function")
        if function and isinstance(function.get("arguments"), str):
            arguments.append(function.pop("arguments"))
        _join(call, piece)
    if arguments:
        call["function"]["arguments"] = "".join(arguments)
    del call["index"]
    return {"id": "", "type": "function", **call}


def _join(whole: JsonObject, piece: Mapping[str, Any], *, do_texts_grow: bool = True) -> None:
    """Add a piece to what came before: texts and lists grow, objects field by field."""
    for name, value in piece.items():
        before = whole.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            _join(before, value, do_texts_grow=do_texts_grow)
        elif isinstance(before, list) and isinstance(value, list):
            before += value
        elif isinstance(before, str) and isinstance(value, str) and do_texts_grow:
            whole[name] = (before or value) if name in _SAID_ONCE else before + value
        elif value is not None or before is None:
            whole[name] = value


def _logprobs(tokens: Sequence[ChosenLogprob]) -> JsonObject:
    content = [
        {**_token(token), "top_logprobs": [_token(other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _token(token: TokenLogprob) -> JsonObject:
    return {
        "token": token.token.decode(errors="replace"),
        "bytes": list(token.token),
        "logprob": max(token.logprob, LEAST_LOGPROB),
    }


def _usage(end: End) -> JsonObject:
    """Return the usage as the engine behind the server said it, or as the counts make it."""
    counts: JsonObject = {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
    }
    try:
        return counts | msgspec.json.decode(end.usage, type=JsonObject)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        # There is none, or of a server that breaks the protocol.
        return {**counts, "prompt_tokens_details": {"cached_tokens": end.cached_tokens}}
