"""The doctor on paths that are healthy, lossy, narrow, blocked, bleached, or to another server."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rungs import CERTIFICATE, PORT, RTT_S, URL, Drops, Filter, network, nothing, serving, udp
from telling import Telling

from eloquent.errors import ConfigurationError, ConnectionFailedError
from eloquent.link import Rung
from eloquent.quic.ecn import Ecn, EcnState
from eloquent.url import ServerUrl
from eloquent_netem.lab.commands import lab
from eloquent_netem.lab.doctor import Examination, examine, parse_target
from eloquent_netem.lab.doctor_probes import Failure
from eloquent_netem.lab.doctor_words import figures, verdict
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import IndependentLoss
from eloquent_netem.packet import Packet
from eloquent_netem.tcp.segment import TcpPacket
from eloquent_netem.vloop import VirtualNetwork, run

SECONDS = 4.0
PIN = CERTIFICATE.pin
ANOTHER_PIN = "0" * 64


def examined(
    drops: Drops = nothing,
    url: ServerUrl = URL,
    *,
    has_quic: bool = True,
    has_websocket: bool = True,
) -> Examination:
    """Examine the path to a server of which losses and what it offers are the test's."""
    return examined_over(network(drops), url, has_quic=has_quic, has_websocket=has_websocket)


def examined_over(
    made: VirtualNetwork,
    url: ServerUrl = URL,
    *,
    has_quic: bool = True,
    has_websocket: bool = True,
) -> Examination:
    """Examine the path of a network of the test's."""

    async def main() -> Examination:
        telling = Telling([], 0.0)
        async with serving(made, telling, has_quic=has_quic, has_websocket=has_websocket):
            return await examine(url, SECONDS)

    return run(main(), made)


def told(found: Examination) -> str:
    """Return all that the user is told."""
    return "\n".join([*(f"{name}: {figure}" for name, figure in figures(found)), *verdict(found)])


def changing(change: Callable[[Packet], None]) -> Drops:
    """Return what changes packets and drops none."""

    def pass_on(now: float, packet: Packet) -> bool:
        change(packet)
        return False

    return pass_on


def bleach(packet: Packet) -> None:
    packet.ecn = type(packet.ecn)(Ecn.NOT_ECT)


def congest(packet: Packet) -> None:
    if packet.ecn == Ecn.ECT_1:
        packet.ecn = type(packet.ecn)(Ecn.CE)


def larger_than(payload_bytes: int) -> Drops:
    headers = 28
    return lambda now, packet: udp(now, packet) and packet.size > payload_bytes + headers


def test_a_healthy_path() -> None:
    found = examined()
    watched = found.watched
    assert watched is not None
    assert found.rung is Rung.DATAGRAMS
    assert found.is_trusted
    assert watched.lost == 0
    assert watched.rtt_s == pytest.approx(RTT_S, rel=0.1)
    assert found.quic.took_s == pytest.approx(RTT_S, rel=0.5)
    assert found.websocket.is_fine
    assert found.echoes.lost == 0
    assert min(found.echoes.rtts_s) == pytest.approx(RTT_S, rel=0.05)
    assert found.echoes.largest_bytes == 1472
    assert watched.ecn is EcnState.CAPABLE
    assert watched.counted.ect1 >= watched.marked > 50
    text = told(found)
    assert "Eloquent will use QUIC datagrams" in text
    assert "Hardly a packet is lost" in text
    assert "ECN marks survive" in text
    assert "the pinned one" in text


@pytest.mark.parametrize("loss", [0.05, 0.2])
def test_loss_is_measured_there_and_both_ways(loss: float) -> None:
    losses = {True: IndependentLoss(loss, stage_rng(3, "any", "loss"))}
    found = examined(lambda now, packet: losses[True].drops(now))
    watched = found.watched
    assert watched is not None
    assert found.rung is Rung.DATAGRAMS
    # 80 probes each: three standard deviations.
    assert watched.lost == pytest.approx(loss, abs=3 * (loss / 80) ** 0.5)
    both = 1 - (1 - loss) ** 2
    assert found.echoes.lost == pytest.approx(both, abs=3 * (both / 80) ** 0.5)
    assert found.echoes.largest_bytes == 1472
    assert "each is sent twice" in told(found)


class Doubling(Filter):
    """A link that loses what `drops` says, and delivers all else twice, the second time late."""

    def __init__(self, name: str, drops: Drops) -> None:
        super().__init__(name, drops)
        self._link = Link(
            delay_s=RTT_S / 2, seed=1, name=name, duplicates=1.0, jitter_s=0.02, reorders=True
        )


def test_packets_that_come_twice_count_once() -> None:
    drops = larger_than(1200)
    found = examined_over(VirtualNetwork.between(Doubling("up", drops), Doubling("down", drops)))
    assert found.echoes.lost == 0
    assert found.echoes.back == found.echoes.sent
    assert found.echoes.largest_bytes == 1200
    assert found.watched is not None
    assert found.watched.lost == 0


def test_blocked_udp() -> None:
    found = examined(udp)
    assert found.rung is Rung.WEBSOCKET
    assert found.quic.failure is Failure.SILENT
    assert found.echoes.lost is None
    text = told(found)
    assert "UDP is blocked" in text
    assert "Eloquent will use WebSocket" in text
    assert f"UDP port {PORT}" in text


def test_blocked_tcp_is_told_since_nothing_would_be_left() -> None:
    found = examined(lambda now, packet: isinstance(packet, TcpPacket))
    assert found.rung is Rung.DATAGRAMS
    assert found.websocket.failure is Failure.SILENT
    assert f"open TCP port {PORT} too" in told(found)


