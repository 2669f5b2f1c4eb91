"""Who is let in, and how much they get, in virtual time."""

import logging
from pathlib import Path

import pytest

from eloquent.errors import RequestError
from eloquent.seldom import EVERY_S
from eloquent_server.admission import LOCAL, Gate, Principal, open_gate
from eloquent_server.keys import KeyFile, entry_for

ALICE, BOB, CLARA = ("elq_" + letter * 43 for letter in "abc")
EXPIRES_S = 1801353600.0
"The start of 2027-01-31."


class World:
    """A gate with a file of keys, two clocks, and what it counts."""

    def __init__(self, path: Path, *entries: str, max_turns: int | None = None) -> None:
        self.path = path
        self.now = 100.0
        self.wall = EXPIRES_S - 1000
        self.write(*entries)
        self.gate = Gate(
            KeyFile(path),
            max_turns=max_turns,
            clock=lambda: self.now,
            wall_clock=lambda: self.wall,
        )
        self.refused = self.gate.refusals

    def write(self, *entries: str) -> None:
        self.path.write_text("\n".join(entries))
        self.path.chmod(0o600)

    def refusal(self, key: str) -> RequestError:
        with pytest.raises(RequestError) as raised:
            self.gate.principal(key)
        return raised.value

    def ask(self, key: str, body_bytes: int = 10) -> RequestError | None:
        """Ask for a turn; return why there is none."""
        try:
            self.gate.admit(self.gate.principal(key), body_bytes)
        except RequestError as error:
            return error
        return None

    def code(self, key: str) -> str:
        refused = self.ask(key)
        return "" if refused is None else refused.code

    def end(self, key: str, answer_bytes: int = 0) -> None:
        self.gate.ended(self.gate.principal(key), answer_bytes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def test_without_keys_everybody_is_local_and_may_do_anything() -> None:
    gate = Gate()
    assert gate.principal("") == gate.principal(ALICE) == LOCAL
    for _ in range(1000):
        gate.admit(LOCAL, 1 << 20)
    assert gate.open_turns == 1000
    gate.reload()


def test_a_key_says_who_asks(path: Path) -> None:
    world = World(path, entry_for(ALICE, "alice"), entry_for(BOB, "bob", "team"), "weight = 2")
    assert world.gate.principal(ALICE) == Principal("alice", 1.0, "alice")
    assert world.gate.principal(BOB) == Principal("team", 2.0, "bob")
    assert world.gate.named("team") == Principal("team", 2.0)
    assert world.gate.named("gone") == Principal("gone", 1.0)


def test_no_key_and_a_wrong_key_are_refused(path: Path) -> None:
    world = World(path, entry_for(ALICE, "alice"))
    for key, reason in (("", "no_key"), (BOB, "wrong_key"), (ALICE[:-1], "wrong_key")):
        assert world.refusal(key).code == "unauthorized"
        assert world.refused.pop(reason) == 1


def test_a_key_is_good_until_it_expires(path: Path) -> None:
    world = World(path, entry_for(ALICE, "alice"), "expires = 2027-01-31")
    world.wall = EXPIRES_S - 0.001
    assert world.gate.principal(ALICE).name == "alice"
    world.wall = EXPIRES_S
    refused = world.refusal(ALICE)
    assert (refused.code, world.refused) == ("unauthorized", {"expired_key": 1})
    assert "expired" in refused.message


def test_a_key_that_leaves_the_file_is_wrong_within_a_second(path: Path) -> None:
    world = World(path, entry_for(ALICE, "alice"))
    assert world.ask(ALICE) is None
    world.write(entry_for(BOB, "bob"))
    world.now += 1
    assert world.refusal(ALICE).code == "unauthorized"
    assert world.gate.principal(BOB).name == "bob"
    world.gate.ended(Principal("alice", 1.0, "alice"), 5)  # its turn that was under way
    assert world.gate.open_turns == 0


def test_limits_are_of_a_key_and_not_of_its_tenant(path: Path) -> None:
    entries = [f"{entry_for(key, key[-1], 'team')}\nturns = 1" for key in (ALICE, BOB)]
    world = World(path, *entries)
    assert [world.code(key) for key in (ALICE, ALICE, BOB, BOB)] == [
        "",
        "too_many_turns",
        "",
        "too_many_turns",
    ]
    assert world.refused == {"turns": 2}
    world.end(ALICE)
    assert [world.code(key) for key in (BOB, ALICE)] == ["too_many_turns", ""]


def test_requests_and_bytes_are_counted_apart(path: Path) -> None:
    lines = "requests_per_minute = 60\nburst = 2\nbytes_per_minute = 6000"
    world = World(path, entry_for(ALICE, "alice"), lines)
    assert [world.code(ALICE) for _ in range(3)] == ["", "", "rate_limited"]
    world.now += 1
    world.end(ALICE, answer_bytes=6000)
    refused = world.ask(ALICE)
    assert refused is not None
    assert refused.retry_after_s > 0
    assert world.refused == {"requests": 1, "bytes": 1}


def test_what_is_asked_counts_at_once(path: Path) -> None:
    world = World(path, entry_for(ALICE, "alice"), "bytes_per_minute = 600")
    assert world.ask(ALICE, body_bytes=600) is None
    refused = world.ask(ALICE, body_bytes=600)
    assert refused is not None
    assert refused.retry_after_s == pytest.approx(60)


def test_all_keys_together_are_bounded(path: Path) -> None:
    world = World(path, entry_for(ALICE, "alice"), entry_for(BOB, "bob"), max_turns=2)
    assert [world.code(key) for key in (ALICE, BOB, ALICE)] == ["", "", "overloaded"]
    refused = world.ask(BOB)
    assert refused is not None
    assert refused.retry_after_s > 0
    assert world.refused == {"all_turns": 2}
    world.end(ALICE)
    assert world.code(BOB) == ""


def test_the_bound_on_all_turns_needs_no_keys() -> None:
    gate = Gate(max_turns=1)
    gate.admit(LOCAL, 1)
    with pytest.raises(RequestError) as raised:
        gate.admit(LOCAL, 1)
    assert raised.value.code == "overloaded"


def test_new_limits_hold_at_once_and_remember_open_turns(path: Path) -> None:
    world = World(path, entry_for(ALICE, "alice"), "turns = 3")
    assert [world.code(ALICE) for _ in range(3)] == [""] * 3
    world.write(entry_for(ALICE, "alice"), "turns = 2")
    world.gate.reload()
    world.end(ALICE)
    assert world.code(ALICE) == "too_many_turns"
    world.end(ALICE)
    assert world.code(ALICE) == ""


def test_a_thousand_wrong_keys_are_a_line_a_second(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(path, entry_for(ALICE, "alice"))
    for number in range(1000):
        world.refusal(f"elq_{number}")
        world.now += EVERY_S / 100
    assert world.refused == {"wrong_key": 1000}
    assert len(caplog.messages) == 10
    assert "(and 99 like it)" in caplog.messages[1]
    assert "elq_" not in caplog.text


def test_the_log_names_a_key_and_never_shows_it(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(path, entry_for(ALICE, "alice"), "turns = 1")
    assert [world.code(ALICE), world.code(ALICE)] == ["", "too_many_turns"]
    assert caplog.messages == ["refused a request of key alice: turns"]


@pytest.mark.parametrize(
    ("host", "warnings"),
    [("127.0.0.1", 0), ("::1", 0), ("localhost", 0), ("0.0.0.0", 1), ("::", 1), ("a.test", 1)],
)
def test_an_open_server_that_others_can_reach_says_so(
    caplog: pytest.LogCaptureFixture, path: Path, host: str, warnings: int
) -> None:
    open_gate(None, host=host)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * warnings
    path.write_text(entry_for(ALICE, "alice"))
    path.chmod(0o600)
    open_gate(path, host=host)
    assert len(caplog.records) == warnings
