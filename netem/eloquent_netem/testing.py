"""What the fixture `netem` makes: asyncio code of a test, over a named network."""

from collections.abc import Coroutine
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from eloquent_netem.capture import TraceDigest
from eloquent_netem.scenario import load_scenario
from eloquent_netem.vloop import LIMIT_S, run, scenario_network

T = TypeVar("T")


class Netem:
    """The hosts "client" and "server", joined by a scenario's path, in virtual time."""

    def __init__(self, scenario: str | Path, seed: int | None = None) -> None:
        self.scenario = load_scenario(scenario)
        self.seed = self.scenario.seed if seed is None else seed
        self.digest = TraceDigest()
        self.network = scenario_network(self.scenario, self.seed, observers=[self.digest.observe])

    def __str__(self) -> str:
        return (
            f"scenario {self.scenario.name}, seed {self.seed}: {self.digest.entries} entries in "
            f"the packet trace, digest {self.digest.hexdigest()}"
        )

    def on(self, host: str) -> AbstractContextManager[None]:
        """Let code in the block, and tasks made there, run on this host.

        Raises:
            NetworkSetupError: there is no such host.
        """
        return self.network.on(host)

    def run(self, main: Coroutine[Any, Any, T], *, limit_s: float = LIMIT_S) -> T:
        """Run `main` in virtual time and return its result; see `eloquent_netem.vloop.run`."""
        return run(main, self.network, limit_s=limit_s)
