"""Logs: a line for each record, as text or JSON, with the turn that it is about.

They hold no text of conversations, no keys and no secrets. Other libraries' records below a warning
are left out: some of them write down what they send and receive. Warnings and errors of one place
are so many a second at most, since anybody on the network may be their cause.
"""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal, TextIO

from eloquent.core.events import End
from eloquent_server.models import Progress, progress_printer

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[LogLevel, ...] = ("debug", "info", "warning", "error")

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
OURS = ("eloquent", "eloquent_server")

FIELDS = "fields"
"`extra={FIELDS: {...}}` of a record adds to what JSON says of it."

MOST_ALIKE = 10
"Warnings and errors that one line of code may log in `WINDOW_S`; the others are counted."
WINDOW_S = 1.0

logger = logging.getLogger(__name__)

_turn: ContextVar[str | None] = ContextVar("turn", default=None)


@contextlib.contextmanager
def about_turn(name: str) -> Iterator[None]:
    """Give all records that are made in this context, and its tasks, the name of a turn."""
    token = _turn.set(name)
    try:
        yield
    finally:
        _turn.reset(token)


def configure(
    level: LogLevel,
    log_format: LogFormat,
    stream: TextIO = sys.stderr,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Have this process log to `stream`, and take away what was configured before.

    `clock` gives seconds, from any origin.
    """
    handler = logging.StreamHandler(stream)
    handler.addFilter(_Floodgate(clock))
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter(TEXT))
    least = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(handlers=[handler], level=max(least, logging.WARNING), force=True)
    for name in OURS:
        logging.getLogger(name).setLevel(least)
    # websockets writes each connection and frame into the logger that it was given.
    logging.getLogger("eloquent.websocket").setLevel(max(least, logging.WARNING))
    # aioquic logs as a warning whatever a peer does wrong; we say that ourselves.
    logging.getLogger("quic").setLevel(logging.ERROR)


def configured() -> tuple[LogLevel, LogFormat]:
    """Return what `configure` was told, for a child process."""
    least = logging.getLogger(OURS[0]).getEffectiveLevel()
    names = logging.getLevelNamesMapping()
    level: LogLevel = "error"
    for name in LEVELS:
        if least <= names[name.upper()]:
            level = name
            break
    handlers = logging.getLogger().handlers
    is_json = any(isinstance(handler.formatter, JsonFormatter) for handler in handlers)
    return level, "json" if is_json else "text"


def progress(log_format: LogFormat, stream: TextIO = sys.stderr) -> Progress:
    """Return a callback that shows progress: on `stream` as people like it, or in the log."""
    if log_format == "text":
        return progress_printer(stream)
    last = ""

    def say(message: str, fraction: float | None) -> None:
        nonlocal last
        if message != last:
            logger.info("%s", message)
        last = message

    return say


class TurnClock:
    """How long a turn takes in this process, from when this is made; says so at its end."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._first_s: float | None = None

    def event(self) -> None:
        """Take note that there is an event."""
        if self._first_s is None:
            self._first_s = time.monotonic()

    def say_end(self, name: str, tenant: str, end: End) -> None:
        """Log that turn `name` is over."""
        duration_s = time.monotonic() - self._began_s
        ttft_ms = None if self._first_s is None else 1000 * (self._first_s - self._began_s)
        fields = {
            "turn": name,
            "tenant": tenant,
            "model": end.model,
            "reason": end.finish_reason,
            "prompt_tokens": end.prompt_tokens,
            "completion_tokens": end.completion_tokens,
            "cached_tokens": end.cached_tokens,
            "ttft_ms": None if ttft_ms is None else round(ttft_ms, 1),
            "duration_ms": round(1000 * duration_s, 1),
        }
        logger.info(
            "turn %s ended: %s, %d tokens, %.2f s",
            *(name, end.finish_reason, end.completion_tokens, duration_s),
            extra={FIELDS: fields},
        )


class _Floodgate(logging.Filter):
    """Lets a few of many records through that come from the same line of code."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self._windows: dict[tuple[str, int], tuple[float, int]] = {}
        "For each place: when its window began, and how many records it had since."

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter.filter`."""
        if record.levelno < logging.WARNING:
            return True
        place = record.pathname, record.lineno
        began_s, count = self._windows.get(place, (-math.inf, 0))
        now = self._clock()
        if now < began_s + WINDOW_S:
            self._windows[place] = began_s, count + 1
            return count < MOST_ALIKE
        self._windows[place] = now, 1
        if count > MOST_ALIKE:
            left_out = count - MOST_ALIKE
            record.msg = f"{record.getMessage()} ({left_out} more like it were left out)"
            record.args = ()
        return True


class TextFormatter(logging.Formatter):
    """A record as a line; the turn is at its end, unless it is said in it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """See `logging.Formatter.formatMessage`."""
        text = super().formatMessage(record)
        turn = _turn.get()
        return text if turn is None or turn in text else f"{text} (turn {turn})"


class JsonFormatter(logging.Formatter):
    """A record as a JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        time = datetime.fromtimestamp(record.created, UTC)
        said: dict[str, object] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        turn = _turn.get()
        if turn is not None:
            said["turn"] = turn
        said |= getattr(record, FIELDS, {})
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)
