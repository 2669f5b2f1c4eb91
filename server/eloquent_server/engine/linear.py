"""Linear layers whose weights are laid out once for oneDNN: 2 to 3 times faster on CPU.

Linears that take the same input are joined into one product, which reads weights faster than
several small ones do. The results are the same up to rounding. The two operators are private to
torch (its compiler uses them), so they are tried before use.
"""

import mmap
from collections.abc import Callable, Sequence

import torch
from torch import nn

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
SAME_INPUT = (QKV, GATE_UP)
"Names of linears beside each other, in transformers' decoders, that take the same input."

Product = Callable[[torch.Tensor], torch.Tensor]


class PrepackedLinear(nn.Module):
    """Stands in for an `nn.Linear` in inference on CPU; the weight is kept in oneDNN's layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._bias = None if linear.bias is None else linear.bias.detach().clone()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return `inputs @ weight.T + bias`; the last dimension is the feature's."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self._packed, self._bias, "none", [], ""
        )
        return output


class Part(nn.Module):
    """Stands in for one of several linears that were joined into one.

    `side_by_side` finds the whole. Called by itself, as by transformers' own forward, a part
    computes the whole and returns its share.
    """

    def __init__(self, whole: nn.Module, first: int, last: int) -> None:
        super().__init__()
        self.whole = whole
        self._first = first
        self._last = last

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the linear's outputs; the last dimension is the feature's."""
        outputs: torch.Tensor = self.whole(inputs)
        return outputs[..., self._first : self._last]


def side_by_side(owner: nn.Module, names: Sequence[str]) -> Product:
    """Return what computes the outputs of `owner`'s linears, one after another, joined or not.

    `names` are an entry of `SAME_INPUT`; outputs are side by side in the last dimension.
    """
    linears: list[nn.Module] = [getattr(owner, name) for name in names]
    wholes = {linear.whole if isinstance(linear, Part) else None for linear in linears}
    whole = wholes.pop()
    if whole is not None and not wholes:
        return whole
    return lambda inputs: torch.cat([linear(inputs) for linear in linears], dim=-1)


def prepacking_works(dtype: torch.dtype = torch.float32) -> bool:
    """Return whether this torch has the operators and they compute what `nn.Linear` computes."""
    linear = nn.Linear(64, 32, dtype=dtype)
    inputs = torch.randn(3, 1, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    most = 1e-4 if dtype == torch.float32 else 0.05
    try:
        with torch.inference_mode():
            return torch.allclose(PrepackedLinear(linear)(inputs), linear(inputs), atol=most)
    except (AttributeError, RuntimeError, TypeError):
        return False  # Another torch, or one built without oneDNN.


def prepack(model: nn.Module, *, join: bool = False) -> int:
    """Replace every `nn.Linear` below `model` by a prepacked one; see `replace_linears`."""
    return replace_linears(model, PrepackedLinear, join=join)


def replace_linears(
    model: nn.Module, make: Callable[[nn.Linear], nn.Module], *, join: bool = False
) -> int:
    """Replace every `nn.Linear` below `model` by what `make` makes of it; return how many.

    `join` makes one of those that `SAME_INPUT` names, for forwards that use `side_by_side`.
    Parameters that stay (embeddings, norms) are copied, so that the file they were mapped from
    can be unmapped.
    """
    count = 0
    for module in list(model.modules()):
        for names in SAME_INPUT if join else ():
            count += _join(module, names, make)
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, make(child))
                count += 1
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return count


def _join(module: nn.Module, names: Sequence[str], make: Callable[[nn.Linear], nn.Module]) -> int:
    """Replace the linears of these names by parts of one, if all are there; return how many."""
    children = dict(module.named_children())
    linears = [child for name in names if type(child := children.get(name)) is nn.Linear]
    weights: list[torch.Tensor] = [linear.weight.detach() for linear in linears]
    biases: list[torch.Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    if len(linears) < len(names) or len(biases) not in (0, len(names)):
        return 0
    outputs = sum(linear.out_features for linear in linears)
    joined = nn.Linear(linears[0].in_features, outputs, bias=bool(biases), device="meta")
    # From the system, to which it goes back after packing; malloc would keep a part of it.
    memory = mmap.mmap(-1, sum(weight.nbytes for weight in weights))
    rows = torch.frombuffer(memory, dtype=weights[0].dtype).view(outputs, -1)
    joined.weight = nn.Parameter(torch.cat(weights, out=rows), False)
    if biases:
        joined.bias = nn.Parameter(torch.cat(biases), False)
    whole = make(joined)
    first = 0
    for name, linear in zip(names, linears, strict=True):
        setattr(module, name, Part(whole, first, first + linear.out_features))
        first += linear.out_features
    return len(names)
