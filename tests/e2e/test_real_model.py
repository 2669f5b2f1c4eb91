"""The embedded model answers, and its answers are those of transformers."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import torch
from msgspec.json import encode
from transformers import AutoModelForCausalLM, AutoTokenizer

from eloquent.core.events import TextDelta
from eloquent_server import models
from eloquent_server.backends.base import BackendEvent, Finish
from eloquent_server.backends.local import LocalBackend
from eloquent_server.chat import ChatMessage, ChatRequest

CAPITAL = "What is the capital of France?"
QUESTIONS = [CAPITAL, "Count from one to ten.", "Write two sentences about 東京.", "Say hello 👋."]
TOKENS = 24


@pytest.fixture
async def backend(embedded_model: models.ModelSource) -> AsyncIterator[LocalBackend]:
    backend = await LocalBackend.start(embedded_model.name, device="cpu")
    yield backend
    await backend.close()


async def answer(backend: LocalBackend, question: str) -> tuple[str, BackendEvent]:
    request = ChatRequest(
        messages=(ChatMessage("user", question),), temperature=0, max_tokens=TOKENS
    )
    events = [event async for event in backend.generate(encode(request))]
    return "".join(event.text for event in events if isinstance(event, TextDelta)), events[-1]


def test_provenance(embedded_model: models.ModelSource) -> None:
    facts = json.loads((embedded_model.path / "provenance.json").read_text())
    assert facts["sha256"] == models.WHEEL_SHA256


async def test_the_capital_of_france(backend: LocalBackend) -> None:
    assert backend.models == (models.EMBEDDED_MODEL,)
    text, end = await answer(backend, CAPITAL)
    assert "Paris" in text
    assert isinstance(end, Finish)
    assert end.reason == "stop"


async def test_greedy_answers_equal_those_of_transformers(
    backend: LocalBackend, embedded_model: models.ModelSource
) -> None:
    answers = await asyncio.gather(*(answer(backend, question) for question in QUESTIONS))
    tokenizer = AutoTokenizer.from_pretrained(embedded_model.path)
    model = AutoModelForCausalLM.from_pretrained(embedded_model.path, attn_implementation="eager")
    for question, (text, _) in zip(QUESTIONS, answers, strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            output = model.generate(**prompt, do_sample=False, max_new_tokens=TOKENS)
        new = output[0, prompt["input_ids"].shape[1] :]
        assert text == tokenizer.decode(new, skip_special_tokens=True).rstrip("\ufffd")
