"""The proxy's programs while the link is gone, in virtual time."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import httpx2
import openai
import pytest
from rungs import URL, Drops, nothing, now, serving, udp_between, virtually
from telling import Telling

from eloquent_client import Client
from eloquent_client.httpx_transport import EloquentTransport
from eloquent_client.proxy.app import ProxyApp
from eloquent_client.proxy.handler import Handler, client_options
from eloquent_client.proxy.link import LinkWatch
from eloquent_netem.vloop import VirtualNetwork
from tests.client.test_proxy import ASKED, CHAT, HELLO, said

TOKENS = [f"word{number} " for number in range(600)]
GAP_S = 0.02
ANSWER_S = len(TOKENS) * GAP_S
FROM_S, TO_S = 3.0, 8.0
OUTAGE = udp_between(FROM_S, TO_S)
GRACE_S = 20.0
COMMENT = re.compile(r"^: link (\w+) at token (\d+)$", re.MULTILINE)


@asynccontextmanager
async def proxied(made: VirtualNetwork, telling: Telling) -> AsyncIterator[httpx2.AsyncClient]:
    transport = EloquentTransport(URL, grace_s=GRACE_S)
    async with (
        serving(made, telling, has_websocket=False),
        httpx2.AsyncClient(transport=transport, base_url="http://proxy", timeout=None) as http,
    ):
        yield http


def deltas(events: list[dict[str, object]]) -> str:
    choices = [choice for event in events for choice in event.get("choices", ())]  # type: ignore[attr-defined]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def streamed(drops: Drops, asked_at_s: float = 0.0) -> tuple[httpx2.Response, Telling, float]:
    """Return what a program was told, the server's application, and when it was over."""

    async def main(made: VirtualNetwork) -> tuple[httpx2.Response, Telling, float]:
        telling = Telling(TOKENS, GAP_S)
        async with proxied(made, telling) as http:
            if asked_at_s:
                # The connection is there before the outage.
                async with http.stream("POST", CHAT, json=ASKED):
                    await asyncio.sleep(asked_at_s - now())
                telling.logs.clear()
            reply = await http.post(CHAT, json=ASKED)
            return reply, telling, now()

    return virtually(main, drops)


def test_an_outage_in_mid_answer_is_invisible_but_for_comments() -> None:
    reply, telling, over_s = streamed(OUTAGE)
    events = said(reply.text)
    assert deltas(events[:-1]) == "".join(TOKENS)
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert len(telling.logs) == 1
    assert over_s < ANSWER_S + 2
    comments = COMMENT.findall(reply.text)
    assert len(comments) >= 1
    assert {state for state, _ in comments} == {"silent"}
    assert all(100 < int(token) < 160 for _, token in comments)


