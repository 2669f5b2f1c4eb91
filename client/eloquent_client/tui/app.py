"""The terminal chat's app: loading first, then the chat."""

import asyncio
from typing import ClassVar

from textual import work
from textual.app import App
from textual.binding import Binding, BindingType

from eloquent.core.pacer import PaceMode
from eloquent.errors import EloquentError
from eloquent_client.client import Client
from eloquent_client.tui.chat import ChatScreen
from eloquent_client.tui.loading import LoadingScreen


class ChatApp(App[None]):
    """Shows the server's progress until `starting` gives a client, then the chat.

    If `starting` fails the app ends; whoever runs it finds the error in `starting`.
    """

    TITLE = "Eloquent"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+q", "quit", "Quit", id="chat.quit", priority=True),
    ]

    def __init__(
        self,
        starting: asyncio.Future[Client],
        progress: asyncio.Queue[str],
        *,
        model: str | None = None,
        system: str | None = None,
        pace: PaceMode = "off",
    ) -> None:
        super().__init__()
        self._starting = starting
        self._progress = progress
        self._model = model
        self._system = system
        self._pace: PaceMode = pace

    def on_mount(self) -> None:
        """Begin; see Textual's `Mount`."""
        self._open_chat()

    @work
    async def _open_chat(self) -> None:
        is_loading = not self._starting.done()
        if is_loading:
            await self.push_screen(LoadingScreen(self._progress))
        try:
            client = await asyncio.shield(self._starting)
        except EloquentError:
            self.exit()
            return
        screen = ChatScreen(client, model=self._model, system=self._system, pace=self._pace)
        await (self.switch_screen(screen) if is_loading else self.push_screen(screen))
