"""The subcommands `eloquent keys new` and `eloquent keys check`."""

import datetime
import sys
from pathlib import Path

from cyclopts import App

from eloquent_server.keys import Key, entry_for, new_key, read_keys

keys = App(name="keys", help="Make keys for a server, and check its file of keys.")


@keys.command
def new(name: str, *, tenant: str | None = None) -> None:
    """Make a key: the lines for the file go to standard output, the key itself to standard error.

    So `eloquent keys new alice >> keys.toml` lets alice in and shows the key, which is kept nowhere
    else: the file has its hash. A server that runs sees the change within a second or so.

    Parameters
    ----------
    name
        What the server's logs call it.
    tenant
        Whose turns and cached prefixes it uses, shared by all keys of that tenant; the name if it
        is left out.
    """
    key = new_key()
    lines = entry_for(key, name, tenant)
    print(f"\n{lines}")  # noqa: T201
    print(f"The key of {name}, shown this once:\n{key}", file=sys.stderr)  # noqa: T201


@keys.command
def check(file: Path) -> None:
    """Check a file of keys, and list whom it lets in.

    Parameters
    ----------
    file
        The file that the server gets with --keys.
    """
    now_s = datetime.datetime.now(datetime.UTC).timestamp()
    for key in read_keys(file):
        print("\t".join((key.name, f"tenant {key.tenant}", *_notes(key, now_s))))  # noqa: T201


def _notes(key: Key, now_s: float) -> list[str]:
    limits = key.limits
    notes = [] if key.weight == 1 else [f"weight {key.weight:g}"]
    if limits.turns is not None:
        notes.append(f"{limits.turns} turns")
    if limits.requests_per_minute is not None:
        notes.append(f"{limits.requests_per_minute:g} requests/min")
    if limits.bytes_per_minute is not None:
        notes.append(f"{limits.bytes_per_minute:g} bytes/min")
    if key.expires_s is not None:
        word = "expired" if key.expires_s <= now_s else "expires"
        date = datetime.datetime.fromtimestamp(key.expires_s, datetime.UTC)
        notes.append(f"{word} {date:%Y-%m-%d %H:%M} UTC")
    return notes
