"""What a chat body may ask for, by OpenAI's names, and what is refused."""

import json
from typing import Any

import pytest

from eloquent.errors import RequestError
from eloquent_server.chat import ChatRequest, parse_chat_body


def parse(**fields: Any) -> ChatRequest:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return parse_chat_body(json.dumps(body).encode())


def test_what_is_left_out_is_off() -> None:
    request = parse()
    assert (request.top_k, request.min_p, request.repetition_penalty) == (0, 0, 1)
    assert (request.presence_penalty, request.frequency_penalty) == (0, 0)
    assert (request.stop_strings, request.bias, request.schema) == ((), (), None)


@pytest.mark.parametrize(
    ("stop", "strings"), [("END", ("END",)), (["a", "b"], ("a", "b")), ([], ()), (None, ())]
)
def test_stop_is_a_string_or_several(stop: Any, strings: tuple[str, ...]) -> None:
    assert parse(stop=stop).stop_strings == strings


def test_a_field_that_is_null_is_left_out() -> None:
    """As OpenAI has it; some programs write all fields that there are."""
    nothing = {"n": None, "stream": None, "presence_penalty": None, "seed": None, "tools": None}
    assert parse(**nothing) == parse()
    with pytest.raises(RequestError, match="messages"):
        parse_chat_body(b'{"messages": null, "n" : null }')


def test_content_may_be_parts_of_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert parse(messages=[{"role": "user", "content": parts}]).messages[0].text == "one\ntwo"
    assert parse(messages=[{"role": "user", "content": "one"}]).messages[0].text == "one"
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    with pytest.raises(RequestError, match=r"image_url.*messages.*content"):
        parse(messages=[{"role": "user", "content": [*parts, image]}])


def test_what_matters_to_openai_s_service_alone_changes_nothing() -> None:
    theirs = {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto"}
    theirs |= {"safety_identifier": "me", "prompt_cache_key": "mine"}
    assert parse(**theirs).messages == parse().messages


@pytest.mark.parametrize("salt", ["mine", "", 5, None])
def test_a_client_does_not_say_whose_prefixes_are_shared(salt: Any) -> None:
    assert parse(cache_salt=salt).messages == parse().messages


def test_biases_are_by_token_id() -> None:
    assert parse(logit_bias={"7": -100, "12": 0.5}).bias == ((7, -100.0), (12, 0.5))


def test_formats_of_the_answer() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert json.loads(parse(response_format=wanted).schema or "") == schema
    assert json.loads(parse(response_format={"type": "json_object"}).schema or "") == {
        "type": "object"
    }
    assert parse(response_format={"type": "text"}).schema is None


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": -2},
        {"min_p": 1.1},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -3},
        {"repetition_penalty": 0},
        {"stop": ""},
        {"stop": ["a"] * 17},
        {"stop": "x" * 129},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {"1": 101}},
        {"logit_bias": {"-1": 1}},
        {"logprobs": 5},
        {"logprobs": True, "top_logprobs": 21},
        {"top_logprobs": 2},
        {"response_format": {"type": "grammar"}},
        {"response_format": {"type": "json_schema"}},
        {"n": 2},
        {"tools": []},
    ],
    ids=str,
)
def test_refusals_name_the_field(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    assert caught.value.code == "invalid_request"
    assert list(fields)[-1] in caught.value.message
