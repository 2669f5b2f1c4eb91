"""Our own ends over the TUN router: the datagram schemes, and a QUIC stream."""

import asyncio
import datetime
import secrets

import msgspec

from eloquent.core.events import TextDelta
from eloquent.core.log import TokenLog
from eloquent.core.schemes import EloquentSender, scheme
from eloquent.core.wire import SECRET_BYTES, TURN_ID_BYTES, Request
from eloquent.quic.certificate import make_certificate
from eloquent.quic.listen import listen
from eloquent.serving import Reader
from eloquent.session.session import Session
from eloquent.url import ServerUrl
from eloquent_netem.lab.tun_ends import MODEL, PORT, REQUEST, End, Hello
from eloquent_netem.namespaces import SERVER_ADDRESS

STREAM = "quic-stream"
"The scheme of a QUIC stream: what peers that take no datagrams get."

CONNECT_WITHIN_S = 60.0
"As patient as TCP."


class _Answering:
    """A `TurnService` that has one answer, for whoever asks."""

    def __init__(self, end: End) -> None:
        self._end = end
        self._log = TokenLog()
        self._readers: dict[Reader, None] = {}
        self.generating: asyncio.Task[None] | None = None

    def on_request(self, reader: Reader) -> None:
        self._readers[reader] = None
        reader.accept(self._log)
        if self.generating is None:
            self.generating = asyncio.create_task(self._end.generate(self._emit))

    def on_cancel(self, reader: Reader) -> None:
        """Leave the answer as it is: a reader that is over another connection has it."""

    def on_gone(self, reader: Reader) -> None:
        self._readers.pop(reader, None)

    def _emit(self, text: str, is_last: bool) -> None:
        if text:
            self._log.append(TextDelta(text))
        if is_last:
            self._log.close("stop", model=MODEL, prompt_tokens=0, completion_tokens=0)
        for reader in self._readers:
            reader.log_grew()


async def serve(end: End) -> None:
    """Answer over QUIC, by the setup's scheme."""
    certificate = make_certificate(SERVER_ADDRESS, datetime.datetime.now(datetime.UTC))
    name = end.setup.scheme
    await listen(
        SERVER_ADDRESS,
        PORT,
        certificate=certificate,
        service=_Answering(end),
        make_sender=EloquentSender if name == STREAM else scheme(name),
        padding=end.setup.padding,
        datagrams=name != STREAM,
    )
    await end.serve_until_stopped(Hello(pin=certificate.pin))


async def ask(end: End) -> None:
    """Connect, ask, and note each piece of the answer."""
    server = await end.until_start()
    session = Session(
        ServerUrl(SERVER_ADDRESS, PORT, server.pin), connect_timeout_s=CONNECT_WITHIN_S
    )
    body = msgspec.json.encode(REQUEST)
    await session.connect()
    request = Request(secrets.token_bytes(TURN_ID_BYTES), body, secrets.token_bytes(SECRET_BYTES))
    async for event in session.open(request):
        if isinstance(event, TextDelta):
            end.note(event.text)
    end.leave()
