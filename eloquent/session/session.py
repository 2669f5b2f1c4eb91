"""A session: one server, any number of turns, and one link after another to carry them."""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from eloquent.core.beat import CLIENT_RTTS, beat_s
from eloquent.core.events import Event
from eloquent.core.liveness import (
    KEEPALIVE_S,
    PROBE_AFTER_S,
    PROBE_EVERY_S,
    TRY_RTTS,
    TRY_S,
    dead_after_s,
    probe_again_s,
)
from eloquent.core.receiver import Receiver
from eloquent.core.wire import SECRET_BYTES, TURN_ID_BYTES, Request
from eloquent.errors import (
    ConnectionFailedError,
    EloquentError,
    ServerRefusedError,
    ServerStoppingError,
)
from eloquent.link import Link, LinkUser
from eloquent.quic.connect import CONNECT_TIMEOUT_S
from eloquent.quic.connect import connect as connect_quic
from eloquent.session.retries import CLIMB_EVERY_S, CLIMB_FIRST_S, RETRY_FOR_S, Climbs, Retries
from eloquent.session.routes import WOKE_S, Machine, Route
from eloquent.session.states import (
    CANCEL_KEPT_S,
    CANCEL_SLACK_S,
    NEXT,
    OFFLINE_LOOK_S,
    SILENT_FOR_S,
    LinkState,
)
from eloquent.session.turn import ClientTurn
from eloquent.url import ServerUrl

OnState = Callable[[LinkState], None]

Connector = Callable[[ServerUrl, LinkUser, float], Awaitable[Link]]
"Makes a link: takes the server, the link's user, and how long it may take in seconds."

MIN_WAIT_S = 1e-3
"Rounding must not make a wait of no time at all, again and again."


