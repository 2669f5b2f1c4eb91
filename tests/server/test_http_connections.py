"""What HTTP connections may cost the server: raw sockets that do not keep to the rules."""

import asyncio
import datetime
import hashlib
import json
import socket
import ssl
from typing import Any

import httpx2
import pytest
from http_front import (
    CHAT,
    DEADLINE_S,
    Front,
    Scripted,
    front_with,
    read_sent,
    ready,
    until_true,
)

from eloquent import handshakes
from eloquent.core import wire
from eloquent.core.events import TextDelta
from eloquent.errors import ConfigurationError
from eloquent.quic.certificate import make_certificate
from eloquent_server.admission import Gate
from eloquent_server.http import connections
from eloquent_server.http.app import Behind
from eloquent_server.http.connections import Connections
from eloquent_server.http.guard import Guard
from eloquent_server.http.listen import listen

POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
MEGABYTE = 1 << 20
NOW = datetime.datetime.now(datetime.UTC)


async def connect(front: Front, **options: Any) -> tuple[asyncio.StreamReader, Any]:
    return await asyncio.open_connection("127.0.0.1", front.port, **options)


async def answer_to(front: Front, data: bytes) -> tuple[int, Any]:
    """Send bytes, and return the status and body of what comes until the end."""
    reader, writer = await connect(front)
    writer.write(data)
    came = await asyncio.wait_for(reader.read(), DEADLINE_S)
    writer.close()
    return _parsed(came)


def _parsed(response: bytes) -> tuple[int, Any]:
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


async def is_over(reader: asyncio.StreamReader) -> bytes:
    """Read until the connection's end, clean or not."""
    came = b""
    try:
        while piece := await asyncio.wait_for(reader.read(65536), DEADLINE_S):
            came += piece
    except ConnectionError:
        pass
    return came


async def test_300_connections_that_drip_their_headers_end_in_time_and_hurt_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handshakes, "HANDSHAKE_S", 1.0)
    async with front_with(Scripted()) as front:

        async def drip() -> None:
            reader, writer = await connect(front)
            ending = asyncio.ensure_future(is_over(reader))
            for byte in POST * 100:
                writer.write(bytes((byte,)))
                done, _ = await asyncio.wait((ending,), timeout=0.1)
                if done:
                    break
            assert ending.done()
            writer.close()

        dripping = [asyncio.ensure_future(drip()) for _ in range(300)]
        await until_true(lambda: front.listener.connections >= 200)
        for _ in range(3):
            answer = await front.http.post("/v1/chat/completions", json=CHAT)
            assert answer.json()["choices"][0]["message"]["content"] == "to be"
        await asyncio.wait_for(asyncio.gather(*dripping), DEADLINE_S)
        assert front.listener.refused["request_timeout"] >= 300
        await front.http.aclose()
        await until_true(lambda: front.listener.connections == 0)


async def test_of_connections_that_say_nothing_the_oldest_makes_room() -> None:
    async with front_with(Scripted(), connections=Connections(waiting=2)) as front:
        silent = [await connect(front) for _ in range(3)]
        assert await is_over(silent[0][0]) == b""
        answer = await front.http.get("/health")
        assert answer.status_code == 200
        assert front.listener.refused["request_timeout"] == 2
        for _, writer in silent:
            writer.close()


async def test_more_connections_than_there_is_room_for_are_closed() -> None:
    async with front_with(Scripted(), connections=Connections(most=2)) as front:
        open_ = [await connect(front) for _ in range(2)]
        await until_true(lambda: front.listener.connections == 2)
        reader, writer = await connect(front)
        assert await is_over(reader) == b""
        assert front.listener.refused["too_many_connections"] == 1
        for _, each in open_:
            each.close()
        await until_true(lambda: front.listener.connections == 0)
        assert (await front.http.get("/health")).status_code == 200
        writer.close()


async def test_one_address_does_not_take_all_connections() -> None:
    async with front_with(Scripted(), connections=Connections(of_one=2)) as front:
        open_ = [await connect(front, local_addr=("127.0.0.2", 0)) for _ in range(2)]
        await until_true(lambda: front.listener.connections == 2)
        for many in range(3):
            reader, writer = await connect(front, local_addr=("127.0.0.2", 0))
            assert await is_over(reader) == b""
            assert front.listener.refused["too_many_connections"] == many + 1
            writer.close()
        assert (await front.http.get("/health")).status_code == 200
        open_.pop()[1].close()
        await until_true(lambda: front.listener.connections == 2)
        reader, writer = await connect(front, local_addr=("127.0.0.2", 0))
        writer.write(HEALTH)
        assert b" 200 " in await asyncio.wait_for(reader.readline(), DEADLINE_S)
        for each in (writer, *(writer for _, writer in open_)):
            each.close()


