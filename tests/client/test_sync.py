"""The client without an event loop, against a real server on a loop in another thread."""

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import get_type_hints

import pytest
from loopback import DEADLINE_S, Hanging, Server, saying

from eloquent.core.events import End, TextDelta
from eloquent.quic.certificate import ServerCertificate
from eloquent_client import (
    APIConnectionError,
    APIError,
    BadRequestError,
    Client,
    ClientClosedError,
    LinkState,
    SyncClient,
    SyncMessageStream,
)
from eloquent_client.sync import ClientOptions, LoopThread
from eloquent_server.turns import Turn, TurnHandler

HELLO = [{"role": "user", "content": "Hello"}]


@contextmanager
def serving(handler: TurnHandler, certificate: ServerCertificate) -> Iterator[Server]:
    """Run a server; its loop is in a thread of its own, since tests block theirs."""
    server = Server(handler, certificate)
    loop = LoopThread()
    loop.run(server.open)
    try:
        yield server
    finally:
        loop.run(server.close)
        loop.close()


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name == "eloquent-client"]


def wait_for(event: asyncio.Event) -> None:
    """Wait for what happens on the server's loop."""
    deadline = threading.Event()
    for _ in range(int(DEADLINE_S * 100)):
        if event.is_set():
            return
        deadline.wait(0.01)
    raise TimeoutError


def test_text_events_and_message(certificate: ServerCertificate) -> None:
    with (
        serving(saying("Hello ", "there"), certificate) as server,
        SyncClient(server.url) as client,
    ):
        with client.stream(HELLO) as stream:
            assert list(stream.text_stream) == ["Hello ", "there"]
            events = list(stream)
            assert events[:2] == [TextDelta("Hello "), TextDelta("there")]
            assert isinstance(events[2], End)
            message = stream.get_final_message()
        assert client.link.state is LinkState.UP
    assert message.text == stream.text == "Hello there"
    assert stream.usage == message.usage
    assert stream.is_over
    assert stream.stats.missing == 0
    assert client.link.state is LinkState.CLOSED


def test_leaving_the_block_cancels(certificate: ServerCertificate) -> None:
    hanging = Hanging()
    with serving(hanging, certificate) as server, SyncClient(server.url) as client:
        with client.stream(HELLO) as stream:
            assert next(stream.text_stream) == "And then"
        wait_for(hanging.cancelled)
        assert stream.is_over


def test_an_answer_that_is_detached_is_read_by_another_client(
    certificate: ServerCertificate,
) -> None:
    go_on = threading.Event()

    async def handle(turn: Turn) -> None:
        turn.append(TextDelta("one "))
        while not go_on.is_set():  # noqa: ASYNC110  (another thread says so)
            await asyncio.sleep(0.01)
        turn.append(TextDelta("two"))
        turn.close("stop", model="told", prompt_tokens=1, completion_tokens=2)

    with serving(handle, certificate) as server:
        with SyncClient(server.url) as client, client.stream(HELLO) as stream:
            assert next(stream.text_stream) == "one "
            stream.detach()
        go_on.set()
        with SyncClient(server.url) as other, other.resume(stream.token) as rest:
            assert rest.get_final_message().text == "two"


def test_errors_are_the_asynchronous_clients(certificate: ServerCertificate) -> None:
    with serving(saying("never"), certificate) as server:
        url = server.url
        with SyncClient(url) as client, pytest.raises(BadRequestError):
            client.stream([{"role": "user", "content": object()}])
    with SyncClient(url, max_retries=0) as client:
        with pytest.raises(APIConnectionError, match="Nothing listens"):
            client.connect()
        with pytest.raises(APIConnectionError), client.stream(HELLO):
            pass


