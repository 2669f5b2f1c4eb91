"""The clients of a soak: each asks one turn after the other, and loses the server again and again.

What happens to a turn is drawn from a seed, before it is asked; what it must say is known, and is
held against what comes. They are bare links without a session, so that hundreds cost little.
"""

import asyncio
import json
import random
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from eloquent.core.events import End, Event, TextDelta, encode_event
from eloquent.core.receiver import Receiver
from eloquent.core.wire import SECRET_BYTES, TURN_ID_BYTES, Request
from eloquent.errors import ConnectionFailedError, EloquentError
from eloquent.link import Link
from eloquent.quic.connect import QuicLink
from eloquent.quic.connect import connect as connect_quic
from eloquent.url import ServerUrl
from eloquent.websocket.client import connect as connect_websocket

LASTS_S = (60.0, 240.0)
"""A turn takes so long if nothing happens to it, from and to. Each has a connection of its own, so
that connections have all ages they can have before memory is looked at."""
WEBSOCKET_EVERY = 10
"One client in so many is connected so; the others by QUIC."
AWAY_S = (0.0, 5.0)
"Who loses the server comes back after so long, from and to."
STOP_S = 5.0
CONNECT_S = 30.0
"On a machine that is busy a handshake may take long."

FATES = {"whole": 0.55, "lost": 0.12, "left": 0.2, "cancelled": 0.08, "gone": 0.05}
"""What happens to a turn, and to what share. Lost: its client ends without a word, and comes back
over another connection. Left: the same, with a word. Gone: without a word, and nobody comes back.
So 0.17 of them leave a connection behind that the server holds for 180 s, its idle timeout."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One turn."""

    words: list[str]
    fate: str
    at: int
    "After so many words it happens."
    away_s: float


def plan_turn(rng: random.Random, tokens_per_s: float) -> Plan:
    """Draw a turn; a token is a word."""
    number = max(2, round(tokens_per_s * rng.uniform(*LASTS_S)))
    return Plan(
        words=[f" {rng.randrange(100_000)}" for _ in range(number)],
        fate=rng.choices(list(FATES), list(FATES.values()))[0],
        at=rng.randint(1, number - 1),
        away_s=rng.uniform(*AWAY_S),
    )


