"""The embedded model, from the user's real cache: fetched by the first run that needs it."""

import pytest

from eloquent_server import models


@pytest.fixture(scope="session")
def embedded_model() -> models.ModelSource:
    """The embedded model; the first time ever this takes about 40 seconds."""
    return models.fetch()
