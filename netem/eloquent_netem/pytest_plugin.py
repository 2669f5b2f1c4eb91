"""A pytest plugin: the fixture `netem` runs a test's asyncio code over a named network.

    def test_chat(netem):
        net = netem("train", seed=3)

        async def main():
            with net.on("server"):
                await serve(...)
            ...

        net.run(main())

Enable it in a `conftest.py`: `pytest_plugins = ["eloquent_netem.pytest_plugin"]`. The report of a
test that fails has scenario, seed and digest.
"""

from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import pytest

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


@pytest.fixture
def netem(request: pytest.FixtureRequest) -> Iterator[Callable[..., Netem]]:
    """Return a maker of networks: `netem(SCENARIO, seed=N)`; a scenario is a name or a file."""
    made: list[Netem] = []

    def make(scenario: str | Path, seed: int | None = None) -> Netem:
        net = Netem(scenario, seed)
        made.append(net)
        return net

    yield make
    for net in made:
        request.node.add_report_section("teardown", "netem", str(net))
