"""The least of a server's application: it tells a fixed answer, in virtual time too."""

import asyncio
from collections.abc import Sequence

from eloquent.core.events import TextDelta
from eloquent.core.log import TokenLog
from eloquent.serving import Reader


class Telling:
    """A `TurnService` without a store: a token every `gap_s` seconds, the same log for one id."""

    def __init__(self, tokens: Sequence[str], gap_s: float) -> None:
        self._tokens = tokens
        self._gap_s = gap_s
        self.logs: dict[bytes, TokenLog] = {}
        self.readers: dict[Reader, TokenLog] = {}
        self.cancelled: list[Reader] = []
        self.gone: list[Reader] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def on_request(self, reader: Reader) -> None:
        """See `TurnService`."""
        turn_id = reader.request.turn_id
        log = self.logs.get(turn_id)
        if log is None:
            log = self.logs[turn_id] = TokenLog()
            task = asyncio.ensure_future(self._tell(log))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self.readers[reader] = log
        reader.accept(log)

    def on_cancel(self, reader: Reader) -> None:
        """See `TurnService`."""
        self.cancelled.append(reader)

    def on_gone(self, reader: Reader) -> None:
        """See `TurnService`."""
        self.gone.append(reader)
        self.readers.pop(reader, None)

    async def _tell(self, log: TokenLog) -> None:
        for token in self._tokens:
            log.append(TextDelta(token))
            self._tell_readers(log)
            await asyncio.sleep(self._gap_s)
        log.close("stop", model="told", prompt_tokens=1, completion_tokens=len(self._tokens))
        self._tell_readers(log)

    def _tell_readers(self, log: TokenLog) -> None:
        for reader, own in list(self.readers.items()):
            if own is log:
                reader.log_grew()
