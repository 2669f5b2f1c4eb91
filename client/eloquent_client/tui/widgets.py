"""The chat's widgets: the conversation, what stands in it, and the input."""

from dataclasses import dataclass
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.events import Key
from textual.message import Message
from textual.widgets import Markdown, Static, TextArea
from textual.widgets.markdown import MarkdownStream

from eloquent_client.printable import printable


class Question(Static):
    """What the user said, as it was typed."""

    DEFAULT_CSS = """
    Question {
        margin: 1 0 1 0; padding: 0 1; border-left: outer $accent; background: $boost;
    }
    """

    def __init__(self, text: str) -> None:
        super().__init__(printable(text), markup=False)


class Notice(Static):
    """A remark of the program's own: an error, a stopped answer."""

    DEFAULT_CSS = """
    Notice { margin: 0 0 1 0; padding: 0 1; color: $text-muted; }
    Notice.-error { color: $text-error; border-left: outer $error; }
    """

    def __init__(self, text: str, *, is_error: bool = False) -> None:
        super().__init__(printable(text), markup=False, classes="-error" if is_error else "")


class Reply(Markdown):
    """An answer; Markdown as it comes."""

    DEFAULT_CSS = """
    Reply { padding: 0 1; margin: 0; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._stream: MarkdownStream | None = None

    async def write(self, text: str) -> None:
        """Add text to the answer."""
        if self._stream is None:
            self._stream = Markdown.get_stream(self)
        await self._stream.write(printable(text))

    async def finish(self, text: str) -> None:
        """Show the answer whole: blocks that were drawn in pieces (code fences) need it."""
        if self._stream is not None:
            await self._stream.stop()
            self._stream = None
        await self.update(printable(text))


class Conversation(VerticalScroll):
    """Questions, answers and notices; stays at its end until the user scrolls up."""

    DEFAULT_CSS = """
    Conversation {
        height: 1fr; padding: 0 1; scrollbar-size-vertical: 1; scrollbar-gutter: stable;
    }
    """

    def on_mount(self) -> None:
        """Stay at the end; see Textual's `Mount`."""
        self.anchor()

    async def add(self, widget: Question | Reply | Notice) -> None:
        """Add something at the end and go there."""
        await self.mount(widget)
        self.anchor()


class Prompt(TextArea):
    """Where the user writes; grows with the text, up to ten lines."""

    DEFAULT_CSS = """
    Prompt { height: auto; min-height: 3; max-height: 10; }
    """

    # Shown in the footer. `on_key` does the work: a binding runs apart from the keys before it,
    # so that a fast typist's line end would come before the line.
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "send", "Send"),
        Binding("shift+enter,ctrl+j", "newline", "New line", key_display="^j"),
    ]

    @dataclass
    class Sent(Message):
        """The user wants this said."""

        text: str

    def __init__(self) -> None:
        super().__init__(placeholder="Write a message", show_line_numbers=False)

    def on_key(self, event: Key) -> None:
        """Send, or begin a new line, before the text area sees the key."""
        if event.key == "enter":
            self.action_send()
        elif event.key in ("shift+enter", "ctrl+j"):
            self.action_newline()
        else:
            return
        event.stop()
        event.prevent_default()

    def action_send(self) -> None:
        """Offer the text; whoever takes it clears the input."""
        if self.text.strip():
            self.post_message(self.Sent(self.text))

    def action_newline(self) -> None:
        """Begin a new line."""
        start, end = self.selection
        self.replace("\n", start, end)
