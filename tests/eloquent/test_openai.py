"""Answers in OpenAI's words: the official client's own models read them."""

from typing import Any

import msgspec
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

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
from eloquent.openai import Chunks, comment, completion, error_body, http_status, server_sent

TURN = "00112233445566778899aabbccddeeff"
ABOUT: dict[str, Any] = {"turn_id": TURN, "model": "m", "created": 1_700_000_000}
CALL = [
    ToolCallDelta(0, "call_1", "weather", ""),
    ToolCallDelta(0, "", "", '{"city": '),
    ToolCallDelta(1, "call_2", "time", "{}"),
    ToolCallDelta(0, "", "", '"Rome"}'),
]
EURO = Logprobs(
    (
        ChosenLogprob(b"\xe2\x82", -0.25, (TokenLogprob(b"\xe2\x82", -0.25),)),
        ChosenLogprob(b"\xac", float("-inf")),
    )
)


def end(reason: str = "stop", *, usage: bytes = b"") -> End:
    return End(reason, "m", 7, 3, 0, b"", cached_tokens=4, usage=usage)


def chunks_of(*events: Event, include_usage: bool = False) -> list[dict[str, Any]]:
    chunks = Chunks(**ABOUT, include_usage=include_usage)
    return [chunks.start(), *(chunk for event in events for chunk in chunks.of(event))]


def parsed(*events: Event, include_usage: bool = False) -> list[ChatCompletionChunk]:
    """Return the chunks as the client has them: over JSON, each held to its model."""
    made = chunks_of(*events, include_usage=include_usage)
    return [ChatCompletionChunk.model_validate_json(msgspec.json.encode(chunk)) for chunk in made]


def whole(*events: Event) -> ChatCompletion:
    return ChatCompletion.model_validate_json(msgspec.json.encode(completion(events, **ABOUT)))


def test_text_comes_between_the_role_and_the_finish_reason() -> None:
    first, *texts, last = parsed(TextDelta("to "), TextDelta("be"), end())
    assert first.choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in texts] == ["to ", "be"]
    assert [chunk.choices[0].finish_reason for chunk in texts] == [None, None]
    assert last.choices[0].finish_reason == "stop"
    assert {(chunk.id, chunk.model, chunk.created) for chunk in (first, *texts, last)} == {
        (f"chatcmpl-{TURN}", "m", ABOUT["created"])
    }
    assert "system_fingerprint" not in chunks_of(end())[0]


def test_reasoning_is_not_content() -> None:
    _, thought, _ = parsed(ReasoningDelta("hm"), end())
    assert thought.choices[0].delta.content is None
    assert thought.choices[0].delta.model_extra == {"reasoning_content": "hm"}


def test_a_call_has_its_name_once_and_its_arguments_in_pieces() -> None:
    _, *pieces, last = parsed(*CALL, end("tool_calls"))
    calls = [call for chunk in pieces for call in chunk.choices[0].delta.tool_calls or ()]
    assert [(call.index, call.id, call.type) for call in calls] == [
        (0, "call_1", "function"),
        (0, None, None),
        (1, "call_2", "function"),
        (0, None, None),
    ]
    assert [call.function and call.function.name for call in calls] == [
        "weather",
        None,
        "time",
        None,
    ]
    assert (
        "".join(
            call.function.arguments or "" for call in calls if call.function and call.index == 0
        )
        == '{"city": "Rome"}'
    )
    assert last.choices[0].finish_reason == "tool_calls"


def test_logprobs_have_their_bytes_and_no_infinity() -> None:
    _, chunk, _ = parsed(EURO, end())
    assert chunk.choices[0].logprobs is not None
    tokens = chunk.choices[0].logprobs.content
    assert tokens is not None
    first, second = tokens
    assert first.bytes == [0xE2, 0x82]
    assert first.token == "�"
    assert first.logprob == first.top_logprobs[0].logprob == -0.25
    assert (second.logprob, second.top_logprobs) == (-9999.0, [])


def test_usage_comes_last_and_only_if_asked() -> None:
    assert "usage" not in chunks_of(end())[-1]
    *others, last = parsed(TextDelta("a"), end(), include_usage=True)
    assert [chunk.usage for chunk in others] == [None] * 3
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (7, 3)
    assert last.usage.total_tokens == 10
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens == 4


