"""The backend that the options ask for."""

import importlib.util
import os
import random

from eloquent.errors import ConfigurationError
from eloquent_server import logs, models
from eloquent_server.backends import echo
from eloquent_server.backends.base import Backend
from eloquent_server.backends.echo import EchoBackend
from eloquent_server.backends.local import LocalBackend
from eloquent_server.options import ServerOptions


async def start_backend(options: ServerOptions) -> Backend:
    """Return the backend that the options ask for, when it is fetched, loaded or looked at.

    Raises:
        ConfigurationError: there is no such model, or it cannot be loaded; an engine's URL or key
            is missing or wrong.
    """
    if options.upstream:
        return await _start_upstreams(options)
    model = options.model or models.EMBEDDED_MODEL
    if model == echo.NAME:
        return EchoBackend()
    return await LocalBackend.start(
        model,
        device=options.device,
        precision=options.precision,
        kv=options.kv,
        progress=logs.progress(options.log_format),
    )


async def _start_upstreams(options: ServerOptions) -> Backend:
    if importlib.util.find_spec("httpx2") is None:
        raise ConfigurationError(
            "--upstream needs httpx2, which is not installed: pip install 'eloquent-stream[server]'"
        )
    from eloquent_server.backends.upstream import FIRST_BYTE_S, Patience
    from eloquent_server.backends.upstreams import UpstreamBackend

    key, idle_s = "", options.upstream_timeout
    if options.upstream_key_env is not None:
        key = os.environ.get(options.upstream_key_env, "").strip()
        if not key:
            raise ConfigurationError(
                f"--upstream-key-env names {options.upstream_key_env}, and no such variable is set "
                "in the server's environment. Put the engine's key there."
            )
    backend = UpstreamBackend(
        options.upstream,
        model=options.model or "",
        key=key,
        salt=options.upstream_salt,
        continues=options.upstream_continues,
        patience=Patience(first_byte_s=max(FIRST_BYTE_S, idle_s), idle_s=idle_s),
        rng=random.Random(),  # noqa: S311 (it spreads probes)
    )
    await backend.start()
    return backend
