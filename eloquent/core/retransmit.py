"""What TCP and QUIC streams do, and the paper's doubling, as schemes to compare with."""

from collections import deque

from eloquent.core.log import Log
from eloquent.core.path import Path
from eloquent.core.sender import NOW, Sender
from eloquent.core.wire import Bundle


class RetransmitSender(Sender):
    """Each bundle carries new tokens only; what is lost is sent again (as TCP and QUIC streams do).

    With `copies=2` each bundle leaves twice, back to back: the paper's "send every packet twice".
    """

    def __init__(self, turn: int, log: Log, path: Path, *, copies: int = 1) -> None:
        super().__init__(turn, log, path)
        self._copies = copies
        self._pending_copies: deque[tuple[int, int]] = deque()

    def next_time(self) -> float | None:
        """See `Sender.next_time`."""
        has_more = self._log.length > self._sent_end
        is_due = bool(self._pending_copies or self._resend or has_more)
        return NOW if is_due else self._confirm_time()

    def next_bundle(self, now: float, room: int) -> Bundle | None:
        """See `Sender.next_bundle`."""
        self._doubt(now)
        if self._pending_copies:
            start, stop = self._pending_copies[0]
            size = self._data_room(start, stop, room)
            if size <= 0:
                return None
            self._pending_copies.popleft()
            if start + size < stop:
                self._pending_copies.appendleft((start + size, stop))
            return self._make(start, start + size, now)
        start, stop = next(iter(self._resend), (self._sent_end, self._log.length))
        size = self._data_room(start, stop, room)
        if size <= 0:
            return None
        self._pending_copies.extend([(start, start + size)] * (self._copies - 1))
        return self._make(start, start + size, now)


class DuplicateSender(RetransmitSender):
    """`RetransmitSender` with every packet sent twice."""

    def __init__(self, turn: int, log: Log, path: Path) -> None:
        super().__init__(turn, log, path, copies=2)
