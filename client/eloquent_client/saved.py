"""Session tickets that one command leaves for the next, so that `eloquent resume` is faster.

They lie in the user's state directory (XDG), one for each server, and are as secret as passwords:
only the user may read them. A ticket that cannot be saved or read costs a round trip, no more.
"""

import contextlib
import hashlib
import os
from pathlib import Path

from eloquent.url import ServerUrl

NO_HOME = RuntimeError
"What `pathlib` raises for a user without a home directory, as containers have them."


def saved_tickets() -> Path:
    """Return the directory of the saved tickets; it need not be there."""
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(root) / "eloquent" / "tickets"


def save_ticket(url: ServerUrl, ticket: bytes) -> None:
    """Keep a server's ticket in place of the one before."""
    with contextlib.suppress(OSError, NO_HOME):
        file = _file(url)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = file.with_suffix(".new")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(ticket)
        new.replace(file)


def take_saved_ticket(url: ServerUrl) -> bytes | None:
    """Take out a server's ticket; None: there is none. It is for one connection."""
    try:
        file = _file(url)
        ticket = file.read_bytes()
        file.unlink()
    except (OSError, NO_HOME):
        return None
    return ticket


def _file(url: ServerUrl) -> Path:
    name = hashlib.sha256(str(url).encode()).hexdigest()
    return saved_tickets() / name[:32]
