"""Session tickets and 0-RTT: what leaves with the first packet, and what repeating it does."""

import asyncio
import datetime
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aioquic.tls import CipherSuite, SessionTicket
from session_world import (
    CERTIFICATE,
    PORT,
    SERVER,
    URL,
    FakeMachine,
    World,
    first_events,
    in_world,
    now,
    read,
    tokens,
)
from telling import Telling
from virtual_hosts import Inbox, opened

from eloquent.core.receiver import Receiver
from eloquent.core.wire import Request
from eloquent.quic.connect import QuicLink, connect
from eloquent.quic.tickets import TicketBook, Tickets
from eloquent.serving import Reader
from eloquent.session.session import Session
from eloquent.url import ServerUrl

ALL = "".join(tokens(100))
RTT_S = 0.1


class Noting(Telling):
    """Tells, and notes when which request came."""

    def __init__(self) -> None:
        super().__init__(tokens(100), 0.05)
        self.requests: list[tuple[float, Request]] = []

    def on_request(self, reader: Reader) -> None:
        self.requests.append((now(), reader.request))
        super().on_request(reader)


def another_session(ticket: bytes | None, world: World) -> Session:
    """Return the session of another process."""
    tickets = Tickets(URL)
    if ticket is not None:
        assert tickets.load(ticket)
    return Session(URL, connector=partial(connect, tickets=tickets), machine=FakeMachine())


async def resumed(world: World, request: Request) -> tuple[str, float]:
    """Go on in another process that has the tickets; return the text, and when its first came."""
    session = another_session(world.tickets.exported(), world)
    times: list[float] = []
    begun_s = now()
    text = await read(session.open(request), times)
    await session.close()
    return text, times[0] - begun_s


async def leave(world: World, count: int) -> Request:
    """Read some of a turn, close the session as a process that ends, and return what resumes it."""
    turn = world.session.ask(b"{}")
    await first_events(turn, count)
    request = turn.request
    await world.session.close()
    await asyncio.sleep(1.0)
    return request


@pytest.mark.parametrize("has_ticket", [True, False])
def test_a_resume_from_another_process_is_a_round_trip_faster_with_a_ticket(
    has_ticket: bool,
) -> None:
    async def play(world: World) -> tuple[float, str]:
        request = await leave(world, 20)
        ticket = world.tickets.exported()
        assert ticket is not None
        session = another_session(ticket if has_ticket else None, world)
        times: list[float] = []
        begun_s = now()
        text = await read(session.open(request), times)
        await session.close()
        return times[0] - begun_s, text

    first_s, text = in_world(play)
    assert first_s == pytest.approx((1 if has_ticket else 2) * RTT_S, abs=0.02)
    assert text == "".join(tokens(100)[20:])


def test_a_ticket_that_a_restarted_server_does_not_know_costs_nothing() -> None:
    async def play(world: World) -> tuple[str, float]:
        request = await leave(world, 20)
        await world.kill_server()
        await world.start_server()
        return await resumed(world, request)

    text, first_s = in_world(play)
    assert text == "".join(tokens(100)[20:])
    assert first_s == pytest.approx(2 * RTT_S, abs=0.02)


def test_a_server_that_keeps_its_tickets_takes_them_after_a_restart(tmp_path: Path) -> None:
    async def play(world: World) -> tuple[str, float]:
        await restart(world, tmp_path)
        request = await leave(world, 20)
        await restart(world, tmp_path)
        return await resumed(world, request)

    text, first_s = in_world(play)
    assert text == "".join(tokens(100)[20:])
    assert first_s == pytest.approx(1 * RTT_S, abs=0.02)


