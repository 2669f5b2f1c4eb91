"""What the doctor found, for a person: figures, and what Eloquent will do on such a path."""

from statistics import median

from eloquent.link import Rung
from eloquent.quic.ecn import EcnState
from eloquent_netem.lab.doctor import Examination
from eloquent_netem.lab.doctor_probes import QUIC_BYTES, Attempt, Failure, Watched

LOSSY_ABOVE = 0.005
"A smaller share of lost packets is not worth a word."

TCP_HURTS_ABOVE = 0.02


def figures(found: Examination) -> list[tuple[str, str]]:
    """Return what was measured: a name and a figure each."""
    watched, echoes = found.watched, found.echoes
    lines = [
        ("address", f"{found.address}, port {found.url.port}"),
        ("UDP, QUIC", _attempt_words(found.quic, "handshake")),
        ("TCP, WebSocket", _attempt_words(found.websocket, "TCP and TLS handshake")),
        ("certificate", _certificate_words(found)),
    ]
    if watched is not None:
        lines += [
            ("datagrams", "yes" if watched.has_datagrams else "no: the server takes none"),
            (
                "round trip",
                f"{1000 * watched.rtt_s:.0f} ms at best, {1000 * watched.srtt_s:.0f} ms smoothed",
            ),
            (
                "loss, on the way there",
                f"{100 * watched.lost:.1f} % ({watched.sent - watched.acked} of {watched.sent})",
            ),
        ]
    if echoes.lost is not None:
        rtt_ms = 1000 * median(echoes.rtts_s)
        lines += [
            (
                "loss, there and back",
                f"{100 * echoes.lost:.1f} % ({echoes.sent - echoes.back} of {echoes.sent}); median "
                f"round trip {rtt_ms:.0f} ms",
            ),
            (
                "largest packet",
                f"{echoes.largest_bytes} bytes of UDP payload; QUIC needs {QUIC_BYTES}",
            ),
        ]
    if watched is not None:
        lines.append(("ECN", _ecn_words(watched)))
    return lines


def verdict(found: Examination) -> list[str]:
    """Say in plain words what Eloquent will do on this path, and what would help."""
    if not found.is_trusted:
        return [_untrusted(found)]
    if found.rung is None:
        return [_hopeless(found)]
    if found.rung is Rung.WEBSOCKET:
        return _fallen_back(found)
    return _over_udp(found)


def _attempt_words(attempt: Attempt, what: str) -> str:
    took = "" if attempt.took_s is None else f" ({what} {1000 * attempt.took_s:.0f} ms)"
    if attempt.failure is None:
        return f"works{took}"
    told = (
        attempt.failure.value if attempt.took_s is None else f"answers, but {attempt.failure.value}"
    )
    detail = f": {attempt.text}" if attempt.failure in (Failure.OTHER, Failure.UNREACHABLE) else ""
    return f"{told}{detail}{took}"


def _certificate_words(found: Examination) -> str:
    if found.shown_pin is None:
        return "none was shown"
    if not found.is_trusted:
        return f"sha256={found.shown_pin}, which is not trusted"
    return "the pinned one" if found.url.pin else "vouched for by an authority"


def _ecn_words(watched: Watched) -> str:
    counted = watched.counted
    counts = f"the server counted {counted.ect1} ECT(1), {counted.ect0} ECT(0), {counted.ce} CE"
    if not watched.can_mark:
        return "this system cannot mark packets"
    if watched.ecn is EcnState.CAPABLE:
        return f"marks arrive ({counts})"
    if watched.ecn is EcnState.FAILED:
        if not watched.marked:
            return "packets that are marked vanish"
        return f"marks are cleared or changed on the way ({counts}, of {watched.marked} that came)"
    return "unknown: too few packets were acknowledged"


