"""The client library against a real server on loopback."""

import asyncio
import json

import pytest
from loopback import DEADLINE_S, HOST, Hanging, StartServer, saying

from eloquent.core.events import End, Event, Failure, TextDelta, encode_event
from eloquent.errors import ConfigurationError
from eloquent.url import ServerUrl
from eloquent_client import (
    APIConnectionError,
    APIError,
    APITimeoutError,
    BadRequestError,
    Client,
    MessageStream,
    NotFoundError,
    ServerFaultError,
    Usage,
)
from eloquent_server.backends.echo import EchoBackend
from eloquent_server.gateway import Gateway
from eloquent_server.turns import Turn

HELLO = [{"role": "user", "content": "Hello"}]
WORDS = [f"word{number} " for number in range(2000)]


async def read(stream: MessageStream) -> str:
    return "".join([text async for text in stream.text_stream])


async def test_text_and_message_arrive(start_server: StartServer) -> None:
    server = await start_server(saying(*WORDS))
    async with Client(str(server.url)) as client:
        assert not client.link.is_up
        assert client.link.rtt_ms is None
        async with asyncio.timeout(DEADLINE_S), client.stream(messages=HELLO) as stream:
            assert await read(stream) == "".join(WORDS)
            message = await stream.get_final_message()
            assert client.link.is_up
            assert client.link.rtt_ms is not None
    assert message.text == stream.text == "".join(WORDS)
    assert (message.finish_reason, message.model) == ("stop", "told")
    assert message.usage == Usage(prompt_tokens=7, completion_tokens=len(WORDS))
    stats = stream.stats
    assert stats.duplicates == stats.missing == 0
    assert stats.datagrams > 0
    assert stats.ttft_ms is not None
    assert 0 < stats.ttft_ms <= stats.duration_ms
    assert stats.rtt_ms > 0
    assert stream.stats.duration_ms == stats.duration_ms


async def test_the_request_is_an_openai_body(start_server: StartServer) -> None:
    bodies: list[bytes] = []

    async def handle(turn: Turn) -> None:
        bodies.append(turn.request.body)
        await saying("yes")(turn)

    server = await start_server(handle)
    async with Client(server.url) as client:
        async with client.stream(HELLO, "a-model", temperature=0, seed=None) as stream:
            await stream.get_final_message()
        async with client.stream(HELLO) as other:
            await other.get_final_message()
    assert json.loads(bodies[0]) == {"messages": HELLO, "model": "a-model", "temperature": 0}
    assert json.loads(bodies[1]) == {"messages": HELLO}
    assert len(stream.turn_id) == 32
    assert stream.turn_id != other.turn_id


async def test_events_can_be_read_more_than_once(start_server: StartServer) -> None:
    server = await start_server(saying("a", "b"))
    async with Client(server.url) as client, client.stream(HELLO) as stream:
        first = [event async for event in stream]
        second = [event async for event in stream]
    assert first == second
    assert first[:2] == [TextDelta("a"), TextDelta("b")]
    assert isinstance(first[2], End)


async def test_a_token_goes_with_the_text_at_each_moment(start_server: StartServer) -> None:
    words = WORDS[:500]
    server = await start_server(saying(*words))
    after = {0: ""}
    text, offset = "", 0
    for word in words:
        text, offset = text + word, offset + len(encode_event(TextDelta(word)))
        after[offset] = text
    async with (
        asyncio.timeout(DEADLINE_S),
        Client(server.url) as client,
        client.stream(HELLO) as stream,
    ):
        async for _ in stream:
            assert stream.text == after[stream.offset]
    assert stream.text == after[stream.offset] == "".join(words)


async def test_the_token_of_a_whole_answer_gives_its_end(start_server: StartServer) -> None:
    server = await start_server(saying("one ", "two"))
    async with asyncio.timeout(DEADLINE_S), Client(server.url) as client:
        async with client.stream(HELLO) as stream:
            whole = await stream.get_final_message()
        async with client.resume(stream.token) as rest:
            message = await rest.get_final_message()
    assert (message.text, message.finish_reason, message.usage) == ("", "stop", whole.usage)
    assert rest.token == stream.token
    assert rest.stats.missing == rest.stats.duplicates == 0


async def test_two_turns_at_once_on_one_connection(start_server: StartServer) -> None:
    hanging = Hanging("slow")

    async def handle(turn: Turn) -> None:
        is_first = not hanging.asked.is_set()
        await (hanging if is_first else saying("quick"))(turn)

    server = await start_server(handle)
    async with asyncio.timeout(DEADLINE_S), Client(server.url) as client:
        async with client.stream(HELLO) as slow:
            assert await anext(slow.text_stream) == "slow"
            async with client.stream(HELLO) as quick:
                assert (await quick.get_final_message()).text == "quick"
            assert not slow.is_over
        await hanging.cancelled.wait()


