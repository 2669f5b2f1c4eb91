"""An OpenAI-compatible engine's stream, decoded: server-sent events, their chunks, our events.

No I/O. Engines differ in what they leave out and add; what has no event of its own goes on as it
is, in an `Extra`. What describes the stream and not the answer (`id`, `created`,
`system_fingerprint`, timings) ends here.
"""

import re
from typing import Annotated

import msgspec

from eloquent.core.events import (
    MAX_EVENT_BYTES,
    ChosenLogprob,
    Delta,
    Extra,
    Logprobs,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
)
from eloquent_server.backends.base import Finish
from eloquent_server.backends.upstream_calls import Calls
from eloquent_server.backends.upstream_errors import EngineError, Said, UpstreamError

MAX_MODEL_CHARS = 256
MAX_USAGE_BYTES = 65_536

TOO_LARGE = (
    f"The engine behind this server sent a chunk of more than {MAX_EVENT_BYTES} bytes, which no "
    "reader takes, so the answer ends here. Ask again."
)
UNREADABLE = (
    "The engine behind this server sent something that is no chunk of an OpenAI stream, so the "
    "answer ends here; the server's log has more. Ask again."
)
BROKE_OFF = (
    "The engine behind this server ended its stream without saying that the answer is over, so "
    "part of it may be missing. Ask again."
)

_DONE = b"[DONE]"
_LINE_END = re.compile(rb"\r\n|\n|\r")
_NOTHING = (b"null", b'""', b"[]", b"{}")
_NOT_AN_ANSWER = ("error", "cancelled", "abort")
"Finish reasons that are no end of an answer; `error` and `cancelled` mean something in our logs."

_Fields = dict[str, msgspec.Raw]
_fields_decoder = msgspec.json.Decoder(_Fields)
_text_decoder = msgspec.json.Decoder(str | None)


