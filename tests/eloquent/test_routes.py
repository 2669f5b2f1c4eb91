"""This machine's routes: what the kernel says of them, in a network namespace of the test's own."""

import asyncio
import shutil
import subprocess
import sys

import pytest
from virtual_hosts import network_with

from eloquent.session.routes import FixedMachine, SystemMachine, this_machine
from eloquent_netem.vloop import run

IN_A_NAMESPACE = """
import asyncio, subprocess
from eloquent.session.routes import SystemMachine

def ip(*words):
    subprocess.run(("ip", *words), check=True)

async def main():
    machine = SystemMachine()
    changes = machine.changes()
    change = asyncio.ensure_future(anext(changes))
    await asyncio.sleep(0.1)
    print(machine.source_for("192.0.2.77"), machine.source_for("name.example"), change.done())
    ip("tuntap", "add", "wlan", "mode", "tun")
    ip("address", "add", "192.0.2.5/24", "dev", "wlan")
    ip("link", "set", "wlan", "up")
    await asyncio.wait_for(change, 20)
    await asyncio.sleep(0.1)
    print(machine.source_for("192.0.2.77"), machine.source_for("198.51.100.1"))
    change = asyncio.ensure_future(anext(changes))
    ip("route", "add", "default", "via", "192.0.2.1")
    await asyncio.wait_for(change, 20)
    print(machine.source_for("198.51.100.1"), machine.source_for("name.example") is not None)
    change = asyncio.ensure_future(anext(changes))
    ip("link", "set", "wlan", "down")
    await asyncio.wait_for(change, 20)
    await asyncio.sleep(0.1)
    print(machine.source_for("192.0.2.77"), machine.source_for("name.example"))

asyncio.run(main())
"""


def can_make_namespaces() -> bool:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    command = ("unshare", "-rn", "ip", "tuntap", "add", "probe", "mode", "tun")
    tried = subprocess.run(command, check=False, capture_output=True)
    return tried.returncode == 0


@pytest.mark.skipif(not can_make_namespaces(), reason="needs network namespaces and TUN devices")
def test_links_addresses_and_routes_that_come_and_go_are_told() -> None:
    done = subprocess.run(
        ("unshare", "-rn", sys.executable, "-c", IN_A_NAMESPACE),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "None None False",
        "192.0.2.5 None",
        "192.0.2.5 True",
        "None None",
    ], done.stderr


async def test_loopback_is_always_reached() -> None:
    machine = SystemMachine()
    assert machine.source_for("127.0.0.1") == "127.0.0.1"


async def test_sleep_does_not_pass_while_awake() -> None:
    machine = SystemMachine()
    before = machine.slept_s()
    await asyncio.sleep(0.05)
    assert machine.slept_s() - before < 0.04


async def test_a_real_loop_is_on_this_machine() -> None:
    assert isinstance(this_machine(), SystemMachine)


def test_a_virtual_loop_is_on_a_machine_that_never_changes() -> None:
    async def main() -> None:
        machine = this_machine()
        assert isinstance(machine, FixedMachine)
        assert machine.source_for("server") is not None
        assert machine.slept_s() == 0.0

    run(main(), network_with())
