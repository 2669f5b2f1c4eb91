"""One run of the engine's process, from the server's side: how it starts, talks and ends."""

import asyncio
import os
import socket
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Sequence

from eloquent_server.engine import ipc

STOP_S = 3.0
"How long an engine that is told to close, or has closed its channel, has to end."

_STANDARD_ERROR = 2
"For what the process prints; the server's standard output is for its URL alone."


class Child:
    """A process, and the channel to it; to be started in the main thread.

    Where the thread that started a process ends, Linux takes its parent for ended.
    """

    def __init__(
        self, process: Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._deadline: asyncio.TimerHandle | None = None

    @classmethod
    async def start(cls, command: Sequence[str]) -> "Child":
        """Start the process, in a session of its own: a Ctrl-C is for the server alone.

        Raises:
            OSError: it cannot be started.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    str(theirs.fileno()),
                    str(os.getpid()),
                    stdin=DEVNULL,
                    stdout=_STANDARD_ERROR,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            reader, writer = await asyncio.open_unix_connection(sock=ours)
        except BaseException:
            ours.close()  # Which ends the process, if there is one.
            raise
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send(self, message: ipc.ToEngine) -> None:
        """Send a message; it is lost if the process is gone.

        Raises:
            ValueError: it is too large.
        """
        self._writer.write(ipc.encode_frame(message))

    async def read(self) -> ipc.FromEngine | None:
        """Wait for the next message; None: it has ended."""
        return await ipc.read(self._reader)

    def close(self) -> None:
        """Tell the process to fail what runs and end; it has `STOP_S` for that."""
        self.send(ipc.Close())
        self._end_soon()

    def _end_soon(self) -> None:
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().call_later(STOP_S, self.kill)

    async def stop(self) -> int:
        """Close the channel, wait for the end, and return the exit code; below 0: a signal."""
        self._writer.close()
        self._end_soon()
        try:
            return await self._process.wait()
        except asyncio.CancelledError:
            self.kill()
            raise
        finally:
            if self._deadline is not None:
                self._deadline.cancel()

    def kill(self) -> None:
        """End the process now, if it has not ended."""
        if self._process.returncode is None:
            self._process.kill()
