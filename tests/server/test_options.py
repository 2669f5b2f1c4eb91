"""Options come from the command line, else the environment, else a file, else the default."""

import dataclasses
import json
import types
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from cyclopts import CycloptsError

from eloquent.cli import make_app
from eloquent.errors import ConfigurationError
from eloquent_server.options import ServerOptions

OF_OPTIONS = ("config", "print_config")
"They say something of the others."
FIELDS = [field for field in dataclasses.fields(ServerOptions) if field.name not in OF_OPTIONS]
TYPES = get_type_hints(ServerOptions, include_extras=True)
DEFAULTS = ServerOptions()
APP = make_app()
"With all commands: what an option is called, one of them may be called, too."


def plain(kind: Any) -> Any:
    """Return a field's type without what stands around it."""
    if get_origin(kind) is Annotated:
        return plain(get_args(kind)[0])
    if get_origin(kind) is types.UnionType:
        (kind,) = (each for each in get_args(kind) if each is not type(None))
    return kind


def samples(name: str) -> list[Any]:
    """Return three values for an option, and one of the other kind where there are two only."""
    kind = plain(TYPES[name])
    if kind is bool:
        other = not getattr(DEFAULTS, name)
        return [other, not other, other]
    if get_origin(kind) is Literal:
        choices = [each for each in get_args(kind) if each != getattr(DEFAULTS, name)]
        return (choices * 3)[:3]
    if get_origin(kind) is tuple:
        return [("a", "b"), ("c",), ("d",)]
    return [kind(each) for each in (["1", "2", "3"] if kind in (int, float) else ["a", "b", "c"])]


def as_flags(name: str, value: Any) -> list[str]:
    option = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [option if value else option.replace("--", "--no-", 1)]
    values = value if isinstance(value, tuple) else (value,)
    return [word for each in values for word in (option, str(each))]


def as_toml(value: Any) -> str:
    if isinstance(value, Path):
        value = str(value)
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def as_variable(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def options_of(*words: str) -> ServerOptions:
    _, bound, _ = APP.parse_args(["serve", *words], exit_on_error=False, print_error=False)
    found = bound.arguments.get("options", DEFAULTS)
    assert isinstance(found, ServerOptions)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "eloquent.toml"


@pytest.mark.parametrize("name", [field.name for field in FIELDS])
def test_each_option_can_be_set_each_way_and_the_nearer_one_holds(
    name: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_flag, by_variable, by_file = samples(name)
    assert getattr(options_of(), name) == getattr(DEFAULTS, name)
    file.write_text(f"{name.replace('_', '-')} = {as_toml(by_file)}\n")
    config = ["--config", str(file)]
    assert getattr(options_of(*config), name) == by_file
    monkeypatch.setenv(f"ELOQUENT_SERVE_{name.upper()}", as_variable(by_variable))
    assert getattr(options_of(), name) == by_variable
    assert getattr(options_of(*config), name) == by_variable
    assert getattr(options_of(*config, *as_flags(name, by_flag)), name) == by_flag


def test_options_from_three_places_go_together(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('model = "echo"\nport = 7\n')
    monkeypatch.setenv("ELOQUENT_SERVE_CONFIG", str(file))
    monkeypatch.setenv("ELOQUENT_SERVE_PORT", "8")
    found = options_of("--host", "::1")
    assert (found.model, found.port, found.host) == ("echo", 8, "::1")
    assert found.config == file


def test_what_is_set_can_be_shown_without_passwords(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text('model = "echo"\nport = 7\nwebsocket = false\n')
    monkeypatch.setenv("ELOQUENT_SERVE_PORT", "8")
    monkeypatch.setenv("ELOQUENT_SERVE_STORE", "redis://user:hush@localhost:1/0")
    engines = ("--upstream", "a", "--upstream", "b")
    with pytest.raises(SystemExit) as ended:
        options_of("--config", str(file), "--durable", *engines, "--print-config")
    assert not ended.value.code
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert {name: (value, where) for name, value, where in lines} == {
        "--config": (str(file), "command line"),
        "--durable": ("True", "command line"),
        "--model": ("echo", str(file)),
        "--port": ("8", "environment"),
        "--store": ("redis://localhost:1/0", "environment"),
        "--upstream": ("a b", "command line"),
        "--websocket": ("False", str(file)),
    }


@pytest.mark.parametrize(
    "url",
    [
        "redis://me:hush@h/0",
        "redis://:hu/sh@h/0",
        "redis://:hu@sh@h/0",
        "redis://h/0?password=hush",
    ],
)
def test_however_a_password_is_given_it_is_not_shown(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        options_of("--store", url, "--print-config")
    shown = capsys.readouterr().out
    assert "h/0" in shown
    assert "hu" not in shown
    assert "sh" not in shown


def test_a_misspelt_name_is_an_error_wherever_it_is(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text('keyz = "keys.toml"\n')
    with pytest.raises(CycloptsError, match="keyz"):
        options_of("--config", str(file))
    with pytest.raises(CycloptsError, match="keyz"):
        options_of("--keyz", "keys.toml")
    monkeypatch.setenv("ELOQUENT_SERVE_KEYZ", "keys.toml")
    with pytest.raises(ConfigurationError, match="ELOQUENT_SERVE_KEYZ"):
        options_of()


@pytest.mark.parametrize("text", ['models = "x"', '[serve]\nkeys = "keys.toml"', "[keys]\nx = 1"])
def test_what_stands_where_no_option_is_looked_for_is_an_error(text: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(CycloptsError, match="Unknown option"):
        options_of("--config", str(file))


@pytest.mark.parametrize("name", ["no-websocket", "no_padding", "no-durable"])
def test_an_option_is_not_negated_by_its_name_but_by_its_value(
    name: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(f"{name} = true\n")
    with pytest.raises(ConfigurationError, match=f"{name}.* with the value `false`"):
        options_of("--config", str(file))
    variable = f"ELOQUENT_SERVE_{name.replace('-', '_').upper()}"
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigurationError, match=f"{variable}.* with the value `false`"):
        options_of()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("port = ", "cannot be read"),
        ('config = "other.toml"', "names another file"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(text: str | None, why: str, file: Path) -> None:
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigurationError, match=why) as refused:
        options_of("--config", str(file))
    assert str(file) in str(refused.value)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_a_number_that_is_none_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--turn-ttl is"):
        options_of(f"--turn-ttl={text}")


@pytest.mark.parametrize("text", ['port = "many"', 'device = "tpu"', "[port]\nx = 1"])
def test_a_value_of_the_wrong_kind_is_an_error_that_names_it(text: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(CycloptsError) as refused:
        options_of("--config", str(file))
    assert "port" in str(refused.value) or "device" in str(refused.value)
