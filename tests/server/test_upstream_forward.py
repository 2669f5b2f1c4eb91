"""Requests that are no chats, passed on to engines: whole, to the right one, and given up."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, cast

import httpx2
import pytest
from bad_engine import Asked, BadEngine, Handler, say_hello

from eloquent.errors import RequestError
from eloquent_server.admission import Principal
from eloquent_server.backends.base import Tenant
from eloquent_server.backends.echo import EchoBackend
from eloquent_server.backends.upstream import Patience
from eloquent_server.backends.upstream_forward import UpstreamForward
from eloquent_server.backends.upstreams import UpstreamBackend
from eloquent_server.http.forwarding import Forwarded, PassThrough

DEADLINE_S = 30.0
"Ends a hang; decides nothing."

JSON = [("Content-Type", "application/json")]


@asynccontextmanager
async def behind(*engines: BadEngine, path: str = "", **options: Any) -> AsyncIterator[PassThrough]:
    urls = [each.url + path for each in engines]
    backend = UpstreamBackend(urls, rng=random.Random(1), **options)
    await backend.start()
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield UpstreamForward(lambda: backend, lambda who: Tenant(salt=f"of {who.name}"))
    finally:
        await backend.close()


async def body_of(forwarded: Forwarded) -> bytes:
    return b"".join([piece async for piece in forwarded.body])


def replying(status: int, said: str, **headers: str) -> Handler:
    async def handle(asked: Asked) -> None:
        asked.reply(status, said, **headers)

    return handle


async def test_a_request_and_its_answer_go_through_as_they_are() -> None:
    async with (
        BadEngine(replying(418, "I am", X_Pot="tea")) as engine,
        behind(engine, key="secret") as engines,
    ):
        form = [("Content-Type", "multipart/form-data; boundary=x"), ("X-Y", "z")]
        answer = await engines.forward("PUT", "/v1/a%2Fb?c=%20d&e", form, b"\0!")
        assert (answer.status, await body_of(answer)) == (418, b"I am")
        assert ("x-pot", "tea") in answer.headers
        (asked,) = engine.chats
    assert (asked.method, asked.path, asked.body) == ("PUT", "/v1/a%2Fb?c=%20d&e", b"\0!")
    assert asked.headers["authorization"] == "Bearer secret"
    assert asked.headers["content-type"] == "multipart/form-data; boundary=x"
    assert asked.headers["x-y"] == "z"


async def test_an_engines_own_path_takes_the_place_of_ours() -> None:
    async with BadEngine(replying(200, "")) as engine, behind(engine, path="/x/openai") as engines:
        await body_of(await engines.forward("GET", "/v1/files", [], b""))
        assert engine.chats[-1].path == "/x/openai/files"


async def test_a_stream_comes_as_it_is_made_and_ends_when_nobody_wants_it() -> None:
    async def half(asked: Asked) -> None:
        asked.begin()
        asked.piece(b"one")
        await asked.is_gone.wait()

    async with BadEngine(half) as engine, behind(engine) as engines:
        answer = await engines.forward("POST", "/v1/responses", JSON, b"{}")
        async with aclosing(cast(Any, answer.body)) as pieces:
            assert await anext(pieces) == b"one"
        await engine.chats[0].is_gone.wait()


async def test_an_engine_that_falls_silent() -> None:
    async def half(asked: Asked) -> None:
        asked.begin()
        asked.piece(b"one")
        await asked.is_gone.wait()

    async with (
        BadEngine(half) as engine,
        behind(engine, patience=Patience(idle_s=0.05)) as engines,
    ):
        answer = await engines.forward("POST", "/v1/responses", JSON, b"{}")
        with pytest.raises(RequestError, match="without a word") as raised:
            await body_of(answer)
    assert raised.value.code == "upstream_timeout"


async def test_the_engine_is_one_that_has_the_model() -> None:
    async with BadEngine(say_hello, "a") as first, BadEngine(say_hello, "b") as second:
        async with behind(first, second) as engines:
            for model in ("b", "b", "a"):
                said = json.dumps({"model": model, "input": "hi"}).encode()
                await body_of(await engines.forward("POST", "/v1/embeddings", JSON, said))
        assert (len(first.chats), len(second.chats)) == (1, 2)


async def test_a_forms_model_counts_too() -> None:
    """As of what is to be transcribed."""
    async with BadEngine(say_hello, "a") as first, BadEngine(say_hello, "b") as second:
        async with behind(first, second) as engines:
            for model in ("b", "b", "a"):
                fields = {"language": "en", "model": model}
                form = httpx2.Request("POST", "http://x", data=fields, files={"file": b"\0model"})
                headers = [("Content-Type", form.headers["content-type"])]
                target = "/v1/audio/transcriptions"
                await body_of(await engines.forward("POST", target, headers, form.read()))
        assert (len(first.chats), len(second.chats)) == (1, 2)


async def test_a_salt_of_the_clients_is_dropped() -> None:
    async with BadEngine(replying(200, "")) as engine, behind(engine) as engines:
        said = b'{"cache_salt":"mine","prompt":"hi","top_p":0.10}'
        await body_of(await engines.forward("POST", "/v1/completions", JSON, said))
        assert engine.chats[0].body == b'{"prompt":"hi","top_p":0.10}'


async def test_each_tenant_has_a_salt_of_its_own() -> None:
    async with BadEngine(replying(200, "")) as engine, behind(engine, salt=True) as engines:
        for body in (b'{"prompt":"hi"}', b'{"cache_salt":"of b"}', b""):
            await body_of(
                await engines.forward("POST", "/v1/completions", JSON, body, Principal("a"))
            )
        assert [asked.body for asked in engine.chats] == [
            b'{"prompt":"hi","cache_salt":"of a"}',
            b'{"cache_salt":"of a"}',
            b"",
        ]


@pytest.mark.parametrize(
    "said",
    [
        b'{"cache_salt":"mine","top_p":NaN}',
        b'{"cache_salt":"mine","stop":"\\ud800"}',
        b'\xef\xbb\xbf{"cache_salt":"mine"}',
        '{"cache_salt":"mine"}'.encode("utf-16"),
        b'[{"cache_salt":"mine"}]',
    ],
    ids=["nan", "surrogate", "mark", "utf-16", "list"],
)
async def test_what_only_an_engine_would_read_a_salt_from_does_not_go_on(said: bytes) -> None:
    """Python's `json`, with which engines read, takes more than JSON."""
    async with BadEngine(replying(200, "")) as engine, behind(engine) as engines:
        with pytest.raises(RequestError, match="no JSON object") as raised:
            await body_of(await engines.forward("POST", "/v1/completions", JSON, said))
        assert not engine.chats
    assert raised.value.code == "invalid_request"


