"""Turns that were cut off with their server: who goes on with them, and when nobody can."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import pytest

from eloquent.core.events import End, Event, EventDecoder, Failure, TextDelta
from eloquent.core.log import Log
from eloquent.core.wire import Request
from eloquent.errors import ConfigurationError, RequestError
from eloquent_server.backends.base import (
    ANYBODY,
    Asker,
    Backend,
    BackendEvent,
    Continuation,
    Finish,
    StoredAnswer,
)
from eloquent_server.backends.echo import EchoBackend
from eloquent_server.backends.loading import LoadingBackend
from eloquent_server.gateway import Gateway
from eloquent_server.store import TokenStore
from eloquent_server.turns import Turn, TurnHub

BODY = b'{"messages": [{"role": "user", "content": "one two three four"}]}'
DEADLINE_S = 20.0
"Ends a hang; decides nothing."


class Notes:
    """A `Reader` that reads everything at once, as a perfect link would."""

    is_silent = False
    report = None

    def __init__(self, turn_id: bytes, secret: bytes, body: bytes = b"") -> None:
        self.request = Request(turn_id, body, secret)
        self.rejected: str | None = None
        self.events: list[Event] = []
        self._log: Log | None = None
        self._decoder = EventDecoder()
        self._offset = 0
        self._news = asyncio.Event()

    def accept(self, log: Log) -> None:
        self._log = log
        self.log_grew()

    def log_grew(self) -> None:
        assert self._log is not None
        data = self._log.read(self._offset, self._log.length)
        self._offset += len(data)
        self.events += self._decoder.feed(data)
        self._news.set()

    def reject(self, code: str, message: str, retry_after_s: float = 0.0) -> None:
        self.rejected = code
        self._news.set()

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TextDelta))

    @property
    def ends(self) -> list[str]:
        """How it ended: the failure's code, if there is one, and the finish reason."""
        return [
            event.code if isinstance(event, Failure) else event.finish_reason
            for event in self.events
            if isinstance(event, Failure | End)
        ]

    async def until(self, text: str | None = None) -> None:
        """Wait until `text` has come; None: for the end."""
        async with asyncio.timeout(DEADLINE_S):
            while not (
                self.rejected
                or (self.text == text if text else self.events and "stop" in self.ends)
                or "error" in self.ends
            ):
                self._news.clear()
                await self._news.wait()


class Steps:
    """Takes the place of `asyncio.sleep`: lets a word of the echo go for each `go`."""

    def __init__(self, words: int = 0) -> None:
        self._gate = asyncio.Semaphore(words)

    async def __call__(self, seconds: float) -> None:
        await self._gate.acquire()

    def go(self, words: int = 1000) -> None:
        for _ in range(words):
            self._gate.release()


class Forgetful:
    """A backend that cannot go on; it must not be asked."""

    @property
    def models(self) -> Sequence[str]:
        return ("forgetful",)

    async def generate(self, body: bytes, asker: Asker = ANYBODY) -> AsyncGenerator[BackendEvent]:
        pytest.fail("generated twice")
        yield Finish("stop", 0, 0)

    async def close(self) -> None:
        pass


SAID = TextDelta("one"), TextDelta(" two"), TextDelta(" three")


class Numbered(Forgetful):
    """Gives continuations, and says what it gets back."""

    def __init__(self) -> None:
        self.got: StoredAnswer | None = None
        self.forever = asyncio.Event()

    async def generate(self, body: bytes, asker: Asker = ANYBODY) -> AsyncGenerator[BackendEvent]:
        yield Continuation(b"first")
        yield TextDelta("one")
        yield TextDelta(" two")
        yield Continuation(b"second")
        yield TextDelta(" three")
        yield Continuation(b"with nothing to go with, so it is lost")
        await self.forever.wait()

    async def resume(
        self, body: bytes, answer: StoredAnswer, asker: Asker = ANYBODY
    ) -> AsyncGenerator[BackendEvent]:
        self.got = answer
        if answer.text.endswith("four"):
            raise RequestError("interrupted", "no further")
        yield Continuation(b"third")
        yield TextDelta(" four")
        await self.forever.wait()


def hub_of(backend: Backend, path: Path) -> TurnHub:
    gateway = Gateway(backend)
    return TurnHub(gateway.handle, TokenStore.open(path), go_on=gateway.go_on)


async def cut_off(backend: Backend, path: Path, reader: Notes, said: str) -> None:
    """Answer until `said` was stored and read; then nothing is written any more."""
    gateway, store = Gateway(backend), TokenStore.open(path)
    tasks: list[asyncio.Task[None] | None] = []

    async def handle(turn: Turn) -> None:
        tasks.append(asyncio.current_task())
        await gateway.handle(turn)

    hub = TurnHub(handle, store, go_on=handle)
    hub.on_request(reader)
    await reader.until(said)
    await store.close()
    for task in tasks:
        assert task is not None
        task.cancel()
        await asyncio.wait((task,))


