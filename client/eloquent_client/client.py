"""The client: one server, one connection at a time, any number of turns on it."""

import asyncio
import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eloquent.core.wire import SECRET_BYTES, TURN_ID_BYTES, Request
from eloquent.errors import EloquentError
from eloquent.quic.connect import CONNECT_TIMEOUT_S
from eloquent.quic.qlog import QlogDirectory
from eloquent.quic.tickets import Tickets
from eloquent.session.race import Race
from eloquent.session.session import OnState, Session
from eloquent.session.states import LinkState
from eloquent.session.turn import ClientTurn
from eloquent.url import ServerUrl, parse_url
from eloquent_client.errors import APITimeoutError, BadRequestError, api_error
from eloquent_client.stream import MessageStream

ANSWER_TIMEOUT_S = 600.0
"How long a turn may take in all, connecting included."


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
        timeout_s: float = ANSWER_TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        on_link_state: OnState = lambda state: None,
        qlog_dir: Path | None = None,
        ticket: bytes | None = None,
    ) -> None:
        """`timeout_s` bounds a turn in all, `connect_timeout_s` the handshake; both in seconds.

        `on_link_state` is called with each new state of the link. `qlog_dir` is a directory for a
        log of each connection: packets, sizes and times, and no text. `ticket` is what another
        client's `take_ticket` gave: `resume` is a round trip faster with it.

        Raises:
            ConfigurationError: `url` is no server URL, or nothing can be written to `qlog_dir`.
        """
        self._url = parse_url(url) if isinstance(url, str) else url
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._on_link_state = on_link_state
        self._qlog = None if qlog_dir is None else QlogDirectory(qlog_dir)
        self._tickets = Tickets(self._url)
        if ticket is not None:
            self._tickets.load(ticket)
        self._session: Session | None = None

    @property
    def url(self) -> ServerUrl:
        """The server."""
        return self._url

    @property
    def link_state(self) -> LinkState:
        """What is known of the way to the server."""
        return self._session.state if self._session is not None else LinkState.IDLE

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self.link_state is LinkState.UP

    @property
    def rtt_ms(self) -> float | None:
        """The connection's smoothed round-trip time in milliseconds; None: not connected."""
        link = self._session.link if self._session is not None else None
        return link.srtt_s * 1e3 if link is not None else None

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
        body = {"messages": list(messages), "model": model, **parameters}
        return self._stream(_make_request(body))

    def resume(
        self, turn_id: str, secret: str, *, offset: int = 0, is_owner: bool = True
    ) -> MessageStream:
        """Return a turn that was asked before, maybe by another process or over another network.

        `turn_id` and `secret` are those of the stream that asked it, `offset` its `offset` then:
        events before it are left out. Of several readers only an owner's cancel stops the answer.
        """
        return self._stream(
            Request(bytes.fromhex(turn_id), b"", bytes.fromhex(secret), offset, is_owner)
        )

    def ask(self, request: Request) -> MessageStream:
        """Return the turn of a request that is made already: with a name, body and key of its own.

        For programs in between, as the proxy is; `stream` makes requests from messages.
        """
        return self._stream(request)

    async def connect(self) -> None:
        """Connect unless connected already; turns do it on their own.

        Raises:
            APIConnectionError: no server answers, or it is not the one that the URL's pin names.
            APITimeoutError: that took longer than `connect_timeout_s`.
            EloquentError: what `fail` was given.
        """
        await self._connect()

    def take_ticket(self) -> bytes | None:
        """Return a ticket for a client in another process, which may use it once; None: none yet.

        The server gives one with each connection. Keep it as secret as a password.
        """
        return self._tickets.exported()

    def fail(self, error: EloquentError) -> None:
        """Let all turns fail with `error`, those that run and those asked later.

        For whoever knows that the server is gone for good.
        """
        self._get_session().fail(error)

    async def close(self) -> None:
        """Close the connection; turns that still run fail."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _stream(self, request: Request) -> MessageStream:
        return MessageStream(self._open, request, timeout_s=self._timeout_s)

    def _get_session(self) -> Session:
        if self._session is None:
            race = Race(qlog=self._qlog, tickets=self._tickets)
            self._session = Session(
                self._url,
                connect_timeout_s=self._connect_timeout_s,
                on_state=self._on_link_state,
                connector=race,
                climber=race.climb,
            )
        return self._session

    async def _open(self, request: Request) -> tuple[Session, ClientTurn]:
        """Ask for a turn; a resume may leave with the first packet of the connection."""
        turn = self._get_session().open(request)
        try:
            return await self._connect(), turn
        except BaseException:
            turn.cancel()
            raise

    async def _connect(self) -> Session:
        session = self._get_session()
        try:
            # Looking up the name counts too, which the link's own deadline leaves out.
            async with asyncio.timeout(self._connect_timeout_s):
                await session.connect()
        except TimeoutError as error:
            raise APITimeoutError(
                f"No answer from {self._url.host}, port {self._url.port}, by UDP or TCP, within "
                f"{self._connect_timeout_s:g} s: no server runs there, or a firewall is in the "
                "way. Check the URL and the network."
            ) from error
        except EloquentError as error:
            raise api_error(error) from error
        return session


def _make_request(body: Mapping[str, Any]) -> Request:
    fields = {name: value for name, value in body.items() if value is not None}
    try:
        encoded = json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise BadRequestError(
            "invalid_request",
            f"The request cannot be written as JSON ({error}): give strings without lone "
            "surrogates, finite numbers, lists and dictionaries.",
        ) from error
    return Request(secrets.token_bytes(TURN_ID_BYTES), encoded, secrets.token_bytes(SECRET_BYTES))
