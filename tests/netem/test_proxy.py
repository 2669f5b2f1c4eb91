"""The UDP proxy carries datagrams through the links, each client apart, and ends when it should."""

import contextlib
import functools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eloquent_netem.proxy import ProxyError, ProxyProcess, UdpProxy, start_proxy
from eloquent_netem.realtime import NotStartedError
from eloquent_netem.worker import WorkerError
from tests.netem.test_tun import links

HOST = "127.0.0.1"
DEADLINE_S = 30.0
"Ends a hang; decides nothing."

DRIVING = """
import json, math
from eloquent_netem.proxy import start_proxy
from tests.netem.test_tun import links
if __name__ == "__main__":
    with start_proxy(links, target=("127.0.0.1", 9), lateness_bound_s=math.inf) as proxy:
        print(json.dumps([proxy.pid, proxy.port]), flush=True)
        input()
"""

INTERRUPTED = """
import os, signal
from eloquent_netem.proxy import start_proxy
from tests.netem.test_tun import links
if __name__ == "__mp_main__":  # In the process with the links, before it does anything.
    os.kill(os.getpid(), signal.SIGINT)
if __name__ == "__main__":
    with start_proxy(links, target=("127.0.0.1", 9)):
        print("ready")
"""


def udp_socket(host: str = HOST, family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
    made = socket.socket(family, socket.SOCK_DGRAM)
    made.bind((host, 0))
    made.settimeout(DEADLINE_S)
    return made


@contextlib.contextmanager
def echo_server() -> Iterator[tuple[str, int]]:
    """Say back what comes, with the port it came from before it; an empty datagram ends it."""

    def serve() -> None:
        while True:
            data, peer = server.recvfrom(2000)
            if not data:
                return
            server.sendto(b"%d " % peer[1] + data, peer)

    with udp_socket() as server:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()
        finally:
            with udp_socket() as ending:
                ending.sendto(b"", server.getsockname())
            thread.join()


@contextlib.contextmanager
def proxy_to_echo(
    make: functools.partial[tuple[object, object]] | None = None, **options: object
) -> Iterator[ProxyProcess]:
    with (
        echo_server() as target,
        start_proxy(
            make or functools.partial(links),  # type: ignore[arg-type]
            target=target,
            lateness_bound_s=math.inf,
            **options,  # type: ignore[arg-type]
        ) as proxy,
    ):
        proxy.start()
        yield proxy


def ask(client: socket.socket, proxy: ProxyProcess, *texts: bytes) -> None:
    for text in texts:
        client.sendto(text, proxy.address)


def answers(client: socket.socket, count: int) -> list[tuple[int, bytes]]:
    """Return the answers: which port the server saw, and the text."""
    received = [client.recv(2000).split(b" ") for _ in range(count)]
    return [(int(port), text) for port, text in received]


def test_datagrams_come_back_in_order_and_are_counted() -> None:
    with proxy_to_echo() as proxy, udp_socket() as client:
        ask(client, proxy, *(b"%d" % index for index in range(20)))
        assert [text for _, text in answers(client, 20)] == [b"%d" % i for i in range(20)]
    stats = proxy.stats()
    assert (stats.driver.up.packets_sent, stats.driver.down.packets_delivered) == (20, 20)
    assert stats.driver.up.bytes_sent == 10 * 29 + 10 * 30
    assert stats.driver.lateness.packets == 40
    assert (stats.clients, stats.evicted, stats.socket_drops) == (1, 0, 0)


def test_a_drop_list_drops_exactly_those_packets() -> None:
    with proxy_to_echo(functools.partial(links, drops_up=(0, 2))) as proxy, udp_socket() as client:
        ask(client, proxy, b"a", b"b", b"c", b"d")
        assert [text for _, text in answers(client, 2)] == [b"b", b"d"]
    assert proxy.stats().driver.up.packets_lost == 2


def test_each_client_has_its_own_socket_at_the_server() -> None:
    with proxy_to_echo() as proxy, udp_socket() as one, udp_socket() as other:
        ask(one, proxy, b"1")
        ask(other, proxy, b"2")
        ask(one, proxy, b"3")
        of_one, of_other = answers(one, 2), answers(other, 1)
    assert [text for _, text in of_one] == [b"1", b"3"]
    assert [text for _, text in of_other] == [b"2"]
    assert of_one[0][0] == of_one[1][0] != of_other[0][0]
    assert proxy.stats().clients == 2


def test_the_client_silent_longest_makes_room_for_a_new_one() -> None:
    with (
        proxy_to_echo(max_clients=2) as proxy,
        udp_socket() as first,
        udp_socket() as second,
        udp_socket() as third,
    ):
        ports = {}
        for client in (first, second, first, third):
            ask(client, proxy, b"x")
            ports[client] = answers(client, 1)[0][0]
        for client in (first, third):
            ask(client, proxy, b"known")
            assert answers(client, 1) == [(ports[client], b"known")]
        assert (proxy.stats().clients, proxy.stats().evicted) == (3, 1)
        ask(second, proxy, b"anew")
        assert answers(second, 1)[0][1] == b"anew"
    assert (proxy.stats().clients, proxy.stats().evicted) == (4, 2)


def test_an_ipv4_client_of_a_dual_stack_socket_is_served() -> None:
    with proxy_to_echo(listen=("::ffff:127.0.0.1", 0)) as proxy, udp_socket() as client:
        client.sendto(b"four", (HOST, proxy.port))
        assert answers(client, 1)[0][1] == b"four"
    assert proxy.stats().driver.up.bytes_sent == 28 + 4


def test_a_server_that_does_not_listen_yet_costs_only_its_packets() -> None:
    with udp_socket() as server, udp_socket() as client:
        target = server.getsockname()
        server.close()
        with start_proxy(links, target=target, lateness_bound_s=math.inf) as proxy:
            proxy.start()
            client.sendto(b"lost", proxy.address)
            deadline = time.monotonic() + DEADLINE_S
            while proxy.stats().driver.up.packets_delivered < 1:
                assert time.monotonic() < deadline
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as late:
                late.bind(target)
                late.settimeout(DEADLINE_S)
                # The first send may only report that the last one was refused.
                client.sendto(b"1", proxy.address)
                client.sendto(b"2", proxy.address)
                assert late.recv(10) in (b"1", b"2")


def test_packets_before_the_start_are_refused() -> None:
    def run() -> None:
        with start_proxy(links, target=(HOST, 9)) as proxy, udp_socket() as client:
            client.sendto(b"x", proxy.address)
            deadline = time.monotonic() + DEADLINE_S
            while not proxy.stats().driver.packets_too_early:
                assert time.monotonic() < deadline

    with pytest.raises(NotStartedError):
        run()


def test_it_runs_in_process_too() -> None:
    up, down = links()
    with udp_socket() as client, echo_server() as target:
        proxy = UdpProxy(up, down, target=target)

        def on_answer() -> None:
            texts.append(client.recv(2000).split()[1])
            proxy.driver.stop()

        texts: list[bytes] = []
        proxy.driver.watch(client.fileno(), on_answer)
        client.sendto(b"hello", proxy.ready())
        proxy.start()
        proxy.driver.run()
        proxy.close()
    assert texts == [b"hello"]
    assert proxy.stats().driver.up.packets_delivered == 1


def test_a_taken_port_and_a_wrong_address_are_said() -> None:
    with udp_socket() as taken:
        with pytest.raises(ProxyError, match="choose another port"):
            start_proxy(links, target=(HOST, 9), listen=taken.getsockname()).__enter__()
        with pytest.raises(ProxyError, match="no address the proxy can use"):
            start_proxy(links, target=("no.such.host.invalid", 9)).__enter__()


def test_too_many_clients_are_refused() -> None:
    up, down = links()
    with pytest.raises(ProxyError, match="1 to 900 clients"):
        UdpProxy(up, down, target=(HOST, 9), max_clients=1000)


def test_a_proxy_that_died_is_said() -> None:
    def run() -> None:
        with start_proxy(links, target=(HOST, 9)) as proxy:
            assert proxy.pid is not None
            os.kill(proxy.pid, signal.SIGKILL)

    with pytest.raises(WorkerError, match="exit code -9"):
        run()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_the_process_that_started_it(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "driving.py"
    script.write_text(DRIVING, encoding="utf-8")
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((root, *sys.path))},
    ) as driving:
        assert driving.stdout is not None
        pid, port = json.loads(driving.stdout.readline())
        driving.send_signal(number)
        driving.wait(DEADLINE_S)
    deadline = time.monotonic() + DEADLINE_S
    while Path(f"/proc/{pid}/exe").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
        again.bind((HOST, port))


def test_ctrl_c_while_it_loads_is_left_to_the_one_who_started_it(tmp_path: Path) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED, encoding="utf-8")
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((root, *sys.path))},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n", "")
