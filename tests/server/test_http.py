"""The HTTP front: OpenAI's chat API over real connections; the hub and its store are real."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
from http_front import CHAT, DEADLINE_S, Scripted, front_with, read_sent, until_true

from eloquent.core.events import Failure, TextDelta
from eloquent.errors import RequestError
from eloquent_server.admission import Gate
from eloquent_server.backends.base import ANYBODY, Asker, BackendEvent
from eloquent_server.backends.echo import EchoBackend
from eloquent_server.http import answers
from eloquent_server.http.reader import HttpReader, Piece


def names() -> dict[str, str]:
    return {
        "X-Eloquent-Turn": secrets.token_hex(16),
        "X-Eloquent-Secret": secrets.token_hex(16),
    }


async def test_a_stream_has_the_words_as_they_come_and_then_done() -> None:
    backend = Scripted(free=1)
    async with front_with(backend) as front, front.post(stream=True) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-accel-buffering"] == "no"
        lines = response.aiter_lines()
        await read_sent(lines, until="to ")  # While the rest is not even there.
        backend.go()
        rest = await read_sent(lines)
        assert rest.text == "be"
        assert rest.is_done


async def test_each_event_has_the_offset_behind_it_as_its_id() -> None:
    usage_too = {"include_usage": True}
    async with (
        front_with(Scripted()) as front,
        front.post(stream=True, stream_options=usage_too) as response,
    ):
        turn = response.headers["x-eloquent-turn"]
        sent = await read_sent(response)
    role, *words, finish, usage, done = sent.data
    assert done == "[DONE]"
    assert len(words) == 2
    assert role["id"] == f"chatcmpl-{turn}"
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    ids = sent.ids
    assert [each.rpartition(":")[0] for each in ids if each] == [turn] * 4
    assert ids[0] == f"{turn}:0"
    assert ids[3] == ""  # Who has only the finish chunk gets the end again.
    offsets = [int(each.rpartition(":")[2]) for each in (ids[0], ids[1], ids[2], ids[4])]
    assert offsets == sorted(set(offsets))


async def test_without_stream_the_answer_is_one_object() -> None:
    async with front_with(Scripted()) as front:
        response = await front.http.post("/v1/chat/completions", json=CHAT)
        said = response.json()
    assert response.headers["content-type"] == "application/json"
    assert said["choices"][0]["message"] == {"role": "assistant", "content": "to be"}
    assert said["usage"]["total_tokens"] == 9
    assert said["id"] == f"chatcmpl-{response.headers['x-eloquent-turn']}"


async def test_who_waits_for_the_whole_answer_has_no_text_to_go_on_with() -> None:
    """The engine lets turns wait whose readers have some."""

    class Asking(Scripted):
        async def generate(
            self, body: bytes, asker: Asker = ANYBODY
        ) -> AsyncIterator[BackendEvent]:
            async for event in super().generate(body, asker):
                yield event
                await asyncio.sleep(0.02)  # So that each word is there by itself.
                while asker.buffered_s() > 0:  # noqa: ASYNC110 - what it waits for has no event
                    await asyncio.sleep(0.005)

    words = [TextDelta("to ")] * 5
    async with asyncio.timeout(DEADLINE_S), front_with(Asking(words)) as front:
        response = await front.http.post("/v1/chat/completions", json=CHAT)
    assert response.json()["choices"][0]["message"]["content"] == "to " * 5


async def test_a_long_answer_that_is_there_does_not_hold_others_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps, taken_at = 0, list[int]()
    take = HttpReader.take

    async def count() -> None:
        nonlocal steps
        while True:
            await asyncio.sleep(0)
            steps += 1

    def taking(reader: HttpReader) -> list[Piece]:
        taken_at.append(steps)
        return take(reader)

    same = names()
    async with front_with(Scripted([TextDelta("to be or not to be ")] * 900)) as front:
        ask = partial(front.http.post, "/v1/chat/completions", json=CHAT, headers=same)
        first = await ask()
        monkeypatch.setattr(HttpReader, "take", taking)
        counting = asyncio.ensure_future(count())
        again = await ask()
        counting.cancel()
    assert again.json()["choices"] == first.json()["choices"]
    assert len(taken_at) > 5
    assert sorted(set(taken_at)) == taken_at


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("invalid_request", 400),
        ("unknown_model", 404),
        ("rate_limited", 429),
        ("overloaded", 503),
        ("upstream_error", 502),
        ("upstream_timeout", 504),
    ],
)
async def test_a_turn_that_is_declined_has_its_status(
    code: str, status: int, *, is_streamed: bool
) -> None:
    backend = Scripted([RequestError(code, "because", 2.5)])
    async with front_with(backend) as front:
        response = await front.http.post(
            "/v1/chat/completions", json={**CHAT, "stream": is_streamed}
        )
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.json()["error"]["message"] == "because"
    assert response.headers.get("retry-after") == ("3" if status in (429, 503) else None)


async def test_an_answer_that_fails_before_its_first_word_has_an_errors_status() -> None:
    async with front_with(Scripted([Failure("engine_error", "broken")])) as front:
        response = await front.http.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_error"


async def test_an_answer_that_fails_in_the_middle_has_an_error_and_no_done() -> None:
    backend = Scripted([TextDelta("to "), Failure("engine_error", "broken")])
    async with front_with(backend) as front:
        async with front.post(stream=True) as response:
            sent = await read_sent(response)
        whole = await front.http.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 200
    assert sent.text == "to "
    assert sent.errors == ["engine_error"]
    assert not sent.is_done
    assert whole.status_code == 500


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no chat request"),
        (b"[]", "no chat request"),
        (b'{"stream": "yes"}', "stream"),
        (b"[" * 100_000, "no chat request"),
        (b'{"messages": 1, "stream": true}', "messages"),
    ],
)
async def test_a_body_that_is_no_chat_is_refused(content: bytes, why: str) -> None:
    async with front_with(EchoBackend()) as front:
        response = await front.http.post("/v1/chat/completions", content=content)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_request"
    assert why in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Eloquent-Turn": "00" * 16},
        {"X-Eloquent-Secret": "00" * 16},
        {"X-Eloquent-Turn": "00" * 15, "X-Eloquent-Secret": "00" * 16},
        {"X-Eloquent-Turn": "zz" * 16, "X-Eloquent-Secret": "00" * 16},
        {"X-Eloquent-Turn": " ".join(["00"] * 16), "X-Eloquent-Secret": "00" * 16},
    ],
)
async def test_names_of_another_form_are_refused(headers: dict[str, str]) -> None:
    async with front_with(Scripted()) as front:
        response = await front.http.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert response.status_code == 400
    assert "hexadecimal" in response.json()["error"]["message"]


async def test_the_same_names_and_body_are_the_same_turn() -> None:
    backend, given = Scripted(), names()
    async with front_with(backend) as front:
        answers_ = [
            await front.http.post("/v1/chat/completions", json=CHAT, headers=given)
            for _ in range(2)
        ]
        other = await front.http.post(
            "/v1/chat/completions", json={**CHAT, "seed": 1}, headers=given
        )
        foreign = await front.http.post(
            "/v1/chat/completions",
            json=CHAT,
            headers={**given, "X-Eloquent-Secret": secrets.token_hex(16)},
        )
    first, second = ({**each.json(), "created": 0} for each in answers_)
    assert first == second
    assert backend.asked == 1
    assert (other.status_code, other.json()["error"]["code"]) == (409, "turn_conflict")
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (404, "unknown_turn")


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_disconnect_cancels(*, is_streamed: bool) -> None:
    backend = Scripted(free=1)
    async with front_with(backend) as front:
        asking = asyncio.ensure_future(_ask(front, is_streamed=is_streamed))
        await until_true(lambda: backend.asked == 1)
        await asyncio.sleep(0.05)
        asking.cancel()
        await asyncio.wait((asking,))
        await asyncio.wait_for(backend.over.wait(), DEADLINE_S)
        await until_true(lambda: front.listener.readers == 0)
    assert backend.cancelled == 1


async def _ask(front: Any, *, is_streamed: bool) -> None:
    async with front.post(stream=is_streamed) as response:
        await response.aread()


async def test_a_disconnect_before_the_first_word_cancels() -> None:
    backend = Scripted(free=0)
    async with front_with(backend) as front:
        asking = asyncio.ensure_future(_ask(front, is_streamed=True))
        await until_true(lambda: backend.asked == 1)
        asking.cancel()
        await asyncio.wait((asking,))
        await asyncio.wait_for(backend.over.wait(), DEADLINE_S)
    assert backend.cancelled == 1


@pytest.mark.parametrize("headers", [{"X-Eloquent-Resume": "true"}, names()])
async def test_a_stream_that_is_cut_goes_on_after_its_last_event(headers: dict[str, str]) -> None:
    words = [TextDelta(f"word{number} ") for number in range(40)]
    backend = Scripted(words, free=10)
    async with front_with(backend) as front:
        async with front.post(stream=True, headers=headers) as response:
            turn, secret = (response.headers[f"x-eloquent-{n}"] for n in ("turn", "secret"))
            before = await read_sent(response, until="".join(w.text for w in words[:10]))
        await until_true(lambda: front.listener.readers == 0)
        backend.go()
        last = {"Last-Event-ID": before.ids[-1]}
        async with front.events(turn, secret, **last) as response:
            after = await read_sent(response)
        async with front.events(turn, secret) as response:
            again = await read_sent(response)
    assert before.text + after.text == again.text == "".join(word.text for word in words)
    assert after.is_done
    assert after.data[-2]["usage"]["completion_tokens"] == 2
    assert {each["model"] for each in (*after.data[:-1], *again.data[:-1])} == {"scripted"}
    assert (backend.asked, backend.cancelled) == (1, 0)


async def test_a_stream_that_goes_on_while_the_model_thinks_begins_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answers, "BEGIN_S", 2 * DEADLINE_S)
    backend = Scripted(free=1)
    async with (
        front_with(backend) as front,
        front.post(stream=True, model="other", headers=names()) as response,
    ):
        turn, secret = (response.headers[f"x-eloquent-{n}"] for n in ("turn", "secret"))
        lines = response.aiter_lines()
        before = await read_sent(lines, until="to ")
        async with front.events(turn, secret, **{"Last-Event-ID": before.ids[-1]}) as other:
            backend.go()
            after = await read_sent(other)
        rest = await read_sent(lines)
    assert after.text == rest.text == "be"  # It takes nobody's place.
    assert after.data[0]["model"] == "other"


async def test_who_has_all_but_done_gets_the_end_again() -> None:
    async with front_with(Scripted()) as front:
        async with front.post(stream=True, headers=names()) as response:
            turn, secret = (response.headers[f"x-eloquent-{n}"] for n in ("turn", "secret"))
            sent = await read_sent(response)
        async with front.events(turn, secret, **{"Last-Event-ID": sent.ids[-2]}) as response:
            again = await read_sent(response)
    assert again.text == ""
    assert again.data[1]["choices"][0]["finish_reason"] == "stop"
    assert again.is_done


async def test_a_cancelled_turn_goes_on_with_an_error_and_no_done() -> None:
    backend = Scripted(free=1)
    async with front_with(backend) as front:
        async with front.post(stream=True) as response:
            turn, secret = (response.headers[f"x-eloquent-{n}"] for n in ("turn", "secret"))
            await read_sent(response, until="to ")
        await asyncio.wait_for(backend.over.wait(), DEADLINE_S)
        async with front.events(turn, secret) as response:
            sent = await read_sent(response)
        offset = sent.ids[-1]
        async with front.events(turn, secret, **{"Last-Event-ID": offset}) as response:
            behind = await read_sent(response)
    assert sent.text == "to "
    assert sent.errors == behind.errors == ["cancelled"]
    assert not sent.is_done


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_turn_that_was_cancelled_before_its_first_word_has_an_errors_status(
    *, is_streamed: bool
) -> None:
    backend, given = Scripted(free=0), names()
    chat = {**CHAT, "stream": is_streamed}
    async with front_with(backend, grace_s=0.01) as front:

        async def ask() -> Any:
            return await front.http.post("/v1/chat/completions", json=chat, headers=given)

        asking = asyncio.ensure_future(ask())
        await until_true(lambda: backend.asked == 1)
        asking.cancel()
        await asyncio.wait_for(backend.over.wait(), DEADLINE_S)  # Nobody came back in time.
        again = await ask()
    assert (again.status_code, again.json()["error"]["code"]) == (409, "cancelled")


async def test_foreign_and_unknown_turns_are_alike() -> None:
    async with front_with(Scripted()) as front:
        known = await front.http.post("/v1/chat/completions", json=CHAT)
        turn, secret = (known.headers[f"x-eloquent-{name}"] for name in ("turn", "secret"))
        wrong = {"X-Eloquent-Secret": secrets.token_hex(16)}
        right = {"X-Eloquent-Secret": secret}
        refused = [
            await front.http.request(method, f"/v1/turns/{name}{path}", headers=headers)
            for method, path in (("GET", "/events"), ("DELETE", ""))
            for name, headers in (
                (turn, wrong),
                (turn, {}),
                (secrets.token_hex(16), right),
                ("nothing", right),
            )
        ]
    assert {each.status_code for each in refused} == {404}
    assert len({each.content for each in refused}) == 1


@pytest.mark.parametrize("offset", ["1", "x", "-1", "9" * 30])
async def test_an_offset_at_which_no_event_starts_is_refused(offset: str) -> None:
    async with front_with(Scripted()) as front:
        known = await front.http.post("/v1/chat/completions", json=CHAT)
        turn, secret = (known.headers[f"x-eloquent-{name}"] for name in ("turn", "secret"))
        response = await front.http.get(
            f"/v1/turns/{turn}/events",
            params={"offset": offset},
            headers={"X-Eloquent-Secret": secret},
        )
    assert response.status_code == 400
    assert response.json()["error"]["code"] in ("bad_offset", "invalid_request")


async def test_an_offset_can_be_in_the_address() -> None:
    async with front_with(Scripted()) as front:
        async with front.post(stream=True, headers=names()) as response:
            turn, secret = (response.headers[f"x-eloquent-{n}"] for n in ("turn", "secret"))
            sent = await read_sent(response)
        rest = await front.http.get(
            f"/v1/turns/{turn}/events",
            params={"offset": sent.ids[1].rpartition(":")[2]},
            headers={"X-Eloquent-Secret": secret},
        )
    assert '"be"' in rest.text
    assert '"to "' not in rest.text


async def test_a_turn_that_is_deleted_is_gone_for_good() -> None:
    backend, given = Scripted(free=1), names()
    async with front_with(backend) as front, front.post(stream=True, headers=given) as response:
        turn, lines = response.headers["x-eloquent-turn"], response.aiter_lines()
        await read_sent(lines, until="to ")
        deleted = await front.http.delete(f"/v1/turns/{turn}", headers=given)
        again = await front.http.delete(f"/v1/turns/{turn}", headers=given)
        asked = await front.http.post("/v1/chat/completions", json=CHAT, headers=given)
        rest = await read_sent(lines)
    assert (deleted.status_code, deleted.json()["deleted"]) == (200, True)
    assert again.status_code == asked.status_code == 404
    assert rest.errors == ["unknown_turn"]
    assert (backend.asked, backend.cancelled) == (1, 1)


async def test_a_quiet_stream_is_kept_alive_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "BEGIN_S", 0.02)
    monkeypatch.setattr(answers, "KEEP_ALIVE_S", 0.02)
    backend = Scripted(free=0)
    async with (
        front_with(backend) as front,
        front.post(stream=True) as first,
        front.post(stream=True) as second,
    ):
        assert second.status_code == 200  # The status waits no longer.
        lines = second.aiter_lines()
        async for line in lines:
            if line == ": waiting; 1 turns before it":
                break
        backend.go()
        assert (await read_sent(first)).text == "to be"
        assert [line async for line in lines][-2] == "data: [DONE]"


async def test_what_is_declined_late_is_an_error_in_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answers, "BEGIN_S", 0.02)
    backend = Scripted([RequestError("overloaded", "full")], free=0)
    async with front_with(backend) as front, front.post(stream=True) as response:
        backend.go()
        sent = await read_sent(response)
    assert sent.errors == ["overloaded"]
    assert not sent.is_done


async def test_when_the_server_stops_its_streams_end_with_an_error() -> None:
    backend = Scripted(free=1)
    async with front_with(backend) as front, front.post(stream=True) as response:
        lines = response.aiter_lines()
        await read_sent(lines, until="to ")
        closing = asyncio.ensure_future(front.listener.close())
        rest = await read_sent(lines)
        await asyncio.wait_for(closing, DEADLINE_S)
    assert rest.errors == ["unavailable"]
    assert not rest.is_done


async def test_models_are_listed_and_found() -> None:
    async with front_with(Scripted()) as front:
        listed = (await front.http.get("/v1/models")).json()
        one = await front.http.get("/v1/models/other")
        none = await front.http.get("/v1/models/a/b")
    assert [model["id"] for model in listed["data"]] == ["scripted", "other"]
    assert one.json() == listed["data"][1]
    assert (none.status_code, none.json()["error"]["code"]) == (404, "unknown_model")


async def test_operators_see_health_readiness_and_metrics() -> None:
    why = [""]

    async def metrics_now() -> tuple[bytes, str]:
        return b"up 1\n", "text/plain; v=1"

    async def why_not() -> str:
        return why[0]

    async with front_with(Scripted(), why_not_ready=why_not, metrics=metrics_now) as front:
        assert (await front.http.get("/health")).status_code == 200
        assert (await front.http.get("/ready")).status_code == 200
        why[0] = "It drains."
        late = await front.http.get("/ready")
        metrics = await front.http.get("/metrics")
        assert (await front.http.get("/health")).status_code == 200
    assert (late.status_code, late.json()["error"]["message"]) == (503, "It drains.")
    assert (metrics.content, metrics.headers["content-type"]) == (b"up 1\n", "text/plain; v=1")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/metrics", 404, "not_found"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("GET", "/v1/turns/00", 404, "not_found"),
        ("PUT", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
    ],
)
async def test_what_is_not_there_is_said_so_in_json(
    method: str, path: str, status: int, code: str
) -> None:
    async with front_with(Scripted()) as front:
        response = await front.http.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code


async def test_a_fault_is_an_error_in_json(caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> str:
        raise RuntimeError("a defect")

    async with front_with(Scripted(), why_not_ready=broken) as front:
        response = await front.http.get("/ready")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "a defect" not in response.text
    assert "a defect" in caplog.text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:1"}, 200),
        ({"Host": "127.1.2.3"}, 200),
        ({"Host": "evil.example"}, 421),
        ({"Host": "localhost.evil.example"}, 421),
        ({"Host": "[::1"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
    ],
)
async def test_pages_of_other_names_get_nothing(headers: dict[str, str], status: int) -> None:
    async with front_with(Scripted()) as front:
        response = await front.http.get("/v1/models", headers=headers)
    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers


async def test_turns_beyond_the_limit_are_told_at_once_to_come_back() -> None:
    backend = Scripted(free=1)
    async with (
        front_with(backend, gate=Gate(max_turns=1)) as front,
        front.post(stream=True) as response,
    ):
        late = await front.http.post("/v1/chat/completions", json={**CHAT, "stream": True})
        assert (late.status_code, late.headers["retry-after"]) == (503, "1")
        assert late.json()["error"]["code"] == "overloaded"
        backend.go()
        assert (await read_sent(response)).is_done


@pytest.mark.parametrize("origin", [None, "https://chat.example", "https://chat.example:8443"])
async def test_what_is_in_front_may_pass_its_name_on(origin: str | None) -> None:
    headers = {"Host": "Chat.Example", **({} if origin is None else {"Origin": origin})}
    async with front_with(Scripted(), names=["chat.example"]) as front:
        assert (await front.http.get("/v1/models", headers=headers)).status_code == 200
        headers["Host"] = "other.example"
        assert (await front.http.get("/v1/models", headers=headers)).status_code == 421
