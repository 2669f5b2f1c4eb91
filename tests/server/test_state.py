"""What a server keeps in its state directory."""

from pathlib import Path

import pytest

from eloquent.errors import ConfigurationError
from eloquent_server.state import TICKETS_FILE, open_tickets


def test_without_a_directory_tickets_are_kept_nowhere() -> None:
    assert len(open_tickets(None)) == 0


def test_tickets_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / TICKETS_FILE).mkdir()
    with pytest.raises(ConfigurationError, match=r"tickets.*cannot be read.*remove the file"):
        open_tickets(tmp_path)
    assert len(open_tickets(tmp_path / "nothing yet")) == 0
