"""The errors of the TCP model."""

from eloquent_netem.errors import NetemError


class TcpError(NetemError):
    """The TCP model was used in a way it cannot serve."""


class SegmentError(TcpError):
    """A packet is not a segment of this connection."""
