"""A server of one's own: it comes up, and it goes however its parent goes."""

import asyncio
import errno
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from loopback import DEADLINE_S

from eloquent.url import ServerUrl, parse_url
from eloquent_client import (
    APIConnectionError,
    Client,
    LocalServerError,
    local,
    local_client,
    local_server,
)

PYTHON = sys.executable
PIN = "0" * 64


async def is_gone(url: ServerUrl) -> bool:
    async with Client(url) as client:
        try:
            await client.connect()
        except APIConnectionError:
            return True
    return False


@pytest.fixture
def fake_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A shell script in the server's place, which runs after it has left its pid in `pid`."""
    program = tmp_path / "server"
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(local, "STOP_TIMEOUT_S", 0.2)
    return program


def write_script(program: Path, *lines: str) -> None:
    script = ["#!/bin/sh", f"echo $$ > {program.parent}/pid", *lines, ""]
    program.write_text("\n".join(script))
    program.chmod(0o700)


def assert_ended(program: Path) -> None:
    pid = int((program.parent / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_options_of_another_server_in_the_environment_are_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ELOQUENT_SERVE_KEYS", "/nowhere")
    async with asyncio.timeout(DEADLINE_S), local_server("echo") as url, Client(url) as client:
        await client.connect()
        assert client.link.is_up


async def test_it_answers_and_ends_with_the_block() -> None:
    async with asyncio.timeout(DEADLINE_S):
        async with local_server("echo") as url, Client(url) as client:
            assert url.host == "127.0.0.1"
            async with client.stream([{"role": "user", "content": "to be repeated"}]) as stream:
                assert (await stream.get_final_message()).text == "to be repeated"
        assert await is_gone(url)


async def test_a_server_that_fails_says_why() -> None:
    lines: list[str] = []
    with pytest.raises(LocalServerError, match="/nonexistent") as error:
        async with (
            asyncio.timeout(DEADLINE_S),
            local_server("/nonexistent", on_progress=lines.append),
        ):
            pass
    assert "exit code 1" in str(error.value)
    assert any("/nonexistent" in line for line in lines)


async def test_a_client_knows_at_once_that_its_server_died(fake_server: Path) -> None:
    write_script(fake_server, "echo 'Its last words' >&2", f'exec {PYTHON} "$@"')
    question = "some two hundred seconds of words " * 2000
    async with asyncio.timeout(DEADLINE_S), local_client("echo") as client:
        async with client.stream([{"role": "user", "content": question}]) as stream:
            await anext(stream.text_stream)
            os.kill(int((fake_server.parent / "pid").read_text()), signal.SIGKILL)
            with pytest.raises(LocalServerError, match="-9") as error:
                await stream.get_final_message()
        assert "Its last words" in str(error.value)
        assert stream.text
        assert not client.link.is_up
        with pytest.raises(LocalServerError, match="-9"):
            await client.connect()


async def test_progress_is_shown_in_lines(fake_server: Path) -> None:
    write_script(
        fake_server,
        "printf 'one\\rtwo\\n\\nthr' >&2",
        "printf 'ee\\n' >&2",
        f"echo LISTENING eloquent://127.0.0.1:1#sha256={PIN}",
        "printf 'four' >&2",
        "read line",
    )
    lines: list[str] = []
    async with asyncio.timeout(DEADLINE_S), local_server(on_progress=lines.append) as url:
        assert url == ServerUrl("127.0.0.1", 1, PIN)
    assert lines == ["one", "two", "three", "four"]
    assert_ended(fake_server)


async def test_progress_that_cannot_be_shown_does_not_stop_the_server(fake_server: Path) -> None:
    def fail(line: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_script(
        fake_server,
        f"{PYTHON} -c 'import sys; sys.stderr.write(10_000 * \"a long line to be shown\\n\")'",
        f"echo LISTENING eloquent://127.0.0.1:1#sha256={PIN}",
        "read line",
    )
    async with asyncio.timeout(DEADLINE_S), local_server(on_progress=fail) as url:
        assert url.port == 1
    assert_ended(fake_server)


async def test_a_server_that_does_not_go_is_terminated(fake_server: Path) -> None:
    write_script(
        fake_server, f"echo LISTENING eloquent://127.0.0.1:1#sha256={PIN}", "exec sleep 600"
    )
    async with asyncio.timeout(DEADLINE_S), local_server():
        pass
    assert_ended(fake_server)


async def test_a_server_that_will_not_be_terminated_is_killed(fake_server: Path) -> None:
    write_script(
        fake_server,
        "trap '' TERM",
        f"echo LISTENING eloquent://127.0.0.1:1#sha256={PIN}",
        "exec sleep 600",
    )
    async with asyncio.timeout(DEADLINE_S), local_server():
        pass
    assert_ended(fake_server)


async def test_giving_up_while_it_loads_ends_it(fake_server: Path) -> None:
    write_script(fake_server, "echo loading >&2", "exec sleep 600")
    loading = asyncio.Event()

    async def start() -> None:
        async with local_server(on_progress=lambda line: loading.set()):
            pytest.fail("it never was ready")

    async with asyncio.timeout(DEADLINE_S):
        starting = asyncio.create_task(start())
        await loading.wait()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    assert_ended(fake_server)


async def test_a_url_that_is_none(fake_server: Path) -> None:
    write_script(fake_server, "echo LISTENING somewhere", "read line")
    with pytest.raises(LocalServerError, match="somewhere"):
        async with asyncio.timeout(DEADLINE_S), local_server():
            pass
    assert_ended(fake_server)


async def test_no_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(LocalServerError, match="Cannot start"):
        async with local_server():
            pass


async def test_it_goes_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import asyncio\n"
        "from eloquent_client import local_server\n"
        "async def main():\n"
        "    async with local_server('echo') as url:\n"
        "        print(url, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, str(script), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        url = parse_url((await parent.stdout.readline()).decode().strip())
        assert not await is_gone(url)
        parent.kill()
        await parent.wait()
    deadline = time.monotonic() + DEADLINE_S
    while not await is_gone(url):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
