"""What a client knows of its link, what it gives up waiting for, and what goes on without it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from declining import Declining
from rungs import RTT_S, URL, now, serving, udp, udp_between, virtually
from telling import Telling

from eloquent_client import (
    APIConnectionError,
    APIError,
    APITimeoutError,
    Client,
    ConfigurationError,
    LinkSnapshot,
    LinkState,
    MessageStream,
    Rung,
)
from eloquent_netem.packet import Packet
from eloquent_netem.vloop import VirtualNetwork

HELLO = [{"role": "user", "content": "Hello"}]
WORDS = [f"word{number} " for number in range(100)]
TEXT = "".join(WORDS)
GAP_S = 0.05


@asynccontextmanager
async def reading(
    network: VirtualNetwork, service: Telling, client: Client
) -> AsyncIterator[MessageStream]:
    """Ask a turn whose first text has come."""
    async with serving(network, service), client, client.stream(HELLO) as stream:
        await anext(stream.text_stream)
        yield stream


def test_a_client_begins_and_ends_without_a_link() -> None:
    async def main(network: VirtualNetwork) -> tuple[LinkSnapshot, LinkSnapshot]:
        client = Client(URL)
        before = client.link
        await client.close()
        return before, client.link

    before, after = virtually(main)
    assert before == LinkSnapshot(LinkState.IDLE, None, None, 0, 0, 0)
    assert after.state is LinkState.CLOSED


def test_what_is_known_of_a_good_link() -> None:
    async def main(network: VirtualNetwork) -> tuple[LinkSnapshot, LinkSnapshot]:
        client = Client(URL)
        async with reading(network, Telling(WORDS, GAP_S), client) as stream:
            await stream.get_final_message()
            once = client.link
            async with client.stream(HELLO) as other:
                await other.get_final_message()
            return once, client.link

    once, twice = virtually(main)
    assert once.is_up
    assert once.rung is Rung.DATAGRAMS
    assert once.rtt_ms == pytest.approx(1e3 * RTT_S, rel=0.2)
    assert once.resumes == once.loss_recovered == 0
    assert once.bytes_received >= len(TEXT.encode())
    assert twice.bytes_received >= 2 * len(TEXT.encode())


def test_losses_of_all_turns_are_counted() -> None:
    async def main(network: VirtualNetwork) -> tuple[int, int]:
        client = Client(URL)
        async with reading(network, Telling(WORDS, GAP_S), client) as stream:
            await stream.get_final_message()
            return client.link.loss_recovered, stream.stats.loss_recovered

    lost, of_stream = virtually(main, udp_between(2.0, 2.3))
    assert lost == of_stream > 0


def test_a_link_below_quic_is_named() -> None:
    async def main(network: VirtualNetwork) -> Rung | None:
        client = Client(URL)
        async with reading(network, Telling(WORDS, GAP_S), client):
            return client.link.rung

    assert virtually(main, udp) is Rung.WEBSOCKET


def test_changes_of_the_link_come_in_order_and_end_with_the_client() -> None:
    said: list[LinkState] = []

    async def main(network: VirtualNetwork) -> list[LinkSnapshot]:
        client = Client(URL, on_link_state=said.append)

        async def watch() -> list[LinkSnapshot]:
            return [link async for link in client.link_changes()]

        watching = asyncio.ensure_future(watch())
        await asyncio.sleep(0)
        async with reading(network, Telling(WORDS, 0.5), client) as stream:
            assert (await stream.get_final_message()).text == TEXT
        return await watching

    links = virtually(main, lambda now, packet: 2.0 <= now < 20.0)
    states = [link.state for link in links]
    assert states[0] is LinkState.IDLE
    assert states[1:] == said
    assert states[1:3] == [LinkState.CONNECTING, LinkState.UP]
    assert states[3:] == [
        LinkState.SILENT,
        LinkState.RECONNECTING,
        LinkState.UP,
        LinkState.CLOSED,
    ]


def test_answers_that_go_on_over_another_connection_are_counted() -> None:
    service = Telling(WORDS, GAP_S)

    async def main(network: VirtualNetwork) -> tuple[str, int]:
        async with Client(URL) as client:
            async with serving(network, service):
                stream = await client.stream(HELLO).__aenter__()
                await anext(stream.text_stream)
            async with serving(network, service):
                return (await stream.get_final_message()).text, client.link.resumes

    assert virtually(main) == (TEXT, 1)


def test_a_slow_model_is_told_from_a_dead_link() -> None:
    def main_with(client: Client, gap_s: float) -> APITimeoutError:
        async def main(network: VirtualNetwork) -> APITimeoutError:
            async with reading(network, Telling(WORDS, gap_s), client) as stream:
                with pytest.raises(APITimeoutError) as error:
                    await stream.get_final_message()
                assert stream.text == WORDS[0]
                return error.value

        return virtually(main, lambda now, packet: now > 2.0 and gap_s < 9.0)

    slow = main_with(Client(URL, idle_timeout_s=8.0), 9.0)
    assert slow.link_state is LinkState.UP
    assert "the model that is slow" in str(slow)
    dead = main_with(Client(URL, idle_timeout_s=8.0), 5.0)
    assert dead.link_state is LinkState.SILENT
    assert "link is silent" in str(dead)


def test_what_comes_in_time_is_waited_for() -> None:
    async def main(network: VirtualNetwork) -> str:
        client = Client(URL, idle_timeout_s=8.0)
        async with reading(network, Telling(WORDS[:9], 7.0), client) as stream:
            return (await stream.get_final_message()).text

    assert virtually(main) == "".join(WORDS[:9])


def test_waiting_to_ask_again_is_not_idle_time() -> None:
    async def main(network: VirtualNetwork) -> str:
        client = Client(URL, idle_timeout_s=2.0)
        async with reading(network, Declining(("overloaded", 10.0)), client) as stream:
            return (await stream.get_final_message()).text

    assert virtually(main) == "yes"


def test_a_turn_that_takes_too_long_is_cancelled() -> None:
    service = Telling(WORDS, 1.0)

    async def main(network: VirtualNetwork) -> tuple[APITimeoutError, float]:
        client = Client(URL, timeout_s=10.0)
        async with reading(network, service, client) as stream:
            with pytest.raises(APITimeoutError, match="within 10 s") as error:
                await stream.get_final_message()
            ended_s = now()
            await asyncio.sleep(1.0)
            assert service.cancelled
            return error.value, ended_s

    error, ended_s = virtually(main)
    assert error.link_state is LinkState.UP
    assert ended_s == pytest.approx(10.0)


def test_a_detached_answer_goes_on_while_the_client_is_there() -> None:
    service = Telling(WORDS, GAP_S)

    async def main(network: VirtualNetwork) -> str:
        client = Client(URL)
        async with serving(network, service), client:
            async with client.stream(HELLO) as stream:
                await anext(stream.text_stream)
                stream.detach()
            return (await stream.get_final_message()).text

    assert virtually(main) == TEXT
    assert not service.cancelled


def test_a_detached_answer_outlives_the_client_and_its_token_reads_the_rest() -> None:
    service = Telling(WORDS, GAP_S)

    async def main(network: VirtualNetwork) -> tuple[str, str, str]:
        async with serving(network, service):
            async with Client(URL) as client, client.stream(HELLO) as stream:
                for _ in range(10):
                    await asyncio.sleep(10 * GAP_S)
                stream.detach()
                token = stream.token
            with pytest.raises(APIError):
                await stream.get_final_message()
            async with Client(URL) as other:
                async with other.resume(token) as rest:
                    message = await rest.get_final_message()
                    assert rest.stats.missing == rest.stats.duplicates == 0
                async with other.resume(token, offset=0) as whole:
                    return stream.text, message.text, (await whole.get_final_message()).text

    first, rest, whole = virtually(main)
    assert first + rest == whole == TEXT
    assert first
    assert not service.cancelled


def test_a_detached_answer_that_is_closed_is_cancelled() -> None:
    service = Telling(WORDS, GAP_S)

    async def main(network: VirtualNetwork) -> None:
        async with reading(network, service, Client(URL)) as stream:
            stream.detach()
            await stream.close()
            await asyncio.sleep(1.0)

    virtually(main)
    assert service.cancelled


def test_a_client_that_closes_fails_the_others() -> None:
    service = Telling(WORDS, GAP_S)

    async def main(network: VirtualNetwork) -> None:
        client = Client(URL)
        async with reading(network, service, client) as stream:
            await client.close()
            with pytest.raises(APIConnectionError, match="closed on this side"):
                await stream.get_final_message()
            await asyncio.sleep(1.0)

    virtually(main)
    assert service.cancelled


@pytest.mark.parametrize("steps", range(12))
def test_a_client_whose_close_is_cancelled_is_closed(steps: int) -> None:
    async def main(network: VirtualNetwork) -> LinkSnapshot:
        client = Client(URL)
        async with serving(network, Telling(WORDS, GAP_S)):
            await client.connect()
            closing = asyncio.create_task(client.close())
            for _ in range(steps):
                await asyncio.sleep(0)
            closing.cancel()
            await asyncio.wait((closing,))
            await client.close()
            return client.link

    assert virtually(main).rung is None


def test_a_token_has_nothing_of_the_key() -> None:
    async def main(network: VirtualNetwork) -> str:
        async with reading(network, Telling(WORDS, GAP_S), Client(URL, key="sesame")) as stream:
            assert stream.token == f"{stream.turn_id}:{stream.secret}:{stream.offset}"
            assert stream.offset > 0
            return repr(stream._request) + stream.token

    assert "sesame" not in virtually(main)


@pytest.mark.parametrize(
    "token", ["", "0" * 64, f"{'0' * 32}:{'g' * 32}", f"{'0' * 32}:{'0' * 32}:-1", "x:y:z"]
)
def test_what_is_no_token_is_refused(token: str) -> None:
    with pytest.raises(ConfigurationError, match="no name of a turn"):
        Client(URL).resume(token)


def test_a_turns_name_is_a_token_from_its_beginning() -> None:
    client = Client(URL)
    assert client.resume(f"{'0' * 32}:{'1' * 32}").offset == 0
    assert client.resume(f"{'0' * 32}:{'1' * 32}:17").offset == 17
    with pytest.raises(ConfigurationError, match="no name of a turn"):
        client.resume(f"{'0' * 32}:{'1' * 32}", offset=-1)


@pytest.mark.parametrize("key", ["k" * 257, "é" * 129, "\ud800"])
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigurationError, match="key"):
        Client(URL, key=key)


def test_a_resume_that_cannot_connect_at_first_leaves_the_answer_alone() -> None:
    """With a ticket it is asked before the connection is made, so giving that up could cancel."""
    service = Telling(WORDS, GAP_S)
    gone_s = float("inf")

    def outage(now: float, packet: Packet) -> bool:
        return gone_s <= now < gone_s + 1.2

    async def main(network: VirtualNetwork) -> tuple[str, str]:
        nonlocal gone_s
        async with serving(network, service):
            async with Client(URL) as client, client.stream(HELLO) as stream:
                await anext(stream.text_stream)
                await asyncio.sleep(1.0)
                stream.detach()
            ticket = client.take_ticket()
            assert ticket is not None
            gone_s = now()
            other = Client(URL, ticket=ticket, connect_timeout_s=1.0)
            async with other, other.resume(stream.token) as rest:
                return stream.text, (await rest.get_final_message()).text

    first, rest = virtually(main, outage)
    assert first + rest == TEXT
    assert not service.cancelled


def test_a_callback_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def on_link_state(state: LinkState) -> None:
        raise ZeroDivisionError(f"at {state.value}")

    async def main(network: VirtualNetwork) -> str:
        client = Client(URL, on_link_state=on_link_state)
        async with reading(network, Telling(WORDS, GAP_S), client) as stream:
            return (await stream.get_final_message()).text

    assert virtually(main) == TEXT
    assert "at up" in caplog.text
