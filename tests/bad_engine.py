"""A real HTTP server on loopback that misbehaves on purpose, as no real engine can be made to."""

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

HOST = "127.0.0.1"


@dataclass
class Asked:
    """One request, and the connection to answer it on."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    out: asyncio.StreamWriter
    number: int = 1
    "Which one it is of its connection."
    is_gone: asyncio.Event = field(default_factory=asyncio.Event)
    "Set when the client has closed the connection."

    @property
    def json(self) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(self.body)
        return fields

    def reply(self, status: int, body: str = "", **headers: str) -> None:
        """Answer at once."""
        head = f"HTTP/1.1 {status} x\r\nContent-Length: {len(body.encode())}\r\n"
        head += "".join(f"{name.replace('_', '-')}: {text}\r\n" for name, text in headers.items())
        self.out.write(f"{head}\r\n{body if self.method != 'HEAD' else ''}".encode())

    def begin(self) -> None:
        """Begin a stream."""
        self.out.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
            b"\r\n"
        )

    def piece(self, data: bytes) -> None:
        """Send some bytes of the stream."""
        self.out.write(b"%x\r\n%s\r\n" % (len(data), data))

    def say(self, text: str) -> None:
        """Send a piece of text."""
        choice = {"index": 0, "delta": {"content": text}}
        self.piece(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")

    def finish(self, reason: str = "stop") -> None:
        """Say that the answer is over."""
        choice = {"index": 0, "delta": {}, "finish_reason": reason}
        self.piece(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")

    def end(self) -> None:
        """End the stream as is due."""
        self.piece(b"data: [DONE]\n\n")
        self.out.write(b"0\r\n\r\n")

    def hang_up(self) -> None:
        """Let the connection break."""
        self.out.transport.abort()


Handler = Callable[[Asked], Awaitable[None]]


async def say_hello(asked: Asked) -> None:
    """Answer as an engine should."""
    asked.begin()
    asked.say("Hel")
    asked.say("lo")
    asked.finish()
    asked.end()


class BadEngine:
    """Has `handler` answer the chats; answers `/health` and `/v1/models` itself."""

    def __init__(self, handler: Handler = say_hello, *models: str, port: int = 0) -> None:
        self._handler = handler
        self.models: tuple[int, str] = (
            200,
            json.dumps({"data": [{"id": name} for name in models]}),
        )
        "Status and body."
        self.health = 200
        self.chats: list[Asked] = []
        self.was_asked = asyncio.Event()
        self.others: list[Asked] = []
        self.connections = 0
        self.port = port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, HOST, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                for number in itertools.count(1):
                    await self._answer(await _read(reader, writer, number), reader)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, asked: Asked, reader: asyncio.StreamReader) -> None:
        if asked.path == "/health":
            self.others.append(asked)
            asked.reply(self.health)
        elif asked.path == "/v1/models":
            self.others.append(asked)
            asked.reply(*self.models)
        else:
            self.chats.append(asked)
            self.was_asked.set()
            watching = asyncio.ensure_future(_watch(reader, asked))
            try:
                await self._handler(asked)
                await asked.out.drain()
            finally:
                watching.cancel()
                await asyncio.wait((watching,))


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> Asked:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Asked(method, path, headers, body, writer, number)


async def _watch(reader: asyncio.StreamReader, asked: Asked) -> None:
    """Notice the client's end; it says nothing more before it has its answer."""
    with suppress(ConnectionError):
        await reader.read(1)
    asked.is_gone.set()
