"""`eloquent netem run` and `eloquent netem proxy`, as a user runs them."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eloquent_netem.namespaces import processes_inside
from eloquent_netem.run import AddressError, parse_address
from tests.netem.test_tun import needs_ip, network

DEADLINE_S = 60
"Ends a hang; decides nothing."

NETEM = [sys.executable, "-m", "eloquent", "netem"]

SERVE = """
import os, socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind((os.environ["NETEM_SERVER"], 7000))
while True:
    data, peer = s.recvfrom(2000)
    s.sendto(data.upper(), peer)
"""
ASK = """
import os, socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(0.3)
for _ in range(100):
    s.sendto(b"hello", (os.environ["NETEM_SERVER"], 7000))
    try:
        print(s.recv(2000).decode())
        sys.exit(7)
    except OSError:
        pass
"""


def netem(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*NETEM, *arguments], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


@pytest.fixture
def namespaces() -> None:
    """Skip a test where there can be none, by saying why."""
    with network():
        pass


@needs_ip
@pytest.mark.usefixtures("namespaces")
def test_two_commands_meet_inside_the_network(tmp_path: Path) -> None:
    server = tmp_path / "server.py"
    server.write_text(SERVE)
    serve, ask = f"{sys.executable} {server}", (sys.executable, "-c", ASK)
    ran = netem("run", "lossy-5", "--lateness-bound-ms", "inf", "--server", serve, "--", *ask)
    assert ran.stdout == "HELLO\n", ran.stderr
    assert ran.returncode == 7
    assert "router lateness" in ran.stderr


@needs_ip
@pytest.mark.usefixtures("namespaces")
def test_a_run_that_is_later_than_its_bound_is_refused(tmp_path: Path) -> None:
    server = tmp_path / "server.py"
    server.write_text(SERVE)
    serve, ask = f"{sys.executable} {server}", (sys.executable, "-c", ASK)
    ran = netem("run", "clean", "--lateness-bound-ms", "0", "--server", serve, "--", *ask)
    assert ran.returncode == 1
    assert "0.00 ms is the bound" in ran.stderr
    assert "widen the bound (--lateness-bound-ms" in ran.stderr


@needs_ip
@pytest.mark.usefixtures("namespaces")
def test_what_the_command_says_is_its_exit_code() -> None:
    # No packet crosses the network, so lateness cannot spoil the run.
    assert netem("run", "clean", "--", sys.executable, "-c", "raise SystemExit(3)").returncode == 3


@needs_ip
@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_both_commands_and_the_network(number: signal.Signals) -> None:
    client = "readlink /proc/self/ns/net; exec sleep 1000"
    with subprocess.Popen(
        [*NETEM, "run", "clean", "--server", "sleep 1000", "--", "sh", "-c", client],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if number == signal.SIGINT:
                os.killpg(process.pid, number)  # As a terminal does.
            else:
                process.send_signal(number)
            _, errors = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    namespace = Path("/proc/self/ns/net").stat().st_dev, int(re.sub(r"\D", "", said))
    assert processes_inside([namespace]) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "nosuch", "--", "true"), "nosuch"),
        (("run", "clean"), "no command"),
        (("run", "clean", "--server", "echo 'it", "--", "true"), "quote it as for a shell"),
        (("run", "clean", "--server", " ", "--", "true"), "leave --server out"),
        (("proxy", "clean", "--to", "nowhere"), "HOST:PORT"),
        (("proxy", "clean", "--to", "127.0.0.1:99999"), "HOST:PORT"),
    ],
)
def test_mistakes_get_one_clear_sentence(arguments: tuple[str, ...], said: str) -> None:
    ran = netem(*arguments)
    assert ran.returncode == 1
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_proxy_and_all_its_processes_ends_it_in_order(
    number: signal.Signals,
) -> None:
    # A terminal sends SIGINT to all of them, timeout(1) SIGTERM.
    with proxy_to(9) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("LISTENING")
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors
    assert "router lateness" in errors


@contextlib.contextmanager
def proxy_to(port: int) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [*NETEM, "proxy", "clean", "--to", f"127.0.0.1:{port}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_proxy_forwards_until_it_is_told_to_stop() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target:
        target.bind(("127.0.0.1", 0))
        target.settimeout(DEADLINE_S)
        with proxy_to(target.getsockname()[1]) as process:
            assert process.stdout is not None
            word, address = process.stdout.readline().split()
            assert word == "LISTENING"
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.settimeout(DEADLINE_S)
                client.sendto(b"there", parse_address(address))
                data, peer = target.recvfrom(100)
                target.sendto(data + b" and back", peer)
                assert client.recv(100) == b"there and back"
            process.send_signal(signal.SIGTERM)
            process.wait(DEADLINE_S)


@pytest.mark.parametrize("text", ["", ":", "host", "host:", ":1", "host:x", "host:65536", "h:-1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(AddressError, match="HOST:PORT"):
        parse_address(text)


def test_addresses() -> None:
    assert parse_address("127.0.0.1:0") == ("127.0.0.1", 0)
    assert parse_address("[::1]:4433") == ("::1", 4433)
