"""What the doctor sends: packets of no connection, a QUIC connection that is watched, and TLS."""

import asyncio
import contextlib
import hashlib
import random
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from eloquent.core.events import Event
from eloquent.errors import EloquentError
from eloquent.link import Link
from eloquent.quic.certificate import certificate_pin
from eloquent.quic.client import ClientConnection, client_configuration
from eloquent.quic.connection import Address, Connected, ConnectionEnded, ConnectionEvent
from eloquent.quic.driver import Driver
from eloquent.quic.ecn import Ecn, EcnCounts, EcnState
from eloquent.quic.marking import PlainMarking, SentPacket
from eloquent.quic.reset import MAX_RESET_BYTES, MIN_RESET_BYTES, TOKEN_BYTES
from eloquent.quic.udp import UdpTransport, open_udp
from eloquent.url import ServerUrl
from eloquent.websocket.client import connect as connect_websocket

PROBE_INTERVAL_S = 0.05
"Between probes of one kind: 20 small packets a second, less than an answer has."

LEAST_PROBE_BYTES = MIN_RESET_BYTES + 1
PROBE_SIZES = MAX_RESET_BYTES - MIN_RESET_BYTES
"""The answer to a probe is a byte smaller (`eloquent.quic.reset`): of so many sizes in turn it
tells which probe it answers. Answers of the largest size are left for large packets."""

FIXED_BIT = 0x40
CONNECTION_ID_BYTES = 8

QUIC_BYTES = 1200
"QUIC's least (RFC 9000 section 14), and what our packets have at most."

LARGER_BYTES = (1252, 1350, 1400, 1452, 1472)
"UDP payloads: Ethernet's 1500 bytes less the headers of tunnels, PPPoE, IPv6, and IPv4."

SMALLER_BYTES = (1000, 800, 512, 300)

SIZE_TRIES = 4
"At 20 % loss each way one in 60 fails that should not."

SIZE_WAIT_S = 0.3
DRAIN_RTTS = 2.0
DRAIN_S = 0.3
"Acknowledgements of the last probes are waited for so long, in round trips and beyond."


class Failure(Enum):
    """How an attempt to connect went wrong."""

    REFUSED = "nothing listens there"
    SILENT = "no answer"
    UNREACHABLE = "no way there"
    UNTRUSTED = "the certificate cannot be trusted"
    OTHER = "what answers is something else"


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt to connect."""

    took_s: float | None
    failure: Failure | None = None
    text: str = ""
    "What failed, for a person."

    @property
    def is_fine(self) -> bool:
        """Whether it succeeded."""
        return self.failure is None


@dataclass(frozen=True, slots=True)
class Echoes:
    """What became of packets of no connection, each of which a server answers."""

    sent: int
    back: int
    rtts_s: tuple[float, ...]
    largest_bytes: int | None
    "The largest UDP payload that got there; None: none did."

    @property
    def lost(self) -> float | None:
        """The share of those that, or whose answer, was lost; None: none was ever answered."""
        return 1 - self.back / self.sent if self.back else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What a QUIC connection learnt of its path."""

    has_datagrams: bool
    pin: str | None
    "SHA-256 of the server's certificate."
    rtt_s: float
    "The smallest."
    srtt_s: float
    sent: int
    acked: int
    marked: int
    "How many of the acknowledged packets left as ECT(1)."
    can_mark: bool
    "Whether this system can mark packets at all."
    ecn: EcnState
    counted: EcnCounts
    "What the server says that it got."

    @property
    def lost(self) -> float:
        """The share of our packets that were lost on the way there."""
        return 1 - self.acked / self.sent if self.sent else 0.0


