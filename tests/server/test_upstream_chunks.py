"""An engine's stream, decoded: all kinds of delta, all engines' manners, any cut of the bytes."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eloquent.core.events import (
    ChosenLogprob,
    Delta,
    EventDecoder,
    Extra,
    Logprobs,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    encode_event,
)
from eloquent_server.backends.base import Finish
from eloquent_server.backends.upstream_chunks import AnswerDecoder, SseDecoder
from eloquent_server.backends.upstream_errors import UpstreamError


def chunk(choice: str, rest: str = "") -> bytes:
    return f'data: {{"model":"m","choices":[{{"index":0,{choice}}}]{rest}}}\n\n'.encode()


END = chunk('"delta":{},"finish_reason":"stop"')
DONE = b"data: [DONE]\n\n"


def decode(*stream: bytes) -> tuple[list[Delta], Finish]:
    answer = AnswerDecoder("asked")
    events = [event for piece in stream for event in answer.feed(piece)]
    return events, answer.finish()


def delta(fields: str) -> list[Delta]:
    return decode(chunk(f'"delta":{{{fields}}}'), END)[0]


def delta_of(*calls: str) -> list[Delta]:
    """Return what comes of tool calls, each in a chunk of its own."""
    return decode(*[chunk(f'"delta":{{"tool_calls":[{call}]}}') for call in calls], END)[0]


LLAMA = b"".join(
    (
        chunk('"finish_reason":null,"delta":{"role":"assistant","content":null}'),
        b":\n\n",
        chunk(
            '"finish_reason":null,"delta":{"content":"\xc3\x9cber "},"logprobs":{"content":['
            '{"id":1,"token":"\xc3\x9cber ","bytes":[195,156,98,101,114,32],"logprob":-0.5,'
            '"top_logprobs":[{"id":1,"token":"\xc3\x9cber ","bytes":[195,156,98,101,114,32],'
            '"logprob":-0.5}]}]}'.encode("latin-1").decode()
        ),
        chunk('"finish_reason":"length","delta":{}'),
        b'data: {"choices":[],"model":"smol","usage":{"completion_tokens":1,"prompt_tokens":34,'
        b'"prompt_tokens_details":{"cached_tokens":33}},"timings":{"cache_n":33}}\n\n',
        DONE,
    )
)
VLLM = b"".join(
    (
        chunk('"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'),
        chunk('"delta":{"reasoning":"Hm","reasoning_content":"Hm"}'),
        chunk('"delta":{"content":"a\\ud83d\\ude00"},"token_ids":null'),
        chunk('"delta":{"content":""},"finish_reason":"stop","stop_reason":128009'),
        b'data: {"choices":[],"usage":{"prompt_tokens":3,"total_tokens":9,"completion_tokens":6}}',
        b"\n\n",
        DONE,
    )
)
TOOLS = b"".join(
    (
        chunk(
            '"delta":{"tool_calls":[{"index":0,"id":"c1","type":"function","function":'
            '{"name":"sum","arguments":""}}]}'
        ),
        chunk('"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\\"a\\":"}}]}'),
        chunk('"delta":{"tool_calls":[{"index":0,"function":{"arguments":"1}"}}]}'),
        chunk(
            '"delta":{"tool_calls":[{"index":1,"id":"c2","type":"function","function":'
            '{"name":"now","arguments":"{}"}}]}'
        ),
        chunk('"delta":{},"finish_reason":"tool_calls"'),
        DONE,
    )
)
TRANSFORMERS = chunk('"delta":{"content":"x"}') + chunk(
    '"delta":{},"finish_reason":"stop"', ',"usage":{"prompt_tokens":1,"completion_tokens":2}'
)


def test_llama_cpp() -> None:
    events, finish = decode(LLAMA)
    token = ChosenLogprob("Über ".encode(), -0.5, (TokenLogprob("Über ".encode(), -0.5),))
    extra = [event for event in events if isinstance(event, Extra)]
    assert [event for event in events if event not in extra] == [
        TextDelta("Über "),
        Logprobs((token,)),
    ]
    assert not extra
    assert (finish.reason, finish.prompt_tokens, finish.completion_tokens) == ("length", 34, 1)
    assert (finish.cached_tokens, finish.model) == (33, "smol")
    assert msgspec.json.decode(finish.usage)["prompt_tokens_details"] == {"cached_tokens": 33}


def test_vllm() -> None:
    events, finish = decode(VLLM)
    assert events == [
        ReasoningDelta("Hm"),
        TextDelta("a😀"),
        Extra(b'{"stop_reason":128009}'),
    ]
    assert (finish.reason, finish.prompt_tokens, finish.completion_tokens) == ("stop", 3, 6)
    assert finish.cached_tokens == 0


def test_tool_calls() -> None:
    events, finish = decode(TOOLS)
    assert events == [
        ToolCallDelta(0, "c1", "sum", ""),
        ToolCallDelta(0, "", "", '{"a":'),
        ToolCallDelta(0, "", "", "1}"),
        ToolCallDelta(1, "c2", "now", "{}"),
    ]
    assert finish.reason == "tool_calls"


def test_calls_under_one_index_are_several_calls() -> None:
    """Ollama and Gemini have sent parallel calls, each whole and each with the index 0."""
    events = delta_of(
        '{"index":0,"id":"a","function":{"name":"sum","arguments":"{}"}}',
        '{"index":0,"id":"b","function":{"name":"now","arguments":"{"}}',
        '{"index":0,"function":{"arguments":"}"}}',
        '{"id":"c","function":{"name":"day","arguments":"{}"}}',
    )
    assert events == [
        ToolCallDelta(0, "a", "sum", "{}"),
        ToolCallDelta(1, "b", "now", "{"),
        ToolCallDelta(1, "", "", "}"),
        ToolCallDelta(2, "c", "day", "{}"),
    ]


def test_an_id_and_a_name_with_each_piece_are_said_once() -> None:
    piece = '{"index":3,"id":"a","function":{"name":"sum","arguments":"{}"}}'
    assert delta_of(piece, piece) == [
        ToolCallDelta(3, "a", "sum", "{}"),
        ToolCallDelta(3, "", "", "{}"),
    ]


def test_a_call_of_another_form_has_an_index_of_its_own() -> None:
    """Without one, OpenAI's own client does not read it."""
    signed = '"function":{"name":"sum","arguments":"{}"},"extra_content":{"signature":"x"}'
    first, second = delta_of(f'{{"id":"a",{signed}}}', f'{{"index":0,"id":"b",{signed}}}')
    assert isinstance(first, Extra)
    assert isinstance(second, Extra)
    calls = [msgspec.json.decode(each.data)["delta"]["tool_calls"][0] for each in (first, second)]
    assert [(call["index"], call["id"]) for call in calls] == [(0, "a"), (1, "b")]
    assert calls[0]["extra_content"] == {"signature": "x"}


