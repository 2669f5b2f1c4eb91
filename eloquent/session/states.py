"""The states of a session's link, as the application sees them."""

from enum import Enum

OFFLINE_LOOK_S = 1.0
"Without a way to the server the link is looked at this often: an answer proves that there is one."

SILENT_FOR_S = 10.0
"A link that is silent for longer counts as lost, though it is still listened to."

CANCEL_SLACK_S = 0.5
"What comes a round trip and this much after a cancel shows that the server was there to hear it."

CANCEL_KEPT_S = 120.0
"A cancel is kept for a link so long; then the server has given the turn up by itself."


class LinkState(Enum):
    """What is known of the way to the server."""

    IDLE = "idle"
    "There is no connection, and none is needed."
    CONNECTING = "connecting"
    "The first connection is being made."
    UP = "up"
    "The server answers, or has not been asked for the last 20 s."
    SILENT = "silent"
    """A turn is open and the server answers nothing, not even what the model has no part in: one
    way of the link is dead, or both. Another link is being made."""
    OFFLINE = "offline"
    "This machine has no network; as soon as it has one, it goes on."
    RECONNECTING = "reconnecting"
    "The connection is gone, or has been silent for long, and a new one is being made."
    CLOSED = "closed"
    "The session is over."


NEXT: dict[LinkState, frozenset[LinkState]] = {
    LinkState.IDLE: frozenset({LinkState.CONNECTING, LinkState.OFFLINE, LinkState.CLOSED}),
    LinkState.CONNECTING: frozenset(
        {LinkState.UP, LinkState.IDLE, LinkState.OFFLINE, LinkState.CLOSED}
    ),
    LinkState.UP: frozenset(
        {
            LinkState.CONNECTING,
            LinkState.SILENT,
            LinkState.OFFLINE,
            LinkState.RECONNECTING,
            LinkState.IDLE,
            LinkState.CLOSED,
        }
    ),
    LinkState.SILENT: frozenset(
        {
            LinkState.UP,
            LinkState.CONNECTING,
            LinkState.OFFLINE,
            LinkState.RECONNECTING,
            LinkState.IDLE,
            LinkState.CLOSED,
        }
    ),
    LinkState.OFFLINE: frozenset(
        {
            LinkState.UP,
            LinkState.CONNECTING,
            LinkState.SILENT,
            LinkState.RECONNECTING,
            LinkState.IDLE,
            LinkState.CLOSED,
        }
    ),
    LinkState.RECONNECTING: frozenset(
        {LinkState.UP, LinkState.CONNECTING, LinkState.OFFLINE, LinkState.IDLE, LinkState.CLOSED}
    ),
    LinkState.CLOSED: frozenset(),
}
"Which state may follow which."
