"""Engines that misbehave, one and several: what the client is told, and who answers instead."""

import asyncio
import json
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any, cast

import httpx2
import pytest
from bad_engine import Asked, BadEngine, Handler, say_hello

from eloquent.core.events import Failure, TextDelta
from eloquent.errors import ConfigurationError, RequestError
from eloquent_netem.vloop import VirtualNetwork, run
from eloquent_server.backends import upstream as one
from eloquent_server.backends import upstreams as several
from eloquent_server.backends.base import (
    ANYBODY,
    Asker,
    BackendEvent,
    Continuation,
    Finish,
    StoredAnswer,
    Tenant,
)
from eloquent_server.backends.upstream import Patience, Upstream, open_client
from eloquent_server.backends.upstreams import MAX_TRIES, UpstreamBackend
from eloquent_server.options import ServerOptions
from eloquent_server.starting import start_backend

DEADLINE_S = 30.0
"Ends a hang; decides nothing."

UNUSED = cast(httpx2.AsyncClient, None)
HELLO = [TextDelta("Hel"), TextDelta("lo"), Finish("stop", 0, 2)]


def body(content: str = "hi", **fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content}], **fields}).encode()


@asynccontextmanager
async def backend(*urls: str | BadEngine, **options: Any) -> AsyncIterator[UpstreamBackend]:
    names = [each if isinstance(each, str) else each.url for each in urls]
    made = UpstreamBackend(names, rng=random.Random(1), **options)
    await made.start()
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield made
    finally:
        await made.close()


async def all_of(events: AsyncGenerator[BackendEvent]) -> list[BackendEvent]:
    return [event async for event in events if not isinstance(event, Continuation)]


async def declined(events: AsyncGenerator[BackendEvent]) -> RequestError:
    with pytest.raises(RequestError) as raised:
        await all_of(events)
    return raised.value


def replying(status: int, said: str = "", **headers: str) -> Handler:
    async def handle(asked: Asked) -> None:
        asked.reply(status, said, **headers)

    return handle


async def half(asked: Asked) -> None:
    """Begin an answer and say no more."""
    asked.begin()
    asked.say("Hel")
    await asked.is_gone.wait()


async def silent(asked: Asked) -> None:
    await asked.is_gone.wait()


async def hang_up(asked: Asked) -> None:
    asked.hang_up()


async def free_port() -> int:
    async with BadEngine() as engine:
        return engine.port


async def test_an_answer_and_its_request() -> None:
    async with BadEngine(say_hello, "m", "n") as engine, backend(engine) as engines:
        assert engines.models == ("m", "n")
        events = await all_of(engines.generate(body(temperature=0)))
        (asked,) = engine.chats
    assert events == [*HELLO[:2], Finish("stop", 0, 2, model="m")]
    assert asked.path == "/v1/chat/completions"
    assert asked.json["model"] == "m"
    assert "authorization" not in asked.headers
    assert "cache_salt" not in asked.json


async def test_the_salt_is_sent_where_the_engine_takes_it() -> None:
    asker = Asker(Tenant("t", salt="salty"))
    async with BadEngine() as engine, backend(engine, salt=True) as engines:
        await all_of(engines.generate(body(cache_salt="mine"), asker))
        await all_of(engines.generate(body(cache_salt="mine"), ANYBODY))
        assert [asked.json.get("cache_salt") for asked in engine.chats] == ["salty", None]
    async with BadEngine() as engine, backend(engine) as engines:
        await all_of(engines.generate(body(), asker))
        assert "cache_salt" not in engine.chats[0].json


async def test_the_key_goes_to_the_engine_and_into_no_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    said = '{"error":{"message":"Incorrect API key provided: sk-very-secret"}}'
    async with BadEngine(replying(401, said)) as engine:
        async with backend(engine, key="sk-very-secret") as engines:
            error = await declined(engines.generate(body()))
        assert engine.chats[0].headers["authorization"] == "Bearer sk-very-secret"
        assert {asked.headers["authorization"] for asked in engine.others} == {
            "Bearer sk-very-secret"
        }
    assert error.code == "upstream_error"
    assert "HTTP 401" in error.message
    assert "HTTP 401" in caplog.text
    assert "very-secret" not in caplog.text + error.message


