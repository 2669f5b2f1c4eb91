"""What server and engine process say to each other: whole, in pieces, damaged."""

import asyncio
import socket
import subprocess
import sys
from typing import get_args

import msgspec
import pytest

from eloquent.core.events import ChosenLogprob, Failure, Logprobs, TextDelta, TokenLogprob
from eloquent.errors import ConfigurationError
from eloquent_server.backends.base import Finish
from eloquent_server.engine import ipc
from eloquent_server.engine.client import EngineClient, EngineOptions
from eloquent_server.engine.turn import EngineEvent, Tokens

EVENTS: list[EngineEvent] = [
    Tokens((1, 2, 70_000), cached_tokens=16),
    TextDelta("日本 👋"),
    Logprobs((ChosenLogprob(b"a", -0.5, (TokenLogprob(b"\xf0", -1.5),)),)),
    Failure("engine_error", "why"),
    Finish("stop", 3, 4, cached_tokens=2),
]
SUBMIT = ipc.Submit(
    turn=7,
    request=b"{}",
    seed=2**63 - 1,
    tenant="local",
    weight=1.0,
    prompt=[1, 2],
    cached_tokens=None,
    generated=[3],
    emitted_chars=1,
    emitted_logprobs=0,
)


async def read_back(*pieces: bytes) -> ipc.FromEngine | None:
    reader = asyncio.StreamReader()
    for piece in pieces:
        reader.feed_data(piece)
    reader.feed_eof()
    return await ipc.read(reader)


async def test_every_event_comes_through() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(EngineEvent))
    step = ipc.step_of(list(enumerate(EVENTS)))
    frame = ipc.encode_frame(step)
    read = await read_back(*(frame[i : i + 3] for i in range(0, len(frame), 3)))
    assert isinstance(read, ipc.Step)
    assert [(one.turn, ipc.event_of(one)) for one in read.occurrences] == list(enumerate(EVENTS))
    assert [ipc.is_terminal(event) for event in EVENTS] == [False, False, False, True, True]


def test_what_the_server_says_comes_through_and_its_end_too() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            for message in (SUBMIT, ipc.Cancel(7), ipc.Hint(7, 1.5), ipc.Close()):
                ours.sendall(ipc.encode_frame(message))
                assert ipc.receive(theirs) == message
            ours.sendall(ipc.encode_frame(SUBMIT)[:-1])
        assert ipc.receive(theirs) is None


@pytest.mark.parametrize("cut", [0, 2, 4, 9])
async def test_a_process_that_ends_in_mid_message(cut: int) -> None:
    assert await read_back(ipc.encode_frame(ipc.Rejected(1, "code", "text"))[:cut]) is None


async def test_bytes_that_are_no_message() -> None:
    with pytest.raises(msgspec.DecodeError):
        await read_back(b"\0\0\0\1\xc1")


def test_a_message_that_is_too_large_is_not_sent() -> None:
    with pytest.raises(ValueError, match="at most"):
        ipc.encode_frame(ipc.LoadFailed("x" * (ipc.MAX_FRAME_BYTES + 1)))


async def test_an_engine_of_another_release() -> None:
    script = "import socket, sys; socket.socket(fileno=int(sys.argv[1])).send(b'\\0\\0\\0\\1\\xc1')"
    with pytest.raises(ConfigurationError, match="another release"):
        await EngineClient.start(EngineOptions("any"), command=(sys.executable, "-c", script))


async def test_an_engine_that_cannot_be_started() -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        await EngineClient.start(EngineOptions("any"), command=("/nonexistent/python",))


def test_the_server_s_process_has_no_torch() -> None:
    script = (
        "import sys, eloquent_server.serve\n"
        "print([name for name in ('torch', 'transformers', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"