async def test_leaving_the_block_cancels(start_server: StartServer) -> None:
    hanging = Hanging()
    server = await start_server(hanging)
    async with asyncio.timeout(DEADLINE_S), Client(server.url) as client:
        async with client.stream(HELLO) as stream:
            assert await anext(stream.text_stream) == "And then"
        await hanging.cancelled.wait()
        assert client.link.is_up
    assert stream.is_over
    assert stream.stats.datagrams > 0
    with pytest.raises(APIError, match="cancelled on this side"):
        await stream.get_final_message()


async def test_leaving_the_block_at_once_cancels(start_server: StartServer) -> None:
    hanging = Hanging()
    server = await start_server(hanging)
    async with asyncio.timeout(DEADLINE_S), Client(server.url) as client:
        async with client.stream(HELLO):
            pass
        async with client.stream(HELLO) as stream:
            await hanging.asked.wait()
            assert await anext(stream.text_stream) == "And then"
        await hanging.cancelled.wait()


async def test_close_ends_a_waiting_reader(start_server: StartServer) -> None:
    server = await start_server(Hanging())
    async with (
        asyncio.timeout(DEADLINE_S),
        Client(server.url) as client,
        client.stream(HELLO) as stream,
    ):
        reading = asyncio.create_task(read(stream))
        assert await anext(stream.text_stream) == "And then"
        await stream.close()
        assert await reading == "And then"


async def test_closing_while_it_is_asked_cancels(start_server: StartServer) -> None:
    server = await start_server(Hanging())
    async with asyncio.timeout(DEADLINE_S), Client(server.url) as client:
        stream = client.stream(HELLO)
        entering = asyncio.create_task(stream.__aenter__())
        await asyncio.sleep(0)
        await stream.close()
        await entering
        assert await read(stream) == ""
        assert stream.is_over


async def test_cancelling_the_task_cancels_the_turn(start_server: StartServer) -> None:
    hanging = Hanging(text=None)
    server = await start_server(hanging)
    async with asyncio.timeout(DEADLINE_S), Client(server.url) as client:

        async def ask() -> None:
            async with client.stream(HELLO) as stream:
                await stream.get_final_message()

        asking = asyncio.create_task(ask())
        await hanging.asked.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await hanging.cancelled.wait()


async def test_errors_of_the_server_are_typed(start_server: StartServer) -> None:
    server = await start_server(Gateway(EchoBackend(1e6)).handle)
    async with asyncio.timeout(DEADLINE_S), Client(server.url) as client:
        with pytest.raises(NotFoundError, match="nonesuch") as not_found:
            async with client.stream(HELLO, model="nonesuch") as stream:
                await stream.get_final_message()
        assert not_found.value.code == "unknown_model"
        with pytest.raises(BadRequestError, match="temperature") as bad:
            async with client.stream(HELLO, temperature=9) as stream:
                await read(stream)
        assert bad.value.code == "invalid_request"
        with pytest.raises(BadRequestError) as large:
            async with client.stream([{"role": "user", "content": "x" * 3_000_000}]) as stream:
                await read(stream)
        assert large.value.code == "request_too_large"
        async with client.stream(HELLO) as stream:
            assert await read(stream) == "Hello"


@pytest.mark.parametrize("messages", [[{"role": "user", "content": "\ud800"}], [object()]])
async def test_what_is_no_json_is_refused_here(messages: list[dict[str, str]]) -> None:
    client = Client(ServerUrl(HOST, 1))
    with pytest.raises(BadRequestError, match="JSON"):
        client.stream(messages)
    with pytest.raises(BadRequestError, match="JSON"):
        client.stream(HELLO, temperature=float("nan"))


