"""Token sources: plans, the shipped recording, and files that are none."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from eloquent.errors import ConfigurationError
from eloquent_netem.lab.record import record
from eloquent_netem.lab.sources import (
    ConstantRate,
    GenerationError,
    LiveModel,
    RecordedAnswer,
    Recording,
    Token,
    token_text,
)
from eloquent_netem.lab.stalls_commands import record as record_command

FIELDS = {
    "version": 1,
    "model": "toy",
    "prompt": "Hello",
    "machine": "Linux",
    "times_s": [0.0, 0.5, 0.5],
    "texts": ["a", "b c", "d"],
}


def test_a_constant_rate_has_one_token_every_so_often() -> None:
    plan = ConstantRate(10, 3, 6).plan(0)
    assert plan == (Token(0.0, "00000 "), Token(0.1, "00001 "), Token(0.2, "00002 "))
    assert ConstantRate(10, 3, 6).plan(1) == plan
    assert token_text(123456, 4) == "456 "


def test_the_shipped_recording_is_of_a_real_answer() -> None:
    recording = Recording()
    plan = recording.plan(0)
    assert len(plan) > 100
    assert plan[0].time_s == 0
    gaps = [later.time_s - earlier.time_s for earlier, later in pairwise(plan)]
    assert min(gaps) >= 0
    assert len(set(gaps)) > 50  # no constant rate
    assert "".join(token.text for token in plan).count(" ") > 100
    assert recording.name == f"recorded {recording.content.model}"
    assert Recording(tokens=5).plan(0) == plan[:5]


def test_a_recording_is_known_by_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "answer.json"
    file.write_text(json.dumps(FIELDS))
    recording = Recording(file)
    assert recording.plan(0) == (Token(0.0, "a"), Token(0.5, "b c"), Token(0.5, "d"))
    assert recording.content.tokens_per_s == 4
    copy = tmp_path / "copy.json"
    copy.write_text(recording.content.dumps())
    assert repr(Recording(copy)) == repr(recording)
    assert repr(Recording(copy, 2)) != repr(recording)
    assert repr(recording) != repr(Recording())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no JSON", "is no recording: Expecting value"),
        ("[]", "is no recording of version 1"),
        (json.dumps({**FIELDS, "version": 2}), "is no recording of version 1"),
        (json.dumps({**FIELDS, "times_s": None}), "a key is missing or of the wrong type"),
        (json.dumps({name: FIELDS[name] for name in ("version", "texts")}), "a key is missing"),
        (json.dumps({**FIELDS, "texts": ["a", "b"]}), "each token needs a time and a text"),
        (json.dumps({**FIELDS, "texts": ["a", "", "d"]}), "each token needs a time and a text"),
        (json.dumps({**FIELDS, "times_s": [], "texts": []}), "each token needs a time and a text"),
        (json.dumps({**FIELDS, "times_s": [0.1, 0.2, 0.3]}), "the first token's time is 0"),
        (json.dumps({**FIELDS, "times_s": [0.0, float("nan"), 1]}), "all are finite"),
        (json.dumps({**FIELDS, "times_s": [0.0, 0.5, 0.4]}), "the times go back"),
    ],
)
def test_a_file_that_is_no_recording_is_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "answer.json"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=said):
        Recording(file).plan(0)


async def test_record_notes_each_piece_of_text_of_a_real_server() -> None:
    heard: list[str] = []
    answer = await record(LiveModel("one two three", model="echo"), on_text=heard.append)
    assert answer.texts == tuple(heard) == ("one", " two", " three")
    assert answer.times_s[0] == 0
    assert all(later >= earlier for earlier, later in pairwise(answer.times_s))
    assert (answer.model, answer.prompt) == ("echo", "one two three")
    assert RecordedAnswer.loads(answer.dumps()) == answer


async def test_an_answer_without_text_is_no_recording() -> None:
    with pytest.raises(GenerationError, match="gave no text"):
        await record(LiveModel("", model="echo"))


def test_the_command_writes_a_recording_that_the_comparison_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answer.json"
    record_command(prompt="one two three", model="echo", output=file)
    printed = capsys.readouterr()
    assert printed.out == "one two three"
    assert "3 tokens, " in printed.err
    assert [token.text for token in Recording(file).plan(0)] == ["one", " two", " three"]


def test_a_recording_that_cannot_be_written_is_refused_before_the_work() -> None:
    with pytest.raises(ConfigurationError, match=r"Cannot write /nowhere/answer\.json"):
        record_command(output=Path("/nowhere/answer.json"))
