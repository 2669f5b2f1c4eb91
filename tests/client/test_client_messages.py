"""Events of every kind, the message that they make, and the errors that codes stand for."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rungs import URL, serving, virtually
from telling import Telling

import eloquent_client
from eloquent.core.events import Delta
from eloquent.core.log import TokenLog
from eloquent.errors import ConnectionFailedError, IntegrityError, RequestError, WireError
from eloquent_client import (
    APIConnectionError,
    APIError,
    APIResponseError,
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    ChosenLogprob,
    Client,
    ConfigurationError,
    End,
    Event,
    Extra,
    Failure,
    Logprobs,
    Message,
    NotFoundError,
    OverloadedError,
    PromptTokensDetails,
    RateLimitError,
    ReasoningDelta,
    ServerFaultError,
    StreamStats,
    TextDelta,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    UpstreamError,
    Usage,
)
from eloquent_client.errors import api_error, status_error
from eloquent_netem.vloop import VirtualNetwork

DOCS = Path(__file__).parents[2] / "docs"
USAGE = {"prompt_tokens": 5, "completion_tokens": 9, "completion_tokens_details": {"x": 1}}


class TellingEvents(Telling):
    """Tells any events."""

    def __init__(self, *events: Delta, usage: bytes = b"") -> None:
        super().__init__((), 0.0)
        self._events = events
        self._usage = usage

    async def _tell(self, log: TokenLog) -> None:
        for event in self._events:
            log.append(event)
        log.close(
            "tool_calls", model="told", prompt_tokens=5, completion_tokens=9, usage=self._usage
        )
        self._tell_readers(log)


def answer(service: Telling) -> tuple[list[Event], Message, Usage | None, StreamStats]:
    async def main(
        network: VirtualNetwork,
    ) -> tuple[list[Event], Message, Usage | None, StreamStats]:
        async with serving(network, service), Client(URL) as client, client.stream([]) as stream:
            events = [event async for event in stream]
            message = await stream.get_final_message()
            return events, message, stream.usage, stream.stats

    return virtually(main)


def test_events_of_every_kind_arrive_and_make_one_message() -> None:
    told = (
        ReasoningDelta("I wonder "),
        ReasoningDelta("why."),
        TextDelta("Let me "),
        Logprobs((ChosenLogprob(b"Let", -0.5, (TokenLogprob(b"No", -1.5),)),)),
        TextDelta("look."),
        ToolCallDelta(1, "call-b", "second", '{"b"'),
        ToolCallDelta(0, "call-a", "first", ""),
        ToolCallDelta(1, "", "", ": 2}"),
        ToolCallDelta(0, "", "", "{}"),
        Extra(b'{"delta": {"refusal": "no"}}'),
    )
    events, message, usage, stats = answer(TellingEvents(*told, usage=json.dumps(USAGE).encode()))
    assert tuple(events[:-1]) == told
    assert isinstance(events[-1], End)
    assert message == Message(
        text="Let me look.",
        finish_reason="tool_calls",
        model="told",
        usage=Usage(5, 9, PromptTokensDetails(0), USAGE),
        reasoning="I wonder why.",
        tool_calls=(ToolCall("call-a", "first", "{}"), ToolCall("call-b", "second", '{"b": 2}')),
    )
    assert usage == message.usage
    assert stats.missing == stats.duplicates == 0


def test_a_message_is_one_of_openais() -> None:
    plain = Message("Hello", "stop", "m", Usage(1, 1))
    assert plain.to_dict() == {"role": "assistant", "content": "Hello"}
    calling = Message("", "tool_calls", "m", Usage(1, 1), tool_calls=(ToolCall("i", "f", "{}"),))
    assert calling.to_dict() == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "i", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        ],
    }


def test_the_server_alone_has_no_usage_of_its_own() -> None:
    _, message, _, _ = answer(TellingEvents(TextDelta("yes")))
    assert message.usage.raw == {}
    assert message.reasoning == ""
    assert message.tool_calls == ()


@pytest.mark.parametrize("usage", [b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_a_usage_that_cannot_be_read_is_the_servers_fault(usage: bytes) -> None:
    with pytest.raises(APIResponseError, match="usage"):
        answer(TellingEvents(TextDelta("yes"), usage=usage))


def test_a_failure_that_an_engine_had_is_typed() -> None:
    with pytest.raises(UpstreamError, match="too slow"):
        answer(TellingEvents(TextDelta("So far"), Failure("upstream_timeout", "It is too slow.")))


KINDS: dict[type[APIStatusError], set[str]] = {
    BadRequestError: {
        *("bad_offset", "invalid_request", "malformed_request", "prompt_too_long"),
        *("request_too_large", "turn_conflict", "unsupported_version"),
    },
    AuthenticationError: {"unauthorized"},
    NotFoundError: {"unknown_model", "unknown_turn"},
    RateLimitError: {"rate_limited", "too_many_turns"},
    ServerFaultError: {"engine_error", "internal_error", "interrupted", "not_stored"},
    OverloadedError: {"overloaded", "unavailable"},
    UpstreamError: {"upstream_error", "upstream_timeout"},
    APIStatusError: {"replaced", "slow_reader", "request_timeout", "of_a_later_release"},
}


@pytest.mark.parametrize(
    ("code", "kind"), [(code, kind) for kind, codes in KINDS.items() for code in sorted(codes)]
)
def test_a_code_is_an_error_of_one_kind(code: str, kind: type[APIStatusError]) -> None:
    error = status_error(code, "of the test", 1.5)
    assert type(error) is kind
    assert (error.code, error.message, error.retry_after_s) == (code, "of the test", 1.5)


def test_every_code_of_the_protocol_has_its_kind() -> None:
    page = (DOCS / "protocol.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([a-z_]+)` \|", page, re.MULTILINE))
    known = set().union(*KINDS.values())
    fields = {"temperature", "repetition_penalty", "logit_bias", "seed", "stop", "response_format"}
    assert listed - fields <= known


def test_what_the_transport_raises_has_a_name_here() -> None:
    cases: list[tuple[Exception, type[APIError]]] = [
        (RequestError("unauthorized", "m"), AuthenticationError),
        (ConnectionFailedError("m"), APIConnectionError),
        (WireError("m"), APIResponseError),
        (IntegrityError("m"), APIResponseError),
    ]
    for error, kind in cases:
        assert type(api_error(error)) is kind  # type: ignore[arg-type]
    own = ConfigurationError("m")
    assert api_error(own) is own


def test_what_is_exported_is_there_and_nothing_is_forgotten() -> None:
    exported = eloquent_client.__all__
    assert exported == sorted(exported)
    assert len(exported) == len(set(exported))
    kinds: set[Any] = {eloquent_client.APIError, *eloquent_client.APIError.__subclasses__()}
    kinds |= set(APIStatusError.__subclasses__()) | set(ServerFaultError.__subclasses__())
    kinds |= set(APIConnectionError.__subclasses__())
    assert {kind.__name__ for kind in kinds} <= set(exported)
    assert {kind.__name__ for kind in Event.__args__} <= set(exported)  # type: ignore[attr-defined]