async def killed_after(backend: Backend, path: Path, said: str) -> tuple[bytes, bytes]:
    """Ask a turn that is cut off; return its names."""
    names = secrets.token_bytes(16), secrets.token_bytes(16)
    await cut_off(backend, path, Notes(*names, BODY), said)
    return names


async def test_a_reader_that_comes_back_has_the_turn_go_on(tmp_path: Path) -> None:
    path = tmp_path / "turns.sqlite"
    names = await killed_after(EchoBackend(sleep=Steps(2)), path, "one two")
    hub = hub_of(EchoBackend(sleep=Steps(100)), path)
    reader = Notes(*names)
    hub.on_request(reader)
    await reader.until()
    assert (reader.text, reader.ends) == ("one two three four", ["stop"])
    await hub.close()


async def test_turns_go_on_at_the_start_though_nobody_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "turns.sqlite"
    names = await killed_after(EchoBackend(sleep=Steps(2)), path, "one two")
    hub = hub_of(EchoBackend(sleep=Steps(100)), path)
    hub.recover()
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.sleep(0.05)
        while hub.generating:  # noqa: ASYNC110 (nothing wakes it)
            await asyncio.sleep(0.01)
    await hub.close()
    hub = hub_of(Forgetful(), path)
    reader = Notes(*names)
    hub.on_request(reader)
    await reader.until()
    assert (reader.text, reader.ends) == ("one two three four", ["stop"])
    await hub.close()


async def test_it_is_told_all_continuations_and_may_be_cut_off_again(tmp_path: Path) -> None:
    path = tmp_path / "turns.sqlite"
    names = await killed_after(Numbered(), path, "one two three")
    second = Numbered()
    await cut_off(second, path, Notes(*names), "one two three four")
    assert second.got == StoredAnswer(SAID, (b"first", b"second"))
    third = Numbered()
    hub = hub_of(third, path)
    reader = Notes(*names)
    hub.on_request(reader)
    await reader.until()
    assert third.got == StoredAnswer((*SAID, TextDelta(" four")), (b"first", b"second", b"third"))
    assert reader.ends == ["interrupted", "error"]
    await hub.close()


async def test_a_backend_that_cannot_go_on_leaves_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "turns.sqlite"
    names = await killed_after(EchoBackend(sleep=Steps(2)), path, "one two")
    hub = hub_of(Forgetful(), path)
    hub.recover()
    reader = Notes(*names)
    hub.on_request(reader)
    await reader.until()
    assert (reader.text, reader.ends) == ("one two", ["interrupted", "error"])
    await hub.close()


async def test_requests_wait_for_a_backend_that_is_loading(tmp_path: Path) -> None:
    path = tmp_path / "turns.sqlite"
    names = await killed_after(EchoBackend(sleep=Steps(2)), path, "one two")
    starting: asyncio.Future[Backend] = asyncio.get_running_loop().create_future()
    backend = LoadingBackend(starting)
    hub = hub_of(backend, path)
    old, new = Notes(*names), Notes(bytes(16), bytes(16), BODY)
    hub.on_request(old)
    hub.on_request(new)
    await old.until("one two")  # What is stored needs no model.
    starting.set_result(EchoBackend(sleep=Steps(100)))
    await old.until()
    await new.until()
    assert old.text == new.text == "one two three four"
    assert backend.models == ("echo",)
    await hub.close()
    await backend.close()


@pytest.mark.parametrize("fails", [True, False], ids=["fails", "is given up"])
async def test_a_start_that_fails_leaves_turns_for_the_next_one(
    tmp_path: Path, fails: bool
) -> None:
    path = tmp_path / "turns.sqlite"
    names = await killed_after(EchoBackend(sleep=Steps(2)), path, "one two")
    starting: asyncio.Future[Backend] = asyncio.get_running_loop().create_future()
    backend = LoadingBackend(starting)
    hub = hub_of(backend, path)
    reader = Notes(*names)
    hub.on_request(reader)
    await reader.until("one two")
    if fails:
        starting.set_exception(ConfigurationError("no such model"))
        with pytest.raises(ConfigurationError):
            await backend.ready()
    await hub.close()
    await backend.close()
    assert backend.models == ()  # Who asks yet is not told of a fault.
    assert (reader.rejected, reader.ends) == ("unavailable", [])
    hub = hub_of(EchoBackend(sleep=Steps(100)), path)
    reader = Notes(*names)
    hub.on_request(reader)
    await reader.until()
    assert (reader.text, reader.ends) == ("one two three four", ["stop"])
    await hub.close()
