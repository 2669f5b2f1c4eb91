"""A session: one server, any number of turns, and one link after another to carry them."""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence

from eloquent.core.events import Event
from eloquent.core.wire import SECRET_BYTES, TURN_ID_BYTES, Request
from eloquent.errors import ConnectionFailedError, EloquentError, ServerRefusedError
from eloquent.link import Link, LinkUser
from eloquent.quic.connect import CONNECT_TIMEOUT_S
from eloquent.quic.connect import connect as connect_quic
from eloquent.session.states import (
    DEAD_AFTER_S,
    NEXT,
    PROBE_AFTER_S,
    PROBE_EVERY_S,
    REFUSED_FOR_S,
    RETRY_FIRST_S,
    RETRY_GROWTH,
    RETRY_MAX_S,
    LinkState,
)
from eloquent.session.turn import ClientTurn
from eloquent.url import ServerUrl

OnState = Callable[[LinkState], None]

Connector = Callable[[ServerUrl, LinkUser, float], Awaitable[Link]]
"Makes a link: takes the server, the link's user, and how long it may take in seconds."


class Session:
    """Connects when it is needed, notices within 2 s that a link is dead, and goes on over another.

    Turns that are open go on where they were: nothing is lost and nothing comes twice. To be used
    on one event loop. It is the `LinkUser` of its links.
    """

    def __init__(
        self,
        url: ServerUrl,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        on_state: OnState = lambda state: None,
        connector: Connector = connect_quic,
    ) -> None:
        """`connect_timeout_s` bounds each attempt to connect, in seconds."""
        self._url = url
        self._connect_timeout_s = connect_timeout_s
        self._on_state = on_state
        self._connect = connector
        self._state = LinkState.IDLE
        self._link: Link | None = None
        self._numbers: dict[ClientTurn, int] = {}
        "The turns that are open, with their numbers on the link; -1: not asked there yet."
        self._failure: EloquentError | None = None
        self._news = asyncio.Event()
        self._waiting: list[asyncio.Future[None]] = []
        self._worker: asyncio.Task[None] | None = None
        self._asked: set[ClientTurn] = set()
        "The open turns that a server has been asked: they wait for it to come back."
        self._expecting_s = 0.0
        "Since when packets are to be expected: the link's first, or the first open turn's."

    @property
    def state(self) -> LinkState:
        """What is known of the way to the server."""
        return self._state

    @property
    def link(self) -> Link | None:
        """The connection in use, if there is one."""
        return self._link

    async def connect(self) -> None:
        """Connect unless connected already; turns do it on their own.

        Raises:
            ConnectionFailedError: no server answers, or not the right one.
            EloquentError: what `fail` was given.
        """
        self._check()
        if self._state is LinkState.UP:
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._wake()
        await future

    def ask(self, body: bytes) -> ClientTurn:
        """Ask for a new turn; `body` is an OpenAI chat body in JSON.

        Raises:
            EloquentError: the session is closed, or what `fail` was given.
        """
        return self.open(
            Request(secrets.token_bytes(TURN_ID_BYTES), body, secrets.token_bytes(SECRET_BYTES))
        )

    def open(self, request: Request) -> ClientTurn:
        """Ask for a turn, or go on with one that was asked before, maybe by another process.

        Raises:
            EloquentError: the session is closed, or what `fail` was given.
        """
        self._check()
        turn = ClientTurn(request, on_cancel=self._cancel, on_taken=self._report)
        if not self._numbers:
            self._expecting_s = _now()
        self._numbers[turn] = -1
        if self._link is not None and self._state is LinkState.UP:
            self._ask(self._link, turn)
        self._wake()
        return turn

    def fail(self, error: EloquentError) -> None:
        """Give the server up: all turns fail with `error`, those that run and those asked later."""
        if self._failure is None:
            self._failure = error
            self._give_up(error, self._numbers)
            self._wake()

    async def close(self) -> None:
        """End the session; turns that are open fail."""
        if self._state is LinkState.CLOSED:
            return
        self._set_state(LinkState.CLOSED)
        closed = ConnectionFailedError("The connection was closed on this side.")
        self._give_up(closed, self._numbers)
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait((self._worker,))
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    # What links say (`LinkUser`).

    def on_progress(self, link: Link, turn: int, events: Sequence[Event]) -> None:
        """See `LinkUser.on_progress`."""
        found = self._find(link, turn)
        if found is not None:
            found.deliver(events)
            if found.is_closed:
                self._forget(found)

    def on_turn_failed(self, link: Link, turn: int, error: EloquentError) -> None:
        """See `LinkUser.on_turn_failed`."""
        found = self._find(link, turn)
        if found is not None:
            self._forget(found)
            found.fail(error)

    def on_link_ended(self, link: Link, error: EloquentError) -> None:
        """See `LinkUser.on_link_ended`."""
        if link is self._link:
            self._link = None
            self._numbers = dict.fromkeys(self._numbers, -1)
            self._wake()

    # Turns.

    def _find(self, link: Link, number: int) -> ClientTurn | None:
        if link is not self._link:
            return None
        return next((turn for turn, other in self._numbers.items() if other == number), None)

    def _ask(self, link: Link, turn: ClientTurn) -> None:
        self._asked.add(turn)
        self._numbers[turn] = link.open_turn(turn.request, turn.receiver)

    def _cancel(self, turn: ClientTurn) -> None:
        number = self._forget(turn)
        if self._link is not None and number >= 0:
            self._link.cancel_turn(number)

    def _report(self, turn: ClientTurn) -> None:
        if self._link is not None and turn.receiver.next_time() == float("-inf"):
            self._link.pump()

    def _forget(self, turn: ClientTurn) -> int:
        """Take a turn out; return its number on the link, or -1."""
        self._asked.discard(turn)
        return self._numbers.pop(turn, -1)

    def _give_up(self, error: EloquentError, turns: Iterable[ClientTurn]) -> None:
        """Fail these turns, and whoever waits for a link."""
        for turn in list(turns):
            number = self._forget(turn)
            if self._link is not None and number >= 0:
                self._link.cancel_turn(number)
            turn.fail(error)
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_exception(error)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._state is LinkState.CLOSED:
            raise ConnectionFailedError("The session is closed: make a new one.")

    # Links.

    def _wake(self) -> None:
        self._news.set()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.ensure_future(self._work())

    async def _work(self) -> None:
        """Make a link whenever one is needed, and watch the one there is."""
        while self._failure is None and (self._numbers or self._waiting or self._link):
            self._news.clear()
            if self._link is not None:
                await self._watch(self._link)
            elif self._numbers or self._waiting:
                await self._make_link()
        if self._failure is not None and self._link is not None:
            await self._link.close()
            self._link = None
        if self._state is not LinkState.CLOSED:
            self._set_state(LinkState.IDLE)

    async def _watch(self, link: Link) -> None:
        """Wait until there is news, or it is time to ask the server for a sign of life."""
        if not self._numbers:
            await self._news.wait()
            return
        silent_s = _now() - max(link.heard_s, self._expecting_s)
        if silent_s >= DEAD_AFTER_S:
            await self._replace(link)
            return
        wait_s = PROBE_AFTER_S - silent_s
        if wait_s <= 0:
            link.probe()
            wait_s = min(PROBE_EVERY_S, DEAD_AFTER_S - silent_s)
        await self._wait_for_news(wait_s)

    async def _replace(self, silent: Link) -> None:
        """Make another link beside one that is silent; the first to say something is used."""
        self._set_state(LinkState.SILENT)
        silent_since = silent.heard_s
        making = asyncio.ensure_future(self._find_link())
        try:
            while silent is self._link and silent.heard_s == silent_since and not making.done():
                silent.probe()
                await asyncio.wait((making,), timeout=PROBE_EVERY_S)
        finally:
            new = await _result_or_stop(making)
        if silent is self._link:
            if new is None:
                self._set_state(LinkState.UP)
                return
            for number in self._numbers.values():
                silent.detach_turn(number)
            await silent.close()
        if new is not None:
            self._use(new)

    async def _make_link(self) -> None:
        self._set_state(LinkState.RECONNECTING if self._asked else LinkState.CONNECTING)
        link = await self._find_link()
        if link is not None:
            self._use(link)

    async def _find_link(self) -> Link | None:
        """Try to connect as long as it makes sense; None: it makes no sense, and all were told."""
        wait_s = RETRY_FIRST_S
        refused_since: float | None = None
        while self._numbers or self._waiting:
            try:
                return await self._connect(self._url, self, self._connect_timeout_s)
            except EloquentError as error:
                is_refusal = isinstance(error, ServerRefusedError)
                refused_since = (refused_since or _now()) if is_refusal else None
                is_gone = refused_since is not None and _now() - refused_since >= REFUSED_FOR_S
                self._give_up(
                    error, self._numbers if is_gone else self._numbers.keys() - self._asked
                )
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * RETRY_GROWTH, RETRY_MAX_S)
        return None

    def _use(self, link: Link) -> None:
        self._link = link
        self._expecting_s = _now()
        self._set_state(LinkState.UP)
        for turn in list(self._numbers):
            self._ask(link, turn)
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def _wait_for_news(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), timeout_s)

    def _set_state(self, state: LinkState) -> None:
        if state is not self._state:
            assert state in NEXT[self._state], (self._state, state)
            self._state = state
            self._on_state(state)


async def _result_or_stop(making: "asyncio.Future[Link | None]") -> Link | None:
    """Return what was made; or stop the making, and close what it made in spite of that."""
    if not making.done():
        making.cancel()
        await asyncio.wait((making,))
        if not making.cancelled() and (link := making.result()) is not None:
            await link.close()
        return None
    return making.result()


def _now() -> float:
    return asyncio.get_running_loop().time()
