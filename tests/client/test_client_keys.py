"""The client and a real server that knows keys and limits."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from loopback import DEADLINE_S, HOST, saying

from eloquent.quic.certificate import ServerCertificate
from eloquent.quic.listen import listen
from eloquent.url import ServerUrl
from eloquent_client import (
    AuthenticationError,
    Client,
    NotFoundError,
    RateLimitError,
)
from eloquent_server.admission import Gate
from eloquent_server.keys import KeyFile, entry_for, new_key
from eloquent_server.store import TokenStore
from eloquent_server.turns import TurnHandler, TurnHub

HELLO = [{"role": "user", "content": "Hello"}]
ALICE, BOB = new_key(), new_key()


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Let Alice in, who may ask twice a minute, and Bob."""
    path = tmp_path / "keys.toml"
    alice = entry_for(ALICE, "alice") + "\nrequests_per_minute = 2\n"
    path.write_text(f"{alice}\n{entry_for(BOB, 'bob')}\n")
    path.chmod(0o600)
    return path


@asynccontextmanager
async def serving(
    handler: TurnHandler, certificate: ServerCertificate, keys: Path
) -> AsyncIterator[ServerUrl]:
    hub = TurnHub(handler, TokenStore.open(None), admission=Gate(KeyFile(keys)))
    listener = await listen(HOST, 0, certificate=certificate, service=hub)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield ServerUrl(HOST, listener.port, certificate.pin)
    finally:
        await hub.close()
        await listener.close()


async def ask(client: Client) -> str:
    async with client.stream(HELLO) as stream:
        return (await stream.get_final_message()).text


@pytest.mark.parametrize("key", ["", "wrong", ALICE + "x"], ids=["none", "wrong", "almost"])
async def test_who_has_no_key_is_told(key: str, certificate: ServerCertificate, keys: Path) -> None:
    async with (
        serving(saying("yes"), certificate, keys) as url,
        Client(url, key=key) as client,
    ):
        with pytest.raises(AuthenticationError) as error:
            await ask(client)
    assert error.value.code == "unauthorized"


async def test_who_has_one_is_served_and_reads_no_others_turns(
    certificate: ServerCertificate, keys: Path
) -> None:
    async with (
        serving(saying("yes"), certificate, keys) as url,
        Client(url, key=ALICE) as alice,
        Client(url, key=BOB) as bob,
    ):
        async with alice.stream(HELLO) as stream:
            assert (await stream.get_final_message()).text == "yes"
        async with alice.resume(stream.token, offset=0) as again:
            assert (await again.get_final_message()).text == "yes"
        with pytest.raises(NotFoundError) as error:
            async with bob.resume(stream.token, offset=0) as foreign:
                await foreign.get_final_message()
    assert error.value.code == "unknown_turn"


async def test_who_asks_too_much_is_told_when_to_ask_again(
    certificate: ServerCertificate, keys: Path
) -> None:
    async with (
        serving(saying("yes"), certificate, keys) as url,
        Client(url, key=ALICE, max_retries=0) as client,
    ):
        assert [await ask(client) for _ in range(2)] == ["yes", "yes"]
        with pytest.raises(RateLimitError) as error:
            await ask(client)
    assert error.value.code == "rate_limited"
    assert 0 < error.value.retry_after_s <= 60
