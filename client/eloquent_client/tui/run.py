"""Runs the terminal chat: the app, the client, and the server if there is none yet."""

import asyncio
import sys
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
    key: str = "",
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
        client = (
            local_client(model, on_progress=progress.put_nowait, qlog_dir=qlog_dir)
            if url is None
            else Client(url, key=key, qlog_dir=qlog_dir)
        )
        starting = asyncio.create_task(stack.enter_async_context(client))
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