def test_a_first_flight_that_is_repeated_to_a_restarted_server_is_not_heard(tmp_path: Path) -> None:
    async def play(world: World) -> int:
        await restart(world, tmp_path)
        request = await leave(world, 20)
        session = another_session(world.tickets.exported(), world)
        world.up.packets.clear()
        await read(session.open(request))
        await session.close()
        first_source = world.up.packets[0][0]
        flight = [data for source, data in world.up.packets if source == first_source]
        await restart(world, tmp_path)
        assert isinstance(world.service, Noting)
        before = len(world.service.requests)
        transport, _ = await opened(Inbox, remote_addr=(SERVER, PORT))
        for data in flight:
            transport.sendto(data)
        await asyncio.sleep(2.0)
        transport.close()
        return len(world.service.requests) - before

    assert in_world(play, Noting) == 0


async def restart(world: World, directory: Path) -> None:
    """Kill the server and start one that keeps its tickets in `directory`."""
    await world.kill_server()
    await world.start_server(tickets=TicketBook(file=directory / "tickets"))


def test_a_new_turn_is_never_asked_early() -> None:
    async def play(world: World) -> float:
        await leave(world, 20)
        session = another_session(world.tickets.exported(), world)
        begun_s = now()
        turn = session.ask(b"{}")
        await asyncio.sleep(RTT_S / 2)
        assert session._early is not None, "the ticket was to be used"
        assert list(session._numbers.values()) == [-1]
        await read(turn)
        await session.close()
        assert isinstance(world.service, Noting)
        return world.service.requests[-1][0] - begun_s

    assert in_world(play, Noting) >= 1.5 * RTT_S - 1e-6


def test_a_server_lets_an_early_ask_wait_for_the_end_of_the_handshake() -> None:
    """Even if a client of somebody else's makes asks early."""

    class Hasty(Session):
        def on_early(self, link: object) -> None:
            assert isinstance(link, QuicLink)
            link._connection.request(Request(bytes(16), b"{}", bytes(16)), Receiver())

    async def play(world: World) -> list[float]:
        await leave(world, 20)
        ticket = world.tickets.exported()
        assert ticket is not None
        tickets = Tickets(URL)
        tickets.load(ticket)
        session = Hasty(URL, connector=partial(connect, tickets=tickets), machine=FakeMachine())
        begun_s = now()
        await session.connect()
        await asyncio.sleep(1.0)
        await session.close()
        assert isinstance(world.service, Noting)
        return [time - begun_s for time, _ in world.service.requests if time >= begun_s]

    (asked_s,) = in_world(play, Noting)
    assert asked_s >= 1.5 * RTT_S - 1e-6


def test_a_first_flight_that_somebody_repeats_is_not_heard_and_hurts_nobody() -> None:
    async def play(world: World) -> tuple[str, int, int]:
        request = await leave(world, 20)
        session = another_session(world.tickets.exported(), world)
        world.up.packets.clear()
        reading = asyncio.ensure_future(read(session.open(request)))
        await asyncio.sleep(1.0)
        assert isinstance(world.service, Noting)
        before = len(world.service.requests)
        first_source = world.up.packets[0][0]
        flight = [data for source, data in world.up.packets if source == first_source]
        transport, inbox = await opened(Inbox, remote_addr=(SERVER, PORT))
        for data in flight:
            transport.sendto(data)
        text = await reading
        await session.close()
        transport.close()
        sent = sum(len(data) for data in flight)
        got = sum(len(data) for _, data, _ in inbox.items if isinstance(data, bytes))
        assert got <= 3 * sent
        return text, before, len(world.service.requests)

    text, before, after = in_world(play, Noting)
    assert text == "".join(tokens(100)[20:])
    assert before == after == 2


def named(names: Iterable[bytes], **fields: Any) -> list[SessionTicket]:
    """Return tickets with these names that are valid for an hour."""
    begin = datetime.datetime.now(datetime.UTC)
    defaults: dict[str, Any] = {
        "age_add": 1,
        "cipher_suite": CipherSuite.AES_128_GCM_SHA256,
        "not_valid_before": begin,
        "not_valid_after": begin + datetime.timedelta(hours=1),
        "resumption_secret": bytes(range(32)),
        "server_name": "",
        "other_extensions": [(57, b"\x00\xff")],
    }
    return [SessionTicket(**(defaults | fields), ticket=name) for name in names]


