"""Tiny models with random weights, a byte-level tokenizer, and a sink for an engine's events."""

import copy
import dataclasses
import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from eloquent.core.events import Failure, Logprobs, TextDelta
from eloquent_server.backends.base import Finish
from eloquent_server.engine.loader import LoadedModel, prepare
from eloquent_server.engine.turn import EngineEvent, Tokens

CONTEXT_TOKENS = 192
# Two threads on two busy cores wait for each other far longer than a tiny model computes.
torch.set_num_threads(1)

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> Any:
    """Return a fast tokenizer whose tokens are the 256 bytes and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        unk_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


@functools.cache
def tiny_model(model_type: str = "llama") -> Any:
    """Return a two-layer float32 model, the same at every call; do not change it."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=256 + len(SPECIALS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.3,
        sliding_window=None,
        # No end token of its own: greedy answers run on to their limit.
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa"
        )
    return model.eval().requires_grad_(False)


@functools.cache
def tiny_loaded(model_type: str = "llama") -> LoadedModel:
    """Return the tiny model as the engine takes it; only `<|im_end|>` ends an answer."""
    return prepare(tiny_model(model_type), tiny_tokenizer(), "tiny")


@functools.cache
def eager_model(model_type: str) -> Any:
    model = copy.deepcopy(tiny_model(model_type))
    model.set_attn_implementation("eager")
    return model


@torch.inference_mode()
def reference_tokens(prompt: Sequence[int], count: int, model_type: str = "llama") -> list[int]:
    """Return `count` greedy tokens: no cache, no batch, eager attention, nothing of ours."""
    tokens = list(prompt)
    end = tiny_loaded(model_type).end_tokens
    while len(tokens) < len(prompt) + count and tokens[-1] not in end:
        logits = eager_model(model_type)(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def reference_text(prompt: Sequence[int], count: int, model_type: str = "llama") -> str:
    tokens = reference_tokens(prompt, count, model_type)
    text: str = tiny_loaded(model_type).tokenizer.decode(tokens, skip_special_tokens=True)
    return text.rstrip("\ufffd")


class Sink:
    """Takes one turn's events in the engine's thread."""

    def __init__(self) -> None:
        self.events: list[TextDelta | Logprobs | Failure | Finish] = []
        "All but the token ids."
        self.tokens: list[int] = []
        self._condition = threading.Condition()

    def __call__(self, event: EngineEvent) -> None:
        with self._condition:
            if isinstance(event, Tokens):
                self.tokens += event.ids
            else:
                self.events.append(event)
            self._condition.notify_all()

    @property
    def ends(self) -> list[Failure | Finish]:
        return [event for event in self.events if isinstance(event, Failure | Finish)]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TextDelta))

    def wait_for(self, count: int) -> None:
        """Wait until at least `count` events are here, or the last one."""
        with self._condition:
            assert self._condition.wait_for(lambda: len(self.events) >= count or self.ends, 60)

    def end(self) -> Failure | Finish:
        """Wait for the terminal event and return it."""
        with self._condition:
            assert self._condition.wait_for(lambda: self.ends, 60), "no terminal event"
        return self.ends[0]


class ScriptedModel:
    """Stands in for a model: after position p, the token `script[p + 1]` has the greatest logit."""

    def __init__(self, script: Sequence[int]) -> None:
        self.device = torch.device("cpu")
        self.calls: list[tuple[int, int]] = []
        "Per forward: turns, and tokens of all of them."
        self._script = torch.tensor(script)

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_to_keep: torch.Tensor,
        **_: Any,
    ) -> Any:
        self.calls.append((len(logits_to_keep), input_ids.shape[1]))
        following = self._script[position_ids[:, logits_to_keep] + 1]
        logits = torch.nn.functional.one_hot(following, 256 + len(SPECIALS)).float() * 100
        return type("Output", (), {"logits": logits})


def scripted(script: Sequence[int]) -> LoadedModel:
    """Return a model that says `script[len(prompt):]`."""
    loaded = tiny_loaded()
    return dataclasses.replace(loaded, name="scripted", model=ScriptedModel(script))
