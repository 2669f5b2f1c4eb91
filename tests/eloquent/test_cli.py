"""The command as a whole; each subcommand has tests of its own."""

import subprocess
import sys

import pytest

INTERRUPTED_AT = """
import sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupting())
from eloquent.cli import main
sys.argv = ["eloquent", "ask", "Hi", "--url", "eloquent://127.0.0.1:1"]
main()
"""


@pytest.mark.parametrize("name", ["cyclopts", "eloquent_client.commands", "asyncio"])
def test_ctrl_c_while_the_command_is_still_being_loaded_is_quiet(name: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_AT.format(name=name)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")
