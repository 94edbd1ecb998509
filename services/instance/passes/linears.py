"""Linear layers: those that are given the same tensor become one matrix product, and weights are packed for the CPU.

``fuse`` stacks the weights of, say, q_proj, k_proj and v_proj. The module keeps its three attributes: each answers its
columns of the one product, which is computed when the first of them is called. So no code that calls them changes.

``pack`` brings weights into the order in which matrix products read them, and gives the plain ones up. An embedding
that shares the output layer's weights reads its rows from the packed ones, where that can be done (not from oneDNN's),
and otherwise keeps the plain ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from kernels.layer_ops import LayerOps, LinearOp, RowReadingLinearOp
from services.instance.passes.check import TOLERANCE, reproduces, typical_error
from services.instance.passes.replace import replace_modules
from services.instance.passes.trace import Call, LayerTrace

_CHECKED_ROWS = 16


class FusedLinear(nn.Module):
    """Several linear layers of one input as one.

    Args:
        linear: their weights, stacked; [sum of sizes, in_features].
    """

    def __init__(self, linear: nn.Linear, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear: nn.Module = linear
        self.sizes = tuple(sizes)
        self._input: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()
        self._missing: set[int] = set()

    @property
    def holds_nothing(self) -> bool:
        """Whether no input and no product is kept."""
        return self._input is None and not self._parts

    def part(self, index: int, x: Tensor) -> Tensor:
        """Columns of the product with x, [..., sizes[index]]; held only until each part has been asked for."""
        if x is not self._input:
            self._input = x
            self._parts = self.linear(x).split(self.sizes, dim=-1)
            self._missing = set(range(len(self.sizes)))
        part = self._parts[index]
        self._missing.discard(index)
        if not self._missing:
            self._input, self._parts = None, ()
        return part


class LinearPart(nn.Module):
    """One of the layers in a ``FusedLinear``."""

    def __init__(self, fused: FusedLinear, index: int) -> None:
        super().__init__()
        self.fused = fused
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return self.fused.part(self.index, x)


class PackedLinear(nn.Module):
    """A linear layer whose weights lie in the order in which they are read."""

    def __init__(self, op: LinearOp, in_features: int, out_features: int) -> None:
        super().__init__()
        self.op = op
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class PackedEmbedding(nn.Module):
    """The embedding that shares a packed linear layer's weights."""

    def __init__(self, op: RowReadingLinearOp) -> None:
        super().__init__()
        self._op = op

    def forward(self, token_ids: Tensor) -> Tensor:
        return self._op.weight_rows(token_ids)


def fuse(layers: Sequence[LayerTrace]) -> int:
    """Fuses what can be; answers how many matrix products are gone."""
    gone = 0
    for layer in layers:
        for calls in _siblings(layer):
            linears = [call.module for call in calls if isinstance(call.module, nn.Linear)]
            fused = FusedLinear(stacked(linears), [linear.out_features for linear in linears])
            for index, call in enumerate(calls):
                call.put(LinearPart(fused, index))
            if reproduces(layer):
                gone += len(calls) - 1
            else:
                for call in calls:
                    call.put(call.module)
    return gone


def whole(parts: Sequence[Call]) -> nn.Module | None:
    """The one product whose parts these layers now are, in this order; None if they are not."""
    now = [call.current for call in parts]
    fused = now[0].fused if isinstance(now[0], LinearPart) else None
    if not isinstance(fused, FusedLinear) or len(fused.sizes) != len(parts):
        return None
    whole = all(isinstance(part, LinearPart) and part.fused is fused and part.index == i for i, part in enumerate(now))
    return fused.linear if whole else None


def _siblings(layer: LayerTrace) -> list[list[Call]]:
    """Calls of plain linear layers that one module gave the same tensor."""
    called = Counter(call.module for call in layer.calls)
    groups: dict[tuple[nn.Module, int, torch.dtype], list[Call]] = {}
    for call in layer.calls:
        if is_plain_linear(call.module) and called[call.module] == 1:
            groups.setdefault((call.parent, id(call.input), call.module.weight.dtype), []).append(call)
    return [group for group in groups.values() if len(group) > 1]


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Not a subclass (LoRA, quantised layers, parametrised ones), and nobody listens to its calls or replaces them."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    return not module._forward_hooks and not module._forward_pre_hooks


def stacked(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One layer with the outputs of all; a missing bias is zero."""
    with torch.device("meta"):
        stacked = nn.Linear(linears[0].in_features, sum(linear.out_features for linear in linears), bias=False)
    stacked.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    if any(linear.bias is not None for linear in linears):
        biases: list[Tensor] = [
            linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears
        ]
        stacked.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return stacked


def pack(root: nn.Module, layers: Sequence[LayerTrace], ops: LayerOps) -> int:
    """Packs the plain linear layers of a model; answers how many."""
    embedded = {id(module.weight) for module in root.modules() if isinstance(module, nn.Embedding)}
    shared: dict[int, PackedLinear] = {}  # by id of the weight

    def replacement(module: nn.Module) -> nn.Module | None:
        new = _packed(module, ops) if is_plain_linear(module) else None
        if new is not None and id(module.weight) in embedded:
            shared[id(module.weight)] = new
        return new

    def reader(module: nn.Module) -> nn.Module | None:
        linear = shared.get(id(module.weight)) if type(module) is nn.Embedding and module.max_norm is None else None
        op = None if linear is None else linear.op
        return PackedEmbedding(op) if isinstance(op, RowReadingLinearOp) else None

    count = replace_modules(root, layers, replacement)
    replace_modules(root, (), reader)
    return count


@torch.inference_mode()
def _packed(linear: nn.Linear, ops: LayerOps) -> PackedLinear | None:
    """None where there is no packed layer that computes the same."""
    if linear.weight.dtype not in TOLERANCE:
        return None
    try:
        op = ops.linear(linear.weight, linear.bias)
    except RuntimeError:  # a shape that the library does not take
        return None
    if op is None:
        return None
    x = torch.randn(_CHECKED_ROWS, linear.in_features, generator=torch.Generator().manual_seed(0)).to(linear.weight)
    errors = [typical_error(op(rows), linear(rows)) for rows in (x[:1], x)]
    if not all(error <= TOLERANCE[x.dtype] for error in errors):
        return None
    return PackedLinear(op, linear.in_features, linear.out_features)
