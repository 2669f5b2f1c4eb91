"""Linear layers whose weights are laid out once for oneDNN: 2 to 3 times faster on CPU.

The results are the same up to rounding. The two operators are private to torch (its compiler uses
them), so they are tried before use.
"""

from collections.abc import Callable

import torch
from torch import nn


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


def prepack(model: nn.Module) -> int:
    """Replace every `nn.Linear` below `model` by a prepacked one; see `replace_linears`."""
    return replace_linears(model, PrepackedLinear)


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> int:
    """Replace every `nn.Linear` below `model` by what `make` makes of it; return how many.

    Parameters that stay (embeddings, norms) are copied, so that the file they were mapped from
    can be unmapped.
    """
    count = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, make(child))
                count += 1
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return count
