"""A chat body on its way to an engine: kept whole, salted, continued; and its head."""

import json
from typing import Any

import pytest

from eloquent.core.events import (
    ChosenLogprob,
    Delta,
    Extra,
    Logprobs,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
)
from eloquent.errors import RequestError
from eloquent_server.backends.upstream_request import HEAD_BYTES, ChatBody, Continues

ASK = {"role": "user", "content": "hi"}
HALF = (TextDelta("Good "), TextDelta("day"))


def body(**fields: Any) -> bytes:
    return json.dumps({"messages": [ASK], **fields}).encode()


def sent(chat: ChatBody, *, model: str = "", salt: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(chat.encode(model, salt))
    return fields


def test_everything_goes_on_as_the_client_wrote_it() -> None:
    fields: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": None}}}],
        "user": "u",
        "temperature": 1e-7,
        "seed": 2**70,
        "response_format": {"type": "json_object"},
        "chat_template_kwargs": {"enable_thinking": False},
    }
    had = sent(ChatBody(body(**fields)))
    assert had == {**fields, "stream": True, "stream_options": {"include_usage": True}}


def test_numbers_keep_their_form() -> None:
    said = b'{"messages":[{"role":"user"}],"seed":1.50e3,"top_p":0.10}'
    assert b'"seed":1.50e3,"top_p":0.10' in ChatBody(said).encode("", "")


def test_a_stream_with_its_usage_is_asked_for_whatever_the_client_wants() -> None:
    options = {"include_usage": False, "continuous_usage_stats": True}
    had = sent(ChatBody(body(stream=False, stream_options=options)))
    assert had["stream"] is True
    assert had["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


def test_the_salt_is_the_servers() -> None:
    assert "cache_salt" not in sent(ChatBody(body(cache_salt="mine")))
    assert sent(ChatBody(body(cache_salt="mine")), salt="theirs")["cache_salt"] == "theirs"


def test_the_model_is_named_if_the_client_leaves_it_out() -> None:
    for fields in ({}, {"model": ""}, {"model": None}):
        chat = ChatBody(body(**fields))
        assert chat.model == ""
        assert sent(chat, model="m")["model"] == "m"


@pytest.mark.parametrize(
    "refused",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"messages":[]}',
        b'{"messages":7}',
        b'{"messages":["hi"]}',
        b'{"messages":[{}],"n":2}',
        b'{"messages":[{}],"n":0}',
        b'{"messages":[{}],"model":7}',
        b'{"messages":[{}],"max_tokens":"many"}',
        b"\xff",
    ],
)
def test_what_is_no_chat_body_is_refused(refused: bytes) -> None:
    with pytest.raises(RequestError) as raised:
        ChatBody(refused)
    assert raised.value.code == "invalid_request"


def test_a_conversation_keeps_its_head() -> None:
    system, answer = {"role": "system", "content": "Be brief."}, {"role": "assistant"}
    first = ChatBody(body(messages=[system, ASK]))
    later = ChatBody(body(messages=[system, ASK, answer, {"role": "user", "content": "and?"}]))
    assert first.head("m", "s") == later.head("m", "s")


def test_others_have_other_heads() -> None:
    long = "x" * HEAD_BYTES
    heads = [
        ChatBody(body(messages=messages)).head(model, salt)
        for model, salt, messages in (
            ("m", "s", [ASK]),
            ("m2", "s", [ASK]),
            ("m", "s2", [ASK]),
            ("m", "s", [{"role": "user", "content": "ho"}]),
            ("m", "s", [{"role": "system", "content": "Be brief."}, ASK]),
            ("m", "s", [{"role": "system", "content": long}, ASK]),
            ("m", "s", [{"role": "system", "content": long}, {"role": "user", "content": "ho"}]),
            ("m", "s", [{"role": "user", "content": "h"}, {"role": "user", "content": "i"}]),
        )
    ]
    assert len(set(heads)) == len(heads)


def continued(
    continues: Continues = "llama", events: tuple[Delta, ...] = HALF, **fields: Any
) -> dict[str, Any]:
    chat = ChatBody(body(**fields))
    chat.go_on(events, continues)
    return sent(chat)


def test_an_answer_is_continued_by_llama_cpp() -> None:
    had = continued()
    assert had["messages"] == [ASK, {"role": "assistant", "content": "Good day"}]
    assert "continue_final_message" not in had


def test_an_answer_is_continued_by_vllm_and_sglang() -> None:
    had = continued("vllm")
    assert had["messages"] == [ASK, {"role": "assistant", "content": "Good day"}]
    assert had["continue_final_message"] is True
    assert had["add_generation_prompt"] is False


def test_what_the_client_began_comes_before_it() -> None:
    began = {"role": "assistant", "content": "Well: "}
    had = continued(messages=[ASK, began])
    assert had["messages"] == [ASK, {"role": "assistant", "content": "Well: Good day"}]


def test_the_limit_shrinks_by_what_is_there() -> None:
    had = continued(max_tokens=10, max_completion_tokens=7)
    assert (had["max_tokens"], had["max_completion_tokens"]) == (8, 5)


def test_what_is_there_is_not_said_again() -> None:
    """An engine would, before an answer that goes on with a message of its own role."""
    assert "echo" not in continued("vllm", echo=True)


def test_logprobs_count_better_than_pieces() -> None:
    token = ChosenLogprob(b"", -1.0)
    assert continued(events=(*HALF, Logprobs((token,) * 3)), max_tokens=10)["max_tokens"] == 7


def test_a_limit_that_is_used_up() -> None:
    chat = ChatBody(body(max_tokens=2))
    assert not chat.has_no_room
    assert chat.go_on(HALF, "llama") == 2
    assert chat.has_no_room


def test_an_answer_is_continued_twice() -> None:
    chat = ChatBody(body(max_tokens=10))
    chat.go_on(HALF, "llama")
    chat.go_on((*HALF, TextDelta("!")), "llama")
    had = sent(chat)
    assert had["messages"] == [ASK, {"role": "assistant", "content": "Good day!"}]
    assert had["max_tokens"] == 7


@pytest.mark.parametrize(
    ("continues", "events", "fields", "why"),
    [
        ("no", HALF, {}, "--upstream-continues"),
        ("vllm", (*HALF, ToolCallDelta(0, "a", "b", "")), {}, "more than text"),
        ("vllm", (ReasoningDelta("Hm"), *HALF), {}, "more than text"),
        ("vllm", (*HALF, Extra(b"{}")), {}, "more than text"),
        ("vllm", HALF, {"response_format": {"type": "json_object"}}, "grammar"),
        ("vllm", HALF, {"guided_regex": "a"}, "grammar"),
        ("llama", HALF, {"grammar": "root ::= x"}, "grammar"),
        ("llama", HALF, {"messages": [ASK, {"role": "assistant", "content": []}]}, "no text"),
    ],
)
def test_what_cannot_be_continued(
    continues: Continues, events: tuple[Delta, ...], fields: dict[str, Any], why: str
) -> None:
    with pytest.raises(RequestError, match=why) as raised:
        continued(continues, events, **fields)
    assert raised.value.code == "interrupted"


def test_a_format_that_is_text_is_no_grammar() -> None:
    assert continued(response_format={"type": "text"})
    assert continued(response_format=None)
