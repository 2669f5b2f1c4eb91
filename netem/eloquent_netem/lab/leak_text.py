"""Answers for `eloquent lab leak`: text of several topics, cut into tokens as a model cuts it."""

import random
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from itertools import islice, pairwise

MERGES = 1300
"""Merges of the byte-pair encoding. With them a token is as long, within 8 % on every topic, as one
of SmolLM2's vocabulary on the same text."""

CORPUS_SENTENCES = 300
"Sentences of each topic from which the encoding is learned."

WORD = re.compile(r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
"What a token never goes beyond: a word with the space before it, a digit, punctuation, space."

SLOT = re.compile(r"<(\w+)>")

Topic = Mapping[str, list[str]]


def load_topics() -> dict[str, Topic]:
    """Return the topics by name: their sentences, and the phrases for the slots in these."""
    path = files("eloquent_netem.lab") / "leak_topics.toml"
    return dict(tomllib.loads(path.read_text(encoding="utf-8")))


def sentences(topic: Topic, rng: random.Random) -> Iterator[str]:
    """Yield sentences of a topic without end; none comes again before all have come."""
    while True:
        for sentence in rng.sample(topic["sentences"], len(topic["sentences"])):
            yield SLOT.sub(lambda slot: rng.choice(topic[slot[1]]), sentence)


class Tokenizer:
    """A byte-pair encoding, learned from the topics' own text (all ASCII)."""

    def __init__(self, topics: Iterable[Topic], rng: random.Random, merges: int = MERGES) -> None:
        counts: Counter[str] = Counter()
        for topic in topics:
            counts.update(WORD.findall("".join(islice(sentences(topic, rng), CORPUS_SENTENCES))))
        self._words = {word: list(word) for word in counts}
        for _ in range(merges):
            pairs: Counter[tuple[str, str]] = Counter()
            for word, pieces in self._words.items():
                for pair in pairwise(pieces):
                    pairs[pair] += counts[word]
            if not pairs:
                break
            best = max(pairs, key=lambda pair: (pairs[pair], pair))
            for word, pieces in self._words.items():
                if best[0] + best[1] in word:
                    self._words[word] = _merged(pieces, best)

    def tokens(self, text: str) -> Iterator[str]:
        """Yield the tokens of a text; words that were not learned come letter by letter."""
        for word in WORD.findall(text):
            yield from self._words.get(word, word)


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def make_answer(topic: Topic, tokenizer: Tokenizer, length: int, rng: random.Random) -> list[str]:
    """Return an answer of `length` tokens about a topic."""
    text = "".join(islice(sentences(topic, rng), length))  # a sentence has a token at least
    return list(islice(tokenizer.tokens(text), length))
