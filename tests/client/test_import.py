"""What importing the library brings along: neither models nor screens nor servers."""

import json
import subprocess
import sys

import pytest

HEAVY = {
    *("torch", "transformers", "numpy", "safetensors"),
    *("textual", "rich", "cyclopts"),
    *("starlette", "uvicorn", "httpx2", "prometheus_client", "redis"),
    *("websockets", "sqlite3", "eloquent_server", "eloquent_netem"),
}


def modules_after(statement: str) -> set[str]:
    """Return the top-level names of the modules that a new process has then."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in json.loads(result.stdout)}


@pytest.mark.parametrize("package", ["eloquent_client", "eloquent_client.sync"])
def test_nothing_heavy_is_imported(package: str) -> None:
    modules = modules_after(f"import {package}")
    assert "eloquent_client" in modules
    assert not modules & HEAVY
