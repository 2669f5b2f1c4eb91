"""The subcommands `eloquent lab leak` and `eloquent lab pace`."""

import json as json_format
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from eloquent.errors import ConfigurationError

MIN_SEEDS = 5
"Each topic needs an answer in each of the five parts that are tested in turn."


def leak(
    *,
    rtt_ms: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (20.0, 100.0, 300.0),
    rate: float = 30.0,
    loss: float = 0.0,
    seeds: int = 40,
    json: Path | None = None,
) -> None:
    """Measure what the sizes and times of packets tell of an answer's topic, padded and not.

    An attacker sees the packets that the server sends, learns from answers whose topics are known,
    and names the topics of others. Both real QUIC ends run, in virtual time (some minutes).

    Parameters
    ----------
    rtt_ms
        Round-trip times in milliseconds.
    rate
        Tokens per second.
    loss
        Share of packets lost each way, 0 to below 1.
    seeds
        Answers of each topic.
    json
        Also write all figures to this file.
    """
    if not 0 <= loss < 1 or not 0 < rate < float("inf"):
        raise ConfigurationError("--loss is a probability below 1, and --rate is above 0.")
    if seeds < MIN_SEEDS or not rtt_ms or not all(0 <= rtt < float("inf") for rtt in rtt_ms):
        raise ConfigurationError(
            f"--seeds must be at least {MIN_SEEDS} and --rtt-ms finite and not negative."
        )
    if find_spec("numpy") is None:
        raise ConfigurationError(
            "The attacker needs numpy, which is not installed: run pip install numpy."
        )
    if json is not None:
        try:
            json.open("a").close()
        except OSError as error:
            raise ConfigurationError(f"Cannot write {json}: {error.strerror}.") from error
    from eloquent_netem.lab.leak import measure, render, to_json, workers

    leaks = measure(
        [rtt / 1000 for rtt in rtt_ms],
        loss=loss,
        tokens_per_s=rate,
        answers=seeds,
        workers=workers(),
    )
    print(render(leaks))  # noqa: T201
    if json is not None:
        json.write_text(json_format.dumps(to_json(leaks, sys.argv[1:]), indent=1) + "\n")


def pace(*, seeds: int = 20, tokens: int = 400) -> None:
    """Show what the pacer makes of answers under loss, and what delay it adds.

    Both real QUIC ends run, in virtual time; the pacer then shows the tokens, of 4 characters each,
    as they arrived (a minute).

    Parameters
    ----------
    seeds
        How many seeds, from 0 on.
    tokens
        Tokens of each answer.
    """
    if seeds < 1 or tokens < 2:
        raise ConfigurationError("--seeds must be at least 1 and --tokens at least 2.")
    from eloquent_netem.lab.pace import table

    print(table(seeds, tokens))  # noqa: T201
