"""How long there has been an outage, for programs that wait for their answers."""

from collections.abc import Callable

from eloquent.session.states import LinkState

LOST = frozenset({LinkState.SILENT, LinkState.OFFLINE, LinkState.RECONNECTING})
"The states of an outage: a turn was asked, and the server is not heard."


class LinkWatch:
    """Follows the link's states; its `on_state` is what `Client` takes as `on_link_state`."""

    def __init__(self, now: Callable[[], float]) -> None:
        """`now` returns the time in seconds."""
        self._now = now
        self._lost_at_s: float | None = None
        self.state = LinkState.IDLE
        "The last that was told."

    def on_state(self, state: LinkState) -> None:
        """Take note of a new state."""
        self.state = state
        if state not in LOST:
            self._lost_at_s = None
        elif self._lost_at_s is None:
            self._lost_at_s = self._now()

    def lost_s(self, since_s: float) -> float:
        """Return for how long there has been an outage, counted from `since_s` at the earliest."""
        if self._lost_at_s is None:
            return 0.0
        return self._now() - max(self._lost_at_s, since_s)