def test_bytes_that_are_no_utf8_are_replaced_and_leave_the_log_whole() -> None:
    said = b'"delta":{"content":"a\xff","note":"\xc3"},"finish_reason":"stop"'
    usage = b'"usage":{"prompt_tokens":1,"why":"\xff"}'
    events, finish = decode(b'data: {"choices":[{' + said + b"}]," + usage + b"}\n\n")
    assert events == [TextDelta("a\ufffd"), Extra('{"delta":{"note":"\ufffd"}}'.encode())]
    decoder = EventDecoder()
    assert [e for event in events for e in decoder.feed(encode_event(event))] == events
    assert msgspec.json.decode(finish.usage) == {"prompt_tokens": 1, "why": "\ufffd"}


def test_counts_that_are_none_count_nothing() -> None:
    for count in ("-1", str(10**30)):
        finish = decode(chunk('"delta":{}', f',"usage":{{"prompt_tokens":{count}}}'), END)[1]
        assert finish.prompt_tokens == 0


def test_a_choice_without_an_index_is_the_answers() -> None:
    said = b'data: {"choices":[{"index":null,"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n'
    assert decode(said)[0] == [TextDelta("a")]


def test_transformers_serve_has_no_end_mark_and_its_usage_in_the_last_chunk() -> None:
    events, finish = decode(TRANSFORMERS)
    assert events == [TextDelta("x")]
    assert (finish.prompt_tokens, finish.completion_tokens) == (1, 2)


