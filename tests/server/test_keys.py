"""The file of keys: who is let in, what is refused, and what changes while the server runs."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eloquent.errors import ConfigurationError
from eloquent_server.keys import Key, KeyFile, Keys, entry_for, new_key, read_keys
from eloquent_server.limits import KeyLimits

KEY = "elq_" + "A" * 43
DEADLINE_S = 60.0


def write(path: Path, *entries: str) -> Path:
    path.write_text("\n".join(entries))
    path.chmod(0o600)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "keys.toml", entry_for(KEY, "alice"))


def test_a_new_key_has_256_random_bits() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert {(key[:4], len(key)) for key in keys} == {("elq_", 4 + 43)}


def test_an_entry_lets_its_key_in_and_no_other(file: Path) -> None:
    keys = read_keys(file)
    found = keys.find(KEY)
    assert found is not None
    assert (found.name, found.tenant, found.weight) == ("alice", "alice", 1.0)
    assert (found.limits, found.expires_s) == (KeyLimits(), None)
    for wrong in ("", KEY[:-1], KEY + "A", KEY.lower(), new_key(), "\ud800"):
        assert keys.find(wrong) is None


def test_the_file_has_no_key_in_it(file: Path) -> None:
    assert KEY[4:] not in file.read_text()


def test_everything_that_an_entry_may_say(tmp_path: Path) -> None:
    lines = [
        entry_for(KEY, "alice", "team"),
        "weight = 2",
        "turns = 3",
        "requests_per_minute = 60",
        "burst = 20",
        "bytes_per_minute = 1_000_000",
        "expires = 2027-01-31",
    ]
    (key,) = read_keys(write(tmp_path / "keys.toml", *lines))
    assert (key.tenant, key.weight) == ("team", 2.0)
    assert key.limits == KeyLimits(
        turns=3, requests_per_minute=60, burst=20, bytes_per_minute=1_000_000
    )


@pytest.mark.parametrize(
    ("value", "expires_s"),
    [
        ("2027-01-31", 1801353600),
        ('"2027-01-31"', 1801353600),
        ("2027-01-31T00:00:00", 1801353600),
        ("2027-01-31T02:00:00+02:00", 1801353600),
        ('"2027-01-31T00:00:00Z"', 1801353600),
    ],
)
def test_a_key_expires_in_utc_unless_the_file_says_where(
    tmp_path: Path, value: str, expires_s: float
) -> None:
    lines = entry_for(KEY, "alice"), f"expires = {value}"
    (key,) = read_keys(write(tmp_path / "keys.toml", *lines))
    assert key.expires_s == expires_s


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "required field `key`"),
        ("key = []", "length >= 1"),
        ("[[keys]]", "unknown field `keys`"),
        ("[[key]]\nname = 'alice'", "required field `hash`"),
        ("[[key]]\nname = 'alice'\nhash = 'sha256:12'", "hash"),
        ("not TOML", "Expected '='"),
        ("turns = 0", ">= 1"),
        ("turn = 5", "unknown field `turn`"),
        ("weight = 0", "> 0"),
        ("weight = nan", "> 0"),
        ("weight = inf", "<= "),
        ("burst = 5", "`burst` needs `requests_per_minute`"),
        ("expires = 5", "no date or time"),
        ('expires = "soon"', "no date or time"),
        ("expires = 10:00:00", "no date or time"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, text: str, reason: str) -> None:
    is_field = text and not text.startswith(("[", "key", "not"))
    lines = [entry_for(KEY, "alice"), text] if is_field else [text]
    path = write(tmp_path / "keys.toml", *lines)
    with pytest.raises(ConfigurationError) as raised:
        read_keys(path)
    assert reason in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (("a", None, ""), ("a", None, ""), "same name"),
        (("a", "team", ""), ("b", "team", "weight = 2.0"), "different weights"),
    ],
)
def test_entries_that_do_not_go_together_are_refused(
    tmp_path: Path,
    first: tuple[str, str | None, str],
    second: tuple[str, str | None, str],
    reason: str,
) -> None:
    lines = [f"{entry_for(new_key(), *each[:2])}\n{each[2]}" for each in (first, second)]
    with pytest.raises(ConfigurationError, match=reason):
        read_keys(write(tmp_path / "keys.toml", *lines))


def test_one_key_under_two_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="same hash"):
        read_keys(write(tmp_path / "k.toml", entry_for(KEY, "a"), entry_for(KEY, "b")))


@pytest.mark.parametrize("name", ["", "a b", "a" * 65, 'a"', "a\n", "ä"])
def test_a_name_that_could_break_the_file_or_the_log_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="no such key"):
        entry_for(KEY, name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        KeyFile(tmp_path / "keys.toml")


@pytest.mark.parametrize(("mode", "warnings"), [(0o600, 0), (0o644, 0), (0o620, 1), (0o602, 1)])
def test_a_file_that_others_may_write_to_is_warned_of(
    file: Path, caplog: pytest.LogCaptureFixture, mode: int, warnings: int
) -> None:
    file.chmod(mode)
    read_keys(file)
    assert len(caplog.records) == warnings
    assert all("chmod go-w" in record.message for record in caplog.records)


def test_a_change_of_the_file_is_seen_within_a_second(file: Path) -> None:
    keys = KeyFile(file)
    keys.look(10.0)
    other = new_key()
    write(file, entry_for(other, "bob"))
    keys.look(10.9)
    assert keys.keys.find(other) is None
    keys.look(11.0)
    assert keys.keys.find(other) is not None
    assert keys.keys.find(KEY) is None


def test_a_file_that_takes_its_place_is_seen_too(file: Path) -> None:
    keys = KeyFile(file)
    keys.look(0.0)
    before = file.stat()
    new = write(file.with_suffix(".new"), entry_for(new_key(), "clara"))
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(file)
    keys.look(1.0)
    assert keys.keys.named("clara") is not None


@pytest.mark.parametrize("broken", ["", "[[key]]\nname = ", None])
def test_a_broken_file_keeps_the_old_keys_and_says_so_once(
    file: Path, caplog: pytest.LogCaptureFixture, broken: str | None
) -> None:
    """Also one that is not there, since another takes its place; and it is read when it is good."""
    keys = KeyFile(file)
    if broken is None:
        file.unlink()
    else:
        write(file, broken)
    for now in range(5):
        keys.look(now)
    assert keys.keys.find(KEY) is not None
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "stay as they were" in caplog.text
    write(file, entry_for(new_key(), "bob"))
    keys.look(5.0)
    assert keys.keys.find(KEY) is None


def test_a_file_that_could_not_be_read_for_a_moment_is_read_later(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = KeyFile(file)
    write(file, entry_for(new_key(), "bob"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", no_more_files)
        keys.look(0.0)
        keys.look(1.0)
    assert keys.keys.find(KEY) is not None
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    keys.look(2.0)
    assert keys.keys.find(KEY) is None


def no_more_files(path: Path, mode: str) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))


def test_a_reload_reads_at_once(file: Path) -> None:
    keys = KeyFile(file)
    write(file, entry_for(new_key(), "bob"))
    keys.reload()
    assert keys.keys.named("bob") is not None


def test_a_tenant_without_keys_has_the_usual_weight() -> None:
    limits = KeyLimits()
    key = Key(name="a", digest=b"", tenant="t", weight=3.0, limits=limits, expires_s=None)
    assert (Keys((key,)).weight("t"), Keys((key,)).weight("gone")) == (3.0, 1.0)


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    program = (
        "from eloquent_server.keys_commands import keys; import sys; "
        "from eloquent.errors import EloquentError\n"
        "try:\n    keys(sys.argv[1:], result_action='return_value')\n"
        "except EloquentError as error:\n    sys.exit(str(error))"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *command],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_the_commands_make_a_file_and_check_it(tmp_path: Path) -> None:
    alice, bob = run("new", "alice"), run("new", "bob", "--tenant", "team")
    path = write(tmp_path / "keys.toml", alice.stdout, bob.stdout, "turns = 4")
    keys = read_keys(path)
    for made, name in ((alice, "alice"), (bob, "bob")):
        key = made.stderr.splitlines()[-1]
        assert key not in made.stdout
        found = keys.find(key)
        assert found is not None
        assert found.name == name
    checked = run("check", str(path))
    assert checked.stdout.splitlines() == [
        "alice\ttenant alice",
        "bob\ttenant team\t4 turns",
    ]


def test_checking_a_broken_file_fails(tmp_path: Path) -> None:
    checked = run("check", str(write(tmp_path / "keys.toml", "[[key]]")))
    assert checked.returncode == 1
    assert "cannot be used" in checked.stderr
