"""Programs that some tests need, and that not every machine has."""

import os
import shutil

import pytest


def needs_tool(name: str) -> pytest.MarkDecorator:
    """Mark a test that needs the program `name`: skipped by that name where it is absent.

    With `CI=true` it is not skipped but fails: there the program must be installed.
    """
    is_missing = shutil.which(name) is None and os.environ.get("CI") != "true"
    return pytest.mark.skipif(is_missing, reason=f"needs {name}, which is not installed")
