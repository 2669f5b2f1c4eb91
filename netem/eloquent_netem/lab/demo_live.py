"""The demo over TUN: real programs, each pair in namespaces of its own."""

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec

from eloquent_netem.errors import NetemError
from eloquent_netem.lab.demo import OURS, Feed, News
from eloquent_netem.lab.rows import Place
from eloquent_netem.lab.sources import Recording
from eloquent_netem.lab.tun_ends import SETUP, Go, Hello, Setup
from eloquent_netem.namespaces import Side
from eloquent_netem.tun import TunNetwork, tun_network

TCP = "tcp-sse"
KINDS = {TCP: "sse", OURS: "quic"}
SIDES: tuple[Side, ...] = ("server", "client")

LEAD_S = 0.3
"From the start of the networks' clocks to the clients' beginning."

LATENESS_BOUND_S = 0.05
"Of the router: nothing is measured, and an eye does not see less."

PROGRAMS_S = 0.002
"About what the programs at both ends take for a token, which no network is to blame for."

END_S = 5.0
"A program that has done its work is gone by then."


@contextlib.contextmanager
def over_tun(place: Place, source: Recording, seed: int) -> Iterator[Feed]:
    """Give a feed of real programs, each pair in namespaces of its own.

    Raises:
        NetemError: the namespaces cannot be made, or a program in them cannot be started; the
            message says why and what helps.
    """
    with contextlib.ExitStack() as stack:
        feed = _Live(place)
        stack.callback(feed.close)  # After the networks, which end what still runs.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eloquent-demo-")))
        for scheme in feed.schemes:
            mine = folder / scheme
            mine.mkdir()
            setup = Setup(scheme=scheme, padding=True, congestion="cubic", plan=source.plan(seed))
            (mine / SETUP).write_bytes(msgspec.json.encode(setup))
            links = partial(place.scenario.links, seed, LEAD_S)
            network = stack.enter_context(tun_network(links, lateness_bound_s=LATENESS_BOUND_S))
            feed.add(_Pair(network, mine, KINDS[scheme]))
        feed.await_ready()
        try:
            yield feed
        finally:
            feed.stop()


class _Pair:
    """The two programs of a pane."""

    def __init__(self, network: TunNetwork, folder: Path, kind: str) -> None:
        self.network = network
        self._folder = folder
        self.programs = {side: self._start(side, kind) for side in SIDES}
        self.hello = Hello()

    def await_ready(self) -> None:
        """Wait until both programs are ready."""
        said = {side: self._first_line(side) for side in SIDES}
        self.hello = msgspec.json.decode(said["server"], type=Hello)

    def say(self, go: Go) -> None:
        """Tell the client when to begin."""
        pipe = self.programs["client"].stdin
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # Its end is noticed at once.
            pipe.write(msgspec.json.encode(go).decode() + "\n")
            pipe.flush()

    def failure(self) -> str:
        """Return how a program failed, or nothing; the client fails where the server has."""
        failed = [side for side in SIDES if self.programs[side].poll()]
        return f"The {failed[0]}'s program failed: {self._complaint(failed[0])}" if failed else ""

    def end_server(self) -> None:
        """Let the server end."""
        server = self.programs["server"]
        assert server.stdin is not None
        server.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(END_S)

    def close(self) -> None:
        """Close the pipes to what has ended."""
        for process in self.programs.values():
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _start(self, side: Side, kind: str) -> "subprocess.Popen[str]":
        with (self._folder / f"{side}.err").open("w") as complaints:
            return self.network.popen(
                side,
                [
                    sys.executable,
                    "-m",
                    "eloquent_netem.lab.demo_end",
                    kind,
                    side,
                    str(self._folder),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
                start_new_session=True,  # Ctrl-C is for us, who end it.
            )

    def _first_line(self, side: Side) -> str:
        pipe = self.programs[side].stdout
        assert pipe is not None
        line = pipe.readline()
        if not line:
            raise NetemError(f"The demo's {side} did not start: {self._complaint(side)}")
        return line

    def _complaint(self, side: Side) -> str:
        text = (self._folder / f"{side}.err").read_text(encoding="utf-8", errors="replace")
        return (text.strip().splitlines() or ["it said nothing"])[-1]


class _Live(Feed):
    def __init__(self, place: Place) -> None:
        super().__init__("live, real sockets and kernel TCP", (TCP, OURS))
        self._base_delay_s = place.base_delay_s + PROGRAMS_S
        self.pairs: list[_Pair] = []
        self._listeners: dict[tuple[int, Side], threading.Thread] = {}
        "By pane and program."

    def add(self, pair: _Pair) -> None:
        """Take the programs of the next pane."""
        self.pairs.append(pair)

    def await_ready(self) -> None:
        """Wait until all programs are ready."""
        for pair in self.pairs:
            pair.await_ready()

    def begin(self) -> None:
        for pair in self.pairs:
            pair.network.start()
        start_s = time.monotonic() + LEAD_S
        for pane, pair in enumerate(self.pairs):
            pair.say(Go(start_s, pair.hello))
            for side in SIDES:
                thread = threading.Thread(target=self._listen, args=(pane, side), daemon=True)
                thread.start()
                self._listeners[pane, side] = thread

    def is_over(self) -> bool:
        return all(self._is_over(pane) for pane in range(len(self.pairs)))

    def failure(self, pane: int) -> str:
        return self.pairs[pane].failure()

    def stop(self) -> None:
        """End the servers; the clients end with their answers, or with the networks."""
        for pair in self.pairs:
            pair.end_server()

    def close(self) -> None:
        """Wait for what listens, and close the pipes to what has ended."""
        for thread in self._listeners.values():
            thread.join()
        for pair in self.pairs:
            pair.close()

    def _is_over(self, pane: int) -> bool:
        """Return whether the client has ended and all its news are told, or the server is gone."""
        programs = self.pairs[pane].programs
        if programs["server"].poll() is not None:
            return True
        return (
            not self._listeners[pane, "client"].is_alive() and programs["client"].poll() is not None
        )

    def _listen(self, pane: int, side: Side) -> None:
        """Tell the news of one program: what it generated is due a while later."""
        pipe = self.pairs[pane].programs[side].stdout
        assert pipe is not None
        for line in pipe:
            if line.endswith("\n"):  # Else whoever wrote it was ended in the middle.
                time_s, text = json.loads(line)
                if side == "server":
                    self.news.put(News(pane, time_s + self._base_delay_s, None))
                else:
                    self.news.put(News(pane, time_s, text))
