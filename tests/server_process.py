"""`eloquent serve` as a process of its own, with the echo backend."""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path

from eloquent.url import ServerUrl, parse_url
from eloquent_server.serve import READY_PREFIX

DEADLINE_S = 60.0
"Ends a hang; decides nothing."


class ServerProcess:
    """One run of a server, from when it is ready."""

    def __init__(self, process: Process, url: ServerUrl, stderr: Path) -> None:
        self._process = process
        self._stderr = stderr
        self.url = url

    @property
    def log(self) -> str:
        """What it wrote to standard error so far."""
        return self._stderr.read_text()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process is over."""
        return self._process.returncode is not None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    async def says(self, text: str) -> None:
        """Wait until its standard error has this text."""
        async with asyncio.timeout(DEADLINE_S):
            while text not in self.log:  # noqa: ASYNC110 (another process writes it)
                await asyncio.sleep(0.02)

    async def line(self) -> str:
        """Return the next line of its standard output."""
        assert self._process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            return (await self._process.stdout.readline()).decode().rstrip("\n")

    async def wait(self) -> int:
        """Wait for its end; return its exit code."""
        async with asyncio.timeout(DEADLINE_S):
            return await self._process.wait()


@contextlib.asynccontextmanager
async def server_process(
    folder: Path,
    *options: str,
    environment: dict[str, str] | None = None,
    stdin: int = DEVNULL,
    model: str = "echo",
) -> AsyncIterator[ServerProcess]:
    """Run a server as long as the block lasts; a free port, unless `options` have one.

    `folder` is for its standard error, which is kept over restarts.
    """
    stderr = folder / "stderr"
    port = () if "--port" in options else ("--port", "0")
    with stderr.open("ab") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "eloquent", "serve", "--model", model),
            *(*port, *options),
            stdin=stdin,
            stdout=PIPE,
            stderr=file,
            env={**os.environ, **(environment or {})},
        )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            line = (await process.stdout.readline()).decode()
        assert line.startswith(READY_PREFIX), stderr.read_text()
        yield ServerProcess(process, parse_url(line.removeprefix(READY_PREFIX).strip()), stderr)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
