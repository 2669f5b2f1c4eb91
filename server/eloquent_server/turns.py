"""Turns: they outlive the connections that read them, and the process that generates them.

A request makes a turn, or finds it: the same id is never generated twice. What is generated goes
into the turn's log, from there into the store, and only then to its readers, of which there may
be any number and none. A turn's life (`State`):

    GENERATING --the log's end--> ENDED
    GENERATING --declined before the first event--> forgotten
    GENERATING --cancelled by its owner, or no reader for `grace_s`--> ENDED ("cancelled")
    GENERATING --a fault--> ENDED ("error", a Failure before it)
    GENERATING --the store has no more room for it--> ENDED ("error", a Failure before it)
    GENERATING --the store cannot keep it--> forgotten, its readers told
    GENERATING --the server stops, and its store is kept--> GENERATING, in the next process
    GENERATING --its lease is lost--> FOLLOWED
    FOLLOWED --the log's end--> ENDED
    FOLLOWED --nobody reads it here--> forgotten
    FOLLOWED --its owner is gone, and this process becomes it--> GENERATING

An ended turn leaves the memory as soon as the store has it and nobody reads it; a request for it
brings it back. One that the store has without its end was cut off with its server: it is generated
further from where it was, or gets a Failure and its end if that is not possible. Where several
servers share a store, one of them owns a turn and generates it; the others follow it, that is, they
serve their readers from what it stores.
"""

import asyncio
import hmac
import logging
from collections.abc import Awaitable
from contextlib import aclosing

from eloquent.core.events import Failure
from eloquent.core.wire import Request
from eloquent.errors import RequestError
from eloquent.serving import Reader
from eloquent_server.admission import Admission, Gate, Principal
from eloquent_server.following import follow
from eloquent_server.opening import NOT_STORED, UNKNOWN_TURN, Opening, Openings
from eloquent_server.store_types import (
    StaleOwnerError,
    StoreError,
    StoreFullError,
    TurnRecord,
    TurnStore,
    TurnTooLargeError,
)
from eloquent_server.turn import Turn, TurnHandler, TurnKey, hash_of

__all__ = ["Turn", "TurnHandler", "TurnHub"]

GRACE_S = 120.0
"A turn that nobody reads is generated for so long."

LATE_S = 2.0
"Another process's turn is that much behind here at most."
LATE_POLL_S = 0.02

STOP_S = 1.0
"How long `close` waits for the turns' tasks."

TOO_LONG = (
    "The answer is longer than the server keeps, so it does not go on. What has come is kept; ask "
    "for a shorter one."
)
DELETED = "The turn was deleted, as its owner asked."
NOT_DELETED = (
    "The server could not delete the turn, so it is still there; its log has the reason. Ask again "
    "in a moment."
)
REPLACED = "The turn goes on over another connection of its owner."
INTERRUPTED = "The server was restarted in mid-answer; what there is of it is here. Ask again."
SHUTTING_DOWN = "The server is shutting down: ask again in a moment."
FAULT = "The server failed; its log has the reason. What has come is kept; ask again."

logger = logging.getLogger(__name__)


