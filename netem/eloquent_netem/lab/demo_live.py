"""The demo over TUN: real programs, each pair in namespaces of its own."""

import contextlib
import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec

from eloquent_netem.lab.demo import OURS, Feed, News
from eloquent_netem.lab.rows import Place
from eloquent_netem.lab.sources import Recording
from eloquent_netem.lab.tun_ends import SETUP, Go, Hello, Setup
from eloquent_netem.lab.tun_run import SIDES, await_ready, close_pipes, failed, say_go, start_end
from eloquent_netem.namespaces import Side
from eloquent_netem.tun import TunNetwork, tun_network

TCP = "tcp-sse"
KINDS = {TCP: "sse", OURS: "quic"}
ENDS = "eloquent_netem.lab.demo_end"

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
        self.programs = {
            side: start_end(network, side, kind, folder, module=ENDS) for side in SIDES
        }
        self._folder = folder
        self._hello = Hello()

    def await_ready(self) -> None:
        """Wait until both programs are ready."""
        self._hello = await_ready(self.programs, self._folder)

    def begin(self, start_s: float) -> None:
        """Tell the client when to begin."""
        say_go(self.programs["client"], Go(start_s, self._hello))

    def failure(self) -> str:
        """Return how a program failed, or nothing; the client fails where the server has."""
        for side in SIDES:
            code = self.programs[side].poll()
            if code:
                return str(failed(self._folder, side, code))
        return ""

    def end(self) -> None:
        """Let the server end; the client ends with its answer, or with the network."""
        server = self.programs["server"]
        assert server.stdin is not None
        server.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(END_S)


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
            pair.begin(start_s)
            for side in SIDES:
                thread = threading.Thread(target=self._listen, args=(pane, side), daemon=True)
                thread.start()
                self._listeners[pane, side] = thread

    def is_over(self) -> bool:
        return all(self._is_over(pane) for pane in range(len(self.pairs)))

    def failure(self, pane: int) -> str:
        return self.pairs[pane].failure()

    def stop(self) -> None:
        """Let all programs end."""
        for pair in self.pairs:
            pair.end()

    def close(self) -> None:
        """Wait for what listens, and close the pipes to what has ended."""
        for thread in self._listeners.values():
            thread.join()
        for pair in self.pairs:
            for process in pair.programs.values():
                close_pipes(process)

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
