"""`eloquent ask`, as a program."""

import asyncio
import json
import os
import shlex
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable
from typing import Any

import pytest
from loopback import DEADLINE_S, Hanging, StartServer, saying
from rungs import URL, serving, virtually
from telling import Telling

from eloquent.cli import make_app
from eloquent.core.events import TextDelta, encode_event
from eloquent.errors import ConfigurationError, RequestError
from eloquent.url import parse_url
from eloquent_client import APIConnectionError, APITimeoutError, Client, commands
from eloquent_netem.vloop import VirtualNetwork
from eloquent_server.backends.echo import EchoBackend
from eloquent_server.gateway import Gateway
from eloquent_server.turns import Turn


async def start(
    *arguments: str, command: str = "ask", stdin: int = asyncio.subprocess.DEVNULL
) -> Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "eloquent", command, *arguments),
        stdin=stdin,
        stdout=PIPE,
        stderr=PIPE,
    )


async def run(
    *arguments: str, command: str = "ask", given: str | None = None
) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error."""
    stdin = asyncio.subprocess.DEVNULL if given is None else PIPE
    process = await start(*arguments, command=command, stdin=stdin)
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate(None if given is None else given.encode())
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_text(start_server: StartServer) -> None:
    server = await start_server(saying("Hello ", "there 👋"))
    assert await run("Hi", "--url", str(server.url)) == (0, "Hello there 👋\n", "")


async def test_json(start_server: StartServer) -> None:
    server = await start_server(saying("Hello\n", "there 👋", finish_reason="length"))
    code, out, err = await run("Hi", "--json", "--url", str(server.url))
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    answer = json.loads(out)
    assert set(answer) == {
        *("turn", "text", "finish_reason", "model", "tokens", "prompt_tokens", "cached_tokens"),
        *("ttft_ms", "duration_ms", "rtt_ms"),
        *("datagrams", "loss_recovered", "duplicates", "missing"),
    }
    assert answer["text"] == "Hello\nthere 👋"
    assert (answer["finish_reason"], answer["model"], answer["tokens"]) == ("length", "told", 2)
    assert answer["duplicates"] == answer["missing"] == 0
    assert 0 < answer["ttft_ms"] <= answer["duration_ms"]


async def test_cached_tokens(start_server: StartServer) -> None:
    async def handle(turn: Turn) -> None:
        turn.append(TextDelta("yes"))
        turn.close("stop", model="m", prompt_tokens=40, completion_tokens=1, cached_tokens=32)

    server = await start_server(handle)
    _, out, _ = await run("Hi", "--json", "--url", str(server.url))
    assert (json.loads(out)["prompt_tokens"], json.loads(out)["cached_tokens"]) == (40, 32)


async def test_everything_is_asked(start_server: StartServer) -> None:
    bodies: list[bytes] = []

    async def handle(turn: Turn) -> None:
        bodies.append(turn.request.body)
        await saying("yes")(turn)

    server = await start_server(handle)
    options = [
        *("--model", "m", "--system", "Be brief.", "--max-tokens", "5"),
        *("--temperature", "0.5", "--seed", "3", "--url", str(server.url)),
    ]
    assert (await run("-", *options, given="from a pipe"))[0] == 0
    assert (await run("--url", str(server.url), given="from a pipe"))[0] == 0
    user = {"role": "user", "content": "from a pipe"}
    assert json.loads(bodies[0]) == {
        "messages": [{"role": "system", "content": "Be brief."}, user],
        "model": "m",
        "max_tokens": 5,
        "temperature": 0.5,
        "seed": 3,
    }
    assert json.loads(bodies[1]) == {"messages": [user]}


async def test_a_server_of_its_own() -> None:
    code, out, _ = await run("say this again", "--model", "echo", "--json")
    assert code == 0
    assert json.loads(out)["text"] == "say this again"


async def test_a_server_of_its_own_that_fails_says_why_once() -> None:
    code, out, err = await run("Hi", "--model", "/nonexistent")
    assert (code, out) == (1, "")
    assert err.count("There is no model '/nonexistent'") == 1
    assert err.splitlines()[-1].startswith("eloquent: The server started on this machine ended")


async def test_errors_are_one_message(start_server: StartServer) -> None:
    server = await start_server(Gateway(EchoBackend(1e6)).handle)
    code, out, err = await run("Hi", "--json", "--model", "nonesuch", "--url", str(server.url))
    assert (code, out) == (1, "")
    assert err.startswith("eloquent: This server has no model 'nonesuch'")
    code, out, err = await run("Hi", "--url", str(server.url).partition("#")[0])
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "self-signed certificate" in err
    await server.close()
    code, out, err = await run("Hi", "--url", str(server.url))
    assert (code, out) == (1, "")
    assert err.startswith("eloquent: Nothing listens")


async def test_an_error_does_not_steer_the_terminal(start_server: StartServer) -> None:
    async def handle(turn: Turn) -> None:
        turn.reject(RequestError("invalid_request", "No.\x1b]0;title\x07\x1b[2J"))

    server = await start_server(handle)
    answer = await run("Hi", "--url", str(server.url))
    assert answer == (1, "", "eloquent: No.]0;title[2J\n")


async def test_a_question_that_begins_with_a_hyphen(start_server: StartServer) -> None:
    server = await start_server(Gateway(EchoBackend(1e6)).handle)
    assert await run("- one\n- two", "--url", str(server.url)) == (0, "- one\n- two\n", "")
    code, out, err = await run("--jsn", "--url", str(server.url))
    assert (code, out) == (1, "")
    assert "no option --jsn" in err


@pytest.mark.parametrize("arguments", [("",), ("-",), ()])
async def test_no_question(arguments: tuple[str, ...]) -> None:
    code, out, err = await run(*arguments, "--url", "eloquent://127.0.0.1:1")
    assert (code, out) == (1, "")
    assert "The question is empty" in err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the locale decides which
async def test_a_question_that_is_no_text(errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", f"utf-8:{errors}")
    process = await start("--url", "eloquent://127.0.0.1:1", stdin=PIPE)
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate(b"caf\xe9")
    assert (process.returncode, out) == (1, b"")
    assert b"no text" in err


async def test_ctrl_c_cancels(start_server: StartServer) -> None:
    hanging = Hanging("So far")
    server = await start_server(hanging)
    process = await start("Hi", "--url", str(server.url))
    assert process.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        assert await process.stdout.readexactly(6) == b"So far"
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
        await hanging.cancelled.wait()
    assert (process.returncode, out, err) == (130, b"\n", b"")


async def test_a_reader_that_goes(start_server: StartServer) -> None:
    gone = asyncio.Event()

    async def handle(turn: Turn) -> None:
        turn.append(TextDelta("x"))
        await gone.wait()
        await saying(*["y"] * 10)(turn)

    server = await start_server(handle)
    reader, writer = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "eloquent", "ask", "Hi", "--url", str(server.url)),
        stdout=writer,
        stderr=PIPE,
    )
    os.close(writer)
    async with asyncio.timeout(DEADLINE_S):
        assert await asyncio.to_thread(os.read, reader, 1) == b"x"
        os.close(reader)
        gone.set()
        _, err = await process.communicate()
    assert (process.returncode, err) == (commands.EXIT_BROKEN_PIPE, b"")


@pytest.mark.parametrize("stream", ["stdin", "stderr"])  # Textual reads and draws on these
def test_chat_needs_a_terminal(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stderr"):
        monkeypatch.setattr(getattr(sys, name), "isatty", lambda name=name: name != stream)
    with pytest.raises(ConfigurationError, match="no terminal"):
        commands.chat(url="no URL")


def test_chat_needs_textual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"eloquent-stream\[chat\]"):
        commands.chat()


async def test_the_key_comes_from_the_environment(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []

    async def handle(turn: Turn) -> None:
        keys.append(turn.request.key)
        await saying("yes")(turn)

    server = await start_server(handle)
    url = str(server.url)
    monkeypatch.setenv("ELOQUENT_KEY", "usual\n")
    monkeypatch.setenv("OTHER_KEY", "other")
    assert await run("Hi", "--url", url) == (0, "yes\n", "")
    assert await run("Hi", "--url", url, "--key-env", "OTHER_KEY") == (0, "yes\n", "")
    monkeypatch.delenv("ELOQUENT_KEY")
    assert await run("Hi", "--url", url) == (0, "yes\n", "")
    assert keys == ["usual", "other", ""]
    code, out, err = await run("Hi", "--url", url, "--key-env", "NO_SUCH_KEY")
    assert (code, out) == (1, "")
    assert "environment variable NO_SUCH_KEY" in err


@pytest.mark.parametrize("is_owner", [True, False])
def test_what_is_said_of_going_on_later_does_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_owner: bool
) -> None:
    """The server vanishes twice in mid-answer; each time the command that is printed goes on."""
    monkeypatch.setenv("MY_KEY", "sesame")
    tokens = [f"word{number} " for number in range(2000)]
    service = Telling(tokens, 0.1)

    async def command_of(network: VirtualNetwork, asking: Awaitable[None]) -> dict[str, Any]:
        """Return the arguments of what is printed when the server vanishes."""
        async with serving(network, service):
            asked = asyncio.ensure_future(asking)
            await asyncio.sleep(3)
        with pytest.raises(APIConnectionError) as error:
            await asked
        command = str(error.value).partition("To go on later: eloquent ")[2]
        called, bound, _ = make_app().parse_args(shlex.split(command))
        assert called is commands.resume
        return bound.arguments

    def resuming(said: dict[str, Any]) -> Awaitable[None]:
        assert said["key_env"] == "MY_KEY"
        return commands._resume(
            parse_url(said["url"]),
            said["name"],
            said["offset"],
            is_owner=is_owner,
            key_env=said["key_env"],
        )

    async def main(network: VirtualNetwork) -> None:
        client = Client(URL, key="sesame")
        asking = commands._ask(URL, client, {"messages": []}, as_json=False, key_env="MY_KEY")
        said = await command_of(network, resuming(await command_of(network, asking)))
        assert said.get("watch", False) is not is_owner
        async with serving(network, service):
            await resuming(said)

    virtually(main)
    assert capsys.readouterr().out.replace("\n", "") == "".join(tokens)


async def test_nobody_is_told_to_go_on_with_what_took_too_long(start_server: StartServer) -> None:
    hanging = Hanging("So far")
    server = await start_server(hanging)
    client = Client(server.url, timeout_s=0.3)
    with pytest.raises(APITimeoutError) as error:
        await commands._ask(server.url, client, {"messages": []}, as_json=False)
    assert "eloquent resume" not in str(error.value)
    async with asyncio.timeout(DEADLINE_S):
        await hanging.cancelled.wait()


async def test_resume_takes_a_name_and_a_programs_token(start_server: StartServer) -> None:
    server = await start_server(saying("one ", "two ", "three"))
    url = str(server.url)
    code, out, _ = await run("Count", "--json", "--url", url)
    name = json.loads(out)["turn"]
    assert code == 0
    first = len(encode_event(TextDelta("one ")))

    async def resumed(*arguments: str) -> tuple[int, str, str]:
        return await run(*arguments, "--url", url, command="resume")

    assert await resumed(name) == (0, "one two three\n", "")
    assert await resumed(name, "--offset", str(first)) == (0, "two three\n", "")
    assert await resumed(f"{name}:{first}", "--watch") == (0, "two three\n", "")
    assert await resumed(f"{name}:{first}", "--offset", "0") == (0, "one two three\n", "")
    for arguments in ((name[1:],), (name, "--offset", "-1")):
        code, out, err = await resumed(*arguments)
        assert (code, out) == (1, "")
        assert "no name of a turn" in err
