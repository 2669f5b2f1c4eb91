"""How far a connection is: one state machine, its table first (RFC 9293 section 3.3.2)."""

from enum import Enum, auto


class Phase(Enum):
    """The states of RFC 9293."""

    CLOSED = auto()
    LISTEN = auto()
    SYN_SENT = auto()
    SYN_RECEIVED = auto()
    ESTABLISHED = auto()
    FIN_WAIT_1 = auto()
    "This end has nothing more to send and has said so."
    FIN_WAIT_2 = auto()
    "The peer knows that, and may go on sending."
    CLOSE_WAIT = auto()
    "The peer has nothing more to send; this end may go on."
    CLOSING = auto()
    "Both said so at the same time; the peer does not yet know that it was heard."
    LAST_ACK = auto()
    TIME_WAIT = auto()
    "All is over; late segments are still answered."


class Arrival(Enum):
    """What happens to a connection."""

    OPEN = auto()
    "The application calls `connect`."
    CLOSE = auto()
    "The application ends its half."
    ABORT = auto()
    "The application, a reset, or a peer that does not answer ends it at once."
    SYN = auto()
    SYN_ACK = auto()
    ACK = auto()
    FIN = auto()
    "The peer's stream has come to its end, everything before it included."
    FIN_ACKED = auto()
    "The peer has acknowledged this end's FIN."
    EXPIRED = auto()
    "A phase that waits for what may never come has lasted long enough."


PHASES: dict[tuple[Phase, Arrival], Phase] = {
    (Phase.CLOSED, Arrival.OPEN): Phase.SYN_SENT,
    (Phase.LISTEN, Arrival.SYN): Phase.SYN_RECEIVED,
    (Phase.SYN_RECEIVED, Arrival.SYN): Phase.SYN_RECEIVED,
    (Phase.SYN_RECEIVED, Arrival.ACK): Phase.ESTABLISHED,
    (Phase.SYN_SENT, Arrival.SYN_ACK): Phase.ESTABLISHED,
    (Phase.ESTABLISHED, Arrival.SYN_ACK): Phase.ESTABLISHED,
    (Phase.ESTABLISHED, Arrival.SYN): Phase.ESTABLISHED,
    (Phase.ESTABLISHED, Arrival.ACK): Phase.ESTABLISHED,
    (Phase.ESTABLISHED, Arrival.CLOSE): Phase.FIN_WAIT_1,
    (Phase.ESTABLISHED, Arrival.FIN): Phase.CLOSE_WAIT,
    (Phase.FIN_WAIT_1, Arrival.SYN_ACK): Phase.FIN_WAIT_1,
    (Phase.FIN_WAIT_1, Arrival.ACK): Phase.FIN_WAIT_1,
    (Phase.FIN_WAIT_1, Arrival.FIN_ACKED): Phase.FIN_WAIT_2,
    (Phase.FIN_WAIT_1, Arrival.FIN): Phase.CLOSING,
    (Phase.FIN_WAIT_2, Arrival.ACK): Phase.FIN_WAIT_2,
    (Phase.FIN_WAIT_2, Arrival.FIN): Phase.TIME_WAIT,
    (Phase.FIN_WAIT_2, Arrival.EXPIRED): Phase.CLOSED,
    (Phase.CLOSING, Arrival.ACK): Phase.CLOSING,
    (Phase.CLOSING, Arrival.FIN_ACKED): Phase.TIME_WAIT,
    (Phase.TIME_WAIT, Arrival.ACK): Phase.TIME_WAIT,
    (Phase.TIME_WAIT, Arrival.EXPIRED): Phase.CLOSED,
    (Phase.CLOSE_WAIT, Arrival.ACK): Phase.CLOSE_WAIT,
    (Phase.CLOSE_WAIT, Arrival.CLOSE): Phase.LAST_ACK,
    (Phase.LAST_ACK, Arrival.ACK): Phase.LAST_ACK,
    (Phase.LAST_ACK, Arrival.FIN_ACKED): Phase.CLOSED,
    # An application that gives up before the handshake is over leaves nothing behind.
    (Phase.SYN_SENT, Arrival.CLOSE): Phase.CLOSED,
    **{(phase, Arrival.ABORT): Phase.CLOSED for phase in Phase},
}
"What is not in the table is dropped in silence."

SYNCHRONISED = frozenset(
    {
        Phase.ESTABLISHED,
        Phase.FIN_WAIT_1,
        Phase.FIN_WAIT_2,
        Phase.CLOSE_WAIT,
        Phase.CLOSING,
        Phase.LAST_ACK,
        Phase.TIME_WAIT,
    }
)
"The phases in which segments are acknowledged."

BEFORE_DATA = frozenset({Phase.CLOSED, Phase.LISTEN, Phase.SYN_SENT, Phase.SYN_RECEIVED})
"The phases in which what is written waits."
