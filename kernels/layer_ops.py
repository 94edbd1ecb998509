"""What a decoder layer computes beside attention: matrix products, norms, rotary embedding, gated activation.

An operation is prepared once, with its weights and constants, and called once per step and layer. Sums run in float32
and a result is rounded once, whatever the dtype. Two operations of one maker can be parts of a third: a ``LayerOp`` is
all of a layer before attention, and all behind it. The classes here compute with torch, on any device; they are also
what compiled ones are tested against. ``load`` chooses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from kernels.layer_stack import LayerStack, StackedLayer

LayerAngles = tuple[Tensor, Tensor] | tuple[None, None]  # cos and sin, [..., rotary_dim]; None: no rotation


class Rotation(Enum):
    """Which elements of a head turn together, and where cosine and sine of their angle stand in the tables.

    With tables of n entries: HALVES turns i and i + n/2 (angle at i and at i + n/2), PAIRS 2i and 2i + 1 (angle at 2i),
    PAIRS_SHORT 2i and 2i + 1 (angle at i). Elements of a head beyond n stay as they are.
    """

    HALVES = 0
    PAIRS = 1
    PAIRS_SHORT = 2


class Activation(Enum):
    SILU = 0
    GELU_TANH = 1


class NormOp(ABC):
    """norm(x) = x / sqrt(mean(x**2) + eps) * (weight + offset) over the last dimension."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., dim]; answers a new tensor of the same shape and dtype."""

    @abstractmethod
    def add(self, delta: Tensor, x: Tensor) -> Tensor:
        """Adds x to delta, in place, and answers norm(delta). Both [..., dim], contiguous."""


