"""What the library gives back: the whole message, and what happened on the way."""

from dataclasses import dataclass


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


@dataclass(frozen=True, slots=True)
class Message:
    """A finished answer."""

    text: str
    "All of it."
    finish_reason: str
    '`"stop"` (the model ended it) or `"length"` (a limit did).'
    model: str
    "The model that answered."
    usage: Usage
    "What it cost."


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
