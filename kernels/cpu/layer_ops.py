"""The compiled layer operations: ``src/layer_ops.h`` behind ``kernels.layer_ops``."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor
from torch.nn import functional

from kernels.cpu.layer_library import (
    DecoderLayer,
    GateCall,
    HeadsCall,
    NormCall,
    NormWeights,
    ProductCall,
    ProductWeights,
    UnpackCall,
    load_layer_library,
)
from kernels.cpu.library import check_status
from kernels.cpu.pages import HugePages
from kernels.layer_ops import (
    Activation,
    GateOp,
    HeadNorms,
    HeadsOp,
    LayerOp,
    LayerOps,
    LayerParts,
    LinearOp,
    NormOp,
    Rotation,
    RowReadingLinearOp,
    TorchLayerOps,
)
from kernels.layer_stack import LayerStack, StackedLayer

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class CpuLayerOps(LayerOps):
    """C operations for tensors in host memory. Threads belong to the object; the GIL is released.

    Args:
        num_threads: that share a call's work, the caller's included.
    """

    name = "cpu"

    def __init__(self, num_threads: int = 1) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, got {num_threads}")
        library = load_layer_library()
        self.context = library.layer_ops_open(num_threads)
        if not self.context:
            raise MemoryError(f"no memory or no threads for {num_threads} threads")
        self.memory = HugePages()
        weakref.finalize(self, library.layer_ops_close, self.context).atexit = False

    @staticmethod
    def has(dtype: torch.dtype) -> bool:
        """Whether there are operations for tensors of this dtype."""
        return dtype in _DTYPES

    def panel_columns(self, dtype: torch.dtype) -> int:
        """Output features in a panel of packed weights; 0: there are no products, or torch has faster ones."""
        columns: int = load_layer_library().layer_ops_columns(self.context, _DTYPES[dtype])
        return columns

    def norm(self, weight: Tensor, eps: float, offset: float) -> NormOp:
        return _CpuNorm(self, weight, eps, offset)

    def heads(self, heads: int, head_dim: int, rotation: Rotation, norms: HeadNorms | None) -> HeadsOp:
        return _CpuHeads(self, heads, head_dim, rotation, norms)

    def gate(self, activation: Activation) -> GateOp:
        return _CpuGate(self, activation)

    def linear(self, weight: Tensor, bias: Tensor | None) -> LinearOp | None:
        _require(weight.dim() == 2 and weight.is_cpu and weight.dtype in _DTYPES, "weight must be [out, in] on the CPU")
        columns = self.panel_columns(weight.dtype)
        if not columns or weight.shape[1] * weight.element_size() % 4:
            return TorchLayerOps().linear(weight, bias)
        return _CpuLinear(self, weight, bias, columns)

    def layer(self, parts: LayerParts) -> LayerOp | None:
        norms = (parts.before_attention, parts.behind_attention, parts.before_mlp, parts.behind_mlp)
        products = (parts.qkv, parts.output, parts.gate_up, parts.down)
        ours = all(isinstance(op, _CpuLinear) for op in products) and all(
            isinstance(op, _CpuNorm | None) for op in norms
        )
        if not ours or not isinstance(parts.heads, _CpuHeads | None):
            return None
        assert isinstance(parts.down, _CpuLinear)
        if parts.down.in_features % parts.down.columns:  # gate and what it gates must begin with a panel
            return None
        return CpuLayer(self, parts)

    def stack(self, layers: Sequence[StackedLayer], q_heads: int, kv_heads: int) -> LayerStack | None:
        # Imported here: that module's stacks are made of this one's layers.
        from kernels.cpu.layer_stack import CpuLayerStack

        ops = [layer.op for layer in layers if isinstance(layer.op, CpuLayer)]
        if not ops or len(ops) < len(layers) or len({op.row_shape for op in ops}) > 1:
            return None
        _, _, qkv_columns, attended = ops[0].row_shape
        if attended % q_heads or qkv_columns != attended // q_heads * (q_heads + 2 * kv_heads):
            return None
        return CpuLayerStack(self, ops, [layer.attention for layer in layers], q_heads, kv_heads)


class _CpuNorm(NormOp):
    def __init__(self, ops: CpuLayerOps, weight: Tensor, eps: float, offset: float) -> None:
        _require(weight.dim() == 1 and weight.is_cpu, "weight must be [dim] on the CPU")
        self._ops = ops  # keeps the context alive
        self._function = load_layer_library().layer_ops_norm
        self.weight = weight.contiguous()
        self.weights = NormWeights(weight=self.weight.data_ptr(), eps=eps, offset=offset)
        self._call = NormCall(
            weight=self.weight.data_ptr(), dim=len(weight), dtype=_DTYPES[weight.dtype], eps=eps, offset=offset, scale=1
        )

    def __call__(self, x: Tensor) -> Tensor:
        self._call.delta = None
        return self._run(x.contiguous())

    def add(self, delta: Tensor, x: Tensor) -> Tensor:
        _require(delta.shape == x.shape and delta.is_contiguous(), "x and delta must have one shape, delta contiguous")
        self._check(delta)
        self._call.delta = self._call.sum = delta.data_ptr()
        return self._run(x.contiguous())

    def _run(self, x: Tensor) -> Tensor:
        self._check(x)
        out = torch.empty_like(x)
        call = self._call
        call.x = x.data_ptr()
        call.out = out.data_ptr()
        call.rows = x.numel() // call.dim
        self._function(self._ops.context, byref(call))
        return out

    def _check(self, x: Tensor) -> None:
        _require(x.shape[-1] == self._call.dim, "x must be [..., dim]")
        _require(x.dtype is self.weight.dtype and x.is_cpu, "x must have the weight's dtype and device")


class _CpuHeads(HeadsOp):
    def __init__(
        self, ops: CpuLayerOps, heads: int, head_dim: int, rotation: Rotation, norms: HeadNorms | None
    ) -> None:
        self._ops = ops
        self._function = load_layer_library().layer_ops_heads
        self.call = HeadsCall(heads=heads, head_dim=head_dim, rotation=rotation.value)
        self.width = heads * head_dim
        self.weight = None if norms is None else norms.weight.contiguous()
        if norms is not None and self.weight is not None:
            _require(self.weight.shape == (heads, head_dim), "weight must be [heads, head_dim]")
            self.call.weight = self.weight.data_ptr()
            self.call.eps, self.call.offset = norms.eps, norms.offset

    def __call__(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
        _require(x.dim() == 2 and x.shape[1] >= self.width and x.stride(1) == 1, "x must be [rows, heads * head_dim]")
        _require(x.dtype in _DTYPES and x.is_cpu, "x must be float32 or bfloat16, on the CPU")
        _require(self.weight is None or self.weight.dtype is x.dtype, "x must have the weight's dtype")
        call = self.call
        call.x = x.data_ptr()
        call.stride = x.stride(0)
        call.rows = len(x)
        call.dtype = _DTYPES[x.dtype]
        call.cos, call.sin, call.rotary_dim = angle_tables(cos, sin, x.dtype, len(x), call.head_dim)
        self._function(self._ops.context, byref(call))


class _CpuGate(GateOp):
    def __init__(self, ops: CpuLayerOps, activation: Activation) -> None:
        self._ops = ops
        self._function = load_layer_library().layer_ops_gate
        self._call = GateCall(activation=activation.value)

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        _require(gate.shape == up.shape and gate.stride() == up.stride(), "gate and up must have one shape and strides")
        _require(gate.dtype is up.dtype and gate.dtype in _DTYPES, "gate and up must be float32 or bfloat16")
        _require(gate.is_cpu and up.is_cpu and gate.stride(-1) == 1, "gate and up must be on the CPU")
        out = torch.empty(gate.shape, dtype=gate.dtype)
        call = self._call
        call.dim = gate.shape[-1]
        call.rows = gate.numel() // call.dim
        call.stride = gate.stride(-2) if gate.dim() > 1 else call.dim
        call.gate, call.up, call.out = gate.data_ptr(), up.data_ptr(), out.data_ptr()
        call.dtype = _DTYPES[gate.dtype]
        self._function(self._ops.context, byref(call))
        return out


class _CpuLinear(RowReadingLinearOp):
    """Attributes: columns: output features in a panel."""

    def __init__(self, ops: CpuLayerOps, weight: Tensor, bias: Tensor | None, columns: int) -> None:
        self._ops = ops
        self._function = load_layer_library().layer_ops_product
        self.out_features, self.in_features = weight.shape
        self.columns = columns
        self.panels = ops.memory.place(_panels(weight, columns))
        self.bias = None if bias is None else bias.detach().contiguous()
        _require(self.bias is None or self.bias.dtype is weight.dtype, "bias must have the weight's dtype")
        self.weights = ProductWeights(
            weight=self.panels.data_ptr(), bias=None if self.bias is None else self.bias.data_ptr()
        )
        self._call = ProductCall(
            weight=self.weights.weight,
            bias=self.weights.bias,
            in_features=self.in_features,
            columns=self.out_features,
            dtype=_DTYPES[weight.dtype],
            activation=-1,
            scale=1,
        )

    def __call__(self, x: Tensor) -> Tensor:
        _require(x.shape[-1] == self.in_features, "x must be [..., in_features]")
        _require(x.dtype is self.panels.dtype and x.is_cpu, "x must have the weight's dtype and device")
        x = x.contiguous()
        out = torch.empty((*x.shape[:-1], self.out_features), dtype=x.dtype)
        call = self._call
        call.x = x.data_ptr()
        call.out = out.data_ptr()
        call.rows = x.numel() // self.in_features
        check_status(self._function(self._ops.context, byref(call)))
        return out

    def weight_rows(self, indices: Tensor) -> Tensor:
        indices = indices.contiguous()
        _require(indices.dtype is torch.int64 and indices.is_cpu, "indices must be int64 on the CPU")
        out = torch.empty((*indices.shape, self.in_features), dtype=self.panels.dtype)
        call = UnpackCall(
            weight=self.weights.weight,
            indices=indices.data_ptr(),
            out=out.data_ptr(),
            rows=indices.numel(),
            in_features=self.in_features,
            columns=self.out_features,
            dtype=_DTYPES[out.dtype],
        )
        check_status(load_layer_library().layer_ops_unpack(self._ops.context, byref(call)))
        return out


class CpuLayer(LayerOp):
    def __init__(self, ops: CpuLayerOps, parts: LayerParts) -> None:
        products = [parts.qkv, parts.output, parts.gate_up, parts.down]
        qkv, output, gate_up, down = (op for op in products if isinstance(op, _CpuLinear))
        heads = parts.heads
        assert isinstance(heads, _CpuHeads | None)
        hidden, dtype = qkv.in_features, qkv.panels.dtype
        shapes = [(op.in_features, op.out_features) for op in (output, gate_up, down)]
        _require(
            [out for _, out in shapes] == [hidden, 2 * down.in_features, hidden] and gate_up.in_features == hidden,
            f"the products' shapes do not fit each other: hidden {hidden}, others [in, out] {shapes}",
        )
        _require(all(op.panels.dtype is dtype for op in (output, gate_up, down)), "products must have one dtype")
        self._parts = parts  # keeps the weights alive
        self._ops = ops
        self.dtype = dtype
        self._hidden = hidden
        self._library = load_layer_library()
        self.layer = DecoderLayer(
            qkv=qkv.weights,
            output=output.weights,
            gate_up=gate_up.weights,
            down=down.weights,
            hidden=hidden,
            qkv_columns=qkv.out_features,
            attended=output.in_features,
            inner=down.in_features,
            activation=parts.activation.value,
            dtype=_DTYPES[dtype],
            multiplier=parts.multiplier,
        )
        for name in ("before_attention", "behind_attention", "before_mlp", "behind_mlp"):
            norm = getattr(parts, name)
            if norm is not None:
                _require(norm.weight.dtype is dtype and len(norm.weight) == hidden, f"{name} must be of [hidden]")
                setattr(self.layer, name, norm.weights)
        if heads is not None:
            _require(heads.width <= qkv.out_features, "there are more heads than q, k and v have elements")
            _require(heads.weight is None or heads.weight.dtype is dtype, "head norms must have the products' dtype")
            self.layer.heads = heads.call
            self.layer.heads.dtype = _DTYPES[dtype]

    def begin(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        rows = self.rows(x)
        layer = self.layer
        angles = angle_tables(cos, sin, x.dtype, rows, layer.heads.head_dim)
        qkv = torch.empty((rows, layer.qkv_columns), dtype=x.dtype)
        check_status(
            self._library.layer_ops_begin(self._ops.context, byref(layer), rows, x.data_ptr(), *angles, qkv.data_ptr())
        )
        return qkv

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        rows = self.rows(x)
        layer = self.layer
        _require(
            attended.numel() == rows * layer.attended and attended.is_contiguous() and attended.dtype is x.dtype,
            "attended must be [rows, q_heads, head_dim] in x's dtype, contiguous",
        )
        y = torch.empty_like(x)
        check_status(
            self._library.layer_ops_finish(
                self._ops.context, byref(layer), rows, x.data_ptr(), attended.data_ptr(), y.data_ptr()
            )
        )
        return y

    @property
    def row_shape(self) -> tuple[torch.dtype, int, int, int]:
        """Dtype, and columns of the input, of q, k and v, and of what is attended; layers that agree share memory."""
        return self.dtype, self._hidden, self.layer.qkv_columns, self.layer.attended

    def rows(self, x: Tensor) -> int:
        """Of a tensor [..., hidden].

        Raises: ValueError: it is not one that the layer computes with.
        """
        _require(x.shape[-1] == self._hidden and x.is_contiguous(), "x must be [..., hidden], contiguous")
        _require(x.dtype is self.dtype and x.is_cpu, "x must have the layer's dtype and device")
        return x.numel() // self._hidden


def _panels(weight: Tensor, columns: int) -> Tensor:
    """[out, in] as panels: [panels, in / 2, columns, 2] of bfloat16, [panels, in, columns, 1] of float32; a view."""
    out_features, in_features = weight.shape
    panels, pair = -(-out_features // columns), 4 // weight.element_size()
    filled = functional.pad(weight.detach(), (0, 0, 0, panels * columns - out_features))
    return filled.view(panels, columns, in_features // pair, pair).permute(0, 2, 1, 3)


def angle_tables(
    cos: Tensor | None, sin: Tensor | None, dtype: torch.dtype, rows: int, head_dim: int
) -> tuple[int | None, int | None, int]:
    """Pointers to the tables, and their width."""
    if cos is None or sin is None:
        return None, None, 0
    width = cos.shape[-1]
    _require(cos.dtype is dtype and sin.dtype is dtype and cos.is_cpu and sin.is_cpu, "cos and sin must have x's dtype")
    _require(cos.is_contiguous() and sin.is_contiguous(), "cos and sin must be contiguous")
    _require(cos.numel() == sin.numel() == rows * width, "cos and sin must have an angle for each row")
    _require(width <= head_dim and width % 2 == 0, "cos and sin must have an even width of at most head_dim")
    return cos.data_ptr(), sin.data_ptr(), width


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