def test_usage_of_an_engine_behind_is_as_it_was() -> None:
    usage = b'{"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10, "cost": 0.5}'
    said = chunks_of(end(usage=usage), include_usage=True)[-1]["usage"]
    assert said == msgspec.json.decode(usage) == completion([end(usage=usage)], **ABOUT)["usage"]
    assert chunks_of(end(usage=b"[]"), include_usage=True)[-1]["usage"]["total_tokens"] == 10


def test_what_else_an_engine_said_is_merged_into_the_choice() -> None:
    _, chunk, _ = parsed(Extra(b'{"delta": {"refusal": "no"}, "stop_reason": 7}'), end())
    assert chunk.choices[0].delta.refusal == "no"
    assert chunk.choices[0].model_extra == {"stop_reason": 7}
    assert chunk.choices[0].index == 0


@pytest.mark.parametrize(
    ("events", "code"),
    [
        ((end("cancelled"),), "cancelled"),
        ((end("error"),), "engine_error"),
        ((Failure("interrupted", "gone"), end("error")), "interrupted"),
    ],
)
def test_an_answer_that_is_not_whole_has_one_error_and_no_end(
    events: tuple[Event, ...], code: str
) -> None:
    chunks = Chunks(**ABOUT, include_usage=True)
    made = [chunk for event in (TextDelta("to"), *events) for chunk in chunks.of(event)]
    assert [chunk["error"]["code"] for chunk in made[1:]] == [code]
    assert not chunks.is_whole
    with pytest.raises(RequestError) as caught:
        completion((TextDelta("to"), *events), **ABOUT)
    assert caught.value.code == code


def test_a_whole_answer_says_so() -> None:
    chunks = Chunks(**ABOUT, include_usage=False)
    chunks.of(TextDelta("a"))
    assert not chunks.is_whole
    chunks.of(end("length"))
    assert chunks.is_whole


def test_a_completion_has_everything_that_the_chunks_have() -> None:
    said = whole(
        ReasoningDelta("h"),
        ReasoningDelta("m"),
        TextDelta("to "),
        TextDelta("be"),
        EURO,
        EURO,
        Extra(b'{"delta": {"refusal": "n"}, "token_ids": [1]}'),
        Extra(b'{"delta": {"refusal": "o"}, "token_ids": [2], "stop_reason": null}'),
        *CALL,
        end("tool_calls"),
    )
    (choice,) = said.choices
    assert said.id == f"chatcmpl-{TURN}"
    assert (choice.message.role, choice.message.content) == ("assistant", "to be")
    assert choice.message.model_extra == {"reasoning_content": "hm"}
    assert choice.message.refusal == "no"
    assert choice.model_extra == {"token_ids": [1, 2], "stop_reason": None}
    assert choice.logprobs is not None
    assert len(choice.logprobs.content or ()) == 4
    assert choice.message.model_dump()["tool_calls"] == [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
        },
        {"id": "call_2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
    ]
    assert choice.finish_reason == "tool_calls"
    assert said.usage is not None
    assert said.usage.total_tokens == 10


def test_a_call_that_an_engine_said_in_two_forms_is_one_call() -> None:
    """Gemini signs a call's first piece, in a field of its own."""
    signed = b'"function": {"name": "weather", "arguments": "{"}, "extra_content": {"by": "g"}'
    custom = b'{"index": 1, "id": "c", "type": "custom", "custom": {"name": "sh", "input": "l"}}'
    (choice,) = completion(
        (
            Extra(b'{"delta": {"tool_calls": [{"index": 0, "id": "call_1", %s}]}}' % signed),
            ToolCallDelta(0, "", "", "}"),
            Extra(b'{"delta": {"tool_calls": [%s]}}' % custom),
            Extra(b'{"delta": {"tool_calls": [{"index": 1, "custom": {"input": "s"}}]}}'),
            end("tool_calls"),
        ),
        **ABOUT,
    )["choices"]
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"] == [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": "{}"},
            "extra_content": {"by": "g"},
        },
        {"id": "c", "type": "custom", "custom": {"name": "sh", "input": "ls"}},
    ]


