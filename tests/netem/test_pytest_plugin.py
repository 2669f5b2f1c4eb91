"""The fixture `netem` runs asyncio code over a named network, and names the seed in reports."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from eloquent_netem.scenario import library_names
from eloquent_netem.testing import Netem

FAILING = """
import asyncio

def test_it(netem):
    net = netem("clean", seed=3)
    net.run(asyncio.sleep(1))
    raise AssertionError("the test failed")
"""
NOT_USING = """
import sys

def test_it():
    loaded = {name for name in sys.modules if name.startswith("eloquent")}
    assert loaded == {"eloquent_netem", "eloquent_netem.pytest_plugin"}
"""


def outcome(test: str, folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run a test where nothing but the installed package names the plugin."""
    file = folder / "test_it.py"
    file.write_text(test)
    # pytest-asyncio warns where it is not configured.
    without = ["-p", "no:asyncio", "-p", "no:cacheprovider"]
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", *without, *options, file],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


class Counter(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.times: list[float] = []

    def datagram_received(self, data: bytes, addr: object) -> None:
        self.times.append(asyncio.get_running_loop().time())


async def send_for_a_while(net: Netem) -> list[float]:
    loop = asyncio.get_running_loop()
    _, counter = await loop.create_datagram_endpoint(Counter, local_addr=("198.51.100.1", 7))
    transport, _ = await loop.create_datagram_endpoint(Counter, remote_addr=("server", 7))
    for _ in range(300):
        transport.sendto(bytes(100))
        await asyncio.sleep(0.02)
    await asyncio.sleep(5)
    return counter.times


@pytest.mark.parametrize("name", library_names())
def test_every_scenario_carries_datagrams_and_is_the_same_for_a_seed(
    netem: Callable[..., Netem], name: str
) -> None:
    nets = [netem(name, seed=seed) for seed in (3, 3)]
    times = [net.run(send_for_a_while(net)) for net in nets]
    assert len(times[0]) > 100
    assert times[0] == times[1]
    assert nets[0].digest.hexdigest() == nets[1].digest.hexdigest()


def test_a_seed_matters(netem: Callable[..., Netem]) -> None:
    nets = [netem("wifi-far", seed=seed) for seed in (3, 4)]
    times = [net.run(send_for_a_while(net)) for net in nets]
    assert times[0] != times[1]


def test_without_a_seed_it_is_the_scenario_s(netem: Callable[..., Netem]) -> None:
    net = netem("wifi-far")
    assert net.seed == net.scenario.seed


def test_a_failing_test_s_report_names_scenario_and_seed(tmp_path: Path) -> None:
    done = outcome(FAILING, tmp_path)
    assert done.returncode == 1, done.stdout
    assert "scenario clean, seed 3" in done.stdout


def test_tests_that_do_not_use_it_load_nothing_else_of_ours(tmp_path: Path) -> None:
    done = outcome(NOT_USING, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_can_be_left_out(tmp_path: Path) -> None:
    done = outcome(FAILING, tmp_path, "-p", "no:eloquent-netem")
    assert "fixture 'netem' not found" in done.stdout
