"""Cancels, failures, ends: every turn gets one terminal event, and the engine goes on."""

import copy
import dataclasses
import random
import threading
from typing import Any

import pytest
import torch
from tiny_model import (
    CONTEXT_TOKENS,
    ScriptedModel,
    Sink,
    reference_text,
    scripted,
    tiny_loaded,
    tiny_model,
    tiny_tokenizer,
)

from eloquent.core.events import Failure, TextDelta
from eloquent.errors import RequestError
from eloquent_server.backends.base import Finish
from eloquent_server.engine.engine import Engine
from eloquent_server.engine.loader import prepare
from eloquent_server.engine.turn import EngineEvent, TurnRequest

A = 65


def greedy(prompt: list[int], count: int | None) -> TurnRequest:
    return TurnRequest(prompt=prompt, seed=0, max_tokens=count, temperature=0)


def test_stop_at_the_end_token() -> None:
    loaded = scripted([A, A, *tiny_ids("Bonjour"), *loaded_end(), *tiny_ids("never said")])
    engine, sink = Engine(loaded), Sink()
    engine.submit(greedy([A, A], None), sink)
    assert sink.end() == Finish("stop", 2, 8)
    assert sink.text == "Bonjour"
    engine.close()


def test_text_comes_token_by_token_without_broken_characters() -> None:
    text = "Grüße 👩‍👩‍👧 aus 東京!"
    loaded = scripted([A, *tiny_ids(text), *loaded_end()])
    engine, sink = Engine(loaded), Sink()
    engine.submit(greedy([A], None), sink)
    sink.end()
    pieces = [event.text for event in sink.events if isinstance(event, TextDelta)]
    assert pieces == list(text)
    engine.close()


def test_a_character_cut_by_the_limit_is_dropped() -> None:
    loaded = scripted([A, *tiny_ids("ab👧cd")])
    engine = Engine(loaded)
    for count, text in enumerate(["a", "ab", "ab", "ab", "ab", "ab👧", "ab👧c"], start=1):
        sink = Sink()
        engine.submit(greedy([A], count), sink)
        assert sink.end() == Finish("length", 1, count)
        assert sink.text == text
    engine.close()


def test_cancel_takes_effect_before_the_next_step() -> None:
    loaded = scripted([A] * CONTEXT_TOKENS)
    engine, sink = Engine(loaded), Sink()
    ids: list[int] = []
    submitted = threading.Event()
    calls_at_cancel = 0

    def emit(event: EngineEvent) -> None:
        nonlocal calls_at_cancel
        sink(event)
        if len(sink.events) == 3:
            assert submitted.wait(60)
            engine.cancel(ids[0])
            calls_at_cancel = len(loaded.model.calls)

    ids.append(engine.submit(greedy([A], None), emit))
    submitted.set()
    assert sink.end() == Finish("cancelled", 1, 3)
    assert len(loaded.model.calls) == calls_at_cancel
    engine.close()


def test_cancel_while_waiting_and_while_prefilling() -> None:
    gate, model = threading.Event(), GatedModel([A] * CONTEXT_TOKENS)
    model.gate = gate
    engine = Engine(
        dataclasses.replace(scripted([]), model=model), max_running=1, prefill_chunk_tokens=4
    )
    sinks = Sink(), Sink(), Sink()
    first = engine.submit(greedy([A] * 100, None), sinks[0])
    second = engine.submit(greedy([A], None), sinks[1])
    assert model.entered.wait(60)
    engine.cancel(second)
    engine.cancel(first)
    engine.submit(greedy([A], 2), sinks[2])
    gate.set()
    assert sinks[0].end() == Finish("cancelled", 100, 0)
    assert sinks[1].end() == Finish("cancelled", 1, 0)
    assert sinks[2].end() == Finish("length", 1, 2)
    assert model.calls[0] == (1, 4)
    assert len(model.calls) <= 1 + 2
    engine.close()


def test_cancel_of_an_unknown_or_ended_turn_does_nothing() -> None:
    engine, sink = Engine(scripted([A] * 9)), Sink()
    turn = engine.submit(greedy([A], 3), sink)
    sink.end()
    engine.cancel(turn)
    engine.cancel(12345)
    again = Sink()
    engine.submit(greedy([A], 3), again)
    again.end()
    engine.close()
    engine.cancel(turn)
    assert len(sink.ends) == len(again.ends) == 1


