"""RMS norms of any name become one operation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels.layer_ops import LayerOps, NormOp, TorchLayerOps
from services.instance.passes.check import TOLERANCE, typical_error

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
_MAGNITUDES = (1e-3, 1.0, 30.0)  # of the rows compared: at the smallest, eps decides


class RmsNorm(nn.Module):
    """x / sqrt(mean(x**2) + eps) * (weight + offset).

    Attributes:
        op: the operation, for who can use more of it.
    """

    def __init__(self, op: NormOp, weight: Tensor, eps: float, offset: float) -> None:
        super().__init__()
        self.op = op
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


@torch.inference_mode()
def recognised(module: nn.Module, ops: LayerOps, dtype: torch.dtype) -> nn.Module | None:
    """The same norm as one operation; None where the module is no RMS norm for activations of this dtype."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    eps = next((getattr(module, name) for name in _EPS_NAMES if isinstance(getattr(module, name, None), float)), None)
    is_leaf = next(module.children(), None) is None and not module._forward_hooks and not module._forward_pre_hooks
    if len(parameters) != 1 or weight is None or weight.dim() != 1 or eps is None or not is_leaf:
        return None
    if weight.dtype != dtype or isinstance(module, RmsNorm):
        return None
    exact = copy.deepcopy(module).float()
    for offset in (0.0, 1.0):
        formula = TorchLayerOps().norm(weight.float(), eps, offset)
        norm = RmsNorm(ops.norm(weight, eps, offset), weight, eps, offset)
        if _equal(exact, formula, weight.float()) and _equal(module, norm, weight):
            return norm
    return None


def _equal(module: nn.Module, norm: Callable[[Tensor], Tensor], weight: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    for magnitude in _MAGNITUDES:
        rows = (torch.randn(8, len(weight), generator=generator) * magnitude).to(weight)
        if not typical_error(norm(rows), module(rows)) <= TOLERANCE[weight.dtype]:
            return False
    return True
