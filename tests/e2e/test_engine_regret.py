"""How far answers of the embedded model are from the best, where something is not exact.

`.venv/bin/pytest tests/e2e/test_engine_regret.py -s` prints the figures.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import Sink
from transformers import AutoModelForCausalLM

from eloquent_server import models
from eloquent_server.backends.base import Finish
from eloquent_server.chat import ChatMessage
from eloquent_server.engine.engine import Engine
from eloquent_server.engine.loader import LoadedModel, load
from eloquent_server.engine.precision import (
    REGRET_BOUND,
    TIER_REGRET_BOUND,
    Precision,
    regrets,
)
from eloquent_server.engine.prompt import PromptEncoder
from eloquent_server.engine.settings import KvOptions
from eloquent_server.engine.tiers import open_tier
from eloquent_server.engine.turn import TurnRequest

QUESTIONS = [
    "What is the capital of France, and what else should I see there?",
    "Write two sentences about 東京.",
    "Count from one to twenty, and tell me which of the numbers are prime.",
    "Explain to a child of six years why the sky is blue at noon and red in the evening, "
    "and why clouds are white although they are made of the same air and water.",
]
GUIDE = " ".join(
    f"Rule {i}: when you are asked about {what}, be brief, be friendly, and name what you know."
    for i, what in enumerate(["cities", "numbers", "colours", "words", "people", "rivers"])
)
TOKENS = 32


@pytest.fixture(scope="module")
def exact(embedded_model: models.ModelSource) -> Any:
    """The model as transformers has it, in float32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield AutoModelForCausalLM.from_pretrained(
        embedded_model.path, dtype=torch.float32, attn_implementation="eager"
    )
    torch.set_num_threads(threads)


def prompts_of(loaded: LoadedModel, system: str = "You are helpful.") -> list[list[int]]:
    encoder = PromptEncoder(loaded.tokenizer)
    first = ChatMessage("system", system)
    return [encoder.encode((first, ChatMessage("user", text))) for text in QUESTIONS]


def answers(engine: Engine, prompts: Sequence[list[int]]) -> Iterator[tuple[list[int], int]]:
    """Yield tokens and how many of the prompt's were cached, of turns that run together."""
    sinks = [Sink() for _ in prompts]
    for prompt, sink in zip(prompts, sinks, strict=True):
        request = TurnRequest(prompt=prompt, seed=0, temperature=0, max_tokens=TOKENS)
        engine.submit(request, sink)
    for sink in sinks:
        end = sink.end()
        assert isinstance(end, Finish), end
        yield sink.tokens, end.cached_tokens


def tell(what: str, worst: float, bound: float) -> None:
    print(f"\n{what}: {worst:.4f} at worst, bound {bound}")  # noqa: T201


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_regret_of_each_precision_is_within_its_bound(
    precision: Precision, embedded_model: models.ModelSource, exact: Any
) -> None:
    loaded = load(embedded_model.path, embedded_model.name, device="cpu", precision=precision)
    engine = Engine(loaded)
    prompts = prompts_of(loaded)
    worst = max(
        max(regrets(exact, prompt, tokens))
        for prompt, (tokens, _) in zip(prompts, answers(engine, prompts), strict=True)
    )
    engine.close()
    tell(f"regret of {precision}", worst, REGRET_BOUND[precision])
    assert worst <= REGRET_BOUND[precision]


def test_the_regret_of_an_int8_tier_is_within_its_bound(
    tmp_path: Path, embedded_model: models.ModelSource, exact: Any
) -> None:
    loaded = load(embedded_model.path, embedded_model.name, device="cpu", precision="fp32")
    prompts = prompts_of(loaded, GUIDE)
    options = KvOptions(directory=str(tmp_path), disk_bytes=1 << 30, encoding="int8")
    engine = Engine(loaded, tier=open_tier(loaded.kv, options))
    list(answers(engine, prompts))
    engine.close()
    worst = 0.0
    engine = Engine(loaded, tier=open_tier(loaded.kv, options))
    for prompt, (tokens, cached) in zip(prompts, answers(engine, prompts), strict=True):
        assert cached > 0
        worst = max(worst, *regrets(exact, prompt, tokens))
    assert engine.stats().restored_tokens > 100
    engine.close()
    tell("regret of --kv-tier int8", worst, TIER_REGRET_BOUND)
    assert worst <= TIER_REGRET_BOUND