async def test_a_fault_of_the_handler(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def handle(turn: Turn) -> None:
        raise ZeroDivisionError("a fault")

    server = await start_server(handle)
    async with asyncio.timeout(DEADLINE_S), Client(server.url) as client:
        with pytest.raises(ServerFaultError) as fault:
            async with client.stream(HELLO) as stream:
                await stream.get_final_message()
    assert fault.value.code == "internal_error"
    assert "a fault" in caplog.text


async def test_a_failure_in_mid_answer(start_server: StartServer) -> None:
    async def handle(turn: Turn) -> None:
        turn.append(TextDelta("So far"))
        turn.append(Failure("unavailable", "The engine is gone."))
        turn.close("error", model="told", prompt_tokens=0, completion_tokens=0)

    server = await start_server(handle)
    async with (
        asyncio.timeout(DEADLINE_S),
        Client(server.url) as client,
        client.stream(HELLO) as stream,
    ):
        with pytest.raises(ServerFaultError, match="engine is gone") as failure:
            await stream.get_final_message()
        with pytest.raises(ServerFaultError):
            await read(stream)
        events = [event async for event in stream]
    assert failure.value.code == "unavailable"
    assert stream.text == "So far"
    assert events[1] == Failure("unavailable", "The engine is gone.")
    assert stream.stats.missing == stream.stats.duplicates == 0


async def test_events_of_kinds_that_a_client_does_not_know_are_not_missing(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = bytes((99, 5)) + b"later"

    def of_a_later_release(event: Event) -> bytes:
        encoded = encode_event(event)
        return encoded if isinstance(event, End) else unknown + encoded + unknown

    monkeypatch.setattr("eloquent.core.log.encode_event", of_a_later_release)
    server = await start_server(saying("one ", "two"))
    async with (
        asyncio.timeout(DEADLINE_S),
        Client(server.url) as client,
        client.stream(HELLO) as stream,
    ):
        assert (await stream.get_final_message()).text == "one two"
    assert stream.stats.missing == stream.stats.duplicates == 0


async def test_no_server_there(start_server: StartServer) -> None:
    server = await start_server(saying("never"))
    await server.close()
    async with asyncio.timeout(DEADLINE_S), Client(server.url) as client:
        with pytest.raises(APIConnectionError, match="Nothing listens"):
            async with client.stream(HELLO):
                pass


@pytest.mark.parametrize("host", ["a..b", "nonesuch.invalid"])
async def test_no_such_host(host: str) -> None:
    async with asyncio.timeout(DEADLINE_S), Client(f"eloquent://{host}") as client:
        with pytest.raises(APIConnectionError):
            await client.connect()


async def test_a_server_that_never_answers() -> None:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(
        asyncio.DatagramProtocol, local_addr=(HOST, 0)
    )
    port = transport.get_extra_info("sockname")[1]
    try:
        async with Client(ServerUrl(HOST, port), connect_timeout_s=0.05) as client:
            with pytest.raises(APITimeoutError, match="firewall"):
                await client.connect()
    finally:
        transport.close()


async def test_the_wrong_server(start_server: StartServer) -> None:
    server = await start_server(saying("never"))
    other = ServerUrl(HOST, server.url.port, "0" * 64)
    async with asyncio.timeout(DEADLINE_S), Client(other) as client:
        with pytest.raises(APIConnectionError, match="pinned"):
            await client.connect()
    unpinned = ServerUrl(HOST, server.url.port)
    async with asyncio.timeout(DEADLINE_S), Client(unpinned) as client:
        with pytest.raises(APIConnectionError):
            await client.connect()


async def test_an_answer_that_takes_too_long(start_server: StartServer) -> None:
    hanging = Hanging()
    server = await start_server(hanging)
    async with asyncio.timeout(DEADLINE_S), Client(server.url, timeout_s=0.3) as client:
        await client.connect()
        with pytest.raises(APITimeoutError, match="not complete within"):
            async with client.stream(HELLO) as stream:
                await stream.get_final_message()
        await hanging.cancelled.wait()


async def test_a_server_that_comes_back(start_server: StartServer) -> None:
    server = await start_server(saying("here"))
    async with asyncio.timeout(DEADLINE_S), Client(server.url) as client:
        async with client.stream(HELLO) as stream:
            assert await read(stream) == "here"
        await server.close()
        while client.link.is_up:  # noqa: ASYNC110  (the news of the end is on its way)
            await asyncio.sleep(0.01)
        with pytest.raises(APIConnectionError):
            await client.connect()
        await server.open()
        async with client.stream(HELLO) as stream:
            assert await read(stream) == "here"


async def test_a_server_that_goes_in_mid_answer(start_server: StartServer) -> None:
    server = await start_server(Hanging("So far"))
    async with asyncio.timeout(DEADLINE_S), Client(server.url) as client:
        async with client.stream(HELLO) as stream:
            assert await anext(stream.text_stream) == "So far"
            await server.close()
            with pytest.raises(ServerFaultError, match="shutting down"):
                await stream.get_final_message()
        assert stream.text == "So far"
        assert stream.stats.datagrams > 0
        while client.link.is_up:  # noqa: ASYNC110  (the news of the end is on its way)
            await asyncio.sleep(0.01)


async def test_a_stream_is_asked_once_and_read_inside(start_server: StartServer) -> None:
    server = await start_server(saying("yes"))
    async with Client(server.url) as client:
        stream = client.stream(HELLO)
        assert stream.stats.duration_ms == 0
        with pytest.raises(RuntimeError):
            await read(stream)
        async with stream:
            pass
        with pytest.raises(RuntimeError):
            async with stream:
                pass


def test_a_url_that_is_none() -> None:
    with pytest.raises(ConfigurationError):
        Client("https://example.org")


async def test_a_ticket_lets_another_client_resume(start_server: StartServer) -> None:
    server = await start_server(saying("one ", "two ", "three"))
    async with Client(server.url) as first:
        async with first.stream(messages=[{"role": "user", "content": "Count"}]) as stream:
            await stream.get_final_message()
        ticket = first.take_ticket()
        assert ticket is not None
        assert first.take_ticket() is None, "a ticket is good once"
    async with (
        Client(server.url, ticket=ticket) as second,
        second.resume(stream.token, offset=0) as resumed,
    ):
        assert (await resumed.get_final_message()).text == "one two three"
