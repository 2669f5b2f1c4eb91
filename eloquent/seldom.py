"""Warnings that anybody on the network can cause: a few in the log, however many there are."""

import logging

EVERY_S = 1.0


class Seldom:
    """Logs a warning a second at most, and says how many it kept back."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._said_at = float("-inf")
        self._kept_back = 0

    def warn(self, now: float, text: str) -> None:
        """Log `text`, or count it; `now` is in seconds."""
        if now < self._said_at + EVERY_S:
            self._kept_back += 1
        else:
            more = f" (and {self._kept_back} like it)" if self._kept_back else ""
            self._logger.warning("%s%s", text, more)
            self._said_at, self._kept_back = now, 0
