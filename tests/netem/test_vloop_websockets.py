"""The `websockets` library, unmodified, over the TCP model in virtual time, in clear and over TLS.

Both ways take 50 ms and lose packets at random, unless a test says otherwise.
"""

import asyncio
import itertools
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import websockets
from certificates import fixed_certificate
from cryptography.hazmat.primitives import serialization
from virtual_hosts import now
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve

from eloquent_netem.capture import Captured, TraceDigest
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import IndependentLoss
from eloquent_netem.vloop import VirtualNetwork, run

RTT_S = 0.1
MESSAGES = 400
INTERVAL_S = 0.02

SCHEMES = ("ws", "wss")


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Contexts of client and server; Ed25519, as the size of an ECDSA signature varies."""
    folder = tmp_path_factory.mktemp("tls")
    server = fixed_certificate()
    public, private = folder / "certificate.pem", folder / "key.pem"
    public.write_bytes(server.certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        server.private_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return client_context(public), server_context(public, private)


def client_context(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate))


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


Tls = tuple[ssl.SSLContext, ssl.SSLContext]


def lossy(seed: int, probability: float) -> tuple[VirtualNetwork, TraceDigest]:
    """Return client and server with loss both ways, and the digest of what they send."""
    print(f"seed {seed}")  # noqa: T201
    digest = TraceDigest()
    up, down = (
        Captured(
            Link(
                delay_s=RTT_S / 2,
                seed=seed,
                name=name,
                loss=IndependentLoss(probability, stage_rng(seed, name, "loss")),
            ),
            name,
            [digest.observe],
        )
        for name in ("up", "down")
    )
    return VirtualNetwork.between(up, down), digest


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


@asynccontextmanager
async def joined(
    network: VirtualNetwork, scheme: str, tls: Tls, handler: object = echo
) -> AsyncIterator[ClientConnection]:
    """Serve on the one host and connect from the other; both close in the end."""
    is_secure = scheme == "wss"
    with network.on("server"):
        server = await serve(handler, "server", 80, ssl=tls[1] if is_secure else None)  # type: ignore[arg-type]
    async with server:
        options = {"ssl": tls[0]} if is_secure else {}
        async with connect(
            f"{scheme}://server:80/", proxy=None, compression=None, **options
        ) as connection:  # type: ignore[arg-type]
            yield connection


async def exchange(network: VirtualNetwork, scheme: str, tls: Tls) -> list[float]:
    """Send numbered messages at a steady pace; return how long each took to come back."""
    sent: list[float] = []
    took: list[float] = []
    async with joined(network, scheme, tls) as connection:

        async def send() -> None:
            for index in range(MESSAGES):
                sent.append(now())
                await connection.send(f"{index} " * 50)
                await asyncio.sleep(INTERVAL_S)

        sending = asyncio.create_task(send())
        for index in range(MESSAGES):
            assert await connection.recv() == f"{index} " * 50
            took.append(now() - sent[index])
        await sending
    return took


@pytest.mark.parametrize(("scheme", "round_trips"), [("ws", 2), ("wss", 3)])
def test_a_connection_takes_the_round_trips_of_its_handshakes(
    scheme: str, round_trips: int, tls: Tls
) -> None:
    network, _ = lossy(1, 0.0)

    async def main() -> None:
        async with joined(network, scheme, tls) as connection:
            assert now() == pytest.approx(round_trips * RTT_S, abs=1e-3)
            assert connection.remote_address == ("198.51.100.1", 80)
            for _ in range(10):
                before = now()
                await connection.send("hello")
                assert await connection.recv() == "hello"
                assert now() - before == pytest.approx(RTT_S, abs=1e-4)
            before = now()
            waiter = await connection.ping()
            assert await waiter == pytest.approx(RTT_S, abs=1e-4)
            assert now() - before == pytest.approx(RTT_S, abs=1e-4)

    run(main(), network)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_all_comes_in_order_over_a_lossy_link(scheme: str, seed: int, tls: Tls) -> None:
    network, _ = lossy(seed, 0.05)
    took = run(exchange(network, scheme, tls), network)
    assert len(took) == MESSAGES
    assert min(took) == pytest.approx(RTT_S, abs=1e-4)
    # What is lost is seen to be so by what comes behind it, and takes one round trip more each way.
    later = [time for time in took if time > RTT_S + 1e-3]
    assert 0.05 * MESSAGES < len(later) < 0.95 * MESSAGES
    assert RTT_S < max(took) < 10 * RTT_S
    assert sorted(took)[MESSAGES // 2] < 2.1 * RTT_S


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_loss_nothing_waits(scheme: str, tls: Tls) -> None:
    network, _ = lossy(1, 0.0)
    took = run(exchange(network, scheme, tls), network)
    assert max(took) == pytest.approx(RTT_S, abs=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_seed_gives_the_same_packets_again(scheme: str, tls: Tls) -> None:
    digests = []
    for seed in (5, 5, 6):
        network, digest = lossy(seed, 0.05)
        run(exchange(network, scheme, tls), network)
        digests.append((digest.entries, digest.hexdigest()))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_slow_reader_slows_the_sender_down(scheme: str, tls: Tls) -> None:
    network, _ = lossy(1, 0.01)
    size = 50_000

    async def main() -> None:
        sent = itertools.count()

        async def flood(connection: ServerConnection) -> None:
            for _ in range(100):
                await connection.send(bytes(size))
                next(sent)

        async with joined(network, scheme, tls, flood) as connection:
            await asyncio.sleep(15)
            held = next(sent)
            assert 3 < held < 30
            for _ in range(100):
                assert await connection.recv() == bytes(size)

    run(main(), network)


def test_a_peer_that_vanishes_is_noticed_by_its_silence(tls: Tls) -> None:
    class Dead(IndependentLoss):
        def drops(self, now: float) -> bool:
            return now > 30

    links = [
        Link(delay_s=RTT_S / 2, seed=1, name=name, loss=Dead(0.0, stage_rng(1, name, "loss")))
        for name in ("up", "down")
    ]
    network = VirtualNetwork.between(*links)

    async def main() -> None:
        async with joined(network, "ws", tls) as connection:
            with pytest.raises(websockets.ConnectionClosedError, match="keepalive ping timeout"):
                await connection.recv()
            # A ping every 20 s, whose answer is awaited for 20 s; then 10 s for an orderly end.
            assert now() == pytest.approx(70, abs=1)

    run(main(), network)


def test_a_certificate_of_somebody_else_is_refused(tls: Tls) -> None:
    network, _ = lossy(1, 0.0)

    async def main() -> None:
        with network.on("server"):
            server = await serve(echo, "server", 80, ssl=tls[1])
        async with server:
            with pytest.raises(ssl.SSLCertVerificationError):
                await connect("wss://server:80/", ssl=ssl.create_default_context(), proxy=None)

    run(main(), network)


def test_tls_can_begin_later(tls: Tls) -> None:
    network, _ = lossy(1, 0.02)

    async def main() -> None:
        is_over = asyncio.Event()

        async def upgrade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert await reader.readline() == b"STARTTLS\n"
            writer.write(b"go\n")
            await writer.start_tls(tls[1])
            writer.write((await reader.readline()).upper())
            await writer.drain()
            writer.close()
            await writer.wait_closed()
            is_over.set()

        with network.on("server"):
            server = await asyncio.start_server(upgrade, port=25)
        async with server:
            reader, writer = await asyncio.open_connection("server", 25)
            writer.write(b"STARTTLS\n")
            assert await reader.readline() == b"go\n"
            await writer.start_tls(tls[0], server_hostname="server")
            writer.write(b"hello\n")
            assert await reader.readline() == b"HELLO\n"
            writer.close()
            await writer.wait_closed()
            await is_over.wait()

    run(main(), network)
