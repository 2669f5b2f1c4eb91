"""Loading: a directory in the Hugging Face layout becomes a model ready for the engine."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from eloquent.errors import ConfigurationError
from eloquent_server.engine.kv import SlotCache
from eloquent_server.engine.linear import prepack, prepacking_works
from eloquent_server.engine.runner import Runner

_log = logging.getLogger(__name__)

_PROBE_TOKENS = 8
_PROBE_TOLERANCE = 0.1
"Relative; rounding in bfloat16 is below it, another architecture's semantics far above."


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What the engine needs of a model."""

    name: str
    model: Any
    "A causal language model of transformers, in eval mode."
    tokenizer: Any
    "A fast tokenizer of transformers, with a chat template."
    context_tokens: int
    "The most tokens of prompt and answer together."
    end_tokens: frozenset[int]
    "Token ids that end an answer."
    temperature: float = 1.0
    top_p: float = 1.0
    "Sampling where a request names none: the model's `generation_config.json`, as far as it says."


def load(directory: Path, name: str, *, device: str = "auto") -> LoadedModel:
    """Load a model: float32 with prepacked weights on CPU, bfloat16 on CUDA.

    `device` is "auto" (CUDA if present), "cpu" or "cuda". Takes a few seconds.

    Raises:
        ConfigurationError: the device is not there, the files cannot be read, or the engine does
            not support the model.
    """
    chosen = _choose_device(device)
    torch.set_num_threads(engine_threads())
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
            refuse_unsupported(config, name)
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            _refuse_tokenizer(tokenizer, name)
            model = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=torch.float32 if chosen == "cpu" else torch.bfloat16,
                attn_implementation="sdpa",
                # Pickled weights could run code.
                use_safetensors=True,
                local_files_only=True,
            )
        except ConfigurationError:
            raise
        except Exception as error:  # Of damaged files the libraries raise bare Exceptions, too.
            raise ConfigurationError(
                f"The model {name} could not be loaded from {directory}: {_first_line(error)}. "
                "The directory must hold config.json, *.safetensors and tokenizer.json, whole, of "
                "an architecture that transformers knows. If it is the embedded model's, delete "
                "it: the model is fetched anew."
            ) from error
    model.eval().requires_grad_(False)
    model.to(chosen)
    if chosen == "cpu":
        if prepacking_works():
            prepack(model)
        else:
            _log.warning("This torch cannot prepack weights; the model runs at half the speed")
    return prepare(model, tokenizer, name)


def prepare(model: Any, tokenizer: Any, name: str) -> LoadedModel:
    """Check a model in memory and gather what the engine needs to know of it.

    Raises:
        ConfigurationError: the engine does not support the model.
    """
    refuse_unsupported(model.config, name)
    _refuse_tokenizer(tokenizer, name)
    # Settings for training batches: here nothing may be cut or filled up.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    _probe(model, name)
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        context_tokens=int(model.config.max_position_embeddings),
        end_tokens=_end_tokens(model, tokenizer),
        **_advised_sampling(model),
    )


def refuse_unsupported(config: Any, name: str) -> None:
    """Check a model's configuration against what the engine's key-value layout can do.

    Raises:
        ConfigurationError: the message names the property that is not supported.
    """
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    problems = {
        "an encoder": getattr(config, "is_encoder_decoder", False),
        "sliding-window attention": getattr(config, "sliding_window", None) is not None
        and getattr(config, "use_sliding_window", True),
        "chunked attention": getattr(config, "attention_chunk_size", None) is not None,
        "soft-capped attention": getattr(config, "attn_logit_softcapping", None) is not None,
        "attention sinks": config.model_type == "gpt_oss",
        f"layers of the kinds {', '.join(sorted(layers))}": layers != {"full_attention"},
        "no max_position_embeddings": not getattr(config, "max_position_embeddings", None),
    }
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise ConfigurationError(
            f"The engine does not support the model {name} ({config.model_type}): it has "
            f"{' and '.join(found)}. Use a decoder with full attention in every layer (Llama, "
            "SmolLM2, Qwen2.5, Qwen3), or an upstream engine."
        )


def engine_threads() -> int:
    """Return how many threads torch should use: all cores but one, which the event loop keeps.

    With as many threads as cores, any other work makes torch's threads wait for each other in
    busy loops: a step then takes not twice but fifty times as long.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    # torch's own default counts physical cores, which is the better number if it is lower.
    return max(1, min(cores - 1, torch.get_num_threads()))


def _choose_device(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigurationError(
            f"There is no device {device!r} for the model: choose auto, cpu or cuda."
        )
    present = torch.cuda.is_available()
    if device == "cuda" and not present:
        raise ConfigurationError(
            "torch sees no CUDA device, so the model cannot run on one. Check the driver and that "
            "torch is a build with CUDA, or use --device cpu."
        )
    return "cuda" if present and device != "cpu" else "cpu"


def _refuse_tokenizer(tokenizer: Any, name: str) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigurationError(
            f"The model {name} has no chat template, so it is a base model that cannot chat. Use "
            "the instruction-tuned variant (often called -Instruct or -Chat)."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigurationError(
            f"The model {name} has no tokenizer.json, which streaming its text needs. Use a "
            "variant of the model that ships one."
        )


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    ends: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        ends.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(ends)


def _advised_sampling(model: Any) -> dict[str, float]:
    advice = getattr(model, "generation_config", None)
    found = {name: getattr(advice, name, None) for name in ("temperature", "top_p")}
    return {name: float(value) for name, value in found.items() if value is not None}


@torch.inference_mode()
def _probe(model: Any, name: str) -> None:
    """Compare a short text through our cache with the plain forward: they must agree."""
    count = min(_PROBE_TOKENS, int(model.config.max_position_embeddings))
    tokens = [(7 * i + 3) % model.config.vocab_size for i in range(count)]
    problem = "its logits through the engine's cache differ from its own"
    try:
        ids = torch.tensor([tokens], device=model.device)
        expected = model(input_ids=ids, use_cache=False).logits[0, -1].float()
        runner = Runner(model, SlotCache(max_tokens=count, device=model.device))
        runner.prefill(0, tokens[: count // 2], 0)
        for position in range(count // 2, count):
            logits = runner.decode(0, [tokens[position]], [position])
        difference = (logits[0].float() - expected).norm() / expected.norm()
        agrees = bool(difference < _PROBE_TOLERANCE)
    except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
        agrees, problem = False, f"its forward fails on the engine's cache: {_first_line(error)}"
    if not agrees:
        raise ConfigurationError(
            f"The engine does not support the model {name} ({model.config.model_type}): {problem}. "
            "Use a plain decoder (Llama, SmolLM2, Qwen2.5, Qwen3), or an upstream engine."
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and remarks off the terminal while it loads."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
