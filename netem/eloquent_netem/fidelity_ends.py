"""The programs that `eloquent_netem.fidelity` runs inside the two namespaces.

Each says `ready`, reads the instant of its start (CLOCK_MONOTONIC, which all namespaces share),
and prints what it has seen as JSON; delays in whole microseconds.
"""

import contextlib
import json
import math
import socket
import struct
import sys
import time
from collections.abc import Callable

from eloquent_netem.realtime import become_real_time, reduce_timer_slack

PORT = 7000
DATAGRAM_BYTES = 100
TOKEN_BYTES = 200
STAMP = struct.Struct("!d")
REQUEST = b"GET / HTTP/1.1\r\n\r\n"
UDP_GRACE_S = 1.5
"How long the last datagram may take."
GREEDY_SKIP_S = 2.0
"Slow start, which Mathis' formula leaves out."
FLOOD_STEP_S = 0.001
US_PER_S = 1_000_000


def send_datagrams(peer: str, count: str, interval_s: str) -> None:
    """Send `count` datagrams, each with the time at which it is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((peer, PORT))
        start_s = _start()
        for index in range(int(count)):
            _sleep_until(start_s + index * float(interval_s))
            sock.send(STAMP.pack(time.monotonic()).ljust(DATAGRAM_BYTES))


def receive_datagrams(own: str, count: str, interval_s: str) -> None:
    """Print the delay of each datagram that comes."""
    delays_us: list[int] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((own, PORT))
        end_s = _start() + int(count) * float(interval_s) + UDP_GRACE_S
        while (left_s := end_s - time.monotonic()) > 0:
            sock.settimeout(left_s)
            with contextlib.suppress(TimeoutError):
                data = sock.recv(2000)
                delays_us.append(_since_us(STAMP.unpack_from(data)[0]))
    _say(delays_us)


def serve_tokens(own: str, tokens: str, interval_s: str, congestion: str) -> None:
    """Answer one request with tokens, each with the time at which it is written."""
    with _listen(own, congestion) as server:
        _start()
        stream, _ = server.accept()
    with stream:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.recv(len(REQUEST))
        start_s = time.monotonic()
        for index in range(int(tokens)):
            _sleep_until(start_s + index * float(interval_s))
            stream.sendall(STAMP.pack(time.monotonic()).ljust(TOKEN_BYTES))
        stream.shutdown(socket.SHUT_WR)
        stream.recv(1)


def read_tokens(peer: str) -> None:
    """Ask, and print the delay from each token's writing to the reading of its last byte."""
    delays_us: list[int] = []
    buffer = bytearray()
    with socket.socket() as stream:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _sleep_until(_start())
        stream.connect((peer, PORT))
        stream.sendall(REQUEST)
        while data := stream.recv(65536):
            buffer += data
            while len(buffer) >= TOKEN_BYTES:
                delays_us.append(_since_us(STAMP.unpack_from(buffer)[0]))
                del buffer[:TOKEN_BYTES]
    _say(delays_us)


def serve_greedy(own: str, congestion: str) -> None:
    """Send as much as the congestion control lets, until the client leaves."""
    with _listen(own, congestion) as server:
        _start()
        stream, _ = server.accept()
    with stream, contextlib.suppress(ConnectionError):
        while True:
            stream.sendall(bytes(65536))


def read_greedy(peer: str, seconds: str) -> None:
    """Print how many bytes come per second, after slow start."""
    received = 0
    with socket.socket() as stream:
        _sleep_until(_start())
        stream.connect((peer, PORT))
        start_s = time.monotonic() + GREEDY_SKIP_S
        while (now := time.monotonic()) < start_s + float(seconds):
            data = stream.recv(65536)
            if now >= start_s:
                received += len(data)
    _say(received / float(seconds))


def flood(peer: str, seconds: str, packets_per_s: str) -> None:
    """Send so many datagrams a second, those that are due together once a millisecond."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((peer, PORT))
        start_s = _start(real_time=False)
        _sleep_until(start_s)
        total, sent = int(float(seconds) * float(packets_per_s)), 0
        while sent < total:
            due = min(total, math.ceil((time.monotonic() - start_s) * float(packets_per_s)))
            for _ in range(due - sent):
                sock.send(bytes(DATAGRAM_BYTES))
            sent = due
            time.sleep(FLOOD_STEP_S)
    _say(total / (time.monotonic() - start_s))


def sink(own: str, seconds: str) -> None:
    """Have a port open, so that no ICMP errors go back; what comes is of no interest."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((own, PORT))
        _sleep_until(_start(real_time=False) + float(seconds) + UDP_GRACE_S)


ROLES: dict[str, Callable[..., None]] = {
    role.__name__: role
    for role in (
        send_datagrams,
        receive_datagrams,
        serve_tokens,
        read_tokens,
        serve_greedy,
        read_greedy,
        flood,
        sink,
    )
}


def _listen(own: str, congestion: str) -> socket.socket:
    server = socket.create_server((own, PORT))
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
    return server


def _start(*, real_time: bool = True) -> float:
    """Say that all is ready, and return when to start."""
    reduce_timer_slack()
    if real_time:  # So that stamps tell of the network, and not of a busy machine.
        become_real_time()
    print("ready", flush=True)  # noqa: T201
    return float(sys.stdin.readline())


def _sleep_until(time_s: float) -> None:
    time.sleep(max(0.0, time_s - time.monotonic()))


def _since_us(time_s: float) -> int:
    return round((time.monotonic() - time_s) * US_PER_S)


def _say(found: object) -> None:
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    ROLES[sys.argv[1]](*sys.argv[2:])
