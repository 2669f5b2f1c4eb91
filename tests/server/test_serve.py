"""What `eloquent serve` refuses before it loads anything."""

import subprocess
import sys

DEADLINE_S = 60.0


def test_durable_turns_need_a_place_on_a_disk() -> None:
    command = [sys.executable, "-m", "eloquent", "serve", "--model", "echo", "--durable"]
    done = subprocess.run(
        [*command, "--port", "0"], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "--durable needs --state" in done.stderr
