"""An HTTP front on loopback, with a real hub and store behind it and a backend to choose."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2

from eloquent.core.events import Delta, TextDelta
from eloquent.errors import RequestError
from eloquent.quic.certificate import ServerCertificate
from eloquent_server.admission import Gate
from eloquent_server.backends.base import ANYBODY, Asker, Backend, BackendEvent, Finish
from eloquent_server.gateway import Gateway
from eloquent_server.http.app import Behind
from eloquent_server.http.connections import Connections
from eloquent_server.http.listen import HttpListener, listen
from eloquent_server.store import TokenStore
from eloquent_server.turns import TurnHub

CHAT: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "to be"}]}
DEADLINE_S = 20.0
"Ends a hang; decides nothing."


@dataclass
class Scripted:
    """A backend that says its events, each when it is let go on; it counts what became of turns."""

    events: Sequence[Delta | RequestError] = (TextDelta("to "), TextDelta("be"))
    finish: Finish = field(default_factory=lambda: Finish("stop", 7, 2, 3))
    free: int = 1000
    "So many steps are let go from the start."
    models: Sequence[str] = ("scripted", "other")
    asked: int = 0
    cancelled: int = 0
    bodies: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate = asyncio.Semaphore(self.free)
        self.over = asyncio.Event()

    async def generate(self, body: bytes, asker: Asker = ANYBODY) -> AsyncIterator[BackendEvent]:
        self.asked += 1
        self.bodies.append(body)
        is_whole = False
        try:
            for event in self.events:
                await self.gate.acquire()
                if isinstance(event, RequestError):
                    raise event
                yield event
            await self.gate.acquire()
            is_whole = True
            yield self.finish
        finally:
            self.cancelled += not is_whole
            self.over.set()

    def go(self, steps: int = 1000) -> None:
        for _ in range(steps):
            self.gate.release()

    async def close(self) -> None:
        pass


@dataclass
class Front:
    """A front that answers, and a client for it."""

    hub: TurnHub
    listener: HttpListener
    http: httpx2.AsyncClient
    store: TokenStore

    @property
    def port(self) -> int:
        return self.listener.port

    @property
    def url(self) -> str:
        return str(self.http.base_url).rstrip("/")

    def post(self, **changes: Any) -> Any:
        """Return a context in which an answer's response streams."""
        headers = changes.pop("headers", {})
        return self.http.stream(
            "POST", "/v1/chat/completions", json={**CHAT, **changes}, headers=headers
        )

    def events(self, turn: str, secret: str, **headers: str) -> Any:
        """Return a context in which a turn's stream goes on."""
        given = {"X-Eloquent-Secret": secret, **headers}
        return self.http.stream("GET", f"/v1/turns/{turn}/events", headers=given)


async def ready() -> str:
    return ""


@asynccontextmanager
async def front_with(
    backend: Backend,
    *,
    gate: Gate | None = None,
    certificate: ServerCertificate | None = None,
    names: Sequence[str] = (),
    connections: Connections | None = None,
    grace_s: float = 60.0,
    **behind: Any,
) -> AsyncIterator[Front]:
    gate = gate or Gate()
    store = TokenStore.open(None)
    hub = TurnHub(Gateway(backend).handle, store, admission=gate, grace_s=grace_s)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        behind = {"why_not_ready": ready, **behind}
        given = Behind(hub=hub, admission=gate, models=lambda: backend.models, **behind)
        listener = await listen(
            "127.0.0.1", 0, given, certificate=certificate, names=names, connections=connections
        )
        stack.push_async_callback(listener.close)
        stack.push_async_callback(hub.close)
        scheme = "http" if certificate is None else "https"
        http = await stack.enter_async_context(
            httpx2.AsyncClient(
                base_url=f"{scheme}://127.0.0.1:{listener.port}", timeout=DEADLINE_S, verify=False
            )
        )
        yield Front(hub, listener, http, store)


async def until_true(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0.005)


@dataclass
class Sent:
    """What came as server-sent events."""

    ids: list[str] = field(default_factory=list)
    "Of each event; empty: it had none."
    data: list[Any] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(
            choice["delta"].get("content") or ""
            for each in self.data
            if isinstance(each, dict)
            for choice in each.get("choices", ())
        )

    @property
    def is_done(self) -> bool:
        return bool(self.data) and self.data[-1] == "[DONE]"

    @property
    def errors(self) -> list[Any]:
        return [each["error"]["code"] for each in self.data if "error" in each]

    def take(self, line: str) -> None:
        name, _, value = line.partition(": ")
        if name == "id":
            self.ids.append(value)
        elif name == "data":
            self.ids += [""] * (len(self.data) + 1 - len(self.ids))
            self.data.append(value if value == "[DONE]" else json.loads(value))
        elif not name:
            self.comments.append(value)
        else:
            assert not line, line


async def read_sent(
    lines: httpx2.Response | AsyncIterator[str], *, until: str | None = None
) -> Sent:
    """Read a stream to its end, or until the text of its chunks is `until`."""
    sent = Sent()
    if isinstance(lines, httpx2.Response):
        lines = lines.aiter_lines()
    async for line in lines:
        sent.take(line)
        if until is not None and sent.text == until and not line:
            break
    return sent