def test_openais_library_passes_over_the_comments() -> None:
    async def main(made: VirtualNetwork) -> str:
        async with proxied(made, Telling(TOKENS, GAP_S)) as http:
            client = openai.AsyncOpenAI(
                api_key="any", base_url="http://proxy/v1", http_client=http, max_retries=0
            )
            stream = await client.chat.completions.create(
                model="any", messages=HELLO, stream=True, timeout=None
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert virtually(main, OUTAGE) == "".join(TOKENS)


def test_an_outage_longer_than_the_grace_time_is_an_error_event_and_no_end() -> None:
    reply, telling, over_s = streamed(udp_between(FROM_S, 1e9))
    assert reply.status_code == 200
    events = said(reply.text)
    assert events[-1]["error"]["code"] == "link_lost"
    told = deltas(events[:-1])
    assert told
    assert "".join(TOKENS).startswith(told)
    assert FROM_S + GRACE_S < over_s < FROM_S + GRACE_S + 6
    states = [state for state, _ in COMMENT.findall(reply.text)]
    assert states[0] == "silent"
    assert len(states) >= GRACE_S / 5
    assert len(telling.logs) == 1


def test_no_turn_stays_when_programs_were_told_of_an_outage() -> None:
    """As uvicorn does it: `receive` says that the program is gone once it has the whole answer."""
    asked = asyncio.Queue[dict[str, Any]]()
    asked.put_nowait({"type": "http.request", "body": json.dumps(ASKED).encode()})

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body" and not message["more_body"]:
            asked.put_nowait({"type": "http.disconnect"})

    async def main(made: VirtualNetwork) -> tuple[int, int]:
        telling = Telling(TOKENS * 10, GAP_S)
        link = LinkWatch(now)
        async with (
            serving(made, telling, has_websocket=False),
            Client(URL, **client_options(link)) as client,
        ):
            handler = Handler(client, link, grace_s=GRACE_S)
            scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
            await ProxyApp(handler, is_local=False)(scope, asked.get, send)
            await asyncio.sleep(60 - now())
            health = await handler.handle("GET", "/health", {}, b"")
            return json.loads(await anext(health.body))["turns"], len(telling.cancelled)

    assert virtually(main, udp_between(FROM_S, FROM_S + GRACE_S + 10)) == (0, 1)


def test_a_program_is_told_something_every_five_seconds_at_least() -> None:
    async def main(made: VirtualNetwork) -> list[float]:
        times: list[float] = []
        async with (
            proxied(made, Telling(TOKENS, GAP_S)) as http,
            http.stream("POST", CHAT, json=ASKED) as reply,
        ):
            times += [now() async for _ in reply.aiter_raw()]
        return times

    times = virtually(main, udp_between(FROM_S, FROM_S + 17))
    gaps = [after - before for before, after in pairwise(times)]
    assert max(gaps) <= 5
    assert times[-1] > FROM_S + 17


def test_a_request_in_an_outage_waits_for_its_end() -> None:
    reply, telling, over_s = streamed(OUTAGE, asked_at_s=5.0)
    events = said(reply.text)
    assert deltas(events[:-1]) == "".join(TOKENS)
    assert events[-1] == "[DONE]"
    assert len(telling.logs) == 1
    assert TO_S + ANSWER_S < over_s < TO_S + ANSWER_S + 3


@pytest.mark.parametrize("until_s", [FROM_S + GRACE_S + 10, FROM_S + 400])
def test_a_named_turn_is_one_however_often_its_program_is_told_of_an_outage(until_s: float) -> None:
    async def main(made: VirtualNetwork) -> tuple[list[httpx2.Response], Telling]:
        telling, replies = Telling(TOKENS, GAP_S), []
        async with proxied(made, telling) as http:
            while not replies or "[DONE]" not in replies[-1].text:
                replies.append(
                    await http.post(CHAT, json=ASKED, headers={"Idempotency-Key": "mine"})
                )
        return replies, telling

    replies, telling = virtually(main, udp_between(FROM_S, until_s))
    assert deltas(said(replies[-1].text)[:-1]) == "".join(TOKENS)
    assert len(telling.logs) == 1
    assert len(replies) >= (until_s - FROM_S) / (GRACE_S + 6)


def test_of_a_named_turn_that_fails_again_and_again_only_the_last_is_kept() -> None:
    async def main(made: VirtualNetwork) -> list[int]:
        turns = []
        with made.on("client"):
            http = httpx2.AsyncClient(transport=EloquentTransport(URL), base_url="http://proxy")
        async with http:
            for _ in range(5):
                await http.post(CHAT, json=ASKED, headers={"Idempotency-Key": "a"}, timeout=None)
                turns.append((await http.get("/health")).json()["turns"])
        return turns

    assert virtually(main, nothing) == [1] * 5


def test_a_server_that_is_never_reached_is_a_status() -> None:
    reply, telling, over_s = streamed(udp_between(0, 1e9))
    assert reply.status_code == 504
    assert reply.json()["error"]["code"] == "link_lost"
    assert reply.headers["x-should-retry"] == "false"
    assert not telling.logs
    assert GRACE_S - 6 < over_s < GRACE_S + 6


def test_a_server_that_is_not_there_is_a_status_soon() -> None:
    async def main(made: VirtualNetwork) -> tuple[httpx2.Response, float]:
        with made.on("client"):
            http = httpx2.AsyncClient(
                transport=EloquentTransport(URL, grace_s=GRACE_S), base_url="http://proxy"
            )
        async with http:
            return await http.post(CHAT, json=ASKED, timeout=None), now()

    reply, over_s = virtually(main, nothing)
    assert reply.status_code == 504
    assert over_s < 8


def test_a_link_lost_before_the_first_event_is_a_status() -> None:
    async def main(made: VirtualNetwork) -> tuple[httpx2.Response, float]:
        telling = Telling([], gap_s=0)
        telling._tell = lambda log: asyncio.sleep(1e6)  # type: ignore[method-assign]
        async with proxied(made, telling) as http:
            return await http.post(CHAT, json=ASKED), now()

    reply, over_s = virtually(main, udp_between(FROM_S, 1e9))
    assert reply.status_code == 504
    assert FROM_S + GRACE_S < over_s < FROM_S + GRACE_S + 6
