"""In which numbers the model's weights are: what is exact, what is fast, and how far off.

| precision | weights | activations, keys, values | greedy answers |
|---|---|---|---|
| `fp32` | float32, laid out for oneDNN | float32 | the same in any company |
| `bf16` | bfloat16, laid out for oneDNN | bfloat16 | within `REGRET_BOUND` |
| `int8` | int8, a scale per output | bfloat16 | within `REGRET_BOUND` |

Activations are never quantised: with a scale per tensor, one user's tokens would change another's
answer. On CUDA everything is bfloat16, in torch's own layout.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from eloquent.errors import ConfigurationError
from eloquent_server.engine.forward import is_plain_decoder
from eloquent_server.engine.linear import PrepackedLinear, prepacking_works, replace_linears

Precision = Literal["fp32", "bf16", "int8"]

REGRET_BOUND: dict[Precision, float] = {"fp32": 1e-3, "bf16": 0.3, "int8": 1.0}
"""By how much, in logits, a chosen token may fall short of the likeliest under a cold float32
forward of the same tokens; tests hold the precisions to it. 1.0: the token was at least 0.37 times
as likely as the best. Measured at worst, on tiny models and the embedded one: bf16 0.15, int8
0.68."""

TIER_REGRET_BOUND = 0.3
"The same for `--kv-tier int8` with float32 weights. Measured at worst: 0.11."

AUTO_MARGIN = 1.2
"A precision that is not exact must be so much faster than float32 for `auto` to take it."

_INT8_MOST_ROWS = 16
"torch's int8 kernel takes time by the row; beyond this, whole weights are made and multiplied."
_TRIAL_BYTES = 64 << 20
"Weights that a trial reads: more than caches hold, as a model's are."
_TRIAL_BATCHES = (1, 8)
_TRIAL_RUNS = 5


class Int8Linear(nn.Module):
    """Stands in for an `nn.Linear` in inference on CPU: int8 weights, bfloat16 activations.

    The kernel is torch's `_weight_int8pack_mm`; it is fast for bfloat16 only.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        # Divided by the scale as it is kept, so that its own rounding costs nothing.
        scale = (weight.abs().amax(dim=1).clamp_min(1e-8) / 127).bfloat16()
        self._scale = scale
        self._weight = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self._bias = None if linear.bias is None else linear.bias.detach().bfloat16()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return `inputs @ weight.T + bias`; the last dimension is the feature's."""
        rows = inputs.reshape(-1, self.in_features)
        if rows.shape[0] <= _INT8_MOST_ROWS:
            output = torch._weight_int8pack_mm(rows.contiguous(), self._weight, self._scale)
        else:
            output = (rows @ self._weight.bfloat16().t()) * self._scale
        if self._bias is not None:
            output = output + self._bias
        return output.view(*inputs.shape[:-1], self.out_features)


def int8_works() -> bool:
    """Return whether this torch has the int8 kernel and it computes what it should."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 32)
    inputs = torch.randn(3, 64, generator=generator).bfloat16()
    try:
        with torch.inference_mode():
            got = Int8Linear(linear)(inputs).float()
            return torch.allclose(got, linear(inputs.float()), atol=0.1)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False


def weights_dtype(precision: Precision) -> torch.dtype:
    """Return the type in which a model is loaded, and computes."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


def apply_precision(model: nn.Module, precision: Precision) -> bool:
    """Lay out the linear weights of a model on CPU, loaded in `weights_dtype`; False: it cannot be.

    It then runs all the same, slower.

    Raises:
        ConfigurationError: int8, and this torch lacks the kernel.
    """
    if precision == "int8":
        if not int8_works():
            raise ConfigurationError(
                "This torch has no int8 kernel for this processor. Use --precision fp32 or bf16."
            )
        replace_linears(model, Int8Linear, join=is_plain_decoder(model))
        return True
    if not prepacking_works(weights_dtype(precision)):
        return False
    replace_linears(model, PrepackedLinear, join=is_plain_decoder(model))
    return True


@dataclass(frozen=True, slots=True)
class Trial:
    """What `choose_precision` measured and took."""

    chosen: Precision
    step_ms: dict[Precision, float]
    "Reading a step's weights, the mean of a batch of 1 and of 8; milliseconds."

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:.1f} ms" for name, value in self.step_ms.items())
        exact = "" if self.chosen == "fp32" else "; for exact answers use --precision fp32"
        return f"Precision {self.chosen} (a step's weights: {figures}){exact}"


@torch.inference_mode()
def choose_precision(config: Any, *, clock: Callable[[], float] = time.perf_counter) -> Trial:
    """Measure a decode step's matrix products in each precision; takes a second or two.

    `config` is a model's, of transformers. The fastest wins, an inexact one by `AUTO_MARGIN`.
    """
    step_ms: dict[Precision, float] = {"fp32": _step_ms(config, "fp32", clock)}
    if prepacking_works(torch.bfloat16):
        step_ms["bf16"] = _step_ms(config, "bf16", clock)
    if int8_works():
        step_ms["int8"] = _step_ms(config, "int8", clock)
    return Trial(fastest(step_ms), step_ms)


def fastest(step_ms: dict[Precision, float]) -> Precision:
    """Return the fastest precision, or fp32 if none is faster by `AUTO_MARGIN`."""
    best = min(step_ms, key=lambda name: step_ms[name])
    return best if step_ms["fp32"] >= AUTO_MARGIN * step_ms[best] else "fp32"


def _step_ms(config: Any, precision: Precision, clock: Callable[[], float]) -> float:
    """Time one layer after another, then the head; copies of a layer stand in for the others."""
    hidden, inner = int(config.hidden_size), int(config.intermediate_size)
    shapes = [(hidden, hidden), (hidden, 2 * inner), (inner, hidden)]  # Gate and up are one.
    layer_bytes = sum(4 * rows * columns for rows, columns in shapes)
    layers = int(config.num_hidden_layers)
    copies = max(1, min(layers, _TRIAL_BYTES // layer_bytes))
    dtype = weights_dtype(precision)
    generator = torch.Generator().manual_seed(0)

    def made(inputs: int, outputs: int) -> nn.Module:
        linear = nn.Linear(inputs, outputs, bias=False, dtype=dtype)
        linear.weight.data.normal_(generator=generator)
        model = nn.Sequential(linear)
        apply_precision(model, precision)
        return model

    body = [made(*shape) for _ in range(copies) for shape in shapes]
    head = made(hidden, int(config.vocab_size))
    total_s = 0.0
    for batch in _TRIAL_BATCHES:
        inputs = {width: torch.ones(batch, width, dtype=dtype) for width in (hidden, inner)}
        work = [
            (module, inputs[width])
            for module, (width, _) in zip(body, shapes * copies, strict=True)
        ]
        total_s += _seconds(work, clock) * layers / copies
        total_s += _seconds([(head, inputs[hidden])], clock)
    return total_s * 1e3 / len(_TRIAL_BATCHES)


def _seconds(work: Sequence[tuple[nn.Module, torch.Tensor]], clock: Callable[[], float]) -> float:
    best = float("inf")
    for _ in range(_TRIAL_RUNS):
        started = clock()
        for module, inputs in work:
            module(inputs)
        best = min(best, clock() - started)
    return best


@torch.inference_mode()
def regrets(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """Return, for each of an answer's tokens, how far its logit is below the greatest.

    `model` is an exact one, of transformers; it computes prompt and answer in one cold forward.
    """
    ids = torch.tensor([[*prompt, *tokens]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    shortfalls: list[float] = (logits.max(dim=-1).values - chosen).tolist()
    return shortfalls
