"""The subcommand `eloquent bench`."""

import json as json_format
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from eloquent.errors import ConfigurationError
from eloquent_server import models as model_store

bench = App(name="bench", help="Measure the server's parts on this machine.")


@bench.command
def engine(
    *,
    model: str = model_store.EMBEDDED_MODEL,
    gguf: Path | None = None,
    engines: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    batches: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (1, 4, 8, 16),
    threads: int | None = None,
    tokens: int = 64,
    runs: int = 3,
    chat: bool = True,
    json: Path | None = None,
) -> None:
    """Measure the engine beside transformers' continuous batching, its server, and llama.cpp.

    Each runs in a process of its own, one after the other, on the same prompts: decoding by batch,
    time to first token for a prompt of 1,024 tokens, cold and warm, the longest gap while such a
    prompt comes in beside decoding turns, a chat of 8 users in 4 rounds, memory. Compare figures of
    one run only, and run it on an idle machine. Takes about ten minutes on two cores.

    Parameters
    ----------
    model
        The embedded model's name, a directory in the Hugging Face layout, or a hub name.
    gguf
        The same model for llama.cpp; for the embedded one it is downloaded if it is not given.
    engines
        Which to run: `eloquent`, `eloquent-serving`, `transformers-cb`, `transformers-serve`,
        `llama.cpp`, with a precision after a colon if only that is wanted (`eloquent:int8`). All
        by default; those whose packages are missing are left out by name (they are in the extra
        `bench`).
    batches
        How many turns decode at the same time.
    threads
        Of each engine; by default all cores. `eloquent-serving` takes one less, as the server does.
    tokens
        Of each answer.
    runs
        Medians are of so many.
    chat
        Measure the chat, too.
    json
        Also write the report to this file.
    """
    from eloquent_server.bench.run import ENGINES, Job, run_all, table

    wanted = [
        each for each in ENGINES if not engines or each[0] in engines or ":".join(each) in engines
    ]
    known = {name for each in ENGINES for name in (each[0], ":".join(each))}
    if unknown := [name for name in engines if name not in known]:
        raise ConfigurationError(
            f"There is no engine {unknown[0]!r} to measure: choose from {', '.join(sorted(known))}."
        )
    if min((*batches, tokens, runs)) < 1:
        raise ConfigurationError("Batches, tokens and runs must be at least 1.")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)  # noqa: T201

    source = model_store.resolve(model, progress=model_store.progress_printer(sys.stderr))
    with tempfile.TemporaryDirectory(prefix="eloquent-bench-") as work:
        needs_gguf = any(name == "llama.cpp" for name, _ in wanted)
        if needs_gguf and gguf is None and model == model_store.EMBEDDED_MODEL:
            gguf = model_store.download_gguf(Path(work))
        jobs = [
            Job(
                name,
                precision,
                str(source.path),
                None if gguf is None else str(gguf),
                threads or os.cpu_count() or 1,
                batches,
                tokens,
                runs,
                chat,
            )
            for name, precision in wanted
        ]
        report = run_all(jobs, say=say)
    if json is not None:
        json.write_text(json_format.dumps(report, indent=1) + "\n")
    print(table(report))  # noqa: T201


@bench.command
def soak(
    *,
    turns: int = 500,
    minutes: float = 10.0,
    tokens_per_s: float = 1.0,
    seed: int = 1,
    state: Path | None = None,
    json: Path | None = None,
) -> None:
    """Hold turns in flight for a long time: memory may not grow, and nothing may be left behind.

    Clients over QUIC and WebSocket ask, disconnect at random and resume, cancel, or never come
    back. It takes 14 minutes more than MINUTES: before, until as many connections are forgotten as
    are left behind (their idle timeout is 3 minutes), and after, until all are. It ends with 1 if
    memory grew by 1 % or more over the last four fifths, if something is left, or an answer was
    wrong.

    Parameters
    ----------
    turns
        How many are in flight.
    minutes
        How long, after the warming up.
    tokens_per_s
        Of each turn. All of them and their readers are to leave the machine room: under more load
        than it bears, clients lag, and then the figures are those of a queue.
    seed
        Of what happens to which turn.
    state
        Directory for the server's store; by default one that is removed afterwards.
    json
        Also write the figures to this file.
    """
    import dataclasses

    from eloquent_server.bench.soak import Soak, describe
    from eloquent_server.bench.soak import soak as run_soak

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)  # noqa: T201

    wanted = Soak(turns, minutes, tokens_per_s, seed)
    with tempfile.TemporaryDirectory(prefix="eloquent-soak-") as own:
        outcome = run_soak(wanted, str(state or own), say=say)
    if json is not None:
        json.write_text(json_format.dumps(dataclasses.asdict(outcome), indent=1) + "\n")
    print(describe(wanted, outcome))  # noqa: T201
    if not outcome.is_good:
        sys.exit(1)


@bench.command
def readers(*, readers: int = 50, tokens_per_s: float = 30.0, seconds: float = 10.0) -> None:
    """Measure what one token to one reader costs the server, over QUIC on loopback.

    CPU time of the server's process, which only feeds logs: no model, no store. The readers are
    another process and need another core, so more of them than that core bears spoil the figure.

    Parameters
    ----------
    readers
        How many there are, each over a connection of its own.
    tokens_per_s
        To each reader.
    seconds
        How long it takes, after three to warm up.
    """
    from eloquent_server.bench.readers import Load, describe, measure

    load = Load(readers, tokens_per_s, seconds)
    print(describe(load, measure(load)))  # noqa: T201


@bench.command
def store(
    *,
    store: str | None = None,
    state: Path | None = None,
    durable: bool = False,
    turns: int = 50,
    tokens_per_s: float = 30.0,
    seconds: float = 10.0,
) -> None:
    """Measure the token store: how long a flush takes, and a token until it may be sent.

    Parameters
    ----------
    store
        A Redis, as `eloquent serve --store` takes it; its turns are deleted afterwards. Without
        one, the store in a file.
    state
        Directory for that file, which is removed afterwards; by default a temporary one.
    durable
        Wait for the disk at each commit of the file.
    turns
        How many are generated at once.
    tokens_per_s
        Of each turn.
    seconds
        How long.
    """
    import asyncio

    from eloquent_server.bench.store import Load, describe, measure

    load = Load(turns, tokens_per_s, seconds)
    speed = asyncio.run(measure(load, url=store, directory=state, durable=durable))
    print(describe(load, speed))  # noqa: T201
