"""Clients and servers of different releases: old with new and back, over each rung."""

import asyncio

import msgspec
import pytest
from declining import Declining
from rungs import URL, Drops, nothing, serving, udp, virtually

from eloquent.core.varint import decode_varint
from eloquent.core.wire import (
    Rejected,
    Request,
    UnsupportedVersionError,
    decode_request,
    encode_reply,
    encode_request,
)
from eloquent_client import BadRequestError, Client, Message
from eloquent_netem.vloop import VirtualNetwork

HELLO = [{"role": "user", "content": "Hello"}]
OVER = pytest.mark.parametrize("drops", [nothing, udp], ids=["QUIC", "WebSocket"])
OLD = 2
"The version that has no keys."


def version_of(request: bytes) -> int:
    decoded = decode_varint(request, 0)
    assert decoded is not None
    return decoded[0]


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Take note of the versions in which a server is asked."""
    seen: list[int] = []

    def noting(data: bytes) -> Request:
        seen.append(version_of(data))
        return decode_request(data)

    for module in ("eloquent.quic.server", "eloquent.core.channel_server"):
        monkeypatch.setattr(f"{module}.decode_request", noting)
    return seen


@pytest.fixture
def old_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let servers know the old version alone, and say what they said then."""

    def decode(data: bytes) -> Request:
        version = version_of(data)
        if version != OLD:
            raise UnsupportedVersionError(
                f"The request is of protocol version {version}, and this server speaks version "
                f"{OLD}: use a client and a server of the same release."
            )
        return decode_request(data)

    for module in ("eloquent.quic.server", "eloquent.core.channel_server"):
        monkeypatch.setattr(f"{module}.decode_request", decode)


@pytest.fixture
def old_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clients write the old version alone."""

    def encode(request: Request) -> bytes:
        return encode_request(request, OLD)

    for module in ("eloquent.quic.client", "eloquent.core.channel_client"):
        monkeypatch.setattr(f"{module}.encode_request", encode)


def ask(service: Declining, drops: Drops, **options: str) -> Message:
    async def main(network: VirtualNetwork) -> Message:
        async with (
            serving(network, service),
            Client(URL, **options) as client,  # type: ignore[arg-type]
            client.stream(HELLO) as stream,
        ):
            return await stream.get_final_message()

    return virtually(main, drops)


@OVER
def test_a_request_is_of_the_oldest_version_that_can_say_it(
    drops: Drops, versions: list[int]
) -> None:
    service = Declining()
    assert ask(service, drops).text == "yes"
    assert ask(service, drops, key="sesame").text == "yes"
    assert versions == [OLD, OLD + 1]
    assert [request.key for request in service.requests] == ["", "sesame"]


@OVER
@pytest.mark.usefixtures("old_client")
def test_an_old_client_is_served_by_a_new_server(drops: Drops, versions: list[int]) -> None:
    service = Declining()
    assert ask(service, drops).text == "yes"
    assert versions == [OLD]


@OVER
@pytest.mark.usefixtures("old_server")
def test_a_new_client_is_served_by_an_old_server(drops: Drops) -> None:
    assert ask(Declining(), drops).text == "yes"


@OVER
@pytest.mark.usefixtures("old_server")
def test_a_server_that_is_too_old_for_keys_is_named_so(drops: Drops) -> None:
    service = Declining()
    with pytest.raises(BadRequestError, match="too old for keys") as error:
        ask(service, drops, key="sesame")
    assert error.value.code == "unsupported_version"
    assert not service.requests, "and it is not asked again without the key"


def test_an_old_client_reads_a_refusal_that_says_when_to_ask_again() -> None:
    class OldBody(msgspec.Struct, array_like=True, frozen=True):
        code: str
        message: str

    reply = encode_reply(Rejected("rate_limited", "Slowly.", 2.5))
    length = decode_varint(reply, 1)
    assert length is not None
    body = msgspec.msgpack.decode(reply[length[1] :], type=OldBody)
    assert (body.code, body.message) == ("rate_limited", "Slowly.")


@OVER
def test_a_resume_has_the_key_again(drops: Drops, versions: list[int]) -> None:
    service = Declining()

    async def main(network: VirtualNetwork) -> str:
        async with serving(network, service):
            async with Client(URL, key="sesame") as client, client.stream(HELLO) as stream:
                await stream.get_final_message()
            async with (
                Client(URL, key="sesame") as other,
                other.resume(stream.token, offset=0) as again,
            ):
                return (await again.get_final_message()).text

    assert virtually(main, drops) == "yes"
    assert versions == [OLD + 1] * 2
    assert {request.key for request in service.requests} == {"sesame"}
    assert service.requests[1].body == b""


def test_a_cancel_that_is_told_later_has_the_key() -> None:
    """A turn that was given up while the link was dead is given up over the next, by its owner."""
    service = Declining(tokens=["one "] * 100, gap_s=0.5)

    async def main(network: VirtualNetwork) -> None:
        async with serving(network, service), Client(URL, key="sesame") as client:
            async with client.stream(HELLO) as stream:
                await anext(stream.text_stream)
                while client.link.is_up:  # noqa: ASYNC110  (nothing passes from then on)
                    await asyncio.sleep(0.1)
            await asyncio.sleep(30.0)

    virtually(main, lambda now, packet: 1.0 < now < 20.0)
    assert service.cancelled
    assert {request.key for request in service.requests} == {"sesame"}
    assert len(service.requests) > 1