class TurnHub:
    """All turns of a server; a `TurnService`. Use it on one event loop."""

    def __init__(
        self,
        handler: TurnHandler,
        store: TurnStore,
        *,
        admission: Admission | None = None,
        go_on: TurnHandler | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        """`handler` generates a turn; `grace_s` is in seconds; `admission` None lets all ask.

        `go_on` generates the rest of one that has a `stored` part; None: that is not possible.
        """
        self._handler = handler
        self._go_on = go_on
        self._store = store
        self._admission = admission or Gate()
        self._grace_s = grace_s
        self._turns: dict[TurnKey, Turn] = {}
        self._openings = Openings(self, store, self._admission, self._start)
        self._tasks: set[asyncio.Task[None]] = set()
        self._of_reader: dict[Reader, Turn] = {}
        self._recovering: asyncio.Task[None] | None = None
        self._is_closed = False
        store.attend(self._on_lost, self._on_cancelled_elsewhere)
        self.resumes = 0
        "How many readers came to a turn that was there, for metrics."

    @property
    def open(self) -> int:
        """How many turns are in memory."""
        return len(self._turns)

    @property
    def unread(self) -> int:
        """How many turns are being generated though nobody reads them at the moment."""
        return sum(turn.grace is not None for turn in self._turns.values())

    @property
    def generating(self) -> int:
        """How many turns are being generated here."""
        return sum(not (turn.is_over or turn.is_elsewhere) for turn in self._turns.values())

    @property
    def readers(self) -> int:
        """How many readers are attached."""
        return len(self._of_reader)

    async def close(self, *, is_restart: bool = False) -> None:
        """End all turns; whoever reads them is told.

        With `is_restart` a hub on the same store goes on with them: their readers come back.
        """
        self._is_closed = True
        if self._recovering is not None:
            self._recovering.cancel()
        for turn in list(self._turns.values()):
            if is_restart and self._go_on is not None:
                self._put_off(turn)
            elif turn.is_waiting_to_go_on or turn.is_elsewhere:
                self._park(turn)
            else:
                self._stop(turn, "error", Failure("unavailable", SHUTTING_DOWN))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_S)
        await self._store.close()

    def recover(self) -> None:
        """Go on with the turns that were cut off with their server; to be called once."""
        if self._go_on is not None:
            self._recovering = self._spawn(self._recover())

    def on_request(self, reader: Reader) -> None:
        """See `TurnService.on_request`."""
        if self._is_closed:
            reader.reject("unavailable", SHUTTING_DOWN)
            return
        try:
            principal = self._admission.principal(reader.request.key)
        except RequestError as error:
            _reject(reader, error)
            return
        turn = self._turns.get((principal.name, reader.request.turn_id))
        if turn is not None:
            self._admit(reader, turn)
        else:
            self._open((principal.name, reader.request.turn_id), reader, principal)

    def on_cancel(self, reader: Reader) -> None:
        """See `TurnService.on_cancel`."""
        if not reader.request.is_owner:
            return
        turn = self._of_reader.get(reader)
        if turn is not None:
            self._cancel(turn)
        else:
            self._openings.cancel(reader)

    def on_gone(self, reader: Reader) -> None:
        """See `TurnService.on_gone`."""
        turn = self._of_reader.pop(reader, None)
        if turn is None:
            self._openings.remove(reader)
            return
        if reader in turn.late:
            turn.late.pop(reader).cancel()
        turn.readers.pop(reader, None)
        self._leave_memory(turn)
        if self._is_current(turn) and not turn.is_over:
            self._begin_grace(turn)

    def body_of(self, reader: Reader) -> bytes:
        """Return what was asked in a reader's turn; empty where that is not kept any more."""
        turn = self._of_reader.get(reader)
        return b"" if turn is None else turn.request.body

    def waiting_before(self, reader: Reader) -> int:
        """Return how many turns that were asked before a reader's have not begun either."""
        own, waiting = self._of_reader.get(reader), 0
        for turn in self._turns.values():
            if turn is own:
                break
            waiting += not (turn.log.written or turn.is_elsewhere)
        return waiting

    async def delete(self, request: Request) -> None:
        """Forget the turn that a request names, open or ended; who reads it is told.

        Raises:
            RequestError: there is none, or its secret is another (`unknown_turn`); `unauthorized`;
                `unavailable`: the store did not do it.
        """
        key = self._admission.principal(request.key).name, request.turn_id
        try:
            await self._delete(key, request)
        except StoreError as error:
            logger.error("turn %s cannot be deleted: %s", request.turn_id.hex(), error)
            raise RequestError("unavailable", NOT_DELETED) from error

    async def _delete(self, key: TurnKey, request: Request) -> None:
        stored = await self._store.load(*key)
        if stored is None or not hmac.compare_digest(
            hash_of(request.secret), stored.record.secret_hash
        ):
            raise RequestError("unknown_turn", UNKNOWN_TURN)
        turn = self._turns.get(key)
        if turn is not None:
            self.forget(turn, RequestError("unknown_turn", DELETED))
        await self._store.delete(*key)

    def keep(self, turn: Turn, continuation: bytes | None = None) -> bool:
        """Hand what was written to the store; readers get it when it is kept.

        Say whether the turn goes on.
        """
        offset, data = turn.handed, turn.log.written_from(turn.handed)
        turn.handed += len(data)

        def on_stored(error: StoreError | None) -> None:
            if error is None:
                self._release(turn, offset + len(data))
            else:
                self._on_not_stored(turn, error)

        if turn.is_over:
            self._release_admission(turn)
        try:
            if turn.is_over:
                self._store.close_turn(turn.record, offset, data, on_stored=on_stored)
            else:
                self._store.append(
                    turn.record, offset, data, continuation=continuation, on_stored=on_stored
                )
        except StoreError as error:
            # Of a turn with a failure nothing is stored any more, its end neither.
            is_sound = turn.record.failure is None
            if offset and is_sound and isinstance(error, TurnTooLargeError | StoreFullError):
                self._end_here(turn, offset, error)
            else:
                self._on_not_stored(turn, error)
            return False
        return True

    def decline(self, turn: Turn, error: RequestError) -> None:
        """Drop a turn to which nothing was appended; its id is free again."""
        self.forget(turn, error)
        self._store.let_go(turn.record)

    def forget(self, turn: Turn, error: RequestError) -> None:
        """Stop a turn and drop it from the memory; its readers get the reason."""
        self._drop(turn)
        for reader in (*turn.readers, *turn.late):
            self._of_reader.pop(reader, None)
            _reject(reader, error)
        turn.readers.clear()
        while turn.late:
            turn.late.popitem()[1].cancel()

    def _admit(self, reader: Reader, turn: Turn, *, may_wait: bool = True) -> None:
        request = reader.request
        if not _is_of(turn, request.secret):
            reader.reject("unknown_turn", UNKNOWN_TURN)
        elif request.body and hash_of(request.body) != turn.body_hash:
            reader.reject(
                "turn_conflict",
                "This turn id was used for another request: make a new id for each turn.",
            )
        elif request.offset > turn.log.length and turn.is_elsewhere and may_wait:
            self._of_reader[reader] = turn
            turn.late[reader] = self._spawn(self._admit_later(reader, turn))
        elif request.offset > turn.log.length:
            reader.reject(
                "bad_offset",
                f"The turn has {turn.log.length} bytes, and byte {request.offset} was asked: "
                "resume at an offset that was received.",
            )
        else:
            self._end_grace(turn)
            if request.is_owner:
                self._replace_owners(turn)
            self.resumes += turn.task is not None or turn.stored is not None
            turn.readers[reader] = None
            self._of_reader[reader] = turn
            reader.accept(turn.log)

    async def _admit_later(self, reader: Reader, turn: Turn) -> None:
        """Admit a reader that has more of a followed turn than has come here by now."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + LATE_S
        offset = reader.request.offset
        while turn.log.length < offset and turn.is_elsewhere and loop.time() < until_s:  # noqa: ASYNC110
            await asyncio.sleep(LATE_POLL_S)
        del turn.late[reader], self._of_reader[reader]
        self._admit(reader, turn, may_wait=False)
        self._leave_memory(turn)

    def _replace_owners(self, turn: Turn) -> None:
        """Let go of the owner's earlier readers: it has come back over another connection."""
        for reader in [reader for reader in turn.readers if reader.request.is_owner]:
            del turn.readers[reader]
            self._of_reader.pop(reader, None)
            reader.reject("replaced", REPLACED)

    def _open(self, key: TurnKey, reader: Reader | None, principal: Principal) -> None:
        """Have a turn that is not in memory looked up or made."""
        if self._openings.add(key, reader, principal):
            self._spawn(self._openings.open(key))

    def _start(self, turn: Turn, opening: Opening) -> None:
        """Attach those that waited for a turn, and have it generated or followed."""
        if self._is_closed:
            for reader in opening.readers:
                reader.reject("unavailable", SHUTTING_DOWN)
            return
        self._turns[turn.key] = turn
        for reader in opening.readers:
            self._admit(reader, turn)
        if turn.is_elsewhere:
            turn.task = self._spawn(self._follow(turn))
        elif turn.stored is None:
            turn.task = self._spawn(self._generate(turn, self._handler))
        elif not turn.is_over:
            self._continue(turn)
        if any(_is_of(turn, secret) for secret in opening.cancels):
            self._cancel(turn)
        self._leave_memory(turn)
        if not turn.is_over:
            self._begin_grace(turn)

    async def _recover(self) -> None:
        """Go on with turns that nobody owns, as the store finds them."""
        async with aclosing(self._store.abandoned()) as keys:
            async for key in keys:
                if key not in self._turns:
                    self._open(key, None, self._admission.named(key[0]))

    async def _follow(self, turn: Turn) -> None:
        """Serve a turn's readers from what its owner stores; become its owner if that is gone."""
        try:
            await follow(self._store, turn, on_grown=self._show_more, is_wanted=self._is_current)
        except RequestError as error:
            self.forget(turn, error)
            self._store.let_go(turn.record)
            return
        if self._is_current(turn) and not turn.is_over:
            self._continue(turn)
            self._begin_grace(turn)

    def _show_more(self, turn: Turn) -> None:
        self._release(turn, turn.log.written)

    def _on_lost(self, record: TurnRecord) -> None:
        """Stop generating a turn that may be another process's by now, and follow it."""
        turn = self._turns.get(record.key)
        if turn is not None and turn.record is record and not turn.is_elsewhere:
            logger.warning("turn %s: its lease is lost", turn.name)
            turn.give_up()
            self._end_grace(turn)
            turn.task = self._spawn(self._follow(turn))

    def _on_cancelled_elsewhere(self, record: TurnRecord) -> None:
        """Stop a turn whose owner has said so to another process."""
        turn = self._turns.get(record.key)
        if turn is not None and turn.record is record:
            self._cancel(turn)

    def _cancel(self, turn: Turn) -> None:
        turn.is_cancelled = True
        if turn.is_elsewhere:
            self._spawn(self._cancel_elsewhere(turn))
        else:
            self._stop(turn, "cancelled")

    async def _cancel_elsewhere(self, turn: Turn) -> None:
        try:
            await self._store.cancel_elsewhere(turn.record)
        except StoreError as error:
            logger.warning("turn %s: its owner was not told of a cancel: %s", turn.name, error)

    def _continue(self, turn: Turn) -> None:
        """Have a turn that was cut off with its server generated further, or end it."""
        assert turn.stored is not None
        if turn.is_cancelled:
            turn.end_early("cancelled")
        elif not turn.stored.events:
            turn.stored = None
            turn.task = self._spawn(self._generate(turn, self._handler))
        elif any(isinstance(event, Failure) for event in turn.stored.events):
            turn.end_early("error")
        elif self._go_on is None:
            turn.end_early("error", Failure("interrupted", INTERRUPTED))
        else:
            logger.info("turn %s goes on where it was cut off", turn.name)
            turn.task = self._spawn(self._generate(turn, self._go_on))

    async def _generate(self, turn: Turn, handler: TurnHandler) -> None:
        try:
            await handler(turn)
        except Exception:
            # The boundary of the application: a fault in one turn ends that turn, says so in the
            # log for the operator, and hurts no other.
            logger.exception("turn %s failed", turn.name)
        if self._is_current(turn) and not turn.is_over:
            if turn.log.written:
                turn.end_early("error", Failure("internal_error", FAULT))
            else:
                turn.reject(RequestError("internal_error", FAULT))

    async def _abandon(self, turn: Turn) -> None:
        """Stop a turn that nobody reads, here or elsewhere."""
        try:
            is_read = await self._store.is_read_elsewhere(turn.record)
        except StoreError:
            is_read = True  # That is not known; it is asked again.
        if turn.readers or turn.grace is not None or turn.is_elsewhere:
            return
        if is_read:
            self._begin_grace(turn)
        else:
            logger.info("turn %s: nobody reads it any more", turn.name)
            self._stop(turn, "cancelled")

    def _stop(self, turn: Turn, reason: str, failure: Failure | None = None) -> None:
        """End a turn before its time, unless it is over."""
        if turn.is_over or not self._is_current(turn):
            return
        if turn.task is not None:
            turn.task.cancel()
        turn.end_early(reason, failure)

    def _park(self, turn: Turn) -> None:
        """Leave a turn that was cut off as it is, for the next start."""
        self.forget(turn, RequestError("unavailable", SHUTTING_DOWN))

    def _put_off(self, turn: Turn) -> None:
        """Stop a turn and leave it in the store without an end, as if the server were killed."""
        if not turn.is_over:
            self._drop(turn)

    def _drop(self, turn: Turn) -> None:
        """Stop a turn, and let it leave the memory."""
        if self._is_current(turn):
            del self._turns[turn.key]
        self._end_grace(turn)
        self._release_admission(turn)
        if turn.task is not None and turn.task is not asyncio.current_task():
            turn.task.cancel()

    def _release(self, turn: Turn, offset: int) -> None:
        turn.log.release(offset)
        for reader in list(turn.readers):
            reader.log_grew()
        self._leave_memory(turn)

    def _on_not_stored(self, turn: Turn, error: StoreError) -> None:
        # What to do about a lost lease is `_on_lost`'s.
        if self._is_current(turn) and not isinstance(error, StaleOwnerError):
            logger.error("turn %s cannot be stored: %s", turn.name, error)
            self.decline(turn, RequestError("not_stored", NOT_STORED))

    def _end_here(self, turn: Turn, offset: int, error: StoreError) -> None:
        """End a turn after what the store has of it, as there is no room for more."""
        if not self._is_current(turn):
            return
        logger.error("turn %s ends early: %s", turn.name, error)
        turn.log.rewind(offset)
        turn.handed = offset
        is_long = isinstance(error, TurnTooLargeError)
        turn.end_early("error", Failure("not_stored", TOO_LONG if is_long else NOT_STORED))

    def _leave_memory(self, turn: Turn) -> None:
        """Drop a turn that nobody reads, and that the store or another process has all of."""
        is_kept = turn.is_elsewhere or turn.log.end is not None
        if is_kept and not turn.readers and not turn.late and self._is_current(turn):
            self._drop(turn)

    def _is_current(self, turn: Turn) -> bool:
        return self._turns.get(turn.key) is turn

    def _release_admission(self, turn: Turn) -> None:
        """Take a turn that is over off its owner's account."""
        if turn.is_admitted:
            turn.is_admitted = False
            self._admission.ended(turn.principal, turn.log.written)

    def _begin_grace(self, turn: Turn) -> None:
        """Give a turn that nobody reads some time for a reader to come."""
        if (
            turn.readers
            or turn.grace is not None
            or turn.is_elsewhere
            or not self._is_current(turn)
        ):
            return

        def end() -> None:
            turn.grace = None
            self._spawn(self._abandon(turn))

        turn.grace = asyncio.get_running_loop().call_later(self._grace_s, end)

    def _end_grace(self, turn: Turn) -> None:
        if turn.grace is not None:
            turn.grace.cancel()
            turn.grace = None

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _is_of(turn: Turn, secret: bytes) -> bool:
    """Say whether this is a turn's resume secret."""
    return hmac.compare_digest(hash_of(secret), turn.secret_hash)


def _reject(reader: Reader, error: RequestError) -> None:
    reader.reject(error.code, error.message, error.retry_after_s)