def test_several_threads_at_once(certificate: ServerCertificate) -> None:
    words = [f"word{number} " for number in range(200)]

    def ask(client: SyncClient) -> str:
        with client.stream(HELLO) as stream:
            return "".join(stream.text_stream)

    with (
        serving(saying(*words), certificate) as server,
        SyncClient(server.url) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        answers = list(pool.map(ask, [client] * 24))
    assert answers == ["".join(words)] * 24


def test_closing_ends_a_reader_in_another_thread(certificate: ServerCertificate) -> None:
    hanging = Hanging()
    with serving(hanging, certificate) as server, ThreadPoolExecutor(1) as pool:
        client = SyncClient(server.url)
        with client.stream(HELLO) as stream:
            assert next(stream.text_stream) == "And then"
            reading = pool.submit(stream.get_final_message)
            client.close()
            with pytest.raises(APIError):
                reading.result(DEADLINE_S)
            with pytest.raises(ClientClosedError):
                stream.get_final_message()
            with pytest.raises(ClientClosedError):
                client.connect()
            client.close()


def test_what_is_known_of_an_answer_is_told_while_another_thread_closes(
    certificate: ServerCertificate,
) -> None:
    def look(client: SyncClient, stream: SyncMessageStream) -> None:
        while client.link.state is not LinkState.CLOSED:
            assert stream.text == "And then"
            assert stream.stats.missing == 0

    with serving(Hanging(), certificate) as server, ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            client = SyncClient(server.url)
            with client.stream(HELLO) as stream:
                assert next(stream.text_stream) == "And then"
                looking = [pool.submit(look, client, stream) for _ in range(4)]
                client.close()
                for each in looking:
                    each.result(DEADLINE_S)


def test_a_callback_that_uses_the_client_is_told(certificate: ServerCertificate) -> None:
    said: list[str] = []

    def on_link_state(state: LinkState) -> None:
        if state is LinkState.UP:
            with pytest.raises(RuntimeError, match="callback") as error:
                client.connect()
            said.append(str(error.value))

    with serving(saying("yes"), certificate) as server:
        client = SyncClient(server.url, on_link_state=on_link_state)
        with client:
            client.connect()
    assert len(said) == 1


def test_changes_of_the_link_end_with_the_client(certificate: ServerCertificate) -> None:
    seen: list[LinkState] = []
    is_up = threading.Event()

    def watch(client: SyncClient) -> None:
        for link in client.link_changes():
            seen.append(link.state)
            if link.is_up:
                is_up.set()

    with serving(saying("yes"), certificate) as server, ThreadPoolExecutor(1) as pool:
        with SyncClient(server.url) as client:
            watching = pool.submit(watch, client)
            client.connect()
            assert is_up.wait(DEADLINE_S)
        watching.result(DEADLINE_S)
    assert seen[0] in {LinkState.IDLE, LinkState.CONNECTING, LinkState.UP}
    assert seen[-1] is LinkState.CLOSED


PROGRAM = """
import sys
from eloquent_client import SyncClient

with SyncClient(sys.argv[1]) as client:
    with client.stream([{"role": "user", "content": "Hello"}]) as stream:
        for text in stream.text_stream:
            print(text, flush=True)
"""


def test_ctrl_c_in_the_caller_cancels_and_ends_the_program(
    certificate: ServerCertificate,
) -> None:
    hanging = Hanging()
    with serving(hanging, certificate) as server:
        command = [sys.executable, "-c", PROGRAM, str(server.url)]
        program = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == b"And then\n"
            os.kill(program.pid, signal.SIGINT)
            _, errors = program.communicate(timeout=DEADLINE_S)
        finally:
            program.kill()
            program.wait()
        assert program.returncode == -signal.SIGINT
        assert errors.splitlines()[-1] == b"KeyboardInterrupt"
        wait_for(hanging.cancelled)


LEFT_OPEN = """
import sys
from eloquent_client import SyncClient

def texts(client):
    with client.stream([{"role": "user", "content": "Hello"}]) as stream:
        yield from stream.text_stream

client = SyncClient(sys.argv[1])
left = texts(client)
print(next(left))
"""

LEFT_OPEN_BY_OPENAI = """
import sys
import httpx2, openai
from eloquent_client.httpx_transport import SyncEloquentTransport

http = httpx2.Client(transport=SyncEloquentTransport(sys.argv[1]))
left = openai.OpenAI(api_key="any", http_client=http).chat.completions.create(
    model="any", messages=[{"role": "user", "content": "Hello"}], stream=True
)
next(left)
print(next(left).choices[0].delta.content)
"""

FORKED = """
import os, sys
from eloquent_client import ClientClosedError, SyncClient

client = SyncClient(sys.argv[1])
client.connect()
if os.fork() == 0:
    try:
        client.connect()
    except ClientClosedError:
        print("And then", flush=True)
    sys.exit()
os.wait()
with client.stream([{"role": "user", "content": "Hello"}]) as stream:
    assert next(stream.text_stream) == "And then"
"""


@pytest.mark.parametrize(
    "program", [LEFT_OPEN, LEFT_OPEN_BY_OPENAI, FORKED], ids=["own", "openai's", "forked"]
)
def test_a_program_that_closes_nothing_ends(certificate: ServerCertificate, program: str) -> None:
    hanging = Hanging()
    with serving(hanging, certificate) as server:
        command = [sys.executable, "-W", "ignore", "-c", program, str(server.url)]
        ended = subprocess.run(command, capture_output=True, timeout=DEADLINE_S, check=False)
        assert (ended.returncode, ended.stdout) == (0, b"And then\n")
        wait_for(hanging.cancelled)


def test_an_interrupted_wait_cancels_its_work() -> None:
    cancelled = threading.Event()
    main = threading.main_thread().ident
    assert main == threading.get_ident()

    async def work() -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(0.05, signal.pthread_kill, main, signal.SIGINT)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    thread = LoopThread()
    try:
        with pytest.raises(KeyboardInterrupt):
            thread.run(work)
        assert cancelled.wait(DEADLINE_S)
    finally:
        thread.close()


def test_the_options_are_the_asynchronous_clients(tmp_path: Path) -> None:
    own = inspect.signature(Client.__init__).parameters
    assert set(get_type_hints(ClientOptions)) == set(own) - {"self", "url"}
    SyncClient("eloquent://127.0.0.1", qlog_dir=tmp_path, key="a key").close()


@pytest.mark.parametrize(
    ("own", "other"), [(SyncClient, Client), (SyncMessageStream, "MessageStream")]
)
def test_nothing_is_offered_that_the_asynchronous_client_has_not(
    own: type[object], other: type[object] | str
) -> None:
    import eloquent_client

    model = getattr(eloquent_client, other) if isinstance(other, str) else other
    names = {name for name in vars(own) if not name.startswith("_")}
    assert names <= set(vars(model))
