"""What a server keeps in its state directory."""

import datetime
from pathlib import Path

import pytest

from eloquent.errors import ConfigurationError
from eloquent_server.state import CERTIFICATE_FILE, TICKETS_FILE, open_tickets, server_certificate

NOW = datetime.datetime(2026, 11, 22, tzinfo=datetime.UTC)
YEAR = datetime.timedelta(days=365)


def test_without_a_directory_tickets_are_kept_nowhere() -> None:
    assert len(open_tickets(None)) == 0


def test_tickets_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / TICKETS_FILE).mkdir()
    with pytest.raises(ConfigurationError, match=r"tickets.*cannot be read.*remove the file"):
        open_tickets(tmp_path)
    assert len(open_tickets(tmp_path / "nothing yet")) == 0


def test_the_pin_stays_for_years_where_the_certificate_is_kept(tmp_path: Path) -> None:
    pin = server_certificate(tmp_path, "host", NOW).pin
    assert (tmp_path / CERTIFICATE_FILE).stat().st_mode & 0o777 == 0o600
    assert server_certificate(tmp_path, "host", NOW + 9 * YEAR).pin == pin
    assert server_certificate(tmp_path, "host", NOW + 11 * YEAR).pin != pin


def test_the_pin_stays_though_the_host_changes(tmp_path: Path) -> None:
    """Clients that know the pin ask for no name, and would not know another pin."""
    hosts = ("0.0.0.0", "::", "127.0.0.1", "chat.example.com")
    assert len({server_certificate(tmp_path, host, NOW).pin for host in hosts}) == 1


def test_each_run_without_a_directory_has_another_certificate() -> None:
    assert len({server_certificate(None, "host", NOW).pin for _ in range(2)}) == 2


def test_a_certificate_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / CERTIFICATE_FILE).write_text("broken")
    with pytest.raises(ConfigurationError, match=r"certificate in .* cannot be used.*remove"):
        server_certificate(tmp_path, "host", NOW)
