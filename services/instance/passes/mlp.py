"""Gated MLPs, down(activation(gate(x)) * up(x)), become two matrix products and one operation between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.layer_ops import Activation, LayerOps, TorchLayerOps
from services.instance.passes.check import TOLERANCE, agree, typical_error
from services.instance.passes.linears import whole
from services.instance.passes.trace import Call, LayerTrace, same


class GatedMlp(nn.Module):
    """The module's input and output are [..., hidden].

    Args:
        gate_up: answers gate and up side by side, [..., 2 * inner].
        gate_first: which of the two comes first.
    """

    def __init__(
        self, gate_up: nn.Module, gate_first: bool, activation: Activation, down: nn.Module, ops: LayerOps
    ) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.gate_first = gate_first
        self.activation = activation
        self.down = down
        self._op = ops.gate(activation)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.gate_up(x).chunk(2, dim=-1)
        gate, up = (first, second) if self.gate_first else (second, first)
        answer: Tensor = self.down(self._op(gate, up))
        return answer


def fuse_mlps(layers: Sequence[LayerTrace], ops: LayerOps) -> int:
    """Replaces gated MLPs whose gate and up are one matrix product; answers how many."""
    count = 0
    for layer in layers:
        for call in layer.calls:
            mlp = _recognised(layer, call, ops)
            if mlp is not None and agree(call.current, mlp, call):
                call.put(mlp)
                count += 1
    return count


def _recognised(layer: LayerTrace, part: Call, ops: LayerOps) -> GatedMlp | None:
    """A part of three products (two, if gate and up are one already) and an activation of the gate's output."""
    leaves = layer.leaves(part)
    linears = [call for call in leaves if isinstance(call.module, nn.Linear)]
    others = [call for call in leaves if call not in linears]
    if len(linears) not in (2, 3) or len(others) != 1:
        return None
    down = next((call for call in linears if same(call.output, part.output)), None)
    inputs = [call for call in linears if call is not down]
    activation = _activation(others[0])
    if down is None or activation is None or not all(same(call.input, part.input) for call in inputs):
        return None
    if len(inputs) == 1:
        gate_up, size = inputs[0].current, inputs[0].output.shape[-1] // 2
        starts = [inputs[0].output.data_ptr() + index * size * part.input.element_size() for index in (0, 1)]
    else:
        fused = whole(inputs)
        if fused is None:
            return None
        gate_up, starts = fused, [call.output.data_ptr() for call in inputs]
    if others[0].input.data_ptr() not in starts:
        return None
    gate_first = others[0].input.data_ptr() == starts[0]
    return GatedMlp(gate_up, gate_first, activation, down.current, ops)


@torch.inference_mode()
def _activation(call: Call) -> Activation | None:
    """Which activation a module computes. Compared in float32: some differ by less than bfloat16 shows."""
    if next(call.module.parameters(), None) is not None:
        return None
    x = torch.linspace(-30, 30, 1201, device=call.input.device)[None]
    try:
        answer = call.module(x)
    except (RuntimeError, TypeError):
        return None
    ops = TorchLayerOps()
    for activation in Activation:
        if typical_error(answer, ops.gate(activation)(x, torch.ones_like(x))) <= TOLERANCE[torch.float32]:
            return activation
    return None
