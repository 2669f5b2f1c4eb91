"""Loading: a directory in the Hugging Face layout becomes a model ready for the engine."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from eloquent.errors import ConfigurationError
from eloquent_server.engine.attention import KvShape, Segment, UnsupportedAttentionError, install
from eloquent_server.engine.layouts import layout_for
from eloquent_server.engine.precision import (
    Precision,
    apply_precision,
    choose_precision,
    weights_dtype,
)
from eloquent_server.engine.runner import Runner

_log = logging.getLogger(__name__)

PRECISIONS = ("default", "auto", "fp32", "bf16", "int8")
DEFAULT_PRECISION = "default"

_PROBE_TOKENS = 8
_PROBE_TOLERANCE = 0.1
"Relative; rounding in bfloat16 is below it, another architecture's semantics far above."
_SAMPLED_WEIGHTS = 1024
"Of each tensor, for the fingerprint."
_FORWARD_VERSION = 2
"Of the fingerprint, too: raised when the forward rounds otherwise, so that stored keys miss."


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
    kv: KvShape
    "What a token's keys and values look like."
    vocab_tokens: int
    "Token ids are below this."
    precision: Precision = "fp32"
    "Of the weights; only fp32 is exact."
    fingerprint: bytes = b""
    "Tells models apart whose keys and values differ; the same at every start."
    temperature: float = 1.0
    top_p: float = 1.0
    "Sampling where a request names none: the model's `generation_config.json`, as far as it says."


def load(
    directory: Path,
    name: str,
    *,
    device: str = "auto",
    precision: str = DEFAULT_PRECISION,
    say: Callable[[str], None] = _log.info,
) -> LoadedModel:
    """Load a model. Takes a few seconds.

    `device` is "auto" (CUDA if present), "cpu" or "cuda"; `precision` one of `PRECISIONS`, where
    "default" is float32 on CPU and bfloat16 on CUDA, and "auto" on CPU measures which is fastest
    and tells `say`.

    Raises:
        ConfigurationError: the device is not there, the files cannot be read, or the engine does
            not support the model.
    """
    chosen = _choose_device(device)
    if precision not in PRECISIONS:
        raise ConfigurationError(
            f"There is no precision {precision!r}: choose {', '.join(PRECISIONS)}."
        )
    torch.set_num_threads(engine_threads())
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
            refuse_unsupported(config, name)
            weights = _choose_precision(precision, chosen, config, say)
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            _refuse_tokenizer(tokenizer, name)
            model = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=weights_dtype(weights),
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
    fingerprint = _fingerprint(model) + weights.encode()
    if chosen == "cpu" and not apply_precision(model, weights):
        _log.warning("This torch cannot prepack weights; the model runs at half the speed")
    return prepare(model, tokenizer, name, fingerprint=fingerprint, precision=weights)


def prepare(
    model: Any,
    tokenizer: Any,
    name: str,
    *,
    fingerprint: bytes | None = None,
    precision: Precision = "fp32",
) -> LoadedModel:
    """Check a model in memory, give it our attention, and gather what the engine needs to know.

    `fingerprint` is taken from the weights if it is not given; prepacked weights show too little.

    Raises:
        ConfigurationError: the engine does not support the model.
    """
    refuse_unsupported(model.config, name)
    _refuse_tokenizer(tokenizer, name)
    # Settings for training batches: here nothing may be cut or filled up.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if fingerprint is None:
        fingerprint = _fingerprint(model)
    shape = _kv_shape(model)
    _probe(model, shape, name)
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        context_tokens=int(model.config.max_position_embeddings),
        end_tokens=_end_tokens(model, tokenizer),
        kv=shape,
        vocab_tokens=int(model.get_input_embeddings().num_embeddings),
        fingerprint=fingerprint,
        precision=precision,
        **_advised_sampling(model),
    )


def refuse_unsupported(config: Any, name: str) -> None:
    """Check a model's configuration against what the engine's key-value layout can do.

    Raises:
        ConfigurationError: the message names the property that is not supported.
    """
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    problems = {
        "an encoder": getattr(config, "is_encoder_decoder", False),
        "sliding-window attention": getattr(config, "sliding_window", None) is not None
        and getattr(config, "use_sliding_window", True),
        "chunked attention": getattr(config, "attention_chunk_size", None) is not None,
        "soft-capped attention": getattr(config, "attn_logit_softcapping", None) is not None,
        "attention sinks": config.model_type == "gpt_oss",
        # transformers takes the longest text of a forward: other turns would change an answer.
        f"rotary positions that depend on the text's length ({rotary})": rotary
        in ("dynamic", "longrope"),
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


def _choose_precision(
    asked: str, device: str, config: Any, say: Callable[[str], None]
) -> Precision:
    if device == "cuda":
        if asked not in ("default", "auto", "bf16"):
            raise ConfigurationError(
                f"On CUDA the engine runs in bf16 only, not in {asked}: leave --precision out, or "
                "use --device cpu."
            )
        return "bf16"
    if asked == "auto":
        trial = choose_precision(config)
        say(str(trial))
        return trial.chosen
    return "fp32" if asked == "default" else cast(Precision, asked)


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


def _kv_shape(model: Any) -> KvShape:
    config = model.config
    heads = int(config.num_attention_heads)
    return KvShape(
        layers=int(config.num_hidden_layers),
        heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        dtype=model.dtype,
    )


def _fingerprint(model: Any) -> bytes:
    """Digest the architecture and a sample of every weight.

    A sample suffices: models that were trained apart, however little, differ nearly everywhere.
    """
    description = f"{_FORWARD_VERSION} {model.config.to_json_string()}"
    digest = hashlib.blake2b(description.encode(), digest_size=16)
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLED_WEIGHTS)]
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.digest()


@torch.inference_mode()
def _probe(model: Any, shape: KvShape, name: str) -> None:
    """Compare a short text, packed in our cache, with the plain forward: they must agree."""
    count = min(_PROBE_TOKENS, int(model.config.max_position_embeddings))
    tokens = [(7 * i + 3) % model.config.vocab_size for i in range(count)]
    problem = "its logits through the engine's cache differ from its own"
    try:
        ids = torch.tensor([tokens], device=model.device)
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        install(model)
        device = torch.device(model.device)
        runner = Runner(model, layout_for(shape, device, rows=2, row_tokens=count))
        half = count // 2
        runner.run([Segment(0, 0, tokens[:half])])
        # Row 1 starts while row 0 decodes, then goes on in chunks.
        got = runner.run([Segment(1, 0, tokens[:1]), Segment(0, half, tokens[half : half + 1])])
        for position in range(half + 1, count):
            got = runner.run(
                [
                    Segment(0, position, tokens[position : position + 1]),
                    Segment(1, position - half, tokens[position - half : position - half + 1]),
                ]
            )
        last = [(expected[-1], got[0][-1]), (expected[count - 1 - half], got[1][-1])]
        agrees = all(
            bool((mine.float() - its).norm() / its.norm() < _PROBE_TOLERANCE) for its, mine in last
        )
    except UnsupportedAttentionError as error:
        agrees, problem = False, str(error)
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
