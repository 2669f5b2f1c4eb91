"""A server's application that declines turns as a test wants, in virtual time too."""

import asyncio
from collections.abc import Sequence

from telling import Telling

from eloquent.core.wire import Request
from eloquent.serving import Reader

Refusal = tuple[str, float]
"A code, and after how many seconds to ask again; 0: nothing is said of it."


class Declining(Telling):
    """Declines the first requests, then tells a fixed answer."""

    def __init__(
        self, *refusals: Refusal, tokens: Sequence[str] = ("yes",), gap_s: float = 0.0
    ) -> None:
        super().__init__(tokens, gap_s)
        self._refusals = list(refusals)
        self.requests: list[Request] = []
        self.asked_s: list[float] = []

    def on_request(self, reader: Reader) -> None:
        """See `TurnService`."""
        self.requests.append(reader.request)
        self.asked_s.append(asyncio.get_running_loop().time())
        if self._refusals:
            code, after_s = self._refusals.pop(0)
            reader.reject(code, f"Said by a test: {code}.", after_s)
        else:
            super().on_request(reader)