class Echo:
    """Sends packets that look like those of a connection which the server has forgotten."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._transport: UdpTransport | None = None
        self._sent_s: dict[int, float] = {}
        "When the last probe of each size left."
        self._rtts_s: list[float] = []
        self._tokens: set[bytes] = set()
        self._is_new = asyncio.Event()

    async def measure(self, url: ServerUrl, address: str, seconds: float) -> Echoes:
        """Send small probes for a while, then ever larger ones."""
        try:
            self._transport = await open_udp(self, remote=(address, url.port))
        except OSError:
            return Echoes(0, 0, (), None)
        try:
            count = max(1, round(seconds / PROBE_INTERVAL_S))
            for index in range(count):
                size = LEAST_PROBE_BYTES + index % PROBE_SIZES
                self._sent_s[size] = self._loop.time()
                self._send(self._rng.randbytes(CONNECTION_ID_BYTES), size)
                await asyncio.sleep(PROBE_INTERVAL_S)
            await asyncio.sleep(DRAIN_S + DRAIN_RTTS * min(self._rtts_s, default=0.0))
            back = tuple(self._rtts_s)
            return Echoes(count, len(back), back, await self._largest() if back else None)
        finally:
            self._transport.close()

    async def _largest(self) -> int | None:
        if not await self._passes(QUIC_BYTES):
            for size in SMALLER_BYTES:
                if await self._passes(size):
                    return size
            return LEAST_PROBE_BYTES
        largest = QUIC_BYTES
        for size in LARGER_BYTES:
            if not await self._passes(size):
                break
            largest = size
        return largest

    async def _passes(self, size: int) -> bool:
        """Return whether a packet of this size is answered: by a token not seen before."""
        connection_id = self._rng.randbytes(CONNECTION_ID_BYTES)
        wait_s = SIZE_WAIT_S + DRAIN_RTTS * min(self._rtts_s)
        self._is_new.clear()
        for _ in range(SIZE_TRIES):
            self._send(connection_id, size)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_new.wait(), wait_s)
                return True
        return False

    def _send(self, connection_id: bytes, size: int) -> None:
        assert self._transport is not None
        first = bytes((FIXED_BIT | self._rng.getrandbits(5),))
        noise = self._rng.randbytes(size - 1 - CONNECTION_ID_BYTES)
        self._transport.send(first + connection_id + noise, None, Ecn.NOT_ECT)

    def connection_made(self, transport: UdpTransport) -> None:
        """See `UdpProtocol`."""

    def datagram_received(self, data: bytes, addr: Address, ecn: Ecn) -> None:
        """See `UdpProtocol`."""
        if len(data) < MIN_RESET_BYTES:
            return
        token = data[-TOKEN_BYTES:]
        if token in self._tokens:
            return
        self._tokens.add(token)
        if len(data) == MAX_RESET_BYTES:
            self._is_new.set()
        sent_s = self._sent_s.pop(len(data) + 1, None)
        if sent_s is not None:
            self._rtts_s.append(self._loop.time() - sent_s)

    def error_received(self, exc: OSError) -> None:
        """See `UdpProtocol`: a packet that could not leave, or a refusal; both show as losses."""


class _Watch(PlainMarking):
    """Marks all packets as ECT(1) and counts what becomes of them."""

    def __init__(self) -> None:
        self.acked: list[SentPacket] = []
        self.lost: list[SentPacket] = []

    def next_codepoint(self, now: float, size: int, *, is_copy: bool) -> Ecn:
        """See `MarkingPolicy`."""
        return Ecn.ECT_1

    def on_acked(self, now: float, packet: SentPacket) -> None:
        """See `MarkingPolicy`."""
        self.acked.append(packet)

    def on_lost(self, now: float, packet: SentPacket) -> None:
        """See `MarkingPolicy`."""
        self.lost.append(packet)


class WatchedConnection:
    """A QUIC connection that asks for nothing and watches its packets."""

    def __init__(self, url: ServerUrl, *, is_checked: bool) -> None:
        """Without `is_checked` any certificate is good: nothing but pings is sent."""
        configuration = client_configuration(url.host, pin=url.pin)
        if not is_checked:
            configuration.verify_mode = ssl.CERT_NONE
        self._watch = _Watch()
        self._url = url
        self._connection = ClientConnection(
            configuration, pin=url.pin if is_checked else None, marking=self._watch
        )
        self._driver = Driver(self._connection, self._send, self._on_event)
        self._transport: UdpTransport | None = None
        self._connected: asyncio.Future[Attempt] = asyncio.get_running_loop().create_future()
        self._begun_s = 0.0

    async def open(self, address: str, timeout_s: float) -> Attempt:
        """Shake hands with the server at `address`."""
        self._begun_s = self._driver.now()
        try:
            transport = await open_udp(self, remote=(address, self._url.port))
        except OSError as error:
            return Attempt(None, Failure.UNREACHABLE, error.strerror or str(error))
        self._connection.connect(transport.peer_address, self._driver.now())
        self._driver.pump()
        try:
            return await asyncio.wait_for(asyncio.shield(self._connected), timeout_s)
        except TimeoutError:
            return Attempt(None, Failure.SILENT, f"no answer within {timeout_s:g} s")

    async def watch(self, seconds: float) -> Watched:
        """Send pings for a while, and say what became of them."""
        for _ in range(max(1, round(seconds / PROBE_INTERVAL_S))):
            self._connection.probe()
            self._driver.pump()
            await asyncio.sleep(PROBE_INTERVAL_S)
        path = self._connection.path
        await asyncio.sleep(DRAIN_S + DRAIN_RTTS * path.srtt_s)
        quic, watch = self._connection.quic, self._watch
        acked, lost = len(watch.acked), len(watch.lost)
        certificate = quic.peer_certificate
        assert self._transport is not None
        return Watched(
            has_datagrams=not self._connection.uses_stream,
            pin=None if certificate is None else certificate_pin(certificate),
            rtt_s=path.min_rtt_s,
            srtt_s=path.srtt_s,
            sent=acked + lost,
            acked=acked,
            marked=sum(packet.codepoint is Ecn.ECT_1 for packet in watch.acked),
            can_mark=self._transport.can_mark,
            ecn=quic.ecn_state or EcnState.UNKNOWN,
            counted=quic.ecn_reported,
        )

    def close(self) -> None:
        """End the connection."""
        self._connection.close("the doctor is done")
        self._driver.pump()
        self._driver.stop()
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: UdpTransport) -> None:
        """See `UdpProtocol`."""
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Address, ecn: Ecn) -> None:
        """See `UdpProtocol`."""
        assert self._transport is not None
        self._driver.receive(data, self._transport.peer_address, ecn)

    def error_received(self, exc: OSError) -> None:
        """See `UdpProtocol`."""
        if isinstance(exc, ConnectionRefusedError):
            self._settle(Attempt(None, Failure.REFUSED, "the machine says that nothing listens"))

    def _send(self, data: bytes, address: Address, ecn: Ecn) -> None:
        if self._transport is not None:
            self._transport.send(data, None, ecn)

    def _on_event(self, event: ConnectionEvent) -> None:
        if isinstance(event, Connected):
            self._settle(Attempt(self._driver.now() - self._begun_s))
        elif isinstance(event, ConnectionEnded):
            self._settle(Attempt(None, Failure.OTHER, event.reason))

    def _settle(self, attempt: Attempt) -> None:
        if not self._connected.done():
            self._connected.set_result(attempt)


class _Nobody:
    """Whom a link that is only tried belongs to; see `LinkUser`."""

    def on_early(self, link: Link) -> None:
        pass

    def on_progress(self, link: Link, turn: int, events: Sequence[Event]) -> None:
        pass

    def on_turn_failed(self, link: Link, turn: int, error: EloquentError) -> None:
        pass

    def on_link_ended(self, link: Link, error: EloquentError) -> None:
        pass


async def try_websocket(url: ServerUrl, timeout_s: float) -> tuple[Attempt, str | None]:
    """Connect as on the lowest rung; return also the certificate's SHA-256, if one was shown."""
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    try:
        pin = await _shown_pin(url, timeout_s)
    except OSError as error:
        return _why_no_tls(error, timeout_s), None
    took_s = loop.time() - begun_s
    try:
        link = await connect_websocket(url, _Nobody(), timeout_s)
    except EloquentError as error:
        is_vouched_for = not isinstance(error.__cause__, ssl.SSLError)
        is_right = is_vouched_for if url.pin is None else url.pin == pin
        failure = Failure.OTHER if is_right else Failure.UNTRUSTED
        return Attempt(took_s, failure, str(error)), pin
    await link.close()
    return Attempt(took_s), pin


def _why_no_tls(error: OSError, timeout_s: float) -> Attempt:
    if isinstance(error, TimeoutError):
        return Attempt(None, Failure.SILENT, f"no answer within {timeout_s:g} s")
    if isinstance(error, ConnectionRefusedError):
        return Attempt(None, Failure.REFUSED, "the machine says that nothing listens")
    if isinstance(error, ssl.SSLError):
        return Attempt(None, Failure.OTHER, f"no TLS: {error.reason or error}")
    if isinstance(error, ConnectionResetError):
        return Attempt(None, Failure.OTHER, "it hangs up during the TLS handshake")
    return Attempt(None, Failure.UNREACHABLE, error.strerror or str(error))


async def _shown_pin(url: ServerUrl, timeout_s: float) -> str:
    """Shake hands by TLS, whoever answers; return the SHA-256 of its certificate."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    _, writer = await asyncio.wait_for(
        asyncio.open_connection(url.host, url.port, ssl=context, server_hostname=url.host),
        timeout_s,
    )
    try:
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return hashlib.sha256(shown).hexdigest()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