async def test_more_requests_than_there_is_room_for_are_told_to_come_back() -> None:
    holding, sent = asyncio.Event(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await holding.wait()

    async def send(message: Any) -> None:
        sent.append(message)

    guard = Guard(app, is_local=False, most=1)
    scope = {"type": "http", "path": "/v1/models", "headers": []}
    first = asyncio.ensure_future(guard(scope, app, send))
    await asyncio.sleep(0)
    await guard(scope, app, send)
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"1") in sent[0]["headers"]
    holding.set()
    await first
    sent.clear()
    await guard(scope, app, send)
    assert sent == []


async def test_a_body_that_does_not_come_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire, "REQUEST_S", 0.1)
    async with front_with(Scripted()) as front:
        status, said = await answer_to(front, POST + b"Content-Length: 9\r\n\r\n{")
    assert status == 408
    assert said["error"]["code"] == "request_timeout"


async def test_a_body_that_comes_slowly_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "REQUEST_S", 0.1)
    monkeypatch.setattr(wire, "REQUEST_BYTES_PER_S", 1)
    body = json.dumps(CHAT).encode()
    async with front_with(Scripted()) as front:
        reader, writer = await connect(front)
        writer.write(POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
        writer.write(body[:-1])
        await asyncio.sleep(0.3)
        writer.write(body[-1:])
        assert (await reader.readline()).split()[1] == b"200"
        writer.close()


async def test_a_body_that_announces_too_much_is_not_read() -> None:
    async with front_with(Scripted()) as front:
        status, said = await answer_to(
            front, POST + b"Content-Length: %d\r\n\r\n" % (MEGABYTE + 1) + bytes(1000)
        )
    assert status == 413
    assert said["error"]["code"] == "request_too_large"


async def test_a_body_in_chunks_is_read_no_further_than_it_may_be() -> None:
    async with front_with(Scripted()) as front:
        reader, writer = await connect(front)
        writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        written = 0
        try:
            while written < 64 * MEGABYTE:
                writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
                await writer.drain()
                written += 0x10000
        except ConnectionError:
            pass
        came = await is_over(reader)
        writer.close()
    # What the kernel's buffers hold on both sides was written, too.
    assert written < 32 * MEGABYTE
    if came:  # The connection's end may overtake it where so much more was sent.
        assert _parsed(came)[0] == 413


@pytest.mark.parametrize("at_once", [0, 100_000])
async def test_a_refusal_is_heard_though_the_body_still_comes(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CLOSE_S", 10 * DEADLINE_S)
    async with front_with(Scripted()) as front:
        reader, writer = await connect(front)
        writer.write(b"PUT /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n" % (at_once + 50_000) + bytes(at_once))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
        for _ in range(4):
            writer.write(bytes(10_000))
            await asyncio.sleep(0.01)
        rest = await asyncio.wait_for(reader.read(), DEADLINE_S)  # No reset.
        writer.close()
        await until_true(lambda: front.listener.connections == 0)
    assert _parsed(head + rest)[0] == 405


@pytest.mark.parametrize(
    "data",
    [
        b"\0\1\2\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000,
        POST + b"Content-Length: -1\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_refused_in_json(data: bytes) -> None:
    async with front_with(Scripted()) as front:
        status, said = await answer_to(front, data)
        assert front.listener.refused["malformed_request"] == 1
    assert status == 400
    assert said["error"]["code"] == "malformed_request"


async def test_a_body_that_turns_out_to_be_no_http_is_refused_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    head = b"POST /nothing HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with front_with(Scripted()) as front:
        status, said = await answer_to(front, head + b"zz\r\nhello\r\n0\r\n\r\n")
        assert (await front.http.get("/health")).status_code == 200
    assert (status, said["error"]["code"]) == (400, "malformed_request")
    assert caplog.messages == []


async def test_what_is_no_http_within_a_response_ends_the_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = Scripted(free=1)
    body = json.dumps({**CHAT, "stream": True}).encode()
    async with front_with(backend) as front:
        reader, writer = await connect(front)
        writer.write(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await asyncio.wait_for(reader.readuntil(b"to "), DEADLINE_S)
        writer.write(b"\0\1\2\r\n\r\n" * 10_000)
        backend.go()
        await is_over(reader)
        writer.close()
    assert "Traceback" not in caplog.text


async def test_a_reader_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SLOW_READER_S", 0.3)
    backend = Scripted([TextDelta("x" * 100_000)] * 100)
    body = json.dumps({**CHAT, "stream": True}).encode()
    async with front_with(backend) as front:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", front.port))
        sock.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await until_true(lambda: front.listener.refused["slow_reader"] == 1)
        await until_true(lambda: front.listener.readers == 0)
        assert front.listener.connections == 0
        sock.close()


async def test_a_connection_takes_one_request_after_the_other() -> None:
    async with front_with(Scripted()) as front:
        reader, writer = await connect(front)
        for _ in range(3):
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
            assert head.startswith(b"HTTP/1.1 200")
            await reader.readexactly(len(b'{"status":"ok"}'))
        writer.write(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
        last = await asyncio.wait_for(reader.read(), DEADLINE_S)
        assert b"connection: close" in last.lower()
        writer.close()


async def test_over_tls_it_is_the_same_and_another_certificate_can_be_shown() -> None:
    first, second = (make_certificate("127.0.0.1", NOW) for _ in range(2))
    async with front_with(Scripted(), certificate=first) as front:
        async with front.post(stream=True) as response:
            sent = await read_sent(response)
        assert sent.text == "to be"
        assert sent.is_done
        assert (await front.http.post("/v1/chat/completions", json=CHAT)).status_code == 200
        shown = [await _shown(front)]
        front.listener.show(second)
        shown.append(await _shown(front))
        assert shown == [first.pin, second.pin]


REFUSED = b"PUT /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def test_over_tls_a_connection_is_of_use_after_a_refusal_that_came_before_the_body() -> None:
    """There is no half of an end over TLS that would tell the client otherwise."""
    certificate = make_certificate("127.0.0.1", NOW)
    async with front_with(Scripted(), certificate=certificate) as front:
        reader, writer = await connect(front, ssl=_trusting())
        for _ in range(3):
            writer.write(REFUSED + b"Content-Length: 5\r\n\r\n")
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
            assert head.startswith(b"HTTP/1.1 405")
            await asyncio.wait_for(reader.readuntil(b"}}"), DEADLINE_S)
            writer.write(b"bo")
            await asyncio.sleep(0.01)
            writer.write(b"dy!" + HEALTH)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
            assert head.startswith(b"HTTP/1.1 200")
            await asyncio.wait_for(reader.readuntil(b"}"), DEADLINE_S)
        writer.close()


@pytest.mark.parametrize(
    "rest", [b"\0not a chunk\r\n", b"10000\r\n" + bytes(MEGABYTE)], ids=["garbage", "much"]
)
async def test_over_tls_what_follows_a_refusal_is_not_read_without_end(
    rest: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CLOSE_S", 10 * DEADLINE_S)
    certificate = make_certificate("127.0.0.1", NOW)
    async with front_with(Scripted(), certificate=certificate) as front:
        reader, writer = await connect(front, ssl=_trusting())
        writer.write(REFUSED + b"Transfer-Encoding: chunked\r\n\r\n")
        await asyncio.wait_for(reader.readuntil(b"}}"), DEADLINE_S)
        writer.write(rest)
        await is_over(reader)
        writer.close()
        await until_true(lambda: front.listener.connections == 0)
    assert "Traceback" not in caplog.text


def _trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def _shown(front: Front) -> str:
    """Return the pin of the certificate that a new connection is shown."""
    _, writer = await connect(front, ssl=_trusting())
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return hashlib.sha256(der).hexdigest()


async def test_tls_has_no_more_time_than_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshakes, "HANDSHAKE_S", 0.3)
    certificate = make_certificate("127.0.0.1", NOW)
    async with front_with(Scripted(), certificate=certificate) as front:
        silent, writer = await connect(front)
        assert await is_over(silent) == b""
        writer.close()
        with pytest.raises(httpx2.TransportError):
            await front.http.get(f"http://127.0.0.1:{front.port}/health")
        assert (await front.http.get("/health")).status_code == 200
        await front.http.aclose()
        await until_true(lambda: front.listener.connections == 0)


async def test_an_address_that_is_taken_is_said_so() -> None:
    async with front_with(Scripted()) as front:
        behind = Behind(hub=front.hub, admission=Gate(), models=list, why_not_ready=ready)
        with pytest.raises(ConfigurationError, match="--http"):
            await listen("127.0.0.1", front.port, behind)
        with pytest.raises(ConfigurationError, match="--http"):
            await listen("name.invalid", 0, behind)