async def test_a_salt_is_dropped_beside_a_model_that_is_none() -> None:
    async with BadEngine(replying(200, "")) as engine, behind(engine) as engines:
        said = b'{"model":5,"cache_salt":"mine"}'
        await body_of(await engines.forward("POST", "/v1/completions", JSON, said))
        assert engine.chats[0].body == b'{"model":5}'


async def test_headers_are_bytes_both_ways() -> None:
    async def named(asked: Asked) -> None:
        head = "HTTP/1.1 200 x\r\nContent-Length: 0\r\nX-Name: \u6a21\r\n\r\n"
        asked.out.write(head.encode())

    async with BadEngine(named) as engine, behind(engine) as engines:
        headers = [("User-Agent", "caf\xc3\xa9")]
        answer = await engines.forward("GET", "/v1/files", headers, b"")
        assert await body_of(answer) == b""
        assert ("x-name", "\u6a21".encode().decode("latin-1")) in answer.headers
        assert engine.chats[0].headers["user-agent"] == "caf\xe9"


@pytest.mark.parametrize("target", ["/v1/files#a", "/v1/files?a#b"])
async def test_a_target_that_is_none_is_refused(target: str) -> None:
    async with BadEngine() as engine, behind(engine) as engines:
        with pytest.raises(RequestError, match="%23") as raised:
            await engines.forward("GET", target, [], b"")
    assert raised.value.code == "invalid_request"


@pytest.mark.parametrize("status", [401, 403])
async def test_what_an_engine_says_of_the_servers_key_stays_here(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    said = '{"error":{"message":"Incorrect API key provided: sk-abc***z"}}'
    async with BadEngine(replying(status, said)) as engine, behind(engine) as engines:
        with pytest.raises(RequestError) as raised:
            await engines.forward("POST", "/v1/embeddings", JSON, b"{}")
    assert raised.value.code == "upstream_error"
    assert "sk-abc" not in raised.value.message
    assert f"upstream_error (HTTP {status})" in caplog.text


async def test_cookies_are_not_kept() -> None:
    """A load balancer's would send all requests of all readers to one engine."""
    async with (
        BadEngine(replying(200, "", Set_Cookie="engine=1")) as engine,
        behind(engine) as engines,
    ):
        for _ in range(2):
            await body_of(await engines.forward("GET", "/v1/files", [], b""))
        assert not any("cookie" in asked.headers for asked in engine.chats)


async def test_a_request_that_was_taken_goes_to_no_other_engine() -> None:
    async def breaking(asked: Asked) -> None:
        asked.hang_up()

    first, second = BadEngine(breaking), BadEngine(breaking)
    async with first, second, behind(first, second) as engines:
        with pytest.raises(RequestError) as raised:
            await engines.forward("POST", "/v1/batches", JSON, b"{}")
        assert not first.chats or not second.chats
    assert raised.value.code == "upstream_error"


async def test_another_engine_is_asked_where_one_cannot_be_reached() -> None:
    gone, there = BadEngine(), BadEngine(replying(200, "here"))
    async with gone, there, behind(gone, there) as engines:
        await gone.__aexit__()
        answer = await engines.forward("POST", "/v1/batches", JSON, b"{}")
        assert await body_of(answer) == b"here"


@pytest.mark.parametrize("backend", [None, EchoBackend()])
async def test_before_the_engines_are_known_nothing_is_passed_on(backend: Any) -> None:
    with pytest.raises(RequestError) as raised:
        await UpstreamForward(lambda: backend, lambda who: Tenant()).forward(
            "GET", "/v1/files", [], b""
        )
    assert raised.value.code == "unavailable"
