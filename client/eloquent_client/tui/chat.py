"""The chat screen: sends what the user writes, shows what comes, and how it came."""

import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Footer
from textual.worker import Worker, WorkerCancelled

from eloquent.core.events import End, Event, Failure, TextDelta
from eloquent.core.pacer import PaceMode, Pacer
from eloquent.errors import EloquentError
from eloquent.session.states import LinkState
from eloquent_client.client import Client
from eloquent_client.errors import APIConnectionError, status_error
from eloquent_client.pacing import paced
from eloquent_client.stream import MessageStream
from eloquent_client.tui.status import Status, StatusBar
from eloquent_client.tui.widgets import Conversation, Notice, Prompt, Question, Reply

STATUS_EVERY_S = 0.1


class ChatScreen(Screen[None]):
    """One conversation at a time with the server of `client`.

    `model` None is the server's default; `system` stands before every conversation.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop", id="chat.stop"),
        Binding("ctrl+n", "new", "New conversation", id="chat.new", priority=True),
    ]

    def __init__(
        self,
        client: Client,
        *,
        model: str | None = None,
        system: str | None = None,
        pace: PaceMode = "off",
    ) -> None:
        super().__init__()
        self._client = client
        self._model = model
        self._system = system
        self._pace: PaceMode = pace
        self._messages: list[dict[str, str]] = []
        self._answering: Worker[None] | None = None
        self._stream: MessageStream | None = None
        self._tokens = 0
        self._heard_s = 0.0
        "When something came last, in seconds of the monotonic clock."
        self._is_connecting = False
        self._had_link = False
        "Whether a connection was there or was tried: without one it is lost, not just missing."

    def compose(self) -> ComposeResult:
        """See Textual."""
        yield Conversation()
        yield Prompt()
        yield StatusBar()
        yield Footer()

    def on_mount(self) -> None:
        """Begin; see Textual's `Mount`."""
        self.set_interval(STATUS_EVERY_S, self._show_status)
        self.query_one(Prompt).focus()
        self._connect()

    @on(Prompt.Sent)
    def _on_sent(self, sent: Prompt.Sent) -> None:
        if self._is_answering:
            self.notify("An answer is still coming. Esc stops it.")
            return
        self.query_one(Prompt).clear()
        self._answering = self._answer(sent.text.strip())

    def action_stop(self) -> None:
        """Cancel the running answer; what has come of it stays."""
        if self._answering is not None:
            self._answering.cancel()

    async def action_new(self) -> None:
        """Begin a new conversation."""
        if self._answering is not None and self._is_answering:
            self._answering.cancel()
            with suppress(WorkerCancelled):
                await self._answering.wait()
        self._messages.clear()
        self._stream = None
        await self.query_one(Conversation).remove_children()
        self.query_one(Prompt).focus()

    @property
    def _is_answering(self) -> bool:
        return self._answering is not None and not self._answering.is_finished

    @work
    async def _connect(self) -> None:
        """Connect ahead of the first question, and say at once if that cannot be."""
        self._is_connecting = True
        try:
            await self._client.connect()
        except EloquentError as error:
            await self._show_error(error)
        finally:
            self._is_connecting = False

    @work
    async def _answer(self, question: str) -> None:
        conversation = self.query_one(Conversation)
        reply = Reply()
        await conversation.add(Question(question))
        await conversation.add(reply)
        self._messages.append({"role": "user", "content": question})
        self._tokens = 0
        self._heard_s = time.monotonic()
        stream = self._stream = self._client.stream(self._request_messages(), model=self._model)
        failure: EloquentError | None = None
        is_whole = False
        try:
            self._is_connecting = not self._client.link.is_up
            async with stream:
                self._is_connecting = False
                failure = await self._receive(stream, reply)
            is_whole = failure is None
        except EloquentError as error:
            failure = error
        finally:
            # Also after a cancellation: what has come stays.
            self._is_connecting = False
            await reply.finish(stream.text)
            if not stream.text:
                await reply.remove()
            self._remember(stream.text)
            if failure is not None:
                await self._show_error(failure)
                self._give_back(question, stream.text)
            elif not is_whole:
                await conversation.add(Notice("Stopped."))

    async def _receive(self, stream: MessageStream, reply: Reply) -> EloquentError | None:
        """Show the answer as it comes; return what the server says went wrong with it."""
        failure: EloquentError | None = None
        async for event in paced(self._heard(stream), Pacer(self._pace)):
            if isinstance(event, TextDelta):
                await reply.write(event.text)
            elif isinstance(event, Failure):
                failure = status_error(event.code, event.message)
            elif isinstance(event, End) and failure is None:
                self._tokens = event.completion_tokens
                if event.finish_reason == "length":
                    await self.query_one(Conversation).add(
                        Notice("The answer ends here because it reached its limit of tokens.")
                    )
        return failure

    async def _heard(self, stream: MessageStream) -> AsyncIterator[Event]:
        """Note what comes when it comes; the pacer may show it later, in other pieces."""
        async for event in stream:
            self._heard_s = time.monotonic()
            self._tokens += isinstance(event, TextDelta)
            yield event

    def _request_messages(self) -> list[dict[str, str]]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return system + self._messages

    def _remember(self, text: str) -> None:
        """Keep the answer for the next question, or forget the question that had none."""
        if text:
            self._messages.append({"role": "assistant", "content": text})
        else:
            self._messages.pop()

    def _give_back(self, question: str, answer: str) -> None:
        """Put a question that was not answered back into the input, unless that is in use."""
        prompt = self.query_one(Prompt)
        if not answer and not prompt.text:
            prompt.text = question
            prompt.move_cursor(prompt.document.end)

    async def _show_error(self, error: EloquentError) -> None:
        text = str(error)
        if isinstance(error, APIConnectionError):
            self._had_link = True
            text += " Your next message connects again."
        await self.query_one(Conversation).add(Notice(text, is_error=True))

    def _show_status(self) -> None:
        now = self._client.link
        link = now.state
        if link is LinkState.IDLE and self._is_connecting:
            link = LinkState.CONNECTING
        self._had_link = self._had_link or link is LinkState.UP
        is_running = self._is_answering and self._stream is not None
        self.query_one(StatusBar).show(
            Status(
                link,
                is_answering=self._is_answering,
                had_link=self._had_link,
                rtt_ms=now.rtt_ms,
                stats=self._stream.stats if self._stream is not None else None,
                tokens=self._tokens,
                quiet_s=time.monotonic() - self._heard_s if is_running else 0.0,
            )
        )