async def test_cancel_closes_the_connection() -> None:
    async with BadEngine(half) as engine, backend(engine) as engines:
        async with aclosing(engines.generate(body())) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    break
            assert not engine.chats[0].is_gone.is_set()
        await engine.chats[0].is_gone.wait()


@pytest.mark.parametrize("handler", [silent, half])
async def test_a_cancelled_task_closes_the_connection(handler: Handler) -> None:
    async with BadEngine(handler) as engine, backend(engine) as engines:
        task = asyncio.ensure_future(all_of(engines.generate(body())))
        await engine.was_asked.wait()
        task.cancel()
        await engine.chats[0].is_gone.wait()
        await asyncio.wait((task,))
        assert task.cancelled()


async def test_two_turns_take_one_connection() -> None:
    async with BadEngine() as engine, backend(engine) as engines:
        before = engine.connections
        assert before == 1
        for _ in range(3):
            assert await all_of(engines.generate(body())) == HELLO
        assert engine.connections == before


async def test_a_connection_that_the_engine_no_longer_wants_is_made_anew() -> None:
    async def once(asked: Asked) -> None:
        await (say_hello(asked) if asked.number == 1 else hang_up(asked))

    engine = BadEngine(once)
    engine.models = (500, "")
    async with engine, backend(engine) as engines:
        for _ in range(3):
            assert await all_of(engines.generate(body())) == HELLO
    assert [asked.number for asked in engine.chats] == [3, 1, 2, 1, 2, 1]


async def test_an_engine_that_takes_no_request_is_not_asked_for_ever() -> None:
    async with BadEngine(hang_up) as engine, backend(engine) as engines:
        error = await declined(engines.generate(body()))
        assert [asked.number for asked in engine.chats] == [3, 1]
    assert error.code == "upstream_error"


async def test_an_engine_that_never_begins() -> None:
    async with (
        BadEngine(silent) as engine,
        backend(engine, patience=Patience(first_byte_s=0.05)) as engines,
    ):
        error = await declined(engines.generate(body()))
        await engine.chats[0].is_gone.wait()
    assert error.code == "upstream_timeout"
    assert "0.05 s without a word" in error.message


async def test_an_engine_that_falls_silent() -> None:
    async with (
        BadEngine(half) as engine,
        backend(engine, patience=Patience(idle_s=0.05)) as engines,
    ):
        text, failure = await all_of(engines.generate(body()))
        await engine.chats[0].is_gone.wait()
    assert text == TextDelta("Hel")
    assert isinstance(failure, Failure)
    assert failure.code == "upstream_timeout"


async def test_who_begins_without_a_word_may_think_before_the_first() -> None:
    """Azure tells of its filters at once, and then its model reasons for minutes."""

    async def thoughtful(asked: Asked) -> None:
        asked.begin()
        asked.piece(b'data: {"choices":[],"prompt_filter_results":[{"prompt_index":0}]}\n\n')
        asked.piece(b'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n')
        await asyncio.sleep(0.3)
        asked.say("Hel")
        asked.say("lo")
        asked.finish()
        asked.end()

    async with (
        BadEngine(thoughtful) as engine,
        backend(engine, patience=Patience(idle_s=0.05)) as engines,
    ):
        assert await all_of(engines.generate(body())) == HELLO


async def test_comments_are_no_events() -> None:
    async def slow(asked: Asked) -> None:
        asked.begin()
        asked.say("Hel")
        asked.piece(b": PROCESSING\n\n")
        asked.say("lo")
        asked.finish()
        asked.end()

    async with BadEngine(slow) as engine, backend(engine) as engines:
        assert await all_of(engines.generate(body())) == HELLO


