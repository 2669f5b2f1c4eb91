"""Whatever happens to a connection, what a program gets to see is the library's own error."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from declining import Declining
from loopback import DEADLINE_S, HOST
from rungs import URL, serving, virtually
from telling import Telling

from eloquent.core.events import Event, encode_event
from eloquent.core.log import TokenLog
from eloquent.quic.certificate import ServerCertificate
from eloquent.url import ServerUrl
from eloquent_client import (
    APIConnectionError,
    APIError,
    APIResponseError,
    APITimeoutError,
    BadRequestError,
    Client,
)
from eloquent_netem.vloop import VirtualNetwork

HELLO = [{"role": "user", "content": "Hello"}]

Answering = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def failure_of(client: Client) -> BaseException:
    """Return what asking and reading a turn raises."""
    with pytest.raises(BaseException) as error:  # noqa: PT011  (its type is what is tested)
        async with client, client.stream(HELLO) as stream:
            await stream.get_final_message()
    return error.value


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close the connection at once."""


async def talk_nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(bytes(range(256)) * 16)
    await writer.drain()


async def be_a_web_server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
    await writer.drain()


async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 302 Found\r\nLocation: wss://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")
    await writer.drain()


async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


@asynccontextmanager
async def answering(handle: Answering, tls: ssl.SSLContext | None) -> AsyncIterator[int]:
    """Serve on a free TCP port of loopback; nothing is there for UDP."""

    async def whole(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handle(reader, writer)
        except (OSError, EOFError):
            pass  # the client went
        finally:
            writer.close()

    async with await asyncio.start_server(whole, HOST, 0, ssl=tls) as server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize("handle", [hang_up, talk_nonsense, say_nothing])
async def test_what_answers_speaks_no_tls(handle: Answering) -> None:
    async with asyncio.timeout(DEADLINE_S), answering(handle, None) as port:
        url = ServerUrl(HOST, port, "0" * 64)
        error = await failure_of(Client(url, connect_timeout_s=0.5, max_retries=0))
    assert isinstance(error, APIConnectionError)


@pytest.mark.parametrize("handle", [hang_up, talk_nonsense, be_a_web_server, redirect, say_nothing])
async def test_what_answers_is_no_server_of_ours(
    handle: Answering, certificate: ServerCertificate
) -> None:
    async with asyncio.timeout(DEADLINE_S), answering(handle, certificate.tls()) as port:
        url = ServerUrl(HOST, port, certificate.pin)
        error = await failure_of(Client(url, connect_timeout_s=0.5, max_retries=0))
    assert isinstance(error, APIConnectionError)


@pytest.mark.parametrize("pin", ["0" * 64, None])
async def test_what_answers_is_not_the_right_server(
    pin: str | None, certificate: ServerCertificate
) -> None:
    tls = certificate.tls()
    async with asyncio.timeout(DEADLINE_S), answering(be_a_web_server, tls) as port:
        error = await failure_of(Client(ServerUrl(HOST, port, pin), max_retries=0))
    assert isinstance(error, APIConnectionError)


class Nonsense(asyncio.DatagramProtocol):
    """Answers each datagram with bytes that are no QUIC."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.DatagramTransport)
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        for answer in (b"", b"\xc0", bytes(range(256)), data, data[::-1]):
            self._transport.sendto(answer, addr)


async def test_udp_that_talks_nonsense() -> None:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(Nonsense, local_addr=(HOST, 0))
    try:
        port = transport.get_extra_info("sockname")[1]
        client = Client(ServerUrl(HOST, port), connect_timeout_s=0.5, max_retries=0)
        async with asyncio.timeout(DEADLINE_S):
            error = await failure_of(client)
    finally:
        transport.close()
    assert isinstance(error, APIConnectionError)


@pytest.mark.parametrize("host", ["a..b", "nonesuch.invalid", "x" * 300, "\udce9"])
async def test_names_that_lead_nowhere(host: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        error = await failure_of(Client(ServerUrl(host, 4433), max_retries=0))
    assert isinstance(error, APIConnectionError)


def test_a_server_that_vanishes_in_mid_answer() -> None:
    service = Telling(["one "] * 1000, 0.1)

    async def main(network: VirtualNetwork) -> tuple[BaseException, str]:
        async with Client(URL) as client:
            async with serving(network, service):
                stream = await client.stream(HELLO).__aenter__()
                await anext(stream.text_stream)
            with pytest.raises(APIError) as error:
                await stream.get_final_message()
            return error.value, stream.text

    error, text = virtually(main)
    assert type(error) is APIConnectionError
    assert text.startswith("one ")


def test_a_link_that_goes_dead_for_good() -> None:
    service = Telling(["one "] * 1000, 0.1)

    async def main(network: VirtualNetwork) -> BaseException:
        async with serving(network, service):
            return await failure_of(Client(URL))

    error = virtually(main, lambda now, packet: now > 2.0)
    assert isinstance(error, APIConnectionError)
    assert not isinstance(error, APITimeoutError)


def test_a_path_that_nothing_passes() -> None:
    async def main(network: VirtualNetwork) -> BaseException:
        return await failure_of(Client(URL))

    assert isinstance(virtually(main, lambda now, packet: True), APITimeoutError)


class Damaged(Declining):
    """Tells a log that is none, or that ends otherwise than it says."""

    def __init__(self, damage: Callable[[bytes], bytes]) -> None:
        super().__init__(tokens=["one ", "two "], gap_s=0.1)
        self._damage = damage

    async def _tell(self, log: TokenLog) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("eloquent.core.log.encode_event", self._encode)
            await super()._tell(log)

    def _encode(self, event: Event) -> bytes:
        return self._damage(encode_event(event))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:2] + b"\xff" * (len(data) - 2),
        lambda data: data[:-1] + bytes((data[-1] ^ 1,)),
        lambda data: b"\x01\xff\xff\xff\xff\xff\xff\xff\xff" + data,
    ],
    ids=["no text", "another digest", "an endless event"],
)
def test_an_answer_that_is_none(damage: Callable[[bytes], bytes]) -> None:
    async def main(network: VirtualNetwork) -> BaseException:
        async with serving(network, Damaged(damage)):
            return await failure_of(Client(URL))

    assert isinstance(virtually(main), APIResponseError)


def test_a_body_that_is_too_deep_is_refused_here() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(BadRequestError, match="JSON"):
        Client(URL).stream(HELLO, metadata=deep)
