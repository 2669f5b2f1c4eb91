"""Runs the terminal chat: the app, the client, and the server if there is none yet."""

import asyncio
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from eloquent.core.pacer import PaceMode
from eloquent.url import ServerUrl
from eloquent_client.client import Client
from eloquent_client.local import local_client
from eloquent_client.tui.app import ChatApp


async def run_chat(
    url: ServerUrl | None,
    *,
    model: str | None,
    system: str | None,
    pace: PaceMode = "off",
    qlog_dir: Path | None = None,
) -> None:
    """Chat until the user quits; without `url` with a server of one's own that runs `model`.

    Raises:
        LocalServerError: the server of one's own did not come up.
    """
    progress: asyncio.Queue[str] = asyncio.Queue()
    async with AsyncExitStack() as stack:
        starting = asyncio.create_task(_start(stack, url, model, progress.put_nowait, qlog_dir))
        asked_model = None if url is None else model
        app = ChatApp(starting, progress, model=asked_model, system=system, pace=pace)
        try:
            await app.run_async()
        finally:
            starting.cancel()
            await asyncio.wait((starting,))
    if not starting.cancelled():
        starting.result()
    if app.return_code:
        sys.exit(app.return_code)


async def _start(
    stack: AsyncExitStack,
    url: ServerUrl | None,
    model: str | None,
    on_progress: Callable[[str], None],
    qlog_dir: Path | None,
) -> Client:
    if url is None:
        own = local_client(model, on_progress=on_progress, qlog_dir=qlog_dir)
        return await stack.enter_async_context(own)
    return await stack.enter_async_context(Client(url, qlog_dir=qlog_dir))