def test_usage_comes_with_each_chunk() -> None:
    stream = [
        chunk('"delta":{"content":"a"}', f',"usage":{{"completion_tokens":{n}}}') for n in (1, 2, 3)
    ]
    assert decode(*stream, END, DONE)[1].completion_tokens == 3


def test_an_engine_that_counts_nothing() -> None:
    finish = decode(chunk('"delta":{"content":"a"}') * 3, END)[1]
    assert (finish.prompt_tokens, finish.completion_tokens, finish.usage) == (0, 3, b"")


def test_usage_that_is_none() -> None:
    for usage in ('"many"', "[]", "null", '{"prompt_tokens":"x"}'):
        assert decode(END, chunk('"delta":{}', f',"usage":{usage}'))[1].prompt_tokens == 0


@pytest.mark.parametrize(
    ("fields", "extra"),
    [
        ('"refusal":"no"', '{"delta":{"refusal":"no"}}'),
        ('"audio":{"id":"a","data":"UklG"}', '{"delta":{"audio":{"id":"a","data":"UklG"}}}'),
        ('"content":[{"type":"thinking"}]', '{"delta":{"content":[{"type":"thinking"}]}}'),
        (
            '"tool_calls":[{"index":0,"id":"x","type":"custom","custom":{"name":"n"}}]',
            '{"delta":{"tool_calls":[{"index":0,"id":"x","type":"custom","custom":{"name":"n"}}]}}',
        ),
        (
            '"tool_calls":[{"index":0,"id":"x","function":{"name":"n"},"more":{"sig":1e400}}]',
            '{"delta":{"tool_calls":[{"index":0,"id":"x","function":{"name":"n"},'
            '"more":{"sig":1e400}}]}}',
        ),
        (
            '"tool_calls":[{"index":-1,"id":"x"}]',
            '{"delta":{"tool_calls":[{"index":-1,"id":"x"}]}}',
        ),
    ],
)
def test_what_has_no_event_of_its_own_goes_on_as_it_is(fields: str, extra: str) -> None:
    assert delta(fields) == [Extra(extra.encode())]


def test_fields_that_say_nothing_are_left_out() -> None:
    assert not delta('"role":"assistant","content":"","refusal":null,"tool_calls":[],"audio":{}')


def test_what_repeats_all_that_there_is_does_not_go_on() -> None:
    said = '"delta":{"content":"be"},"message":{"role":"assistant","content":"to be"}'
    assert decode(chunk(said), END)[0] == [TextDelta("be")]


def test_logprobs_of_another_form_go_on_as_they_are() -> None:
    said = '"logprobs":{"tokens":["a"],"token_logprobs":[-1]}'
    assert decode(chunk(f'"delta":{{}},{said}'), END)[0] == [Extra(f"{{{said}}}".encode())]


def test_a_token_without_bytes_is_its_text() -> None:
    events = decode(
        chunk('"delta":{},"logprobs":{"content":[{"token":"é","logprob":-1,"bytes":null}]}'), END
    )[0]
    assert events == [Logprobs((ChosenLogprob("é".encode(), -1.0),))]


def test_other_choices_are_none_of_this_answer() -> None:
    other = b'data: {"choices":[{"index":1,"delta":{"content":"b"},"finish_reason":"stop"}]}\n\n'
    with pytest.raises(UpstreamError, match="without saying"):
        decode(other)


@pytest.mark.parametrize(
    "stream",
    [b"", chunk('"delta":{"content":"half"}'), chunk('"delta":{"content":"half"}') + DONE],
    ids=["empty", "cut", "done"],
)
def test_a_stream_without_a_finish_reason_is_no_answer(stream: bytes) -> None:
    with pytest.raises(UpstreamError, match="without saying that the answer is over"):
        decode(stream)


