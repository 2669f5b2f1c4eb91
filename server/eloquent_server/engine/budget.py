"""How many prompt tokens a step may take, so that it ends in time for those who are decoding."""

import os
from pathlib import Path

STEP_TARGET_S = 0.15
"The gap that decoding turns may see while a prompt goes in."
ALONE_TARGET_S = 0.45
"Where nobody decodes only a cancel or a newcomer waits for the step."
MIN_TOKENS = 16
MAX_TOKENS = 2048
FIRST_TOKENS = 64
"Before anything has been measured."

_SMOOTHING = 0.3
"Weight of the newest measurement."
_LEAST_TOKEN_S = 1e-6
"A clock may not have moved."
_GROWTH = 2.0
"From one step to the next; costs learned on small chunks do not hold for ones far larger."


class StepBudget:
    """Learns what a decode step and a prompt token cost, and says how many prompt tokens fit."""

    def __init__(
        self, *, target_s: float = STEP_TARGET_S, alone_target_s: float = ALONE_TARGET_S
    ) -> None:
        self._target_s = target_s
        self._alone_target_s = alone_target_s
        self._decode_s = 0.0
        self._decode_rows = 0
        self._token_s: float | None = None
        self._last_tokens = FIRST_TOKENS // 2

    def tokens(self, decoding: int) -> int:
        """Return how many prompt tokens the next step may take beside `decoding` turns."""
        if self._token_s is None:
            return FIRST_TOKENS
        target = self._target_s if decoding else self._alone_target_s
        room = (target - self._decode_estimate(decoding)) / self._token_s
        most = min(MAX_TOKENS, max(FIRST_TOKENS, _GROWTH * self._last_tokens))
        return max(MIN_TOKENS, int(min(room, most)))

    def observe(self, decoding: int, prompt_tokens: int, duration_s: float) -> None:
        """Take in how long a step took."""
        if not prompt_tokens:
            if decoding:
                self._decode_s = _smooth(self._decode_s or duration_s, duration_s)
                self._decode_rows = decoding
            return
        self._last_tokens = prompt_tokens
        if prompt_tokens < MIN_TOKENS:
            return  # Mostly the fixed cost.
        spent = max(duration_s - self._decode_estimate(decoding), duration_s / 10)
        cost = max(spent / prompt_tokens, _LEAST_TOKEN_S)
        self._token_s = cost if self._token_s is None else _smooth(self._token_s, cost)

    def _decode_estimate(self, decoding: int) -> float:
        """Mostly the reading of the weights, so hardly less for fewer turns."""
        if not decoding or not self._decode_rows:
            return 0.0
        return self._decode_s * (0.7 + 0.3 * decoding / self._decode_rows)


def _smooth(old: float, new: float) -> float:
    return old + _SMOOTHING * (new - old)


def memory_bytes() -> int:
    """Return the memory that this process may use: the machine's, or its control group's limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
