"""The turns that programs ask through the proxy, and each program's reading of one."""

import asyncio
import hashlib
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from eloquent.core.events import Event, Failure
from eloquent.core.wire import SECRET_BYTES, TURN_ID_BYTES, Request
from eloquent.errors import EloquentError, RequestError, ServerRefusedError
from eloquent.session.retries import REFUSED_FOR_S
from eloquent_client.client import Client
from eloquent_client.errors import APIConnectionError, APIResponseError, APIStatusError
from eloquent_client.proxy.link import LinkWatch
from eloquent_client.stream import MessageStream

LINK_LOST = "link_lost"
"The error code of a turn whose server was not reached within the grace time."

HELD_S = 60.0
"A turn with a name waits so long for the program to ask for it again, then it is cancelled."

MAX_HELD = 64
"Of turns with a name that nobody reads, so many are kept, the newest."

MAX_TURNS = 256
"So many run at once."

RETRY_FIRST_S = 0.25
RETRY_MAX_S = 2.0
"A failed attempt to connect is followed by the next after such waits, each twice the last."

ENDED = "The proxy was ended on this machine. Start it again, and ask again."
TOO_MANY = f"{MAX_TURNS} answers are under way through this proxy already: ask again later."
CANCELLED = "The answer was cancelled, since nobody had read it for a while. Ask again."
CLOSED = "The answer was given up by the program that asked for it."


class ProxyTurn:
    """One turn; it goes on until it is closed, whatever becomes of those who read it."""

    def __init__(self, client: Client, request: Request, grace_s: float) -> None:
        """`grace_s` is how long connecting may take."""
        self.request = request
        self.readers = 0
        self.failure: EloquentError | None = None
        "Why its answer will not be whole, once a reader was told."
        self.dropping: asyncio.TimerHandle | None = None
        self._client = client
        self._opening = asyncio.ensure_future(self._open(grace_s))

    @property
    def is_lost(self) -> bool:
        """Whether it failed on the way, so that the server may have the answer yet."""
        return isinstance(self.failure, APIConnectionError)

    async def events(self) -> AsyncGenerator[Event]:
        """Give out the answer from its start; each call does so.

        Raises:
            EloquentError: what `MessageStream` raises.
        """
        # Shielded: one program that goes takes the turn from no other.
        stream = await asyncio.shield(self._opening)
        async for event in stream:
            yield event

    async def close(self) -> None:
        """Cancel the turn if it is unfinished."""
        self._opening.cancel()
        await asyncio.wait((self._opening,))
        if not self._opening.cancelled() and self._opening.exception() is None:
            await self._opening.result().close()

    async def _open(self, grace_s: float) -> MessageStream:
        """Ask as soon as there is a link; until then nothing has been asked, so it is not twice."""
        loop = asyncio.get_running_loop()
        due_s, refused_due_s, wait_s = loop.time() + grace_s, float("inf"), RETRY_FIRST_S
        while True:
            try:
                return await self._client.ask(self.request).__aenter__()
            except APIConnectionError as error:
                is_refused = isinstance(error.__cause__, ServerRefusedError)
                over_s = min(refused_due_s, loop.time() + REFUSED_FOR_S)
                refused_due_s = over_s if is_refused else float("inf")
                if loop.time() + wait_s >= min(due_s, refused_due_s):
                    raise
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, RETRY_MAX_S)


