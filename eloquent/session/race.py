"""Which way to the server: QUIC's and WebSocket's attempts race, in the style of RFC 8305.

QUIC starts first, and the others 250 ms after it, or at once where it has just failed; the first
to be ready wins, and the others are given up. So a path that lets no UDP through costs that much
more than TCP alone would take, and after the first time nothing.
"""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Awaitable, Callable, Sequence

from eloquent.errors import ConnectionFailedError, EloquentError, ServerRefusedError
from eloquent.link import STAGGER_S, Link, LinkUser
from eloquent.quic.connect import connect as connect_quic
from eloquent.quic.qlog import QlogDirectory
from eloquent.quic.tickets import Tickets
from eloquent.url import ServerUrl

REMEMBER_S = 600.0
"For so long after QUIC has lost, WebSocket gets no handicap."

MAX_ADDRESSES = 4
"Of a name's addresses, those that QUIC tries."

Entrant = tuple[float, Callable[[], Awaitable[Link]]]
"How many seconds it starts late, and what it does."


class Race:
    """A `Connector`, and a `Climber`, that takes the best rung that the path carries."""

    def __init__(
        self, *, qlog: QlogDirectory | None = None, tickets: Tickets | None = None
    ) -> None:
        """`qlog` takes the logs of QUIC connections, `tickets` are the server's."""
        self._qlog = qlog
        self._tickets = tickets
        self._lost_s = float("-inf")
        "When QUIC last lost."

    async def __call__(self, url: ServerUrl, user: LinkUser, timeout_s: float) -> Link:
        """Connect to a server.

        Raises:
            ConnectionFailedError: the name is unknown, or no server answers within `timeout_s`
                seconds, either way (`ServerRefusedError`: what answers is no server, or not the
                right one).
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s

        async def over_tcp() -> Link:
            # Only here: it takes time to import, and most connections do without.
            from eloquent.websocket.client import connect as connect_websocket

            return await connect_websocket(url, user, deadline_s - loop.time())

        late_s = 0.0 if loop.time() - self._lost_s < REMEMBER_S else STAGGER_S
        entrants = await self._over_udp(url, user, timeout_s)
        link, failures = await _race([*entrants, (late_s, over_tcp)])
        self._lost_s = loop.time() if link is None or link.rung.is_below_quic else float("-inf")
        if link is None:
            raise _joined(failures[0], failures[-1])
        return link

    async def climb(self, url: ServerUrl, user: LinkUser, timeout_s: float) -> Link:
        """Connect by QUIC, or not at all.

        Raises:
            ConnectionFailedError: that does not work.
        """
        link, failures = await _race(await self._over_udp(url, user, timeout_s))
        if link is None:
            raise failures[0]
        self._lost_s = float("-inf")
        return link

    async def _over_udp(self, url: ServerUrl, user: LinkUser, timeout_s: float) -> list[Entrant]:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s

        def entrant(index: int, address: str) -> Entrant:
            async def over_udp() -> Link:
                left_s = deadline_s - loop.time()
                return await connect_quic(
                    url, user, left_s, address=address, qlog=self._qlog, tickets=self._tickets
                )

            return index * STAGGER_S, over_udp

        return [entrant(*item) for item in enumerate(await _addresses(url, timeout_s))]


async def _addresses(url: ServerUrl, timeout_s: float) -> list[str]:
    """Return the addresses to try."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            found = await loop.getaddrinfo(url.host, url.port, type=socket.SOCK_DGRAM)
    except TimeoutError:
        raise ConnectionFailedError(
            f"The name {url.host} was not resolved within {timeout_s:g} s. Check the network."
        ) from None
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConnectionFailedError(
            f"Cannot reach {url.host}: {reason}. Check the name and the network."
        ) from error
    return in_turn([(family, str(address[0])) for family, _, _, _, address in found])


def in_turn(found: Sequence[tuple[int, str]]) -> list[str]:
    """Return the addresses to try of those found, each with its family.

    The families take turns, as RFC 8305 section 4 asks, else the order stays.
    """
    first = [address for family, address in found if family == found[0][0]]
    other = [address for family, address in found if family != found[0][0]]
    pairs = itertools.zip_longest(dict.fromkeys(first), dict.fromkeys(other))
    mixed = [address for pair in pairs for address in pair if address is not None]
    return mixed[:MAX_ADDRESSES]


async def _race(entrants: Sequence[Entrant]) -> tuple[Link | None, list[EloquentError]]:
    """Return the first link that is ready; or None, and why each of them failed."""
    hurry = asyncio.Event()

    async def run(late_s: float, connect: Callable[[], Awaitable[Link]]) -> Link:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(hurry.wait(), late_s)
        try:
            return await connect()
        except EloquentError:
            hurry.set()  # nobody need wait for this one
            raise

    tasks = [asyncio.ensure_future(run(*entrant)) for entrant in entrants]
    winner: Link | None = None
    try:
        running = set(tasks)
        while running and winner is None:
            _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            winner = next((task.result() for task in tasks if _is_ready(task)), None)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if _is_ready(task) and task.result() is not winner:
                await task.result().close()
    if winner is not None:
        return winner, []
    return None, [_failure(task) for task in tasks]


def _is_ready(task: asyncio.Task[Link]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _failure(task: asyncio.Task[Link]) -> EloquentError:
    failure = task.exception()
    if not isinstance(failure, EloquentError):
        assert failure is not None
        raise failure
    return failure


def _joined(over_udp: EloquentError, over_tcp: EloquentError) -> EloquentError:
    """Return one error that names both reasons, and what to do once."""
    reason, _, advice = str(over_udp).rstrip(".").partition(". ")
    other, _, _ = str(over_tcp).rstrip(".").partition(". ")
    if reason == other:
        return over_udp
    what, _, todo = reason.partition(": ")
    if todo and other.endswith(f": {todo}"):
        reason = what
    are_refusals = isinstance(over_udp, ServerRefusedError) and isinstance(
        over_tcp, ServerRefusedError
    )
    kind = ServerRefusedError if are_refusals else ConnectionFailedError
    ending = f". {advice}." if advice else "."
    return kind(f"{reason}; and {other[:1].lower()}{other[1:]}{ending}")
