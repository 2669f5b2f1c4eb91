"""`eloquent chat` in a real terminal, with the server that it starts itself."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools import needs_tool

DEADLINE_S = 60.0
"Ends a hang; decides nothing."


class Terminal:
    """A program in tmux: keys in, screen out."""

    def __init__(self, socket: Path, command: list[str]) -> None:
        self._socket = socket
        # The last command keeps the screen there to be read after the program's end.
        line = f"{shlex.join(command)}; echo exit code $?; exec cat"
        self._tmux("-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "30", line)

    def type(self, text: str) -> None:
        """Type text as it is."""
        self._tmux("send-keys", "-l", text)

    def press(self, *keys: str) -> None:
        """Press keys, by tmux's names."""
        self._tmux("send-keys", *keys)

    def wait_for(self, text: str, times: int = 1) -> str:
        """Wait until the screen shows `text` so many times, and return the screen."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            screen = self._tmux("capture-pane", "-p")
            if screen.count(text) >= times:
                return screen
            assert time.monotonic() < deadline, f"no {text!r} on the screen:\n{screen}"
            time.sleep(0.05)

    def close(self) -> None:
        """End the program, if it still runs."""
        self._tmux("kill-server")

    def _tmux(self, *arguments: str) -> str:
        # Python's own view of the environment: readline, which pytest loads, adds the size of
        # pytest's terminal behind its back.
        return subprocess.run(
            ["tmux", "-S", str(self._socket), *arguments],
            check=True,
            env=dict(os.environ),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        ).stdout


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    command = [sys.executable, "-m", "eloquent", "chat", "--model", "echo"]
    terminal = Terminal(tmp_path / "tmux", command)
    yield terminal
    terminal.close()


@needs_tool("tmux")
def test_a_chat(terminal: Terminal) -> None:
    terminal.wait_for("● connected")
    terminal.type("first line")
    terminal.press("C-j")
    terminal.type("and a **second** one")
    terminal.press("Enter")
    terminal.wait_for("and a **second** one")
    terminal.wait_for("and a second one")
    terminal.wait_for("no loss")
    terminal.wait_for("● connected")

    terminal.type(" ".join(str(number) for number in range(1000, 1200)))
    terminal.press("Enter")
    terminal.wait_for("● receiving")
    terminal.wait_for("1002", times=2)
    terminal.press("Escape")
    terminal.wait_for("Stopped.")

    terminal.press("C-n")
    terminal.wait_for("Write a message")
    terminal.press("C-q")
    terminal.wait_for("exit code 0")