class Reading:
    """One program's reading of a turn; end it with `close`."""

    def __init__(self, turns: "Turns", turn: ProxyTurn, name: bytes | None) -> None:
        self._turns = turns
        self._turn = turn
        self._name = name
        self._events = turn.events()
        self._next: asyncio.Future[Event] | None = None
        self._since_s = asyncio.get_running_loop().time()
        self._closing: asyncio.Task[None] | None = None
        turn.readers += 1

    @property
    def turn_id(self) -> str:
        """The turn's id in hexadecimal."""
        return self._turn.request.turn_id.hex()

    async def next(self, within_s: float) -> Event | None:
        """Return the next event; None: none came `within_s`.

        Raises:
            RequestError: there will be none: `link_lost`, the reason that the server gave, or
                `cancelled`: this was closed meanwhile.
        """
        turns = self._turns
        if self._next is None:
            self._next = asyncio.ensure_future(anext(self._events))
        await asyncio.wait(
            (self._next, turns.ending), timeout=within_s, return_when=asyncio.FIRST_COMPLETED
        )
        if self._closing is not None:
            raise RequestError("cancelled", CLOSED)
        if self._next.done():
            came, self._next = self._next, None
            return self._taken(came)
        if turns.ending.done():
            raise RequestError("unavailable", ENDED)
        if turns.link.lost_s(self._since_s) >= turns.grace_s:
            raise RequestError(
                LINK_LOST,
                f"The server was not reached for {turns.grace_s:g} s (the link is "
                f"{turns.link.state.value}). What had come by then stands; ask again when there "
                "is a network.",
            )
        return None

    def _taken(self, came: asyncio.Future[Event]) -> Event:
        try:
            event = came.result()
        except StopAsyncIteration as error:
            raise RequestError("cancelled", CANCELLED) from error
        except EloquentError as error:
            self._turn.failure = error
            raise refusal(error) from error
        if isinstance(event, Failure):
            self._turn.failure = RequestError(event.code, event.message)
        return event

    async def close(self) -> None:
        """Read no more; a turn that nobody reads is cancelled, unless it has a name.

        It is done even if the wait for it is cancelled, as it is where a program goes just then.
        """
        if self._closing is None:
            self._closing = self._turns.finish(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if self._next is not None:
            self._next.cancel()
            # What it may have come to is of no interest any more.
            await asyncio.gather(self._next, return_exceptions=True)
        await self._events.aclose()
        self._turn.readers -= 1
        if not self._turn.readers:
            await self._turns.on_unread(self._turn, self._name)


class Turns:
    """All turns of a proxy."""

    def __init__(self, client: Client, link: LinkWatch, grace_s: float) -> None:
        """`grace_s` is how long an outage may last before programs are told."""
        self.link = link
        self.grace_s = grace_s
        self.ending = asyncio.get_running_loop().create_future()
        "Has a result as soon as the proxy is to end."
        self._client = client
        self._turns: set[ProxyTurn] = set()
        self._named: OrderedDict[bytes, ProxyTurn] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def running(self) -> int:
        """How many turns there are, those included that wait for their program."""
        return len(self._turns)

    def read(self, body: bytes, key: str, name: str | None) -> Reading:
        """Ask for a new turn, or read one anew that was asked by this name before.

        `name` is the program's own for its request: the same with the same body and key is the
        same turn.

        Raises:
            RequestError: there are too many turns, or the proxy is to end.
        """
        if self.ending.done():
            raise RequestError("unavailable", ENDED)
        full_name = None if name is None else _full_name(name, key, body)
        turn = None if full_name is None else self._named.get(full_name)
        if turn is None or turn.failure is not None:
            if len(self._turns) >= MAX_TURNS:
                raise RequestError("overloaded", TOO_MANY, retry_after_s=1.0)
            request = turn.request if turn is not None and turn.is_lost else _request(body, key)
            if turn is not None and full_name is not None and not turn.readers:
                self._drop(turn, full_name)  # it has failed, and another takes its place
            turn = ProxyTurn(self._client, request, self.grace_s)
            self._turns.add(turn)
        if turn.dropping is not None:
            turn.dropping.cancel()
            turn.dropping = None
        if full_name is not None:
            self._named[full_name] = turn
            self._named.move_to_end(full_name)
        return Reading(self, turn, full_name)

    async def on_unread(self, turn: ProxyTurn, name: bytes | None) -> None:
        """Cancel a turn that nobody reads; with a name, it is kept for a while."""
        is_of_use = turn.failure is None or turn.is_lost
        if name is None or not is_of_use or self._named.get(name) is not turn:
            await self._close(turn, name)
            return
        loop = asyncio.get_running_loop()
        turn.dropping = loop.call_later(HELD_S, self._drop, turn, name)
        unread = [each for each in self._named.items() if not each[1].readers]
        for old_name, old in unread[:-MAX_HELD]:
            self._drop(old, old_name)

    async def close(self) -> None:
        """Cancel all turns; programs that read get an error."""
        if not self.ending.done():
            self.ending.set_result(None)
        for turn in list(self._turns):
            await self._close(turn, None)
        self._named.clear()
        if self._closing:
            await asyncio.wait(self._closing)

    def finish(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Have this done, whether anybody waits for it or not."""
        task = asyncio.ensure_future(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return task

    def _drop(self, turn: ProxyTurn, name: bytes) -> None:
        self._forget_name(turn, name)  # at once, so that nobody is given it any more
        self.finish(self._close(turn, name))

    def _forget_name(self, turn: ProxyTurn, name: bytes | None) -> None:
        if name is not None and self._named.get(name) is turn:
            del self._named[name]

    async def _close(self, turn: ProxyTurn, name: bytes | None) -> None:
        if turn.dropping is not None:
            turn.dropping.cancel()
        self._forget_name(turn, name)
        if turn in self._turns:
            self._turns.discard(turn)
            await turn.close()


def refusal(error: EloquentError) -> RequestError:
    """Return an error of the client as a program is told of it."""
    match error:
        case APIStatusError():
            return RequestError(error.code, error.message, getattr(error, "retry_after_s", 0.0))
        case APIConnectionError():
            return RequestError(LINK_LOST, str(error))
        case APIResponseError():
            return RequestError("upstream_error", str(error))
        case _:
            return RequestError("unavailable", str(error))


def _request(body: bytes, key: str) -> Request:
    turn_id, secret = secrets.token_bytes(TURN_ID_BYTES), secrets.token_bytes(SECRET_BYTES)
    return Request(turn_id, body, secret, key=key)


def _full_name(name: str, key: str, body: bytes) -> bytes:
    """Return what tells a request from others: two with the same are one."""
    hashed = hashlib.sha256()
    for part in (name.encode(), key.encode(), body):
        hashed.update(len(part).to_bytes(8))
        hashed.update(part)
    return hashed.digest()
