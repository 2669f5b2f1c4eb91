"""Tickets that one process leaves for another, and what they are for: a resume without a wait."""

import asyncio
import dataclasses
import os
from pathlib import Path

import pytest
from loopback import StartServer, saying
from rungs import RTT_S, URL, nothing, now, serving, virtually
from telling import Telling

from eloquent_client import APIConnectionError, Client
from eloquent_client.commands import resuming
from eloquent_client.saved import save_ticket, saved_tickets, take_saved_ticket
from eloquent_netem.vloop import VirtualNetwork

TOKENS = [f"token {index} " for index in range(20)]


@pytest.mark.parametrize("has_ticket", [True, False])
def test_a_resume_with_a_ticket_is_a_round_trip_faster(has_ticket: bool) -> None:
    async def main(network: VirtualNetwork) -> float:
        async with serving(network, Telling(TOKENS, 0.0)):
            async with Client(URL) as first:
                async with first.stream(messages=[]) as stream:
                    await stream.get_final_message()
                ticket = first.take_ticket()
            begun_s = now()
            async with (
                Client(URL, ticket=ticket if has_ticket else None) as second,
                second.resume(stream.token, offset=0) as resumed,
            ):
                async for _ in resumed.text_stream:
                    break
                first_s = now() - begun_s
                assert (await resumed.get_final_message()).text == "".join(TOKENS)
            return first_s

    rtts = 1 if has_ticket else 2
    assert virtually(main, nothing) == pytest.approx(rtts * RTT_S, abs=0.01)


def test_a_ticket_that_nobody_has_seen_is_used_again() -> None:
    """The attempts while no server answers must not use up what there is."""

    async def main(network: VirtualNetwork) -> list[bool]:
        async with Client(URL, connect_timeout_s=1.0) as client:
            async with serving(network, Telling(TOKENS, 0.0)):
                await client.connect()
                await asyncio.sleep(1.0)
            await asyncio.sleep(1.0)
            for _ in range(5):
                with pytest.raises(APIConnectionError):
                    await client.connect()
            return [client.take_ticket() is not None for _ in range(2)]

    assert virtually(main, nothing) == [True, False]


def test_a_saved_ticket_is_for_one_server_and_taken_once(state_home: Path) -> None:
    other = dataclasses.replace(URL, port=URL.port + 1)
    save_ticket(URL, b"ticket")
    assert take_saved_ticket(other) is None
    assert take_saved_ticket(URL) == b"ticket"
    assert take_saved_ticket(URL) is None
    save_ticket(URL, b"first")
    save_ticket(URL, b"second")
    assert take_saved_ticket(URL) == b"second"
    assert [path for path in state_home.rglob("*") if path.is_file()] == []


def test_only_its_owner_reads_a_saved_ticket() -> None:
    save_ticket(URL, b"ticket")
    (file,) = saved_tickets().iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert saved_tickets().stat().st_mode & 0o777 == 0o700
    assert URL.host not in file.name


def test_a_ticket_that_cannot_be_saved_or_read_is_no_matter(state_home: Path) -> None:
    state_home.mkdir()
    (state_home / "eloquent").write_text("in the way")
    save_ticket(URL, b"ticket")
    assert take_saved_ticket(URL) is None


def test_a_user_without_a_home_has_no_saved_tickets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "getuid", lambda: (1 << 31) - 3)
    save_ticket(URL, b"ticket")
    assert take_saved_ticket(URL) is None


async def test_resume_uses_the_ticket_that_was_saved_and_saves_the_next(
    start_server: StartServer,
) -> None:
    server = await start_server(saying("one ", "two ", "three"))
    async with Client(server.url) as first:
        async with first.stream(messages=[{"role": "user", "content": "Count"}]) as stream:
            await stream.get_final_message()
        ticket = first.take_ticket()
    assert ticket is not None
    save_ticket(server.url, ticket)
    async with resuming(server.url) as client:
        async with client.resume(stream.token, offset=0) as resumed:
            assert (await resumed.get_final_message()).text == "one two three"
        assert take_saved_ticket(server.url) is None, "it was used"
    next_ticket = take_saved_ticket(server.url)
    assert next_ticket not in (None, ticket)
