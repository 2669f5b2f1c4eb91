"""`eloquent serve` as a process that is killed and started again."""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from processes import is_gone
from tiny_model import tiny_model, tiny_tokenizer

DEADLINE_S = 240.0
"Ends a hang; decides nothing."
CONTEXT_TOKENS = 4096


def tiny_model_in(folder: Path) -> Path:
    """Put the tiny model on disk, with room for an answer of some seconds."""
    path = folder / "tiny"
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT_TOKENS
    (path / "config.json").write_text(json.dumps(config))
    return path


class Serving:
    """A server process that can be killed and started again at the same address and state."""

    def __init__(self, model: str, state: Path, options: Sequence[str] = ()) -> None:
        """`options` are more of `eloquent serve`'s."""
        self._model = model
        self._state = state
        self._options = options
        self._port = 0
        self._process: Process | None = None
        self._stderr = state / "stderr"
        self.url = ""

    @property
    def command(self) -> list[str]:
        """What starts it."""
        return [
            *(sys.executable, "-m", "eloquent", "serve", "--model", self._model),
            *("--port", str(self._port), "--state", str(self._state / "state")),
            *("--log-level=info", *self._options),
        ]

    async def start(self) -> None:
        """Start it and wait until it is ready; the first time on a free port."""
        with self._stderr.open("ab") as stderr:
            self._process = await asyncio.create_subprocess_exec(
                *self.command, stdout=PIPE, stderr=stderr, start_new_session=True
            )
        assert self._process.stdout is not None
        line = (await self._process.stdout.readline()).decode()
        assert line.startswith("LISTENING "), self.log
        self.url = line.split()[1]
        found = re.search(r":(\d+)", self.url.removeprefix("eloquent://"))
        assert found is not None
        self._port = int(found[1])

    @property
    def log(self) -> str:
        """What it and its predecessors wrote to standard error."""
        return self._stderr.read_text()

    @property
    def engines(self) -> list[int]:
        """The server's child processes."""
        assert self._process is not None
        pid = self._process.pid
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    async def kill(self) -> None:
        """Kill the server, and see its engine go."""
        assert self._process is not None
        if self._process.returncode is not None:
            return
        engines = self.engines
        self._process.kill()
        await self._process.wait()
        for pid in engines:
            await is_gone(pid)

    async def interrupt(self) -> int:
        """Do what Ctrl-C at the server's terminal does; return the exit code."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGINT)
        return await self._process.wait()


@contextlib.asynccontextmanager
async def serving(
    model: str, state: Path, *options: str, deadline_s: float = DEADLINE_S
) -> AsyncIterator[Serving]:
    """Have a server run, with a directory for its state; `deadline_s` bounds all of it."""
    server = Serving(model, state, options)
    async with asyncio.timeout(deadline_s):
        await server.start()
        try:
            yield server
        finally:
            await server.kill()
