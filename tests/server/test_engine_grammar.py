"""Answers keep their JSON schema, sampled at any temperature; wrong schemas are refused."""

import json
from typing import Any

import pytest
import torch
from tiny_model import Sink, scripted, tiny_loaded, tiny_tokenizer

from eloquent.errors import RequestError
from eloquent_server.backends.base import Finish
from eloquent_server.engine.engine import Engine
from eloquent_server.engine.grammar import GrammarError, TokenTable
from eloquent_server.engine.turn import TurnRequest

TABLE = TokenTable(tiny_tokenizer(), vocab_tokens=259, end_tokens=frozenset({258}))
BACKEND = tiny_tokenizer().backend_tokenizer
PERSON = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ada", "Zoë"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def ids(text: str) -> list[int]:
    tokens: list[int] = BACKEND.encode(text, add_special_tokens=False).ids
    return tokens


def ask(engine: Engine, schema: dict[str, Any], **options: Any) -> Sink:
    sink = Sink()
    fields = {"prompt": [65, 66], "seed": 0, "json_schema": json.dumps(schema), **options}
    engine.submit(TurnRequest(**fields), sink)
    sink.end()
    return sink


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_random_model_writes_what_the_schema_allows(temperature: float, seed: int) -> None:
    engine = Engine(tiny_loaded())
    sink = ask(engine, PERSON, temperature=temperature, seed=seed)
    engine.close()
    end = sink.end()
    assert isinstance(end, Finish)
    assert end.reason == "stop"
    person = json.loads(sink.text)
    assert person["name"] in ("Ada", "Zoë")
    assert 0 <= person["age"] <= 150
    assert set(person) == {"name", "age"}


def test_the_answer_ends_where_nothing_can_follow() -> None:
    text = '{"name": "Ada", "age": 36}'
    engine = Engine(scripted([65, 66, *ids(text), *ids("never")]))
    sink = ask(engine, PERSON, temperature=0)
    engine.close()
    assert sink.text == text
    assert sink.end() == Finish("stop", 2, len(text))


def test_a_continuation_goes_on_in_its_grammar() -> None:
    engine = Engine(tiny_loaded())
    whole = ask(engine, PERSON, temperature=1.5, seed=3)
    for cut in range(0, len(whole.tokens), 5):
        rest = ask(engine, PERSON, temperature=1.5, seed=3, generated=tuple(whole.tokens[:cut]))
        assert whole.tokens[:cut] + rest.tokens == whole.tokens
    engine.close()


def test_a_neighbour_without_a_grammar_is_free() -> None:
    engine = Engine(tiny_loaded())
    alone, free, bound = Sink(), Sink(), Sink()
    request = TurnRequest(prompt=[70, 71], seed=0, temperature=0, max_tokens=30)
    engine.submit(request, alone)
    alone.end()
    engine.submit(request, free)
    engine.submit(
        TurnRequest(prompt=[65], seed=0, json_schema='{"type":"object"}', max_tokens=30), bound
    )
    free.end()
    bound.end()
    engine.close()
    assert free.text == alone.text


@pytest.mark.parametrize(
    "schema", ['{"type": "objekt"}', '{"$ref": "http://localhost/x"}', '{"pattern": "("}', "[1"]
)
def test_a_wrong_schema_is_refused(schema: str) -> None:
    with pytest.raises(RequestError, match="cannot be used") as caught:
        TABLE.grammar(schema)
    assert caught.value.code == "invalid_request"
    engine = Engine(tiny_loaded())
    with pytest.raises(RequestError):
        engine.submit(TurnRequest(prompt=[65], seed=0, json_schema=schema), Sink())
    engine.close()


def test_a_model_without_an_end_token_is_refused() -> None:
    table = TokenTable(tiny_tokenizer(), vocab_tokens=259, end_tokens=frozenset())
    with pytest.raises(RequestError, match="no token that ends"):
        table.grammar("{}")
    assert table.text(ids("a")[0]) == b"a"


def test_only_allowed_tokens_keep_their_logits() -> None:
    grammar = TABLE.grammar('{"type":"object"}')
    logits = torch.zeros(300)
    grammar.mask(logits)
    assert torch.isfinite(logits).nonzero().flatten().tolist() == ids("{")
    with pytest.raises(GrammarError):
        grammar.accept(ids("x")[0])


def test_whitespace_is_bounded() -> None:
    grammar = TABLE.grammar('{"type":"object"}')
    for token in ids("{" + 16 * "\n"):
        grammar.accept(token)
    logits = torch.zeros(259)
    grammar.mask(logits)
    assert logits[ids("\n")[0]] == -torch.inf


def test_texts_of_tokens() -> None:
    assert b"".join(TABLE.text(token) for token in ids(" é")) == " é".encode()
    assert TABLE.text(258) == b""
