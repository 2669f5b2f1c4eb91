"""Looking at processes that are not one's own children."""

import asyncio
import os
import time
from pathlib import Path

DEADLINE_S = 60.0
"Ends a hang; decides nothing."


def is_alive(pid: int) -> bool:
    """Say whether a process runs; one that only waits to be reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


async def is_gone(pid: int) -> float:
    """Wait for a process's end; return how long it took, in seconds."""
    began_s = time.monotonic()
    async with asyncio.timeout(DEADLINE_S):
        while is_alive(pid):  # noqa: ASYNC110 (it is not our child)
            await asyncio.sleep(0.01)
    return time.monotonic() - began_s


def children() -> list[str]:
    """Return the command lines of this process's own children."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids]