def test_a_kept_book_is_what_it_was_before_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "tickets"
    before = TicketBook(file=file)
    one, two, three = named([b"1", b"2", b"3"])
    for ticket in (one, two, three):
        before.put(ticket)
    assert before.take(b"2") == two
    after = TicketBook(file=file)
    assert after.take(b"1") == one
    assert after.take(b"2") is None
    again = TicketBook(file=file)
    assert len(again) == 1
    assert again.take(b"3") == three
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_kept_book_forgets_what_is_no_longer_valid(tmp_path: Path) -> None:
    long_ago = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    book = TicketBook(file=tmp_path / "tickets")
    for ticket in named([b"1"], not_valid_after=long_ago) + named([b"2"]):
        book.put(ticket)
    after = TicketBook(file=tmp_path / "tickets")
    assert len(after) == 1
    assert after.take(b"1") is None


@pytest.mark.parametrize("count", range(1, 12))
def test_a_kept_book_stays_bounded_and_no_ticket_that_was_shown_comes_back(
    count: int, tmp_path: Path
) -> None:
    file = tmp_path / "tickets"
    names = [str(number).encode() for number in range(count)]
    book = TicketBook(limit=3, file=file)
    for number, ticket in enumerate(named(names)):
        book.put(ticket)
        if number % 2:
            assert book.take(ticket.ticket) is not None
    assert sum(path.read_bytes().count(b"\n") for path in tmp_path.iterdir()) <= 2 * 3
    after = TicketBook(limit=3, file=file)
    valid = [name for name in names if book.take(name) is not None]
    kept = [name for name in names if after.take(name) is not None]
    assert kept == valid[-len(kept) :]
    assert len(kept) >= min(len(valid), 2)


def test_a_kept_book_that_was_cut_short_or_is_none_is_read_as_far_as_it_goes(
    tmp_path: Path,
) -> None:
    file = tmp_path / "tickets"
    book = TicketBook(file=file)
    for ticket in named([b"1", b"2"]):
        book.put(ticket)
    whole = file.read_bytes()
    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        assert len(TicketBook(file=file)) <= 2
    file.write_bytes(whole[:-10])
    book = TicketBook(file=file)
    for ticket in named([b"3"]):
        book.put(ticket)
    after = TicketBook(file=file)
    assert [after.take(name) is not None for name in (b"1", b"2", b"3")] == [True, False, True]
    file.write_bytes(b"\x00\xff not tickets\n\xff\n{}\n[]")
    assert len(TicketBook(file=file)) == 0


def test_a_book_that_can_no_longer_be_written_goes_on_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "state"
    directory.mkdir()
    book = TicketBook(file=directory / "tickets")
    directory.rmdir()
    for ticket in named([b"1", b"2"]):
        book.put(ticket)
    assert book.take(b"1") is not None
    assert len(caplog.records) == 1


def test_a_book_is_bounded_and_each_ticket_good_once() -> None:
    async def play(world: World) -> list[bytes]:
        await leave(world, 20)
        ticket = world.tickets.take()
        assert ticket is not None
        book = TicketBook(limit=2)
        names = [b"1", b"2", b"3"]
        for name in names:
            ticket.ticket = name
            book.put(ticket)
        assert len(book) == 2
        return [name for name in names + names if book.take(name) is not None]

    assert in_world(play) == [b"2", b"3"]


def test_a_ticket_for_another_server_or_what_is_none_is_not_taken() -> None:
    async def play(world: World) -> bytes | None:
        await leave(world, 20)
        return world.tickets.exported()

    ticket = in_world(play)
    assert ticket is not None
    assert Tickets(URL).load(ticket)
    assert not Tickets(ServerUrl(SERVER, PORT + 1, CERTIFICATE.pin)).load(ticket)
    assert not Tickets(ServerUrl(SERVER, PORT, "00" * 32)).load(ticket)
    for broken in (b"", b"\xc1", ticket[:-1], b"\x00" + ticket):
        assert not Tickets(URL).load(broken)