def test_a_call_whose_id_name_and_type_are_repeated_has_them_once() -> None:
    piece = b'{"index": 0, "id": "a", "type": "custom", "custom": {"name": "n", "input": "x"}}'
    extra = Extra(b'{"delta": {"tool_calls": [%s]}}' % piece)
    (choice,) = completion((extra, extra, end("tool_calls")), **ABOUT)["choices"]
    assert choice["message"]["tool_calls"] == [
        {"id": "a", "type": "custom", "custom": {"name": "n", "input": "xx"}}
    ]
    pieces = (ToolCallDelta(0, "a", "", ""), ToolCallDelta(0, "a", "n", "{}"), end("tool_calls"))
    (choice,) = completion(pieces, **ABOUT)["choices"]
    assert choice["message"]["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "n", "arguments": "{}"}}
    ]


def test_text_is_whole_beside_content_that_is_none() -> None:
    """Mistral's models think in lists and answer in text."""
    thought = Extra(b'{"delta": {"content": [{"type": "thinking", "thinking": []}]}}')
    (choice,) = completion((thought, TextDelta("to "), TextDelta("be"), end()), **ABOUT)["choices"]
    assert choice["message"]["content"] == [
        {"type": "thinking", "thinking": []},
        {"type": "text", "text": "to be"},
    ]


def test_what_an_engine_says_of_a_choice_again_and_again_is_said_once() -> None:
    """Azure does so with its filters."""
    extra = Extra(b'{"content_filter_results": {"hate": {"severity": "safe"}}}')
    (choice,) = completion((extra, extra, end()), **ABOUT)["choices"]
    assert choice["content_filter_results"] == {"hate": {"severity": "safe"}}


@pytest.mark.parametrize("usage", [b"{}", b"[]", b'{"a": "\xff"}', b"[" * 100_000])
def test_usage_has_its_counts_whatever_an_engine_says(usage: bytes) -> None:
    said = whole(end(usage=usage)).usage
    assert said is not None
    assert (said.prompt_tokens, said.completion_tokens, said.total_tokens) == (7, 3, 10)


@pytest.mark.parametrize("call", [5, True, {}, {"index": "x"}, {"index": 0, "function": 5}])
def test_calls_of_no_known_form_go_on_as_they_are(call: Any) -> None:
    extra = Extra(msgspec.json.encode({"delta": {"tool_calls": call if call is True else [call]}}))
    (choice,) = completion((*CALL, extra, end()), **ABOUT)["choices"]
    assert [each == call for each in choice["message"]["tool_calls"]] == [False, False, True]


def test_what_an_engine_says_cannot_replace_the_message() -> None:
    extras = (Extra(b'{"delta": 5, "index": 1}'), Extra(b'{"message": {"content": "x"}}'))
    (choice,) = completion((TextDelta("to"), *extras, end()), **ABOUT)["choices"]
    assert (choice["index"], choice["message"]["content"]) == (0, "to")


def test_content_is_null_only_beside_calls() -> None:
    assert whole(end()).choices[0].message.content == ""
    assert whole(*CALL, end()).choices[0].message.content is None


def test_events_without_an_end_are_no_completion() -> None:
    with pytest.raises(ValueError, match="End"):
        completion([TextDelta("to")], **ABOUT)


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("invalid_request", 400, "invalid_request_error"),
        ("unauthorized", 401, "authentication_error"),
        ("unknown_model", 404, "invalid_request_error"),
        ("request_too_large", 413, "invalid_request_error"),
        ("rate_limited", 429, "rate_limit_error"),
        ("too_many_turns", 429, "rate_limit_error"),
        ("overloaded", 503, "server_error"),
        ("upstream_error", 502, "server_error"),
        ("upstream_timeout", 504, "server_error"),
        ("a_code_of_tomorrow", 500, "server_error"),
    ],
)
def test_codes_have_their_status_and_type(code: str, status: int, kind: str) -> None:
    assert http_status(code) == status
    assert error_body(code, "why") == {
        "error": {"message": "why", "type": kind, "param": None, "code": code}
    }


def test_a_server_sent_event_is_one_line_of_data() -> None:
    assert server_sent({"text": "a\nb"}, "turn:12") == b'id: turn:12\ndata: {"text":"a\\nb"}\n\n'
    assert server_sent({"a": 1}) == b'data: {"a":1}\n\n'
    assert comment("waiting") == b": waiting\n\n"
