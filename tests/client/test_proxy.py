"""What programs for OpenAI's API get of the proxy; it is in the test's process, the server real."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import openai
import pytest
from loopback import DEADLINE_S, Hanging, Server, StartServer, saying

from eloquent.core.events import Extra, Failure, ReasoningDelta, TextDelta, ToolCallDelta
from eloquent.core.wire import MAX_REQUEST_BODY_BYTES
from eloquent.errors import ConfigurationError, RequestError
from eloquent_client import Client, LinkState
from eloquent_client.httpx_transport import EloquentTransport, SyncEloquentTransport
from eloquent_client.proxy import turns as proxy_turns
from eloquent_client.proxy.handler import client_options
from eloquent_client.proxy.link import LinkWatch
from eloquent_client.proxy.turns import Turns
from eloquent_server.backends.echo import EchoBackend
from eloquent_server.gateway import Gateway
from eloquent_server.turns import Turn

HELLO = [{"role": "user", "content": "Hello"}]
ASKED = {"messages": HELLO, "stream": True}
CHAT = "/v1/chat/completions"


@asynccontextmanager
async def proxied(server: Server, **options: Any) -> AsyncIterator[httpx2.AsyncClient]:
    transport = EloquentTransport(str(server.url), **options)
    http = httpx2.AsyncClient(transport=transport, base_url="http://proxy")
    async with asyncio.timeout(DEADLINE_S), http:
        yield http


def openai_over(http: httpx2.AsyncClient, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        api_key="a key", base_url="http://proxy/v1", http_client=http, **options
    )


def said(stream: str) -> list[Any]:
    """Return the data of a stream's events; `[DONE]` as it is."""
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line[:5] == "data:"]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


class Counting:
    """Counts a handler's turns."""

    def __init__(self, handler: Callable[[Turn], Any]) -> None:
        self._handler = handler
        self.turns: list[Turn] = []

    async def __call__(self, turn: Turn) -> None:
        self.turns.append(turn)
        await self._handler(turn)


