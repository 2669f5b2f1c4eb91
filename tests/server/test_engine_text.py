"""Text comes in whole characters, and joined it is the whole decoding."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny_tokenizer

from eloquent_server.engine.text import REPLACEMENT, TextStream

TOKENIZER = tiny_tokenizer().backend_tokenizer
TEXTS = [
    "plain",
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 family",
    "🇫🇷🇩🇪",
    "𝒳 ≠ ∅",
    " leading",
    "\n\n",
]


def ids(text: str) -> list[int]:
    tokens: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return tokens


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(text: str) -> None:
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(token) for token in ids(text)]
    assert REPLACEMENT not in "".join(pieces)
    assert "".join(pieces) + stream.flush() == text


@pytest.mark.parametrize("text", TEXTS)
def test_cut_anywhere_only_whole_characters_come(text: str) -> None:
    tokens = ids(text)
    for cut in range(len(tokens)):
        stream = TextStream(TOKENIZER)
        got = "".join(stream.push(token) for token in tokens[:cut]) + stream.flush()
        assert got == text.encode()[:cut].decode(errors="ignore")


@given(st.text(st.characters(exclude_characters=REPLACEMENT, exclude_categories=["Cs"])))
def test_any_text(text: str) -> None:
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(token) for token in ids(text)]
    assert REPLACEMENT not in "".join(pieces)
    assert "".join(pieces) + stream.flush() == text


@given(st.lists(st.integers(0, 258), max_size=40))
def test_any_tokens(tokens: list[int]) -> None:
    stream = TextStream(TOKENIZER)
    got = "".join(stream.push(token) for token in tokens) + stream.flush()
    whole = TOKENIZER.decode(tokens, skip_special_tokens=True)
    assert got.rstrip(REPLACEMENT) == whole.rstrip(REPLACEMENT)


def test_special_tokens_are_no_text() -> None:
    stream = TextStream(TOKENIZER)
    end = TOKENIZER.token_to_id("<|im_end|>")
    assert [stream.push(token) for token in [*ids("a"), end, *ids("b")]] == ["a", "", "b"]
