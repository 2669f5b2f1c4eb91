"""A TCP for the simulator, without I/O, modelled after Linux."""

from eloquent_netem.tcp.connection import TcpConnection
from eloquent_netem.tcp.errors import SegmentError, TcpError
from eloquent_netem.tcp.pair import TcpPair
from eloquent_netem.tcp.tokens import TokenTimes, even_tokens, send_tokens

__all__ = [
    "SegmentError",
    "TcpConnection",
    "TcpError",
    "TcpPair",
    "TokenTimes",
    "even_tokens",
    "send_tokens",
]