@pytest.mark.parametrize(("payload_bytes", "found_bytes"), [(1100, 1000), (900, 800), (400, 300)])
def test_a_path_too_narrow_for_quic(payload_bytes: int, found_bytes: int) -> None:
    found = examined(larger_than(payload_bytes))
    assert found.rung is Rung.WEBSOCKET
    assert found.quic.failure is Failure.SILENT
    assert found.echoes.largest_bytes == found_bytes
    text = told(found)
    assert "UDP is blocked" not in text
    assert f"packets up to {found_bytes} bytes pass" in text
    assert "MTU" in text


@pytest.mark.parametrize(("payload_bytes", "found_bytes"), [(1200, 1200), (1420, 1400)])
def test_a_tunnel_that_is_wide_enough(payload_bytes: int, found_bytes: int) -> None:
    found = examined(larger_than(payload_bytes))
    assert found.rung is Rung.DATAGRAMS
    assert found.echoes.largest_bytes == found_bytes
    assert "MTU" not in told(found)


def test_bleached_marks() -> None:
    found = examined(changing(bleach))
    assert found.rung is Rung.DATAGRAMS
    assert found.watched is not None
    assert found.watched.ecn is EcnState.FAILED
    assert found.watched.counted.total == 0
    text = told(found)
    assert "marks are cleared or changed" in text
    assert "ECN marks do not survive" in text


def test_a_path_that_drops_marked_packets() -> None:
    found = examined(lambda now, packet: packet.ecn != Ecn.NOT_ECT and udp(now, packet))
    assert found.rung is Rung.DATAGRAMS
    assert found.watched is not None
    assert found.watched.ecn is EcnState.FAILED
    assert found.watched.marked == 0
    assert "packets that are marked vanish" in told(found)


def test_congestion_marks_are_counted() -> None:
    found = examined(changing(congest))
    assert found.watched is not None
    assert found.watched.ecn is EcnState.CAPABLE
    assert found.watched.counted.ce > 50
    assert f"{found.watched.counted.ce} CE" in told(found)


def test_the_pin_is_missing() -> None:
    found = examined(url=replace(URL, pin=None))
    assert not found.is_trusted
    assert found.rung is not Rung.DATAGRAMS
    assert found.shown_pin == PIN
    (line,) = verdict(found)
    assert "no authority vouches" in line
    assert f"sha256={PIN}" in line
    assert found.watched is not None  # the path is examined all the same
    assert found.watched.lost == 0


def test_the_pin_is_wrong() -> None:
    found = examined(url=replace(URL, pin=ANOTHER_PIN))
    assert not found.is_trusted
    assert found.quic.failure is found.websocket.failure is Failure.UNTRUSTED
    (line,) = verdict(found)
    assert "is not the pinned one" in line
    assert f"sha256={PIN}" in line


def test_the_pin_is_wrong_and_udp_is_blocked() -> None:
    found = examined(udp, replace(URL, pin=ANOTHER_PIN))
    assert not found.is_trusted
    assert found.rung is None
    assert found.shown_pin == PIN


def test_nothing_listens() -> None:
    found = examined(has_quic=False, has_websocket=False)
    assert found.rung is None
    assert found.websocket.failure is Failure.REFUSED
    (line,) = verdict(found)
    assert "server" in line


def test_nothing_gets_through() -> None:
    found = examined(lambda now, packet: True)
    assert found.rung is None
    (line,) = verdict(found)
    assert f"does not answer on port {PORT}, neither UDP nor TCP" in line


def test_only_tcp_is_served() -> None:
    found = examined(has_quic=False)
    assert found.rung is Rung.WEBSOCKET
    assert "WebSocket" in verdict(found)[0]


def test_an_unknown_name() -> None:
    made = network()
    with pytest.raises(ConnectionFailedError, match="The name elsewhere cannot be resolved"):
        run(examine(ServerUrl("elsewhere", PORT, PIN), SECONDS), made)


def test_the_seconds_are_a_length_of_time() -> None:
    with pytest.raises(ConfigurationError, match="--seconds"):
        asyncio.run(examine(URL, 0.0))


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("example.org", ServerUrl("example.org")),
        ("example.org:4000", ServerUrl("example.org", 4000)),
        ("192.0.2.7", ServerUrl("192.0.2.7")),
        ("[2001:db8::7]:4000", ServerUrl("2001:db8::7", 4000)),
        ("2001:db8::7", ServerUrl("2001:db8::7")),
        (f"example.org#sha256={PIN}", ServerUrl("example.org", pin=PIN)),
        (str(URL), URL),
    ],
)
def test_a_host_is_enough(text: str, url: ServerUrl) -> None:
    assert parse_target(text) == url


@pytest.mark.parametrize("text", ["", "host:port", "https://example.org", "example.org/path"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="server URL"):
        parse_target(text)


def test_what_was_found_goes_into_a_file() -> None:
    content = json.loads(json.dumps(examined().to_json()))
    assert content["rung"] == "QUIC datagrams"
    assert content["quic"]["failure"] is None
    assert content["watched"]["ecn"] == "CAPABLE"


def test_the_command_on_real_sockets_where_nothing_listens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found.json"
    with pytest.raises(SystemExit) as stopped:
        lab(["doctor", "127.0.0.1:1", "--seconds", "0.1", "--json", str(output)])
    assert stopped.value.code == 1
    assert "Nothing listens on 127.0.0.1, port 1" in " ".join(capsys.readouterr().out.split())
    assert json.loads(output.read_text())["rung"] is None