def test_a_finish_reason_that_is_a_failure() -> None:
    with pytest.raises(UpstreamError) as raised:
        decode(chunk('"delta":{},"finish_reason":"error"'), DONE)
    assert raised.value.code == "upstream_error"
    assert "finish_reason is error" in raised.value.detail


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ('{"error":{"message":"boom","type":"InternalServerError","code":500}}', "upstream_error"),
        ('{"error":{"message":"boom","code":400}}', "invalid_request"),
        ('{"error":{"message":"boom: context length","code":400}}', "prompt_too_long"),
        ('{"error":"boom"}', "upstream_error"),
        ('{"object":"error","message":"boom","type":"BadRequest","code":400}', "invalid_request"),
    ],
)
def test_an_error_in_the_stream(data: str, code: str) -> None:
    answer = AnswerDecoder("m")
    stream = chunk('"delta":{"content":"a"}') + f"data: {data}\n\n".encode() + END
    assert answer.feed(stream) == [TextDelta("a")]
    assert answer.error is not None
    assert answer.error.code == code
    assert "boom" in answer.error.message


@pytest.mark.parametrize(
    "data", [b"{", b"[]", b'{"choices":[{"delta":7}]}', b'{"choices":7}', b'"\\ud800"', b"\xff"]
)
def test_what_is_no_chunk(data: bytes) -> None:
    answer = AnswerDecoder("m")
    assert not answer.feed(b"data: " + data + b"\n\n")
    assert answer.error is not None
    assert answer.error.code == "upstream_error"


def test_what_follows_a_whole_answer_cannot_spoil_it() -> None:
    assert decode(TRANSFORMERS, b'data: {"error":"x"}\n\n')[1].reason == "stop"
    assert decode(TRANSFORMERS, DONE, b"data: {\n\n")[1].reason == "stop"


def test_the_largest_event_fits_a_log() -> None:
    size = (1 << 20) - len(b'data: {"model":"m","choices":[{"index":0,"delta":{"content":""}}]}')
    event = delta(f'"content":"{"x" * size}"')[0]
    assert encode_event(event)
    with pytest.raises(UpstreamError, match="more than 1048576 bytes"):
        delta(f'"content":"{"x" * (size + 1)}"')


def test_lines() -> None:
    stream = b": comment\r\ndata: a\rdata:b\n\nevent: x\nid: 7\ndata\n\n\n\n"
    stream += b"retry: 1\n\ndata:  c\r\ndata:d\r\n\r\nx"
    events = [b"a\nb", b"", b" c\nd"]
    assert SseDecoder().feed(stream) == events
    sse = SseDecoder()
    assert [event for byte in stream for event in sse.feed(bytes((byte,)))] == events


def test_any_number_of_comments_is_let_by() -> None:
    sse = SseDecoder(max_bytes=100)
    assert not sse.feed(b": still here\n" * 100)
    assert sse.feed(b"data: x\n\n") == [b"x"]


@pytest.mark.parametrize("stream", [LLAMA, VLLM, TOOLS, TRANSFORMERS], ids=["l", "v", "t", "tf"])
@given(data=st.data())
def test_any_cut_of_the_bytes_gives_the_same_events(stream: bytes, data: st.DataObject) -> None:
    stream = data.draw(st.sampled_from([b"\n", b"\r", b"\r\n"])).join(stream.split(b"\n"))
    stream += (
        b"\n"  # A lone CR at the very end may yet become a CRLF; its line is over all the same.
    )
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)))))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert decode(*pieces) == decode(stream)


@given(st.binary(max_size=200), st.sets(st.integers(0, 200)))
def test_any_bytes_are_events_or_an_error(data: bytes, cuts: set[int]) -> None:
    whole = SseDecoder(max_bytes=40)
    events = whole.feed(data)
    places = sorted(cut for cut in cuts if cut <= len(data))
    cut_up = SseDecoder(max_bytes=40)
    pieces = [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]
    assert [event for piece in pieces for event in cut_up.feed(piece)] == events
    assert cut_up.is_too_large == whole.is_too_large


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "choices",
                        "delta",
                        "index",
                        "logprobs",
                        "content",
                        "usage",
                        "tool_calls",
                        "function",
                        "error",
                        "finish_reason",
                    ]
                ),
                x,
            )
        ),
    )
)
def test_any_json_is_decoded_or_refused(value: object) -> None:
    answer = AnswerDecoder("m")
    try:
        said = msgspec.json.encode(value)
    except (UnicodeError, msgspec.MsgspecError, OverflowError):
        return
    for event in answer.feed(b"data: " + said + b"\n\n"):
        assert encode_event(event)