@pytest.mark.parametrize(("gap_s", "comes"), [(59.0, True), (61.0, False)])
def test_any_byte_shows_that_an_engine_lives(gap_s: float, comes: bool) -> None:
    async def comments() -> AsyncGenerator[bytes]:
        for _ in range(20):
            yield b":"
            await asyncio.sleep(gap_s)

    async def read() -> bytes:
        upstream = Upstream("http://h", UNUSED, Patience(first_byte_s=600, idle_s=60))
        return b"".join([piece async for piece in upstream.paced(comments())])

    if comes:
        assert run(read(), VirtualNetwork()) == b":" * 20
    else:
        with pytest.raises(RequestError, match="60 s without a word"):
            run(read(), VirtualNetwork())


async def test_an_end_without_its_mark_and_without_the_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(one, "USAGE_S", 0.05)

    async def lingering(asked: Asked) -> None:
        asked.begin()
        asked.say("Hel")
        asked.say("lo")
        asked.finish()
        await asked.is_gone.wait()

    async with BadEngine(lingering) as engine, backend(engine) as engines:
        assert await all_of(engines.generate(body())) == HELLO


async def test_a_connection_that_breaks_in_mid_answer() -> None:
    async def breaking(asked: Asked) -> None:
        asked.begin()
        asked.say("Hel")
        await asked.out.drain()
        asked.hang_up()

    async with BadEngine(breaking) as engine, BadEngine(breaking) as other:
        async with backend(engine, other) as engines:
            text, failure = await all_of(engines.generate(body()))
        assert len(engine.chats) + len(other.chats) == 1
    assert text == TextDelta("Hel")
    assert isinstance(failure, Failure)
    assert failure.code == "upstream_error"


async def test_another_engine_goes_on_where_one_broke() -> None:
    async def turn(asked: Asked) -> None:
        asked.begin()
        if asked.json["messages"][-1]["role"] == "user":
            asked.say("Hel")
            await asked.out.drain()
            asked.hang_up()
        else:
            asked.say("lo")
            asked.finish()
            asked.end()

    first, second = BadEngine(turn), BadEngine(turn)
    async with first, second, backend(first, second, continues="vllm") as engines:
        assert await all_of(engines.generate(body(max_tokens=5))) == HELLO
    began, went_on = (first, second) if first.chats[0].json["max_tokens"] == 5 else (second, first)
    assert len(began.chats) == len(went_on.chats) == 1
    asked = went_on.chats[0].json
    assert asked["messages"][-1] == {"role": "assistant", "content": "Hel"}
    assert (asked["max_tokens"], asked["continue_final_message"]) == (4, True)


async def test_an_answer_that_breaks_everywhere_fails_with_what_there_is() -> None:
    async def breaking(asked: Asked) -> None:
        asked.begin()
        asked.say("Hel")
        await asked.out.drain()
        asked.hang_up()

    async def refusing(asked: Asked) -> None:
        await (breaking(asked) if asked.json["messages"][-1]["role"] == "user" else refuse(asked))

    refuse = replying(400, "{}")
    for handler in (breaking, refusing):
        first, second = BadEngine(handler), BadEngine(handler)
        async with first, second, backend(first, second, continues="llama") as engines:
            *texts, failure = await all_of(engines.generate(body()))
        assert isinstance(failure, Failure)
        assert failure.code == "upstream_error"
        assert texts == [TextDelta("Hel")] * (2 if handler is breaking else 1)
        assert len(first.chats) == len(second.chats) == 1


async def test_an_error_in_mid_stream() -> None:
    async def failing(asked: Asked) -> None:
        asked.begin()
        asked.say("Hel")
        asked.piece(b'data: {"error":{"message":"out of blocks","code":400}}\n\n')
        asked.end()

    async with BadEngine(failing) as engine, backend(engine) as engines:
        text, failure = await all_of(engines.generate(body()))
    assert text == TextDelta("Hel")
    assert isinstance(failure, Failure)
    assert failure.code == "upstream_error"
    assert "out of blocks" in failure.message


async def test_an_error_at_the_streams_beginning_is_one_of_the_request() -> None:
    async def failing(asked: Asked) -> None:
        asked.begin()
        asked.piece(b'data: {"error":{"message":"bad role","code":400}}\n\n')

    async with BadEngine(failing) as engine, backend(engine) as engines:
        error = await declined(engines.generate(body()))
    assert error.code == "invalid_request"
    assert "bad role" in error.message


