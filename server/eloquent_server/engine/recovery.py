"""Which turns go back into the engine after its process has died.

A turn that was in the engine when it died is suspect, though most often it only was there:

    died once    goes back at once, with all others
    died twice   goes back alone: of such turns one is in the engine at a time
    died thrice  ends: it is what kills the engine

A turn that gets `CLEARED_TOKENS` further than it was at the last death is cleared.
"""

from collections.abc import Iterable
from dataclasses import dataclass

ALONE_DEATHS = 2
MAX_DEATHS = 3
CLEARED_TOKENS = 32


@dataclass(slots=True, eq=False)
class Standing:
    """One turn's, in the server's eyes; changed only here."""

    tokens: int = 0
    "Of its answer, so far."
    in_engine: bool = False
    deaths: int = 0
    "How often the engine died with this turn in it."
    died_at: int = 0
    "How many tokens there were at the last death."

    @property
    def is_suspect(self) -> bool:
        """Whether it may only be in the engine with no other suspect."""
        return self.deaths >= ALONE_DEATHS

    @property
    def is_guilty(self) -> bool:
        """Whether it is not to go back."""
        return self.deaths >= MAX_DEATHS

    def advance(self, count: int) -> bool:
        """Count new tokens; return whether they clear a suspect."""
        self.tokens += count
        if not self.deaths or self.tokens < self.died_at + CLEARED_TOKENS:
            return False
        was_suspect = self.is_suspect
        self.deaths = 0
        return was_suspect

    def on_death(self) -> None:
        """Take note that the engine died."""
        if self.in_engine:
            self.in_engine = False
            self.deaths += 1
            self.died_at = self.tokens


def due(standings: Iterable[Standing]) -> list[Standing]:
    """Choose, oldest first, those that go into the engine now, and take note that they do."""
    all_of_them = list(standings)
    is_taken = any(one.is_suspect and one.in_engine for one in all_of_them)
    chosen = []
    for one in all_of_them:
        if one.in_engine or (one.is_suspect and is_taken):
            continue
        is_taken = is_taken or one.is_suspect
        one.in_engine = True
        chosen.append(one)
    return chosen