@dataclass(frozen=True, slots=True)
class _Cancel:
    """A turn that was given up; times are the loop's."""

    request: Request
    said_s: float
    kept_until_s: float


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
        climber: Connector | None = None,
        machine: Machine | None = None,
        waits_offline: bool = False,
    ) -> None:
        """`connect_timeout_s` bounds each attempt to connect, in seconds.

        `climber` makes links of a better rung only; None: the session stays where it is. `machine`
        tells of routes and sleep; None: the one that this runs on. `waits_offline`: what is asked
        while there is no network waits for it, instead of failing.
        """
        self._url = url
        self._climber = climber
        self._climbing: asyncio.Task[None] | None = None
        self._climbs = Climbs()
        self._retries = Retries()
        self._connect_timeout_s = connect_timeout_s
        self._on_state = on_state
        self._connect = connector
        self._waits_offline = waits_offline
        self._route = Route(url.host, machine)
        self._state = LinkState.IDLE
        self._link: Link | None = None
        self._early: Link | None = None
        "A link that is still being made, on which turns were resumed already."
        self._numbers: dict[ClientTurn, int] = {}
        "The turns that are open, with their numbers on the link; -1: not asked there yet."
        self._cancels: list[_Cancel] = []
        "Turns given up on a link that may be dead: if it is, the next one tells the server."
        self._lost_s = 0.0
        "When a link was last in order."
        self._failure: EloquentError | None = None
        self._news = asyncio.Event()
        self._waiting: list[asyncio.Future[None]] = []
        self._worker: asyncio.Task[None] | None = None
        self._asked: set[ClientTurn] = set()
        "The open turns that a server has been asked: they wait for it to come back."
        self._expecting_s = 0.0
        "Since when packets are to be expected: the link's first, or the first open turn's."
        self._tried_s = float("-inf")
        "When the network had changed, or the machine woke up, and the link was tried."
        self.resumes = 0
        "How often turns that had been asked went on over another link."

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
        try:
            await future
        finally:
            if future in self._waiting:
                self._waiting.remove(future)

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

    def detach(self, turn: ClientTurn) -> None:
        """Hear no more of a turn and leave it running, for a reader that comes later."""
        number = self._forget(turn)
        if self._link is not None and number >= 0:
            self._link.detach_turn(number)

    def fail(self, error: EloquentError) -> None:
        """Give the server up: all turns fail with `error`, those that run and those asked later."""
        if self._failure is None:
            self._failure = error
            self._give_up(error, self._numbers)
            if self._state is not LinkState.CLOSED:
                self._set_state(LinkState.IDLE)
            self._wake()

    async def close(self) -> None:
        """End the session; turns that are open fail."""
        if self._state is LinkState.CLOSED:
            return
        self._set_state(LinkState.CLOSED)
        closed = ConnectionFailedError("The connection was closed on this side.")
        self._give_up(closed, self._numbers)
        self._stop_climbing()
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait((self._worker,))
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    # What links say (`LinkUser`).

    def on_early(self, link: Link) -> None:
        """See `LinkUser.on_early`."""
        if self._link is None and self._early is None:
            self._early = link
            for turn in self._numbers:
                if not turn.request.body:
                    self._numbers[turn] = link.open_turn(turn.request, turn.receiver)

    def on_progress(self, link: Link, turn: int, events: Sequence[Event]) -> None:
        """See `LinkUser.on_progress`."""
        if self._state in (LinkState.SILENT, LinkState.OFFLINE):
            self._news.set()
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
            self._stop_climbing()
            self._forget_told(link)
            self._link = None
            self._retries.hurry()
            if isinstance(error, ServerStoppingError):
                self._retries.on_stop()
            self._numbers = dict.fromkeys(self._numbers, -1)
            self._wake()

    # Turns.

    def _find(self, link: Link, number: int) -> ClientTurn | None:
        if link is not self._link and link is not self._early:
            return None
        return next((turn for turn, other in self._numbers.items() if other == number), None)

    def _ask(self, link: Link, turn: ClientTurn) -> None:
        self._asked.add(turn)
        self._numbers[turn] = link.open_turn(turn.request, turn.receiver)

    def _ask_new(self, link: Link) -> None:
        """Ask what was opened while the link was not in order."""
        for turn, number in list(self._numbers.items()):
            if number < 0:
                self._ask(link, turn)

    def _cancel(self, turn: ClientTurn) -> None:
        was_asked = turn in self._asked
        number = self._forget(turn)
        was_asked = was_asked or number >= 0  # early
        if self._link is not None and number >= 0:
            self._link.cancel_turn(number)
        if was_asked:
            self._forget_told(self._link)
            alive_s = _now() if self._state is LinkState.UP else self._lost_s
            request = replace(turn.request, body=b"")
            self._cancels.append(_Cancel(request, _now(), alive_s + CANCEL_KEPT_S))
            self._wake()

    def _forget_told(self, link: Link | None) -> None:
        """Forget cancels that the server has heard: the link lived on after they were said."""
        if link is not None:
            told_s = link.answered_s - link.srtt_s - CANCEL_SLACK_S
            self._cancels = [cancel for cancel in self._cancels if cancel.said_s > told_s]

    def _tell_cancels(self, link: Link) -> None:
        """Give up on a new link what was given up while there was none, or none that lived on."""
        now_s = _now()
        kept = [cancel for cancel in self._cancels if now_s < cancel.kept_until_s]
        self._cancels = [replace(cancel, said_s=now_s) for cancel in kept]
        for cancel in kept:
            request = cancel.request
            link.cancel_turn(link.open_turn(request, Receiver(offset=request.offset)))

    def _wants_link(self) -> bool:
        self._cancels = [cancel for cancel in self._cancels if _now() < cancel.kept_until_s]
        return bool(self._numbers or self._waiting or self._cancels)

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

    @property
    def _is_open(self) -> bool:
        return self._failure is None and self._state is not LinkState.CLOSED

    async def _work(self) -> None:
        """Make a link whenever one is needed, and watch the one there is."""
        self._route.look()
        noting = asyncio.ensure_future(self._route.follow(self._news.set))
        try:
            # `wait_for` may forget a cancellation (Python 3.11), so the state decides.
            while self._is_open and (self._link or self._wants_link()):
                self._news.clear()
                if self._link is not None:
                    await self._watch(self._link)
                else:
                    await self._make_link()
        finally:
            noting.cancel()
            await asyncio.wait((noting,))
        if self._failure is not None and self._link is not None:
            await self._link.close()
            self._link = None
        self._worker = None
        if self._is_open and self._wants_link():
            self._wake()  # a turn was opened after the last look
        elif self._state is not LinkState.CLOSED:
            self._set_state(LinkState.IDLE)

    async def _watch(self, link: Link) -> None:
        """Wait until there is news, or it is time to ask the server for a sign of life."""
        await self._follow_route(link)
        self._forget_told(link)
        is_tried = self._tried_s > link.answered_s
        dead_s = dead_after_s(link.srtt_s)
        if is_tried:
            since_s = self._tried_s
            dead_s = min(dead_s, TRY_S + TRY_RTTS * link.srtt_s)
        elif self._numbers or self._cancels:
            since_s = max(link.answered_s, self._expecting_s)
        else:
            since_s = link.heard_s + KEEPALIVE_S  # then the link asks by itself
        silent_s = _now() - since_s
        if silent_s >= dead_s:
            await self._do_without(link)
            return
        self._set_state(LinkState.UP)
        self._ask_new(link)
        wait_s = 0.0 if is_tried else PROBE_AFTER_S - silent_s
        if wait_s < MIN_WAIT_S:
            link.probe()
            again_s = PROBE_EVERY_S if is_tried else probe_again_s(silent_s)
            wait_s = max(min(again_s, dead_s - silent_s), MIN_WAIT_S)
        due_s = _now() + wait_s
        await self._wait_for_news(wait_s)
        if _now() - due_s > WOKE_S:  # this process was stopped: what is silent was not asked
            self._tried_s = _now()

    async def _do_without(self, dead: Link) -> None:
        """Go over to another link, if one is needed and can be had."""
        if not self._wants_link():
            await self._leave(dead)
        elif self._route.is_missing:
            self._set_state(LinkState.OFFLINE)
            await self._wait_for_news(OFFLINE_LOOK_S)
        else:
            await self._replace(dead)

    async def _leave(self, dead: Link) -> None:
        """Close a link that is dead while none is needed; the next turn makes another."""
        self._set_state(LinkState.IDLE)
        self._stop_climbing()
        self._link = None
        await dead.close()

    async def _replace(self, silent: Link) -> None:
        """Make another link beside one that is silent; the first to answer is used."""
        begun_s, silent_since = _now(), silent.answered_s
        self._set_state(LinkState.SILENT)
        making = asyncio.ensure_future(self._find_link(LinkState.SILENT))
        probed_s = float("-inf")
        try:
            while silent is self._link and silent.answered_s == silent_since and not making.done():
                await self._follow_route(silent)
                if self._state is LinkState.SILENT and _now() - begun_s >= SILENT_FOR_S:
                    self._set_state(LinkState.RECONNECTING)
                wait_s = probed_s + beat_s(_now() - begun_s, silent.srtt_s, CLIENT_RTTS) - _now()
                if wait_s < MIN_WAIT_S:
                    silent.probe()
                    probed_s = _now()
                    continue
                self._news.clear()
                news = asyncio.ensure_future(self._news.wait())
                try:
                    await asyncio.wait(
                        (making, news), timeout=wait_s, return_when=asyncio.FIRST_COMPLETED
                    )
                finally:
                    news.cancel()
        finally:
            new = await _result_or_stop(making)
        if new is not None:
            await self.switch(new)
        elif silent is self._link and silent.answered_s > silent_since:
            self._retries = Retries()
            self._set_state(LinkState.UP)

    async def switch(self, link: Link) -> None:
        """Go on over another link and close the one before."""
        if self._state is LinkState.CLOSED or self._failure is not None:
            await link.close()
            return
        before = self._link
        if before is not None:
            self._forget_told(before)
            for number in self._numbers.values():
                before.detach_turn(number)
        self._use(link)
        if before is not None:
            await before.close()

    async def _make_link(self) -> None:
        is_anew = self._asked or self._cancels
        state = LinkState.RECONNECTING if is_anew else LinkState.CONNECTING
        link = await self._find_link(state)
        if link is not None:
            self._use(link)

    async def _find_link(self, state: LinkState) -> Link | None:
        """Try to connect as long as it makes sense; None: it makes no sense, and all were told.

        The session is in `state` while it tries, and offline while no way leads to the server.
        """
        while self._wants_link():
            may_wait = self._asked or self._cancels or self._waits_offline
            if may_wait and self._route.is_missing:
                self._set_state(LinkState.OFFLINE)
                await self._route.wait(self._route.changes, OFFLINE_LOOK_S)
                continue
            if self._state is not LinkState.RECONNECTING:
                self._set_state(state)
            changes, begun_s = self._route.changes, _now()
            try:
                return await self._connect(self._url, self, self._connect_timeout_s)
            except EloquentError as error:
                self._forget_early()
                wait_s = self._retries.on_failure(
                    begun_s, _now(), is_refusal=isinstance(error, ServerRefusedError)
                )
                if self._retries.is_over:
                    self._cancels.clear()
                    self._give_up(self._why_over(error), self._numbers)
                    self._retries = Retries()
                else:
                    self._give_up(error, self._numbers.keys() - self._asked)
            if self._wants_link() and await self._route.wait(changes, wait_s):
                self._retries.hurry()
        return None

    def _why_over(self, last: EloquentError) -> EloquentError:
        if isinstance(last, ServerRefusedError):
            return last
        return ConnectionFailedError(
            f"{self._url.host} was not reached for {RETRY_FOR_S:g} s, though there is a network. "
            f"What has arrived is kept. The last attempt: {last}"
        )

    def _use(self, link: Link) -> None:
        early, self._early = self._early, None
        self.resumes += bool(self._asked)
        self._link = link
        self._retries = Retries()
        self._expecting_s, self._tried_s = _now(), float("-inf")
        self._route.note_use()
        self._set_state(LinkState.UP)
        if link is early:
            self._asked.update(turn for turn, number in self._numbers.items() if number >= 0)
        else:
            self._numbers = dict.fromkeys(self._numbers, -1)
        self._ask_new(link)
        self._tell_cancels(link)
        self._stop_climbing()
        if not link.rung.is_below_quic:
            self._climbs.on_quic(_now())
        elif self._climber is not None:
            wait_s = self._climbs.on_fall(_now())
            self._climbing = asyncio.ensure_future(self._climb(link, self._climber, wait_s))

    async def _climb(self, link: Link, climber: Connector, wait_s: float) -> None:
        """Try to go over to a better rung until one is found, or the link is no more in use."""
        is_late = wait_s > CLIMB_FIRST_S
        while True:
            await self._wait_to_climb(wait_s, is_late=is_late)
            wait_s = max(wait_s, CLIMB_EVERY_S)
            if link is not self._link:
                return
            with contextlib.suppress(EloquentError):
                better = await climber(self._url, self, self._connect_timeout_s)
                if link is self._link:
                    await self.switch(better)
                else:
                    await better.close()
                return

    async def _wait_to_climb(self, wait_s: float, *, is_late: bool) -> None:
        """Wait, or until the network changes; if the climb `is_late`, until the way is another."""
        due_s, source = _now() + wait_s, self._route.source
        while (left_s := due_s - _now()) > 0:
            has_changed = await self._route.wait(self._route.changes, left_s)
            if has_changed and (not is_late or self._route.is_another(source)):
                return

    def _stop_climbing(self) -> None:
        climbing, self._climbing = self._climbing, None
        if climbing is not None and climbing is not asyncio.current_task():
            climbing.cancel()

    def _forget_early(self) -> None:
        if self._early is not None:
            self._early = None
            self._numbers = dict.fromkeys(self._numbers, -1)

    async def _follow_route(self, link: Link) -> None:
        """After a change of the way to the server, or a sleep: go on from here, and ask at once."""
        before = self._route.source
        if not self._route.has_changed():
            return
        self._tried_s = _now()
        if self._route.source != before:
            self._climbs = Climbs()
        if self._route.source is not None and (
            self._route.source == before or await link.migrate()
        ):
            link.probe()

    async def _wait_for_news(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), timeout_s)

    def _set_state(self, state: LinkState) -> None:
        if self._failure is not None and state not in (LinkState.IDLE, LinkState.CLOSED):
            return
        if state is not self._state:
            assert state in NEXT[self._state], (self._state, state)
            if self._state is LinkState.UP:
                self._lost_s = _now()
            self._state = state
            self._on_state(state)
        if state is LinkState.UP:
            waiting, self._waiting = self._waiting, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)


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