async def test_an_engine_that_cannot_stream() -> None:
    whole = replying(200, '{"choices":[]}', Content_Type="application/json")
    async with BadEngine(whole) as engine, backend(engine) as engines:
        error = await declined(engines.generate(body()))
    assert error.code == "upstream_error"
    assert "application/json" in error.message


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ('{"error":{"message":"too long: context length","code":400}}', "prompt_too_long"),
        ('{"object":"error","message":"too long","code":422}', "invalid_request"),
        ('{"error":"too long"}', "upstream_error"),
    ],
)
async def test_an_error_that_calls_itself_good(said: str, code: str) -> None:
    good = replying(200, said, Content_Type="application/json")
    async with BadEngine(good) as engine, backend(engine) as engines:
        error = await declined(engines.generate(body()))
    assert error.code == code
    assert "too long" in error.message


async def test_an_error_that_calls_itself_a_stream() -> None:
    sick = replying(500, '{"error":"out of memory"}', Content_Type="text/event-stream")
    async with BadEngine(sick) as engine, backend(engine) as engines:
        error = await declined(engines.generate(body()))
    assert error.code == "upstream_error"
    assert "out of memory" in error.message


@pytest.mark.parametrize(
    ("last", "code"), [(b"data: [DONE]\n\n", "upstream_error"), (b"data:\n\n", "upstream_timeout")]
)
async def test_an_end_mark_without_an_answers_end_is_not_waited_for(
    last: bytes, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And an event without data says nothing."""

    async def open_end(asked: Asked) -> None:
        asked.begin()
        asked.say("Hel")
        asked.piece(last)
        await asked.is_gone.wait()

    async with (
        BadEngine(open_end) as engine,
        backend(engine, patience=Patience(idle_s=0.3)) as engines,
    ):
        events = await all_of(engines.generate(body()))
    assert isinstance(events[-1], Failure)
    assert events[-1].code == code
    assert code in caplog.text
    assert "()" not in caplog.text  # Why is there, too.


async def test_its_wish_to_be_left_alone_is_passed_on() -> None:
    async with (
        BadEngine(replying(429, "{}", Retry_After="7")) as engine,
        backend(engine) as engines,
    ):
        error = await declined(engines.generate(body()))
    assert (error.code, error.retry_after_s) == ("rate_limited", 7)


async def test_nobody_is_there() -> None:
    async with backend(f"http://127.0.0.1:{await free_port()}") as engines:
        assert engines.models == ()
        error = await declined(engines.generate(body()))
    assert error.code == "upstream_error"
    assert "cannot be reached" in error.message


async def test_another_engine_answers_for_one_that_is_gone() -> None:
    async with BadEngine() as engine, BadEngine() as leaving, backend(engine, leaving) as engines:
        await leaving.__aexit__()
        for n in range(8):
            assert await all_of(engines.generate(body(str(n)))) == HELLO
        assert len(engine.chats) == 8


@pytest.mark.parametrize("status", [401, 429, 500, 503])
async def test_another_engine_answers_for_one_that_cannot(status: int) -> None:
    async with BadEngine(replying(status, "{}")) as bad, BadEngine() as engine:
        async with backend(bad, engine) as engines:
            for n in range(8):
                assert await all_of(engines.generate(body(str(n)))) == HELLO
        assert bad.chats


async def test_a_bad_request_is_tried_once() -> None:
    async with BadEngine(replying(400, "{}")) as first, BadEngine(replying(400, "{}")) as second:
        async with backend(first, second) as engines:
            error = await declined(engines.generate(body()))
        assert len(first.chats) + len(second.chats) == 1
    assert error.code == "invalid_request"


async def test_a_request_that_fails_everywhere_is_not_tried_everywhere() -> None:
    many = [BadEngine(replying(500, "{}")) for _ in range(MAX_TRIES + 2)]
    async with asyncio.TaskGroup() as starting:
        for each in many:
            starting.create_task(each.__aenter__())
    async with backend(*many) as engines:
        error = await declined(engines.generate(body()))
    assert error.code == "upstream_error"
    assert sum(len(each.chats) for each in many) == MAX_TRIES
    for each in many:
        await each.__aexit__()


async def test_models_are_those_of_all_and_each_is_asked_for_its_own() -> None:
    async with BadEngine(say_hello, "a", "b") as first, BadEngine(say_hello, "b", "c") as second:
        async with backend(first, second, model="c") as engines:
            assert engines.models == ("c", "a", "b")
            for model in ("a", "a", "c"):
                await all_of(engines.generate(body(model=model)))
            await all_of(engines.generate(body()))
        assert [asked.json["model"] for asked in first.chats] == ["a", "a"]
        assert [asked.json["model"] for asked in second.chats] == ["c", "c"]


async def has_only(model: str, asked: Asked) -> None:
    if asked.json["model"] == model:
        await say_hello(asked)
    else:
        asked.reply(404, '{"error":{"message":"no such","code":"model_not_found"}}')


@pytest.mark.parametrize("name", ["m", "n"])
async def test_a_model_that_none_lists_is_asked_for_of_all(name: str) -> None:
    """Ollama takes `m` for `m:latest`, Gemini for `models/m`, and Azure does not list its own."""
    first, second = (
        BadEngine(partial(has_only, "m"), "m:latest"),
        BadEngine(partial(has_only, "n"), "models/n"),
    )
    stored = StoredAnswer((TextDelta("He"),), (name.encode(),))
    async with first, second, backend(first, second, continues="llama") as engines:
        *texts, finish = await all_of(engines.generate(body(model=name)))
        assert texts == HELLO[:2]
        assert isinstance(finish, Finish)
        assert await all_of(engines.resume(body(model=name), stored))
        error = await declined(engines.generate(body(model="o")))
    assert error.code == "unknown_model"
    assert "no such" in error.message


@pytest.mark.parametrize("said", [(500, ""), (404, ""), (200, "<html>"), (200, "{}")])
async def test_an_engine_that_does_not_say_its_models_is_given_any(said: tuple[int, str]) -> None:
    engine = BadEngine()
    engine.models = said
    async with engine, backend(engine) as engines:
        assert engines.models == ()
        assert await all_of(engines.generate(body())) == HELLO
        await all_of(engines.generate(body(model="x")))
        assert [asked.json.get("model") for asked in engine.chats] == [None, "x"]


async def test_a_sick_engine_is_left_alone_until_it_is_well() -> None:
    async with BadEngine() as engine, open_client() as client:
        upstream = Upstream(engine.url, client, Patience())
        seen = []
        for health in (503, 200, 503, 503, 503, 200, 503):
            engine.health = health
            await upstream.probe()
            seen.append(upstream.is_up)
    assert seen == [False, True, True, False, False, True, True]


async def test_an_engine_without_health_is_asked_for_its_models() -> None:
    engine = BadEngine(say_hello, "m")
    engine.health = 404
    async with engine, open_client() as client:
        upstream = Upstream(engine.url, client, Patience())
        await upstream.probe()
        assert upstream.models == ("m",)
        engine.models = (500, "")
        for _ in range(one.FAILED_PROBES):
            await upstream.probe()
        assert not upstream.is_up


async def test_an_engine_without_health_need_not_list_its_models_each_time() -> None:
    """A hosted one's list may have half a megabyte."""
    engine = BadEngine(say_hello, "m")
    engine.health = 404
    async with engine, open_client() as client:
        upstream = Upstream(engine.url, client, Patience())
        for _ in range(one.MODELS_EVERY):
            await upstream.probe()
            assert upstream.is_up
        asked = [each.method for each in engine.others if each.path == "/v1/models"]
    assert asked.count("GET") == 1


async def test_models_are_kept_where_an_engine_does_not_say_them_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(one, "MODELS_EVERY", 1)
    async with BadEngine(say_hello, "m") as engine, open_client() as client:
        upstream = Upstream(engine.url, client, Patience())
        await upstream.probe()
        engine.models = (429, '{"error":{"message":"too many requests"}}')
        await upstream.probe()
        assert upstream.models == ("m",)


async def test_the_log_has_why_an_engine_is_down(caplog: pytest.LogCaptureFixture) -> None:
    async with open_client() as client:
        upstream = Upstream(f"http://127.0.0.1:{await free_port()}", client, Patience())
        await upstream.probe()
    assert "is down: it does not answer (ConnectError(" in caplog.text


async def test_an_engine_that_comes_late_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several, "PROBE_EVERY_S", 0.02)
    stored = StoredAnswer((TextDelta("Hel"),), (b"m",))
    port = await free_port()
    async with backend(f"http://127.0.0.1:{port}", continues="llama") as engines:
        await declined(engines.generate(body()))
        resumed = asyncio.ensure_future(all_of(engines.resume(body(), stored)))
        await asyncio.sleep(0)

        async def go_on(asked: Asked) -> None:
            asked.begin()
            asked.say("lo")
            asked.finish()
            asked.end()

        async with BadEngine(go_on, "m", port=port) as engine:
            assert await resumed == [TextDelta("lo"), Finish("stop", 0, 2, model="m")]
            assert engine.chats[0].json["messages"][-1] == {"role": "assistant", "content": "Hel"}