def test_more_turns_than_may_run_wait_in_order() -> None:
    loaded = scripted([A] * CONTEXT_TOKENS)
    engine = Engine(loaded, max_running=2)
    order: list[int] = []
    sinks = [Sink() for _ in range(6)]

    def emit_to(i: int) -> Any:
        def emit(event: EngineEvent) -> None:
            if i not in order:
                order.append(i)
            sinks[i](event)

        return emit

    for i in range(6):
        engine.submit(greedy([A], 10), emit_to(i))
    for sink in sinks:
        sink.end()
    assert order == list(range(6))
    assert max(rows for rows, _ in loaded.model.calls) == 2
    engine.close()


def test_prompt_too_long_names_both_numbers() -> None:
    engine = Engine(tiny_loaded())
    with pytest.raises(RequestError, match=rf"{CONTEXT_TOKENS} tokens.*{CONTEXT_TOKENS}") as caught:
        engine.submit(greedy([A] * CONTEXT_TOKENS, 1), Sink())
    assert caught.value.code == "prompt_too_long"
    sink = Sink()
    engine.submit(greedy([A] * (CONTEXT_TOKENS - 1), 5), sink)
    assert sink.end() == Finish("length", CONTEXT_TOKENS - 1, 1)
    engine.close()


def test_an_empty_prompt_is_refused_and_the_rest_go_on() -> None:
    engine, sink = Engine(tiny_loaded()), Sink()
    engine.submit(greedy([A], 40), sink)
    with pytest.raises(RequestError, match="empty") as caught:
        engine.submit(greedy([], 1), Sink())
    assert caught.value.code == "invalid_request"
    assert sink.end() == Finish("length", 1, 40)
    engine.close()


@pytest.mark.parametrize("field", ["prompt", "generated"])
@pytest.mark.parametrize("token", [-1, 259, 1 << 40])
def test_a_token_that_is_not_the_models_is_refused(token: int, field: str) -> None:
    engine, sink = Engine(tiny_loaded()), Sink()
    fields = {"prompt": [1, 2], field: [1, token]}
    with pytest.raises(RequestError, match=f"{token}.*0 to 258") as caught:
        engine.submit(TurnRequest(seed=0, **fields), sink)
    assert caught.value.code == "invalid_request"
    engine.submit(greedy([258, 0], 2), sink)
    assert isinstance(sink.end(), Finish)
    engine.close()


def test_a_thousand_turns_submitted_and_cancelled_leave_nothing() -> None:
    rng = random.Random(8)
    engine = Engine(tiny_loaded(), max_running=4)
    threads = threading.active_count()
    sinks, ids = [], []
    for _ in range(1000):
        sink = Sink()
        prompt = [rng.randrange(4)] * rng.randint(1, 40)
        ids.append(engine.submit(greedy(prompt, rng.randint(1, 30)), sink))
        sinks.append(sink)
        if rng.random() < 0.9:
            engine.cancel(rng.choice(ids[-20:]))
    for turn in ids:
        if rng.random() < 0.8:
            engine.cancel(turn)
    for sink in sinks:
        sink.end()
    assert threading.active_count() == threads
    engine.close()
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.kv_bytes == len(engine._cache.tree) * 16 * tiny_loaded().kv.token_bytes
    assert all(len(sink.ends) == 1 for sink in sinks)


def test_events_of_a_step_come_before_its_end_is_told() -> None:
    told: list[int] = []
    sink = Sink()
    engine = Engine(
        scripted([A] * CONTEXT_TOKENS), after_step=lambda: told.append(len(sink.tokens))
    )
    turn = engine.submit(greedy([A], 5), sink)
    sink.end()
    engine.cancel(turn)
    engine.close()
    assert [count for count in told if count][:5] == [1, 2, 3, 4, 5]


def test_a_cancel_that_leaves_no_work_is_told_at_once() -> None:
    loaded = scripted([A] * CONTEXT_TOKENS)
    model = GatedModel([A] * CONTEXT_TOKENS)
    model.gate = threading.Event()
    flushed = threading.Event()
    sink = Sink()
    engine = Engine(
        dataclasses.replace(loaded, model=model),
        after_step=lambda: flushed.set() if sink.ends else None,
    )
    turn = engine.submit(greedy([A], None), sink)
    assert model.entered.wait(60)
    engine.cancel(turn)
    model.gate.set()
    assert flushed.wait(60)
    engine.close()


