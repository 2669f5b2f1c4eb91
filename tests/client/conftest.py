"""Real servers on loopback for the client to talk to."""

import datetime
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from loopback import HOST, Server, StartServer

from eloquent.quic.certificate import ServerCertificate, make_certificate
from eloquent_server.turns import TurnHandler


@pytest.fixture(autouse=True)
def state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let what commands keep for the user lie elsewhere."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture(scope="session")
def certificate() -> ServerCertificate:
    return make_certificate(HOST, datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1))


@pytest.fixture
async def start_server(certificate: ServerCertificate) -> AsyncIterator[StartServer]:
    servers: list[Server] = []

    async def start(handler: TurnHandler) -> Server:
        server = Server(handler, certificate)
        servers.append(server)
        await server.open()
        return server

    yield start
    for server in servers:
        await server.close()
