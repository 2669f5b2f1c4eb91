"""Recordings: when a real model gave out each token of a real answer."""

import platform
import time
from collections.abc import Callable

from eloquent.core.events import End, TextDelta
from eloquent_netem.lab.sources import RECORDING_VERSION, GenerationError, LiveModel, RecordedAnswer


async def record(
    source: LiveModel, *, on_text: Callable[[str], None] = lambda text: None
) -> RecordedAnswer:
    """Let a model answer, note when each piece of text comes, and tell `on_text` of it.

    The server is the real one, asked over loopback: what comes here was generated some tenths of a
    millisecond before.

    Raises:
        EloquentError: the server cannot be started, the answer failed, or it has no text.
    """
    pieces: list[tuple[float, str]] = []
    model = ""
    async for event in source.events():
        if isinstance(event, TextDelta) and event.text:
            pieces.append((time.perf_counter(), event.text))
            on_text(event.text)
        elif isinstance(event, End):
            model = event.model
    if not pieces:
        raise GenerationError("The model gave no text: ask another prompt.")
    first_s = pieces[0][0]
    return RecordedAnswer(
        version=RECORDING_VERSION,
        model=model,
        prompt=source.prompt,
        machine=f"{platform.system()} {platform.machine()}",
        times_s=tuple(round(time_s - first_s, 6) for time_s, _ in pieces),
        texts=tuple(text for _, text in pieces),
    )