def test_a_row_of_nan_fails_alone_and_leaves_nothing_behind() -> None:
    bad = 200
    model = copy.deepcopy(tiny_model())
    model.model.embed_tokens.weight[bad] = float("nan")
    engine = Engine(prepare(model, tiny_tokenizer(), "bad"))
    good = [1, 2, 3, 4]
    for _ in range(2):  # The second time, rows that held NaN are used again.
        sinks = [Sink() for _ in range(4)]
        for i, sink in enumerate(sinks):
            prompt = [5, bad, *range(50)] if i % 2 else good
            engine.submit(greedy(prompt, 20), sink)
        for i, sink in enumerate(sinks):
            end = sink.end()
            if i % 2:
                assert isinstance(end, Failure)
                assert end.code == "engine_error"
                assert "not numbers" in end.message
            else:
                assert sink.text == reference_text(good, 20)
    engine.close()


class FragileModel:
    """The tiny model, failing at one position."""

    def __init__(self, position: int) -> None:
        self.device = torch.device("cpu")
        self._position = position

    def __call__(self, **inputs: Any) -> Any:
        if (inputs["position_ids"] == self._position).any():
            raise RuntimeError("no memory left, say")
        return tiny_loaded().model(**inputs)


def test_an_exception_in_a_step_fails_only_the_turn_that_causes_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = Engine(dataclasses.replace(tiny_loaded(), model=FragileModel(100)))
    prompts = [[9, 8, 7], [6] * 95, [3, 2, 1], [7] * 120]
    sinks = [Sink() for _ in prompts]
    for prompt, sink in zip(prompts, sinks, strict=True):
        engine.submit(greedy(prompt, 40), sink)
    ends = [sink.end() for sink in sinks]
    for i in (0, 2):
        assert sinks[i].text == reference_text(prompts[i], 40)
    for i in (1, 3):  # In decoding and in prefill.
        assert isinstance(ends[i], Failure)
        assert "no memory left, say" in ends[i].message
    engine.close()
    assert "one by one" in caplog.text


def test_a_callback_that_raises_ends_its_turn_only() -> None:
    engine, other = Engine(scripted([A] * CONTEXT_TOKENS)), Sink()
    calls = 0

    def emit(event: EngineEvent) -> None:
        nonlocal calls
        calls += 1
        raise RuntimeError("Event loop is closed")

    engine.submit(greedy([A], 20), emit)
    engine.submit(greedy([A], 20), other)
    assert other.end() == Finish("length", 1, 20)
    assert calls == 1
    engine.close()


class GatedModel(ScriptedModel):
    """Waits in its first forward."""

    gate: threading.Event

    def __init__(self, script: list[int]) -> None:
        super().__init__(script)
        self.entered = threading.Event()

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        self.entered.set()
        assert self.gate.wait(60)
        return super().__call__(*args, **inputs)


def test_close_fails_what_runs_and_refuses_what_comes() -> None:
    model = GatedModel([A] * CONTEXT_TOKENS)
    model.gate = threading.Event()
    engine = Engine(dataclasses.replace(scripted([]), model=model), max_running=1)
    sinks = Sink(), Sink()
    for sink in sinks:
        engine.submit(greedy([A], None), sink)
    assert model.entered.wait(60)
    closing = threading.Thread(target=engine.close)
    closing.start()
    model.gate.set()
    closing.join(60)
    for sink in sinks:
        assert len(sink.ends) == 1
        assert isinstance(sink.end(), Failure)
        assert sink.end().code == "unavailable"
    with pytest.raises(RequestError, match="shutting down"):
        engine.submit(greedy([A], 1), Sink())
    engine.close()


def test_an_idle_engine_does_not_run() -> None:
    loaded = scripted([A] * 9)
    engine, sink = Engine(loaded), Sink()
    engine.submit(greedy([A], 2), sink)
    sink.end()
    calls = len(loaded.model.calls)
    assert not threading.Event().wait(0.05)
    assert len(loaded.model.calls) == calls
    engine.close()


def tiny_ids(text: str) -> list[int]:
    ids: list[int] = tiny_loaded().tokenizer.encode(text, add_special_tokens=False)
    return ids


def loaded_end() -> list[int]:
    return list(tiny_loaded().end_tokens)
