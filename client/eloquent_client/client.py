"""The client: one server, one connection at a time, any number of turns on it."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from random import Random
from secrets import token_bytes
from types import TracebackType
from typing import Any, Self

from eloquent.core.wire import MAX_KEY_BYTES, SECRET_BYTES, TURN_ID_BYTES, Request
from eloquent.errors import ConfigurationError, EloquentError
from eloquent.quic.connect import CONNECT_TIMEOUT_S
from eloquent.quic.qlog import QlogDirectory
from eloquent.quic.tickets import Tickets
from eloquent.session.race import Race
from eloquent.session.session import Session
from eloquent.session.states import LinkState
from eloquent.session.turn import ClientTurn
from eloquent.url import ServerUrl, parse_url
from eloquent_client.errors import APITimeoutError, BadRequestError, ClientClosedError, translated
from eloquent_client.messages import LinkSnapshot
from eloquent_client.retries import MAX_RETRIES
from eloquent_client.running import Running
from eloquent_client.stream import MessageStream, Patience

ANSWER_TIMEOUT_S = 600.0
"How long a turn may take in all, connecting included."

_TOKEN = re.compile(r"([0-9a-f]{32}):([0-9a-f]{32})(?::([0-9]{1,18}))?")
"See `MessageStream.token`; without an offset it is 0."


class Client:
    """A server to chat with.

    It connects when the first turn is asked, and again whenever the connection is dead; turns go
    on where they were. Turns may run at the same time. To be used on one event loop::

        async with Client("eloquent://localhost:4433#sha256=...") as client:
            async with client.stream(messages=[{"role": "user", "content": "Hello"}]) as stream:
                async for text in stream.text_stream:
                    print(text, end="")
    """

    def __init__(
        self,
        url: str | ServerUrl,
        *,
        key: str = "",
        timeout_s: float = ANSWER_TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        idle_timeout_s: float | None = None,
        max_retries: int = MAX_RETRIES,
        on_link_state: Callable[[LinkState], None] = lambda state: None,
        qlog_dir: Path | None = None,
        ticket: bytes | None = None,
        rng: Random | None = None,
    ) -> None:
        """`timeout_s` bounds a turn in all, `connect_timeout_s` each attempt to connect.

        `key` says who asks, where the server wants to know. `idle_timeout_s` bounds the time
        between two events of an answer, whoever is to blame for it; None: nothing does. All are in
        seconds. `max_retries` is how often a turn is asked again, under the same id, when no
        connection could be made or the server declined it for now; waiting for a network does not
        count, and with 0 it is not waited for. `rng` gives the jitter of the waits before.

        `on_link_state` is called with each new state of the link. `qlog_dir` is a directory for a
        log of each connection: packets, sizes and times, and no text. `ticket` is what another
        client's `take_ticket` gave: `resume` is a round trip faster with it.

        Raises:
            ConfigurationError: `url` is no server URL, `key` is no key, or nothing can be written
                to `qlog_dir`.
        """
        self._url = parse_url(url) if isinstance(url, str) else url
        self._key = checked_key(key)
        self._connect_timeout_s = connect_timeout_s
        jitter = Random() if rng is None else rng  # noqa: S311 (no secret)
        self._patience = Patience(timeout_s, idle_timeout_s, max_retries, jitter)
        self._on_link_state = on_link_state
        self._qlog = None if qlog_dir is None else QlogDirectory(qlog_dir)
        self._tickets = Tickets(self._url)
        if ticket is not None:
            self._tickets.load(ticket)
        self._session: Session | None = None
        self._running = Running()
        self._watching: set[asyncio.Queue[LinkSnapshot]] = set()
        self._is_closed = False
        self._closing: asyncio.Future[None] | None = None

    @property
    def url(self) -> ServerUrl:
        """The server."""
        return self._url

    @property
    def link(self) -> LinkSnapshot:
        """What is known of the link to the server now."""
        session = self._session
        link = None if session is None else session.link
        if self._is_closed:
            state = LinkState.CLOSED
        else:
            state = LinkState.IDLE if session is None else session.state
        return LinkSnapshot(
            state=state,
            rung=None if link is None else link.rung,
            rtt_ms=None if link is None else link.srtt_s * 1e3,
            resumes=0 if session is None else session.resumes,
            loss_recovered=self._running.loss_recovered,
            bytes_received=self._running.bytes_received,
        )

    async def link_changes(self) -> AsyncIterator[LinkSnapshot]:
        """Give the link as it is now, and whenever its state changes, until the client closes."""
        changes: asyncio.Queue[LinkSnapshot] = asyncio.Queue()
        changes.put_nowait(self.link)
        self._watching.add(changes)
        try:
            state = None
            while state is not LinkState.CLOSED:
                snapshot = await changes.get()
                state = snapshot.state
                yield snapshot
        finally:
            self._watching.discard(changes)

    def stream(
        self,
        messages: Iterable[Mapping[str, Any]],
        model: str | None = None,
        **parameters: Any,
    ) -> MessageStream:
        """Return a turn, which is asked when it is entered with `async with`.

        `messages` are OpenAI's: `{"role": "user", "content": "..."}`. `model` None is the server's
        default. `parameters` are the other fields of OpenAI's chat body that the server takes
        (`temperature`, `max_tokens`, `seed`, ...); a field that is None is left out.

        Raises:
            BadRequestError: the request cannot be written as JSON.
        """
        body = _encoded({"messages": list(messages), "model": model, **parameters})
        turn_id, secret = token_bytes(TURN_ID_BYTES), token_bytes(SECRET_BYTES)
        return self.ask(Request(turn_id, body, secret, key=self._key))

    def resume(
        self, token: str, *, offset: int | None = None, is_owner: bool = True
    ) -> MessageStream:
        """Return a turn that was asked before, maybe by another process or over another network.

        `token` is what the stream that asked it had as its `token`; events before the token's
        offset are left out. `offset` takes its place, and 0 is the whole answer. Of several readers
        only an owner's cancel stops the answer.

        Raises:
            ConfigurationError: `token` is none.
        """
        match = _TOKEN.fullmatch(token)
        if match is None or (offset is not None and offset < 0):
            raise ConfigurationError(
                "That is no name of a turn: it has 32 hexadecimal digits, a colon, 32 more, and "
                "perhaps a colon and an offset, which counts bytes from 0 on."
            )
        turn_id, secret = bytes.fromhex(match[1]), bytes.fromhex(match[2])
        start = int(match[3] or 0) if offset is None else offset
        return self.ask(Request(turn_id, b"", secret, start, is_owner, self._key))

    def ask(self, request: Request) -> MessageStream:
        """Return a turn for a request that is made already; it has its own key, or none."""
        return MessageStream(
            request,
            open_turn=self._open,
            link_state=lambda: self.link.state,
            patience=self._patience,
            running=self._running,
        )

    async def connect(self) -> None:
        """Connect unless connected already; turns do it on their own, and try more than once.

        Raises:
            APIConnectionError: no server answers, or it is not the one that the URL's pin names.
            APITimeoutError: that took longer than `connect_timeout_s`.
            ClientClosedError: that.
            EloquentError: what `fail` was given.
        """
        with translated():
            await self._connect(self._get_session())

    def take_ticket(self) -> bytes | None:
        """Return a ticket for a client in another process, which may use it once; None: none yet.

        The server gives one with each connection. Keep it as secret as a password.
        """
        return self._tickets.exported()

    def fail(self, error: EloquentError) -> None:
        """Let all turns fail with `error`, those that run and those asked later.

        For whoever knows that the server is gone for good.
        """
        if not self._is_closed:
            self._get_session().fail(error)

    async def close(self) -> None:
        """Close the connection for good; turns that still run fail, unless they are detached.

        It is closed even if the wait for that is cancelled.
        """
        if not self._is_closed:
            self._is_closed = True
            self._running.leave_detached()
            if self._session is None:
                self._on_state(LinkState.CLOSED)
            else:
                self._closing = asyncio.ensure_future(self._session.close())
        if self._closing is not None:
            await asyncio.shield(self._closing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _get_session(self) -> Session:
        if self._is_closed:
            raise ClientClosedError
        if self._session is None:
            race = Race(qlog=self._qlog, tickets=self._tickets)
            self._session = Session(
                self._url,
                connect_timeout_s=self._connect_timeout_s,
                on_state=self._on_state,
                connector=race,
                climber=race.climb,
                waits_offline=self._patience.max_retries > 0,
            )
        return self._session

    def _on_state(self, state: LinkState) -> None:
        snapshot = self.link
        for changes in self._watching:
            changes.put_nowait(snapshot)
        # Not from here: what it raises is no matter of the session's.
        asyncio.get_running_loop().call_soon(self._on_link_state, state)

    async def _open(self, request: Request) -> tuple[Session, ClientTurn]:
        """Ask for a turn; a resume may leave with the first packet of the connection."""
        session = self._get_session()
        turn = session.open(request)
        try:
            await self._connect(session)
        except BaseException:
            if not request.body:
                session.detach(turn)  # it was to be read again: nobody has given the answer up
            turn.cancel()
            raise
        return session, turn

    async def _connect(self, session: Session) -> None:
        while True:
            try:
                # Looking up the name counts too, which the link's own deadline leaves out.
                async with asyncio.timeout(self._connect_timeout_s):
                    await session.connect()
            except TimeoutError as error:
                is_offline = session.state is LinkState.OFFLINE
                if is_offline and self._patience.max_retries > 0:
                    continue
                raise APITimeoutError(self._why_no_answer(), session.state) from error
            return

    def _why_no_answer(self) -> str:
        return (
            f"No answer from {self._url.host}, port {self._url.port}, by UDP or TCP, within "
            f"{self._connect_timeout_s:g} s: no server runs there, or a firewall is in the way. "
            "Check the URL and the network."
        )


def checked_key(key: str) -> str:
    """Return `key` if it can be sent.

    Raises:
        ConfigurationError: it cannot.
    """
    try:
        size = len(key.encode())
    except UnicodeEncodeError as error:
        raise ConfigurationError("The key is no text: it has lone surrogates.") from error
    if size > MAX_KEY_BYTES:
        raise ConfigurationError(
            f"The key has {size} bytes, and {MAX_KEY_BYTES} are allowed: is it another file?"
        )
    return key


def _encoded(body: Mapping[str, Any]) -> bytes:
    fields = {name: value for name, value in body.items() if value is not None}
    try:
        return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequestError(
            "invalid_request",
            f"The request cannot be written as JSON ({error}): give strings without lone "
            "surrogates, finite numbers, lists and dictionaries.",
        ) from error
