"""The readers on one connection of a server, whatever carries it."""

from collections.abc import Callable
from typing import Protocol

from eloquent.core.log import Log
from eloquent.core.turns import ReaderDone, TurnCancelled, TurnEvent, TurnRequested
from eloquent.core.wire import Report, Request
from eloquent.serving import TurnService


class Turns(Protocol):
    """The server's end of a connection without I/O: `ServerConnection`, `ServerChannel`."""

    def accept(self, turn: int, log: Log, offset: int = 0) -> None:
        """Send a log."""

    def log_grew(self, turn: int, now: float) -> None:
        """Take note that it has more."""

    def reject(self, turn: int, code: str, message: str, retry_after_s: float = 0.0) -> None:
        """Send no more of it, and say why."""

    def report(self, turn: int) -> Report | None:
        """Return what its reader said last."""


class Pumping(Protocol):
    """What drives it: `Driver`, `ChannelDriver`."""

    def now(self) -> float:
        """Return the time in seconds."""

    def pump(self) -> None:
        """Send what there is to send."""


class TurnReader:
    """A `Reader`: one turn on one connection."""

    def __init__(self, readers: "Readers", number: int, request: Request) -> None:
        self._readers = readers
        self._number = number
        self._request = request

    @property
    def request(self) -> Request:
        """See `Reader.request`."""
        return self._request

    @property
    def is_silent(self) -> bool:
        """See `Reader.is_silent`."""
        return self._readers.is_silent()

    @property
    def report(self) -> Report | None:
        """See `Reader.report`."""
        return self._readers.turns.report(self._number)

    def accept(self, log: Log) -> None:
        """See `Reader.accept`."""
        self._readers.turns.accept(self._number, log, self._request.offset)
        self.log_grew()

    def log_grew(self) -> None:
        """See `Reader.log_grew`."""
        driver = self._readers.driver
        self._readers.turns.log_grew(self._number, driver.now())
        driver.pump()

    def reject(self, code: str, message: str, retry_after_s: float = 0.0) -> None:
        """See `Reader.reject`."""
        self._readers.forget(self._number)
        self._readers.turns.reject(self._number, code, message, retry_after_s)
        self._readers.driver.pump()


class Readers:
    """All readers on one connection: its events bring and end them."""

    def __init__(
        self, service: TurnService, turns: Turns, driver: Pumping, is_silent: Callable[[], bool]
    ) -> None:
        """`is_silent` says what `Reader.is_silent` is to say."""
        self._service = service
        self._readers: dict[int, TurnReader] = {}
        self.turns = turns
        self.driver = driver
        self.is_silent = is_silent

    def __len__(self) -> int:
        return len(self._readers)

    def on_event(self, event: TurnEvent) -> None:
        """Tell the application what happened to a turn."""
        if isinstance(event, TurnRequested):
            reader = TurnReader(self, event.turn, event.request)
            self._readers[event.turn] = reader
            self._service.on_request(reader)
        elif isinstance(event, TurnCancelled | ReaderDone):
            done = self._readers.pop(event.turn, None)
            if done is not None:
                if isinstance(event, TurnCancelled):
                    self._service.on_cancel(done)
                self._service.on_gone(done)

    def forget(self, number: int) -> None:
        """Take note that nothing more is said to a reader."""
        self._readers.pop(number, None)

    def end(self) -> None:
        """Take note that the connection is over: its readers are gone."""
        readers, self._readers = self._readers, {}
        for reader in readers.values():
            self._service.on_gone(reader)