class Crowd:
    """So many clients at a time."""

    def __init__(self, url: ServerUrl, clients: int, tokens_per_s: float, seed: int) -> None:
        self._url = url
        self._tokens_per_s = tokens_per_s
        self._clients = clients
        self._rng = random.Random(seed)  # noqa: S311 (a plan, no secret)
        self.ends: Counter[str] = Counter()
        "How turns went: by fate, and `wrong` for those that were not as planned."
        self.faults: list[str] = []
        "What was wrong with the first few of these."

    async def run(self, seconds: float, *, ramp_s: float) -> None:
        """Keep them busy for a time; they begin over `ramp_s`."""
        tasks = [
            asyncio.ensure_future(self._ask_on(each, ramp_s * each / self._clients))
            for each in range(self._clients)
        ]
        try:
            await asyncio.sleep(seconds)
        finally:
            left = set(tasks)
            while left:  # `wait_for` may forget a cancellation (Python 3.11)
                for task in left:
                    task.cancel()
                _, left = await asyncio.wait(left, timeout=STOP_S)

    async def _ask_on(self, number: int, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        client = _Client(self._url, is_websocket=number % WEBSOCKET_EVERY == 0)
        try:
            while True:
                plan = plan_turn(self._rng, self._tokens_per_s)
                try:
                    fault = await client.ask(plan)
                except EloquentError as error:
                    fault = str(error)
                self.ends["wrong" if fault else plan.fate] += 1
                if fault and len(self.faults) < 10:
                    self.faults.append(f"{plan.fate}: {fault}")
        finally:
            self.ends["unconnected"] += client.unconnected
            await client.leave()


class _Client:
    """One client, with a connection as long as it has one; the `LinkUser` of it."""

    def __init__(self, url: ServerUrl, *, is_websocket: bool) -> None:
        self._url = url
        self._is_websocket = is_websocket
        self._link: Link | None = None
        self._reading = _Reading(0, None)
        self.unconnected = 0
        "Attempts to connect that took too long."

    async def ask(self, plan: Plan) -> str:
        """Carry out a plan; return what went wrong, or nothing."""
        body = json.dumps({"messages": [{"role": "user", "content": "".join(plan.words)}]}).encode()
        turn_id, secret = secrets.token_bytes(TURN_ID_BYTES), secrets.token_bytes(SECRET_BYTES)
        reading = await self._read(
            Request(turn_id, body, secret), None if plan.fate == "whole" else plan.at
        )
        words = reading.words
        if plan.fate == "cancelled":
            assert self._link is not None
            self._link.cancel_turn(reading.number)
            await self.leave()
        elif plan.fate in ("lost", "gone"):
            await self._vanish()
        elif plan.fate == "left":
            await self.leave()
        if plan.fate in ("gone", "cancelled"):
            return "" if words == plan.words[: len(words)] else "other words"
        if plan.fate != "whole":
            await asyncio.sleep(plan.away_s)
            offset = reading.offset
            reading = await self._read(Request(turn_id, b"", secret, offset), None)
            words = words + reading.words
        await self.leave()
        if words != plan.words or not reading.has_ended:
            return f"{len(words)} words of {len(plan.words)}, ended: {reading.has_ended}"
        return ""

    async def leave(self) -> None:
        """End the connection in order."""
        link, self._link = self._link, None
        if link is not None:
            link.detach_turn(self._reading.number)
            await link.close()

    async def _vanish(self) -> None:
        """End the connection without a word; WebSocket cannot but say one, TCP's."""
        if isinstance(self._link, QuicLink):
            self._link.abandon()
            self._link = None
        await self.leave()

    async def _read(self, request: Request, most: int | None) -> "_Reading":
        """Read a turn to its end, or so many words."""
        while self._link is None:
            connect = connect_websocket if self._is_websocket else connect_quic
            try:
                self._link = await connect(self._url, self, CONNECT_S)
            except ConnectionFailedError:
                self.unconnected += 1  # the machine has more to do than it can
        reading = self._reading = _Reading(request.offset, most)
        reading.number = self._link.open_turn(request, reading.receiver)
        await reading.over
        return reading

    def on_early(self, link: Link) -> None:
        """See `LinkUser.on_early`; it never is."""

    def on_progress(self, link: Link, turn: int, events: Sequence[Event]) -> None:
        """See `LinkUser.on_progress`."""
        if link is self._link and turn == self._reading.number:
            self._reading.take(events)
            link.pump()

    def on_turn_failed(self, link: Link, turn: int, error: EloquentError) -> None:
        """See `LinkUser.on_turn_failed`."""
        if link is self._link and turn == self._reading.number:
            self._reading.fail(error)

    def on_link_ended(self, link: Link, error: EloquentError) -> None:
        """See `LinkUser.on_link_ended`."""
        if link is self._link:
            self._link = None
            self._reading.fail(error)


class _Reading:
    """What has come of one turn over one connection."""

    def __init__(self, offset: int, most: int | None) -> None:
        self.receiver = Receiver(offset=offset)
        self.receiver.on_taken(offset)
        self.number = -1
        "The turn's on the link."
        self.words: list[str] = []
        self.offset = offset
        "Up to which byte of the log."
        self.has_ended = False
        "Whether it came to its end, and a good one."
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._most = most

    def take(self, events: Sequence[Event]) -> None:
        """Take what has come, up to as many words as are wanted."""
        self.receiver.on_taken(self.receiver.contiguous)
        for event in events:
            if self.over.done():
                return
            if isinstance(event, End):
                self.has_ended = event.finish_reason == "stop"
                self.over.set_result(None)
                return
            self.offset += len(encode_event(event))
            if isinstance(event, TextDelta):
                self.words.append(event.text)
                if len(self.words) == self._most:
                    self.over.set_result(None)

    def fail(self, error: EloquentError) -> None:
        """Take note that no more comes."""
        if not self.over.done():
            self.over.set_exception(error)
