"""qlog on request: a file for each connection, with our frames named and no text in it.

The files are JSON text sequences (RFC 7464, `.sqlog`) of qlog 0.3
(draft-ietf-quic-qlog-main-schema), which allows frames to have fields of their own. A record is
written as soon as it is complete, so memory is bounded however long a connection lives, and what a
crash leaves can be read.
"""

import json
import logging
import os
import time
import weakref
from pathlib import Path
from typing import Any

from aioquic.quic.logger import QLOG_VERSION, QuicLogger, QuicLoggerTrace
from aioquic.quic.packet import QuicTransportParameters

from eloquent.core.wire import Bundle, decode_frame
from eloquent.errors import ConfigurationError, WireError

RECORD_START = b"\x1e"
"RFC 7464's record separator, which stands before each record."

MAX_WAITING = 256
"Events that wait, at most, for the packet to which they belong to be complete."

PACKET_EVENTS = ("packet_sent", "packet_received")

logger = logging.getLogger(__name__)


def describe_frame(payload: bytes) -> dict[str, Any]:
    """Return what qlog says of one of our frames beyond its length: all but the text."""
    try:
        frame = decode_frame(payload)
    except WireError:
        return {"eloquent": {"frame_type": "malformed"}}
    if isinstance(frame, Bundle):
        fields = {
            "frame_type": "bundle",
            "turn": frame.turn,
            "number": frame.number,
            "offset": frame.offset,
            "length": len(frame.data),
        }
    else:
        fields = {
            "frame_type": "report",
            "turn": frame.turn,
            "contiguous": frame.contiguous,
            "newest": frame.newest,
            "unread": frame.unread,
            "arrivals": len(frame.arrivals),
        }
    return {"eloquent": fields}


class QlogDirectory(QuicLogger):
    """Writes each connection's trace to `NAME_client.sqlog` or `NAME_server.sqlog`.

    The name is the connection id that the client chose first, alike on both ends.
    """

    def __init__(self, path: Path) -> None:
        """Make the directory if need be.

        Raises:
            ConfigurationError: no file can be written there.
        """
        super().__init__()
        self._path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from error
        if not os.access(path, os.W_OK | os.X_OK):
            raise ConfigurationError(f"Cannot write qlog files into {path}: no permission.")

    def start_trace(self, is_client: bool, odcid: bytes) -> QuicLoggerTrace:
        """See `QuicLogger.start_trace`; a connection for which there is no file has no log."""
        role = "client" if is_client else "server"
        path = self._path / f"{odcid.hex()}_{role}.sqlog"
        try:
            return _FileTrace(path, is_client=is_client, odcid=odcid)
        except OSError as error:
            # A directory that was removed, or a full disk, must not keep anybody from connecting.
            logger.warning("qlog: %s cannot be made: %s", path, error.strerror)
            return _NoTrace(is_client=is_client, odcid=odcid)

    def end_trace(self, trace: QuicLoggerTrace) -> None:
        """See `QuicLogger.end_trace`."""
        if isinstance(trace, _FileTrace):
            trace.finish()


class _NoTrace(QuicLoggerTrace):
    """A trace that is not kept."""

    def log_event(self, *, category: str, event: str, data: dict[str, Any]) -> None:
        """See `QuicLoggerTrace.log_event`."""


class _FileTrace(QuicLoggerTrace):
    """A trace that is written while it grows.

    aioquic logs a received packet before it reads its frames, and fills them in afterwards; so
    events wait until the next packet's. A connection that is dropped without an end finishes its
    file when it is collected, or when the process ends.
    """

    def __init__(self, path: Path, *, is_client: bool, odcid: bytes) -> None:
        super().__init__(is_client=is_client, odcid=odcid)
        # Readable for the owner alone: who talked to whom and when is nobody else's business.
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._file = file
        known = super().to_dict()
        self._waiting: list[dict[str, Any]] = [
            {
                "qlog_format": "JSON-SEQ",
                "qlog_version": QLOG_VERSION,
                "trace": {
                    "common_fields": {**known["common_fields"], "time_format": "absolute"},
                    "vantage_point": {**known["vantage_point"], "name": "eloquent"},
                },
            }
        ]
        self.finish = weakref.finalize(self, _finish, file, self._waiting)

    def log_event(self, *, category: str, event: str, data: dict[str, Any]) -> None:
        """See `QuicLoggerTrace.log_event`."""
        if not self.finish.alive:
            return
        if event in PACKET_EVENTS or len(self._waiting) >= MAX_WAITING:
            _write(self._file, self._waiting)
        now_ms = self.encode_time(time.time())
        self._waiting.append({"time": now_ms, "name": f"{category}:{event}", "data": data})

    # Tokens that let their holder speak for a peer do not belong into a file that is passed on.

    def encode_new_connection_id_frame(
        self,
        connection_id: bytes,
        retire_prior_to: int,
        sequence_number: int,
        stateless_reset_token: bytes,
    ) -> dict[str, Any]:
        """See `QuicLoggerTrace`; leaves the reset token out."""
        known = super().encode_new_connection_id_frame(
            connection_id, retire_prior_to, sequence_number, stateless_reset_token
        )
        return _without(known, "reset_token")

    def encode_new_token_frame(self, token: bytes) -> dict[str, Any]:
        """See `QuicLoggerTrace`; leaves the token out."""
        return _without(super().encode_new_token_frame(token), "token")

    def encode_transport_parameters(
        self, owner: str, parameters: QuicTransportParameters
    ) -> dict[str, Any]:
        """See `QuicLoggerTrace`; leaves the reset token out."""
        known = super().encode_transport_parameters(owner, parameters)
        return _without(known, "stateless_reset_token")


def _without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


def _finish(file: int, waiting: list[dict[str, Any]]) -> None:
    _write(file, waiting)
    os.close(file)


def _write(file: int, waiting: list[dict[str, Any]]) -> None:
    records = [RECORD_START + json.dumps(event).encode() + b"\n" for event in waiting]
    waiting.clear()
    try:
        os.write(file, b"".join(records))
    except OSError as error:
        # A full disk must not end anybody's answer.
        logger.warning("qlog: an event could not be written: %s", error.strerror)


def _unwritable(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(f"Cannot write qlog files into {path}: {error.strerror}.")