class HeadsOp(ABC):
    """Normalises each head, if it has a norm, then rotates it."""

    @abstractmethod
    def __call__(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
        """In place.

        Args:
            x: [rows, heads * head_dim or more], contiguous in the last dimension; what is beyond the heads stays.
            cos, sin: [..., rotary_dim] in x's dtype, contiguous, an angle for each row; None: no rotation.
        """


class GateOp(ABC):
    """activation(gate) * up."""

    @abstractmethod
    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate, up: [..., dim], contiguous in the last dimension, equal strides; answers a new, contiguous tensor."""


class LinearOp(ABC):
    """x weight^T + bias, with weights in an order of its own."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., in]; answers a new tensor [..., out]."""


class RowReadingLinearOp(LinearOp):
    """One whose order of weights is known, so that an embedding can share them."""

    @abstractmethod
    def weight_rows(self, indices: Tensor) -> Tensor:
        """Rows of the weight, as an embedding reads them: [...] int64 to [..., in]."""


class LayerOp(ABC):
    """A decoder layer without its attention."""

    @abstractmethod
    def begin(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """q, k and v side by side, ready for attention: [rows, all heads * head_dim].

        Args:
            x: [..., hidden], rows in all; contiguous.
            cos, sin: [..., rotary_dim] as in ``HeadsOp``; None: no rotation.
        """

    @abstractmethod
    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's output in x's shape, a new tensor.

        Args:
            x: what ``begin`` was given.
            attended: [rows, q_heads, head_dim], contiguous.
        """


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """One norm for each head.

    Attributes:
        weight: [heads, head_dim].
        offset: added to the weight.
    """

    weight: Tensor
    eps: float
    offset: float


@dataclass(frozen=True, slots=True)
class LayerParts:
    """x += multiplier * norm(attention(norm(x))), then x += multiplier * norm(mlp(norm(x))); norms may be None.

    Attributes:
        heads: for those of q and k; None: they stay as they are.
        gate_up: its outputs are those of the gate, then those of what it gates.
    """

    before_attention: NormOp | None
    qkv: LinearOp
    heads: HeadsOp | None
    output: LinearOp
    behind_attention: NormOp | None
    before_mlp: NormOp | None
    gate_up: LinearOp
    activation: Activation
    down: LinearOp
    behind_mlp: NormOp | None
    multiplier: float


class LayerOps(ABC):
    """Makes operations for tensors of one dtype on one device. One object serves one thread."""

    name: str

    @abstractmethod
    def norm(self, weight: Tensor, eps: float, offset: float) -> NormOp:
        """weight: [dim]; offset: added to it (some models store the weight minus one)."""

    @abstractmethod
    def heads(self, heads: int, head_dim: int, rotation: Rotation, norms: HeadNorms | None) -> HeadsOp: ...

    @abstractmethod
    def gate(self, activation: Activation) -> GateOp: ...

    @abstractmethod
    def linear(self, weight: Tensor, bias: Tensor | None) -> LinearOp | None:
        """weight: [out, in], not needed afterwards; bias: [out]. None: nothing is gained over plain weights."""

    @abstractmethod
    def layer(self, parts: LayerParts) -> LayerOp | None:
        """None: nothing is gained over the parts one by one, or there is no such operation for these."""

    def stack(self, layers: Sequence[StackedLayer], q_heads: int, kv_heads: int) -> LayerStack | None:
        """None: nothing is gained over the layers one by one."""
        return None


_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: functional.silu,
    Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
}


class TorchLayerOps(LayerOps):
    """Plain torch."""

    name = "torch"

    def norm(self, weight: Tensor, eps: float, offset: float) -> NormOp:
        return _TorchNorm(weight, eps, offset)

    def heads(self, heads: int, head_dim: int, rotation: Rotation, norms: HeadNorms | None) -> HeadsOp:
        return _TorchHeads(heads, head_dim, rotation, norms)

    def gate(self, activation: Activation) -> GateOp:
        return _TorchGate(activation)

    def linear(self, weight: Tensor, bias: Tensor | None) -> LinearOp | None:
        return _OneDnnLinear(weight, bias) if weight.is_cpu and _OneDnnLinear.is_available(weight.dtype) else None

    def layer(self, parts: LayerParts) -> LayerOp | None:
        return None


class _TorchNorm(NormOp):
    def __init__(self, weight: Tensor, eps: float, offset: float) -> None:
        self._weight = weight
        self._eps = eps
        self._offset = offset

    def __call__(self, x: Tensor) -> Tensor:
        return _norm(x, self._weight, self._eps, self._offset).to(x.dtype)

    def add(self, delta: Tensor, x: Tensor) -> Tensor:
        return self(delta.add_(x))


class _TorchHeads(HeadsOp):
    def __init__(self, heads: int, head_dim: int, rotation: Rotation, norms: HeadNorms | None) -> None:
        self._heads = heads
        self._head_dim = head_dim
        self._rotation = rotation
        self._norms = norms

    def __call__(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
        heads = x[:, : self._heads * self._head_dim].view(len(x), self._heads, self._head_dim)
        if self._norms is not None:
            heads.copy_(_norm(heads, self._norms.weight, self._norms.eps, self._norms.offset))
        if cos is None or sin is None:
            return
        cos, sin = cos.flatten(0, -2), sin.flatten(0, -2)
        n = cos.shape[1]
        turned = heads[..., :n].float()
        c, s = (self._angles(table)[:, None] for table in (cos, sin))
        if self._rotation is Rotation.HALVES:
            a, b = turned.chunk(2, dim=-1)
            across = torch.cat([-b, a], dim=-1)
        else:
            a, b = turned[..., 0::2], turned[..., 1::2]
            across = torch.stack([-b, a], dim=-1).flatten(-2)
        heads[..., :n] = turned * c + across * s

    def _angles(self, table: Tensor) -> Tensor:
        """[rows, n] float32: for each element that turns."""
        table = table.float()
        if self._rotation is Rotation.HALVES:
            return table
        each = table[:, 0::2] if self._rotation is Rotation.PAIRS else table[:, : table.shape[1] // 2]
        return each.repeat_interleave(2, dim=1)


class _TorchGate(GateOp):
    def __init__(self, activation: Activation) -> None:
        self._function = _FUNCTIONS[activation]

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return (self._function(gate.float()) * up.float()).to(gate.dtype)


class _OneDnnLinear(LinearOp):
    """oneDNN's kernels, with weights in their order, which is the same for any number of rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self._bias = None if bias is None else bias.detach()

    @staticmethod
    def is_available(dtype: torch.dtype) -> bool:
        """Newer versions of torch have it; of bfloat16 for some processors (not those with AVX2 alone)."""
        operators = torch.ops.mkldnn
        if not hasattr(operators, "_reorder_linear_weight") or not hasattr(operators, "_linear_pointwise"):
            return False
        return dtype is not torch.bfloat16 or bool(operators._is_mkldnn_bf16_supported())

    def __call__(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return product


def _norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """float32."""
    exact = x.float()
    scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    return exact * scale * (weight.float() + offset)


def load(device: str | torch.device, dtype: torch.dtype, num_threads: int = 1) -> LayerOps:
    """The best there is for tensors of this dtype on this device; one object per thread that computes.

    Args:
        num_threads: that share a call's work, the caller's included; torch has its own setting.
    """
    # Imported here: that module implements what this one defines.
    from kernels.cpu.layer_ops import CpuLayerOps
    from kernels.cpu.library import find_library

    if torch.device(device).type == "cpu" and CpuLayerOps.has(dtype) and find_library() is not None:
        return CpuLayerOps(num_threads)
    return TorchLayerOps()
