"""A Redis of a test's own: on a free port of loopback, in a folder of its own, ended by its pid."""

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEADLINE_S = 20.0
"Ends a hang; decides nothing."


class RedisServer:
    """A `redis-server` process; `start` again after `kill` has what it had kept."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        settings = ("--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._folder))
        self._process = subprocess.Popen(
            ["redis-server", *settings, "--save", "", "--appendonly", "yes", *self._options],
            stdout=subprocess.DEVNULL,
        )
        deadline_s = time.monotonic() + DEADLINE_S
        while not self._answers():
            assert self._process.poll() is None, "redis-server has ended"
            assert time.monotonic() < deadline_s, "redis-server does not answer"
            time.sleep(0.01)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(number)
            self._process.wait(DEADLINE_S)
            self._process = None

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1.0) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False


@contextmanager
def running(folder: Path) -> Iterator[RedisServer]:
    """Run one as long as the block lasts."""
    server = RedisServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def command(server: RedisServer, *words: str | bytes) -> bytes:
    """Run a command with `redis-cli`, and return what it prints."""
    call = [b"redis-cli", b"-p", b"%d" % server.port]
    call += [word.encode() if isinstance(word, str) else word for word in words]
    done = subprocess.run(call, check=True, capture_output=True, timeout=DEADLINE_S)
    return done.stdout.strip()