class SseDecoder:
    """Turns a stream's bytes, in pieces of any size, into the data of its events.

    See the WHATWG's "Server-sent events", section 9.2.6; only the field `data` matters here.
    """

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        """`max_bytes` bounds an event."""
        self._max_bytes = max_bytes
        self._line = bytearray()
        self._data: list[bytes] = []
        self._bytes = 0
        self._is_after_cr = False

    @property
    def is_too_large(self) -> bool:
        """Whether an event was larger than allowed; then nothing more comes out."""
        return self._bytes > self._max_bytes

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next bytes and return what the events that they complete carry."""
        if self._is_after_cr and data:
            data = data.removeprefix(b"\n")
            self._is_after_cr = False
        if not data:
            return []
        self._is_after_cr = data.endswith(b"\r")
        first, *others = _LINE_END.split(data)
        self._line += first
        events: list[bytes] = []
        for begun in others:
            self._end_line(bytes(self._line), events)
            self._line = bytearray(begun)
        if self._bytes + len(self._line) > self._max_bytes:
            self._bytes = self._max_bytes + 1
        return events

    def _end_line(self, line: bytes, events: list[bytes]) -> None:
        if self.is_too_large:
            return
        if not line:
            if self._data:
                events.append(b"\n".join(self._data))
            self._data, self._bytes = [], 0
            return
        bytes_before, self._bytes = self._bytes, self._bytes + len(line)
        if self.is_too_large:
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        else:
            self._bytes = bytes_before  # So that no number of comments is too large.


class _Chunk(Said):
    choices: list[_Fields] | None = None
    usage: msgspec.Raw = msgspec.Raw(b"null")
    model: str | None = None


_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]


class _UsageDetails(msgspec.Struct):
    cached_tokens: _Count | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: _UsageDetails | None = None


class _Token(msgspec.Struct, rename={"octets": "bytes"}):
    token: str
    logprob: float
    octets: list[Annotated[int, msgspec.Meta(ge=0, le=255)]] | None = None
    top_logprobs: "list[_Token] | None" = None

    @property
    def text(self) -> bytes:
        return self.token.encode() if self.octets is None else bytes(self.octets)


class _Logprobs(msgspec.Struct, forbid_unknown_fields=True):
    content: list[_Token] | None = None
    refusal: None = None


_chunk_decoder = msgspec.json.Decoder(_Chunk)
_logprobs_decoder = msgspec.json.Decoder(_Logprobs)
_usage_decoder = msgspec.json.Decoder(_Usage)


class AnswerDecoder:
    """Turns the bytes of one answer's stream into its events and its `Finish`."""

    def __init__(self, model: str) -> None:
        """`model` is what was asked for; the engine's own word counts more."""
        self._sse = SseDecoder()
        self._model = model
        self._reason = ""
        self._usage = b""
        self._pieces = self._logprobs = 0
        self._calls = Calls()
        self.is_done = False
        "Whether the stream's own end mark has come."
        self.error: UpstreamError | None = None
        "What ended the answer before its time; nothing comes out after it."

    @property
    def has_begun(self) -> bool:
        """Whether something of the answer has come."""
        return self._pieces > 0

    @property
    def has_ended(self) -> bool:
        """Whether the answer is whole; the usage may yet come."""
        return bool(self._reason)

    def feed(self, data: bytes) -> list[Delta]:
        """Take the next bytes of the stream; look at `error` after each."""
        events: list[Delta] = []
        for each in self._sse.feed(data):
            if self.error is not None or self.is_done:
                return events
            if not each:
                continue
            if each == _DONE:
                self.is_done = True
                continue
            try:
                events += self._chunk(each)
            except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
                self.error = UpstreamError("upstream_error", UNREADABLE, detail=str(error))
        if self._sse.is_too_large and self.error is None and not self.is_done:
            self.error = UpstreamError("upstream_error", TOO_LARGE)
        return events

    def finish(self) -> Finish:
        """Return how the answer ended, when no more will come.

        Raises:
            UpstreamError: it did not end.
        """
        if not self._reason:
            raise self.error or UpstreamError("upstream_error", BROKE_OFF)
        usage = _read_usage(self._usage)
        details = usage.prompt_tokens_details or _UsageDetails()
        completion_tokens = usage.completion_tokens
        if completion_tokens is None:
            completion_tokens = max(self._pieces, self._logprobs)
        return Finish(
            self._reason,
            usage.prompt_tokens or 0,
            completion_tokens,
            details.cached_tokens or 0,
            self._model[:MAX_MODEL_CHARS],
            self._usage,
        )

    def _chunk(self, data: bytes) -> list[Delta]:
        # What is kept as it came is for readers, who take UTF-8 alone.
        chunk = _chunk_decoder.decode(data.decode(errors="replace"))
        if chunk.is_error:
            self.error = EngineError.read(200, data).as_upstream_error()
            return []
        self._model = chunk.model or self._model
        if bytes(chunk.usage).startswith(b"{") and len(bytes(chunk.usage)) <= MAX_USAGE_BYTES:
            self._usage = bytes(chunk.usage)
        events: list[Delta] = []
        for choice in chunk.choices or ():
            if bytes(choice.pop("index", b"0")) in (b"0", b"null"):
                events += self._choice(choice)
        return events

    def _choice(self, choice: _Fields) -> list[Delta]:
        reason = _take_text(choice, "finish_reason")
        if reason in _NOT_AN_ANSWER:
            detail = f"the engine's finish_reason is {reason}"
            self.error = UpstreamError("upstream_error", BROKE_OFF, detail=detail)
            return []
        self._reason = reason or self._reason
        if "delta" in choice:
            choice.pop("message", None)  # Perplexity repeats all that there is in each chunk.
        raw_delta = bytes(choice.pop("delta", msgspec.Raw(b"null")))
        delta = _fields_decoder.decode(raw_delta) if raw_delta != b"null" else {}
        delta.pop("role", None)
        reasoning = [_take_text(delta, name) for name in ("reasoning_content", "reasoning")]
        text = _take_text(delta, "content")
        logprobs = _take_logprobs(choice)
        events: list[Delta] = []
        if any(reasoning):
            # vLLM has said the same under both names for some releases.
            events.append(ReasoningDelta(reasoning[0] or reasoning[1]))
        if text:
            events.append(TextDelta(text))
        events += self._calls.take(delta)
        self._pieces += len(events)
        events += _what_is_left(choice, delta)
        if logprobs:
            self._logprobs += len(logprobs)
            events.append(Logprobs(logprobs))
        return events


def _read_usage(data: bytes) -> _Usage:
    try:
        return _usage_decoder.decode(data or b"{}")
    except msgspec.ValidationError:
        return _Usage()


def _take_text(fields: _Fields, name: str) -> str:
    """Take a text out of the fields; what is no text stays there."""
    try:
        text = _text_decoder.decode(fields.get(name, b"null"))
    except msgspec.ValidationError:
        return ""
    fields.pop(name, None)
    return text or ""


def _take_logprobs(choice: _Fields) -> tuple[ChosenLogprob, ...]:
    """Take the logprobs out of a choice; those of another form stay there."""
    raw = choice.get("logprobs")
    if raw is None or bytes(raw) in _NOTHING:
        return ()
    try:
        content = _logprobs_decoder.decode(raw).content
    except msgspec.ValidationError:
        return ()
    del choice["logprobs"]
    return tuple(
        ChosenLogprob(
            token.text,
            token.logprob,
            tuple(TokenLogprob(top.text, top.logprob) for top in token.top_logprobs or ()),
        )
        for token in content or ()
    )


def _what_is_left(choice: _Fields, delta: _Fields) -> list[Delta]:
    """Return what has no event of its own; empty fields say nothing."""
    said = {name: raw for name, raw in choice.items() if bytes(raw) not in _NOTHING}
    in_delta = {name: raw for name, raw in delta.items() if bytes(raw) not in _NOTHING}
    if in_delta:
        said["delta"] = msgspec.Raw(msgspec.json.encode(in_delta))
    return [Extra(msgspec.json.encode(said))] if said else []
