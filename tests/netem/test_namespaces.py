"""The namespaces are quiet and fresh; what is missing is said with the way out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tools import needs_tool

from eloquent_netem import namespaces
from eloquent_netem.namespaces import (
    NamespaceHolder,
    PrivilegeError,
    Side,
    ToolMissingError,
    TunMissingError,
    open_tun,
    processes_inside,
)
from eloquent_netem.tun import TunNetwork, tun_network
from tests.netem.test_tun import links, needs_ip, network

HOLDING = """
from eloquent_netem.namespaces import LimitError, NamespaceHolder
try:
    NamespaceHolder(rootless={rootless}).close()
    print("made")
except LimitError as error:
    print(error)
"""


def output(net: TunNetwork, side: Side, *words: str) -> str:
    done = subprocess.run(net.command(side, words), capture_output=True, text=True, check=True)
    return done.stdout


@needs_ip
@pytest.mark.parametrize("rootless", [None, True])
def test_each_side_has_one_device_and_remembers_no_connection(rootless: bool | None) -> None:
    with network(rootless=rootless) as net:
        sides: tuple[Side, Side] = ("client", "server")
        for side in sides:
            settings = output(net, side, "cat", "/proc/sys/net/ipv4/tcp_no_metrics_save")
            assert settings.split() == ["1"]
            devices = [
                line.split()[0]
                for line in output(net, side, "ip", "-br", "link").split("\n")
                if line
            ]
            assert devices == ["lo", "tun0"]
            assert " mtu 1500 " in output(net, side, "ip", "link", "show", "tun0")
            assert "fe80" not in output(net, side, "ip", "-6", "addr")
        assert "192.0.2.1/30" in output(net, "client", "ip", "addr")
        assert "192.0.2.2/30" in output(net, "server", "ip", "addr")


@needs_ip
def test_two_networks_at_once_know_nothing_of_each_other() -> None:
    with network() as one, network() as other:
        assert len({*one.namespaces.ids.values(), *other.namespaces.ids.values()}) == 4
        process = one.popen("client", ["sleep", "1000"])
        assert processes_inside(set(other.namespaces.ids.values())) == []
    assert process.returncode is not None


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ToolMissingError, match="program ip: install the package iproute2"):
        tun_network(links).__enter__()


def test_a_missing_device_is_said(tmp_path: Path) -> None:
    with pytest.raises(TunMissingError, match="modprobe tun"):
        open_tun(tmp_path / "tun")


def test_a_device_of_another_kind_is_said(tmp_path: Path) -> None:
    path = tmp_path / "tun"
    path.touch()
    with pytest.raises(TunMissingError, match="modprobe tun"):
        open_tun(path)


def test_a_device_for_others_only_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(TunMissingError, match="chmod 0666"):
        open_tun(tmp_path / "tun")


@pytest.mark.parametrize(
    ("rootless", "way_out"),
    [(None, "run it as root, allow them"), (True, "allow them"), (False, "as root, or rootless")],
)
def test_missing_privileges_are_said(
    rootless: bool | None, way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_flags: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(namespaces, "_unshare", refuse)
    monkeypatch.setattr(namespaces, "check_tools", lambda: None)
    with pytest.raises(PrivilegeError, match=way_out):
        NamespaceHolder(rootless=rootless)


@needs_ip
@needs_tool("unshare")
@pytest.mark.parametrize("rootless", [None, True])
@pytest.mark.parametrize(
    ("limit", "number"), [("user", 0), ("net", 0), ("net", 1), ("net", 2), ("net", 3)]
)
def test_a_limit_of_the_kernel_s_is_said(rootless: bool | None, limit: str, number: int) -> None:
    with network():
        pass  # Or skip.
    lowered = f"echo {number} > /proc/sys/user/max_{limit}_namespaces && exec "
    make = f"{sys.executable} -c '{HOLDING.format(rootless=rootless)}'"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", lowered + make],
        capture_output=True,
        text=True,
        check=False,
    )
    # Where no user namespace is asked for, none is missed; and networks are three, all held at
    # once: the kernel takes its time to give back one that was left.
    is_enough = (rootless, limit) == (None, "user") or number == 3
    wanted = "made" if is_enough else "The kernel's limit on namespaces"
    assert done.stdout.startswith(wanted), done.stderr
