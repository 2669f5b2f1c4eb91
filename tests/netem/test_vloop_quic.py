"""Unmodified QUIC endpoints in virtual time: stock aioquic's, and our own."""

import asyncio
import os
import random
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aioquic.asyncio import QuicConnectionProtocol, connect, serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import DatagramFrameReceived, QuicEvent
from certificates import fixed_certificate
from telling import Telling

from eloquent.core.events import End, TextDelta
from eloquent.errors import ConnectionFailedError
from eloquent.quic.listen import listen
from eloquent.session.session import Session
from eloquent.url import ServerUrl
from eloquent_netem.capture import Captured, Fate, TraceDigest
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import IndependentLoss, Outages
from eloquent_netem.packet import Packet
from eloquent_netem.vloop import VirtualNetwork, run

PORT = 4433
DELAY_S = 0.025
OUTAGE_S = (4.0, 7.0)


def has_ipv6() -> bool:
    """Stock aioquic's client makes a real IPv6 socket, though nothing leaves by it here."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="needs IPv6 sockets, not available here")


CERTIFICATE = fixed_certificate()


def configuration(*, is_client: bool) -> QuicConfiguration:
    made = QuicConfiguration(
        is_client=is_client, alpn_protocols=["echo"], max_datagram_frame_size=65535
    )
    if is_client:
        made.verify_mode = ssl.CERT_NONE
    else:
        made.certificate = CERTIFICATE.certificate
        made.private_key = CERTIFICATE.private_key
    return made


class Trace:
    """Digests and counts what goes over both links."""

    def __init__(self) -> None:
        self.digest = TraceDigest()
        self.times: list[tuple[str, Fate, float]] = []

    def observe(self, now: float, direction: str, packet: Packet, fate: Fate) -> None:
        self.digest.observe(now, direction, packet, fate)
        self.times.append((direction, fate, now))

    def count(self, direction: str, fate: Fate, start_s: float = 0.0, stop_s: float = 1e9) -> int:
        return sum(
            (way, what) == (direction, fate) and start_s <= time < stop_s
            for way, what, time in self.times
        )


def lossy(seed: int, probability: float, outages: Any = ()) -> tuple[VirtualNetwork, Trace]:
    """Return client and server with loss both ways, and the trace of what they send."""
    trace = Trace()
    links = []
    for name in ("up", "down"):
        independent = IndependentLoss(probability, stage_rng(seed, name, "loss"))
        loss = Outages(outages, independent)
        link = Link(delay_s=DELAY_S, seed=seed, name=name, loss=loss, jitter_s=0.005)
        links.append(Captured(link, name, [trace.observe]))
    return VirtualNetwork.between(*links), trace


# Stock aioquic.


class Datagrams(QuicConnectionProtocol):
    """Collects datagrams; a server's sends them back."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.received: list[bytes] = []

    def quic_event_received(self, event: QuicEvent) -> None:
        super().quic_event_received(event)
        if isinstance(event, DatagramFrameReceived):
            self.received.append(event.data)
            if not self._quic.configuration.is_client:
                self.send(event.data)

    def send(self, data: bytes) -> None:
        self._quic.send_datagram_frame(data)
        self.transmit()


def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async def copy() -> None:
        writer.write(await reader.read())
        writer.write_eof()

    echoing.append(asyncio.ensure_future(copy()))


echoing: list[asyncio.Task[None]] = []
"Asyncio keeps no reference to a task that runs."


@pytest.fixture(autouse=True)
def _forget_tasks() -> Iterator[None]:
    yield
    echoing.clear()


async def echo_over_aioquic(network: VirtualNetwork) -> tuple[bytes, list[bytes], float]:
    """Send 20 kB on a stream and 100 datagrams; return what comes back and when."""
    with network.on("server"):
        server = await serve(
            "0.0.0.0",
            PORT,
            configuration=configuration(is_client=False),
            create_protocol=Datagrams,
            stream_handler=echo,
        )
    async with connect(
        "server", PORT, configuration=configuration(is_client=True), create_protocol=Datagrams
    ) as client:
        assert isinstance(client, Datagrams)
        reader, writer = await client.create_stream()
        writer.write(bytes(range(200)) * 100)
        writer.write_eof()
        for number in range(100):
            client.send(number.to_bytes(2, "big"))
            await asyncio.sleep(0.02)
        answer = await reader.read()
        await asyncio.sleep(1)
        received = client.received
    server.close()
    return answer, received, asyncio.get_running_loop().time()


@needs_ipv6
def test_stock_aioquic_echoes_streams_and_datagrams_without_loss() -> None:
    network, trace = lossy(1, 0)
    answer, received, _ = run(echo_over_aioquic(network), network)
    assert answer == bytes(range(200)) * 100
    assert received == [number.to_bytes(2, "big") for number in range(100)]
    for way in ("up", "down"):
        # What the last packets, sent when the connection closes, would be is not waited for.
        assert 0 <= trace.count(way, Fate.SENT) - trace.count(way, Fate.DELIVERED) <= 2


@needs_ipv6
def test_stock_aioquic_echoes_through_loss() -> None:
    network, trace = lossy(3, 0.1)
    answer, received, _ = run(echo_over_aioquic(network), network)
    assert answer == bytes(range(200)) * 100
    assert 60 < len(received) < 95
    lost = 1 - trace.count("up", Fate.DELIVERED) / trace.count("up", Fate.SENT)
    assert lost == pytest.approx(0.1, abs=0.06)


