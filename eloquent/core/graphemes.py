"""Where a text may be cut so that no reader sees half a character."""

import unicodedata
from collections.abc import Iterator

FIRST_COMBINING = "\u0300"
"No code point below this one continues a character, a line feed after a carriage return aside."

ZERO_WIDTH_JOINER = "\u200d"
ZERO_WIDTH_NON_JOINER = "\u200c"


def clusters(text: str) -> Iterator[str]:
    """Split a text into what readers take for one character each.

    The rules are those of Unicode's UAX #29 that Python's tables can tell: combining marks,
    variation selectors, joined emoji, skin tones, flags, tags and conjoining Hangul stay whole.
    """
    start = 0
    for position in range(1, len(text) + 1):
        if position == len(text) or not continues(text[start:position], text[position]):
            yield text[start:position]
            start = position


def continues(cluster: str, char: str) -> bool:
    """Return whether `char` belongs to the character that `cluster` (not empty) began."""
    if char < FIRST_COMBINING:
        return char == "\n" and cluster[-1] == "\r"
    last = cluster[-1]
    return (
        char in (ZERO_WIDTH_JOINER, ZERO_WIDTH_NON_JOINER)
        or last == ZERO_WIDTH_JOINER
        or unicodedata.category(char).startswith("M")
        or "\U0001f3fb" <= char <= "\U0001f3ff"  # skin tones
        or "\U000e0020" <= char <= "\U000e007f"  # tags: the flags of England, Scotland, Wales
        or (len(cluster) == 1 and _is_regional(last) and _is_regional(char))
        or ("\u1100" <= last <= "\u11ff" and "\u1160" <= char <= "\u11ff")  # Hangul, in parts
    )


def _is_regional(char: str) -> bool:
    return "\U0001f1e6" <= char <= "\U0001f1ff"
