"""The loading screen: what the server says while it fetches and loads its model."""

import asyncio

from textual import work
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.screen import Screen
from textual.widgets import Footer, Label, LoadingIndicator, RichLog

from eloquent_client.printable import printable


class LoadingScreen(Screen[None]):
    """Shows the lines that come through `progress`."""

    DEFAULT_CSS = """
    LoadingScreen { align: center middle; }
    LoadingScreen > Vertical {
        width: 80%; max-width: 100; height: auto;
        border: round $primary; padding: 0 2;
    }
    LoadingScreen Label { width: 100%; text-align: center; margin-top: 1; }
    LoadingScreen LoadingIndicator { height: 3; }
    LoadingScreen RichLog {
        height: auto; max-height: 10; background: $background; color: $text-muted;
        scrollbar-size: 0 0;
    }
    """

    def __init__(self, progress: asyncio.Queue[str]) -> None:
        super().__init__()
        self._progress = progress

    def compose(self) -> ComposeResult:
        """See Textual."""
        with Vertical():
            yield Label("Starting a server on this machine")
            yield LoadingIndicator()
            yield RichLog(wrap=True, markup=False)
        yield Footer()

    def on_mount(self) -> None:
        """Begin to show lines; see Textual's `Mount`."""
        self._show_lines()

    @work
    async def _show_lines(self) -> None:
        log = self.query_one(RichLog)
        while True:
            log.write(printable(await self._progress.get()))
