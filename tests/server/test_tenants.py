"""The salts of tenants: the same for the same, kept with the state, told to nobody."""

import stat
from pathlib import Path

import pytest

from eloquent.errors import ConfigurationError
from eloquent_server.admission import Principal
from eloquent_server.backends.base import Tenant
from eloquent_server.tenants import SALT_FILE, tenants


def test_keys_of_one_tenant_have_one_salt_and_others_have_others() -> None:
    tenant_of = tenants(None)
    alice, bob = (tenant_of(Principal("team", 2.0, key)) for key in ("alice", "bob"))
    other = tenant_of(Principal("other", 2.0, "clara"))
    assert alice == bob == Tenant("team", 2.0, alice.salt)
    assert other.salt != alice.salt
    assert len(bytes.fromhex(alice.salt)) == 32
    assert "team" not in alice.salt


def test_another_server_has_other_salts() -> None:
    assert tenants(None)(Principal("a")).salt != tenants(None)(Principal("a")).salt


def test_a_restart_on_the_same_state_keeps_them(tmp_path: Path) -> None:
    state = tmp_path / "state"
    before = tenants(state)(Principal("a"))
    assert tenants(state)(Principal("a")) == before
    assert stat.S_IMODE((state / SALT_FILE).stat().st_mode) == 0o600
    assert [path.name for path in state.iterdir()] == [SALT_FILE]


def test_a_key_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / SALT_FILE).write_bytes(b"short")
    with pytest.raises(ConfigurationError, match="5 bytes"):
        tenants(tmp_path)


def test_a_state_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(ConfigurationError, match="--state"):
        tenants(tmp_path / "state")