def _over_udp(found: Examination) -> list[str]:
    watched = found.watched
    assert watched is not None
    if watched.has_datagrams:
        lines = [
            "Eloquent will use QUIC datagrams: each packet carries all that is not acknowledged, "
            "so one that gets through is enough to be up to date."
        ]
    else:
        lines = [
            "Eloquent will use one QUIC stream: the server takes no datagrams, so a lost packet "
            "holds back what comes after it for about a round trip."
        ]
    each_way = 1 - (1 - (found.echoes.lost or 0.0)) ** 0.5
    lost = max(watched.lost, each_way)
    if lost <= LOSSY_ABOVE:
        lines.append("Hardly a packet is lost, so nothing will be sent twice.")
    else:
        tcp = " Over TCP answers would stall." if lost > TCP_HURTS_ABOVE else ""
        lines.append(
            f"About {100 * lost:.0f} % of the packets are lost each way: while that lasts each is "
            f"sent twice, a few milliseconds apart.{tcp}"
        )
    largest = found.echoes.largest_bytes
    if largest is not None and largest < QUIC_BYTES:
        lines.append(
            f"Packets of more than {largest} bytes seem to be dropped, although the handshake's "
            "got through: answers go on in smaller ones after about half a second."
        )
    if watched.ecn is EcnState.CAPABLE:
        lines.append(
            "ECN marks survive: `eloquent serve --ecn l4s` may use the low-latency queue of L4S "
            "routers, if there is one on the way."
        )
    elif watched.ecn is EcnState.FAILED:
        lines.append("ECN marks do not survive: packets go unmarked, which costs nothing.")
    if not found.websocket.is_fine:
        why = _attempt_words(found.websocket, "")
        lines.append(
            f"There is nothing to fall back to ({why}): open TCP port {found.url.port} too, for "
            "networks that block UDP."
        )
    return lines


def _fallen_back(found: Examination) -> list[str]:
    lines = [
        "Eloquent will use WebSocket over TCP: answers come whole and survive a change of network, "
        "but a lost packet holds back what comes after it. Connecting takes 0.3 s longer, once; "
        "QUIC is tried again every minute."
    ]
    port = f"UDP port {found.url.port}"
    if found.echoes.back:
        lines.append(
            f"The reason: packets up to {found.echoes.largest_bytes} bytes pass on {port}, and "
            f"QUIC needs {QUIC_BYTES}. A tunnel or VPN on the way has too small an MTU: raise it "
            "to 1280 or more."
        )
    elif found.quic.failure is Failure.REFUSED:
        lines.append(
            f"The reason: nothing listens on {port}, or a firewall says so. `eloquent serve` "
            "listens there unless it was told otherwise."
        )
    elif found.quic.failure is Failure.SILENT:
        lines.append(
            f"The reason: UDP is blocked. Nothing that was sent to {port} was answered: have it "
            "opened in the firewalls of the server and of this network."
        )
    else:
        lines.append(f"The reason: {found.quic.text}.")
    return lines


def _hopeless(found: Examination) -> str:
    quic, websocket, url = found.quic.failure, found.websocket.failure, found.url
    if quic is Failure.REFUSED and websocket is Failure.REFUSED:
        return (
            f"Nothing listens on {url.host}, port {url.port}, neither UDP nor TCP: start the "
            "server (`eloquent serve --host 0.0.0.0`) or check the port."
        )
    if {quic, websocket} <= {Failure.SILENT, Failure.UNREACHABLE}:
        return (
            f"{url.host} does not answer on port {url.port}, neither UDP nor TCP: it is off, its "
            "address is wrong, or a firewall drops everything for this port."
        )
    return (
        f"No Eloquent server answers on {url.host}, port {url.port}. QUIC: "
        f"{_attempt_words(found.quic, 'handshake')}. TCP: {_attempt_words(found.websocket, 'TLS')}."
    )


def _untrusted(found: Examination) -> str:
    shown = f" It shows sha256={found.shown_pin}." if found.shown_pin else ""
    if found.url.pin is None:
        return (
            "The server answers, and no authority vouches for its certificate, so clients will "
            "refuse it: give the URL with the pin (#sha256=...), as `eloquent serve` printed it."
            f"{shown} Trust that only if it is what the server printed."
        )
    return (
        "A server answers, and its certificate is not the pinned one, so clients will refuse it: "
        "without --state `eloquent serve` makes a new one at each start, so use the URL that it "
        f"printed last. If that is what you did, somebody sits in between.{shown}"
    )
