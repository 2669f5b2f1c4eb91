"""What the library gives back: the whole message, what happened on the way, and the link."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eloquent.core.events import End, Event, ReasoningDelta, TextDelta, ToolCallDelta
from eloquent.link import Rung
from eloquent.session.states import LinkState
from eloquent_client.errors import APIResponseError


@dataclass(frozen=True, slots=True)
class PromptTokensDetails:
    """What became of the prompt's tokens."""

    cached_tokens: int = 0
    "Not computed, since the server knew them from before."


@dataclass(frozen=True, slots=True)
class Usage:
    """What a turn cost, in tokens."""

    prompt_tokens: int
    "Tokens of the prompt, after the chat template."
    completion_tokens: int
    "Tokens generated."
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()
    "As OpenAI's usage has them."
    raw: Mapping[str, Any] = field(default_factory=dict)
    "The usage in the words of the engine behind the server; empty: it has none of its own."


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that the request offered."""

    id: str
    "Its name, for the message with the tool's result."
    name: str
    "The function's."
    arguments: str
    "A JSON object, as far as the model wrote one."


@dataclass(frozen=True, slots=True)
class Message:
    """A finished answer."""

    text: str
    "All of it."
    finish_reason: str
    '`"stop"` (the model ended it), `"length"` (a limit did), or what an engine says.'
    model: str
    "The model that answered."
    usage: Usage
    "What it cost."
    reasoning: str = ""
    "What the model thought before; no part of the answer."
    tool_calls: tuple[ToolCall, ...] = ()
    "The tools that it calls, in its order."

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as a message of OpenAI's, to go before the next question."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        return message


@dataclass(frozen=True, slots=True)
class StreamStats:
    """What happened on the way, up to the moment at which it was read."""

    datagrams: int
    "Datagrams with a part of the answer that arrived."
    loss_recovered: int
    "Datagrams that were lost, and whose content came with another."
    duplicates: int
    "Bytes of the answer's log handed out twice, known at its end; always 0 unless there is a bug."
    missing: int
    "Bytes of the answer's log never handed out, known at its end; always 0 unless there is a bug."
    ttft_ms: float | None
    """Milliseconds from entering the block to the first text, a connection made for it included;
    None before."""
    duration_ms: float
    "Milliseconds from entering the block to the end of the answer, or to now."
    rtt_ms: float
    "The connection's smoothed round-trip time in milliseconds."


@dataclass(frozen=True, slots=True)
class LinkSnapshot:
    """What is known of the link to the server at one moment."""

    state: LinkState
    "What is known of the way to the server."
    rung: Rung | None
    "What carries the answers; None: there is no connection."
    rtt_ms: float | None
    "The connection's smoothed round-trip time in milliseconds; None: there is none."
    resumes: int
    "How often running turns went on over another connection, since the client was made."
    loss_recovered: int
    "Datagrams of all turns that were lost, and whose content came with another."
    bytes_received: int
    "Bytes of all answers' logs that arrived, those that came twice included."

    @property
    def is_up(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self.state is LinkState.UP


def text_of(events: Iterable[Event]) -> str:
    """Return the text of an answer."""
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def message_of(events: Sequence[Event], end: End) -> Message:
    """Return the answer that `events` are, of which `end` is the last.

    Raises:
        APIResponseError: the usage that the server gave cannot be read.
    """
    reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
    return Message(
        text_of(events), end.finish_reason, end.model, usage_of(end), reasoning, _calls_of(events)
    )


def usage_of(end: End) -> Usage:
    """Return what a turn cost.

    Raises:
        APIResponseError: the usage that the server gave cannot be read.
    """
    try:
        raw = json.loads(end.usage or b"{}")
    except (ValueError, RecursionError) as error:
        raise APIResponseError(f"The answer's usage is no JSON: {error}.") from error
    if not isinstance(raw, dict):
        raise APIResponseError("The answer's usage is no JSON object: the server is faulty.")
    details = PromptTokensDetails(end.cached_tokens)
    return Usage(end.prompt_tokens, end.completion_tokens, details, raw)


def _calls_of(events: Iterable[Event]) -> tuple[ToolCall, ...]:
    calls: dict[int, ToolCall] = {}
    for event in events:
        if isinstance(event, ToolCallDelta):
            before = calls.get(event.index, ToolCall("", "", ""))
            calls[event.index] = ToolCall(
                before.id or event.id,
                before.name or event.name,
                before.arguments + event.arguments,
            )
    return tuple(call for _, call in sorted(calls.items()))
