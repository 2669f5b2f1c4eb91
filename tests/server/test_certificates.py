"""Certificates from files: which are taken, what clients make of them, and what is read anew."""

import asyncio
import contextlib
import datetime
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from authority import Authority, Issued
from loopback import DEADLINE_S, HOST, saying

from eloquent.core.events import TextDelta
from eloquent.errors import ConfigurationError, EloquentError
from eloquent.quic.certificate import ServerCertificate, make_certificate
from eloquent.quic.connect import connect as connect_quic
from eloquent.quic.listen import Listener
from eloquent.quic.listen import listen as listen_quic
from eloquent.session.session import Connector, Session
from eloquent.url import ServerUrl
from eloquent.websocket.client import connect as connect_websocket
from eloquent.websocket.server import WebSocketListener
from eloquent.websocket.server import listen as listen_websocket
from eloquent_server.certificates import CertificateFiles, chosen_certificate, follow, url_of
from eloquent_server.options import ServerOptions
from eloquent_server.store import TokenStore
from eloquent_server.turns import TurnHub

BODY = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
NOW = datetime.datetime.now(datetime.UTC)
KINDS = ("p256", "p384", "ed25519", "rsa")
RUNGS = (connect_quic, connect_websocket)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(autouse=True)
def trusted(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process's clients trust the authority, and no other."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.write(tmp_path)))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))


def files_of(issued: Issued, folder: Path) -> CertificateFiles:
    return CertificateFiles(*issued.write(folder))


@contextlib.asynccontextmanager
async def serving(
    certificate: ServerCertificate,
) -> AsyncIterator[tuple[Listener, WebSocketListener]]:
    hub = TurnHub(saying("hi"), TokenStore.open(None))
    over_udp = await listen_quic(HOST, 0, certificate=certificate, service=hub)
    over_tcp = await listen_websocket(HOST, 0, certificate=certificate, service=hub)
    try:
        yield over_udp, over_tcp
    finally:
        await hub.close()
        await over_udp.close()
        await over_tcp.close()


async def ask(url: ServerUrl, connector: Connector) -> str:
    session = Session(url, connector=connector)
    try:
        async with asyncio.timeout(DEADLINE_S):
            events = [event async for event in session.ask(BODY)]
    finally:
        await session.close()
    return "".join(event.text for event in events if isinstance(event, TextDelta))


@pytest.mark.parametrize("kind", KINDS)
async def test_clients_believe_the_authority_on_both_rungs(
    kind: str, authority: Authority, tmp_path: Path
) -> None:
    certificate = files_of(authority.issue(HOST, kind=kind), tmp_path).read()
    assert not certificate.is_self_signed
    async with serving(certificate) as listeners:
        for listener, connector in zip(listeners, RUNGS, strict=True):
            assert await ask(ServerUrl(HOST, listener.port), connector) == "hi"


async def test_a_certificate_for_another_name_or_of_another_authority_is_refused(
    authority: Authority, tmp_path: Path
) -> None:
    for issued in (authority.issue("example.com"), Authority().issue(HOST)):
        async with serving(files_of(issued, tmp_path).read()) as listeners:
            for listener, connector in zip(listeners, RUNGS, strict=True):
                with pytest.raises(EloquentError):
                    await ask(ServerUrl(HOST, listener.port), connector)


async def test_those_who_connect_later_are_shown_the_new_one(
    authority: Authority, tmp_path: Path
) -> None:
    old = files_of(authority.issue(HOST), tmp_path).read()
    new = files_of(authority.issue(HOST, kind="rsa"), tmp_path).read()
    async with serving(old) as listeners:
        for listener, connector in zip(listeners, RUNGS, strict=True):
            earlier = Session(ServerUrl(HOST, listener.port, old.pin), connector=connector)
            await earlier.connect()
            listener.show(new)
            assert await ask(ServerUrl(HOST, listener.port, new.pin), connector) == "hi"
            with pytest.raises(EloquentError, match="not the pinned one"):
                await ask(ServerUrl(HOST, listener.port, old.pin), connector)
            events = [event async for event in earlier.ask(BODY)]
            assert TextDelta("hi") in events
            await earlier.close()


@pytest.mark.parametrize("kind", ["p521", "ed448"])
def test_kinds_that_some_clients_do_not_know_are_refused(
    kind: str, authority: Authority, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=r"of another kind.*P-256"):
        files_of(authority.issue(HOST, kind=kind), tmp_path).read()


def test_what_cannot_be_used_is_named(authority: Authority, tmp_path: Path) -> None:
    issued = authority.issue(HOST)
    cert, key = issued.write(tmp_path)
    missing = tmp_path / "missing"
    with pytest.raises(ConfigurationError, match=r"certificate in .*missing.*--cert"):
        CertificateFiles(missing, key).read()
    with pytest.raises(ConfigurationError, match=r"private key in .*missing.*--cert-key"):
        CertificateFiles(cert, missing).read()
    with pytest.raises(ConfigurationError, match=r"certificate in .*server.key"):
        CertificateFiles(key, key).read()
    with pytest.raises(ConfigurationError, match=r"private key in .*server.pem"):
        CertificateFiles(cert, cert).read()
    with pytest.raises(ConfigurationError, match="not that of the certificate"):
        CertificateFiles(cert, authority.issue(HOST).write(tmp_path, "other")[1]).read()
    key.write_bytes(issued.key_pem(b"secret"))
    with pytest.raises(ConfigurationError, match="without a password"):
        CertificateFiles(cert, key).read()


SM2_KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqBHM9VAYItBG0wawIBAQQg7otRBf18Ac9a2br5
zu7z+lKJtAx1xOYBSSOe4OGC5PmhRANCAATLkXoHE9WWFb5LbE2hgI20nDgALXbM
nhWQm+P67qfnX2Q1HW5WURKtj0YYDWzQt4sRkmLc2RXX88RB2mBbArag
-----END PRIVATE KEY-----
"""
SM2_CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBgzCCASmgAwIBAgIUGB+GvehEJmZmbitHemQ+5d3cJHMwCgYIKoEcz1UBg3Uw
DDEKMAgGA1UEAwwBeDAeFw0yNjExMjIxNzQ3MTZaFw0yNjEyMjIxNzQ3MTZaMAwx
CjAIBgNVBAMMAXgwWTATBgcqhkjOPQIBBggqgRzPVQGCLQNCAATLkXoHE9WWFb5L
bE2hgI20nDgALXbMnhWQm+P67qfnX2Q1HW5WURKtj0YYDWzQt4sRkmLc2RXX88RB
2mBbArago2kwZzAdBgNVHQ4EFgQU12OIKq2QTWLYDftQD8DhVwKT4+gwHwYDVR0j
BBgwFoAU12OIKq2QTWLYDftQD8DhVwKT4+gwDwYDVR0TAQH/BAUwAwEB/zAUBgNV
HREEDTALgglsb2NhbGhvc3QwCgYIKoEcz1UBg3UDSAAwRQIgM/G8V7YLLbnqiVmS
giTXAwHSGTn+G1DonuDp9Jne66QCIQDCp13m1lEJy/Gd6VEZ9HejPPSmBW+/hAoY
LXbFAkbuMQ==
-----END CERTIFICATE-----
"""
"Made with openssl, for `localhost`."


def test_kinds_that_the_library_does_not_know_are_refused_too(
    authority: Authority, tmp_path: Path
) -> None:
    cert, key = authority.issue(HOST).write(tmp_path)
    for path, text, named in (
        (key, SM2_KEY, "private key"),
        (cert, SM2_CERTIFICATE, "certificate"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=f"{named} in .* cannot be used"):
            CertificateFiles(cert, key).read()


def test_an_expired_one_is_refused(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"was good until .*renew it"):
        files_of(authority.issue(HOST, days=1), tmp_path).read()


def test_one_that_is_about_to_end_is_said_to_be_once_a_day(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    times = [NOW]
    paths = authority.issue(HOST, days=30).write(tmp_path)
    files = CertificateFiles(*paths, now=lambda: times[-1])
    said = []
    files.read()
    for days in (0, 21, 22.5, 22.6, 23.6, 40):
        times.append(NOW + datetime.timedelta(days=days))
        caplog.clear()
        files.warn_if_late()
        said.append("renew it" in caplog.text)
    assert said == [False, False, True, False, True, True]
    authority.issue(HOST, days=90).write(tmp_path)
    files.read()
    caplog.clear()
    files.warn_if_late()
    assert not caplog.records


def test_clients_call_the_server_by_a_name_in_its_certificate(
    authority: Authority, tmp_path: Path
) -> None:
    for names, host, called in (
        (("*.example.com", "chat.example.com"), "0.0.0.0", "eloquent://chat.example.com:7"),
        (("chat.example.com", "10.0.0.7"), "10.0.0.7", "eloquent://10.0.0.7:7"),
        (("*.example.com",), "0.0.0.0", "eloquent://0.0.0.0:7"),
        (("fe80::7",), "::", "eloquent://[fe80::7]:7"),
    ):
        certificate = files_of(authority.issue(*names), tmp_path).read()
        assert str(url_of(certificate, host, 7)) == called


def test_a_certificate_that_nobody_vouches_for_is_pinned(tmp_path: Path) -> None:
    made = make_certificate(HOST, NOW)
    assert url_of(made, HOST, 7) == ServerUrl(HOST, 7, made.pin)
    path = tmp_path / "made.pem"
    path.write_bytes(made.pem())
    from_file, files = chosen_certificate(ServerOptions(cert=path), NOW)
    assert files is not None
    assert url_of(from_file, HOST, 7) == ServerUrl(HOST, 7, made.pin)


def test_a_self_made_one_is_said_to_be_so_where_others_reach_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for options, is_said in (
        (ServerOptions(), False),
        (ServerOptions(host="localhost"), False),
        (ServerOptions(host="0.0.0.0"), True),
        (ServerOptions(host="0.0.0.0", dev_cert=True), False),
    ):
        caplog.clear()
        certificate, files = chosen_certificate(options, NOW)
        assert certificate.is_self_signed
        assert files is None
        assert ("self-made" in caplog.text) == is_said, options


def test_options_that_contradict_each_other(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue(HOST).write(tmp_path)
    with pytest.raises(ConfigurationError, match="exclude each other"):
        chosen_certificate(ServerOptions(cert=cert, cert_key=key, dev_cert=True), NOW)
    with pytest.raises(ConfigurationError, match="--cert-key needs --cert"):
        chosen_certificate(ServerOptions(cert_key=key), NOW)


class Following:
    """`follow` at work; what it shows is awaited with `next`."""

    def __init__(self, files: CertificateFiles, *, every_s: float) -> None:
        self.asked = asyncio.Event()
        self._shown: asyncio.Queue[ServerCertificate] = asyncio.Queue()
        self._task = asyncio.ensure_future(
            follow(files, [self._shown.put_nowait], self.asked, every_s=every_s)
        )

    async def next(self) -> ServerCertificate:
        async with asyncio.timeout(DEADLINE_S):
            return await self._shown.get()

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        assert self._shown.empty()


async def test_changed_files_are_read_again(authority: Authority, tmp_path: Path) -> None:
    files = files_of(authority.issue(HOST), tmp_path)
    files.read()
    following = Following(files, every_s=0.01)
    new = authority.issue(HOST)
    new.write(tmp_path)
    assert (await following.next()).certificate == new.certificate
    await following.stop()


async def test_they_are_read_when_asked_though_they_look_the_same(
    authority: Authority, tmp_path: Path
) -> None:
    issued = authority.issue(HOST)
    files = files_of(issued, tmp_path)
    files.read()
    following = Following(files, every_s=DEADLINE_S)
    following.asked.set()
    assert (await following.next()).certificate == issued.certificate
    await following.stop()


async def test_a_link_that_leads_elsewhere_is_a_change(
    authority: Authority, tmp_path: Path
) -> None:
    """Certificates from ACME programs and Kubernetes are links that are moved."""
    folders = [tmp_path / "1", tmp_path / "2"]
    issued = [authority.issue(HOST), authority.issue(HOST)]
    for folder, each in zip(folders, issued, strict=True):
        folder.mkdir()
        each.write(folder)
    link = tmp_path / "live"
    link.symlink_to(folders[0])
    files = CertificateFiles(link / "server.pem", link / "server.key")
    assert files.read().certificate == issued[0].certificate
    following = Following(files, every_s=0.01)
    later = tmp_path / "later"
    later.symlink_to(folders[1])
    later.replace(link)
    assert (await following.next()).certificate == issued[1].certificate
    await following.stop()


async def test_a_broken_new_pair_keeps_the_old_one_and_is_logged_once(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = files_of(authority.issue(HOST), tmp_path)
    files.read()
    new = authority.issue(HOST)
    following = Following(files, every_s=0.01)
    (tmp_path / "server.pem").write_bytes(new.pem())  # the key comes later
    async with asyncio.timeout(DEADLINE_S):
        while not caplog.records:  # noqa: ASYNC110 (a log is a list)
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "stays what it was" in caplog.text
    assert "not that of the certificate" in caplog.text
    (tmp_path / "server.key").write_bytes(new.key_pem())
    assert (await following.next()).certificate == new.certificate
    await following.stop()


async def test_what_was_in_the_way_of_a_new_pair_for_a_while_is_no_reason_to_keep_the_old_one(
    authority: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """TLS takes certificates from files alone, so it needs a place for temporary ones."""
    files = files_of(authority.issue(HOST), tmp_path)
    files.read()
    following = Following(files, every_s=0.01)
    with monkeypatch.context() as full:
        full.setattr("tempfile.tempdir", str(tmp_path / "a full disk"))
        new = authority.issue(HOST)
        new.write(tmp_path)
        async with asyncio.timeout(DEADLINE_S):
            while not caplog.records:  # noqa: ASYNC110 (a log is a list)
                await asyncio.sleep(0.01)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "TMPDIR" in caplog.text
    assert (await following.next()).certificate == new.certificate
    await following.stop()
