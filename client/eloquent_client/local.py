"""A server of one's own: a child process on loopback, for as long as a block lasts."""

import asyncio
import os
import re
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from eloquent.errors import ConfigurationError
from eloquent.url import ServerUrl, parse_url
from eloquent_client.client import Client
from eloquent_client.errors import LocalServerError

READY_PREFIX = "LISTENING "
"Starts the line on standard output with which a server gives its URL once it is ready."

SERVER_OPTIONS = "ELOQUENT_SERVE_"

STOP_TIMEOUT_S = 5.0
"A server whose standard input has closed ends within this time, or is terminated."

KEPT_LINES = 20
"As many of a failed server's last lines are shown."

READ_BYTES = 4096

OnProgress = Callable[[str], None]

Ending = Callable[[str], Awaitable[LocalServerError]]
"Waits for a server's end and returns the error that tells of it; takes when that was."


@asynccontextmanager
async def local_server(
    model: str | None = None, *, on_progress: OnProgress = lambda line: None
) -> AsyncIterator[ServerUrl]:
    """Run a server on loopback as long as the block lasts, and give its URL once it is ready.

    `model` is what `eloquent serve --model` takes; None is its default. `on_progress` gets each
    line that the server writes to standard error, also later ones. Readiness has no deadline: a
    model may have to be downloaded first.

    Raises:
        LocalServerError: the server cannot be started, or ended before it was ready.
    """
    async with _running(model, on_progress) as (url, _):
        yield url


@asynccontextmanager
async def local_client(
    model: str | None = None,
    *,
    on_progress: OnProgress = lambda line: None,
    on_end: Callable[[LocalServerError], None] = lambda error: None,
    **options: Any,
) -> AsyncIterator[Client]:
    """Run a server as `local_server` does, and give a client of it; `options` are `Client`'s.

    If the server ends before the block does, the client's turns fail at once with
    `LocalServerError`, those that run and those asked later, and `on_end` is called with it.

    Raises:
        LocalServerError: the server cannot be started, or ended before it was ready.
    """

    async def watch(client: Client, ending: Ending) -> None:
        error = await ending("while it was in use: run the command anew")
        client.fail(error)
        on_end(error)

    async with (
        _running(model, on_progress) as (url, ending),
        Client(url, **options) as client,
    ):
        watching = asyncio.create_task(watch(client, ending))
        try:
            yield client
        finally:
            watching.cancel()


@asynccontextmanager
async def _running(
    model: str | None, on_progress: OnProgress
) -> AsyncIterator[tuple[ServerUrl, Ending]]:
    command = [sys.executable, "-m", "eloquent", "serve"]
    command += ["--host", "127.0.0.1", "--port", "0", "--exit-with-parent"]
    if model is not None:
        command += [f"--model={model}"]
    # Options in the environment are those of another server on this machine.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(SERVER_OPTIONS)
    }
    try:
        # In a session of its own a Ctrl-C at the terminal does not reach the server: it ends when
        # its standard input closes, which also happens if this process is killed.
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True, env=environment
        )
    except OSError as error:
        raise LocalServerError(
            f"Cannot start a server on this machine: {error}. Start one elsewhere and give its URL "
            "with --url."
        ) from error
    last_lines: deque[str] = deque(maxlen=KEPT_LINES)
    logs = asyncio.create_task(_follow_logs(process, last_lines, on_progress))
    readers = {logs}

    async def ending(when: str) -> LocalServerError:
        code = await process.wait()
        await asyncio.wait((logs,), timeout=STOP_TIMEOUT_S)
        return LocalServerError(
            f"The server started on this machine ended with exit code {code} {when}.",
            "\n".join(last_lines),
        )

    try:
        url = await _wait_until_ready(process)
        if url is None:
            raise await ending(
                "before it was ready: put right what it said last, or give the URL of another "
                "server with --url"
            )
        readers.add(asyncio.create_task(_drain(process)))
        yield url, ending
    finally:
        try:
            await _stop(process)
            await asyncio.wait(readers, timeout=STOP_TIMEOUT_S)
        finally:
            for reader in readers:
                reader.cancel()


async def _wait_until_ready(process: Process) -> ServerUrl | None:
    """Return the URL that the server prints, or None if its output ends first."""
    assert process.stdout is not None
    async for line in _lines(process.stdout):
        if line.startswith(READY_PREFIX):
            try:
                return parse_url(line.removeprefix(READY_PREFIX).strip())
            except ConfigurationError as error:
                raise LocalServerError(
                    f"The server started on this machine gave no usable URL: {error} Its release "
                    "and the client's may differ: install both anew."
                ) from error
    return None


async def _follow_logs(process: Process, last: deque[str], on_progress: OnProgress) -> None:
    assert process.stderr is not None
    async for line in _lines(process.stderr):
        last.append(line)
        with suppress(OSError):  # nowhere to show it; but unread the server would come to a stop
            on_progress(line)


async def _drain(process: Process) -> None:
    """Read what else the server prints, so that it is never blocked."""
    assert process.stdout is not None
    while await process.stdout.read(READ_BYTES):
        pass


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Give out lines of any length; a rewritten line (CR) counts as one each time."""
    rest = b""
    while data := await stream.read(READ_BYTES):
        *lines, rest = re.split(rb"[\r\n]+", rest + data)
        for line in lines:
            if line:
                yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


async def _stop(process: Process) -> None:
    """Close the server's standard input; terminate it if it stays, kill it if it must be."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        if not await _ends_in_time(process):
            process.terminate()
            await _ends_in_time(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _ends_in_time(process: Process) -> bool:
    try:
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    except TimeoutError:
        return False
    return True
