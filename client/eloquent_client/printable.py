"""Text from elsewhere, made safe for a terminal."""

_CONTROLS = dict.fromkeys(
    code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"
)


def printable(text: str) -> str:
    """Return the text without control characters, which could steer the reader's terminal.

    Line ends and tabs stay. Without the escape character a terminal shows the rest of an escape
    sequence as plain text.
    """
    return text.translate(_CONTROLS)
