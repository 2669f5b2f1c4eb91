"""The subcommand `eloquent lab doctor`."""

import asyncio
import json as json_format
import logging
import sys
from pathlib import Path

EXIT_UNREACHABLE = 1


def doctor(server: str, /, *, seconds: float = 4.0, json: Path | None = None) -> None:
    """Examine the path from here to an Eloquent server, and say what it will do there.

    Tries QUIC and WebSocket as clients do, and measures round trip, loss, the largest packet and
    whether ECN marks survive. It asks the server for nothing. The exit code is 1 if clients could
    not use the server from here.

    Parameters
    ----------
    server
        HOST, HOST:PORT, or the URL that the server printed.
    seconds
        How long to measure.
    json
        Write what was found to this file.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from eloquent_netem.lab.doctor import examine, parse_target
    from eloquent_netem.lab.doctor_words import figures, verdict
    from eloquent_netem.lab.stalls_commands import check_writable

    url = parse_target(server)
    if json is not None:
        check_writable(json)
    # What breaks is said in our words; aioquic logs it too.
    logging.getLogger("quic").setLevel(logging.CRITICAL)
    console = Console()
    with Console(stderr=True).status(f"Examining the path to {url.host} ..."):
        found = asyncio.run(examine(url, seconds))
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")  # A pin must be whole.
    for name, figure in figures(found):
        table.add_row(name, escape(figure))
    console.print(table)
    for line in verdict(found):
        console.print(f"\n{line}", markup=False)
    if json is not None:
        json.write_text(json_format.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
    if found.rung is None or not found.is_trusted:
        sys.exit(EXIT_UNREACHABLE)
