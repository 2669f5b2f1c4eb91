"""The Dockerfile and the systemd unit: what they say of the server is so."""

import asyncio
import dataclasses
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from asyncio.subprocess import DEVNULL
from pathlib import Path

import pytest
from authority import Authority
from server_process import DEADLINE_S, server_process

from eloquent.cli import make_app
from eloquent.url import DEFAULT_PORT
from eloquent_server.front import address_of
from eloquent_server.keys import read_keys
from eloquent_server.options import ServerOptions

PROJECT = Path(__file__).parents[2]
DOCKERFILE = (PROJECT / "Dockerfile").read_text().replace("\\\n", "")
UNIT = PROJECT / "packaging" / "eloquent.service"


def options_of(*words: str) -> ServerOptions:
    _, bound, _ = make_app().parse_args(["serve", *words], exit_on_error=False, print_error=False)
    found = bound.arguments["options"]
    assert isinstance(found, ServerOptions)
    return found


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name}\s+(.*)$", DOCKERFILE, flags=re.MULTILINE)


def setting(name: str) -> str:
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT.read_text(), flags=re.MULTILINE)
    return str(value)


def test_the_image_s_environment_is_made_of_options(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = dict(word.split("=", 1) for line in instructions("ENV") for word in line.split())
    for name, value in variables.items():
        if name.startswith("ELOQUENT_SERVE_"):
            monkeypatch.setenv(name, value)
    options = options_of()
    assert options.host == "0.0.0.0"
    assert options.state == Path(instructions("VOLUME")[0])
    assert options.http is not None
    port = address_of(options.http)[1]
    exposed = set(instructions("EXPOSE")[0].split())
    assert exposed == {f"{DEFAULT_PORT}/udp", f"{DEFAULT_PORT}/tcp", f"{port}/tcp"}
    assert f":{port}/health" in instructions("HEALTHCHECK")[0]


@pytest.mark.parametrize("has_tls", [False, True])
async def test_the_image_s_health_check_tells_a_server_from_none(
    has_tls: bool, tmp_path: Path
) -> None:
    cert, key = Authority().issue("example.com").write(tmp_path)
    tls = ("--cert", str(cert), "--cert-key", str(key)) if has_tls else ()
    (command,) = re.findall(r"CMD (\[.*\])", instructions("HEALTHCHECK")[0])
    words = json.loads(command)
    words[0] = sys.executable

    async def check(at: str) -> int:
        given = [word.replace(":8080/", f":{at}/") for word in words]
        process = await asyncio.create_subprocess_exec(*given, stderr=DEVNULL)
        async with asyncio.timeout(DEADLINE_S):
            return await process.wait()

    async with server_process(tmp_path, "--http", "0.0.0.0:0", *tls) as server:
        at = (await server.line()).rpartition(":")[2]
        assert await check(at) == 0
        server.signal(signal.SIGTERM)
        assert await server.wait() == 0
    assert await check(at) != 0


def test_the_image_s_extras_exist_and_its_sources_are_let_through() -> None:
    with (PROJECT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    (asked,) = re.findall(r"^ARG EXTRAS=(.*)$", DOCKERFILE, flags=re.MULTILINE)
    assert set(asked.split(",")) <= set(extras)
    let_through = {line[1:] for line in (PROJECT / ".dockerignore").read_text().split("\n")}
    copied = [line.split()[:-1] for line in instructions("COPY") if not line.startswith("--from")]
    for name in (name for names in copied for name in names):
        assert (PROJECT / name).exists()
        assert name in let_through


def test_the_unit_starts_a_server_with_options_that_there_are(tmp_path: Path) -> None:
    config = tmp_path / "eloquent.toml"
    config.write_text('host = "0.0.0.0"\n')
    words = shlex.split(setting("ExecStart"))
    assert words[1] == "serve"
    words[words.index("--config") + 1] = str(config)
    options = options_of(*words[2:])
    assert options.host == "0.0.0.0"
    assert options.state == Path("/var/lib") / setting("StateDirectory")
    assert options.drain_timeout < float(setting("TimeoutStopSec"))
    assert setting("Type") == "notify"


def test_models_from_the_hub_go_where_the_unit_may_write() -> None:
    given = dict(word.split("=", 1) for word in setting("Environment").split())
    code = "from huggingface_hub import constants\nprint(constants.HF_HUB_CACHE)"
    command = [sys.executable, "-c", code]
    environment = {"HOME": "/home/nobody", **given}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    cache = Path("/var/cache") / setting("CacheDirectory")
    assert Path(done.stdout.strip()).is_relative_to(cache)


def test_the_unit_leaves_an_engine_its_gpu() -> None:
    """What closes devices; a whole list of them would have to be opened again."""
    for name in ("PrivateDevices", "DeviceAllow", "DevicePolicy", "ProtectClock"):
        assert f"\n{name}=" not in UNIT.read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    executable = shlex.split(setting("ExecStart"))[0]
    unit.write_text(UNIT.read_text().replace(executable, "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.returncode == 0


def test_the_page_for_operators_names_only_options_that_there_are(tmp_path: Path) -> None:
    page = (PROJECT / "docs" / "operations.md").read_text()
    other = {  # of other programs
        *("--system", "--now", "--init", "--stop-timeout", "--network"),
        *("--help", "--key-env"),
    }
    known = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(ServerOptions)}
    named = set(re.findall(r"(?<![-\w])--[a-z][a-z-]+", page))
    assert named - other - known <= {"--no-websocket"}
    snippets = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
    options, keys = sorted(snippets, key=lambda text: "[[key]]" in text)
    config = tmp_path / "eloquent.toml"
    config.write_text(options)
    found = options_of("--config", str(config))
    for name, value in tomllib.loads(options).items():
        assert str(getattr(found, name.replace("-", "_"))) == str(value)
    config.write_text(keys)
    config.chmod(0o600)
    assert [key.name for key in read_keys(config)] == ["alice"]


def test_the_page_for_operators_names_only_metrics_that_there_are() -> None:
    page = (PROJECT / "docs" / "operations.md").read_text()
    source = (PROJECT / "server" / "eloquent_server" / "metrics.py").read_text()
    for name in re.findall(r"`((?:vllm|eloquent):[a-z_]+)`", page):
        assert f'"{name.removesuffix("_total")}"' in source, name
