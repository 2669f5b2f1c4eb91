"""The programs of `docs/client.md` run as they stand, against a real server."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import Server

import eloquent_client
from eloquent.quic.certificate import ServerCertificate
from eloquent_client.errors import APIError
from eloquent_client.sync import LoopThread
from eloquent_server.backends.echo import EchoBackend
from eloquent_server.gateway import Gateway

PAGE = (Path(__file__).parents[2] / "docs" / "client.md").read_text(encoding="utf-8")
PROGRAMS = [
    (section.partition("\n")[0], program)
    for section in PAGE.split("\n## ")[1:]
    for program in re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
]
"With the heading that each stands under."
URL = "eloquent://localhost:4433#sha256=…"

SAYS = {
    "Ten lines": r"Hello",
    "Without an event loop": r"HelloStreamStats\(datagrams=\d.*missing=0",
    "Events": r"Hello\nended: stop\nHello  \(\)\n1 1 {}",
    "Errors": r"unknown_model This server has no model 'nonesuch'",
    "Keys, timeouts and retries": r"",
    "Going on later": r"One two three",
    "The link": r"idle None\n(.*\n)*up \d.*\n(.*\n)*LinkSnapshot\(state=<LinkState.UP(.*\n)*closed",
}


@pytest.fixture
def server(certificate: ServerCertificate) -> Iterator[Server]:
    """Serve an echo; on a loop of its own, since the programs have theirs."""
    found = Server(Gateway(EchoBackend(1e3)).handle, certificate)
    loop = LoopThread()
    loop.run(found.open)
    yield found
    loop.run(found.close)
    loop.close()


def test_every_program_of_the_page_is_here() -> None:
    assert [title for title, _ in PROGRAMS] == list(SAYS)
    assert PAGE.count("```python") == len(PROGRAMS)


@pytest.mark.parametrize(("title", "program"), PROGRAMS, ids=[title for title, _ in PROGRAMS])
def test_a_program_runs_and_says_what_it_should(
    title: str, program: str, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert URL in program
    code = compile(program.replace(URL, str(server.url)), title, "exec")
    exec(code, {"__name__": "__main__"})
    assert re.match(SAYS[title], capsys.readouterr().out)


def test_the_page_names_every_error_and_its_codes() -> None:
    rows = dict(re.findall(r"^\| [^`|]*`(\w+Error)` \|[^|]*\|([^|]*)\|$", PAGE, re.M))
    errors = {
        name
        for name in eloquent_client.__all__
        if isinstance(kind := getattr(eloquent_client, name), type)
        and issubclass(kind, APIError)
        and kind is not APIError
    }
    assert set(rows) == errors
    for name, codes in rows.items():
        for code in re.findall(r"`([a-z]\w+)`", codes):
            assert type(eloquent_client.errors.status_error(code, "")).__name__ == name