async def test_an_answer_is_not_continued_unless_the_engine_is_known_to() -> None:
    stored = StoredAnswer((TextDelta("Hel"),), (b"m",))
    async with BadEngine(say_hello, "m") as engine, backend(engine) as engines:
        error = await declined(engines.resume(body(), stored))
        assert not engine.chats
    assert error.code == "interrupted"


async def test_an_answer_at_its_limit_needs_no_engine() -> None:
    stored = StoredAnswer((TextDelta("Hel"), TextDelta("lo")), (b"m",))
    async with BadEngine(say_hello, "m") as engine, backend(engine, continues="vllm") as engines:
        events = await all_of(engines.resume(body(max_tokens=2), stored))
        assert not engine.chats
    assert events == [Finish("length", 0, 2, model="m")]


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:8000", "http://h:8000/v1"),
        ("http://h:8000/", "http://h:8000/v1"),
        ("https://h/v1", "https://h/v1"),
        ("https://h/v1beta/openai/", "https://h/v1beta/openai"),
    ],
)
async def test_urls_are_as_openais_clients_take_them(url: str, base: str) -> None:
    async with open_client() as client:
        assert Upstream(url, client, Patience()).name == base


@pytest.mark.parametrize(
    "url", ["", "h:8000", "ftp://h", "http://", "http://h?x=1", "http://user:pass@h", "http://h:x"]
)
async def test_other_urls_are_refused(url: str) -> None:
    async with open_client() as client:
        with pytest.raises(ConfigurationError):
            Upstream(url, client, Patience())


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_an_engine_must_be_given_time(seconds: float) -> None:
    with pytest.raises(ConfigurationError, match="no time"):
        Patience(idle_s=seconds)


@pytest.mark.parametrize("key", ["sk-\u00e9", "sk-a\nb"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigurationError, match="--upstream-key-env") as raised:
        open_client(key)
    assert "sk-" not in str(raised.value)


@pytest.mark.parametrize("proxy", ["bogus://x", "http://x:port"])
def test_a_proxy_of_the_environments_that_is_none_is_said_so(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(ConfigurationError, match="HTTP_PROXY"):
        open_client()


async def test_the_server_takes_the_key_from_its_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with BadEngine(say_hello, "m") as engine:
        options = ServerOptions(upstream=(engine.url,), upstream_key_env="ENGINE_KEY")
        with pytest.raises(ConfigurationError, match="ENGINE_KEY"):
            await start_backend(options)
        monkeypatch.setenv("ENGINE_KEY", " secret\n")
        started = await start_backend(options)
        await started.close()
        assert engine.others[-1].headers["authorization"] == "Bearer secret"
    assert isinstance(started, UpstreamBackend)
