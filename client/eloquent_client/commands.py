"""The subcommands `eloquent ask` and `eloquent chat`."""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.util import find_spec
from json import dumps
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from eloquent.core.pacer import PaceMode, Pacer
from eloquent.errors import ConfigurationError, EloquentError
from eloquent.url import ServerUrl, parse_url
from eloquent_client.client import Client
from eloquent_client.errors import APIConnectionError, APITimeoutError, LocalServerError
from eloquent_client.local import local_client
from eloquent_client.pacing import paced_text
from eloquent_client.printable import printable
from eloquent_client.saved import save_ticket, take_saved_ticket
from eloquent_client.stream import MessageStream

KEY_ENV = "ELOQUENT_KEY"
"Where a key is looked for. On a command line others could read it."

EXIT_BROKEN_PIPE = 141
"As a shell reports a program that SIGPIPE ended."


def ask(
    prompt: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    *,
    url: str | None = None,
    model: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    json: bool = False,
    pace: PaceMode = "off",
    key_env: str = KEY_ENV,
    qlog: Annotated[Path | None, Parameter(env_var="ELOQUENT_QLOG")] = None,
) -> None:
    """Ask one question and print the answer as it comes.

    Args:
        prompt: The question. With `-`, or without a prompt when something is piped in, it is read
            from standard input.
        url: The server, as `eloquent serve` prints it. Without it a server is started on this
            machine for this one question.
        model: The model to ask. Without a URL: the model to start (see `eloquent serve --help`).
        system: Instructions that stand before the question.
        max_tokens: End the answer after this many tokens.
        temperature: 0 always takes the likeliest token; up to 2 is more varied.
        seed: The same seed and question give the same answer on the same machine.
        json: Print one JSON object once the answer is complete: the text and how it arrived.
            `turn` is its name for `eloquent resume`; times are in milliseconds; `duplicates` and
            `missing` are bytes of the answer.
        pace: How text appears: `off`, as it comes; `smooth`, evenly; `reading`, no faster than one
            reads. Nothing is held for more than half a second.
        key_env: The environment variable that has the key, where the server wants one.
        qlog: Directory for a log of the connection in qlog's format (`.sqlog`): packets, sizes,
            times, and no text.
    """
    # What goes wrong is raised; without a handler Python would print QUIC's log beside it.
    logging.getLogger().addHandler(logging.NullHandler())
    server_url = None if url is None else parse_url(url)
    client: AbstractAsyncContextManager[Client]
    messages = [{"role": "user", "content": _read_prompt(prompt)}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    body = {
        "messages": messages,
        "model": model if server_url is not None else None,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    try:
        if server_url is None:
            client = local_client(model, on_progress=_print_progress, qlog_dir=qlog)
        else:
            client = Client(server_url, key=_key(key_env), qlog_dir=qlog)
        _run(_ask(server_url, client, body, as_json=json, pace=pace, key_env=key_env))
    except BrokenPipeError:
        # Whoever read our output is gone; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)


def resume(
    name: str, *, url: str, offset: int | None = None, watch: bool = False, key_env: str = KEY_ENV
) -> None:
    """Go on with an answer that was asked before, here or elsewhere, and print the rest of it.

    Args:
        name: The turn's name as `eloquent ask` gave it when its connection failed, or with
            `--json`: its id and its secret, with a colon between. Or a program's token of it
            (`stream.token`), which has the offset too.
        url: The server that was asked.
        offset: Where to go on, as `eloquent ask` gave it; 0 is the whole answer, as is a name
            without one.
        watch: Only look on: ending this command does not stop the answer.
        key_env: The environment variable that has the key, where the server wants one.
    """
    logging.getLogger().addHandler(logging.NullHandler())
    _run(_resume(parse_url(url), name, offset, is_owner=not watch, key_env=key_env))


def chat(
    *,
    url: str | None = None,
    model: str | None = None,
    system: str | None = None,
    pace: PaceMode = "off",
    key_env: str = KEY_ENV,
    qlog: Annotated[Path | None, Parameter(env_var="ELOQUENT_QLOG")] = None,
) -> None:
    """Chat in the terminal.

    Args:
        url: The server, as `eloquent serve` prints it. Without it a server is started on this
            machine for as long as the chat runs.
        model: The model to ask. Without a URL: the model to start (see `eloquent serve --help`).
        system: Instructions that stand before every conversation.
        pace: How text appears: `off`, as it comes; `smooth`, evenly; `reading`, no faster than one
            reads. Nothing is held for more than half a second.
        key_env: The environment variable that has the key, where the server wants one.
        qlog: Directory for a log of each connection in qlog's format (`.sqlog`): packets, sizes,
            times, and no text.
    """
    if find_spec("textual") is None:
        raise ConfigurationError(
            "The terminal chat needs Textual, which is not installed: run "
            "pip install 'eloquent-stream[chat]'. `eloquent ask` works without it."
        )
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigurationError(
            "There is no terminal to chat in: standard input or standard error is redirected. For "
            "pipes and scripts there is `eloquent ask`."
        )
    from eloquent_client.tui.run import run_chat

    server_url = None if url is None else parse_url(url)
    key = "" if server_url is None else _key(key_env)
    asyncio.run(run_chat(server_url, key=key, model=model, system=system, pace=pace, qlog_dir=qlog))


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run a command; what a server says of an error must not steer the terminal, either."""
    try:
        asyncio.run(work)
    except EloquentError as error:
        raise EloquentError(printable(str(error))) from error


def _key(name: str) -> str:
    """Return the key in this environment variable; the usual one need not be there."""
    key = os.environ.get(name, "").strip()
    if not key and name != KEY_ENV:
        raise ConfigurationError(
            f"There is no key in the environment variable {name}: put one there, or leave "
            "--key-env out."
        )
    return key


def _read_prompt(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise ConfigurationError(
            'There is no question: write eloquent ask "QUESTION", or pipe one in.'
        )
    if prompt is not None and prompt.startswith("--") and " " not in prompt:
        # Since `-` must be taken as a question, so is what looks like an option and is none.
        raise ConfigurationError(
            f"There is no option {prompt}: see `eloquent ask --help`. To ask just that, pipe it in."
        )
    try:
        if prompt is None or prompt == "-":
            prompt = sys.stdin.read()
        prompt.encode()  # Some locales let any bytes through, as lone surrogates.
    except UnicodeError as error:
        raise ConfigurationError(
            f"The question is no text ({error}): give it in {sys.stdin.encoding}."
        ) from error
    if not prompt.strip():
        raise ConfigurationError("The question is empty: write one, or pipe one in.")
    return prompt


async def _ask(
    url: ServerUrl | None,
    client: AbstractAsyncContextManager[Client],
    body: dict[str, Any],
    *,
    as_json: bool,
    pace: PaceMode = "off",
    key_env: str = KEY_ENV,
) -> None:
    try:
        async with client as connected, connected.stream(**body) as stream:
            try:
                if as_json:
                    await _print_json(stream)
                    if url is not None:
                        _save_ticket(connected)  # the answer's name was given: others may read it
                else:
                    await _print_text(stream, pace)
            except APIConnectionError as error:
                if url is None or isinstance(error, APITimeoutError):
                    raise  # what takes too long is cancelled: nothing goes on
                _save_ticket(connected)
                how = _how_to_resume(stream, url, key_env)
                raise APIConnectionError(f"{error} {how}") from error
    except LocalServerError as error:
        # What the server said has been printed as it said it.
        raise LocalServerError(error.message) from error


def _how_to_resume(
    stream: MessageStream, url: ServerUrl, key_env: str, *, is_owner: bool = True
) -> str:
    options = "" if is_owner else " --watch"
    options += "" if key_env == KEY_ENV else f" --key-env {key_env}"
    return (
        f"To go on later: eloquent resume {stream.turn_id}:{stream.secret} "
        f"--offset {stream.offset} --url '{url}'{options}"
    )


async def _resume(
    url: ServerUrl, name: str, offset: int | None, *, is_owner: bool, key_env: str = KEY_ENV
) -> None:
    async with resuming(url, _key(key_env)) as client:
        stream = client.resume(name, offset=offset, is_owner=is_owner)
        async with stream:
            try:
                await _print_text(stream)
            except APIConnectionError as error:
                if is_owner and isinstance(error, APITimeoutError):
                    raise
                how = _how_to_resume(stream, url, key_env, is_owner=is_owner)
                raise APIConnectionError(f"{error} {how}") from error


@asynccontextmanager
async def resuming(url: ServerUrl, key: str = "") -> AsyncIterator[Client]:
    """Give a client of a server with the ticket that a command before left; leave the next."""
    async with Client(url, key=key, ticket=take_saved_ticket(url)) as client:
        try:
            yield client
        finally:
            _save_ticket(client)


def _save_ticket(client: Client) -> None:
    ticket = client.take_ticket()
    if ticket is not None:
        save_ticket(client.url, ticket)


async def _print_text(stream: MessageStream, pace: PaceMode = "off") -> None:
    is_terminal = sys.stdout.isatty()
    last = ""
    try:
        async for text in paced_text(stream, Pacer(pace)):
            last = printable(text) if is_terminal else text
            sys.stdout.write(last)
            sys.stdout.flush()
    finally:
        if last and not last.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()


async def _print_json(stream: MessageStream) -> None:
    message = await stream.get_final_message()
    stats = stream.stats
    answer = {
        "turn": f"{stream.turn_id}:{stream.secret}",
        "text": message.text,
        "finish_reason": message.finish_reason,
        "model": message.model,
        "tokens": message.usage.completion_tokens,
        "prompt_tokens": message.usage.prompt_tokens,
        "cached_tokens": message.usage.prompt_tokens_details.cached_tokens,
        "ttft_ms": _rounded(stats.ttft_ms),
        "duration_ms": _rounded(stats.duration_ms),
        "rtt_ms": _rounded(stats.rtt_ms),
        "datagrams": stats.datagrams,
        "loss_recovered": stats.loss_recovered,
        "duplicates": stats.duplicates,
        "missing": stats.missing,
    }
    sys.stdout.write(dumps(answer, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _rounded(time_ms: float | None) -> float | None:
    return None if time_ms is None else round(time_ms, 3)


def _print_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201
