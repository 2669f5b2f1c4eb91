"""Token sources: when an answer's tokens are generated, and what they say."""

import hashlib
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from eloquent.core.events import Event
from eloquent.errors import ConfigurationError, EloquentError

if TYPE_CHECKING:
    from eloquent_client import Client

TOKEN_TEXT_CHARS = 10

RECORDED = files("eloquent_netem.lab") / "recorded.json"
"A recording that is shipped, made by `eloquent lab record`."

RECORDING_VERSION = 1

DEFAULT_PROMPT = "Explain to a child in a few paragraphs why the sky is blue and sunsets are red."


class GenerationError(EloquentError):
    """A model was to answer, and gave nothing that could be used."""


class Token(NamedTuple):
    """One token of an answer."""

    time_s: float
    "When it is generated, counted from the first one, which is at 0; never going back."
    text: str
    "Not empty."


class PlannedSource(Protocol):
    """A source whose times are known before; a frozen dataclass, whose `repr` is its identity."""

    @property
    def name(self) -> str:
        """What it is, in a word or two: a row's `source`."""

    def plan(self, seed: int) -> tuple[Token, ...]:
        """Return the answer's tokens, at least one."""


@dataclass(frozen=True, slots=True)
class ConstantRate:
    """Tokens of the same size at a fixed rate."""

    tokens_per_s: float = 30.0
    tokens: int = 400
    token_chars: int = TOKEN_TEXT_CHARS

    @property
    def name(self) -> str:
        """See `PlannedSource.name`."""
        return f"{self.tokens_per_s:g} tok/s"

    def plan(self, seed: int) -> tuple[Token, ...]:
        """See `PlannedSource.plan`; all seeds have the same."""
        return tuple(
            Token(index / self.tokens_per_s, token_text(index, self.token_chars))
            for index in range(self.tokens)
        )


@dataclass(frozen=True, slots=True, repr=False)
class Recording:
    """The timings of a real generation, in a file that `eloquent lab record` wrote."""

    path: Path | None = None
    "None: the one that is shipped."
    tokens: int | None = None
    "How many of its tokens, from the first on; None: all."

    @property
    def name(self) -> str:
        """See `PlannedSource.name`."""
        return f"recorded {self.content.model}"

    @property
    def content(self) -> "RecordedAnswer":
        """What the file has.

        Raises:
            ConfigurationError: it cannot be read, or is no recording.
        """
        return _load(self.path)

    def plan(self, seed: int) -> tuple[Token, ...]:
        """See `PlannedSource.plan`; all seeds have the same.

        Raises:
            ConfigurationError: see `content`.
        """
        content = self.content
        tokens = map(Token, content.times_s, content.texts)
        return tuple(tokens)[: self.tokens]

    def __repr__(self) -> str:
        digest = hashlib.blake2b(self.content.dumps().encode(), digest_size=12).hexdigest()
        return f"Recording({digest}, {self.tokens})"


@dataclass(frozen=True, slots=True)
class LiveModel:
    """A model that answers while the run goes on; only in real time (`--driver tun`)."""

    prompt: str = DEFAULT_PROMPT
    model: str | None = None
    "What `eloquent serve --model` takes; None is its default."
    max_tokens: int = 400

    @property
    def name(self) -> str:
        """See `PlannedSource.name`."""
        return f"live {self.model or 'default'}"

    @asynccontextmanager
    async def loaded(self) -> AsyncIterator[AsyncIterator[Event]]:
        """Start a server of one's own on loopback, a process of its own, and load the model.

        What it gives asks for the answer when its first event is, gives each event as it comes, and
        raises `EloquentError` if the answer failed.

        Raises:
            EloquentError: the server cannot be started.
        """
        from eloquent_client import local_client

        async with local_client(self.model) as client:
            yield self._ask(client)

    async def events(self) -> AsyncIterator[Event]:
        """Generate an answer; give each event as it comes.

        Raises:
            EloquentError: the server cannot be started, or the answer failed.
        """
        async with self.loaded() as events:
            async for event in events:
                yield event

    async def _ask(self, client: "Client") -> AsyncIterator[Event]:
        from eloquent_client import Failure

        messages = [{"role": "user", "content": self.prompt}]
        async with client.stream(messages, max_tokens=self.max_tokens) as stream:
            async for event in stream:
                if isinstance(event, Failure):
                    raise GenerationError(f"The model's answer failed: {event.message}")
                yield event


Source = ConstantRate | Recording | LiveModel


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedAnswer:
    """What a recording's file has."""

    version: int
    model: str
    prompt: str
    machine: str
    "What generated it, in a few words."
    times_s: tuple[float, ...]
    "When each piece of text was generated, counted from the first."
    texts: tuple[str, ...]

    @property
    def tokens_per_s(self) -> float:
        """The mean rate."""
        return (len(self.times_s) - 1) / self.times_s[-1] if self.times_s[-1] > 0 else math.inf

    def dumps(self) -> str:
        """Return the file's text."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=None) + "\n"

    @classmethod
    def loads(cls, text: str) -> "RecordedAnswer":
        """Read a file's text.

        Raises:
            ValueError: it is no recording.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict) or fields.get("version") != RECORDING_VERSION:
            raise ValueError(f"it is no recording of version {RECORDING_VERSION}")
        try:
            answer = cls(
                version=RECORDING_VERSION,
                model=str(fields["model"]),
                prompt=str(fields["prompt"]),
                machine=str(fields["machine"]),
                times_s=tuple(float(time_s) for time_s in fields["times_s"]),
                texts=tuple(str(text) for text in fields["texts"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"a key is missing or of the wrong type ({error})") from error
        times_s = answer.times_s
        if not times_s or len(times_s) != len(answer.texts) or not all(answer.texts):
            raise ValueError("each token needs a time and a text that is not empty")
        if times_s[0] != 0 or not all(map(math.isfinite, times_s)):
            raise ValueError("the first token's time is 0, and all are finite")
        if any(later < earlier for earlier, later in pairwise(times_s)):
            raise ValueError("the times go back")
        return answer


def token_text(index: int, chars: int = TOKEN_TEXT_CHARS) -> str:
    """Return token `index` of the synthetic answer, of `chars` characters."""
    return f"{index:0{chars - 1}d}"[-(chars - 1) :] + " "


@lru_cache(maxsize=8)
def _load(path: Path | None) -> RecordedAnswer:
    try:
        text = (RECORDED if path is None else path).read_text(encoding="utf-8")
        return RecordedAnswer.loads(text)
    except OSError as error:
        raise ConfigurationError(
            f"The recording {path} cannot be read: {error.strerror}. `eloquent lab record` makes "
            "one."
        ) from error
    except ValueError as error:  # JSON's and UTF-8's errors are ValueErrors too.
        raise ConfigurationError(
            f"{path} is no recording: {error}. `eloquent lab record` makes one."
        ) from error
