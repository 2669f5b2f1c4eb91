"""Guessing several tokens at once, and keeping those that the model would have chosen.

Prompt lookup (Saxena, 2023): where the last few tokens occurred before, what followed them is the
guess; quotations, code and names are full of such repeats. The guess goes through one forward with
the last token, and each of its tokens is kept as long as it is the one that is chosen there. Since
a choice depends on nothing but logits, seed and place, an answer is the same with and without.

Reading the weights costs a forward most of its time while few turns run; with more turns, guesses
cost more than they bring. So it is for `MOST_TURNS`, and pauses where it has not paid.
"""

from collections.abc import Sequence

MOST_TURNS = 2
"Decoding at the same time."
MOST_TOKENS = 8
"In a guess."

_NGRAMS = (3, 2)
"Lengths that are looked up, the surer first."
_SMOOTHING = 0.2
_FIRST_PAUSE_TOKENS = 8
_LONGEST_PAUSE_TOKENS = 256
_MARGIN = 1.05
"Guessing must bring at least so much to go on."


class StepCost:
    """What a step with guesses takes, against one without; for each number of turns."""

    def __init__(self) -> None:
        self._plain_s: dict[int, float] = {}
        self._guessing_s: dict[int, float] = {}

    def observe(self, decoding: int, guessed: int, duration_s: float) -> None:
        """Take in a step of `decoding` turns with `guessed` tokens in all, and no prompts."""
        known = self._guessing_s if guessed else self._plain_s
        before = known.get(decoding, duration_s)
        known[decoding] = before + _SMOOTHING * (duration_s - before)

    def ratio(self, decoding: int) -> float:
        """Return how much longer a step with guesses takes; 1 while that is not known."""
        plain, guessing = self._plain_s.get(decoding), self._guessing_s.get(decoding)
        if not plain or guessing is None:  # Or the clock did not move in a plain step.
            return 1.0
        return max(1.0, guessing / plain)


class PromptLookup:
    """One turn's guesses."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # Where each n-gram ended last.
        self._indexed = 0  # How many tokens were looked at.
        self._gain = 2.0  # Tokens a step with guesses brings, smoothed; hopeful at first.
        self._pause = _FIRST_PAUSE_TOKENS
        self._resume_at = 0

    def guess(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        """Return at most `most` tokens that may follow `tokens`, which have only grown."""
        self._index(tokens)
        most = min(most, MOST_TOKENS)
        if len(tokens) < self._resume_at or most <= 0:
            return ()
        for size in _NGRAMS:
            end = self._ends.get(tuple(tokens[-size:]))
            if end is not None and len(tokens) > size:
                return tokens[end : end + most]
        return ()

    def observe(self, length: int, kept: int, cost: float) -> None:
        """Take in that `kept` tokens of a guess were right, when there are `length` tokens now.

        `cost` is `StepCost.ratio`.
        """
        self._gain += _SMOOTHING * (1 + kept - self._gain)
        if kept:
            self._pause = _FIRST_PAUSE_TOKENS
        if self._gain < cost * _MARGIN:
            self._resume_at = length + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_TOKENS)
            self._gain = cost * _MARGIN  # One more try after the pause.

    def _index(self, tokens: Sequence[int]) -> None:
        """Note where n-grams ended, up to the token before the last: the last has no successor."""
        for end in range(self._indexed + 1, len(tokens)):
            for size in _NGRAMS:
                if end >= size:
                    self._ends[tuple(tokens[end - size : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)