async def test_openais_library_streams(start_server: StartServer) -> None:
    server = await start_server(saying("one ", "two ", "three"))
    async with proxied(server) as http:
        stream = await openai_over(http).chat.completions.create(
            model="any", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    deltas = [choice.delta.content for chunk in chunks for choice in chunk.choices]
    assert deltas == ["", "one ", "two ", "three", None]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (7, 3)
    assert len({chunk.id for chunk in chunks}) == 1
    assert stream.response.headers["content-type"] == "text/event-stream"


async def test_openais_library_streams_without_an_event_loop(start_server: StartServer) -> None:
    def ask(url: str) -> list[str | None]:
        with httpx2.Client(transport=SyncEloquentTransport(url)) as http:
            client = openai.OpenAI(api_key="any", http_client=http)
            whole = client.chat.completions.create(model="any", messages=HELLO)
            with client.chat.completions.create(model="any", messages=HELLO, stream=True) as stream:
                deltas = [chunk.choices[0].delta.content for chunk in stream]
            with client.chat.completions.create(
                model="any", messages=HELLO, stream=True
            ) as given_up:
                next(given_up)
            return [whole.choices[0].message.content, *deltas]

    server = await start_server(saying("one ", "two"))
    async with asyncio.timeout(DEADLINE_S):
        said = await asyncio.to_thread(ask, str(server.url))
    assert said == ["one two", "", "one ", "two", None]


async def test_a_response_may_be_closed_after_its_transport(start_server: StartServer) -> None:
    hanging = Hanging()

    def ask(url: str) -> None:
        transport = SyncEloquentTransport(url)
        http = httpx2.Client(transport=transport, base_url="http://proxy")
        reply = http.send(http.build_request("POST", CHAT, json=ASKED), stream=True)
        http.close()
        reply.close()
        transport.close()

    server = await start_server(hanging)
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.to_thread(ask, str(server.url))
        await hanging.cancelled.wait()


async def test_a_transport_whose_close_is_cancelled_is_closed(start_server: StartServer) -> None:
    hanging = Hanging()
    server = await start_server(hanging)
    transport = EloquentTransport(server.url)
    http = httpx2.AsyncClient(transport=transport, base_url="http://proxy")
    async with asyncio.timeout(DEADLINE_S), http.stream("POST", CHAT, json=ASKED):
        client = transport._client
        assert client is not None
        closing = asyncio.create_task(transport.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait((closing,))
        await hanging.cancelled.wait()
    assert client.link.state is LinkState.CLOSED


async def test_without_stream_the_answer_is_one_object(start_server: StartServer) -> None:
    server = await start_server(saying("one ", "two"))
    async with proxied(server) as http:
        answer = await openai_over(http).chat.completions.create(model="any", messages=HELLO)
    assert answer.choices[0].message.content == "one two"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 9


async def test_reasoning_tool_calls_and_what_else_there_is_come_through(
    start_server: StartServer,
) -> None:
    async def handle(turn: Turn) -> None:
        turn.append(ReasoningDelta("Hm."))
        turn.append(ToolCallDelta(0, "call-1", "look", ""))
        turn.append(ToolCallDelta(0, "", "", '{"at":1}'))
        turn.append(Extra(b'{"delta":{"refusal":"no"}}'))
        turn.close("tool_calls", model="told", prompt_tokens=1, completion_tokens=2)

    server = await start_server(handle)
    async with proxied(server) as http:
        whole = (await http.post(CHAT, json={"messages": HELLO})).json()["choices"][0]
        stream = await openai_over(http).chat.completions.create(
            model="any", messages=HELLO, stream=True
        )
        deltas = [chunk.choices[0].delta async for chunk in stream]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["reasoning_content"] == "Hm."
    assert whole["message"]["tool_calls"][0]["function"] == {
        "name": "look",
        "arguments": '{"at":1}',
    }
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert "".join(call.function.arguments for call in calls if call.function) == '{"at":1}'
    assert [delta.refusal for delta in deltas if delta.refusal] == ["no"]


async def test_refusals_have_their_status_before_anything_else(start_server: StartServer) -> None:
    server = await start_server(Gateway(EchoBackend(1e6)).handle)
    async with proxied(server) as http:
        client = openai_over(http)
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.chat.completions.create(model="nonesuch", messages=HELLO, stream=True)
        assert unknown.value.code == "unknown_model"
        with pytest.raises(openai.BadRequestError) as invalid:
            await client.chat.completions.create(model="echo", messages=HELLO, temperature=9)
        assert invalid.value.code == "invalid_request"
        assert "temperature" in invalid.value.message


async def test_a_limit_says_when_to_ask_again(start_server: StartServer) -> None:
    async def handle(turn: Turn) -> None:
        turn.reject(RequestError("rate_limited", "Too much.", 6.2))

    counting = Counting(handle)
    server = await start_server(counting)
    async with proxied(server) as http:
        reply = await http.post(CHAT, json=ASKED)
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "7")
    assert reply.json()["error"]["code"] == "rate_limited"
    assert len(counting.turns) == 1


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_failure_before_any_text_has_its_status(
    start_server: StartServer, is_stream: bool
) -> None:
    async def handle(turn: Turn) -> None:
        turn.append(Failure("upstream_timeout", "The engine is slow."))
        turn.close("error", model="told", prompt_tokens=0, completion_tokens=0)

    server = await start_server(handle)
    async with proxied(server) as http:
        reply = await http.post(CHAT, json=ASKED | {"stream": is_stream})
    assert reply.status_code == 504
    assert reply.json()["error"]["message"] == "The engine is slow."


async def test_a_failure_in_mid_answer_is_an_error_event_and_no_end(
    start_server: StartServer,
) -> None:
    async def handle(turn: Turn) -> None:
        turn.append(TextDelta("So far"))
        turn.append(Failure("upstream_error", "The engine is gone."))
        turn.close("error", model="told", prompt_tokens=0, completion_tokens=0)

    server = await start_server(handle)
    async with proxied(server) as http:
        events = said((await http.post(CHAT, json=ASKED)).text)
        whole = await http.post(CHAT, json={"messages": HELLO})
        stream = await openai_over(http).chat.completions.create(
            model="any", messages=HELLO, stream=True
        )
        with pytest.raises(openai.APIError, match="engine is gone"):
            async for _ in stream:
                pass
    assert events[1]["choices"][0]["delta"]["content"] == "So far"
    assert [event["error"]["code"] for event in events[2:]] == ["upstream_error"]
    assert whole.status_code == 502


async def test_a_program_that_hangs_up_cancels(start_server: StartServer) -> None:
    hanging = Hanging()
    server = await start_server(hanging)
    async with proxied(server) as http:
        stream = await openai_over(http).chat.completions.create(
            model="any", messages=HELLO, stream=True
        )
        assert (await anext(aiter(stream))).choices[0].delta.content == ""
        await stream.close()
        await hanging.cancelled.wait()


async def test_a_program_that_hangs_up_before_the_first_event_cancels(
    start_server: StartServer,
) -> None:
    hanging = Hanging(text=None)
    server = await start_server(hanging)
    async with proxied(server) as http:
        asking = asyncio.create_task(http.post(CHAT, json=ASKED))
        await hanging.asked.wait()
        asking.cancel()
        await hanging.cancelled.wait()
        with pytest.raises(asyncio.CancelledError):
            await asking


async def test_a_program_that_goes_while_its_answer_is_closed_cancels(
    start_server: StartServer,
) -> None:
    hanging = Hanging()
    server = await start_server(hanging)
    async with proxied(server) as http:
        reply = await http.send(http.build_request("POST", CHAT, json=ASKED), stream=True)
        reading = asyncio.create_task(reply.aread())
        await hanging.asked.wait()
        closing = asyncio.create_task(reply.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        await hanging.cancelled.wait()
        await asyncio.wait((closing, reading))
        assert (await http.get("/health")).json()["turns"] == 0


async def test_who_reads_an_answer_that_another_task_closes_is_told(
    start_server: StartServer,
) -> None:
    server = await start_server(Hanging())
    async with proxied(server) as http:
        stream = await openai_over(http).chat.completions.create(
            model="any", messages=HELLO, stream=True
        )
        deltas = aiter(stream)
        assert (await anext(deltas)).choices[0].delta.content == ""
        assert (await anext(deltas)).choices[0].delta.content == "And then"
        waiting = asyncio.ensure_future(anext(deltas))
        for _ in range(10):  # until it waits
            await asyncio.sleep(0)
        await stream.close()
        with pytest.raises(openai.APIError, match="given up by the program"):
            await waiting


async def test_a_read_timeout_is_kept_within_a_program(start_server: StartServer) -> None:
    hanging = Hanging(text=None)
    server = await start_server(hanging)
    async with proxied(server) as http:
        with pytest.raises(httpx2.ReadTimeout):
            await http.post(CHAT, json=ASKED, timeout=0.2)
        await hanging.cancelled.wait()


async def test_a_named_request_is_one_turn_however_often_it_is_asked(
    start_server: StartServer,
) -> None:
    counting = Counting(saying("one ", "two"))
    server = await start_server(counting)
    async with proxied(server) as http:
        for name, key, question, turns in [
            ("a", "k", "Hello", 1),
            ("a", "k", "Hello", 1),
            ("b", "k", "Hello", 2),
            ("a", "other", "Hello", 3),
            ("a", "k", "Bye", 4),
            ("a", "k", "Hello", 4),
            (None, "k", "Hello", 5),
            (None, "k", "Hello", 6),
        ]:
            headers = {"Authorization": f"Bearer {key}"}
            headers |= {} if name is None else {"Idempotency-Key": name}
            body = ASKED | {"messages": [{"role": "user", "content": question}]}
            events = said((await http.post(CHAT, json=body, headers=headers)).text)
            assert events[-1] == "[DONE]"
            assert len(counting.turns) == turns


async def test_a_named_turn_waits_for_its_program_to_ask_again(start_server: StartServer) -> None:
    more = asyncio.Event()

    async def handle(turn: Turn) -> None:
        turn.append(TextDelta("one "))
        await more.wait()
        turn.append(TextDelta("two"))
        turn.close("stop", model="told", prompt_tokens=1, completion_tokens=2)

    counting = Counting(handle)
    server = await start_server(counting)
    headers = {"Idempotency-Key": "a"}
    async with proxied(server) as http:
        async with http.stream("POST", CHAT, json=ASKED, headers=headers) as reply:
            assert "one " in await anext(reply.aiter_text())
        more.set()
        events = said((await http.post(CHAT, json=ASKED, headers=headers)).text)
    deltas = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(deltas) == "one two"
    assert len(counting.turns) == 1


async def test_a_named_turn_that_nobody_asks_for_again_is_cancelled(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_turns, "HELD_S", 0.05)
    hanging = Hanging()
    server = await start_server(hanging)
    async with proxied(server) as http:
        async with http.stream("POST", CHAT, json=ASKED, headers={"Idempotency-Key": "a"}) as reply:
            await anext(reply.aiter_text())
        await hanging.cancelled.wait()
        assert (await http.get("/health")).json()["turns"] == 0


async def test_a_named_turn_is_asked_for_in_the_moment_in_which_it_is_given_up(
    start_server: StartServer,
) -> None:
    hanging = Hanging()
    server = await start_server(hanging)
    link = LinkWatch(asyncio.get_running_loop().time)
    async with asyncio.timeout(DEADLINE_S), Client(server.url, **client_options(link)) as client:
        turns = Turns(client, link, grace_s=1.0)
        body = json.dumps(ASKED).encode()
        first = turns.read(body, "", "mine")
        assert await first.next(DEADLINE_S) == TextDelta("And then")
        await first.close()
        (name, turn), *_ = turns._named.items()
        turns._drop(turn, name)
        again = turns.read(body, "", "mine")
        assert await again.next(DEADLINE_S) == TextDelta("And then")
        assert again.turn_id != first.turn_id
        await again.close()
        await turns.close()


async def test_no_more_named_turns_are_kept_than_allowed(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_turns, "MAX_HELD", 2)
    counting = Counting(saying("yes"))
    server = await start_server(counting)
    async with proxied(server) as http:
        for name in ["a", "b", "c", "c", "b", "a"]:
            await http.post(CHAT, json=ASKED, headers={"Idempotency-Key": name})
    assert len(counting.turns) == 4  # "a" was asked anew


async def test_a_named_turn_that_failed_is_asked_anew(start_server: StartServer) -> None:
    async def handle(turn: Turn) -> None:
        if len(counting.turns) == 1:
            turn.reject(RequestError("overloaded", "Not now.", 0.01))
        elif len(counting.turns) == 2:
            turn.append(Failure("engine_error", "It broke."))
            turn.close("error", model="told", prompt_tokens=0, completion_tokens=0)
        else:
            await saying("yes")(turn)

    counting = Counting(handle)
    server = await start_server(counting)
    async with proxied(server) as http:
        answer = await openai_over(http).chat.completions.create(
            model="any", messages=HELLO, extra_headers={"Idempotency-Key": "a"}
        )
    assert answer.choices[0].message.content == "yes"
    assert len(counting.turns) == 3


@pytest.mark.parametrize(("own", "passed"), [(None, "a key"), ("the proxy's", "the proxy's")])
async def test_a_programs_key_is_passed_on_unless_the_proxy_has_one(
    start_server: StartServer, own: str | None, passed: str
) -> None:
    counting = Counting(saying("yes"))
    server = await start_server(counting)
    async with proxied(server, key=own) as http:
        await openai_over(http).chat.completions.create(model="any", messages=HELLO)
    assert [turn.request.key for turn in counting.turns] == [passed]


@pytest.mark.parametrize("key", ["x" * 300, "\ud800"])
def test_a_transport_takes_no_key_that_is_none(key: str) -> None:
    with pytest.raises(ConfigurationError, match="key"):
        EloquentTransport("eloquent://localhost", key=key)


async def test_a_key_that_is_none_is_refused_here(start_server: StartServer) -> None:
    counting = Counting(saying("never"))
    server = await start_server(counting)
    async with proxied(server) as http:
        reply = await http.post(CHAT, json=ASKED, headers={"Authorization": f"Bearer {'x' * 300}"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (401, "unauthorized")
    assert not counting.turns


async def test_models_are_those_that_have_answered(start_server: StartServer) -> None:
    counting = Counting(saying("yes"))
    server = await start_server(counting)
    async with proxied(server) as http:
        client = openai_over(http)
        assert [model.id async for model in client.models.list()] == ["default"]
        await client.chat.completions.create(model="default", messages=HELLO)
        assert [model.id async for model in client.models.list()] == ["told"]
    assert "model" not in json.loads(counting.turns[0].request.body)


async def test_an_answer_has_the_name_of_the_model_that_gave_it(start_server: StartServer) -> None:
    async def handle(turn: Turn) -> None:
        turn.append(TextDelta("yes"))
        model = json.loads(turn.request.body).get("model", "usual")
        turn.close("stop", model=model, prompt_tokens=1, completion_tokens=1)

    server = await start_server(handle)
    async with proxied(server) as http:
        for asked, told in [
            ({"model": "special"}, "special"),
            ({}, "usual"),
            ({"model": "default"}, "usual"),
            ({"stream": True}, "usual"),
            ({"stream": True, "model": "special"}, "special"),
        ]:
            reply = (await http.post(CHAT, json={"messages": HELLO, **asked})).text
            assert f'"model":"{told}"' in reply


async def test_a_body_goes_to_the_server_as_it_is(start_server: StartServer) -> None:
    counting = Counting(saying("yes"))
    server = await start_server(counting)
    body = b'{"seed": 1e0, "messages":[{"role":"user","content":"\\u00e9"}]}'
    async with proxied(server) as http:
        await http.post(CHAT, content=body)
    assert counting.turns[0].request.body == body


@pytest.mark.parametrize(
    ("line", "body", "status", "code"),
    [
        (f"POST {CHAT}", b"no json", 400, "invalid_request"),
        (f"POST {CHAT}", b"[1]", 400, "invalid_request"),
        (f"POST {CHAT}", b'{"stream": "yes"}', 400, "invalid_request"),
        (f"POST {CHAT}", b"[" * 100_000, 400, "invalid_request"),
        (f"POST {CHAT}", b'"' + b"x" * MAX_REQUEST_BODY_BYTES + b'"', 413, "request_too_large"),
        (f"GET {CHAT}", b"", 405, "method_not_allowed"),
        ("POST /v1/models", b"", 405, "method_not_allowed"),
        ("POST /v1/embeddings", b"{}", 404, "not_found"),
        ("GET /", b"", 404, "not_found"),
    ],
)
async def test_what_cannot_be_answered_is_refused_in_openais_form(
    start_server: StartServer, line: str, body: bytes, status: int, code: str
) -> None:
    counting = Counting(saying("never"))
    server = await start_server(counting)
    method, path = line.split(" ")
    async with proxied(server) as http:
        reply = await http.request(method, path, content=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert not counting.turns


async def test_health_tells_how_the_link_is(start_server: StartServer) -> None:
    server = await start_server(saying("yes"))
    async with proxied(server) as http:
        before = (await http.get("/health")).json()
        await http.post(CHAT, json=ASKED)
        after = (await http.get("/health")).json()
    assert before["link"]["state"] == "idle"
    assert before["link"]["rtt_ms"] is None
    assert after["status"] == "ok"
    assert after["turns"] == 0
    assert after["link"]["state"] == "up"
    assert after["link"]["rtt_ms"] > 0
    assert (after["link"]["loss_recovered"], after["link"]["resumes"]) == (0, 0)


async def test_so_many_turns_run_at_once_and_no_more(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_turns, "MAX_TURNS", 1)
    hanging = Hanging()
    server = await start_server(hanging)
    async with proxied(server) as http:
        async with http.stream("POST", CHAT, json=ASKED):
            reply = await http.post(CHAT, json=ASKED)
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        await hanging.cancelled.wait()


async def test_closing_tells_programs(start_server: StartServer) -> None:
    hanging = Hanging()
    server = await start_server(hanging)
    transport = EloquentTransport(server.url)
    http = httpx2.AsyncClient(transport=transport, base_url="http://proxy")
    async with asyncio.timeout(DEADLINE_S), http.stream("POST", CHAT, json=ASKED) as reply:
        lines = reply.aiter_text()
        await anext(lines)
        closing = asyncio.create_task(transport.aclose())
        events = said("".join([text async for text in lines]))
        await closing
    await hanging.cancelled.wait()
    assert [event["error"]["code"] for event in events] == ["unavailable"]