@needs_ipv6
def test_stock_aioquic_is_the_same_for_a_seed_and_another_for_another() -> None:
    digests = []
    for seed in (3, 3, 4):
        network, trace = lossy(seed, 0.1)
        _, received, ended = run(echo_over_aioquic(network), network)
        digests.append((trace.digest.hexdigest(), trace.digest.entries, tuple(received), ended))
    assert digests[0] == digests[1]
    assert digests[0][0] != digests[2][0]


@needs_ipv6
def test_stock_aioquic_gives_up_where_nobody_listens() -> None:
    network, _ = lossy(1, 0)

    async def main() -> float:
        with pytest.raises(ConnectionError):
            async with connect("server", PORT, configuration=configuration(is_client=True)):
                pass
        return asyncio.get_running_loop().time()

    # A socket that is not connected does not learn of refusal: the idle timeout decides.
    assert run(main(), network) == pytest.approx(60, abs=1)


# Our own endpoints.

TOKENS = [f"word {number} " for number in range(200)]


GAP_S = 0.05
"The answer takes ten seconds."


def telling() -> Telling:
    return Telling(TOKENS, GAP_S)


async def read_a_turn(network: VirtualNetwork) -> list[tuple[float, str]]:
    """Return the texts that come, and when."""
    loop = asyncio.get_running_loop()
    with network.on("server"):
        listener = await listen(
            "server",
            PORT,
            certificate=CERTIFICATE,
            service=Telling(TOKENS, GAP_S),
            skips=random.Random(1),
        )
    session = Session(ServerUrl("server", PORT, CERTIFICATE.pin))
    texts = []
    async for event in session.ask(b"{}"):
        if isinstance(event, TextDelta):
            texts.append((loop.time(), event.text))
        else:
            assert isinstance(event, End)
    await session.close()
    await listener.close()
    return texts


def turn_of(seed: int) -> tuple[list[tuple[float, str]], Trace]:
    network, trace = lossy(seed, 0.1, [OUTAGE_S])
    return run(read_a_turn(network), network), trace


def test_our_endpoints_go_on_after_an_outage() -> None:
    texts, trace = turn_of(1)
    assert "".join(text for _, text in texts) == "".join(TOKENS)
    start, stop = OUTAGE_S
    for way in ("up", "down"):
        late = DELAY_S + 0.005
        assert trace.count(way, Fate.SENT, start, stop) > 0
        assert trace.count(way, Fate.DELIVERED, start + late, stop + DELAY_S) == 0
    in_outage = [time for time, _ in texts if start + DELAY_S + 0.005 < time < stop + DELAY_S]
    assert in_outage == []
    assert any(stop < time < stop + 1 for time, _ in texts)


def test_our_endpoints_are_the_same_for_a_seed_and_another_for_another() -> None:
    runs = [turn_of(seed) for seed in (1, 1, 2)]
    digests = [trace.digest.hexdigest() for _, trace in runs]
    assert digests[0] == digests[1]
    assert runs[0][0] == runs[1][0]
    assert digests[0] != digests[2]


def digest_of_a_process(hash_seed: str) -> str:
    here = Path(__file__)
    code = (
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('quic', {str(here)!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.turn_of(1)[1].digest.hexdigest())\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONHASHSEED": hash_seed,
            "PYTHONPATH": str(here.parents[1]),  # As in pyproject.toml.
        },
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_our_endpoints_are_the_same_in_every_process() -> None:
    digests = {digest_of_a_process(hash_seed) for hash_seed in ("0", "4242")}
    assert digests == {turn_of(1)[1].digest.hexdigest()}


def test_our_client_learns_at_once_that_nobody_listens() -> None:
    network, _ = lossy(1, 0)

    async def main() -> float:
        with pytest.raises(ConnectionFailedError, match="Nothing listens"):
            await Session(ServerUrl("server", PORT, CERTIFICATE.pin)).connect()
        return asyncio.get_running_loop().time()

    assert 2 * DELAY_S <= run(main(), network) < 2 * DELAY_S + 0.02


def test_our_client_says_that_a_name_is_unknown() -> None:
    network, _ = lossy(1, 0)

    async def main() -> None:
        session = Session(ServerUrl("example.com", PORT, CERTIFICATE.pin))
        with pytest.raises(ConnectionFailedError, match=r"example\.com"):
            await session.connect()

    run(main(), network)


def test_our_client_gives_up_where_everything_is_lost() -> None:
    network, _ = lossy(1, 0, [(0.0, 100.0)])

    async def main() -> float:
        session = Session(ServerUrl("server", PORT, CERTIFICATE.pin), connect_timeout_s=5)
        with pytest.raises(ConnectionFailedError, match="No answer"):
            await session.connect()
        return asyncio.get_running_loop().time()

    assert run(main(), network) == 5.0


def test_two_endpoints_on_one_host_talk_over_loopback() -> None:
    network, trace = lossy(1, 0.5)

    async def main() -> str:
        listener = await listen(
            "127.0.0.1", 0, certificate=CERTIFICATE, service=Telling(TOKENS, GAP_S)
        )
        session = Session(ServerUrl("127.0.0.1", listener.port, CERTIFICATE.pin))
        events = [event async for event in session.ask(b"{}")]
        await session.close()
        await listener.close()
        return "".join(event.text for event in events if isinstance(event, TextDelta))

    assert run(main(), network) == "".join(TOKENS)
    assert trace.digest.entries == 0
