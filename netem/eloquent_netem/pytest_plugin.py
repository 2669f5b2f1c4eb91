"""A pytest plugin: the fixture `netem` runs a test's asyncio code over a named network.

    def test_chat(netem):
        net = netem("train", seed=3)

        async def main():
            with net.on("server"):
                await serve(...)
            ...

        net.run(main())

It is there where the package is installed (`-p no:eloquent-netem` leaves it out). The report of a
test that fails has scenario, seed and digest.
"""

# Every run of pytest where this package is installed loads this module: it imports next to nothing.

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from eloquent_netem.testing import Netem


@pytest.fixture
def netem(request: pytest.FixtureRequest) -> "Iterator[Callable[..., Netem]]":
    """Return a maker of networks: `netem(SCENARIO, seed=N)`; a scenario is a name or a file."""
    from eloquent_netem.testing import Netem

    made: list[Netem] = []

    def make(scenario: str | Path, seed: int | None = None) -> Netem:
        net = Netem(scenario, seed)
        made.append(net)
        return net

    yield make
    for net in made:
        request.node.add_report_section("teardown", "netem", str(net))
