"""What `eloquent serve` refuses before it loads anything, and how it is with few files."""

import asyncio
import contextlib
import resource
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from server_process import server_process

DEADLINE_S = 60.0


def test_durable_turns_need_a_place_on_a_disk() -> None:
    command = [sys.executable, "-m", "eloquent", "serve", "--model", "echo", "--durable"]
    done = subprocess.run(
        [*command, "--port", "0"], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "--durable needs --state" in done.stderr


@pytest.mark.parametrize("turns", ["0", "-1"])
def test_a_server_that_could_take_no_turn_does_not_start(turns: str) -> None:
    command = [sys.executable, "-m", "eloquent", "serve", "--model", "echo", "--port", "0"]
    done = subprocess.run(
        [*command, "--max-turns", turns],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 1
    assert "--max-turns is at least 1" in done.stderr


async def test_it_takes_all_the_files_that_it_may_have(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard <= 256:
        pytest.skip("there are few")
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        async with server_process(tmp_path, "--http", "0") as server:
            front = (await server.line()).partition(" ")[2]
            async with httpx2.AsyncClient(base_url=front, timeout=DEADLINE_S) as http:
                metrics = (await http.get("/metrics")).text
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    (line,) = (line for line in metrics.splitlines() if line.startswith("process_max_fds "))
    assert float(line.split()[1]) > 256


def files_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs prlimit(2)")
async def test_without_a_file_for_a_connection_it_says_so_and_does_not_fill_the_log(
    tmp_path: Path,
) -> None:
    async with server_process(tmp_path, "--http", "0") as server:
        port = int((await server.line()).rpartition(":")[2])
        held = files_of(server.pid)
        _, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (held + 3, hard))
        with contextlib.ExitStack() as stack:
            for _ in range(10):
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            await server.says("no file left")
            await asyncio.sleep(1.5)
            assert "ulimit -n" in server.log
            assert server.log.count("no file left") <= 4
            assert "Traceback" not in server.log
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (held + 100, hard))
        async with httpx2.AsyncClient(timeout=DEADLINE_S) as http:
            assert (await http.get(f"http://127.0.0.1:{port}/health")).status_code == 200
